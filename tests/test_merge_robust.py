"""The robust means against numpy, scipy and exact fractions, and against one poisoned branch."""

import itertools
import math
from fractions import Fraction

import numpy
import pytest
import torch
from mergekit.merge_methods import merge_tensors
from scipy.optimize import minimize
from test_merge_methods import DTYPES, KINDS, adversarial, bits, exact_mean

from motkit.errors import UserError
from motkit.merge_plan import merge_in_memory
from motkit.merge_robust import GeometricMedianPlan, OrderedMeanPlan, SquaredDistances, sort_elements


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_branches", [1, 2, 3, 4, 5, 7])
def test_median_and_trimmed_mean_are_exact(dtype, num_branches):
    generator = torch.Generator().manual_seed(num_branches)
    tensors = [torch.cat([adversarial(kind, 40, dtype, generator) for kind in KINDS]) for _ in range(num_branches)]
    base = adversarial("weights", len(tensors[0]), dtype, generator)
    for drop in (None, *range((num_branches + 1) // 2)):
        left = (num_branches - 1) // 2 if drop is None else drop
        ordered = torch.from_numpy(numpy.sort(torch.stack(tensors).double().numpy(), axis=0)).to(dtype)
        kept = list(ordered[left : num_branches - left])
        for scale in (1.0, 0.7):
            step = Fraction(scale)
            coefficients = [step / len(kept)] * len(kept) + ([1 - step] if scale != 1 else [])
            inputs = kept + ([base] if scale != 1 else [])
            expected = exact_mean(inputs, coefficients, torch.float32)
            plan = OrderedMeanPlan(num_branches, drop, scale)
            got = merge_in_memory(plan, [*tensors, base][: num_branches + plan.uses_base], torch.float32)
            assert torch.equal(got, expected), (drop, scale)  # numbers: numpy may order the zeros otherwise
    if num_branches % 2:
        median = merge_in_memory(OrderedMeanPlan(num_branches, None), tensors)
        assert torch.equal(median, torch.stack(tensors).median(dim=0).values)


def test_elements_are_sorted_also_zeros_and_mixed_signs():
    columns = list(itertools.permutations([-math.pi, -0.0, 0.0, 1e-40, 3.0]))
    rows = [torch.tensor(row) for row in zip(*columns, strict=True)]
    expected = torch.tensor([-math.pi, -0.0, 0.0, 1e-40, 3.0])
    for tensor, value in zip(sort_elements(rows), expected, strict=True):
        assert torch.equal(bits(tensor), bits(value.expand(len(columns)).contiguous()))


def test_order_of_branches_changes_nothing():
    generator = torch.Generator().manual_seed(1)
    tensors = [torch.randn(40_000, generator=generator) for _ in range(4)]
    for plan in (OrderedMeanPlan(4, None), OrderedMeanPlan(4, 1), GeometricMedianPlan([1.0] * 4, over="tensor")):
        first = merge_in_memory(plan, tensors)
        for order in itertools.permutations(range(4)):
            assert torch.equal(merge_in_memory(plan, [tensors[k] for k in order]), first)


@pytest.mark.parametrize(("num_branches", "weights"), [(3, [1, 1, 1]), (4, [0.2, 1.0, 2.0, 0.7]), (5, [1] * 5)])
def test_geometric_median_minimises_the_sum_of_distances(num_branches, weights):
    generator = torch.Generator().manual_seed(num_branches)
    points = [torch.randn(6, generator=generator) * (k + 1) for k in range(num_branches)]
    matrix = torch.stack(points).double().numpy()

    def cost(v):
        return float(numpy.dot(weights, numpy.linalg.norm(matrix - v, axis=1)))

    best = minimize(cost, matrix.mean(axis=0), method="BFGS", options={"gtol": 1e-10})
    got = merge_in_memory(GeometricMedianPlan(weights, over="tensor"), points).double().numpy()
    assert cost(got) <= best.fun * (1 + 1e-6)
    assert numpy.allclose(got, best.x, atol=1e-3)


def test_squared_distances_of_spans_add_up():
    generator = torch.Generator().manual_seed(2)
    tensors = [torch.randn(100_000, generator=generator) for _ in range(3)]
    statistics = SquaredDistances([1.0] * 3)
    for start in range(0, 100_000, 30_001):
        assert statistics.look([t[start : start + 30_001] for t in tensors])
    assert not statistics.end_pass()
    for i, j in itertools.product(range(3), range(3)):
        expected = (tensors[i].double() - tensors[j].double()).square().sum().item()
        assert statistics.squared[i][j] == pytest.approx(expected, rel=1e-12)


def test_equal_branches_and_the_base():
    x = torch.randn(50, generator=torch.Generator().manual_seed(3))
    base = torch.zeros(50)
    assert torch.equal(merge_in_memory(GeometricMedianPlan([1, 1, 1], over="tensor"), [x, x, x]), x)
    assert torch.equal(merge_in_memory(GeometricMedianPlan([1, 1], 0.5, "tensor"), [x, x, base]), x / 2)
    parameters = {"scale": 0.5}
    assert torch.equal(merge_tensors([base, x, x, x], "mot_median", base_index=0, parameters=parameters), x / 2)


def test_one_poisoned_branch_of_three_cannot_carry_the_merge_away():
    """Good branches: the truth + noise. Poisoned: its task vector turned round, 1, 10 and 1000 times as long."""
    generator = torch.Generator().manual_seed(4)
    base = torch.randn(20_000, generator=generator) * 0.02
    truth = torch.randn(20_000, generator=generator) * 0.002
    good = [base + truth + torch.randn(20_000, generator=generator) * 0.001 for _ in range(2)]
    mean_of_good = (good[0].double() + good[1].double()) / 2
    spread = (good[0].double() - good[1].double()).norm() / 2
    for length in (1, 10, 1000):
        branches = [*good, base - length * truth]
        errors = {
            method: float((merge_tensors(branches, method).double() - mean_of_good).norm())
            for method in ("mot", "mot_median", "mot_trimmed_mean", "mot_geometric_median")
        }
        for method in ("mot_median", "mot_trimmed_mean", "mot_geometric_median"):
            assert errors[method] <= 1.01 * spread, (length, errors)
        assert errors["mot"] > 0.3 * length * truth.norm()


@pytest.mark.parametrize("method", ["mot_median", "mot_trimmed_mean", "mot_geometric_median"])
def test_nan_stays_where_it_is(method):
    tensors = [torch.randn(50_000, generator=torch.Generator().manual_seed(k)) for k in range(3)]
    tensors[1][40_000] = math.nan
    got = merge_tensors(tensors, method)
    assert torch.nonzero(~torch.isfinite(got)).view(-1).tolist() == [40_000]


def test_bad_parameters():
    with pytest.raises(UserError, match="drop_each_end: 1 of 2 branches at each end leave none"):
        merge_tensors([torch.ones(2)] * 2, "mot_trimmed_mean")
    with pytest.raises(UserError, match=r"mot_median: parameter scale: 0\.5 needs a base"):
        merge_tensors([torch.ones(2)] * 2, "mot_median", parameters={"scale": 0.5})
    with pytest.raises(UserError, match="parameter weight: expected at least 0"):
        GeometricMedianPlan([2.0, -1.0])
    with pytest.raises(UserError, match="needs the whole model at once"):
        merge_tensors([torch.ones(2)] * 2, "mot_geometric_median", parameters={"over": "model"})
    with pytest.raises(UserError, match="dtype float64: expected bfloat16"):
        merge_tensors([torch.ones(2, dtype=torch.float64)] * 3, "mot_median")
