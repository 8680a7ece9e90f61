"""The exact weighted mean: θ = Σ_k c_k x_k, every element the real value rounded once to the output dtype.

So the same branches give the same bits in any order, on any number of threads, on any device. mergekit's ``linear``
instead rounds at each of its K+1 steps.

Glossary: K inputs, coefficient c_k = n_k / D with integers n_k and one common denominator D, sum s = Σ n_k x_k,
quotient q = s / D, "quantum" = the power of two of which all values in question are multiples.
"""

import math
from collections.abc import Iterable, Sequence
from fractions import Fraction

import torch

from motkit.errors import UserError
from motkit.merge_float import FORMATS, ValueRange, cast_rounded, round_float64_, round_ratio, value_range, widen
from motkit.merge_plan import Kernel, MergePlan, Statistics, chunk_size, merge_in_memory

_LIMB_BITS = 28  # limb × 24-bit input and limb × 25-bit midpoint are exact in float64
_BLOCK = 64  # elements that are redone together, for one of them that is too wide for float32
_MOST_FAR = 8  # one element in this many may be redone before the whole chunk is
_MAX_INTEGER_BITS = 600  # beyond, n_k · x_k may overflow float64


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
    """θ = Σ_k c_k x_k for flat tensors, correctly rounded. It owns its work space: one per worker.

    Args:
        coefficients: c_k, exact. They need not sum to 1.
        out_dtype: bfloat16, float16 or float32.
        device: where the tensors are.

    How a chunk is computed, cheapest first:

    0. Where the inputs lie close to one another, as branches do, an element's sum is exact: for inputs of 16 bits even
       in float32 (all bits of its terms lie in a window of 24), for float32 in float64 (53). So, by the argument of
       case 1, q = fl(s / D) and one rounding are right. The elements for which this does not hold are gathered over
       the whole span.
    1. If exponents prove that s = Σ n_k x_k is exact in float64 (all bits of all terms lie in a window of 53), then
       q = fl(s / D) and one rounding is right: q can hit a midpoint m of the output format only if s = m·D exactly,
       because m·D is itself a float64 (D has at most 52 − precision bits) and nearby float64 values stay apart.
    2. Otherwise q comes with an error bound: one for the chunk, from its largest exponents, or, where sums may be
       exact and so hit midpoints, an elementwise one that is 0 where s is exact. Where q − bound and q + bound round
       to the same value, that is it (Ziv's test).
    3. Where not, θ is next to a midpoint m of the output format (3 of 10^5 elements with bfloat16 and unequal
       weights), and the sign of s − m·D, from exact products and cascaded sums, decides. These elements are gathered
       over the whole span first.
    4. What is left even then (nothing, on real weights) is computed with Python integers.
    """

    def __init__(self, coefficients: Sequence[Fraction], out_dtype: torch.dtype, device: torch.device | str = "cpu"):
        if out_dtype not in FORMATS:
            raise UserError(f"mot: output dtype {out_dtype}: expected bfloat16, float16 or float32")
        self.out_dtype = out_dtype
        self.device = torch.device(device)
        self.chunk = chunk_size(device)
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
            # On a GPU torch divides by a number by multiplying with its inverse, which is no division; by a tensor it
            # divides.
            self._divisors: dict[torch.dtype, float | torch.Tensor] = {
                dtype: self._divisor
                if self.device.type == "cpu"
                else torch.tensor([self._divisor], device=device).to(dtype)
                for dtype in (torch.float32, torch.float64)
            }
        self._spreads = {dtype: self._largest_spread(dtype) for dtype in FORMATS}
        self._too_large = {dtype: self._smallest_too_large(dtype) for dtype in FORMATS}
        # Work space made once: fresh memory for every operator would cost more than most operators here.
        self._float64 = [torch.empty(self.chunk, dtype=torch.float64, device=device) for _ in range(3)]
        self._float32, self._total32 = (torch.empty(self.chunk, dtype=torch.float32, device=device) for _ in range(2))
        self._magnitudes = {
            dtype: [torch.empty(self.chunk, dtype=dtype, device=device) for _ in range(3)]
            for dtype in (torch.int16, torch.int32)
        }
        self._within_block = torch.arange(_BLOCK, device=device)
        self._nowhere = self._within_block[:0]
        self._high = torch.empty(self.chunk, dtype=out_dtype, device=device)
        self._integers = {
            dtype: torch.empty(self.chunk, dtype=dtype, device=device) for dtype in (torch.int16, torch.int32)
        }

    def __call__(self, tensors: Sequence[torch.Tensor], out: torch.Tensor) -> bool:
        """Write Σ c_k x_k to ``out``.

        Args:
            tensors: K flat, contiguous tensors of bfloat16, float16 or float32 in any mix.
            out: as long, of the output dtype; it may not overlap the inputs.

        Returns:
            True if all inputs are finite. Elements for which one is not become NaN, or an infinity where IEEE
            arithmetic gives one.
        """
        if not out.numel():
            return True
        dtypes = {tensor.dtype for tensor in tensors}
        spread = self._spreads.get(dtypes.pop(), 0) if len(dtypes) == 1 else 0
        finite, far = True, []
        chunks = zip(*(tensor.split(self.chunk) for tensor in (out, *tensors)), strict=True)
        for number, (part, *chunk) in enumerate(chunks):
            left = self._near(chunk, part, spread) if spread else None
            if left is None:
                finite &= self._far(chunk, part)
            elif left.numel():
                far.append(left + number * self.chunk)
        if far:
            at = torch.cat(far)
            merged = torch.empty(at.numel(), dtype=out.dtype, device=out.device)
            self._far([tensor[at] for tensor in tensors], merged)
            out[at] = merged
        return finite

    def _largest_spread(self, dtype: torch.dtype) -> int:
        """Difference of two magnitudes, as integers, below which every sum between them is exact; 0 for none."""
        mantissa, precision = FORMATS[dtype].mantissa_bits, 53 if dtype is torch.float32 else 24
        fits = (
            self._power_of_two or _odd_bits(self.denominator) <= precision - 1 - FORMATS[self.out_dtype].precision_bits
        )
        # Divided by 2^16, the smallest bfloat16 is the smallest float32.
        fits &= self._floats_suffice if precision == 53 else self.denominator <= 1 << 16
        if not fits or not all(self.numerators):
            return 0
        # All terms are multiples of 2^(e − mantissa), the smallest being 2^e or more, and the sum of their magnitudes
        # is below Σ|n| · 2^(e + d + 1) for exponents that differ by d: at most 2^precision multiples.
        total = sum(map(abs, self.numerators))
        exponents = precision - mantissa - 1 - (total - 1).bit_length()
        return max(exponents, 0) << mantissa

    def _smallest_too_large(self, dtype: torch.dtype) -> int:
        """The magnitude, as an integer, from which on a sum may overflow or an element is not finite."""
        layout, growth = FORMATS[dtype], sum(map(abs, self.numerators)).bit_length()
        exponents = max(layout.overflow + growth - (1024 if dtype is torch.float32 else 128), 0)
        return max(layout.infinity - (exponents << layout.mantissa_bits), 0)

    def _near(self, tensors: Sequence[torch.Tensor], out: torch.Tensor, spread: int) -> torch.Tensor | None:
        """Case 0 of the class; returns the positions of what it does not hold for, or None if all has to be redone."""
        size, dtype = out.numel(), tensors[0].dtype
        largest, least, own = (space[:size] for space in self._magnitudes[FORMATS[dtype].integer_dtype])
        narrow, signs = self._float32[:size], self._float64[2][:size]
        if dtype is torch.float32:
            total, term = (space[:size] for space in self._float64[:2])
        else:
            total, term = self._total32[:size], narrow
        for index, (tensor, numerator) in enumerate(zip(tensors, self.numerators, strict=True)):
            # The bits of a magnitude, which are in the order of the magnitudes; NaN is the largest.
            torch.abs(tensor, out=(own if index else largest).view(dtype))
            if index:
                torch.minimum(least, own, out=least)
                torch.maximum(largest, own, out=largest)
                total.add_(term.copy_(tensor), alpha=float(numerator))
            else:
                least.copy_(largest)
                total.copy_(tensor)
                if numerator != 1:
                    total.mul_(float(numerator))
        if int(largest.amax()) >= self._too_large[dtype]:
            return None
        torch.sub(largest, least, out=own)
        left = self._nowhere
        if int(own.amax()) >= spread:
            # Whole blocks, because to find single elements would cost as much as all that came before.
            width = _BLOCK if size % _BLOCK == 0 else 1
            blocks = torch.nonzero(own.view(-1, width).amax(dim=1) >= spread)
            if blocks.numel() * width * _MOST_FAR > size:
                return None
            left = (blocks * width + self._within_block[:width]).view(-1)
        self._divide_(total)
        if dtype is torch.float32:
            cast_rounded(total, out, term, signs, narrow)
        else:
            out.copy_(total)
        return left

    def _far(self, tensors: Sequence[torch.Tensor], out: torch.Tensor) -> bool:
        """Cases 1 to 4, for inputs of any length; returns whether all are finite."""
        used = [k for k, n in enumerate(self.numerators) if n]
        undecided: list[tuple[torch.Tensor, torch.Tensor]] = []  # (positions, the upper candidates)
        finite = True
        for start in range(0, out.numel(), self.chunk):
            stop = min(start + self.chunk, out.numel())
            chunk = [tensor[start:stop] for tensor in tensors]
            finite &= self._merge_chunk(chunk, used, out[start:stop], start, undecided)
        if undecided:
            at = torch.cat([positions for positions, _ in undecided])
            high = torch.cat([candidates for _, candidates in undecided])
            inputs = [tensors[k][at].to(torch.float64) for k in used]
            out[at] = self._at_midpoints(inputs, used, out[at], high)
        return finite

    def _merge_chunk(
        self,
        tensors: Sequence[torch.Tensor],
        used: Sequence[int],
        out: torch.Tensor,
        start: int,
        undecided: list[tuple[torch.Tensor, torch.Tensor]],
    ) -> bool:
        size = out.numel()
        ranges = [value_range(t, self._integers[FORMATS[t.dtype].integer_dtype][:size]) for t in tensors]
        if not all(r.finite for r in ranges):
            self._non_finite(tensors, out)
            return False
        # An input with coefficient 0 is looked at (for NaN), not added.
        if not used:
            out.zero_()
        elif not self._floats_suffice:
            self._exact(list(tensors), out)
        elif self._sum_is_exact([ranges[k] for k in used], [self.numerators[k] for k in used]):
            self._fast([tensors[k] for k in used], [self.numerators[k] for k in used], out)
        else:
            at, high = self._careful([tensors[k] for k in used], used, [ranges[k] for k in used], out)
            if at.numel():
                undecided.append((at + start, high))
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
        total, term, signs = (space[: out.numel()] for space in self._float64)
        narrow = self._float32[: out.numel()]
        for index, (tensor, numerator) in enumerate(zip(tensors, numerators, strict=True)):
            target = widen(tensor, term if index else total, narrow)
            if index:
                total.add_(target, alpha=float(numerator))
            elif numerator != 1:
                target.mul_(float(numerator))
        self._divide_(total)
        cast_rounded(total, out, term, signs, narrow)

    def _divide_(self, total: torch.Tensor) -> None:
        """``total /= D``, as exact as the format allows."""
        if self._power_of_two:
            total.mul_(1.0 / self._divisor)
        else:
            total.div_(self._divisors[total.dtype])

    def _careful(
        self, tensors: Sequence[torch.Tensor], used: Sequence[int], ranges: Sequence[ValueRange], out: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the lower candidates; returns (positions of undecided elements, their upper candidates)."""
        if self._denominator_fits and self._numerators_fit:
            quotient, bound = self._cascaded_quotient(tensors, used)
            below, above = quotient - bound, quotient.add_(bound)
            if self.out_dtype is not torch.float32:
                # Where the bound is 0, float32 must be as exact as the quotient: only one rounding is certain.
                scratch, signs = torch.empty_like(below), torch.empty_like(below)
                round_float64_(below, self.out_dtype, scratch, signs)
                round_float64_(above, self.out_dtype, scratch, signs)
        else:
            below, above = self._plain_quotients(tensors, used, ranges)
        high, narrow = self._high[: out.numel()], self._float32[: out.numel()]
        for values, target in ((below, out), (above, high)):
            target.copy_(values if target.dtype is torch.float32 else narrow.copy_(values))
        integer_dtype = FORMATS[self.out_dtype].integer_dtype
        different = torch.sub(
            out.view(integer_dtype), high.view(integer_dtype), out=self._integers[integer_dtype][: out.numel()]
        )
        at = torch.nonzero(different).view(-1)
        return at, high[at]

    def _cascaded_quotient(
        self, tensors: Sequence[torch.Tensor], used: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(q, bound of its error), float64; the bound is 0 wherever s is exact."""
        total, error, slack = _cascade(
            t.to(torch.float64) * limb for t, k in zip(tensors, used, strict=True) for limb in self._limbs[k]
        )
        bound, quotient = error.abs_().add_(slack), total.div_(self._divisors[total.dtype])
        # Where the sum is exact the quotient is as good as exact (case 1); elsewhere it adds its own rounding.
        inexact = bound / self._divisor * (1 + 2.0**-20) + quotient.abs() * 2.0**-51
        return quotient, torch.where(bound == 0, 0.0, inexact)

    def _plain_quotients(
        self, tensors: Sequence[torch.Tensor], used: Sequence[int], ranges: Sequence[ValueRange]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(below, above), float64, in the work space: θ lies between them, also once both are rounded to float32.

        For weights like 0.3, whose sums are seldom exact.
        """
        total, term, margin = (space[: tensors[0].numel()] for space in self._float64)
        narrow = self._float32[: tensors[0].numel()]
        for index, (tensor, k) in enumerate(zip(tensors, used, strict=True)):
            target = widen(tensor, term if index else total, narrow)
            if index:
                total.add_(target, alpha=float(self.numerators[k]))
            else:
                target.mul_(float(self.numerators[k]))
        total.mul_(1 / self._divisor)
        # n_k, each product, each addition and |terms| round by at most 2^-53 relative; likewise 1 / D, twice, and q.
        largest = sum(
            math.ldexp(float(abs(self.numerators[k])), r.bound) for k, r in zip(used, ranges, strict=True) if not r.zero
        )
        bound = largest * (len(used) + 8) * 2.0**-52 / self._divisor
        torch.abs(total, out=margin)
        if self.out_dtype is not torch.float32:
            # Both ends go through float32, whose rounding must not cross the midpoint that θ has not crossed.
            margin.mul_(2.0**-24 * (1 + 2.0**-20) + 2.0**-51).add_(bound * (1 + 2.0**-20) + 2.0**-149)
        else:
            margin.mul_(2.0**-51).add_(bound)
        return torch.sub(total, margin, out=term), total.add_(margin)

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


class MeanPlan(MergePlan):
    """Σ_k c_k x_k with exact coefficients, as `mot_coefficients` makes them."""

    def __init__(self, coefficients: Sequence[Fraction], base: Fraction = Fraction(0)) -> None:
        self.uses_base = bool(base)
        self.coefficients = [*coefficients, base] if base else list(coefficients)

    def kernel(self, found: Statistics | None, out_dtype: torch.dtype, device: torch.device | str) -> Kernel:
        return WeightedMean(self.coefficients, out_dtype, device)


def weighted_mean(
    tensors: Sequence[torch.Tensor], coefficients: Sequence[Fraction], out_dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Σ_k c_k x_k, every element correctly rounded once; see `WeightedMean` and `merge_in_memory`.

    Args:
        tensors: K tensors of one shape and device; bfloat16, float16 or float32 in any mix.
        coefficients: K exact c_k, as `mot_coefficients` makes them.
        out_dtype: of the result; the promoted dtype of the inputs if None.

    Returns:
        A new tensor, bit-identical under any order of (tensor, coefficient) pairs.

    Raises:
        UserError: another dtype.
    """
    return merge_in_memory(MeanPlan(coefficients), tensors, out_dtype)


def mot_coefficients(
    weights: Sequence[float], scale: float = 1.0, method: str = "mot"
) -> tuple[list[Fraction], Fraction]:
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
        raise UserError(f"{method}: no branch to merge; list at least one model besides the base")
    for weight in weights:
        if not math.isfinite(weight):
            raise UserError(f"{method}: parameter weight: expected a finite number, got {weight}")
    if not math.isfinite(scale):
        raise UserError(f"{method}: parameter scale: expected a finite number, got {scale}")
    exact = [Fraction(weight) for weight in weights]
    total = sum(exact, Fraction(0))
    if total <= 0:
        raise UserError(f"{method}: parameter weight: expected a positive sum over the branches, got {float(total)}")
    step = Fraction(scale)
    return [step * weight / total for weight in exact], 1 - step
