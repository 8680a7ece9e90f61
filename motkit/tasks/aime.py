"""What lm-eval calls for a problem of the AIME tasks: all k answers are graded, by motkit's verifier."""

import atexit
import functools
from collections.abc import Iterable, Sequence
from typing import Any

from motkit.traces import SeedProblem
from motkit.verify import Answer, Verifier, graded_text, last_boxed


def every_sample(samples: Iterable[Sequence[str]], docs: Any) -> list[Sequence[str]]:
    """A filter that drops none of a problem's k answers."""
    return list(samples)


def process_results(doc: dict[str, Any], results: Sequence[Sequence[str]]) -> dict[str, float]:
    r"""Scores of one problem.

    lm-eval does not tell how a generation ended, so a cut-off one is known only by what it lacks: an answer counts only
    in a ``\boxed{…}`` after the reasoning (a number in mid-thought is none). A cut-off one that has boxed a guess,
    under a template that opens the reasoning itself, is still taken for finished; `motkit.evaluate` knows better.

    Args:
        doc: with ``problem`` and ``answer``.
        results: one entry, the k answers (`every_sample`).

    Returns:
        ``avg@k``: share of the k answers that are right; ``answered``: share that gives an answer at all.
    """
    (samples,) = results
    problem = SeedProblem(id="aime", prompt=doc["problem"], answer=str(doc["answer"]).strip())
    boxed = [text for text in samples if last_boxed(graded_text(text, "stop")[0] or "") is not None]
    right = sum(verdict.correct is True for verdict in _verifier().many([Answer(problem, text) for text in boxed]))
    return {f"avg@{len(samples)}": right / len(samples), "answered": len(boxed) / len(samples)}


@functools.cache
def _verifier() -> Verifier:
    verifier = Verifier("math", workers=1)
    atexit.register(verifier.close)
    return verifier
