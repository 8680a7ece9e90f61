"""Tensor data in spans: look for NaN in checkpoints, and run a `MergePlan` from file to file.

A worker (`motkit.crew`) reads a span of each input at its offset, merges it, and writes the result at its offset.
Memory does not grow with the model, and nothing depends on the order in which workers finish.
"""

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from motkit import spans
from motkit.crew import Crew
from motkit.errors import UserError
from motkit.merge_inputs import ITEM_BYTES, Checkpoint, TensorRecord, listed, same_data

if TYPE_CHECKING:
    import torch

    from motkit.adapters import LowRank
    from motkit.merge_plan import Kernel, MergePlan, Statistics


def non_finite(checkpoints: Sequence[Checkpoint], quiet: bool, description: str) -> tuple[list[str], int]:
    """(one line per tensor that holds a NaN or an infinity, bytes read)."""
    import torch

    from motkit.merge_float import CHUNK_CPU, FORMATS, value_range

    found: dict[tuple[Path, str], None] = {}
    jobs = [
        (number, name, span)
        for number, checkpoint in enumerate(checkpoints)
        for name, record in checkpoint.tensors.items()
        if record.is_float and record.dtype in spans.TORCH_NAMES and name not in checkpoint.dropped
        for span in spans.ranges(record.numel)
    ]
    total = sum((b - a) * ITEM_BYTES[checkpoints[number].tensors[name].dtype] for number, name, (a, b) in jobs)
    with spans.Files() as files, spans.progress_bar(description, total, quiet) as bar:

        def make_space() -> Any:
            integers = {dtype: torch.empty(CHUNK_CPU, dtype=dtype) for dtype in (torch.int16, torch.int32)}
            return torch.empty(spans.SPAN * 8, dtype=torch.uint8), integers

        def look(space: Any, job: Any) -> int:
            buffer, scratch = space
            number, name, (start, stop) = job
            record = checkpoints[number].tensors[name]
            item = ITEM_BYTES[record.dtype]
            files.read_into(record, start * item, buffer[: (stop - start) * item])
            values = buffer[: (stop - start) * item].view(spans.torch_dtype(record.dtype))
            if values.dtype in FORMATS:
                pieces = values.split(CHUNK_CPU)
                integers = scratch[FORMATS[values.dtype].integer_dtype]
                finite = all(value_range(piece, integers[: len(piece)]).finite for piece in pieces)
            else:
                finite = bool(torch.isfinite(values).all())
            if not finite:
                found[(checkpoints[number].path, name)] = None
            return int((stop - start) * item)

        read, reports = Crew(make_space, total, bar.update).run(jobs, look, lambda: list(found))
    return [_non_finite_line(path, name) for path, name in sorted({fault for part in reports for fault in part})], read


def _non_finite_line(path: Path, name: str) -> str:
    return f"{path}: {name}: holds NaN or infinite values; train that branch again or leave it out"


def stream_merge(
    plan: "MergePlan",
    inputs: Sequence[Checkpoint],
    out_dtype: str | None,
    out: Path,
    *,
    method: str,
    device: str,
    quiet: bool,
    updates: "Mapping[str, LowRank] | None" = None,
) -> int:
    """Merge from file to file, a span at a time; returns bytes read.

    Args:
        plan: what to do with the inputs.
        inputs: the checkpoints that the plan wants, in its order, with equal tensor names and shapes.
        out_dtype: bfloat16, float16 or float32; None for the promoted dtype of each tensor's inputs.
        out: an existing folder; gets ``model.safetensors``, or shards with an index.
        updates: what adapters add to tensors, by name, with a `MeanPlan`; such a tensor is summed in float64 and
            rounded once.
        method: for messages.

    Raises:
        UserError: NaN or infinite values, other dtypes than bfloat16, float16 and float32, or integer buffers that
            differ between inputs. All faults at once.
    """
    names = sorted(inputs[0].names)
    records = {name: [checkpoint.tensors[name] for checkpoint in inputs] for name in names}
    out_codes = _out_codes(records, out_dtype, method)
    written = spans.lay_out(out, {name: (out_codes[name], records[name][0].shape) for name in names})
    floats = [name for name in names if records[name][0].is_float]
    passes = 1 + (plan.max_passes if plan.over != "element" else 0)
    total = passes * sum(r.stop - r.start for name in floats for r in records[name])
    with contextlib.ExitStack() as stack:
        files, bar = (
            stack.enter_context(spans.Files()),
            stack.enter_context(spans.progress_bar("Merging", total, quiet)),
        )
        targets = stack.enter_context(spans.Targets({record.file for record in written.values()}))

        def advance(count: int) -> None:
            bar.update(count)
            targets.keep_up(count)

        crew = Crew(lambda: _Space(len(inputs)), total, advance, device)
        run = _StreamedMerge(plan, inputs, records, written, files, targets, device, updates or {})
        if plan.over == "tensor":
            # Each tensor by one worker, which counts and merges it while its data is in memory; the largest first.
            largest = sorted(floats, key=lambda name: -records[name][0].numel)
            read, reports = crew.run(run.tensors(largest), run.merge_tensor, run.take_broken)
            run.refuse_non_finite(reports)
        else:
            found, read = None, 0
            if plan.over == "model":
                found = plan.statistics(sum(records[name][0].numel for name in floats), device)
                more = True
                while more:
                    look = functools.partial(run.look, found)
                    passed, looked = crew.run(run.spans(floats), look, lambda: (found.take(), run.take_broken()))
                    read += passed
                    run.refuse_non_finite([broken for _, broken in looked])
                    for part, _ in looked:
                        found.absorb(part)
                    more = found.end_pass()
            merged, reports = crew.run(run.spans(floats), functools.partial(run.merge, found), run.take_broken)
            read += merged
            run.refuse_non_finite(reports)
        for name in names:
            if not records[name][0].is_float:
                for start, stop in spans.ranges(records[name][0].numel):
                    read += spans.copy_span(files, records[name][0], written[name], targets, start, stop) * len(inputs)
    return read


def _out_codes(records: Mapping[str, Sequence[TensorRecord]], out_dtype: str | None, method: str) -> dict[str, str]:
    """safetensors' dtype of every tensor of the result."""
    codes, faults = {}, []
    for name, group in records.items():
        if not group[0].is_float:
            if not all(same_data(record, group[0]) for record in group[1:]):
                faults.append(f"{name}: an integer buffer that differs between the inputs; {method} cannot merge it")
            codes[name] = group[0].dtype
            continue
        unreadable = [r for r in group if r.dtype not in ("BF16", "F16", "F32")]
        for record in unreadable:
            faults.append(
                f"{record.file}: {name}: dtype {record.dtype}: {method} expects BF16, F16 or F32; "
                "convert the checkpoint"
            )
        if not unreadable:
            codes[name] = spans.SAFETENSORS_NAMES[out_dtype] if out_dtype else _promoted(group)
    if faults:
        raise UserError(listed(faults))
    return codes


class _Space:
    """Work space of one worker: a buffer per input, one for the result, and its kernels."""

    def __init__(self, num_inputs: int) -> None:
        import torch

        self.buffers = [torch.empty(spans.SPAN * 4, dtype=torch.uint8) for _ in range(num_inputs)]
        self.out = torch.empty(spans.SPAN * 4, dtype=torch.uint8)
        self.kernels: dict[str, Kernel] = {}
        self.made_for: Statistics | None = None


@dataclass
class _StreamedMerge:
    """The jobs of a merge from file to file: a look at a span, the merge of a span."""

    plan: "MergePlan"
    inputs: Sequence[Checkpoint]
    records: Mapping[str, Sequence[TensorRecord]]
    written: Mapping[str, TensorRecord]
    files: spans.Files
    targets: spans.Targets
    device: str
    updates: "Mapping[str, LowRank]"
    broken: dict[tuple[Path, str], None] = field(default_factory=dict)

    def spans(self, names: Sequence[str]) -> Iterator[tuple[str, int, int]]:
        for position, name in enumerate(names):
            for following in names[position + 1 : position + 2]:
                for record in self.records[following]:
                    self.files.will_need(record)
            for start, stop in spans.ranges(self.records[name][0].numel):
                yield name, start, stop

    def tensors(self, names: Sequence[str]) -> Iterator[str]:
        for name in names:
            for record in self.records[name]:
                self.files.will_need(record)
            yield name

    def merge_tensor(self, space: _Space, name: str) -> int:
        """Count over one tensor, then merge it."""
        jobs = [(name, start, stop) for start, stop in spans.ranges(self.records[name][0].numel)]
        found, read, more = self.plan.statistics(self.records[name][0].numel, self.device), 0, True
        while more:
            read += sum(self.look(found, space, job) for job in jobs)
            if self.broken:
                return read
            more = found.end_pass()
        return read + sum(self.merge(found, space, job) for job in jobs)

    def look(self, found: "Statistics", space: _Space, job: tuple[str, int, int]) -> int:
        values, read = self._read(space, job)
        if not found.look(values):
            self._note_non_finite(job[0], values)
        return read

    def merge(self, found: "Statistics | None", space: _Space, job: tuple[str, int, int]) -> int:
        import torch

        name, start, stop = job
        target = self.written[name]
        if space.made_for is not found:
            space.kernels, space.made_for = {}, found
        if target.dtype not in space.kernels:
            out_dtype = spans.torch_dtype(target.dtype) or torch.float32
            space.kernels[target.dtype] = self.plan.kernel(found, out_dtype, self.device)
        values, read = self._read(space, job)
        item = ITEM_BYTES[target.dtype]
        result_bytes = space.out[: (stop - start) * item]
        result = result_bytes.view(spans.torch_dtype(target.dtype)).to(self.device)
        if name in self.updates:
            finite = _add_update(values, self.plan.coefficients, self.updates[name].span(start, stop), result)  # type: ignore[attr-defined]
        else:
            finite = space.kernels[target.dtype](values, result)
        if not finite:
            self._note_non_finite(name, values)
        if result.device.type != "cpu":
            result_bytes.copy_(result.view(torch.uint8))
        self.targets.write(target, start * item, memoryview(result_bytes.numpy()))
        return read

    def take_broken(self) -> list[tuple[Path, str]]:
        broken, self.broken = list(self.broken), {}
        return broken

    def refuse_non_finite(self, reports: Sequence[Sequence[tuple[Path, str]]]) -> None:
        if broken := sorted({fault for report in reports for fault in report}):
            raise UserError(listed([_non_finite_line(path, name) for path, name in broken]))

    def _read(self, space: _Space, job: tuple[str, int, int]) -> "tuple[list[torch.Tensor], int]":
        name, start, stop = job
        records = self.records[name]
        values = [value.to(self.device) for value in self.files.read(records, space.buffers, start, stop)]
        return values, sum((stop - start) * ITEM_BYTES[record.dtype] for record in records)

    def _note_non_finite(self, name: str, values: "Sequence[torch.Tensor]") -> None:
        import torch

        for checkpoint, value in zip(self.inputs, values, strict=True):
            if not bool(torch.isfinite(value).all()):
                self.broken[(checkpoint.path, name)] = None


def _add_update(
    values: Sequence["torch.Tensor"], coefficients: Sequence[Fraction], update: "torch.Tensor", result: "torch.Tensor"
) -> bool:
    """``result[:] = Σ c_k·x_k + update`` in float64, rounded once; False if that is not finite."""
    import torch

    from motkit.merge_float import round_float64_

    total = update.to(values[0].device, copy=True)
    for value, coefficient in zip(values, coefficients, strict=True):
        total.add_(value.to(torch.float64), alpha=float(coefficient))
    finite = bool(torch.isfinite(total).all())
    if finite and result.dtype is not torch.float32:  # float64 → float32 rounds once on its own
        round_float64_(total, result.dtype, torch.empty_like(total), torch.empty_like(total))
    result.copy_(total)
    return finite


def _promoted(group: Sequence[TensorRecord]) -> str:
    codes = {record.dtype for record in group}
    return codes.pop() if len(codes) == 1 else "F32"
