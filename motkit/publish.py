"""The student that leaves a run: its weights in the published type, its tokenizer, and a model card."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from motkit.checkpoint import copy_tokenizer, weight_files


def cast_checkpoint(source: Path, out: Path, dtype: str) -> None:
    """Copy a checkpoint with its floating-point tensors rounded once to ``dtype`` (round to nearest, ties to even).

    File by file: memory is bounded by the largest shard of ``source``.

    Args:
        dtype: ``float32``, ``bfloat16`` or ``float16``.
    """
    import torch
    from safetensors.torch import load_file, save_file

    kind = getattr(torch, dtype)
    out.mkdir(parents=True, exist_ok=True)
    files = weight_files(source)
    weight_map: dict[str, str] = {}
    total = 0
    for file in files:
        tensors = {
            name: tensor.to(kind) if tensor.is_floating_point() else tensor for name, tensor in load_file(file).items()
        }
        save_file(tensors, out / file.name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file.name)
        total += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)
    config["dtype"] = dtype
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    copy_tokenizer(source, out)


def model_card(
    *,
    name: str,
    student: str,
    teachers: Sequence[str],
    method: str,
    rounds: int,
    steps: int,
    scores: str,
    recipe: str,
    versions: Mapping[str, Any],
) -> str:
    """Markdown for the hub: base model, teachers, what was done, how it scored, and how to make it again.

    Args:
        student: hub id or folder; only a hub id becomes the card's ``base_model``.
        scores: a Markdown table, or empty.
        recipe: the resolved recipe, YAML.
    """
    base = f"base_model: {student}\n" if not Path(student).is_absolute() else ""
    listed = "\n".join(f"  - `{teacher}`" for teacher in teachers)
    table = f"\n## Scores\n\n{scores}\n" if scores else ""
    used = ", ".join(f"{package} {version}" for package, version in versions.items())
    return f"""---
{base}library_name: transformers
pipeline_tag: text-generation
tags:
- merge-of-thought
- mot
- distillation
- reasoning
- mergekit
- merge
- motkit
---
# {name}

A student distilled from {len(teachers)} teachers by Merge-of-Thought Distillation
([arXiv 2509.08814](https://arxiv.org/abs/2509.08814)) with motkit: in each of {rounds} rounds, one branch per teacher
is fine-tuned for {steps} steps on that teacher's answer-checked traces, and the branches are merged in weight space
(`{method}`).

- Base model: `{student if base else Path(student).name}`
- Teachers:
{listed}
{table}
## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForCausalLM.from_pretrained("{name}")
```

## How it was made

```yaml
{recipe.strip()}
```

Versions: {used}.
"""
