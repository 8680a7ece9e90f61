"""Traces and problems that somebody already has, in another form, made ours.

A source is a JSONL file, or a dataset of the hub as ``hf://owner/name[/config][:split]``. Its form is seen from its
columns: ``messages`` (role, content), ``conversations`` (ShareGPT: from, value), or prompt and completion. A mapping
``columns`` says what is called otherwise: ``{id: problem_id, response: output, reasoning: thoughts}``.
"""

import hashlib
import itertools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from motkit.errors import UserError
from motkit.traces import SeedProblem, Trace, read_objects, read_problems, sample_problems

if TYPE_CHECKING:
    from motkit.recipe import ProblemSource, Recipe

HUB = "hf://"
_HUB_SOURCE = re.compile(r"^hf://(?P<name>[\w.-]+/[\w.-]+)(?:/(?P<config>[\w.-]+))?(?::(?P<split>[\w.\[\]%:-]+))?$")

# What a mapping may name, and where it is looked for if it does not.
TRACE_COLUMNS: dict[str, tuple[str, ...]] = {
    "id": ("problem_id", "id"),
    "sample": ("sample",),
    "messages": ("messages",),
    "conversations": ("conversations",),
    "prompt": ("prompt", "problem", "question", "instruction"),
    "response": ("response", "completion", "solution", "output", "generation"),
    "reasoning": ("reasoning", "reasoning_content"),
    "finish_reason": ("finish_reason",),
}
PROBLEM_COLUMNS: dict[str, tuple[str, ...]] = {
    "id": ("id", "problem_id"),
    "messages": ("messages",),
    "conversations": ("conversations",),
    "prompt": ("prompt", "problem", "question", "instruction"),
    "answer": ("answer", "final_answer", "expected_answer", "solution"),
    "verifier": ("verifier",),
    "metadata": ("metadata",),
}
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def is_hub_source(source: str) -> bool:
    """Whether a source is a dataset of the hub rather than a file."""
    return source.startswith(HUB)


def columns_fault(columns: Mapping[str, str], kind: str) -> str | None:
    """What is wrong with a ``columns`` mapping, in words. ``kind``: ``traces`` or ``problems``."""
    known = TRACE_COLUMNS if kind == "traces" else PROBLEM_COLUMNS
    unknown = [key for key in columns if key not in known]
    if unknown:
        return f"columns: unknown {', '.join(unknown)}; a mapping for {kind} may name {', '.join(known)}"
    return None


def import_problems(source: str, columns: Mapping[str, str]) -> Iterator[SeedProblem]:
    """Seed problems of a foreign source, in its order.

    Without an id column, the id is made from the prompt, so that traces of the same prompt find it. Numbers as answers
    become text. ``hash`` marks of GSM8K (``#### 72``) and worked solutions are left to the caller: map ``answer`` to a
    column with the final answer.

    Raises:
        UserError: the source cannot be read, a row lacks what is needed, or two rows have one id.
    """
    _check(columns, "problems")
    seen: set[str] = set()
    for where, row in _rows(source):
        prompt, _ = _turns(row, columns, PROBLEM_COLUMNS, where)
        prompt = prompt if prompt is not None else _text(row, "prompt", columns, PROBLEM_COLUMNS, where)
        answer = _text(row, "answer", columns, PROBLEM_COLUMNS, where)
        given = _value(row, "id", columns, PROBLEM_COLUMNS)
        fields: dict[str, Any] = {"id": str(given) if given is not None else prompt_id(prompt)}
        for key in ("verifier", "metadata"):
            value = _value(row, key, columns, PROBLEM_COLUMNS)
            fields |= {} if value is None else {key: value}
        if fields["id"] in seen:
            raise UserError(f"{where}: the id {fields['id']!r} is used before; map another column: columns id=…")
        seen.add(fields["id"])
        yield _made(SeedProblem, {**fields, "prompt": prompt, "answer": answer}, where)
    if not seen:
        raise UserError(f"{source}: holds no problem")


def seed_problems(recipe: "Recipe", imported: Path) -> tuple[dict[str, SeedProblem], dict[str, SeedProblem]]:
    """(all problems of a recipe's source, those that its ``sample`` leaves), by id; see `source_problems`."""
    return source_problems(recipe.problem_source, imported)


def source_problems(source: "ProblemSource", imported: Path) -> tuple[dict[str, SeedProblem], dict[str, SeedProblem]]:
    """(all problems of a source, those that its ``sample`` leaves), by id.

    Args:
        imported: where a run keeps what it fetched from the hub; read instead of the hub once it is there.
    """
    hub = is_hub_source(source.path)
    if imported.is_file() if hub else not source.columns:
        known = read_problems(imported if hub else Path(source.path))
    else:
        known = {problem.id: problem for problem in import_problems(source.path, source.columns)}
    return known, sample_problems(known, source.sample.count, source.sample.seed) if source.sample else known


def import_traces(
    source: str, columns: Mapping[str, str], problems: Mapping[str, SeedProblem] | None = None
) -> Iterator[Trace]:
    """Traces of a foreign source, in its order; those of other problems are left out.

    A row belongs to the problem of its id, else to the one whose prompt it repeats. Think tags in the text are taken
    apart into reasoning and response; a reasoning that never ends stays in the response with its tag, and no verifier
    will grade it. Without a ``finish_reason`` a row counts as finished: nothing says otherwise.

    Args:
        problems: ours, by id; without them ids are taken as they are, or made from the prompt.

    Raises:
        UserError: the source cannot be read, a row lacks what is needed, or no row is of these problems.
    """
    _check(columns, "traces")
    by_prompt = {_plain(problem.prompt): name for name, problem in (problems or {}).items()}
    used: dict[str, set[int]] = {}
    rows = 0
    for rows, (where, row) in enumerate(_rows(source), start=1):  # noqa: B007
        prompt, said = _turns(row, columns, TRACE_COLUMNS, where)
        if prompt is None:
            found = _value(row, "prompt", columns, TRACE_COLUMNS)
            prompt = found if isinstance(found, str) else None
        response = said if said is not None else _text(row, "response", columns, TRACE_COLUMNS, where)
        given = _value(row, "id", columns, TRACE_COLUMNS)
        if given is None and prompt is None:
            raise UserError(f"{where}: neither an id nor a prompt; name the column: columns id=…")
        name = by_prompt.get(_plain(prompt or "")) if given is None else str(given)
        if name is None and problems is None:
            name = prompt_id(prompt or "")
        if name is None or (problems is not None and name not in problems):
            continue
        reasoning, response = split_thinking(response)
        apart = _value(row, "reasoning", columns, TRACE_COLUMNS)
        samples = used.setdefault(name, set())
        sample = _value(row, "sample", columns, TRACE_COLUMNS)
        if sample is None:
            sample = next(number for number in itertools.count(len(samples)) if number not in samples)
        if sample in samples:
            raise UserError(f"{where}: problem {name!r} has a sample {sample} before; leave out the sample column")
        fields = {
            "problem_id": name,
            "sample": sample,
            "reasoning": apart if isinstance(apart, str) and apart else reasoning,
            "response": response,
            "finish_reason": _value(row, "finish_reason", columns, TRACE_COLUMNS) or "stop",
        }
        trace = _made(Trace, fields, where)
        samples.add(trace.sample)
        yield trace
    if not used:
        raise UserError(
            f"{source}: no trace of these problems in its {rows} rows; ids or prompts must be those of the problems: "
            "name the column with columns id=…"
        )


def split_thinking(text: str) -> tuple[str, str]:
    """(reasoning, response) of a text with think tags; no tags, or an unclosed one: ("", text)."""
    head, closed, tail = text.rpartition("</think>")
    if not closed:
        return "", text
    return head.strip().removeprefix("<think>").strip("\n"), tail.strip()


def prompt_id(prompt: str) -> str:
    """The id of a problem that has none: made from its prompt, whatever the white space."""
    return "p-" + hashlib.sha256(_plain(prompt).encode()).hexdigest()[:16]


def _plain(prompt: str) -> str:
    return " ".join(prompt.split())


def _check(columns: Mapping[str, str], kind: str) -> None:
    fault = columns_fault(columns, kind)
    if fault:
        raise UserError(fault)


def _rows(source: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, row) of a source."""
    if not is_hub_source(source):
        for line, value in read_objects(Path(source)):
            yield f"{source}:{line}", value
        return
    match = _HUB_SOURCE.match(source)
    if match is None:
        raise UserError(f"{source}: expected hf://owner/name, hf://owner/name/config or hf://owner/name:split")
    import datasets

    try:
        rows = datasets.load_dataset(match["name"], match["config"], split=match["split"] or "train")
    except Exception as error:  # the hub, the network, a name: many types
        raise UserError(f"{source}: cannot be loaded: {' '.join(str(error).split())[:300]}") from error
    for number, value in enumerate(rows):
        yield f"{source} row {number}", dict(value)


def _value(row: Mapping[str, Any], key: str, columns: Mapping[str, str], known: Mapping[str, tuple[str, ...]]) -> Any:
    if key in columns:
        if columns[key] not in row:
            raise UserError(
                f"columns: {key} is to be read from {columns[key]!r}; the columns are {', '.join(list(row)[:30])}"
            )
        return row[columns[key]]
    return next((row[name] for name in known[key] if row.get(name) is not None), None)


def _text(
    row: Mapping[str, Any], key: str, columns: Mapping[str, str], known: Mapping[str, tuple[str, ...]], where: str
) -> str:
    value = _value(row, key, columns, known)
    if isinstance(value, list):  # conversational prompt or completion, as TRL has them
        value = next((turn.get("content") for turn in reversed(value) if isinstance(turn, dict)), None)
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value:
        raise UserError(
            f"{where}: no {key}: looked in {columns.get(key) or ', '.join(known[key])}, the columns are "
            f"{', '.join(list(row)[:30])}; name it with columns {key}=…"
        )
    return value


def _turns(
    row: Mapping[str, Any], columns: Mapping[str, str], known: Mapping[str, tuple[str, ...]], where: str
) -> tuple[str | None, str | None]:
    """(the user's turn, the assistant's) of messages or conversations; (None, None) if the row has neither."""
    turns = _value(row, "messages", columns, known) or _value(row, "conversations", columns, known)
    if turns is None or ("messages" not in columns and "conversations" not in columns and "response" in columns):
        return None, None
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise UserError(f"{where}: expected a list of turns, got {str(turns)[:60]!r}")
    said: dict[str, list[str]] = {"user": [], "assistant": [], "system": []}
    for turn in turns:
        role, text = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if role not in _ROLES or not isinstance(text, str):
            raise UserError(f"{where}: a turn needs role and content (or from and value), got {str(turn)[:60]!r}")
        said[_ROLES[role]].append(text)
    if len(said["user"]) != 1 or len(said["assistant"]) > 1:
        raise UserError(
            f"{where}: {len(said['user'])} user turns and {len(said['assistant'])} assistant turns; a trace is one of "
            "each: take the others out before importing"
        )
    return said["user"][0], said["assistant"][0] if said["assistant"] else None


def _made(kind: Any, fields: dict[str, Any], where: str) -> Any:
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        fault = error.errors()[0]
        field = ".".join(str(part) for part in fault["loc"])
        raise UserError(f"{where}: {field}: got {str(fault['input'])[:80]!r}: {fault['msg']}") from None
