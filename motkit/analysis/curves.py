"""Scores and losses over the steps of a run, by arm: the paper's Figures 1, 3 and 4, and what each arm costs.

The paper takes each curve from one run. Here a line is the mean over the seeds of a comparison and its band their
standard deviation (none with one seed).
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from motkit import figures, rundir
from motkit.analysis.runs import Run, Runs

if TYPE_CHECKING:
    import pandas

ARM_ORDER = ("base", "std", "mtd", "posthoc", "mot", "leave_out")
_PLACE = ["name", "arm", "budget", "seed", "teacher", "left_out"]


def _place(run: Run) -> dict[str, Any]:
    return {
        "name": run.name, "arm": run.arm, "budget": run.budget, "seed": run.seed, "teacher": run.teacher or "",
        "left_out": run.left_out or "",
    }  # fmt: skip


def compute_scores(runs: Sequence[Run]) -> "pandas.DataFrame":
    """Every score of every run. Columns: name, arm, budget, seed, teacher, left_out, student, kind (base, branch,
    merge, between), steps (optimizer steps that a branch has behind it, all rounds together), accuracy, standard_error,
    heldout_loss.
    """
    import pandas

    rows = []
    for run in runs:
        for number in range(run.recipe.rounds + 1):
            for student, scores in run.evaluation(number).items():
                between = re.fullmatch(r"(.+)@(\d+)", student)
                before = (number - 1) * run.branch_steps
                kind, steps = "branch", number * run.branch_steps
                if between:
                    kind, steps = "between", before + int(between[2])
                elif student in ("base", "merged"):
                    kind = "base" if student == "base" else "merge"
                values = {key: scores.get(key) for key in ("accuracy", "standard_error", "heldout_loss")}
                rows.append({**_place(run), "student": student, "kind": kind, "steps": steps, **values})
    columns = [*_PLACE, "student", "kind", "steps", "accuracy", "standard_error", "heldout_loss"]
    return pandas.DataFrame(rows, columns=columns)


def compute_training(runs: Sequence[Run]) -> "pandas.DataFrame":
    """The training loss at every step, mean over a run's branches; columns as in `compute_scores`, steps and loss."""
    import pandas

    rows = []
    for run in runs:
        losses: dict[int, list[float]] = {}
        for number in run.rounds_done:
            for stage in run.branch_stages(number).values():
                text = (stage / "metrics.jsonl").read_text(encoding="utf-8")
                for line in map(json.loads, text.splitlines()):
                    losses.setdefault((number - 1) * run.branch_steps + line["step"], []).append(line["loss"])
        rows += [{**_place(run), "steps": step, "loss": sum(some) / len(some)} for step, some in sorted(losses.items())]
    return pandas.DataFrame(rows, columns=[*_PLACE, "steps", "loss"])


def compute_final(runs: Sequence[Run]) -> "pandas.DataFrame":
    """A row per run: the score it ends with, and its cost in branch-steps, tokens, FLOPs, seconds, memory and disk.

    Evaluation is in none of the costs; the merges are in seconds and disk.
    """
    import pandas

    rows = []
    for run in runs:
        last = run.rounds_done[-1] if run.rounds_done else 0
        scores = run.evaluation(last).get("merged" if last else "base", {})
        stages = []
        for number in run.rounds_done:
            stages += [*run.branch_stages(number).values(), run.folder.merged(number)]
        records = [record for record in map(rundir.read_done, stages) if record]
        costs = [record.get("cost", {}) for record in records]
        rows.append(
            {
                **_place(run),
                "accuracy": scores.get("accuracy"),
                "heldout_loss": scores.get("heldout_loss"),
                "branch_steps": sum(cost.get("steps", 0) for cost in costs),
                "tokens": sum(cost.get("tokens", 0) for cost in costs),
                "flops": sum(cost.get("flops", 0) for cost in costs),
                "seconds": sum(cost.get("seconds", 0) for cost in costs),
                "peak_memory_bytes": max((cost.get("peak_memory_bytes") or 0 for cost in costs), default=0),
                "disk_bytes": sum(entry["bytes"] for record in records for entry in record["outputs"].values()),
            }
        )
    return pandas.DataFrame(rows)


# Figure 1


def compute_best_teacher(runs: Sequence[tuple[str, Runs]]) -> dict[str, "pandas.DataFrame"]:
    """``finals``: the final accuracy of every STD run and of base and MoT, per comparison (``panel``)."""
    import pandas

    parts = []
    for label, some in runs:
        chosen = some.of("base", "std", "mot", budget="steps")
        part = compute_final(chosen)
        if not (part["arm"] == "base").any():
            seen = {run.seed: run for run in some.runs}
            base = [
                {
                    "name": "base",
                    "arm": "base",
                    "seed": seed,
                    "accuracy": run.evaluation(0).get("base", {}).get("accuracy"),
                }
                for seed, run in seen.items()
            ]
            part = pandas.concat([part, pandas.DataFrame(base)], ignore_index=True)
        part.insert(0, "panel", label)
        parts.append(part)
    finals = pandas.concat(parts, ignore_index=True)
    return {"finals": finals[["panel", "name", "arm", "seed", "teacher", "accuracy"]].fillna({"teacher": ""})}


def draw_best_teacher(tables: Mapping[str, "pandas.DataFrame"]) -> Any:
    """A panel per comparison: accuracy after STD by teacher, beside base and MoT; the best teacher of each seed
    marked.
    """
    finals = tables["finals"]
    panels = list(dict.fromkeys(finals["panel"]))
    with figures.house_style():
        figure, axes = figures.new_figure(1, len(panels), width_in=max(5.2, 4.2 * len(panels)), height_in=3.6)
        for axis, panel in zip(axes[0], panels, strict=True):
            part = finals[finals["panel"] == panel]
            order = [name for arm in ARM_ORDER for name in dict.fromkeys(part.loc[part["arm"] == arm, "name"])]
            singles = part[part["arm"] == "std"].dropna(subset=["accuracy"])
            best = singles.loc[singles.groupby("seed")["accuracy"].idxmax()] if len(singles) else singles
            for place, name in enumerate(order):
                some = part[part["name"] == name]
                style = figures.arm_style(some["arm"].iloc[0])
                mean, spread = 100 * some["accuracy"].mean(), 100 * some["accuracy"].std()
                axis.bar(place, mean, 0.7, color=style.colour, alpha=0.75 if style.colour != "#000000" else 0.45)
                if spread == spread:
                    axis.errorbar(place, mean, yerr=spread, color="#222222", capsize=3, linewidth=1)
                axis.plot([place] * len(some), 100 * some["accuracy"], "o", color="#222222", markersize=2.5)
                wins = int((best["name"] == name).sum())
                if wins:
                    axis.annotate(
                        f"best in {wins} of {len(best)}", (place, mean + (spread if spread == spread else 0)),
                        ha="center", va="bottom", fontsize=7, xytext=(0, 4), textcoords="offset points",
                    )  # fmt: skip
            axis.set_xticks(range(len(order)), [name.replace(" ", "\n") for name in order])
            axis.set_ylim(0, 112)
            axis.set_yticks(range(0, 101, 20))
            axis.set(ylabel="accuracy on held-out problems, %", title=panel)
            axis.grid(visible=False, axis="x")
    return figure


# Figures 3 and 4


def compute_curves(runs: Runs, *arms: str) -> dict[str, "pandas.DataFrame"]:
    """``scores`` and ``training`` of these arms at equal steps."""
    chosen = runs.of(*arms, budget="steps")
    return {"scores": compute_scores(chosen), "training": compute_training(chosen)}


def draw_curves(tables: Mapping[str, "pandas.DataFrame"]) -> Any:
    """Training loss, held-out loss and accuracy against the steps of one branch."""
    training, scores = tables["training"], tables["scores"]
    names = list(dict.fromkeys([*training["name"], *scores["name"]]))
    arms = {name: arm for table in (training, scores) for name, arm in zip(table["name"], table["arm"], strict=True)}
    names.sort(key=lambda name: ARM_ORDER.index(arms[name]) if arms[name] in ARM_ORDER else len(ARM_ORDER))
    styles = _styles(names, arms)
    with figures.house_style():
        figure, axes = figures.new_figure(1, 3, width_in=11, height_in=3.9)
        for name in names:
            losses = training[training["name"] == name].pivot_table(index="steps", columns="seed", values="loss")
            window = max(1, len(losses) // 30)
            losses = losses.rolling(window, center=True, min_periods=1).mean()
            figures.plot_band(axes[0, 0], losses.index, losses.mean(axis=1), losses.std(axis=1), styles[name], name)
            for axis, key, factor in ((axes[0, 1], "heldout_loss", 1), (axes[0, 2], "accuracy", 100)):
                # What the student is at these steps: the base, then each merge; in between, a single branch.
                kinds = ["base", "merge", *(["between"] if arms[name] in ("std", "mtd") else [])]
                part = scores[(scores["name"] == name) & scores["kind"].isin(kinds)]
                by = factor * part.pivot_table(index="steps", columns="seed", values=key, aggfunc="mean")
                if by.empty:
                    continue
                figures.plot_band(
                    axis, by.index, by.mean(axis=1), by.std(axis=1), styles[name], marker=styles[name].marker
                )
        titles = ("Training loss of the branches", "Held-out loss, all teachers' traces", "Held-out problems")
        labels = ("loss (nats per token)", "loss (nats per token)", "accuracy, %")
        for axis, title, label in zip(axes[0], titles, labels, strict=True):
            axis.set(xlabel="optimizer steps of a branch, all rounds", ylabel=label, title=title)
        figures.log_axis(axes[0, 0])
        figures.log_axis(axes[0, 1])
        if names:
            figure.legend(loc="outside upper center", ncols=min(len(names), 6))
    return figure


def _styles(names: Sequence[str], arms: Mapping[str, str]) -> dict[str, figures.Style]:
    """The arm's style; further series of the same arm with another marker and line."""
    markers = "sP<>hp8*"
    lines: list[tuple[int, tuple[int, ...]]] = [(0, (1, 1)), (0, (5, 2, 1, 2)), (0, (7, 2)), (0, (3, 3))]
    styles: dict[str, figures.Style] = {}
    seen: dict[str, int] = {}
    for name in names:
        style, number = figures.arm_style(arms[name]), seen.get(arms[name], 0)
        if number:
            style = figures.Style(style.colour, markers[number % len(markers)], lines[number % len(lines)])
        seen[arms[name]] = number + 1
        styles[name] = style
    return styles


# Costs


def compute_costs(runs: Runs) -> dict[str, "pandas.DataFrame"]:
    """``costs``: a row per run, with its score and what it took."""
    table = compute_final(runs.runs)
    return {"costs": table}


def draw_costs(tables: Mapping[str, "pandas.DataFrame"]) -> Any:
    """Accuracy and held-out loss against branch-steps, FLOPs and seconds: a mark per arm and budget, mean over
    seeds.
    """
    costs = tables["costs"]
    costs = costs[costs["arm"] != "base"]
    names = list(dict.fromkeys(costs["name"]))
    arms = dict(zip(costs["name"], costs["arm"], strict=True))
    names.sort(key=lambda name: ARM_ORDER.index(arms[name]) if arms[name] in ARM_ORDER else len(ARM_ORDER))
    styles = _styles(names, arms)
    columns = (
        ("branch_steps", 1.0, "branch-steps (optimizer steps of all branches)"),
        ("flops", 1e-12, "training TFLOPs (6·P·tokens)"),
        ("seconds", 1.0, "training and merging, seconds"),
    )
    with figures.house_style():
        figure, axes = figures.new_figure(2, 3, width_in=11, height_in=6.6)
        for row, (score, factor, label) in enumerate(
            (("accuracy", 100, "accuracy, %"), ("heldout_loss", 1, "held-out loss (nats per token)"))
        ):
            for column, (key, unit, title) in enumerate(columns):
                axis = axes[row, column]
                for name in names:
                    style = styles[name]
                    for budget, part in costs[costs["name"] == name].groupby("budget"):
                        values = factor * part[score].dropna()
                        if values.empty:
                            continue
                        spread = values.std() if len(values) > 1 else None
                        axis.errorbar(
                            unit * part[key].mean(), values.mean(), yerr=spread, marker=style.marker,
                            color=style.colour, markerfacecolor="white" if budget == "compute" else style.colour,
                            capsize=2.5, markersize=6.5, linestyle="",
                            label=name if (row, column) == (0, 0) and budget != "compute" else None,
                        )  # fmt: skip
                axis.set(ylabel=label, xlabel=title)
                axis.set_xlim(left=0)
                if score == "heldout_loss":
                    figures.log_axis(axis)
        figure.legend(loc="outside upper center", ncols=min(max(len(names), 1), 6))
        figure.supxlabel(
            "filled: equal steps per branch; hollow: equal compute; bars: standard deviation over seeds", fontsize=8
        )
    return figure
