"""TIES: trim every task vector, elect a sign per element, average the entries that agree with it.

With task vectors δ_k = θ_k − θ_base, their trimmed forms δ̂_k (|δ̂_k| ≥ the threshold of branch k, or 0) and weights w_k:

    s = sign(Σ_k w_k δ̂_k), + where the sum is 0
    θ = θ_base + scale · Σ_{k: sign(δ̂_k) = s} w_k δ̂_k / Σ_{k: sign(δ̂_k) = s} w_k

Source: "TIES-Merging", Yadav et al. 2023, arXiv 2306.01708. Ours differs from mergekit's ``ties`` in three ways:

* The threshold is the exact k-th magnitude, k = max(1, ⌊density · n⌋), and **all** entries of that magnitude are kept,
  as in the authors' code; a sort keeps some of them, by chance. (Task vectors of 16-bit checkpoints hold few different
  values, so such ties are common.) It is found by counting bits, without a sort.
* n is a tensor's size (``trim: tensor``, as in mergekit and in PEFT) or the model's (``trim: model``, the authors').
* Task vectors are float32 and sums float64 whatever the inputs' dtype, and the result is rounded once.
"""

from collections.abc import Sequence
from typing import Literal

import torch

from motkit.errors import UserError
from motkit.merge_float import cast_rounded, widen
from motkit.merge_mean import mot_coefficients
from motkit.merge_plan import Kernel, MergePlan, Statistics, chunk_size, finite_parts

# |δ| as float32 has 31 bits: the first pass counts the upper ones, the second the lower ones of what is left.
_LOW_BITS = 15
_BINS = 1 << (31 - _LOW_BITS)
_INFINITE = 0x7F800000 >> _LOW_BITS  # the first bin of what is not finite


class TiesPlan(MergePlan):
    """See the module's docstring. Inputs: K branches, then the base.

    Args:
        weights: one per branch, not negative; only ratios count.
        densities: share of each task vector that is kept, one per branch, in [0, 1].
        scale: of the merged task vector (the paper's λ).
        trim: what a density counts over.

    Raises:
        UserError: weights or densities out of range.
    """

    max_passes = 2
    uses_base = True

    def __init__(
        self,
        weights: Sequence[float],
        densities: Sequence[float],
        scale: float = 1.0,
        trim: Literal["tensor", "model"] = "tensor",
    ) -> None:
        mot_coefficients(weights, scale, "mot_ties")  # finite, and a positive sum
        for weight in weights:
            if weight < 0:
                raise UserError(f"mot_ties: parameter weight: expected at least 0, got {weight}")
        for density in densities:
            if not 0 <= density <= 1:
                raise UserError(f"mot_ties: parameter density: expected a number from 0 to 1, got {density}")
        if trim not in ("tensor", "model"):
            raise UserError(f"mot_ties: parameter trim: expected tensor or model, got {trim!r}")
        self.weights, self.densities, self.scale = list(weights), list(densities), scale
        trims = any(0 < density < 1 for density in densities)
        self.over = trim if trims else "element"

    def statistics(self, numel: int, device: torch.device | str) -> "MagnitudeThresholds":
        return MagnitudeThresholds(self.densities, numel, device)

    def kernel(self, found: Statistics | None, out_dtype: torch.dtype, device: torch.device | str) -> Kernel:
        if isinstance(found, MagnitudeThresholds):
            thresholds = found.thresholds
        else:
            thresholds = [0.0 if density else float("inf") for density in self.densities]
        return _TiesKernel(self.weights, thresholds, self.scale, device)


class MagnitudeThresholds(Statistics):
    """The k-th largest |δ| of every branch, exactly, as float32: a radix selection in two passes.

    ``thresholds`` holds them once no pass is needed any more: 0 for a density of 1, infinity for a density of 0.
    """

    def __init__(self, densities: Sequence[float], numel: int, device: torch.device | str = "cpu") -> None:
        self.thresholds = [0.0 if density >= 1 else float("inf") for density in densities]
        # What is still to be kept, by branch; branches that keep all or nothing are not counted.
        self._wanted = {k: max(1, int(d * numel)) for k, d in enumerate(densities) if 0 < d < 1 and numel}
        self._upper: dict[int, int] = {}
        self._chunk = chunk_size(device)
        self._counts: dict[int, torch.Tensor] = {}

    def look(self, tensors: Sequence[torch.Tensor]) -> bool:
        *branches, base = tensors
        finite, numel = True, base.numel()
        size = min(self._chunk, numel)
        delta, base32 = (torch.empty(size, device=base.device) for _ in range(2))
        place = torch.empty(size, dtype=torch.int64, device=base.device)
        one = torch.ones(size, dtype=torch.int64, device=base.device)
        found = {
            k: torch.zeros((1 << _LOW_BITS) + 2 if k in self._upper else _BINS, dtype=torch.int64, device=base.device)
            for k in self._wanted
        }
        for start in range(0, numel, self._chunk):
            part = slice(start, start + self._chunk)
            length = min(self._chunk, numel - start)
            base32[:length].copy_(base[part])
            for k, counts in found.items():
                bits = delta[:length].copy_(branches[k][part]).sub_(base32[:length]).abs_().view(torch.int32)
                if k in self._upper:  # lower bits + 1; below and above the bin of interest: 0 and the last
                    bits.sub_(self._upper[k] << _LOW_BITS).clamp_(-1, 1 << _LOW_BITS).add_(1)
                else:
                    bits.bitwise_right_shift_(_LOW_BITS)
                # Not bincount, which also looks for the extremes, in threads of its own.
                counts.scatter_add_(0, place[:length].copy_(bits), one[:length])
        for k, counts in found.items():
            if k not in self._upper and bool(counts[_INFINITE:].any()):
                counts[0] += counts[_INFINITE:].sum()
                counts[_INFINITE:] = 0
                finite = False
        self.absorb(found)
        return finite

    def take(self) -> dict[int, torch.Tensor]:
        counts, self._counts = self._counts, {}
        return counts

    def absorb(self, part: dict[int, torch.Tensor]) -> None:
        for k, counts in part.items():
            self._counts[k] = self._counts[k] + counts if k in self._counts else counts

    def end_pass(self) -> bool:
        for k, counts in self._counts.items():
            if k not in self._upper:
                self._upper[k], self._wanted[k] = _kth_from_above(counts, self._wanted[k])
            else:
                lower, _ = _kth_from_above(counts[1:-1], self._wanted[k])
                bits = torch.tensor([(self._upper[k] << _LOW_BITS) + lower], dtype=torch.int32)
                self.thresholds[k] = float(bits.view(torch.float32))
                del self._wanted[k]
        self._counts = {}
        return bool(self._wanted)


def _kth_from_above(counts: torch.Tensor, k: int) -> tuple[int, int]:
    """(the bin that holds the k-th largest value, how many of that bin's are among the k largest)."""
    from_above = counts.flip(0).cumsum(0)
    place = int(torch.searchsorted(from_above, k))
    before = int(from_above[place - 1]) if place else 0
    return len(counts) - 1 - place, k - before


class _TiesKernel:
    """Trim by threshold, elect, average; see the module's docstring."""

    def __init__(
        self, weights: Sequence[float], thresholds: Sequence[float], scale: float, device: torch.device | str
    ) -> None:
        self._weights, self._scale = list(weights), scale
        self._smallest_weight = min(weight for weight in weights if weight)
        # hardshrink keeps |δ| > λ; the float32 below the threshold makes that |δ| ≥ threshold.
        below = torch.nextafter(torch.tensor(list(thresholds), dtype=torch.float32), torch.tensor(0.0))
        self._below = [
            None if threshold == 0 else value for threshold, value in zip(thresholds, below.tolist(), strict=True)
        ]
        self._chunk = chunk_size(device)
        self._float64 = [torch.empty(self._chunk, dtype=torch.float64, device=device) for _ in range(7)]
        self._float32 = [torch.empty(self._chunk, device=device) for _ in range(3)]

    def __call__(self, tensors: Sequence[torch.Tensor], out: torch.Tensor) -> bool:
        finite = True
        for start in range(0, out.numel(), self._chunk):
            part = slice(start, start + self._chunk)
            inputs, where = finite_parts([tensor[part] for tensor in tensors])
            self._merge_chunk(inputs, out[part])
            if where is not None:
                out[part] = torch.where(where, out[part], torch.full_like(out[part], float("nan")))
                finite = False
        return finite

    def _merge_chunk(self, tensors: Sequence[torch.Tensor], out: torch.Tensor) -> None:
        *branches, base = tensors
        positive, total, weight_above, weight_all, delta64, part, sign64 = (s[: out.numel()] for s in self._float64)
        base32, delta, sign = (space[: out.numel()] for space in self._float32)
        base32.copy_(base)
        first = True
        for branch, weight, below in zip(branches, self._weights, self._below, strict=True):
            if not weight:
                continue
            delta.copy_(branch).sub_(base32)
            if below is not None:
                torch.ops.aten.hardshrink.out(delta, below, out=delta)
            delta64.copy_(delta)
            sign64.copy_(torch.sign(delta, out=sign))
            if first:
                torch.mul(delta64, weight, out=total)
                torch.clamp_min(delta64, 0.0, out=positive).mul_(weight)
                torch.clamp_min(sign64, 0.0, out=weight_above).mul_(weight)
                torch.abs(sign64, out=weight_all).mul_(weight)
                first = False
                continue
            total.add_(delta64, alpha=weight)
            positive.add_(torch.clamp_min(delta64, 0.0, out=part), alpha=weight)
            weight_above.add_(torch.clamp_min(sign64, 0.0, out=part), alpha=weight)
            weight_all.add_(sign64.abs_(), alpha=weight)
        # What is elected: the entries above 0 where the sum is at least 0, else those below. With numbers 1 and 0 for
        # yes and no, because torch.where costs as much as all the rest.
        negative, weight_below = torch.sub(total, positive, out=delta64), weight_all.sub_(weight_above)
        elected = torch.sign(total, out=total).add_(1.0).clamp_max_(1.0)
        rejected = torch.sub(1.0, elected, out=part)
        merged = positive.mul_(elected).addcmul_(negative, rejected)
        divisor = weight_above.mul_(elected).addcmul_(weight_below, rejected)
        # A weight of entries is 0 only where there are none, and then so is their sum.
        merged.div_(divisor.clamp_min_(self._smallest_weight)).mul_(self._scale)
        merged.add_(widen(base, delta64, base32))
        cast_rounded(merged, out, part, sign64, base32)
