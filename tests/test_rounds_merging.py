"""The loop's merge stage with weights of teachers, a server's step and the agreement report."""

import json
import shutil

import pytest
from click.testing import CliRunner
from conftest import make_pico_checkpoint
from experiment import RECIPE, write_experiment
from test_merge import flat, weights
from test_rounds import run
from test_rounds import weights as hashes

import motkit
from motkit.cli import main
from motkit.errors import UserError
from motkit.merge_agreement import measure_agreement, read_agreement
from motkit.scoring import Scorer

SERVER = "server={learning_rate: 0.8, momentum: 0.5, nesterov: true}"


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """(recipe, folder, lines) of a run with ``weights: auto`` and a server's step."""
    folder = tmp_path_factory.mktemp("served")
    recipe = write_experiment(folder / "data", make_pico_checkpoint, RECIPE)
    _, said = run(recipe, folder / "run", "weights=auto", SERVER)
    return recipe, folder / "run", said


def test_the_merge_is_the_servers_step_along_the_weighted_mean(served):
    _, folder, said = served
    start, velocity = folder.parent / "data" / "student", 0
    for number in ("round_01", "round_02"):
        stage = folder / number / "merged"
        assert sorted(path.name for path in stage.iterdir()) == [
            "agreement.csv", "checkpoint", "done.json", "merge.yaml", "server", "weights.json",
        ]  # fmt: skip
        found = json.loads((stage / "weights.json").read_text())
        assert found["loss"] <= found["uniform_loss"]
        assert found["evaluations"] >= 3
        assert found["traces"] == 4
        assert sum(found["weights"].values()) == pytest.approx(1, abs=1e-5)
        names = sorted(weights(start))
        before = flat(start, names)
        mean = sum(
            share * flat(folder / number / "branches" / name / "checkpoint", names)
            for name, share in found["weights"].items()
        ) / sum(found["weights"].values())
        update = mean - before
        velocity = 0.5 * velocity + update
        expected = before + 0.8 * (update + 0.5 * velocity)
        assert (flat(stage / "checkpoint", names) - expected).abs().max() < 1e-6
        assert (flat(stage / "server", names) - velocity).abs().max() < 1e-6
        outputs = json.loads((stage / "done.json").read_text())["outputs"]
        assert {"server/velocity.safetensors", "weights.json", "agreement.csv"} <= outputs.keys()
        start = stage / "checkpoint"
    assert sum(line.startswith("weights: plain ") for line in said) == 2


def test_the_agreement_report_is_of_the_rounds_own_branches(served):
    _, folder, _ = served
    for number, start in ((1, folder.parent / "data" / "student"), (2, folder / "round_01/merged/checkpoint")):
        stage = folder / f"round_{number:02d}"
        branches = {name: stage / "branches" / name / "checkpoint" for name in ("plain", "wordy")}
        expected = measure_agreement(start, branches, stage / "merged/checkpoint")
        got = read_agreement(stage / "merged/agreement.csv")
        assert [(r.layer, r.metric, r.first, r.second) for r in got] == [
            (r.layer, r.metric, r.first, r.second) for r in expected
        ]
        assert all(a.value == pytest.approx(b.value, rel=1e-5) for a, b in zip(got, expected, strict=True))
        assert ("model", "cosine", "plain", "wordy") in {(r.layer, r.metric, r.first, r.second) for r in got}
    shown = CliRunner().invoke(main, ["status", str(folder), "--verbose"])
    assert shown.exit_code == 0
    assert "agreement of the branches" in shown.output
    assert "survival" in shown.output
    assert "agreement of" not in CliRunner().invoke(main, ["status", str(folder)]).output


def test_a_merge_made_again_goes_on_from_the_same_velocity(served, tmp_path):
    recipe, folder, _ = served
    copy = tmp_path / "run"
    shutil.copytree(folder, copy, symlinks=True)
    for gone in ("round_02/merged", "round_02/published"):
        shutil.rmtree(copy / gone)
    run(recipe, copy, "weights=auto", SERVER)
    assert hashes(copy) == hashes(folder)
    # The velocity is an input of the next round: one that was changed is not used.
    shutil.rmtree(copy / "round_02" / "merged")
    state = copy / "round_01/merged/server/velocity.safetensors"
    content = bytearray(state.read_bytes())
    content[-1] ^= 1
    state.write_bytes(content)
    with pytest.raises(UserError, match="damaged: server/velocity"):
        run(recipe, copy, "weights=auto", SERVER)


def test_weights_by_right_answers_to_seed_problems(served, tmp_path, monkeypatch):
    recipe, _, _ = served
    short = ["weights=accuracy", "rounds=1", "train.max_steps=2"]
    _, said = run(recipe, tmp_path / "none", *short)
    stage = tmp_path / "none/round_01/merged"
    asked = json.loads((stage / "weights.json").read_text())["problems"]
    problems = [json.loads(line) for line in (recipe.parent / "problems.jsonl").read_text().splitlines()]
    assert asked == len(problems)
    # A random model answers nothing right.
    assert [line for line in said if line.startswith("weights")] == [
        f"weights: right answers to {asked} seed problems: plain 0.0 %, wordy 0.0 %; all count alike"
    ]
    answers = [json.loads(line) for line in (tmp_path / "none/round_01/weights/wordy.jsonl").read_text().splitlines()]
    assert sorted(row["problem_id"] for row in answers) == sorted(problem["id"] for problem in problems)
    cost = json.loads((stage / "done.json").read_text())["cost"]
    assert cost["tokens"] > sum(row["tokens"] for row in answers)
    assert cost["flops"] > 0

    def score(self, checkpoint, **settings):
        right = 0.75 if "plain" in checkpoint.parts else 0.25
        settings["results"].parent.mkdir(parents=True, exist_ok=True)
        settings["results"].touch()
        return {"scores": {"accuracy": right, "heldout_loss": 1.0}, "cost": {"tokens": 7, "flops": 14.0}}

    # A merge that is made again has its answers already.
    before = hashes(tmp_path / "none")
    for gone in ("merged", "published"):
        shutil.rmtree(tmp_path / "none/round_01" / gone)
    with monkeypatch.context() as patch:
        patch.setattr(Scorer, "score", lambda self, checkpoint, **settings: pytest.fail("asked again"))
        run(recipe, tmp_path / "none", *short)
    assert hashes(tmp_path / "none") == before

    monkeypatch.setattr(Scorer, "score", score)
    run(recipe, tmp_path / "some", *short)
    stage = tmp_path / "some/round_01"
    names = sorted(weights(stage / "merged/checkpoint"))
    plain, wordy = (flat(stage / "branches" / name / "checkpoint", names) for name in ("plain", "wordy"))
    found = json.loads((stage / "merged/weights.json").read_text())
    assert found["accuracy"] == {"plain": 0.75, "wordy": 0.25}
    a, b = (found["weights"][name] for name in ("plain", "wordy"))
    assert (a, b) == (round(0.75 * asked), round(0.25 * asked))
    assert (flat(stage / "merged/checkpoint", names) - (a * plain + b * wordy) / (a + b)).abs().max() < 1e-7
    assert json.loads((stage / "merged/done.json").read_text())["cost"]["tokens"] == 14


def test_fixed_weights_and_bad_ones(served, tmp_path):
    recipe, _, _ = served
    _, said = run(recipe, tmp_path / "run", "weights={plain: 3, wordy: 1}", "rounds=1", "train.max_steps=2")
    stage = tmp_path / "run" / "round_01"
    names = sorted(weights(stage / "merged/checkpoint"))
    plain, wordy = (flat(stage / "branches" / name / "checkpoint", names) for name in ("plain", "wordy"))
    assert (flat(stage / "merged/checkpoint", names) - (3 * plain + wordy) / 4).abs().max() < 1e-7
    assert json.loads((stage / "merged/weights.json").read_text()) == {"weights": {"plain": 3.0, "wordy": 1.0}}
    assert not [line for line in said if line.startswith("weights")]
    cases = {
        "weights=best": "weights: got 'best', expected auto, accuracy or a mapping",
        "weights={plain: 1}": "weights.wordy: missing; give every teacher a number",
        "weights={plain: 1, wordy: -1}": "weights.wordy: got -1.0, expected a number of at least 0",
        "weights={plain: 1, wordy: 1, wrody: 1}": "weights.wrody: no such teacher; did you mean 'wordy'?",
        "weights={plain: 0, wordy: 0}": "weights: all are 0",
        "server={momentum: 1.0}": "server.momentum: got 1.0",
        "server={nesterov: true}": "'nesterov' needs 'momentum' above 0",
        "server={lr: 1}": "server.lr: unknown key",
    }
    for override, fault in cases.items():
        with pytest.raises(UserError) as caught:
            motkit.load_recipe(recipe, [override])
        assert fault in str(caught.value), (override, str(caught.value))
    with pytest.raises(UserError, match="'branches: union' has one branch"):
        motkit.load_recipe(recipe, ["weights=auto", "branches=union"])
    with pytest.raises(UserError, match="weights: accuracy asks the branches with the engine"):
        motkit.load_recipe(recipe, ["weights=accuracy", "evaluate=null"])
    with pytest.raises(UserError, match="weights: auto needs held-out traces"):
        motkit.load_recipe(recipe, ["weights=auto", "evaluate=null"])
    with pytest.raises(UserError, match="weights: merge method 'mot_median' has no weight per branch"):
        run(recipe, tmp_path / "other", "weights={plain: 1, wordy: 1}", "merge=mot_median")
    assert not (tmp_path / "other" / "round_00").exists()
