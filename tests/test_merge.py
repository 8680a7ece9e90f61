"""Merges of pico-models through the public functions, against exact means and against stock mergekit."""

import json
import os
import random
import shutil
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from scipy.optimize import minimize
from test_merge_methods import bits, exact_mean
from test_merge_ties import reference as ties_reference

from motkit import spans
from motkit.bundle import bundled_files
from motkit.errors import UserError
from motkit.merge import check_merge_config, load_merge_config, merge_checkpoints, resolve_merge_config
from motkit.rundir import hash_file

KINDS = ("llama", "qwen3", "gemma3", "qwen3_moe")


@pytest.fixture(scope="session")
def family(make_pico, tmp_path_factory):
    """``family(kind)`` → (student, three branches), bfloat16; made once, never changed by a test."""
    made = {}

    def get(kind="llama", dtype="bfloat16"):
        if (kind, dtype) not in made:
            folder = tmp_path_factory.mktemp(kind)
            names = ("student", "alpha", "beta", "gamma")
            made[kind, dtype] = [make_pico(kind, folder / name, seed, dtype) for seed, name in enumerate(names)]
        return made[kind, dtype][0], made[kind, dtype][1:]

    return get


def weights(folder):
    tensors = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        tensors.update(load_file(file))
    return tensors


def same_bits(a, b):
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(bits(a[n]), bits(b[n])) for n in a)


def copy_of(checkpoint, folder, changes=None):
    """A copy of a checkpoint with some tensors replaced (or, with None, removed)."""
    shutil.copytree(checkpoint, folder)
    tensors = weights(checkpoint)
    for name, tensor in (changes or {}).items():
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def refusal(*args, **kwargs):
    """Lines of the `UserError` of a merge, which must leave nothing behind."""
    out = Path(args[1])
    with pytest.raises(UserError) as caught:
        merge_checkpoints(*args, quiet=True, **kwargs)
    assert not out.exists()
    assert not out.with_name(out.name + ".partial").exists()
    return str(caught.value).splitlines()


# mot


@pytest.mark.parametrize("kind", KINDS)
def test_mot_is_the_exact_mean_and_loads(kind, family, tmp_path):
    from transformers import AutoModelForCausalLM

    student, branches = family(kind)
    report = merge_checkpoints("mot", tmp_path / "out", base=student, branches=branches, quiet=True)
    inputs = [weights(branch) for branch in branches]
    got = weights(tmp_path / "out")
    assert got.keys() == inputs[0].keys()
    for name, tensor in got.items():
        expected = exact_mean([i[name].view(-1) for i in inputs], [Fraction(1, 3)] * 3, torch.bfloat16)
        assert torch.equal(bits(tensor.view(-1)), bits(expected)), name

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    loaded = [AutoModelForCausalLM.from_pretrained(branch).state_dict() for branch in branches]
    assert model.dtype == torch.bfloat16
    for name, tensor in model.state_dict().items():
        mean = sum(state[name].double() for state in loaded) / 3
        assert torch.all((tensor.double() - mean).abs() <= mean.abs() * 2**-8), name

    size = sum(t.numel() for t in got.values())
    assert (report.method, report.num_inputs, report.num_tensors, report.parameters) == ("mot", 3, len(got), size)
    assert (report.bytes_read, report.bytes_written) == (3 * 2 * size, 2 * size)


def test_mot_streamed_is_mot_in_stock_mergekit(family, tmp_path):
    """The same resolved YAML through mergekit's own command, our plugin imported."""
    from mergekit.io.tasks import LoaderCache
    from mergekit.scripts.run_yaml import main

    student, branches = family("llama", "float32")
    models = [{"model": str(b), "parameters": {"weight": w}} for b, w in zip(branches, (0.3, 1, 2), strict=True)]
    for number, (scale, out_dtype) in enumerate([(1.0, "bfloat16"), (0.7, "bfloat16"), (1.5, "float32")]):
        config = {
            "merge_method": "mot",
            "base_model": str(student),
            "models": models,
            "parameters": {"scale": scale},
            "out_dtype": out_dtype,
        }
        ours, stock = tmp_path / f"ours{number}", tmp_path / f"stock{number}"
        merge_checkpoints(config, ours, quiet=True)
        LoaderCache.loaders.clear()
        main([str(ours / "mergekit_config.yml"), str(stock), "--quiet"], standalone_mode=False)
        assert same_bits(weights(ours), weights(stock))
    # A gradient cannot be streamed: it goes through mergekit, and constant ones must change nothing.
    for entry in config["models"]:
        entry["parameters"]["weight"] = [entry["parameters"]["weight"]] * 2
    merge_checkpoints(config, tmp_path / "gradient", quiet=True)
    assert same_bits(weights(ours), weights(tmp_path / "gradient"))


def test_mot_weights_and_scale(family, tmp_path):
    student, branches = family()
    config = load_merge_config("mot")
    config["models"][0]["parameters"]["weight"] = 2.5  # the same for all: no effect
    config["parameters"]["scale"] = 0.7
    report = merge_checkpoints(config, tmp_path / "out", base=student, branches=branches, quiet=True)
    assert report.num_inputs == 4
    step = Fraction(0.7)
    coefficients = [step / 3] * 3 + [1 - step]
    inputs = [weights(path) for path in (*branches, student)]
    for name, tensor in weights(tmp_path / "out").items():
        expected = exact_mean([i[name].view(-1) for i in inputs], coefficients, torch.bfloat16)
        assert torch.equal(bits(tensor.view(-1)), bits(expected)), name


def test_carry_in_float32_and_mixed_inputs(family, tmp_path):
    student, (alpha, beta, _) = family()
    wide = family("llama", "float32")[1][2]
    merge_checkpoints("mot", tmp_path / "a", base=student, branches=[alpha, wide], out_dtype="float32", quiet=True)
    merge_checkpoints("mot", tmp_path / "b", base=student, branches=[wide, alpha], out_dtype="float32", quiet=True)
    got = weights(tmp_path / "a")
    assert {t.dtype for t in got.values()} == {torch.float32}
    assert same_bits(got, weights(tmp_path / "b"))
    assert json.loads((tmp_path / "a" / "config.json").read_text())["dtype"] == "float32"
    config = {k: v for k, v in load_merge_config("mot").items() if k != "out_dtype"}
    merge_checkpoints(config, tmp_path / "c", base=student, branches=[alpha, beta], quiet=True)
    assert {t.dtype for t in weights(tmp_path / "c").values()} == {torch.bfloat16}


def test_an_explicit_dtype_is_honoured(family, tmp_path, monkeypatch):
    """``dtype`` casts the inputs first, as in mergekit; where that changes nothing, the merge is streamed."""
    student, branches = family()
    wide = family("llama", "float32")[1]
    config = {"merge_method": "mot", "models": [{"model": "$branches"}], "dtype": "bfloat16"}
    merge_checkpoints(config, tmp_path / "cast", base=student, branches=wide, quiet=True)
    inputs = [{name: t.to(torch.bfloat16) for name, t in weights(path).items()} for path in wide]
    for name, tensor in weights(tmp_path / "cast").items():
        expected = exact_mean([i[name].view(-1) for i in inputs], [Fraction(1, 3)] * 3, torch.bfloat16)
        assert torch.equal(bits(tensor.view(-1)), bits(expected)), name
    monkeypatch.setattr("motkit.merge._run_mergekit", None)
    merge_checkpoints(config, tmp_path / "streamed", base=student, branches=branches, quiet=True)
    merge_checkpoints("mot", tmp_path / "plain", base=student, branches=branches, quiet=True)
    assert same_bits(weights(tmp_path / "streamed"), weights(tmp_path / "plain"))


def test_shards_spans_and_threads_change_nothing(family, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    student, branches = family()
    merge_checkpoints("mot", tmp_path / "one", base=student, branches=branches, quiet=True)
    monkeypatch.setattr(spans, "SHARD_BYTES", 20_000)
    monkeypatch.setattr(spans, "SPAN", 100)
    merge_checkpoints("mot", tmp_path / "many", base=student, branches=branches, quiet=True)
    files = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(files)
    assert index["metadata"]["total_size"] == sum(t.numel() * 2 for t in weights(tmp_path / "one").values())
    assert same_bits(weights(tmp_path / "one"), weights(tmp_path / "many"))
    AutoModelForCausalLM.from_pretrained(tmp_path / "many")
    # Sharded checkpoints are inputs too.
    again = [tmp_path / "many", *branches[1:]]
    merge_checkpoints("mot", tmp_path / "again", base=student, branches=again, quiet=True)


def test_integer_buffers(family, tmp_path):
    student, (alpha, beta, _) = family()
    steps = torch.arange(5)
    a = copy_of(alpha, tmp_path / "a", {"model.steps": steps})
    b = copy_of(beta, tmp_path / "b", {"model.steps": steps})
    base = copy_of(student, tmp_path / "base", {"model.steps": steps})
    merge_checkpoints("mot", tmp_path / "out", base=base, branches=[a, b], quiet=True)
    assert torch.equal(weights(tmp_path / "out")["model.steps"], steps)
    c = copy_of(beta, tmp_path / "c", {"model.steps": steps + 1})
    assert "model.steps" in refusal("mot", tmp_path / "no", base=base, branches=[a, c])[0]


class Malicious:
    """What a pickle may do when it is loaded: here, make a folder."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("method", ["mot", "mot_median", "linear"])
def test_pickled_weights_only_where_they_are_allowed(method, family, tmp_path):
    student, branches = family("qwen3")  # tied: saved with both names of the embedding, as torch.save does
    pickled = shutil.copytree(branches[0], tmp_path / "pickled")
    tensors = weights(pickled)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    torch.save(tensors, pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    inputs = [pickled, *branches[1:]]
    assert "--allow-pickle" in refusal(method, tmp_path / "out", base=student, branches=inputs)[0]
    merge_checkpoints(method, tmp_path / "out", base=student, branches=inputs, allow_pickle=True, quiet=True)
    merge_checkpoints(method, tmp_path / "plain", base=student, branches=branches, quiet=True)
    assert same_bits(weights(tmp_path / "out"), weights(tmp_path / "plain"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "pickled", "plain"]

    torch.save({"x": torch.ones(1), "y": Malicious(tmp_path / "owned")}, pickled / "pytorch_model.bin")
    (line,) = refusal(method, tmp_path / "no", base=student, branches=inputs, allow_pickle=True)
    assert line.startswith(f"{pickled / 'pytorch_model.bin'}: not loaded, it holds more than tensors")
    torch.save([torch.ones(1)], pickled / "pytorch_model.bin")
    assert (
        "expected named tensors"
        in refusal(method, tmp_path / "no", base=student, branches=inputs, allow_pickle=True)[0]
    )
    assert not (tmp_path / "owned").exists()


# Our other methods

OWN = ("mot_ties", "mot_median", "mot_trimmed_mean", "mot_geometric_median")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_own_methods_stream_what_stock_mergekit_gives(dtype, family, tmp_path, monkeypatch):
    """Per tensor, which is all that stock mergekit can do; with small spans, so that a tensor has many."""
    student, branches = family("llama", dtype)
    monkeypatch.setattr(spans, "SPAN", 700)
    settings = {
        "mot_ties": {"parameters": {"density": 0.3, "weight": 1.0, "trim": "tensor", "scale": 0.9}},
        "mot_median": {"parameters": {"scale": 0.7}},
        "mot_trimmed_mean": {"parameters": {"drop_each_end": 1}},
        "mot_geometric_median": {"parameters": {"over": "tensor"}},
    }
    for method in OWN:
        config = {"merge_method": method, "base_model": "$student", "models": [{"model": "$branches"}]}
        config |= {"out_dtype": "bfloat16", **settings[method]}
        merge_checkpoints(config, tmp_path / method, base=student, branches=branches, quiet=True)
    for method in OWN:
        arguments = [str(tmp_path / method / "mergekit_config.yml"), str(tmp_path / f"{method}-stock"), "--quiet"]
        command = [sys.executable, "-m", "motkit.mergekit", "mergekit-yaml", *arguments]
        subprocess.run(command, check=True, capture_output=True, timeout=300)
        assert same_bits(weights(tmp_path / method), weights(tmp_path / f"{method}-stock")), method


def flat(folder, names):
    """All weights of a checkpoint as one float64 vector."""
    tensors = weights(folder)
    return torch.cat([tensors[name].double().view(-1) for name in names])


def test_own_methods_over_the_whole_model(family, tmp_path):
    """The bundled configs against float64 computations on the model as one vector."""
    student, branches = family("qwen3")
    names = sorted(weights(student))
    base, vectors = flat(student, names), [flat(branch, names) for branch in branches]
    merged = {}
    for method in OWN:
        report = merge_checkpoints(method, tmp_path / method, base=student, branches=branches, quiet=True)
        assert (report.method, report.num_inputs) == (method, 4 if method == "mot_ties" else 3)
        merged[method] = flat(tmp_path / method, names)
    expected = ties_reference(base, vectors, [0.5] * 3, [1.0] * 3)
    assert torch.equal(merged["mot_ties"], expected.float().to(torch.bfloat16).double())
    median = torch.stack(vectors).median(dim=0).values
    assert torch.equal(merged["mot_median"], median)
    assert torch.equal(merged["mot_trimmed_mean"], median)

    far = copy_of(branches[2], tmp_path / "far", {n: t * 1.5 for n, t in weights(branches[2]).items()})
    inputs = [*branches[:2], far]
    merge_checkpoints(
        "mot_geometric_median", tmp_path / "geo", base=student, branches=inputs, out_dtype="float32", quiet=True
    )
    matrix = torch.stack([flat(path, names) for path in inputs]).numpy()

    def cost(share):
        return numpy.linalg.norm(matrix - share @ matrix, axis=1).sum()

    found = minimize(
        cost, [1 / 3] * 3, bounds=[(0, 1)] * 3, constraints={"type": "eq", "fun": lambda share: share.sum() - 1}
    )
    assert cost(numpy.full(3, 1 / 3)) > found.fun * 1.001
    got = flat(tmp_path / "geo", names).numpy()
    assert numpy.linalg.norm(matrix - got, axis=1).sum() <= found.fun * (1 + 1e-6)


@pytest.mark.parametrize("method", OWN)
def test_bytes_do_not_depend_on_spans_shards_order_or_processes(method, family, tmp_path, monkeypatch, request):
    student, branches = family()
    merge_checkpoints(method, tmp_path / "one", base=student, branches=branches, quiet=True)
    merge_checkpoints(method, tmp_path / "order", base=student, branches=branches[::-1], quiet=True)
    monkeypatch.setattr(spans, "SHARD_BYTES", 20_000)
    monkeypatch.setattr(spans, "SPAN", 700)
    request.getfixturevalue("forked")
    merge_checkpoints(method, tmp_path / "shards", base=student, branches=branches, quiet=True)
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    for other in ("order", "shards"):
        assert same_bits(weights(tmp_path / "one"), weights(tmp_path / other))


@pytest.mark.parametrize("method", OWN)
def test_own_methods_refuse_what_mot_refuses(method, family, tmp_path):
    student, (alpha, beta, gamma) = family()
    norm, head = "model.norm.weight", "lm_head.weight"
    short = copy_of(alpha, tmp_path / "short", {norm: weights(alpha)[norm][:-1].clone(), head: None})
    extra = copy_of(beta, tmp_path / "extra", {"model.extra.weight": torch.zeros(2, dtype=torch.bfloat16)})
    out = tmp_path / "out"
    assert len(refusal(method, out, base=student, branches=[short, extra, gamma])) == 3
    assert "given twice" in refusal(method, out, base=student, branches=[alpha, beta, alpha])[0]
    assert "given as the base and as a branch" in refusal(method, out, base=student, branches=[alpha, beta, student])[0]
    wide = copy_of(alpha, tmp_path / "wide", {norm: weights(alpha)[norm].double()})
    assert "expects BF16, F16 or F32" in refusal(method, out, base=student, branches=[wide, beta, gamma])[0]
    steps = [copy_of(p, tmp_path / f"s{i}", {"model.steps": torch.arange(5) + i % 3}) for i, p in enumerate(
        (student, alpha, beta, gamma)
    )]  # fmt: skip
    assert "model.steps: an integer buffer that differs" in refusal(method, out, base=steps[0], branches=steps[1:])[0]


def test_own_methods_take_mixed_dtypes_and_shards(family, tmp_path, monkeypatch):
    student, (alpha, beta, _) = family()
    wide = family("llama", "float32")[1][2]
    with monkeypatch.context() as patch:
        patch.setattr(spans, "SHARD_BYTES", 20_000)
        merge_checkpoints(
            {"merge_method": "mot", "models": [{"model": str(beta)}]}, tmp_path / "sharded", base=student, quiet=True
        )
    assert (tmp_path / "sharded" / "model.safetensors.index.json").is_file()
    assert same_bits(weights(tmp_path / "sharded"), weights(beta))
    names = sorted(weights(student))
    vectors = [flat(path, names) for path in (alpha, beta, wide)]
    inputs = [alpha, tmp_path / "sharded", wide]
    merged = {}
    for method in OWN:
        merge_checkpoints(method, tmp_path / method, base=student, branches=inputs, out_dtype="float32", quiet=True)
        merged[method] = flat(tmp_path / method, names)
    assert torch.equal(merged["mot_median"], torch.stack(vectors).median(dim=0).values)
    expected = ties_reference(flat(student, names), vectors, [0.5] * 3, [1.0] * 3)
    # These task vectors are as large as the weights, so that their own rounding to float32 shows.
    assert (merged["mot_ties"] - expected).norm() <= 1.2 * (expected.float().double() - expected).norm()


def test_one_poisoned_branch_of_three(family, make_pico, tmp_path):
    """Robust merges stay as near to the mean of the good branches as those are to it; the mean does not."""
    student = family("llama", "float32")[0]
    start, generator = weights(student), torch.Generator().manual_seed(0)

    def noise(size):
        return {name: torch.randn(t.shape, generator=generator) * size for name, t in start.items()}

    update, branches = noise(0.002), []
    for number in range(2):
        own = noise(0.001)
        changes = {name: t + update[name] + own[name] for name, t in start.items()}
        branches.append(copy_of(student, tmp_path / f"good{number}", changes))
    poison = {name: t - 20 * update[name] for name, t in start.items()}
    branches.append(copy_of(student, tmp_path / "poisoned", poison))
    names = sorted(start)
    good = [flat(branch, names) for branch in branches[:2]]
    mean, spread = (good[0] + good[1]) / 2, (good[0] - good[1]).norm() / 2
    distances = {}
    for method in ("mot", "mot_median", "mot_trimmed_mean", "mot_geometric_median"):
        merge_checkpoints(method, tmp_path / method, base=student, branches=branches, out_dtype="float32", quiet=True)
        distances[method] = float((flat(tmp_path / method, names) - mean).norm() / spread)
    assert distances.pop("mot") > 10
    assert all(distance <= 1.01 for distance in distances.values()), distances


@pytest.mark.slow
def test_mergekits_commands_know_our_methods(family, tmp_path):
    student, (alpha, beta, gamma) = family()
    models = [{"model": str(alpha)}, {"model": str(beta)}, {"model": str(gamma)}]
    single = tmp_path / "single.yaml"
    single.write_text(yaml.safe_dump({"merge_method": "mot_median", "models": models}))
    multi = tmp_path / "multi.yaml"
    first = {"name": "first", "merge_method": "mot", "models": models[:2]}
    last = {"merge_method": "mot", "models": [{"model": "first"}, models[2]]}
    multi.write_text(yaml.safe_dump_all([first, last]))
    raw = tmp_path / "raw.yaml"
    files = [{"model": str(path / "model.safetensors")} for path in (alpha, beta, gamma)]
    raw.write_text(yaml.safe_dump({"merge_method": "mot_median", "models": files}))
    commands = [
        ["mergekit-yaml", str(single), str(tmp_path / "yaml")],
        ["mergekit-multi", str(multi), "--intermediate-dir", str(tmp_path / "work"), "--out-path", str(tmp_path / "m")],
        ["mergekit-pytorch", str(raw), str(tmp_path / "pytorch")],
    ]
    for command in commands:
        done = subprocess.run(
            [sys.executable, "-m", "motkit.mergekit", *command], capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
    merge_checkpoints("mot_median", tmp_path / "ours", base=student, branches=[alpha, beta, gamma], quiet=True)
    expected = weights(tmp_path / "ours")
    assert same_bits(weights(tmp_path / "yaml"), expected)
    assert same_bits(weights(tmp_path / "pytorch"), expected)
    a, b, c = weights(alpha), weights(beta), weights(gamma)
    for name, tensor in weights(tmp_path / "m").items():
        half = exact_mean([a[name].view(-1), b[name].view(-1)], [Fraction(1, 2)] * 2, torch.bfloat16)
        both = exact_mean([half, c[name].view(-1)], [Fraction(1, 2)] * 2, torch.bfloat16)
        assert torch.equal(tensor.view(-1), both), name
    for arguments in ([], ["mergekit-moe"]):
        refused = subprocess.run([sys.executable, "-m", "motkit.mergekit", *arguments], capture_output=True, text=True)
        assert refused.returncode == 2
        assert refused.stderr.startswith("Error: expected one of mergekit-yaml")


# mergekit's methods

STOCK = """
import sys
from pathlib import Path
from mergekit.io.tasks import LoaderCache
from mergekit.scripts.run_yaml import main
for folder in sys.argv[1:]:
    LoaderCache.loaders.clear()
    arguments = [f"{folder}/ours/mergekit_config.yml", f"{folder}/stock", "--random-seed", "7", "--quiet"]
    main(arguments, standalone_mode=False)
"""


def test_mergekits_methods_give_what_mergekit_yaml_gives(family, tmp_path):
    student, branches = family()
    expert_student, expert_branches = family("qwen3_moe")
    cases = {
        "linear": ("linear", student, branches),
        "ties": ("ties", student, branches),
        "task_arithmetic": ("task_arithmetic", student, branches),
        "dare_ties": ("dare_ties", student, branches),
        "slerp": ("slerp", student, branches[:2]),
        "experts": ("ties", expert_student, expert_branches),
        "passthrough": (
            {
                "merge_method": "passthrough",
                "slices": [
                    {"sources": [{"model": str(branches[0]), "layer_range": [0, 1]}]},
                    {"sources": [{"model": str(branches[1]), "layer_range": [0, 2]}]},
                ],
            },
            None,
            [],
        ),
    }
    for name, (config, base, inputs) in cases.items():
        merge_checkpoints(config, tmp_path / name / "ours", base=base, branches=inputs, seed=7, quiet=True)
    folders = [str(tmp_path / name) for name in cases]
    subprocess.run([sys.executable, "-c", STOCK, *folders], check=True, capture_output=True, timeout=300)
    for name in cases:
        assert same_bits(weights(tmp_path / name / "ours"), weights(tmp_path / name / "stock")), name
    deeper = json.loads((tmp_path / "passthrough" / "ours" / "config.json").read_text())
    assert deeper["num_hidden_layers"] == 3

    from transformers import AutoModelForCausalLM

    for name in ("linear", "experts", "passthrough"):
        _, info = AutoModelForCausalLM.from_pretrained(tmp_path / name / "ours", output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]

    # The next round: a student with fused experts, as mergekit wrote it, and branches that transformers wrote.
    fused = tmp_path / "experts" / "ours"
    for method in ("mot", "ties"):
        merge_checkpoints(method, tmp_path / f"next-{method}", base=fused, branches=expert_branches, quiet=True)
        AutoModelForCausalLM.from_pretrained(tmp_path / f"next-{method}")
    scaled = {**load_merge_config("mot"), "parameters": {"scale": 0.5}}
    merge_checkpoints(scaled, tmp_path / "next-scaled", base=fused, branches=expert_branches, quiet=True)
    AutoModelForCausalLM.from_pretrained(tmp_path / "next-scaled")


IN_A_PROCESS = """
import sys
from pathlib import Path
from motkit.merge import merge_checkpoints
out, student, *branches = map(Path, sys.argv[1:])
for method in ("mot", "linear", "dare_ties"):
    merge_checkpoints(method, out / method, base=student, branches=branches, seed=3, quiet=True)
"""


def test_same_bytes_in_another_process_with_another_hash_seed(family, tmp_path):
    student, branches = family("qwen3")
    command = [sys.executable, "-c", IN_A_PROCESS, str(tmp_path / "there"), str(student), *map(str, branches)]
    environment = {**os.environ, "PYTHONHASHSEED": "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"}
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True, timeout=300)
    assert done.stderr == ""  # no warnings, and no bars when quiet
    for method in ("mot", "linear", "dare_ties"):
        merge_checkpoints(method, tmp_path / "here" / method, base=student, branches=branches, seed=3, quiet=True)
        files = sorted(path.name for path in (tmp_path / "here" / method).iterdir())
        assert len(files) == 8
        for name in files:
            here, there = (tmp_path / side / method / name for side in ("here", "there"))
            assert hash_file(here) == hash_file(there), name


def test_seeds_differ_and_the_callers_random_state_is_left_alone(family, tmp_path):
    student, branches = family()
    torch.manual_seed(1)
    random.seed(1)
    numpy.random.seed(1)
    expected = torch.rand(1), random.random(), numpy.random.rand()
    torch.manual_seed(1)
    random.seed(1)
    numpy.random.seed(1)
    for seed in (1, 2):
        merge_checkpoints("dare_ties", tmp_path / str(seed), base=student, branches=branches, seed=seed, quiet=True)
    assert (torch.rand(1), random.random(), numpy.random.rand()) == expected
    assert not same_bits(weights(tmp_path / "1"), weights(tmp_path / "2"))


@pytest.mark.parametrize("method", ["mot", "linear"])
def test_a_checkpoint_replaced_at_the_same_path_is_read_again(method, family, tmp_path):
    student, (alpha, beta, gamma) = family()
    moving = tmp_path / "branch"
    for number, source in enumerate((alpha, beta)):
        shutil.rmtree(moving, ignore_errors=True)
        shutil.copytree(source, moving)
        merge_checkpoints(method, tmp_path / str(number), base=student, branches=[moving, gamma], quiet=True)
    merge_checkpoints(method, tmp_path / "direct", base=student, branches=[beta, gamma], quiet=True)
    assert same_bits(weights(tmp_path / "1"), weights(tmp_path / "direct"))


# The output folder


@pytest.mark.parametrize("method", ["mot", "ties"])
def test_everything_but_the_weights_comes_from_the_base(method, family, make_pico, tmp_path):
    student, branches = family("gemma3")
    bare = tmp_path / "bare"
    shutil.copytree(branches[0], bare)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        (bare / name).unlink()
    out = tmp_path / "out"
    merge_checkpoints(method, out, base=student, branches=[bare, *branches[1:]], quiet=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (out / name).read_bytes() == (student / name).read_bytes(), name
    before, after = (json.loads((path / "config.json").read_text()) for path in (student, out))
    assert after == before | {"dtype": "bfloat16"}
    assert after["tie_word_embeddings"]
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "mergekit_config.yml",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    resolved = yaml.safe_load((out / "mergekit_config.yml").read_text())
    assert [entry["model"] for entry in resolved["models"]] == [str(bare), *map(str, branches[1:])]
    card = (out / "README.md").read_text()
    assert f"`{method}`" in card
    assert str(tmp_path) not in card
    assert list(tmp_path.glob("*.partial")) == []


def test_a_base_without_tokenizer_gets_a_branchs(family, tmp_path):
    student, branches = family()
    bare = copy_of(student, tmp_path / "bare")
    (bare / "tokenizer.json").unlink()
    merge_checkpoints("mot", tmp_path / "out", base=bare, branches=branches, quiet=True)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (branches[0] / "tokenizer.json").read_bytes()


def test_an_older_dtype_key_is_kept(family, tmp_path):
    student, branches = family()
    old = copy_of(student, tmp_path / "old")
    config = json.loads((old / "config.json").read_text())
    config["torch_dtype"] = config.pop("dtype")
    (old / "config.json").write_text(json.dumps(config))
    merge_checkpoints("mot", tmp_path / "out", base=old, branches=branches, out_dtype="float32", quiet=True)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["torch_dtype"] == "float32"
    assert "dtype" not in written


@pytest.mark.parametrize("method", ["mot", "dare_ties", "mot_ties", "mot_median"])
def test_a_tied_head_saved_once_more_is_dropped_and_a_different_one_refused(method, family, tmp_path):
    student, (alpha, beta, _) = family("qwen3")
    embedding = weights(alpha)["model.embed_tokens.weight"]
    same = copy_of(alpha, tmp_path / "same", {"lm_head.weight": embedding.clone()})
    merge_checkpoints(method, tmp_path / "a", base=student, branches=[same, beta], quiet=True)
    merge_checkpoints(method, tmp_path / "b", base=student, branches=[alpha, beta], quiet=True)
    assert same_bits(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert not (tmp_path / "a" / ".inputs").exists()
    untied = copy_of(alpha, tmp_path / "untied", {"lm_head.weight": embedding + 1})
    (line,) = refusal(method, tmp_path / "no", base=student, branches=[untied, beta])
    assert line.startswith(f"{untied}: lm_head.weight: differs from the embedding")


def test_a_folder_name_with_mergekits_own_signs(family, tmp_path):
    student, branches = family()
    folder = tmp_path / "run a+b@c"
    odd = [copy_of(branch, folder / f"branch+{i}") for i, branch in enumerate(branches[:2])]
    for method in ("mot", "linear"):
        merge_checkpoints(method, folder / method, base=student, branches=odd, quiet=True)
        merge_checkpoints(method, tmp_path / method, base=student, branches=branches[:2], quiet=True)
        assert same_bits(weights(folder / method), weights(tmp_path / method))


# What is refused


def test_all_faults_of_all_branches_at_once(family, tmp_path):
    student, (alpha, beta, gamma) = family()
    tensors = weights(alpha)
    norm, head = "model.norm.weight", "lm_head.weight"
    a = copy_of(alpha, tmp_path / "a", {norm: tensors[norm][:-1].clone(), head: None})
    b = copy_of(beta, tmp_path / "b", {"model.extra.weight": torch.zeros(2, dtype=torch.bfloat16)})
    lines = refusal("mot", tmp_path / "out", base=student, branches=[a, b, gamma])
    assert lines == [
        f"{a}: {head}: missing, {student} has it",
        f"{a}: {norm}: shape (31,), expected (32,) as in {student}",
        f"{b}: model.extra.weight: unknown, {student} has no such tensor",
    ]


@pytest.mark.parametrize("crew", ["alone", "forked"])
@pytest.mark.parametrize("method", ["mot", "ties", *OWN])
def test_nan_and_infinity_are_found_before_anything_is_published(method, crew, family, tmp_path, request):
    if crew == "forked":
        request.getfixturevalue("forked")
    student, (alpha, beta, gamma) = family()
    broken = {}
    for path, name, value in ((alpha, "model.norm.weight", "nan"), (beta, "lm_head.weight", "-inf")):
        tensor = weights(path)[name].clone()
        tensor.view(-1)[7] = float(value)
        broken[name] = copy_of(path, tmp_path / name, {name: tensor})
    lines = refusal(method, tmp_path / "out", base=student, branches=[*broken.values(), gamma])
    assert len(lines) == 2
    for name, path in broken.items():
        assert any(line.startswith(f"{path}: {name}: holds NaN or infinite values") for line in lines)


def test_damaged_files(family, tmp_path):
    student, (alpha, beta, gamma) = family()
    cut, pickled, both = (copy_of(alpha, tmp_path / name) for name in ("cut", "pickled", "both"))
    with (cut / "model.safetensors").open("r+b") as file:
        file.truncate(5000)
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    (both / "model.safetensors.index.json").write_text("{}")
    lines = refusal("mot", tmp_path / "out", base=student, branches=[cut, pickled, both, beta])
    assert len(lines) == 3
    assert lines[0].startswith(f"{cut / 'model.safetensors'}: truncated")
    assert lines[1].startswith(f"{pickled}: pickled weights only")
    assert lines[2].startswith(f"{both}: holds both")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert refusal("mot", tmp_path / "out", base=student, branches=[empty, gamma])[0].startswith(f"{empty}: no config")


def test_other_architectures_settings_and_tokenizers(family, make_pico, tmp_path):
    student, (alpha, beta, _) = family()
    other = family("qwen3")[0]
    assert "architecture" in refusal("mot", tmp_path / "out", base=student, branches=[alpha, other])[0]

    narrow = make_pico("llama", tmp_path / "narrow", 1, num_attention_heads=2, num_key_value_heads=1, head_dim=16)
    lines = refusal("mot", tmp_path / "out", base=student, branches=[alpha, narrow])
    assert f"{narrow}: config.json: num_attention_heads: 2, expected 4 as in {student}" in lines

    permuted = copy_of(beta, tmp_path / "permuted")
    text = (permuted / "tokenizer.json").read_text()
    tokenizer = json.loads(text)
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (permuted / "tokenizer.json").write_text(json.dumps(tokenizer))
    (line,) = refusal("mot", tmp_path / "out", base=student, branches=[alpha, permuted])
    assert line.startswith(f"{permuted / 'tokenizer.json'}: 2 tokens have other ids")
    # The same vocabulary written otherwise is the same vocabulary.
    (permuted / "tokenizer.json").write_text(json.dumps(json.loads(text), indent=None))
    merge_checkpoints("mot", tmp_path / "fine", base=student, branches=[alpha, permuted], quiet=True)


def test_tensors_that_mergekit_would_lose(family, tmp_path):
    inputs = [family()[0], *family()[1][:2]]
    extra = torch.ones(3, dtype=torch.bfloat16)
    base, a, b = (copy_of(path, tmp_path / path.name, {"model.extra.weight": extra}) for path in inputs)
    (line,) = refusal("linear", tmp_path / "out", base=base, branches=[a, b])
    assert line.startswith(f"{base}: model.extra.weight: lost in the merge")
    merge_checkpoints("mot", tmp_path / "mot", base=base, branches=[a, b], quiet=True)
    assert torch.equal(weights(tmp_path / "mot")["model.extra.weight"], extra)


def test_roles_of_base_and_branches(family, tmp_path):
    student, (alpha, beta, gamma) = family()
    out = tmp_path / "out"
    assert "given twice" in refusal("mot", out, base=student, branches=[alpha, beta, alpha])[0]
    assert "given as the base and as a branch" in refusal("mot", out, base=student, branches=[alpha, student])[0]
    assert "$branches has no value" in refusal("mot", out, base=student)[0]
    assert "$student has no value" in refusal("mot", out, branches=[alpha])[0]
    explicit = {"merge_method": "mot", "models": [{"model": str(alpha)}, {"model": str(beta)}]}
    assert "no entry 'model: $branches'" in refusal(explicit, out, branches=[gamma])[0]
    (line,) = refusal("slerp", out, base=student, branches=[alpha, beta, gamma])
    assert line.startswith("merge_method slerp: Merge method requires at most 2 inputs") or "exactly 2" in line
    assert "needs a base" in refusal({**explicit, "parameters": {"scale": 0.5}}, out)[0]
    assert "no such checkpoint folder" in refusal("mot", out, base=student, branches=[alpha, tmp_path / "missing"])[0]
    weighted = [{"model": str(student), "parameters": {"weight": 1.0}}, {"model": str(alpha)}]
    config = {"merge_method": "mot", "base_model": str(student), "models": weighted}
    assert "mot never averages its base" in refusal(config, out)[0]
    ties = {"merge_method": "ties", "models": [{"model": str(alpha)}, {"model": str(beta)}]}
    assert refusal(ties, out)[0].startswith("merge_method ties: Merge method requires a base")
    unweighted = {**ties, "base_model": str(student)}
    assert "Missing required parameter weight" in refusal(unweighted, out)[0]
    zero = {"merge_method": "linear", "models": [{"model": str(alpha)}, {"model": str(beta)}]}
    assert "is not finite" in refusal({**zero, "parameters": {"weight": 0.0}}, out)[0]
    assert merge_checkpoints(explicit, out, quiet=True).num_inputs == 2  # no base at all: the first model donates
    with pytest.raises(UserError, match="exists already"):
        merge_checkpoints(explicit, out, quiet=True)


# Merge configs


@pytest.mark.parametrize("name", [*("mot", "linear", "ties", "task_arithmetic", "dare_ties", "slerp"), *OWN])
def test_bundled_configs_open_with_their_purpose(name):
    path = bundled_files("merge_configs")[name]
    text = path.read_text()
    assert text.startswith("# ")
    assert f"motkit merge {name} OUT" in text
    config = load_merge_config(name)
    check_merge_config(config, num_branches=2 if name == "slerp" else 3)
    assert config["out_dtype"] == "bfloat16"
    assert (config.get("dtype") == "float32") == (not name.startswith("mot"))
    if name == "slerp":
        with pytest.raises(UserError, match="slerp"):
            check_merge_config(config, num_branches=3)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("merge_method: mot\nmodel: []", "unknown key 'model'; did you mean 'models'?"),
        ("merge_method: tiess\nmodels: [{model: a}]", "unknown method 'tiess'; did you mean 'ties'?"),
        ("merge_method: frobnicate\nmodels: [{model: a}]", "unknown method 'frobnicate'; known: arcee_fusion"),
        ("models: [{model: a}]", "merge_method: missing"),
        ("merge_method: mot", "exactly one of models, slices, modules"),
        ("merge_method: mot\nmodels: [{model: a, parameters: {wieght: 1}}]", "did you mean 'weight'?"),
        ("merge_method: mot\nmodels: [{model: a, parameters: {weight: .nan}}]", "expected a finite number, got nan"),
        ("merge_method: mot\nmodels: [{model: a, parameters: {weight: heavy}}]", "expected a number, got 'heavy'"),
        ("merge_method: mot\nmodels: [{model: a, parameters: {scale: 1}}]", "move it to the top-level parameters"),
        ("merge_method: ties\nmodels: [{model: a}]\nparameters: {density: [0.5, .inf]}", "expected a finite number"),
        ("merge_method: mot\nmodels: [{model: $branch}]", "unknown placeholder '$branch'"),
        ("merge_method: mot\nmodels: [{model: a, weight: 1}]", "models[0]: unknown key 'weight'"),
        ("merge_method: mot\nmodels: [{parameters: {}}]", "models[0].model: missing"),
        ("merge_method: mot\nmodels: [{model: a}]\nout_dtype: bf16", "out_dtype: unknown dtype 'bf16'"),
        ("merge_method: mot\nmerge_method: ties\nmodels: [{model: a}]", "key 'merge_method' is given twice"),
        (
            "merge_method: mot\nmodels: [{model: a}]\nparameters: {weight: [{fliter: mlp, value: 1}, {value: 2}]}",
            "parameters.weight: unknown key 'fliter'; did you mean 'filter'?",
        ),
        ("merge_method: mot\nmodels: 3\nparameters: 5", "models: expected a list"),
        ("merge_method: mot\nmodels: [3]\nparameters: 5", "parameters: expected a mapping, got int"),
        ("merge_method: mot\nmodules: 3", "modules: expected a mapping, got int"),
        ("merge_method: 3\nmodels: [{model: [a]}]\n7: 8", "unknown key 7"),
        ("merge_method: [", "not valid YAML"),
        ("- a", "expected a mapping"),
        ("merge_method: mot\nmodels: []", "models: expected a list with at least one entry"),
        ("merge_method: mot\nslices: [{sources: [{model: a, layers: 1}]}]", "slices[0].sources[0]: unknown key"),
    ],
)
def test_faulty_configs_are_refused_by_name(text, fault, tmp_path):
    file = tmp_path / "merge.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        load_merge_config(file)
    assert fault in str(caught.value)
    assert all(line.startswith(str(file)) for line in str(caught.value).splitlines())


def test_unknown_config_names_what_is_bundled():
    with pytest.raises(UserError, match=r"bundled name .*mot.*ties"):
        load_merge_config("mott")


def test_a_config_file_with_relative_paths_and_short_floats(family, tmp_path):
    student, branches = family()
    (tmp_path / "configs").mkdir()
    for name, path in zip(("s", "a", "b"), (student, *branches[:2]), strict=True):
        (tmp_path / name).symlink_to(path)
    file = tmp_path / "configs" / "merge.yaml"
    file.write_text(
        "merge_method: task_arithmetic\nbase_model: ../s\n"
        "models: [{model: ../a, parameters: {weight: 1e-5}}, {model: ../b, parameters: {weight: 1}}]\n"
        "dtype: float32\nout_dtype: bfloat16\n"
    )
    config = load_merge_config(file)
    assert config["models"][0]["parameters"]["weight"] == 1e-5
    assert config["base_model"] == str(tmp_path / "s")
    merge_checkpoints(file, tmp_path / "out", quiet=True)


def test_resolving_placeholders():
    config = {
        "merge_method": "ties",
        "base_model": "$student",
        "models": [{"model": "$branches", "parameters": {"density": [0.1, 0.9], "weight": 1.0}}, {"model": "/extra"}],
    }
    resolved = resolve_merge_config(config, base=Path("/s"), branches=[Path("/a"), Path("/b")], out_dtype="float32")
    settings = {"density": [0.1, 0.9], "weight": 1.0}  # a list stays a gradient over layers
    assert resolved == {
        "merge_method": "ties",
        "base_model": "/s",
        "models": [
            {"model": "/a", "parameters": settings},
            {"model": "/b", "parameters": settings},
            {"model": "/extra"},
        ],
        "out_dtype": "float32",
    }
    assert config["models"][0]["model"] == "$branches"  # the argument is not changed

    linear = {"merge_method": "linear", "base_model": "$student", "models": [{"model": "$branches"}]}
    assert "base_model" not in resolve_merge_config(linear, base=Path("/s"), branches=[Path("/a")], out_dtype=None)
    listed = {**linear, "models": [{"model": "$student"}, {"model": "$branches"}]}
    resolved = resolve_merge_config(listed, base=Path("/s"), branches=[Path("/a")], out_dtype=None)
    assert resolved["base_model"] == "/s"

    bare = {"merge_method": "mot", "models": [{"model": "$branches"}], "dtype": "float32", "out_dtype": "bfloat16"}
    resolved = resolve_merge_config(bare, base=Path("/s"), branches=[Path("/a")], out_dtype=None)
    assert resolved == {
        "merge_method": "mot",
        "models": [{"model": "/a"}],
        "out_dtype": "bfloat16",
        "base_model": "/s",
        "parameters": {"round_to": "bfloat16"},
    }


def test_importing_the_module_is_cheap():
    code = "import sys, motkit.merge; print({'torch', 'mergekit', 'transformers', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "set()"
