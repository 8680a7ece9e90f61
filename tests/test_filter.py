import json

import pytest
from conftest import pico_tokenizer

from motkit.errors import UserError
from motkit.filter import REPORT_HEADINGS, filter_traces, report_rows
from motkit.recipe import TraceFilter
from motkit.render import Renderer
from motkit.traces import SeedProblem, Trace
from motkit.verify import Verifier

PROBLEMS = {f"p{n}": SeedProblem(id=f"p{n}", prompt=f"{n}?", answer=str(n)) for n in range(4)}


def trace(number, sample=0, answer=None, reasoning="", finish="stop", response=None) -> Trace:
    response = response if response is not None else rf"\boxed{{{number if answer is None else answer}}}"
    fields = {"problem_id": f"p{number}", "sample": sample, "reasoning": reasoning, "response": response}
    return Trace(**fields, finish_reason=finish)


def prepared(read, *, max_length=None, seed=0, asked=None, **settings):
    tokenizer = pico_tokenizer()
    settings = {"verifier": "exact", **settings}
    verifier = Verifier(settings["verifier"])
    return filter_traces(
        {name: iter(traces) for name, traces in read.items()},
        problems=PROBLEMS,
        settings=TraceFilter(**settings),
        max_length=max_length,
        renderer=Renderer(tokenizer, {tokenizer.eos_token_id}),
        judge=lambda traces: verifier.judge(traces, PROBLEMS),
        seed=seed,
        asked=asked,
    )


def labels(result, teacher="a") -> list[str]:
    return [trace.label for trace in result.kept[teacher]]


MIXED = [
    trace(0), trace(0, 1), trace(1, answer=9), trace(1, 1, finish="length"), trace(1, 2, finish="error"),
    trace(2, reasoning="long " * 40), trace(3, response="<think> 3"), trace(3, 1, reasoning="a<|im_end|>"),
]  # fmt: skip


def test_every_trace_is_counted_once():
    result = prepared({"a": MIXED}, max_length=100, asked={"a": 10})
    report = result.report["a"]
    assert (report["asked"], report["read"], report["answered"]) == (10, 8, 7)
    assert (report["truncated"], report["failed"], report["wrong"], report["unverifiable"]) == (1, 1, 1, 1)
    assert (report["unfit"], report["over_long"], report["surplus"], report["kept"]) == (1, 1, 1, 1)
    lost = ("truncated", "failed", "wrong", "unverifiable", "unfit", "over_long", "surplus")
    assert sum(report[key] for key in lost) + report["kept"] == report["read"]
    assert list(report["unfit_reasons"]) == ["p3#1"]
    assert labels(result) == ["p0#0"]


def test_the_report_is_a_table_and_json():
    result = prepared({"a": [trace(0), trace(1), trace(2)], "b": [trace(1), trace(2), trace(3)]})
    assert result.report["a"]["overlap"] == {"b": 2}
    assert json.loads(json.dumps(result.report)) == result.report
    rows = report_rows(result.report)
    assert all(len(row) == len(REPORT_HEADINGS) for row in rows)
    assert rows[0][-1] == "b 2"


def test_tokens_are_those_of_what_is_kept():
    lengths = [len(row.input_ids) for row in prepared({"a": [trace(n) for n in range(4)]}).rendered["a"]]
    report = prepared({"a": [trace(n) for n in range(4)]}).report["a"]
    assert report["tokens"] == sum(lengths)
    assert report["mean_tokens"] == pytest.approx(sum(lengths) / 4, abs=0.05)
    assert report["p95_tokens"] == max(lengths)


def test_first_shortest_and_random():
    traces = [trace(0, sample, reasoning="x" * size) for sample, size in enumerate([30, 5, 20, 10, 40])]
    assert labels(prepared({"a": traces}, keep="first", keep_per_problem=2)) == ["p0#0", "p0#1"]
    assert labels(prepared({"a": traces}, keep="shortest", keep_per_problem=2)) == ["p0#1", "p0#3"]
    drawn = [tuple(labels(prepared({"a": traces}, keep="random", keep_per_problem=2, seed=seed))) for seed in range(30)]
    assert len(set(drawn)) > 5
    assert {label for pair in drawn for label in pair} == {f"p0#{n}" for n in range(5)}
    assert all(list(pair) == sorted(pair) for pair in drawn)
    assert drawn[0] == tuple(labels(prepared({"a": traces}, keep="random", keep_per_problem=2, seed=0)))


def test_a_random_choice_of_one_problem_does_not_change_with_the_others():
    traces = [trace(0, sample) for sample in range(6)]
    alone = labels(prepared({"a": traces}, keep="random"))
    other = labels(prepared({"a": [trace(1, 0), *traces[::-1]]}, keep="random"))
    assert alone == [label for label in other if label.startswith("p0")]


def test_without_a_verifier_wrong_traces_stay_and_unfinished_ones_do_not():
    result = prepared({"a": MIXED}, verifier="none", keep_per_problem=9, max_length=100)
    assert labels(result) == ["p0#0", "p0#1", "p1#0"]
    assert result.report["a"]["wrong"] == 0


@pytest.mark.parametrize(
    ("traces", "settings", "says"),
    [
        ([trace(0, n, answer=9) for n in range(3)], {}, r"none of its 3 traces is left \(3 wrong\); check"),
        ([trace(0, n, finish="length") for n in range(3)], {}, "3 truncated.*raise the teacher's sampling.max_tokens"),
        ([trace(0, response="<think>")], {}, "1 unverifiable.*use another filter.verifier than 'exact'"),
        ([trace(0, reasoning="long " * 40)], {}, "1 over-long.*raise train.max_length"),
        ([trace(0, n) for n in range(5)], {"min_per_teacher": 2},
         r"1 of its 5 traces are left \(4 surplus\); raise filter.keep_per_problem, or lower .*min_per_teacher"),
        ([trace(0)], {"min_per_teacher": 2}, r"1 of its 1 traces are left; ask for more problems or samples"),
    ],
)  # fmt: skip
def test_a_teacher_with_too_few_traces_is_an_error_that_names_the_knob(traces, settings, says):
    with pytest.raises(UserError, match=says):
        prepared({"a": traces}, max_length=100, **settings)


def test_only_what_is_kept_stays_in_memory():
    alive = []

    def many():
        import weakref

        for sample in range(2000):
            made = trace(sample % 4, sample)
            alive.append(weakref.ref(made))
            yield made
            if sample % 500 == 499:
                assert sum(ref() is not None for ref in alive) < 800  # the window of the verifier and what is kept

    assert len(labels(prepared({"a": many()}))) == 4
