"""`motkit merge mot` against `mergekit-yaml` with method linear: wall time and peak memory of whole processes.

    python tests/benchmarks/bench_merge.py [--size-mb 500] [--repeats 5] [--branches 4] [--json FILE]

Both merge the same Llama-shaped bfloat16 checkpoints (random normal · 0.02) into bfloat16. The runs alternate, so that
a slow spell of the machine hits both. mergekit runs without `dtype: float32`, which its linear does not need and which
would slow it down. Peak memory is the process's maximum resident set, file pages that it maps included.

This process stays small (the checkpoints are made by another one): Linux counts the size of the process that starts a
child into the child's maximum.
"""

import argparse
import json
import multiprocessing
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

VOCABULARY = 32_000


def make_checkpoint(folder: Path, seed: int, size_mb: float) -> int:
    """Write a Llama-shaped bfloat16 checkpoint of about ``size_mb`` (10^6 bytes); returns its bytes of tensor data."""
    import torch
    from safetensors.torch import save_file

    hidden = 1024 if size_mb >= 300 else 256
    intermediate = hidden * 11 // 4
    layer = 4 * hidden * hidden + 3 * hidden * intermediate + 2 * hidden
    embeddings = 2 * VOCABULARY * hidden + hidden
    layers = max(1, round((size_mb * 1e6 / 2 - embeddings) / layer))
    shapes = {"model.embed_tokens.weight": (VOCABULARY, hidden), "lm_head.weight": (VOCABULARY, hidden)}
    shapes["model.norm.weight"] = (hidden,)
    for number in range(layers):
        prefix = f"model.layers.{number}"
        shapes |= {f"{prefix}.self_attn.{name}_proj.weight": (hidden, hidden) for name in "qkvo"}
        shapes |= {f"{prefix}.mlp.{name}_proj.weight": (intermediate, hidden) for name in ("gate", "up")}
        shapes[f"{prefix}.mlp.down_proj.weight"] = (hidden, intermediate)
        shapes |= {f"{prefix}.{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: (torch.randn(shape, generator=generator) * 0.02).to(torch.bfloat16) for name, shape in shapes.items()
    }
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 64,
        "vocab_size": VOCABULARY,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    # Both tools copy these files; neither looks inside.
    vocabulary = {f"t{index}": index for index in range(VOCABULARY)}
    tokenizer = {"version": "1.0", "added_tokens": [], "model": {"type": "WordLevel", "vocab": vocabulary}}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text("{}")
    return sum(tensor.numel() * 2 for tensor in tensors.values())


def measure(command: list[str]) -> tuple[float, float]:
    """(wall seconds, peak resident memory in MB) of a process from start to end.

    Raises:
        SystemExit: it failed; its output is shown.
    """
    os.sync()  # what the run before left to be written must not slow this one down
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile() as log:
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        if status:
            log.seek(0)
            sys.exit(f"{' '.join(command)}\n{log.read().decode()}")
    return seconds, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size-mb", type=float, default=500, help="size of a branch, 10^6 bytes")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--branches", type=int, default=4)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every measurement here")
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory(prefix="bench-merge-") as temporary:
        folder = Path(temporary)
        student, *branches = (
            folder / name for name in ("student", *(f"branch-{n}" for n in range(arguments.branches)))
        )
        print(f"making {1 + len(branches)} checkpoints of {arguments.size_mb:.0f} MB …", file=sys.stderr, flush=True)
        for seed, checkpoint in enumerate((student, *branches)):
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                size = pool.submit(make_checkpoint, checkpoint, seed, arguments.size_mb).result()
        models = [{"model": str(branch), "parameters": {"weight": 1.0}} for branch in branches]
        config = folder / "linear.yaml"
        config.write_text(json.dumps({"merge_method": "linear", "models": models, "out_dtype": "bfloat16"}))
        out = folder / "out"
        flags = [flag for branch in branches for flag in ("--branch", str(branch))]
        commands = {
            "motkit merge mot": [
                sys.executable,
                "-m",
                "motkit",
                "merge",
                "mot",
                str(out),
                "--base",
                str(student),
                *flags,
            ],
            "mergekit-yaml linear": [sys.executable, "-m", "mergekit.scripts.run_yaml", str(config), str(out)],
        }
        runs: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
        for _ in range(arguments.repeats):
            for name, command in commands.items():
                runs[name].append(measure(command))
                shutil.rmtree(out)
                seconds, memory = runs[name][-1]
                print(f"{name}: {seconds:.2f} s, {memory:.0f} MB", file=sys.stderr, flush=True)

    print(f"{len(branches)} branches of {size / 1e6:.0f} MB, bfloat16 → bfloat16, {arguments.repeats} runs each")
    print(f"{'':22}{'wall, median':>14}{'min':>9}{'max':>9}{'peak RSS':>12}")
    medians = {}
    for name, values in runs.items():
        walls, peaks = zip(*values, strict=True)
        medians[name] = statistics.median(walls), max(peaks)
        wall = f"{medians[name][0]:>12.2f} s{min(walls):>7.2f} s{max(walls):>7.2f} s"
        print(f"{name:22}{wall}{medians[name][1]:>9.0f} MB")
    ours, theirs = medians["motkit merge mot"], medians["mergekit-yaml linear"]
    ratios = {"wall": ours[0] / theirs[0], "peak_rss": ours[1] / theirs[1]}
    print(f"motkit / mergekit     wall × {ratios['wall']:.2f}     peak RSS × {ratios['peak_rss']:.2f}")
    if arguments.json:
        report: dict[str, Any] = {
            "branches": len(branches),
            "bytes_per_branch": size,
            "runs": {name: [{"seconds": s, "peak_rss_mb": m} for s, m in values] for name, values in runs.items()},
            "ratios": ratios,
            "python": platform.python_version(),
            "versions": {name: version(name) for name in ("torch", "mergekit", "transformers")},
            "cpus": os.cpu_count(),
        }
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
