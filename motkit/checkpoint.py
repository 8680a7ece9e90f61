"""A checkpoint folder as files: where it is, whether it is whole, how large, and what belongs to its tokenizer.

Nothing here loads weights or imports torch.
"""

import json
import math
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from motkit.errors import UserError

# Everything that travels with a tokenizer, besides the weights and config.json.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates",
)

# In a stage whose checkpoint was deleted on purpose.
PRUNED = "pruned.json"


def find_checkpoint(student: str, remedy: str = "") -> Path:
    """Folder of a checkpoint: the folder itself, or the local snapshot of a hub id (downloaded if need be).

    Raises:
        UserError: neither a folder with ``config.json`` nor a hub id that can be had.
    """
    path = Path(student)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"{student}: not a checkpoint: no config.json in it")
        return path.resolve()
    if path.is_absolute():
        raise UserError(pruned_fault(path) or f"{student}: no such folder{remedy}")
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "additional_chat_templates/*"]
    try:
        return Path(snapshot_download(student, allow_patterns=patterns))
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{student}: no such folder here, and the hub does not give it ({type(error).__name__}: {reason}){remedy}"
        ) from error


def content_files(checkpoint: Path) -> list[Path]:
    """Every file of a checkpoint that says what it is, sorted: the model card is none."""
    files = (path for path in checkpoint.rglob("*") if path.is_file())
    return sorted(path for path in files if path.name not in {"README.md", ".gitattributes"})


def pruned_fault(checkpoint: Path) -> str | None:
    """What to say of a branch's checkpoint that ``keep_branches`` has deleted; None if it was not."""
    stage = checkpoint.parent
    if checkpoint.exists() or not (stage / PRUNED).is_file():
        return None
    if (stage / "adapter").is_dir():
        how = f"its adapter is there: 'motkit merge mot OUT --base START --branch {stage / 'adapter'} --dtype float32'"
        how += " makes it again, where START is the student that its round began with"
    else:
        how = "a new run with keep_branches=all trains it again"
    return f"{checkpoint}: was pruned (keep_branches); {how}"


def weight_files(checkpoint: Path) -> list[Path]:
    """The safetensors files that hold a checkpoint's weights, sorted by name.

    Raises:
        UserError: there are none (pickle checkpoints are not read), or the index names a file that is missing.
    """
    index = checkpoint / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        missing = [name for name in names if not (checkpoint / name).is_file()]
        if missing:
            raise UserError(f"{checkpoint}: incomplete: {index.name} names {missing[0]}, which is missing")
        return [checkpoint / name for name in names]
    files = sorted(checkpoint.glob("*.safetensors"))
    if not files:
        found = sorted(path.name for pattern in ("*.bin", "*.pt", "*.gguf") for path in checkpoint.glob(pattern))
        hint = f" (found {found[0]}: convert it with save_pretrained)" if found else ""
        raise UserError(f"{checkpoint}: no .safetensors file in it{hint}")
    return files


def safetensors_header(file: Path) -> dict[str, dict[str, Any]]:
    """``{tensor name: {"dtype", "shape", "data_offsets"}}`` from a safetensors file, whose length is checked.

    Raises:
        UserError: the file is truncated or not safetensors.
    """
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length)) if length <= size else None
    except (struct.error, ValueError):
        header = None
    if not isinstance(header, dict):
        raise UserError(f"{file}: truncated or not safetensors: its header cannot be read; copy the file again")
    header.pop("__metadata__", None)
    expected = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if size != expected:
        raise UserError(f"{file}: truncated or damaged: {size} bytes, expected {expected}; copy the file again")
    return header


def tensors(checkpoint: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """``(name, header entry)`` of every tensor of a checkpoint; each file's length is checked on the way."""
    for file in weight_files(checkpoint):
        yield from safetensors_header(file).items()


def count_parameters(checkpoint: Path) -> int:
    """Number of stored parameters P (a tied output embedding counts once, as stored)."""
    return sum(math.prod(entry["shape"]) for _, entry in tensors(checkpoint))


def copy_tokenizer(source: Path, target: Path) -> None:
    """Give ``target`` byte for byte the tokenizer, chat template and generation config of ``source``."""
    for name in (*TOKENIZER_FILES, "generation_config.json"):
        old, new = source / name, target / name
        if new.is_dir():
            shutil.rmtree(new)
        else:
            new.unlink(missing_ok=True)
        if old.is_dir():
            shutil.copytree(old, new)
        elif old.is_file():
            # copyfile, not copy: the content without the source's mode (a hub cache may be read-only).
            shutil.copyfile(old, new)


def load_tokenizer(checkpoint: Path) -> Any:
    """The checkpoint's tokenizer, as transformers loads it.

    Raises:
        UserError: it has none that transformers can load.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(checkpoint)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{checkpoint}: its tokenizer cannot be loaded: {' '.join(str(error).split())[:200]}"
        ) from error


def end_token_ids(checkpoint: Path, tokenizer: Any) -> set[int]:
    """Ids of the tokens that end a generation: the tokenizer's EOS and those of the generation config."""
    ends = {tokenizer.eos_token_id} - {None}
    file = checkpoint / "generation_config.json"
    if file.is_file():
        listed = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
        ends |= set(listed if isinstance(listed, list) else [listed]) - {None}
    return ends
