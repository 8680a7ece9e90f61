"""The ``motkit`` command: arguments in, tables out. No logic; heavy imports inside the commands."""

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from motkit import __version__
from motkit.errors import UserError

if TYPE_CHECKING:
    import pandas


class _Group(click.Group):
    """Prints a `UserError` as it is and exits 2; an interruption exits 130; anything else is a bug and shows itself."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as error:
            for line in str(error).splitlines():
                click.echo(line if line.startswith(" ") else f"error: {line}", err=True)
            ctx.exit(2)
        except KeyboardInterrupt:
            click.echo("interrupted: what is published stays; run the same command again to go on", err=True)
            ctx.exit(130)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="motkit")
def main() -> None:
    """Merge-of-Thought Distillation: branch a student per teacher, fine-tune, merge, repeat.

    \b
    motkit recipes                     what is bundled
    motkit round quickstart --all      run a recipe
    motkit generate real-teachers-cpu  ask its teachers first, where they are models
    motkit status runs/quickstart      how it went
    """


@main.command("round")
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--run", "run", type=click.Path(path_type=Path), help="Run directory.  [default: runs/<recipe's name>]")
@click.option("--rounds", type=click.IntRange(min=1), help="Do this many unfinished rounds.  [default: 1]")
@click.option("--all", "all_rounds", is_flag=True, help="Do all unfinished rounds.")
@click.option("--dry-run", is_flag=True, help="Say what each stage would do, and do nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the table as JSON.")
def round_command(
    recipe: str,
    overrides: Sequence[str],
    run: Path | None,
    rounds: int | None,
    all_rounds: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Do the next unfinished round of RECIPE (a path, or the bare name of a bundled one).

    KEY=VALUE overrides a field: train.max_steps=10, student=path/to/checkpoint, teachers.0.traces=mine.jsonl.
    Run again to go on: what is done is skipped, what was interrupted resumes.
    """
    if all_rounds and rounds is not None:
        raise click.UsageError("--all and --rounds exclude each other")
    from motkit import recipe as recipes
    from motkit.rounds import plan_rounds, run_rounds

    loaded = recipes.load_recipe(recipe, overrides)
    folder = run or Path("runs") / recipes.recipe_name(recipes.recipe_path(recipe))
    wanted = None if all_rounds else rounds or 1
    if dry_run:
        _print_plan(plan_rounds(loaded, folder, rounds=wanted), folder, as_json)
        return
    table = run_rounds(loaded, folder, rounds=wanted, progress=sys.stderr.isatty())
    if not as_json:
        _print_report(folder)
    _print_summary(table, folder, as_json)


@main.command("generate")
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--run", "run", type=click.Path(path_type=Path), help="Run directory.  [default: runs/<recipe's name>]")
@click.option("--teacher", "teachers", multiple=True, metavar="NAME", help="Ask this teacher alone; repeat it.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def generate_command(
    recipe: str, overrides: Sequence[str], run: Path | None, teachers: Sequence[str], as_json: bool
) -> None:
    """Ask the teachers of RECIPE that have a model, into RUN/generated, and say what the filter keeps of each.

    Run again to go on: what has arrived is not asked for again; a changed prompt, sampling or model is.
    """
    from motkit import recipe as recipes
    from motkit.filter import REPORT_HEADINGS, report_rows
    from motkit.generate import generate_traces
    from motkit.rounds import preview_traces
    from motkit.verify import verify_exact

    loaded = recipes.load_recipe(recipe, overrides)
    folder = run or Path("runs") / recipes.recipe_name(recipes.recipe_path(recipe))
    # For the progress bar: quick, and nearly what the recipe's verifier will say when the traces are filtered.
    verify = verify_exact if loaded.filter.verifier != "none" else None
    report = generate_traces(loaded, folder, teachers=teachers, verify=verify, progress=sys.stderr.isatty())
    if as_json:
        import json

        kept = preview_traces(loaded, folder, list(report))
        click.echo(json.dumps({name: {**entry, "traces": kept[name]} for name, entry in report.items()}))
        return
    counted = ["asked", "answered", "truncated", "rejected", "prompt_tokens", "tokens"]
    rows = [
        [
            name,
            *(_count(entry[key]) for key in counted),
            f"{entry['seconds']:.0f}",
            f"{entry['tokens'] / entry['asking_seconds']:.0f}" if entry["asking_seconds"] else "",
            f"{entry['cost']:.2f}" if entry["cost"] is not None else "",
        ]
        for name, entry in report.items()
    ]
    headings = ["teacher", *(key.replace("_", " ") for key in counted), "seconds", "tokens/s", "cost"]
    _print_table(f"{folder}/generated", headings, rows)
    kept = preview_traces(loaded, folder, list(report))
    _print_table(f"what the filter keeps (verifier {loaded.filter.verifier})", REPORT_HEADINGS, report_rows(kept))


@main.command("merge")
@click.argument("config")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--base", type=click.Path(path_type=Path), help="Checkpoint for $student: the merge's base model.")
@click.option("--branch", "branches", type=click.Path(path_type=Path), multiple=True, help="Checkpoint; repeat it.")
@click.option("--dtype", help="Type of the written weights, instead of the config's out_dtype.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of methods that draw at random.")
@click.option("--device", default="cpu", show_default=True, help="Where the arithmetic is done.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def merge_command(
    config: str,
    out: Path,
    base: Path | None,
    branches: Sequence[Path],
    dtype: str | None,
    seed: int,
    device: str,
    as_json: bool,
) -> None:
    """Merge checkpoints as the mergekit CONFIG says (a path or a bundled name: mot, linear, ties, …) into OUT."""
    from motkit.merge import merge_checkpoints

    report = merge_checkpoints(
        config, out, base=base, branches=branches, out_dtype=dtype, seed=seed, device=device,
        quiet=not sys.stderr.isatty(),
    )  # fmt: skip
    if as_json:
        import dataclasses
        import json

        click.echo(json.dumps(dataclasses.asdict(report), default=str))
        return
    click.echo(
        f"{report.out}: {report.method} of {report.num_inputs} checkpoints, {report.num_tensors} tensors, "
        f"{report.parameters / 1e6:.1f} M parameters, {report.bytes_written / 1e6:.0f} MB written in "
        f"{report.seconds:.1f} s"
    )


@main.command("verify")
@click.argument("traces", type=click.Path(path_type=Path))
@click.option("--problems", required=True, type=click.Path(path_type=Path), help="JSONL of the problems they answer.")
@click.option("--verifier", default="math", show_default=True, help="math, exact, choice, reasoning_gym:<task>, none.")
@click.option("--time-limit", "time_limit_s", default=5.0, show_default=True, help="Processor seconds for one answer.")
@click.option("--workers", type=click.IntRange(min=1), help="Worker processes.  [default: one per core, at most 8]")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line for every trace.")
def verify_command(
    traces: Path, problems: Path, verifier: str, time_limit_s: float, workers: int | None, as_json: bool
) -> None:
    """Say of every trace in TRACES (JSONL) whether its answer is right.

    A problem's own 'verifier' goes before --verifier. An answer that cannot be judged (cut off, no end of its
    reasoning, too hard to compare in time) is neither right nor wrong: null.
    """
    import json
    from collections import Counter

    from tqdm import tqdm

    from motkit.traces import read_problems, stream_traces
    from motkit.verify import Verifier

    known = read_problems(problems)
    counts: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    with Verifier(verifier, workers=workers, time_limit_s=time_limit_s) as judge:
        judged = judge.judge(stream_traces(traces, known), known)
        for trace, verdict in tqdm(judged, unit="trace", file=sys.stderr, disable=not sys.stderr.isatty(), leave=False):
            counts[{True: "right", False: "wrong", None: "unverifiable"}[verdict.correct]] += 1
            if verdict.correct is not True:
                reasons[verdict.reason if len(reasons) < 1000 else "other reasons"] += 1
            if as_json:
                fields = {"problem_id": trace.problem_id, "sample": trace.sample, "correct": verdict.correct}
                line = {**fields, "extracted": verdict.extracted, "reason": verdict.reason}
                click.echo(json.dumps(line, ensure_ascii=False))
    if as_json:
        return
    total = counts.total()
    rows = [[name, _count(counts[name]), f"{counts[name] / total:.1%}"] for name in ("right", "wrong", "unverifiable")]
    rows += [
        [f"  {_printable(reason)}", _count(count), f"{count / total:.1%}"] for reason, count in reasons.most_common(10)
    ]
    _print_table(f"{traces}: {total:,} traces, verifier {verifier}", ["verdict", "traces", "share"], rows)


@main.command("import")
@click.argument("source")
@click.option("--to", "out", required=True, type=click.Path(path_type=Path), help="JSONL to write.")
@click.option("--kind", type=click.Choice(["traces", "problems"]), default="traces", show_default=True)
@click.option("--columns", "columns", multiple=True, metavar="KEY=COLUMN", help="Where KEY is found; repeat it.")
@click.option(
    "--problems", type=click.Path(path_type=Path), help="JSONL of our problems: traces of others are left out."
)
@click.option("--count", type=click.IntRange(min=1), help="With --kind problems: a random subset of this many.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the subset.")
def import_command(
    source: str,
    out: Path,
    kind: str,
    columns: Sequence[str],
    problems: Path | None,
    count: int | None,
    seed: int,
) -> None:
    """Write traces or problems of SOURCE as ours.

    SOURCE is a JSONL file or a dataset of the hub (hf://owner/name[/config][:split]), in messages, prompt/completion or
    ShareGPT form. KEYs for traces: id, sample, messages, conversations, prompt, response, reasoning, finish_reason; for
    problems: id, messages, conversations, prompt, answer, verifier, metadata.
    """
    from motkit import importing, traces

    mapping = {}
    for pair in columns:
        key, equals, column = pair.partition("=")
        if not equals or not key or not column:
            raise UserError(f"--columns {pair!r}: expected KEY=COLUMN, such as id=problem_id")
        mapping[key] = column
    if out.exists():
        raise UserError(f"{out}: exists already; delete it or name another file")
    if kind == "problems":
        found = {problem.id: problem for problem in importing.import_problems(source, mapping)}
        if count is not None:
            found = traces.sample_problems(found, count, seed)
        written = traces.write_jsonl(out, found.values())
    else:
        known = traces.read_problems(problems) if problems else None
        written = traces.write_jsonl(out, importing.import_traces(source, mapping, known))
    click.echo(f"{out}: {written:,} {kind} written")


@main.command("status")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the table as JSON.")
def status_command(run: Path, as_json: bool) -> None:
    """Table what the run directory RUN holds: each branch and merge, its cost and its scores."""
    from motkit.summary import summarise

    table = summarise(run)
    if not as_json:
        _print_report(run)
    _print_summary(table, run, as_json)


@main.command("report")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="Folder to write into.  [default: RUN/report]")
@click.option("--format", "form", type=click.Choice(["html", "md"]), default="html", show_default=True)
@click.option("--confidence/--no-confidence", default=True, help="Score tokens too: loads the base and the student.")
def report_command(run: Path, out: Path | None, form: str, confidence: bool) -> None:
    """Write what a run or a comparison was and how it went on one page, with figures, and print its path.

    The HTML is one file without scripts that loads nothing from elsewhere.
    """
    from motkit.analysis.report import write_report

    click.echo(str(write_report(run, out, form=form, with_confidence=confidence, progress=sys.stderr.isatty())))


@main.group("recipes", invoke_without_command=True)
@click.pass_context
def recipes_group(context: click.Context) -> None:
    """List the bundled recipes and merge configs; 'copy' writes one to edit."""
    if context.invoked_subcommand:
        return
    from motkit.bundle import bundled_files

    for kind, title in (("recipes", "recipes"), ("merge_configs", "merge configs")):
        click.echo(f"{title}:")
        for name, path in bundled_files(kind).items():
            first = path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
            click.echo(f"  {name:<22} {first}")


@recipes_group.command("copy")
@click.argument("name")
@click.argument("to", required=False, type=click.Path(path_type=Path))
def recipes_copy(name: str, to: Path | None) -> None:
    """Write the bundled recipe or merge config NAME to TO (default: the working folder) to edit."""
    from motkit.bundle import bundled_files

    known = {**bundled_files("merge_configs"), **bundled_files("recipes")}
    if name not in known:
        raise UserError(f"{name}: no bundled recipe or merge config of that name; known: {', '.join(known)}")
    source = known[name].parent if known[name].name == "recipe.yaml" else known[name]
    target = to or Path(source.name)
    if target.exists():
        raise UserError(f"{target}: exists already; delete it or name another place")
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("data", "data.partial", "__pycache__"))
    else:
        shutil.copyfile(source, target)
    click.echo(str(target))


def _print_plan(plan: Sequence[Any], folder: Path, as_json: bool) -> None:
    if as_json:
        import dataclasses
        import json

        click.echo(json.dumps([dataclasses.asdict(stage) for stage in plan]))
        return
    rows = [
        [
            stage.stage,
            stage.action,
            _count(stage.rows),
            _count(stage.steps),
            _count(stage.tokens),
            _bytes(stage.disk_bytes),
        ]
        for stage in plan
    ]
    total = sum(stage.disk_bytes or 0 for stage in plan if stage.action != "skip")
    _print_table(f"{folder}: what would be done", ["stage", "action", "rows", "steps", "≈ tokens", "disk"], rows)
    click.echo(f"disk to be written: {_bytes(total) or '0 MB'}, and a branch's resumable checkpoints while it trains")


def _print_summary(table: "pandas.DataFrame", folder: Path, as_json: bool) -> None:
    if as_json:
        click.echo(table.to_json(orient="records"))
        return
    rows = []
    for row in table.to_dict(orient="records"):
        accuracy = f"{100 * row['accuracy']:.1f} ± {100 * row['standard_error']:.1f}" if _known(row["accuracy"]) else ""
        rows.append(
            [
                str(row["round"]),
                row["name"],
                _count(row["steps"]),
                _count(row["tokens"]),
                f"{row['seconds']:.1f}" if _known(row["seconds"]) else "",
                f"{row['train_loss']:.3f}" if _known(row["train_loss"]) else "",
                accuracy,
                f"{row['heldout_loss']:.4f}" if _known(row["heldout_loss"]) else "",
            ]
        )
    headings = ["round", "student", "steps", "tokens", "seconds", "train loss", "accuracy %", "held-out loss"]
    _print_table(str(folder), headings, rows, bold="merged")
    final = folder / "final"
    click.echo(
        f"student: {final}" if final.exists() else "student: not published yet; 'motkit round … --all' finishes it"
    )


def _print_report(folder: Path) -> None:
    """Table what the filter kept of each teacher, if it has run."""
    from motkit.filter import REPORT_HEADINGS, report_rows
    from motkit.rundir import RunDir, read_json

    report = read_json(RunDir(folder).traces / "report.json")
    if report:
        _print_table(f"{folder}: traces", REPORT_HEADINGS, report_rows(report))


def _print_table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]], bold: str = "") -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    console = Console(file=sys.stdout)
    if not console.is_terminal:
        console = Console(file=sys.stdout, width=160)
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    used = [number for number in range(len(headings)) if any(row[number] for row in rows)]
    for number in used:
        table.add_column(headings[number], justify="left" if number < 2 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(row[number] for number in used), style="bold" if bold and bold in row else "")
    click.echo(title)
    console.print(table)


def _printable(text: str) -> str:
    """A stranger's text in one line of a terminal: no control characters, no markup of rich's."""
    return "".join(char if char.isprintable() else " " for char in text)[:80].replace("[", "\\[")


def _known(value: Any) -> bool:
    # NaN and pandas.NA are not equal to themselves (comparing NA gives NA, which has no truth value).
    return value is not None and str(value) not in {"nan", "<NA>"}


def _count(value: Any) -> str:
    return f"{int(value):,}" if _known(value) else ""


def _bytes(value: int | None) -> str:
    if not value:
        return ""
    return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.1f} MB"
