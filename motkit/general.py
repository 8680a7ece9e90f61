"""General ability and forgetting: lm-eval's tasks on a student and its base, and what the difference allows to claim.

lm-eval is the extra ``eval``. motkit's own tasks for it are in `motkit.tasks`.
"""

import contextlib
import datetime
import difflib
import functools
import gc
import importlib.util
import json
import math
import random
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import motkit.tasks
from motkit import rundir
from motkit.checkpoint import TOKENIZER_FILES, find_checkpoint, load_tokenizer, weight_files
from motkit.errors import UserError

if TYPE_CHECKING:
    import pandas

ENGINES = ("auto", "hf", "vllm")
LEVEL = 0.95
# On a CPU lm-eval's own search would try 64 prompts of the model's whole context.
_CPU_BATCH_SIZE = 8
# lm-eval's own default for everything but Python's random numbers: seed 0 is what its command line does.
_SEED_OFFSET = 1234
_PACKAGES = ("motkit", "lm-eval", "torch", "transformers", "vllm", "datasets", "math-verify")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")

Say = Callable[[str], None]


def evaluate_tasks(
    checkpoints: Mapping[str, Path],
    tasks: Sequence[str],
    out: Path,
    *,
    engine: str = "auto",
    limit: int | None = None,
    batch_size: int | str = "auto",
    num_fewshot: int | None = None,
    max_gen_toks: int | None = None,
    chat_template: bool | None = None,
    include_path: Path | None = None,
    seed: int = 0,
    progress: bool = True,
    say: Say = lambda line: print(line, file=sys.stderr),
) -> "pandas.DataFrame":
    """Run lm-eval's tasks on checkpoints and compare each with the base.

    1. Find the tasks; of each checkpoint, which have a result for the same inputs already: those are skipped.
    2. Load the others' data, then the checkpoint, in float32 on a CPU and bfloat16 on a GPU; run them one by one.
       After each, ``general/<name>.json`` is rewritten (versions, settings, scores) beside
       ``general/<name>/<task>/*.jsonl`` (every sample).
    3. Tabulate into ``general.csv``.

    Args:
        checkpoints: by name; the others are compared with ``base``, or with the first if there is no ``base``.
        tasks: names of lm-eval's tasks, groups and tags, of motkit's (`motkit.tasks`), of those in ``include_path``;
            patterns such as ``mmlu_*`` too.
        engine: ``hf`` (transformers), ``vllm`` (where it is installed beside motkit), or ``auto``: vLLM where there are
            both it and a GPU.
        limit: only the first so many documents of each task; not comparable with published figures.
        batch_size: prompts at a time; ``auto`` is lm-eval's search on a GPU, 8 on a CPU.
        num_fewshot: examples in the prompt; default: what the task says, 0 where it says nothing (as for MMLU, whose
            published figures mostly have 5). A task that fixes 0 keeps it.
        max_gen_toks: tokens that a generative task may generate, instead of what it says itself.
        chat_template: whether prompts go through the checkpoint's chat template. Default: those of generative tasks do
            where the checkpoint has one, those scored by likelihood do not, as most published figures were made.
        include_path: folder of further task files.
        seed: 0 gives the random numbers of lm-eval's command line: the same documents and examples as there.

    Returns:
        A row per task, metric and filter (and checkpoint, but for the base):

        * ``task``, ``part_of`` (the group whose score it is a part of, or empty), ``metric``, ``filter``, ``n_shot``,
          ``chat_template``, ``higher_is_better``, ``n`` documents;
        * ``base``, ``base_standard_error``, ``checkpoint`` (a name), its ``student`` and ``student_standard_error``;
        * ``difference`` (student − base), its ``standard_error`` and 95 % interval ``low``, ``high`` (Student's t).
          ``paired``: from the differences of the same documents; where a metric is no mean over documents, from both
          standard errors, as if the two were independent, which is too wide;
        * ``p_value``: where every document scores 0 or 1, the exact two-sided sign test of the documents on which the
          two differ (McNemar);
        * ``claim``: ``better``, ``worse``, ``no difference can be claimed``; ``no interval`` where there is none. A
          claim wants an interval without 0 and, where there is a ``p_value``, one below 5 %: an interval from a handful
          of differing documents is too narrow.

        With one checkpoint, it is ``student`` and there is nothing to compare.

    Raises:
        UserError: lm-eval is not installed; a task is unknown, its data cannot be had, or the checkpoint is too short
            for it.
    """
    _require_lm_eval()
    if engine not in ENGINES:
        raise UserError(f"engine: unknown {engine!r}; known: {', '.join(ENGINES)}")
    for name in checkpoints:
        if not _NAME.fullmatch(name):
            raise UserError(
                f"checkpoints: {name!r}: expected letters, digits, '.', '_' and '-': it becomes a file's name"
            )
    if not checkpoints or not tasks:
        raise UserError("nothing to evaluate: expected a checkpoint and a task, or more")
    if limit is not None and limit < 1:
        raise UserError(f"limit: expected a whole number of documents, 1 or more, got {limit}")
    engine = _engine(engine)
    with _quiet_stdout():
        manager = _task_manager(include_path, tasks)
    units = _find_tasks(manager, tasks)
    if limit is not None:
        say(f"only the first {limit} documents of each task: not comparable with published figures")
    records: dict[str, dict[str, Any]] = {}
    for name, path in checkpoints.items():
        checkpoint = find_checkpoint(str(path))
        templated = load_tokenizer(checkpoint).chat_template is not None
        identity = _checkpoint_identity(checkpoint)
        asked = {}
        for unit in units:
            wanted = _is_generative(manager, unit) if chat_template is None else chat_template
            if wanted and chat_template and not templated:
                raise UserError(f"{path}: its tokenizer has no chat template, and one was asked for")
            asked[unit] = {
                "checkpoint": identity,
                "task": unit,
                "definition": _definition(manager, unit),
                "engine": engine,
                "dtype": _dtype(),
                "limit": limit,
                "num_fewshot": num_fewshot,
                "max_gen_toks": max_gen_toks,
                "chat_template": wanted and templated,
                "seed": seed,
                "versions": rundir.installed_versions(_PACKAGES),
            }
        results = out / "general" / f"{name}.json"
        records[name] = _evaluate_checkpoint(
            name, checkpoint, asked, results, manager, batch_size=batch_size, progress=progress, say=say
        )
    table = _tabulate(records, out / "general", say)
    rundir.write_text(out / "general.csv", table.to_csv(index=False))
    return table


def describe(table: "pandas.DataFrame") -> list[str]:
    """What the table of `evaluate_tasks` allows to be said: a line per row that is not a part of another."""
    lines = []
    compared = table[table["difference"].notna()]
    for row in table[table["part_of"] == ""].to_dict("records"):
        percent = row["higher_is_better"] is True and 0 <= row["student"] <= 1
        show: Callable[[float], str] = (
            (lambda value: f"{100 * value:.1f} %") if percent else (lambda value: f"{value:.4g}")
        )
        metric = row["metric"] if row["filter"] == "none" else f"{row['metric']} ({row['filter']})"
        head = f"{row['task']}, {metric}, {row['n_shot']}-shot:"
        if math.isnan(row["difference"]):
            error = row["student_standard_error"]
            spread = "" if math.isnan(error) else f" ± {show(error)} (standard error)"
            lines.append(f"{head} {row['checkpoint']} {show(row['student'])}{spread} over {row['n']} documents.")
            continue
        scale, unit = (100, " points") if percent else (1, "")
        body = f"{head} base {show(row['base'])}, {row['checkpoint']} {show(row['student'])}; difference "
        body += f"{scale * row['difference']:+.{1 if percent else 4}f}{unit}"
        if not math.isnan(row["low"]):
            ends = ", ".join(f"{scale * row[end]:+.{1 if percent else 4}f}" for end in ("low", "high"))
            body += f", 95 % interval [{ends}]"
        kind = f"{row['n']} documents" if row["paired"] else f"{row['n']} documents, not paired"
        says = {"better": f"{row['checkpoint']} is better", "worse": f"{row['checkpoint']} is worse"}
        lines.append(f"{body} over {kind}: {says.get(row['claim'], row['claim'])}.")
    tested = int(compared["standard_error"].notna().sum())
    if tested > 1:
        lines.append(
            f"{tested} comparisons at 95 % each: with nothing changed, chance alone would show a difference in about "
            f"{(1 - LEVEL) * tested:.1f}."
        )
    return lines


# Tasks


def _require_lm_eval() -> None:
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("lm-eval is not installed; install it with: pip install 'motkit[eval]'")


def _task_manager(include_path: Path | None, tasks: Sequence[str]) -> Any:
    """lm-eval's index of tasks. Reading its own 14,000 files takes seconds: only where they are wanted."""
    from lm_eval.tasks import TaskManager

    folders = [Path(motkit.tasks.__path__[0])]
    if include_path is not None:
        if not Path(include_path).is_dir():
            raise UserError(f"include_path: no such folder: {include_path}")
        folders.append(Path(include_path))
    ours = TaskManager(include_path=folders, include_defaults=False)
    known = {*ours.all_subtasks, *ours.all_groups}  # a tag may have further tasks among lm-eval's own
    if set(tasks) <= known and all(config.keys() != {"task"} for name in tasks for config in _members(ours, name)):
        return ours
    return TaskManager(include_path=folders)


def _find_tasks(manager: Any, tasks: Sequence[str]) -> list[str]:
    """The tasks' names, patterns resolved, in order, each once."""
    units: list[str] = []
    faults = []
    for name in tasks:
        found = manager.match_tasks([name])
        if not found:
            near = difflib.get_close_matches(name, manager.all_tasks, n=5)
            near = near or [other for other in manager.all_tasks if name.lower() in other.lower()][:5]
            hint = f"; near: {', '.join(near)}" if near else "; 'lm_eval ls tasks' lists them"
            faults.append(f"--tasks: unknown {name!r}{hint}")
        units += [unit for unit in sorted(found) if unit not in units]
    if faults:
        raise UserError("\n".join(faults))
    return units


def _members(manager: Any, unit: str) -> list[dict[str, Any]]:
    """The configs that a task, group or tag stands for, as they are in the files (functions by name).

    Of one that the index does not have there is nothing but ``task``.
    """
    entry = manager.task_index[unit]
    config: dict[str, Any] = entry.cfg or {}
    if entry.kind.name == "TAG":
        children: list[Any] = sorted(entry.tags)
    elif entry.kind.name == "GROUP":
        children = config["task"] if isinstance(config["task"], list) else [config["task"]]
    else:
        return [config]
    configs = [{key: value for key, value in config.items() if key != "task"}]
    for child in children:
        if isinstance(child, str):
            configs += _members(manager, child) if child in manager.task_index else [{"task": child}]
        else:  # a task written out, or one with a few settings changed
            name = child.get("task", child.get("group"))
            known = _members(manager, name) if isinstance(name, str) and name in manager.task_index else []
            configs += [*known, child]
    return configs


def _definition(manager: Any, unit: str) -> str:
    """Identity of a task: its files' settings, the local data that they name, and the Python beside them.

    lm-eval's own tasks are known by its version; of a data set on the hub nothing is known before it is loaded.
    """
    configs = json.loads(json.dumps(_members(manager, unit), default=str))
    text = json.dumps(configs)
    files = {Path(path) for path in re.findall(r'"(/[^"]+)"', text) if Path(path).is_file()}
    # A function is written as its file's path and its name.
    code = {Path(path).with_suffix(".py") for path in re.findall(r'"(/[^"]+\.\w+)"', text)}
    files |= {other for path in code if path.is_file() for other in path.parent.glob("*.py")}
    return rundir.digest([configs, {str(path): rundir.hash_file(path) for path in sorted(files)}])


def _is_generative(manager: Any, unit: str) -> bool:
    return any(config.get("output_type") == "generate_until" for config in _members(manager, unit))


@dataclass(frozen=True)
class _Loaded:
    """A task, group or tag with its data: lm-eval's own objects, by name."""

    tasks: dict[str, Any]
    groups: dict[str, Any]


def _load(manager: Any, unit: str, seed: int) -> _Loaded:
    """Load a task's data, with the random numbers that lm-eval's command line would load it with.

    Raises:
        UserError: the data cannot be had, or lm-eval wants more than motkit gives (running code, images).
    """
    _seed(seed)  # some tasks shuffle their choices as they load
    try:
        loaded = manager.load([unit])
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"--tasks {unit}: its data set cannot be loaded ({type(error).__name__}: {reason}); "
            "is the network there, and does the data set want 'hf auth login'?"
        ) from error
    tasks, groups = loaded["tasks"], loaded.get("groups", {})
    for name, task in tasks.items():
        if getattr(task, "UNSAFE_CODE", False):
            raise UserError(
                f"--tasks {unit}: {name} runs code that the model writes; run it with lm-eval's own command, isolated"
            )
        if getattr(task, "MULTIMODAL", False):
            raise UserError(f"--tasks {unit}: {name} wants images or sound; a text model cannot be asked")
    return _Loaded(tasks, groups)


def _averaging(group: Any) -> dict[str, Any]:
    """The tasks of a group, and for each metric that it averages, whether by their sizes."""
    return {
        "tasks": [task.task_name for task in group.get_all_tasks()],
        "by_size": {one.metric: bool(one.weight_by_size) for one in group.aggregate_metric_list or []},
    }


def _seed(seed: int) -> None:
    """The random numbers that lm-eval's command line begins with, where ``seed`` is 0."""
    import numpy
    import torch

    random.seed(seed)
    numpy.random.seed(_SEED_OFFSET + seed)
    torch.manual_seed(_SEED_OFFSET + seed)


def _configure(tasks: Mapping[str, Any], inputs: Mapping[str, Any]) -> None:
    """What lm-eval's command line changes in its tasks."""
    for task in tasks.values():
        if inputs["max_gen_toks"] and task.OUTPUT_TYPE == "generate_until":
            task.set_config(key="generation_kwargs", value={"max_gen_toks": inputs["max_gen_toks"]}, update=True)
        fixed = task.get_config("num_fewshot")
        if fixed is None or (fixed != 0 and inputs["num_fewshot"] is not None):
            task.set_config(key="num_fewshot", value=inputs["num_fewshot"] or 0)
        task.set_fewshot_seed(seed=_SEED_OFFSET + inputs["seed"])


# Running


def _evaluate_checkpoint(
    name: str,
    checkpoint: Path,
    asked: Mapping[str, dict[str, Any]],
    results: Path,
    manager: Any,
    *,
    batch_size: int | str,
    progress: bool,
    say: Say,
) -> dict[str, Any]:
    """The records of a checkpoint's tasks; those that are not there, or for other inputs, are made."""
    known = rundir.read_json(results).get("tasks", {})
    done = {unit: known[unit] for unit, inputs in asked.items() if _is_done(known.get(unit), inputs, results.parent)}
    for unit in done:
        say(f"{name}: {unit}: done already")
    pending = {unit: inputs for unit, inputs in asked.items() if unit not in done}
    if not pending:
        return done
    with _quiet_stdout():
        loaded = {unit: _load(manager, unit, inputs["seed"]) for unit, inputs in pending.items()}
        first = next(iter(pending.values()))
        model = _model(checkpoint, first["engine"], first["dtype"], batch_size, first["seed"])
    try:
        for unit, inputs in pending.items():
            say(f"{name}: {unit}: running{' with the chat template' if inputs['chat_template'] else ''}")
            record = _run(model, unit, loaded.pop(unit), inputs, results, batch_size, progress)
            # What another call did for other tasks stays.
            known = rundir.read_json(results).get("tasks", {}) | {unit: record}
            rundir.write_json(results, {"checkpoint": str(checkpoint), "tasks": known})
            done[unit] = record
    finally:
        _release(model)
    return {unit: done[unit] for unit in asked}


def _is_done(record: dict[str, Any] | None, inputs: Mapping[str, Any], folder: Path) -> bool:
    if record is None or record["inputs"] != inputs:
        return False
    return rundir.damage(folder, {"outputs": record["samples"]}, hashes=True) is None


def _run(
    model: Any,
    unit: str,
    loaded: _Loaded,
    inputs: Mapping[str, Any],
    results: Path,
    batch_size: int | str,
    progress: bool,
) -> dict[str, Any]:
    """Run one task, group or tag; its samples are on disk when this returns, and the record names them."""
    from lm_eval import evaluate
    from lm_eval.utils import handle_non_serializable

    longest, changed = getattr(model, "max_length", None), inputs["max_gen_toks"]
    for name, task in loaded.tasks.items():
        if task.OUTPUT_TYPE == "generate_until" and longest is not None:
            tokens = changed or (task.config.generation_kwargs or {}).get("max_gen_toks", 256)
            if tokens >= longest:
                raise UserError(
                    f"--tasks {unit}: {name} generates up to {tokens} tokens, and the checkpoint takes {longest} with "
                    "the prompt; give a smaller max_gen_toks"
                )
    begin = time.monotonic()
    with _quiet_stdout(), _stderr(progress, results.with_suffix(".log")):
        # Not simple_evaluate: it describes the machine after every call, which takes longer than a small task.
        _configure(loaded.tasks, inputs)
        _seed(inputs["seed"])
        found = evaluate(
            lm=model,
            task_dict={"tasks": loaded.tasks, "groups": loaded.groups},
            limit=inputs["limit"],
            log_samples=True,
            apply_chat_template=inputs["chat_template"],
            fewshot_as_multiturn=inputs["chat_template"],
        )
    assert found is not None  # None is for the other processes of a distributed run
    files = {}
    for task, samples in found["samples"].items():
        file = results.with_suffix("") / unit / f"{task}.jsonl"
        dump = functools.partial(json.dumps, default=handle_non_serializable, ensure_ascii=False)
        rundir.write_text(file, "".join(dump(sample) + "\n" for sample in samples))
        where = file.relative_to(results.parent).as_posix()
        files[where] = {"task": task, "sha256": rundir.hash_file(file), "bytes": file.stat().st_size}
    record = {
        "inputs": dict(inputs),
        "device": str(getattr(model, "device", None)),
        "batch_size": batch_size,
        "task_versions": found["versions"],
        "n_shot": found["n-shot"],
        "higher_is_better": found["higher_is_better"],
        "documents": found["n-samples"],
        "groups": {name: _averaging(group) for name, group in loaded.groups.items()},
        "results": found["results"],
        "samples": files,
        "seconds": time.monotonic() - begin,
        "finished": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
    }
    plain: dict[str, Any] = json.loads(json.dumps(record, default=handle_non_serializable))
    return plain


def _model(checkpoint: Path, engine: str, dtype: str, batch_size: int | str, seed: int) -> Any:
    import torch

    if engine == "vllm":
        from lm_eval.models.vllm_causallms import VLLM

        return VLLM(pretrained=str(checkpoint), dtype=dtype, batch_size=batch_size, seed=_SEED_OFFSET + seed)
    from lm_eval.models.huggingface import HFLM

    gpu = torch.cuda.is_available()
    if batch_size == "auto" and not gpu:
        batch_size = _CPU_BATCH_SIZE
    return HFLM(pretrained=str(checkpoint), dtype=dtype, device="cuda" if gpu else "cpu", batch_size=batch_size)


def _release(model: Any) -> None:
    """Give the model's memory back, so that the next checkpoint fits."""
    import torch

    engine = getattr(getattr(getattr(model, "model", None), "llm_engine", None), "engine_core", None)
    if engine is not None:  # vLLM's own process
        engine.shutdown()
    if hasattr(model, "_model"):
        model._model = None
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _engine(engine: str) -> str:
    import torch

    there = importlib.util.find_spec("vllm") is not None
    if engine == "vllm" and not there:
        raise UserError("engine: vllm is not installed beside motkit; pip install 'motkit[vllm]', or use engine hf")
    if engine == "auto":
        return "vllm" if there and torch.cuda.is_available() else "hf"
    return engine


def _dtype() -> str:
    import torch

    return "bfloat16" if torch.cuda.is_available() else "float32"


def _checkpoint_identity(checkpoint: Path) -> str:
    """A digest of the weights, the config and everything that belongs to the tokenizer."""
    files = [*weight_files(checkpoint), checkpoint / "config.json", checkpoint / "generation_config.json"]
    for name in TOKENIZER_FILES:
        path = checkpoint / name
        files += sorted(path.rglob("*")) if path.is_dir() else [path]
    return rundir.digest(
        {file.relative_to(checkpoint).as_posix(): rundir.hash_file(file) for file in files if file.is_file()}
    )


@contextlib.contextmanager
def _quiet_stdout() -> Iterator[None]:
    """What lm-eval prints goes to stderr: stdout is for results."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


@contextlib.contextmanager
def _stderr(progress: bool, log: Path) -> Iterator[None]:
    """With ``progress`` as it is; else lm-eval's bars and warnings go to a file."""
    if progress:
        yield
        return
    with rundir.storage_errors(log):
        log.parent.mkdir(parents=True, exist_ok=True)
        file = log.open("a", encoding="utf-8")
    with file, contextlib.redirect_stderr(file):
        yield


# The table


def _tabulate(records: Mapping[str, dict[str, Any]], folder: Path, say: Say) -> "pandas.DataFrame":
    import pandas

    names = list(records)
    base = "base" if "base" in names else names[0]
    others = [name for name in names if name != base] or [base]
    rows = []
    for name in others:
        for unit, record in records[name].items():
            before = records[base][unit] if name != base else None
            rows += _rows(name, unit, record, before, folder, say)
    return pandas.DataFrame(rows, columns=list(_Row.__dataclass_fields__))


@dataclass
class _Row:
    """A row of the table; see `evaluate_tasks`."""

    task: str
    part_of: str
    metric: str
    filter: str
    n_shot: int
    chat_template: bool
    higher_is_better: bool | None
    n: int
    base: float
    base_standard_error: float
    checkpoint: str
    student: float
    student_standard_error: float
    difference: float = math.nan
    standard_error: float = math.nan
    low: float = math.nan
    high: float = math.nan
    p_value: float = math.nan
    paired: bool = False
    claim: str = ""


def _rows(
    name: str, unit: str, record: dict[str, Any], before: dict[str, Any] | None, folder: Path, say: Say
) -> list[_Row]:
    """The rows of one task, group or tag: groups first, then their parts."""
    groups = {group: how for group, how in record["groups"].items() if how["by_size"]}
    scores = _scores(record, folder)
    earlier = _scores(before, folder) if before is not None else {}
    if before is not None:
        _say_what_differs(unit, scores, earlier, record, before, say)
    rows = []
    for task, values in sorted(record["results"].items(), key=lambda item: (item[0] not in groups, item[0])):
        holders = [group for group, how in groups.items() if task in how["tasks"] and group != task]
        if task in groups:
            own = set(groups[task]["tasks"])
            holders = [group for group, how in groups.items() if own < set(how["tasks"])]
        # The smallest group that it belongs to.
        part_of = min(holders, key=lambda group: len(groups[group]["tasks"]), default="")
        for key, value in values.items():
            metric, comma, kind = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            theirs = before["results"][task].get(key, math.nan) if before is not None else math.nan
            row = _Row(
                task,
                part_of,
                metric,
                kind,
                record["n_shot"].get(task, 0),
                record["inputs"]["chat_template"],
                record["higher_is_better"].get(task, {}).get(metric),
                values.get("sample_len", 0),
                theirs,
                _number(before["results"][task].get(f"{metric}_stderr,{kind}") if before is not None else None),
                name,
                float(value),
                _number(values.get(f"{metric}_stderr,{kind}")),
            )
            if before is not None:
                row.difference = row.student - row.base
                if task in groups:
                    parts = [
                        (part, scores.get((part, key)), earlier.get((part, key))) for part in groups[task]["tasks"]
                    ]
                    _compare_group(row, parts, groups[task]["by_size"].get(metric, False))
                else:
                    _compare(row, scores.get((task, key)), earlier.get((task, key)))
                row.claim = _claim(row)
            rows.append(row)
    return rows


_Scores = dict[tuple[int, str], float]  # of a document: its place and hash


def _scores(record: Mapping[str, Any], folder: Path) -> dict[tuple[str, str], _Scores]:
    """{(task, "metric,filter"): score of each document}, where each has a number, out of the samples' files."""
    scores: dict[tuple[str, str], _Scores] = {}
    for where, entry in record["samples"].items():
        with (folder / where).open(encoding="utf-8") as file:
            for line in file:
                sample = json.loads(line)
                document = (sample["doc_id"], sample["doc_hash"])
                for metric in sample["metrics"]:
                    if isinstance(sample[metric], int | float):
                        key = (entry["task"], f"{metric},{sample['filter']}")
                        scores.setdefault(key, {})[document] = float(sample[metric])
    return scores


def _say_what_differs(
    unit: str,
    scores: Mapping[tuple[str, str], _Scores],
    earlier: Mapping[tuple[str, str], _Scores],
    record: Mapping[str, Any],
    before: Mapping[str, Any],
    say: Say,
) -> None:
    if record["inputs"]["chat_template"] != before["inputs"]["chat_template"]:
        say(f"{unit}: only one of the two checkpoints has a chat template: the difference is of the prompts too")
    changed = sorted({task for (task, key), own in scores.items() if own.keys() != earlier.get((task, key), {}).keys()})
    if changed:
        say(f"{unit}: not the same documents for both ({', '.join(changed[:5])}): has the data set changed? not paired")


def _compare(row: _Row, ours: _Scores | None, theirs: _Scores | None) -> None:
    """The row's error and interval: paired where both have a number for each document and the score is their mean."""
    pairs = _pairs(ours, theirs)
    if pairs is not None and _is_mean(row.student, [a for a, _ in pairs]) and _is_mean(row.base, [b for _, b in pairs]):
        _, row.standard_error = _mean_and_error([a - b for a, b in pairs])
        row.paired, row.n = True, len(pairs)
        row.p_value = _sign_test(pairs)
    else:
        row.standard_error = math.hypot(row.student_standard_error, row.base_standard_error)
    _interval(row, row.n - 1)


def _compare_group(row: _Row, parts: Sequence[tuple[str, _Scores | None, _Scores | None]], by_size: bool) -> None:
    """As `_compare`, for a mean of tasks, weighted by their documents or not: fixed tasks, their documents a sample."""
    present = [(ours, theirs) for _, ours, theirs in parts if ours or theirs]
    paired = [_pairs(ours, theirs) for ours, theirs in present]
    if not paired or any(pairs is None for pairs in paired):
        row.standard_error = math.hypot(row.student_standard_error, row.base_standard_error)
        _interval(row, row.n - 1)
        return
    kept = [pairs for pairs in paired if pairs is not None]
    sizes = [len(pairs) for pairs in kept]
    weights = [size / sum(sizes) if by_size else 1 / len(sizes) for size in sizes]
    parted = [_mean_and_error([a - b for a, b in pairs]) for pairs in kept]
    if not math.isclose(
        sum(w * mean for w, (mean, _) in zip(weights, parted, strict=True)), row.difference, abs_tol=1e-9
    ):
        # lm-eval's score of the group is another mean than this.
        row.standard_error = math.hypot(row.student_standard_error, row.base_standard_error)
        _interval(row, row.n - 1)
        return
    row.standard_error = math.sqrt(sum((w * error) ** 2 for w, (_, error) in zip(weights, parted, strict=True)))
    row.paired, row.n = True, sum(sizes)
    if by_size:
        row.p_value = _sign_test([pair for pairs in kept for pair in pairs])
    _interval(row, sum(sizes) - len(sizes))


def _pairs(ours: _Scores | None, theirs: _Scores | None) -> list[tuple[float, float]] | None:
    if not ours or not theirs or ours.keys() != theirs.keys():
        return None
    return [(ours[document], theirs[document]) for document in sorted(ours)]


def _is_mean(value: float, scores: Sequence[float]) -> bool:
    return math.isclose(value, math.fsum(scores) / len(scores), abs_tol=1e-9)


def _mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """(mean, sample standard deviation / √n); the error of a single value is not known."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, math.nan
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))


def _sign_test(pairs: Sequence[tuple[float, float]]) -> float:
    """McNemar's exact test; not a number where a score is neither 0 nor 1."""
    from scipy.stats import binomtest

    if any(score not in (0.0, 1.0) for pair in pairs for score in pair):
        return math.nan
    better, worse = sum(a > b for a, b in pairs), sum(a < b for a, b in pairs)
    return float(binomtest(better, better + worse).pvalue) if better + worse else 1.0


def _interval(row: _Row, degrees: int) -> None:
    from scipy.stats import t

    if degrees > 0 and not math.isnan(row.standard_error):
        reach = float(t.ppf((1 + LEVEL) / 2, degrees)) * row.standard_error
        row.low, row.high = row.difference - reach, row.difference + reach


def _claim(row: _Row) -> str:
    if math.isnan(row.low):
        return "no interval"
    if row.low <= 0 <= row.high or row.p_value >= 1 - LEVEL:  # a p-value that is not a number is not
        return "no difference can be claimed"
    if row.higher_is_better is None:
        return "higher" if row.low > 0 else "lower"
    return "better" if (row.low > 0) == row.higher_is_better else "worse"


def _number(value: Any) -> float:
    """A standard error of lm-eval's, which is ``"N/A"`` where it has none."""
    return float(value) if isinstance(value, int | float) else math.nan
