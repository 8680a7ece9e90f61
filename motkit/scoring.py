"""What ``evaluate`` of a recipe asks of a checkpoint, wired to the engines and verifiers that teachers use.

`Scorer` serves the loop and `motkit evaluate` alike.
"""

import contextlib
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from motkit import checkpoint as checkpoints
from motkit import evaluate, generate, importing, rundir
from motkit.errors import UserError
from motkit.recipe import Evaluation
from motkit.render import RenderedTrace, Renderer, UnfitTrace
from motkit.rundir import RunDir
from motkit.traces import SeedProblem, read_traces, write_jsonl
from motkit.verify import Answer, Verifier


class Scorer:
    """Held-out problems and traces, read and rendered; `score` scores a checkpoint on them.

    Args:
        settings: the recipe's ``evaluate``.
        verifier: name of what judges an answer.
        seed: of sampled generation.
        renderer: the student's, for the held-out traces.
        imported: where problems that come from the hub are kept.
        verifiers: name → verifier, held by the caller.
        problems: to ask instead of those that the settings name.

    Raises:
        UserError: problems or traces that cannot be read, or that do not fit the student.
    """

    def __init__(
        self,
        settings: Evaluation,
        *,
        verifier: str,
        seed: int,
        renderer: Renderer,
        imported: Path,
        verifiers: Callable[[str], Verifier],
        problems: Mapping[str, SeedProblem] | None = None,
    ) -> None:
        self.settings, self.seed = settings, seed
        self.problems: dict[str, SeedProblem] = {}
        self.heldout: dict[str, list[RenderedTrace]] = {}
        self._verifier_name, self._verifiers, self._imported = verifier, verifiers, imported
        self._all_problems: dict[str, SeedProblem] = {}
        source = settings.problem_source
        if problems is not None:
            self.problems = dict(problems)
        elif source is not None:
            self._all_problems, self.problems = importing.source_problems(source, imported)
        for name, file in settings.traces.items():
            self.heldout[name] = []
            for trace in read_traces(Path(file), self._all_problems):
                if trace.problem_id in self.problems:
                    try:
                        row = renderer.render(self.problems[trace.problem_id], trace)
                    except UnfitTrace as reason:
                        raise UserError(f"{file}: trace {trace.label}: {reason}; remove or correct it") from reason
                    self.heldout[name].append(row)
            if not self.heldout[name]:
                raise UserError(f"{file}: no trace of the problems that evaluate.problems samples; sample more")

    def files(self) -> dict[str, Path]:
        """Name → file of what is read; problems of the hub are kept first."""
        files = {f"evaluate.traces.{name}": Path(file) for name, file in self.settings.traces.items()}
        source = self.settings.problem_source
        if source is not None:
            hub = importing.is_hub_source(source.path)
            if hub and not self._imported.is_file():
                write_jsonl(self._imported, self._all_problems.values())
            files["evaluate.problems"] = self._imported if hub else Path(source.path)
        return files

    def inputs(self, digest: str, hashes: Mapping[str, str]) -> dict[str, Any]:
        """All that the scores of a checkpoint depend on: its identity, the settings, the hashes of `files`."""
        where = {"preset", "problems", "traces", "python", "branches", "every_steps"}
        settings = self.settings.model_dump(mode="json", exclude=where) | {"verifier": self._verifier_name}
        source = self.settings.problem_source
        if source is not None and source.sample is not None:
            settings["sample"] = source.sample.model_dump()
        if self.settings.sampling.temperature > 0.0:
            settings["seed"] = self.seed
        return {"checkpoint": digest, "settings": settings, "files": dict(hashes)}

    def score(
        self, checkpoint: Path, *, identity: str, name: str, results: Path, log: Path, progress: bool
    ) -> dict[str, Any]:
        """`motkit.evaluate.evaluate_checkpoint` with the engine that the settings choose on this machine."""
        engine = generate.evaluation_engine(self.settings)
        return evaluate.evaluate_checkpoint(
            checkpoint,
            identity=identity,
            settings=self.settings,
            engine=engine,
            problems=self.problems,
            heldout=self.heldout,
            generate=generate.text_generator(engine, self.settings, log),
            generation=generate.Generation,
            verify=self._judge,
            seed=self.seed,
            name=name,
            results=results,
            progress=progress,
        )

    def _judge(self, pairs: Sequence[tuple[SeedProblem, str]]) -> list[Any]:
        verifier = self._verifiers(self._verifier_name)
        return verifier.many(Answer(problem, response) for problem, response in pairs)


def student_checkpoint(student: str | Path) -> Path:
    """Folder of a student: a checkpoint, a hub id's snapshot, or a run directory's ``final``.

    Raises:
        UserError: none of these.
    """
    final = Path(student) / "final"
    return checkpoints.find_checkpoint(str(final if final.is_dir() else student))


def evaluate_student(
    student: str | Path,
    settings: Evaluation,
    out: str | Path,
    *,
    seed: int = 42,
    progress: bool = True,
    say: Callable[[str], None] = lambda line: print(line, file=sys.stderr),
) -> dict[str, Any]:
    """Score one student outside of a run: ``out/evaluation.json`` and ``out/evaluation/student.jsonl``.

    Repeated with the same student, settings and files it does nothing; interrupted, it goes on.

    Args:
        student: checkpoint folder, hub id, or a run directory (its ``final``).
        out: made if it does not exist.

    Returns:
        What `motkit.evaluate.evaluate_checkpoint` returns.

    Raises:
        UserError: no such student, or problems that cannot be read.
    """
    path = student_checkpoint(student)
    tokenizer = checkpoints.load_tokenizer(path)
    renderer = Renderer(tokenizer, checkpoints.end_token_ids(path, tokenizer))
    folder = RunDir(Path(out).resolve())
    with contextlib.ExitStack() as stack:
        open_verifiers: dict[str, Verifier] = {}

        def verifier(name: str) -> Verifier:
            if name not in open_verifiers:
                open_verifiers[name] = stack.enter_context(Verifier(name))
            return open_verifiers[name]

        scorer = Scorer(
            settings,
            verifier=settings.verifier or "math",
            seed=seed,
            renderer=renderer,
            imported=folder.source("evaluate.problems"),
            verifiers=verifier,
        )
        stack.enter_context(folder.hold())
        stack.enter_context(rundir.storage_errors(folder.root))
        hashes = {name: rundir.hash_file(file) for name, file in scorer.files().items()}
        digest = rundir.digest({file.name: rundir.hash_file(file) for file in checkpoints.content_files(path)})
        inputs = scorer.inputs(digest, hashes)
        file, results = folder.root / "evaluation.json", folder.root / "evaluation" / "student.jsonl"
        entry = rundir.read_json(file).get("student", {})
        if entry.get("inputs") == inputs and (results.is_file() or not scorer.problems):
            say(f"{file}: is done")
            return dict(entry)
        log = folder.logs / "evaluate.log"
        entry = scorer.score(path, identity=digest, name=path.name, results=results, log=log, progress=progress)
        entry = {"student": str(student), "inputs": inputs, **entry}
        rundir.write_json(file, {"student": entry})
        return entry
