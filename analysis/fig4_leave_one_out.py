"""Figure 4 of the paper: MoT with all teachers and without one.

The paper leaves out R1, whose traces are unlike the others', at two student sizes, and finds that it does not hurt to
have it. Ours shows every teacher that a comparison left out ('motkit compare … --leave-out NAME'), with bands over its
seeds.

    python analysis/fig4_leave_one_out.py --run runs/quickstart-compare --out figures
"""

from motkit.analysis.command import figure_command
from motkit.analysis.curves import compute_curves, draw_curves
from motkit.analysis.runs import open_runs


def compute(runs, out):
    return compute_curves(open_runs(runs), "mot", "leave_out")


main = figure_command("fig4_leave_one_out", __doc__, compute, draw_curves)

if __name__ == "__main__":
    main()
