import json
import os
import shutil
import signal
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pandas
import pytest
import torch
from crash_driver import MOMENTS, PRUNING_MOMENTS
from experiment import RECIPE, write_experiment
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import motkit
from motkit.errors import UserError
from motkit.rounds import plan_rounds
from motkit.rundir import hash_file, hash_tree
from motkit.summary import summarise

HERE = Path(__file__).parent


def run(recipe, folder, *overrides, **options) -> tuple[pandas.DataFrame, list[str]]:
    said: list[str] = []
    table = motkit.run_rounds(motkit.load_recipe(recipe, overrides), folder, progress=False, say=said.append, **options)
    return table, said


def weights(folder: Path) -> dict[str, str]:
    """SHA-256 of every weight file of a run, and of each checkpoint's config."""
    tree = hash_tree(folder)
    return {name: entry["sha256"] for name, entry in tree.items() if name.endswith((".safetensors", "config.json"))}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(recipe, folder, table, lines) of one uninterrupted run."""
    from conftest import make_pico_checkpoint

    folder = tmp_path_factory.mktemp("whole")
    recipe = write_experiment(folder / "data", make_pico_checkpoint)
    table, said = run(recipe, folder / "run")
    return recipe, folder / "run", table, said


def test_a_run_is_readable_and_its_student_loads(whole):
    _, folder, _, said = whole
    assert [path.name for path in sorted(folder.iterdir())] == [
        ".lock", "environment.json", "final", "inputs.json", "logs", "recipe.yaml",
        "round_00", "round_01", "round_02", "summary.csv", "traces",
    ]  # fmt: skip
    assert sorted(path.name for path in (folder / "round_01").rglob("*") if path.is_dir()) == [
        "branches", "checkpoint", "checkpoint", "checkpoint", "evaluation", "merged", "plain", "wordy",
    ]  # fmt: skip
    assert os.readlink(folder / "final") == "round_02/published/checkpoint"
    student = AutoModelForCausalLM.from_pretrained(folder / "final")
    assert student.dtype == torch.bfloat16
    assert AutoTokenizer.from_pretrained(folder / "final").chat_template
    carried = load_file(folder / "round_02" / "merged" / "checkpoint" / "model.safetensors")
    assert {tensor.dtype for tensor in carried.values()} == {torch.float32}
    published = load_file(folder / "final" / "model.safetensors")
    assert all(torch.equal(published[name], carried[name].to(torch.bfloat16)) for name in carried)
    card = (folder / "final" / "README.md").read_text()
    assert str(folder.parent) not in card
    assert "- `wordy`" in card
    assert "| 2 | merged |" in card
    assert "round_02/merged: runs" in said


def test_the_merge_of_a_round_is_the_exact_mean_of_its_branches(whole):
    _, folder, _, _ = whole
    for number in ("round_01", "round_02"):
        files = [folder / number / "branches" / name / "checkpoint/model.safetensors" for name in ("plain", "wordy")]
        branches = [load_file(file) for file in files]
        merged = load_file(folder / number / "merged/checkpoint/model.safetensors")
        for name, tensor in merged.items():
            mean = torch.stack([branch[name].double() for branch in branches]).mean(0).float()
            assert torch.equal(tensor, mean)
    first, second = (float(branch["model.norm.weight"][0]) for branch in branches)
    exact = float((Fraction(first) + Fraction(second)) / 2)
    assert merged["model.norm.weight"][0] == torch.tensor(exact, dtype=torch.float32)


def test_the_second_round_starts_from_the_first_merge(whole):
    _, folder, _, _ = whole
    read = lambda path: json.loads((folder / path / "done.json").read_text())  # noqa: E731
    started_from = {read(f"round_02/branches/{name}")["inputs"]["student"] for name in ("plain", "wordy")}
    assert len(started_from) == 1
    assert started_from != {read("round_01/branches/plain")["inputs"]["student"]}


def test_what_was_dropped_is_counted(whole):
    _, folder, _, said = whole
    report = json.loads((folder / "traces" / "report.json").read_text())
    assert {key: report["wordy"][key] for key in ("read", "wrong", "truncated", "over_long", "kept")} == {
        "read": 8, "wrong": 1, "truncated": 1, "over_long": 1, "kept": 5,
    }  # fmt: skip
    assert report["plain"]["kept"] == 8
    assert "traces wordy: 5 of 8 kept (dropped: 1 truncated, 1 wrong, 1 over-long)" in said


def test_the_summary_has_a_row_for_everything(whole):
    _, folder, table, _ = whole
    assert list(zip(table["round"], table["name"], strict=True)) == [
        (0, "base"), (1, "plain"), (1, "wordy"), (1, "merged"), (2, "plain"), (2, "wordy"), (2, "merged"),
    ]  # fmt: skip
    assert table["heldout_loss"].notna().all()
    assert table["accuracy"].between(0, 1).all()
    assert table.loc[table["kind"] == "branch", "steps"].eq(4).all()
    read = pandas.read_csv(folder / "summary.csv", dtype={"steps": "Int64", "tokens": "Int64"})
    pandas.testing.assert_frame_equal(read, table, check_exact=False, rtol=1e-9)


def test_the_heldout_loss_is_that_of_a_plain_computation(whole):
    from test_train import rows

    from motkit.logits import mean_loss

    _, folder, _, _ = whole
    model = AutoModelForCausalLM.from_pretrained(folder / "round_02/merged/checkpoint").double()
    total, count = 0.0, 0
    for row in rows():
        with torch.no_grad():
            log_p = model(torch.tensor([row.input_ids])).logits[0].log_softmax(-1)
        for position in range(row.num_prompt_tokens, len(row.input_ids)):
            total -= log_p[position - 1, row.input_ids[position]].item()
            count += 1
    loss, tokens = mean_loss(model.float(), rows())
    assert tokens == count
    assert loss == pytest.approx(total / count, rel=1e-5)


def test_running_again_does_nothing(whole):
    recipe, folder, table, _ = whole
    before = hash_tree(folder)
    again, said = run(recipe, folder)
    assert all("is done" in line or line.startswith("traces") for line in said), said
    pandas.testing.assert_frame_equal(again, table)
    changed = {name for name, entry in hash_tree(folder).items() if before.get(name) != entry}
    assert changed <= {".lock", f"logs/attempt_{len(list((folder / 'logs').glob('*.log'))):02d}.log"}


def test_round_by_round_ends_like_all_at_once(whole, tmp_path):
    recipe, folder, _, _ = whole
    run(recipe, tmp_path / "run", rounds=1)
    assert not (tmp_path / "run" / "final").exists()
    assert not (tmp_path / "run" / "round_02").exists()
    run(recipe, tmp_path / "run", rounds=1)
    assert weights(tmp_path / "run") == weights(folder)


def test_a_plan_says_what_would_be_done_and_writes_nothing(whole, tmp_path):
    recipe, folder, _, _ = whole
    plan = plan_rounds(motkit.load_recipe(recipe), tmp_path / "new")
    assert not (tmp_path / "new").exists()
    assert [stage.stage for stage in plan if stage.action == "run"] == [stage.stage for stage in plan]
    branch = next(stage for stage in plan if stage.stage == "round_01/branches/wordy")
    assert (branch.rows, branch.steps) == (5, 4)
    size = (folder / "round_01/branches/plain/checkpoint/model.safetensors").stat().st_size
    assert branch.disk_bytes == pytest.approx(size, rel=0.1)
    assert {stage.action for stage in plan_rounds(motkit.load_recipe(recipe), folder)} == {"skip"}


def test_a_changed_recipe_or_input_is_refused_with_what_changed(whole, tmp_path, make_pico):
    recipe, folder, _, _ = whole
    with pytest.raises(UserError, match=r"train\.max_steps: 4 → 5"):
        run(recipe, folder, "train.max_steps=5")
    mine = write_experiment(tmp_path / "data", make_pico)
    run(mine, tmp_path / "run", rounds=1)
    problems = tmp_path / "data" / "problems.jsonl"
    problems.write_text(problems.read_text().replace("7+2?", "7 + 2?"))
    with pytest.raises(UserError, match="not those that the run began with: problems;"):
        run(mine, tmp_path / "run")


def test_a_method_that_cannot_merge_these_branches_is_refused_before_training(tmp_path, make_pico):
    recipe = write_experiment(tmp_path, make_pico)
    with pytest.raises(UserError, match="slerp"):
        run(recipe, tmp_path / "run", "teachers.1.name=two", "merge=slerp", "branches=union")
    assert not (tmp_path / "run" / "round_01").exists()


def test_a_teacher_without_right_answers_is_refused(tmp_path, make_pico):
    recipe = write_experiment(tmp_path, make_pico)
    traces = tmp_path / "plain.jsonl"
    traces.write_text(traces.read_text().replace("boxed{", "boxed{9"))
    with pytest.raises(UserError, match=r"teacher plain: none of its 8 traces is left \(8 wrong\)"):
        run(recipe, tmp_path / "run")


def test_over_long_traces_can_be_an_error(tmp_path, make_pico):
    recipe = write_experiment(tmp_path, make_pico)
    with pytest.raises(UserError, match=r"trace p7#0 has \d+ tokens, train.max_length is 96"):
        run(recipe, tmp_path / "run", "filter.over_long=error")


def test_a_truncated_student_is_named_and_nothing_is_published(tmp_path, make_pico):
    recipe = write_experiment(tmp_path, make_pico)
    file = tmp_path / "student" / "model.safetensors"
    whole_bytes = file.read_bytes()
    file.write_bytes(whole_bytes[:-100])
    with pytest.raises(UserError, match=r"model\.safetensors: truncated or damaged"):
        run(recipe, tmp_path / "run")
    assert not list((tmp_path / "run").glob("round_*"))
    file.write_bytes(whole_bytes)
    run(recipe, tmp_path / "run", rounds=1)


@pytest.mark.slow
@pytest.mark.parametrize("cut", [100, 0], ids=["truncated", "flipped"])
def test_a_damaged_stage_is_set_aside_and_made_again(whole, tmp_path, cut):
    recipe, folder, _, _ = whole
    run(recipe, tmp_path / "run", rounds=1)
    file = tmp_path / "run/round_01/merged/checkpoint/model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content[: len(content) - cut])
    if cut:
        _, said = run(recipe, tmp_path / "run")
        assert any("round_01/merged: is damaged" in line for line in said)
    else:
        with pytest.raises(UserError, match="its SHA-256 differs"):
            run(recipe, tmp_path / "run")
        run(recipe, tmp_path / "run")
    made = {name: digest for name, digest in weights(tmp_path / "run").items() if "damaged" not in name}
    assert made == weights(folder)
    assert (tmp_path / "run/round_01/merged.damaged-1").is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_run_goes_on_to_the_same_bytes(whole, tmp_path, moment):
    recipe, folder, _, _ = whole
    command = [sys.executable, HERE / "crash_driver.py", recipe, tmp_path / "run", moment]
    killed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "run" / "final").exists()
    _, said = run(recipe, tmp_path / "run")
    if moment == "training":
        assert "round_01/branches/wordy: resumes at step 2" in said
        assert "round_01/branches/plain: is done" in said
    assert weights(tmp_path / "run") == weights(folder)
    left = [path.name for path in (tmp_path / "run").rglob("*") if path.name.endswith((".partial", ".training"))]
    assert left == []


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_the_next_run_goes_on(whole, tmp_path):
    recipe, folder, _, _ = whole
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "from motkit.cli import main\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, resource.RLIM_INFINITY)); main()"
    )
    command = [sys.executable, "-c", code, "round", recipe, "--run", tmp_path / "run", "--all"]
    stopped = subprocess.run(command, capture_output=True, text=True, check=False)
    assert stopped.returncode == 2, stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert stopped.stderr.strip().splitlines()[-1].startswith("error: ")
    assert not list((tmp_path / "run").rglob("checkpoint/model.safetensors"))
    run(recipe, tmp_path / "run")
    assert weights(tmp_path / "run") == weights(folder)


def test_other_peoples_files_are_read_where_they_are(tmp_path, make_pico):
    recipe = write_experiment(tmp_path, make_pico)
    rows = [json.loads(line) for line in (tmp_path / "plain.jsonl").read_text().splitlines()]
    turns = [
        [{"from": "human", "value": f"{n}+2?"}, {"from": "gpt", "value": f"<think>so</think>{row['response']}"}]
        for n, row in enumerate(rows)
    ]
    (tmp_path / "theirs.jsonl").write_text("".join(json.dumps({"chat": turn}) + "\n" for turn in turns))
    text = recipe.read_text().replace("traces: plain.jsonl}", "traces: theirs.jsonl, columns: {conversations: chat}}")
    text = text.replace("problems: problems.jsonl\n", "problems: {path: problems.jsonl, sample: {count: 6, seed: 1}}\n")
    recipe.write_text(text.replace("verifier: exact", "verifier: math"))
    plan = plan_rounds(motkit.load_recipe(recipe), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    _, said = run(recipe, tmp_path / "run", "evaluate=null", rounds=1)
    assert "traces plain: 6 of 6 kept" in said
    kept = (tmp_path / "run/traces/plain.jsonl").read_text().splitlines()
    assert {json.loads(line)["reasoning"] for line in kept} == {"so"}
    report = json.loads((tmp_path / "run/traces/report.json").read_text())
    assert plan[0].rows == report["plain"]["kept"] + report["wordy"]["kept"]
    _, again = run(recipe, tmp_path / "run", "evaluate=null", rounds=1)
    assert "traces: is done" in again


def test_a_dataset_of_the_hub_is_fetched_once(tmp_path, make_pico, monkeypatch):
    import datasets

    recipe = write_experiment(tmp_path, make_pico)
    rows = [json.loads(line) for line in (tmp_path / "plain.jsonl").read_text().splitlines()]
    fetched = []

    def load_dataset(name, config, split):
        fetched.append(name)
        return datasets.Dataset.from_list(rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    changes = ["evaluate=null", "teachers.0.traces=hf://a/b"]
    run(recipe, tmp_path / "run", *changes, rounds=1)
    assert (tmp_path / "run/sources/teachers.plain.traces.jsonl").is_file()
    run(recipe, tmp_path / "run", *changes, rounds=1)
    assert fetched == ["a/b"]


@pytest.mark.slow
def test_a_union_of_teachers_is_one_branch(tmp_path, make_pico):
    recipe = write_experiment(tmp_path, make_pico, RECIPE.replace("merge: mot", "merge: mot\nbranches: union"))
    table, _ = run(recipe, tmp_path / "run", "rounds=1", "evaluate=null")
    assert list(table["name"]) == ["base", "union", "merged"]
    branch = load_file(tmp_path / "run/round_01/branches/union/checkpoint/model.safetensors")
    merged = load_file(tmp_path / "run/round_01/merged/checkpoint/model.safetensors")
    assert all(torch.equal(branch[name], merged[name]) for name in branch)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qwen3", "gemma3", "qwen3_moe"])
def test_any_causal_lm_goes_through_the_loop(tmp_path, make_pico, kind):
    recipe = write_experiment(tmp_path, make_pico)
    make_pico(kind, tmp_path / "other")
    student = f"student={tmp_path / 'other'}"
    table, _ = run(recipe, tmp_path / "run", student, "rounds=1", "train.max_steps=2")
    assert table["heldout_loss"].notna().all()
    branches = [
        AutoModelForCausalLM.from_pretrained(tmp_path / f"run/round_01/branches/{name}/checkpoint").state_dict()
        for name in ("plain", "wordy")
    ]
    final = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "final").state_dict()
    for name, tensor in final.items():
        mean = torch.stack([branch[name].double() for branch in branches]).mean(0)
        assert torch.equal(tensor, mean.float().to(torch.bfloat16)), name


def killed_at(moment, recipe, folder) -> None:
    command = [sys.executable, HERE / "crash_driver.py", recipe, folder, moment]
    killed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr


LORA = RECIPE.replace("gradient_checkpointing: false}", "lora: {r: 4, alpha: 8, dropout: 0.1}}\nmerged_adapter: {r: 6}")


@pytest.fixture(scope="module")
def whole_lora(tmp_path_factory):
    """(recipe, folder, table, lines) of one uninterrupted run whose branches train adapters."""
    from conftest import make_pico_checkpoint

    folder = tmp_path_factory.mktemp("lora")
    recipe = write_experiment(folder / "data", make_pico_checkpoint, LORA)
    table, said = run(recipe, folder / "run")
    return recipe, folder / "run", table, said


@pytest.mark.slow
def test_a_round_of_adapters_merges_the_updates_themselves(whole_lora):
    from test_adapters import expected_mean

    recipe, folder, table, _ = whole_lora
    student = recipe.parent / "student"
    for number in ("round_01", "round_02"):
        stages = [folder / number / "branches" / name for name in ("plain", "wordy")]
        want = expected_mean(student, {stage / "adapter": 8 / 4 for stage in stages})
        merged = load_file(folder / number / "merged/checkpoint/model.safetensors")
        assert merged.keys() == want.keys()
        moved = 0
        for name, tensor in merged.items():
            assert torch.equal(tensor, torch.from_numpy(want[name]).float()), name
            moved += not torch.equal(tensor, load_file(student / "model.safetensors")[name].float())
        assert moved == 2 * 7
        error = json.loads((folder / number / "merged/adapter_error.json").read_text())
        assert error["rank"] == 6
        assert 0 < error["relative_error"] < 1
        assert len(error["per_tensor"]) == 2 * 7
        student = folder / number / "merged/checkpoint"
    assert table["heldout_loss"].notna().all()
    bases = [
        json.loads((folder / f"round_{n:02d}/branches/plain/adapter/adapter_config.json").read_text())[
            "base_model_name_or_path"
        ]
        for n in (1, 2)
    ]
    assert bases == [str(recipe.parent / "student"), "round_01/merged/checkpoint"]


@pytest.mark.slow
def test_the_merged_adapter_loads_on_the_runs_own_student(whole_lora):
    import peft

    recipe, folder, _, _ = whole_lora
    base = AutoModelForCausalLM.from_pretrained(recipe.parent / "student", dtype=torch.float32)
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    loaded = peft.PeftModel.from_pretrained(base, folder / "round_02/merged/adapter").merge_and_unload().state_dict()
    merged = load_file(folder / "round_02/merged/checkpoint/model.safetensors")
    lost = sum(float((merged[n].double() - loaded[n].double()).square().sum()) for n in merged)
    total = sum(float((merged[n].double() - before[n].double()).square().sum()) for n in merged)
    error = json.loads((folder / "round_02/merged/adapter_error.json").read_text())
    assert (lost / total) ** 0.5 == pytest.approx(error["relative_error"], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["training", "checkpoint write", "after branch", "merge"])
def test_a_killed_run_of_adapters_goes_on_to_the_same_bytes(whole_lora, tmp_path, moment):
    recipe, folder, _, _ = whole_lora
    killed_at(moment, recipe, tmp_path / "run")
    _, said = run(recipe, tmp_path / "run")
    if moment == "training":
        assert "round_01/branches/wordy: resumes at step 2" in said
    assert weights(tmp_path / "run") == weights(folder)


@pytest.mark.slow
def test_other_methods_take_the_adapters_checkpoints(tmp_path, make_pico):
    recipe = write_experiment(tmp_path, make_pico, LORA.replace("merge: mot", "merge: ties"))
    run(recipe, tmp_path / "run", "rounds=1", "evaluate=null", "merged_adapter=null")
    stages = [tmp_path / "run/round_01/branches" / name for name in ("plain", "wordy")]
    again = tmp_path / "again"
    motkit.merge_checkpoints(
        "ties",
        again,
        base=tmp_path / "student",
        branches=[stage / "adapter" for stage in stages],
        out_dtype="float32",
        quiet=True,
    )
    merged = tmp_path / "run/round_01/merged/checkpoint"
    assert hash_file(again / "model.safetensors") == hash_file(merged / "model.safetensors")


@pytest.mark.slow
def test_a_pruned_checkpoint_is_made_again_from_its_adapter(whole_lora, tmp_path):
    recipe, folder, _, _ = whole_lora
    run(recipe, tmp_path / "run", "keep_branches=none", rounds=1)
    stage = tmp_path / "run/round_01/branches/plain"
    with pytest.raises(UserError, match=r"was pruned .*its adapter is there: 'motkit merge mot OUT --base START"):
        motkit.merge_checkpoints(
            "mot", tmp_path / "out", base=recipe.parent / "student", branches=[stage / "checkpoint"], quiet=True
        )
    motkit.merge_checkpoints(
        "mot",
        tmp_path / "out",
        base=recipe.parent / "student",
        branches=[stage / "adapter"],
        out_dtype="float32",
        quiet=True,
    )
    before = folder / "round_01/branches/plain/checkpoint/model.safetensors"
    assert hash_file(tmp_path / "out/model.safetensors") == hash_file(before)


@pytest.mark.slow
def test_the_plan_of_adapters_says_what_is_written(whole_lora, tmp_path):
    recipe, folder, _, _ = whole_lora
    plan = {entry.stage: entry for entry in plan_rounds(motkit.load_recipe(recipe), tmp_path / "run")}
    for stage in ("round_01/branches/plain", "round_02/merged"):
        written = sum(path.stat().st_size for path in (folder / stage).rglob("*.safetensors"))
        assert plan[stage].disk_bytes == pytest.approx(written, rel=0.1)  # headers of small files


@pytest.mark.slow
def test_modules_that_the_student_lacks_are_refused_before_the_run_begins(tmp_path, make_pico):
    recipe = write_experiment(tmp_path, make_pico)
    with pytest.raises(UserError, match=r"train\.lora: peft refuses these settings: .*nope"):
        run(recipe, tmp_path / "run", "train.lora={r: 2, target_modules: [nope]}")
    assert not (tmp_path / "run" / "recipe.yaml").exists()


@pytest.mark.slow
@pytest.mark.parametrize("keep", ["last", "none"])
def test_pruned_branches_leave_their_records_and_the_same_student(whole, tmp_path, keep):
    recipe, folder, table, _ = whole
    changes = [f"keep_branches={keep}"]
    plan = plan_rounds(motkit.load_recipe(recipe, changes), tmp_path / "run")
    _, said = run(recipe, tmp_path / "run", *changes, rounds=1)
    stage = tmp_path / "run/round_01/branches/plain"
    assert f"round_01/branches/plain: checkpoint pruned (keep_branches: {keep})" in said
    assert sorted(path.name for path in stage.iterdir()) == ["done.json", "metrics.jsonl", "pruned.json"]
    pruned, said = run(recipe, tmp_path / "run", *changes)
    assert "round_01/branches/plain: is done" in said
    gone = {"round_01", "round_02"} if keep == "none" else {"round_01"}
    kept = {
        name: digest
        for name, digest in weights(folder).items()
        if not ("/branches/" in name and name.partition("/")[0] in gone)
    }
    assert weights(tmp_path / "run") == kept
    columns = ["round", "name", "steps", "tokens", "heldout_loss"]
    pandas.testing.assert_frame_equal(pruned[columns], table[columns])
    pandas.testing.assert_frame_equal(summarise(tmp_path / "run"), pruned)
    assert pruned["checkpoint"].isna().sum() == 2 * len(gone)
    # The plan's bytes are those of the weights, up to headers of the files.
    freed = -sum(entry.disk_bytes for entry in plan if entry.action == "prune")
    size = sum(path.stat().st_size for path in (folder / "round_01/branches").rglob("model.safetensors"))
    assert freed == pytest.approx(size * len(gone), rel=0.05)
    again = plan_rounds(motkit.load_recipe(recipe, changes), tmp_path / "run")
    assert {entry.action for entry in again} == {"skip"}
    _, said = run(recipe, tmp_path / "run", *changes)
    assert all("is done" in line or line.startswith("traces") for line in said), said


def test_the_plan_says_how_much_disk_is_in_use_at_one_time(tmp_path, make_pico):
    from click.testing import CliRunner

    from motkit.checkpoint import count_parameters
    from motkit.cli import main

    recipe = write_experiment(tmp_path, make_pico)
    size = count_parameters(tmp_path / "student") * 4
    command = ["round", str(recipe), "--all", "--run", str(tmp_path / "run"), "--dry-run"]
    last, every = (CliRunner().invoke(main, [*command, *more]).output for more in (["keep_branches=last"], []))
    megabytes = lambda checkpoints: f"{checkpoints * size / 1e6:.1f} MB"  # noqa: E731
    # Two rounds of two branches and a merge; the student, published in half the bytes.
    assert f"disk to be written: {megabytes(6.5)}, and" in last
    assert f"of it at one time at most {megabytes(4.5)}, in the end {megabytes(4.5)}" in last
    assert f"disk to be written: {megabytes(6.5)}, and" in every
    assert "at one time" not in every
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("moment", PRUNING_MOMENTS)
def test_a_run_killed_while_it_prunes_goes_on(whole, tmp_path, moment):
    recipe, folder, _, _ = whole
    pruning = recipe.with_name(f"{moment.replace(' ', '-')}.yaml")
    pruning.write_text(recipe.read_text() + "keep_branches: last\n")
    killed_at(moment, pruning, tmp_path / "run")
    run(pruning, tmp_path / "run")
    assert not list((tmp_path / "run/round_01/branches").glob("*/checkpoint*"))
    expected = {name: digest for name, digest in weights(folder).items() if not name.startswith("round_01/branches")}
    assert weights(tmp_path / "run") == expected


@pytest.mark.slow
def test_a_finished_run_can_be_pruned_later_and_what_is_gone_can_be_made_again(whole, tmp_path):
    recipe, folder, _, _ = whole
    run(recipe, tmp_path / "run", rounds=1)
    run(recipe, tmp_path / "run", "keep_branches=last", rounds=1)
    branches = tmp_path / "run/round_01/branches"
    assert not (branches / "wordy/checkpoint").exists()
    shutil.rmtree(tmp_path / "run/round_01/merged")
    with pytest.raises(UserError) as stopped:
        run(recipe, tmp_path / "run")
    (line,) = str(stopped.value).splitlines()
    assert line.startswith("round_01/merged: must be made again, but its branches' checkpoints were pruned")
    assert str(branches / "plain") in line
    assert str(branches / "wordy") in line
    shutil.rmtree(branches / "plain")
    shutil.rmtree(branches / "wordy")
    run(recipe, tmp_path / "run")
    assert weights(tmp_path / "run") == weights(folder)


@pytest.mark.slow
def test_a_damaged_merge_stops_the_pruning_of_its_branches(whole, tmp_path):
    recipe, _, _, _ = whole
    run(recipe, tmp_path / "run", rounds=1)
    file = tmp_path / "run/round_01/merged/checkpoint/model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match="its SHA-256 differs"):
        run(recipe, tmp_path / "run", "keep_branches=last")
    assert (tmp_path / "run/round_01/branches/plain/checkpoint/model.safetensors").is_file()


@pytest.mark.slow
def test_weights_in_between_are_made_from_adapters_and_pruned_with_the_branch(whole_lora, tmp_path):
    recipe, folder, _, _ = whole_lora
    changes = ["evaluate.every_steps=2"]
    run(recipe, tmp_path / "run", *changes, rounds=1)
    stage = tmp_path / "run/round_01/branches/plain"
    last, between = (load_file(stage / part / "model.safetensors") for part in ("checkpoint", "steps/000002"))
    start = load_file(recipe.parent / "student/model.safetensors")
    assert last.keys() == between.keys() == start.keys()
    q_proj = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(between[q_proj], start[q_proj].float())
    assert not torch.equal(between[q_proj], last[q_proj])
    assert hash_file(stage / "checkpoint/model.safetensors") == hash_file(
        folder / "round_01/branches/plain/checkpoint/model.safetensors"
    )
    scores = json.loads((tmp_path / "run/round_01/evaluation.json").read_text())
    assert {"plain@2", "wordy@2"} <= scores.keys()
    _, said = run(recipe, tmp_path / "run", *changes, "keep_branches=none")
    assert "round_01/branches/plain: checkpoint pruned (keep_branches: none)" in said
    assert sorted(path.name for path in stage.iterdir()) == ["adapter", "done.json", "metrics.jsonl", "pruned.json"]
