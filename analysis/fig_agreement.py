"""Evidence for consensus, which the paper has not: do the branches agree, and what does the merge keep?

Cosine and sign agreement of the branches' task vectors by round and by layer, the merged update beside theirs, and the
loss of every branch on every teacher's held-out traces before and after the merge.

    python analysis/fig_agreement.py --run runs/quickstart-compare --out figures
"""

from motkit.analysis import agreement
from motkit.analysis.command import figure_command
from motkit.analysis.runs import open_runs


def compute(runs, out):
    return agreement.compute(open_runs(runs).main)


main = figure_command("fig_agreement", __doc__, compute, agreement.draw_agreement)

if __name__ == "__main__":
    main()
