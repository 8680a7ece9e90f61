"""A checkpoint's scores: accuracy on held-out problems, mean loss on held-out traces."""

import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from motkit.checkpoint import end_token_ids, load_tokenizer
from motkit.errors import UserError
from motkit.recipe import Evaluation
from motkit.render import RenderedTrace, Renderer
from motkit.traces import SeedProblem

# Logits of a batch, in float32: 2**28 bytes. A single longer trace is not split.
_LOGITS_BYTES = 2**28


def evaluate_checkpoint(
    checkpoint: Path,
    *,
    settings: Evaluation,
    problems: Mapping[str, SeedProblem],
    heldout: Mapping[str, Sequence[RenderedTrace]],
    generate: Callable[..., Any],
    verify: Callable[[Sequence[tuple[SeedProblem, str]]], Sequence[Any]],
    seed: int,
    name: str,
    progress: bool = True,
) -> dict[str, Any]:
    """Score one checkpoint, in float32 on a CPU and bfloat16 on a GPU.

    Args:
        problems: held-out problems; empty for none.
        heldout: sets of rendered held-out traces, by name.
        generate: `motkit.generate.generate_texts` or its like.
        verify: (problem, response) pairs → verdicts with ``correct``; the responses are finished and hold no reasoning.
        name: for progress and messages.

    Returns:
        ``accuracy`` (mean over problems and samples) and its ``standard_error`` over problems, ``problems``,
        ``samples``, ``truncated`` and ``unverifiable`` (shares of generations that hit the limit, and whose answer
        cannot be judged; they count as wrong), ``mean_tokens``;
        ``heldout_loss`` (nats per trace token, over all sets) and ``heldout_loss_by_set``; ``seconds``.

    Raises:
        UserError: the held-out loss is not finite.
    """
    import torch
    from transformers import AutoModelForCausalLM

    started = time.perf_counter()
    gpu = torch.cuda.is_available()
    tokenizer = load_tokenizer(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16 if gpu else torch.float32)
    model = model.to("cuda" if gpu else "cpu").eval()
    scores: dict[str, Any] = {}
    losses, tokens = {}, {}
    for set_name, traces in heldout.items():
        losses[set_name], tokens[set_name] = heldout_loss(model, traces)
        if not math.isfinite(losses[set_name]):
            raise UserError(f"{checkpoint}: the loss on held-out traces {set_name!r} is {losses[set_name]}")
    if losses:
        total = sum(tokens.values())
        scores["heldout_loss"] = sum(losses[key] * tokens[key] for key in losses) / total
        scores["heldout_loss_by_set"] = losses
    if problems:
        renderer = Renderer(tokenizer, end_token_ids(checkpoint, tokenizer))
        asked = list(problems.values())
        with tqdm(
            total=len(asked),
            desc=f"{name}: answers",
            unit="problem",
            disable=not progress,
            file=sys.stderr,
            leave=False,
        ) as bar:
            generations = generate(
                model,
                tokenizer,
                [renderer.prompt_ids(problem) for problem in asked],
                samples=settings.samples,
                temperature=settings.sampling.temperature,
                top_p=settings.sampling.top_p,
                max_tokens=settings.sampling.max_tokens,
                end_ids=sorted(renderer.end_ids),
                batch_size=settings.batch_size,
                seed=seed,
                on_batch=bar.update,
            )
        graded: list[tuple[int, str]] = []  # (number of the problem, response)
        for number, answers in enumerate(generations):
            prompt = renderer.prompt(asked[number])
            for answer in answers:
                parts = renderer.parse(prompt, answer.text) if answer.finish_reason == "stop" else None
                if parts is not None:
                    graded.append((number, parts[1]))
        verdicts = verify([(asked[number], response) for number, response in graded])
        right = [0] * len(asked)
        for (number, _), verdict in zip(graded, verdicts, strict=True):
            right[number] += verdict.correct is True
        shares = [count / len(answers) for count, answers in zip(right, generations, strict=True)]
        flat = [answer for answers in generations for answer in answers]
        accuracy = sum(shares) / len(shares)
        variance = sum((share - accuracy) ** 2 for share in shares) / max(len(shares) - 1, 1)
        scores |= {
            "accuracy": accuracy,
            "standard_error": math.sqrt(variance / len(shares)),
            "problems": len(asked),
            "samples": settings.samples,
            "truncated": sum(answer.finish_reason == "length" for answer in flat) / len(flat),
            "unverifiable": sum(verdict.correct is None for verdict in verdicts) / len(flat),
            "mean_tokens": sum(answer.num_tokens for answer in flat) / len(flat),
        }
    scores["seconds"] = round(time.perf_counter() - started, 3)
    return scores


def heldout_loss(model: Any, traces: Sequence[RenderedTrace]) -> tuple[float, int]:
    """(mean negative log-likelihood in nats per completion token, number of those tokens), teacher-forced.

    Summed in float64 over all tokens of all traces: a long trace weighs more than a short one, as in training.
    """
    import torch

    vocabulary = model.config.get_text_config().vocab_size
    total, count = 0.0, 0
    pending: list[RenderedTrace] = []

    def flush() -> None:
        nonlocal total, count
        longest = max(len(trace.input_ids) for trace in pending)
        ids = torch.zeros(len(pending), longest, dtype=torch.long)  # (B, T), padded on the right
        labels = torch.full_like(ids, -100)
        mask = torch.zeros_like(ids)
        for row, trace in enumerate(pending):
            length = len(trace.input_ids)
            ids[row, :length] = torch.tensor(trace.input_ids)
            labels[row, :length] = torch.tensor(trace.labels)
            mask[row, :length] = 1
        with torch.inference_mode():
            logits = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device)).logits  # (B, T, V)
        targets = labels[:, 1:].to(model.device)
        losses = torch.nn.functional.cross_entropy(
            logits[:, :-1].float().flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="none"
        )
        total += losses.double().sum().item()
        count += int((targets != -100).sum())
        pending.clear()

    for trace in sorted(traces, key=lambda trace: len(trace.input_ids)):
        if pending and (len(pending) + 1) * len(trace.input_ids) * vocabulary * 4 > _LOGITS_BYTES:
            flush()
        pending.append(trace)
    flush()
    return total / count, count
