"""The comparison that MoT has to win: every arm is a run of the same loop with other settings, over seeds and budgets.

| arm | what it is |
|---|---|
| ``base`` | the student as it was |
| ``std`` | single-teacher distillation: one branch, one round; a run per teacher |
| ``mtd`` | the union of all teachers' traces: one branch, one round |
| ``posthoc`` | a branch per teacher, one round, merged once at the end |
| ``mot`` | the recipe |
| ``mot/CONFIG`` | the recipe with another merge config |
| ``leave_out`` | the recipe without one teacher (Figure 4) |

With T rounds of E steps and K teachers, budget ``steps`` gives each branch T·E steps, budget ``compute`` gives every
arm the T·E·K branch-steps of MoT; ``posthoc`` and ``mot`` are the same under both. What is scored is each arm's last
checkpoint: the stopping rule is fixed beforehand. The traces are filtered once and shared, and a branch that two arms
have in common is trained once (`run_rounds`, ``share_with``).
"""

import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from motkit import importing, rundir
from motkit.errors import UserError
from motkit.recipe import Recipe, Teacher, TraceFilter
from motkit.rounds import run_rounds
from motkit.rundir import RunDir
from motkit.scores import paired_difference, problem_means
from motkit.summary import ledger, load_recorded_recipe
from motkit.traces import Trace, read_objects, to_jsonl

if TYPE_CHECKING:
    import pandas

ARMS = ("base", "std", "mtd", "posthoc", "mot")
BUDGETS = ("steps", "compute")
Say = Callable[[str], None]


@dataclass(frozen=True)
class ArmRun:
    """One run of a comparison. ``budget`` is ``both`` where an arm is the same under either."""

    arm: str
    budget: str
    seed: int
    teacher: str | None
    left_out: str | None
    run: str

    @property
    def label(self) -> str:
        """How tables and figures name it."""
        return arm_label(self.arm, self.teacher, self.left_out)


def arm_label(arm: str, teacher: str | None, left_out: str | None) -> str:
    """How tables and figures name an arm."""
    return f"{arm} {teacher}" if teacher else f"mot without {left_out}" if left_out else arm


@dataclass(frozen=True)
class Comparison:
    """``arms``: a row per budget and arm; ``runs``: a row per run; ``sentences``: what may be claimed, per budget."""

    arms: "pandas.DataFrame"
    runs: "pandas.DataFrame"
    sentences: list[str]


def plan_comparison(
    recipe: Recipe, arms: Sequence[str], seeds: Sequence[int], budgets: Sequence[str], leave_out: Sequence[str] = ()
) -> list[ArmRun]:
    """The runs of a comparison, in the order in which they are best done: what others share first.

    Raises:
        UserError: an arm, budget or teacher that there is not, or a recipe that cannot be compared.
    """
    faults = []
    names = [teacher.name for teacher in recipe.teachers]
    for arm in arms:
        if arm not in ARMS and not (arm.startswith("mot/") and len(arm) > 4):
            faults.append(f"--arms: unknown {arm!r}; known: {', '.join(ARMS)}, mot/CONFIG (a merge config)")
    faults += [
        f"--budget: unknown {budget!r}; known: {', '.join(BUDGETS)}" for budget in budgets if budget not in BUDGETS
    ]
    faults += [
        f"--leave-out: no teacher {name!r}; the recipe has {', '.join(names)}"
        for name in leave_out
        if name not in names
    ]
    if recipe.evaluate is None or recipe.evaluate.problems is None:
        faults.append("evaluate.problems: a comparison needs held-out problems; add them to the recipe")
    if recipe.branches != "per_teacher":
        faults.append("branches: a comparison starts from a recipe with 'per_teacher'; the arm 'mtd' is the union")
    if len(names) < 2:
        faults.append("teachers: a comparison needs two or more")
    if not seeds or len(set(seeds)) < len(seeds):
        faults.append(f"--seeds: expected different whole numbers, got {','.join(map(str, seeds)) or 'none'}")
    if faults:
        raise UserError("\n".join(faults))
    runs = []
    for seed in seeds:

        def add(
            arm: str, folder: str, budget: str = "both", teacher: str | None = None, out: str | None = None
        ) -> None:
            runs.append(ArmRun(arm, budget, seed, teacher, out, f"seed_{seed}/{folder}"))  # noqa: B023

        add("base", "base")
        suffixes = {"steps": "", "compute": ".compute"}
        for budget in budgets:
            for name in names if "std" in arms else ():
                add("std", f"std-{name}{suffixes[budget]}", budget, teacher=name)
            if "mtd" in arms:
                add("mtd", f"mtd{suffixes[budget]}", budget)
        if "posthoc" in arms:
            add("posthoc", "posthoc")
        for arm in arms:
            if arm == "mot" or arm.startswith("mot/"):
                add(arm, arm.replace("/", "-") if "." not in arm else f"mot-{Path(arm).stem}")
        for name in leave_out:
            add("leave_out", f"mot-without-{name}", "steps" if "steps" in budgets else "both", out=name)
    return runs


def arm_recipe(recipe: Recipe, run: ArmRun) -> Recipe:
    """The settings of the loop that make an arm out of a recipe whose traces are filtered already."""
    assert recipe.evaluate is not None
    total, num_teachers = recipe.rounds * recipe.train["max_steps"], len(recipe.teachers)
    values: dict[str, Any] = recipe.model_dump(mode="json") | {"seed": run.seed}
    if run.arm in ("std", "mtd"):
        factor = num_teachers if run.budget == "compute" else 1
        # The mean of one branch is the branch, whatever the recipe's merge does to several.
        values |= {"rounds": 1, "merge": "mot", "train": recipe.train | {"max_steps": total * factor}}
        values |= {"weights": None, "server": None}
        values["evaluate"] |= {"branches": False}
        if recipe.evaluate.every_steps:
            values["evaluate"]["every_steps"] = recipe.evaluate.every_steps * factor
    if run.arm == "std":
        values["teachers"] = [teacher for teacher in values["teachers"] if teacher["name"] == run.teacher]
    elif run.arm == "mtd":
        values["branches"] = "union"
    elif run.arm == "posthoc":
        values |= {"rounds": 1, "train": recipe.train | {"max_steps": total}}
        values["evaluate"] |= {"branches": False}
    elif run.arm.startswith("mot/"):
        name = run.arm.removeprefix("mot/")
        values["merge"] = str(Path(name).resolve()) if Path(name).is_file() else name
    elif run.left_out:
        values["teachers"] = [teacher for teacher in values["teachers"] if teacher["name"] != run.left_out]
        if isinstance(recipe.weights, dict):
            values["weights"] = {name: weight for name, weight in recipe.weights.items() if name != run.left_out}
    return Recipe.model_validate(values)


def run_comparison(
    recipe: Recipe,
    root: str | Path,
    *,
    arms: Sequence[str] = ARMS,
    seeds: Sequence[int] = (0, 1, 2),
    budgets: Sequence[str] = ("steps",),
    leave_out: Sequence[str] = (),
    noisy: str | None = None,
    clean: str | Path | None = None,
    progress: bool = True,
    say: Say = lambda line: print(line, file=sys.stderr),
) -> Comparison:
    """Run the arms, or go on with them, and compare.

    1. Hold the folder; compare the recipe with the one that it began with.
    2. Filter the teachers' traces once (``prepared/``); with ``noisy``, shuffle one teacher's answers (``noisy/``).
    3. Run each arm and seed in a run directory of its own; what is finished is skipped.
    4. Table, figure, and one sentence per budget: ``compare.csv``, ``compare_runs.csv``, ``compare.png``,
       ``comparison.json``.

    Args:
        recipe: from `motkit.load_recipe`; its own arm is ``mot``.
        root: the comparison's folder; made if it does not exist.
        noisy: a teacher whose kept traces are given to the wrong problems, after the filter: none of its answers is
            right but by chance, and nothing drops them.
        clean: a comparison without ``noisy``: what they have in common is not done again, and the tables say how much
            each arm lost.

    Raises:
        UserError: as `plan_comparison` and `run_rounds`; what is finished stays.
    """
    runs = plan_comparison(recipe, arms, seeds, budgets, leave_out)
    folder = RunDir(Path(root).resolve())
    clean_root = Path(clean).resolve() if clean is not None else None
    if noisy is not None and noisy not in [teacher.name for teacher in recipe.teachers]:
        names = ", ".join(teacher.name for teacher in recipe.teachers)
        raise UserError(f"--noisy: no teacher {noisy!r}; the recipe has {names}")
    if clean_root is not None and not (clean_root / "comparison.json").is_file():
        raise UserError(f"--clean {clean}: not a comparison: no comparison.json in it")
    with folder.hold():
        _open(folder, recipe, noisy)
        prepared = folder.root / "prepared"
        run_rounds(recipe, prepared, rounds=0, progress=progress, say=lambda line: say(f"prepared: {line}"))
        shared = _with_prepared_traces(recipe, folder.root, noisy)
        for number, run in enumerate(runs, start=1):
            here = folder.root / run.run
            prefix = f"[{number}/{len(runs)}] {run.run}"
            run_rounds(
                arm_recipe(shared, run),
                here,
                rounds=0 if run.arm == "base" else None,
                share_with=[other for other in _runs_in(folder.root, clean_root) if other != here],
                progress=progress,
                say=lambda line, prefix=prefix: say(f"{prefix}: {line}"),  # type: ignore[misc]
            )
        _record(folder, recipe, runs, noisy, clean_root)
        return summarise_comparison(folder.root)


def summarise_comparison(root: str | Path) -> Comparison:
    """Tables, figure and sentences of a comparison, from its runs' records; written to its folder.

    Raises:
        UserError: the folder is not a comparison.
    """
    folder = RunDir(Path(root).resolve())
    record = rundir.read_json(folder.root / "comparison.json")
    if "runs" not in record:
        raise UserError(f"{root}: not a comparison, or none of its runs is finished: no comparison.json in it")
    runs = [ArmRun(**values) for values in record["runs"]]
    table = _runs_table(folder, runs)
    answers = {run.run: _answers(folder.root / run.run) for run in runs}
    arms, sentences = _arms_table(table, answers, record["budgets"])
    clean = record.get("clean")
    if clean:
        arms = _with_losses(arms, Path(clean))
    rundir.write_text(folder.root / "compare_runs.csv", table.to_csv(index=False))
    rundir.write_text(folder.root / "compare.csv", arms.to_csv(index=False))
    rundir.write_json(folder.root / "comparison.json", {**record, "sentences": [*sentences, *caveats(arms)]})
    _draw(arms, table, folder.root)
    return Comparison(arms, table, sentences)


def _open(folder: RunDir, recipe: Recipe, noisy: str | None) -> None:
    """Record the recipe, or refuse another one than the comparison began with."""
    if folder.recipe.is_file():
        changed = recipe.differences(load_recorded_recipe(folder))
        before = rundir.read_json(folder.root / "noisy.json").get("teacher")
        if before != noisy:
            changed.append(f"--noisy: {before} → {noisy}")
        if changed:
            lines = "\n".join(f"  {line}" for line in changed)
            raise UserError(
                f"{folder.root}: began with another recipe; restore it, or choose another folder with --run:\n{lines}"
            )
        return
    rundir.write_json(folder.root / "noisy.json", {"teacher": noisy})
    rundir.write_text(folder.recipe, recipe.to_yaml())


def _with_prepared_traces(recipe: Recipe, root: Path, noisy: str | None) -> Recipe:
    """The recipe whose teachers have the traces that the filter kept, so that every arm gets the same."""
    prepared = RunDir(root / "prepared")
    files = {teacher.name: prepared.traces / f"{teacher.name}.jsonl" for teacher in recipe.teachers}
    if noisy is not None:
        files[noisy] = _shuffled(files[noisy], root / "noisy" / f"{noisy}.jsonl", recipe.seed)
    evaluation = recipe.evaluate
    assert evaluation is not None
    values = recipe.model_dump(mode="json")
    values["teachers"] = [Teacher(name=name, traces=str(file)).model_dump(mode="json") for name, file in files.items()]
    settings = recipe.filter.model_dump() | {"verifier": "none", "keep": "first"}
    values["filter"] = TraceFilter.model_validate(settings).model_dump()
    values["evaluate"]["verifier"] = recipe.evaluation_verifier
    source = recipe.problem_source
    if importing.is_hub_source(source.path):
        values["problems"] = {"path": str(prepared.source("problems")), "sample": values["problems"].get("sample")}
    return Recipe.model_validate(values)


def _shuffled(file: Path, target: Path, seed: int) -> Path:
    """Each problem's traces under another problem's id, for all of them (a random cyclic order)."""
    if not target.is_file():
        traces = [Trace.model_validate(row) for _, row in read_objects(file)]
        order = sorted({trace.problem_id for trace in traces})
        if len(order) < 2:
            raise UserError(f"--noisy: {file}: answers of one problem cannot be shuffled")
        random.Random(seed).shuffle(order)
        follows = dict(zip(order, order[1:] + order[:1], strict=True))
        moved = [trace.model_copy(update={"problem_id": follows[trace.problem_id]}) for trace in traces]
        rundir.write_text(target, to_jsonl(moved))
    return target


def _record(folder: RunDir, recipe: Recipe, runs: Sequence[ArmRun], noisy: str | None, clean: Path | None) -> None:
    """``comparison.json``: what was compared, with what an earlier call did on top."""
    before = rundir.read_json(folder.root / "comparison.json")
    known = {run["run"]: run for run in before.get("runs", [])} | {run.run: asdict(run) for run in runs}
    every = [ArmRun(**values) for values in known.values()]
    record = {
        "arms": list(dict.fromkeys(run.arm for run in every)),
        "seeds": sorted({run.seed for run in every}),
        "budgets": [b for b in BUDGETS if any(run.budget == b for run in every)] or ["steps"],
        "rounds": recipe.rounds,
        "branch_steps": recipe.train["max_steps"],
        "noisy": noisy,
        "clean": str(clean) if clean else None,
        "runs": [asdict(run) for run in every],
    }
    rundir.write_json(folder.root / "comparison.json", record)


def _runs_in(*roots: Path | None) -> Iterator[Path]:
    """The run directories of comparisons, of this call or an earlier one."""
    for root in roots:
        if root is not None:
            yield root / "prepared"
            yield from sorted(path.parent for path in root.glob("seed_*/*/recipe.yaml"))


def _last_scored(folder: RunDir) -> tuple[int, str]:
    """(round, name) of what counts as an arm's result: its last merge, or the base."""
    rounds = [int(path.parents[1].name.rpartition("_")[2]) for path in folder.root.glob("round_*/merged/done.json")]
    return (max(rounds), "merged") if rounds else (0, "base")


def _answers(run: Path) -> dict[str, float]:
    """Mean of ``correct`` of every problem."""
    folder = RunDir(run)
    return problem_means(row for _, row in read_objects(folder.results(*_last_scored(folder))))


def _runs_table(folder: RunDir, runs: Sequence[ArmRun]) -> "pandas.DataFrame":
    import pandas

    rows = []
    for run in runs:
        here = RunDir(folder.root / run.run)
        number, name = _last_scored(here)
        scores = rundir.read_json(here.evaluation(number)).get(name, {}).get("scores", {})
        spent = ledger(here.root)
        work = spent[spent["kind"].isin(["branch", "merge"])]
        rows.append(
            {
                **{"arm": run.arm, "budget": run.budget, "seed": run.seed, "teacher": run.teacher},
                **{"left_out": run.left_out, "run": run.run},
                **{key: scores.get(key) for key in ("accuracy", "standard_error", "heldout_loss")},
                **{f"pass_at_{k}": value for k, value in scores.get("pass_at", {}).items()},
                **{f"maj_at_{k}": value for k, value in scores.get("maj_at", {}).items()},
                **{key: scores.get(key) for key in ("truncated", "mean_tokens", "problems", "samples")},
                **{key: work[key].sum() for key in ("branch_steps", "tokens", "flops", "seconds", "disk_bytes")},
                "peak_memory_bytes": work["peak_memory_bytes"].max(),
                "evaluation_seconds": spent.loc[spent["kind"] == "evaluation", "seconds"].sum(),
            }
        )
    return pandas.DataFrame(rows)


def _arms_table(
    runs: "pandas.DataFrame", answers: dict[str, dict[str, float]], budgets: Sequence[str]
) -> tuple["pandas.DataFrame", list[str]]:
    """A row per budget and arm, and a sentence per budget."""
    import pandas

    rows, sentences = [], []
    for budget in budgets:
        part = runs[runs["budget"].isin([budget, "both"])]
        keys = ["arm", "teacher", "left_out"]
        groups = {
            tuple(value or None for value in key): group.sort_values("seed")
            for key, group in part.fillna(dict.fromkeys(keys, "")).groupby(keys, sort=False)
        }
        singles = {key: group["accuracy"].mean() for key, group in groups.items() if key[0] == "std"}
        best = max(singles, key=lambda key: singles[key]) if singles else ("base", None, None)
        for key, group in groups.items():
            row: dict[str, Any] = {
                "budget": budget,
                **dict(zip(keys, key, strict=True)),
                "best_teacher": key[0] == "std" and key == best,
                "seeds": len(group),
                "accuracy": group["accuracy"].mean(),
                "accuracy_std": group["accuracy"].std(ddof=1),
            }
            both = groups[best][groups[best]["seed"].isin(group["seed"])]
            paired = group[group["seed"].isin(both["seed"])]
            row["pairs"] = len(paired)
            if len(paired) and key != best:
                names = sorted(answers[paired["run"].iloc[0]])
                ours = [[answers[run][name] for name in names] for run in paired["run"]]
                theirs = [[answers[run][name] for name in names] for run in both["run"]]
                row["difference"], row["low"], row["high"] = paired_difference(ours, theirs)
                row["differing_problems"] = sum(
                    any(a[place] != b[place] for a, b in zip(ours, theirs, strict=True)) for place in range(len(names))
                )
                if key[0] == "mot":
                    accuracies = float(paired["accuracy"].mean()), float(both["accuracy"].mean())
                    sentences.append(_sentence(budget, row, best, accuracies, len(names)))
            columns = ["heldout_loss", "truncated", "mean_tokens", "branch_steps", "tokens", "flops", "seconds"]
            row |= {column: group[column].mean() for column in [*columns, "disk_bytes"]}
            row |= {
                column: group[column].mean() for column in map(str, group) if column.startswith(("pass_at", "maj_at"))
            }
            row["peak_memory_bytes"] = group["peak_memory_bytes"].max()
            rows.append(row)
    return pandas.DataFrame(rows), sentences


# Fewer problems than this on which two arms differ are no evidence, whatever a bootstrap of them says.
_LEAST_DIFFERING = 10


def _sentence(
    budget: str, row: dict[str, Any], best: Sequence[Any], accuracies: tuple[float, float], num_problems: int
) -> str:
    """What the interval allows to say of MoT, and no more."""
    who = f"the best single teacher, {best[1]}" if best[0] == "std" else "the base"
    equal = "steps per branch" if budget == "steps" else "compute (branch-steps in all)"
    seeds = f"{row['pairs']} seeds" if row["pairs"] > 1 else "one seed"
    claim = "MoT is better" if row["low"] > 0 else "MoT is worse" if row["high"] < 0 else "no difference can be claimed"
    if row["differing_problems"] < _LEAST_DIFFERING:
        claim = f"no difference can be claimed: they differ on {row['differing_problems']} problems only"
    ours, theirs = (100 * accuracy for accuracy in accuracies)
    interval = f"[{100 * row['low']:+.1f}, {100 * row['high']:+.1f}]"
    return (
        f"At equal {equal}: MoT {ours:.1f} %, {who}, {theirs:.1f} %; difference {100 * row['difference']:+.1f} points, "
        f"95 % interval {interval} over {seeds} and {num_problems} problems: {claim}."
    )


def caveats(arms: "pandas.DataFrame") -> list[str]:
    """What the tables and sentences do not say by themselves."""
    lines = []
    if (arms["arm"] == "std").any():
        lines.append(
            "The best single teacher is picked on the problems that are scored, which nobody can do beforehand: it "
            "flatters that arm."
        )
    seeds = int(arms["seeds"].max())
    if seeds < 5:
        lines.append(
            f"{'One seed says' if seeds == 1 else f'{seeds} seeds say'} little of other seeds: where seeds differ more "
            "than problems do, the interval is too narrow."
        )
    return lines


def _with_losses(arms: "pandas.DataFrame", clean: Path) -> "pandas.DataFrame":
    """The table with ``lost``: the accuracy of the same arm without noise, minus that with it."""
    import pandas

    before = pandas.read_csv(clean / "compare.csv")
    keys = ["budget", "arm", "teacher", "left_out"]

    def accuracies(table: pandas.DataFrame) -> dict[tuple[str, ...], float]:
        names = zip(*(table[key].fillna("").astype(str) for key in keys), strict=True)
        return dict(zip(names, table["accuracy"], strict=True))

    without = accuracies(before)
    return arms.assign(lost=[without.get(key, float("nan")) - value for key, value in accuracies(arms).items()])


def _draw(arms: "pandas.DataFrame", runs: "pandas.DataFrame", out: Path) -> None:
    """``compare.png`` and ``compare.svg``: a panel per budget; a dot per seed, mean and standard deviation."""
    from motkit import figures

    keys = ["arm", "teacher", "left_out"]
    arms, runs = (table.fillna(dict.fromkeys(keys, "")) for table in (arms, runs))
    budgets = list(dict.fromkeys(arms["budget"]))
    names = list(dict.fromkeys(arms[keys].itertuples(index=False, name=None)))
    titles = {"steps": "equal steps per branch", "compute": "equal compute (branch-steps in all)"}
    with figures.house_style():
        size = {"width_in": 1.9 + 3.3 * len(budgets), "height_in": 1.0 + 0.34 * len(names)}
        figure, axes = figures.new_figure(1, len(budgets), **size)
        for panel, budget in zip(axes[0], budgets, strict=True):
            for row in arms[arms["budget"] == budget].to_dict(orient="records"):
                name = tuple(row[key] for key in keys)
                style = figures.arm_style(name[0] if name[0] in figures.ARM_NAMES else "mot")
                own = runs[runs["budget"].isin([budget, "both"]) & (runs[keys] == name).all(axis=1)]
                y = len(names) - 1 - names.index(name)
                spread = 100 * row["accuracy_std"] if row["accuracy_std"] > 0 else None
                panel.errorbar(
                    100 * row["accuracy"], y, xerr=spread, color=style.colour, marker=style.marker, markersize=6,
                    capsize=3, linestyle="none",
                )  # fmt: skip
                panel.plot(100 * own["accuracy"], [y - 0.27] * len(own), ".", color=style.colour, markersize=4)
            panel.set_yticks(
                range(len(names) - 1, -1, -1), [arm_label(*name) if panel is axes[0, 0] else "" for name in names]
            )
            panel.set_ylim(-0.6, len(names) - 0.4)
            panel.set_xlim(100 * runs["accuracy"].min() - 3, 100 * runs["accuracy"].max() + 3)
            panel.set_xlabel("accuracy on held-out problems, %\n(mean ± standard deviation; a dot per seed)")
            panel.set_title(titles[budget])
            panel.grid(visible=False, axis="y")
        figures.save(figure, out, "compare")
