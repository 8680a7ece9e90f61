# mypy: disable-error-code="misc"
"""The loss landscape around checkpoints: losses along lines and planes in weight space, sharpness, Hessian spectra.

Source: arXiv 2509.08814, Figure 6 and appendix: the loss landscape becomes flatter, probed by merging the final student
back along its trajectory and by perturbation. Beyond it: random directions (Li et al. 2018, arXiv 1712.09913), planes
and linear mode connectivity (Garipov et al. 2018; Frankle et al. 2020), sharpness (Foret et al. 2021) and the Hessian.

Flatness describes, it does not explain: in transformers sharpness and generalisation correlate weakly (Andriushchenko
et al. 2023, arXiv 2302.07011). `CAVEAT` is printed beside every figure.
"""

import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from motkit import figures, rundir
from motkit.analysis.models import load_model
from motkit.analysis.runs import Run, Runs
from motkit.checkpoint import weight_files
from motkit.errors import UserError
from motkit.logits import batches, mean_loss, pad
from motkit.render import RenderedTrace

if TYPE_CHECKING:
    import pandas

CAVEAT = (
    "Flatness describes, it does not explain: in transformers sharpness and generalisation correlate weakly "
    "(Andriushchenko et al. 2023)."
)
SAM_RADIUS = 0.05  # Foret et al. 2021, their default
# Radii of the perturbations, as shares of the base student's weight norm: the same lengths for every checkpoint. The
# worst direction of a million is so much worse than a random one that no radius shows both.
RADII_WORST = (0.0005, 0.001, 0.002, 0.005)
RADII_MOST = (0.02, 0.05, 0.1, 0.2)

Weights = dict[str, Any]


class Objective:
    """A loss as a function of a model's weights.

    Args:
        model: its parameters are moved about by `put`.
        batches: what ``batch_loss`` takes, and the weight of each in the mean (its number of target tokens).
        batch_loss: (model, batch) → mean loss of the batch, a scalar tensor that can be differentiated.
        value: the mean loss without gradients, where there is a cheaper way than ``batch_loss``.
    """

    def __init__(
        self,
        model: Any,
        batches: Sequence[tuple[Any, float]],
        batch_loss: Callable[[Any, Any], Any],
        value: Callable[[], float] | None = None,
    ) -> None:
        self.model = model
        self.batches = list(batches)
        self.batch_loss = batch_loss
        self.total = sum(weight for _, weight in self.batches)
        self._value = value

    @property
    def weights(self) -> Weights:
        """A copy of the weights as they are now, by parameter name (tied ones once)."""
        return {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}

    def put(self, weights: Mapping[str, Any]) -> None:
        """Make these the model's weights."""
        for name, parameter in self.model.named_parameters():
            parameter.data.copy_(weights[name])

    def value(self) -> float:
        """The loss at the weights as they are."""
        import torch

        if self._value is not None:
            return self._value()
        with torch.no_grad():
            parts = (weight * float(self.batch_loss(self.model, batch)) for batch, weight in self.batches)
            return math.fsum(parts) / self.total

    def at(self, weights: Mapping[str, Any]) -> float:
        """The loss at these weights, which stay in the model."""
        self.put(weights)
        return self.value()

    def gradient(self) -> tuple[float, Weights]:
        """(loss, gradient) at the weights as they are."""
        import torch

        names, parameters = zip(*self.model.named_parameters(), strict=True)
        sums, loss = [torch.zeros_like(parameter) for parameter in parameters], 0.0
        for batch, weight in self.batches:
            value = self.batch_loss(self.model, batch)
            loss += weight * float(value.detach())
            for total, part in zip(sums, torch.autograd.grad(value, parameters), strict=True):
                total.add_(part, alpha=weight / self.total)
        return loss / self.total, dict(zip(names, sums, strict=True))


def trace_objective(model: Any, traces: Sequence[RenderedTrace], *, batch_tokens: int = 4096) -> Objective:
    """The mean loss per target token of a model on traces. With gradients, a batch's logits exist whole."""
    import torch

    parts = []
    for numbers in batches(traces, batch_tokens):
        ids, labels = pad([traces[number] for number in numbers], model.device)
        parts.append(((ids, labels[:, 1:]), float((labels[:, 1:] != -100).sum())))

    def batch_loss(model: Any, batch: Any) -> Any:
        ids, targets = batch
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)

    return Objective(model, parts, batch_loss, lambda: mean_loss(model, traces)[0])


# Vectors in weight space


def dot(one: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    """Inner product over all parameters, summed in float64."""
    return math.fsum(float((one[name].double() * other[name].double()).sum()) for name in one)


def norm(vector: Mapping[str, Any]) -> float:
    """Euclidean length over all parameters."""
    return math.sqrt(dot(vector, vector))


def combine(*terms: tuple[float, Mapping[str, Any]]) -> Weights:
    """Σ cₖ vₖ."""
    (first, vector), *rest = terms
    total = {name: tensor * first for name, tensor in vector.items()}
    for factor, other in rest:
        for name, tensor in total.items():
            tensor.add_(other[name], alpha=factor)
    return total


def random_direction(weights: Mapping[str, Any], seed: int, *, filter_normalised: bool = True) -> Weights:
    """A Gaussian direction; every filter as long as the weights' own (Li et al. 2018), or the whole of length 1.

    One filter is one output row of a matrix; norms and biases (vectors) get no direction.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    direction = {}
    for name, tensor in weights.items():
        drawn = torch.randn(tensor.shape, generator=generator, dtype=torch.float32).to(tensor)
        if filter_normalised:
            if tensor.dim() < 2:
                drawn = torch.zeros_like(tensor)
            else:
                own = torch.linalg.vector_norm(tensor, dim=-1, keepdim=True)
                drawn *= own / torch.linalg.vector_norm(drawn, dim=-1, keepdim=True)
        direction[name] = drawn
    return direction if filter_normalised else combine((1 / norm(direction), direction))


def plane_basis(origin: Weights, one: Weights, other: Weights) -> tuple[Weights, Weights, list[tuple[float, float]]]:
    """Two orthonormal directions of the plane through three points, and the points' coordinates in it.

    Raises:
        UserError: the three lie on one line.
    """
    u = combine((1.0, one), (-1.0, origin))
    length = norm(u)
    if length == 0:
        raise UserError("the plane's points are not three different checkpoints")
    u = combine((1 / length, u))
    to_other = combine((1.0, other), (-1.0, origin))
    along = dot(to_other, u)
    v = combine((1.0, to_other), (-along, u))
    height = norm(v)
    if height <= 1e-6 * length:
        raise UserError("the plane's points lie on one line; take another branch")
    return u, combine((1 / height, v)), [(0.0, 0.0), (length, 0.0), (along, height)]


def barrier(positions: Sequence[float], losses: Sequence[float]) -> float:
    """The loss barrier of a line from position 0 to 1: the largest excess over the straight line between the ends'
    losses.

    Linear mode connectivity (Frankle et al. 2020, arXiv 1912.05671): two solutions are connected when it is about 0.
    It is at least 0, which the ends have.
    """
    order = sorted(zip(positions, losses, strict=True))
    (_, first), (_, last) = order[0], order[-1]
    return max(loss - ((1 - at) * first + at * last) for at, loss in order)


# Scalars at a checkpoint


def sam_sharpness(objective: Objective, radius: float = SAM_RADIUS) -> float:
    """L(θ + ρ g/‖g‖) − L(θ): the first-order worst case of Foret et al. 2021 (arXiv 2010.01412, eq. 2).

    θ is restored.
    """
    origin = objective.weights
    _, gradient = objective.gradient()
    length = norm(gradient)
    here = objective.value()
    if length == 0:
        return 0.0
    found = objective.at(combine((1.0, origin), (radius / length, gradient))) - here
    objective.put(origin)
    return found


def random_perturbation(objective: Objective, radius: float, seed: int) -> float:
    """Loss increase by a random step of length ``radius``: the most common case, one draw. θ is restored."""
    origin = objective.weights
    here = objective.value()
    direction = random_direction(origin, seed, filter_normalised=False)
    found = objective.at(combine((1.0, origin), (radius, direction))) - here
    objective.put(origin)
    return found


def worst_perturbation(objective: Objective, radius: float, *, steps: int = 10, seed: int = 0) -> float:
    """Loss increase by the worst step of length ``radius`` that gradient ascent on the sphere finds. θ is restored.

    Each step goes to the point of the sphere along the gradient where it stands (Frank-Wolfe for a maximum): on a
    convex quadratic the loss never falls on the way, and it ends at the true worst case. In general it is a lower
    bound of it.
    """
    origin = objective.weights
    here = objective.value()
    # A tiny random start, so that the gradient is not 0 where θ is a minimum.
    step = combine((radius * 1e-2, random_direction(origin, seed, filter_normalised=False)))
    best = -math.inf
    for _ in range(steps):
        objective.put(combine((1.0, origin), (1.0, step)))
        _, gradient = objective.gradient()
        length = norm(gradient)
        if length == 0:
            break
        step = combine((radius / length, gradient))
        best = max(best, objective.at(combine((1.0, origin), (1.0, step))) - here)
    objective.put(origin)
    return best


def curvature_operator(objective: Objective, kind: str = "hessian") -> Any:
    """Products with the ``hessian`` of the loss, or with its generalised Gauss-Newton matrix (``ggn``), which leaves
    out the model's own curvature and is never negative: their eigenvalues are not the same and are never mixed.

    Needs a model with eager attention, and hessian-eigenthings (extra ``analysis``).

    Raises:
        UserError: the extra is not installed.
    """
    try:
        from hessian_eigenthings import GGNOperator, HessianOperator
    except ImportError:
        raise UserError("Hessians need hessian-eigenthings; pip install 'motkit[analysis]'") from None
    # It takes the plain mean over batches; scaled like this the mean is over tokens.
    share = {id(batch): weight * len(objective.batches) / objective.total for batch, weight in objective.batches}
    data = [batch for batch, _ in objective.batches]
    if kind == "hessian":
        # Not moved or copied on the way, so that a batch is known by its identity.
        scaled = [(batch, share[id(batch)]) for batch in data]
        return HessianOperator(
            objective.model, scaled, lambda model, pair: pair[1] * objective.batch_loss(model, pair[0])
        )
    if kind != "ggn":
        raise ValueError(f"kind: expected 'hessian' or 'ggn', got {kind!r}")
    import torch

    def forward(model: Any, pair: Any) -> Any:
        (ids, _), _ = pair
        return model(input_ids=ids, use_cache=False).logits[:, :-1].float()

    def loss_of_logits(logits: Any, pair: Any) -> Any:
        (_, targets), weight = pair
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
        return weight * loss

    return GGNOperator(objective.model, [(batch, share[id(batch)]) for batch in data], forward, loss_of_logits)


@dataclass(frozen=True)
class Spectrum:
    """What is known of a curvature matrix: its largest eigenvalues in magnitude, its trace and its density.

    ``nodes`` and ``weights``: the quadrature of stochastic Lanczos, whose weights sum to 1 over each run.
    """

    operator: str
    eigenvalues: list[float]
    residuals: list[float]
    trace: float
    trace_error: float
    nodes: list[float]
    weights: list[float]


def spectrum(
    objective: Objective,
    *,
    kind: str = "hessian",
    top: int = 5,
    lanczos_steps: int = 30,
    trace_samples: int = 20,
    density_runs: int = 2,
    seed: int = 0,
) -> Spectrum:
    """Top eigenvalues (Lanczos), trace (Hutchinson, with its standard error) and density (stochastic Lanczos
    quadrature).

    Costs lanczos_steps × (1 + density_runs) + trace_samples products, each about 3.6 forward and backward passes.
    """
    from hessian_eigenthings import lanczos, spectral_density, trace

    operator = curvature_operator(objective, kind)
    steps = min(lanczos_steps, operator.size)
    pairs = lanczos(operator, k=min(top, steps), max_iter=steps, which="LM", reorthogonalize=True, seed=seed)
    traced = trace(operator, num_matvecs=trace_samples, method="hutchinson", seed=seed)
    density = spectral_density(operator, num_runs=density_runs, lanczos_steps=steps, num_grid_points=8, seed=seed)
    nodes, weights = density.raw_eigenvalues.double().flatten(), density.raw_weights.double().flatten()
    known = nodes.isfinite()
    return Spectrum(
        kind,
        pairs.eigenvalues.double().tolist(),
        pairs.residuals.double().tolist(),
        float(traced.estimate),
        float(traced.stderr),
        nodes[known].tolist(),
        (weights[known] / density_runs).tolist(),
    )


def density_curve(nodes: Sequence[float], weights: Sequence[float], grid: Sequence[float], width: float) -> Any:
    """The density on a grid: each node a Gaussian of this ``width``; it integrates to 1."""
    import numpy

    apart = (numpy.asarray(grid)[:, None] - numpy.asarray(nodes)[None]) / width
    return (numpy.exp(-0.5 * apart**2) / (width * math.sqrt(2 * math.pi))) @ numpy.asarray(weights)


# Points, each computed once


class Points:
    """A JSONL file of what has been computed, a line per point, known by what it was computed from.

    A killed analysis goes on where it stopped; another checkpoint, another set of traces or another place gives another
    key, so that nothing stale is ever used.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.known: dict[str, dict[str, Any]] = {}
        whole = 0
        if file.is_file():
            for line in file.read_bytes().splitlines(keepends=True):
                try:
                    record = json.loads(line)
                except ValueError:
                    break
                if not line.endswith(b"\n"):
                    break
                self.known[record["key"]] = record
                whole += len(line)
            with rundir.storage_errors(file):
                os.truncate(file, whole)  # a torn last line
        self.computed = 0

    def get(self, what: Mapping[str, Any], compute: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """The record of ``what``; computed and written at once if it is not there yet."""
        key = rundir.digest(dict(what))
        if key not in self.known:
            record = {"key": key, **what, **compute()}
            with rundir.storage_errors(self.file):
                self.file.parent.mkdir(parents=True, exist_ok=True)
                with self.file.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(record) + "\n")
            self.known[key] = record
            self.computed += 1
        return self.known[key]


def checkpoint_identity(checkpoint: Path) -> str:
    """Digest of a checkpoint's weights: from its stage's record, or else of the files themselves."""
    record = rundir.read_done(checkpoint.parent)
    if record is not None and checkpoint.name == "checkpoint":
        return rundir.checkpoint_digest(record)
    return rundir.digest({file.name: rundir.hash_file(file) for file in weight_files(checkpoint)})


@dataclass(frozen=True)
class Detail:
    """How finely to look. `QUICK` is for the quickstart on two cores."""

    traces_per_set: int = 32
    curvature_traces_per_set: int = 8
    line_points: int = 21
    plane_points: int = 13
    seeds: int = 3
    worst_steps: int = 8
    lanczos_steps: int = 30
    trace_samples: int = 16
    density_runs: int = 2
    random_reach: float = 1.0
    radii_worst: tuple[float, ...] = RADII_WORST
    radii_most: tuple[float, ...] = RADII_MOST
    curvature: tuple[str, ...] = ("hessian",)


QUICK = Detail(
    traces_per_set=12, curvature_traces_per_set=4, line_points=13, plane_points=9, worst_steps=5, lanczos_steps=16,
    trace_samples=10, density_runs=1,
)  # fmt: skip


class Landscape:
    """Losses around the checkpoints of some runs, on the same traces, point by point.

    Args:
        runs: the first MoT run (or the only run) is looked at in full; the other arms of its seed are put beside it.
        file: JSONL of the points, kept from call to call.
    """

    def __init__(self, runs: Runs, file: Path, detail: Detail | None = None, *, progress: bool = True) -> None:
        self.run = runs.main
        self.detail = detail or Detail()
        self.points = Points(file)
        self.models = compared_models(runs)
        sets, self.traces_are = self.run.traces(per_set=self.detail.traces_per_set)
        self.traces = [trace for some in sets.values() for trace in some]
        few = self.detail.curvature_traces_per_set
        self.few = [trace for some in sets.values() for trace in some[:few]]
        self.bar = tqdm(desc="landscape", unit="point", disable=not progress, file=sys.stderr, leave=False)
        self._objectives: dict[str, Objective] = {}
        self._weights: dict[Path, Weights] = {}
        self._identities: dict[Path, str] = {}

    # What is needed, loaded when a point is missing

    def objective(self, which: str) -> Objective:
        """``value``: on all traces; ``gradient``: on few, with eager attention."""
        if which not in self._objectives:
            attention, traces = ("sdpa", self.traces) if which == "value" else ("eager", self.few)
            model = load_model(self.run.base, dtype="float32", attention=attention)
            self._objectives[which] = trace_objective(model, traces)
        return self._objectives[which]

    def weights(self, checkpoint: Path) -> Weights:
        if checkpoint not in self._weights:
            if len(self._weights) >= 4:  # what is held is bounded: a plane has three corners
                self._weights.pop(next(iter(self._weights)))
            model = load_model(checkpoint, dtype="float32")
            self._weights[checkpoint] = {name: p.detach() for name, p in model.named_parameters()}
        return self._weights[checkpoint]

    def identity(self, checkpoint: Path) -> str:
        if checkpoint not in self._identities:
            self._identities[checkpoint] = checkpoint_identity(checkpoint)
        return self._identities[checkpoint]

    def point(self, kind: str, checkpoints: Sequence[Path], compute: Callable[[], Any], **place: Any) -> dict[str, Any]:
        traces = self.traces if kind in ("random", "random-2d", "plane", "line", "most-case") else self.few
        shown = rundir.digest([[trace.input_ids, trace.num_prompt_tokens] for trace in traces])
        of = [self.identity(checkpoint) for checkpoint in checkpoints]
        record = self.points.get({"kind": kind, "of": of, "traces": shown, **place}, compute)
        self.bar.update()
        return record

    def loss(self, kind: str, checkpoints: Sequence[Path], weights: Callable[[], Weights], **place: Any) -> float:
        record = self.point(
            kind, checkpoints, lambda: {"loss": self.objective("value").at(weights())}, **place
        )  # fmt: skip
        return float(record["loss"])

    # Tables

    def random_lines(self) -> "pandas.DataFrame":
        """Loss along filter-normalised random directions; columns model, arm, seed, position, loss."""
        import pandas

        rows = []
        for name, (arm, checkpoint) in self.models.items():
            for seed in range(self.detail.seeds):
                direction = _once(lambda c=checkpoint, s=seed: random_direction(self.weights(c), s))
                for at in _positions(-self.detail.random_reach, self.detail.random_reach, self.detail.line_points):
                    loss = self.loss(
                        "random",
                        [checkpoint],
                        lambda c=checkpoint, at=at, d=direction: combine((1.0, self.weights(c)), (at, d())),
                        seed=seed,
                        position=at,
                    )
                    rows.append({"model": name, "arm": arm, "seed": seed, "position": at, "loss": loss})
        return pandas.DataFrame(rows)

    def random_planes(self, arms: Sequence[str] = ("base", "std", "mot")) -> "pandas.DataFrame":
        """Loss in the plane of two random directions; columns model, arm, x, y, loss."""
        import pandas

        rows = []
        shown: set[str] = set()
        reach = self.detail.random_reach
        for name, (arm, checkpoint) in self.models.items():
            if arm not in arms or arm in shown:
                continue
            shown.add(arm)
            directions = [_once(lambda c=checkpoint, s=s: random_direction(self.weights(c), s)) for s in (1000, 1001)]
            for x in _positions(-reach, reach, self.detail.plane_points):
                for y in _positions(-reach, reach, self.detail.plane_points):
                    loss = self.loss(
                        "random-2d",
                        [checkpoint],
                        lambda c=checkpoint, x=x, y=y, d=directions: combine(
                            (1.0, self.weights(c)), (x, d[0]()), (y, d[1]())
                        ),
                        seeds=[1000, 1001],
                        x=x,
                        y=y,
                    )
                    rows.append({"model": name, "arm": arm, "x": x, "y": y, "loss": loss})
        return pandas.DataFrame(rows)

    def plane(self) -> tuple["pandas.DataFrame", "pandas.DataFrame"]:
        """The plane through the base, the final student and its last round's first branch: (losses, its corners)."""
        import pandas

        last = self.run.rounds_done[-1]
        branches = self.run.branches(last)
        final, base = self.run.final, self.run.base
        empty = pandas.DataFrame(columns=["x", "y", "loss"]), pandas.DataFrame(columns=["name", "x", "y"])
        if len(branches) < 2:  # the merge of one branch is that branch
            return empty
        name, branch = next(iter(branches.items()))
        basis = _once(lambda: plane_basis(self.weights(base), self.weights(final), self.weights(branch)))
        where = self.point(
            "plane-corners", [base, final, branch], lambda: {"corners": [list(pair) for pair in basis()[2]]}
        )["corners"]  # fmt: skip
        xs, ys = [x for x, _ in where], [y for _, y in where]
        margin = 0.25 * max(max(xs) - min(xs), max(ys) - min(ys))
        rows = []
        for x in _positions(min(xs) - margin, max(xs) + margin, self.detail.plane_points):
            for y in _positions(min(ys) - margin, max(ys) + margin, self.detail.plane_points):
                loss = self.loss(
                    "plane",
                    [base, final, branch],
                    lambda x=x, y=y: combine((1.0, self.weights(base)), (x, basis()[0]), (y, basis()[1])),
                    x=x,
                    y=y,
                )
                rows.append({"x": x, "y": y, "loss": loss})
        names = ["base", f"merged, round {last}", f"branch {name}, round {last}"]
        corners = [{"name": label, "x": x, "y": y} for label, (x, y) in zip(names, where, strict=True)]
        return pandas.DataFrame(rows), pandas.DataFrame(corners)

    def line(self, one: Path, other: Path) -> list[tuple[float, float]]:
        """(position, loss) along the line from one checkpoint (0) to another (1)."""
        points = []
        for at in _positions(0.0, 1.0, max(self.detail.line_points // 2, 7)):
            loss = self.loss(
                "line",
                [one, other],
                lambda at=at: combine((1 - at, self.weights(one)), (at, self.weights(other))),
                position=at,
            )
            points.append((at, loss))
        return points

    def reverse_trajectory(self) -> "pandas.DataFrame":
        """The final student interpolated back to each earlier round's and to the base; columns to, position, loss."""
        import pandas

        rows = []
        for number in [0, *self.run.rounds_done[:-1]]:
            label = f"round {number}" if number else "base"
            for at, loss in self.line(self.run.final, self.run.student(number)):
                rows.append({"to": label, "position": at, "loss": loss})
        return pandas.DataFrame(rows)

    def branch_lines(self) -> tuple["pandas.DataFrame", "pandas.DataFrame"]:
        """Lines between the branches of each round: (losses, the barrier of each line)."""
        import itertools

        import pandas

        rows, barriers = [], []
        for number in self.run.rounds_done:
            for (one, first), (other, second) in itertools.combinations(self.run.branches(number).items(), 2):
                points = self.line(first, second)
                place = {"round": number, "first": one, "second": other}
                rows += [{**place, "position": at, "loss": loss} for at, loss in points]
                barriers.append({**place, "barrier": barrier(*zip(*points, strict=True))})
        lines = pandas.DataFrame(rows, columns=["round", "first", "second", "position", "loss"])
        return lines, pandas.DataFrame(barriers, columns=["round", "first", "second", "barrier"])

    def scalars(self) -> tuple["pandas.DataFrame", "pandas.DataFrame", "pandas.DataFrame"]:
        """(scalars, perturbations, spectra) of every compared model, on few traces.

        Scalars: model, arm, loss, sam_sharpness (and its radius), operator, top_eigenvalue, trace, trace_error.
        Perturbations: model, arm, case (most, worst), seed, radius, radius_share, increase.
        Spectra: model, arm, operator, node, weight.
        """
        import pandas

        detail, base = self.detail, self.run.base
        length = self.point("norm", [base], lambda: {"norm": norm(self.weights(base))})["norm"]
        scalars, perturbations, spectra = [], [], []
        for name, (arm, checkpoint) in self.models.items():
            here = _Placed(self, checkpoint)
            row: dict[str, Any] = {"model": name, "arm": arm}
            sharp = self.point(
                "sam",
                [checkpoint],
                lambda here=here: {"loss": here().value(), "sharpness": sam_sharpness(here())},
                radius=SAM_RADIUS,
            )
            row |= {"loss": sharp["loss"], "sam_radius": SAM_RADIUS, "sam_sharpness": sharp["sharpness"]}
            cases = [("most", seed, share) for share in detail.radii_most for seed in range(detail.seeds)]
            cases += [("worst", 0, share) for share in detail.radii_worst]
            for case, seed, share in cases:
                radius = share * length

                def compute(
                    here: _Placed = here, case: str = case, seed: int = seed, radius: float = radius
                ) -> dict[str, float]:
                    if case == "most":
                        return {"increase": random_perturbation(here(), radius, seed)}
                    return {"increase": worst_perturbation(here(), radius, steps=detail.worst_steps, seed=seed)}

                found = self.point(
                    f"perturbation-{case}", [checkpoint], compute, seed=seed, radius=radius,
                    steps=detail.worst_steps if case == "worst" else 1,
                )  # fmt: skip
                place = {"case": case, "seed": seed, "radius": radius, "radius_share": share}
                perturbations.append({"model": name, "arm": arm, **place, "increase": found["increase"]})
            for kind in detail.curvature:
                settings: dict[str, Any] = {
                    "lanczos_steps": detail.lanczos_steps,
                    "trace_samples": detail.trace_samples,
                    "density_runs": detail.density_runs,
                }
                found = self.point(
                    "spectrum",
                    [checkpoint],
                    lambda here=here, kind=kind, settings=settings: vars(spectrum(here(), kind=kind, **settings)),
                    matrix=kind,
                    **settings,
                )
                top = {"top_eigenvalue": found["eigenvalues"][0], "trace": found["trace"]}
                scalars.append({**row, "operator": kind, **top, "trace_error": found["trace_error"]})
                for node, weight in zip(found["nodes"], found["weights"], strict=True):
                    place = {"model": name, "arm": arm, "operator": kind}
                    spectra.append({**place, "node": node, "weight": weight})
            if not detail.curvature:
                scalars.append(row)
        return pandas.DataFrame(scalars), pandas.DataFrame(perturbations), pandas.DataFrame(spectra)

    def tables(self) -> dict[str, "pandas.DataFrame"]:
        """Everything that `draw_landscape` draws."""
        plane, corners = self.plane()
        lines, barriers = self.branch_lines()
        scalars, perturbations, spectra = self.scalars()
        tables = {
            "random_lines": self.random_lines(),
            "random_planes": self.random_planes(),
            "plane": plane,
            "corners": corners,
            "reverse_trajectory": self.reverse_trajectory(),
            "branch_lines": lines,
            "barriers": barriers,
            "scalars": scalars,
            "perturbations": perturbations,
            "spectra": spectra,
        }
        self.bar.close()
        return tables


class _Placed:
    """The gradient objective with a checkpoint's weights in it, made when it is first asked for."""

    def __init__(self, landscape: Landscape, checkpoint: Path) -> None:
        self.landscape, self.checkpoint = landscape, checkpoint

    def __call__(self) -> Objective:
        objective = self.landscape.objective("gradient")
        objective.put(self.landscape.weights(self.checkpoint))
        return objective


def _once(make: Callable[[], Any]) -> Callable[[], Any]:
    """``make`` called when first needed, and never again."""
    made: list[Any] = []

    def get() -> Any:
        if not made:
            made.append(make())
        return made[0]

    return get


def _positions(low: float, high: float, count: int) -> list[float]:
    """Evenly spaced, both ends, and for an odd count around 0 the exact centre."""
    return [low + (high - low) * step / (count - 1) for step in range(count)]


def compared_models(runs: Runs) -> dict[str, tuple[str, Path]]:
    """The checkpoints that are put side by side, by name: base, STD, MTD, post-hoc, MoT of one seed: (arm, path)."""
    main = runs.main
    models: dict[str, tuple[str, Path]] = {"base": ("base", main.base)}
    others: Iterable[Run] = [run for run in runs.same_seed("std", "mtd", "posthoc") if run is not main]
    for run in [*others, main]:
        if run.rounds_done:
            models[run.name] = (run.arm, run.final)
    return models


# The figure


def model_styles(table: "pandas.DataFrame") -> dict[str, figures.Style]:
    """The arm's style for each model; further models of the same arm (STD of other teachers) get another marker."""
    markers = "sP<>hp8"
    styles: dict[str, figures.Style] = {}
    seen: dict[str, int] = {}
    for model, arm in table[["model", "arm"]].drop_duplicates().itertuples(index=False):
        style = figures.arm_style(arm)
        if number := seen.get(arm, 0):
            style = figures.Style(style.colour, markers[number % len(markers)], (0, (1 + number, 1)))
        seen[arm] = seen.get(arm, 0) + 1
        styles[model] = style
    return styles


def draw_landscape(tables: Mapping[str, "pandas.DataFrame"]) -> Any:
    """Figure 6 and more, from the tables of `Landscape.tables`."""
    with figures.house_style():
        figure, axes = figures.new_figure(3, 3, width_in=11.0, height_in=9.4)
        styles = model_styles(tables["random_lines"])
        _draw_random_lines(axes[0, 0], tables["random_lines"], styles)
        _draw_planes(figure, axes[0, 1], axes[0, 2], tables)
        _draw_plane(figure, axes[1, 0], tables["plane"], tables["corners"])
        _draw_reverse(axes[1, 1], tables["reverse_trajectory"])
        _draw_branch_lines(axes[1, 2], tables["branch_lines"], tables["barriers"])
        _draw_perturbations(axes[2, 0], tables["perturbations"], styles)
        _draw_scalars(axes[2, 1], tables["scalars"], styles)
        _draw_spectra(axes[2, 2], tables["spectra"], styles)
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=min(len(labels), 7))
        figure.supxlabel(CAVEAT, fontsize=8, color="#555555")
    return figure


def _draw_random_lines(axes: Any, table: "pandas.DataFrame", styles: Mapping[str, figures.Style]) -> None:
    for model, part in table.groupby("model", sort=False):
        by = part.groupby("position")["loss"].agg(["mean", "std"])
        figures.plot_band(axes, by.index, by["mean"], by["std"], styles[str(model)], str(model))
    axes.set(xlabel="step along the direction (1: as long as each filter)", ylabel="loss (nats per token)")
    axes.set_title("Random directions, filter-normalised")
    axes.set_yscale("log")


def _contour(figure: Any, axes: Any, part: "pandas.DataFrame", levels: Any) -> Any:
    grid = part.pivot(index="y", columns="x", values="loss")
    values = grid.to_numpy().clip(levels[0], levels[-1])
    axes.grid(False)
    return axes.contourf(grid.columns, grid.index, values, levels=levels, cmap=figures.SEQUENTIAL, norm="log")


def _levels(losses: Any) -> Any:
    import numpy

    low, high = float(losses.min()), float(losses.quantile(0.9))
    low = max(low, 1e-6)
    return numpy.geomspace(low, max(high, low * 1.01), 14)


def _colour_bar(figure: Any, image: Any, axes: Any) -> None:
    bar = figure.colorbar(image, ax=axes, format="%.3g")
    bar.set_label("loss (nats per token)")
    bar.ax.minorticks_off()
    levels = image.levels
    bar.set_ticks([levels[0], levels[len(levels) // 2], levels[-1]])


def _draw_planes(figure: Any, left: Any, right: Any, tables: Mapping[str, "pandas.DataFrame"]) -> None:
    table = tables["random_planes"]
    models = list(table["model"].unique())
    shown = [models[0], models[-1]] if len(models) > 1 else models
    part = table[table["model"].isin(shown)]
    levels = _levels(part["loss"])
    for axes, model in zip((left, right), shown, strict=False):
        image = _contour(figure, axes, part[part["model"] == model], levels)
        axes.plot(0, 0, "o", color="white", markeredgecolor="black")
        axes.set(xlabel="first random direction", ylabel="second", title=f"Random plane around {model}")
    _colour_bar(figure, image, [left, right] if len(shown) > 1 else left)
    if len(shown) < 2:
        right.set_axis_off()


def _draw_plane(figure: Any, axes: Any, plane: "pandas.DataFrame", corners: "pandas.DataFrame") -> None:
    axes.set_title("Plane through base, merge and a branch")
    if plane.empty:
        _say_nothing(axes, "one branch only:\nno plane")
        return
    image = _contour(figure, axes, plane, _levels(plane["loss"]))
    for row, marker in zip(corners.to_dict(orient="records"), "XoD", strict=True):
        axes.plot(row["x"], row["y"], marker, color="white", markeredgecolor="black", label=row["name"], markersize=7)
    axes.legend(loc="upper left", fontsize=7, frameon=True, framealpha=0.85)
    axes.set(xlabel="distance in weight space", ylabel="distance in weight space")
    _colour_bar(figure, image, axes)


def _draw_reverse(axes: Any, table: "pandas.DataFrame") -> None:
    axes.set_title("Reverse trajectory of the final student")
    names = list(table["to"].unique())
    for name, style in figures.series_styles(names).items():
        part = table[table["to"] == name]
        axes.plot(
            part["position"], part["loss"], color=style.colour, marker=style.marker, linestyle=style.line,
            label=f"back to {name}",
        )  # fmt: skip
    axes.set(xlabel="share of the earlier student (0: final)", ylabel="loss (nats per token)")
    axes.legend()


def _draw_branch_lines(axes: Any, table: "pandas.DataFrame", barriers: "pandas.DataFrame") -> None:
    axes.set_title("Lines between the branches of a round")
    if table.empty:
        _say_nothing(axes, "one branch only:\nno line")
        return
    pairs = list((barriers["first"] + " – " + barriers["second"]).unique())
    styles = figures.series_styles(pairs)
    last = table["round"].max()
    for row in barriers.to_dict(orient="records"):
        pair = f"{row['first']} – {row['second']}"
        chosen = (
            (table["round"] == row["round"]) & (table["first"] == row["first"]) & (table["second"] == row["second"])
        )
        part = table[chosen]
        newest = row["round"] == last
        label = f"{pair}: barrier {row['barrier']:.3f}" if newest else None
        style = styles[pair]
        axes.plot(
            part["position"], part["loss"], color=style.colour, marker=style.marker if newest else "",
            alpha=1.0 if newest else 0.35, linewidth=1.6 if newest else 0.9, label=label,
        )  # fmt: skip
    axes.set(xlabel=f"share of the second branch (pale: before round {last})", ylabel="loss (nats per token)")
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.35 * (high - low))
    axes.legend(fontsize=7, loc="upper center")


def _draw_perturbations(axes: Any, table: "pandas.DataFrame", styles: Mapping[str, figures.Style]) -> None:
    for model, part in table.groupby("model", sort=False):
        style = styles[str(model)]
        for case, line, face in (("most", style.line, "white"), ("worst", style.line, style.colour)):
            by = part[part["case"] == case].groupby("radius_share")["increase"].mean()
            axes.plot(
                100 * by.index, by, color=style.colour, linestyle=line, marker=style.marker,
                markerfacecolor=face, alpha=0.9,
            )  # fmt: skip
    axes.set_yscale("symlog", linthresh=1e-2)
    axes.set_xscale("log")
    ticks = [100 * share for share in sorted(table["radius_share"].unique())]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks], fontsize=7)
    axes.minorticks_off()
    axes.set(xlabel="radius (% of the base's weight norm)", ylabel="loss increase (nats per token)")
    axes.set_title("Perturbation: filled worst case, hollow most case")


def _draw_scalars(axes: Any, table: "pandas.DataFrame", styles: Mapping[str, figures.Style]) -> None:
    if "top_eigenvalue" not in table:
        _say_nothing(axes, "no curvature computed")
        return
    operator = table["operator"].iloc[0]
    names = {"sam_sharpness": f"SAM, ρ={table['sam_radius'].iloc[0]:g}", "top_eigenvalue": "top eigenvalue"}
    names["trace"] = "trace"
    part = table[table["operator"] == operator]
    width = 0.8 / len(part)
    for place, row in enumerate(part.to_dict(orient="records")):
        for group, key in enumerate(names):
            # Beside the base's own value: the three have no common unit.
            base = abs(part[key].iloc[0]) or 1.0
            at = group + (place - (len(part) - 1) / 2) * width
            axes.bar(
                at, row[key] / base, width * 0.92, color=styles[row["model"]].colour,
                hatch=["", "//", "..", "xx"][list(part[part["arm"] == row["arm"]]["model"]).index(row["model"]) % 4],
                edgecolor="white", linewidth=0,
            )  # fmt: skip
            if key == "trace":
                error = row["trace_error"] / base
                axes.errorbar(at, row[key] / base, yerr=error, color="#333333", linewidth=0.8)
    axes.axhline(1, color="#000000", linewidth=0.7, linestyle=":")
    label = {"hessian": "Hessian", "ggn": "GGN"}[operator]
    units = [f"{part[key].iloc[0]:.3g}" for key in names]
    axes.set_xticks(
        range(3), [f"{name}\n(base {unit})" for name, unit in zip(names.values(), units, strict=True)], fontsize=7
    )
    axes.set_ylabel("relative to the base")
    axes.set_title(f"Sharpness and {label}")


def _draw_spectra(axes: Any, table: "pandas.DataFrame", styles: Mapping[str, figures.Style]) -> None:
    if table.empty:
        _say_nothing(axes, "no spectrum computed")
        return
    operator = table["operator"].iloc[0]
    part = table[(table["operator"] == operator) & (table["weight"] > 1e-9)]
    for model, some in part.groupby("model", sort=False):
        style = styles[str(model)]
        by = some.sort_values("node")
        axes.plot(
            by["node"],
            by["weight"],
            style.marker,
            color=style.colour,
            linestyle=style.line,
            linewidth=0.7,
            markersize=4,
        )
    axes.set_yscale("log")
    axes.set_xscale("symlog", linthresh=1)
    label = {"hessian": "Hessian", "ggn": "GGN"}[operator]
    axes.set(xlabel=f"eigenvalue of the {label}", ylabel="share of the spectrum")
    axes.set_title(f"Spectral density of the {label} (quadrature)")


def _say_nothing(axes: Any, why: str) -> None:
    axes.set_axis_off()
    axes.text(0.5, 0.5, why, ha="center", va="center", transform=axes.transAxes, color="#555555")
