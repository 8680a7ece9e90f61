"""Seed problems and traces: what they are, and JSONL in and out, read strictly."""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from motkit.errors import UserError

Row = TypeVar("Row", bound=BaseModel)


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


def read_traces(path: Path, problems: Mapping[str, SeedProblem]) -> list[Trace]:
    """The traces of one teacher, in the file's order.

    Raises:
        UserError: a malformed line (file, line, field), the same problem and sample twice, a trace of a problem that is
            not among ``problems``, or no trace at all.
    """
    traces: list[Trace] = []
    seen: set[tuple[str, int]] = set()
    for line, trace in _read_rows(path, Trace):
        if trace.problem_id not in problems:
            raise UserError(f"{path}:{line}: problem_id: {trace.problem_id!r} is not among the recipe's problems")
        if (trace.problem_id, trace.sample) in seen:
            raise UserError(
                f"{path}:{line}: sample: problem {trace.problem_id!r} has a sample {trace.sample} on an earlier line"
            )
        seen.add((trace.problem_id, trace.sample))
        traces.append(trace)
    if not traces:
        raise UserError(f"{path}: the teacher is empty: no trace in it; expected one JSON object a line")
    return traces


def to_jsonl(rows: Iterable[BaseModel]) -> str:
    """One compact JSON object a line; characters outside ASCII as they are."""
    return "".join(json.dumps(row.model_dump(exclude_none=True), ensure_ascii=False) + "\n" for row in rows)


def _read_rows(path: Path, kind: type[Row]) -> Iterator[tuple[int, Row]]:
    try:
        # Not str.splitlines: it also breaks at characters that JSON strings may hold (U+2028 and others).
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    for number, raw in enumerate(lines, start=1):
        if not raw.strip():
            continue
        where = f"{path}:{number}"
        try:
            value: Any = json.loads(raw.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise UserError(f"{where}: not UTF-8 at byte {error.start} of the line") from error
        except (json.JSONDecodeError, RecursionError) as error:
            raise UserError(f"{where}: not a JSON object: {error}") from error
        if not isinstance(value, dict):
            raise UserError(f"{where}: expected a JSON object, got {type(value).__name__}")
        try:
            yield number, kind.model_validate(value)
        except ValidationError as error:
            fault = error.errors()[0]
            field = ".".join(str(part) for part in fault["loc"])
            known = ", ".join(kind.model_fields)
            if fault["type"] == "missing":
                raise UserError(f"{where}: {field}: missing; a line needs {known}") from None
            raise UserError(f"{where}: {field}: got {str(fault['input'])[:80]!r}: {fault['msg']}") from None
