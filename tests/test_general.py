"""lm-eval's tasks on checkpoints: the real lm-eval, pico-models, local data."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest

import motkit.tasks
from motkit import UserError

pytest.importorskip("lm_eval", reason="lm-eval is not installed (pip install 'motkit[eval]')")

from motkit import general

TASKS = Path(motkit.tasks.__path__[0])
ITEMS = 24


@pytest.fixture
def local_tasks(tmp_path: Path) -> Path:
    """``pico_choice``, ``pico_more`` (multiple choice; group ``pico_group``) and ``pico_aime`` (3 answers each)."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [
        {"question": f"{a} + {a + 1} =", "choices": [str(2 * a + 1), str(2 * a), str(a)], "gold": 0}
        for a in range(1, ITEMS + 1)
    ]
    (folder / "choice.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "more.jsonl").write_text("".join(json.dumps(row | {"gold": 1}) + "\n" for row in rows[: ITEMS // 3]))
    problems = [{"problem": f"What is {a} + {a}?", "answer": f"{2 * a:03d}"} for a in (3, 9, 20)]
    (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in problems))
    for name in ("choice", "more"):
        (folder / f"{name}.yaml").write_text(
            f"task: pico_{name}\ndataset_path: json\n"
            f"dataset_kwargs: {{data_files: {{test: {folder / name}.jsonl}}}}\ntest_split: test\n"
            "output_type: multiple_choice\ndoc_to_text: '{{question}}'\ndoc_to_choice: '{{choices}}'\n"
            "doc_to_target: gold\nmetric_list:\n  - {metric: acc, aggregation: mean, higher_is_better: true}\n"
            "metadata: {version: 3}\n"
        )
    (folder / "group.yaml").write_text(
        "group: pico_group\ntask: [pico_choice, pico_more]\n"
        "aggregate_metric_list: [{metric: acc, weight_by_size: true}]\nmetadata: {version: 1}\n"
    )
    (folder / "aime.yaml").write_text(
        f"include: {TASKS / '_aime.yaml'}\ntask: pico_aime\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {folder / 'problems.jsonl'}}}}}\ntest_split: test\nrepeats: 3\n"
        "generation_kwargs: {until: [], do_sample: true, temperature: 0.6, top_p: 0.95, top_k: 0, max_gen_toks: 4}\n"
        "metric_list:\n  - {metric: avg@3, aggregation: mean, higher_is_better: true}\n"
        "  - {metric: answered, aggregation: mean, higher_is_better: true}\n"
    )
    return folder


def samples_of(out: Path, name: str, unit: str, task: str) -> list[dict[str, Any]]:
    lines = (out / "general" / name / unit / f"{task}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


# motkit's own tasks


@pytest.mark.slow
def test_every_one_of_the_k_answers_counts(local_tasks: Path) -> None:
    """The real lm-eval with a model that answers from a script: avg@3 over problems, and its standard error."""
    import lm_eval
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager

    script = {
        "What is 3 + 3?": [r"\boxed{6}", r"so \boxed{7}", r"<think>\boxed{5}</think> It is \boxed{6.0}"],
        # A number in mid-thought, one in reasoning that never ends, and one outside a box do not count.
        "What is 9 + 9?": ["it must be 18", r"<think> \boxed{18} wait", "The answer is 18"],
        "What is 20 + 20?": [r"\boxed{\frac{80}{2}}", r"\boxed{40}", r"\boxed{40}"],
    }

    class Scripted(LM):
        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            asked: dict[str, int] = {}
            answers = []
            for request in requests:
                prompt, settings = request.args
                assert settings["max_gen_toks"] == 4
                problem = next(problem for problem in script if problem in prompt)
                assert r"\boxed{}" in prompt
                answers.append(script[problem][asked.get(problem, 0)])
                asked[problem] = asked.get(problem, 0) + 1
            assert set(asked.values()) == {3}
            return answers

        def loglikelihood(self, requests: Any) -> Any:
            raise NotImplementedError

        loglikelihood_rolling = loglikelihood

    found = lm_eval.simple_evaluate(
        model=Scripted(),
        tasks=["pico_aime"],
        task_manager=TaskManager(include_path=[TASKS, local_tasks], include_defaults=False),
    )
    scores = found["results"]["pico_aime"]
    means = numpy.array([2 / 3, 0.0, 3 / 3])
    assert scores["avg@3,none"] == pytest.approx(means.mean())
    assert scores["avg@3_stderr,none"] == pytest.approx(means.std(ddof=1) / math.sqrt(3))
    assert scores["answered,none"] == pytest.approx((3 + 0 + 3) / 9)


@pytest.mark.slow
def test_the_aime_tasks_say_what_the_convention_is() -> None:
    """As lm-eval reads them, under names that are not its own."""
    from lm_eval.tasks._yaml_loader import load_yaml

    for year, dataset, split in (("24", "HuggingFaceH4/aime_2024", "train"), ("25", "math-ai/aime25", "test")):
        task = load_yaml(TASKS / f"aime{year}.yaml")
        assert (task["task"], task["dataset_path"], task["test_split"]) == (f"motkit_aime{year}", dataset, split)
        assert task["repeats"] == 16
        settings = task["generation_kwargs"]
        assert (settings["temperature"], settings["top_p"], settings["max_gen_toks"]) == (0.6, 0.95, 32768)
        assert settings["do_sample"] is True
        assert settings["until"] == []
        assert task["metric_list"][0]["metric"] == "avg@16"
    manager = general._task_manager(None, ["motkit_aime*"])
    assert general._find_tasks(manager, ["motkit_aime*"]) == ["motkit_aime24", "motkit_aime25"]
    import lm_eval

    assert manager.task_index["aime24"].yaml_path.is_relative_to(Path(lm_eval.__file__).parent)


# The table, against independent computations


def record_of(folder: Path, name: str, scores: dict[str, list[float]], **changes: Any) -> dict[str, Any]:
    """What `evaluate_tasks` keeps of a checkpoint, with given scores per document of each task."""
    files = {}
    for task, values in scores.items():
        file = folder / name / f"{task}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        rows = [
            {"doc_id": i, "doc_hash": f"h{i}", "filter": "none", "metrics": ["acc"], "acc": value}
            for i, value in enumerate(values)
        ]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        files[file.relative_to(folder).as_posix()] = {"task": task}
    results = {
        task: {
            "acc,none": float(numpy.mean(values)),
            "acc_stderr,none": float(numpy.std(values, ddof=1) / math.sqrt(len(values))),
            "sample_len": len(values),
        }
        for task, values in scores.items()
    }
    return {
        "inputs": {"chat_template": False},
        "n_shot": {},
        "higher_is_better": {task: {"acc": True} for task in scores},
        "groups": {},
        "results": results,
        "samples": files,
    } | changes


def tabulate(folder: Path, base: dict[str, Any], student: dict[str, Any]) -> Any:
    return general._tabulate({"base": {"unit": base}, "student": {"unit": student}}, folder, lambda line: None)


def test_paired_error_and_interval(tmp_path: Path) -> None:
    from scipy import stats

    draw = numpy.random.default_rng(0)
    before, after = draw.integers(0, 2, 200).astype(float), draw.integers(0, 2, 200).astype(float)
    after[:150] = before[:150]
    table = tabulate(
        tmp_path, record_of(tmp_path, "base", {"t": list(before)}), record_of(tmp_path, "student", {"t": list(after)})
    )
    (row,) = table.to_dict("records")
    expected = stats.ttest_rel(after, before)
    interval = expected.confidence_interval(0.95)
    assert row["paired"]
    assert row["n"] == 200
    assert row["difference"] == pytest.approx((after - before).mean())
    assert row["standard_error"] == pytest.approx((after - before).mean() / expected.statistic)
    assert (row["low"], row["high"]) == pytest.approx((interval.low, interval.high))
    gained, lost = int((after > before).sum()), int((after < before).sum())
    smaller = sum(math.comb(gained + lost, k) for k in range(min(gained, lost) + 1)) / 2 ** (gained + lost)
    assert row["p_value"] == pytest.approx(min(1.0, 2 * smaller))


@pytest.mark.parametrize(
    ("gained", "lost", "claim"),
    [
        (0, 0, "no difference can be claimed"),
        (3, 0, "no difference can be claimed"),
        (20, 2, "better"),
        (2, 20, "worse"),
    ],
)
def test_what_may_be_claimed(tmp_path: Path, gained: int, lost: int, claim: str) -> None:
    """Three documents gained of three that differ are no proof: tossed coins do that one time in four."""
    before = [0.0] * gained + [1.0] * lost + [1.0] * 40
    after = [1.0] * gained + [0.0] * lost + [1.0] * 40
    table = tabulate(tmp_path, record_of(tmp_path, "base", {"t": before}), record_of(tmp_path, "student", {"t": after}))
    assert list(table["claim"]) == [claim]
    (line,) = general.describe(table)
    assert claim in line


def test_a_metric_where_lower_is_better(tmp_path: Path) -> None:
    better = {"higher_is_better": {"t": {"acc": False}}}
    before, after = [3.0, 4.0, 5.0, 4.5], [1.0, 2.1, 3.0, 2.6]
    table = tabulate(
        tmp_path,
        record_of(tmp_path, "base", {"t": before}, **better),
        record_of(tmp_path, "student", {"t": after}, **better),
    )
    assert list(table["claim"]) == ["better"]
    assert math.isnan(table["p_value"][0])


@pytest.mark.parametrize("by_size", [True, False])
def test_error_of_a_group(tmp_path: Path, by_size: bool) -> None:
    """Against a bootstrap within each task, slow and plain."""
    draw = numpy.random.default_rng(1)
    tasks = {"a": 30, "b": 90}
    before = {task: list(draw.integers(0, 2, n).astype(float)) for task, n in tasks.items()}
    after = {task: list(draw.integers(0, 2, n).astype(float)) for task, n in tasks.items()}

    def group_mean(scores: dict[str, list[float]]) -> float:
        if by_size:
            return float(numpy.mean([score for values in scores.values() for score in values]))
        return float(numpy.mean([numpy.mean(values) for values in scores.values()]))

    records = []
    for name, scores in (("base", before), ("student", after)):
        record = record_of(tmp_path, name, scores, groups={"g": {"tasks": ["a", "b"], "by_size": {"acc": by_size}}})
        record["results"]["g"] = {"acc,none": group_mean(scores), "acc_stderr,none": 0.5, "sample_len": 120}
        records.append(record)
    table = tabulate(tmp_path, *records)
    assert list(table["task"]) == ["g", "a", "b"]
    assert list(table["part_of"]) == ["", "g", "g"]
    row = table.iloc[0]
    resampled = []
    for _ in range(4000):
        picked = {task: draw.integers(0, n, n) for task, n in tasks.items()}
        mean = [
            group_mean({task: [scores[task][i] for i in picked[task]] for task in tasks}) for scores in (after, before)
        ]
        resampled.append(mean[0] - mean[1])
    assert row["paired"]
    assert row["difference"] == pytest.approx(group_mean(after) - group_mean(before))
    assert row["standard_error"] == pytest.approx(numpy.std(resampled), rel=0.06)
    assert math.isnan(row["p_value"]) != by_size


def test_parts_of_groups_in_groups_are_told_apart(tmp_path: Path) -> None:
    """As mmlu holds mmlu_stem, which holds its subjects; a group that averages nothing holds nothing."""
    draw = numpy.random.default_rng(2)
    sizes = {"a": 8, "b": 12, "c": 10, "alone": 9}
    groups = {
        "all": {"tasks": ["a", "b", "c"], "by_size": {"acc": True}},
        "some": {"tasks": ["a", "b"], "by_size": {"acc": True}},
        "collection": {"tasks": ["alone"], "by_size": {}},
    }
    records, scores = [], {}
    for name in ("base", "student"):
        scores[name] = {task: list(draw.integers(0, 2, n).astype(float)) for task, n in sizes.items()}
        record = record_of(tmp_path, name, scores[name], groups=groups)
        for group in ("all", "some"):
            values = [score for task in groups[group]["tasks"] for score in scores[name][task]]
            record["results"][group] = {"acc,none": float(numpy.mean(values)), "sample_len": len(values)}
        record["results"]["collection"] = {}
        records.append(record)
    table = tabulate(tmp_path, *records).set_index("task")
    parts = {"all": "", "some": "all", "a": "some", "b": "some", "c": "all", "alone": ""}
    assert dict(table["part_of"]) == parts
    assert dict(table["n"]) == {"all": 30, "some": 20, **sizes}
    assert table["paired"].all()
    lines = general.describe(table.reset_index())
    assert [line.partition(",")[0] for line in lines[:-1]] == ["all", "alone"]
    assert lines[-1].startswith("6 comparisons at 95 % each")
    assert lines[-1].endswith("about 0.3.")


def test_other_documents_are_not_paired(tmp_path: Path) -> None:
    base, student = (record_of(tmp_path, name, {"t": [1.0, 0.0, 1.0, 1.0]}) for name in ("base", "student"))
    file = tmp_path / "student" / "t.jsonl"
    file.write_text(file.read_text().replace("h3", "other"))
    said: list[str] = []
    table = general._tabulate({"base": {"unit": base}, "student": {"unit": student}}, tmp_path, said.append)
    assert not table["paired"][0]
    error = base["results"]["t"]["acc_stderr,none"]
    assert table["standard_error"][0] == pytest.approx(math.sqrt(2) * error)
    assert "not the same documents" in said[0]


# The whole, with the real lm-eval


@pytest.mark.slow
def test_tasks_on_pico_checkpoints(local_tasks: Path, tmp_path: Path, make_pico: Callable[..., Path]) -> None:
    """Scores agree with the samples on disk and with a likelihood computed here; the second call does nothing."""
    checkpoints = {name: make_pico("llama", tmp_path / name, seed=seed) for name, seed in (("base", 1), ("student", 2))}
    out = tmp_path / "out"
    said: list[str] = []

    def run() -> Any:
        said.clear()
        return general.evaluate_tasks(
            checkpoints, ["pico_group", "pico_aime"], out, engine="hf", include_path=local_tasks, progress=False,
            say=said.append,
        )  # fmt: skip

    table = run().set_index(["task", "metric"])
    assert (out / "general.csv").is_file()
    assert not list(out.rglob("*.partial"))
    right = {
        name: numpy.array([sample["acc"] for sample in samples_of(out, name, "pico_group", "pico_choice")])
        for name in checkpoints
    }
    row = table.loc[("pico_choice", "acc")]
    assert row["n"] == ITEMS
    assert row["part_of"] == "pico_group"
    assert (row["base"], row["student"]) == (right["base"].mean(), right["student"].mean())
    difference = right["student"] - right["base"]
    assert row["standard_error"] == pytest.approx(difference.std(ddof=1) / math.sqrt(ITEMS))
    assert table.loc[("pico_group", "acc")]["n"] == ITEMS + ITEMS // 3
    assert list(right["base"]) == own_choices(checkpoints["base"], local_tasks / "choice.jsonl")
    aime = table.loc[("pico_aime", "avg@3")]
    assert aime["n"] == 3
    assert aime["chat_template"]
    assert not row["chat_template"]
    answers = samples_of(out, "student", "pico_aime", "pico_aime")
    assert all(len(sample["resps"][0]) == 3 for sample in answers)
    assert len({answer for sample in answers for answer in sample["resps"][0]}) > 3
    assert answers[0]["arguments"][0][0].startswith("<|im_start|>user\nWhat is 3 + 3?")
    record = json.loads((out / "general" / "student.json").read_text())["tasks"]["pico_group"]
    assert record["task_versions"]["pico_choice"] == 3
    assert record["inputs"]["versions"]["lm-eval"]

    times = {path: path.stat().st_mtime_ns for path in (out / "general").rglob("*.json*")}
    again = run().set_index(["task", "metric"])
    assert said == [f"{name}: {task}: done already" for name in checkpoints for task in ("pico_group", "pico_aime")]
    assert times == {path: path.stat().st_mtime_ns for path in (out / "general").rglob("*.json*")}
    assert again.equals(table)

    # Other weights, a damaged file and other data are noticed, each where it is.
    make_pico("llama", checkpoints["base"], seed=3)
    (out / "general/student/pico_aime/pico_aime.jsonl").write_text("")
    with (local_tasks / "more.jsonl").open("a") as file:
        file.write(json.dumps({"question": "1 + 1 =", "choices": ["2", "3"], "gold": 0}) + "\n")
    run()
    assert not [line for line in said if "done already" in line]


def own_choices(checkpoint: Path, data: Path) -> list[float]:
    """Whether the likeliest choice is the first, for each item: log-likelihoods summed over its tokens, in float64."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float64)
    right = []
    for line in data.read_text().splitlines():
        item = json.loads(line)
        likelihoods = []
        for choice in item["choices"]:
            prompt = tokenizer(item["question"], add_special_tokens=False)["input_ids"]
            whole = tokenizer(f"{item['question']} {choice}", add_special_tokens=False)["input_ids"]
            with torch.inference_mode():
                logprobs = model(torch.tensor([whole])).logits[0].log_softmax(-1)
            likelihoods.append(sum(float(logprobs[i - 1, whole[i]]) for i in range(len(prompt), len(whole))))
        right.append(float(int(numpy.argmax(likelihoods)) == item["gold"]))
    return right


@pytest.mark.slow
def test_one_checkpoint_has_nothing_to_compare(
    local_tasks: Path, tmp_path: Path, make_pico: Callable[..., Path]
) -> None:
    table = general.evaluate_tasks(
        {"student": make_pico("llama", tmp_path / "s")}, ["pico_choice"], tmp_path / "out", engine="hf", limit=5,
        include_path=local_tasks, progress=False, say=lambda line: None,
    )  # fmt: skip
    assert table["n"].tolist() == [5]
    assert table["difference"].isna().all()
    (line,) = general.describe(table)
    assert "over 5 documents" in line


# What a user can mend


@pytest.mark.slow
def test_unknown_tasks(tmp_path: Path, make_pico: Callable[..., Path]) -> None:
    checkpoint = make_pico("llama", tmp_path / "s")
    with pytest.raises(UserError) as error:
        general.evaluate_tasks({"s": checkpoint}, ["motkit_aime42", "no-such-thing"], tmp_path / "out", engine="hf")
    first, second = str(error.value).splitlines()
    assert first.startswith("--tasks: unknown 'motkit_aime42'; near: motkit_aime2")
    assert second.startswith("--tasks: unknown 'no-such-thing'")
    assert not (tmp_path / "out").exists()


def test_data_that_cannot_be_had(local_tasks: Path, tmp_path: Path, make_pico: Callable[..., Path]) -> None:
    (local_tasks / "choice.jsonl").unlink()
    checkpoint = make_pico("llama", tmp_path / "s")
    with pytest.raises(
        UserError, match=r"^--tasks pico_choice: its data set cannot be loaded \(FileNotFoundError: .*\)"
    ):
        general.evaluate_tasks(
            {"s": checkpoint}, ["pico_choice"], tmp_path / "out", engine="hf", include_path=local_tasks,
            say=lambda line: None,
        )  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_more_tokens_than_the_checkpoint_takes(
    local_tasks: Path, tmp_path: Path, make_pico: Callable[..., Path]
) -> None:
    with pytest.raises(UserError, match=r"generates up to 3000 tokens, and the checkpoint takes 2048"):
        general.evaluate_tasks(
            {"s": make_pico("llama", tmp_path / "s")}, ["pico_aime"], tmp_path / "out", engine="hf", max_gen_toks=3000,
            include_path=local_tasks, say=lambda line: None,
        )  # fmt: skip


def test_without_lm_eval(tmp_path: Path) -> None:
    """An interpreter in which lm_eval cannot be found."""
    code = (
        "import sys, importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'lm_eval' else find(name, *rest)\n"
        "from motkit import UserError, general\n"
        "from pathlib import Path\n"
        "try: general.evaluate_tasks({'s': Path('s')}, ['mmlu'], Path('out'))\n"
        "except UserError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(motkit.__file__).parents[1])},
    )  # fmt: skip
    assert done.stdout.strip() == "lm-eval is not installed; install it with: pip install 'motkit[eval]'", done.stderr
