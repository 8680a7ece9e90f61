"""`motkit report`: a run or a comparison on one page, to keep and to pass on.

The HTML holds everything: figures as inline SVG, no script, nothing from elsewhere. The page with the tokens of single
traces is a file beside it. Markdown has the figures as PNG files beside it.
"""

import html
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from motkit import figures, rundir
from motkit.analysis import agreement, confidence, curves
from motkit.analysis.runs import Run, Runs, open_runs
from motkit.analysis.tables import read_tables, write_tables
from motkit.recipe import Recipe
from motkit.summary import summarise

if TYPE_CHECKING:
    import pandas

FORMATS = ("html", "md")


@dataclass
class Section:
    """A heading and what is under it: ("text", words), ("table", rows), ("code", text), ("figure", stem, words) or
    ("link", file, words)."""

    title: str
    blocks: list[tuple[Any, ...]] = field(default_factory=list)


@dataclass
class Page:
    """What a report says, before it is HTML or Markdown."""

    title: str
    sections: list[Section] = field(default_factory=list)
    drawn: dict[str, Any] = field(default_factory=dict)  # figures by stem


def write_report(
    run: Path, out: Path | None = None, *, form: str = "html", with_confidence: bool = True, progress: bool = True
) -> Path:
    """Write the report of a run or a comparison, and return its file.

    Args:
        run: a run directory or a comparison.
        out: folder to write into; default: ``run/report``.
        form: ``html`` or ``md``.
        with_confidence: score the tokens too, which loads the base and the final student.

    Raises:
        UserError: the folder is neither, or a storage fault.
    """
    runs = open_runs([run])
    out = out or run / "report"
    page = Page(run.resolve().name)
    what = "comparison" if runs.comparison else "run"
    page.sections = [
        _overview(runs, what),
        _scores(runs, page, out),
        _traces(runs.main),
        *_costs(runs, page, out),
        *_agreement(runs.main, page, out),
        *(_confidence(runs.main, page, out, progress) if with_confidence else []),
        _recipe(runs.main),
        _versions(runs.main),
    ]
    target = out / f"report.{form}"
    if form == "md":
        for stem, figure in page.drawn.items():
            figures.save(figure, out, stem)
        rundir.write_text(target, to_markdown(page))
    else:
        rundir.write_text(target, to_html(page))
    return target


# What it says


def _overview(runs: Runs, what: str) -> Section:
    main = runs.main
    teachers = ", ".join(teacher.name for teacher in main.recipe.teachers)
    words = (
        f"A {what} of Merge-of-Thought Distillation (arXiv 2509.08814): {len(main.recipe.teachers)} teachers "
        f"({teachers}), {main.recipe.rounds} rounds of {main.branch_steps} steps per branch, from the student "
        f"'{_short(main.recipe.student)}'."
    )
    section = Section("What this is", [("text", words)])
    if runs.comparison:
        seeds = sorted({run.seed for run in runs.runs})
        section.blocks.append(("text", f"{len(runs.runs)} runs; seeds {', '.join(map(str, seeds))}."))
    if not main.rounds_done:
        section.blocks.append(("text", "No round is done yet."))
    return section


def _scores(runs: Runs, page: Page, out: Path) -> Section:
    section = Section("Scores")
    if runs.comparison:
        section.blocks += _comparison_table(runs)
        for stem, tables, draw, words in (
            (
                "best_teacher",
                curves.compute_best_teacher([(page.title, runs)]),
                curves.draw_best_teacher,
                "Accuracy after distilling from one teacher, beside the base and MoT. Dots: seeds; bars: their "
                "standard deviation.",
            ),
            (
                "training_curves",
                curves.compute_curves(runs, "std", "mtd", "mot", "leave_out"),
                curves.draw_curves,
                "Training loss, held-out loss and accuracy against steps. Bands: standard deviation over seeds.",
            ),
        ):
            _add_figure(section, page, out, stem, tables, draw, words)
        return section
    table = summarise(runs.main.folder.root)
    section.blocks.append(("table", _summary_rows(table)))
    section.blocks.append(("text", "Accuracy with its 95 % interval over problems (1.96 standard errors)."))
    tables = curves.compute_curves(runs, runs.main.arm)
    words = "Training loss, held-out loss and accuracy against steps; the points are the base and the merges."
    _add_figure(section, page, out, "training_curves", tables, curves.draw_curves, words)
    return section


def _add_figure(
    section: Section, page: Page, out: Path, stem: str, tables: Mapping[str, "pandas.DataFrame"], draw: Any, words: str
) -> None:
    write_tables(tables, out / stem)
    page.drawn[stem] = draw(read_tables(out / stem))
    section.blocks.append(("figure", stem, words))


def _comparison_table(runs: Runs) -> list[tuple[Any, ...]]:
    import pandas

    blocks: list[tuple[Any, ...]] = []
    file = runs.root / "compare.csv"
    if file.is_file():
        table = pandas.read_csv(file, keep_default_na=False, na_values=[""])
        rows = [["budget", "arm", "seeds", "accuracy, %", "against the best teacher [95 %]", "held-out loss"]]
        for row in table.to_dict(orient="records"):
            name = " ".join(str(row[key]) for key in ("arm", "teacher", "left_out") if _known(row.get(key)))
            difference = ""
            if _known(row.get("difference")):
                low, high = 100 * row["low"], 100 * row["high"]
                difference = f"{100 * row['difference']:+.1f} [{low:+.1f}, {high:+.1f}]"
            cells = [str(row["budget"]), name, str(row.get("seeds", "")), _percent(row, "accuracy", "accuracy_std")]
            rows.append([*cells, difference, _number(row.get("heldout_loss"))])
        blocks.append(("table", rows))
        for sentence in runs.comparison.get("sentences", []):
            blocks.append(("text", " ".join(str(sentence).split())))
    else:
        table = curves.compute_final(runs.runs)
        order = {arm: place for place, arm in enumerate(curves.ARM_ORDER)}
        table = table.assign(place=table["arm"].map(order)).sort_values(["budget", "place"], kind="stable")
        rows = [["budget", "arm", "seeds", "accuracy, %", "held-out loss"]]
        for place, part in table.groupby(["budget", "name"], sort=False):
            budget, name = typing.cast(tuple[str, str], place)
            mean = {"accuracy": part["accuracy"].mean(), "accuracy_std": part["accuracy"].std()}
            cells = [str(budget), str(name), str(len(part)), _percent(mean, "accuracy", "accuracy_std")]
            rows.append([*cells, _number(part["heldout_loss"].mean())])
        blocks.append(("table", rows))
    blocks.append(("text", "Accuracy: mean ± standard deviation over seeds."))
    return blocks


def _summary_rows(table: "pandas.DataFrame") -> list[list[str]]:
    rows = [["round", "student", "steps", "train loss", "accuracy, % [95 %]", "held-out loss"]]
    for row in table.to_dict(orient="records"):
        interval = ""
        if _known(row["accuracy"]):
            low, high = (100 * (row["accuracy"] + sign * 1.96 * row["standard_error"]) for sign in (-1, 1))
            interval = f"{100 * row['accuracy']:.1f} [{max(low, 0):.1f}, {min(high, 100):.1f}]"
        steps = str(int(row["steps"])) if _known(row["steps"]) else ""
        cells = [str(row["round"]), str(row["name"]), steps, _number(row["train_loss"])]
        rows.append([*cells, interval, _number(row["heldout_loss"])])
    return rows


def _traces(run: Run) -> Section:
    section = Section("Teachers and what was kept of their traces")
    # The arms of a comparison begin with what its filter kept.
    prepared = run.folder.root.parent.parent / "prepared" / "traces" / "report.json"
    report = rundir.read_json(prepared) or rundir.read_json(run.folder.traces / "report.json")
    if not report:
        section.blocks.append(("text", "The traces are not filtered yet."))
        return section
    keys = [key for key in next(iter(report.values())) if isinstance(next(iter(report.values()))[key], int | float)]
    used = [key for key in keys if any(counts.get(key) for counts in report.values())]
    rows = [["teacher", *(key.replace("_", " ") for key in used)]]
    rows += [[name, *(f"{counts.get(key, 0):,}" for key in used)] for name, counts in report.items()]
    section.blocks.append(("table", rows))
    return section


def _costs(runs: Runs, page: Page, out: Path) -> list[Section]:
    section = Section("What it cost")
    tables = curves.compute_costs(runs)
    heading = ["arm", "budget", "branch-steps", "tokens", "TFLOPs", "seconds", "peak memory, GB", "disk, MB"]
    rows = [heading if runs.comparison else [cell for cell in heading if cell != "budget"]]
    for place, part in tables["costs"].groupby(["name", "budget"], sort=False):
        if not part["branch_steps"].sum():
            continue
        mean = part.mean(numeric_only=True)
        name, budget = typing.cast(tuple[str, str], place)
        cells = [str(name), *([str(budget)] if runs.comparison else [])]
        cells += [f"{mean['branch_steps']:,.0f}", f"{mean['tokens']:,.0f}", f"{mean['flops'] / 1e12:.3g}"]
        cells += [
            f"{mean['seconds']:.1f}",
            f"{mean['peak_memory_bytes'] / 1e9:.2f}",
            f"{mean['disk_bytes'] / 1e6:,.1f}",
        ]
        rows.append(cells)
    if len(rows) == 1:
        return []
    section.blocks.append(("table", rows))
    words = (
        "Training and merging, without evaluation; FLOPs are 6·P·tokens; seconds are of the machine that made the run."
    )
    section.blocks.append(("text", words))
    if runs.comparison:
        _add_figure(section, page, out, "cost", tables, curves.draw_costs, "Score against cost, by arm and budget.")
    return [section]


def _agreement(run: Run, page: Page, out: Path) -> list[Section]:
    if not run.rounds_done or len(run.branches(run.rounds_done[-1])) < 2:
        return []
    section = Section("Do the teachers agree?")
    words = "Task vectors of the branches by round and layer, and every branch on every teacher's held-out traces."
    _add_figure(section, page, out, "agreement", agreement.compute(run), agreement.draw_agreement, words)
    return [section]


def _confidence(run: Run, page: Page, out: Path, progress: bool) -> list[Section]:
    if not run.rounds_done:
        return []
    tables = confidence.compute_run(run, progress=progress)
    whole = confidence.confidence_page(
        tables["tokens"], before="base", after=run.name, summary=tables["summary"], groups=tables["groups"]
    )
    rundir.write_text(out / "confidence.html", whole)
    section = Section("Which tokens changed")
    words = "A trace with the tokens that fell or rose, and what falls by kind of token and by who uses it."
    _add_figure(section, page, out, "confidence", tables, confidence.draw_confidence, words)
    section.blocks.append(("table", confidence.groups_text(tables["groups"])))
    section.blocks.append(("link", "confidence.html", "More traces, token by token"))
    return [section]


def _recipe(run: Run) -> Section:
    return Section("Recipe", [("code", public_recipe(run.recipe).to_yaml())])


def public_recipe(recipe: Recipe) -> Recipe:
    """The recipe without the folders of the machine and without private addresses: a report is passed on."""

    def strip(value: Any) -> Any:
        if isinstance(value, dict):
            private = {"base_url": "http://127.0.0.1/v1"}
            return {
                key: private.get(key, inner) if inner and key in private else strip(inner)
                for key, inner in value.items()
            }
        if isinstance(value, list):
            return [strip(inner) for inner in value]
        return _short(value) if isinstance(value, str) else value

    return Recipe.model_validate(strip(recipe.model_dump(mode="json")))


def _versions(run: Run) -> Section:
    environment = rundir.read_json(run.folder.environment)
    rows = [["what", "version"]]
    rows += [[name, str(version)] for name, version in environment.get("versions", {}).items()]
    for key in ("python", "motkit_commit", "platform", "devices", "cores", "threads"):
        value = environment.get(key)
        if value is not None:
            rows.append([key.replace("_", " "), ", ".join(value) if isinstance(value, list) else str(value)])
    return Section("Versions", [("table", rows)])


def _short(value: str) -> str:
    return Path(value).name if Path(value).is_absolute() else value


def _known(value: Any) -> bool:
    return value is not None and str(value) not in {"nan", "<NA>", "", "None"}


def _number(value: Any) -> str:
    return f"{float(value):.4g}" if _known(value) else ""


def _percent(row: Mapping[Any, Any], mean: str, spread: str) -> str:
    if not _known(row.get(mean)):
        return ""
    around = f" ± {100 * row[spread]:.1f}" if _known(row.get(spread)) else ""
    return f"{100 * row[mean]:.1f}{around}"


# How it is written

_STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { font: 16px/1.55 system-ui, sans-serif; color: #222; background: #fff; margin: 0 auto; max-width: 64rem;
  padding: 1rem 1rem 4rem; }
h1 { font-size: 1.5rem; margin: .6rem 0 0; overflow-wrap: anywhere; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .4rem; }
nav { font-size: .9rem; } nav a { margin-right: .9rem; display: inline-block; } a { color: #005a8c; }
.wide { overflow-x: auto; margin: .8rem 0; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #e4e4e4; white-space: nowrap; }
th.words, td.words { text-align: left; }
figure { margin: 1rem 0; } figure > div { overflow-x: auto; }
figure svg { max-width: 100%; height: auto; display: block; }
figcaption { color: #555; font-size: .88rem; margin-top: .3rem; }
pre { background: #f6f6f6; padding: .8rem; overflow-x: auto; font-size: .82rem; line-height: 1.4; }
@media (max-width: 640px) { figure .large svg { min-width: 620px; } }
@media print { body { font-size: 11px; max-width: none; padding: 0; } nav { display: none; }
  figure, table { break-inside: avoid; } figure .large svg { min-width: 0; } details > * { display: block; }
  pre { white-space: pre-wrap; } }
"""


def to_html(page: Page) -> str:
    """One self-contained page."""
    parts, links = [], []
    for number, section in enumerate(page.sections):
        links.append(f'<a href="#s{number}">{html.escape(section.title)}</a>')
        parts.append(f'<section id="s{number}"><h2>{html.escape(section.title)}</h2>')
        parts += [_block_html(page, block) for block in section.blocks]
        parts.append("</section>")
    title = html.escape(f"motkit: {page.title}")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>{title}</title><style>{_STYLE}</style></head><body>\n<h1>{html.escape(page.title)}</h1>\n"
        f"<nav>{''.join(links)}</nav>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def _block_html(page: Page, block: Sequence[Any]) -> str:
    kind, content = block[0], block[1]
    if kind == "text":
        return f"<p>{html.escape(content)}</p>"
    if kind == "code":
        return f"<pre>{html.escape(content)}</pre>"
    if kind == "link":
        return f'<p><a href="{html.escape(content)}">{html.escape(block[2])}</a></p>'
    if kind == "figure":
        svg = figures.to_svg(page.drawn[content], content)
        svg = svg[svg.index("<svg") :].replace("<svg ", f'<svg role="img" aria-label="{html.escape(block[2])}" ', 1)
        size = "large" if page.drawn[content].get_figwidth() > 7 else "small"
        return f'<figure><div class="{size}">{svg}</div><figcaption>{html.escape(block[2])}</figcaption></figure>'
    heading, *rows = content
    words = [any(cell[:1].isalpha() for cell in column) for column in zip(*rows, strict=True)] or [False] * len(heading)

    def line(cells: Sequence[str], tag: str) -> str:
        starts = [f'<{tag} class="words">' if wordy else f"<{tag}>" for wordy in words]
        return "".join(f"{start}{html.escape(cell)}</{tag}>" for start, cell in zip(starts, cells, strict=True))

    lines = [f"<tr>{line(heading, 'th')}</tr>", *(f"<tr>{line(row, 'td')}</tr>" for row in rows)]
    return '<div class="wide"><table>' + "\n".join(lines) + "</table></div>"


def to_markdown(page: Page) -> str:
    """The same in Markdown, with the figures as files."""
    parts = [f"# {_plain(page.title)}"]
    for section in page.sections:
        parts.append(f"## {_plain(section.title)}")
        for block in section.blocks:
            kind, content = block[0], block[1]
            if kind == "text":
                parts.append(_plain(content))
            elif kind == "code":
                parts.append(f"```yaml\n{content.rstrip()}\n```")
            elif kind == "link":
                parts.append(f"[{_plain(block[2])}]({content})")
            elif kind == "figure":
                parts.append(f"![{_plain(block[2])}]({content}.png)\n\n{_plain(block[2])}")
            else:
                heading, *rows = content
                lines = ["| " + " | ".join(map(_plain, heading)) + " |", "|" + " --- |" * len(heading)]
                lines += ["| " + " | ".join(map(_plain, row)) + " |" for row in rows]
                parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _plain(text: str) -> str:
    """Text that Markdown leaves as it is."""
    return html.escape(text, quote=False).replace("|", "\\|").replace("*", "\\*").replace("[", "\\[").replace("\n", " ")
