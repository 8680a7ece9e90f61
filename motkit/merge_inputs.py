"""The inputs of a merge, by their headers and configs: are they whole, and do they fit together?

No weights are read here, except an ``lm_head`` that may repeat a tied embedding. All faults of all inputs are
collected, one line each, naming the checkpoint and the tensor.
"""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from motkit.checkpoint import pruned_fault, safetensors_header
from motkit.errors import UserError
from motkit.rundir import hash_file

# Settings of config.json that change what the weights mean. Compared where both sides state them: a library version
# that writes a default out, or not, makes no difference.
_SHAPE_FIELDS = [
    *("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "vocab_size", "hidden_act", "hidden_activation", "rms_norm_eps"),
    *("layer_norm_eps", "sliding_window", "layer_types", "query_pre_attn_scalar", "rope_theta", "tie_word_embeddings"),
    *("moe_intermediate_size", "num_experts", "num_local_experts", "n_routed_experts", "num_experts_per_tok"),
    *("n_embd", "n_layer", "n_head"),
]


ITEM_BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "BF16": 2, "F16": 2, "I16": 2, "U16": 2}
_MAX_FAULTS = 40


def listed(faults: Sequence[str]) -> str:
    shown = list(faults[:_MAX_FAULTS])
    if len(faults) > _MAX_FAULTS:
        shown.append(f"… and {len(faults) - _MAX_FAULTS} more of these faults")
    return "\n".join(shown)


@dataclass(frozen=True)
class TensorRecord:
    """Where a tensor lies: ``dtype`` is safetensors' name, ``start`` and ``stop`` are bytes from the file's start."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def is_float(self) -> bool:
        return self.dtype.startswith(("F", "BF"))


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder by its headers; no weights are read. ``dropped`` are tied copies that do not count."""

    path: Path
    config: dict[str, Any]
    tensors: dict[str, TensorRecord]
    dropped: frozenset[str] = frozenset()

    @property
    def names(self) -> set[str]:
        """Names of the tensors that count."""
        return self.tensors.keys() - self.dropped

    @property
    def num_bytes(self) -> int:
        """Bytes of tensor data."""
        return sum(record.stop - record.start for record in self.tensors.values())


def read_header(path: Path) -> dict[str, TensorRecord]:
    """The tensors of one safetensors file.

    Raises:
        UserError: not a safetensors file, shorter or longer than its header says, or a header that contradicts itself.
    """
    header = safetensors_header(path)
    try:
        data = path.stat().st_size - max((entry["data_offsets"][1] for entry in header.values()), default=0)
        records = {
            name: TensorRecord(
                path,
                entry["dtype"],
                tuple(entry["shape"]),
                data + entry["data_offsets"][0],
                data + entry["data_offsets"][1],
            )
            for name, entry in header.items()
        }
    except (KeyError, TypeError, IndexError) as error:
        raise UserError(f"{path}: its safetensors header cannot be read; copy the file again") from error
    for name, record in records.items():
        size = record.stop - record.start
        if size != record.numel * ITEM_BYTES.get(record.dtype, size // max(record.numel, 1)):
            raise UserError(f"{path}: {name}: {size} bytes do not make shape {record.shape} of {record.dtype}")
    return records


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON; write or download it again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object")
    return value


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint's config and safetensors headers.

    Raises:
        UserError: missing or damaged files, pickled weights only, an adapter instead of a model, or an index and a
            single file side by side. All faults at once.
    """
    if not path.is_dir():
        raise UserError(pruned_fault(path) or f"{path}: expected a checkpoint folder, got a file")
    if not (path / "config.json").is_file():
        if (path / "adapter_config.json").is_file():
            raise UserError(
                f"{path}: a LoRA adapter, not a model; write BASE+{path}, or give it with --branch and --base"
            )
        raise UserError(f"{path}: no config.json; expected a checkpoint folder in Hugging Face format")
    config = read_json(path / "config.json")
    single, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if single.is_file() and index.is_file():
        raise UserError(f"{path}: holds both {single.name} and {index.name}, one of them is stale; delete that one")
    if single.is_file():
        return Checkpoint(path, config, read_header(single))
    if not index.is_file():
        if any(path.glob("*.bin")) or any(path.glob("*.pt")):
            raise UserError(f"{path}: pickled weights only, which can run code; save the model as safetensors")
        raise UserError(f"{path}: no model.safetensors and no {index.name}")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index}: no weight_map; write or download it again")
    faults, tensors = [], {}
    for shard in sorted(set(weight_map.values())):
        if not (path / shard).is_file():
            faults.append(f"{path / shard}: missing, but {index.name} lists it; write or download it again")
            continue
        try:
            records = read_header(path / shard)
        except UserError as error:
            faults.append(str(error))
            continue
        for name in (name for name, file in weight_map.items() if file == shard):
            if name in records:
                tensors[name] = records[name]
            else:
                faults.append(f"{path / shard}: {name}: missing, but {index.name} lists it; is the index stale?")
        faults += [f"{path / shard}: {name}: not in {index.name}; is it stale?" for name in records.keys() - weight_map]
    if faults:
        raise UserError("\n".join(faults))
    return Checkpoint(path, config, tensors)


def same_data(one: TensorRecord, other: TensorRecord) -> bool:
    """Whether two tensors hold the same bytes."""
    left = one.stop - one.start
    if left != other.stop - other.start:
        return False
    with one.file.open("rb") as a, other.file.open("rb") as b:
        a.seek(one.start)
        b.seek(other.start)
        while left:
            piece = min(left, 1 << 24)
            if a.read(piece) != b.read(piece):
                return False
            left -= piece
    return True


def check_compatible(
    checkpoints: Sequence[Checkpoint], same_shapes: bool, same_vocabulary: bool
) -> tuple[list[Checkpoint], list[str]]:
    """Compare every checkpoint with the first.

    Args:
        checkpoints: all inputs, the base or else the first model first.
        same_shapes: whether tensors must agree by name and shape (not for slices and modules, which mergekit puts
            together from differing models).
        same_vocabulary: whether tokens and embedding sizes must agree (not if mergekit maps the tokenizers).

    Returns:
        (the checkpoints, with tied copies of the embedding marked as dropped; the faults, one line each).
    """
    first = checkpoints[0]
    expected = first.config.get("architectures")
    faults = [
        f"{other.path}: architecture {got}, expected {expected} as in {first.path}"
        for other in checkpoints[1:]
        if expected and (got := other.config.get("architectures")) and got != expected
    ]
    if faults:
        return list(checkpoints), faults
    checkpoints, faults = _drop_tied(checkpoints)
    first = checkpoints[0]
    reference = first.names
    vocabulary = next((v for c in checkpoints if (v := tokenizer_file(c.path)) is not None), None)
    for other in checkpoints[1:]:
        if not same_shapes:
            continue
        faults += _config_differences(first, other, same_vocabulary)
        names = other.names
        if names != reference and tensor_layout(first, reference) != tensor_layout(other, names):
            faults += [f"{other.path}: {name}: missing, {first.path} has it" for name in sorted(reference - names)]
            faults += [
                f"{other.path}: {name}: unknown, {first.path} has no such tensor" for name in sorted(names - reference)
            ]
        for name in sorted(names & reference):
            got, expected = other.tensors[name], first.tensors[name]
            if got.shape != expected.shape and same_vocabulary:
                faults.append(f"{other.path}: {name}: shape {got.shape}, expected {expected.shape} as in {first.path}")
            elif got.is_float != expected.is_float:
                faults.append(f"{other.path}: {name}: dtype {got.dtype}, expected {expected.dtype} as in {first.path}")
        if same_vocabulary and vocabulary is not None:
            faults += _vocabulary_faults(vocabulary, other.path)
    return checkpoints, faults


def _config_differences(first: Checkpoint, other: Checkpoint, same_vocabulary: bool) -> list[str]:
    faults = []
    for part in ("", "text_config"):
        mine = first.config.get(part, {}) if part else first.config
        theirs = other.config.get(part, {}) if part else other.config
        for key in _SHAPE_FIELDS:
            if key == "vocab_size" and not same_vocabulary:
                continue
            got, expected = _config_value(theirs, key), _config_value(mine, key)
            if got is not None and expected is not None and got != expected:
                where = f"{part}.{key}".removeprefix(".")
                faults.append(f"{other.path}: config.json: {where}: {got!r}, expected {expected!r} as in {first.path}")
    return faults


def _config_value(config: dict[str, Any], key: str) -> Any:
    """A setting; transformers 5 writes ``rope_theta`` into ``rope_parameters``."""
    if key == "rope_theta" and key not in config:
        return (config.get("rope_parameters") or {}).get(key)
    return config.get(key)


def tensor_layout(checkpoint: Checkpoint, names: Any) -> dict[str, int]:
    """Elements per tensor name, experts gathered under the name that transformers 5 and mergekit fuse them into.

    A mixture of experts is stored as one tensor per expert or as one for all; mergekit writes the latter.
    """
    sizes: dict[str, int] = {}
    for name in names:
        fused = re.sub(r"\.experts\.\d+\.(gate_proj|up_proj)\.weight$", ".experts.gate_up_proj", name)
        fused = re.sub(r"\.experts\.\d+\.(down_proj)\.weight$", r".experts.\1", fused)
        sizes[fused] = sizes.get(fused, 0) + checkpoint.tensors[name].numel
    return sizes


def _drop_tied(checkpoints: Sequence[Checkpoint]) -> tuple[list[Checkpoint], list[str]]:
    """Mark an ``lm_head`` that repeats the tied embedding; one that differs from it is a fault.

    A checkpoint with such a tensor loads untied, whatever its config says (TRAPS in CONTRIBUTING.md).
    """
    head = "lm_head.weight"
    tied = any(c.config.get("tie_word_embeddings") is True for c in checkpoints) or (
        head not in checkpoints[0].tensors and checkpoints[0].config.get("tie_word_embeddings") is not False
    )
    if not tied:
        return list(checkpoints), []
    result, faults = [], []
    for checkpoint in checkpoints:
        if head in checkpoint.tensors:
            embeddings = [n for n in checkpoint.tensors if n.endswith(("embed_tokens.weight", "wte.weight"))]
            if len(embeddings) != 1 or not same_data(checkpoint.tensors[head], checkpoint.tensors[embeddings[0]]):
                faults.append(
                    f"{checkpoint.path}: {head}: differs from the embedding although tie_word_embeddings is true; "
                    "the branch was trained untied, which the tied model cannot hold"
                )
            checkpoint = Checkpoint(checkpoint.path, checkpoint.config, checkpoint.tensors, frozenset([head]))
        result.append(checkpoint)
    return result, faults


def tokenizer_file(path: Path) -> tuple[Path, str] | None:
    for name in ("tokenizer.json", "tokenizer.model"):
        if (path / name).is_file():
            return path / name, hash_file(path / name)
    return None


def _token_ids(path: Path) -> dict[str, int]:
    tokenizer = read_json(path)
    vocabulary = (tokenizer.get("model") or {}).get("vocab") or {}
    if isinstance(vocabulary, list):  # Unigram: [[token, score], …]
        vocabulary = {entry[0]: index for index, entry in enumerate(vocabulary)}
    added = {entry["content"]: entry["id"] for entry in tokenizer.get("added_tokens") or []}
    return {**vocabulary, **added}


def _vocabulary_faults(expected: tuple[Path, str], path: Path) -> list[str]:
    """Whether a checkpoint gives the same ids to the same tokens; a checkpoint without a tokenizer passes."""
    reference, digest = expected
    file = path / reference.name
    if not file.is_file() or hash_file(file) == digest:
        return []
    if reference.name != "tokenizer.json":
        return [f"{file}: differs from {reference}; branches must share the student's tokenizer"]
    mine, theirs = _token_ids(reference), _token_ids(file)
    different = [token for token in mine.keys() | theirs.keys() if mine.get(token) != theirs.get(token)]
    if not different:
        return []
    token = min(different)
    return [
        f"{file}: {len(different)} tokens have other ids than in {reference}, such as {token!r}: "
        f"{theirs.get(token)}, expected {mine.get(token)}; branches must share the student's tokenizer"
    ]
