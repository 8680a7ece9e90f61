"""Floating-point formats by their bits: the range of a tensor's values, and rounding once.

Facts relied on: all of bfloat16, float16 and float32 embed in float64 with at least 29 bits to spare; float64 → float32
rounds once, but torch takes float64 → bfloat16 or float16 through float32 and rounds twice, which is wrong for about
one element in 2^16 (never use ``.to(torch.bfloat16)`` on a float64 tensor here).

torch converts between float64 and the 16-bit formats one element at a time, and through float32 in vectors: `widen` and
`cast_rounded` go that way, which is several times faster.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from motkit.errors import UserError


@dataclass(frozen=True)
class FloatFormat:
    """Layout of a floating-point dtype that our merge methods read and write."""

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

# Elements per operator on a CPU: so many that starting one costs little, and few enough for the caches.
CHUNK_CPU = 1 << 17
CHUNK_ACCELERATOR = 1 << 22

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


def widen(tensor: torch.Tensor, out: torch.Tensor, scratch: torch.Tensor) -> torch.Tensor:
    """``out[:] = tensor``, to float64, exactly; ``scratch`` is float32 work space as long as the tensor."""
    if tensor.dtype is torch.float32:
        return out.copy_(tensor)
    return out.copy_(scratch.copy_(tensor))


def cast_rounded(
    values: torch.Tensor, out: torch.Tensor, scratch: torch.Tensor, signs: torch.Tensor, narrow: torch.Tensor
) -> None:
    """``out[:] = values``, float64 to ``out.dtype`` with a single rounding; all but ``out`` are used up.

    ``scratch`` and ``signs`` are float64 work space, ``narrow`` is float32.
    """
    if out.dtype is torch.float32:
        out.copy_(values)
    else:
        out.copy_(narrow.copy_(round_float64_(values, out.dtype, scratch, signs)))


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


def check_tensor_dtype(dtype: torch.dtype, what: str, method: str = "mot") -> None:
    """Raise a `UserError` unless our merge methods can read ``dtype``."""
    if dtype not in FORMATS:
        name = str(dtype).removeprefix("torch.")
        raise UserError(
            f"{method}: {what}: dtype {name}: expected bfloat16, float16 or float32; convert the checkpoint first"
        )


def round_dtype(name: str | None, method: str = "mot") -> torch.dtype | None:
    """The dtype that parameter ``round_to`` names.

    Raises:
        UserError: not a name that ``mot`` can write.
    """
    if name is None:
        return None
    dtype = DTYPE_NAMES.get(str(name).removeprefix("torch."))
    if dtype is None:
        raise UserError(f"{method}: parameter round_to: expected one of {', '.join(DTYPE_NAMES)}, got {name!r}")
    return dtype


def promoted(tensors: Sequence[torch.Tensor]) -> torch.dtype:
    """The dtype that holds the values of all tensors."""
    return functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
