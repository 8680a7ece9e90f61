"""Tensor data in spans: look for NaN in checkpoints, and run a `MergePlan` from file to file.

Every thread reads a span of each input at its offset, merges it, and writes the result at its offset. Memory does not
grow with the model, and nothing depends on the order in which threads finish. The kernel is told in advance which
tensor is read next, and a thread has it write out what is merged, so that disk and processor work at the same time.
"""

import contextlib
import functools
import json
import math
import os
import struct
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from motkit.errors import UserError
from motkit.merge_inputs import ITEM_BYTES, Checkpoint, TensorRecord, listed, same_data

if TYPE_CHECKING:
    import torch

    from motkit.merge_plan import Kernel, MergePlan, Statistics

TORCH_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}  # safetensors' → torch's
_SAFETENSORS_NAMES = {name: code for code, name in TORCH_NAMES.items()}
_SHARD_BYTES = 5_000_000_000
_SPAN = 1 << 18  # elements that a thread reads, merges and writes at a time
_READ_AHEAD_BYTES = 1 << 24  # of the next tensor of every input
_FLUSH_BYTES = 1 << 26  # of the result, between two requests to write it to the disk


class _Files:
    """Open files by path, read and written at offsets from many threads."""

    def __init__(self) -> None:
        self._descriptors: dict[Path, int] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> "_Files":
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)

    def descriptor(self, path: Path) -> int:
        with self._lock:
            if path not in self._descriptors:
                self._descriptors[path] = os.open(path, os.O_RDONLY)
            return self._descriptors[path]

    def will_need(self, record: TensorRecord) -> None:
        """Have the tensor's first part read from the disk in the background."""
        if hasattr(os, "posix_fadvise"):  # not on macOS
            length = min(record.stop - record.start, _READ_AHEAD_BYTES)
            os.posix_fadvise(self.descriptor(record.file), record.start, length, os.POSIX_FADV_WILLNEED)

    def read_into(self, record: TensorRecord, offset: int, buffer: "torch.Tensor") -> None:
        """Fill a flat byte tensor from ``offset`` bytes into the tensor."""
        descriptor, view, done = self.descriptor(record.file), memoryview(buffer.numpy()), 0
        while done < len(view):
            count = os.preadv(descriptor, [view[done:]], record.start + offset + done)
            if not count:
                raise UserError(f"{record.file}: became shorter while it was read; do not change inputs during a merge")
            done += count


class _Crew:
    """Threads that do jobs, each with work space of its own (from ``make_space``) for as long as it lives."""

    def __init__(self, make_space: Callable[[], Any], bar: Any, device: str) -> None:
        from motkit.merge_plan import num_threads

        self._workers = num_threads(torch_device=device)
        self._pool = ThreadPoolExecutor(self._workers)
        self._spaces = [make_space() for _ in range(self._workers)]
        self._bar, self._lock = bar, threading.Lock()

    def __enter__(self) -> "_Crew":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def run(self, jobs: Iterable[Any], do: Callable[[Any, Any], int]) -> int:
        """Run ``do(work space, job)`` for every job; returns the sum of what they return."""
        waiting, stop = iter(jobs), threading.Event()

        def work(space: Any) -> int:
            done = 0
            while not stop.is_set():
                with self._lock:
                    job = next(waiting, None)
                if job is None:
                    break
                try:
                    count = do(space, job)
                except BaseException:
                    stop.set()
                    raise
                done += count
                with self._lock:
                    self._bar.update(count)
            return done

        threads = [self._pool.submit(work, space) for space in self._spaces]
        try:
            return sum([thread.result() for thread in threads])
        except BaseException:
            stop.set()
            raise


def _progress(description: str, total: int, quiet: bool) -> Any:
    from tqdm import tqdm

    return tqdm(desc=description, total=total, unit="B", unit_scale=True, disable=quiet)


def _spans(numel: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + _SPAN, numel)) for start in range(0, numel, _SPAN))


def _torch_dtype(code: str) -> "torch.dtype | None":
    import torch

    name = TORCH_NAMES.get(code)
    return getattr(torch, name) if name else None


def non_finite(checkpoints: Sequence[Checkpoint], quiet: bool, description: str) -> tuple[list[str], int]:
    """(one line per tensor that holds a NaN or an infinity, bytes read)."""
    import torch

    from motkit.merge_float import CHUNK_CPU, FORMATS, value_range

    found: dict[tuple[Path, str], None] = {}
    jobs = [
        (checkpoint, name, record, span)
        for checkpoint in checkpoints
        for name, record in checkpoint.tensors.items()
        if record.is_float and record.dtype in TORCH_NAMES and name not in checkpoint.dropped
        for span in _spans(record.numel)
    ]
    total = sum((b - a) * ITEM_BYTES[record.dtype] for _, _, record, (a, b) in jobs)
    with _Files() as files, _progress(description, total, quiet) as bar:

        def make_space() -> Any:
            integers = {dtype: torch.empty(CHUNK_CPU, dtype=dtype) for dtype in (torch.int16, torch.int32)}
            return torch.empty(_SPAN * 8, dtype=torch.uint8), integers

        def look(space: Any, job: Any) -> int:
            buffer, scratch = space
            checkpoint, name, record, (start, stop) = job
            item = ITEM_BYTES[record.dtype]
            files.read_into(record, start * item, buffer[: (stop - start) * item])
            values = buffer[: (stop - start) * item].view(_torch_dtype(record.dtype))
            if values.dtype in FORMATS:
                pieces = values.split(CHUNK_CPU)
                integers = scratch[FORMATS[values.dtype].integer_dtype]
                finite = all(value_range(piece, integers[: len(piece)]).finite for piece in pieces)
            else:
                finite = bool(torch.isfinite(values).all())
            if not finite:
                found[(checkpoint.path, name)] = None
            return int((stop - start) * item)

        with _Crew(make_space, bar, "cpu") as crew:
            read = crew.run(jobs, look)
    return [_non_finite_line(path, name) for path, name in sorted(found)], read


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
) -> int:
    """Merge from file to file, a span at a time; returns bytes read.

    Args:
        plan: what to do with the inputs.
        inputs: the checkpoints that the plan wants, in its order, with equal tensor names and shapes.
        out_dtype: bfloat16, float16 or float32; None for the promoted dtype of each tensor's inputs.
        out: an existing folder; gets ``model.safetensors``, or shards with an index.
        method: for messages.

    Raises:
        UserError: NaN or infinite values, other dtypes than bfloat16, float16 and float32, or integer buffers that
            differ between inputs. All faults at once.
    """
    names = sorted(inputs[0].names)
    records = {name: [checkpoint.tensors[name] for checkpoint in inputs] for name in names}
    out_codes = _out_codes(records, out_dtype, method)
    written = _lay_out(out, {name: (out_codes[name], records[name][0].shape) for name in names})
    floats = [name for name in names if records[name][0].is_float]
    passes = 1 + (plan.max_passes if plan.over != "element" else 0)
    total = passes * sum(r.stop - r.start for name in floats for r in records[name])
    with contextlib.ExitStack() as stack:
        files, bar = stack.enter_context(_Files()), stack.enter_context(_progress("Merging", total, quiet))
        targets = stack.enter_context(_Targets({record.file for record in written.values()}))
        crew = stack.enter_context(_Crew(lambda: _Space(len(inputs)), bar, device))
        run = _StreamedMerge(plan, inputs, records, written, files, targets, device)
        read = 0
        # What is counted over one tensor is counted and merged before the next, while its data is in memory.
        for unit in [[name] for name in floats] if plan.over == "tensor" else [floats]:
            found = None
            if plan.over != "element":
                found = plan.statistics(sum(records[name][0].numel for name in unit), device)
                more = True
                while more:
                    read += crew.run(run.spans(unit), functools.partial(run.look, found))
                    run.refuse_non_finite()
                    more = found.end_pass()
            read += crew.run(run.spans(unit), functools.partial(run.merge, found))
        run.refuse_non_finite()
        for name in names:
            if not records[name][0].is_float:
                for start, stop in _spans(records[name][0].numel):
                    read += _copy_span(files, records[name][0], written[name], targets, start, stop) * len(inputs)
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
            codes[name] = _SAFETENSORS_NAMES[out_dtype] if out_dtype else _promoted(group)
    if faults:
        raise UserError(listed(faults))
    return codes


class _Space:
    """Work space of one thread: a buffer per input, one for the result, and its kernels."""

    def __init__(self, num_inputs: int) -> None:
        import torch

        self.buffers = [torch.empty(_SPAN * 4, dtype=torch.uint8) for _ in range(num_inputs)]
        self.out = torch.empty(_SPAN * 4, dtype=torch.uint8)
        self.kernels: dict[str, Kernel] = {}
        self.made_for: Statistics | None = None


@dataclass
class _StreamedMerge:
    """The jobs of a merge from file to file: a look at a span, the merge of a span."""

    plan: "MergePlan"
    inputs: Sequence[Checkpoint]
    records: Mapping[str, Sequence[TensorRecord]]
    written: Mapping[str, TensorRecord]
    files: _Files
    targets: "_Targets"
    device: str
    broken: dict[tuple[Path, str], None] = field(default_factory=dict)

    def spans(self, names: Sequence[str]) -> Iterator[tuple[str, int, int]]:
        for position, name in enumerate(names):
            for following in names[position + 1 : position + 2]:
                for record in self.records[following]:
                    self.files.will_need(record)
            for start, stop in _spans(self.records[name][0].numel):
                yield name, start, stop

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
            out_dtype = _torch_dtype(target.dtype) or torch.float32
            space.kernels[target.dtype] = self.plan.kernel(found, out_dtype, self.device)
        values, read = self._read(space, job)
        item = ITEM_BYTES[target.dtype]
        result_bytes = space.out[: (stop - start) * item]
        result = result_bytes.view(_torch_dtype(target.dtype)).to(self.device)
        if not space.kernels[target.dtype](values, result):
            self._note_non_finite(name, values)
        if result.device.type != "cpu":
            result_bytes.copy_(result.view(torch.uint8))
        self.targets.write(target, start * item, memoryview(result_bytes.numpy()))
        return read

    def refuse_non_finite(self) -> None:
        if self.broken:
            raise UserError(listed([_non_finite_line(path, name) for path, name in sorted(self.broken)]))

    def _read(self, space: _Space, job: tuple[str, int, int]) -> "tuple[list[torch.Tensor], int]":
        name, start, stop = job
        values, read = [], 0
        for record, buffer in zip(self.records[name], space.buffers, strict=True):
            item = ITEM_BYTES[record.dtype]
            self.files.read_into(record, start * item, buffer[: (stop - start) * item])
            values.append(buffer[: (stop - start) * item].view(_torch_dtype(record.dtype)).to(self.device))
            read += (stop - start) * item
        return values, read

    def _note_non_finite(self, name: str, values: "Sequence[torch.Tensor]") -> None:
        import torch

        for checkpoint, value in zip(self.inputs, values, strict=True):
            if not bool(torch.isfinite(value).all()):
                self.broken[(checkpoint.path, name)] = None


class _Targets:
    """The files of the result, written at offsets from many threads, and to the disk as they grow."""

    def __init__(self, files: Iterable[Path]) -> None:
        self._files = list(files)
        self._descriptors: dict[Path, int] = {}
        self._pending, self._lock = 0, threading.Lock()

    def __enter__(self) -> "_Targets":
        self._descriptors = {file: os.open(file, os.O_WRONLY) for file in self._files}
        self._flusher = ThreadPoolExecutor(1)
        return self

    def __exit__(self, *_: object) -> None:
        self._flusher.shutdown()
        for descriptor in self._descriptors.values():
            os.close(descriptor)

    def write(self, record: TensorRecord, offset: int, view: memoryview) -> None:
        descriptor, done = self._descriptors[record.file], 0
        while done < len(view):
            done += os.pwrite(descriptor, view[done:], record.start + offset + done)
        with self._lock:
            self._pending += len(view)
            due, self._pending = self._pending >= _FLUSH_BYTES, self._pending % _FLUSH_BYTES
        if due:
            self._flusher.submit(os.fdatasync, descriptor)


def _promoted(group: Sequence[TensorRecord]) -> str:
    codes = {record.dtype for record in group}
    return codes.pop() if len(codes) == 1 else "F32"


def _copy_span(
    files: _Files, source: TensorRecord, target: TensorRecord, targets: "_Targets", start: int, stop: int
) -> int:
    import torch

    item = (source.stop - source.start) // source.numel
    buffer = torch.empty((stop - start) * item, dtype=torch.uint8)
    files.read_into(source, start * item, buffer)
    targets.write(target, start * item, memoryview(buffer.numpy()))
    return len(buffer)


def _lay_out(out: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, TensorRecord]:
    """Create the safetensors files of a checkpoint, headers written, data still to come.

    Args:
        out: an existing folder.
        tensors: name → (safetensors dtype, shape).

    Returns:
        name → where its data belongs.
    """

    def item_bytes(name: str) -> int:
        return ITEM_BYTES.get(tensors[name][0], 1)

    def size(name: str) -> int:
        return item_bytes(name) * math.prod(tensors[name][1])

    shards: list[list[str]] = [[]]
    filled = 0
    for name in tensors:
        if shards[-1] and filled + size(name) > _SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size(name)
    records: dict[str, TensorRecord] = {}
    for number, shard in enumerate(shards, 1):
        file = out / (
            "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        )
        # As the safetensors library orders them: widest dtype first, so that every tensor is aligned.
        ordered = sorted(shard, key=lambda name: (-item_bytes(name), name))
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name in ordered:
            code, shape = tensors[name]
            header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [offset, offset + size(name)]}
            offset += size(name)
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        with file.open("wb") as stream:
            stream.write(struct.pack("<Q", len(text)) + text)
            stream.truncate(8 + len(text) + offset)
        for name in ordered:
            begin, end = (8 + len(text) + edge for edge in header[name]["data_offsets"])
            records[name] = TensorRecord(file, header[name]["dtype"], tensors[name][1], begin, end)
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(size(name) for name in tensors)},
            "weight_map": {name: records[name].file.name for name in tensors},
        }
        (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return records
