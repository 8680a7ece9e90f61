"""The kernel of ``mot`` against exact rational arithmetic, and the method inside stock mergekit."""

import importlib
import itertools
import math
import random
from fractions import Fraction

import pytest
import torch
from mergekit import merge_methods as mergekit_methods
from mergekit.merge_methods import merge_state_dicts, merge_tensors

from motkit import merge_float, merge_methods
from motkit.errors import UserError
from motkit.merge_float import round_ratio, value_range
from motkit.merge_mean import WeightedMean, mot_coefficients, weighted_mean

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
INTEGERS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}
INFINITY = {torch.bfloat16: 0x7F80, torch.float16: 0x7C00, torch.float32: 0x7F800000}
OVERFLOW = {torch.bfloat16: 128, torch.float16: 16, torch.float32: 128}  # the infinity's bits, read as a number: 2^this
MANTISSA = {torch.bfloat16: 7, torch.float16: 10, torch.float32: 23}


def bits(tensor):
    return tensor.view(INTEGERS[tensor.dtype])


def magnitude_at(pattern, dtype):
    """The number that a bit pattern without sign stands for."""
    if pattern == INFINITY[dtype]:
        return Fraction(2) ** OVERFLOW[dtype]
    return Fraction(torch.tensor([pattern], dtype=INTEGERS[dtype]).view(dtype).item())


def nearest(value, dtype):
    """Bit pattern without sign of |value| rounded to nearest, ties to even: the best of three neighbours."""
    value = abs(value)
    guess = int(bits(torch.tensor([min(float(value), 1e300)], dtype=torch.float64).to(dtype)))
    near = [p for p in (guess - 1, guess, guess + 1) if 0 <= p <= INFINITY[dtype]]
    return min(near, key=lambda p: (abs(magnitude_at(p, dtype) - value), p & 1))


def exact_mean(tensors, coefficients, dtype):
    """Σ c_k x_k by fractions, element by element; a sum of negative zeros stays -0."""
    result = []
    for row in zip(*(t.to(torch.float64).tolist() for t in tensors), strict=True):
        terms = [(c, x) for c, x in zip(coefficients, row, strict=True) if c]
        value = sum((c * Fraction(x) for c, x in terms), Fraction(0))
        negative = value < 0 or (
            all(x == 0 for _, x in terms) and all((c < 0) != (math.copysign(1, x) < 0) for c, x in terms)
        )
        magnitude = torch.tensor([nearest(value, dtype)], dtype=INTEGERS[dtype]).view(dtype)
        result.append(-magnitude if negative else magnitude)
    return torch.cat(result)


def adversarial(kind, count, dtype, generator):
    """Values of one kind: what weights look like, and what breaks rounding."""
    normal = torch.randn(count, generator=generator)
    if kind == "weights":
        return (normal * 0.02).to(dtype)
    if kind == "any bits":
        width = 8 * torch.empty(0, dtype=dtype).element_size()
        patterns = torch.randint(-(1 << (width - 1)), 1 << (width - 1), (count,), generator=generator)
        values = patterns.to(INTEGERS[dtype]).view(dtype)
        return torch.where(torch.isfinite(values), values, torch.zeros_like(values))
    if kind == "subnormal":
        patterns = torch.randint(0, 4 << MANTISSA[dtype], (count,), generator=generator)
        return patterns.to(INTEGERS[dtype]).view(dtype) * normal.sign().to(dtype)
    if kind == "ties":
        return torch.randint(-9, 10, (count,), generator=generator).to(dtype)
    if kind == "huge":
        top = torch.full((count,), INFINITY[dtype] - 1) - torch.randint(0, 9, (count,), generator=generator)
        return top.to(INTEGERS[dtype]).view(dtype) * normal.sign().to(dtype)
    values = (normal * 0.02).to(dtype)  # "wide": one chunk with 0.02, 1e-7 (1e-30 where it exists) and both zeros
    values[::3] = 1e-7 if dtype == torch.float16 else 1e-30
    values[1], values[2] = 0.0, -0.0
    return values


KINDS = ["weights", "any bits", "subnormal", "ties", "huge", "wide"]
WEIGHTS = {
    "equal": lambda k: [1.0] * k,
    "0.3": lambda k: [0.3] + [0.7] * (k - 1),
    "counting": lambda k: [0.1 * (i + 1) for i in range(k)],
    "far apart": lambda k: [1e-10] + [1.0] * (k - 1),
    "negative": lambda k: [-0.25] + [1.0] * (k - 1) if k > 1 else [1.0],
    "with a zero": lambda k: [0.0] + [1.0] * (k - 1) if k > 1 else [1.0],
}


@pytest.mark.parametrize("weighting", WEIGHTS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_element_is_the_exact_value_rounded_once(kind, weighting):
    rng = random.Random(f"{kind} {weighting}")
    generator = torch.Generator().manual_seed(rng.randrange(1 << 30))
    for num_branches, out_dtype in itertools.product(range(1, 8), DTYPES):
        scale = rng.choice([1.0, 0.7, 1.5])
        dtype = rng.choice(DTYPES)
        branches, base = mot_coefficients(WEIGHTS[weighting](num_branches), scale)
        coefficients = [*branches, base] if base else branches
        tensors = [adversarial(kind, 48, dtype, generator) for _ in coefficients]
        if rng.random() < 0.3:
            tensors[0] = adversarial(kind, 48, rng.choice(DTYPES), generator)
        got = weighted_mean(tensors, coefficients, out_dtype)
        expected = exact_mean(tensors, coefficients, out_dtype)
        assert torch.equal(bits(got), bits(expected)), (num_branches, out_dtype, dtype, scale)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighting", ["equal", "counting"])
def test_the_order_of_the_branches_does_not_matter(dtype, weighting):
    generator = torch.Generator().manual_seed(3)
    tensors = [torch.cat([adversarial(k, 200, dtype, generator) for k in KINDS]) for _ in range(4)]
    coefficients, _ = mot_coefficients(WEIGHTS[weighting](4))
    first = weighted_mean(tensors, coefficients)
    for order in itertools.permutations(range(4)):
        again = weighted_mean([tensors[k] for k in order], [coefficients[k] for k in order])
        assert torch.equal(bits(first), bits(again))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weighting", ["equal", "0.3", "far apart"])
@pytest.mark.parametrize("num_branches", [1, 2, 3, 7])
def test_equal_branches_come_back_bit_for_bit(dtype, weighting, num_branches):
    generator = torch.Generator().manual_seed(1)
    value = torch.cat([adversarial(kind, 300, dtype, generator) for kind in KINDS])
    coefficients, _ = mot_coefficients(WEIGHTS[weighting](num_branches))
    assert torch.equal(bits(weighted_mean([value] * num_branches, coefficients)), bits(value))


def test_float64_to_bfloat16_is_not_rounded_twice():
    # Just above a tie of bfloat16; float32 rounds it onto the tie, and the tie goes down to even.
    tensors = [torch.tensor([1.0]), torch.tensor([2.0**-8]), torch.tensor([2.0**-30])]
    got = weighted_mean(tensors, [Fraction(1)] * 3, torch.bfloat16)
    assert got.item() == 1 + 2**-7
    assert sum(t.to(torch.float64) for t in tensors).to(torch.bfloat16).item() == 1.0  # what torch makes of it


@pytest.mark.parametrize("out_dtype", DTYPES)
def test_sums_next_to_midpoints_are_decided_exactly(out_dtype):
    """θ a hair above, on and below midpoints of the output format, where float64 sees all three as one."""
    tiny = 2.0**-140 if out_dtype != torch.float16 else 2.0**-100
    ulp = 2.0 ** -MANTISSA[out_dtype]
    cases, signs = [], []
    for step, sign in itertools.product(range(6), (-1, 0, 1)):
        cases.append((1.0 + step * ulp, ulp / 2, sign * tiny))
        signs.append(sign)
    tensors = [torch.tensor(column, dtype=torch.float32) for column in zip(*cases, strict=True)]
    for coefficients in ([Fraction(1)] * 3, [Fraction(3, 7), Fraction(3, 7), Fraction(1)]):
        scaled = [t * 7 if c.denominator == 7 else t for t, c in zip(tensors, coefficients, strict=True)]
        got = weighted_mean(scaled, coefficients, out_dtype)
        assert torch.equal(bits(got), bits(exact_mean(scaled, coefficients, out_dtype)))


def test_cancellation_keeps_the_bits_of_the_small_term():
    """big + small - big, with the exponents from close together to beyond what float64 holds."""
    small = torch.full((80,), 1 + 2.0**-23) * 2.0 ** -torch.arange(80).to(torch.float32)
    big = torch.full((80,), 1.5)
    for gap in range(80):  # one at a time: a chunk is as wide as its widest element
        tensors = [big[gap : gap + 1], small[gap : gap + 1], -big[gap : gap + 1]]
        assert torch.equal(weighted_mean(tensors, [Fraction(1)] * 3), small[gap : gap + 1])


def test_quotients_next_to_midpoints_of_float32_are_decided_exactly():
    """x · 2^31 / D = m ± 1 / D with a midpoint m of float32: 2^-55 away from it, and equal to it in float64."""
    found = 0
    for m in range(2**24 + 1, 2**24 + 2001, 2):
        for sign in (1, -1):
            denominator = sign * pow(m, -1, 2**31) % 2**31
            x = (m * denominator - sign) >> 31
            if x >= 2**24:
                continue
            found += 1
            coefficients, tensors = [Fraction(2**31, denominator)], [torch.tensor([float(x)])]
            got = weighted_mean(tensors, coefficients)
            assert torch.equal(got, exact_mean(tensors, coefficients, torch.float32)), (m, sign)
    assert found > 100


def test_python_integers_take_over_where_floats_cannot():
    generator = torch.Generator().manual_seed(0)
    for weights in ([1e-300, 1.0, 1e300], [5e-324, 1e-310]):
        coefficients, _ = mot_coefficients(weights)
        tensors = [adversarial("any bits", 40, torch.float32, generator) for _ in weights]
        tensors[0][:3] = -0.0
        tensors[1][:3] = -0.0
        got = weighted_mean(tensors, coefficients)
        assert torch.equal(bits(got), bits(exact_mean(tensors, coefficients, torch.float32)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_ratios_of_integers_round_to_the_nearest_value(dtype):
    rng = random.Random(9)
    for _ in range(2000):
        value = Fraction(rng.randrange(-(2**40), 2**40), rng.randrange(1, 2**40)) * Fraction(2) ** rng.randrange(
            -170, 170
        )
        if rng.random() < 0.3:  # the midpoint of two neighbours
            pattern = rng.randrange(INFINITY[dtype])
            value = (magnitude_at(pattern, dtype) + magnitude_at(pattern + 1, dtype)) / 2
        got = torch.tensor([round_ratio(value.numerator, value.denominator, dtype)], dtype=torch.float64).to(dtype)
        assert int(bits(got.abs())) == nearest(value, dtype), value
        assert bool(got < 0) == (value < 0 and got != 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_value_range_brackets_every_element(dtype):
    generator = torch.Generator().manual_seed(2)
    for kind in KINDS:
        values = adversarial(kind, 500, dtype, generator)
        found = value_range(values)
        exact = [Fraction(x) for x in values.to(torch.float64).tolist()]
        assert all(abs(x) < Fraction(2) ** found.bound for x in exact)
        assert all((x / Fraction(2) ** found.quantum).denominator == 1 for x in exact)
        assert found.finite
        assert not found.zero
    assert value_range(torch.tensor([0.0, -0.0], dtype=dtype)).zero
    for bad in (math.nan, math.inf, -math.inf):
        assert not value_range(torch.tensor([0.0, 1.0, bad], dtype=dtype)).finite


@pytest.mark.parametrize("out_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_branches_of_one_student_are_summed_without_care_and_are_exact(dtype, out_dtype, monkeypatch):
    redone = []
    far = WeightedMean._far
    monkeypatch.setattr(
        WeightedMean,
        "_far",
        lambda self, tensors, out: redone.append(len(out)) or far(self, tensors, out),
    )
    generator = torch.Generator().manual_seed(11)
    student = torch.randn(1600, generator=generator) * 0.02
    student[:60] *= 2.0**-130 if dtype is not torch.float16 else 2.0**-12  # to subnormals
    for num_branches, scale in itertools.product((1, 3, 4, 5), (1.0, 0.5)):
        moved = [student * (1 + 0.01 * torch.randn(1600, generator=generator)) for _ in range(num_branches)]
        tensors = [tensor.to(dtype) for tensor in moved]
        tensors[-1][100], tensors[0][333] = 0.0, -0.0
        tensors[0][1550] = 3e38 if dtype is torch.bfloat16 else 6e4
        branches, base = mot_coefficients([1.0] * num_branches, scale)
        coefficients = [*branches, base] if base else branches
        if base:
            tensors.append(student.to(dtype))
        for values, count in ((tensors, 1600), ([t[:1499] for t in tensors], 1499)):
            redone.clear()
            got = weighted_mean(values, coefficients, out_dtype)
            assert torch.equal(bits(got), bits(exact_mean(values, coefficients, out_dtype))), (num_branches, scale)
            # All that is redone is a block for each of the three that are far from the rest, unless the sum of the
            # large one with others like it would not be finite, or a quotient fills the 24 bits of the result.
            overflows = dtype is torch.bfloat16 and count == 1600
            divisor = num_branches * (2 if base else 1)
            fills = dtype is not torch.float32 and out_dtype is torch.float32 and divisor & (divisor - 1)
            assert overflows or fills or sum(redone) <= 3 * 64, (num_branches, scale, redone)


def test_many_chunks_give_what_one_chunk_gives():
    generator = torch.Generator().manual_seed(4)
    size = 5 * merge_float.CHUNK_CPU + 77
    tensors = [(torch.randn(size, generator=generator) * 0.02).to(torch.bfloat16) for _ in range(3)]
    tensors[0][::1000] = 1e-30
    coefficients, _ = mot_coefficients([1, 1, 1])
    shared = weighted_mean([t.view(-1, 1) for t in tensors], coefficients)
    assert shared.shape == (size, 1)
    shared = shared.view(-1)
    alone = torch.cat([weighted_mean([t[a : a + 999] for t in tensors], coefficients) for a in range(0, size, 999)])
    assert torch.equal(bits(alone), bits(shared))
    sample = torch.randint(size, (300,), generator=generator)
    assert torch.equal(
        bits(shared[sample]), bits(exact_mean([t[sample] for t in tensors], coefficients, torch.bfloat16))
    )


def test_strided_and_empty_tensors():
    generator = torch.Generator().manual_seed(5)
    tensors = [torch.randn(6, 8, generator=generator).t() for _ in range(3)]
    coefficients, _ = mot_coefficients([1, 1, 1])
    got = weighted_mean(tensors, coefficients)
    expected = exact_mean([t.reshape(-1) for t in tensors], coefficients, torch.float32)
    assert torch.equal(got, expected.view(8, 6))
    assert weighted_mean([torch.empty(0, 3)] * 2, [Fraction(1, 2)] * 2).shape == (0, 3)


def test_nan_and_infinity_propagate_and_leave_their_neighbours_alone():
    x = torch.tensor([math.nan, math.inf, math.inf, -math.inf, 1.0, 0.25])
    y = torch.tensor([1.0, 1.0, -math.inf, -math.inf, 2.0, 0.5])
    out = torch.empty(6)
    assert not WeightedMean([Fraction(1, 2)] * 2, torch.float32)([x, y], out)
    assert math.isnan(out[0])
    assert math.isnan(out[2])
    assert out[[1, 3, 4, 5]].tolist() == [math.inf, -math.inf, 1.5, 0.375]
    # A branch with weight 0 is not added, but its NaN is seen.
    assert not WeightedMean([Fraction(0), Fraction(1)], torch.float32)([x, y], out)


@pytest.mark.parametrize(
    ("weights", "scale", "fault"),
    [
        ([1.0, math.nan], 1.0, "parameter weight: expected a finite number, got nan"),
        ([math.inf], 1.0, "parameter weight: expected a finite number, got inf"),
        ([1.0, -1.0], 1.0, "parameter weight: expected a positive sum"),
        ([0.0, 0.0], 1.0, "parameter weight: expected a positive sum"),
        ([1.0], math.nan, "parameter scale: expected a finite number, got nan"),
        ([], 1.0, "no branch"),
    ],
)
def test_bad_weights_are_refused_in_one_line(weights, scale, fault):
    with pytest.raises(UserError, match=fault) as caught:
        mot_coefficients(weights, scale)
    assert str(caught.value).startswith("mot: ")
    assert "\n" not in str(caught.value)


def test_equal_weights_are_exactly_one_over_k():
    for weight in (1.0, 0.1, 3e-7):
        assert mot_coefficients([weight] * 3) == ([Fraction(1, 3)] * 3, 0)
    branches, base = mot_coefficients([1, 3], scale=0.5)
    assert (branches, base) == ([Fraction(1, 8), Fraction(3, 8)], Fraction(1, 2))


# Inside mergekit


def test_import_and_reload_register_once():
    importlib.reload(merge_methods)
    importlib.reload(merge_methods)
    assert mergekit_methods.get("mot").spec.name == "mot"
    with pytest.raises(ValueError, match="already registered"):
        mergekit_methods.register(mergekit_methods.get("mot"))


def test_mergekit_in_memory_api():
    generator = torch.Generator().manual_seed(6)
    base, *branches = ((torch.randn(20, 30, generator=generator) * 0.02) for _ in range(4))
    mean = merge_tensors(branches, "mot")
    assert torch.equal(mean, exact_mean([t.view(-1) for t in branches], [Fraction(1, 3)] * 3, mean.dtype).view(20, 30))

    scaled = merge_tensors(
        [base, *branches],
        "mot",
        base_index=0,
        parameters={"weight": [1.0, 2.0, 1.0], "scale": 0.7},
        out_dtype=torch.bfloat16,
    )
    coefficients, rest = mot_coefficients([1.0, 2.0, 1.0], 0.7)
    flat = [t.view(-1) for t in (*branches, base)]
    assert torch.equal(scaled.view(-1), exact_mean(flat, [*coefficients, rest], torch.bfloat16))

    merged = merge_state_dicts([{"w": t, "steps": torch.tensor([7])} for t in branches], "mot")
    assert torch.equal(merged["w"], mean)
    assert merged["steps"].tolist() == [7]


def test_out_dtype_and_round_to_round_once():
    # The sum is 1 + 2^-8 + 2^-30: two roundings give 1, one gives 1 + 2^-7.
    tensors = [torch.tensor([x * 3]) for x in (1.0, 2.0**-8, 2.0**-30)]
    assert merge_tensors(tensors, "mot", out_dtype=torch.bfloat16).item() == 1 + 2**-7
    assert merge_tensors(tensors, "mot", parameters={"round_to": "bfloat16"}).item() == 1 + 2**-7
    assert merge_tensors(tensors, "mot", parameters={"round_to": "bfloat16"}).dtype == torch.bfloat16
    # An explicit dtype casts the inputs first, as in any mergekit method.
    assert merge_tensors(tensors, "mot", dtype=torch.bfloat16).dtype == torch.bfloat16
    half = [t.to(torch.bfloat16) for t in tensors]
    assert merge_tensors(half, "mot", dtype=torch.float32).dtype == torch.float32


@pytest.mark.parametrize(
    ("tensors", "parameters", "fault"),
    [
        ([torch.ones(2), torch.ones(2)], {"scale": 0.5}, "parameter scale: 0.5 needs a base"),
        ([torch.ones(2), torch.ones(2)], {"weight": [1.0, -1.0]}, "parameter weight"),
        ([torch.ones(2), torch.ones(2)], {"round_to": "float64"}, "parameter round_to: expected one of"),
        ([torch.ones(2, dtype=torch.float64)], {}, "dtype float64: expected bfloat16, float16 or float32"),
        ([torch.ones(2).to(torch.float8_e4m3fn)], {}, "dtype float8_e4m3fn: expected bfloat16"),
    ],
)
def test_the_method_refuses_in_one_line(tensors, parameters, fault):
    with pytest.raises(UserError, match=fault) as caught:
        merge_tensors(tensors, "mot", parameters=parameters)
    assert str(caught.value).startswith("mot: ")
    assert "\n" not in str(caught.value)


def test_the_base_alone_is_no_merge():
    with pytest.raises(ValueError, match="at least 1 non-base"):
        merge_tensors([torch.ones(2)], "mot", base_index=0)


@pytest.mark.gpu
def test_a_gpu_gives_the_bits_of_the_cpu():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    generator = torch.Generator().manual_seed(8)
    for weighting, dtype, out_dtype in itertools.product(WEIGHTS, DTYPES, DTYPES):
        tensors = [torch.cat([adversarial(k, 4000, dtype, generator) for k in KINDS]) for _ in range(4)]
        coefficients, base = mot_coefficients(WEIGHTS[weighting](3), 0.7)
        cpu = weighted_mean(tensors, [*coefficients, base], out_dtype)
        gpu = weighted_mean([t.cuda() for t in tensors], [*coefficients, base], out_dtype).cpu()
        assert torch.equal(bits(cpu), bits(gpu))
    # Quotients at midpoints: a GPU that multiplied with 1/14 or 1/49 instead of dividing would miss them.
    for count in (3, 7, 14, 49):
        near = [(1.5 + torch.randint(0, 2, (4000,), generator=generator) / 128).bfloat16() for _ in range(count)]
        coefficients, _ = mot_coefficients([1.0] * count)
        gpu = weighted_mean([t.cuda() for t in near], coefficients).cpu()
        assert torch.equal(bits(weighted_mean(near, coefficients)), bits(gpu))
