"""What the loop adds: wall time of ``motkit round`` over the time inside its ``SFTTrainer.train()``.

    python tests/benchmarks/bench_round.py                                # a Llama of 30 M parameters, made here
    python tests/benchmarks/bench_round.py --recipe RECIPE [KEY=VALUE]...  # any recipe; evaluation is left out

The whole process counts: imports, reading and rendering traces, loading, saving, hashing, merging, publishing.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click


def make_experiment(folder: Path) -> Path:
    """A recipe with a random Llama of 30 M parameters and two teachers of long traces."""
    sys.path.insert(0, str(Path(__file__).parent.parent))
    from conftest import make_pico_checkpoint

    make_pico_checkpoint(
        "llama", folder / "student", hidden_size=512, intermediate_size=1536, num_hidden_layers=9,
        num_attention_heads=8, num_key_value_heads=4, head_dim=64,
    )  # fmt: skip
    lines = {"problems": [], "a": [], "b": []}
    for number in range(64):
        lines["problems"].append({"id": f"p{number}", "prompt": f"{number} + 2?", "answer": str(number + 2)})
        for teacher in ("a", "b"):
            row = {"problem_id": f"p{number}", "sample": 0, "reasoning": f"so {teacher} " * 40, "finish_reason": "stop"}
            lines[teacher].append({**row, "response": rf"\boxed{{{number + 2}}}"})
    for name, rows in lines.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "bench.yaml").write_text(
        "student: student\nproblems: problems.jsonl\n"
        "teachers: [{name: a, traces: a.jsonl}, {name: b, traces: b.jsonl}]\n"
        "filter: {verifier: exact}\n"
        "rounds: 1\ntrain: {max_steps: 20, per_device_train_batch_size: 8, learning_rate: 1e-4, max_length: 512}\n"
    )
    return folder / "bench.yaml"


@click.command()
@click.option("--recipe", type=click.Path(exists=True, path_type=Path))
@click.argument("overrides", nargs=-1)
def main(recipe: Path | None, overrides: tuple[str, ...]) -> None:
    """Print both times and the overhead."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        recipe = recipe or make_experiment(folder)
        command = [sys.executable, "-m", "motkit", "round", recipe, "evaluate=null", *overrides]
        started = time.perf_counter()
        subprocess.run([*command, "--run", folder / "run", "--all", "--json"], check=True, stdout=subprocess.DEVNULL)
        wall = time.perf_counter() - started
        records = (folder / "run").glob("round_*/branches/*/done.json")
        trained = sum(json.loads(record.read_text())["cost"]["train_seconds"] for record in records)
    click.echo(
        f"motkit round {wall:.1f} s, inside SFTTrainer.train() {trained:.1f} s: the loop adds {wall / trained - 1:.1%}"
    )


if __name__ == "__main__":
    main()
