"""LoRA adapters as branches of a merge: which are named, how ``mot`` sums them, and how other methods get them.

A reference to an adapter is mergekit's ``base+adapter``; it stands for base + scaling·B·A. Plain ``mot`` adds the
averaged updates to the base in float64 and rounds once (`AdapterSum`). For every other method each such branch is
written out first, in float32, and merged like any other (`write_out`).
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from motkit.adapters import Adapter, is_adapter, materialise, read_adapter, stream_sum
from motkit.errors import UserError
from motkit.merge_config import adapter_reference, local_reference, map_models, model_path, reference_parts
from motkit.merge_inputs import Checkpoint, listed, read_checkpoint

Key = tuple[str, str]


@dataclass(frozen=True)
class AdapterSum:
    """A ``mot`` merge as one sum for all tensors: Σ coefficient · input + Σ coefficient · adapter's update."""

    inputs: list[Checkpoint]
    coefficients: list[Fraction]
    terms: list[tuple[Fraction, Adapter]]
    out_dtype: str | None

    def stream(self, out: Path, *, device: str, quiet: bool) -> int:
        """Merge from file to file; returns bytes read."""
        read = stream_sum(
            self.inputs, self.coefficients, self.terms, self.out_dtype, out, device=device, quiet=quiet
        )  # fmt: skip
        return read + sum(adapter.num_bytes for _, adapter in self.terms)


def branch_reference(branch: Path, base: Path | None) -> Path | dict[str, Any]:
    """A branch as a model reference; an adapter is one on the base.

    Raises:
        UserError: an adapter without a base.
    """
    if not is_adapter(branch):
        return branch
    if base is None:
        raise UserError(f"{branch}: a LoRA adapter, not a model; give the model that it was trained on with --base DIR")
    return adapter_reference(base, branch)


def _key(reference: Any) -> Key:
    """(absolute path of the base, of the adapter)."""
    return model_path(reference), os.path.abspath(str(reference_parts(reference)[1]))


def read_adapters(models: Sequence[Any], checkpoints: Mapping[str, Checkpoint]) -> dict[Key, Adapter]:
    """The adapters among the model references, each read against its base.

    Raises:
        UserError: as `read_adapter`, of all of them.
    """
    found, faults = {}, []
    for key in dict.fromkeys(_key(model) for model in models if reference_parts(model)[1]):
        try:
            found[key] = read_adapter(Path(key[1]), checkpoints[key[0]])
        except UserError as error:
            faults.append(str(error))
    if faults:
        raise UserError(listed(faults))
    return found


def takes_adapters(config: Mapping[str, Any]) -> bool:
    """Whether a merge config averages adapters without writing them out: plain ``mot`` over whole models."""
    shared = config.get("parameters") or {}
    settings = [shared, *((entry.get("parameters") or {}) for entry in config.get("models") or ())]
    return (
        config["merge_method"] == "mot"
        and config.get("models") is not None
        and not any(config.get(key) for key in ("tokenizer", "tokenizer_source", "chat_template"))
        and str(config.get("dtype") or "float32").removeprefix("torch.") == "float32"
        and not any(isinstance(value, list | dict) for setting in settings for value in setting.values())
    )


def adapter_sum(
    config: Mapping[str, Any], checkpoints: Mapping[str, Checkpoint], adapters: Mapping[Key, Adapter]
) -> AdapterSum | None:
    """The sum that a resolved config asks for; None if it names no adapter or `takes_adapters` not.

    Raises:
        UserError: weights that cannot be normalised, or a scale without a base.
    """
    if not adapters or not takes_adapters(config):
        return None
    from motkit.merge_methods import mot_coefficients, round_dtype

    shared, base = config.get("parameters") or {}, config.get("base_model")
    entries = [entry for entry in config["models"] if entry["model"] != base]
    weights = [(entry.get("parameters") or {}).get("weight", shared.get("weight", 1.0)) for entry in entries]
    scale = shared.get("scale", 1.0)
    round_dtype(config.get("out_dtype"))
    coefficients, rest = mot_coefficients([float(weight) for weight in weights], float(scale))
    models = [entry["model"] for entry in entries]
    if rest:
        if base is None:
            raise UserError(f"mot: parameter scale: {scale} needs a base; set base_model or give --base")
        models, coefficients = [*models, base], [*coefficients, rest]
    # Adapters on one base count it once, with the sum of their coefficients: exactly 1 if there is nothing else.
    shares: dict[str, Fraction] = {}
    terms = []
    for model, coefficient in zip(models, coefficients, strict=True):
        shares[model_path(model)] = shares.get(model_path(model), Fraction(0)) + coefficient
        if reference_parts(model)[1]:
            terms.append((coefficient, adapters[_key(model)]))
    inputs = [checkpoints[path] for path in shares]
    if any(checkpoint.names != inputs[0].names for checkpoint in inputs):
        return None  # experts fused in one input and not in another, which mergekit converts
    return AdapterSum(inputs, list(shares.values()), terms, config.get("out_dtype"))


def write_out(
    config: dict[str, Any],
    checkpoints: Mapping[str, Checkpoint],
    adapters: Mapping[Key, Adapter],
    folder: Path,
    *,
    device: str,
) -> tuple[dict[str, Any], list[Checkpoint]]:
    """Write every adapter out as a checkpoint of its own, base + update in float32.

    Args:
        folder: to make; the caller deletes it.

    Returns:
        (the config with those checkpoints in place of the references, the checkpoints).
    """
    folder.mkdir()
    paths = {key: folder / str(number) for number, key in enumerate(adapters)}
    for key, path in paths.items():
        materialise(checkpoints[key[0]], adapters[key], path, device=device)

    def replaced(reference: Any) -> Any:
        return local_reference(paths[_key(reference)]) if reference_parts(reference)[1] else reference

    changed: dict[str, Any] = map_models(config, replaced)
    return changed, [read_checkpoint(path) for path in paths.values()]
