import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import make_pico_checkpoint
from experiment import write_experiment
from unruly_server import FAULTS, UnrulyServer, completion

from motkit.engines import _proxy, split_reasoning
from motkit.errors import UserError
from motkit.generate import generate_traces, generated_traces
from motkit.recipe import load_recipe
from motkit.rundir import RunDir
from motkit.samples import SampleFile, read_samples, requests_of
from motkit.traces import SeedProblem, read_problems
from motkit.verify import Verifier

RECIPE = """
student: student
problems: problems.jsonl
teachers:
  - name: asked
    model: some-model
    engine: openai
    base_url: {url}
    sampling: {{n: 3, temperature: 1.0, max_tokens: 50}}
    concurrency: 4
    timeout_s: 2
    price_per_million_tokens: {{input: 1.0, output: 10.0}}
rounds: 1
train: {{max_steps: 4, max_length: 128}}
"""


@pytest.fixture
def quick(monkeypatch):
    """Back-off a hundred times shorter, but not what a server asks for with Retry-After."""
    monkeypatch.setattr("motkit.engines._FIRST_DELAY_S", 0.005)


@pytest.fixture
def write(tmp_path):
    def write(server: UnrulyServer, num_problems: int = 8, changes: str = "") -> Path:
        if not (tmp_path / "student").exists():
            make_pico_checkpoint("llama", tmp_path / "student")
        rows = [{"id": f"p{n}", "prompt": f"{n}+2?", "answer": str(n + 2)} for n in range(num_problems)]
        (tmp_path / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (tmp_path / "mini.yaml").write_text(RECIPE.format(url=server.url) + changes)
        return tmp_path / "mini.yaml"

    return write


def generate(path, run, *overrides):
    return generate_traces(load_recipe(path, overrides), run, progress=False, say=lambda line: None)


def lines(run, teacher="asked"):
    return [json.loads(line) for line in (run / "generated" / f"{teacher}.jsonl").read_text().splitlines()]


def test_every_sample_arrives_exactly_once_from_a_server_that_misbehaves(write, tmp_path, quick):
    with UnrulyServer(FAULTS * 2) as server:
        report = generate(write(server), tmp_path / "run", "teachers.0.max_retries=40", "teachers.0.timeout_s=1")
    rows = lines(tmp_path / "run")
    assert sorted((row["problem_id"], row["sample"]) for row in rows) == [
        (f"p{n}", k) for n in range(8) for k in range(3)
    ]
    assert all(row["response"] == rf"\boxed{{{int(row['problem_id'][1:]) + 2}}}" for row in rows)
    assert len({row["reasoning"] for row in rows}) == 24  # each asked with a seed of its own
    assert set(server.answered.values()) == {1}
    assert sum(server.asked.values()) == 24 + 2 * len(FAULTS)
    assert 1 < server.most_in_flight <= 4 + 4  # those that we gave up on still hang in the server
    entry = report["asked"]
    assert (entry["answered"], entry["missing"], entry["tokens"], entry["prompt_tokens"]) == (24, 0, 168, 120)
    assert entry["cost"] == pytest.approx((120 * 1.0 + 168 * 10.0) / 1e6)
    assert json.loads((tmp_path / "run/generated/report.json").read_text()) == report


def test_the_bar_counts_what_the_recipes_verifier_finds_right(write, tmp_path, capsys):
    def answer(body):  # a third is right, though none as a text; a third is cut off
        number = int(body["messages"][-1]["content"].split("+")[0])
        right = rf"\boxed{{\frac{{{2 * number + 4}}}{{2}}}}"
        return [completion(right), completion(r"\boxed{x}"), completion(right, "length")][number % 3]

    with UnrulyServer(answer=answer) as server, Verifier("math", workers=1) as judge:
        loaded = load_recipe(write(server, 6))
        generate_traces(loaded, tmp_path / "run", verify=judge.one, say=lambda line: None)
    shown = capsys.readouterr().err
    assert "18/18" in shown
    assert re.search(r"tokens/s, 6/18 right", shown), shown[-300:]


def test_retry_after_is_honoured(write, tmp_path, quick):
    with UnrulyServer(["too_many_retry_after"]) as server:
        started = time.perf_counter()
        generate(write(server, 1), tmp_path / "run", "teachers.0.sampling.n=1")
        assert 1.0 <= time.perf_counter() - started < 3.0


def test_a_second_generation_asks_for_nothing_and_a_changed_one_asks_again(write, tmp_path):
    with UnrulyServer() as server:
        recipe = write(server, 4)
        generate(recipe, tmp_path / "run", "teachers.0.sampling.n=2")
        assert sum(server.asked.values()) == 8
        before = (tmp_path / "run/generated/asked.jsonl").read_bytes()
        generate(recipe, tmp_path / "run", "teachers.0.sampling.n=2", "teachers.0.concurrency=1")
        assert sum(server.asked.values()) == 8
        assert (tmp_path / "run/generated/asked.jsonl").read_bytes() == before
        generate(recipe, tmp_path / "run")  # n: 3, the first two are there
        assert sum(server.asked.values()) == 12
        for number, change in enumerate(
            ["teachers.0.model=another", "teachers.0.sampling.temperature=0.5", "teachers.0.system=Think."], start=1
        ):
            report = generate(recipe, tmp_path / "run", change)
            assert sum(server.asked.values()) == 12 + 12 * number
            assert (report["asked"]["answered"], report["asked"]["stale"]) == (12, 12 * number)
        problems = tmp_path / "problems.jsonl"
        problems.write_text(problems.read_text().replace("3+2?", "and 3+2?"))
        generate(recipe, tmp_path / "run")
        assert sum(server.asked.values()) == 48 + 3
        assert server.bodies[-1]["messages"] == [{"role": "user", "content": "and 3+2?"}]


def test_the_request_is_what_the_recipe_says(write, tmp_path, monkeypatch):
    monkeypatch.setenv("A_KEY", "sesame")
    with UnrulyServer() as server:
        recipe = write(server, 1)
        generate(
            recipe,
            tmp_path / "run",
            "teachers.0.sampling.n=1",
            "teachers.0.system=Think.",
            "teachers.0.api_key_env=A_KEY",
            "teachers.0.sampling.extra={stop: ['x'], top_k: 5, max_tokens: null, max_completion_tokens: 9}",
        )
        (body,), (headers,) = server.bodies, server.headers
        monkeypatch.delenv("A_KEY")
        with pytest.raises(UserError, match="the environment variable A_KEY is not set"):
            generate(recipe, tmp_path / "other", "teachers.0.api_key_env=A_KEY")
    assert headers["authorization"] == "Bearer sesame"
    assert body.pop("seed") >= 0
    assert body == {
        "model": "some-model",
        "messages": [{"role": "system", "content": "Think."}, {"role": "user", "content": "0+2?"}],
        "temperature": 1.0,
        "top_p": 0.95,
        "stop": ["x"],
        "top_k": 5,
        "max_completion_tokens": 9,
    }
    assert "sesame" not in "".join(path.read_text() for path in (tmp_path / "run").rglob("*") if path.is_file())


HOSTILE = {
    "jinja": "{{ cycler.__init__.__globals__.os.system('touch pwned') }}{% for x in range(10**9) %}{% endfor %}",
    "html": "<script>fetch('//x')</script><img src=x onerror=alert(1)>",
    "control": "\x1b[2J\x1b]0;title\x07\x00\r\x08\x7f\u202e\u2028\x85 end",
    "shell": "$(touch pwned) `touch pwned`; ${oc.env:HOME} %s %n",
    "surrogate": "a\ud800b\udc00c",
    "megabytes": "long " * 2_000_000,
}


def test_hostile_texts_end_as_data_or_as_counted_rejections(write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = list(HOSTILE)

    def answer(body):
        return completion(HOSTILE[names[int(body["messages"][-1]["content"].split("+")[0])]])

    with UnrulyServer(answer=answer) as server:
        recipe = write(server, len(names))
        report = generate(recipe, tmp_path / "run", "teachers.0.sampling.n=1")
        loaded = load_recipe(recipe, ["teachers.0.sampling.n=1"])
        problems = read_problems(tmp_path / "problems.jsonl")
        traces = generated_traces(loaded, RunDir(tmp_path / "run"), loaded.teachers[0], problems)
        texts = dict(zip(names, traces, strict=True))
        for name in ("jinja", "html", "shell", "control"):
            assert texts[name].response == HOSTILE[name].strip()
        assert texts["surrogate"].response == "a\ufffdb\ufffdc"
        assert texts["megabytes"].finish_reason == "rejected"
        assert texts["megabytes"].response == ""
        assert (report["asked"]["answered"], report["asked"]["rejected"]) == (5, 1)
        assert not (tmp_path / "pwned").exists()
        # A rejection is not asked again, until the limit is raised.
        assert sum(server.asked.values()) == 6
        generate(recipe, tmp_path / "run", "teachers.0.sampling.n=1")
        assert sum(server.asked.values()) == 6
        raised = ["teachers.0.sampling.n=1", "teachers.0.max_response_bytes=20000000"]
        report = generate(recipe, tmp_path / "run", *raised)
        assert sum(server.asked.values()) == 7
        assert (report["asked"]["answered"], report["asked"]["rejected"]) == (6, 0)


def test_reasoning_is_found_wherever_an_endpoint_puts_it(write, tmp_path):
    forms = [
        ({"content": "7", "reasoning": "r"}, ("r", "7")),
        ({"content": "7", "reasoning_content": "r"}, ("r", "7")),
        ({"content": "<think>\nr\n</think>\n\n7"}, ("r", "7")),
        ({"content": "r\n</think>\n\n7"}, ("r", "7")),
        ({"content": "<think>r"}, ("r", "")),
        ({"content": None, "reasoning": "r"}, ("r", "")),
        ({"content": " 7 "}, ("", "7")),
        ({"content": None, "tool_calls": []}, ("", "")),
    ]

    def answer(body):
        return completion(**forms[int(body["messages"][-1]["content"].split("+")[0])][0])

    with UnrulyServer(answer=answer) as server:
        generate(write(server, len(forms)), tmp_path / "run", "teachers.0.sampling.n=1")
    found = {int(row["problem_id"][1:]): (row["reasoning"], row["response"]) for row in lines(tmp_path / "run")}
    assert [found[number] for number in range(len(forms))] == [expected for _, expected in forms]


def test_a_second_close_of_the_reasoning_stays_in_the_response():
    assert split_reasoning("<think>a</think>b</think>c") == ("a", "b</think>c")


def test_a_refused_prompt_is_a_counted_rejection_and_a_refused_teacher_an_error(write, tmp_path, quick):
    with UnrulyServer(["refused"] * 2) as server:
        report = generate(write(server, 4), tmp_path / "run")
        assert (report["asked"]["answered"], report["asked"]["rejected"], report["asked"]["missing"]) == (10, 2, 0)
    with UnrulyServer(["refused"] * 100) as server, pytest.raises(UserError, match=r"HTTP 400.*prompt too long"):
        generate(write(server, 4), tmp_path / "other")
    assert lines(tmp_path / "other") == []
    with UnrulyServer(["unauthorized"] * 100) as server:
        with pytest.raises(UserError, match=r"no such key.*set api_key_env"):
            generate(write(server, 4), tmp_path / "other")
        assert sum(server.asked.values()) <= 8


def test_an_endpoint_that_stays_broken_ends_the_generation_and_what_arrived_stays(write, tmp_path, quick):
    with UnrulyServer() as server:
        recipe = write(server, 8)
        generate(recipe, tmp_path / "run", "teachers.0.sampling.n=1")
        server.faults.extend(["broken"] * 1000)
        with pytest.raises(UserError, match=r"HTTP 500.*run the same command again"):
            generate(recipe, tmp_path / "run", "teachers.0.max_retries=1")
        server.faults.clear()
        before = sum(server.asked.values())
        report = generate(recipe, tmp_path / "run")
        assert sum(server.asked.values()) - before == 16
        assert report["asked"]["answered"] == 24


def test_some_failures_are_missing_and_asked_for_alone(write, tmp_path, quick):
    with UnrulyServer(["broken"] * 2) as server:
        recipe = write(server, 8)
        with pytest.raises(UserError, match=r"2 of 24 samples are missing .*run the same command again"):
            generate(recipe, tmp_path / "run", "teachers.0.max_retries=0")
        generate(recipe, tmp_path / "run")
        assert sum(server.asked.values()) == 26


@pytest.mark.parametrize("tear", [b'{"problem_id": "p1", "sam', b"\0" * 4096, b"", b'{"a": 1}'])
def test_a_torn_last_line_is_cut_off_and_asked_again(write, tmp_path, tear):
    with UnrulyServer() as server:
        recipe = write(server, 4)
        generate(recipe, tmp_path / "run")
        file = tmp_path / "run/generated/asked.jsonl"
        whole = file.read_bytes().splitlines(keepends=True)
        file.write_bytes(b"".join(whole[:-1]) + tear)
        generate(recipe, tmp_path / "run")
        assert sum(server.asked.values()) == 13
    assert sorted((row["problem_id"], row["sample"]) for row in lines(tmp_path / "run")) == sorted(
        (row["problem_id"], row["sample"]) for row in map(json.loads, whole)
    )


def test_a_damaged_line_in_the_middle_is_named(write, tmp_path):
    with UnrulyServer() as server:
        recipe = write(server, 4)
        generate(recipe, tmp_path / "run")
        file = tmp_path / "run/generated/asked.jsonl"
        rows = file.read_bytes().splitlines(keepends=True)
        file.write_bytes(b"".join([*rows[:3], b"rubbish\n", *rows[3:]]))
        with pytest.raises(UserError, match=r"asked\.jsonl:4: damaged"):
            generate(recipe, tmp_path / "run")


def test_a_line_longer_than_what_is_read_at_a_time_survives_a_torn_one_after_it(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"a" * 3_000_000 + b"\n" + b"b" * 2_500_000)
    with SampleFile(path) as file:
        file.append({"a": 1})
    assert path.read_bytes() == b"a" * 3_000_000 + b'\n{"a": 1}\n'


@pytest.mark.slow
def test_a_generation_killed_at_30_percent_goes_on_and_asks_nothing_twice(write, tmp_path):
    """What was in flight at the kill may be asked again: nothing of it had arrived here."""
    with UnrulyServer(seconds=0.05) as server:
        recipe = write(server, 40)
        command = [sys.executable, "-m", "motkit", "generate", recipe, "--run", tmp_path / "run"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        file = tmp_path / "run/generated/asked.jsonl"
        while not file.is_file() or file.read_bytes().count(b"\n") < 36:
            assert process.poll() is None
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
        time.sleep(0.3)
        arrived = {(row["problem_id"], row["sample"]) for row in map(json.loads, file.read_bytes().split(b"\n")[:-1])}
        asked_at_kill = dict(server.asked)
        assert 36 <= len(arrived) < 120
        assert len(asked_at_kill) - len(arrived) <= 4  # in flight: at most 'concurrency'
        done = subprocess.run([*command, "--json"], check=True, capture_output=True, text=True)
        assert json.loads(done.stdout)["asked"]["answered"] == 120
        loaded = load_recipe(recipe)
        prompts = {
            r.label: (r.messages[-1]["content"], r.seed)
            for r in requests_of(loaded.teachers[0], read_problems(tmp_path / "problems.jsonl"), 42)
        }
        assert all(server.asked[prompts[f"{problem}#{sample}"]] == 1 for problem, sample in arrived)
        assert len(server.asked) == 120
        assert sum(server.asked.values()) - 120 <= 4
    rows = lines(tmp_path / "run")
    assert len(rows) == len({(row["problem_id"], row["sample"]) for row in rows}) == 120


def test_samples_are_read_in_the_order_of_the_problems(write, tmp_path):
    with UnrulyServer(seconds=0.01) as server:
        recipe = load_recipe(write(server, 4))
        generate_traces(recipe, tmp_path / "run", progress=False, say=lambda line: None)
    file = tmp_path / "run/generated/asked.jsonl"
    rows = file.read_text().splitlines(keepends=True)
    file.write_text("".join(reversed(rows)))
    requests = requests_of(recipe.teachers[0], read_problems(tmp_path / "problems.jsonl"), 42)
    traces = read_samples(file, requests, 10**6)
    assert [trace.label for trace in traces] == [f"p{n}#{k}" for n in range(4) for k in range(3)]


def test_a_model_folder_is_known_by_its_content(tmp_path, make_pico):
    from motkit.recipe import Teacher

    problems = {"p": SeedProblem(id="p", prompt="?", answer="1")}

    def fingerprint(folder, **settings):
        teacher = Teacher(name="t", model=str(folder), engine="transformers", **settings)
        return requests_of(teacher, problems, 0)[0].fingerprint

    first = make_pico("llama", tmp_path / "a", seed=0)
    assert fingerprint(first) == fingerprint(make_pico("llama", tmp_path / "b", seed=0))
    assert fingerprint(first) != fingerprint(make_pico("llama", tmp_path / "c", seed=1))
    assert fingerprint(first) == fingerprint(first, batch_size=3)


def test_only_what_can_be_asked_is_asked(write, tmp_path, make_pico):
    with UnrulyServer() as server:
        recipe = load_recipe(write(server))
        with pytest.raises(UserError, match="no such teacher; it has asked"):
            generate_traces(recipe, tmp_path / "run", teachers=["other"])
    plain = load_recipe(write_experiment(tmp_path / "plain", make_pico))
    with pytest.raises(UserError, match="the recipe has no teacher to ask"):
        generate_traces(plain, tmp_path / "run")


def test_from_a_notebook(write, tmp_path):
    async def cell():
        with UnrulyServer() as server:
            return generate(write(server, 2), tmp_path / "run")

    assert asyncio.run(cell())["asked"]["answered"] == 6


def test_the_transformers_engine(tmp_path, make_pico):
    recipe = write_experiment(tmp_path, make_pico)
    text = recipe.read_text().replace(
        "{name: wordy, traces: wordy.jsonl}",
        "{name: pico, model: student, engine: transformers, batch_size: 3, sampling: {n: 2, max_tokens: 6}}",
    )
    recipe.write_text(text)
    report = generate(recipe, tmp_path / "run")
    assert (report["pico"]["asked"], report["pico"]["missing"], report["pico"]["without_usage"]) == (16, 0, 0)
    rows = lines(tmp_path / "run", "pico")
    assert {row["finish_reason"] for row in rows} <= {"stop", "length"}
    assert sum(row["tokens"] for row in rows) == report["pico"]["tokens"]


@pytest.mark.slow
def test_rounds_train_on_what_was_generated_and_want_it_whole(tmp_path, make_pico):
    import motkit

    recipe = write_experiment(tmp_path, make_pico)
    with UnrulyServer() as server:
        url = server.url
        recipe.write_text(
            recipe.read_text()
            .replace(
                "{name: wordy, traces: wordy.jsonl}",
                f"{{name: asked, model: m, engine: openai, base_url: {url}, sampling: {{n: 2, max_tokens: 9}}}}",
            )
            .replace("rounds: 2", "rounds: 1")
        )
        with pytest.raises(UserError, match=r"teacher asked: 16 of 16 samples are missing.*run 'motkit generate "):
            motkit.run_rounds(load_recipe(recipe), tmp_path / "run", progress=False)
        assert not (tmp_path / "run" / "recipe.yaml").exists()
        generate(recipe, tmp_path / "run")
        table = motkit.run_rounds(load_recipe(recipe), tmp_path / "run", progress=False)
        assert "asked" in set(table["name"])
        kept = [json.loads(line) for line in (tmp_path / "run/traces/asked.jsonl").read_text().splitlines()]
        assert [row["problem_id"] for row in kept] == [f"p{n}" for n in range(8)]
        assert url not in (tmp_path / "run/final/README.md").read_text()
        with pytest.raises(UserError, match=r"its rounds began with other teachers[\s\S]*temperature"):
            generate(recipe, tmp_path / "run", "teachers.1.sampling.temperature=0.1")
        motkit.run_rounds(load_recipe(recipe, ["teachers.1.concurrency=2"]), tmp_path / "run", progress=False)


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_the_file_stays_whole(write, tmp_path):
    with UnrulyServer() as server:
        recipe = write(server, 40)
        code = (
            "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
            "from motkit.cli import main\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, resource.RLIM_INFINITY)); main()"
        )
        command = [sys.executable, "-c", code, "generate", recipe, "--run", tmp_path / "run"]
        stopped = subprocess.run(command, capture_output=True, text=True, check=False)
        assert stopped.returncode == 2, stopped.stderr
        assert stopped.stderr.strip().splitlines()[-1].startswith("error: ")
        have = len(lines(tmp_path / "run"))
        assert 0 < have < 120
        generate(recipe, tmp_path / "run")
        assert len(lines(tmp_path / "run")) == 120


@pytest.mark.slow
def test_interrupted_by_a_person(write, tmp_path):
    with UnrulyServer(seconds=0.05) as server:
        recipe = write(server, 40)
        command = [sys.executable, "-m", "motkit", "generate", recipe, "--run", tmp_path / "run"]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ},
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background ignores it
        )  # fmt: skip
        file = tmp_path / "run/generated/asked.jsonl"
        while not file.is_file() or file.read_bytes().count(b"\n") < 10:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "Traceback" not in said
    assert json.loads((tmp_path / "run/generated/report.json").read_text())["asked"]["answered"] >= 10


def test_the_proxy_is_the_environments(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("https_proxy", "http://proxy:3128")
    monkeypatch.setenv("no_proxy", "127.0.0.1,.internal")
    assert _proxy("https://llm.example.com/v1") == "http://proxy:3128"
    assert _proxy("https://127.0.0.1:8000/v1") is None
    assert _proxy("https://llm.internal/v1") is None
    assert _proxy("http://llm.example.com/v1") is None
