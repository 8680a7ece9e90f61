import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from experiment import write_experiment

from motkit.cli import main


def command(*arguments, code=0):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def test_help_imports_nothing_heavy():
    code = (
        "import sys, motkit.cli\n"
        "sys.exit(bool({'torch', 'transformers', 'pandas', 'mergekit', 'rich'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    for name in ("round", "merge", "status", "recipes"):
        assert "Usage" in command(name, "--help").output


def test_a_fault_is_one_line_without_traceback_and_exits_2(tmp_path):
    (tmp_path / "bad.yaml").write_text("student: x\nround: 3\n")
    result = command("round", tmp_path / "bad.yaml", code=2)
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    assert "error: " in result.stderr
    assert "round: unknown key; did you mean 'rounds'?" in result.stderr


def test_a_bug_shows_itself(monkeypatch, tmp_path):
    import motkit.summary

    def bug(run):
        raise ZeroDivisionError

    monkeypatch.setattr(motkit.summary, "summarise", bug)
    with pytest.raises(ZeroDivisionError):
        command("status", tmp_path)


def test_a_folder_that_is_no_run_is_said(tmp_path):
    assert "not a run directory" in command("status", tmp_path, code=2).stderr


def test_recipes_are_listed_and_copied(tmp_path):
    listed = command("recipes").output
    for name in ("quickstart", "smollm2-135m-gsm8k", "mot", "ties", "dare_ties", "linear", "slerp", "task_arithmetic"):
        assert f"  {name}" in listed
    command("recipes", "copy", "mot", tmp_path / "mine.yaml")
    assert "merge_method: mot" in (tmp_path / "mine.yaml").read_text()
    assert "exists already" in command("recipes", "copy", "mot", tmp_path / "mine.yaml", code=2).stderr
    command("recipes", "copy", "quickstart", tmp_path / "quick")
    assert sorted(path.name for path in (tmp_path / "quick").iterdir()) == ["make_data.py", "recipe.yaml"]
    assert "known: " in command("recipes", "copy", "nothing", code=2).stderr


def test_every_yaml_opens_with_its_purpose_and_a_command():
    root = Path(__file__).parent.parent
    files = [*root.glob("recipes/*.yaml"), *root.glob("recipes/*/recipe.yaml"), *root.glob("merge_configs/*.yaml")]
    assert len(files) >= 8
    for file in files:
        comment = [line for line in file.read_text().splitlines() if line.startswith("#")]
        assert any("motkit" in line for line in comment), file


def test_round_and_status_on_a_miniature(tmp_path, make_pico):
    recipe = write_experiment(tmp_path / "data", make_pico)
    run = tmp_path / "run"
    plan = json.loads(command("round", recipe, "--run", run, "--all", "--dry-run", "--json").stdout)
    assert plan[0]["stage"] == "traces"
    assert "what would be done" in command("round", recipe, "--run", run, "--dry-run").stdout
    done = command("round", recipe, "--run", run, "rounds=1", "train.max_steps=2")
    assert "merged" in done.stdout
    assert f"student: {run}/final" in done.stdout.replace("\n", "")
    rows = json.loads(command("status", run, "--json").stdout)
    assert [row["name"] for row in rows] == ["base", "plain", "wordy", "merged"]
    assert rows[1]["steps"] == 2
    assert "--all and --rounds exclude each other" in command("round", recipe, "--all", "--rounds", "2", code=2).stderr


def test_merge_reports_what_it_did(tmp_path, make_pico):
    for seed, name in enumerate(["base", "one", "two"]):
        make_pico("llama", tmp_path / name, seed=seed)
    branches = ["--branch", tmp_path / "one", "--branch", tmp_path / "two"]
    report = json.loads(
        command("merge", "mot", tmp_path / "out", "--base", tmp_path / "base", *branches, "--json").stdout
    )
    assert report["method"] == "mot"
    again = command("merge", "mot", tmp_path / "out", "--base", tmp_path / "base", *branches, code=2)
    assert "exists already" in again.stderr
