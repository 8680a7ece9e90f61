"""A whole experiment in miniature, for the tests of the loop: pico student, two teachers, held-out problems."""

import json
from pathlib import Path

RECIPE = """
student: student
problems: problems.jsonl
teachers:
  - {name: plain, traces: plain.jsonl}
  - {name: wordy, traces: wordy.jsonl}
filter: {verifier: exact}
rounds: 2
train: {max_steps: 4, per_device_train_batch_size: 4, learning_rate: 1e-3, max_length: 96, save_steps: 2,
        gradient_checkpointing: false}
merge: mot
evaluate:
  problems: heldout.jsonl
  traces: {plain: heldout-plain.jsonl}
  sampling: {max_tokens: 4}
  batch_size: 4
"""


def write_experiment(folder: Path, make_pico, recipe: str = RECIPE) -> Path:
    """The recipe's path. ``wordy`` has one wrong, one cut-off and one over-long trace."""
    folder.mkdir(parents=True, exist_ok=True)
    make_pico("llama", folder / "student")

    def write(name, rows):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    def trace(number, reasoning="", answer=None, finish="stop"):
        boxed = rf"\boxed{{{number + 2 if answer is None else answer}}}"
        fields = {"problem_id": f"p{number}", "sample": 0, "reasoning": reasoning, "response": boxed}
        return {**fields, "finish_reason": finish}

    def problems(numbers):
        return [{"id": f"p{n}", "prompt": f"{n}+2?", "answer": str(n + 2)} for n in numbers]

    write("problems.jsonl", problems(range(8)))
    write("plain.jsonl", [trace(n) for n in range(8)])
    odd = [trace(5, answer=1), trace(6, finish="length"), trace(7, reasoning="so " * 60)]
    write("wordy.jsonl", [trace(n, reasoning=f"{n} and two") for n in range(5)] + odd)
    write("heldout.jsonl", problems(range(20, 24)))
    write("heldout-plain.jsonl", [trace(n) for n in range(20, 24)])
    (folder / "mini.yaml").write_text(recipe)
    return folder / "mini.yaml"
