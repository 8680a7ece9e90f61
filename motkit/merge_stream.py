"""Tensor data in spans: look for NaN in checkpoints, and merge with ``mot`` from file to file.

Every thread reads a span of each input at its offset, merges it, and writes the result at its offset. Memory does not
grow with the model, every byte is read once, and nothing depends on the order in which threads finish.
"""

import contextlib
import json
import math
import os
import struct
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from motkit.errors import UserError
from motkit.merge_inputs import ITEM_BYTES, Checkpoint, TensorRecord, listed, same_data

if TYPE_CHECKING:
    import torch

TORCH_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}  # safetensors' → torch's
_SAFETENSORS_NAMES = {name: code for code, name in TORCH_NAMES.items()}
_SHARD_BYTES = 5_000_000_000
_SPAN = 1 << 18  # elements that a thread reads, merges and writes at a time


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

    def read_into(self, record: TensorRecord, offset: int, buffer: "torch.Tensor") -> None:
        """Fill a flat byte tensor from ``offset`` bytes into the tensor."""
        descriptor, view, done = self.descriptor(record.file), memoryview(buffer.numpy()), 0
        while done < len(view):
            count = os.preadv(descriptor, [view[done:]], record.start + offset + done)
            if not count:
                raise UserError(f"{record.file}: became shorter while it was read; do not change inputs during a merge")
            done += count


def _in_threads(jobs: Iterable[Any], make_worker: Callable[[], Callable[[Any], int]], bar: Any, device: str) -> int:
    """Run ``worker(job)`` for every job, each thread with a worker of its own; returns the sum of what they return."""
    from motkit.merge_methods import num_threads

    waiting, lock, stop = iter(jobs), threading.Lock(), threading.Event()

    def run() -> int:
        worker, done = make_worker(), 0
        while not stop.is_set():
            with lock:
                job = next(waiting, None)
            if job is None:
                break
            try:
                count = worker(job)
            except BaseException:
                stop.set()
                raise
            done += count
            with lock:
                bar.update(count)
        return done

    workers = num_threads(torch_device=device)
    with ThreadPoolExecutor(workers) as pool:
        threads = [pool.submit(run) for _ in range(workers)]
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

    from motkit.merge_methods import CHUNK_CPU, FORMATS, value_range

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

        def make_worker() -> Callable[[Any], int]:
            buffer = torch.empty(_SPAN * 8, dtype=torch.uint8)
            scratch = {dtype: torch.empty(CHUNK_CPU, dtype=dtype) for dtype in (torch.int16, torch.int32)}

            def look(job: Any) -> int:
                checkpoint, name, record, (start, stop) = job
                item = ITEM_BYTES[record.dtype]
                files.read_into(record, start * item, buffer[: (stop - start) * item])
                values = buffer[: (stop - start) * item].view(_torch_dtype(record.dtype))
                if values.dtype in FORMATS:
                    pieces = values.split(CHUNK_CPU)
                    space = scratch[FORMATS[values.dtype].integer_dtype]
                    finite = all(value_range(piece, space[: len(piece)]).finite for piece in pieces)
                else:
                    finite = bool(torch.isfinite(values).all())
                if not finite:
                    found[(checkpoint.path, name)] = None
                return int((stop - start) * item)

            return look

        read = _in_threads(jobs, make_worker, bar, "cpu")
    return [_non_finite_line(path, name) for path, name in sorted(found)], read


def _non_finite_line(path: Path, name: str) -> str:
    return f"{path}: {name}: holds NaN or infinite values; train that branch again or leave it out"


def stream_mot(
    inputs: Sequence[Checkpoint],
    coefficients: Sequence[Fraction],
    out_dtype: str | None,
    out: Path,
    *,
    device: str,
    quiet: bool,
) -> int:
    """Merge from file to file, a span at a time; returns bytes read.

    Args:
        inputs: the checkpoints that enter the sum, with equal tensor names and shapes.
        coefficients: exact, one per input.
        out_dtype: bfloat16, float16 or float32; None for the promoted dtype of each tensor's inputs.
        out: an existing folder; gets ``model.safetensors``, or shards with an index.

    Raises:
        UserError: NaN or infinite values, other dtypes than bfloat16, float16 and float32, or integer buffers that
            differ between inputs. All faults at once.
    """
    import torch

    from motkit.merge_methods import WeightedMean

    names = sorted(inputs[0].names)
    records = {name: [checkpoint.tensors[name] for checkpoint in inputs] for name in names}
    out_codes, faults = {}, []
    for name, group in records.items():
        if not group[0].is_float:
            if not all(same_data(record, group[0]) for record in group[1:]):
                faults.append(f"{name}: an integer buffer that differs between the inputs; mot cannot average it")
            out_codes[name] = group[0].dtype
            continue
        unreadable = [r for r in group if r.dtype not in ("BF16", "F16", "F32")]
        for record in unreadable:
            faults.append(
                f"{record.file}: {name}: dtype {record.dtype}: mot expects BF16, F16 or F32; convert the checkpoint"
            )
        if not unreadable:
            out_codes[name] = _SAFETENSORS_NAMES[out_dtype] if out_dtype else _promoted(group)
    if faults:
        raise UserError(listed(faults))

    written = _lay_out(out, {name: (out_codes[name], records[name][0].shape) for name in names})
    jobs = ((name, span) for name in names for span in _spans(records[name][0].numel))
    total = sum(r.stop - r.start for group in records.values() for r in group)
    found: dict[tuple[Path, str], None] = {}
    with contextlib.ExitStack() as stack:
        files, bar = stack.enter_context(_Files()), stack.enter_context(_progress("Merging", total, quiet))
        targets = {}
        for file in {record.file for record in written.values()}:
            targets[file] = os.open(file, os.O_WRONLY)
            stack.callback(os.close, targets[file])

        def make_worker() -> Callable[[Any], int]:
            buffers = [torch.empty(_SPAN * 4, dtype=torch.uint8) for _ in inputs]
            out_buffer = torch.empty(_SPAN * 4, dtype=torch.uint8)
            means: dict[str, WeightedMean] = {}

            def merge(job: Any) -> int:
                name, (start, stop) = job
                code, group = out_codes[name], records[name]
                if not group[0].is_float:
                    return _copy_span(files, group[0], written[name], targets, start, stop) * len(group)
                if code not in means:
                    means[code] = WeightedMean(coefficients, _torch_dtype(code) or torch.float32, device)
                mean, values, read = means[code], [], 0
                for record, buffer in zip(group, buffers, strict=True):
                    item = ITEM_BYTES[record.dtype]
                    files.read_into(record, start * item, buffer[: (stop - start) * item])
                    values.append(buffer[: (stop - start) * item].view(_torch_dtype(record.dtype)).to(device))
                    read += (stop - start) * item
                result_bytes = out_buffer[: (stop - start) * ITEM_BYTES[code]]
                result = result_bytes.view(_torch_dtype(code)).to(device)
                for begin in range(0, stop - start, mean.chunk):
                    end = min(begin + mean.chunk, stop - start)
                    if not mean([v[begin:end] for v in values], result[begin:end]):
                        for checkpoint, value in zip(inputs, values, strict=True):
                            if not bool(torch.isfinite(value[begin:end]).all()):
                                found[(checkpoint.path, name)] = None
                if result.device.type != "cpu":
                    result_bytes.copy_(result.view(torch.uint8))
                _write_all(targets, written[name], start * ITEM_BYTES[code], memoryview(result_bytes.numpy()))
                return read

            return merge

        read = _in_threads(jobs, make_worker, bar, device)
    if found:
        raise UserError(listed([_non_finite_line(path, name) for path, name in sorted(found)]))
    return read


def _promoted(group: Sequence[TensorRecord]) -> str:
    codes = {record.dtype for record in group}
    return codes.pop() if len(codes) == 1 else "F32"


def _write_all(targets: Mapping[Path, int], record: TensorRecord, offset: int, view: memoryview) -> None:
    done = 0
    while done < len(view):
        done += os.pwrite(targets[record.file], view[done:], record.start + offset + done)


def _copy_span(
    files: _Files, source: TensorRecord, target: TensorRecord, targets: Mapping[Path, int], start: int, stop: int
) -> int:
    import torch

    item = (source.stop - source.start) // source.numel
    buffer = torch.empty((stop - start) * item, dtype=torch.uint8)
    files.read_into(source, start * item, buffer)
    _write_all(targets, target, start * item, memoryview(buffer.numpy()))
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
