"""Lemma 1 of the paper, and where it does not hold.

The paper states that s_E falls strictly in λ on (0, 2/η) for every E ≥ 1. It is constant for E = 1 and rises again
near 2/η for odd E ≥ 3 (left, middle). With --run also the damping of real branches along the top Hessian eigenvectors,
beside the lemma's prediction (right); the lemma is about gradient descent on a quadratic, a branch is trained by AdamW
on mini-batches.

    python analysis/lemma1.py --run runs/quickstart-compare --out figures
"""

from motkit.analysis import lemma1
from motkit.analysis.command import figure_command
from motkit.analysis.landscape import Points
from motkit.analysis.runs import open_runs


def compute(runs, out):
    tables = lemma1.compute_theory()
    if runs:
        tables["branch"] = lemma1.compute_branch(open_runs(runs).main, Points(out / "lemma1.points.jsonl"))
    return tables


main = figure_command("lemma1", __doc__, compute, lemma1.draw_lemma1, needs_run=False)

if __name__ == "__main__":
    main()
