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


def test_an_empty_source_and_a_byte_order_mark(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match=r"empty\.jsonl: holds no trace"):
        list(import_traces(str(tmp_path / "empty.jsonl"), {}, PROBLEMS))
    windows = (
        '\ufeff{"id": "a", "prompt": "1 + 1?", "answer": "2"}\r\n{"id": "b", "prompt": "2 + 2?", "answer": "4"}\r\n'
    )
    (tmp_path / "p.jsonl").write_bytes(windows.encode())
    assert read_problems(tmp_path / "p.jsonl") == PROBLEMS
    (tmp_path / "p.jsonl").write_bytes(b"\n" + windows.encode())
    with pytest.raises(UserError, match=r"p\.jsonl:2: not a JSON object"):  # only where a file begins
        read_problems(tmp_path / "p.jsonl")


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


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_a_dataset_with_configs_and_splits_is_read_through_datasets(tmp_path, monkeypatch, kind):
    """A folder of the working folder stands in for the repository on the hub: `datasets` takes both the same way."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "owner" / "name"
    lines = ["---", "configs:"]
    for config in ("main", "hard"):
        lines += [f"- config_name: {config}", "  data_files:"]
        for split in ("train", "test"):
            rows = [
                {
                    "uuid": f"{config}-{split}-{number}",
                    "messages": [
                        {"role": "user", "content": f"{number} + 1?"},
                        {"role": "assistant", "content": f"<think>\none more\n</think>\n\n\\boxed{{{number + 1}}}"},
                    ],
                    "expected": number + 1,
                    "extra": {"level": None if number else 3},
                }
                for number in range(3)
            ]
            file = folder / config / f"{split}.{kind}"
            file.parent.mkdir(parents=True, exist_ok=True)
            table = datasets.Dataset.from_list(rows)
            table.to_parquet(file) if kind == "parquet" else table.to_json(file)
            lines += [f"  - split: {split}", f"    path: {config}/{split}.{kind}"]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]))
    columns = {"id": "uuid", "answer": "expected"}
    for source, names in {
        "hf://owner/name/main": ["main-train-0", "main-train-1", "main-train-2"],
        "hf://owner/name/hard:test": ["hard-test-0", "hard-test-1", "hard-test-2"],
        "hf://owner/name/hard:train[1:]": ["hard-train-1", "hard-train-2"],
    }.items():
        problems = list(import_problems(source, columns))
        assert [problem.id for problem in problems] == names
        assert [problem.answer for problem in problems] == [str(int(name[-1]) + 1) for name in names]
        known = {problem.id: problem for problem in problems}
        traces = list(import_traces(source, {"id": "uuid"}, known))
        assert [(trace.problem_id, trace.reasoning) for trace in traces] == [(name, "one more") for name in names]
    for source, says in {
        "hf://owner/name": r"Config name is missing.*main",  # two configs: it says which
        "hf://owner/name/soft": r"BuilderConfig 'soft' not found.*main",
        "hf://owner/name/main:dev": r"Unknown split.*dev",
    }.items():
        with pytest.raises(UserError, match=f"{source}: cannot be loaded: {says}"):
            list(import_problems(source, columns))


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
