"""Figure 3 of the paper: training loss and score against steps, MoT and STD.

The paper reads from it that STD's loss goes on falling while its score peaks and falls, and that MoT's score keeps
rising. Ours adds the held-out loss over all teachers' traces and bands over the seeds of a comparison. MoT's points
are the base and its merges, STD's also what was scored in between (evaluate.every_steps).

    python analysis/fig3_training_curves.py --run runs/quickstart-compare --out figures
"""

from motkit.analysis.command import figure_command
from motkit.analysis.curves import compute_curves, draw_curves
from motkit.analysis.runs import open_runs


def compute(runs, out):
    return compute_curves(open_runs(runs), "std", "mot")


main = figure_command("fig3_training_curves", __doc__, compute, draw_curves)

if __name__ == "__main__":
    main()
