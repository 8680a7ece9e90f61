"""Figure 5 of the paper: the tokens of a trace whose confidence falls or rises after MoT.

The paper shows one trace and reads the tokens that fall as one teacher's style. Ours scores every target token of the
run's held-out traces under the base and the final student, shows one trace, and puts the reading to the test: mean
change by kind of token, and by whether the traces of all teachers hold it or only one's, with bootstrap intervals over
traces. Beside the figure: fig5_token_confidence.html with more traces, and tokens.csv with every token.

    python analysis/fig5_token_confidence.py --run runs/quickstart-compare --out figures [--trace ledger/heldout-001#0]
"""

import sys

import click

from motkit import rundir
from motkit.analysis import confidence
from motkit.analysis.command import figure_command
from motkit.analysis.runs import open_runs


def compute(runs, out, trace, per_set, minimum_count):
    run = open_runs(runs).main
    tables = confidence.compute_run(run, per_set=per_set, minimum_count=minimum_count, trace=trace)
    page = confidence.confidence_page(
        tables["tokens"], before="base", after=run.name, summary=tables["summary"], groups=tables["groups"]
    )
    rundir.write_text(out / "fig5_token_confidence.html", page)
    if sys.stdout.isatty():
        from rich.console import Console

        Console().print(confidence.terminal_view(tables["trace"]))
    return tables


main = figure_command(
    "fig5_token_confidence",
    __doc__,
    compute,
    confidence.draw_confidence,
    [
        click.option("--trace", metavar="SET/PROBLEM#SAMPLE", help="Which trace to show.  [default: most tokens fell]"),
        click.option(
            "--per-set", type=click.IntRange(min=1), default=100, show_default=True, help="Traces of each set."
        ),
        click.option(
            "--minimum-count", type=click.IntRange(min=1), default=20, show_default=True, help="Of a token id."
        ),
    ],
)

if __name__ == "__main__":
    main()
