"""Lemma 1: how far E steps of gradient descent move the weights along an eigen-direction of curvature λ.

Source: arXiv 2509.08814, Lemma 1: s_E(λ) = η Σ_{e<E} (1 − ηλ)^e = (1 − (1 − ηλ)^E) / λ, stated there to be strictly
decreasing in λ on (0, 2/η) for every E ≥ 1. It is not: for E = 1 it is constant, and for odd E ≥ 3 it rises again near
2/η (E = 3 from λ = 1.5/η). It holds for even E on (0, 2/η), and for every E ≥ 2 on (0, 1/η]. Both are computed here,
and the damping is measured on a real branch.
"""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from motkit import figures
from motkit.analysis.landscape import (
    Objective,
    Points,
    Weights,
    checkpoint_identity,
    combine,
    curvature_operator,
    dot,
    norm,
    trace_objective,
)
from motkit.analysis.models import load_model
from motkit.analysis.runs import Run
from motkit.rundir import digest

if TYPE_CHECKING:
    import numpy
    import pandas

STEPS = (1, 2, 3, 4, 5, 8, 50)
NOTE = (
    "The lemma is about full-batch gradient descent at a constant step size on a quadratic loss. A branch is trained "
    "by AdamW on mini-batches: η is fitted, and the shape of the damping alone is compared."
)


def movement(curvature: Any, rates: Sequence[float]) -> "numpy.ndarray[Any, Any]":
    """How far gradient descent at these step sizes, one per step, moves along directions of this curvature λ, per unit
    of
    the first gradient: Σ_e η_e Π_{j>e} (1 − η_j λ). At constant η this is the paper's s_E(λ); at λ = 0 it is Σ η_e.
    """
    import numpy

    curvature = numpy.asarray(curvature, dtype=float)
    moved: numpy.ndarray[Any, Any] = numpy.zeros_like(curvature)
    for rate in rates:
        # one step: x ← x − η (g + λ x), with x = −moved · g
        moved += rate * (1 - curvature * moved)
    return moved


def rises_from(steps: int, *, points: int = 200_001) -> float:
    """ηλ in (0, 2) from where s_E is no longer decreasing; NaN if it decreases all the way; 0 if it never does (E = 1).

    Where the derivative of (1 − (1 − x)^E) / x changes its sign, by bisection on x.
    """
    import numpy

    if steps == 1:
        return 0.0

    def slope(x: Any) -> Any:  # x² times the derivative, which has its sign
        return steps * x * (1 - x) ** (steps - 1) - 1 + (1 - x) ** steps

    grid = numpy.linspace(0, 2, points)[1:-1]
    positive = numpy.flatnonzero(slope(grid) > 0)
    if len(positive) == 0:
        return math.nan
    low, high = grid[positive[0] - 1], grid[positive[0]]
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) <= 0 else (low, middle)
    return float(high)


def compute_theory(steps: Sequence[int] = STEPS, points: int = 401) -> dict[str, "pandas.DataFrame"]:
    """``grid``: steps, eta_lambda, share (s_E(λ) / (E η): 1 for a flat direction). ``claim``: for each E, whether s_E
    is strictly decreasing on (0, 1] and on (0, 2), by the sign of its derivative, and from where it rises.
    """
    import numpy
    import pandas

    x = numpy.linspace(0, 2, points)
    grid, claim = [], []
    for count in steps:
        share = movement(x, [1.0] * count) / count
        grid.append(pandas.DataFrame({"steps": count, "eta_lambda": x, "share": share}))
        start = rises_from(count)
        claim.append(
            {
                "steps": count,
                "decreasing_to_1": count > 1 and not start <= 1,
                "decreasing_to_2": count > 1 and math.isnan(start),
                "rises_from": start,
            }
        )
    return {"grid": pandas.concat(grid, ignore_index=True), "claim": pandas.DataFrame(claim)}


def measure_damping(
    objective: Objective, start: Weights, end: Weights, *, top: int = 10, lanczos_steps: int = 40,
    seed: int = 0,
) -> "pandas.DataFrame":  # fmt: skip
    """A branch's movement along the top Hessian eigenvectors at its start, and along what is left of the gradient.

    Args:
        objective: the branch's own training loss, on a model with eager attention.
        start, end: the weights before and after.

    Returns:
        Columns direction (eigenvector, flat), curvature (uᵀHu), gradient (uᵀg), moved (uᵀ(θ_end − θ_start)) and
        damping (−moved / gradient: the measured s_E, in units of the step size). Rows whose gradient is 0 have no
        damping.
    """
    import pandas
    from hessian_eigenthings import lanczos

    objective.put(start)
    _, gradient = objective.gradient()
    step = combine((1.0, end), (-1.0, start))
    operator = curvature_operator(objective)
    count = min(lanczos_steps, operator.size)
    pairs = lanczos(operator, k=min(top, count), max_iter=count, which="LM", reorthogonalize=True, seed=seed)
    rows = []

    def add(kind: str, direction: Weights, curvature: float) -> None:
        slope, moved = dot(direction, gradient), dot(direction, step)
        damping = -moved / slope if slope else math.nan
        rows.append(
            {"direction": kind, "curvature": curvature, "gradient": slope, "moved": moved, "damping": damping}
        )  # fmt: skip

    for value, vector in zip(pairs.eigenvalues.tolist(), pairs.eigenvectors, strict=True):
        add("eigenvector", _unflatten(vector, start), value)
    flat = dict(gradient)
    for vector in pairs.eigenvectors:
        along = _unflatten(vector, start)
        flat = combine((1.0, flat), (-dot(flat, along), along))
    if norm(flat) > 0:
        flat = combine((1 / norm(flat), flat))
        product = _unflatten(operator.matvec(_flatten(flat)), start)
        add("flat", flat, dot(flat, product))
    return pandas.DataFrame(rows)


def compute_branch(run: Run, points: Points, *, traces_per_set: int = 24, seed: int = 0) -> "pandas.DataFrame":
    """`measure_damping` for each branch of a run's first round, with the prediction of the lemma beside it.

    Further columns: branch, steps, eta_lambda, share (damping / that of the flat direction: below 1 is damped) and
    predicted (the same by the lemma). The lemma's step sizes are the branch's own schedule times one factor, such that
    it moves as far along the flat direction as the branch did. Where ηλ ≥ 2 the lemma says nothing: no prediction.
    """
    import pandas

    traces = run.training_traces()
    parts = []
    for name, checkpoint in run.branches(1).items():
        chosen = [t for some in traces.values() for t in some] if name == "union" else traces[name]
        chosen = chosen[:traces_per_set]
        what = {
            "kind": "damping",
            "of": [checkpoint_identity(run.base), checkpoint_identity(checkpoint)],
            "traces": digest([[trace.input_ids, trace.num_prompt_tokens] for trace in chosen]),
            "seed": seed,
        }

        def compute(checkpoint: Path = checkpoint, chosen: Sequence[Any] = chosen) -> dict[str, Any]:
            model = load_model(run.base, dtype="float32", attention="eager")
            objective = trace_objective(model, chosen)
            start = objective.weights
            end = {key: p.detach() for key, p in load_model(checkpoint, dtype="float32").named_parameters()}
            table = measure_damping(objective, start, end, seed=seed)
            return {"rows": table.to_dict(orient="records")}

        table = pandas.DataFrame(points.get(what, compute)["rows"])
        rates = _rates(run.folder.branch(1, name) / "metrics.jsonl")
        table.insert(0, "branch", name)
        table["steps"] = len(rates)
        parts.append(_with_prediction(table, rates))
        print(f"lemma 1: branch {name}: {len(table)} directions", file=sys.stderr)
    return pandas.concat(parts, ignore_index=True)


def _rates(metrics: Path) -> list[float]:
    """The step sizes of a branch, one per step, from its log."""
    return [float(json.loads(line)["learning_rate"]) for line in metrics.read_text(encoding="utf-8").splitlines()]


def _with_prediction(table: "pandas.DataFrame", rates: Sequence[float]) -> "pandas.DataFrame":
    """Step sizes from the flat direction, for whose curvature 0 is taken: what AdamW makes of a learning rate is not
    known beforehand."""
    import numpy

    table = table.copy()
    moved = float(table.loc[table["direction"] == "flat", "damping"].iloc[0])
    scaled = [rate * moved / sum(rates) for rate in rates]
    curvature = table["curvature"].to_numpy()
    table["eta_lambda"] = max(scaled) * curvature
    table["share"] = table["damping"] / moved
    predicted = movement(curvature, scaled) / moved
    table["predicted"] = numpy.where(table["eta_lambda"] < 2, predicted, math.nan)
    return table


def _flatten(vector: Mapping[str, Any]) -> Any:
    import torch

    return torch.cat([tensor.reshape(-1) for tensor in vector.values()])


def _unflatten(flat: Any, like: Mapping[str, Any]) -> Weights:
    parts, start = {}, 0
    for name, tensor in like.items():
        parts[name] = flat[start : start + tensor.numel()].reshape(tensor.shape)
        start += tensor.numel()
    return parts


def draw_lemma1(tables: Mapping[str, "pandas.DataFrame"]) -> Any:
    """From ``grid`` and ``claim``, and ``branch`` where a run was measured."""
    grid, claim, branch = tables["grid"], tables["claim"], tables.get("branch")
    measured = branch is not None and not branch.empty
    with figures.house_style():
        figure, axes = figures.new_figure(1, 3 if measured else 2, width_in=11 if measured else 8, height_in=3.6)
        names = [str(count) for count in grid["steps"].unique()]
        styles = figures.series_styles(names)
        for panel, (low, high) in zip(axes[0], ((0, 2), (1.3, 2)), strict=False):
            for name in names:
                part = grid[(grid["steps"] == int(name)) & grid["eta_lambda"].between(low, high)]
                panel.plot(
                    part["eta_lambda"], part["share"], color=styles[name].colour, linestyle=styles[name].line,
                    label=f"E = {name}",
                )  # fmt: skip
                start = claim.loc[claim["steps"] == int(name), "rises_from"].iloc[0]
                if low <= start <= high and start > 0:
                    at = (part["eta_lambda"] - start).abs().idxmin()
                    panel.plot(start, part["share"][at], styles[name].marker, color=styles[name].colour, markersize=7)
            panel.set_xlabel("ηλ")
        axes[0, 0].axvspan(1, 2, color="#000000", alpha=0.05, linewidth=0)
        axes[0, 0].set_ylabel("s_E(λ) / (E η)")
        axes[0, 0].set_title("Movement against curvature (grey: ηλ > 1)")
        axes[0, 1].legend(ncols=4, loc="upper center", fontsize=7, columnspacing=1)
        axes[0, 1].set_ylim(-0.02, 0.55)
        axes[0, 1].set_title("Odd E rise again (from the marks): not monotone")
        if measured:
            assert branch is not None
            _draw_branches(axes[0, 2], branch)
    return figure


def _draw_branches(axes: Any, branch: "pandas.DataFrame") -> None:
    names = list(branch["branch"].unique())
    shown = branch[branch["curvature"] > 0]
    for name, style in figures.series_styles(names).items():
        part = shown[shown["branch"] == name].sort_values("eta_lambda")
        axes.plot(part["eta_lambda"], part["predicted"], color=style.colour, linestyle=style.line, linewidth=1)
        size = 12 + 90 * (part["gradient"] / part["gradient"].abs().max()) ** 2
        axes.scatter(
            part["eta_lambda"], part["share"], s=size, marker=style.marker, color=style.colour, alpha=0.8, linewidths=0,
            label=name,
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("symlog", linthresh=1)
    axes.axhline(0, color="#000000", linewidth=0.6)
    axes.axhline(1, color="#000000", linewidth=0.6, linestyle=":")
    axes.axvspan(1, max(2.0, 1.3 * float(shown["eta_lambda"].max())), color="#000000", alpha=0.05, linewidth=0)
    axes.set(xlabel="ηλ, η from the flat direction", ylabel="movement / that of the flat direction")
    axes.set_title("Measured (marks) and predicted (lines)")
    axes.legend(title="branch (large: much gradient)", title_fontsize=7)
