"""The mergekit plugin: merge method ``mot`` and its kernel. Importing this module registers the method with mergekit.

``mot`` is the merge of Merge-of-Thought Distillation (arXiv 2509.08814, algorithm step 2) and of federated averaging:

    θ = θ_base + scale · Σ_k w_k (θ_k − θ_base),   w_k = weight_k / Σ weight

With ``scale`` 1, the default and the paper's, this is the weighted mean of the K branches and the base drops out.

Every element of the result is the exact real value rounded once to the output dtype (to nearest, ties to even), so the
same branches give the same bits in any order, on any number of threads, on any device. mergekit's ``linear`` instead
rounds at each of its K+1 steps.

Floating-point facts relied on: all of bfloat16, float16 and float32 embed in float64 with at least 29 bits to spare;
float64 → float32 rounds once, but torch takes float64 → bfloat16 or float16 through float32 and rounds twice, which is
wrong for about one element in 2^16 (never use ``.to(torch.bfloat16)`` on a float64 tensor here).

Glossary: K inputs, coefficient c_k = n_k / D with integers n_k and one common denominator D, sum s = Σ n_k x_k,
quotient q = s / D, "quantum" = the power of two of which all values in question are multiples.
"""

import functools
import itertools
import math
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from mergekit.merge_methods import (
    BasePolicy,
    BatchOptions,
    GroupMergeMethod,
    InputContract,
    MergeMethodSpec,
    ParameterScope,
    TensorGroup,
    registered_methods,
)
from mergekit.merge_methods.base import ParameterSpec
from mergekit.merge_methods.registry import _METHODS

from motkit.errors import UserError


@dataclass(frozen=True)
class FloatFormat:
    """Layout of a floating-point dtype that ``mot`` reads and writes."""

    precision_bits: int  # significand with its hidden bit
    bias: int
    integer_dtype: torch.dtype  # of the same width, for looking at the bits

    @functools.cached_property
    def width(self) -> int:
        return int(torch.iinfo(self.integer_dtype).bits)

    @functools.cached_property
    def mantissa_bits(self) -> int:
        return self.precision_bits - 1

    @functools.cached_property
    def min_exponent(self) -> int:
        """Of the smallest normal value 2^e."""
        return 1 - self.bias

    @functools.cached_property
    def min_quantum(self) -> int:
        """Exponent of the smallest subnormal."""
        return self.min_exponent - self.mantissa_bits

    @functools.cached_property
    def overflow(self) -> int:
        """Values of 2^this and more do not exist."""
        return self.bias + 1

    @functools.cached_property
    def infinity(self) -> int:
        """Its bits."""
        return (2 * self.bias + 1) << self.mantissa_bits


FORMATS = {
    torch.bfloat16: FloatFormat(8, 127, torch.int16),
    torch.float16: FloatFormat(11, 15, torch.int16),
    torch.float32: FloatFormat(24, 127, torch.int32),
}
DTYPE_NAMES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

# Elements per step on a CPU. It is torch's parallel grain: operators on no more than this run on the calling thread.
# So threads share no barrier (a barrier costs 8 ms per operator where another process holds a core) and the float64
# work space stays in the L2 cache.
CHUNK_CPU = 32768
CHUNK_ACCELERATOR = 1 << 22

_LIMB_BITS = 28  # limb × 24-bit input and limb × 25-bit midpoint are exact in float64
_MAX_INTEGER_BITS = 600  # beyond, n_k · x_k may overflow float64
_EXPONENT_MASK = 0x7FF0000000000000
_SIGN_MASK = -0x8000000000000000


class ValueRange(NamedTuple):
    """What a look at the bits of a tensor tells: every element is 0 or has |x| < 2^``bound`` and is a multiple of
    2^``quantum``. ``finite`` is False if there is a NaN or an infinity; ``zero`` is True if there is nothing but zeros.
    """

    bound: int
    quantum: int
    finite: bool
    zero: bool


@functools.cache
def _range_offset(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.tensor(torch.iinfo(dtype).max - 1, dtype=dtype, device=device)


def value_range(tensor: torch.Tensor, scratch: torch.Tensor | None = None) -> ValueRange:
    """`ValueRange` of a tensor by its bits, in two passes.

    Args:
        tensor: flat and contiguous, bfloat16, float16 or float32, at least one element.
        scratch: work space of the dtype's integer type, as long as the tensor; allocated if None.
    """
    layout = FORMATS[tensor.dtype]
    bits = tensor.view(layout.integer_dtype)
    # 2·bits drops the sign; the offset wraps it so that signed order is the order of |x|, both zeros last (= offset).
    offset = (1 << (layout.width - 1)) - 2
    ordered = torch.add(_range_offset(layout.integer_dtype, tensor.device), bits, alpha=2, out=scratch)
    lowest, highest = torch.aminmax(ordered)
    low, high = lowest.item(), highest.item()
    if low == offset:
        return ValueRange(layout.min_quantum, layout.min_quantum, True, True)
    low_magnitude = (low + offset + 4) // 2
    if high == offset:
        high_magnitude = torch.amax(torch.bitwise_and(bits, offset + 1, out=scratch)).item()
    else:
        high_magnitude = (high + offset + 4) // 2
    low_exponent = max(low_magnitude >> layout.mantissa_bits, 1) - layout.bias
    high_exponent = max(high_magnitude >> layout.mantissa_bits, 1) - layout.bias
    finite = high_magnitude < layout.infinity
    return ValueRange(high_exponent + 1, low_exponent - layout.mantissa_bits, finite, False)


def round_float64_(
    values: torch.Tensor, dtype: torch.dtype, scratch: torch.Tensor, signs: torch.Tensor
) -> torch.Tensor:
    """Round float64 values in place to what ``dtype`` can hold: to nearest, ties to even, once.

    Subnormals and the sign of zero are right; a value that overflows becomes 2^``overflow`` or more, which the cast to
    ``dtype`` makes infinite. No NaN or infinity may go in.

    Adding and subtracting 1.5 · 2^(52 + e), where 2^e is the quantum of ``dtype`` at that magnitude, lets the float64
    adder do the rounding. ``scratch`` and ``signs`` are work space like ``values``.
    """
    layout = FORMATS[dtype]
    bits, sign_bits = values.view(torch.int64), signs.view(torch.int64)
    torch.bitwise_and(bits, _SIGN_MASK, out=sign_bits)
    torch.bitwise_and(bits, _EXPONENT_MASK, out=scratch.view(torch.int64))
    scratch.clamp_min_(2.0**layout.min_exponent).mul_(1.5 * 2.0 ** (53 - layout.precision_bits))
    values.add_(scratch).sub_(scratch)
    bits.bitwise_or_(sign_bits)
    return values


def _cast_rounded(values: torch.Tensor, out: torch.Tensor, scratch: torch.Tensor, signs: torch.Tensor) -> None:
    """``out[:] = values``, float64 to ``out.dtype`` with a single rounding; all but ``out`` are used up."""
    if out.dtype is not torch.float32:
        round_float64_(values, out.dtype, scratch, signs)
    out.copy_(values)


def round_ratio(numerator: int, denominator: int, dtype: torch.dtype) -> float:
    """Nearest value of ``dtype`` to an exact ratio, ties to even; ``inf`` beyond its range. ``denominator`` > 0."""
    layout = FORMATS[dtype]
    sign, magnitude = (-1.0 if numerator < 0 else 1.0), abs(numerator)
    if not magnitude:
        return 0.0
    exponent = magnitude.bit_length() - denominator.bit_length()  # of the ratio, or one more
    if magnitude << max(-exponent, 0) < denominator << max(exponent, 0):
        exponent -= 1
    quantum = max(exponent - layout.mantissa_bits, layout.min_quantum)
    units, rest = divmod(magnitude << max(-quantum, 0), denominator << max(quantum, 0))
    twice, whole = 2 * rest, denominator << max(quantum, 0)
    units += twice > whole or (twice == whole and units & 1)
    if units >= 1 << max(layout.overflow - quantum, 0):
        return sign * math.inf
    return sign * math.ldexp(units, quantum)


def _two_sum(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(fl(a + b), its rounding error), exactly (Knuth's TwoSum)."""
    total = a + b
    b_part = total - a
    return total, (a - (total - b_part)).add_(b - b_part)


def _cascade(terms: Iterable[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sum of float64 tensors as (s, e, f): the exact sum is s + e up to ±f elementwise, s = fl(s + e).

    Two cascaded TwoSums (Ogita, Rump, Oishi 2005); f bounds what the second one rounded off and is 0 where the sum is
    exact.
    """
    iterator = iter(terms)
    total = next(iterator).clone()
    error = torch.zeros_like(total)
    slack = torch.zeros_like(total)
    for term in iterator:
        total, first = _two_sum(total, term)
        error, second = _two_sum(error, first)
        slack += second.abs_()
    joined, left = _two_sum(total, error)
    # -0 + 0 would lose the sign of a sum of negative zeros.
    return torch.where(error == 0, total, joined), left, slack.mul_(1 + 2.0**-20)


def _limbs(integer: int) -> list[float]:
    """``integer`` as a sum of floats with at most 28 significant bits each."""
    sign, magnitude, limbs, shift = (-1 if integer < 0 else 1), abs(integer), [], 0
    while magnitude:
        zeros = (magnitude & -magnitude).bit_length() - 1
        magnitude, shift = magnitude >> zeros, shift + zeros
        limbs.append(sign * math.ldexp(magnitude & ((1 << _LIMB_BITS) - 1), shift))
        magnitude, shift = magnitude >> _LIMB_BITS, shift + _LIMB_BITS
    return limbs[::-1]


def _odd_bits(integer: int) -> int:
    """Bits between the highest and the lowest set bit of ``integer``."""
    return (abs(integer) // (integer & -integer)).bit_length() if integer else 0


class WeightedMean:
    """θ = Σ_k c_k x_k for flat tensors of at most one chunk, correctly rounded. It owns its work space: one per thread.

    Args:
        coefficients: c_k, exact. They need not sum to 1.
        out_dtype: bfloat16, float16 or float32.
        device: where the tensors are.

    How a chunk is computed, cheapest first:

    1. If exponents prove that s = Σ n_k x_k is exact in float64 (all bits of all terms lie in a window of 53), then
       q = fl(s / D) and one rounding is right: q can hit a midpoint m of the output format only if s = m·D exactly,
       because m·D is itself a float64 (D has at most 52 − precision bits) and nearby float64 values stay apart.
    2. Otherwise q comes with an elementwise error bound, 0 where s is exact. Where q − bound and q + bound round to
       the same value, that is it (Ziv's test).
    3. Where not, θ is next to a midpoint m of the output format, and the sign of s − m·D, from exact products and
       cascaded sums, decides.
    4. What is left even then (nothing, on real weights) is computed with Python integers.
    """

    def __init__(self, coefficients: Sequence[Fraction], out_dtype: torch.dtype, device: torch.device | str = "cpu"):
        if out_dtype not in FORMATS:
            raise UserError(f"mot: output dtype {out_dtype}: expected bfloat16, float16 or float32")
        self.out_dtype = out_dtype
        self.device = torch.device(device)
        self.chunk = CHUNK_CPU if self.device.type == "cpu" else CHUNK_ACCELERATOR
        self.denominator = math.lcm(*(c.denominator for c in coefficients))
        self.numerators = [int(c * self.denominator) for c in coefficients]
        common = math.gcd(self.denominator, *self.numerators)
        self.denominator //= common
        self.numerators = [n // common for n in self.numerators]

        widest = max(abs(n).bit_length() for n in [*self.numerators, self.denominator])
        self._floats_suffice = widest <= _MAX_INTEGER_BITS
        # (p + 1)-bit midpoint × D fits float64
        self._denominator_fits = _odd_bits(self.denominator) <= 52 - FORMATS[out_dtype].precision_bits
        self._power_of_two = _odd_bits(self.denominator) == 1
        self._numerators_fit = all(_odd_bits(n) <= _LIMB_BITS for n in self.numerators)
        if self._floats_suffice:
            self._limbs = [_limbs(n) for n in self.numerators]
            self._minus_denominator = [-limb for limb in _limbs(self.denominator)]
            self._divisor = float(self.denominator)
        # Work space made once: fresh memory for every operator would cost more than most operators here.
        self._float64 = [torch.empty(self.chunk, dtype=torch.float64, device=device) for _ in range(4)]
        self._high = torch.empty(self.chunk, dtype=out_dtype, device=device)
        self._integers = {
            dtype: torch.empty(self.chunk, dtype=dtype, device=device) for dtype in (torch.int16, torch.int32)
        }

    def __call__(self, tensors: Sequence[torch.Tensor], out: torch.Tensor) -> bool:
        """Write Σ c_k x_k to ``out``.

        Args:
            tensors: K flat, contiguous tensors of bfloat16, float16 or float32 in any mix, at most ``chunk`` elements.
            out: as long, of the output dtype; it may not overlap the inputs.

        Returns:
            True if all inputs are finite. Elements for which one is not become NaN, or an infinity where IEEE
            arithmetic gives one.
        """
        size = out.numel()
        if not size:
            return True
        ranges = [value_range(t, self._integers[FORMATS[t.dtype].integer_dtype][:size]) for t in tensors]
        if not all(r.finite for r in ranges):
            self._non_finite(tensors, out)
            return False
        # An input with coefficient 0 is looked at (for NaN), not added.
        used = [k for k, n in enumerate(self.numerators) if n]
        if not used:
            out.zero_()
        elif not self._floats_suffice:
            self._exact(list(tensors), out)
        elif self._sum_is_exact([ranges[k] for k in used], [self.numerators[k] for k in used]):
            self._fast([tensors[k] for k in used], [self.numerators[k] for k in used], out)
        else:
            self._careful([tensors[k] for k in used], used, out)
        return True

    def _sum_is_exact(self, ranges: Sequence[ValueRange], numerators: Sequence[int]) -> bool:
        """Whether all partial sums of Σ n_k x_k are multiples of one quantum and at most 2^53 of them."""
        if not self._denominator_fits or any(_odd_bits(n) > 53 for n in numerators):
            return False
        pairs = [(r, n) for r, n in zip(ranges, numerators, strict=True) if not r.zero]
        if not pairs:
            return True
        quantum = min(r.quantum + (n & -n).bit_length() - 1 for r, n in pairs)
        bound = sum(math.ldexp(abs(n), r.bound - quantum) for r, n in pairs)
        return bound * (1 + 1e-9) <= 2.0**53

    def _fast(self, tensors: Sequence[torch.Tensor], numerators: Sequence[int], out: torch.Tensor) -> None:
        total, term, signs, _ = (space[: out.numel()] for space in self._float64)
        for index, (tensor, numerator) in enumerate(zip(tensors, numerators, strict=True)):
            target = term if index else total
            target.copy_(tensor)
            if numerator != 1:
                target.mul_(float(numerator))
            if index:
                total.add_(term)
        if self._power_of_two:
            total.mul_(1.0 / self._divisor)
        else:
            total.div_(self._divisor)
        _cast_rounded(total, out, term, signs)

    def _careful(self, tensors: Sequence[torch.Tensor], used: Sequence[int], out: torch.Tensor) -> None:
        if self._denominator_fits and self._numerators_fit:
            quotient, bound = self._cascaded_quotient(tensors, used)
        else:
            quotient, bound = self._plain_quotient(tensors, used)
        _, _, below, scratch = (space[: out.numel()] for space in self._float64)
        high = self._high[: out.numel()]
        torch.sub(quotient, bound, out=below)
        quotient.add_(bound)
        _cast_rounded(below, out, scratch, bound)
        _cast_rounded(quotient, high, scratch, bound)
        integer_dtype = FORMATS[self.out_dtype].integer_dtype
        undecided = torch.nonzero(out.view(integer_dtype) != high.view(integer_dtype)).view(-1)
        if undecided.numel():
            inputs = [t[undecided].to(torch.float64) for t in tensors]
            out[undecided] = self._at_midpoints(inputs, used, out[undecided], high[undecided])

    def _cascaded_quotient(
        self, tensors: Sequence[torch.Tensor], used: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(q, bound of its error), float64; the bound is 0 wherever s is exact."""
        total, error, slack = _cascade(
            t.to(torch.float64) * limb for t, k in zip(tensors, used, strict=True) for limb in self._limbs[k]
        )
        bound, quotient = error.abs_().add_(slack), total.div_(self._divisor)
        # Where the sum is exact the quotient is as good as exact (case 1); elsewhere it adds its own rounding.
        inexact = bound / self._divisor * (1 + 2.0**-20) + quotient.abs() * 2.0**-51
        return quotient, torch.where(bound == 0, 0.0, inexact)

    def _plain_quotient(
        self, tensors: Sequence[torch.Tensor], used: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(q, bound of its error), float64, in the work space: for weights like 0.3, whose sums are seldom exact."""
        total, magnitude, term, _ = (space[: tensors[0].numel()] for space in self._float64)
        for index, (tensor, k) in enumerate(zip(tensors, used, strict=True)):
            target = term if index else total
            target.copy_(tensor).mul_(float(self.numerators[k]))
            if index:
                total.add_(term)
                magnitude.add_(term.abs_())
            else:
                torch.abs(total, out=magnitude)
        # n_k, each product, each addition and |terms| round by at most 2^-53 relative; likewise 1 / D, twice, and q.
        magnitude.mul_((len(used) + 8) * 2.0**-52 / self._divisor)
        return total.mul_(1 / self._divisor), magnitude

    def _at_midpoints(
        self, values: Sequence[torch.Tensor], used: Sequence[int], low: torch.Tensor, high: torch.Tensor
    ) -> torch.Tensor:
        """The nearer of ``low`` < ``high`` to θ, elementwise, by the sign of s − m·D at their midpoint m."""
        integer_dtype = FORMATS[self.out_dtype].integer_dtype
        low64, high64 = low.to(torch.float64), high.to(torch.float64)
        midpoint = (low64 + high64) / 2
        total, _, slack = _cascade(
            [v * limb for v, k in zip(values, used, strict=True) for limb in self._limbs[k]]
            + [midpoint * limb for limb in self._minus_denominator]
        )
        even = torch.where(high.view(integer_dtype) & 1 == 0, high, low)
        # Between the two zeros the sum's own sign says whether all terms are negative zeros.
        even = torch.where((low64 == high64) & torch.signbit(total), low, even)
        result = torch.where(total < 0, low, torch.where(total > 0, high, even))
        # Neighbours differ by 1 as bits, or are the two zeros. (s + e has the sign of s and at least half its size.)
        gap = (high.view(integer_dtype).to(torch.int64) - low.view(integer_dtype)).abs()
        neighbours = torch.isfinite(midpoint) & ((gap == 1) | (low64 == high64))
        decided = neighbours & ((slack == 0) | (total.abs() > 2 * slack))
        left = torch.nonzero(~decided).view(-1)
        if left.numel():
            exact = torch.empty_like(result[left])
            self._exact([v[left] for v in values], exact, used)
            result[left] = exact
        return result

    def _exact(self, tensors: Sequence[torch.Tensor], out: torch.Tensor, used: Sequence[int] | None = None) -> None:
        """Python integers, element by element."""
        numerators = [self.numerators[k] for k in (range(len(tensors)) if used is None else used)]
        columns = [t.to(torch.float64).tolist() for t in tensors]
        rounded = []
        for row in zip(*columns, strict=True):
            terms = [(n, *x.as_integer_ratio(), x) for n, x in zip(numerators, row, strict=True) if n]
            scale = max(power for _, _, power, _ in terms)  # powers of two, so the largest is a common denominator
            total = sum(n * integer * (scale // power) for n, integer, power, _ in terms)
            if total or any((n > 0) == (math.copysign(1, x) > 0) for n, _, _, x in terms):
                rounded.append(round_ratio(total, self.denominator * scale, self.out_dtype))
            else:
                rounded.append(-0.0)
        out.copy_(torch.tensor(rounded, dtype=torch.float64, device=out.device))

    def _non_finite(self, tensors: Sequence[torch.Tensor], out: torch.Tensor) -> None:
        finite = torch.stack([torch.isfinite(t) for t in tensors]).all(dim=0)
        self([torch.where(finite, t, torch.zeros((), dtype=t.dtype, device=t.device)) for t in tensors], out)
        # Only the signs of the coefficients matter to infinities.
        signs = [float((n > 0) - (n < 0)) for n in self.numerators]
        plain = torch.stack([t.to(torch.float64) * sign for t, sign in zip(tensors, signs, strict=True)]).sum(dim=0)
        nan = torch.full_like(plain, math.nan)
        patch = torch.where(torch.isnan(plain), nan, plain.sign() * math.inf)
        out.copy_(torch.where(finite, out, patch.to(out.dtype)))


def check_tensor_dtype(dtype: torch.dtype, what: str) -> None:
    """Raise a `UserError` unless ``mot`` can read ``dtype``."""
    if dtype not in FORMATS:
        name = str(dtype).removeprefix("torch.")
        raise UserError(
            f"mot: {what}: dtype {name}: expected bfloat16, float16 or float32; convert the checkpoint first"
        )


def num_threads(torch_device: torch.device | str) -> int:
    """Python threads to merge with: as many as torch would use, but the interpreter's lock feeds no more than 8."""
    return min(torch.get_num_threads(), 8) if torch.device(torch_device).type == "cpu" else 1


def weighted_mean(
    tensors: Sequence[torch.Tensor], coefficients: Sequence[Fraction], out_dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Σ_k c_k x_k, every element correctly rounded once; see `WeightedMean`.

    Args:
        tensors: K tensors of one shape and device; bfloat16, float16 or float32 in any mix.
        coefficients: K exact c_k, as `mot_coefficients` makes them.
        out_dtype: of the result; the promoted dtype of the inputs if None.

    Returns:
        A new tensor, bit-identical under any order of (tensor, coefficient) pairs. A NaN or infinity in an input gives
        NaN or an infinity there.

    Raises:
        UserError: another dtype.
    """
    for index, tensor in enumerate(tensors):
        check_tensor_dtype(tensor.dtype, f"input {index}")
    if out_dtype is None:
        out_dtype = tensors[0].dtype
        for tensor in tensors[1:]:
            out_dtype = torch.promote_types(out_dtype, tensor.dtype)
    shape, device = tensors[0].shape, tensors[0].device
    flat = [t.detach().contiguous().view(-1) for t in tensors]
    mean = WeightedMean(coefficients, out_dtype, device)
    out = torch.empty(shape, dtype=out_dtype, device=device)
    flat_out = out.view(-1)
    size, chunk = flat_out.numel(), mean.chunk

    def run(mean: WeightedMean, start: int, stop: int) -> None:
        for begin in range(start, stop, chunk):
            end = min(begin + chunk, stop)
            mean([t[begin:end] for t in flat], flat_out[begin:end])

    workers = min(num_threads(device), size // (4 * chunk))
    if workers < 2:
        run(mean, 0, size)
        return out
    edges = [size * w // workers for w in range(workers + 1)]
    with ThreadPoolExecutor(workers) as pool:
        jobs = [
            pool.submit(run, WeightedMean(coefficients, out_dtype, device), a, b) for a, b in itertools.pairwise(edges)
        ]
        for job in jobs:
            job.result()
    return out


def mot_coefficients(weights: Sequence[float], scale: float = 1.0) -> tuple[list[Fraction], Fraction]:
    """Exact coefficients of θ = base + scale · Σ w_k (θ_k − base).

    Args:
        weights: one per branch, unnormalised. Negative ones are allowed as long as the sum is positive.
        scale: step along the mean task vector; 1 gives the plain weighted mean.

    Returns:
        (one coefficient per branch, the base's). Made from the floats' exact values, so that K equal weights give
        exactly 1/K. They sum to 1.

    Raises:
        UserError: no branch, a weight or scale that is not finite, or weights whose sum is not positive.
    """
    if not weights:
        raise UserError("mot: no branch to merge; list at least one model besides the base")
    for weight in weights:
        if not math.isfinite(weight):
            raise UserError(f"mot: parameter weight: expected a finite number, got {weight}")
    if not math.isfinite(scale):
        raise UserError(f"mot: parameter scale: expected a finite number, got {scale}")
    exact = [Fraction(weight) for weight in weights]
    total = sum(exact, Fraction(0))
    if total <= 0:
        raise UserError(f"mot: parameter weight: expected a positive sum over the branches, got {float(total)}")
    step = Fraction(scale)
    return [step * weight / total for weight in exact], 1 - step


def round_dtype(name: str | None) -> torch.dtype | None:
    """The dtype that parameter ``round_to`` names.

    Raises:
        UserError: not a name that ``mot`` can write.
    """
    if name is None:
        return None
    dtype = DTYPE_NAMES.get(str(name).removeprefix("torch."))
    if dtype is None:
        raise UserError(f"mot: parameter round_to: expected one of {', '.join(DTYPE_NAMES)}, got {name!r}")
    return dtype


class MotMerge(GroupMergeMethod):
    """mergekit method ``mot``: see the module's docstring.

    Parameters in the merge config:

    * ``weight`` per branch (default 1): normalised over the branches, so only ratios count;
    * ``scale`` (default 1): other values need a ``base_model``;
    * ``round_to`` (default: the promoted dtype of the inputs): dtype of the result. Without it, a merge of float32
      branches into ``out_dtype: bfloat16`` rounds twice, here to float32 and in mergekit to bfloat16.

    ``base_model`` is optional. The base is never averaged as a branch, even if ``models`` lists it: mergekit knows one
    input per model and flags it as the base.
    """

    spec = MergeMethodSpec(
        name="mot",
        pretty_name="Merge-of-Thought",
        reference_url="https://arxiv.org/abs/2509.08814",
        parameters=(
            ParameterSpec("weight", float, ParameterScope.NON_BASE, default=1.0),
            ParameterSpec("scale", float, ParameterScope.SHARED, default=1.0),
            ParameterSpec("round_to", str | None, ParameterScope.SHARED, default=None),
        ),
        contract=InputContract(base=BasePolicy.OPTIONAL, min_inputs=1, min_non_base=1),
    )

    def merge_group(self, group: TensorGroup, /, **parameters: Any) -> torch.Tensor:
        """One tensor of the model, in ``round_to`` or else the promoted dtype of the inputs."""
        return self._merge(group, parameters, round_dtype(parameters["round_to"]))

    def _merge(self, group: TensorGroup, parameters: dict[str, Any], out_dtype: torch.dtype | None) -> torch.Tensor:
        name = group.metadata.name or "tensor"
        scale = parameters["scale"]
        branches, base_coefficient = mot_coefficients(parameters["weight"].values_for(group.non_base), scale)
        if base_coefficient and group.base is None:
            raise UserError(f"mot: parameter scale: {scale} needs a base, got none; set base_model or remove scale")
        tensors = [entry.tensor for entry in group.non_base]
        if base_coefficient and group.base is not None:
            tensors, branches = [*tensors, group.base.tensor], [*branches, base_coefficient]
        for tensor in tensors:
            check_tensor_dtype(tensor.dtype, name)
        return weighted_mean(tensors, branches, out_dtype)

    def _execute(
        self,
        groups: Sequence[TensorGroup],
        parameters: list[dict[str, Any]],
        options: BatchOptions,
        *,
        input_dtypes: Sequence[torch.dtype | None],
        out_dtype: torch.dtype | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """As `GroupMergeMethod._execute`, but rounds straight to ``out_dtype`` and never widens the inputs.

        mergekit's in-memory API would round to the input dtype first. Widening changes no value, it only costs memory;
        an explicit narrower ``dtype`` is honoured.
        """
        results = []
        for group, kwargs, input_dtype in zip(groups, parameters, input_dtypes, strict=True):
            target = round_dtype(kwargs["round_to"]) or out_dtype or input_dtype
            results.append(self._merge(_narrow(group, input_dtype), kwargs, target))
        return tuple(r if out_dtype is None else r.to(out_dtype) for r in results)


def _narrow(group: TensorGroup, dtype: torch.dtype | None) -> TensorGroup:
    """The group with every input cast to ``dtype`` that ``dtype`` cannot hold exactly."""
    if dtype is None or all(torch.promote_types(e.tensor.dtype, dtype) == dtype for e in group.entries):
        return group
    from mergekit.merge_methods.dtype import align_dtype

    return align_dtype(group, dtype)


def _register(method: GroupMergeMethod) -> None:
    """Register with mergekit, replacing the one that an earlier import or a reload registered.

    mergekit's own ``register`` refuses a second registration and offers no way to replace one.
    """
    known = {m.spec.name: type(m).__qualname__ for m in registered_methods()}
    if known.get(method.spec.name, type(method).__qualname__) != type(method).__qualname__:
        raise UserError(f"mergekit already has a merge method {method.spec.name!r} that is not motkit's; update motkit")
    _METHODS[method.spec.name] = method


_register(MotMerge())
