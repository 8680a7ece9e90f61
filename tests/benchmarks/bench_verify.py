"""Verification: answers per second of ``math`` on one core, memory over many traces, the cost of a hostile answer.

    python tests/benchmarks/bench_verify.py [--answers 1000] [--traces 100000] [--time-limit 2]

The answers of the first figure are all different, and none is equal as text or as a plain number: all need math-verify.
Those of the second are plain numbers, as most are in practice, which no worker process sees.
"""

import itertools
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import click

from motkit.traces import SeedProblem
from motkit.verify import Answer, Verifier

BOMBS = ["9^{9^{9}}", "1000000!", r"\binom{10^{9}}{10^{8}}", "(" * 900, "(x+y+z+w)^{400}", "x^" * 500 + "x"]


def answers(count: int) -> Iterator[Answer]:
    """Fractions, roots, tuples, multiples of π, polynomials, sets, mixed numbers, units, a fifth is wrong."""
    rng = random.Random(0)
    for number in range(count):
        a, b, c = rng.randint(2, 999), rng.randint(2, 999), rng.randint(2, 9)
        known, given = [
            (rf"\frac{{{a}}}{{{b}}}", f"{a}/{b}"),
            (rf"{a}\sqrt{{{c}}}", rf"\sqrt{{{a * a * c}}}"),
            (f"({a},{b})", rf"\left({a}, {b}\right)"),
            (rf"\frac{{{a}\pi}}{{{c}}}", rf"\frac{{{a}}}{{{c}}} \pi"),
            (f"x^2+{a}x", f"x(x+{a})"),
            (rf"\{{{a},{b}\}}", rf"\{{{b},{a}\}}"),
            (f"{a}.5", rf"{a}\frac{{1}}{{2}}"),
            (rf"{a}\text{{ cm}}", rf"{a}.{b}\text{{ cm}}"),
            (f"{a}", f"x={a}"),
            (rf"\frac{{{a}}}{{{b}}}", rf"\frac{{{a + 1}}}{{{b}}}"),
        ][number % 10]
        yield Answer(SeedProblem(id=str(number), prompt="?", answer=known), "so " * 1000 + rf"\boxed{{{given}}}")


def processor_seconds(judge: Verifier) -> float:
    """Of this process and of the child that compares."""
    worker = judge._pool.workers[0].process.pid
    child = Path(f"/proc/{worker}/task/{worker}/children").read_text().split()[0]
    fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
    return time.process_time() + (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def peak_of_the_command(folder: Path, count: int) -> tuple[float, float, float]:
    """(MB of the file, peak MB of the process, seconds) of ``motkit verify`` on ``count`` traces."""
    (folder / "p.jsonl").write_text(json.dumps({"id": "p", "prompt": "?", "answer": "42"}) + "\n")
    with (folder / "t.jsonl").open("w") as file:
        for sample in range(count):
            row = {"problem_id": "p", "sample": sample, "reasoning": "so " * 2000, "finish_reason": "stop"}
            file.write(json.dumps({**row, "response": rf"It is \boxed{{{sample}}}."}) + "\n")
    command = [sys.executable, "-m", "motkit", "verify", folder / "t.jsonl", "--problems", folder / "p.jsonl", "--json"]
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    return (folder / "t.jsonl").stat().st_size / 1e6, peak, seconds


@click.command()
@click.option("--answers", "num_answers", default=1000, show_default=True)
@click.option("--traces", "num_traces", default=100_000, show_default=True)
@click.option("--time-limit", "time_limit_s", default=2.0, show_default=True)
def main(num_answers: int, num_traces: int, time_limit_s: float) -> None:
    """Print the three figures."""
    with tempfile.TemporaryDirectory() as temporary:
        for count in (num_traces // 10, num_traces):
            size, peak, seconds = peak_of_the_command(Path(temporary), count)
            click.echo(f"motkit verify, {count:,} traces ({size:.0f} MB): peak {peak:.0f} MB, {seconds:.1f} s")
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # the worker inherits it: one core for both
    with Verifier("math", workers=1, time_limit_s=time_limit_s) as judge:
        judge.many(itertools.islice(answers(1), 1))  # the worker has started
        started, used = time.perf_counter(), processor_seconds(judge)
        verdicts = judge.many(answers(num_answers))
        rate = num_answers / (time.perf_counter() - started)
        used = processor_seconds(judge) - used
        right = sum(verdict.correct is True for verdict in verdicts)
        click.echo(
            f"math: {rate:.0f} verifications/s on one core by the clock, {num_answers / used:.0f} per "
            f"second of processor time (a busy machine); {right} of {num_answers} right"
        )
        costs = []
        for bomb in BOMBS:
            started = time.perf_counter()
            verdict = judge.one(SeedProblem(id="p", prompt="?", answer="7"), rf"\boxed{{{bomb}}}")
            costs.append(time.perf_counter() - started)
            assert verdict.correct is not True
    click.echo(
        f"hostile answers under a limit of {time_limit_s:g} s: at most {max(costs):.2f} s, "
        f"median {statistics.median(costs):.2f} s"
    )


if __name__ == "__main__":
    main()
