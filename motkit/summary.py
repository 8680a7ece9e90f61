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

    folder = RunDir(Path(run).resolve())
    if not folder.recipe.is_file():
        raise UserError(f"{run}: not a run directory: no recipe.yaml in it")
    recipe = load_recorded_recipe(folder)
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
