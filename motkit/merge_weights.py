"""Weights of the teachers that a round finds by itself, so that a teacher's quality counts.

``weights: accuracy``: every branch answers up to `ASKED_PROBLEMS` of the recipe's seed problems, greedily; its weight
is the share that it answers right. A branch that learned wrong answers counts for nothing, and branches about as good
as one another count about alike. Where none answers anything right, all count alike. Cost: those answers.

``weights: auto``: what is minimised is the loss of the merged student, Σ_k w_k θ_k with w in the simplex (w ≥ 0,
Σ w = 1), on a fixed set of held-out traces. The search is a compass search over the simplex: from the uniform weights,
a step's worth of weight is moved from one branch to another; the first move that lowers the loss is taken, and tried
again from there; where no move does, the step is halved. It never ends worse than it began, draws nothing at random,
and needs no gradients.

Cost: at most 12 K forward passes over the fixed set (K branches), and as many averages of K models in memory.

Paper gap: the paper weighs all teachers alike; these are options beyond it.
"""

import collections
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from motkit.errors import UserError

ASKED_PROBLEMS = 128
EVALUATIONS_PER_BRANCH = 12
FIRST_STEP, LAST_STEP = 0.25, 0.02


@dataclass(frozen=True)
class WeightSearch:
    """What a search found: the weights, their loss, that of uniform weights, and how many losses were asked for."""

    weights: tuple[float, ...]
    loss: float
    uniform_loss: float
    evaluations: int


def search_weights(
    loss: Callable[[Sequence[float]], float], num_branches: int, max_evaluations: int | None = None
) -> WeightSearch:
    """Weights in the simplex with a low loss; see the module's docstring.

    Args:
        loss: of the merge with these weights, which sum to 1. The same weights are not asked for twice.
        max_evaluations: how often the loss may be asked for; default: 12 K.

    Raises:
        UserError: the loss of uniform weights is not finite.
    """
    budget = max_evaluations or EVALUATIONS_PER_BRANCH * num_branches
    here = (1.0 / num_branches,) * num_branches
    known = {here: loss(here)}
    uniform = known[here]
    if not math.isfinite(uniform):
        raise UserError(f"weights: auto: the loss of the plain mean on the held-out traces is {uniform}")
    moves = collections.deque(itertools.permutations(range(num_branches), 2))
    step, failed = FIRST_STEP, 0
    while step >= LAST_STEP and len(known) < budget and moves:
        candidate = _moved(here, *moves[0], step)
        if candidate not in known:
            known[candidate] = loss(candidate)
        if known[candidate] < known[here]:
            here, failed = candidate, 0
            continue
        moves.rotate(-1)
        failed += 1
        if failed == len(moves):
            step, failed = step / 2, 0
    return WeightSearch(here, known[here], uniform, len(known))


def _moved(weights: Sequence[float], giver: int, taker: int, step: float) -> tuple[float, ...]:
    """``step`` of weight, or all that there is, moved; rounded, so that a place is the same however it was reached."""
    amount = min(step, weights[giver])
    changed = {giver: weights[giver] - amount, taker: weights[taker] + amount}
    return tuple(round(changed.get(k, weight), 6) for k, weight in enumerate(weights))


class MeanInMemory:
    """The weighted mean of checkpoints, as a model in memory whose weights can be set again and again.

    It holds K + 1 models: the branches as they are stored, on the CPU, and the candidate, in float32 (bfloat16 on a
    GPU).
    """

    def __init__(self, checkpoints: Sequence[Path]) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self._branches: list[dict[str, Any]] = []
        for checkpoint in checkpoints:
            model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto")
            self._branches.append(dict(model.named_parameters()))
        gpu = torch.cuda.is_available()
        self.model = AutoModelForCausalLM.from_pretrained(
            checkpoints[0], dtype=torch.bfloat16 if gpu else torch.float32
        )
        self.model = self.model.to("cuda" if gpu else "cpu").eval()

    def set_weights(self, weights: Sequence[float]) -> Any:
        """Make ``model`` the mean with these weights, and return it."""
        import torch

        with torch.no_grad():
            for name, parameter in self.model.named_parameters():  # a tied weight comes once
                total = torch.zeros(parameter.shape, dtype=torch.float32)
                for branch, weight in zip(self._branches, weights, strict=True):
                    if weight:
                        total.add_(branch[name].to(torch.float32), alpha=weight)
                parameter.copy_(total)
        return self.model
