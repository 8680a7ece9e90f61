import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy
import pandas
import pytest
from experiment import write_experiment

import motkit
from motkit.compare import arm_recipe, plan_comparison, run_comparison
from motkit.errors import UserError
from motkit.scores import score
from motkit.summary import ledger

SEEDS = (0, 1)
pytestmark = pytest.mark.slow


def compare(recipe, folder, *overrides, **options):
    said: list[str] = []
    loaded = motkit.load_recipe(recipe, ["evaluate.every_steps=2", *overrides])
    settings = {"seeds": SEEDS, "budgets": ("steps", "compute"), "progress": False, "say": said.append, **options}
    return run_comparison(loaded, folder, **settings), said


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(recipe, folder, result, lines) of a comparison of two seeds under both budgets."""
    from conftest import make_pico_checkpoint

    folder = tmp_path_factory.mktemp("compare")
    recipe = write_experiment(folder / "data", make_pico_checkpoint)
    result, said = compare(recipe, folder / "compare", leave_out=("wordy",))
    return recipe, folder / "compare", result, said


def test_arms_are_the_papers_settings_of_the_loop(whole):
    recipe, *_ = whole
    loaded = motkit.load_recipe(recipe)  # two teachers, two rounds of four steps
    runs = {
        run.run: arm_recipe(loaded, run)
        for run in plan_comparison(loaded, motkit.compare.ARMS, [7], motkit.compare.BUDGETS)
    }

    def says(run):
        settings = runs[f"seed_7/{run}"]
        return settings.branch_names, settings.rounds, settings.train["max_steps"], settings.seed

    assert says("std-plain") == (("plain",), 1, 8, 7)
    assert says("std-plain.compute") == (("plain",), 1, 16, 7)
    assert says("mtd") == (("union",), 1, 8, 7)
    assert says("mtd.compute") == (("union",), 1, 16, 7)
    assert says("posthoc") == (("plain", "wordy"), 1, 8, 7)
    assert says("mot") == (("plain", "wordy"), 2, 4, 7)


def test_every_arm_gets_the_compute_of_mot_under_that_budget(whole):
    _, _, result, _ = whole
    steps = result.arms.set_index(["budget", "arm"])["branch_steps"]
    assert steps["compute", "mot"] == 2 * 2 * 4
    for arm in ("mtd", "posthoc", "mot"):
        assert steps["compute", arm] == 16
    assert set(steps["compute", "std"]) == {16.0}
    assert set(steps["steps", "std"]) == {8.0}
    assert steps["steps", "mtd"] == 8


def test_a_branch_that_two_arms_have_in_common_is_trained_once(whole):
    _, folder, _, said = whole
    assert any(
        "seed_1/posthoc: round_01/branches/wordy: is std-wordy's round_01/branches/wordy" in line for line in said
    )
    files = [
        folder / f"seed_1/{run}/round_01/branches/wordy/checkpoint/model.safetensors"
        for run in ("std-wordy", "posthoc")
    ]
    assert files[0].stat().st_ino == files[1].stat().st_ino
    # but each arm's own costs are counted in full
    spent = ledger(folder / "seed_1/posthoc")
    assert spent.loc[spent["kind"] == "branch", "branch_steps"].sum() == 16


def test_the_arms_share_the_traces_that_the_filter_kept(whole):
    _, folder, _, _ = whole
    kept = (folder / "prepared/traces/wordy.jsonl").read_bytes()
    assert len(kept.splitlines()) == 5
    for run in ("mot", "mtd", "std-wordy", "posthoc"):
        assert (folder / f"seed_0/{run}/traces/wordy.jsonl").read_bytes() == kept


def test_every_score_is_recomputed_from_the_per_problem_file(whole):
    _, folder, result, _ = whole
    for run in result.runs.itertuples():
        number, name = (0, "base") if run.arm == "base" else (2 if run.arm in ("mot", "leave_out") else 1, "merged")
        here = folder / run.run / f"round_{number:02d}"
        rows = [json.loads(line) for line in (here / f"evaluation/{name}.jsonl").read_text().splitlines()]
        scores = json.loads((here / "evaluation.json").read_text())[name]["scores"]
        assert {key: scores[key] for key in score(rows)} == score(rows)
        assert run.accuracy == numpy.mean([row["correct"] is True for row in rows])


def test_the_tables_are_on_disk_and_in_the_status(whole):
    _, folder, result, _ = whole
    assert (folder / "compare.png").read_bytes()[:4] == b"\x89PNG"
    read = pandas.read_csv(folder / "compare.csv")
    assert list(read["arm"]) == list(result.arms["arm"])
    pandas.testing.assert_series_equal(read["heldout_loss"], result.arms["heldout_loss"])
    assert len(result.sentences) == 2
    assert "over 2 seeds and 4 problems" in result.sentences[0]
    done = subprocess.run(
        [sys.executable, "-m", "motkit", "status", folder], capture_output=True, text=True, check=True
    )
    assert result.sentences[0] in done.stdout


def test_another_recipe_is_refused_and_the_same_does_nothing(whole):
    recipe, folder, result, _ = whole
    with pytest.raises(UserError, match=r"train\.learning_rate"):
        compare(recipe, folder, "train.learning_rate=1e-2")
    again, said = compare(recipe, folder, leave_out=("wordy",))
    assert not [line for line in said if line.endswith(": runs") or "scores" in line]
    pandas.testing.assert_frame_equal(again.arms, result.arms)


def test_faults_are_said_together_before_anything_is_made(whole, tmp_path):
    recipe, *_ = whole
    with pytest.raises(UserError) as fault:
        compare(recipe, tmp_path / "c", arms=("mot", "best"), budgets=("money",), leave_out=("nobody",))
    lines = str(fault.value).splitlines()
    assert [line.partition(":")[0] for line in lines] == ["--arms", "--budget", "--leave-out"]
    assert not (tmp_path / "c").exists()


def test_a_noisy_teachers_answers_are_all_at_other_problems(whole, tmp_path):
    recipe, folder, *_ = whole
    result, said = compare(
        recipe,
        tmp_path / "noisy",
        arms=("base", "std", "mot"),
        seeds=(0,),
        budgets=("steps",),
        noisy="plain",
        clean=folder,
    )
    clean = [json.loads(line) for line in (folder / "prepared/traces/plain.jsonl").read_text().splitlines()]
    noisy = [json.loads(line) for line in (tmp_path / "noisy/seed_0/mot/traces/plain.jsonl").read_text().splitlines()]
    before = {row["problem_id"]: row["response"] for row in clean}
    after = {row["problem_id"]: row["response"] for row in noisy}
    assert sorted(before) == sorted(after)
    assert sorted(before.values()) == sorted(after.values())
    assert all(before[name] != after[name] for name in before)
    # the other teacher's branch is the one of the clean comparison
    assert any("seed_0/std-wordy: round_01/branches/wordy: is " in line for line in said)
    lost = result.arms.set_index("arm")["lost"]
    assert lost["base"] == 0


def test_a_killed_comparison_repeats_no_finished_branch(whole, tmp_path):
    recipe, *_ = whole
    command = [
        sys.executable, "-m", "motkit", "compare", recipe, "evaluate.every_steps=2", "--seeds", "0", "--arms",
        "base,std,mot", "--run", tmp_path / "c",
    ]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if "std-wordy: round_01/evaluation.json" in line:
            process.send_signal(signal.SIGKILL)
            break
    process.wait()
    finished = {path: path.stat().st_mtime_ns for path in Path(tmp_path / "c").rglob("branches/*/done.json")}
    assert len(finished) == 2
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    assert "std-plain: round_01/branches/plain: is done" in done.stderr
    assert "over" in done.stdout
