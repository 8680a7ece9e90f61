"""Sums of two one-digit numbers (reasoning-gym's chain_sum), easy enough for models of a hundred million parameters.

python recipes/real-teachers-cpu/make_data.py
"""

import json
import shutil
from pathlib import Path

import reasoning_gym

NUM_PROBLEMS, NUM_HELDOUT, SEED = 60, 20, 0


def make_data(folder: Path) -> None:
    """Write ``problems.jsonl`` and ``heldout.jsonl``, which share no problem, into ``folder``."""
    size = 40 * (NUM_PROBLEMS + NUM_HELDOUT)
    dataset = reasoning_gym.create_dataset(
        "chain_sum", min_terms=2, max_terms=2, min_digits=1, max_digits=1, size=size, seed=SEED
    )
    sums = {row["question"].split(":")[1].strip(" =."): row["answer"] for row in dataset}
    rows = [
        {"id": f"sum-{number}", "prompt": f"What is {text}?", "answer": answer, "source": "reasoning_gym:chain_sum"}
        for number, (text, answer) in enumerate(sums.items())
    ][: NUM_PROBLEMS + NUM_HELDOUT]
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    for name, part in (("problems", rows[:NUM_PROBLEMS]), ("heldout", rows[NUM_PROBLEMS:])):
        (partial / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    print(f"{folder}: {len(rows[:NUM_PROBLEMS])} problems, {len(rows[NUM_PROBLEMS:])} held out")


if __name__ == "__main__":
    make_data(Path(__file__).resolve().parent / "data")
