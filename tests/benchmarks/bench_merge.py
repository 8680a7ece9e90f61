"""Our merges against mergekit's, and against the disk: wall time and peak memory of whole processes.

    python tests/benchmarks/bench_merge.py [--size-mb 500] [--repeats 5] [--branches 4] [--json FILE] [--cases …]

All merge the same Llama-shaped bfloat16 checkpoints (a student and branches near it) into bfloat16. The cases:

* mot: `motkit merge mot` and `mergekit-yaml` with linear;
* unequal: the same with weights 0.3, 0.7, …, whose sums are exact in no float64;
* ties: `motkit merge mot_ties` trimmed per tensor and `mergekit-yaml` with ties (dtype float32 for mergekit, without
  which its result is far off), and the errors of both against a float64 computation, in units of rounding once;
* robust: `motkit merge` with mot_median and mot_geometric_median; no peer in mergekit;
* disk: mot inside a process, imports aside, and `cat` of the inputs to nowhere and of one of them to a new file;
* memory: mot, mot_ties and robust means where no process may allocate more than a quarter of one branch.

The runs of a case alternate, so that a slow spell of the machine hits both. mergekit's linear runs without
`dtype: float32`, which it does not need and which would slow it down. Peak memory is the maximum resident set of the
process, or of the largest that it started, file pages that it maps included: `motkit merge` forks a worker per core,
which shares what it was forked with and adds some 22 MB of its own to it.

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
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

VOCABULARY = 32_000


def make_checkpoint(folder: Path, seed: int, size_mb: float) -> int:
    """Write a Llama-shaped bfloat16 checkpoint of about ``size_mb`` (10^6 bytes); returns its bytes of tensor data.

    Seed 0 is the student; the others are it and an update of a tenth of its size.
    """
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
    start, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes.items():
        weights = torch.randn(shape, generator=start) * 0.02
        if seed:
            weights += torch.randn(shape, generator=own) * 0.002
        tensors[name] = weights.to(torch.bfloat16)
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


IN_PROCESS = """
import sys, time
import torch, yaml, tqdm
import motkit.merge_methods
from motkit.merge import merge_checkpoints
out, student, *branches = sys.argv[1:]
started = time.perf_counter()
merge_checkpoints("mot", out, base=student, branches=branches, quiet=True)
print(time.perf_counter() - started)
"""

IN_LITTLE_MEMORY = """
import re, resource, sys
from pathlib import Path
import torch, yaml, tqdm
import motkit.merge_methods
from motkit.merge import merge_checkpoints
method, allowed, out, student, *branches = sys.argv[1:]
(torch.ones(10) + 1).sum()
used = int(re.search(r"VmData:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (used + int(allowed), used + int(allowed)))
merge_checkpoints(method, out, base=student, branches=branches, quiet=True)
"""

ERRORS = """
import json, sys
import torch
from safetensors import safe_open
ours, theirs, student, *branches = [safe_open(f"{path}/model.safetensors", "pt") for path in sys.argv[1:]]
worst = [0.0, 0.0]
for name in list(ours.keys())[:12]:
    base = student.get_tensor(name).double()
    kept = []
    for branch in branches:
        delta = branch.get_tensor(name).double() - base
        k = max(1, int(0.5 * delta.numel()))
        kept.append(torch.where(delta.abs() >= delta.abs().view(-1).sort(descending=True).values[k - 1], delta, 0.0))
    kept = torch.stack(kept)
    agrees = kept.sign() == torch.where(kept.sum(0) >= 0, 1.0, -1.0)
    exact = base + (kept * agrees).sum(0) / agrees.sum(0).clamp_min(1)
    once = (exact.float().to(torch.bfloat16).double() - exact).norm()
    for place, result in enumerate((ours, theirs)):
        worst[place] = max(worst[place], float((result.get_tensor(name).double() - exact).norm() / once))
print(json.dumps(worst))
"""

WEIGHTS = (0.3, 0.7, 0.45, 1.1, 0.9, 0.2, 0.6, 0.8)


def output_of(command: list[str]) -> str:
    os.sync()
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    if done.returncode:
        sys.exit(f"{' '.join(command[:3])}\n{done.stdout}{done.stderr}")
    return done.stdout


class Bench:
    """The checkpoints, and what is measured on them."""

    def __init__(self, folder: Path, size_mb: float, num_branches: int, repeats: int) -> None:
        self.folder, self.repeats = folder, repeats
        self.student, *self.branches = (folder / n for n in ("student", *(f"branch-{i}" for i in range(num_branches))))
        print(f"making {1 + num_branches} checkpoints of {size_mb:.0f} MB …", file=sys.stderr, flush=True)
        for seed, checkpoint in enumerate((self.student, *self.branches)):
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
                self.size = pool.submit(make_checkpoint, checkpoint, seed, size_mb).result()
        self.report: dict[str, Any] = {"branches": num_branches, "bytes_per_branch": self.size, "runs": {}}

    def ours(self, config: str, out: Path) -> list[str]:
        flags = [flag for branch in self.branches for flag in ("--branch", str(branch))]
        return [sys.executable, "-m", "motkit", "merge", config, str(out), "--base", str(self.student), *flags]

    def mergekits(self, name: str, config: dict[str, Any], out: Path) -> list[str]:
        file = self.folder / f"{name}.yaml"
        file.write_text(json.dumps({"out_dtype": "bfloat16", **config}))
        return [sys.executable, "-m", "mergekit.scripts.run_yaml", str(file), str(out)]

    def config(self, name: str, config: dict[str, Any]) -> str:
        file = self.folder / f"ours-{name}.yaml"
        file.write_text(json.dumps({"base_model": "$student", "out_dtype": "bfloat16", **config}))
        return str(file)

    def compare(self, case: str, commands: dict[str, list[str]], keep: bool = False) -> None:
        """Time the commands in turn; the last word of each is its output's folder."""
        outs = {name: Path(next(w for w in command if w.startswith(str(self.folder / "out")))) for name, command in commands.items()}  # fmt: skip # noqa: E501
        runs: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
        for repeat in range(self.repeats):
            for name, command in commands.items():
                runs[name].append(measure(command))
                if not keep or repeat < self.repeats - 1:
                    shutil.rmtree(outs[name])
                print(f"{name}: {runs[name][-1][0]:.2f} s, {runs[name][-1][1]:.0f} MB", file=sys.stderr, flush=True)
        print(f"\n{case:36}{'wall, median':>14}{'min':>9}{'max':>9}{'peak RSS':>12}")
        medians = {}
        for name, values in runs.items():
            walls, peaks = zip(*values, strict=True)
            medians[name] = statistics.median(walls), max(peaks)
            wall = f"{medians[name][0]:>12.2f} s{min(walls):>7.2f} s{max(walls):>7.2f} s"
            print(f"{name:36}{wall}{medians[name][1]:>9.0f} MB")
        self.report["runs"][case] = {n: [{"seconds": s, "peak_rss_mb": m} for s, m in v] for n, v in runs.items()}
        if len(medians) == 2:
            ours, theirs = medians.values()
            ratios = {"wall": ours[0] / theirs[0], "peak_rss": ours[1] / theirs[1]}
            self.report["runs"][case]["ratios"] = ratios
            print(f"{'ours / mergekit':36}wall × {ratios['wall']:.2f}     peak RSS × {ratios['peak_rss']:.2f}")

    def models(self, weights: Sequence[float]) -> list[dict[str, Any]]:
        return [
            {"model": str(branch), "parameters": {"weight": weight}}
            for branch, weight in zip(self.branches, weights, strict=False)
        ]

    def mot(self) -> None:
        out = self.folder / "out"
        linear = {"merge_method": "linear", "models": self.models([1.0] * len(self.branches))}
        self.compare(
            "mot",
            {"motkit merge mot": self.ours("mot", out), "mergekit-yaml linear": self.mergekits("linear", linear, out)},
        )

    def unequal(self) -> None:
        out, models = self.folder / "out", self.models(WEIGHTS)
        ours = self.config("unequal", {"merge_method": "mot", "models": models})
        command = [sys.executable, "-m", "motkit", "merge", ours, str(out), "--base", str(self.student)]
        theirs = self.mergekits("unequal", {"merge_method": "linear", "models": models}, out)
        self.compare("weights 0.3, 0.7, …", {"motkit merge mot": command, "mergekit-yaml linear": theirs})

    def ties(self) -> None:
        parameters = {"density": 0.5, "weight": 1.0}
        ours = {"merge_method": "mot_ties", "models": [{"model": "$branches", "parameters": parameters}]}
        models = [{"model": str(branch), "parameters": parameters} for branch in self.branches]
        theirs = {"merge_method": "ties", "base_model": str(self.student), "models": models, "dtype": "float32"}
        outs = [self.folder / "out-ours", self.folder / "out-theirs"]
        commands = {
            "motkit merge mot_ties": self.ours(self.config("ties", ours), outs[0]),
            "mergekit-yaml ties": self.mergekits("ties", theirs, outs[1]),
        }
        self.compare("ties", commands, keep=True)
        paths = [str(path) for path in (*outs, self.student, *self.branches)]
        errors = json.loads(output_of([sys.executable, "-c", ERRORS, *paths]))
        self.report["runs"]["ties"]["errors"] = errors
        print(f"error / error of rounding once      ours {errors[0]:.4f}     mergekit {errors[1]:.4f}")
        for out in outs:
            shutil.rmtree(out)

    def robust(self) -> None:
        out = self.folder / "out"
        methods = ("mot_median", "mot_trimmed_mean", "mot_geometric_median")
        self.compare("robust", {f"motkit merge {m}": self.ours(m, out) for m in methods})

    def disk(self) -> None:
        out, copy = self.folder / "out", self.folder / "copy"
        inputs = " ".join(str(branch / "model.safetensors") for branch in self.branches)
        paths = [str(path) for path in (self.student, *self.branches)]
        inside, cats = [], []
        for _ in range(self.repeats):
            inside.append(float(output_of([sys.executable, "-c", IN_PROCESS, str(out), *paths])))
            shutil.rmtree(out)
            os.sync()
            started = time.perf_counter()
            subprocess.run(
                ["bash", "-c", f"cat {inputs} >/dev/null; cat {paths[1]}/model.safetensors >{copy}; sync {copy}"]
            )
            cats.append(time.perf_counter() - started)
            copy.unlink()
        ratio = statistics.median(inside) / statistics.median(cats)
        self.report["runs"]["disk"] = {"inside": inside, "cat": cats, "ratio": ratio}
        middle = statistics.median(inside), statistics.median(cats)
        print(f"\nmot inside the process {middle[0]:.2f} s, cat {middle[1]:.2f} s: × {ratio:.2f}")

    def memory(self) -> None:
        allowed, out = self.size // 4, self.folder / "out"
        paths = [str(path) for path in (out, self.student, *self.branches)]
        for method in ("mot", "mot_ties", "mot_median", "mot_geometric_median"):
            output_of([sys.executable, "-c", IN_LITTLE_MEMORY, method, str(allowed), *paths])
            shutil.rmtree(out)
        print(f"\nmerged with at most {allowed / 1e6:.0f} MB allocated, a quarter of one branch: ok")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cases = ("mot", "unequal", "ties", "robust", "disk", "memory")
    parser.add_argument("--size-mb", type=float, default=500, help="size of a branch, 10^6 bytes")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--branches", type=int, default=4, help="at most 8")
    parser.add_argument("--cases", nargs="+", choices=cases, default=cases)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every measurement here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-merge-") as temporary:
        bench = Bench(Path(temporary), arguments.size_mb, arguments.branches, arguments.repeats)
        print(
            f"{arguments.branches} branches of {bench.size / 1e6:.0f} MB, bfloat16 → bfloat16, {arguments.repeats} runs"
        )
        for case in arguments.cases:
            getattr(bench, case)()
    if arguments.json:
        bench.report |= {
            "python": platform.python_version(),
            "versions": {name: version(name) for name in ("torch", "mergekit", "transformers")},
            "cpus": os.cpu_count(),
        }
        arguments.json.write_text(json.dumps(bench.report, indent=2) + "\n")


if __name__ == "__main__":
    main()
