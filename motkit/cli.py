"""The ``motkit`` command: arguments in, tables out. No logic; heavy imports inside the commands."""

import itertools
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
    from motkit.verify import Verifier

    loaded = recipes.load_recipe(recipe, overrides)
    folder = run or Path("runs") / recipes.recipe_name(recipes.recipe_path(recipe))
    with Verifier(loaded.filter.verifier, workers=1) as judge:  # for the progress bar
        report = generate_traces(loaded, folder, teachers=teachers, verify=judge.one, progress=sys.stderr.isatty())
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
            f"{entry['asking_seconds']:.0f}",
            f"{entry['tokens'] / entry['asking_seconds']:.0f}" if entry["asking_seconds"] else "",
            f"{entry['cost']:.2f}" if entry["cost"] is not None else "",
        ]
        for name, entry in report.items()
    ]
    headings = ["teacher", *(key.replace("_", " ") for key in counted), "seconds", "of them asking", "tokens/s", "cost"]
    _print_table(f"{folder}/generated", headings, rows)
    kept = preview_traces(loaded, folder, list(report))
    _print_table(f"what the filter keeps (verifier {loaded.filter.verifier})", REPORT_HEADINGS, report_rows(kept))


@main.command("merge")
@click.argument("config")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--base", type=click.Path(path_type=Path), help="Checkpoint for $student: the merge's base model.")
@click.option(
    "--branch",
    "branches",
    type=click.Path(path_type=Path),
    multiple=True,
    help="Checkpoint or LoRA adapter; repeat it.",
)
@click.option("--dtype", help="Type of the written weights, instead of the config's out_dtype.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of methods that draw at random.")
@click.option("--device", default="cpu", show_default=True, help="Where the arithmetic is done.")
@click.option("--allow-pickle", is_flag=True, help="Also read pickled weights (tensors only, no code).")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def merge_command(
    config: str,
    out: Path,
    base: Path | None,
    branches: Sequence[Path],
    dtype: str | None,
    seed: int,
    device: str,
    allow_pickle: bool,
    as_json: bool,
) -> None:
    """Merge checkpoints as the mergekit CONFIG says (a path or a bundled name: mot, linear, ties, …) into OUT.

    A branch may be a LoRA adapter of peft's, trained on --base: it stands for base + scaling·B·A.
    """
    from motkit.merge import merge_checkpoints

    report = merge_checkpoints(
        config, out, base=base, branches=branches, out_dtype=dtype, seed=seed, device=device,
        quiet=not sys.stderr.isatty(), allow_pickle=allow_pickle,
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


@main.command("evaluate")
@click.argument("student")
@click.option("--problems", help="JSONL of problems, or hf://owner/name of the hub; needed without a preset.")
@click.option("--preset", help="aime24 or aime25: avg@16, temperature 0.6, top_p 0.95, 32,768 tokens.")
@click.option("--verifier", help="math, exact, choice, reasoning_gym:<task>.  [default: math]")
@click.option("--samples", type=click.IntRange(min=1), help="k: answers to each problem.  [default: 1]")
@click.option("--temperature", type=float, help="0 is greedy.  [default: 0]")
@click.option("--top-p", type=float, help="[default: 1]")
@click.option("--max-tokens", type=click.IntRange(min=1), help="Of an answer.  [default: 1024]")
@click.option("--traces", "traces", multiple=True, metavar="NAME=FILE", help="Held-out traces: their loss; repeat it.")
@click.option("--engine", type=click.Choice(["auto", "transformers", "vllm"]), default="auto", show_default=True)
@click.option(
    "--batch-size", type=click.IntRange(min=1), default=32, show_default=True, help="Problems (transformers)."
)
@click.option("--seed", type=int, default=42, show_default=True)
@click.option("--tasks", help="Also lm-eval's tasks, with commas between: mmlu,gpqa,…")
@click.option("--base", help="With --tasks: the student before, to table the differences.")
@click.option("--num-fewshot", type=click.IntRange(min=0), help="With --tasks; lm-eval's MMLU is 0-shot without it.")
@click.option("--limit", type=click.IntRange(min=1), help="With --tasks: documents of each task.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder.  [default: evaluations/<student>]")
@click.option("--json", "as_json", is_flag=True, help="Print what evaluation.json holds.")
def evaluate_command(
    student: str,
    problems: str | None,
    preset: str | None,
    verifier: str | None,
    samples: int | None,
    temperature: float | None,
    top_p: float | None,
    max_tokens: int | None,
    traces: Sequence[str],
    engine: str,
    batch_size: int,
    seed: int,
    tasks: str | None,
    base: str | None,
    num_fewshot: int | None,
    limit: int | None,
    out: Path | None,
    as_json: bool,
) -> None:
    """Score STUDENT (a checkpoint, a hub id or a run directory) on held-out problems: avg@k, pass@k, maj@k.

    The answers and what was said of each are in OUT/evaluation/student.jsonl: every score can be computed from it. Run
    again to go on.
    """
    import json

    from motkit.recipe import read_evaluation
    from motkit.scoring import evaluate_student

    folder = out or Path("evaluations") / Path(student).name
    sampling = {"temperature": temperature, "top_p": top_p, "max_tokens": max_tokens}
    values: dict[str, Any] = {"preset": preset, "problems": problems, "verifier": verifier, "samples": samples}
    values |= {"sampling": {key: value for key, value in sampling.items() if value is not None} or None}
    values |= {"traces": dict(_pair("--traces", pair, "NAME=FILE") for pair in traces) or None}
    values |= {"engine": engine, "batch_size": batch_size}
    found: dict[str, Any] = {}
    if problems or preset or traces or not tasks:
        settings = read_evaluation({key: value for key, value in values.items() if value is not None})
        found = evaluate_student(student, settings, folder, seed=seed, progress=sys.stderr.isatty())
        if not as_json:
            _print_scores(found, folder)
    if tasks:
        from motkit.general import describe, evaluate_tasks
        from motkit.scoring import student_checkpoint

        named = {"base": base, "student": student} if base else {"student": student}
        table = evaluate_tasks(
            {name: student_checkpoint(model) for name, model in named.items()},
            [task.strip() for task in tasks.split(",")],
            folder,
            engine="hf" if engine == "transformers" else engine,
            limit=limit,
            num_fewshot=num_fewshot,
            seed=seed,
            progress=sys.stderr.isatty(),
        )
        found["tasks"] = json.loads(table.to_json(orient="records"))
        if not as_json:
            for line in describe(table):
                click.echo(line)
            click.echo(f"tables: {folder / 'general.csv'}")
    if as_json:
        click.echo(json.dumps(found))


@main.command("compare")
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--arms", default="base,std,mtd,posthoc,mot", show_default=True, help="Also mot/CONFIG: another merge.")
@click.option("--seeds", default="0,1,2", show_default=True, help="A run of every arm for each.")
@click.option(
    "--budget",
    "budgets",
    multiple=True,
    type=click.Choice(["steps", "compute"]),
    help="What is equal; both with two.  [default: steps]",
)
@click.option(
    "--leave-out", "leave_out", multiple=True, metavar="NAME", help="Also MoT without this teacher; repeat it."
)
@click.option("--noisy", metavar="NAME", help="Give this teacher's answers to the wrong problems, filter off.")
@click.option(
    "--clean", type=click.Path(path_type=Path), help="With --noisy: the comparison to say what was lost against."
)
@click.option("--run", "run", type=click.Path(path_type=Path), help="Folder.  [default: runs/<recipe's name>-compare]")
@click.option("--dry-run", is_flag=True, help="Say what would be run, and do nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the tables as JSON.")
def compare_command(
    recipe: str,
    overrides: Sequence[str],
    arms: str,
    seeds: str,
    budgets: Sequence[str],
    leave_out: Sequence[str],
    noisy: str | None,
    clean: Path | None,
    run: Path | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Compare MoT with what one would do otherwise: RECIPE's student and teachers, several seeds, one stopping rule.

    Every arm is the same loop with other settings: base (no training), std (one teacher; a run for each), mtd (all
    traces mixed), posthoc (one merge at the end), mot. Budget 'steps' gives every branch the same number of steps,
    'compute' gives every arm as many branch-steps as MoT. Run again to go on.
    """
    from motkit import recipe as recipes
    from motkit.compare import arm_recipe, plan_comparison, run_comparison

    loaded = recipes.load_recipe(recipe, overrides)
    name = recipes.recipe_name(recipes.recipe_path(recipe)) + "-compare" + (f"-noisy-{noisy}" if noisy else "")
    folder = run or Path("runs") / name
    if not all(seed.strip().isdigit() for seed in seeds.split(",")):
        raise UserError(f"--seeds {seeds}: expected whole numbers with commas between, such as 0,1,2")
    chosen: dict[str, Any] = {
        "arms": [arm.strip() for arm in arms.split(",")],
        "seeds": [int(seed) for seed in seeds.split(",")],
        "budgets": budgets or ("steps",),
        "leave_out": leave_out,
    }
    if dry_run:
        rows = []
        for planned in plan_comparison(loaded, **chosen):
            settings = arm_recipe(loaded, planned)
            steps = 0 if planned.arm == "base" else settings.rounds * settings.train["max_steps"]
            rows.append(
                [planned.run, planned.label, planned.budget, _count(steps * len(settings.branch_names) or None)]
            )
        _print_table(f"{folder}: what would be run", ["run", "arm", "budget", "branch-steps"], rows)
        return
    result = run_comparison(loaded, folder, **chosen, noisy=noisy, clean=clean, progress=sys.stderr.isatty())
    _print_comparison(result, folder, as_json)


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

    mapping = dict(_pair("--columns", pair, "KEY=COLUMN, such as id=problem_id") for pair in columns)
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
@click.option("--verbose", is_flag=True, help="Also what every stage spent, and how far the branches agree.")
@click.option("--json", "as_json", is_flag=True, help="Print the table as JSON; with --verbose also the costs.")
def status_command(run: Path, verbose: bool, as_json: bool) -> None:
    """Table what RUN (a run directory or a comparison) holds: each branch and merge, its scores, and what all cost."""
    if (run / "comparison.json").is_file():
        from motkit.compare import summarise_comparison

        _print_comparison(summarise_comparison(run), run, as_json)
        return
    from motkit.summary import ledger, summarise, total_costs

    table, costs = summarise(run), ledger(run)
    if as_json and verbose:
        import json

        found = {"students": table, "costs": costs}
        click.echo(json.dumps({key: json.loads(value.to_json(orient="records")) for key, value in found.items()}))
        return
    if not as_json:
        _print_report(run)
    if verbose and not as_json:
        _print_agreement(run)
    _print_summary(table, run, as_json)
    if not as_json and len(costs):
        _print_costs(f"{run}: what it cost", total_costs(costs).assign(stage=lambda totals: totals["kind"]))
        if verbose:
            _print_costs(f"{run}: by stage", costs)


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
    changes = [stage.disk_bytes or 0 for stage in plan if stage.action != "skip"]
    total = sum(change for change in changes if change > 0)
    _print_table(f"{folder}: what would be done", ["stage", "action", "rows", "steps", "≈ tokens", "disk"], rows)
    click.echo(f"disk to be written: {_bytes(total) or '0 MB'}, and a branch's resumable checkpoints while it trains")
    if any(change < 0 for change in changes):
        most = max(itertools.accumulate(changes))
        click.echo(f"of it at one time at most {_bytes(most) or '0 MB'}, in the end {_bytes(sum(changes)) or '0 MB'}")


def _print_summary(table: "pandas.DataFrame", folder: Path, as_json: bool) -> None:
    if as_json:
        click.echo(table.to_json(orient="records"))
        return
    rows = []
    for row in table.to_dict(orient="records"):
        error = f" ± {100 * row['standard_error']:.1f}" if _known(row["standard_error"]) else ""
        accuracy = f"{100 * row['accuracy']:.1f}{error}" if _known(row["accuracy"]) else ""
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


def _pair(option: str, text: str, what: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key or not value:
        raise UserError(f"{option} {text!r}: expected {what}")
    return key, value


def _print_scores(entry: dict[str, Any], folder: Path) -> None:
    """A line per score of one evaluation."""
    scores, rows = entry["scores"], []
    if "accuracy" in scores:
        k = scores["samples"]
        error = f"of {scores['problems']} problem{'s' * (scores['problems'] > 1)}"
        if scores["standard_error"] is not None:
            error = f"± {100 * scores['standard_error']:.1f} (standard error over {scores['problems']} problems)"
        rows.append([f"avg@{k}", f"{100 * scores['accuracy']:.1f} %", error])
        if k > 1:
            rows += [[f"pass@{at}", f"{100 * value:.1f} %", ""] for at, value in scores["pass_at"].items()]
            rows += [[f"maj@{at}", f"{100 * value:.1f} %", ""] for at, value in scores["maj_at"].items()]
        rows.append(["truncated", f"{100 * scores['truncated']:.1f} %", "of the answers reached the token limit"])
        rows.append(["unverifiable", f"{100 * scores['unverifiable']:.1f} %", "finished, but cannot be judged; wrong"])
        rows.append(["mean tokens", f"{scores['mean_tokens']:.0f}", "of an answer"])
    if "heldout_loss" in scores:
        rows.append(["held-out loss", f"{scores['heldout_loss']:.4f}", "nats a token"])
        by_set = scores["heldout_loss_by_set"]
        rows += [[f"  {name}", f"{loss:.4f}", ""] for name, loss in by_set.items() if len(by_set) > 1]
    cost = entry["cost"]
    rows.append(["seconds", f"{cost['seconds']:.1f}", f"{_bytes(cost['peak_memory_bytes'])}, engine {entry['engine']}"])
    _print_table(str(folder), ["score", "value", ""], rows)


def _print_costs(title: str, costs: "pandas.DataFrame") -> None:
    headings = [
        "stage",
        "branch-steps",
        "tokens",
        "TFLOPs",
        "seconds",
        "peak memory",
        "read",
        "written",
        "disk",
        "price",
    ]

    def size(row: Any, key: str) -> str:
        return _bytes(int(row[key])) if _known(row[key]) else ""

    cells = [
        [
            row["stage"],
            _count(row["branch_steps"]),
            _count(row["tokens"]),
            f"{row['flops'] / 1e12:,.2f}" if _known(row["flops"]) else "",
            f"{row['seconds']:,.1f}" if _known(row["seconds"]) else "",
            *(size(row, key) for key in ("peak_memory_bytes", "bytes_read", "bytes_written", "disk_bytes")),
            f"{row['price']:.2f}" if _known(row["price"]) else "",
        ]
        for row in costs.to_dict(orient="records")
    ]
    _print_table(title, headings, cells, bold="total")


def _print_comparison(comparison: Any, folder: Path, as_json: bool) -> None:
    from motkit.compare import arm_label, caveats

    if as_json:
        import json

        arms, runs = (json.loads(table.to_json(orient="records")) for table in (comparison.arms, comparison.runs))
        click.echo(json.dumps({"arms": arms, "runs": runs, "sentences": comparison.sentences}))
        return
    titles = {"steps": "equal steps per branch", "compute": "equal compute"}
    peer = "the best teacher" if comparison.arms["best_teacher"].any() else "the base"
    headings = ["arm", "seeds", "accuracy %", f"against {peer}", "lost", "held-out loss", "branch-steps"]
    headings += ["tokens", "TFLOPs", "seconds", "memory", "disk"]
    for budget in dict.fromkeys(comparison.arms["budget"]):
        rows = []
        for row in comparison.arms[comparison.arms["budget"] == budget].to_dict(orient="records"):
            spread = f" ± {100 * row['accuracy_std']:.1f}" if _known(row["accuracy_std"]) else ""
            against = peer if row["best_teacher"] else ""
            if _known(row.get("difference")):
                interval = f"[{100 * row['low']:+.1f}, {100 * row['high']:+.1f}]"
                against = f"{100 * row['difference']:+.1f} {interval}"
            teacher, left_out = (row[key] if _known(row[key]) else None for key in ("teacher", "left_out"))
            rows.append(
                [
                    arm_label(row["arm"], teacher, left_out),
                    str(row["seeds"]),
                    f"{100 * row['accuracy']:.1f}{spread}",
                    against,
                    f"{100 * row['lost']:+.1f}" if _known(row.get("lost")) else "",
                    f"{row['heldout_loss']:.4f}" if _known(row["heldout_loss"]) else "",
                    *(_count(row[key] or None) for key in ("branch_steps", "tokens")),
                    f"{row['flops'] / 1e12:,.1f}" if row["flops"] else "",
                    f"{row['seconds']:,.0f}" if row["seconds"] else "",
                    _bytes(int(row["peak_memory_bytes"])) if _known(row["peak_memory_bytes"]) else "",
                    _bytes(int(row["disk_bytes"])),
                ]
            )
        _print_table(f"{folder}: {titles[budget]}", headings, rows, bold="mot")
    click.echo("accuracy: mean ± standard deviation over seeds; costs: of one seed, training and merging alone")
    for line in [*comparison.sentences, *caveats(comparison.arms)]:
        click.echo(line)
    click.echo(f"tables and figure: {folder}/compare.csv, compare_runs.csv, compare.png")


def _print_report(folder: Path) -> None:
    """Table what the filter kept of each teacher, if it has run."""
    from motkit.filter import REPORT_HEADINGS, report_rows
    from motkit.rundir import RunDir, read_json

    report = read_json(RunDir(folder).traces / "report.json")
    if report:
        _print_table(f"{folder}: traces", REPORT_HEADINGS, report_rows(report))


def _print_agreement(folder: Path) -> None:
    """Table how far the branches agree: the whole model in every round, and the layers of the last."""
    from motkit.merge_agreement import HEADINGS, MODEL, agreement_rows, read_agreement
    from motkit.rundir import RunDir

    files = sorted(RunDir(folder).root.glob("round_*/merged/agreement.csv"))
    rows = []
    for file in files:
        values = read_agreement(file)
        if file != files[-1]:
            values = [value for value in values if value.layer == MODEL]
        number = str(int(file.parts[-3].removeprefix("round_")))
        rows += [[number, *row] for row in agreement_rows(values)]
    if rows:
        _print_table(f"{folder}: agreement of the branches", ["round", *HEADINGS], rows, bold=MODEL)


def _print_table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]], bold: str = "") -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    console = Console(file=sys.stdout)
    if not console.is_terminal:
        console = Console(file=sys.stdout, width=200)
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
    if value < 0:
        return f"−{_bytes(-value)}"
    return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.1f} MB"
