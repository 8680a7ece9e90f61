"""The samples asked of a teacher, on disk: ``RUN/generated/<teacher>.jsonl``.

The file is only ever appended to. A line is a trace with the fingerprint of the request that it answers, so that a
generation goes on where it stopped, and asks again where prompt, sampling or model are others than they were: a line
whose fingerprint no request has is stale, stays and is ignored.
"""

import contextlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from motkit.errors import UserError
from motkit.recipe import PLACEMENT_ARGS, Teacher
from motkit.rundir import digest, hash_file, sync
from motkit.traces import SeedProblem, Trace

REJECTED = "rejected"

# An appended line is in the operating system's hands at once (a killed process loses none); it is forced to the disk
# with its batch (a power cut loses at most one).
_BATCH_LINES, _BATCH_SECONDS = 256, 2.0
_END_BYTES = 2**20


@dataclass(frozen=True)
class Request:
    """One sample to ask for."""

    problem_id: str
    sample: int
    messages: tuple[dict[str, str], ...]
    seed: int
    fingerprint: str

    @property
    def label(self) -> str:
        """How messages name it, as `Trace.label`."""
        return f"{self.problem_id}#{self.sample}"


def requests_of(teacher: Teacher, problems: Mapping[str, SeedProblem], seed: int) -> list[Request]:
    """Every request that a teacher is to answer, problem by problem.

    Each has a seed of its own, so that the samples of a problem differ and none depends on which others are asked.
    """
    sampling = teacher.sampling.model_dump(mode="json", exclude={"n"})
    engine_args = {key: value for key, value in teacher.engine_args.items() if key not in PLACEMENT_ARGS}
    same = {"model": _model_identity(teacher), "sampling": sampling, "engine_args": engine_args, "seed": seed}
    system = ({"role": "system", "content": teacher.system},) if teacher.system else ()
    requests = []
    for problem in problems.values():
        messages = (*system, {"role": "user", "content": problem.prompt})
        for sample in range(teacher.sampling.n):
            fingerprint = digest([same, messages, problem.id, sample])
            requests.append(Request(problem.id, sample, messages, int(fingerprint[:7], 16), fingerprint))
    return requests


def _model_identity(teacher: Teacher) -> Any:
    """The model's name; of a folder, what is in it: the name and place of a folder say little.

    Of a large file only the length and both ends are read: training changes every tensor, and a teacher may have
    hundreds of gigabytes.
    """
    assert teacher.model is not None
    folder = Path(teacher.model)
    if not folder.is_absolute() or not folder.is_dir():
        return teacher.model
    files = {}
    for path in sorted(folder.iterdir()):
        if not path.is_file() or path.suffix not in {".json", ".jinja", ".safetensors", ".model", ".txt"}:
            continue
        size = path.stat().st_size
        if size <= 2 * _END_BYTES:
            files[path.name] = hash_file(path)
            continue
        with path.open("rb") as file:
            first = file.read(_END_BYTES)
            file.seek(-_END_BYTES, os.SEEK_END)
            files[path.name] = digest([size, first.hex(), file.read().hex()])
    return files


@dataclass
class Tally:
    """What a teacher's file holds. ``current``: label → whether it is a rejection, of the requests that it answers."""

    current: dict[str, bool] = field(default_factory=dict)
    stale: int = 0
    truncated: int = 0
    prompt_tokens: int = 0
    tokens: int = 0
    without_usage: int = 0
    paid_prompt_tokens: int = 0
    paid_tokens: int = 0

    def add(self, row: Mapping[str, Any], wanted: Mapping[tuple[str, int], str], limit_bytes: int) -> bool:
        """Count a line; whether it is the answer to a request that had none."""
        key = (row["problem_id"], row["sample"])
        label = f"{key[0]}#{key[1]}"
        prompt_tokens, tokens = row.get("prompt_tokens"), row.get("tokens")
        self.paid_prompt_tokens += prompt_tokens or 0
        self.paid_tokens += tokens or 0
        # What was rejected for its length is asked again when the limit is higher than it was.
        outgrown = row.get("limit_bytes", limit_bytes) < limit_bytes
        if wanted.get(key) != row["request"] or outgrown or label in self.current:
            self.stale += 1
            return False
        self.current[label] = row["finish_reason"] == REJECTED
        self.truncated += row["finish_reason"] == "length"
        self.prompt_tokens += prompt_tokens or 0
        self.tokens += tokens or 0
        self.without_usage += tokens is None
        return True


def tally(path: Path, requests: Sequence[Request], limit_bytes: int) -> Tally:
    """Count what the file holds of ``requests``, one line in memory at a time."""
    result = Tally()
    wanted = {(request.problem_id, request.sample): request.fingerprint for request in requests}
    for row in _rows(path):
        result.add(row, wanted, limit_bytes)
    return result


def read_samples(path: Path, requests: Sequence[Request], limit_bytes: int) -> list[Trace]:
    """The answers to ``requests``, in their order whatever the order in which they arrived.

    A rejected sample is among them, empty, with ``finish_reason: rejected``; one that was never answered is not.
    """
    result = Tally()
    wanted = {(request.problem_id, request.sample): request.fingerprint for request in requests}
    found = {}
    for row in _rows(path):
        if result.add(row, wanted, limit_bytes):
            found[row["problem_id"], row["sample"]] = Trace.model_validate(row)
    return [found[key] for key in wanted if key in found]


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """The complete lines of a file; a torn last one is left out.

    Raises:
        UserError: a line that is none of ours.
    """
    if not path.is_file():
        return
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            if not raw.endswith(b"\n"):
                return
            try:
                row = json.loads(raw)
                Trace.model_validate(row)
                row["request"]
            except (ValueError, KeyError, TypeError, RecursionError):
                raise UserError(
                    f"{path}:{number}: damaged: expected a trace with its 'request'; delete the line, and "
                    "'motkit generate' asks for it again"
                ) from None
            yield row


class SampleFile:
    """A teacher's file, open for appending; a line torn by a kill or a full disk is cut off first."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> Self:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("r+b" if self.path.exists() else "w+b", buffering=0)
        self._file.truncate(_end_of_last_line(self._file))
        self._file.seek(0, os.SEEK_END)
        sync(self.path.parent)
        self._pending, self._synced = 0, time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._file, contextlib.suppress(OSError) if error else contextlib.nullcontext():
            os.fsync(self._file.fileno())

    def append(self, row: Mapping[str, Any]) -> bool:
        """Append a line; whether the batch that it ends was forced to the disk."""
        line = json.dumps(row, ensure_ascii=False).encode() + b"\n"
        at = self._file.tell()
        written = 0
        try:
            while written < len(line):
                written += self._file.write(line[written:])
        except OSError:
            self._file.truncate(at)
            raise
        self._pending += 1
        if self._pending < _BATCH_LINES and time.monotonic() - self._synced < _BATCH_SECONDS:
            return False
        os.fsync(self._file.fileno())
        self._pending, self._synced = 0, time.monotonic()
        return True


def _end_of_last_line(file: Any) -> int:
    end = int(file.seek(0, os.SEEK_END))
    while end > 0:
        begin = max(0, end - _END_BYTES)
        file.seek(begin)
        at = file.read(end - begin).rfind(b"\n")
        if at >= 0:
            return begin + int(at) + 1
        end = begin
    return 0
