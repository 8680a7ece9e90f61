"""Which traces are trained on: finished, right, fitting the student; what is dropped is counted."""

import bisect
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from motkit.errors import UserError
from motkit.recipe import TraceFilter
from motkit.render import RenderedTrace, Renderer, UnfitTrace
from motkit.traces import SeedProblem, Trace

# Why a trace is not trained on, in the order in which it is asked.
LOSSES = ("truncated", "failed", "wrong", "unverifiable", "unfit", "over_long", "surplus")
_UNFIT_REASONS = 20  # that a report lists

REPORT_HEADINGS = (
    *(
        "teacher",
        "asked",
        "ans-\nwered",
        "trun-\ncated",
        "wrong",
        "unveri-\nfiable",
        "unfit",
        "over-\nlong",
        "sur-\nplus",
    ),
    *("kept", "prob-\nlems", "mean\ntokens", "p95\ntokens", "problems shared\nwith"),
)

# Traces of one teacher → (trace, verdict) in the same order; a verdict has ``correct`` and ``reason``.
Judge = Callable[[Iterable[Trace]], Iterator[tuple[Trace, Any]]]


@dataclass(frozen=True)
class PreparedTraces:
    """Traces that passed the filter, by teacher, with what was counted on the way."""

    kept: dict[str, list[Trace]]
    rendered: dict[str, list[RenderedTrace]]
    report: dict[str, dict[str, Any]]


def filter_traces(
    read: Mapping[str, Iterable[Trace]],
    *,
    problems: Mapping[str, SeedProblem],
    settings: TraceFilter,
    max_length: int | None,
    renderer: Renderer,
    judge: Judge,
    seed: int,
    asked: Mapping[str, int] | None = None,
) -> PreparedTraces:
    """Keep of each teacher the finished, right, fitting traces, up to ``keep_per_problem`` of a problem.

    A teacher's traces are gone through once, and only those that are kept so far stay in memory. What is kept is in the
    order in which it was read.

    Args:
        read: every teacher's traces.
        max_length: tokens that a rendered trace may have, prompt included; None for any number.
        judge: the verdict on every trace.
        seed: of ``keep: random``.
        asked: samples that each teacher was asked for, where it is known; else those that were read.

    Raises:
        UserError: an over-long trace under ``over_long: error``, or a teacher of whom fewer than ``min_per_teacher``
            traces are left.
    """
    kept: dict[str, list[Trace]] = {}
    rendered: dict[str, list[RenderedTrace]] = {}
    report: dict[str, dict[str, Any]] = {}
    for teacher, traces in read.items():
        counts = dict.fromkeys(["read", *LOSSES, "kept"], 0)
        unfit: dict[str, str] = {}
        best = _Best(settings.keep_per_problem)
        for position, (trace, verdict) in enumerate(judge(traces)):
            counts["read"] += 1
            row, loss = None, _loss(trace, verdict)
            if loss is None:
                try:
                    row = renderer.render(problems[trace.problem_id], trace)
                except UnfitTrace as reason:
                    loss = "unfit"
                    if len(unfit) < _UNFIT_REASONS:
                        unfit[trace.label] = str(reason)
            if row is not None and max_length is not None and len(row.input_ids) > max_length:
                if settings.over_long == "error":
                    raise UserError(
                        f"teacher {teacher}: trace {trace.label} has {len(row.input_ids)} tokens, train.max_length is "
                        f"{max_length}; raise train.max_length or set filter.over_long: drop"
                    )
                loss = "over_long"
            if loss is not None or row is None:
                counts[loss or "unfit"] += 1
                continue
            counts["surplus"] += best.add(_rank(settings.keep, seed, teacher, position, row), position, trace, row)
        pairs = best.in_order()
        kept[teacher], rendered[teacher] = [trace for trace, _ in pairs], [row for _, row in pairs]
        counts["kept"] = len(pairs)
        lengths = sorted(len(row.input_ids) for row in rendered[teacher])
        tokens = sum(lengths)
        report[teacher] = {
            "asked": max((asked or {}).get(teacher, 0), counts["read"]),
            "answered": counts["read"] - counts["failed"],
            **counts,
            "problems": len(best.kept),
            "tokens": tokens,
            "mean_tokens": round(tokens / max(len(pairs), 1), 1),
            "p95_tokens": lengths[math.ceil(0.95 * len(lengths)) - 1] if lengths else 0,
            "unfit_reasons": unfit,
        }
        if len(pairs) < settings.min_per_teacher:
            raise UserError(_too_few(teacher, report[teacher], settings))
    covered = {teacher: {trace.problem_id for trace in traces} for teacher, traces in kept.items()}
    for teacher, counted in report.items():
        others = {other: len(covered[teacher] & covered[other]) for other in covered if other != teacher}
        counted["overlap"] = others  # problems that both cover
    return PreparedTraces(kept, rendered, report)


def report_rows(report: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """The report as rows under `REPORT_HEADINGS`, a teacher each. Also of a report whose teachers lack a count."""
    keys = ["asked", "answered", *(loss for loss in LOSSES if loss != "failed"), "kept", "problems"]
    rows = []
    for teacher, counts in report.items():
        cells = [f"{counts[key]:,}" if key in counts else "" for key in keys]
        tokens = [f"{counts[key]:,.0f}" if key in counts else "" for key in ("mean_tokens", "p95_tokens")]
        shared = ", ".join(f"{other} {count}" for other, count in counts.get("overlap", {}).items())
        rows.append([teacher, *cells, *tokens, shared])
    return rows


class _Best:
    """Of each problem, the ``limit`` traces of the lowest rank."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.kept: dict[str, list[tuple[tuple[Any, ...], int, Trace, RenderedTrace]]] = {}

    def add(self, rank: tuple[Any, ...], position: int, trace: Trace, row: RenderedTrace) -> bool:
        """Add one; whether one, this or another, is now too many and was dropped."""
        entries = self.kept.setdefault(trace.problem_id, [])
        bisect.insort(entries, (rank, position, trace, row), key=lambda entry: entry[:2])
        if len(entries) <= self.limit:
            return False
        entries.pop()
        return True

    def in_order(self) -> list[tuple[Trace, RenderedTrace]]:
        everything = [entry for entries in self.kept.values() for entry in entries]
        return [entry[2:] for entry in sorted(everything, key=lambda entry: entry[1])]


def _loss(trace: Trace, verdict: Any) -> str | None:
    if trace.finish_reason == "length":
        return "truncated"
    if trace.finish_reason != "stop":
        return "failed"  # an engine's error, a content filter, …: no answer
    if verdict.correct is None:
        return "unverifiable"
    return None if verdict.correct else "wrong"


def _rank(keep: str, seed: int, teacher: str, position: int, row: RenderedTrace) -> tuple[Any, ...]:
    """What is kept first has the lowest."""
    if keep == "shortest":
        return (row.num_completion_tokens,)
    if keep == "random":
        # By the sample's name, not by a generator's state: one trace more or fewer does not change the other choices.
        key = f"{seed}/{teacher}/{row.problem_id}/{row.sample}"
        return (hashlib.sha256(key.encode()).digest(),)
    return (position,)


def _too_few(teacher: str, counts: Mapping[str, Any], settings: TraceFilter) -> str:
    """Which knob to turn: the one for the greatest loss."""
    losses: Sequence[tuple[str, int]] = [(loss, counts[loss]) for loss in LOSSES if counts[loss]]
    lost = ", ".join(f"{count} {loss.replace('_', '-')}" for loss, count in losses)
    remedies = {
        "truncated": "raise the teacher's sampling.max_tokens",
        "failed": "generate again: finish_reason says that these never came to an answer",
        "wrong": "check the problems' answers, ask for more samples, or set filter.verifier: none",
        "unverifiable": f"use another filter.verifier than {settings.verifier!r}, or filter.verifier: none",
        "unfit": f"see the texts: {next(iter(counts['unfit_reasons'].items()), '')}",
        "over_long": "raise train.max_length",
        "surplus": "raise filter.keep_per_problem",
    }
    worst = max(losses, key=lambda loss: loss[1])[0] if losses else None
    remedy = remedies[worst] if worst else "ask for more problems or samples"
    if counts["kept"]:
        remedy += f", or lower filter.min_per_teacher ({settings.min_per_teacher})"
    left = f"{counts['kept']} of its {counts['read']} traces are" if counts["kept"] else None
    left = left or f"none of its {counts['read']} traces is"
    return f"teacher {teacher}: {left} left" + (f" ({lost})" if lost else "") + f"; {remedy}"
