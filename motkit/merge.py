"""Merge config + branches → merged checkpoint. The only module that runs mergekit.

A merge config is mergekit YAML with two placeholders, ``$student`` (where the round began) and ``$branches`` (one
entry becomes one per branch). ``merge_checkpoints`` runs it in five steps: resolve the config, read every input's
headers, check them against one another, merge, check and publish the result.

A LoRA adapter as a branch stands for base + scaling·B·A. Plain ``mot`` adds the averaged updates to the base in float64
and rounds once; for every other method each such branch is written out first, in float32, and merged like any other.

Plain merges with our own methods are streamed from file to file (`stream_merge`): memory does not grow with the model,
and NaN is found on the way. Everything else goes through mergekit's ``run_merge`` (`_run_mergekit`). Both give the same
bits for our methods.

What mergekit leaves to chance is pinned here: the donor of config and tokenizer, stale class-level caches, the model
card that asks the hub, output that is not atomic, unknown keys, tensors dropped silently, NaN.
"""

import contextlib
import dataclasses
import json
import logging
import os
import shutil
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from motkit.adapters import Adapter, combined, is_adapter, materialise, read_adapter
from motkit.checkpoint import TOKENIZER_FILES, copy_tokenizer
from motkit.errors import UserError
from motkit.merge_config import (
    adapter_reference,
    check_contract,
    check_merge_config,
    fetch,
    is_own_method,
    load_merge_config,
    local_reference,
    map_models,
    method_spec,
    model_path,
    reference_parts,
    references,
    resolve_merge_config,
)
from motkit.merge_inputs import (
    Checkpoint,
    check_compatible,
    listed,
    read_checkpoint,
    read_header,
    read_json,
    tensor_layout,
    tokenizer_file,
)
from motkit.merge_stream import non_finite, stream_merge
from motkit.rundir import publish
from motkit.spans import TORCH_NAMES

if TYPE_CHECKING:
    from motkit.merge_plan import MergePlan

__all__ = [
    "MergeReport",
    "check_merge_config",
    "load_merge_config",
    "merge_checkpoints",
    "merge_with_server_step",
    "resolve_merge_config",
]

_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")


@dataclass(frozen=True)
class MergeReport:
    """What a merge did.

    ``bytes_read`` and ``bytes_written`` count tensor data (mergekit's methods read the inputs twice: once to look for
    NaN); ``parameters`` counts the elements of the output.
    """

    out: Path
    method: str
    num_inputs: int
    num_tensors: int
    parameters: int
    bytes_read: int
    bytes_written: int
    seconds: float


def _run_mergekit(
    config: dict[str, Any], inputs: Sequence[Checkpoint], out: Path, seed: int, device: str, quiet: bool
) -> None:
    """Run a config without placeholders through ``mergekit.merge.run_merge``.

    Raises:
        UserError: mergekit refused it (its one-line reason).
    """
    import random

    import numpy
    import torch
    import transformers
    from mergekit.architecture.auto import infer_architecture_info
    from mergekit.config import MergeConfiguration
    from mergekit.io.tasks import LoaderCache
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    import motkit.merge_methods  # noqa: F401  registers our methods

    def forget() -> None:
        # Both are keyed by path and outlive a merge: a checkpoint replaced at the same path would be merged as it was.
        LoaderCache.loaders.clear()
        infer_architecture_info.cache_clear()

    wants_tokenizer = any(config.get(key) for key in ("tokenizer", "tokenizer_source", "chat_template"))
    scratch = out / ".inputs"
    scratch.mkdir()
    links = {
        str(checkpoint.path): str(_without_dropped(checkpoint, scratch / str(number)))
        for number, checkpoint in enumerate(inputs)
        if checkpoint.dropped
    }
    config = map_models(config, lambda reference: links.get(model_path(reference), reference))
    options = MergeOptions(
        random_seed=seed,
        device=device,
        quiet=quiet,
        copy_tokenizer=wants_tokenizer,
        write_model_card=False,  # its card asks the hub about local paths
        lora_merge_cache=str(scratch),  # fresh: mergekit reuses an old adapter merge of the same name
    )
    states = random.getstate(), numpy.random.get_state()
    forget()
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), _quiet_logs(transformers):
            warnings.simplefilter("ignore")
            run_merge(MergeConfiguration.model_validate(config), str(out), options)
    except (RuntimeError, ValueError) as error:
        if isinstance(error, UnicodeError) or "os error" in str(error):
            raise
        reason = " ".join(str(error).split())
        raise UserError(f"mergekit refuses this merge ({config['merge_method']}): {reason}") from error
    finally:
        random.setstate(states[0])
        numpy.random.set_state(states[1])
        forget()
        shutil.rmtree(scratch)


@contextlib.contextmanager
def _quiet_logs(transformers: Any) -> Iterator[None]:
    """No log lines below an error, no progress bar of transformers."""
    level = logging.root.manager.disable
    bars = transformers.utils.logging.is_progress_bar_enabled()
    logging.disable(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.disable(level)
        if bars:
            transformers.utils.logging.enable_progress_bar()


def _without_dropped(checkpoint: Checkpoint, folder: Path) -> Path:
    """A folder of links to a checkpoint whose index does not list the dropped tensors.

    mergekit would merge them as tensors of their own, and a randomised method would break the tie.
    """
    folder.mkdir()
    for file in checkpoint.path.iterdir():
        if file.name != "model.safetensors.index.json":
            (folder / file.name).symlink_to(file.resolve())
    weight_map = {n: r.file.name for n, r in checkpoint.tensors.items() if n not in checkpoint.dropped}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    return folder


def _lost_tensors(expected: Checkpoint, merged: Checkpoint, whole_models: bool, maps_tokens: bool) -> list[str]:
    """Faults of the result's set of tensors: mergekit drops in silence what its architecture does not know.

    Args:
        expected: the donor.
        merged: the result.
        whole_models: whether the result must have the donor's tensors, or only those that its own config asks for.
        maps_tokens: whether the embeddings may have another size.
    """
    if whole_models:
        before, after = tensor_layout(expected, expected.names), tensor_layout(merged, merged.names)
        if before == after or (maps_tokens and before.keys() == after.keys()):
            return []
        missing = [name for name in before if before[name] != after.get(name)]
        extra = [name for name in after if name not in before]
    else:
        wanted = _architecture_tensors(merged.path)
        missing, extra = sorted((wanted or set()) - merged.names), []
    remedy = "mergekit's definition of this architecture does not know it; merge with mot"
    return [
        *(f"{expected.path}: {name}: lost in the merge: {remedy}" for name in missing),
        *(f"{name}: in the result, but not in {expected.path}" for name in extra),
    ]


def _architecture_tensors(path: Path) -> set[str] | None:
    """Tensor names that transformers would load from ``path``'s config, tied ones left out; None if it cannot tell."""
    import torch
    import transformers

    try:
        with torch.device("meta"):
            config = transformers.AutoConfig.from_pretrained(path)
            model = getattr(transformers, config.architectures[0])(config)
    except Exception:  # an architecture that this transformers does not have: no second opinion
        return None
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    return {name for name in model.state_dict() if name not in tied}


def _write_config(donor: Path, out: Path, dtype: str) -> None:
    """``config.json`` of the donor with the output's dtype.

    If mergekit wrote one, what it changed on purpose is taken over: the number of layers, the size of the vocabulary.
    """
    config = read_json(donor / "config.json")
    if (out / "config.json").is_file():
        from transformers import AutoConfig

        before = json.loads(AutoConfig.from_pretrained(donor).to_json_string(use_diff=True))
        after = read_json(out / "config.json")
        ignored = ("dtype", "torch_dtype", "transformers_version", "_name_or_path", "architectures")
        config |= {k: v for k, v in after.items() if k not in ignored and k in before and before[k] != v}

    def set_dtype(part: dict[str, Any]) -> None:
        for key, value in part.items():
            if key in ("dtype", "torch_dtype") and isinstance(value, str):
                part[key] = dtype
            elif isinstance(value, dict):
                set_dtype(value)

    set_dtype(config)
    if "torch_dtype" not in config:
        config["dtype"] = dtype
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (out / "config.json").write_text(text, encoding="utf-8")


def _result_dtype(config: dict[str, Any], out: Path) -> str:
    """Name of the result's dtype: what the config asks for, else what most of its tensors have."""
    asked = config.get("out_dtype") or config.get("dtype")
    if asked:
        return str(asked).removeprefix("torch.")
    records = [record for file in sorted(out.glob("*.safetensors")) for record in read_header(file).values()]
    codes = sorted(record.dtype for record in records if record.dtype in TORCH_NAMES)
    return TORCH_NAMES[max(codes, key=codes.count)] if codes else "float32"


def _copy_donor_files(donor: Path, out: Path, inputs: Sequence[str], keep_tokenizer: bool) -> None:
    """Tokenizer, chat template, generation settings and model code of the donor, byte for byte.

    A donor without a tokenizer gets that of the first input that has one. With ``keep_tokenizer`` the tokenizer that
    mergekit made stays.
    """
    if keep_tokenizer:
        if (donor / "generation_config.json").is_file():
            shutil.copyfile(donor / "generation_config.json", out / "generation_config.json")
    else:
        copy_tokenizer(donor, out)
        source = next((Path(path) for path in inputs if tokenizer_file(Path(path)) is not None), None)
        if tokenizer_file(out) is None and source is not None:
            for file in (source / name for name in TOKENIZER_FILES):
                if file.is_file():
                    shutil.copyfile(file, out / file.name)
    for file in [*(donor / name for name in _PROCESSOR_FILES), *donor.glob("*.py")]:
        if file.is_file():
            shutil.copyfile(file, out / file.name)


def _write_card(out: Path, name: str, config: dict[str, Any], donor: Path, inputs: Sequence[Path]) -> None:
    """``mergekit_config.yml``, and a README.md that says what was merged and how (without local paths)."""
    text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
    (out / "mergekit_config.yml").write_text(text, encoding="utf-8")
    method, reference = config["merge_method"], method_spec(config["merge_method"]).reference_url
    source = f" ([source]({reference}))" if reference else ""
    merged = "\n".join(f"- `{path.parent.name}/{path.name}`" for path in inputs)
    card = f"""---
library_name: transformers
tags:
- motkit
- mergekit
- merge
---
# {name}

A merge of {len(inputs)} checkpoints by method `{method}`{source}, made with motkit on mergekit.

Config and tokenizer are those of `{donor.name}`. Merged were:

{merged}

`mergekit_config.yml` holds the merge config as it was run.
"""
    (out / "README.md").write_text(card, encoding="utf-8")


@dataclass(frozen=True)
class _Streamed:
    """A merge by one plan for all tensors. ``adapters``: what is added to the inputs, with its coefficient."""

    plan: "MergePlan"
    inputs: list[Checkpoint]
    out_dtype: str | None
    adapters: list[tuple[Fraction, Adapter]]


def _streamed(
    config: dict[str, Any], checkpoints: Mapping[str, Checkpoint], adapters: Mapping[tuple[str, str], Adapter]
) -> _Streamed | None:
    """What `stream_merge` needs; None for a merge that needs mergekit (its methods, filters, gradients, slices, …).

    Raises:
        UserError: parameters out of range, or a scale without a base.
    """
    from motkit.merge_methods import OWN_METHODS

    method = OWN_METHODS.get(config["merge_method"])
    if method is None or "models" not in config:
        return None
    if any(config.get(key) for key in ("tokenizer", "tokenizer_source", "chat_template")):
        return None
    shared, base = config.get("parameters") or {}, config.get("base_model")
    entries = [entry for entry in config["models"] if entry["model"] != base]
    adapted = any(reference_parts(entry["model"])[1] for entry in entries)
    if adapted and config["merge_method"] != "mot":
        return None

    values: dict[str, Any] = {}
    for parameter in method.spec.parameters:
        default = None if parameter.required else parameter.default
        common = shared.get(parameter.name, default)
        if parameter in method.spec.input_parameters:
            each = [(entry.get("parameters") or {}).get(parameter.name, common) for entry in entries]
        else:
            each = [common]
        if any(isinstance(value, list | dict) for value in each):
            return None
        checked = [parameter.validate(value) for value in each]
        values[parameter.name] = checked if parameter in method.spec.input_parameters else checked[0]

    from motkit.merge_float import round_dtype

    out_dtype = config.get("out_dtype")
    round_dtype(out_dtype, method.spec.name)
    plan = method.plan(len(entries), values)
    models = [entry["model"] for entry in entries]
    if plan.uses_base:
        if base is None:
            raise UserError(
                f"{method.spec.name}: parameter scale: {values['scale']} needs a base; set base_model or give --base"
            )
        models.append(base)
    inputs, terms = [checkpoints[model_path(model)] for model in models], []
    if adapted:
        from motkit.merge_mean import MeanPlan

        assert isinstance(plan, MeanPlan)
        # Adapters on one base count it once, with the sum of their coefficients: exactly 1 if there is nothing else.
        shares: dict[str, Fraction] = {}
        for model, coefficient in zip(models, plan.coefficients, strict=True):
            shares[model_path(model)] = shares.get(model_path(model), Fraction(0)) + coefficient
            if reference_parts(model)[1]:
                terms.append((coefficient, adapters[_adapter_key(model)]))
        plan, inputs = MeanPlan(list(shares.values())), [checkpoints[path] for path in shares]
    if any(checkpoint.names != inputs[0].names for checkpoint in inputs):
        return None  # experts fused in one input and not in another, which mergekit converts
    exact = {None: None, "bfloat16": {"BF16"}, "float16": {"F16"}}.get(config.get("dtype"), set())
    if exact is not None and any(r.is_float and r.dtype not in exact for c in inputs for r in c.tensors.values()):
        return None  # mergekit casts the inputs to a narrower dtype first
    return _Streamed(plan, inputs, out_dtype, terms)


def _adapter_key(reference: Any) -> tuple[str, str]:
    """(absolute path of the base, of the adapter)."""
    return model_path(reference), os.path.abspath(str(reference_parts(reference)[1]))


def _read_adapters(models: Sequence[Any], checkpoints: Mapping[str, Checkpoint]) -> dict[tuple[str, str], Adapter]:
    """The adapters among the references, each read against its base."""
    found, faults = {}, []
    for key in dict.fromkeys(_adapter_key(model) for model in models if reference_parts(model)[1]):
        try:
            found[key] = read_adapter(Path(key[1]), checkpoints[key[0]])
        except UserError as error:
            faults.append(str(error))
    if faults:
        raise UserError(listed(faults))
    return found


def _write_out(
    adapters: Mapping[tuple[str, str], Adapter], checkpoints: Mapping[str, Checkpoint], folder: Path, device: str
) -> dict[tuple[str, str], Checkpoint]:
    """Every adapter as a checkpoint of its own, base + update in float32."""
    written = {}
    for number, (key, adapter) in enumerate(adapters.items()):
        out = folder / str(number)
        out.mkdir(parents=True)
        base = checkpoints[key[0]]
        materialise(base, adapter, out, device=device)
        _write_config(base.path, out, "float32")
        copy_tokenizer(base.path, out)
        written[key] = read_checkpoint(out)
    return written


def takes_adapters(config: Mapping[str, Any]) -> bool:
    """Whether a merge config averages adapters without writing them out: plain ``mot`` over whole models."""
    shared = config.get("parameters") or {}
    settings = [shared, *((entry.get("parameters") or {}) for entry in config.get("models") or ())]
    values = [value for setting in settings for value in setting.values()]
    return (
        config["merge_method"] == "mot"
        and "models" in config
        and not any(config.get(key) for key in ("tokenizer", "tokenizer_source", "chat_template"))
        and str(config.get("dtype", "float32")).removeprefix("torch.") == "float32"
        and not any(isinstance(value, list | dict) for value in values)
    )


def merge_checkpoints(
    config: str | Path | Mapping[str, Any],
    out: str | Path,
    *,
    base: str | Path | None = None,
    branches: Sequence[str | Path] = (),
    weights: Sequence[float] | None = None,
    out_dtype: str | None = None,
    seed: int = 0,
    device: str = "cpu",
    quiet: bool = False,
) -> MergeReport:
    """Merge checkpoints as a merge config says, and publish the result whole or not at all.

    Args:
        config: see `load_merge_config`.
        out: the folder to make; it must not exist.
        base: value of ``$student``, and donor of config and tokenizer.
        branches: values of ``$branches``: checkpoints, or folders of peft LoRA adapters trained on ``base``.
        weights: one per branch, not negative; multiplies the weight that the config has for ``$branches``.
        out_dtype: dtype of the result: bfloat16, float16 or float32 (mergekit's methods: also float64); None for
            the config's ``out_dtype``, else its ``dtype``, else the inputs' own.
        seed: for randomised methods (dare_ties, della): same seed, same bytes. The caller's random state is untouched.
        device: where the arithmetic runs, ``cpu`` or ``cuda``. ``mot`` gives the same bits on both.
        quiet: no progress bar.

    Returns:
        Sizes, counts and time.

    Raises:
        UserError: whatever is wrong with config, inputs or disk; faults of all inputs together, one line each.
    """
    started = time.perf_counter()
    out = Path(out)
    if out.exists() or out.is_symlink():
        raise UserError(f"{out}: exists already; delete it or choose another folder")
    loaded = load_merge_config(config)
    student = Path(base) if base is not None else None
    resolved = resolve_merge_config(
        loaded,
        base=student,
        branches=[_branch_reference(Path(branch), student) for branch in branches],
        out_dtype=out_dtype,
        weights=weights,
    )
    resolved = map_models(resolved, fetch)
    # The donor of config and tokenizer comes first, also where mergekit must not see a base.
    donor_reference = local_reference(student) if student is not None else loaded.get("base_model")
    models = references({key: resolved.get(key) for key in ("base_model", "models", "slices", "modules")})
    merged_paths = list(dict.fromkeys(map(model_path, models)))
    donor = Path(model_path(fetch(donor_reference)) if donor_reference is not None else merged_paths[0])
    whole_models = "models" in resolved
    if whole_models:
        check_contract(resolved)
        _check_roles(resolved, student, [Path(branch) for branch in branches])

    maps_tokens = any(resolved.get(key) for key in ("tokenizer", "tokenizer_source"))
    checkpoints = _read_inputs(
        [str(donor), *(path for path in merged_paths if path != str(donor))], whole_models, not maps_tokens
    )
    adapters = _read_adapters(models, checkpoints)
    streamed = _streamed(resolved, checkpoints, adapters)
    inputs = streamed.inputs if streamed is not None else [checkpoints[path] for path in merged_paths]
    plain = {model_path(model) for model in models if not reference_parts(model)[1]}
    listed_paths = {model_path(m) for m in references({**resolved, "base_model": None}) if not reference_parts(m)[1]}
    named = [c.path for c in inputs if not adapters or str(c.path) in listed_paths]
    named += [adapter.path for adapter in adapters.values()]
    with publish(out) as partial:
        if streamed is not None:
            bytes_read = stream_merge(
                streamed.plan,
                streamed.inputs,
                streamed.out_dtype,
                partial,
                method=resolved["merge_method"],
                device=device,
                quiet=quiet,
                updates=combined(streamed.adapters),
            ) + sum(adapter.num_bytes for _, adapter in streamed.adapters)
        else:
            scratch, runnable = partial / ".adapters", resolved
            if adapters:
                whole = _write_out(adapters, checkpoints, scratch, device)
                inputs = [*(c for c in inputs if str(c.path) in plain), *whole.values()]
                written = {key: local_reference(checkpoint.path) for key, checkpoint in whole.items()}
                runnable = map_models(resolved, lambda r: written[_adapter_key(r)] if reference_parts(r)[1] else r)
            faults, bytes_read = non_finite(inputs, quiet, "Checking inputs")
            if faults:
                raise UserError(listed(faults))
            bytes_read += sum(checkpoint.num_bytes for checkpoint in inputs)
            _run_mergekit(runnable, inputs, partial, seed, device, quiet)
            if adapters:
                shutil.rmtree(scratch)
        _write_config(donor, partial, _result_dtype(resolved, partial))
        _copy_donor_files(donor, partial, list(checkpoints), maps_tokens or bool(resolved.get("chat_template")))
        _write_card(partial, out.name, resolved, donor, named)
        merged = read_checkpoint(partial)
        faults = _lost_tensors(checkpoints[str(donor)], merged, whole_models, maps_tokens)
        if not faults and streamed is None:
            faults = [
                f"merge_method {resolved['merge_method']}: the result is not finite: {line.split(': ')[1]}"
                for line in non_finite([merged], quiet, "Checking result")[0]
            ]
        if faults:
            raise UserError(listed(faults))
    return MergeReport(
        out=out,
        method=resolved["merge_method"],
        num_inputs=len(named),
        num_tensors=len(merged.tensors),
        parameters=sum(record.numel for record in merged.tensors.values()),
        bytes_read=bytes_read,
        bytes_written=merged.num_bytes,
        seconds=time.perf_counter() - started,
    )


def _branch_reference(branch: Path, student: Path | None) -> Any:
    """A branch as a model reference; an adapter is one on the base.

    Raises:
        UserError: an adapter without a base.
    """
    if not is_adapter(branch):
        return branch
    if student is None:
        raise UserError(f"{branch}: a LoRA adapter, not a model; give the model that it was trained on with --base DIR")
    return adapter_reference(student, branch)


def merge_with_server_step(
    config: str | Path | Mapping[str, Any],
    out: Path,
    server_out: Path,
    *,
    base: Path,
    branches: Sequence[Path],
    velocity: Path | None,
    server: Mapping[str, Any],
    out_dtype: str,
    weights: Sequence[float] | None = None,
    seed: int = 0,
    quiet: bool = False,
) -> MergeReport:
    """`merge_checkpoints`, then `motkit.merge_server.server_step` from ``base`` along the mean update.

    Args:
        server_out: a folder to make for the new velocity.
        velocity: that of the round before; None in the first.
        server: ``learning_rate``, ``momentum``, ``nesterov``.
        out_dtype: of the weights after the step; the merge itself is in float32.
    """
    from motkit.merge_server import server_step

    mean = out.with_name(out.name + ".mean")
    report = merge_checkpoints(
        config, mean, base=base, branches=branches, weights=weights, out_dtype="float32", seed=seed, quiet=quiet
    )
    started = time.perf_counter()
    out.mkdir()
    server_out.mkdir()
    server_step(base, mean, velocity, out, server_out, out_dtype=out_dtype, quiet=quiet, **server)
    _write_config(mean, out, out_dtype)
    for file in mean.iterdir():
        if file.is_file() and not (out / file.name).exists() and not file.name.startswith("model"):
            shutil.copyfile(file, out / file.name)
    shutil.rmtree(mean)
    written = sum(path.stat().st_size for folder in (out, server_out) for path in folder.glob("*.safetensors"))
    return dataclasses.replace(
        report, out=out, bytes_written=written, seconds=report.seconds + time.perf_counter() - started
    )


def _check_roles(config: dict[str, Any], student: Path | None, branches: Sequence[Path]) -> None:
    """A base is not a branch: mergekit would quietly drop the one or the other.

    Raises:
        UserError: the student is also given as a branch, or one of our methods has a weight for its base.
    """
    if student is not None and os.path.realpath(student) in map(os.path.realpath, branches):
        raise UserError(f"{student}: given as the base and as a branch; leave it out of the branches")
    base, method = config.get("base_model"), config["merge_method"]
    for entry in config["models"] if is_own_method(method) and base is not None else ():
        if entry["model"] == base and "weight" in (entry.get("parameters") or {}):
            raise UserError(
                f"{model_path(base)}: has a weight, but {method} never averages its base as a branch; "
                "leave base_model out to average it, or leave the weight out"
            )


def _read_inputs(paths: Sequence[str], same_shapes: bool, same_vocabulary: bool) -> dict[str, Checkpoint]:
    """Checkpoints by path, read and compared with the first."""
    found, faults = [], []
    for path in paths:
        try:
            found.append(read_checkpoint(Path(path)))
        except UserError as error:
            faults.append(str(error))
    if not faults:
        found, faults = check_compatible(found, same_shapes, same_vocabulary)
    if faults:
        raise UserError(listed(faults))
    return {str(checkpoint.path): checkpoint for checkpoint in found}
