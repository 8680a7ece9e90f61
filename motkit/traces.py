"""Seed problems and traces: what they are, and JSONL in and out, read strictly and a line at a time."""

import difflib
import json
import random
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from motkit import rundir
from motkit.errors import UserError

Row = TypeVar("Row", bound=BaseModel)

VERIFIERS = ("math", "exact", "choice", "none")


def verifier_fault(name: str) -> str | None:
    """What is wrong with a verifier's name, in words; None if it is known. What each does: `motkit.verify`."""
    if name in VERIFIERS or (name.startswith("reasoning_gym:") and len(name) > len("reasoning_gym:")):
        return None
    known = [*VERIFIERS, "reasoning_gym:<task>"]
    if name == "python":
        return (
            "'python' is not available in this version of motkit, which executes nothing that a model wrote; "
            "use one of " + ", ".join(known) + ", or judge elsewhere and import what is right with 'none'"
        )
    close = difflib.get_close_matches(name, known, n=1)
    return f"got {name!r}, expected one of {', '.join(known)}" + (f"; did you mean '{close[0]}'?" if close else "")


class SeedProblem(BaseModel):
    """A problem with a known answer.

    JSONL: ``{"id": …, "prompt": …, "answer": …, "verifier"?: …}``; what else a line holds (source, level, …) is carried
    along.
    """

    model_config = ConfigDict(frozen=True, extra="allow", strict=True)

    id: str = Field(min_length=1)
    prompt: str = Field(min_length=1)
    answer: str = Field(min_length=1)
    verifier: str | None = None


class Trace(BaseModel):
    """A teacher's answer to a seed problem: the reasoning, the response that follows it, and how generation ended.

    JSONL: ``{"problem_id", "sample", "reasoning", "response", "finish_reason"}``; what else a line holds (tokens,
    model, …) is carried along.
    """

    model_config = ConfigDict(frozen=True, extra="allow", strict=True)

    problem_id: str = Field(min_length=1)
    sample: int = Field(ge=0)
    reasoning: str
    response: str
    finish_reason: str

    @property
    def label(self) -> str:
        """How messages name this trace."""
        return f"{self.problem_id}#{self.sample}"


def read_problems(path: Path) -> dict[str, SeedProblem]:
    """Seed problems by id, in the file's order.

    Raises:
        UserError: a malformed line (file, line, field), an id given twice, or no problem at all.
    """
    problems: dict[str, SeedProblem] = {}
    for line, problem in _read_rows(path, SeedProblem):
        if problem.id in problems:
            raise UserError(f"{path}:{line}: id: {problem.id!r} is used on an earlier line too; ids must be unique")
        problems[problem.id] = problem
    if not problems:
        raise UserError(f"{path}: holds no problem; expected one JSON object a line")
    return problems


def sample_problems(problems: Mapping[str, SeedProblem], count: int, seed: int) -> dict[str, SeedProblem]:
    """A random subset of ``count`` problems, in their order. The same ids and seed give the same subset, whatever the
    order in the file.

    Raises:
        UserError: there are fewer than ``count``.
    """
    if count > len(problems):
        raise UserError(f"sample.count: got {count}, but there are {len(problems)} problems; lower it")
    chosen = set(random.Random(seed).sample(sorted(problems), count))
    return {name: problem for name, problem in problems.items() if name in chosen}


def read_traces(path: Path, problems: Mapping[str, SeedProblem]) -> list[Trace]:
    """`stream_traces` as a list."""
    return list(stream_traces(path, problems))


def stream_traces(path: Path, problems: Mapping[str, SeedProblem]) -> Iterator[Trace]:
    """The traces of one teacher, in the file's order, one at a time.

    Raises:
        UserError: a malformed line (file, line, field), the same problem and sample twice, a trace of a problem that is
            not among ``problems``, or no trace at all.
    """
    seen: dict[str, set[int]] = {}
    for line, trace in _read_rows(path, Trace):
        if trace.problem_id not in problems:
            raise UserError(f"{path}:{line}: problem_id: {trace.problem_id!r} is not among the recipe's problems")
        samples = seen.setdefault(trace.problem_id, set())
        if trace.sample in samples:
            raise UserError(
                f"{path}:{line}: sample: problem {trace.problem_id!r} has a sample {trace.sample} on an earlier line"
            )
        samples.add(trace.sample)
        yield trace
    if not seen:
        raise UserError(f"{path}: the teacher is empty: no trace in it; expected one JSON object a line")


def to_jsonl(rows: Iterable[BaseModel]) -> str:
    """One compact JSON object a line; characters outside ASCII as they are."""
    return "".join(json.dumps(row.model_dump(exclude_none=True), ensure_ascii=False) + "\n" for row in rows)


def write_jsonl(target: Path, rows: Iterable[BaseModel]) -> int:
    """Write rows as they come, the file whole or not at all; returns how many.

    Raises:
        UserError: the disk is full, read-only or failing.
    """
    partial = rundir.partial_path(target)
    count = 0
    with rundir.storage_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("w", encoding="utf-8") as file:
                for row in rows:
                    file.write(to_jsonl([row]))
                    count += 1
            rundir.move_into_place(partial, target)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    return count


def read_objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, JSON object) of every line that is not blank.

    Raises:
        UserError: the file cannot be read, or a line is not UTF-8 or no JSON object.
    """
    try:
        file = path.open("rb")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    with file:
        # In bytes, where only \n ends a line: JSON strings may hold other line separators (U+2028).
        for number, raw in enumerate(file, start=1):
            if not raw.strip():
                continue
            where = f"{path}:{number}"
            try:
                # Editors on Windows begin a file with a byte order mark.
                value: Any = json.loads(raw.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                raise UserError(f"{where}: not UTF-8 at byte {error.start} of the line") from error
            except (ValueError, RecursionError) as error:
                raise UserError(f"{where}: not a JSON object: {error}") from error
            if not isinstance(value, dict):
                raise UserError(f"{where}: expected a JSON object, got {type(value).__name__}")
            yield number, value


def _read_rows(path: Path, kind: type[Row]) -> Iterator[tuple[int, Row]]:
    for number, value in read_objects(path):
        try:
            yield number, kind.model_validate(value)
        except ValidationError as error:
            fault = error.errors()[0]
            where = f"{path}:{number}"
            field = ".".join(str(part) for part in fault["loc"])
            known = ", ".join(kind.model_fields)
            if fault["type"] == "missing":
                raise UserError(f"{where}: {field}: missing; a line needs {known}") from None
            raise UserError(f"{where}: {field}: got {str(fault['input'])[:80]!r}: {fault['msg']}") from None
