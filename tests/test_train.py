import contextlib
import json
import math
from pathlib import Path

import pytest
import torch
from conftest import PICO_KINDS, pico_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from motkit import train
from motkit.checkpoint import count_parameters
from motkit.errors import UserError
from motkit.render import RenderedTrace, Renderer
from motkit.rundir import hash_file
from motkit.traces import SeedProblem, Trace


def rows(count: int = 8) -> list[RenderedTrace]:
    tokenizer = pico_tokenizer()
    renderer = Renderer(tokenizer, {tokenizer.eos_token_id})
    made = []
    for number in range(count):
        problem = SeedProblem(id=f"p{number}", prompt=f"{number} + 2?", answer=str(number + 2))
        trace = Trace(
            problem_id=problem.id,
            sample=0,
            reasoning=f"{number} and 2" + " so" * number,
            response=rf"\boxed{{{number + 2}}}",
            finish_reason="stop",
        )
        made.append(renderer.render(problem, trace))
    return made


def branch(student: Path, folder: Path, **changes):
    arguments = {
        "student": student,
        "traces": rows(),
        "out": folder / "checkpoint",
        "work": folder / "work",
        "metrics": folder / "work" / "metrics.jsonl",
        "settings": {"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "max_length": 128},
        "seed": 7,
        "name": "run/round_01/branches/a",
        "parameters": count_parameters(student),
        "reports": folder / "reports",
        "progress": False,
    }
    settings = arguments["settings"] | changes.pop("settings", {})
    return train.train_branch(**(arguments | changes | {"settings": settings}))


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "work" / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("kind", PICO_KINDS)
def test_any_causal_lm_trains_and_loads_again(make_pico, tmp_path, kind):
    student = make_pico(kind, tmp_path / "student")
    report = branch(student, tmp_path)
    assert report.steps == 4
    assert report.tokens == metrics(tmp_path)[-1]["tokens"]
    assert report.flops == 6 * count_parameters(student) * report.tokens
    before = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32).state_dict()
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint")
    assert trained.dtype == torch.float32
    assert all(torch.isfinite(tensor).all() for tensor in trained.state_dict().values())
    assert any(not torch.equal(before[name], tensor) for name, tensor in trained.state_dict().items())
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (student / name).read_bytes() == (tmp_path / "checkpoint" / name).read_bytes()
    assert AutoTokenizer.from_pretrained(tmp_path / "checkpoint").chat_template


def test_the_first_loss_is_that_of_the_traces_tokens_only(make_pico, tmp_path):
    student = make_pico("llama", tmp_path / "student")
    branch(student, tmp_path, settings={"max_steps": 1, "per_device_train_batch_size": 8})
    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float64)
    total, count = 0.0, 0
    for row in rows():
        with torch.no_grad():
            log_p = model(torch.tensor([row.input_ids])).logits[0].log_softmax(-1)
        for position in range(row.num_prompt_tokens, len(row.input_ids)):
            total -= log_p[position - 1, row.input_ids[position]].item()
            count += 1
    assert metrics(tmp_path)[0]["loss"] == pytest.approx(total / count, rel=1e-5)
    assert metrics(tmp_path)[0]["tokens"] == sum(len(row.input_ids) for row in rows())


def test_every_step_is_recorded_and_the_seed_decides_the_bytes(make_pico, tmp_path):
    student = make_pico("qwen3", tmp_path / "student")
    for name, seed in (("one", 7), ("two", 7), ("three", 8)):
        branch(student, tmp_path / name, seed=seed)
    recorded = metrics(tmp_path / "one")
    assert [row["step"] for row in recorded] == [1, 2, 3, 4]
    assert all(math.isfinite(row[key]) for row in recorded for key in ("loss", "learning_rate", "grad_norm", "seconds"))
    one, two, three = (
        hash_file(tmp_path / name / "checkpoint" / "model.safetensors") for name in ("one", "two", "three")
    )
    assert one == two != three


@contextlib.contextmanager
def killed_in_step(number):
    """Training inside must die in this step, after the trainer has taken it and before it is logged."""

    class Killed(Exception):
        pass

    def dies(self, step, logs):
        if step == number:
            raise Killed
        return original(self, step, logs)

    original = train._StepLog.add
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train._StepLog, "add", dies)
        with pytest.raises(Killed):
            yield


def test_a_branch_resumes_from_its_last_complete_checkpoint_with_the_same_bytes(make_pico, tmp_path):
    student = make_pico("llama", tmp_path / "student")
    settings = {"max_steps": 6, "save_steps": 2}
    branch(student, tmp_path / "whole", settings=settings)

    with killed_in_step(5):
        branch(student, tmp_path / "broken", settings=settings)
    work = tmp_path / "broken" / "work"
    assert train.resumable_step(work) == 4
    # As a kill in the middle of a checkpoint's write leaves it: the newest has no optimizer and no seal.
    (work / "checkpoint-5").mkdir()
    (work / "checkpoint-5" / "model.safetensors").write_bytes(b"half")
    # And one whose optimizer was cut short after it was sealed.
    (work / "checkpoint-4" / "optimizer.pt").write_bytes(b"cut")
    assert train.resumable_step(work) == 2
    report = branch(student, tmp_path / "broken", settings=settings)
    assert report.resumed_from_step == 2
    assert not (work / "checkpoint-5").exists()
    for name in ("model.safetensors", "config.json"):
        assert hash_file(tmp_path / "broken" / "checkpoint" / name) == hash_file(
            tmp_path / "whole" / "checkpoint" / name
        )
    strip = [[{**row, "seconds": 0} for row in metrics(tmp_path / name)] for name in ("whole", "broken")]
    assert strip[0] == strip[1]


@pytest.mark.parametrize("how", ["nan weights", "absurd learning rate"])
def test_a_loss_that_is_not_finite_stops_the_branch(make_pico, tmp_path, how):
    student = make_pico("llama", tmp_path / "student", dtype="float32")
    settings = {"max_steps": 8}
    if how == "nan weights":
        file = student / "model.safetensors"
        weights = load_file(file)
        weights["model.norm.weight"][0] = float("nan")
        save_file(weights, file, metadata={"format": "pt"})
    else:
        settings |= {"learning_rate": 1e38, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
    with pytest.raises(UserError, match=r"branch run/round_01/branches/a: step \d+: (loss|grad_norm) is (nan|inf)"):
        branch(student, tmp_path, settings=settings)
    assert not (tmp_path / "checkpoint").exists()


def test_settings_that_sft_config_refuses_are_the_users(make_pico, tmp_path):
    student = make_pico("llama", tmp_path / "student")
    with pytest.raises(UserError, match="SFTConfig refuses"):
        branch(student, tmp_path, settings={"lr_scheduler_type": "no such schedule"})


@pytest.mark.slow
def test_each_branch_reports_to_a_run_of_its_own(make_pico, tmp_path):
    student = make_pico("llama", tmp_path / "student")
    for name in ("a", "b"):
        branch(student, tmp_path / name, reports=tmp_path / "tb" / name, settings={"report_to": "tensorboard"})
    for name in ("a", "b"):
        assert len(list((tmp_path / "tb" / name).rglob("events.out.tfevents.*"))) == 1
