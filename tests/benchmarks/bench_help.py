"""Wall time of ``motkit --help`` against ``mergekit-yaml --help``, whole processes, in turn.

python tests/benchmarks/bench_help.py [--repeats 5]
"""

import statistics
import subprocess
import sys
import time
from pathlib import Path

import click


@click.command()
@click.option("--repeats", default=5, show_default=True)
def main(repeats: int) -> None:
    """Print the median of each and their ratio."""
    scripts = Path(sys.executable).parent
    seconds: dict[str, list[float]] = {"motkit": [], "mergekit-yaml": []}
    for _ in range(repeats):
        for command, taken in seconds.items():
            started = time.perf_counter()
            subprocess.run([scripts / command, "--help"], check=True, capture_output=True)
            taken.append(time.perf_counter() - started)
    ours, theirs = (statistics.median(taken) for taken in seconds.values())
    click.echo(
        f"motkit --help {ours:.2f} s, mergekit-yaml --help {theirs:.2f} s: ratio {ours / theirs:.3f} ({repeats} runs)"
    )


if __name__ == "__main__":
    main()
