"""Logits of traces' tokens in bounded memory, and the loss that follows from them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from motkit.errors import UserError
from motkit.render import RenderedTrace

# Logits of a chunk of positions, in float32. One more array of this size is alive beside it.
CHUNK_BYTES = 2**25
# Tokens, padding included, that go through a model's body together (one longer trace goes alone).
BATCH_TOKENS = 8192


def mean_loss(model: Any, traces: Sequence[RenderedTrace], *, batch_tokens: int = BATCH_TOKENS) -> tuple[float, int]:
    """(mean negative log-likelihood in nats per completion token, number of those tokens), teacher-forced.

    Summed in float64 over all tokens of all traces: a long trace weighs more than a short one, as in training.
    """
    import torch

    total, count = 0.0, 0
    with torch.inference_mode():
        for numbers in batches(traces, batch_tokens):
            for logits, targets in target_logits(model, [traces[number] for number in numbers]):
                losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
                total += losses.double().sum().item()
                count += len(targets)
    return total / count, count


def batches(traces: Sequence[RenderedTrace], max_tokens: int) -> Iterator[list[int]]:
    """Numbers of traces that go through a model together: of like length, ``max_tokens`` or fewer with padding."""
    pending: list[int] = []
    for number in sorted(range(len(traces)), key=lambda number: len(traces[number].input_ids)):
        if pending and (len(pending) + 1) * len(traces[number].input_ids) > max_tokens:
            yield pending
            pending = []
        pending.append(number)
    if pending:
        yield pending


def pad(traces: Sequence[RenderedTrace], device: Any = "cpu") -> tuple[Any, Any]:
    """(input ids, labels), each (B, T) int64, padded on the right; labels are -100 where there is no loss.

    A causal model needs no mask for padding on the right: no token that counts sees it.
    """
    import torch

    longest = max(len(trace.input_ids) for trace in traces)
    ids = torch.zeros(len(traces), longest, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for row, trace in enumerate(traces):
        ids[row, : len(trace.input_ids)] = torch.tensor(trace.input_ids)
        labels[row, : len(trace.input_ids)] = torch.tensor(trace.labels)
    return ids.to(device), labels.to(device)


def target_logits(
    model: Any, traces: Sequence[RenderedTrace], chunk_bytes: int = CHUNK_BYTES
) -> Iterator[tuple[Any, Any]]:
    """(logits (C, V) float32, targets (C,)) for chunks of the target tokens of ``traces``, in order, which go through
    the model together. The logits are the caller's to spend. Call it under `torch.inference_mode`.

    The body of the model runs once (no cache, no logits), its head then on chunks of positions, so that the logits of a
    long trace (20 GB for 32,768 tokens and a vocabulary of 152k) never exist together. The head is the model's own,
    with whatever soft cap or scale it applies.
    """
    ids, labels = pad(traces, model.device)
    wanted = labels[:, 1:] != -100  # (B, T-1): position t predicts token t+1
    body = model.base_model(input_ids=ids, use_cache=False)
    hidden = body.last_hidden_state[:, :-1][wanted]  # (N, H)
    targets = labels[:, 1:][wanted]  # (N,)
    body = type(body)(last_hidden_state=hidden[:1][None])
    chunk = max(1, chunk_bytes // (4 * model.config.get_text_config().vocab_size))
    with _own_head(model, type(body)) as head:
        for start in range(0, len(targets), chunk):
            yield head(hidden[start : start + chunk]), targets[start : start + chunk]


@contextmanager
def _own_head(model: Any, kind: Any) -> Iterator[Callable[[Any], Any]]:
    """hidden states (C, H) → logits (C, V) float32, by the model's own forward with its body put aside."""
    import torch

    body = model.base_model
    if body is model:
        raise UserError(f"{type(model).__name__}: has no body apart from its head; expected a causal language model")
    given: dict[str, Any] = {}

    def head(hidden: Any) -> Any:
        given["hidden"] = hidden[None]
        nothing = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
        return model(input_ids=nothing, use_cache=False).logits[0].float()

    body.forward = lambda *args, **keywords: kind(last_hidden_state=given["hidden"])
    try:
        yield head
    finally:
        del body.forward
