"""Merge configs: mergekit YAML with the placeholders ``$student`` and ``$branches``, read, checked and resolved.

mergekit ignores keys and parameters that it does not know; here they are refused, with the nearest name.
"""

import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

import yaml

from motkit.bundle import bundled_files
from motkit.checkpoint import find_checkpoint, pruned_fault
from motkit.errors import UserError, nearest

if TYPE_CHECKING:
    from mergekit.merge_methods import MergeMethodSpec

STUDENT, BRANCHES = "$student", "$branches"

# Keys that mergekit 0.1.5 reads (mergekit/config.py). It ignores any other key without a word.
_TOP_KEYS = [
    *("modules", "slices", "models", "merge_method", "base_model", "dtype", "out_dtype", "parameters"),
    *("tokenizer_source", "tokenizer", "chat_template"),
]
_MODEL_KEYS = ("model", "parameters")
_SOURCE_KEYS = ("model", "layer_range", "parameters")
_SLICE_KEYS = ("sources", "base_model", "residual_weight", "parameters")
_MODULE_KEYS = ("slices", "models", "parameters")
_TOKENIZER_KEYS = ("source", "tokens", "pad_to_multiple_of")
_CONDITION_KEYS = ("value", "filter")
_DTYPES = ("bfloat16", "float16", "float32", "float64")


class _StrictLoader(yaml.SafeLoader):
    """Safe YAML that reads ``1e-5`` as a number (PyYAML wants ``1.0e-5``) and refuses a key given twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = key_node.value
            if key in seen and key != "<<":
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            seen.add(key)
        result: dict[Any, Any] = super().construct_mapping(node, deep)
        return result


_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*(?:\.[0-9_]*)?|\.[0-9_]+)[eE][-+]?[0-9]+$"),
    list("-+0123456789."),
)


def load_merge_config(config: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    """Read and check a merge config.

    Args:
        config: a bundled config's bare name (``mot``), a path to a YAML file, or the mapping itself. Relative model
            paths in a file resolve against that file.

    Returns:
        mergekit's YAML as a dict, placeholders still in it.

    Raises:
        UserError: the file is missing or is not valid YAML; a key, a merge method or a parameter that mergekit does
            not know; a parameter that is not finite. All faults at once, one line each.
    """
    if isinstance(config, Mapping):
        label, folder, value = "merge config", Path.cwd(), _plain(config)
    else:
        path = _config_path(config)
        label, folder = str(config), path.parent.absolute()
        try:
            value = yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictLoader)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            problem = " ".join(str(error).split())
            raise UserError(f"{label}: not valid YAML: {problem}") from error
    if not isinstance(value, dict):
        raise UserError(f"{label}: expected a mapping with merge_method and models, got {type(value).__name__}")
    faults = _config_faults(value)
    if faults:
        raise UserError("\n".join(f"{label}: {fault}" for fault in faults))
    resolved: dict[str, Any] = map_models(value, lambda reference: _absolute(reference, folder))
    return resolved


def _plain(value: Any) -> Any:
    """A deep copy of plain dicts and lists (what came may be a library's own mapping types)."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _config_path(config: str | Path) -> Path:
    path = Path(config).expanduser()
    if path.is_file():
        return path
    bundled = bundled_files("merge_configs")
    if str(config) in bundled:
        return bundled[str(config)]
    known = f"bundled configs: {', '.join(bundled) or 'none'}"
    raise UserError(f"{config}: merge config not found; give a path to a YAML file or a bundled name ({known})")


def method_spec(method: str) -> "MergeMethodSpec":
    from mergekit import merge_methods

    import motkit.merge_methods  # noqa: F401  registers our methods

    return merge_methods.get(method).spec


def is_own_method(method: str) -> bool:
    """Whether a merge method is one of ours."""
    from motkit.merge_methods import OWN_METHODS

    return method in OWN_METHODS


def _config_faults(config: dict[str, Any]) -> list[str]:
    """What is wrong with a merge config in itself, one line each."""
    faults: list[str] = []

    def mapping(value: Any, where: str, keys: Sequence[str] | None = None) -> dict[str, Any]:
        if not isinstance(value, dict):
            faults.append(f"{where}: expected a mapping, got {type(value).__name__}")
            return {}
        for key in value:
            if keys is not None and key not in keys:
                faults.append(f"{where}: unknown key {key!r}{nearest(key, keys)}".removeprefix(": "))
        return value

    def entries(value: Any, where: str) -> list[Any]:
        if not isinstance(value, list) or not value:
            faults.append(f"{where}: expected a list with at least one entry")
            return []
        return value

    mapping(config, "", _TOP_KEYS)
    method = config.get("merge_method")
    spec = None
    if not isinstance(method, str):
        faults.append("merge_method: missing; name one, such as merge_method: mot")
    else:
        try:
            spec = method_spec(method)
        except RuntimeError:
            from mergekit.merge_methods import registered_methods

            known = sorted(m.spec.name for m in registered_methods())
            faults.append(f"merge_method: unknown method {method!r}{nearest(method, known)}")

    def parameters(owner: dict[str, Any], where: str, per_input: bool) -> None:
        found = owner.get("parameters")
        if found is None or spec is None:
            return
        known = {parameter.name: parameter for parameter in spec.parameters}
        for name, setting in mapping(found, f"{where}parameters").items():
            here = f"{where}parameters.{name}"
            if name not in known:
                names = list(known)
                hint = nearest(name, names) if names else f"; {method} has no parameters"
                faults.append(f"{here}: merge method {method!r} has no such parameter{hint}")
                continue
            if per_input and known[name].scope.value == "shared":
                faults.append(f"{here}: one value for the whole merge; move it to the top-level parameters")
                continue
            for condition in setting if isinstance(setting, list) else [setting]:
                if isinstance(condition, dict):
                    mapping(condition, here, _CONDITION_KEYS)
            for value in _setting_values(setting):
                try:
                    checked = known[name].validate(value)
                except ValueError:
                    faults.append(f"{here}: expected {_type_name(known[name].value_type)}, got {value!r}")
                    continue
                if isinstance(checked, float) and not math.isfinite(checked):
                    faults.append(f"{here}: expected a finite number, got {checked}")

    def models(owner: dict[str, Any], key: str, where: str, keys: Sequence[str]) -> None:
        for index, entry in enumerate(entries(owner[key], f"{where}{key}")):
            here = f"{where}{key}[{index}]"
            entry = mapping(entry, here, keys)
            if entry and not isinstance(entry.get("model"), (str, dict)):
                faults.append(f"{here}.model: missing; give a path, a hub id, {STUDENT} or {BRANCHES}")
            parameters(entry, f"{here}.", per_input=True)

    def slices(owner: dict[str, Any], where: str) -> None:
        for index, entry in enumerate(entries(owner["slices"], f"{where}slices")):
            here = f"{where}slices[{index}]"
            entry = mapping(entry, here, _SLICE_KEYS)
            if "sources" in entry:
                models(entry, "sources", f"{here}.", _SOURCE_KEYS)
            parameters(entry, f"{here}.", per_input=False)

    def body(owner: dict[str, Any], where: str) -> None:
        if owner.get("models") is not None:
            models(owner, "models", where, _MODEL_KEYS)
        if owner.get("slices") is not None:
            slices(owner, where)

    if sum(config.get(key) is not None for key in ("models", "slices", "modules")) != 1:
        faults.append("expected exactly one of models, slices, modules")
    body(config, "")
    if config.get("modules") is not None:
        modules = config["modules"]
        for name, module in mapping(modules, "modules").items():
            module = mapping(module, f"modules.{name}", _MODULE_KEYS)
            body(module, f"modules.{name}.")
            parameters(module, f"modules.{name}.", per_input=False)
    parameters(config, "", per_input=False)
    if config.get("tokenizer") is not None:
        mapping(config["tokenizer"], "tokenizer", _TOKENIZER_KEYS)
    for key in ("dtype", "out_dtype"):
        if config.get(key) is not None:
            faults += [f"{key}: {fault}" for fault in _dtype_faults(config[key])]
    for reference in references(config):
        if isinstance(reference, str) and reference.startswith("$") and reference not in (STUDENT, BRANCHES):
            faults.append(f"unknown placeholder {reference!r}; known: {STUDENT}, {BRANCHES}")
    return faults


def _type_name(value_type: Any) -> str:
    if get_origin(value_type) is Literal:
        return " or ".join(map(str, get_args(value_type)))
    names = {float: "a number", int: "a whole number", bool: "true or false", str: "text"}
    return names.get(value_type, str(value_type))


def _dtype_faults(name: object) -> list[str]:
    if str(name).removeprefix("torch.") in _DTYPES:
        return []
    return [f"unknown dtype {name!r}{nearest(name, _DTYPES)}"]


def _setting_values(setting: Any) -> Iterator[Any]:
    """The scalars in a parameter setting: a value, a gradient (a list), or conditionals ``{value, filter}``."""
    for item in setting if isinstance(setting, list) else [setting]:
        if isinstance(item, dict):
            yield from _setting_values(item.get("value"))
        else:
            yield item


def map_models(node: Any, change: Callable[[Any], Any]) -> Any:
    """A copy of a merge config with ``change`` applied to every model reference in it."""
    if isinstance(node, list):
        return [map_models(item, change) for item in node]
    if not isinstance(node, dict):
        return node
    result = {}
    for key, value in node.items():
        names_model = key in ("model", "base_model") and value is not None
        names_tokenizer = key in ("tokenizer_source", "source") and isinstance(value, str)
        if names_model or (names_tokenizer and value not in ("union", "base")):
            result[key] = change(value)
        elif key in ("parameters", "chat_template"):
            result[key] = _plain(value)
        else:
            result[key] = map_models(value, change)
    return result


def references(config: dict[str, Any]) -> list[Any]:
    """Every model reference in a merge config, in order."""
    found: list[Any] = []

    def note(reference: Any) -> Any:
        found.append(reference)
        return reference

    map_models(config, note)
    return found


def _absolute(reference: Any, folder: Path) -> Any:
    """A model reference with its existing local paths made absolute; placeholders and hub ids are left alone.

    mergekit reads ``a+b`` as base and LoRA, and ``a@b`` as a revision. A path that has such a sign in its name is
    handed over as a mapping, which mergekit takes as it is.
    """
    if not isinstance(reference, str) or reference.startswith("$"):
        return reference
    whole = folder / Path(reference).expanduser()
    if whole.exists():
        return _path_reference(whole)
    parts = [(part, folder / Path(part).expanduser()) for part in reference.split("+")]
    return "+".join(os.path.abspath(path) if path.exists() else part for part, path in parts)


def _path_reference(path: Path) -> Any:
    absolute = os.path.abspath(path)
    return {"model": {"path": absolute}} if "+" in absolute or "@" in absolute else absolute


def resolve_merge_config(
    config: dict[str, Any],
    *,
    base: Path | None,
    branches: Sequence[Path | Mapping[str, Any]],
    out_dtype: str | None,
    weights: Sequence[float] | None = None,
) -> dict[str, Any]:
    """Put real models in the place of the placeholders, so that mergekit can run the result.

    Args:
        config: from `load_merge_config`.
        base: replaces ``$student``; also becomes ``base_model`` if the config names none and its method uses one.
        branches: an entry ``model: $branches`` becomes one entry per branch, its parameters copied as they are (a list
            stays a mergekit gradient over layers in each of them). ``base_model: $branches`` is the first branch.
        out_dtype: overrides the config's ``out_dtype``.
        weights: one per branch, not negative; multiplies the weight that the config has for ``$branches``.

    Returns:
        A config without placeholders, local paths absolute. ``base_model`` is left out for a method that knows no base
        (``linear``): mergekit would add the base as one more input. For our methods with a known output dtype,
        ``round_to`` is set to it, so that the result is rounded once, and an upcast by ``dtype`` is dropped: the
        kernels take the checkpoints' own dtypes.

    Raises:
        UserError: a placeholder without a value, a value without a placeholder, or weights that the config cannot take.
    """
    own_weight = _branch_weight(config) if weights is not None else 1.0
    found = references(config)
    if STUDENT in found and base is None:
        raise UserError(f"merge config: {STUDENT} has no value; give the student with --base DIR")
    if BRANCHES in found and not branches:
        raise UserError(f"merge config: {BRANCHES} has no value; give every branch with --branch DIR")
    if branches and BRANCHES not in found:
        raise UserError(
            f"merge config: {len(branches)} branches given, but no entry 'model: {BRANCHES}' to put them in; "
            "add one or leave --branch out"
        )
    if out_dtype is not None and _dtype_faults(out_dtype):
        raise UserError(f"out_dtype: {_dtype_faults(out_dtype)[0]}")
    student = local_reference(base) if base is not None else None
    branch_references = [local_reference(branch) for branch in branches]

    def expand(node: Any) -> Any:
        if isinstance(node, list):
            result = []
            for item in node:
                if isinstance(item, dict) and item.get("model") == BRANCHES:
                    entries = [_plain({**item, "model": reference}) for reference in branch_references]
                    for entry, weight in zip(entries, weights or [], strict=weights is not None):
                        entry["parameters"] = {**(entry.get("parameters") or {}), "weight": own_weight * weight}
                    result += entries
                else:
                    result.append(expand(item))
            return result
        return {key: expand(value) for key, value in node.items()} if isinstance(node, dict) else node

    if config.get("base_model") == BRANCHES:
        config = {**config, "base_model": branch_references[0]}
    resolved = map_models(expand(config), lambda reference: student if reference == STUDENT else reference)
    if BRANCHES in references(resolved):
        raise UserError(f"merge config: {BRANCHES} can only stand as base_model or as the model of an entry")
    assert isinstance(resolved, dict)
    if out_dtype is not None:
        resolved["out_dtype"] = out_dtype

    ignores_base = method_spec(resolved["merge_method"]).contract.base.value in ("ignored", "forbidden")
    listed = [r for key in ("models", "slices", "modules") for r in references({key: resolved.get(key)})]
    if resolved.get("base_model") is None:
        resolved.pop("base_model", None)
        if student is not None and (not ignores_base or student in listed):
            resolved["base_model"] = student
    elif ignores_base and resolved["base_model"] not in listed:
        del resolved["base_model"]

    if is_own_method(resolved["merge_method"]):
        _resolve_rounding(resolved)
    return resolved


def _branch_weight(config: Mapping[str, Any]) -> float:
    """The weight that a config gives every branch, so that weights of teachers can be put in.

    Raises:
        UserError: the merge method has no weights, or the config has a gradient or a filter there.
    """
    method = config["merge_method"]
    if "weight" not in {parameter.name for parameter in method_spec(method).input_parameters}:
        raise UserError(
            f"weights: merge method {method!r} has no weight per branch; leave 'weights' out, or merge with mot"
        )
    entries = [e for e in config.get("models") or [] if isinstance(e, Mapping) and e.get("model") == BRANCHES]
    if len(entries) != 1:
        raise UserError(f"weights: the merge config needs one entry 'model: {BRANCHES}' in models to put them in")
    shared = (config.get("parameters") or {}).get("weight", 1.0)
    own = (entries[0].get("parameters") or {}).get("weight", shared)
    if isinstance(own, bool) or not isinstance(own, int | float):
        raise UserError("weights: the merge config has a gradient or a filter as weight; leave one of the two out")
    return float(own)


def _resolve_rounding(config: dict[str, Any]) -> None:
    parameters = dict(config.get("parameters") or {})
    target = config.get("out_dtype") or parameters.get("round_to") or config.get("dtype")
    if target is None:
        return
    target = str(target).removeprefix("torch.")
    if str(parameters.get("round_to") or target).removeprefix("torch.") != target:
        raise UserError(
            f"merge config: parameters.round_to: {parameters['round_to']} contradicts out_dtype: {target}; "
            "give out_dtype only"
        )
    config["parameters"] = {**parameters, "round_to": target}
    config["out_dtype"] = target
    if str(config.get("dtype")).removeprefix("torch.") == "float32":
        del config["dtype"]


def reference_parts(reference: Any) -> tuple[str, str | None]:
    """(model path or id, LoRA path or None) of a mergekit model reference."""
    if isinstance(reference, dict):
        model, lora = (
            part.get("path") if isinstance(part, dict) else part
            for part in (reference.get("model"), reference.get("lora"))
        )
        return str(model), str(lora) if lora else None
    path, _, lora = str(reference).partition("+")
    return path, lora or None


def model_path(reference: Any) -> str:
    """Absolute path of a model reference's model (of its base model, if it has a LoRA)."""
    return os.path.abspath(reference_parts(reference)[0])


def local_reference(path: Path | Mapping[str, Any]) -> Any:
    """A model reference for a path that a user gave; a hub id, or what is a reference already, stays what it is."""
    return _plain(path) if isinstance(path, Mapping) else _absolute(str(path), Path.cwd())


def adapter_reference(base: Path, adapter: Path) -> dict[str, Any]:
    """mergekit's reference to a LoRA adapter on its base (``base+adapter``), safe for every name of a folder."""
    found = local_reference(base)
    model = found["model"]["path"] if isinstance(found, dict) else found
    return {"model": {"path": model}, "lora": {"path": os.path.abspath(adapter)}}


def fetch(reference: Any) -> Any:
    """A model reference whose hub id, if it is one, is downloaded and replaced by the local folder.

    Raises:
        UserError: neither a folder nor a hub id, or the hub does not give it.
    """
    path, lora = reference_parts(reference)
    if Path(path).exists():
        return reference
    name, _, revision = path.partition("@")
    if not re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*", name):
        if pruned_fault(Path(path)):
            raise UserError(pruned_fault(Path(path)))
        raise UserError(f"{path}: no such checkpoint folder; give an existing path or a hub id such as Qwen/Qwen3-8B")
    if revision:
        raise UserError(f"{path}: a revision cannot be asked for here; download it and give the folder")
    local = find_checkpoint(name)
    return adapter_reference(local, Path(lora)) if lora else _path_reference(local)


def check_contract(config: dict[str, Any]) -> None:
    """The method's demands on its inputs (slerp merges two, ties needs a base, …), before any file is read.

    Args:
        config: a resolved one with ``models``.

    Raises:
        UserError: a model is given twice, or too many, too few, or no base.
    """

    def identity(reference: Any) -> str:
        path, lora = reference_parts(reference)
        return "+".join(os.path.realpath(part) for part in (path, lora) if part)

    method, base = config["merge_method"], config.get("base_model")
    models = [identity(entry["model"]) for entry in config["models"]]
    duplicates = sorted({model for model in models if models.count(model) > 1})
    if duplicates:
        raise UserError(
            "\n".join(f"{model}: given twice; a model counts once, use weight to favour it" for model in duplicates)
        )
    base_id = identity(base) if base is not None else None
    try:
        method_spec(method).contract.validate_ids(
            [*models, *([base_id] if base_id and base_id not in models else [])], base_id
        )
    except ValueError as error:
        given = f"{len(models)} models and {'a' if base_id else 'no'} base"
        raise UserError(f"merge_method {method}: {error} ({given} given)") from error


def check_merge_config(config: dict[str, Any], num_branches: int, weighted: bool = False) -> None:
    """Refuse a config that cannot merge a student's branches, before any branch is trained.

    Args:
        weighted: whether it must take a weight per branch.

    Raises:
        UserError: no ``$branches`` in it, or a number of inputs that the method does not take (slerp merges two).
    """
    names = [Path(f"/branch-{number}") for number in range(num_branches)]
    weights = [1.0] * num_branches if weighted else None
    resolved = resolve_merge_config(config, base=Path("/student"), branches=names, out_dtype=None, weights=weights)
    if "models" in resolved:
        check_contract(resolved)
