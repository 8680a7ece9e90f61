"""Which traces are trained on: finished, right, fitting the student; what is dropped is counted."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from motkit.errors import UserError
from motkit.recipe import TraceFilter
from motkit.render import RenderedTrace, Renderer, UnfitTrace
from motkit.traces import SeedProblem, Trace


@dataclass(frozen=True)
class PreparedTraces:
    """Traces that passed the filter, by teacher, with what was counted on the way."""

    kept: dict[str, list[Trace]]
    rendered: dict[str, list[RenderedTrace]]
    report: dict[str, dict[str, Any]]


def filter_traces(
    read: Mapping[str, Sequence[Trace]],
    *,
    problems: Mapping[str, SeedProblem],
    settings: TraceFilter,
    max_length: int | None,
    renderer: Renderer,
    verify: Callable[[str, str], Any],
) -> PreparedTraces:
    """Keep of each teacher the finished, right, fitting traces, up to ``keep_per_problem`` in file order.

    Args:
        read: every teacher's traces.
        max_length: tokens that a rendered trace may have, prompt included; None for any number.
        verify: (response, answer) → verdict with ``correct``; used under ``verifier: exact``.

    Raises:
        UserError: an over-long trace under ``over_long: error``, or a teacher of whom nothing is left.
    """
    kept: dict[str, list[Trace]] = {}
    rendered: dict[str, list[RenderedTrace]] = {}
    report: dict[str, dict[str, Any]] = {}
    for teacher, traces in read.items():
        counts = dict.fromkeys(["truncated", "wrong", "unfit", "over_long", "surplus", "kept"], 0)
        unfit: dict[str, str] = {}
        kept[teacher], rendered[teacher] = [], []
        per_problem: dict[str, int] = {}
        for trace in traces:
            problem = problems[trace.problem_id]
            if trace.finish_reason != "stop":
                counts["truncated"] += 1
                continue
            if settings.verifier == "exact" and not verify(trace.response, problem.answer).correct:
                counts["wrong"] += 1
                continue
            try:
                row = renderer.render(problem, trace)
            except UnfitTrace as reason:
                counts["unfit"] += 1
                unfit[trace.label] = str(reason)
                continue
            if max_length is not None and len(row.input_ids) > max_length:
                if settings.over_long == "error":
                    raise UserError(
                        f"teacher {teacher}: trace {trace.label} has {len(row.input_ids)} tokens, train.max_length is "
                        f"{max_length}; raise train.max_length or set filter.over_long: drop"
                    )
                counts["over_long"] += 1
                continue
            if per_problem.get(trace.problem_id, 0) >= settings.keep_per_problem:
                counts["surplus"] += 1
                continue
            per_problem[trace.problem_id] = per_problem.get(trace.problem_id, 0) + 1
            counts["kept"] += 1
            kept[teacher].append(trace)
            rendered[teacher].append(row)
        if not kept[teacher]:
            lost = ", ".join(f"{count} {reason}" for reason, count in counts.items() if count)
            example = f" (for example {next(iter(unfit.items()))})" if unfit else ""
            raise UserError(
                f"teacher {teacher}: none of its {len(traces)} traces is left ({lost}){example}; check the answers and "
                "finish_reason, raise train.max_length, or set filter.verifier: none"
            )
        tokens = sum(len(row.input_ids) for row in rendered[teacher])
        report[teacher] = {
            "read": len(traces),
            **counts,
            "problems": len(per_problem),
            "tokens": tokens,
            "mean_tokens": round(tokens / counts["kept"], 1),
            "unfit_reasons": unfit,
        }
    return PreparedTraces(kept, rendered, report)
