"""Throughput of ``motkit generate`` against `vllm bench serve`: the same server, model, prompts' length, concurrency.

    MOTKIT_VLLM_PYTHON=… python tests/benchmarks/bench_generate.py [--model PATH] [--requests 256] [--concurrency 16]

In turn, after a warm-up, each over the same number of requests of the same number of tokens (``ignore_eos``), on
other random prompts, so that the server's prefix cache helps neither. Both clocks run from the first request to the
last answer; ours until it is stored and forced to the disk. Ours gives every request a seed and is not streamed; the
peer, as it comes, streams and sends none. The ratio is the median of the turns' own, so that what else the machine does
weighs little.
"""

import json
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from vllm_server import SERVABLE, find_vllm_python, vllm_command, vllm_environment, vllm_serve


def ours(folder: Path, number: int, url: str, requests: int, concurrency: int, prompt_words: int, tokens: int) -> float:
    """Generated tokens a second."""
    from motkit.generate import generate_traces
    from motkit.recipe import load_recipe

    draw = random.Random(number)
    run = folder / f"run-{number}"
    run.mkdir()
    with (run / "problems.jsonl").open("w") as file:
        for n in range(requests):
            prompt = " ".join(draw.choice("abcdefgh") for _ in range(prompt_words))
            file.write(json.dumps({"id": str(n), "prompt": prompt, "answer": "1"}) + "\n")
    teacher = {
        "name": "t",
        "model": "model",
        "engine": "openai",
        "base_url": f"{url}/v1",
        "concurrency": concurrency,
        "sampling": {"temperature": 1.0, "max_tokens": tokens, "extra": {"ignore_eos": True}},
    }
    recipe = {
        "student": str(folder),
        "problems": "problems.jsonl",
        "teachers": [teacher],
        "rounds": 1,
        "train": {"max_steps": 1},
    }
    (run / "recipe.yaml").write_text(json.dumps(recipe))
    loaded = load_recipe(run / "recipe.yaml")
    report = generate_traces(loaded, run / "run", progress=False, say=lambda line: None)["t"]
    assert report["answered"] == requests
    return float(report["tokens"] / report["asking_seconds"])


def theirs(
    python: str,
    folder: Path,
    number: int,
    url: str,
    model: Path,
    requests: int,
    concurrency: int,
    words: int,
    tokens: int,
) -> float:
    """Generated tokens a second, as vLLM's client reports them."""
    command = vllm_command(
        python, "vllm", "bench", "serve", "--backend", "openai-chat", "--base-url", url, "--endpoint",
        "/v1/chat/completions", "--model", "model", "--tokenizer", model, "--dataset-name", "random",
        "--random-input-len", words * 2, "--random-output-len", tokens, "--ignore-eos", "--num-prompts", requests,
        "--max-concurrency", concurrency, "--temperature", "1.0", "--top-p", "0.95", "--seed", number, "--save-result",
        "--result-dir", folder, "--result-filename", f"theirs-{number}.json", "--disable-tqdm",
    )  # fmt: skip
    done = subprocess.run(command, env=vllm_environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stdout[-2000:] + done.stderr[-2000:])
    result = json.loads((folder / f"theirs-{number}.json").read_text())
    assert result["completed"] == requests
    return float(result["output_throughput"])


@click.command()
@click.option("--model", type=click.Path(exists=True, path_type=Path), help="Checkpoint.  [default: a pico-model]")
@click.option("--requests", default=256, show_default=True)
@click.option("--concurrency", default=16, show_default=True)
@click.option("--tokens", default=64, show_default=True, help="Generated tokens a request.")
@click.option("--prompt-words", default=32, show_default=True)
@click.option("--repeats", default=3, show_default=True)
def main(model: Path | None, requests: int, concurrency: int, tokens: int, prompt_words: int, repeats: int) -> None:
    """Print each run, both medians and their ratio."""
    python = find_vllm_python()
    if python is None:
        raise SystemExit("no vLLM: 'make vllm' makes .venv-vllm, or set MOTKIT_VLLM_PYTHON to its interpreter")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "config.json").write_text("{}")
        if model is None:
            from conftest import make_pico_checkpoint

            model = make_pico_checkpoint("llama", folder / "model", **SERVABLE)
        flags = ["--max-model-len", "1024", "--enforce-eager", "--dtype", "bfloat16", "--served-model-name", "model"]
        with vllm_serve(python, model, folder / "serve.log", *flags) as url:
            ours(folder, 1000, url, concurrency * 2, concurrency, prompt_words, tokens)  # warm-up
            found: dict[str, list[float]] = {"ours": [], "theirs": []}
            for number in range(repeats):
                for who in sorted(found, reverse=number % 2 == 1):  # neither is always the second
                    if who == "ours":
                        got = ours(folder, number, url, requests, concurrency, prompt_words, tokens)
                    else:
                        got = theirs(python, folder, number, url, model, requests, concurrency, prompt_words, tokens)
                    found[who].append(got)
                click.echo(f"motkit {found['ours'][-1]:.1f} tokens/s, vllm bench serve {found['theirs'][-1]:.1f}")
    mine, other = (statistics.median(figures) for figures in found.values())
    ratio = statistics.median(one / peer for one, peer in zip(found["ours"], found["theirs"], strict=True))
    click.echo(
        f"motkit generate {mine:.1f} tokens/s, vllm bench serve {other:.1f} tokens/s: ratio {ratio:.3f} "
        f"({requests} requests of {tokens} tokens, {concurrency} in flight, median of {repeats})"
    )


if __name__ == "__main__":
    main()
