"""Figure 1 of the paper: which single teacher is best.

Accuracy after single-teacher distillation (STD), by teacher, beside the base student and MoT, a panel per comparison.
The paper has a panel per student and dataset, from single runs; ours shows every seed, the mean, the standard
deviation over seeds, and in how many seeds each teacher was the best one.

    python analysis/fig1_best_teacher.py --run runs/quickstart-compare --out figures
"""

from motkit.analysis.command import figure_command
from motkit.analysis.curves import compute_best_teacher, draw_best_teacher
from motkit.analysis.runs import open_runs


def compute(runs, out):
    return compute_best_teacher([(path.name, open_runs([path])) for path in runs])


main = figure_command("fig1_best_teacher", __doc__, compute, draw_best_teacher)

if __name__ == "__main__":
    main()
