"""The frame of a figure script: ``--run`` and ``--out`` in; PNG, SVG and the numbers as CSV out."""

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from motkit import figures
from motkit.analysis.runs import open_runs
from motkit.analysis.tables import read_tables, write_tables
from motkit.errors import UserError

if TYPE_CHECKING:
    import pandas

Tables = Mapping[str, "pandas.DataFrame"]


def make_figure(
    name: str, out: Path, compute: Callable[[], Tables] | None, draw: Callable[[Tables], Any]
) -> list[Path]:
    """Compute the tables, write them to ``out/name/``, and draw ``out/name.png`` and ``.svg`` from what was written.

    Args:
        compute: None to draw again from the CSV files that are there.
    """
    folder = out / name
    if compute is not None:
        write_tables(compute(), folder)
    return figures.save(draw(read_tables(folder)), out, name)


def figure_command(
    name: str,
    text: str | None,
    compute: Callable[..., Tables],
    draw: Callable[[Tables], Any],
    options: Sequence[Callable[[Any], Any]] = (),
    *,
    needs_run: bool = True,
) -> click.Command:
    """The command of a figure script.

    Args:
        text: the help: which figure of the paper it makes, and how ours differs.
        compute: (runs, out, **options) → tables; ``runs`` is a list of paths.
    """

    def command(runs: tuple[Path, ...], out: Path, redraw: bool, **values: Any) -> None:
        try:
            if not redraw and needs_run and not runs:
                raise UserError("--run: name a run directory or a comparison (or --redraw what is in --out)")
            if not redraw:
                for path in runs:
                    open_runs([path])
            work = None if redraw else (lambda: compute(list(runs), out, **values))
            for path in make_figure(name, out, work, draw):
                click.echo(str(path))
        except UserError as error:
            for line in str(error).splitlines():
                click.echo(f"error: {line}", err=True)
            sys.exit(2)

    made: Any = click.option("--redraw", is_flag=True, help=f"Draw again from the CSV files in OUT/{name}/.")(command)
    for option in reversed(options):
        made = option(made)
    made = click.option(
        "--out",
        type=click.Path(path_type=Path),
        default=Path("figures"),
        show_default=True,
        help="Folder to write into.",
    )(made)
    made = click.option(
        "--run", "runs", type=click.Path(path_type=Path), multiple=True, metavar="DIR",
        help="A run directory or a comparison; repeat it.",
    )(made)  # fmt: skip
    settings = {"help_option_names": ["-h", "--help"]}
    return click.command(name, help=text, context_settings=settings)(made)
