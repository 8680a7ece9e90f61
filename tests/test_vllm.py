"""Against real vLLM, in its own environment; without one the tests are skipped."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from vllm_server import SERVABLE, SMALL, find_vllm_python, vllm_serve

from motkit.errors import UserError
from motkit.generate import Generation, continue_with_vllm, generate_texts, generate_traces
from motkit.recipe import load_recipe

PYTHON = find_vllm_python()
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(
        PYTHON is None, reason="no vLLM: 'make vllm' makes .venv-vllm, or set MOTKIT_VLLM_PYTHON to its interpreter"
    ),
]
ENGINE_ARGS = {"max_model_len": 512, "dtype": "float32", "enforce_eager": True}
FLAGS = ["--max-model-len=512", "--dtype=float32", "--enforce-eager", "--served-model-name=pico"]


@pytest.fixture(scope="module")
def pico(tmp_path_factory):
    from conftest import make_pico_checkpoint

    return make_pico_checkpoint("llama", tmp_path_factory.mktemp("pico") / "model", dtype="float32", **SERVABLE)


@pytest.fixture(scope="module")
def served(pico, tmp_path_factory):
    with vllm_serve(PYTHON, pico, tmp_path_factory.mktemp("logs") / "serve.log", *FLAGS) as url:
        yield f"{url}/v1"


def write_recipe(folder: Path, student: Path, **teacher) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"id": f"p{n}", "prompt": f"{n}+2?", "answer": str(n + 2)} for n in range(6)]
    (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    fields = {"name": "pico", "model": "pico", "engine": "openai", **teacher}
    recipe = {
        "student": str(student),
        "problems": "problems.jsonl",
        "teachers": [fields],
        "rounds": 1,
        "train": {"max_steps": 1},
    }
    (folder / "mini.yaml").write_text(json.dumps(recipe))
    return folder / "mini.yaml"


def greedy(pico: Path) -> dict[str, str]:
    """Problem id → what transformers generates from it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(pico)
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": f"{n}+2?"}], add_generation_prompt=True, return_dict=False
        )
        for n in range(6)
    ]
    model = AutoModelForCausalLM.from_pretrained(pico).eval()
    texts = generate_texts(
        model, tokenizer, prompts, samples=1, temperature=0.0, top_p=1.0, max_tokens=24,
        end_ids=[tokenizer.eos_token_id], batch_size=1, seed=0,
    )  # fmt: skip
    return {f"p{number}": generations[0].text.strip() for number, generations in enumerate(texts)}


def test_an_endpoint_generates_what_transformers_does(pico, served, tmp_path):
    sampling = {"temperature": 0.0, "max_tokens": 24, "extra": {"skip_special_tokens": False}}
    recipe = load_recipe(write_recipe(tmp_path, pico, base_url=served, sampling=sampling))
    report = generate_traces(recipe, tmp_path / "run", progress=False)
    rows = [json.loads(line) for line in (tmp_path / "run/generated/pico.jsonl").read_text().splitlines()]
    assert report["pico"]["answered"] == 6
    texts = greedy(pico)
    for row in rows:
        text = row["response"] or row["reasoning"]
        assert texts[row["problem_id"]].startswith(text.removesuffix("<|im_end|>")[:10])
        assert row["tokens"] == 24 or row["finish_reason"] == "stop"
    assert report["pico"]["tokens"] == sum(row["tokens"] for row in rows)


def test_samples_differ_and_come_again_with_their_seeds(pico, served, tmp_path):
    sampling = {"n": 4, "temperature": 1.0, "max_tokens": 16}
    recipe = load_recipe(write_recipe(tmp_path, pico, base_url=served, sampling=sampling, concurrency=1))
    texts = []
    for run in ("one", "two"):
        generate_traces(recipe, tmp_path / run, progress=False)
        rows = [json.loads(line) for line in (tmp_path / run / "generated/pico.jsonl").read_text().splitlines()]
        texts.append({(row["problem_id"], row["sample"]): (row["reasoning"], row["response"]) for row in rows})
    assert texts[0] == texts[1]
    assert len(set(texts[0].values())) > 12


def test_a_prompt_that_is_too_long_is_rejected_and_an_unknown_model_is_an_error(pico, served, tmp_path):
    recipe = write_recipe(tmp_path, pico, base_url=served, sampling={"max_tokens": 16})
    with pytest.raises(UserError, match=r"HTTP 404: .*correct base_url or model"):
        generate_traces(load_recipe(recipe, ["teachers.0.model=other"]), tmp_path / "run", progress=False)
    with (tmp_path / "problems.jsonl").open("a") as file:
        file.write(json.dumps({"id": "long", "prompt": "7" * 600, "answer": "1"}) + "\n")
    report = generate_traces(load_recipe(recipe), tmp_path / "run", progress=False)
    assert (report["pico"]["answered"], report["pico"]["rejected"]) == (6, 1)


def test_the_offline_engine_generates_and_is_gone_afterwards(pico, tmp_path, monkeypatch):
    for name, value in SMALL.items():
        monkeypatch.setenv(name, value)
    sampling = {"temperature": 0.0, "max_tokens": 24}
    recipe = write_recipe(
        tmp_path, pico, model=str(pico), engine="vllm", engine_args=ENGINE_ARGS, python=PYTHON, sampling=sampling
    )
    with (tmp_path / "problems.jsonl").open("a") as file:
        file.write(json.dumps({"id": "long", "prompt": "7" * 600, "answer": "1"}) + "\n")
    before = set(processes_with(str(pico)))  # the server of the other tests
    report = generate_traces(load_recipe(recipe), tmp_path / "run", progress=False)
    assert (report["pico"]["answered"], report["pico"]["rejected"], report["pico"]["missing"]) == (6, 1, 0)
    texts = greedy(pico)
    for line in (tmp_path / "run/generated/pico.jsonl").read_text().splitlines():
        row = json.loads(line)
        assert texts.get(row["problem_id"], "").startswith((row["response"] or row["reasoning"])[:10])
    deadline = time.monotonic() + 5.0  # for the system to bury them
    while (left := set(processes_with(str(pico))) - before) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert left == set()


@pytest.fixture(scope="module")
def continued(pico, tmp_path_factory):
    """Prompts of several lengths; what vLLM made of them greedily, as it arrived and as it was returned."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(pico)
    prompts = [list(tokenizer(text)["input_ids"]) for text in ("1+2?", "12 times 3 is", "x", "what is 7 minus 5")]
    # In a random model any token is as good an end as another: one that ends some texts early and others not.
    ends = [tokenizer.eos_token_id, *tokenizer("e")["input_ids"]]
    arrived, before = [], set(processes_with(str(pico)))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SMALL.items():
            patch.setenv(name, value)
        made = continue_with_vllm(
            pico, prompts, samples=1, temperature=0.0, top_p=1.0, max_tokens=24, end_ids=ends, seed=0,
            engine_args={"dtype": "float32", "enforce_eager": True}, python=PYTHON,
            log=tmp_path_factory.mktemp("log") / "vllm.log",
            on_ready=lambda version: arrived.append(version), on_result=lambda *result: arrived.append(result),
        )  # fmt: skip
        wait_until(lambda: set(processes_with(str(pico))) <= before, 5)  # all that it started is gone
    return tokenizer, prompts, ends, arrived, made


def test_continuations_are_those_of_transformers(pico, continued):
    from transformers import AutoModelForCausalLM

    tokenizer, prompts, ends, arrived, made = continued
    expected = generate_texts(
        AutoModelForCausalLM.from_pretrained(pico, dtype="float32").eval(), tokenizer, prompts, samples=1,
        temperature=0.0, top_p=1.0, max_tokens=24, end_ids=ends, batch_size=1, seed=0,
    )  # fmt: skip
    assert made == expected
    assert len({generation.text for (generation,) in made}) > 1
    assert re.match(r"\d+\.\d+", arrived[0])
    assert sorted(arrived[1:]) == [(number, 0, generation) for number, (generation,) in enumerate(made)]


def test_continuations_are_sampled_with_seeds_of_their_own_and_known_ones_are_not_asked(pico, tmp_path, monkeypatch):
    for name, value in SMALL.items():
        monkeypatch.setenv(name, value)
    settings = {
        "samples": 3, "temperature": 1.0, "top_p": 0.9, "max_tokens": 12, "end_ids": [1], "python": PYTHON,
        "engine_args": {"dtype": "float32", "enforce_eager": True}, "log": tmp_path / "vllm.log",
    }  # fmt: skip
    first = continue_with_vllm(pico, [[5, 6, 7], [8, 9]], seed=3, **settings)
    assert len({generation.text for of_prompt in first for generation in of_prompt}) == 6
    known = {(0, 0): Generation("was there", 2, "stop"), (1, 2): first[1][2]}
    arrived = []
    again = continue_with_vllm(
        pico, [[5, 6, 7], [8, 9]], seed=3, known=known, on_result=lambda *result: arrived.append(result[:2]), **settings
    )
    assert again == [[Generation("was there", 2, "stop"), *first[0][1:]], first[1]]
    assert sorted(arrived) == [(0, 1), (0, 2), (1, 0), (1, 1)]
    everything = {(number, sample): first[number][sample] for number in range(2) for sample in range(3)}
    # Nothing to ask: no process is started, so that it need not be there.
    nothing = {**settings, "python": "/nowhere/python"}
    assert continue_with_vllm(pico, [[5, 6, 7], [8, 9]], seed=3, known=everything, **nothing) == first
    with pytest.raises(UserError, match="no interpreter at /nowhere/python"):
        continue_with_vllm(pico, [[5, 6, 7], [8, 9]], seed=3, **nothing)


def test_more_prompt_tokens_than_a_step_takes(pico, tmp_path, monkeypatch):
    # On a CPU vLLM 0.32 cannot cut the prompt of a request with a seed over two steps.
    for name, value in SMALL.items():
        monkeypatch.setenv(name, value)
    prompts = [[10 + number % 50, 11, 12, *range(10, 60)] for number in range(60)]
    made = continue_with_vllm(
        pico, prompts, samples=4, temperature=1.0, top_p=0.95, max_tokens=8, end_ids=[2], seed=1,
        engine_args={"enforce_eager": True}, python=PYTHON, log=tmp_path / "log",
    )  # fmt: skip
    assert [len(samples) for samples in made] == [4] * 60


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGINT])
def test_a_server_on_loan_does_not_outlive_us(pico, tmp_path, signal_number):
    model = shutil.copytree(pico, tmp_path / "model")
    recipe = write_recipe(tmp_path, pico, model=str(model), serve=True, engine_args=ENGINE_ARGS, python=PYTHON)
    command = [sys.executable, "-m", "motkit", "generate", recipe, "--run", tmp_path / "run"]
    process = subprocess.Popen(
        command, stderr=subprocess.DEVNULL, env={**os.environ, **SMALL},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background ignores it
    )  # fmt: skip
    wait_until(lambda: len(processes_with(str(model))) >= 2, 60)  # the watch, and the server
    process.send_signal(signal_number)
    assert process.wait(60) == (130 if signal_number == signal.SIGINT else -signal_number)
    wait_until(lambda: processes_with(str(model)) == [], 15)


def wait_until(condition, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not so after {seconds} s"
        time.sleep(0.2)


def processes_with(text: str) -> list[int]:
    """Living processes that have ``text`` in their command line, other than this one."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if text in line and int(folder.name) != os.getpid():
                found.append(int(folder.name))
        except OSError:
            continue
    return found
