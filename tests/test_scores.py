"""Scores out of graded samples, against enumeration and slow loops."""

import itertools
import json
import math
import random
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy
import pytest

from motkit import scores


def sample(
    problem: str, number: int, correct: bool | None, extracted: str | None = "1", finish: str = "stop", tokens: int = 5
) -> dict[str, Any]:
    return {
        "problem_id": problem, "sample": number, "correct": correct, "extracted": extracted, "finish_reason": finish,
        "tokens": tokens,
    }  # fmt: skip


@pytest.mark.parametrize("num_samples", [1, 2, 5, 8])
def test_pass_at_k_counts_every_choice_of_k(num_samples: int) -> None:
    """The share of the k-element subsets of the n samples that hold a right one."""
    for num_right in range(num_samples + 1):
        right = [True] * num_right + [False] * (num_samples - num_right)
        for k in range(1, num_samples + 1):
            subsets = [any(subset) for subset in itertools.combinations(right, k)]
            expected = Fraction(sum(subsets), len(subsets))
            assert scores.pass_at(num_samples, num_right, k) == pytest.approx(float(expected), abs=1e-15)


def test_pass_at_k_is_unbiased() -> None:
    """Its mean over binomially many right ones is 1 − (1 − p)^k, exactly."""
    n, p = 8, Fraction(3, 10)
    for k in range(1, n + 1):
        mean = sum(
            Fraction(math.comb(n, c))
            * p**c
            * (1 - p) ** (n - c)
            * Fraction(scores.pass_at(n, c, k)).limit_denominator(10**6)
            for c in range(n + 1)
        )
        assert float(mean) == pytest.approx(float(1 - (1 - p) ** k), abs=1e-9)


def test_majority_over_every_order() -> None:
    """A tie broken by who came first, averaged over all orders of the samples, is its share of the tie."""
    draw = random.Random(0)
    kinds = [
        (True, "4", "stop"),
        (False, "5", "stop"),
        (False, "6", "stop"),
        (None, "7", "stop"),
        (None, None, "length"),
    ]
    for _ in range(60):
        picked = [draw.choice(kinds) for _ in range(draw.randint(1, 6))]
        samples = [sample("p", i, *kind) for i, kind in enumerate(picked)]
        wins = []
        for order in itertools.permutations(samples):
            voted = [row["extracted"] for row in order if row["extracted"] is not None]
            # The first to reach the highest count, as a dictionary of votes would have it.
            winner = max(dict.fromkeys(voted), key=voted.count) if voted else None
            wins.append(winner == "4")
        assert scores.majority(samples) == pytest.approx(sum(wins) / len(wins))


def test_majority_counts_right_answers_as_one_and_texts_without_spaces() -> None:
    half = [sample("p", i, True, text) for i, text in enumerate(("1/2", r"\frac12", "0.5"))]
    wrong = [sample("p", 3 + i, False, text) for i, text in enumerate(("x + 1", "x+1"))]
    assert scores.majority([*half[:2], *wrong]) == 0.5
    assert scores.majority([*half, *wrong]) == 1.0
    assert scores.majority([half[0], *wrong]) == 0.0
    cut = [sample("p", i, None, "7", "length") for i in range(3)]
    assert scores.majority([half[0], *cut]) == 1.0
    assert scores.majority(cut) == 0.0


def test_score_from_the_file_of_answers(tmp_path: Path) -> None:
    """Every figure again, from the JSONL, with numpy."""
    draw = random.Random(1)
    rows = []
    for problem in range(7):
        for number in range(6):
            kind = draw.choice(["right", "wrong", "cut", "unclear"])
            correct = {"right": True, "wrong": False, "cut": None, "unclear": None}[kind]
            finish = "length" if kind == "cut" else "stop"
            text = None if kind == "cut" else {"right": "r", "wrong": draw.choice("ab"), "unclear": "u"}[kind]
            rows.append(sample(f"p{problem}", number, correct, text, finish, draw.randint(1, 99)))
    draw.shuffle(rows)
    file = tmp_path / "student.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = [json.loads(line) for line in file.read_text().splitlines()]
    found = scores.score(read)
    right = numpy.zeros((7, 6))
    for row in read:
        right[int(row["problem_id"][1:]), row["sample"]] = row["correct"] is True
    means = right.mean(axis=1)
    assert found["accuracy"] == pytest.approx(means.mean())
    assert found["standard_error"] == pytest.approx(means.std(ddof=1) / math.sqrt(7))
    assert sorted(map(int, found["pass_at"])) == [1, 2, 4, 6]
    assert found["pass_at"]["1"] == pytest.approx(found["accuracy"])
    assert found["pass_at"]["6"] == pytest.approx(right.any(axis=1).mean())
    pairs = [any(right[p, list(pick)]) for p in range(7) for pick in itertools.combinations(range(6), 2)]
    assert found["pass_at"]["2"] == pytest.approx(numpy.mean(pairs))
    assert (found["problems"], found["samples"]) == (7, 6)
    assert found["truncated"] == pytest.approx(sum(row["finish_reason"] == "length" for row in rows) / 42)
    assert found["unverifiable"] == pytest.approx(sum(row["extracted"] == "u" for row in rows) / 42)
    assert found["tokens"] == sum(row["tokens"] for row in rows)
    assert scores.problem_means(read) == pytest.approx({f"p{i}": mean for i, mean in enumerate(means)})
    assert list(scores.by_problem(read)) == list(dict.fromkeys(row["problem_id"] for row in rows))


@pytest.mark.parametrize("num_seeds", [1, 3])
def test_interval_against_a_slow_bootstrap(num_seeds: int) -> None:
    """Seeds and problems drawn by hand, one at a time, each pair of draws crossed."""
    generator = numpy.random.default_rng(5)
    ours, theirs = generator.random((num_seeds, 12)), generator.random((num_seeds, 12)) * 0.8
    difference, low, high = scores.paired_difference(ours, theirs)
    assert difference == pytest.approx((ours - theirs).mean())
    draw = random.Random(3)
    means = []
    for _ in range(6000):
        picked = [draw.randrange(num_seeds) for _ in range(num_seeds)]
        asked = [draw.randrange(12) for _ in range(12)]
        gains = [ours[s][p] - theirs[s][p] for s in picked for p in asked]
        means.append(sum(gains) / len(gains))
    means.sort()
    width = high - low
    assert low == pytest.approx(means[int(0.025 * len(means))], abs=0.06 * width)
    assert high == pytest.approx(means[int(0.975 * len(means))], abs=0.06 * width)


def test_interval_is_paired() -> None:
    """What both arms find hard does not widen it, and swapping the arms turns it round."""
    generator = numpy.random.default_rng(6)
    hard = generator.random((2, 40))
    _, low, high = scores.paired_difference(hard + 0.1, hard)
    assert (low, high) == pytest.approx((0.1, 0.1))
    ours = generator.random((2, 40))
    one, other = scores.paired_difference(ours, hard), scores.paired_difference(hard, ours)
    assert other == pytest.approx((-one[0], -one[2], -one[1]), abs=0.01)


def test_interval_covers_where_problems_vary() -> None:
    """With one seed and 40 problems it holds the truth about 95 times in 100 (here: 88 of 100 at least)."""
    generator = numpy.random.default_rng(7)
    held = 0
    for _ in range(100):
        ours, theirs = generator.binomial(1, 0.6, (1, 40)), generator.binomial(1, 0.5, (1, 40))
        _, low, high = scores.paired_difference(ours, theirs)
        held += low <= 0.1 <= high
    assert held >= 88
