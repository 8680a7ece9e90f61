"""Scores out of graded samples, and how sure they are. Pure functions of what the per-problem files hold.

A row is a sample: ``problem_id``, ``sample``, ``correct`` (true, false or null), ``extracted``, ``finish_reason``,
``tokens``. Everything that is reported of an evaluation is computed from such rows alone.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy

RESAMPLES, LEVEL = 10_000, 0.95


def by_problem(rows: Iterable[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """The rows of each problem, in their order."""
    grouped: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        grouped.setdefault(row["problem_id"], []).append(row)
    return grouped


def score(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Scores of N problems with k samples each.

    Returns:
        ``accuracy``: avg@k, the mean of ``correct`` over samples and problems (what cannot be judged is wrong);
        ``standard_error``: of the accuracy over problems, the sample standard deviation of the problems' means / √N;
        ``pass_at``: {k': pass@k'} for the powers of two up to k, and k (`pass_at`), over problems;
        ``maj_at``: {k: maj@k} (`majority`);
        ``problems`` N, ``samples`` k, ``truncated`` and ``unverifiable`` (shares of the samples), ``tokens`` in all and
        ``mean_tokens`` per sample.
    """
    grouped = by_problem(rows)
    counts = [(len(samples), sum(row["correct"] is True for row in samples)) for samples in grouped.values()]
    num_samples = counts[0][0]
    means = [right / count for count, right in counts]
    accuracy = sum(means) / len(means)
    variance = sum((mean - accuracy) ** 2 for mean in means) / max(len(means) - 1, 1)
    every = [row for samples in grouped.values() for row in samples]
    tokens = sum(row["tokens"] for row in every)
    sizes = sorted({num_samples, *(2**power for power in range(num_samples.bit_length()) if 2**power <= num_samples)})
    return {
        "accuracy": accuracy,
        "standard_error": math.sqrt(variance / len(means)),
        "pass_at": {str(k): sum(pass_at(n, c, k) for n, c in counts) / len(counts) for k in sizes},
        "maj_at": {str(num_samples): sum(majority(samples) for samples in grouped.values()) / len(counts)},
        "problems": len(grouped),
        "samples": num_samples,
        "truncated": sum(row["finish_reason"] == "length" for row in every) / len(every),
        "unverifiable": sum(row["correct"] is None and row["finish_reason"] == "stop" for row in every) / len(every),
        "tokens": tokens,
        "mean_tokens": tokens / len(every),
    }


def pass_at(num_samples: int, num_right: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k samples is right: 1 − C(n−c, k) / C(n, k) (Chen et al. 2021)."""
    return 1.0 - math.comb(num_samples - num_right, k) / math.comb(num_samples, k)


def majority(samples: Sequence[Mapping[str, Any]]) -> float:
    """Whether the most frequent answer is right; the right one's share of a tie (a tie is broken at random).

    All right answers are one answer, however they are written; wrong ones are the same if their texts are, spaces
    aside. A sample without an answer, or cut off, does not vote.
    """
    votes: Counter[str | bool] = Counter()
    for row in samples:
        if row["correct"] is True:
            votes[True] += 1
        elif row["extracted"] is not None and row["finish_reason"] == "stop":
            votes["".join(row["extracted"].split())] += 1
    most = max(votes.values(), default=0)
    return 1.0 / sum(count == most for count in votes.values()) if votes[True] and votes[True] == most else 0.0


def problem_means(rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Mean of ``correct`` of each problem."""
    return {
        problem: sum(row["correct"] is True for row in samples) / len(samples)
        for problem, samples in by_problem(rows).items()
    }


def paired_difference(
    ours: "numpy.typing.ArrayLike", theirs: "numpy.typing.ArrayLike", *, seed: int = 0
) -> tuple[float, float, float]:
    """Mean of ours − theirs with a bootstrap confidence interval.

    Args:
        ours, theirs: (S, N) scores of S seeds on the same N problems.
        seed: of the resampling.

    Returns:
        (difference, lower end, upper end) of the percentile interval at `LEVEL` from `RESAMPLES` resamples, in which
        seeds and problems are both drawn with replacement (crossed, paired in both), so that it covers another set of
        problems and another seed alike. With one seed it covers the problems alone.
    """
    difference = numpy.asarray(ours, dtype=float) - numpy.asarray(theirs, dtype=float)  # (S, N)
    num_seeds, num_problems = difference.shape
    draw = numpy.random.default_rng(seed)
    seeds = draw.multinomial(num_seeds, [1 / num_seeds] * num_seeds, RESAMPLES) / num_seeds  # (R, S)
    problems = draw.multinomial(num_problems, [1 / num_problems] * num_problems, RESAMPLES) / num_problems  # (R, N)
    means = ((seeds @ difference) * problems).sum(axis=1)
    low, high = numpy.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(difference.mean()), float(low), float(high)
