import json

import pytest
from click.testing import CliRunner

from motkit import importing
from motkit.cli import main
from motkit.errors import UserError
from motkit.importing import import_problems, import_traces, prompt_id, split_thinking
from motkit.traces import SeedProblem, read_problems, read_traces, sample_problems

PROBLEMS = {
    "a": SeedProblem(id="a", prompt="1 + 1?", answer="2"),
    "b": SeedProblem(id="b", prompt="2 + 2?", answer="4"),
}
THOUGHT = "<think>\none and one\n</think>\n\nIt is \\boxed{2}."


def jsonl(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"messages": [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": THOUGHT}]}, {}),
        ({"conversations": [{"from": "human", "value": "1 +  1?\n"}, {"from": "gpt", "value": THOUGHT}]}, {}),
        ({"prompt": "1 + 1?", "completion": THOUGHT}, {}),
        ({"id": "a", "prompt": [{"role": "user", "content": "1 + 1?"}],
          "completion": [{"role": "assistant", "content": THOUGHT}]}, {}),
        ({"question_id": "a", "out": THOUGHT}, {"id": "question_id", "response": "out"}),
        ({"problem_id": "a", "response": "It is \\boxed{2}.", "thoughts": "one and one"}, {"reasoning": "thoughts"}),
        ({"id": "a", "chat": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 1?"},
                              {"role": "assistant", "content": THOUGHT}]}, {"messages": "chat"}),
    ],
)  # fmt: skip
def test_every_form_becomes_the_same_trace(tmp_path, row, columns):
    (trace,) = import_traces(jsonl(tmp_path / "t.jsonl", [row]), columns, PROBLEMS)
    assert (trace.problem_id, trace.sample, trace.finish_reason) == ("a", 0, "stop")
    assert (trace.reasoning, trace.response) == ("one and one", "It is \\boxed{2}.")


def test_samples_are_numbered_and_other_problems_left_out(tmp_path):
    rows = [{"prompt": prompt, "completion": "x"} for prompt in ("1 + 1?", "3 + 3?", "2 + 2?", "1 + 1?")]
    traces = list(import_traces(jsonl(tmp_path / "t.jsonl", rows), {}, PROBLEMS))
    assert [trace.label for trace in traces] == ["a#0", "b#0", "a#1"]


def test_a_reasoning_that_never_ends_stays_as_it_is():
    assert split_thinking("<think> 1") == ("", "<think> 1")
    assert split_thinking("1") == ("", "1")
    assert split_thinking("a</think>b") == ("a", "b")
    assert split_thinking("<think>a</think>b</think>c") == ("a</think>b", "c")


def test_problems_get_an_id_that_their_traces_find(tmp_path):
    source = jsonl(tmp_path / "p.jsonl", [{"question": "1 + 1?", "final": 2}, {"question": "2 + 2?", "final": 4}])
    problems = {problem.id: problem for problem in import_problems(source, {"answer": "final"})}
    assert [problem.answer for problem in problems.values()] == ["2", "4"]
    traces = jsonl(tmp_path / "t.jsonl", [{"prompt": " 2 +\n2?", "completion": "4"}])
    (trace,) = import_traces(traces, {}, None)
    assert trace.problem_id == prompt_id("2 + 2?") == list(problems)[1]


@pytest.mark.parametrize(
    ("row", "columns", "says"),
    [
        (
            {"prompt": "1 + 1?"},
            {},
            r"t\.jsonl:1: no response: looked in response, .*the columns are prompt; name it with",
        ),
        ({"completion": "x"}, {}, r"t\.jsonl:1: neither an id nor a prompt"),
        ({"prompt": "x", "completion": "x"}, {}, "no trace of these problems in its 1 rows"),
        (
            {"prompt": "x", "completion": "x"},
            {"response": "text"},
            "response is to be read from 'text'; the columns are",
        ),
        ({"prompt": "x", "completion": "x"}, {"respnse": "text"}, "unknown respnse; a mapping for traces may name id"),
        ({"messages": [{"role": "user", "content": "1 + 1?"}] * 2}, {}, "2 user turns and 0 assistant turns"),
        ({"messages": [{"role": "tool", "content": "x"}]}, {}, "a turn needs role and content"),
        ({"messages": "hello"}, {}, "expected a list of turns"),
    ],
)
def test_what_cannot_be_imported_says_why(tmp_path, row, columns, says):
    with pytest.raises(UserError, match=says):
        list(import_traces(jsonl(tmp_path / "t.jsonl", [row]), columns, PROBLEMS))


def test_a_dataset_of_the_hub_is_loaded_by_name(monkeypatch):
    import datasets

    asked = []

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        return datasets.Dataset.from_list([{"problem": "1 + 1?", "answer": "2"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    sources = ["hf://a/b", "hf://a/b/c", "hf://a/b:test", "hf://a/b/c:train[:10%]"]
    for source in sources:
        (problem,) = import_problems(source, {})
        assert problem.prompt == "1 + 1?"
    assert asked == [("a/b", None, "train"), ("a/b", "c", "train"), ("a/b", None, "test"), ("a/b", "c", "train[:10%]")]
    with pytest.raises(UserError, match="expected hf://owner/name"):
        list(import_problems("hf://a", {}))
    assert importing.is_hub_source("hf://a/b")
    assert not importing.is_hub_source("a/b.jsonl")


def test_a_subset_depends_on_ids_and_seed_only():
    problems = {f"p{n}": SeedProblem(id=f"p{n}", prompt="?", answer="1") for n in range(50)}
    turned = dict(reversed(problems.items()))
    chosen = sample_problems(problems, 10, 0)
    assert set(chosen) == set(sample_problems(turned, 10, 0))
    assert list(chosen) == [name for name in problems if name in chosen]
    assert set(chosen) != set(sample_problems(problems, 10, 1))
    with pytest.raises(UserError, match=r"sample\.count: got 51, but there are 50 problems"):
        sample_problems(problems, 51, 0)


def test_the_command_writes_ours(tmp_path):
    problems = jsonl(tmp_path / "theirs-p.jsonl", [{"key": n, "q": f"{n}?", "a": n} for n in range(5)])
    traces = jsonl(tmp_path / "theirs-t.jsonl", [{"key": str(n), "out": THOUGHT} for n in range(5)])
    ours_p, ours_t = str(tmp_path / "p.jsonl"), str(tmp_path / "t.jsonl")
    columns = ["--columns", "id=key", "--columns", "prompt=q", "--columns", "answer=a"]
    done = CliRunner().invoke(
        main, ["import", problems, "--to", ours_p, "--kind", "problems", *columns, "--count", "3"]
    )
    assert done.exit_code == 0, done.output
    assert "3 problems written" in done.output
    columns = ["--columns", "id=key", "--columns", "response=out"]
    done = CliRunner().invoke(main, ["import", traces, "--to", ours_t, *columns, "--problems", ours_p])
    assert done.exit_code == 0, done.output
    read = read_traces(tmp_path / "t.jsonl", read_problems(tmp_path / "p.jsonl"))
    assert [trace.reasoning for trace in read] == ["one and one"] * 3
    again = CliRunner().invoke(main, ["import", traces, "--to", ours_t])
    assert again.exit_code == 2
    assert "exists already" in again.output
    wrong = CliRunner().invoke(main, ["import", traces, "--to", str(tmp_path / "x"), "--columns", "id"])
    assert "expected KEY=COLUMN" in wrong.output
