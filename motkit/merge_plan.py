"""A merge as a plan that runs chunk by chunk: from file to file (`merge_stream`) or on tensors in memory (mergekit).

A `MergePlan` says which inputs it wants (K branches, then perhaps the base), what it must know of them beforehand
(`Statistics`, over one tensor or over the whole model), and makes the `Kernel` that then merges any span of them.
"""

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal, Protocol

import torch

from motkit.crew import one_thread
from motkit.errors import UserError
from motkit.merge_float import CHUNK_ACCELERATOR, CHUNK_CPU, check_tensor_dtype, promoted, value_range
from motkit.spans import SPAN

Scope = Literal["element", "tensor", "model"]


class Kernel(Protocol):
    """Merges flat spans of any length. It owns its work space: one per worker."""

    def __call__(self, tensors: Sequence[torch.Tensor], out: torch.Tensor) -> bool:
        """Write the merge of K flat, contiguous tensors to ``out``, as long, which may not overlap them.

        Returns:
            True if all inputs are finite. Where one is not, the result is not either.
        """
        ...


class Statistics(ABC):
    """What a merge must know of all elements before it can merge the first.

    Whatever the order of the spans, the result is the same, to the bit; also where several processes each look at some
    of them in a copy of their own, and one absorbs what the others take out.
    """

    @abstractmethod
    def look(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Take in a span of every input; returns whether all of it is finite (what is not counts as 0)."""

    @abstractmethod
    def take(self) -> Any:
        """What this pass has found so far, which is then no longer here."""

    @abstractmethod
    def absorb(self, part: Any) -> None:
        """Add what `take` took out."""

    @abstractmethod
    def end_pass(self) -> bool:
        """All spans were shown; returns whether all of them are needed once more."""


class MergePlan(ABC):
    """What to do with K branches and, if ``uses_base``, the base after them."""

    over: Scope = "element"
    max_passes = 0  # looks at everything before the merge itself
    uses_base: bool

    def statistics(self, numel: int, device: torch.device | str) -> Statistics:
        """Fresh statistics over ``numel`` elements; for a plan whose scope is not ``element``."""
        raise NotImplementedError

    @abstractmethod
    def kernel(self, found: Statistics | None, out_dtype: torch.dtype, device: torch.device | str) -> Kernel:
        """A kernel for one worker, which writes ``out_dtype``."""


def chunk_size(device: torch.device | str) -> int:
    """Elements per operator: see `CHUNK_CPU`."""
    return CHUNK_CPU if torch.device(device).type == "cpu" else CHUNK_ACCELERATOR


def finite_parts(tensors: Sequence[torch.Tensor]) -> tuple[Sequence[torch.Tensor], torch.Tensor | None]:
    """(the tensors, zeros where any of them is not finite; where all are finite, None if that is everywhere)."""
    if all(value_range(tensor).finite for tensor in tensors):
        return tensors, None
    finite = torch.stack([torch.isfinite(tensor) for tensor in tensors]).all(dim=0)
    return [torch.where(finite, tensor, torch.zeros_like(tensor)) for tensor in tensors], finite


def merge_in_memory(
    plan: MergePlan, tensors: Sequence[torch.Tensor], out_dtype: torch.dtype | None = None, method: str = "mot"
) -> torch.Tensor:
    """Merge one tensor of a model, on the device where it is.

    Args:
        tensors: what the plan wants, of one shape and device; bfloat16, float16 or float32 in any mix.
        out_dtype: of the result; the promoted dtype of the inputs if None.
        method: for messages.

    Returns:
        A new tensor. A NaN or infinity in an input gives one there.

    Raises:
        UserError: another dtype, or a plan that needs the whole model at once.
    """
    for index, tensor in enumerate(tensors):
        check_tensor_dtype(tensor.dtype, f"input {index}", method)
    if plan.over == "model":
        raise UserError(
            f"{method}: needs the whole model at once, and is given one tensor at a time; "
            "run it with 'motkit merge', without gradients, filters and slices"
        )
    shape, device = tensors[0].shape, tensors[0].device
    flat = [tensor.detach().contiguous().view(-1) for tensor in tensors]
    out_dtype = out_dtype or promoted(tensors)
    out = torch.empty(shape, dtype=out_dtype, device=device)
    flat_out, size = out.view(-1), math.prod(shape)
    span = max(SPAN, chunk_size(device))
    parts = [slice(start, min(start + span, size)) for start in range(0, size, span)]
    with one_thread() if torch.device(device).type == "cpu" else contextlib.nullcontext():
        found = None
        if plan.over == "tensor":
            found, more = plan.statistics(size, device), True
            while more:
                for part in parts:
                    found.look([tensor[part] for tensor in flat])
                more = found.end_pass()
        kernel = plan.kernel(found, out_dtype, device)
        for part in parts:
            kernel([tensor[part] for tensor in flat], flat_out[part])
    return out
