"""A run as its records tell it: scores and costs of the base, every branch and every merge."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from motkit import rundir
from motkit.errors import UserError
from motkit.recipe import Recipe, read_yaml_mapping
from motkit.rundir import RunDir

if TYPE_CHECKING:
    import pandas


def summarise(run: str | Path) -> "pandas.DataFrame":
    """The summary of a run as its records tell it: one row for the base, each branch and each merge.

    Columns: round, name, kind (base, branch, merge), steps, tokens, flops, seconds, train_loss, accuracy,
    standard_error, heldout_loss, checkpoint. What a row does not have is missing (NaN).

    Raises:
        UserError: the folder is not a run.
    """
    import pandas

    folder, recipe = _open_run(run)
    columns = [
        *["round", "name", "kind", "steps", "tokens", "flops", "seconds", "train_loss"],
        *["accuracy", "standard_error", "heldout_loss", "checkpoint"],
    ]
    rows: list[dict[str, Any]] = []

    def add(number: int, name: str, kind: str, stage: Path | None) -> None:
        record = rundir.read_done(stage) if stage else {}
        if record is None:
            return
        scores = rundir.read_json(folder.evaluation(number)).get(name, {}).get("scores", {})
        cost = record.get("cost", {})
        rows.append(
            {
                "round": number,
                "name": name,
                "kind": kind,
                "steps": cost.get("steps"),
                "tokens": cost.get("tokens"),
                "flops": cost.get("flops"),
                "seconds": cost.get("seconds"),
                "train_loss": cost.get("final_loss"),
                **{key: scores.get(key) for key in ("accuracy", "standard_error", "heldout_loss")},
                # A pruned branch has none.
                "checkpoint": None
                if record.get("pruned")
                else f"{folder.relative(stage)}/checkpoint"
                if stage
                else recipe.student,
            }
        )

    add(0, "base", "base", None)
    for number in range(1, recipe.rounds + 1):
        for name in recipe.branch_names:
            add(number, name, "branch", folder.branch(number, name))
        add(number, "merged", "merge", folder.merged(number))
    return pandas.DataFrame(rows, columns=columns).astype({"steps": "Int64", "tokens": "Int64"})


LEDGER_COLUMNS = (
    *("stage", "kind", "branch_steps", "tokens", "flops", "seconds", "peak_memory_bytes"),
    *("bytes_read", "bytes_written", "disk_bytes", "price"),
)


def ledger(run: str | Path) -> "pandas.DataFrame":
    """What each finished stage of a run spent, as its record tells it: a row per stage.

    Columns: `LEDGER_COLUMNS`; kind is ``generation``, ``traces``, ``branch``, ``merge``, ``evaluation`` or
    ``publication``. ``flops`` are counted from tokens and parameters (training 6·P·tokens, evaluation 2·P·tokens), not
    measured; a teacher's are unknown. ``disk_bytes`` is what the stage left. A stage that was linked from another run
    has the costs that it had there. What a row does not have is missing (NaN).

    Raises:
        UserError: the folder is not a run.
    """
    import pandas

    folder, recipe = _open_run(run)
    rows: list[dict[str, Any]] = []
    for name, report in rundir.read_json(folder.generated_report).items():
        samples = folder.generated(name)
        rows.append(
            {
                "stage": f"generated/{name}",
                "kind": "generation",
                "tokens": report.get("prompt_tokens", 0) + report.get("tokens", 0),
                "seconds": report.get("seconds"),
                "price": report.get("cost"),
                "disk_bytes": samples.stat().st_size if samples.is_file() else 0,
            }
        )

    def add(stage: Path, kind: str) -> None:
        record = rundir.read_done(stage)
        if record is not None:
            cost = record.get("cost", {})
            outputs = record["outputs"].items()
            disk = sum(output["bytes"] for name, output in outputs if not rundir.is_pruned(record, name))
            known = {column: cost[column] for column in LEDGER_COLUMNS if column in cost}
            steps = {"branch_steps": cost["steps"]} if "steps" in cost else {}
            rows.append({"stage": folder.relative(stage), "kind": kind, **steps, **known, "disk_bytes": disk})

    def add_scores(number: int) -> None:
        for name, entry in rundir.read_json(folder.evaluation(number)).items():
            results = folder.results(number, name)
            disk = results.stat().st_size if results.is_file() else 0
            stage = f"{folder.relative(folder.round(number))}/evaluation/{name}"
            rows.append({"stage": stage, "kind": "evaluation", **entry.get("cost", {}), "disk_bytes": disk})

    add(folder.traces, "traces")
    add_scores(0)
    for number in range(1, recipe.rounds + 1):
        for name in recipe.branch_names:
            add(folder.branch(number, name), "branch")
        add(folder.merged(number), "merge")
        add_scores(number)
        add(folder.published(number), "publication")
    return pandas.DataFrame(rows, columns=list(LEDGER_COLUMNS))


def total_costs(table: "pandas.DataFrame") -> "pandas.DataFrame":
    """A `ledger` summed per kind of stage, and in all (``total``): sums, but the highest of ``peak_memory_bytes``."""
    sums = [column for column in LEDGER_COLUMNS if column not in ("stage", "kind", "peak_memory_bytes")]
    how: dict[str, Any] = {column: (column, lambda values: values.sum(min_count=1)) for column in sums}
    how |= {"stages": ("stage", "count"), "peak_memory_bytes": ("peak_memory_bytes", "max")}
    totals = table.groupby("kind", sort=False).agg(**how)
    totals.loc["total"] = table.assign(every="total").groupby("every").agg(**how).loc["total"]
    table = totals.reset_index()
    return table


def _open_run(run: str | Path) -> tuple[RunDir, Recipe]:
    folder = RunDir(Path(run).resolve())
    if not folder.recipe.is_file():
        raise UserError(f"{run}: not a run directory: no recipe.yaml in it")
    return folder, load_recorded_recipe(folder)


def load_recorded_recipe(folder: RunDir) -> Recipe:
    """The recipe that a run began with, read without checking that its files are still there."""
    return Recipe.model_validate(read_yaml_mapping(folder.recipe))


def scores_markdown(table: "pandas.DataFrame") -> str:
    scored = table.dropna(axis="columns", how="all")
    columns = [name for name in ("round", "name", "accuracy", "standard_error", "heldout_loss") if name in scored]
    if len(columns) == 2:
        return ""
    lines = ["| " + " | ".join(columns) + " |", "| " + " | ".join("---" for _ in columns) + " |"]
    for row in scored[columns].itertuples(index=False):
        lines.append("| " + " | ".join(f"{cell:.4f}" if isinstance(cell, float) else str(cell) for cell in row) + " |")
    return "\n".join(lines)
