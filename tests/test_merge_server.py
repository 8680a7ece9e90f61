"""The server's step against ``torch.optim.SGD`` in float64, over rounds."""

import itertools

import pytest
import torch
from test_merge import copy_of, weights

from motkit import spans
from motkit.errors import UserError
from motkit.merge import merge_with_server_step
from motkit.merge_server import server_step


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.8, True)])
def test_rounds_of_server_steps_are_torchs_sgd(momentum, nesterov, make_pico, tmp_path, monkeypatch, forked):
    monkeypatch.setattr(spans, "SPAN", 900)
    start = make_pico("qwen3", tmp_path / "start", 0, "float32")
    names = sorted(weights(start))
    parameters = {name: torch.nn.Parameter(weights(start)[name].double()) for name in names}
    optimizer = torch.optim.SGD(parameters.values(), lr=0.7, momentum=momentum, nesterov=nesterov)
    velocity, generator = None, torch.Generator().manual_seed(0)
    for number in range(3):
        begun = weights(start)
        update = {n: torch.randn(t.shape, generator=generator) * 0.01 for n, t in begun.items()}
        branches = [
            copy_of(start, tmp_path / f"branch-{number}-{k}", {n: t + k * update[n] for n, t in begun.items()})
            for k in (0, 2)
        ]
        mean = {n: (weights(branches[0])[n].double() + weights(branches[1])[n].double()).div(2).float() for n in names}
        for name, parameter in parameters.items():
            parameter.grad = begun[name].double() - mean[name].double()
        optimizer.step()
        out, state = tmp_path / f"out-{number}", tmp_path / f"server-{number}"
        merge_with_server_step(
            "mot", out, state, base=start, branches=branches, velocity=velocity, out_dtype="float32", quiet=True,
            server={"learning_rate": 0.7, "momentum": momentum, "nesterov": nesterov},
        )  # fmt: skip
        got = weights(out)
        assert got.keys() == set(names)
        for name in names:
            assert torch.allclose(got[name].double(), parameters[name].data, rtol=0, atol=2e-7), (number, name)
            assert (got[name] != begun[name]).any()
            # The next round of the reference goes on from the stored weights, as the run does.
            parameters[name].data.copy_(got[name])
        assert {p.name for p in out.iterdir()} == {p.name for p in start.iterdir()} | {
            *("README.md", "mergekit_config.yml")
        }
        assert not list(tmp_path.glob("*.mean"))
        start, velocity = out, state


def test_a_step_of_one_without_momentum_changes_nothing(make_pico, tmp_path):
    start, merged = (make_pico("llama", tmp_path / str(seed), seed, "float32") for seed in (0, 1))
    for out_dtype in ("float32", "bfloat16"):
        out, state = tmp_path / f"{out_dtype}-out", tmp_path / f"{out_dtype}-state"
        out.mkdir()
        state.mkdir()
        settings = {"learning_rate": 1.0, "momentum": 0.0, "nesterov": False, "out_dtype": out_dtype}
        server_step(start, merged, None, out, state, **settings)
        for name, tensor in weights(merged).items():
            expected = tensor.to(getattr(torch, out_dtype))
            # start + (merged - start) in float64 is merged but for the last bit of a float64.
            assert torch.equal(weights(out)[name], expected), name


def test_what_does_not_fit_is_refused(make_pico, tmp_path):
    start, merged = (make_pico("llama", tmp_path / str(seed), seed, "float32") for seed in (0, 1))
    state = tmp_path / "state"
    for folder in (state, tmp_path / "out", tmp_path / "new"):
        folder.mkdir()
    settings = {"learning_rate": 1.0, "momentum": 0.5, "nesterov": True, "out_dtype": "float32"}
    with pytest.raises(UserError, match=r"state: lm_head\.weight: missing, or of another shape"):
        server_step(start, merged, state, tmp_path / "out", tmp_path / "new", **settings)
    assert not list(itertools.chain((tmp_path / "out").iterdir(), (tmp_path / "new").iterdir()))
