"""Run directories and comparisons as the analyses read them; nothing here writes into one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from motkit import importing, rundir
from motkit.analysis.models import render_traces
from motkit.checkpoint import find_checkpoint
from motkit.errors import UserError
from motkit.figures import ARM_NAMES
from motkit.recipe import Recipe
from motkit.render import RenderedTrace
from motkit.rundir import RunDir
from motkit.summary import load_recorded_recipe
from motkit.traces import Trace, read_traces


@dataclass(frozen=True)
class Run:
    """One run and its place in a comparison.

    ``arm``: base, std, mtd, posthoc, mot, leave_out, or mot/CONFIG (another merge). ``budget``: steps, compute, or
    both where the arm is the same under either. ``branch_steps``: optimizer steps of one branch in one round.
    """

    folder: RunDir
    recipe: Recipe
    arm: str
    seed: int
    budget: str = "both"
    teacher: str | None = None
    left_out: str | None = None

    @property
    def name(self) -> str:
        """How figures name the run: its arm, and the teacher where it matters."""
        if self.arm == "std" and self.teacher:
            return f"STD {self.teacher}"
        if self.arm == "leave_out" and self.left_out:
            return f"MoT without {self.left_out}"
        return ARM_NAMES.get(self.arm) or f"MoT {self.arm.removeprefix('mot/')}"

    @property
    def branch_steps(self) -> int:
        return int(self.recipe.train["max_steps"])

    @property
    def base(self) -> Path:
        """The student before the first round.

        Raises:
            UserError: it is not where the recipe says.
        """
        return find_checkpoint(self.recipe.student)

    @cached_property
    def rounds_done(self) -> list[int]:
        """Numbers of the rounds that have a merge (with a single branch, the merge is that branch)."""
        if self.arm == "base":
            return []
        numbers = range(1, self.recipe.rounds + 1)
        return [number for number in numbers if rundir.read_done(self.folder.merged(number))]

    def student(self, number: int) -> Path:
        """The checkpoint that a round ended with; round 0 is the base."""
        return self.folder.merged(number) / "checkpoint" if number else self.base

    @property
    def final(self) -> Path:
        """The last round's student, in the precision that is carried.

        Raises:
            UserError: no round is done.
        """
        if self.arm == "base":
            return self.base
        if not self.rounds_done:
            raise UserError(f"{self.folder.root}: no round is done yet; finish it with 'motkit round … --all'")
        return self.student(self.rounds_done[-1])

    def branch_stages(self, number: int) -> dict[str, Path]:
        """The stage folders of a round's branches that are done, by name: records and logs, perhaps no weights."""
        folders = {name: self.folder.branch(number, name) for name in self.recipe.branch_names}
        return {name: folder for name, folder in folders.items() if rundir.read_done(folder)}

    def branches(self, number: int) -> dict[str, Path]:
        """The branch checkpoints of a round, by name; those that ``keep_branches`` has pruned are left out."""
        stages = {name: folder / "checkpoint" for name, folder in self.branch_stages(number).items()}
        return {name: checkpoint for name, checkpoint in stages.items() if (checkpoint / "config.json").is_file()}

    def evaluation(self, number: int) -> dict[str, dict[str, Any]]:
        """Scores of a round by name: ``base``, branches, ``NAME@STEP``, ``merged``."""
        entries = rundir.read_json(self.folder.evaluation(number))
        return {name: entry["scores"] for name, entry in entries.items() if "scores" in entry}

    def heldout_traces(self) -> dict[str, list[RenderedTrace]]:
        """The traces that the run's held-out loss is taken on, in the student's tokens, by set; may be empty."""
        settings = self.recipe.evaluate
        if settings is None or settings.problem_source is None or not settings.traces:
            return {}
        imported = self.folder.source("evaluate.problems")
        known, asked = importing.source_problems(settings.problem_source, imported)
        return {
            name: render_traces(self.base, asked, [t for t in read_traces(Path(file), known) if t.problem_id in asked])
            for name, file in settings.traces.items()
        }

    def training_traces(self) -> dict[str, list[RenderedTrace]]:
        """What the run trained on, by teacher, in the student's tokens."""
        problems, _ = importing.seed_problems(self.recipe, self.folder.source("problems"))
        kept = {}
        for teacher in self.recipe.teachers:
            file = self.folder.traces / f"{teacher.name}.jsonl"
            if not file.is_file():
                raise UserError(f"{file}: missing; the run has not filtered its traces yet")
            traces: list[Trace] = read_traces(file, problems)
            kept[teacher.name] = render_traces(self.base, problems, traces)
        return kept

    def traces(self, *, per_set: int | None = None) -> tuple[dict[str, list[RenderedTrace]], str]:
        """(traces by set, what they are in words): held-out ones if the run has them, else those it trained on.

        Args:
            per_set: at most so many of each set, the first ones.
        """
        found, what = self.heldout_traces(), "held-out traces"
        if not found:
            found, what = self.training_traces(), "training traces"
        return {name: some[:per_set] for name, some in found.items()}, what


@dataclass(frozen=True)
class Runs:
    """All runs that a figure is made from."""

    runs: list[Run]
    root: Path
    comparison: Mapping[str, Any] = field(default_factory=dict)

    def of(self, *arms: str, budget: str | None = None) -> list[Run]:
        """The runs of these arms; with ``budget``, those that count under it."""
        return [run for run in self.runs if run.arm in arms and (budget is None or run.budget in (budget, "both"))]

    @property
    def main(self) -> Run:
        """The run that a figure about one run is about: MoT's with the lowest seed; else the first."""
        found = sorted(self.of("mot"), key=lambda run: run.seed)
        return found[0] if found else self.runs[0]

    def same_seed(self, *arms: str) -> list[Run]:
        """The runs of these arms with the seed of `main`, at equal steps."""
        return [run for run in self.of(*arms, budget="steps") if run.seed == self.main.seed]


def open_run(path: Path, **place: Any) -> Run:
    """A run directory; its arm, where nobody says, is what its recipe's settings make it (METHOD: the paper's arms).

    Raises:
        UserError: it is not one.
    """
    folder = RunDir(path.resolve())
    if not folder.recipe.is_file():
        raise UserError(f"{path}: neither a run directory (recipe.yaml) nor a comparison (comparison.json)")
    recipe = load_recorded_recipe(folder)
    if "arm" not in place:
        if recipe.branches == "union":
            place["arm"] = "mtd"
        elif len(recipe.teachers) == 1:
            place |= {"arm": "std", "teacher": recipe.teachers[0].name}
        else:
            place["arm"] = "mot" if recipe.rounds > 1 else "posthoc"
    return Run(folder, recipe, **{"seed": recipe.seed, **place})


def open_runs(paths: Sequence[Path]) -> Runs:
    """Run directories and comparisons together.

    Raises:
        UserError: a folder is neither, or a comparison names an arm that is not known.
    """
    if not paths:
        raise UserError("no run given; name one with --run")
    runs: list[Run] = []
    comparison: dict[str, Any] = {}
    for path in paths:
        file = path / "comparison.json"
        if not file.is_file():
            runs.append(open_run(path))
            continue
        comparison = rundir.read_json(file)
        for entry in comparison.get("runs", []):
            if entry["arm"] not in ARM_NAMES and not entry["arm"].startswith("mot/"):
                raise UserError(f"{file}: unknown arm {entry['arm']!r}; expected {', '.join(ARM_NAMES)} or mot/CONFIG")
            if not (path / entry["run"] / "recipe.yaml").is_file():
                continue  # a comparison that is still being made
            place = {key: entry.get(key) for key in ("arm", "seed", "budget", "teacher", "left_out")}
            runs.append(open_run(path / entry["run"], **place))
    if not runs:
        raise UserError(f"{paths[0]}: the comparison has no run yet; make them with 'motkit compare'")
    return Runs(runs, paths[0].resolve(), comparison)
