"""The landscape on a quadratic, where everything has a closed form; Hessians against an explicit one; resuming."""

import itertools
import math

import numpy
import pytest
import torch
from conftest import make_pico_checkpoint
from scipy.optimize import brentq
from test_confidence import some_traces

from motkit.analysis import landscape
from motkit.analysis.models import load_model
from motkit.errors import UserError

SIZE = 12


class Quadratic(torch.nn.Module):
    """½ (θ − c)ᵀ A (θ − c), its weights a matrix and a vector, in float64."""

    def __init__(self, eigenvalues, seed=0):
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.matrix = torch.nn.Parameter(torch.randn(3, 3, generator=draw, dtype=torch.float64))
        self.vector = torch.nn.Parameter(torch.randn(SIZE - 9, generator=draw, dtype=torch.float64))
        q, _ = torch.linalg.qr(torch.randn(SIZE, SIZE, generator=draw, dtype=torch.float64))
        self.curvature = q @ torch.diag(torch.tensor(eigenvalues, dtype=torch.float64)) @ q.T
        self.centre = torch.randn(SIZE, generator=draw, dtype=torch.float64)

    def flat(self):
        return torch.cat([self.matrix.flatten(), self.vector])

    def loss(self, share):
        apart = self.flat() - self.centre
        return 0.5 * share * apart @ self.curvature @ apart


def quadratic(eigenvalues=(*range(1, SIZE), 20), seed=0):
    model = Quadratic(eigenvalues, seed)
    # Two batches, unlike in loss and in weight, whose weighted mean is the quadratic: (3 · 0.5 + 1 · 2.5) / 4 = 1.
    batches = [(torch.tensor(0.5), 3.0), (torch.tensor(2.5), 1.0)]
    return model, landscape.Objective(model, batches, lambda model, share: model.loss(share))


def exact(model, flat):
    apart = flat - model.centre
    return 0.5 * float(apart @ model.curvature @ apart)


def put_flat(model, flat):
    model.matrix.data.copy_(flat[:9].reshape(3, 3))
    model.vector.data.copy_(flat[9:])


def test_loss_and_gradient_of_a_quadratic():
    model, objective = quadratic()
    flat = model.flat().detach()
    assert objective.value() == pytest.approx(exact(model, flat), rel=1e-12)
    loss, gradient = objective.gradient()
    assert loss == pytest.approx(exact(model, flat), rel=1e-12)
    found = torch.cat([gradient["matrix"].flatten(), gradient["vector"]])
    torch.testing.assert_close(found, model.curvature @ (flat - model.centre))


def test_sam_sharpness_is_its_closed_form():
    model, objective = quadratic()
    flat, radius = model.flat().detach(), 0.3
    gradient = model.curvature @ (flat - model.centre)
    length = float(gradient.norm())
    expected = radius * length + 0.5 * radius**2 * float(gradient @ model.curvature @ gradient) / length**2
    assert landscape.sam_sharpness(objective, radius) == pytest.approx(expected, rel=1e-10)
    torch.testing.assert_close(model.flat().detach(), flat, rtol=0, atol=0)


def test_the_worst_case_is_that_of_the_trust_region():
    """max over ‖δ‖ = ρ of gᵀδ + ½ δᵀAδ: δ = (μ − A)⁻¹ g with μ > λ_max such that ‖δ‖ = ρ."""
    model, objective = quadratic()
    flat, radius = model.flat().detach(), 0.7
    gradient = (model.curvature @ (flat - model.centre)).numpy()
    values, vectors = numpy.linalg.eigh(model.curvature.numpy())
    along = vectors.T @ gradient
    length = lambda mu: math.sqrt(((along / (mu - values)) ** 2).sum())  # noqa: E731
    mu = brentq(lambda mu: length(mu) - radius, values[-1] + 1e-9, values[-1] + 1e6)
    step = along / (mu - values)
    expected = along @ step + 0.5 * (values * step**2).sum()
    assert landscape.worst_perturbation(objective, radius, steps=60) == pytest.approx(expected, rel=1e-8)
    # at the minimum, where the gradient is 0: half the largest eigenvalue times the radius squared
    put_flat(model, model.centre)
    assert landscape.worst_perturbation(objective, radius, steps=60) == pytest.approx(0.5 * 20 * radius**2, rel=1e-6)
    torch.testing.assert_close(model.flat().detach(), model.centre, rtol=0, atol=0)


def test_the_most_common_case_is_the_mean_curvature():
    """At the minimum E[½ δᵀAδ] = ρ² tr A / 2n for δ uniform on the sphere."""
    model, objective = quadratic()
    put_flat(model, model.centre)
    draws = [landscape.random_perturbation(objective, 0.5, seed) for seed in range(400)]
    expected = 0.25 * float(model.curvature.trace()) / (2 * SIZE)
    error = numpy.std(draws, ddof=1) / math.sqrt(len(draws))
    assert numpy.mean(draws) == pytest.approx(expected, abs=4 * error)
    same, _ = quadratic([3.0] * SIZE)
    objective = landscape.Objective(same, [(torch.tensor(1.0), 1.0)], lambda model, share: model.loss(share))
    put_flat(same, same.centre)
    assert landscape.random_perturbation(objective, 0.5, 7) == pytest.approx(0.5 * 3 * 0.25, rel=1e-6)


def test_spectrum_trace_and_density_are_those_of_the_matrix():
    pytest.importorskip("hessian_eigenthings")
    model, objective = quadratic()
    found = landscape.spectrum(objective, top=3, lanczos_steps=SIZE, trace_samples=600, density_runs=200)
    assert found.operator == "hessian"
    assert found.eigenvalues == pytest.approx([20, 11, 10], rel=1e-9)
    assert abs(found.trace - float(model.curvature.trace())) < 4 * found.trace_error
    assert sum(found.weights) == pytest.approx(1)
    # the quadrature gives every moment of the density exactly in expectation: the mean eigenvalue, and their squares
    nodes, weights = numpy.array(found.nodes), numpy.array(found.weights)
    values = numpy.array([*range(1, SIZE), 20.0])
    assert (weights * nodes).sum() == pytest.approx(values.mean(), rel=0.05)
    assert (weights * nodes**2).sum() == pytest.approx((values**2).mean(), rel=0.08)
    grid = numpy.linspace(-5, 30, 2001)
    curve = landscape.density_curve(found.nodes, found.weights, grid, 0.5)
    assert numpy.trapezoid(curve, grid) == pytest.approx(1, rel=1e-6)


def test_barriers():
    at = [0, 0.25, 0.5, 0.75, 1]
    quartic = [(2 * x - 1) ** 2 * -1 + 1 for x in at]  # 0 at the ends, 1 in the middle
    assert landscape.barrier(at, quartic) == pytest.approx(1)
    tilted = [loss + 3 * x for x, loss in zip(at, quartic, strict=True)]
    assert landscape.barrier(at, tilted) == pytest.approx(1)
    assert landscape.barrier(at, [(x - 0.5) ** 2 for x in at]) == 0


def test_directions_are_filter_normalised():
    weights = {"w": torch.randn(4, 6) * 3, "experts": torch.randn(2, 3, 5), "norm": torch.randn(6)}
    direction = landscape.random_direction(weights, 1)
    for name in ("w", "experts"):
        torch.testing.assert_close(direction[name].norm(dim=-1), weights[name].norm(dim=-1))
    assert not direction["norm"].any()
    again, other = landscape.random_direction(weights, 1), landscape.random_direction(weights, 2)
    assert torch.equal(direction["w"], again["w"])
    assert not torch.equal(direction["w"], other["w"])
    whole = landscape.random_direction(weights, 1, filter_normalised=False)
    assert landscape.norm(whole) == pytest.approx(1, rel=1e-6)
    assert whole["norm"].any()


def test_the_plane_goes_through_its_three_points():
    def point(seed):
        return {"a": torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))}

    origin, one, other = point(0), point(1), point(2)
    u, v, corners = landscape.plane_basis(origin, one, other)
    assert landscape.dot(u, v) == pytest.approx(0, abs=1e-12)
    assert landscape.norm(u) == pytest.approx(1)
    for (x, y), corner in zip(corners, (origin, one, other), strict=True):
        torch.testing.assert_close(landscape.combine((1.0, origin), (x, u), (y, v))["a"], corner["a"])
    with pytest.raises(UserError, match="one line"):
        landscape.plane_basis(origin, one, landscape.combine((0.5, origin), (0.5, one)))


@pytest.fixture(scope="module")
def pico(tmp_path_factory):
    small = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 4}
    path = tmp_path_factory.mktemp("pico") / "m"
    return make_pico_checkpoint("llama", path, dtype="float32", num_key_value_heads=1, **small)


def test_losses_of_a_model_are_those_of_a_plain_computation(pico):
    traces = some_traces()
    model = load_model(pico, dtype="float64", attention="eager", device="cpu")
    total, count = 0.0, 0
    for trace in traces:
        with torch.no_grad():
            log_p = model(torch.tensor([trace.input_ids])).logits[0].log_softmax(-1)
        for position in range(trace.num_prompt_tokens, len(trace.input_ids)):
            total, count = total - log_p[position - 1, trace.input_ids[position]].item(), count + 1
    expected = total / count
    objective = landscape.trace_objective(load_model(pico, dtype="float32", device="cpu"), traces, batch_tokens=50)
    assert objective.total == count
    assert objective.value() == pytest.approx(expected, rel=1e-6)
    eager = load_model(pico, dtype="float64", attention="eager", device="cpu")
    loss, _ = landscape.trace_objective(eager, traces, batch_tokens=50).gradient()
    assert loss == pytest.approx(expected, rel=1e-6)


def explicit_hessian(model, traces, columns):
    """∂²L/∂θ², a column at a time, of the loss written out by hand in float64."""
    parameters = list(model.parameters())
    total, count = 0.0, 0
    for trace in traces:
        logits = model(input_ids=torch.tensor([trace.input_ids])).logits[0]
        log_p = logits - logits.exp().sum(-1, keepdim=True).log()
        for place in range(trace.num_prompt_tokens, len(trace.input_ids)):
            total = total - log_p[place - 1, trace.input_ids[place]]
            count += 1
    gradient = torch.autograd.grad(total / count, parameters, create_graph=True)
    flat = torch.cat([part.flatten() for part in gradient])
    rows = []
    for column in columns:
        parts = torch.autograd.grad(flat[column], parameters, retain_graph=True, allow_unused=True)
        whole = [torch.zeros_like(p) if part is None else part for p, part in zip(parameters, parts, strict=True)]
        rows.append(torch.cat([part.flatten() for part in whole]))
    return torch.stack(rows)


def test_hessian_products_are_those_of_an_explicit_hessian(pico):
    pytest.importorskip("hessian_eigenthings")
    traces = some_traces((5, 14, 9))
    model = load_model(pico, dtype="float64", attention="eager", device="cpu")
    operator = landscape.curvature_operator(landscape.trace_objective(model, traces, batch_tokens=20))
    columns = list(range(3, operator.size, operator.size // 12))
    hessian = explicit_hessian(model, traces, columns)
    for column, row in zip(columns, hessian, strict=True):
        unit = torch.zeros(operator.size, dtype=torch.float64)
        unit[column] = 1
        torch.testing.assert_close(operator.matvec(unit), row, rtol=1e-5, atol=1e-9)


@pytest.mark.slow
def test_top_eigenvalues_trace_and_ggn_of_a_model(pico):
    pytest.importorskip("hessian_eigenthings")
    traces = some_traces((5, 9))
    model = load_model(pico, dtype="float64", attention="eager", device="cpu")
    objective = landscape.trace_objective(model, traces)
    size = landscape.curvature_operator(objective).size
    whole = explicit_hessian(model, traces, range(size))
    values = torch.linalg.eigvalsh((whole + whole.T) / 2)
    found = landscape.spectrum(objective, top=2, lanczos_steps=60, trace_samples=100, density_runs=1)
    order = values[values.abs().argsort(descending=True)]
    assert found.eigenvalues == pytest.approx(order[:2].tolist(), rel=1e-4)
    assert abs(found.trace - float(values.sum())) < 4 * found.trace_error
    ggn = landscape.spectrum(objective, kind="ggn", top=1, lanczos_steps=60, trace_samples=10, density_runs=1)
    assert ggn.operator == "ggn"
    assert min(ggn.nodes) > -1e-6  # the GGN has no negative eigenvalue
    assert values.min() < -1e-6  # the Hessian has


def test_points_are_computed_once_and_a_torn_line_again(tmp_path):
    file, calls = tmp_path / "points.jsonl", itertools.count()

    def compute():
        return {"loss": float(next(calls))}

    points = landscape.Points(file)
    assert points.get({"at": 0.1}, compute)["loss"] == 0
    assert points.get({"at": 0.2}, compute)["loss"] == 1
    assert points.get({"at": 0.1}, compute)["loss"] == 0
    assert landscape.Points(file).get({"at": 0.2}, compute)["loss"] == 1
    content = file.read_bytes()
    file.write_bytes(content[:-5])  # killed while writing
    again = landscape.Points(file)
    assert again.get({"at": 0.1}, compute)["loss"] == 0
    assert again.get({"at": 0.2}, compute)["loss"] == 2
    assert len(landscape.Points(file).known) == 2
