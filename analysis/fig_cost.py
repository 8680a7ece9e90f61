"""What each arm costs, which the paper does not show: MoT spends K times the branch-steps of STD.

Accuracy and held-out loss against branch-steps, training FLOPs and seconds, at equal steps and at equal compute; the
CSV has tokens, memory and disk too. Seconds are those of the machine that made the runs.

    python analysis/fig_cost.py --run runs/quickstart-compare --out figures
"""

from motkit.analysis.command import figure_command
from motkit.analysis.curves import compute_costs, draw_costs
from motkit.analysis.runs import open_runs


def compute(runs, out):
    return compute_costs(open_runs(runs))


main = figure_command("fig_cost", __doc__, compute, draw_costs)

if __name__ == "__main__":
    main()
