r"""Answers out of texts, right or wrong: the same code for teachers' traces and for the student's evaluation.

Verifiers, by the name that a recipe or a problem gives:

* ``math``: the same mathematical object (math-verify), compared in worker processes that can be killed;
* ``exact``: the same text or the same number;
* ``choice``: the letter of a multiple choice;
* ``reasoning_gym:<task>``: the scorer of a reasoning-gym task;
* ``none``: every finished answer is right (an ablation of the paper).

Only what a finished generation says after its reasoning is graded: the last ``\boxed{…}`` whose braces balance, else
what stands where an answer is announced. An answer that cannot be judged is neither right nor wrong: ``correct`` is
None.
"""

import contextlib
import itertools
import json
import os
import re
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from pathlib import Path
from types import TracebackType
from typing import Any

from motkit.errors import UserError
from motkit.traces import SeedProblem, Trace, verifier_fault
from motkit.verify_worker import WALL_PER_LIMIT

TIME_LIMIT_S = 5.0
MEMORY_LIMIT_MB = 512
_PREPARE_LIMIT_S = 180.0
_RESPONSE_LIMIT = 1_000_000  # characters of a response that are looked at
_ANSWER_LIMIT = 2_000  # characters of an answer for ``math``
_REMEMBERED = 4096

# A sign counts only where it does not join two words or numbers, as in "20-7".
_NUMBER = re.compile(
    r"(?:(?<![\w)\]])[-+])?(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?"
)

# What opens and closes braces; an escaped one, as in \{1, 2\}, is text.
_BRACE = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)

_ANNOUNCED = re.compile(
    r"(?:^|\n)\s*####\s*(?P<hash>[^\n]+)|\banswer\b[*_]*\s*(?:is|:|=)[*_:]*\s*(?P<said>[^\n]+)", re.IGNORECASE
)
_FORMULA = re.compile(r"\$\$?([^$]{1,500})\$\$?|\\\((.{1,500}?)\\\)")
_LETTER = re.compile(r"^[\s(\[*$]*([A-Za-z])(?:[\s)\]*$]*$|[).:]\s*\S|\)\s)")
# In a text with single spaces and without emphasis.
_SAID_LETTER = re.compile(
    r"(?i:answer|option|choice) ?(?i:is|:|=)?:? ?(?i:option |choice )?[(\[]?"
    r"(A(?! (?!(?:because|since|as|and|or|not|is|with|by|for)\b)[a-z])|[B-Z])(?![A-Za-z'’])"
)


@dataclass(frozen=True)
class Verdict:
    """What a verifier says of one answer.

    ``correct``: True, False, or None where it cannot be judged. ``extracted``: the answer found in the text (None:
    none found). ``reason``: why, in a few words.
    """

    correct: bool | None
    extracted: str | None
    reason: str


@dataclass(frozen=True)
class Answer:
    """A generation to be judged: its text (with or without reasoning in think tags) and how it ended."""

    problem: SeedProblem
    response: str
    finish_reason: str = "stop"

    @classmethod
    def of(cls, trace: Trace, problem: SeedProblem) -> "Answer":
        """The answer that a trace gives."""
        return cls(problem, trace.response, trace.finish_reason)


class Verifier:
    """Judges answers; holds the worker processes, so use it as a context manager or `close` it.

    Workers are started when the first answer needs one. One that takes longer than the limit, crashes or wants too much
    memory is killed and replaced; its answer is None, "unverifiable".

    Args:
        name: the recipe's verifier; a problem's own ``verifier`` goes first, unless the name is ``none``.
        workers: processes; default: one per core, at most 8.
        time_limit_s: processor seconds for one answer, and a sixth of the wall seconds that it may take.
        memory_limit_mb: what a worker may grow by, in MiB of address space.

    Raises:
        UserError: there is no verifier of that name.
    """

    def __init__(
        self,
        name: str = "math",
        *,
        workers: int | None = None,
        time_limit_s: float = TIME_LIMIT_S,
        memory_limit_mb: int = MEMORY_LIMIT_MB,
    ) -> None:
        fault = verifier_fault(name)
        if fault:
            raise UserError(f"verifier: {fault}")
        self.name = name
        cores = len(os.sched_getaffinity(0))
        self._pool = _Pool(workers or min(cores, 8), time_limit_s, memory_limit_mb)
        self._remembered: OrderedDict[tuple[str, str, str], tuple[bool | None, str]] = OrderedDict()

    def __enter__(self) -> "Verifier":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the worker processes."""
        self._pool.close()

    def one(self, problem: SeedProblem, response: str, finish_reason: str = "stop") -> Verdict:
        """The verdict on one answer."""
        return next(self.stream([Answer(problem, response, finish_reason)]))

    def many(self, answers: Iterable[Answer]) -> list[Verdict]:
        """The verdicts on answers, in their order."""
        return list(self.stream(answers))

    def stream(self, answers: Iterable[Answer]) -> Iterator[Verdict]:
        """The verdicts on answers, in their order, while they come in: of a response nothing is kept but its answer.

        Raises:
            UserError: a problem names a verifier that does not exist, or a task that reasoning-gym does not have.
        """
        pending: deque[_Job] = deque()
        window = 64 * self._pool.size
        try:
            for answer in answers:
                job = self._begin(answer)
                pending.append(job)
                while pending and (pending[0].judged or len(pending) >= window):
                    yield self._end(pending)
            while pending:
                yield self._end(pending)
        finally:
            if pending:  # the caller stopped listening: what runs is of no use
                self._pool.close()

    def judge(self, traces: Iterable[Trace], problems: Mapping[str, SeedProblem]) -> Iterator[tuple[Trace, Verdict]]:
        """Each trace with its verdict, in their order; a few hundred are in memory at a time."""
        read, judged = itertools.tee(traces)
        verdicts = self.stream(Answer.of(trace, problems[trace.problem_id]) for trace in read)
        yield from zip(judged, verdicts, strict=True)

    def _begin(self, answer: Answer) -> "_Job":
        name = self.name if self.name == "none" else answer.problem.verifier or self.name
        fault = verifier_fault(name)
        if fault:
            raise UserError(f"problem {answer.problem.id}: verifier: {fault}")
        text, reason = graded_text(answer.response, answer.finish_reason)
        if text is None:
            return _Job(judged=(None, reason))
        if name == "none":
            return _Job(judged=(True, "not verified"))
        if len(text) > _RESPONSE_LIMIT:
            return _Job(judged=(None, f"the response has {len(text):,} characters, {_RESPONSE_LIMIT:,} are the limit"))
        if name == "exact":
            verdict = verify_exact(text, answer.problem.answer)
            return _Job(extracted=verdict.extracted, judged=(verdict.correct, verdict.reason))
        if name == "choice":
            verdict = verify_choice(text, answer.problem)
            return _Job(extracted=verdict.extracted, judged=(verdict.correct, verdict.reason))
        if name == "math":
            return self._begin_math(text, answer.problem)
        return self._begin_reasoning_gym(text, answer.problem, name)

    def _begin_math(self, text: str, problem: SeedProblem) -> "_Job":
        extracted = final_answer(text)
        if extracted is None:
            return _Job(judged=(False, "no answer found"))
        if _same(extracted, problem.answer):
            return _Job(extracted=extracted, judged=(True, "equal"))
        if len(extracted) > _ANSWER_LIMIT:
            # Far longer than any known answer: junk, or an expression that no person would call an answer.
            reason = f"the answer has {len(extracted):,} characters, {_ANSWER_LIMIT:,} are the limit"
            return _Job(extracted=extracted[:200] + "…", judged=(None, reason))
        one, other = _number(_plain(extracted)), _number(_plain(problem.answer))
        if one is not None and other is not None and "," not in extracted + problem.answer:
            return _Job(extracted=extracted, judged=(False, "not equal"))
        key = ("math", problem.answer, extracted)
        job = _Job(extracted=extracted, judged=self._remembered.get(key), key=key)
        if job.judged is None:
            job.request = {"kind": "math", "gold": problem.answer, "answer": extracted}
            self._pool.submit(job)
        return job

    def _begin_reasoning_gym(self, text: str, problem: SeedProblem, name: str) -> "_Job":
        extracted = last_boxed(text)
        if extracted is None:
            extracted = last_tag(text)
        if extracted is None:
            extracted = text.strip()
        if not extracted:
            return _Job(judged=(False, "no answer found"))
        if len(extracted) > 10 * _ANSWER_LIMIT:
            return _Job(extracted=extracted[:200] + "…", judged=(None, "the answer is too long"))
        kind, _, task = name.partition(":")
        metadata = (problem.model_extra or {}).get("metadata", {})
        entry = {"question": problem.prompt, "answer": problem.answer, "metadata": metadata}
        job = _Job(extracted=extracted, request={"kind": kind, "task": task, "answer": extracted, "entry": entry})
        self._pool.submit(job)
        return job

    def _end(self, pending: "deque[_Job]") -> Verdict:
        job = pending[0]
        while job.judged is None:
            self._pool.wait()
        pending.popleft()
        if job.key is not None:
            self._remembered[job.key] = job.judged
            while len(self._remembered) > _REMEMBERED:
                self._remembered.popitem(last=False)
        return Verdict(job.judged[0], job.extracted, job.judged[1])


def verify_many(answers: Iterable[Answer], verifier: str = "math", **limits: Any) -> list[Verdict]:
    """`Verifier.many` with workers of its own; ``limits`` as `Verifier` takes them."""
    with Verifier(verifier, **limits) as judge:
        return judge.many(answers)


def graded_text(response: str, finish_reason: str) -> tuple[str | None, str]:
    """(what of a generation is graded, "") or (None, why nothing is).

    A cut-off generation is not graded, nor is one whose reasoning never ends: an answer in the middle of it may be a
    guess.
    """
    if finish_reason != "stop":
        return None, f"not finished: finish_reason is {finish_reason[:40]!r}"
    text = response.rpartition("</think>")[2]
    if "<think>" in text:
        return None, "the reasoning never ends"
    return text, ""


def verify_exact(response: str, answer: str) -> Verdict:
    r"""The verifier ``exact``: the last balanced ``\boxed{…}``, else the last number, against the known answer.

    Args:
        response: the text after the reasoning; a guess inside the reasoning must not count.
        answer: the known answer. It equals the extracted one as text (spaces and a closing full stop aside) or as a
            number (``1,000`` is ``1000.0``).
    """
    extracted = last_boxed(response)
    if extracted is None:
        extracted = last_number(response)
    if extracted is None:
        return Verdict(False, None, "no answer found")
    same = _same(extracted, answer)
    return Verdict(same, extracted, "equal" if same else "not equal")


def verify_choice(response: str, problem: SeedProblem) -> Verdict:
    r"""The verifier ``choice``: the letter in the last ``\boxed{…}``, else the one that is announced or stands alone.

    The known answer is a letter, ``(B)`` or ``B. text``, or several letters. With ``choices`` in the problem (a list of
    texts, in the letters' order), an answer may also be a choice's text.
    """
    choices = (problem.model_extra or {}).get("choices")
    texts = [str(choice) for choice in choices] if isinstance(choices, list) else []
    known = _letters(problem.answer, texts)
    if known is None:
        return Verdict(None, None, "the known answer is no letter")
    extracted = last_boxed(response)
    if extracted is None:
        tail = last_tag(response) or response[-4000:]
        said = _SAID_LETTER.findall(" ".join(re.sub(r"\\(?:text|mathbf|mathrm)\b|[*_${}]", "", tail).split()))
        last_line = next((line for line in reversed(tail.splitlines()) if line.strip()), "")
        extracted = said[-1] if said else last_line.strip(" *_$")[:200]
    given = _letters(extracted, texts)
    if given is None:
        return Verdict(False, extracted or None, "no letter found")
    return Verdict(given == known, "".join(sorted(given)), "equal" if given == known else "not equal")


def _letters(text: str, choices: list[str]) -> frozenset[str] | None:
    if len(text) > _ANSWER_LIMIT:
        return None
    text = re.sub(r"\\(?:text|textbf|mathrm|mathbf|mbox)\s*\{([^{}]*)\}", r"\1", text).strip()
    match = _LETTER.match(text)
    if match:
        return frozenset(match[1].upper())
    several = re.fullmatch(r"[\s({\\]*([A-Z](?:\s*(?:,|and|&)?\s*[A-Z])+)[\s)}\\]*", text)
    if several:
        return frozenset(re.findall(r"[A-Z]", several[1].replace("and", "")))
    for number, choice in enumerate(choices):
        if _same(text, choice) or _plain(text).casefold() == _plain(choice).casefold():
            return frozenset(chr(ord("A") + number))
    return None


def final_answer(text: str) -> str | None:
    r"""The answer that a text gives: the last balanced ``\boxed{…}``; else the last that is announced by an answer tag,
    ``####`` or "the answer is"; else the last formula or number. None if there is none.
    """
    boxed = last_boxed(text)
    if boxed is not None:
        return boxed
    tail = text[-4000:]
    tagged = last_tag(tail)
    if tagged is not None:
        return tagged
    announcements = list(_ANNOUNCED.finditer(tail))
    if announcements:
        announced = announcements[-1]
        said = (announced["hash"] or announced["said"]).strip()
        formulas = [one or other for one, other in _FORMULA.findall(said)]
        if formulas:
            return str(formulas[-1]).strip()
        # The sentence ends at a full stop; one inside a number is none.
        said = re.split(r"(?<=[^\s])[.!?](?:\s|$)", said)[0].strip(" *_")
        return said or last_number(tail)
    formulas = [one or other for one, other in _FORMULA.findall(tail)]
    number = last_number(tail)
    if formulas and (number is None or tail.rfind(number) <= tail.rfind(formulas[-1]) + len(formulas[-1])):
        return str(formulas[-1]).strip()
    return number


def last_boxed(text: str) -> str | None:
    r"""Content of the last ``\boxed{…}`` whose braces balance; None if there is none."""
    last: tuple[int, int] | None = None
    open_braces: list[int | None] = []  # where a box's content begins; None for any other brace
    for match in _BRACE.finditer(text):
        if match.group().startswith(r"\boxed"):
            open_braces.append(match.end())
        elif match.group() == "{":
            open_braces.append(None)
        elif match.group() == "}" and open_braces:
            begin = open_braces.pop()
            if begin is not None and (last is None or begin > last[0]):
                last = begin, match.start()
    return None if last is None else text[last[0] : last[1]].strip()


def last_tag(text: str) -> str | None:
    """Content of the last ``<answer>…</answer>``; None if there is none."""
    end = text.rfind("</answer>")
    begin = text.rfind("<answer>", 0, max(end, 0))
    return None if begin < 0 else text[begin + len("<answer>") : end].strip()


def last_number(text: str) -> str | None:
    """The last number of a text, as written; None if there is none."""
    found = _NUMBER.findall(text)
    return found[-1] if found else None


def _same(extracted: str, answer: str) -> bool:
    one, other = _plain(extracted), _plain(answer)
    if one == other:
        return True
    first, second = _number(one), _number(other)
    return first is not None and first == second


def _plain(text: str) -> str:
    return " ".join(text.strip().strip("$").split()).rstrip(".").strip()


def _number(text: str) -> Decimal | None:
    if len(text) > _ANSWER_LIMIT or not _NUMBER.fullmatch(text):
        return None
    try:
        return Decimal(text.replace(",", ""))
    except InvalidOperation:  # an exponent of 20 digits
        return None


# Worker processes


@dataclass(eq=False)
class _Job:
    """An answer on its way: ``judged`` is (correct, reason) once it is known."""

    extracted: str | None = None
    judged: tuple[bool | None, str] | None = None
    request: dict[str, Any] = field(default_factory=dict)
    key: tuple[str, str, str] | None = None


class _Worker:
    """One process for one kind of comparison, one answer at a time."""

    def __init__(self, kind: str, time_limit_s: float, memory_limit_mb: int) -> None:
        self.kind = kind
        self.time_limit_s = time_limit_s
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the process)
        script = Path(__file__).with_name("verify_worker.py")
        # -P: neither this folder nor the working folder is searched for modules. -B: no bytecode is written.
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-B", str(script), kind, str(time_limit_s), str(memory_limit_mb)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONHASHSEED": "0"},
            start_new_session=True,  # killed with the child that it forks
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.requests, self.replies = self.process.stdin, self.process.stdout
        os.set_blocking(self.replies.fileno(), False)
        self.ready = False
        self.deadline = time.monotonic() + _PREPARE_LIMIT_S
        self.job: _Job | None = None
        self.buffer = b""

    def send(self, job: _Job) -> None:
        self.job = job
        # The process keeps the limit itself; this is for one that cannot.
        self.deadline = time.monotonic() + WALL_PER_LIMIT * self.time_limit_s + 5.0
        with contextlib.suppress(BrokenPipeError):  # it has died: reading says so
            self.requests.write(json.dumps(job.request).encode() + b"\n")
            self.requests.flush()

    def receive(self) -> dict[str, Any] | None:
        """The reply; empty if the process has ended; None if there is none yet."""
        try:
            got = os.read(self.replies.fileno(), 65536)
        except BlockingIOError:
            return None
        if not got:
            return {}
        self.buffer += got
        if not self.buffer.endswith(b"\n"):
            return None
        reply, self.buffer = self.buffer, b""
        parsed: dict[str, Any] = json.loads(reply)
        return parsed

    def last_error(self) -> str:
        self.errors.seek(max(self.errors.seek(0, os.SEEK_END) - 2000, 0))
        lines = self.errors.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else "no message"

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        with contextlib.suppress(BrokenPipeError):
            self.requests.close()
        self.replies.close()
        self.errors.close()


class _Pool:
    """A few workers and the answers that wait for one. Single-threaded: `wait` is where time passes."""

    def __init__(self, size: int, time_limit_s: float, memory_limit_mb: int) -> None:
        self.size = size
        self.time_limit_s = time_limit_s
        self.memory_limit_mb = memory_limit_mb
        self.waiting: deque[_Job] = deque()
        self.workers: list[_Worker] = []

    def submit(self, job: _Job) -> None:
        self.waiting.append(job)
        self.wait(at_most_s=0.0)

    def wait(self, at_most_s: float | None = None) -> None:
        """Until a worker has replied, ended or used up its time."""
        self._dispatch()
        busy = [worker for worker in self.workers if worker.job or not worker.ready]
        with selectors.DefaultSelector() as selector:
            for worker in busy:
                selector.register(worker.replies, selectors.EVENT_READ, worker)
            left = max(min(worker.deadline for worker in busy) - time.monotonic(), 0.0)
            selected = {key.data for key, _ in selector.select(left if at_most_s is None else min(left, at_most_s))}
        for worker in busy:
            reply = worker.receive() if worker in selected else None
            if reply is not None or time.monotonic() >= worker.deadline:
                self._settle(worker, reply or {})
        self._dispatch()

    def close(self) -> None:
        for worker in self.workers:
            worker.kill()
        self.workers.clear()
        self.waiting.clear()

    def _dispatch(self) -> None:
        """Give waiting answers to idle workers of their kind; start workers, or replace idle ones of another kind."""
        for job in list(self.waiting)[: self.size]:
            kind = job.request["kind"]
            idle = [worker for worker in self.workers if worker.ready and worker.job is None]
            fitting = next((worker for worker in idle if worker.kind == kind), None)
            if fitting is not None:
                self.waiting.remove(job)
                fitting.send(job)
                continue
            starting = sum(not worker.ready and worker.kind == kind for worker in self.workers)
            if starting >= sum(other.request["kind"] == kind for other in self.waiting):
                continue
            other = next((worker for worker in idle if worker.kind != kind), None)
            if len(self.workers) >= self.size and other is not None:
                other.kill()
                self.workers.remove(other)
            if len(self.workers) < self.size:
                self.workers.append(_Worker(kind, self.time_limit_s, self.memory_limit_mb))

    def _settle(self, worker: _Worker, reply: dict[str, Any]) -> None:
        """Take a worker's reply; without one it has ended or does not answer any more, and is killed."""
        if not worker.ready:
            fault = reply.get("fault") if reply else f"its worker process does not start: {worker.last_error()}"
            if fault:
                kind = worker.kind
                self.close()
                raise UserError(f"verifier {kind}: {fault}")
            worker.ready = True
            return
        assert worker.job is not None
        if "fault" in reply:
            self.close()
            raise UserError(f"verifier {worker.job.request.get('task', worker.kind)}: {reply['fault']}")
        worker.job.judged = (reply["correct"], reply["reason"]) if reply else (None, "its worker process ended")
        worker.job = None
        if not reply:
            worker.kill()
            self.workers.remove(worker)
