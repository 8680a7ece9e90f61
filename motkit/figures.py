"""The look of every figure: a colour, marker and line per arm, sizes and fonts; PNG and SVG, byte for byte repeatable.

Colours are those of Okabe and Ito (2008, "Color Universal Design"), which people with any of the common kinds of colour
blindness tell apart; markers and lines differ too, so that a figure also reads in grey.
"""

import contextlib
import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from motkit import rundir
from motkit.errors import UserError

ARM_NAMES = {
    "base": "base",
    "std": "STD",
    "mtd": "MTD",
    "posthoc": "post-hoc merge",
    "mot": "MoT",
    "leave_out": "MoT without one",
}


@dataclass(frozen=True)
class Style:
    """How one series is drawn."""

    colour: str
    marker: str
    line: str | tuple[int, tuple[int, ...]] = "-"


_ARMS = {
    "base": Style("#000000", "x", ":"),
    "std": Style("#E69F00", "s", "--"),
    "mtd": Style("#CC79A7", "^", "-."),
    "posthoc": Style("#009E73", "D", (0, (5, 1, 1, 1, 1, 1))),
    "mot": Style("#0072B2", "o", "-"),
    "leave_out": Style("#56B4E9", "v", (0, (3, 1))),
}
# What is no arm (teachers, branches, layers): first the colours that no full line of an arm has.
_SERIES = [
    Style("#D55E00", "o", "-"),
    Style("#56B4E9", "s", "--"),
    Style("#009E73", "^", "-."),
    Style("#CC79A7", "D", ":"),
    Style("#E69F00", "v", (0, (5, 1, 1, 1, 1, 1))),
    Style("#0072B2", "P", (0, (3, 1))),
    Style("#000000", "X", (0, (1, 1))),
    Style("#B8A800", "*", (0, (7, 2))),
]
_RC = {
    "font.family": "DejaVu Sans",  # travels with matplotlib: the same on every machine
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "figure.dpi": 100,
    "savefig.dpi": 200,
    "savefig.facecolor": "white",
    "svg.fonttype": "path",  # text as outlines: looks the same where the font is missing
    "figure.constrained_layout.use": True,
}
BAND_ALPHA = 0.18  # of the band that shows the spread over seeds
DIVERGING = "RdBu_r"
SEQUENTIAL = "cividis"


def arm_style(arm: str) -> Style:
    """Style of an arm: base, std, mtd, posthoc, mot, leave_out; ``mot/CONFIG`` looks like mot with another marker.

    Raises:
        KeyError: there is no such arm.
    """
    if arm.startswith("mot/"):
        return Style(_ARMS["mot"].colour, "P", (0, (4, 1, 1, 1)))
    return _ARMS[arm]


def series_styles(names: Sequence[str]) -> dict[str, Style]:
    """A style for each further series (teachers, branches, …), by its place among all of them.

    An arm's name among them keeps the arm's style. From the ninth on colours repeat with other markers.
    """
    styles, place = {}, 0
    for name in names:
        if name in _ARMS:
            styles[name] = _ARMS[name]
            continue
        style, turn = _SERIES[place % len(_SERIES)], place // len(_SERIES)
        marker = _SERIES[(place + turn) % len(_SERIES)].marker
        styles[name] = Style(style.colour, marker, style.line)
        place += 1
    return styles


@contextlib.contextmanager
def house_style() -> Iterator[None]:
    """matplotlib with the sizes and fonts of this project, whatever the user's own settings are."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_RC)
        yield


def new_figure(rows: int = 1, columns: int = 1, *, width_in: float = 0.0, height_in: float = 0.0) -> tuple[Any, Any]:
    """(figure, 2-D array of axes); 3.6 × 2.8 inches for each pair of axes unless told otherwise.

    Call it inside `house_style`, and save inside it too.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    size = (width_in or max(4.6, 3.6 * columns), height_in or max(3.1, 2.8 * rows))
    figure = Figure(figsize=size)
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def plot_band(
    axes: Any, x: Any, mean: Any, spread: Any, style: Style, label: str | None = None, **options: Any
) -> None:
    """A line with a band of ± ``spread`` (of the seeds) around it; no band where the spread is not known (NaN)."""
    import numpy

    x, mean, spread = (numpy.asarray(values, dtype=float) for values in (x, mean, spread))
    keywords = {"color": style.colour, "linestyle": style.line, "label": label} | options
    axes.plot(x, mean, **keywords)
    if numpy.isfinite(spread).any() and len(x) > 1:
        axes.fill_between(x, mean - spread, mean + spread, color=style.colour, alpha=BAND_ALPHA, linewidth=0)


def log_axis(axes: Any) -> None:
    """A logarithmic y axis whose labels are plain numbers, also where it spans less than a decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    ratio = high / max(low, 1e-300)
    subs: tuple[float, ...] = (1.0,)
    if ratio < 3:
        subs = (1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0)
    elif ratio < 12:
        subs = (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0)
    elif ratio < 3000:
        subs = (1.0, 2.0, 5.0)
    axes.yaxis.set_major_locator(LogLocator(subs=subs))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def to_svg(figure: Any, stem: str) -> str:
    """The figure as the text of an SVG element; ``stem`` keeps its ids apart from those of other figures on a page."""
    import matplotlib

    with house_style():
        matplotlib.rcParams["svg.hashsalt"] = stem
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": "motkit"})
    return text.getvalue()


def to_png(figure: Any) -> bytes:
    """The figure as the bytes of a PNG file."""
    with house_style():
        image = io.BytesIO()
        figure.savefig(image, format="png", metadata={"Software": "motkit"})
    return image.getvalue()


def save(figure: Any, out: Path, stem: str) -> list[Path]:
    """Write ``out/stem.png`` and ``out/stem.svg``, each whole or not at all; the same figure gives the same bytes.

    Raises:
        UserError: ``out`` is no folder, or the disk is full, read-only or failing.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; name a folder for the figures")
    contents = {".png": to_png(figure), ".svg": to_svg(figure, stem).encode()}
    written = []
    with rundir.storage_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        for suffix, content in contents.items():
            target = out / f"{stem}{suffix}"
            partial = rundir.partial_path(target)
            partial.write_bytes(content)
            os.replace(partial, target)
            written.append(target)
    return written
