"""Pico-models built on the spot: real transformers architectures, two layers, a real tokenizer, no network."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHARACTERS = [*map(chr, range(32, 127)), "\n"]
PICO_KINDS = ("llama", "qwen3", "gemma3", "qwen3_moe")


def pico_tokenizer() -> Any:
    """One token per printable ASCII character and newline, ``<|im_start|>``, ``<|im_end|>`` (the EOS), and
    ``<think>``, ``</think>`` as added tokens that are not special, as in Qwen3. ChatML template.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: index for index, token in enumerate(["<|unk|>", "<|pad|>", *CHARACTERS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unk|>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([AddedToken(t, special=True) for t in ("<|im_start|>", "<|im_end|>")])
    backend.add_tokens([AddedToken(t, special=False, normalized=False) for t in ("<think>", "</think>")])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<|unk|>", pad_token="<|pad|>", eos_token="<|im_end|>", bos_token=None
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def pico_config(kind: str, **changes: Any) -> Any:
    """Configuration of a pico-model: 2 layers, hidden size 32, about 20 to 60 thousand parameters."""
    import transformers

    tokenizer = pico_tokenizer()
    common: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 2048,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": kind in ("qwen3", "gemma3"),
    }
    if kind == "llama":
        return transformers.LlamaConfig(**common | changes)
    if kind == "qwen3":
        return transformers.Qwen3Config(**common | changes)
    if kind == "gemma3":
        return transformers.Gemma3TextConfig(**common | {"query_pre_attn_scalar": 8, "sliding_window": 512} | changes)
    if kind == "qwen3_moe":
        experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
        return transformers.Qwen3MoeConfig(**common | experts | changes)
    raise ValueError(f"kind: expected one of {PICO_KINDS}, got {kind!r}")


def make_pico_checkpoint(kind: str, path: Path, seed: int = 0, dtype: str = "bfloat16", **changes: Any) -> Path:
    """Save a pico-model into ``path``: weights random from ``seed``, of the size that the architecture begins with."""
    import torch
    import transformers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(pico_config(kind, **changes))
        for parameter in model.parameters():
            parameter.data += torch.randn_like(parameter) * 0.02
    model.to(getattr(torch, dtype)).save_pretrained(path)
    pico_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def make_pico() -> Callable[..., Path]:
    """`make_pico_checkpoint`: (kind, path, seed, dtype, config changes) → path."""
    return make_pico_checkpoint


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Three processes for every merge, however small."""
    import torch

    from motkit import crew

    if sys.platform != "linux":
        pytest.skip("merges fork on Linux only")
    monkeypatch.setattr(crew, "FORK_BYTES", 0)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(threads)
