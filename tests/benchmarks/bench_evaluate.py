"""Tokens a second of evaluation with vLLM against raw ``vllm.LLM.generate``: same environment, checkpoint and prompts.

    MOTKIT_VLLM_PYTHON=… python tests/benchmarks/bench_evaluate.py [--model PATH] [--prompts 64] [--samples 8]

In turn, each in a fresh process; both clocks run from the loaded engine to the last text. Ours seeds every sample and
hands each over as it arrives; the peer is what one would write by hand: one call, ``n`` samples, no seed.
"""

import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from vllm_server import SERVABLE, SMALL, find_vllm_python, vllm_environment

RAW = """
import json, sys, time
import vllm

if __name__ == "__main__":
    asked = json.load(open(sys.argv[1]))
    llm = vllm.LLM(model=asked["model"], **asked["engine_args"])
    params = vllm.SamplingParams(**asked["sampling"])
    started = time.perf_counter()
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in asked["prompts"]], params, use_tqdm=False)
    seconds = time.perf_counter() - started
    tokens = sum(len(sample.token_ids) for output in outputs for sample in output.outputs)
    json.dump({"tokens": tokens, "seconds": seconds}, open(sys.argv[2], "w"))
"""


def ours(python: str, folder: Path, asked: dict[str, Any]) -> float:
    from motkit.generate import continue_with_vllm

    ready, samples = [], asked["sampling"]["n"]
    generations = continue_with_vllm(
        asked["model"],
        asked["prompts"],
        samples=samples,
        temperature=asked["sampling"]["temperature"],
        top_p=asked["sampling"]["top_p"],
        max_tokens=asked["sampling"]["max_tokens"],
        end_ids=[],
        seed=0,
        engine_args=asked["engine_args"],
        python=python,
        log=folder / "ours.log",
        on_ready=lambda version: ready.append(time.perf_counter()),
    )
    seconds = time.perf_counter() - ready[0]
    tokens = sum(sample.num_tokens for of_prompt in generations for sample in of_prompt)
    assert tokens == len(asked["prompts"]) * samples * asked["sampling"]["max_tokens"]
    return tokens / seconds


def theirs(python: str, folder: Path, asked: dict[str, Any]) -> float:
    (folder / "raw.py").write_text(RAW)
    (folder / "asked.json").write_text(json.dumps(asked))
    command = [python, folder / "raw.py", folder / "asked.json", folder / "found.json"]
    done = subprocess.run(command, env=vllm_environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    found = json.loads((folder / "found.json").read_text())
    assert found["tokens"] == len(asked["prompts"]) * asked["sampling"]["n"] * asked["sampling"]["max_tokens"]
    return float(found["tokens"] / found["seconds"])


@click.command()
@click.option("--model", type=click.Path(exists=True, path_type=Path), help="Checkpoint.  [default: a pico-model]")
@click.option("--prompts", "num_prompts", default=64, show_default=True)
@click.option("--samples", default=8, show_default=True, help="Continuations of a prompt.")
@click.option("--tokens", default=128, show_default=True, help="Generated tokens a continuation.")
@click.option("--prompt-tokens", default=64, show_default=True)
@click.option("--repeats", default=3, show_default=True)
def main(model: Path | None, num_prompts: int, samples: int, tokens: int, prompt_tokens: int, repeats: int) -> None:
    """Print each run, both medians and their ratio."""
    python = find_vllm_python()
    if python is None:
        raise SystemExit("no vLLM: 'make vllm' makes .venv-vllm, or set MOTKIT_VLLM_PYTHON to its interpreter")
    import os

    os.environ.update(SMALL)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if model is None:
            from conftest import make_pico_checkpoint

            model = make_pico_checkpoint("llama", folder / "model", **SERVABLE)
        draw = random.Random(0)
        asked = {
            "model": str(model),
            "engine_args": {"max_model_len": prompt_tokens + tokens, "dtype": "bfloat16", "enforce_eager": True},
            "prompts": [[draw.randrange(10, 60) for _ in range(prompt_tokens)] for _ in range(num_prompts)],
            "sampling": {
                "n": samples, "temperature": 0.6, "top_p": 0.95, "max_tokens": tokens, "ignore_eos": True,
                "skip_special_tokens": False,
            },
        }  # fmt: skip
        found: dict[str, list[float]] = {"ours": [], "theirs": []}
        for number in range(repeats):
            for who in sorted(found, reverse=number % 2 == 1):  # neither is always the second
                found[who].append((ours if who == "ours" else theirs)(python, folder, asked))
            click.echo(f"motkit {found['ours'][-1]:.1f} tokens/s, vllm.LLM.generate {found['theirs'][-1]:.1f}")
    mine, other = (statistics.median(figures) for figures in found.values())
    ratio = statistics.median(one / peer for one, peer in zip(found["ours"], found["theirs"], strict=True))
    click.echo(
        f"evaluation with vLLM {mine:.1f} tokens/s, vllm.LLM.generate {other:.1f} tokens/s: ratio {ratio:.3f} "
        f"({num_prompts} prompts, {samples} samples of {tokens} tokens each, median of {repeats})"
    )


if __name__ == "__main__":
    main()
