"""Checkpoints as the analyses read them: models, weights, rendered traces."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from motkit.checkpoint import end_token_ids, load_tokenizer, weight_files
from motkit.errors import UserError
from motkit.render import RenderedTrace, Renderer, UnfitTrace
from motkit.traces import SeedProblem, Trace


def load_model(checkpoint: Path, *, dtype: str = "auto", attention: str = "sdpa", device: str = "auto") -> Any:
    """The checkpoint as a transformers model in evaluation mode.

    Args:
        dtype: a torch type's name; ``auto``: float32 on a CPU, bfloat16 on a GPU, as `motkit.evaluate` scores.
        attention: ``sdpa``, or ``eager`` where gradients of gradients are taken (SDPA has none on a CPU; nor have the
            fused experts of a mixture, which are eager then too).
        device: ``cpu``, ``cuda``, …; ``auto``: a GPU if there is one.
    """
    import torch
    import transformers

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype == "auto":
        dtype = "float32" if device == "cpu" else "bfloat16"
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        checkpoint,
        dtype=getattr(torch, dtype),
        attn_implementation=attention,
        **({"experts_implementation": "eager"} if attention == "eager" else {}),
    )
    return model.to(device).eval()


def load_weights(checkpoint: Path, dtype: str = "float32") -> dict[str, Any]:
    """Every stored tensor of a checkpoint by name, in ``dtype``, on the CPU."""
    import torch
    from safetensors import safe_open

    weights = {}
    for file in weight_files(checkpoint):
        with safe_open(file, framework="pt") as stored:
            for name in stored.keys():  # noqa: SIM118 (not a dict)
                tensor = stored.get_tensor(name)
                weights[name] = tensor.to(getattr(torch, dtype)) if tensor.is_floating_point() else tensor
    return weights


def render_traces(
    checkpoint: Path, problems: Mapping[str, SeedProblem], traces: Iterable[Trace]
) -> list[RenderedTrace]:
    """The traces in the checkpoint's tokens.

    Raises:
        UserError: a trace of a problem that is not there, or one that this checkpoint's tokenizer cannot hold.
    """
    tokenizer = load_tokenizer(checkpoint)
    renderer = Renderer(tokenizer, end_token_ids(checkpoint, tokenizer))
    rendered = []
    for trace in traces:
        if trace.problem_id not in problems:
            raise UserError(f"trace {trace.label}: its problem {trace.problem_id!r} is not among the problems")
        try:
            rendered.append(renderer.render(problems[trace.problem_id], trace))
        except UnfitTrace as reason:
            raise UserError(f"trace {trace.label}: {reason}; remove or correct it") from reason
    return rendered
