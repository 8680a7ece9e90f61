"""The search for weights on functions whose minimum is known, and the mean in memory against the merge on disk."""

import itertools

import numpy
import pytest
import torch
from scipy.optimize import minimize
from test_merge import weights

from motkit.errors import UserError
from motkit.merge import merge_checkpoints
from motkit.merge_weights import EVALUATIONS_PER_BRANCH, LAST_STEP, MeanInMemory, search_weights


@pytest.mark.parametrize("num_branches", [2, 3, 4])
def test_the_search_comes_near_the_minimum_of_quadratics(num_branches):
    rng = numpy.random.default_rng(num_branches)
    for _ in range(20):
        points = rng.normal(size=(num_branches, 5))
        target = points.mean(axis=0) + rng.normal(size=5)

        def loss(w, points=points, target=target):
            return float(((numpy.asarray(w) @ points - target) ** 2).sum())

        asked = []
        found = search_weights(lambda w, asked=asked, loss=loss: asked.append(w) or loss(w), num_branches)
        best = minimize(
            loss,
            [1 / num_branches] * num_branches,
            bounds=[(0, 1)] * num_branches,
            constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
        ).fun
        assert found.evaluations == len(asked) == len(set(asked)) <= EVALUATIONS_PER_BRANCH * num_branches
        assert all(min(w) >= 0 and abs(sum(w) - 1) < 1e-5 for w in asked)
        assert found.loss == loss(found.weights) <= found.uniform_loss
        # What is left of the possible gain is small, but for what a last step can change.
        resolution = LAST_STEP**2 * max(float(((a - b) ** 2).sum()) for a, b in itertools.combinations(points, 2))
        assert found.loss - best <= 0.1 * (found.uniform_loss - best) + resolution
        assert found.uniform_loss - found.loss > 0 or found.uniform_loss - best <= resolution


def test_a_useless_teacher_gets_next_to_nothing_and_equals_stay_equal():
    found = search_weights(lambda w: 10 * w[2] + (w[0] - w[1]) ** 2, 3)
    assert found.weights[2] < LAST_STEP
    assert search_weights(lambda w: sum(x * x for x in w), 3).weights == (1 / 3,) * 3
    assert search_weights(lambda w: 1.0, 1).evaluations == 1
    with pytest.raises(UserError, match="weights: auto: the loss of the plain mean on the held-out traces is nan"):
        search_weights(lambda w: float("nan"), 2)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "qwen3_moe"])
def test_the_mean_in_memory_is_the_merge(kind, make_pico, tmp_path):
    from transformers import AutoModelForCausalLM

    branches = [make_pico(kind, tmp_path / str(seed), seed) for seed in range(3)]
    mean = MeanInMemory(branches)
    for number, share in enumerate([(1 / 3, 1 / 3, 1 / 3), (0.7, 0.3, 0.0)]):
        out = tmp_path / f"out-{number}"
        merge_checkpoints(
            {"merge_method": "mot", "models": [{"model": "$branches"}]},
            out, branches=branches, weights=share, out_dtype="float32", quiet=True,
        )  # fmt: skip
        expected = AutoModelForCausalLM.from_pretrained(out).state_dict()
        got = mean.set_weights(share).state_dict()
        assert got.keys() == expected.keys()
        assert all(torch.allclose(got[n], expected[n], rtol=0, atol=1e-6) for n in got)
    assert len(list(itertools.chain(*(weights(b) for b in branches)))) > 3
