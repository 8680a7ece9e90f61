"""Tables of numbers in and out: every figure is drawn from what its CSV files hold."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from motkit import rundir
from motkit.errors import UserError

if TYPE_CHECKING:
    import pandas

# Columns of text, whatever they look like: a token may be "7" or "nan".
_TEXT = """
set problem_id text word kind token_use word_use split group model arm operator case name to first second layer metric
student branch direction teacher left_out budget run panel label
"""
TEXT = frozenset(_TEXT.split())


def write_tables(tables: Mapping[str, "pandas.DataFrame"], folder: Path) -> None:
    """``folder/NAME.csv`` for each table, each whole or not at all."""
    for name, table in tables.items():
        rundir.write_text(folder / f"{name}.csv", table.to_csv(index=False, na_rep="nan"))


def read_tables(folder: Path) -> dict[str, "pandas.DataFrame"]:
    """What `write_tables` wrote, number for number.

    Raises:
        UserError: there is none.
    """
    import pandas

    files = sorted(folder.glob("*.csv"))
    if not files:
        raise UserError(f"{folder}: no CSV file in it; make the figure with --run first")
    tables = {}
    for file in files:
        columns = pandas.read_csv(file, nrows=0).columns
        numbers = [column for column in columns if column not in TEXT]
        table = pandas.read_csv(
            file, dtype={column: str for column in columns if column in TEXT}, keep_default_na=False,
            na_values={column: ["nan"] for column in numbers}, float_precision="round_trip",
        )  # fmt: skip
        tables[file.stem] = table
    return tables
