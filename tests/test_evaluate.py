import json
import subprocess
import sys

import pytest
from conftest import make_pico_checkpoint
from experiment import write_experiment

from motkit import generate
from motkit.errors import UserError
from motkit.recipe import Evaluation, read_evaluation
from motkit.scores import score
from motkit.scoring import evaluate_student


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    write_experiment(folder, make_pico_checkpoint)
    return folder


def settings(data, **more):
    values = {"problems": str(data / "heldout.jsonl"), "verifier": "exact", "samples": 3, "batch_size": 2}
    return Evaluation.model_validate({**values, "sampling": {"temperature": 1.0, "max_tokens": 4}, **more})


def test_a_student_is_scored_and_the_scores_follow_from_the_file(data, tmp_path):
    traces = {"plain": str(data / "heldout-plain.jsonl")}
    entry = evaluate_student(data / "student", settings(data, traces=traces), tmp_path / "out", progress=False)
    rows = [json.loads(line) for line in (tmp_path / "out/evaluation/student.jsonl").read_text().splitlines()]
    assert [(row["problem_id"], row["sample"]) for row in rows] == [
        (f"p{n}", k) for n in range(20, 24) for k in range(3)
    ]
    assert {key: entry["scores"][key] for key in score(rows)} == score(rows)
    assert entry["scores"]["heldout_loss"] == entry["scores"]["heldout_loss_by_set"]["plain"]
    assert entry["versions"]["torch"]
    assert entry["cost"]["flops"] > 0
    assert json.loads((tmp_path / "out/evaluation.json").read_text())["student"]["scores"] == entry["scores"]


def test_what_is_done_is_not_done_again_and_other_settings_are(data, tmp_path):
    said: list[str] = []
    options = {"progress": False, "say": said.append}
    first = evaluate_student(data / "student", settings(data), tmp_path / "out", **options)
    assert evaluate_student(data / "student", settings(data), tmp_path / "out", **options) == first
    assert len(said) == 1
    other = evaluate_student(data / "student", settings(data, samples=2), tmp_path / "out", **options)
    assert other["scores"]["samples"] == 2


def test_an_interrupted_evaluation_goes_on_with_what_it_had(data, tmp_path, monkeypatch):
    whole = evaluate_student(data / "student", settings(data), tmp_path / "whole", progress=False)
    original, calls = generate._generation, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 8:  # in the second of two batches of two problems
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(generate, "_generation", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate_student(data / "student", settings(data), tmp_path / "out", progress=False)
    kept = (tmp_path / "out/evaluation/student.jsonl.partial").read_text().splitlines()
    assert len(kept) == 1 + 6 + 1  # what it is of, the first batch, one of the second
    with (tmp_path / "out/evaluation/student.jsonl.partial").open("a") as file:
        file.write('{"problem": 3, "sam')  # torn by a kill
    calls.clear()
    monkeypatch.setattr(generate, "_generation", lambda *arguments: calls.append(arguments) or original(*arguments))
    entry = evaluate_student(data / "student", settings(data), tmp_path / "out", progress=False)
    assert len(calls) == 6  # the second batch alone
    assert entry["scores"] == whole["scores"]
    results = [(tmp_path / name / "evaluation/student.jsonl").read_bytes() for name in ("whole", "out")]
    assert results[0] == results[1]


def test_presets_are_the_usual_settings_and_take_another_source(tmp_path, data):
    found = read_evaluation({"preset": "aime24", "problems": str(data / "heldout.jsonl")})
    assert (found.samples, found.sampling.temperature, found.sampling.top_p) == (16, 0.6, 0.95)
    assert found.sampling.max_tokens == 32768
    assert found.problems == str(data / "heldout.jsonl")
    assert str(read_evaluation({"preset": "aime25"}).problems).startswith("hf://")
    with pytest.raises(UserError, match="unknown 'aime23'; known: aime24, aime25"):
        read_evaluation({"preset": "aime23"})


def test_the_command_says_where_and_what(data, tmp_path):
    def motkit(*arguments):
        command = [sys.executable, "-m", "motkit", "evaluate", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)

    done = motkit(data / "student", "--problems", data / "heldout.jsonl", "--verifier", "exact", "--max-tokens", "4")
    assert done.returncode == 0, done.stderr
    assert "avg@1" in done.stdout
    missing = motkit(data / "student", "--problems", "nowhere.jsonl")
    assert (missing.returncode, missing.stderr) == (2, "error: file not found: nowhere.jsonl\n")
    nothing = motkit(data / "student")
    assert nothing.returncode == 2
    assert "nothing to evaluate" in nothing.stderr
