"""The loop of Merge-of-Thought Distillation: the only place that orders the stages.

`run_rounds` is the spine; `_Run` does one stage at a time, each skipped if it is done, resumed or redone if it is not.
"""

import contextlib
import functools
import json
import logging
import os
import platform
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from motkit import (
    adapters,
    generate,
    importing,
    merge,
    merge_agreement,
    merge_weights,
    publish,
    rundir,
    train,
)
from motkit import checkpoint as checkpoints
from motkit.errors import UserError
from motkit.filter import LOSSES, PreparedTraces, filter_traces
from motkit.logits import mean_loss
from motkit.meter import Meter
from motkit.recipe import Recipe, Teacher, missing_data_remedy
from motkit.render import RenderedTrace, Renderer
from motkit.rundir import RunDir
from motkit.scoring import Scorer
from motkit.summary import load_recorded_recipe, scores_markdown, summarise
from motkit.traces import (
    SeedProblem,
    Trace,
    read_traces,
    stream_traces,
    to_jsonl,
    write_jsonl,
)
from motkit.verify import Verifier

if TYPE_CHECKING:
    import pandas

_PACKAGES = (
    "motkit",
    "torch",
    "transformers",
    "trl",
    "mergekit",
    "safetensors",
    "accelerate",
    "datasets",
    "math-verify",
    "tokenizers",
    "peft",
    "numpy",
    "pandas",
    "pydantic",
)
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

Say = Callable[[str], None]


def run_rounds(
    recipe: Recipe,
    run: str | Path,
    *,
    rounds: int | None = None,
    share_with: Sequence[str | Path] = (),
    progress: bool = True,
    say: Say | None = None,
) -> "pandas.DataFrame":
    """Do the next rounds of a run.

    1. Open the run: hold its lock, compare the recipe and the input files with those it began with.
    2. Filter each teacher's traces and render them with the student's tokenizer.
    3. Score the student before the first round.
    4. For each round: train the branches from the student, merge them, score branches and merge; the merge is the next
       round's student.
    5. After the last round publish the student: ``final``, in ``precision.publish``.

    What is done already is skipped, a killed branch resumes from its last complete trainer checkpoint, and an
    interrupted run, continued, ends with the same bytes as one that was not (one machine, one set of versions).

    Args:
        recipe: from `motkit.load_recipe`.
        run: the run's folder; made if it does not exist.
        rounds: how many unfinished rounds to do; None for all, 0 for the steps before the first.
        share_with: folders of other runs: a branch or a score that one of them made from the same inputs is linked
            from there instead of being made again; its costs count as this run's.
        progress: progress bars on stderr.
        say: receives a line per stage; default: printed to stderr.

    Returns:
        The summary: a row for the base, every branch and every merge so far (also in ``summary.csv``).

    Raises:
        UserError: anything that the user can mend; what was published before stays.
    """
    folder = RunDir(Path(run).resolve())
    with (
        folder.hold(),
        _logging(folder, say) as say,
        rundir.storage_errors(folder.root),
        contextlib.ExitStack() as stack,
    ):
        now = _Run(folder, recipe, say, progress, shared=[RunDir(Path(other).resolve()) for other in share_with])
        stack.callback(now.close)
        now.open()
        rows = now.prepare_traces()
        student = now.student
        now.evaluate(0, {"base": student})
        last = now.last_round(rounds)
        for number in range(1, last + 1):
            branches = {name: now.train_branch(number, name, student, rows[name]) for name in recipe.branch_names}
            merged = now.merge(number, student, branches)
            now.evaluate(number, {**now.between(number), **branches, "merged": merged})
            now.prune(number, merged)
            student = merged
        if last == recipe.rounds:
            now.publish(last, student)
        return now.summarise()


@dataclass(frozen=True)
class Model:
    """A checkpoint with the identity of its content."""

    path: Path
    digest: str
    adapter: Path | None = None  # of a branch that trained one


@dataclass(frozen=True)
class StagePlan:
    """What a stage would do: ``run``, ``resume``, ``skip`` or ``prune``, which frees disk: negative bytes."""

    stage: str
    action: str
    rows: int | None = None
    steps: int | None = None
    tokens: int | None = None
    disk_bytes: int | None = None


def preview_traces(recipe: Recipe, run: str | Path, teachers: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
    """What the filter would keep of each teacher's traces, as in ``traces/report.json``; writes nothing.

    Args:
        teachers: names; default: all.

    Raises:
        UserError: as `run_rounds` before the first round, for example a teacher of whom too few traces are left.
    """
    now = _Run(RunDir(Path(run).resolve()), recipe, lambda line: None, progress=False)
    try:
        now.resolve()
        return now.filtered(teachers).report
    finally:
        now.close()


def plan_rounds(recipe: Recipe, run: str | Path, *, rounds: int | None = None) -> list[StagePlan]:
    """What `run_rounds` would do, without doing or writing anything.

    Disk is what a stage leaves, plus the trainer's resumable checkpoints while a branch runs.
    """
    folder = RunDir(Path(run).resolve())
    now = _Run(folder, recipe, lambda line: None, progress=False)
    now.resolve()
    now.compare_recipe()
    try:
        report = now.prepared_before() or now.filtered().report
    finally:
        now.close()
    steps, size = recipe.train["max_steps"], now.parameters * 4
    merged_bytes = now.parameters * _BYTES[recipe.precision.carry]
    if recipe.merged_adapter is not None and recipe.lora is not None:
        merged_bytes += now.adapter_parameters * 4 * (recipe.merged_adapter.r or recipe.lora.r) // recipe.lora.r
    if recipe.server is not None:
        merged_bytes += size  # its velocity
    plan = [
        StagePlan(
            "traces",
            "skip" if rundir.read_done(folder.traces) else "run",
            rows=sum(counts["kept"] for counts in report.values()),
            tokens=sum(counts["tokens"] for counts in report.values()),
        )
    ]

    def evaluation(number: int, names: Sequence[str]) -> None:
        if now.scorer:
            scored = rundir.read_json(folder.evaluation(number))
            plan.append(
                StagePlan(
                    folder.relative(folder.evaluation(number)),
                    "skip" if all(name in scored for name in names) else "run",
                    rows=len(now.scorer.problems) * len(names),
                )
            )

    evaluation(0, ["base"])
    last = now.last_round(rounds)
    for number in range(1, last + 1):
        for name in recipe.branch_names:
            teachers = [name] if recipe.branches == "per_teacher" else list(report)
            kept = sum(report[teacher]["kept"] for teacher in teachers)
            tokens = sum(report[teacher]["tokens"] for teacher in teachers)
            batch = recipe.train.get("per_device_train_batch_size", 8) * recipe.train.get(
                "gradient_accumulation_steps", 1
            )
            done = rundir.read_done(folder.branch(number, name))
            resumable = train.resumable_step(folder.branch_work(number, name))
            plan.append(
                StagePlan(
                    folder.relative(folder.branch(number, name)),
                    "skip" if done else f"resume at {resumable}" if resumable else "run",
                    rows=kept,
                    steps=steps,
                    tokens=round(steps * batch * tokens / kept),
                    disk_bytes=size * (1 + len(recipe.kept_steps)) + now.adapter_parameters * 4,
                )
            )
        plan.append(
            StagePlan(
                folder.relative(folder.merged(number)),
                "skip" if rundir.read_done(folder.merged(number)) else "run",
                disk_bytes=merged_bytes,
            )
        )
        evaluation(number, recipe.scored_names)
        if _is_pruned(recipe, number):
            records = [rundir.read_done(folder.branch(number, name)) for name in recipe.branch_names]
            whole = sum(not (record and record.get("pruned")) for record in records)
            plan.append(
                StagePlan(
                    f"{folder.relative(folder.round(number))}/branches/*/checkpoint",
                    "prune" if whole else "skip",
                    disk_bytes=-now.parameters * 4 * (1 + len(recipe.kept_steps)) * whole or None,
                )
            )
    if last == recipe.rounds:
        plan.append(
            StagePlan(
                folder.relative(folder.published(last)),
                "skip" if rundir.read_done(folder.published(last)) else "run",
                disk_bytes=now.parameters * _BYTES[recipe.precision.publish],
            )
        )
    return plan


@dataclass
class _Run:
    """One process's hold on a run: the stages, one method each."""

    folder: RunDir
    recipe: Recipe
    say: Say
    progress: bool
    problems: dict[str, SeedProblem] = field(default_factory=dict)
    all_problems: dict[str, SeedProblem] = field(default_factory=dict)  # also those that 'sample' leaves out
    scorer: Scorer | None = None
    shared: list[RunDir] = field(default_factory=list)
    made_here: set[Path] = field(default_factory=set)
    verifiers: dict[str, Verifier] = field(default_factory=dict)

    # Opening a run

    def resolve(self) -> None:
        """Find the student, read problems and merge config: everything that can be wrong before anything is spent."""
        remedy = missing_data_remedy(self.folder.recipe)
        self.student_path = checkpoints.find_checkpoint(self.recipe.student, remedy)
        self.parameters = checkpoints.count_parameters(self.student_path)
        lora = self.recipe.lora
        self.adapter_parameters = train.count_adapter_parameters(self.student_path, lora) if lora else 0
        self.merge_config = merge.load_merge_config(self.recipe.merge)
        merge.check_merge_config(
            self.merge_config, num_branches=len(self.recipe.branch_names), weighted=self.recipe.weights is not None
        )
        self.recipe = self.recipe.model_copy(update={"merge": self.merge_config})
        self.all_problems, self.problems = importing.seed_problems(self.recipe, self.folder.source("problems"))
        self.tokenizer = checkpoints.load_tokenizer(self.student_path)
        ends = checkpoints.end_token_ids(self.student_path, self.tokenizer)
        self.renderer = Renderer(self.tokenizer, ends)
        if self.recipe.evaluate:
            self.scorer = Scorer(
                self.recipe.evaluate,
                verifier=self.recipe.evaluation_verifier,
                seed=self.recipe.seed,
                renderer=self.renderer,
                imported=self.folder.source("evaluate.problems"),
                verifiers=self.verifier,
            )

    def compare_recipe(self) -> None:
        """Refuse a recipe other than the one that the run began with."""
        if self.folder.recipe.is_file():
            changed = self.recipe.differences(load_recorded_recipe(self.folder))
            if changed:
                lines = "\n".join(f"  {line}" for line in changed)
                raise UserError(
                    f"{self.folder.root}: began with another recipe; restore it, or choose another folder with --run:\n"
                    f"{lines}"
                )

    def open(self) -> None:
        """Resolve the recipe; record it, the environment and the input files, or compare them with the records."""
        self.resolve()
        self.compare_recipe()
        for teacher in self.recipe.teachers:
            if teacher.model is not None:
                self._stream_traces(teacher)  # complete, before anything is recorded
        if not self.folder.recipe.is_file():
            rundir.write_text(self.folder.recipe, self.recipe.to_yaml())
        self._open_environment()
        self._fetch_sources()
        files = {"problems": self._source_file("problems", self.recipe.problem_source.path)}
        for teacher in self.recipe.teachers:
            files[f"teachers.{teacher.name}.traces"] = self._traces_file(teacher)
        if self.scorer:
            files |= self.scorer.files()
        for path in checkpoints.content_files(self.student_path):
            files[f"student/{path.relative_to(self.student_path).as_posix()}"] = path
        recorded = rundir.read_json(self.folder.inputs)
        self.input_hashes = {key: _hash_if_changed(path, recorded.get(key)) for key, path in files.items()}
        if recorded:
            changed = [
                key
                for key in sorted(recorded.keys() | self.input_hashes.keys())
                if recorded.get(key, {}).get("sha256") != self.input_hashes.get(key, {}).get("sha256")
            ]
            if changed:
                raise UserError(
                    f"{self.folder.root}: input files are not those that the run began with: {', '.join(changed)}; "
                    "restore them, or choose another folder with --run"
                )
        rundir.write_json(self.folder.inputs, self.input_hashes)
        student = {key: entry["sha256"] for key, entry in self.input_hashes.items() if key.startswith("student/")}
        self.student = Model(self.student_path, rundir.digest(student))

    def _open_environment(self) -> None:
        import torch

        recorded = rundir.read_json(self.folder.environment)
        if recorded:
            # Another thread count gives other bytes on a wide model.
            torch.set_num_threads(recorded["threads"])
        current = _environment()
        if not recorded:
            rundir.write_json(self.folder.environment, current)
        changed = [key for key in ("versions", "devices", "python") if recorded and recorded.get(key) != current[key]]
        if changed:
            self.say(
                f"warning: {', '.join(changed)} changed since this run began (environment.json): what is made now may "
                "differ in its last bits from what an uninterrupted run makes"
            )

    # Sources of problems and traces

    def _source_file(self, key: str, source: str) -> Path:
        """The file behind a source; a dataset of the hub is imported once, into the run's folder."""
        return self.folder.source(key) if importing.is_hub_source(source) else Path(source)

    def _fetch_sources(self) -> None:
        """Import what comes from the hub, so that the run is made from files that stay as they are."""
        source = self.recipe.problem_source
        if importing.is_hub_source(source.path):
            file = self._source_file("problems", source.path)
            if not file.is_file():
                write_jsonl(file, self.all_problems.values())
        for teacher in self.recipe.teachers:
            file = self._traces_file(teacher)
            if teacher.traces and importing.is_hub_source(teacher.traces) and not file.is_file():
                write_jsonl(file, importing.import_traces(teacher.traces, teacher.columns, self.all_problems))

    def _traces_file(self, teacher: Teacher) -> Path:
        """A teacher's traces: its own file, or what `motkit generate` has asked of it in this run."""
        if teacher.traces is None:
            return self.folder.generated(teacher.name)
        return self._source_file(f"teachers.{teacher.name}.traces", teacher.traces)

    def _stream_traces(self, teacher: Teacher) -> Iterator[Trace]:
        if teacher.traces is None:
            return iter(generate.generated_traces(self.recipe, self.folder, teacher, self.problems))
        file = self._traces_file(teacher)
        fetched = importing.is_hub_source(teacher.traces) and file.is_file()
        if fetched or not (teacher.columns or importing.is_hub_source(teacher.traces)):
            traces = stream_traces(file, self.all_problems)
        else:
            traces = importing.import_traces(teacher.traces, teacher.columns, self.all_problems)
        return (trace for trace in traces if trace.problem_id in self.problems)

    def verifier(self, name: str) -> Verifier:
        """The verifier of a name, with its worker processes, for as long as this run is held."""
        if name not in self.verifiers:
            self.verifiers[name] = Verifier(name)
        return self.verifiers[name]

    def close(self) -> None:
        """End the verifiers' processes."""
        for verifier in self.verifiers.values():
            verifier.close()

    # Stages

    def filtered(self, names: Sequence[str] = ()) -> PreparedTraces:
        """Read and filter the traces of these teachers, or of all."""
        verifier = self.verifier(self.recipe.filter.verifier)
        return filter_traces(
            {
                teacher.name: self._stream_traces(teacher)
                for teacher in self.recipe.teachers
                if not names or teacher.name in names
            },
            problems=self.problems,
            settings=self.recipe.filter,
            max_length=self.recipe.train.get("max_length", 1024),  # SFTConfig's own default
            renderer=self.renderer,
            judge=lambda traces: verifier.judge(traces, self.problems),
            seed=self.recipe.seed,
        )

    def prepared_before(self) -> dict[str, Any]:
        """The report of the stage ``traces`` if it is done; else empty."""
        return rundir.read_json(self.folder.traces / "report.json") if rundir.read_done(self.folder.traces) else {}

    def prepare_traces(self) -> dict[str, list[RenderedTrace]]:
        """Stage ``traces``: the kept traces of each teacher, and the report. Returns each branch's rows."""
        inputs = {
            "hashes": {key: entry["sha256"] for key, entry in self.input_hashes.items() if "evaluate" not in key},
            "filter": self.recipe.filter.model_dump(),
            "max_length": self.recipe.train.get("max_length", 1024),
            "seed": self.recipe.seed,
        }
        sample = self.recipe.problem_source.sample
        inputs |= {"sample": sample.model_dump()} if sample else {}
        folder = self.folder.traces
        if self._done(folder, inputs) is not None:
            # What was kept then is what is trained on now: an answer that took too long to judge may not do so again.
            kept = {name: read_traces(folder / f"{name}.jsonl", self.problems) for name in self.prepared_before()}
            rendered = {
                name: [self.renderer.render(self.problems[trace.problem_id], trace) for trace in traces]
                for name, traces in kept.items()
            }
            prepared = PreparedTraces(kept, rendered, self.prepared_before())
        else:
            with Meter() as meter:
                prepared = self.filtered()
            with rundir.publish(folder) as partial:
                for name, traces in prepared.kept.items():
                    rundir.write_text(partial / f"{name}.jsonl", to_jsonl(traces))
                rundir.write_json(partial / "report.json", prepared.report)
                rundir.write_done(partial, inputs, cost=meter.cost)
        for name, counts in prepared.report.items():
            lost = ", ".join(f"{counts[key]} {key.replace('_', '-')}" for key in LOSSES if counts[key])
            self.say(
                f"traces {name}: {counts['kept']} of {counts['read']} kept" + (f" (dropped: {lost})" if lost else "")
            )
        if self.recipe.branches == "union":
            return {"union": [row for rows in prepared.rendered.values() for row in rows]}
        return prepared.rendered

    def train_branch(self, number: int, name: str, student: Model, rows: Sequence[RenderedTrace]) -> Model:
        """Stage ``round_NN/branches/NAME``."""
        folder, work = self.folder.branch(number, name), self.folder.branch_work(number, name)
        # Paper gap: whether optimizer state and learning-rate schedule carry over from round to round is not said; each
        # round starts both afresh, because after a merge no branch's optimizer state fits the student.
        # Paper gap: nor is the order of the traces; each round shuffles them anew, the same way for every branch.
        seed = self.recipe.seed + number
        inputs = {
            "student": student.digest,
            "traces": rundir.digest([[row.input_ids, row.num_prompt_tokens] for row in rows]),
            "train": self.recipe.train,
            "seed": seed,
        }
        if self.recipe.kept_steps:
            inputs["kept_steps"] = list(self.recipe.kept_steps)
        record = self._done(folder, inputs) or self._share(folder, inputs)
        if record is None:
            # The branch, and two of the trainer's checkpoints with their optimizer; those of adapters are small.
            trained = self.adapter_parameters or self.parameters
            kept = self.parameters * len(self.recipe.kept_steps)
            rundir.require_space(folder, (self.parameters + 3 * trained + kept) * 4, f"training branch {name}")
            self._verify(student)
            fingerprint = rundir.digest(inputs)
            if work.exists() and _read_text(work / "inputs.sha256") != fingerprint:
                shutil.rmtree(work)
            rundir.write_text(work / "inputs.sha256", fingerprint)
            resumable = train.resumable_step(work)
            self._say_stage(folder, f"resumes at step {resumable}" if resumable else "runs")
            with rundir.publish(folder) as partial, Meter() as meter:
                report = train.train_branch(
                    student=student.path,
                    traces=rows,
                    out=partial / "checkpoint",
                    work=work,
                    metrics=work / "metrics.jsonl",
                    settings=self.recipe.train,
                    seed=seed,
                    keep_steps=self.recipe.kept_steps,
                    name=f"{self.folder.root.name}/{self.folder.relative(folder)}",
                    parameters=self.parameters,
                    reports=self.folder.logs / "tensorboard" / f"round_{number:02d}" / name,
                    adapter_out=partial / "adapter" if self.recipe.lora else None,
                    base_name=self._base_name(student),
                    progress=self.progress,
                )
                shutil.copyfile(work / "metrics.jsonl", partial / "metrics.jsonl")
                if self.recipe.kept_steps:
                    rundir.link_tree(work / "steps", partial / "steps")
                meter.stop()
                memory = meter.peak_memory_bytes
                cost = {**asdict(report), "seconds": report.train_seconds, "peak_memory_bytes": memory}
                record = rundir.write_done(partial, inputs, cost=cost)
            self.made_here.add(folder / "checkpoint")
        if work.exists():
            shutil.rmtree(work)
        adapter = folder / "adapter" if self.recipe.lora else None
        return Model(folder / "checkpoint", rundir.checkpoint_digest(record), adapter)

    def _base_name(self, student: Model) -> str:
        """What an adapter's config names as its base: the same wherever the run's folder is."""
        return self.recipe.student if student.path == self.student_path else self.folder.relative(student.path)

    def between(self, number: int) -> dict[str, Model]:
        """The branches of a round as they were in between, as ``NAME@STEP``."""
        models = {}
        for name in self.recipe.branch_names:
            folder = self.folder.branch(number, name)
            record = rundir.read_done(folder)
            assert record is not None
            for step in self.recipe.kept_steps:
                path = self.folder.branch_step(number, name, step)
                digest = rundir.checkpoint_digest(record, path.relative_to(folder).as_posix())
                models[f"{name}@{step}"] = Model(path, digest)
        return models

    def merge(self, number: int, student: Model, branches: Mapping[str, Model]) -> Model:
        """Stage ``round_NN/merged``: the merge, with what it says of the branches' agreement."""
        folder = self.folder.merged(number)
        carry, server = self.recipe.precision.carry, self.recipe.server
        inputs: dict[str, Any] = {
            "student": student.digest,
            "branches": {name: branch.digest for name, branch in branches.items()},
            "config": self.merge_config,
            "out_dtype": carry,
            "seed": self.recipe.seed + number,
        }
        if self.recipe.merged_adapter is not None:
            inputs["merged_adapter"] = self.recipe.merged_adapter.model_dump()
        if self.recipe.weights is not None:
            weights = self.recipe.weights
            inputs["weights"] = weights if isinstance(weights, dict) else [weights, *self._weighed_by()]
        velocity = self.folder.merged(number - 1) / "server" if server is not None and number > 1 else None
        if server is not None:
            before = rundir.read_done(velocity.parent) if velocity is not None else None
            state = {
                n: e["sha256"] for n, e in (before or {"outputs": {}})["outputs"].items() if n.startswith("server/")
            }
            inputs["server"] = {**server.model_dump(), "velocity": rundir.digest(state) if velocity else None}
        record = self._done(folder, inputs)
        if record is None:
            kept = 3 if server is not None else 1  # the mean, the velocity, the checkpoint
            rundir.require_space(folder, self.parameters * (_BYTES[carry] + 4 * (kept - 1)), "the merge")
            self._require_unpruned(list(branches.values()), self.folder.relative(folder))
            for model in (student, *branches.values()):
                self._verify(model)
            self._say_stage(folder, "runs")
            ordered, averages = list(branches.values()), merge.takes_adapters(self.merge_config)
            with rundir.publish(folder) as partial, Meter() as meter:
                shares, cost = self._branch_weights(number, branches, partial)
                settings: dict[str, Any] = {
                    "base": student.path,
                    "branches": [b.adapter if averages and b.adapter else b.path for b in ordered],
                    "weights": shares,
                    "out_dtype": carry,
                    "seed": self.recipe.seed + number,
                    "quiet": not self.progress,
                }
                if server is None:
                    report = merge.merge_checkpoints(self.merge_config, partial / "checkpoint", **settings)
                else:
                    report = merge.merge_with_server_step(
                        self.merge_config,
                        partial / "checkpoint",
                        partial / "server",
                        velocity=velocity,
                        server=server.model_dump(),
                        **settings,
                    )
                self._write_agreement(student, branches, partial)
                shutil.copyfile(partial / "checkpoint" / "mergekit_config.yml", partial / "merge.yaml")
                if self.recipe.merged_adapter is not None:
                    self._extract_adapter(partial, ordered)
                meter.stop()
                cost |= {**meter.cost, "bytes_read": report.bytes_read, "bytes_written": report.bytes_written}
                record = rundir.write_done(partial, inputs, cost=cost)
            self.made_here.add(folder / "checkpoint")
        return Model(folder / "checkpoint", rundir.checkpoint_digest(record))

    def _weighed_by(self) -> list[Any]:
        """What the weights that a round finds depend on, besides its branches."""
        if self.recipe.weights == "auto":
            return [{k: e["sha256"] for k, e in self.input_hashes.items() if k.startswith("evaluate")}]
        if self.recipe.weights == "accuracy" and self.recipe.evaluate is not None:
            sampling, verifier = self.recipe.evaluate.sampling.model_dump(), self.recipe.seed_problem_verifier
            return [self.input_hashes["problems"]["sha256"], sampling, verifier]
        return []

    def _extract_adapter(self, merged: Path, branches: Sequence[Model]) -> None:
        """``adapter/`` and ``adapter_error.json`` of a merge: its update since the run's own student."""
        settings, lora = self.recipe.merged_adapter, self.recipe.lora
        assert settings is not None
        assert lora is not None
        error = adapters.extract_adapter(
            self.student_path,
            merged / "checkpoint",
            merged / "adapter",
            tensors=adapters.adapted_tensors([branch.adapter for branch in branches if branch.adapter]),
            rank=settings.r or lora.r,
            base_name=self.recipe.student,
            seed=self.recipe.seed,
        )
        rundir.write_json(merged / "adapter_error.json", error)
        self.say(f"merged adapter: rank {error['rank']}, relative error {error['relative_error']:.3g}")

    def _branch_weights(
        self, number: int, branches: Mapping[str, Model], partial: Path
    ) -> tuple[list[float] | None, dict[str, float]]:
        """(the recipe's weights, or those that are found; what that cost); recorded in ``weights.json``."""
        chosen = self.recipe.weights
        if chosen is None:
            return None, {}
        found: dict[str, Any] = {}
        cost: dict[str, float] = {}
        if chosen == "accuracy":
            chosen, found, cost = self._accuracies(number, branches)
        elif isinstance(chosen, str):
            assert self.scorer is not None
            traces = weights_subset(self.scorer.heldout)
            mean = merge_weights.MeanInMemory([branch.path for branch in branches.values()])
            search = merge_weights.search_weights(
                lambda weights: mean_loss(mean.set_weights(weights), traces)[0], len(branches)
            )
            chosen = dict(zip(branches, search.weights, strict=True))
            found = {key: value for key, value in asdict(search).items() if key != "weights"} | {"traces": len(traces)}
            listed = ", ".join(f"{name} {weight:.3f}" for name, weight in chosen.items())
            self.say(
                f"weights: {listed} (held-out loss {search.loss:.4f}; uniform {search.uniform_loss:.4f}; "
                f"{search.evaluations} evaluations)"
            )
        rundir.write_json(partial / "weights.json", {"weights": chosen, **found})
        return [chosen[name] for name in branches], cost

    def _accuracies(
        self, number: int, branches: Mapping[str, Model]
    ) -> tuple[dict[str, float], dict[str, Any], dict[str, float]]:
        """(weights, what ``weights.json`` says besides, cost) of ``weights: accuracy``.

        The answers stay in ``round_NN/weights``, outside of the stage, so that an interrupted one goes on with them.
        """
        settings = self.recipe.evaluate
        assert settings is not None
        # Drawn, because files of problems are often in the order of their difficulty; the same in every round.
        drawn = sorted(self.problems, key=lambda name: rundir.digest([self.recipe.seed, name]))
        asked = {name: self.problems[name] for name in drawn[: merge_weights.ASKED_PROBLEMS]}
        greedy = {"samples": 1, "traces": {}, "sampling": settings.sampling.model_copy(update={"temperature": 0.0})}
        scorer = Scorer(
            settings.model_copy(update=greedy),
            verifier=self.recipe.seed_problem_verifier,
            seed=self.recipe.seed,
            renderer=self.renderer,
            imported=self.folder.source("problems"),
            verifiers=self.verifier,
            problems=asked,
        )
        folder, hashes = self.folder.weights(number), {"problems": self.input_hashes["problems"]["sha256"]}
        entries = self._scored(
            scorer, folder / "scores.json", branches, hashes, lambda name: folder / f"{name}.jsonl", "weight of"
        )
        accuracy = {name: float(entry["scores"]["accuracy"]) for name, entry in entries.items()}
        listed = ", ".join(f"{name} {100 * share:.1f} %" for name, share in accuracy.items())
        none = "" if any(accuracy.values()) else "; all count alike"
        self.say(f"weights: right answers to {len(asked)} seed problems: {listed}{none}")
        cost = {key: sum(entry["cost"][key] for entry in entries.values()) for key in ("tokens", "flops")}
        # Numbers of right answers, not shares: whole numbers keep the mean's arithmetic simple.
        right = {name: float(round(share * len(asked))) for name, share in accuracy.items()}
        weights = right if any(right.values()) else dict.fromkeys(right, 1.0)
        return weights, {"accuracy": accuracy, "problems": len(asked)}, cost

    def _write_agreement(self, student: Model, branches: Mapping[str, Model], partial: Path) -> None:
        """``agreement.csv``; a merge that changes the model's shape has none."""
        paths = {name: branch.path for name, branch in branches.items()}
        try:
            rows = merge_agreement.measure_agreement(
                student.path, paths, partial / "checkpoint", quiet=not self.progress
            )
        except UserError as reason:
            self.say(f"agreement of the branches: not measured: {str(reason).splitlines()[0]}")
            return
        rundir.write_text(partial / "agreement.csv", merge_agreement.agreement_csv(rows))

    def evaluate(self, number: int, models: Mapping[str, Model]) -> None:
        """``round_NN/evaluation.json``: one entry per checkpoint, each written when it is known."""
        if self.scorer is None:
            return
        hashes = {key: entry["sha256"] for key, entry in self.input_hashes.items() if key.startswith("evaluate")}
        scored = {name: models[name] for name in ("base", *self.recipe.scored_names) if name in models}
        results = functools.partial(self.folder.results, number)
        self._scored(self.scorer, self.folder.evaluation(number), scored, hashes, results, f"round {number}")

    def _scored(
        self,
        scorer: Scorer,
        file: Path,
        models: Mapping[str, Model],
        hashes: Mapping[str, str],
        results_of: Callable[[str], Path],
        title: str,
    ) -> dict[str, Any]:
        """The entries of ``file`` for these models; those that are missing are made, each written when it is known."""
        entries = rundir.read_json(file)
        for name, model in models.items():
            results, inputs = results_of(name), scorer.inputs(model.digest, hashes)
            if entries.get(name, {}).get("inputs") == inputs and (results.is_file() or not scorer.problems):
                continue
            entry = self._shared_score(inputs, results)
            if entry is None:
                self._require_unpruned([model], self.folder.relative(file))
                self._verify(model)
                self._say_stage(file, f"scores {name}")
                entry = scorer.score(
                    model.path,
                    identity=model.digest,
                    name=f"{title} {name}",
                    results=results,
                    log=self.folder.logs / "evaluate.log",
                    progress=self.progress,
                )
            entries[name] = {"inputs": inputs, **entry}
            rundir.write_json(file, entries)
        return {name: entries[name] for name in models}

    # What other runs have made

    def _share(self, folder: Path, inputs: Mapping[str, Any]) -> dict[str, Any] | None:
        """Link a branch from a run that made it from the same inputs; its record, or None if there is no such."""
        wanted = json.loads(json.dumps(inputs))  # as a record holds them
        for other in self.shared:
            for stage in sorted(other.root.glob("round_*/branches/*/done.json")):
                record = rundir.read_done(stage.parent)
                if record is None or record.get("pruned") or record["inputs"] != wanted:
                    continue
                if rundir.damage(stage.parent, record, hashes=False) is not None:
                    continue
                with rundir.publish(folder) as partial:
                    rundir.link_tree(stage.parent, partial)
                self._say_stage(folder, f"is {other.root.name}'s {other.relative(stage.parent)}")
                return record
        return None

    def _shared_score(self, inputs: Mapping[str, Any], results: Path) -> dict[str, Any] | None:
        """The entry of a run that scored the same checkpoint in the same way, its answers linked; None if there is
        none."""
        for other in self.shared:
            for file in sorted(other.root.glob("round_*/evaluation.json")):
                for name, entry in rundir.read_json(file).items():
                    answers = other.results(int(file.parent.name.rpartition("_")[2]), name)
                    if entry.get("inputs") != inputs or not (answers.is_file() or "accuracy" not in entry["scores"]):
                        continue
                    if answers.is_file():
                        with rundir.storage_errors(results):
                            results.parent.mkdir(parents=True, exist_ok=True)
                            results.unlink(missing_ok=True)
                            rundir.link_file(answers, results)
                    return dict(entry)
        return None

    def prune(self, number: int, merged: Model) -> None:
        """After a round is merged and scored: delete the branch checkpoints that ``keep_branches`` does not keep."""
        if not _is_pruned(self.recipe, number):
            return
        stages = [self.folder.branch(number, name) for name in self.recipe.branch_names]
        if any((stage / "checkpoint").exists() for stage in stages):
            self._verify(merged)  # what is left of them must be sound
        for stage in stages:
            if rundir.prune_checkpoint(stage):
                self._say_stage(stage, f"checkpoint pruned (keep_branches: {self.recipe.keep_branches})")

    def _require_unpruned(self, models: Sequence[Model], what: str) -> None:
        pruned = [str(_stage_of(model)) for model in models if (rundir.read_done(_stage_of(model)) or {}).get("pruned")]
        if pruned:
            raise UserError(
                f"{what}: must be made again, but its branches' checkpoints were pruned (keep_branches); delete "
                f"{' '.join(pruned)} and run the same command: they are trained again, to the same bytes"
            )

    def publish(self, number: int, student: Model) -> None:
        """Stage ``round_NN/published``: the student in ``precision.publish`` with its card; ``final`` points to it."""
        folder = self.folder.published(number)
        inputs = {"student": student.digest, "dtype": self.recipe.precision.publish}
        if self._done(folder, inputs) is None:
            rundir.require_space(folder, self.parameters * _BYTES[inputs["dtype"]], "the published student")
            self._verify(student)
            self._say_stage(folder, "runs")
            with rundir.publish(folder) as partial, Meter() as meter:
                publish.cast_checkpoint(student.path, partial / "checkpoint", inputs["dtype"])
                card = publish.model_card(
                    name=self.folder.root.name,
                    student=self.recipe.student,
                    teachers=[teacher.name for teacher in self.recipe.teachers],
                    method=str(self.merge_config.get("merge_method")),
                    rounds=number,
                    steps=self.recipe.train["max_steps"],
                    scores=scores_markdown(summarise(self.folder.root)),
                    recipe=_without_folders(self.recipe).to_yaml(),
                    versions=rundir.read_json(self.folder.environment)["versions"],
                )
                rundir.write_text(partial / "checkpoint" / "README.md", card)
                meter.stop()
                rundir.write_done(partial, inputs, cost=meter.cost)
        self.folder.link_final(folder / "checkpoint")

    def summarise(self) -> "pandas.DataFrame":
        """Write and return the summary."""
        table = summarise(self.folder.root)
        rundir.write_text(self.folder.summary, table.to_csv(index=False))
        return table

    # What is done

    def is_finished(self, number: int) -> bool:
        """Whether a round's merge exists and all of its scores do."""
        if rundir.read_done(self.folder.merged(number)) is None:
            return False
        if self.recipe.evaluate is None:
            return True
        scored = rundir.read_json(self.folder.evaluation(number))
        return all(name in scored for name in self.recipe.scored_names)

    def last_round(self, rounds: int | None) -> int:
        """Number of the last round to do when ``rounds`` unfinished ones are asked for."""
        if rounds == 0:
            return 0
        unfinished = [number for number in range(1, self.recipe.rounds + 1) if not self.is_finished(number)]
        return self.recipe.rounds if rounds is None or not unfinished else unfinished[:rounds][-1]

    def _done(self, folder: Path, inputs: Mapping[str, Any]) -> dict[str, Any] | None:
        """The stage's record if it is done from these inputs and its files are there; damaged, it is set aside."""
        record = rundir.read_done(folder)
        if record is None:
            if folder.exists():
                aside = rundir.set_aside(folder)
                self._say_stage(folder, f"has no completion record; moved to {aside.name}")
            return None
        wrong = rundir.damage(folder, record, hashes=False)
        if wrong:
            aside = rundir.set_aside(folder)
            self._say_stage(folder, f"is damaged: {wrong}; moved to {aside.name}, made again")
            return None
        if record["inputs"] != json.loads(json.dumps(inputs)):
            differ = [key for key in inputs if record["inputs"].get(key) != json.loads(json.dumps(inputs[key]))]
            raise UserError(
                f"{folder}: was made from other inputs than this run has now ({', '.join(differ) or 'fewer fields'}); "
                "choose another folder with --run, or delete this round's folder and those after it to redo them"
            )
        self._say_stage(folder, "is done")
        return record

    def _verify(self, model: Model) -> None:
        """Before a checkpoint is read: compare the bytes of what an earlier process made with its record."""
        if model.path in self.made_here or model.path == self.student_path:
            return
        stage = _stage_of(model)
        record = rundir.read_done(stage)
        wrong = "its record is gone" if record is None else rundir.damage(stage, record, hashes=True)
        if wrong:
            aside = rundir.set_aside(stage)
            raise UserError(f"{stage}: damaged: {wrong}; moved to {aside.name}: run the same command again to redo it")
        self.made_here.add(model.path)

    def _say_stage(self, path: Path, what: str) -> None:
        self.say(f"{self.folder.relative(path)}: {what}")


def weights_subset(heldout: Mapping[str, Sequence[RenderedTrace]], max_tokens: int = 16_384) -> list[RenderedTrace]:
    """The held-out traces that ``weights: auto`` is decided on: in turn one of each set, until there are enough tokens.

    The same in every round. At least one trace of every set is in it.
    """
    chosen: list[RenderedTrace] = []
    tokens = 0
    for place in range(max(len(traces) for traces in heldout.values())):
        for traces in heldout.values():
            if place < len(traces) and (place == 0 or tokens + len(traces[place].input_ids) <= max_tokens):
                chosen.append(traces[place])
                tokens += len(traces[place].input_ids)
    return chosen


@contextlib.contextmanager
def _logging(folder: RunDir, say: Say | None) -> Iterator[Say]:
    """A log file per attempt; libraries' warnings go there instead of the terminal."""
    import datasets
    import transformers

    with rundir.storage_errors(folder.logs):
        folder.logs.mkdir(parents=True, exist_ok=True)
        attempt = 1 + max((int(path.stem.rpartition("_")[2]) for path in folder.logs.glob("attempt_*.log")), default=0)
        handler = logging.FileHandler(folder.logs / f"attempt_{attempt:02d}.log", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    level, others = root.level, root.handlers[:]
    for other in others:
        root.removeHandler(other)
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    # transformers prints through a handler of its own; its messages go to the root's file instead.
    transformers.utils.logging.disable_default_handler()
    transformers.utils.logging.enable_propagation()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    log = logging.getLogger("motkit")

    def say_and_log(line: str) -> None:
        log.info(line)
        if say is not None:
            say(line)
        else:
            print(line, file=sys.stderr)

    with warnings.catch_warnings():
        logging.captureWarnings(True)
        try:
            yield say_and_log
        except BaseException as error:
            log.error("stopped by %s: %s", type(error).__name__, error)
            raise
        finally:
            logging.captureWarnings(False)
            transformers.utils.logging.enable_default_handler()
            transformers.utils.logging.disable_propagation()
            root.removeHandler(handler)
            root.setLevel(level)
            for other in others:
                root.addHandler(other)
            handler.close()


def _environment() -> dict[str, Any]:
    import torch

    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    source = Path(__file__).resolve().parent.parent
    commit = None
    if (source / ".git").exists():
        with contextlib.suppress(OSError):
            asked = subprocess.run(
                ["git", "rev-parse", "HEAD"], cwd=source, capture_output=True, text=True, check=False
            )
            commit = asked.stdout.strip() or None
    return {
        "versions": rundir.installed_versions(_PACKAGES),
        "python": platform.python_version(),
        "motkit_commit": commit,
        "platform": platform.platform(),
        "devices": devices or ["cpu"],
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def _stage_of(model: Model) -> Path:
    """The stage folder that holds a checkpoint."""
    return next((folder for folder in model.path.parents if (folder / "done.json").is_file()), model.path.parent)


def _is_pruned(recipe: Recipe, number: int) -> bool:
    """Whether a finished round's branch checkpoints are deleted."""
    return recipe.keep_branches == "none" or (recipe.keep_branches == "last" and number < recipe.rounds)


def _hash_if_changed(path: Path, recorded: Mapping[str, Any] | None) -> dict[str, Any]:
    """Hash of an input file; one whose size and time of change are as recorded is not read again."""
    stat = path.stat()
    seen = {"bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    if recorded and all(recorded.get(key) == value for key, value in seen.items()):
        return dict(recorded)
    return {"sha256": rundir.hash_file(path), **seen}


def _read_text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return None


def _without_folders(recipe: Recipe) -> Recipe:
    """The recipe for a public card: file names without the folders of the machine that ran it, no private address."""

    def strip(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: "http://127.0.0.1/v1" if key == "base_url" else strip(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [strip(inner) for inner in value]
        return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value

    return Recipe.model_validate(strip(recipe.model_dump(mode="json")))
