"""LoRA: what a branch leaves, how adapters are merged, and the merged update as one adapter."""

import itertools
import json
import math
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_train import branch, killed_in_step, metrics, rows
from transformers import AutoModelForCausalLM

from motkit import adapters, train
from motkit.checkpoint import count_parameters
from motkit.errors import UserError
from motkit.merge import merge_checkpoints
from motkit.merge_inputs import read_checkpoint
from motkit.recipe import Lora
from motkit.rundir import hash_file, hash_tree

MODULES = ["self_attn.q_proj", "mlp.down_proj"]


def lora_branch(student: Path, folder: Path, lora: dict, **changes):
    settings = {"lora": Lora(**lora).model_dump(mode="json"), **changes.pop("settings", {})}
    return branch(
        student, folder, settings=settings, adapter_out=folder / "adapter", base_name="org/student", **changes
    )


def make_adapter(student: Path, folder: Path, seed: int = 0, r: int = 4, alpha: int = 8, **config) -> Path:
    """A peft adapter with random factors, saved by peft itself."""
    import peft

    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    settings = {"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM", **config}
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=r, lora_alpha=alpha, **settings))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    wrapped.save_pretrained(folder)
    return folder


def update(adapter: Path, module: str, scaling: float) -> numpy.ndarray:
    """scaling·B·A in float64, by numpy."""
    factors = load_file(adapter / "adapter_model.safetensors")
    a, b = (factors[f"base_model.model.{module}.lora_{x}.weight"].double().numpy() for x in "AB")
    return scaling * (b @ a)


def expected_mean(student: Path, branches: dict[Path, float], weights=None) -> dict[str, numpy.ndarray]:
    """W + Σ w_k·ΔW_k in float64; ``branches``: adapter → scaling."""
    weights = weights or [1 / len(branches)] * len(branches)
    result = {name: tensor.double().numpy() for name, tensor in load_file(student / "model.safetensors").items()}
    for name in result:
        module = name.removesuffix(".weight")
        for (adapter, scaling), weight in zip(branches.items(), weights, strict=True):
            if f"base_model.model.{module}.lora_A.weight" in load_file(adapter / "adapter_model.safetensors"):
                result[name] = result[name] + weight * update(adapter, module, scaling)
    return result


# Training


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3"])
def test_a_lora_branch_leaves_its_adapter_and_the_checkpoint_that_it_makes(make_pico, tmp_path, kind):
    student = make_pico(kind, tmp_path / "student")
    report = lora_branch(student, tmp_path, {"r": 4, "alpha": 8})
    factors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(factors) == 2 * 2 * 7  # two layers of seven linear modules
    assert {tensor.dtype for tensor in factors.values()} == {torch.float32}
    assert all(tensor.abs().max() > 0 for tensor in factors.values())
    want = expected_mean(student, {tmp_path / "adapter": 8 / 4})
    got = load_file(tmp_path / "checkpoint" / "model.safetensors")
    assert got.keys() == want.keys()
    for name, tensor in got.items():
        assert torch.equal(tensor, torch.from_numpy(want[name]).float()), name
    trained = sum(tensor.numel() for tensor in factors.values())
    assert train.count_adapter_parameters(student, Lora(r=4)) == trained
    assert report.flops == (4 * count_parameters(student) + 6 * trained) * report.tokens
    assert (tmp_path / "checkpoint/tokenizer.json").read_bytes() == (student / "tokenizer.json").read_bytes()


def test_peft_loads_the_adapter_and_agrees_with_the_checkpoint(make_pico, tmp_path):
    import peft

    student = make_pico("llama", tmp_path / "student")
    lora_branch(student, tmp_path, {"r": 4, "alpha": 8, "use_rslora": True})
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["inference_mode"]) == ("org/student", True)
    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    wrapped = peft.PeftModel.from_pretrained(model, tmp_path / "adapter")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint", dtype=torch.float32)
    ids = torch.tensor([rows(1)[0].input_ids])
    base = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)(ids).logits
    torch.testing.assert_close(wrapped(ids).logits, whole(ids).logits, rtol=1e-4, atol=1e-5)
    assert (whole(ids).logits - base).abs().max() > 1e-2


def test_the_first_loss_is_the_frozen_students(make_pico, tmp_path):
    student = make_pico("llama", tmp_path / "student")
    branch(student, tmp_path / "full", settings={"max_steps": 1})
    lora_branch(student, tmp_path / "lora", {"r": 4, "target_modules": ["q_proj"]}, settings={"max_steps": 1})
    full, lora = metrics(tmp_path / "full")[0], metrics(tmp_path / "lora")[0]
    assert lora["loss"] == pytest.approx(full["loss"], rel=1e-5)  # an adapter begins at zero
    assert lora["tokens"] == full["tokens"]


def test_gradient_checkpointing_gives_the_same_gradients(make_pico, tmp_path):
    student = make_pico("llama", tmp_path / "student")
    found = []
    for checkpointing in (True, False):
        folder = tmp_path / str(checkpointing)
        lora_branch(student, folder, {"r": 4}, settings={"gradient_checkpointing": checkpointing})
        found.append([(row["loss"], row["grad_norm"]) for row in metrics(folder)])
        assert all(gradient > 0 for _, gradient in found[-1])
    numpy.testing.assert_allclose(found[0], found[1], rtol=1e-4)


def test_a_lora_branch_resumes_with_the_same_bytes(make_pico, tmp_path):
    student = make_pico("llama", tmp_path / "student")
    lora, settings = {"r": 4, "dropout": 0.2}, {"max_steps": 6, "save_steps": 2}
    lora_branch(student, tmp_path / "whole", lora, settings=settings)

    with killed_in_step(5):
        lora_branch(student, tmp_path / "broken", lora, settings=settings)
    work = tmp_path / "broken" / "work"
    assert train.resumable_step(work) == 4
    sealed = json.loads((work / "checkpoint-4" / "sealed.json").read_text())
    assert {"adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"} <= sealed.keys()
    assert "model.safetensors" not in sealed
    assert lora_branch(student, tmp_path / "broken", lora, settings=settings).resumed_from_step == 4
    for folder in ("checkpoint", "adapter"):
        assert hash_tree(tmp_path / "broken" / folder) == hash_tree(tmp_path / "whole" / folder)


def test_modules_that_cannot_be_merged_are_refused_before_anything_is_trained(make_pico, tmp_path):
    llama, moe = make_pico("llama", tmp_path / "llama"), make_pico("qwen3_moe", tmp_path / "moe")
    for student, targets, reason in (
        (llama, ["no_such_proj"], "peft refuses these settings: Target modules .*no_such_proj"),
        (llama, ["embed_tokens"], r"reaches model\.embed_tokens \(Embedding\)"),
        (llama, ["lm_head"], r"reaches lm_head \(the output head\)"),
        (moe, "all-linear", r"reaches model\.layers\.0\.mlp"),
        (moe, ["gate_proj", "up_proj", "q_proj"], r"reaches model\.layers\.0\.mlp\.experts"),
    ):
        with pytest.raises(UserError, match=reason):
            train.count_adapter_parameters(student, Lora(r=2, target_modules=targets))
    assert train.count_adapter_parameters(moe, Lora(r=2, target_modules=["q_proj"])) == 2 * 2 * (32 + 32)


def test_attention_of_a_mixture_of_experts_takes_adapters(make_pico, tmp_path):
    student = make_pico("qwen3_moe", tmp_path / "student")
    lora_branch(student, tmp_path, {"r": 2, "target_modules": ["q_proj", "o_proj"]})
    want = expected_mean(student, {tmp_path / "adapter": 8 / 2})
    got = load_file(tmp_path / "checkpoint" / "model.safetensors")
    assert all(torch.equal(got[name], torch.from_numpy(want[name]).float()) for name in want)
    AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint")


# Merging


@pytest.mark.parametrize("out_dtype", ["float32", "bfloat16"])
def test_mot_averages_the_updates_and_rounds_once(make_pico, tmp_path, out_dtype):
    student = make_pico("llama", tmp_path / "student", dtype="float32")
    made = {
        make_adapter(student, tmp_path / "a", 1): 8 / 4,
        make_adapter(student, tmp_path / "b", 2, r=3, alpha=5): 5 / 3,
        make_adapter(student, tmp_path / "c", 3, use_rslora=True, target_modules=["q_proj", "k_proj"]): 8 / 2,
    }
    report = merge_checkpoints(
        "mot", tmp_path / "out", base=student, branches=list(made), out_dtype=out_dtype, quiet=True
    )
    assert report.num_inputs == 3
    got, want = load_file(tmp_path / "out" / "model.safetensors"), expected_mean(student, made)
    base = load_file(student / "model.safetensors")
    dtype, touched, means_of_products = getattr(torch, out_dtype), 0, 0
    for name, tensor in got.items():
        exact = torch.from_numpy(want[name])
        if out_dtype == "float32":
            assert torch.equal(tensor, exact.float()), name
        else:
            # Nearest, by brute force: no neighbour is nearer.
            bits = tensor.view(torch.int16)
            for step in (-1, 1):
                neighbour = (bits + step).view(dtype).double()
                assert bool(((tensor.double() - exact).abs() <= (neighbour - exact).abs()).all()), name
        touched += not torch.equal(tensor, base[name].to(dtype))
        # What averaging A and B on their own would give is something else.
        module = f"base_model.model.{name.removesuffix('.weight')}"
        factors = [load_file(path / "adapter_model.safetensors") for path in made]
        if "q_proj" in name:
            a, b = (f[f"{module}.lora_A.weight"] for f in factors), (f[f"{module}.lora_B.weight"] for f in factors)
            pairs = [(x[:3], y[:, :3]) for x, y in zip(a, b, strict=True)]
            naive = sum(y for _, y in pairs) / 3 @ (sum(x for x, _ in pairs) / 3)
            means_of_products += not torch.allclose(base[name] + naive, tensor.float(), atol=1e-3)
    assert touched == 2 * 3  # q, k and down of two layers
    assert means_of_products == 2


def test_the_order_of_adapters_changes_no_bit(make_pico, tmp_path):
    student = make_pico("llama", tmp_path / "student")
    made = [make_adapter(student, tmp_path / name, seed) for seed, name in enumerate("abc")]
    digests = set()
    for number, order in enumerate(itertools.permutations(made)):
        merge_checkpoints(
            "mot", tmp_path / f"out{number}", base=student, branches=order, out_dtype="float32", quiet=True
        )
        digests.add(hash_file(tmp_path / f"out{number}" / "model.safetensors"))
    assert len(digests) == 1


def test_weights_scale_and_whole_branches_mix_with_adapters(make_pico, tmp_path):
    student = make_pico("llama", tmp_path / "student", dtype="float32")
    whole = make_pico("llama", tmp_path / "whole", seed=5, dtype="float32")
    adapter = make_adapter(student, tmp_path / "a", 1)
    config = {
        "merge_method": "mot",
        "base_model": str(student),
        "models": [
            {"model": f"{student}+{adapter}", "parameters": {"weight": 3.0}},
            {"model": str(whole), "parameters": {"weight": 1.0}},
        ],
        "parameters": {"scale": 0.5},
        "out_dtype": "float32",
    }
    merge_checkpoints(config, tmp_path / "out", quiet=True)
    got = load_file(tmp_path / "out" / "model.safetensors")
    one = expected_mean(student, {adapter: 8 / 4})
    other = {name: tensor.double().numpy() for name, tensor in load_file(whole / "model.safetensors").items()}
    base = {name: tensor.double().numpy() for name, tensor in load_file(student / "model.safetensors").items()}
    for name, tensor in got.items():
        mean = 0.75 * one[name] + 0.25 * other[name]
        want = base[name] + 0.5 * (mean - base[name])
        numpy.testing.assert_allclose(tensor.numpy(), want, rtol=2**-23, atol=1e-12)


@pytest.mark.parametrize("method", ["linear", "ties", "task_arithmetic"])
def test_other_methods_merge_what_an_adapter_stands_for(make_pico, tmp_path, method):
    student = make_pico("llama", tmp_path / "student")
    made = [make_adapter(student, tmp_path / name, seed) for seed, name in enumerate("ab")]
    whole = []
    for adapter in made:
        whole.append(tmp_path / f"whole-{adapter.name}")
        adapters.materialise_checkpoint(student, adapter, whole[-1])
    merge_checkpoints(method, tmp_path / "one", base=student, branches=made, out_dtype="float32", quiet=True)
    merge_checkpoints(method, tmp_path / "two", base=student, branches=whole, out_dtype="float32", quiet=True)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not list((tmp_path / "one").glob(".*"))


def test_an_adapter_replaced_at_its_path_is_read_again(make_pico, tmp_path):
    student = make_pico("llama", tmp_path / "student")
    digests = []
    for seed in (1, 2):
        adapter = make_adapter(student, tmp_path / "a", seed)
        for method in ("mot", "linear"):
            out = tmp_path / f"{method}{seed}"
            merge_checkpoints(method, out, base=student, branches=[adapter], out_dtype="float32", quiet=True)
            digests.append(hash_file(out / "model.safetensors"))
    assert len(set(digests)) == 2
    assert digests[0] == digests[1] != digests[2] == digests[3]


def test_an_adapter_without_its_base_is_one_line(make_pico, tmp_path):
    student = make_pico("llama", tmp_path / "student")
    adapter = make_adapter(student, tmp_path / "a")
    with pytest.raises(UserError, match=r"a: a LoRA adapter, not a model; give the model .* with --base DIR"):
        merge_checkpoints("linear", tmp_path / "out", branches=[adapter], quiet=True)
    assert not (tmp_path / "out").exists()


def damage_shape(folder):
    change(folder, lambda name, tensor: tensor[:, :-1].contiguous() if "q_proj.lora_A" in name else tensor)


def damage_nan(folder):
    change(folder, lambda name, tensor: tensor * math.nan if "layers.1.mlp.down_proj.lora_B" in name else tensor)


def damage_name(folder):
    file = folder / "adapter_model.safetensors"
    save_file({name.replace("layers.1", "layers.7"): t for name, t in load_file(file).items()}, file)


def damage_half(folder):
    file = folder / "adapter_model.safetensors"
    save_file({name: t for name, t in load_file(file).items() if "layers.0.self_attn.q_proj.lora_B" not in name}, file)


def damage_cut(folder):
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])


def damage_pickle(folder):
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def change(folder, how):
    file = folder / "adapter_model.safetensors"
    save_file({name: how(name, tensor) for name, tensor in load_file(file).items()}, file)


def setting(**values):
    def write(folder):
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return write


FAULTS = {
    "shape": (damage_shape, r"layers\.0\.self_attn\.q_proj\.weight: update of shape \(32, 31\), expected \(32, 32\)"),
    "nan": (damage_nan, r"layers\.1\.mlp\.down_proj\.lora_B\.weight: holds NaN"),
    "name": (damage_name, r"has no tensor model\.layers\.7\.mlp\.down_proj\.weight; is this the adapter's base\?"),
    "half": (damage_half, r"layers\.0\.self_attn\.q_proj: has only one factor, lora_A"),
    "cut": (damage_cut, r"adapter_model\.safetensors: truncated or damaged"),
    "pickle": (damage_pickle, "pickled weights only"),
    "dora": (setting(use_dora=True), "use_dora: DoRA: its update is not scaling"),
    "saved": (setting(modules_to_save=["lm_head"]), "modules_to_save: whole modules"),
    "pissa": (setting(init_lora_weights="pissa_niter_4"), "init_lora_weights: 'pissa_niter_4' changes the base's"),
    "bias": (setting(bias="all"), "bias: 'all', expected 'none'"),
    "kind": (setting(peft_type="IA3"), "peft_type 'IA3', expected 'LORA'"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_adapter_that_does_not_fit_is_refused_by_name(make_pico, tmp_path, fault):
    student = make_pico("llama", tmp_path / "student")
    adapter = make_adapter(student, tmp_path / "a")
    spoil, message = FAULTS[fault]
    spoil(adapter)
    with pytest.raises(UserError, match=message):
        merge_checkpoints("mot", tmp_path / "out", base=student, branches=[adapter], quiet=True)
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_fused_experts_is_refused(make_pico, tmp_path):
    student = make_pico("qwen3_moe", tmp_path / "student")
    adapter = make_adapter(student, tmp_path / "a", target_modules="all-linear")
    with pytest.raises(UserError, match=r"fused expert parameters|mlp\.experts"):
        merge_checkpoints("mot", tmp_path / "out", base=student, branches=[adapter], quiet=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj.weight", "model.norm.weight"])
def test_a_base_that_is_not_finite_is_refused_by_name(make_pico, tmp_path, name):
    student = make_pico("llama", tmp_path / "student", dtype="float32")
    adapter = make_adapter(student, tmp_path / "a")
    weights = load_file(student / "model.safetensors")
    weights[name].view(-1)[-1] = math.nan
    save_file(weights, student / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"student: {name}: holds NaN"):
        merge_checkpoints("mot", tmp_path / "out", base=student, branches=[adapter], quiet=True)
    assert not (tmp_path / "out").exists()


def test_ranks_and_alphas_of_single_modules_count(make_pico, tmp_path):
    import peft

    student = make_pico("llama", tmp_path / "student", dtype="float32")
    patterns = {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"layers.1.self_attn.q_proj": 12}}
    adapter = make_adapter(student, tmp_path / "a", **patterns)
    merge_checkpoints("mot", tmp_path / "out", base=student, branches=[adapter], out_dtype="float32", quiet=True)
    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    merged = peft.PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict()
    got = load_file(tmp_path / "out" / "model.safetensors")
    assert any(not torch.equal(got[name], load_file(student / "model.safetensors")[name]) for name in got)
    for name, tensor in got.items():
        torch.testing.assert_close(tensor, merged[name], rtol=1e-6, atol=1e-6)


# The merged update as one adapter


@pytest.mark.parametrize("full_svd", [True, False], ids=["full", "randomised"])
def test_the_merged_adapter_is_the_best_of_its_rank(make_pico, tmp_path, monkeypatch, full_svd):
    import peft

    if not full_svd:
        monkeypatch.setattr(adapters, "_FULL_SVD", 1)
    student = make_pico("llama", tmp_path / "student", dtype="float32")
    made = [make_adapter(student, tmp_path / name, seed) for seed, name in enumerate("abc")]
    merge_checkpoints("mot", tmp_path / "out", base=student, branches=made, out_dtype="float32", quiet=True)
    names = adapters.adapted_tensors(made)
    before, after = (load_file(folder / "model.safetensors") for folder in (student, tmp_path / "out"))
    for rank in (4, 12):
        found = adapters.extract_adapter(
            student, tmp_path / "out", tmp_path / f"r{rank}", tensors=names, rank=rank, base_name="org/student", seed=0
        )
        lost = total = 0.0
        for name in names:
            delta = after[name].double().numpy() - before[name].double().numpy()
            singular = numpy.linalg.svd(delta, compute_uv=False)
            lost, total = lost + (singular[rank:] ** 2).sum(), total + (singular**2).sum()
            best = math.sqrt((singular[rank:] ** 2).sum() / (singular**2).sum())
            assert found["per_tensor"][name] == pytest.approx(best, rel=1e-3, abs=1e-6)
            kept = update(tmp_path / f"r{rank}", name.removesuffix(".weight"), 1.0)
            error = numpy.linalg.norm(delta - kept) / numpy.linalg.norm(delta)
            assert found["per_tensor"][name] == pytest.approx(error, rel=1e-6, abs=1e-9)
        assert found["relative_error"] == pytest.approx(math.sqrt(lost / total), rel=1e-3, abs=1e-6)
        assert found["outside"] == 0.0
        assert (found["relative_error"] < 1e-6) == (rank == 12)  # three adapters of rank 4
    base = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "r12").merge_and_unload().state_dict()
    for name in names:
        torch.testing.assert_close(loaded[name], after[name], rtol=1e-5, atol=1e-6)


def test_what_the_merged_adapter_cannot_hold_counts_as_error(make_pico, tmp_path):
    student = make_pico("llama", tmp_path / "student", dtype="float32")
    adapter = make_adapter(student, tmp_path / "a", 1)
    merge_checkpoints("mot", tmp_path / "out", base=student, branches=[adapter], out_dtype="bfloat16", quiet=True)
    found = adapters.extract_adapter(
        student,
        tmp_path / "out",
        tmp_path / "svd",
        tensors=adapters.adapted_tensors([adapter]),
        rank=4,
        base_name="x",
        seed=0,
    )
    before, after = (load_file(folder / "model.safetensors") for folder in (student, tmp_path / "out"))
    deltas = {name: after[name].double() - before[name].double() for name in before}
    outside = sum(float((delta**2).sum()) for name, delta in deltas.items() if name not in found["per_tensor"])
    total = sum(float((delta**2).sum()) for delta in deltas.values())
    assert found["outside"] == pytest.approx(math.sqrt(outside / total))
    assert found["relative_error"] >= found["outside"] > 0


def test_an_adapter_has_no_checkpoint_of_its_own(make_pico, tmp_path):
    student = make_pico("llama", tmp_path / "student")
    adapter = make_adapter(student, tmp_path / "a")
    assert adapters.is_adapter(adapter)
    assert not adapters.is_adapter(student)
    with pytest.raises(UserError, match="a LoRA adapter, not a model"):
        read_checkpoint(adapter)
