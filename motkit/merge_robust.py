"""Means that one bad teacher cannot move far.

A plain mean goes wherever a single branch drags it. Two remedies, from the literature on federated learning with
faulty clients:

* per coordinate (`OrderedMeanPlan`): sort the K values and average those in the middle. The median and the trimmed mean
  of Yin et al. 2018, arXiv 1803.01498.
* over whole task vectors (`GeometricMedianPlan`): the point with the least sum of distances to the branches, RFA of
  Pillutla et al. 2019, arXiv 1912.13445. It works from three branches on; Krum (Blanchard et al. 2017), which picks one
  branch, needs 2f + 3 of them against f bad ones, so five against one.

Neither changes if a base is subtracted first, so both work on the weights as they are. The result is the exact weighted
mean of what was chosen, rounded once (`motkit.merge_mean`).
"""

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Literal

import torch

from motkit.errors import UserError
from motkit.merge_float import FORMATS, promoted
from motkit.merge_mean import WeightedMean, mot_coefficients
from motkit.merge_plan import Kernel, MergePlan, Statistics, chunk_size, finite_parts


class OrderedMeanPlan(MergePlan):
    """θ = base + scale · (mean of the values in the middle − base), per coordinate.

    With the K values of a coordinate in ascending order, x_(1) ≤ … ≤ x_(K), the mean is
    (1 / (K − 2m)) Σ_{m < j ≤ K−m} x_(j). m = ⌊(K−1)/2⌋ is the median (of an even K: the mean of the middle two).

    Args:
        num_branches: K.
        drop_each_end: m; None for the median.
        scale: step along the resulting task vector; other values than 1 need the base.

    Raises:
        UserError: nothing would be left of K.
    """

    def __init__(
        self, num_branches: int, drop_each_end: int | None, scale: float = 1.0, method: str = "mot_median"
    ) -> None:
        drop = (num_branches - 1) // 2 if drop_each_end is None else drop_each_end
        if drop < 0 or 2 * drop >= num_branches:
            raise UserError(
                f"{method}: parameter drop_each_end: {drop} of {num_branches} branches at each end leave none; "
                f"expected a number from 0 to {(num_branches - 1) // 2}"
            )
        self.kept = range(drop, num_branches - drop)
        coefficients, base = mot_coefficients([1.0] * len(self.kept), scale, method)
        self.uses_base = bool(base)
        self.coefficients = [*coefficients, base] if base else coefficients
        self.num_branches = num_branches

    def kernel(self, found: Statistics | None, out_dtype: torch.dtype, device: torch.device | str) -> Kernel:
        return _OrderedMeanKernel(self, out_dtype, device)


class _OrderedMeanKernel:
    def __init__(self, plan: OrderedMeanPlan, out_dtype: torch.dtype, device: torch.device | str) -> None:
        self._plan, self._chunk = plan, chunk_size(device)
        self._mean = WeightedMean(plan.coefficients, out_dtype, device)

    def __call__(self, tensors: Sequence[torch.Tensor], out: torch.Tensor) -> bool:
        finite, dtype = True, promoted(tensors)
        for start in range(0, out.numel(), self._chunk):
            part = slice(start, start + self._chunk)
            inputs, where = finite_parts([tensor[part] for tensor in tensors])
            count = self._plan.num_branches
            ordered = sort_elements([tensor.to(dtype) for tensor in inputs[:count]])
            self._mean([*(ordered[j] for j in self._plan.kept), *inputs[count:]], out[part])
            if where is not None:
                out[part] = torch.where(where, out[part], torch.full_like(out[part], math.nan))
                finite = False
        return finite


def sort_elements(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The K tensors with the K values of every coordinate in ascending order (−0 before +0).

    An odd-even transposition network on the bits: K(K−1)/2 vectorised minima and maxima, for small K far quicker than a
    sort along an axis.
    """
    layout = FORMATS[tensors[0].dtype]
    keys = [_order_key(tensor.view(layout.integer_dtype)) for tensor in tensors]
    for step in range(len(keys)):
        for j in range(step % 2, len(keys) - 1, 2):
            keys[j], keys[j + 1] = torch.minimum(keys[j], keys[j + 1]), torch.maximum(keys[j], keys[j + 1])
    return [_order_key(key).view(tensors[0].dtype) for key in keys]


def _order_key(bits: torch.Tensor) -> torch.Tensor:
    """Integers in the order of the floats that ``bits`` stand for; applied twice, the bits again."""
    highest = torch.iinfo(bits.dtype).max
    return torch.bitwise_right_shift(bits, highest.bit_length()).bitwise_and_(highest).bitwise_xor_(bits)


class GeometricMedianPlan(MergePlan):
    """θ = base + scale · (v − base) with v = argmin_v Σ_k w_k ‖v − θ_k‖₂, over a tensor or over the whole model.

    v is a weighted mean of the branches, so all that is needed of them are their distances: one pass, then Weiszfeld's
    iteration on K numbers (`geometric_median_weights`).

    Args:
        weights: one per branch, not negative; only ratios count.
        scale: step along the resulting task vector; other values than 1 need the base.
        over: what a distance is taken over.

    Raises:
        UserError: weights out of range.
    """

    max_passes = 1
    method = "mot_geometric_median"

    def __init__(self, weights: Sequence[float], scale: float = 1.0, over: Literal["tensor", "model"] = "model"):
        _, base = mot_coefficients(weights, scale, self.method)
        for weight in weights:
            if weight < 0:
                raise UserError(f"{self.method}: parameter weight: expected at least 0, got {weight}")
        if over not in ("tensor", "model"):
            raise UserError(f"{self.method}: parameter over: expected tensor or model, got {over!r}")
        self.over, self.uses_base, self._base, self._scale = over, bool(base), base, scale
        self.weights = list(weights)

    def statistics(self, numel: int, device: torch.device | str) -> "SquaredDistances":
        return SquaredDistances(self.weights, device)

    def kernel(self, found: Statistics | None, out_dtype: torch.dtype, device: torch.device | str) -> Kernel:
        assert isinstance(found, SquaredDistances)
        # To 2^-40 of the whole: a last bit of a distance must not change the result.
        coefficients, _ = mot_coefficients([round(s * 2.0**40) for s in found.shares], self._scale, self.method)
        return WeightedMean([*coefficients, self._base] if self._base else coefficients, out_dtype, device)


class SquaredDistances(Statistics):
    """``squared[i][j]`` = ‖θ_i − θ_j‖² for every pair of the K branches, and their ``shares`` in the geometric median.

    The partial sums of spans are added exactly (as integers), so that the order of spans does not matter.
    """

    def __init__(self, weights: Sequence[float], device: torch.device | str = "cpu") -> None:
        num_branches = len(weights)
        self._weights = weights
        self._pairs = [(i, j) for j in range(num_branches) for i in range(j)]
        self._sums = dict.fromkeys(self._pairs, 0)
        self._chunk = chunk_size(device)
        self.squared = [[0.0] * num_branches for _ in range(num_branches)]
        self.shares: list[float] = []

    def look(self, tensors: Sequence[torch.Tensor]) -> bool:
        finite = True
        for start in range(0, tensors[0].numel(), self._chunk):
            inputs, where = finite_parts([tensor[start : start + self._chunk] for tensor in tensors])
            finite &= where is None
            wide = [tensor.to(torch.float32).to(torch.float64) for tensor in inputs]
            for i, j in self._pairs:
                difference = wide[i] - wide[j]
                numerator, denominator = torch.dot(difference, difference).item().as_integer_ratio()
                self._sums[i, j] += numerator << (_FIXED_POINT - denominator.bit_length() + 1)
        return finite

    def take(self) -> dict[tuple[int, int], int]:
        sums, self._sums = self._sums, dict.fromkeys(self._pairs, 0)
        return sums

    def absorb(self, part: dict[tuple[int, int], int]) -> None:
        for pair, total in part.items():
            self._sums[pair] += total

    def end_pass(self) -> bool:
        for (i, j), total in self._sums.items():
            self.squared[i][j] = self.squared[j][i] = float(Fraction(total, 1 << _FIXED_POINT))
        self.shares = geometric_median_weights(self.squared, self._weights)
        return False


_FIXED_POINT = 1074  # every float64 is an integer multiple of 2^-1074


def geometric_median_weights(squared: Sequence[Sequence[float]], weights: Sequence[float]) -> list[float]:
    """Shares α of the points in their geometric median Σ α_k θ_k; α ≥ 0, Σ α = 1.

    Weiszfeld's iteration, smoothed as in RFA: α_k ∝ w_k / max(ν, ‖v − θ_k‖), with
    ‖v − θ_k‖² = Σ_j α_j d²_kj − ½ Σ_ij α_i α_j d²_ij. ``math.fsum`` makes it the same in any order of the points.

    Args:
        squared: d², the squared distance of every pair.
        weights: w, not negative, with a positive sum.
    """
    count, total = len(weights), math.fsum(weights)
    share = [weight / total for weight in weights]
    smallest = 1e-9 * math.sqrt(max(max(row) for row in squared))
    if not smallest:
        return share
    for _ in range(10_000):
        spread = math.fsum(share[i] * share[j] * squared[i][j] for i in range(count) for j in range(i))
        distances = [
            math.sqrt(max(math.fsum([*(share[j] * squared[k][j] for j in range(count)), -spread]), 0.0))
            for k in range(count)
        ]
        pull = [weight / max(distance, smallest) for weight, distance in zip(weights, distances, strict=True)]
        whole = math.fsum(pull)
        before, share = share, [each / whole for each in pull]
        if max(abs(a - b) for a, b in zip(before, share, strict=True)) < 1e-13:
            break
    return share
