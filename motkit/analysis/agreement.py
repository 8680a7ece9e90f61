"""Evidence for consensus: how far the branches of a round agree, and what the merge keeps of them.

Readers of the paper asked for direct evidence that the merge keeps what teachers share, not only that it dilutes style.
Three views: the task vectors' cosine and sign agreement by layer and round, the length of the merged update beside
that of the branches, and the loss of every branch on every teacher's held-out traces before and after the merge.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from motkit import figures
from motkit.analysis.runs import Run
from motkit.merge_agreement import COLUMNS, measure_agreement, read_agreement

if TYPE_CHECKING:
    import pandas


def compute_agreement(run: Run) -> "pandas.DataFrame":
    """The agreement report of every round; columns round, layer, metric, first, second, value.

    Read from the merge's ``agreement.csv``; computed from the checkpoints where a run has none (and has not pruned
    them).
    """
    import pandas

    rows = []
    for number in run.rounds_done:
        values = read_agreement(run.folder.merged(number) / "agreement.csv")
        branches = run.branches(number)
        if not values and branches.keys() == run.branch_stages(number).keys():
            values = measure_agreement(run.student(number - 1), branches, run.student(number))
        rows += [{"round": number, **asdict(value)} for value in values]
    return pandas.DataFrame(rows, columns=["round", *COLUMNS])


def compute_cross_losses(run: Run) -> "pandas.DataFrame":
    """Held-out loss of every branch, merge and the base on every set of held-out traces; columns round, student, set,
    loss. A set is a teacher's traces; branch i on teacher j's says what i has unlearned of j's way, and the merge's row
    what it brought back.
    """
    import pandas

    rows = []
    for number in [0, *run.rounds_done]:
        for name, scores in run.evaluation(number).items():
            if "@" in name:
                continue
            for which, loss in scores.get("heldout_loss_by_set", {}).items():
                rows.append({"round": number, "student": name, "set": which, "loss": loss})
    return pandas.DataFrame(rows, columns=["round", "student", "set", "loss"])


def compute(run: Run) -> dict[str, "pandas.DataFrame"]:
    """``agreement`` and ``cross_losses``."""
    return {"agreement": compute_agreement(run), "cross_losses": compute_cross_losses(run)}


def draw_agreement(tables: Mapping[str, "pandas.DataFrame"]) -> Any:
    """Cosine and sign agreement by round and by layer, survival, and the cross-teacher losses of the last round."""
    agreement, losses = tables["agreement"], tables["cross_losses"]
    agreement = agreement.assign(layer=agreement["layer"].astype(str))
    pairs = agreement[agreement["metric"] == "cosine"]
    names = list((pairs["first"] + " – " + pairs["second"]).unique())
    styles = figures.series_styles(names)
    with figures.house_style():
        figure, axes = figures.new_figure(2, 3, width_in=11, height_in=6.2)
        for axis, metric, title in (
            (axes[0, 0], "cosine", "Cosine of task vectors, whole model"),
            (axes[0, 1], "sign_agreement", "Elements that move the same way"),
        ):
            part = agreement[(agreement["metric"] == metric) & (agreement["layer"] == "model")]
            for name in names:
                some = part[part["first"] + " – " + part["second"] == name]
                axis.plot(
                    some["round"], some["value"], color=styles[name].colour, marker=styles[name].marker,
                    linestyle=styles[name].line, label=name,
                )  # fmt: skip
            axis.axhline(0 if metric == "cosine" else 0.5, color="#000000", linewidth=0.7, linestyle=":")
            axis.set(xlabel="round", title=title)
            axis.set_xticks(sorted(part["round"].unique()))
        axes[0, 0].set_ylabel("cosine (dotted: orthogonal)")
        axes[0, 1].set_ylabel("share of elements (dotted: chance)")
        if names:
            axes[0, 0].legend(fontsize=7)
        _draw_survival(axes[0, 2], agreement)
        _draw_layers(axes[1, 0], agreement)
        _draw_losses(figure, axes[1, 1], axes[1, 2], losses)
    return figure


def _draw_survival(axes: Any, agreement: "pandas.DataFrame") -> None:
    part = agreement[(agreement["metric"] == "survival") & (agreement["layer"] == "model")]
    teachers = agreement.loc[agreement["metric"] == "task_vector_norm", "first"].nunique()
    style = figures.arm_style("mot")
    axes.plot(part["round"], part["value"], color=style.colour, marker=style.marker)
    axes.axhline(1, color="#000000", linewidth=0.7, linestyle=":")
    if teachers > 1:
        axes.axhline(1 / math.sqrt(teachers), color="#000000", linewidth=0.7, linestyle="--")
        axes.text(0.02, 1 / math.sqrt(teachers) - 0.02, "dashed: nothing in common, 1/√K", fontsize=7, va="top",
                  transform=axes.get_yaxis_transform())  # fmt: skip
        axes.text(0.02, 0.98, "dotted: all agree", fontsize=7, va="top", transform=axes.get_yaxis_transform())
    axes.set_ylim(0, 1.05 * max(1.0, float(part["value"].max())) if len(part) else 1.05)
    axes.set_xticks(sorted(part["round"].unique()))
    axes.set(xlabel="round", ylabel="‖merged update‖ / mean ‖task vector‖", title="What survives the merge")


def _draw_layers(axes: Any, agreement: "pandas.DataFrame") -> None:
    part = agreement[(agreement["metric"] == "cosine") & (agreement["layer"] != "model")]
    rounds = sorted(part["round"].unique())
    shades = ["#bdbdbd", "#7f9fb5", "#0072B2"]
    layers = list(dict.fromkeys(part["layer"]))
    for number in rounds:
        by = part[part["round"] == number].groupby("layer", sort=False)["value"].mean()
        place = rounds.index(number)
        shade = shades[-1] if number == rounds[-1] else shades[min(place * 2 // max(len(rounds) - 1, 1), 1)]
        axes.plot(
            [layers.index(str(layer)) for layer in by.index], by.to_numpy(), color=shade, marker="o",
            label=f"round {number}",
        )  # fmt: skip
    step = max(1, len(layers) // 12)
    axes.set_xticks(range(0, len(layers), step), layers[::step])
    axes.set(xlabel="layer", ylabel="mean cosine over pairs", title="Cosine of task vectors by layer")
    if rounds:
        axes.legend(fontsize=7)


def _draw_losses(figure: Any, left: Any, right: Any, losses: "pandas.DataFrame") -> None:
    import numpy

    if losses.empty:
        for axes in (left, right):
            axes.set_axis_off()
        left.text(0.0, 0.5, "the run has no held-out traces by teacher", transform=left.transAxes, color="#555555")
        return
    last = losses["round"].max()
    now = losses[losses["round"] == last]
    sets = list(dict.fromkeys(losses["set"]))
    students = [*[name for name in dict.fromkeys(now["student"]) if name != "merged"], "merged"]
    grid = now.pivot(index="student", columns="set", values="loss").reindex(index=students, columns=sets).to_numpy()
    image = left.imshow(grid, cmap=figures.SEQUENTIAL, norm="log", aspect="auto")
    left.grid(False)
    middle = math.sqrt(float(numpy.nanmin(grid)) * float(numpy.nanmax(grid)))
    for row in range(len(students)):
        for column in range(len(sets)):
            value = grid[row, column]
            dark = value < middle
            left.text(
                column, row, f"{value:.3f}", ha="center", va="center", color="white" if dark else "black", fontsize=7
            )
    left.set_xticks(range(len(sets)), sets, fontsize=7)
    left.set_yticks(
        range(len(students)), [name if name == "merged" else f"branch {name}" for name in students], fontsize=7
    )
    left.set(xlabel="held-out traces of", title=f"Held-out loss in round {last} (nats per token)")
    figure.colorbar(image, ax=left, format="%.2g").ax.minorticks_off()
    others = losses[losses["student"].isin(sets) & (losses["student"] != losses["set"])]
    own = losses[losses["student"] == losses["set"]]
    merged = losses[losses["student"].isin(["merged", "base"])]
    for part, style, label in (
        (others, figures.arm_style("std"), "branch on the others' traces"),
        (own, figures.arm_style("posthoc"), "branch on its own teacher's traces"),
        (merged, figures.arm_style("mot"), "merge (round 0: base) on all"),
    ):
        by = part.groupby("round")["loss"].mean()
        right.plot(by.index, by.to_numpy(), color=style.colour, marker=style.marker, linestyle=style.line, label=label)
    right.set_xticks(sorted(losses["round"].unique()))
    right.set(xlabel="round", ylabel="mean held-out loss (nats per token)", title="Before the merge and after")
    figures.log_axis(right)
    low, high = right.get_ylim()
    right.set_ylim(low, high * (high / low) ** 0.45)
    right.legend(fontsize=7, loc="upper left")
