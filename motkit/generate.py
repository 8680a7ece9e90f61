"""Text out of a model: the transformers engine, for small models and machines without vLLM."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Generation:
    """One sampled continuation. ``finish_reason`` is ``stop`` at an end token, ``length`` at the limit."""

    text: str
    num_tokens: int
    finish_reason: str


def generate_texts(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    samples: int,
    temperature: float,
    top_p: float,
    max_tokens: int,
    end_ids: Sequence[int],
    batch_size: int,
    seed: int,
    on_batch: Callable[[int], None] = lambda count: None,
) -> list[list[Generation]]:
    """Continue each prompt, batched by length with padding on the left.

    Args:
        model: a causal LM in evaluation mode, on its device.
        prompts: token ids of each prompt.
        samples: continuations of each prompt.
        temperature: 0 is greedy.
        max_tokens: limit of a continuation, in tokens.
        end_ids: token ids that end a continuation; they are not part of its text.
        batch_size: prompts at a time.
        seed: of the sampling, set before every batch, so that a batch does not depend on those before it.
        on_batch: called with the number of prompts that a batch has finished.

    Returns:
        For each prompt, in the order given, its ``samples`` generations.
    """
    import torch
    from transformers import GenerationConfig

    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end_ids[0]
    greedy = temperature == 0.0
    # A fresh config: what the checkpoint's own generation_config would add (top_k, penalties) is not asked for here.
    model.generation_config = GenerationConfig(
        do_sample=not greedy,
        **({} if greedy else {"temperature": temperature, "top_p": top_p, "top_k": 0}),
        num_return_sequences=samples,
        max_new_tokens=max_tokens,
        eos_token_id=list(end_ids),
        pad_token_id=pad_id,
    )
    results: list[list[Generation]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        longest = max(len(prompts[index]) for index in batch)
        padding = [longest - len(prompts[index]) for index in batch]
        ids = torch.tensor([[pad_id] * pad + list(prompts[index]) for pad, index in zip(padding, batch, strict=True)])
        mask = torch.tensor([[0] * pad + [1] * (longest - pad) for pad in padding])
        torch.manual_seed(seed + start)
        with torch.inference_mode():
            output = model.generate(input_ids=ids.to(model.device), attention_mask=mask.to(model.device))
        for row, continuation in enumerate(output[:, longest:].tolist()):
            end = next((at for at, token in enumerate(continuation) if token in end_ids), None)
            kept = continuation[: len(continuation) if end is None else end]
            text = tokenizer.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            results[batch[row // samples]].append(
                Generation(text, len(kept) + (end is not None), "length" if end is None else "stop")
            )
        on_batch(len(batch))
    return results
