"""``mot_ties`` against a float64 computation with a sort, against mergekit's ``ties`` and against PEFT's."""

import itertools
import warnings

import pytest
import torch
from mergekit.merge_methods import merge_tensors
from peft.utils.merge_utils import ties as peft_ties

import motkit.merge_methods  # noqa: F401  registers our methods
from motkit.errors import UserError
from motkit.merge_plan import merge_in_memory
from motkit.merge_ties import MagnitudeThresholds, TiesPlan


def reference(base, branches, densities, weights, scale=1.0, groups=None):
    """TIES in float64 with a sort; ``groups`` are slices that are trimmed apart from one another (default: one)."""
    base64 = base.double()
    deltas = []
    for branch, density in zip(branches, densities, strict=True):
        delta = branch.double() - base64
        for group in groups or [slice(None)]:
            part = delta[group]
            k = max(1, int(density * part.numel())) if density else 0
            smallest = part.abs().sort(descending=True).values[k - 1] if k else float("inf")
            delta[group] = torch.where(part.abs() >= smallest, part, 0.0)
        deltas.append(delta)
    deltas, weights = torch.stack(deltas), torch.tensor(weights, dtype=torch.float64)[:, None]
    elected = torch.where((weights * deltas).sum(0) >= 0, 1.0, -1.0)
    agrees = deltas.sign() == elected
    weight_sum = (weights * agrees).sum(0)
    mean = (weights * deltas * agrees).sum(0) / torch.where(weight_sum == 0, 1.0, weight_sum)
    return base64 + scale * mean


def task(num_branches, size, dtype, seed=0, spread=0.002):
    generator = torch.Generator().manual_seed(seed)
    base = (torch.randn(size, generator=generator) * 0.02).to(dtype)
    return base, [
        (base.float() + torch.randn(size, generator=generator) * spread).to(dtype) for _ in range(num_branches)
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_ties_is_the_float64_result_rounded_once(dtype):
    """Its error is that of rounding once (a float32 task vector adds at most 2^-24 of itself to a float32 result)."""
    for num_branches, densities, weights in [
        (1, [0.3], [1.0]),
        (3, [0.5, 0.2, 1.0], [1.0, 1.0, 1.0]),
        (4, [0.5] * 4, [0.3, 0.7, 0.0, 2.0]),
        (2, [0.0, 0.7], [1.0, 1.0]),
    ]:
        base, branches = task(num_branches, 70_001, dtype, seed=num_branches)
        expected = reference(base, branches, densities, weights, 0.8)
        plan = TiesPlan(weights, densities, 0.8)
        for out_dtype in (torch.bfloat16, torch.float32):
            got = merge_in_memory(plan, [*branches, base], out_dtype).double()
            rounded = expected.to(torch.float32).to(out_dtype).double()
            error, once = (got - expected).norm(), (rounded - expected).norm()
            assert error <= 1.01 * once, (num_branches, out_dtype, float(error / once))


def test_thresholds_are_the_kth_magnitudes():
    generator = torch.Generator().manual_seed(3)
    for size, density in itertools.product((1, 2, 77, 100_003), (0.001, 0.2, 0.5, 0.999)):
        base = torch.randn(size, generator=generator) * 10.0 ** torch.randint(-20, 10, (size,), generator=generator)
        branches = [torch.randn(size, generator=generator), base.clone()]  # the second: all task vectors are 0
        statistics = MagnitudeThresholds([density, density], size)
        more = True
        while more:
            for start in range(0, size, 999):
                assert statistics.look([t[start : start + 999] for t in (*branches, base)])
            more = statistics.end_pass()
        k = max(1, int(density * size))
        expected = [(branch - base).abs().sort(descending=True).values[k - 1].item() for branch in branches]
        assert statistics.thresholds == expected


def test_all_entries_as_large_as_the_smallest_kept_one_are_kept():
    base = torch.zeros(6)
    branch = torch.tensor([3.0, -1.0, 1.0, 1.0, 0.5, 0.0])
    assert merge_in_memory(TiesPlan([1.0], [1 / 3]), [branch, base]).tolist() == [3.0, -1.0, 1.0, 1.0, 0.0, 0.0]


def test_sign_election_by_hand():
    base = torch.tensor([1.0, 1.0, 1.0, 1.0])
    branches = [torch.tensor(column) for column in ([3.0, 2.0, 0.0, 1.0], [0.0, 0.0, -1.0, 1.0], [2.0, 1.0, 3.0, 1.0])]
    # task vectors: (2, -1, 1) → + → 1.5; (1, -1, 0) → sum 0 → + → 1; (-1, -2, 2) → - → -1.5; all 0 → 0
    assert merge_in_memory(TiesPlan([1.0] * 3, [1.0] * 3), [*branches, base]).tolist() == [2.5, 2.0, -0.5, 1.0]


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
def test_agrees_with_mergekit_and_peft(density):
    """On float32 values without ties, where the two agree with each other: weights 1, trimmed per tensor."""
    base, branches = task(3, 40_000, torch.float32, seed=5)
    ours = merge_tensors([base, *branches], "mot_ties", base_index=0, parameters={"density": density})
    theirs = merge_tensors([base, *branches], "ties", base_index=0, parameters={"density": density, "weight": 1.0})
    with warnings.catch_warnings(action="ignore"):  # PEFT warns of a density of 1
        peft = base + peft_ties([b - base for b in branches], torch.ones(3), density)
    for other in (theirs, peft):
        assert torch.allclose(ours, other, rtol=0, atol=1e-8)
    # With weights, mergekit elects and averages with them, and so do we.
    parameters = {"density": density, "weight": [0.5, 2.0, 1.0]}
    ours = merge_tensors([base, *branches], "mot_ties", base_index=0, parameters=parameters | {"scale": 0.7})
    theirs = merge_tensors([base, *branches], "ties", base_index=0, parameters=parameters | {"lambda": 0.7})
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-8)


def test_the_order_of_branches_changes_nothing_on_16_bit_weights():
    base, branches = task(4, 300_000, torch.bfloat16, seed=6)
    plan = TiesPlan([1.0] * 4, [0.4] * 4)
    first = merge_in_memory(plan, [*branches, base])
    for order in itertools.islice(itertools.permutations(range(4)), 1, 24, 5):
        assert torch.equal(merge_in_memory(plan, [*(branches[k] for k in order), base]), first)


def test_nan_stays_where_it_is():
    base, branches = task(2, 50_000, torch.float32)
    clean = merge_in_memory(TiesPlan([1.0] * 2, [0.5] * 2), [*branches, base])
    branches[0][40_000] = float("nan")
    branches[1][7] = float("inf")
    got = merge_in_memory(TiesPlan([1.0] * 2, [0.5] * 2), [*branches, base])
    assert torch.nonzero(~torch.isfinite(got)).view(-1).tolist() == [7, 40_000]
    assert (got != clean).sum() < 10  # and thresholds hardly move


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (([1.0, -1.0], [1.0, 1.0]), "parameter weight: expected a positive sum"),
        (([2.0, -1.0], [1.0, 1.0]), "parameter weight: expected at least 0, got -1.0"),
        (([1.0], [1.5]), "parameter density: expected a number from 0 to 1, got 1.5"),
        (([1.0], [float("nan")]), "parameter density"),
        (([1.0], [0.5], float("inf")), "parameter scale: expected a finite number"),
        (([1.0], [0.5], 1.0, "layer"), "parameter trim: expected tensor or model, got 'layer'"),
    ],
)
def test_bad_parameters(arguments, fault):
    with pytest.raises(UserError, match=fault) as caught:
        TiesPlan(*arguments)
    assert str(caught.value).startswith("mot_ties: ")


def test_a_plan_over_the_model_needs_the_model():
    base, branches = task(2, 100, torch.float32)
    with pytest.raises(UserError, match="mot_ties: needs the whole model at once") as caught:
        merge_tensors([base, *branches], "mot_ties", base_index=0, parameters={"density": 0.5, "trim": "model"})
    assert "\n" not in str(caught.value)
