import json

import pytest

from motkit.errors import UserError
from motkit.traces import read_problems, read_traces, to_jsonl

PROBLEM = {"id": "p1", "prompt": "1 + 1?", "answer": "2"}
TRACE = {"problem_id": "p1", "sample": 0, "reasoning": "a\u2028b", "response": "\\boxed{2}", "finish_reason": "stop"}


def jsonl(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), "utf-8")
    return path


def test_what_is_written_is_read_again(tmp_path):
    problems = read_problems(jsonl(tmp_path / "p.jsonl", [PROBLEM]))
    traces = read_traces(
        jsonl(tmp_path / "t.jsonl", [{**TRACE, "model": "teacher"}, "", {**TRACE, "sample": 1}]), problems
    )
    (tmp_path / "again.jsonl").write_text(to_jsonl(traces), "utf-8")
    assert read_traces(tmp_path / "again.jsonl", problems) == traces
    assert traces[0].label == "p1#0"


def test_a_line_separator_inside_a_string_is_no_new_line(tmp_path):
    problems = read_problems(jsonl(tmp_path / "p.jsonl", [PROBLEM]))
    (tmp_path / "t.jsonl").write_text(json.dumps(TRACE, ensure_ascii=False) + "\n", "utf-8")
    assert read_traces(tmp_path / "t.jsonl", problems)[0].reasoning == "a\u2028b"


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("{", "p.jsonl:2: not a JSON object"),
        ("[1]", "p.jsonl:2: expected a JSON object, got list"),
        ({"id": "p2", "answer": "2"}, "p.jsonl:2: prompt: missing"),
        ({**PROBLEM, "id": "p2", "answer": 2}, "p.jsonl:2: answer: got '2'"),
        ({**PROBLEM, "id": "p2", "prompt": None}, "p.jsonl:2: prompt: got 'None'"),
        (PROBLEM, "p.jsonl:2: id: 'p1' is used on an earlier line"),
    ],
)
def test_a_malformed_problem_names_file_line_and_field(tmp_path, row, says):
    with pytest.raises(UserError) as caught:
        read_problems(jsonl(tmp_path / "p.jsonl", [PROBLEM, row]))
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({**TRACE, "problem_id": "p9"}, "t.jsonl:2: problem_id: 'p9' is not among"),
        (TRACE, "t.jsonl:2: sample: problem 'p1' has a sample 0"),
        ({**TRACE, "sample": "1"}, "t.jsonl:2: sample: got '1'"),
        ({key: TRACE[key] for key in TRACE if key != "finish_reason"}, "t.jsonl:2: finish_reason: missing"),
    ],
)
def test_a_malformed_trace_names_file_line_and_field(tmp_path, row, says):
    problems = read_problems(jsonl(tmp_path / "p.jsonl", [PROBLEM]))
    with pytest.raises(UserError) as caught:
        read_traces(jsonl(tmp_path / "t.jsonl", [TRACE, row]), problems)
    assert says in str(caught.value)


def test_bytes_that_are_not_utf8_name_their_line(tmp_path):
    (tmp_path / "p.jsonl").write_bytes(json.dumps(PROBLEM).encode() + b'\n{"id": "\xff"}\n')
    with pytest.raises(UserError, match=r"p\.jsonl:2: not UTF-8"):
        read_problems(tmp_path / "p.jsonl")


def test_empty_files_are_refused(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match="holds no problem"):
        read_problems(tmp_path / "empty.jsonl")
    with pytest.raises(UserError, match="the teacher is empty"):
        read_traces(tmp_path / "empty.jsonl", {})
