"""Evidence for consensus: how far the branches of a round agree, and what the merge keeps of them.

Readers of the paper asked for direct evidence that the merge keeps what teachers share, not only that it dilutes style.
Three views: the task vectors' cosine and sign agreement by layer and round, the length of the merged update beside
that of the branches, and the loss of every branch on every teacher's held-out traces before and after the merge.
"""

import itertools
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from motkit import figures
from motkit.analysis.models import load_weights
from motkit.analysis.runs import Run
from motkit.errors import UserError

if TYPE_CHECKING:
    import pandas

COLUMNS = ["layer", "metric", "first", "second", "value"]


def compute_agreement(run: Run) -> "pandas.DataFrame":
    """The agreement report of every round; columns round, layer, metric, first, second, value.

    Read from the merge's ``agreement.csv``; computed from the checkpoints where a run has none.
    """
    import pandas

    parts = []
    for number in run.rounds_done:
        file = run.folder.merged(number) / "agreement.csv"
        if file.is_file():
            part = pandas.read_csv(file, dtype={"layer": str, "first": str, "second": str}, keep_default_na=False)
            part["value"] = part["value"].astype(float)
        else:
            part = measure(run.student(number - 1), run.branches(number), run.student(number))
        part.insert(0, "round", number)
        parts.append(part)
    if not parts:
        return pandas.DataFrame(columns=["round", *COLUMNS])
    return pandas.concat(parts, ignore_index=True)


def layer_of(name: str) -> str:
    """The layer of a tensor: its number, or embed, lm_head, norm; else its own name."""
    numbered = re.search(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.", name)
    if numbered:
        return numbered[1]
    for group, pattern in (("embed", r"embed|wte|wpe"), ("lm_head", r"lm_head|embed_out"), ("norm", r"norm|ln_f")):
        if re.search(pattern, name):
            return group
    return name.removesuffix(".weight")


def measure(start: Path, branches: Mapping[str, Path], merged: Path) -> "pandas.DataFrame":
    """The agreement report from checkpoints, in float64: `COLUMNS`, ``model`` first, then layer by layer.

    With δ_k = branch k − start and u = merged − start: task_vector_norm ‖δ_k‖, cosine, sign_agreement (of the elements
    that both changed, the share that moved the same way), merged_norm ‖u‖, survival ‖u‖ / mean ‖δ_k‖.

    Raises:
        UserError: a branch has other tensors than the start.
    """
    import pandas

    base = load_weights(start)
    vectors = {name: load_weights(path) for name, path in branches.items()} | {"": load_weights(merged)}
    for name, weights in vectors.items():
        if weights.keys() != base.keys():
            odd = sorted(weights.keys() ^ base.keys())[0]
            where = branches.get(name, merged)
            raise UserError(f"{where}: has other tensors than {start} (the first: {odd}); it is no branch of it")
    names = [*vectors]
    pairs = list(itertools.combinations(names[:-1], 2))
    inner: dict[str, dict[tuple[str, str], float]] = {}
    for tensor in base:
        deltas = {name: vectors[name][tensor].double().sub_(base[tensor].double()).flatten() for name in names}
        signs = {name: delta.sign() for name, delta in deltas.items() if name}
        for layer in ("model", layer_of(tensor)):
            sums = inner.setdefault(layer, {})
            for name in names:
                sums["norm", name] = sums.get(("norm", name), 0.0) + float(deltas[name] @ deltas[name])
            for one, other in pairs:
                product = signs[one] * signs[other]
                for key, value in (
                    ("dot", float(deltas[one] @ deltas[other])),
                    ("same", float((product > 0).sum())),
                    ("both", float((product != 0).sum())),
                ):
                    place = (key, f"{one}\n{other}")
                    sums[place] = sums.get(place, 0.0) + value
    layers = sorted(
        (layer for layer in inner if layer != "model"), key=lambda layer: (not layer.isdigit(), layer.zfill(6))
    )
    rows: list[tuple[str, str, str, str, float]] = []
    for layer in ["model", *layers]:
        sums = inner[layer]
        norms = {name: math.sqrt(sums["norm", name]) for name in names}
        rows += [(layer, "task_vector_norm", name, "", norms[name]) for name in names[:-1]]
        for one, other in pairs:
            length = norms[one] * norms[other]
            rows.append((layer, "cosine", one, other, sums["dot", f"{one}\n{other}"] / length if length else math.nan))
        for one, other in pairs:
            both = sums["both", f"{one}\n{other}"]
            rows.append(
                (layer, "sign_agreement", one, other, sums["same", f"{one}\n{other}"] / both if both else math.nan)
            )
        mean = sum(norms[name] for name in names[:-1]) / len(branches)
        rows.append((layer, "merged_norm", "", "", norms[""]))
        rows.append((layer, "survival", "", "", norms[""] / mean if mean else math.nan))
    return pandas.DataFrame(rows, columns=COLUMNS)


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
