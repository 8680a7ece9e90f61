"""The agreement report against float64 computations on whole models."""

import itertools
import math

import pytest
import torch
from test_merge import copy_of, flat, weights

from motkit import spans
from motkit.merge import merge_checkpoints
from motkit.merge_agreement import Agreement, agreement_csv, layer_of, measure_agreement, read_agreement


@pytest.fixture(scope="module")
def merged(make_pico, tmp_path_factory):
    folder = tmp_path_factory.mktemp("agreement")
    student = make_pico("qwen3", folder / "student", 0)
    branches = {name: make_pico("qwen3", folder / name, seed) for seed, name in enumerate(("plain", "b-2", "c"), 1)}
    # Branch c leaves layer 0 as it is; plain and b-2 share half of their weights.
    start, plain = weights(student), weights(branches["plain"])
    still = {name: start[name] for name in start if ".layers.0." in name}
    branches["c"] = copy_of(branches["c"], folder / "c-still", still)
    shared = {name: plain[name] for name in plain if "mlp" in name}
    branches["b-2"] = copy_of(branches["b-2"], folder / "b-shared", shared)
    merge_checkpoints("mot", folder / "merged", base=student, branches=list(branches.values()), quiet=True)
    return student, branches, folder / "merged"


@pytest.mark.parametrize("crew", ["alone", "forked"])
def test_every_metric_of_the_model_and_of_every_layer(crew, merged, monkeypatch, request):
    if crew == "forked":
        request.getfixturevalue("forked")
    student, branches, result = merged
    monkeypatch.setattr(spans, "SPAN", 1000)
    rows = measure_agreement(student, branches, result)
    found = {(r.layer, r.metric, r.first, r.second): r.value for r in rows}
    assert len(found) == len(rows) == 5 * (3 + 3 + 3 + 2)
    assert [*dict.fromkeys(r.layer for r in rows)] == ["model", "0", "1", "embed", "norm"]
    names = sorted(weights(student))
    groups = {"model": names} | {
        layer: [name for name in names if layer_of(name) == layer] for layer in ("0", "1", "embed", "norm")
    }
    for layer, members in groups.items():
        start = flat(student, members)
        deltas = {name: flat(path, members) - start for name, path in branches.items()}
        update = flat(result, members) - start
        norms = {name: float(delta.norm()) for name, delta in deltas.items()}
        for name, norm in norms.items():
            assert found[layer, "task_vector_norm", name, ""] == pytest.approx(norm, rel=1e-9)
        for one, other in itertools.combinations(branches, 2):
            a, b = deltas[one], deltas[other]
            cosine, share = found[layer, "cosine", one, other], found[layer, "sign_agreement", one, other]
            if not norms[one] * norms[other]:
                assert math.isnan(cosine)
                assert math.isnan(share)
                continue
            assert cosine == pytest.approx(float(torch.dot(a, b) / a.norm() / b.norm()), rel=1e-9)
            moved = (a != 0) & (b != 0)
            assert share == pytest.approx(float((a.sign() == b.sign())[moved].double().mean()), rel=1e-12)
        assert found[layer, "merged_norm", "", ""] == pytest.approx(float(update.norm()), rel=1e-9)
        mean = sum(norms.values()) / 3
        assert found[layer, "survival", "", ""] == pytest.approx(float(update.norm()) / mean, rel=1e-9)


def test_csv_and_back(merged, tmp_path):
    student, branches, result = merged
    rows = measure_agreement(student, branches, result)
    text = agreement_csv(rows)
    assert text.splitlines()[0] == "layer,metric,first,second,value"
    (tmp_path / "agreement.csv").write_text(text)
    again = read_agreement(tmp_path / "agreement.csv")
    assert [(r.layer, r.metric, r.first, r.second) for r in again] == [
        (r.layer, r.metric, r.first, r.second) for r in rows
    ]
    assert all(a.value == pytest.approx(b.value, rel=1e-5, nan_ok=True) for a, b in zip(again, rows, strict=True))
    assert agreement_csv(measure_agreement(student, branches, result)) == text
    assert read_agreement(tmp_path / "missing.csv") == []


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.11.mlp.up_proj.weight", "11"),
        ("model.layers.0.input_layernorm.weight", "0"),
        ("transformer.h.3.attn.c_attn.weight", "3"),
        ("model.embed_tokens.weight", "embed"),
        ("transformer.wte.weight", "embed"),
        ("lm_head.weight", "lm_head"),
        ("model.norm.weight", "norm"),
        ("model.extra.weight", "model.extra"),
    ],
)
def test_layers_by_name(name, layer):
    assert layer_of(name) == layer


def test_one_branch_has_no_pairs():
    rows = [Agreement("model", "survival", "", "", 1.0)]
    assert agreement_csv(rows).splitlines()[1] == "model,survival,,,1"
