"""Tensor data in spans: read and written at offsets of safetensors files, by several processes at a time.

The kernel is told in advance which tensor is read next, and a thread has it write out what is finished, so that disk
and processor work at the same time.
"""

import json
import math
import os
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from motkit.errors import UserError
from motkit.merge_inputs import ITEM_BYTES, TensorRecord

if TYPE_CHECKING:
    import torch

TORCH_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}  # safetensors' → torch's
SAFETENSORS_NAMES = {name: code for code, name in TORCH_NAMES.items()}
SHARD_BYTES = 5_000_000_000
SPAN = 1 << 18  # elements that are read, merged and written at a time
_READ_AHEAD_BYTES = 1 << 24  # of the next tensor of every input
_FLUSH_BYTES = 1 << 28  # that are worked through between two requests to write the result to the disk


class Files:
    """Open files by path, read at offsets."""

    def __init__(self) -> None:
        self._descriptors: dict[Path, int] = {}

    def __enter__(self) -> "Files":
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)

    def descriptor(self, path: Path) -> int:
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

    def read(
        self, records: Sequence[TensorRecord], buffers: "Sequence[torch.Tensor]", start: int, stop: int
    ) -> "list[torch.Tensor]":
        """Elements ``start`` to ``stop`` of every tensor, as flat views of the byte buffers, in the tensors' dtypes."""
        values = []
        for record, buffer in zip(records, buffers, strict=True):
            item = ITEM_BYTES[record.dtype]
            self.read_into(record, start * item, buffer[: (stop - start) * item])
            values.append(buffer[: (stop - start) * item].view(torch_dtype(record.dtype)))
        return values


def progress_bar(description: str, total: int, quiet: bool) -> Any:
    from tqdm import tqdm

    return tqdm(desc=description, total=total, unit="B", unit_scale=True, disable=quiet)


def ranges(numel: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + SPAN, numel)) for start in range(0, numel, SPAN))


def torch_dtype(code: str) -> "torch.dtype | None":
    import torch

    name = TORCH_NAMES.get(code)
    return getattr(torch, name) if name else None


class Targets:
    """The files of the result, written at offsets by several processes, and to the disk as they grow."""

    def __init__(self, files: Iterable[Path]) -> None:
        self._files = list(files)
        self._descriptors: dict[Path, int] = {}
        self._pending = 0

    def __enter__(self) -> "Targets":
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

    def keep_up(self, num_bytes: int) -> None:
        """So much more has been worked through: now and then what is written goes to the disk, in the background."""
        self._pending += num_bytes
        if self._pending >= _FLUSH_BYTES:
            self._pending = 0
            for descriptor in self._descriptors.values():
                self._flusher.submit(os.fdatasync, descriptor)


def copy_span(files: Files, source: TensorRecord, target: TensorRecord, targets: Targets, start: int, stop: int) -> int:
    import torch

    item = (source.stop - source.start) // source.numel
    buffer = torch.empty((stop - start) * item, dtype=torch.uint8)
    files.read_into(source, start * item, buffer)
    targets.write(target, start * item, memoryview(buffer.numpy()))
    return len(buffer)


def lay_out(
    out: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]], stem: str = "model"
) -> dict[str, TensorRecord]:
    """Create the safetensors files of a checkpoint, headers written, data still to come.

    Args:
        out: an existing folder.
        tensors: name → (safetensors dtype, shape).
        stem: of the file names.

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
        if shards[-1] and filled + size(name) > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size(name)
    records: dict[str, TensorRecord] = {}
    for number, shard in enumerate(shards, 1):
        file = out / (
            f"{stem}.safetensors" if len(shards) == 1 else f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
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
        (out / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return records
