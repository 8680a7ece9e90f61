"""LoRA adapters as files: what a peft folder holds, base + update exactly, and one adapter out of an update.

An adapter says of each module that it targets: W → W + s·B·A with factors B (rows, r), A (r, columns) and a scaling s.
Averaging B and A on their own is not averaging the updates, because a product is not linear in both; here the update
itself is what counts. It is never stored: `LowRank` gives any span of Σ c·s·B·A in float64, and the merge adds it to
the base and rounds once (`motkit.merge_stream.stream_merge`).

Nothing is cached. mergekit's own cache of merged adapters is keyed by path and goes stale.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from motkit.checkpoint import copy_tokenizer
from motkit.errors import UserError
from motkit.merge_inputs import Checkpoint, listed, read_checkpoint, read_header, require_json

if TYPE_CHECKING:
    import torch

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<factor>A|B)\.weight")

# Fields of adapter_config.json that make the update something else than scaling·B·A on the base's own weights.
_FOREIGN = {
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
    "lora_bias": "a bias in the adapter",
    "modules_to_save": "whole modules beside the adapter",
    "trainable_token_indices": "trained tokens beside the adapter",
    "alora_invocation_tokens": "activated LoRA",
    "layer_replication": "replicated layers",
    "megatron_config": "Megatron layers",
    "kasa_config": "KaSA",
    "arrow_config": "Arrow routing",
    "monteclora_config": "MonteCLoRA",
    "velora_config": "VeLoRA",
}
_OWN_WEIGHTS_INITS = {True, False, "gaussian", "orthogonal", "eva"}  # others begin by changing the base's weights

# Up to this many rows or columns the singular vectors are computed in full; beyond, by randomised iteration.
_FULL_SVD = 1024


@dataclass(frozen=True)
class Factors:
    """One module's update, ``scaling``·``left``·``right``: float64, (rows, r) and (r, columns) of the base's tensor."""

    scaling: float
    left: "torch.Tensor"
    right: "torch.Tensor"


@dataclass(frozen=True)
class Adapter:
    """An adapter folder, read: the updates by the name of the base's tensor."""

    path: Path
    sha256: str
    updates: dict[str, Factors]
    num_bytes: int


class LowRank:
    """Σ_k c_k·s_k·B_k·A_k of one tensor, a span at a time, in float64."""

    def __init__(self, terms: Sequence[tuple[Fraction, Factors]]) -> None:
        import torch

        self._left = torch.cat([factors.left * (float(c) * factors.scaling) for c, factors in terms], dim=1)
        self._right = torch.cat([factors.right for _, factors in terms], dim=0)

    def span(self, start: int, stop: int) -> "torch.Tensor":
        """Elements ``start`` to ``stop`` of the flat update."""
        columns = self._right.shape[1]
        first, last = start // columns, -(-stop // columns)
        rows = self._left[first:last] @ self._right
        return rows.view(-1)[start - first * columns : stop - first * columns]


def is_adapter(path: Path) -> bool:
    """Whether a folder holds an adapter and no model."""
    return (path / CONFIG).is_file() and not (path / "config.json").is_file()


def read_adapter(path: Path, base: Checkpoint) -> Adapter:
    """Read a peft LoRA adapter that belongs to ``base``.

    Raises:
        UserError: not a LoRA adapter, one whose update is not scaling·B·A, a file that is missing or damaged, NaN, or
            factors that do not fit the base. All faults at once, each with the tensor's name.
    """
    from safetensors.torch import load_file

    if not (path / CONFIG).is_file():
        raise UserError(f"{path}: no {CONFIG}; expected a folder that peft's save_pretrained wrote")
    config = require_json(path / CONFIG)
    weights = path / WEIGHTS
    faults = _foreign_faults(path, config)
    if not weights.is_file():
        hint = ": pickled weights only, which can run code; save the adapter as safetensors"
        faults.append(f"{path}: no {WEIGHTS}{hint if any(path.glob('*.bin')) else ''}")
    if faults:
        raise UserError(listed(faults))
    read_header(weights)  # its length
    found: dict[str, dict[str, Any]] = {}
    for name, tensor in load_file(weights).items():
        match = _FACTOR.fullmatch(name)
        if match is None:
            faults.append(f"{path}: {name}: not a factor of a linear module; only lora_A and lora_B can be merged")
        elif not bool(tensor.isfinite().all()):
            faults.append(f"{path}: {name}: holds NaN or infinite values; train that branch again or leave it out")
        else:
            found.setdefault(match["module"], {})[match["factor"]] = tensor.double()
    if not found and not faults:
        faults.append(f"{path}: {weights.name}: holds no adapter; save it again")
    updates = {}
    for module, factors in sorted(found.items()):
        name = module.removeprefix(_PREFIX)
        tensor_name = f"{name}.weight"
        if len(factors) != 2:
            # The other factor may have been refused above.
            faults.append(f"{path}: {module}: has only one factor, lora_{next(iter(factors))}")
            continue
        left, right = factors["B"], factors["A"]
        record = base.tensors.get(tensor_name)
        if record is None or tensor_name in base.dropped:
            faults.append(f"{path}: {module}: {base.path} has no tensor {tensor_name}; is this the adapter's base?")
            continue
        if left.ndim != 2 or right.ndim != 2 or left.shape[1] != right.shape[0]:
            faults.append(f"{path}: {module}: factors {tuple(left.shape)} and {tuple(right.shape)} make no matrix")
            continue
        if config.get("fan_in_fan_out"):
            left, right = right.T.contiguous(), left.T.contiguous()
        shape = (left.shape[0], right.shape[1])
        if shape != record.shape:
            faults.append(f"{path}: {tensor_name}: update of shape {shape}, expected {record.shape} as in {base.path}")
            continue
        if not record.is_float:
            faults.append(f"{base.path}: {tensor_name}: dtype {record.dtype}: an update needs a floating-point base")
            continue
        updates[tensor_name] = Factors(_scaling(config, name, factors["A"].shape[0]), left, right)
    if faults:
        raise UserError(listed(faults))
    digest = hashlib.sha256((path / CONFIG).read_bytes() + weights.read_bytes()).hexdigest()
    return Adapter(path, digest, updates, weights.stat().st_size)


def _foreign_faults(path: Path, config: Mapping[str, Any]) -> list[str]:
    kind = config.get("peft_type")
    if kind != "LORA":
        return [f"{path}: {CONFIG}: peft_type {kind!r}, expected 'LORA'"]
    remedy = "its update is not scaling·B·A on the base's weights; merge it into its base with peft first"
    faults = [f"{path}: {CONFIG}: {key}: {what}: {remedy}" for key, what in _FOREIGN.items() if config.get(key)]
    if config.get("bias", "none") != "none":
        faults.append(f"{path}: {CONFIG}: bias: {config['bias']!r}, expected 'none'; {remedy}")
    if config.get("target_parameters"):
        faults.append(f"{path}: {CONFIG}: target_parameters: adapters on fused expert parameters cannot be merged here")
    init = config.get("init_lora_weights", True)
    if not isinstance(init, bool | str) or init not in _OWN_WEIGHTS_INITS:
        faults.append(f"{path}: {CONFIG}: init_lora_weights: {init!r} changes the base's weights; {remedy}")
    return faults


def _scaling(config: Mapping[str, Any], module: str, rank: int) -> float:
    """As peft scales a module: by its alpha over its rank, or over the root of it (rsLoRA)."""
    from peft.utils.other import get_pattern_key

    patterns = config.get("alpha_pattern") or {}
    alpha = patterns.get(get_pattern_key(list(patterns), module), config.get("lora_alpha", 8))
    ranks = config.get("rank_pattern") or {}
    rank = ranks.get(get_pattern_key(list(ranks), module), rank)
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def adapted_tensors(paths: Sequence[Path]) -> list[str]:
    """Names of the base's tensors that any of these adapters adds to, from their headers."""
    matches = [_FACTOR.fullmatch(name) for path in paths for name in read_header(path / WEIGHTS)]
    return sorted({match["module"].removeprefix(_PREFIX) + ".weight" for match in matches if match})


def combined(terms: Sequence[tuple[Fraction, Adapter]]) -> dict[str, LowRank]:
    """The weighted sum of the updates of several adapters, by tensor name.

    The terms are put in the order of the adapters' content, so that the order of the branches changes no bit.
    """
    ordered = sorted(((c, adapter) for c, adapter in terms if c), key=lambda term: (term[1].sha256, term[0]))
    names = sorted({name for _, adapter in ordered for name in adapter.updates})
    return {
        name: LowRank([(c, adapter.updates[name]) for c, adapter in ordered if name in adapter.updates])
        for name in names
    }


def materialise(base: Checkpoint, adapter: Adapter, out: Path, *, device: str = "cpu", quiet: bool = True) -> int:
    """Write the weights of base + update in float32, each element the float64 sum rounded once; returns bytes read.

    Args:
        out: an existing folder; gets safetensors files only.
    """
    from motkit.merge_mean import MeanPlan
    from motkit.merge_stream import stream_merge

    updates = combined([(Fraction(1), adapter)])
    plan = MeanPlan([Fraction(1)])
    return stream_merge(plan, [base], "float32", out, method="mot", device=device, quiet=quiet, updates=updates)


def materialise_checkpoint(base: Path, adapter: Path, out: Path) -> None:
    """A whole checkpoint of base + update, float32, with the base's config and tokenizer."""
    checkpoint = read_checkpoint(base)
    out.mkdir()
    materialise(checkpoint, read_adapter(adapter, checkpoint), out)
    config = {key: value for key, value in checkpoint.config.items() if key != "torch_dtype"}
    text = json.dumps({**config, "dtype": "float32"}, indent=2, ensure_ascii=False) + "\n"
    (out / "config.json").write_text(text, encoding="utf-8")
    copy_tokenizer(base, out)


def write_adapter(out: Path, config: Any, factors: Mapping[str, "torch.Tensor"], base_name: str) -> None:
    """An adapter folder that peft loads: float32 factors by peft's names, and its config with nothing left to chance.

    Args:
        out: the folder to make.
        config: peft's LoraConfig.
        base_name: ``base_model_name_or_path``, as a person would ask for the base.
    """
    import torch
    from safetensors.torch import save_file

    out.mkdir()
    tensors = {name: tensor.detach().to("cpu", torch.float32).contiguous() for name, tensor in sorted(factors.items())}
    save_file(tensors, out / WEIGHTS, metadata={"format": "pt"})
    values = {**config.to_dict(), "base_model_name_or_path": base_name, "inference_mode": True}
    # peft writes its sets in the order of the process's hash seed.
    values = {key: sorted(value) if isinstance(value, set) else value for key, value in values.items()}
    text = json.dumps(values, indent=2, sort_keys=True) + "\n"
    (out / CONFIG).write_text(text, encoding="utf-8")


def extract_adapter(
    base: Path, merged: Path, out: Path, *, tensors: Sequence[str], rank: int, base_name: str, seed: int
) -> dict[str, Any]:
    """The update merged − base as one LoRA adapter: per tensor the best approximation of its rank (Eckart and Young).

    The update is taken and decomposed in float64. Singular vectors are computed in full for small matrices, else by
    randomised subspace iteration (Halko, Martinsson, Tropp 2011); the error is measured on what is written either way.

    Args:
        tensors: names of the weights that get factors.
        rank: of the factors; less where a matrix is smaller.

    Returns:
        ``{"rank", "relative_error", "per_tensor": {name: …}, "outside": …}``: Frobenius norms of (update − B·A) over
        those of the update. ``relative_error`` is over all tensors of the checkpoint, ``outside`` is the share of the
        update in tensors that have no factors (rounding to a narrower ``precision.carry``, say).
    """
    import torch
    from peft import LoraConfig
    from safetensors import safe_open

    before, after = read_checkpoint(base), read_checkpoint(merged)
    factors: dict[str, torch.Tensor] = {}
    per_tensor: dict[str, float] = {}
    total = missed = outside = 0.0

    wanted = set(tensors)
    for name, record in sorted(after.tensors.items()):
        if name not in before.tensors or not record.is_float:
            continue
        with (
            safe_open(before.tensors[name].file, framework="pt") as old,
            safe_open(record.file, framework="pt") as new,
        ):
            if name not in wanted:
                size = _distance(old.get_slice(name), new.get_slice(name), record.shape)
                total, outside = total + size, outside + size
                continue
            update = new.get_tensor(name).double() - old.get_tensor(name).double()
        size = float(update.square().sum())
        total += size
        left, right = _truncated(update, min(rank, *update.shape), seed)
        # What is written is float32; rows are filled up so that one rank serves every module.
        left, right = left.float(), right.float()
        error = float((update - left.double() @ right.double()).square().sum())
        missed += error
        per_tensor[name] = math.sqrt(error / size) if size else 0.0
        module = _PREFIX + name.removesuffix(".weight")
        factors[f"{module}.lora_A.weight"] = torch.nn.functional.pad(right, (0, 0, 0, rank - right.shape[0]))
        factors[f"{module}.lora_B.weight"] = torch.nn.functional.pad(left, (0, rank - left.shape[1]))
    modules = [name.removesuffix(".weight") for name in tensors]
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=modules, task_type="CAUSAL_LM")
    write_adapter(out, config, factors, base_name)
    return {
        "rank": rank,
        "relative_error": math.sqrt((missed + outside) / total) if total else 0.0,
        "outside": math.sqrt(outside / total) if total else 0.0,
        "per_tensor": per_tensor,
    }


def _distance(old: Any, new: Any, shape: Sequence[int]) -> float:
    """Σ (new − old)² of two slices of safetensors, in float64, a few rows at a time: an embedding may be large."""
    if not shape:
        return float((new[...].double() - old[...].double()).square())
    rows = max(1, (1 << 22) // max(math.prod(shape[1:]), 1))
    pieces = ((start, min(start + rows, shape[0])) for start in range(0, shape[0], rows))
    return math.fsum(float((new[a:b].double() - old[a:b].double()).square().sum()) for a, b in pieces)


def _truncated(update: "torch.Tensor", rank: int, seed: int) -> "tuple[torch.Tensor, torch.Tensor]":
    """(B, A) of rank ``rank`` with B·A nearest to ``update``, the singular values shared evenly between them."""
    import torch

    if min(update.shape) <= _FULL_SVD:
        u, s, vt = torch.linalg.svd(update, full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            u, s, v = torch.svd_lowrank(update, q=min(2 * rank + 8, *update.shape), niter=4)
        vt = v.T
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * vt[:rank]
