"""Figure 6 and appendix of the paper: the loss landscape, and the reverse trajectory merge.

The paper merges the final student back along its own trajectory and perturbs it. Ours adds random filter-normalised
lines and planes, the plane through base, merge and a branch, the barriers between branches, sharpness, and the
Hessian, side by side for base, STD, MTD, post-hoc merge and MoT. Flatness describes, it does not explain. Every point
is kept in fig6_loss_landscape.points.jsonl: run it again to go on. Needs the extra 'analysis' for the Hessian.

    python analysis/fig6_loss_landscape.py --run runs/quickstart-compare --out figures --quick
"""

import dataclasses
import sys

import click

from motkit.analysis.command import figure_command
from motkit.analysis.landscape import QUICK, Detail, Landscape, draw_landscape
from motkit.analysis.runs import open_runs


def compute(runs, out, quick, curvature):
    detail = dataclasses.replace(QUICK if quick else Detail(), curvature=() if curvature == "none" else (curvature,))
    points = out / "fig6_loss_landscape.points.jsonl"
    return Landscape(open_runs(runs), points, detail, progress=sys.stderr.isatty()).tables()


main = figure_command(
    "fig6_loss_landscape",
    __doc__,
    compute,
    draw_landscape,
    [
        click.option("--quick", is_flag=True, help="Fewer points and traces, for the quickstart on two cores."),
        click.option(
            "--curvature", type=click.Choice(["hessian", "ggn", "none"]), default="hessian", show_default=True,
            help="Which matrix; the two are not the same and are labelled.",
        ),
    ],
)  # fmt: skip

if __name__ == "__main__":
    main()
