import json
import os
import resource
import subprocess
import sys
import time

import pytest
from click.testing import CliRunner
from verify_pairs import HOSTILE, MATH, RESPONSES

from motkit.cli import main
from motkit.errors import UserError
from motkit.traces import SeedProblem, Trace
from motkit.verify import Answer, Verifier, graded_text, last_boxed, last_number, verify_exact, verify_many

# Where math-verify, with our guards, does not say what a person says. Each is a right answer called wrong.
DISAGREEMENTS = {
    (r"\sin 30^\circ", "0.5"): "degrees are dropped: the sine is taken of 30 radians",
    ("red and blue", "blue and red"): "words are compared in their order",
    ("42", "四十二"): "numerals that are not digits",
    ("x=2", "х=2"): "a Cyrillic letter that looks like x",
}


def problem(answer, verifier=None, **more) -> SeedProblem:
    return SeedProblem(id="p", prompt="?", answer=answer, verifier=verifier, **more)


@pytest.fixture(scope="module")
def judge():
    with Verifier("math", workers=1, time_limit_s=2.0) as judge:
        yield judge


@pytest.mark.parametrize(
    ("response", "answer", "correct"),
    [
        (r"The answer is \boxed{42}.", "42", True),
        (r"\boxed{41}, no: \boxed{42}", "42", True),
        (r"\boxed{42}, no: \boxed{41}", "42", False),
        (r"\boxed{42} and an unbalanced \boxed{41", "42", True),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}", True),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}", True),
        (r"\boxed{}", "0", False),
        (r"\boxed{1,000}", "1000", True),
        (r"\boxed{1000.0}", "1,000", True),
        (r"\boxed{0.5}", ".5", True),
        (r"\boxed{-3}", "3", False),
        (r"\boxed{$7$}", "7", True),
        (r"\boxed{x}", "X", False),
        ("first 3 apples, then 4: 12.", "12", True),
        ("12 apples, 3 left", "12", False),
        ("20-7", "7", True),
        ("it is -7", "-7", True),
        ("no number at all", "1", False),
        ("", "1", False),
        (r"\boxed{1e3}", "1000", True),
    ],
)
def test_exact(response, answer, correct):
    assert verify_exact(response, answer).correct is correct


def test_nested_braces_stay_whole():
    assert last_boxed(r"a \boxed{\frac{a}{b_{1}}} b") == r"\frac{a}{b_{1}}"
    assert last_boxed("nothing") is None


def test_numbers_are_taken_as_written():
    assert last_number("from 1,234.50 to 3.") == "3"
    assert last_number("1,234.50") == "1,234.50"
    assert last_number("version e5") == "5"


def test_hostile_text_costs_linear_time():
    assert verify_exact(r"\boxed{" * 2000 + "1" * 100_000, "1").correct is False


def test_verdicts_agree_with_a_careful_grader(judge):
    answers = [Answer(problem(gold, "math"), rf"\boxed{{{given}}}") for gold, given, _ in MATH]
    verdicts = judge.many(answers)
    differ = {
        (gold, given): (right, verdict.correct)
        for (gold, given, right), verdict in zip(MATH, verdicts, strict=True)
        if verdict.correct is not right
    }
    whole = judge.many(Answer(problem(gold, name), text) for name, gold, text, _ in RESPONSES)
    differ_whole = [pair for pair, verdict in zip(RESPONSES, whole, strict=True) if verdict.correct is not pair[3]]
    total = len(MATH) + len(RESPONSES)
    print(f"agreement: {total - len(differ) - len(differ_whole)} of {total} pairs")
    assert total >= 200
    assert differ_whole == []
    assert differ.keys() == DISAGREEMENTS.keys(), differ
    assert all(right and not got for right, got in differ.values()), "a wrong answer must never count as right"


def test_an_infinity_is_no_number_whatever_the_library_says(monkeypatch):
    import math_verify

    from motkit import verify_worker

    monkeypatch.setattr(math_verify, "verify", lambda *arguments, **keywords: True)
    for infinite in (r"\infty", r"\infty^{\infty^{\infty}}", r"-\infty"):
        assert verify_worker.compare_math({"gold": "7", "answer": infinite})[0] is False
    assert verify_worker.compare_math({"gold": r"(-\infty, 3)", "answer": r"(-\infty, 3)"})[0] is True


@pytest.mark.slow
def test_a_hostile_answer_costs_at_most_its_time_limit_and_is_never_right():
    with Verifier("math", workers=1, time_limit_s=1.0) as judge:
        judge.one(problem("7"), r"\boxed{x}")  # the worker is warm
        for text in HOSTILE:
            started = time.monotonic()
            verdict = judge.one(problem("7"), rf"\boxed{{{text}}}")
            assert verdict.correct is not True, text
            # The limit is of processor time: this is what a busy machine may make of it.
            assert time.monotonic() - started < 6 * 1.0 + 1.0, text
        assert judge.one(problem("1/2"), r"\boxed{0.5}").correct is True


def test_a_worker_that_hangs_or_wants_too_much_memory_is_replaced():
    bombs = ["9^{9^{9}}", "1/2", "2^{2^{40}}", "0.5"]
    with Verifier("math", workers=1, time_limit_s=1.0, memory_limit_mb=64) as judge:
        verdicts = judge.many(Answer(problem(r"\frac{1}{2}"), rf"\boxed{{{text}}}") for text in bombs)
        assert [verdict.correct for verdict in verdicts] == [None, True, None, True]
        assert verdicts[0].reason == "no verdict within 1 s"
        worker = judge._pool.workers[0]
        os.kill(worker.process.pid, 9)
        verdicts = judge.many(Answer(problem(str(n)), rf"\boxed{{\frac{{{2 * n}}}{{2}}}}") for n in range(5))
        assert [verdict.correct for verdict in verdicts].count(True) >= 4
    assert worker.process.poll() is not None


def test_the_workers_go_with_their_parent(tmp_path):
    code = (
        "import os, sys\nfrom motkit.verify import Verifier\nfrom motkit.traces import SeedProblem\n"
        "v = Verifier('math', workers=1)\nv.one(SeedProblem(id='p', prompt='?', answer='1/2'), r'\\boxed{0.5}')\n"
        "print(v._pool.workers[0].process.pid, flush=True)\nos.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    pid = int(done.stdout)
    for _ in range(50):
        if not os.path.exists(f"/proc/{pid}"):
            return
        time.sleep(0.1)
    pytest.fail("the worker outlives its parent")


def test_nothing_of_a_teacher_is_executed(judge, tmp_path):
    mark = tmp_path / "executed"
    code = f"__import__('pathlib').Path('{mark}').touch()"
    tasks = ["countdown", "puzzle24", "polynomial_multiplication", "simple_integration", "intermediate_integration"]
    tasks += ["string_insertion", "spiral_matrix", "binary_matrix", "n_queens", "number_sorting", "codeio", "bf"]
    metadata = {
        "numbers": [4, 6],
        "target": 24,
        "integrand": "x",
        "variable": "x",
        "solution": "1",
        "valid_answers": [],
    }
    answers = [
        Answer(problem("1 2", f"reasoning_gym:{task}", metadata=metadata), f"<answer>{text}</answer>")
        for task in tasks
        for text in (code, f"[{code}]", f"({code})")
    ]
    answers += [Answer(problem("49", "math"), text) for text in (code, rf"\boxed{{{code}}}", "{{ 7*7 }}", f"${code}$")]
    assert not any(verdict.correct for verdict in judge.many(answers))
    assert not mark.exists()


@pytest.mark.parametrize(
    ("task", "answer", "metadata", "response", "correct"),
    [
        ("countdown", "4*6", {"numbers": [4, 6], "target": 24}, r"\boxed{6*4}", True),
        ("countdown", "4*6", {"numbers": [4, 6], "target": 24}, r"\boxed{6+4}", False),
        ("countdown", "4*6", {"numbers": [4, 6], "target": 24}, "<answer>4 * 6</answer>", True),
        ("spiral_matrix", "1 2", {}, "<answer>1 2</answer>", True),
        ("spiral_matrix", "1 2", {}, "<answer>[1, 2]</answer>", False),
        ("chain_sum", "42", {}, "So it is <answer>42</answer>", True),
        ("polynomial_multiplication", "x**2 - 1", {}, "<answer>-1 + x*x</answer>", True),
    ],
)
def test_reasoning_gym_scores_its_own_tasks(judge, task, answer, metadata, response, correct):
    given = problem(answer, f"reasoning_gym:{task}", metadata=metadata)
    assert judge.one(given, response).correct is correct


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("maths", "did you mean 'math'"),
        ("python", "'python' is not available in this version"),
        ("reasoning_gym:", "expected one of math"),
    ],
)
def test_an_unknown_verifier_is_refused(name, says):
    with pytest.raises(UserError, match=says):
        Verifier(name)
    with pytest.raises(UserError, match=f"problem p: verifier: .*{says}"):
        verify_many([Answer(problem("1", name), "1")])


def test_an_unknown_task_of_reasoning_gym_is_refused():
    with pytest.raises(UserError, match="no task 'countdwn'; did you mean 'countdown'"):
        verify_many([Answer(problem("1", "reasoning_gym:countdwn"), "1")], workers=1)


def test_a_problem_names_its_own_verifier_unless_nothing_is_verified():
    answer = Answer(problem("1/2", "exact"), r"\boxed{0.5}")
    assert verify_many([answer], "math")[0].correct is False
    assert verify_many([answer], "none")[0].correct is True
    unfinished = Answer(answer.problem, answer.response, "length")
    assert verify_many([unfinished], "none")[0].correct is None


def test_only_a_finished_response_is_graded():
    assert graded_text(r"\boxed{1}", "length") == (None, "not finished: finish_reason is 'length'")
    assert graded_text("<think> 1", "stop") == (None, "the reasoning never ends")
    assert graded_text("<think>1</think>2</think>3", "stop") == ("3", "")


def test_verdicts_come_in_order_whatever_the_workers_do():
    texts = [rf"\frac{{{n}}}{{3}}" if n % 3 else "5+" * 300 + "1" if n == 9 else str(n) for n in range(40)]
    verdicts = verify_many(
        [Answer(problem(r"\frac{8}{3}"), rf"\boxed{{{text}}}") for text in texts], workers=2, time_limit_s=2.0
    )
    assert [n for n, verdict in enumerate(verdicts) if verdict.correct] == [8]
    assert [verdict.extracted for verdict in verdicts] == texts


@pytest.mark.parametrize("text", ["<answer>", "answer ", r"\boxed{", "$", "**", "#### ", "answer is ", "\n", "(A"])
def test_extraction_takes_linear_time(text):
    started = time.monotonic()
    response = text * (990_000 // len(text))
    for name in ("math", "choice", "exact"):
        verify_many([Answer(problem("B", name), response)], workers=1)
    assert time.monotonic() - started < 15


def test_ten_megabytes_end_as_a_verdict(judge):
    verdict = judge.one(problem("42"), "x" * 10_000_000 + r"\boxed{42}")
    assert verdict.correct is None
    assert "10,000,010 characters" in verdict.reason


def test_the_command_prints_a_table_or_an_object_a_line(tmp_path):
    (tmp_path / "p.jsonl").write_text(json.dumps({"id": "p", "prompt": "?", "answer": "1/2"}))
    texts = [r"\boxed{0.5}", r"\boxed{0.6}", "<think> 0.5", "[red]nothing\x1b[J"]
    rows = [
        Trace(problem_id="p", sample=n, reasoning="", response=text, finish_reason="stop").model_dump_json()
        for n, text in enumerate(texts)
    ]
    (tmp_path / "t.jsonl").write_text("\n".join(rows))
    command = ["verify", str(tmp_path / "t.jsonl"), "--problems", str(tmp_path / "p.jsonl"), "--workers", "1"]
    table = CliRunner().invoke(main, command)
    assert table.exit_code == 0, table.output
    assert "unverifiable" in table.output
    assert "no answer found" in table.output
    lines = CliRunner().invoke(main, [*command, "--json"]).stdout.splitlines()
    assert [json.loads(line)["correct"] for line in lines] == [True, False, None, False]
    assert json.loads(lines[0]) == {
        "problem_id": "p", "sample": 0, "correct": True, "extracted": "0.5", "reason": "equal",
    }  # fmt: skip
    refused = CliRunner().invoke(main, [*command, "--verifier", "python"])
    assert refused.exit_code == 2


@pytest.mark.slow
def test_a_hundred_thousand_traces_are_judged_in_bounded_memory():
    def answers(count):
        for n in range(count):
            yield Answer(problem(str(n)), "x" * 10_000 + rf"\boxed{{{n}}}")

    with Verifier("math", workers=1) as judge:
        assert sum(verdict.correct is True for verdict in judge.stream(answers(1000))) == 1000
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        assert sum(verdict.correct is True for verdict in judge.stream(answers(100_000))) == 100_000
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 30_000  # KiB; the responses together have 1 GB
