"""Token confidence: how sure a checkpoint is of each token of a trace, and where two checkpoints differ.

Source: arXiv 2509.08814, Figure 5, which marks the tokens of one trace whose confidence falls after MoT and reads them
as teacher-specific style. Here every target token of every given trace is scored, teacher-forced, under two
checkpoints, and the reading is put to the test: by kind of token, and by whether all teachers' traces use it or only
one's.
"""

import html
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from motkit import figures, rundir
from motkit.analysis.models import load_model
from motkit.analysis.runs import Run
from motkit.checkpoint import load_tokenizer
from motkit.errors import UserError
from motkit.logits import BATCH_TOKENS, CHUNK_BYTES, batches, target_logits
from motkit.render import RenderedTrace

if TYPE_CHECKING:
    import numpy
    import pandas

KINDS = ("number", "connective", "formatting", "word")
USES = ("all", "some", "one", "none")
FELL, ROSE = -0.1, 0.1  # a change in probability by this much marks a token

# What carries an argument on, in English. Words, not tokens: a token has the kind of the word it is part of.
_CONNECTIVES = """
actually after again alternatively although and assume because before but check consider finally first given hence hmm
how however if indeed instead let maybe means meanwhile moreover next no not now ok okay or otherwise perhaps recall
right second similarly since so suppose then therefore third thus unless until wait well what when where whereas whether
while why yes yet
"""
CONNECTIVES = frozenset(_CONNECTIVES.split())
_LEXER = re.compile(
    r"(?P<tag></?think>)|(?P<command>\\[A-Za-z]+)|(?P<letters>[^\W\d_]+(?:['’][^\W\d_]+)*)"
    r"|(?P<number>[\d+\-−*/=<>^%×÷·±√≤≥≠≈∑∏∫]+(?:[.,]\d+)*)|(?P<other>\s+|[^\w\s]|_)"
)


@dataclass(frozen=True)
class TokenScores:
    """Of each of the T target tokens of a trace, in order; float64 and int64 arrays (T,).

    ``log_probability`` in nats, ``rank`` 1 for the likeliest token of the vocabulary, ``entropy`` in nats.
    """

    log_probability: "numpy.ndarray[Any, Any]"
    rank: "numpy.ndarray[Any, Any]"
    entropy: "numpy.ndarray[Any, Any]"


def score_traces(
    model: Any,
    traces: Sequence[RenderedTrace],
    *,
    chunk_bytes: int = CHUNK_BYTES,
    batch_tokens: int = BATCH_TOKENS,
    progress: str | None = None,
) -> list[TokenScores]:
    """Teacher-forced log-probability, rank and entropy of every target token of every trace.

    The body of the model runs once over a batch (no cache, no logits); its head then runs on chunks of positions, so
    that the logits of a long trace (20 GB for 32,768 tokens and a vocabulary of 152k) never exist together. The head
    is the model's own, with whatever soft cap or scale it applies. Arithmetic on logits is in float32.

    Args:
        model: a causal language model of transformers.
        chunk_bytes: memory of a chunk's logits.
        progress: name for a progress bar on stderr; None for no bar.

    Raises:
        UserError: the model gives logits that are not finite.
    """
    import torch

    results: dict[int, TokenScores] = {}
    bar = tqdm(total=len(traces), desc=progress, unit="trace", disable=progress is None, file=sys.stderr, leave=False)
    with bar, torch.inference_mode():
        for numbers in batches(traces, batch_tokens):
            some = [traces[number] for number in numbers]
            columns = [_score(*chunk) for chunk in target_logits(model, some, chunk_bytes)]
            table = torch.cat(columns, dim=1).cpu().numpy()  # (3, N)
            first = 0
            for number in numbers:
                last = first + traces[number].num_completion_tokens
                log_probability, rank, entropy = table[:, first:last]
                results[number] = TokenScores(log_probability.copy(), rank.astype("int64"), entropy.copy())
                first = last
            bar.update(len(numbers))
    for number, scores in sorted(results.items()):
        if not (abs(scores.log_probability) < float("inf")).all() or not (scores.entropy < float("inf")).all():
            label = f"{traces[number].problem_id}#{traces[number].sample}"
            raise UserError(f"trace {label}: the model's logits are not finite; check the checkpoint's weights")
    return [results[number] for number in range(len(traces))]


def _score(logits: Any, targets: Any) -> Any:
    """(3, C) float64: log-probability, rank and entropy of the targets (C,) under logits (C, V), which are spent."""
    import torch

    shifted = logits.sub_(logits.amax(1, keepdim=True))
    target = shifted.gather(1, targets[:, None])  # (C, 1)
    scratch = torch.empty_like(shifted)  # the only other array of this size, written twice
    # Counted in float32, exact below 2**24 entries: sums over bool are many times slower.
    rank = torch.gt(shifted, target, out=scratch).sum(1) + 1
    weights = torch.exp(shifted, out=scratch)
    total = weights.sum(1)
    mean = torch.bmm(weights[:, None], shifted[:, :, None])[:, 0, 0]
    if not mean.isfinite().all():
        # -inf (padding of the vocabulary) has probability 0 and adds nothing; NaN and +inf stay and are found later.
        mean = torch.bmm(weights[:, None], shifted.masked_fill_(shifted == -torch.inf, 0)[:, :, None])[:, 0, 0]
    normaliser = total.double().log()
    return torch.stack([target[:, 0].double() - normaliser, rank.double(), normaliser - mean.double() / total.double()])


# Tokens as text


def token_pieces(tokenizer: Any, ids: Sequence[int]) -> list[tuple[int, str]]:
    """The text of ``ids`` in whole characters: (number of tokens, text) of each piece, in order.

    Byte-level tokenizers split one character over several tokens; such tokens make one piece together. What is no
    character even together (a trace cut inside one) is shown as U+FFFD.
    """
    pieces, start, context = [], 0, 4

    def decode(some: Sequence[int]) -> str:
        return str(tokenizer.decode(some, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    while start < len(ids):
        before = list(ids[max(0, start - context) : start])
        known = decode(before) if before else ""
        chosen = None
        for count in range(1, min(8, len(ids) - start) + 1):
            text = decode([*before, *ids[start : start + count]])
            piece = text[len(known) :] if text.startswith(known) else decode(ids[start : start + count])
            chosen = chosen or (count, piece)
            if not piece.endswith("\ufffd"):
                chosen = count, piece
                break
        assert chosen is not None
        pieces.append(chosen)
        start += chosen[0]
    return pieces


def classify(text: str) -> list[tuple[str, str]]:
    """(word, kind) of every character of a text; kinds: number, connective, formatting, word.

    Numbers are digits and operators, formatting is white space, punctuation, think tags, and LaTeX commands. A
    character stands in the word around it, so that a token of one letter has the kind of its word.
    """
    kinds = [("", "formatting")] * len(text)
    for match in _LEXER.finditer(text):
        word = match[0].strip()
        if match["letters"]:
            word = word.lower()
            kind = "connective" if word in CONNECTIVES else "word"
        else:
            kind = "number" if match["number"] else "formatting"
        kinds[match.start() : match.end()] = [(word, kind)] * (match.end() - match.start())
    return kinds


def _describe(tokenizer: Any, ids: Sequence[int]) -> list[tuple[str, int, str, str]]:
    """(text, number of its piece, word, kind) of every token. Tokens of one piece share its text."""
    special = set(tokenizer.all_special_ids)
    pieces = token_pieces(tokenizer, ids)
    text = "".join(piece for _, piece in pieces)
    characters = classify(text)
    described, at, first = [], 0, 0
    for number, (count, piece) in enumerate(pieces):
        visible = next((place for place, sign in enumerate(piece) if not sign.isspace()), 0)
        word, kind = characters[at + visible] if piece else ("", "formatting")
        if ids[first] in special:
            word, kind = piece, "formatting"
        described += [(piece, number, word, kind)] * count
        at += len(piece)
        first += count
    return described


# Two checkpoints


def compute_tokens(
    before: Path,
    after: Path,
    traces: Mapping[str, Sequence[RenderedTrace]],
    teacher_traces: Mapping[str, Sequence[RenderedTrace]] | None = None,
    *,
    progress: bool = True,
) -> "pandas.DataFrame":
    """Every target token of the given traces under two checkpoints: one row per token.

    Args:
        before, after: checkpoint folders with the same tokenizer, such as the base student and the final merge.
        traces: sets of rendered traces by name (a teacher's name, where they are a teacher's).
        teacher_traces: what each teacher wrote, for who uses a token; default: ``traces`` itself.

    Returns:
        Columns: set, problem_id, sample, position (0 for the first target token), token_id, text, piece (tokens with
        the same number make one character or more together), word, kind (`KINDS`), token_use and word_use (`USES`: of
        how many teachers' traces the token, or the word it stands in, is part), and for both checkpoints p_, log_p_,
        rank_ and entropy_ with ``before`` or ``after``; delta_p and delta_log_p.
    """
    import numpy
    import pandas

    names = [(name, trace) for name, some in traces.items() for trace in some]
    if not names:
        raise UserError("no trace to score; give at least one")
    scores = {}
    for which, checkpoint in (("before", before), ("after", after)):
        model = load_model(checkpoint)
        label = f"confidence {which}" if progress else None
        scores[which] = score_traces(model, [trace for _, trace in names], progress=label)
        del model
    tokenizer = load_tokenizer(before)
    tokens_of, words_of = _vocabularies(tokenizer, teacher_traces or traces)
    frames = []
    for number, (name, trace) in enumerate(names):
        ids = trace.input_ids[trace.num_prompt_tokens :]
        described = _describe(tokenizer, ids)
        columns: dict[str, Any] = {
            "set": name,
            "problem_id": trace.problem_id,
            "sample": trace.sample,
            "position": range(len(ids)),
            "token_id": ids,
            "text": [text for text, _, _, _ in described],
            "piece": [piece for _, piece, _, _ in described],
            "word": [word for _, _, word, _ in described],
            "kind": [kind for _, _, _, kind in described],
            "token_use": [_use(token, tokens_of) for token in ids],
            "word_use": [_use(word, words_of) for _, _, word, _ in described],
        }
        for which in ("before", "after"):
            found = scores[which][number]
            columns[f"p_{which}"] = numpy.exp(found.log_probability)
            columns[f"log_p_{which}"] = found.log_probability
            columns[f"rank_{which}"] = found.rank
            columns[f"entropy_{which}"] = found.entropy
        frames.append(pandas.DataFrame(columns))
    table = pandas.concat(frames, ignore_index=True)
    table["delta_p"] = table["p_after"] - table["p_before"]
    table["delta_log_p"] = table["log_p_after"] - table["log_p_before"]
    return table


def _vocabularies(
    tokenizer: Any, traces: Mapping[str, Sequence[RenderedTrace]]
) -> tuple[dict[str, set[int]], dict[str, set[str]]]:
    tokens: dict[str, set[int]] = {}
    words: dict[str, set[str]] = {}
    for name, some in traces.items():
        tokens[name], words[name] = set(), set()
        for trace in some:
            ids = trace.input_ids[trace.num_prompt_tokens :]
            tokens[name].update(ids)
            words[name].update(word for _, _, word, _ in _describe(tokenizer, ids))
    return tokens, words


def _use(what: Any, used: Mapping[str, set[Any]]) -> str:
    count = sum(what in known for known in used.values())
    if count == len(used):
        return "all"
    return "none" if count == 0 else "one" if count == 1 else "some"


def summarise_tokens(
    tokens: "pandas.DataFrame", *, minimum_count: int = 20, draws: int = 1000, seed: int = 0
) -> "pandas.DataFrame":
    """Per token id: count, mean change in p and in log p, each with a 95 % bootstrap interval; largest fall in p first.

    Traces are drawn, not tokens: the tokens of one trace are not independent. Ids that occur fewer than
    ``minimum_count`` times are left out. The two orders differ: Δp is largest where the student was undecided, Δlog p
    where it was sure of something else.
    """
    counts = tokens["token_id"].value_counts()
    kept = tokens[tokens["token_id"].isin(counts[counts >= minimum_count].index)]
    table = _grouped(kept, "token_id", draws, seed)
    first = tokens.drop_duplicates("token_id").set_index("token_id")
    table.insert(1, "text", table["token_id"].map(first["text"]))
    return table.sort_values(["delta_p", "token_id"], ignore_index=True)


def compute_groups(
    tokens: "pandas.DataFrame", *, fell: float = FELL, rose: float = ROSE, draws: int = 1000, seed: int = 0
) -> "pandas.DataFrame":
    """What falls and what rises: by kind of token, by who uses the token, and by who uses the word it stands in.

    Columns: split (kind, token_use, word_use), group, count, share (of all tokens), share_of_fallen, share_of_risen (of
    the tokens whose p changed by more than ``fell`` or ``rose``), mean delta_p and delta_log_p with 95 % bootstrap
    intervals over traces. If what falls were mostly teacher-specific, ``share_of_fallen`` of the group ``one`` would be
    well above its ``share``, and its mean change below that of ``all``.
    """
    import pandas

    parts = []
    down, up = tokens["delta_p"] <= fell, tokens["delta_p"] >= rose
    for split, order in (("kind", KINDS), ("token_use", USES), ("word_use", USES)):
        part = _grouped(tokens, split, draws, seed)
        part = part.rename(columns={split: "group"})
        part.insert(0, "split", split)
        part.insert(3, "share", part["count"] / len(tokens))
        for column, chosen in (("share_of_fallen", down), ("share_of_risen", up)):
            number = tokens[chosen].groupby(split).size()
            total = int(chosen.sum())
            part[column] = part["group"].map(number).fillna(0) / total if total else float("nan")
        part["place"] = part["group"].map({name: place for place, name in enumerate(order)})
        parts.append(part.sort_values("place").drop(columns="place"))
    return pandas.concat(parts, ignore_index=True)


def _grouped(tokens: "pandas.DataFrame", by: str, draws: int, seed: int) -> "pandas.DataFrame":
    """Means per group, with intervals from drawing traces with replacement."""
    import numpy
    import pandas

    measures = ("delta_p", "delta_log_p")
    trace = tokens.groupby(["set", "problem_id", "sample"], sort=True).ngroup().to_numpy()
    groups, place = numpy.unique(tokens[by].to_numpy(), return_inverse=True)
    num_traces = int(trace.max()) + 1 if len(trace) else 0
    chances = [1 / num_traces] * num_traces if num_traces else [1.0]
    drawn = numpy.random.default_rng(seed).multinomial(num_traces, chances, size=draws)
    rows = []
    for start in range(0, len(groups), 256):
        width = min(256, len(groups) - start)
        chosen = (place >= start) & (place < start + width)
        cell = trace[chosen] * width + (place[chosen] - start)

        def per_trace(weights: Any = None, cell: Any = cell, width: int = width) -> Any:
            return numpy.bincount(cell, weights, minlength=num_traces * width).reshape(num_traces, width)

        counts = per_trace()
        sums = {measure: per_trace(tokens[measure].to_numpy()[chosen]) for measure in measures}
        with numpy.errstate(invalid="ignore", divide="ignore"):
            means = {measure: (drawn @ sums[measure]) / (drawn @ counts) for measure in measures}  # (draws, width)
        before = per_trace(tokens["p_before"].to_numpy()[chosen]).sum(0)
        after = per_trace(tokens["p_after"].to_numpy()[chosen]).sum(0)
        for number in range(width):
            total = counts[:, number].sum()
            row = {
                by: groups[start + number],
                "count": int(total),
                "traces": int((counts[:, number] > 0).sum()),
                "p_before": before[number] / total,
                "p_after": after[number] / total,
            }
            for measure in measures:
                low, high = numpy.nanpercentile(means[measure][:, number], [2.5, 97.5])
                row |= {measure: sums[measure][:, number].sum() / total, f"{measure}_low": low, f"{measure}_high": high}
            rows.append(row)
    columns = [by, "count", "traces", "p_before", "p_after"]
    columns += [f"{measure}{end}" for measure in measures for end in ("", "_low", "_high")]
    return pandas.DataFrame(rows, columns=columns)


def compute_run(
    run: Run, *, per_set: int = 100, minimum_count: int = 20, trace: str | None = None, progress: bool | None = None
) -> dict[str, "pandas.DataFrame"]:
    """``tokens``, ``summary``, ``groups`` and ``trace`` of a run: its base against its final student, on its held-out
    traces (on those it trained on, if it has none), with its teachers' training traces for who uses a token."""
    progress = sys.stderr.isatty() if progress is None else progress
    traces, _ = run.traces(per_set=per_set)
    tokens = compute_tokens(run.base, run.final, traces, run.training_traces(), progress=progress)
    return {
        "tokens": tokens,
        "summary": summarise_tokens(tokens, minimum_count=minimum_count),
        "groups": compute_groups(tokens),
        "trace": pick_trace(tokens, trace),
    }


def pick_trace(tokens: "pandas.DataFrame", which: str | None = None) -> "pandas.DataFrame":
    """The tokens of one trace: ``SET/PROBLEM#SAMPLE``, or the one with the largest share of tokens that changed.

    Raises:
        UserError: there is no such trace.
    """
    keys = tokens["set"] + "/" + tokens["problem_id"] + "#" + tokens["sample"].astype(str)
    if which is None:
        changed = (tokens["delta_p"] <= FELL).groupby(keys).mean()
        which = str(changed.idxmax())
    found = tokens[keys == which]
    if found.empty:
        raise UserError(f"{which}: no such trace; they are named like {keys.iloc[0]}")
    return found.reset_index(drop=True)


def write_tokens(tokens: "pandas.DataFrame", target: Path) -> None:
    """The per-token table as Parquet or CSV, by the file's ending, whole or not at all.

    Raises:
        UserError: another ending, or a storage fault.
    """
    if target.suffix not in (".parquet", ".csv"):
        raise UserError(f"{target}: expected a name that ends in .parquet or .csv")
    partial = rundir.partial_path(target)
    with rundir.storage_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.suffix == ".parquet":
            tokens.to_parquet(partial, index=False)
        else:
            tokens.to_csv(partial, index=False)
        rundir.move_into_place(partial, target)


# One trace to look at


@dataclass(frozen=True)
class Piece:
    """Whole characters of a trace with what happened to them: of several tokens, the one that changed most."""

    text: str
    delta_p: float
    p_before: float
    p_after: float
    rank_before: int
    rank_after: int

    @property
    def mark(self) -> str:
        """``fell``, ``rose`` or nothing."""
        return "fell" if self.delta_p <= FELL else "rose" if self.delta_p >= ROSE else ""


def trace_pieces(trace: "pandas.DataFrame") -> list[Piece]:
    """The pieces of one trace (`pick_trace`), in order."""
    pieces = []
    for _, tokens in trace.groupby("piece", sort=True):
        row: Any = tokens.iloc[int(tokens["delta_p"].abs().to_numpy().argmax())]
        names = ("delta_p", "p_before", "p_after", "rank_before", "rank_after")
        pieces.append(Piece(str(row["text"]), *(row[name] for name in names)))
    return pieces


def visible(text: str) -> str:
    """The text with control characters as the pictures Unicode has for them; new lines and tabs stay."""
    signs = []
    for sign in text:
        code = ord(sign)
        if code < 0x20 and sign not in "\n\t":
            sign = chr(0x2400 + code)
        elif code == 0x7F:
            sign = "\u2421"
        elif 0x80 <= code < 0xA0 or code in (0x2028, 0x2029) or 0x202A <= code <= 0x202E or 0x2066 <= code <= 0x2069:
            sign = "\ufffd"  # other controls, and those that would turn the reading direction of the page
        signs.append(sign)
    return "".join(signs)


def terminal_view(trace: "pandas.DataFrame") -> Any:
    """One trace as a `rich.text.Text`: what fell is red and underlined, what rose is blue and bold."""
    from rich.text import Text

    text = Text()
    styles = {"fell": "red underline", "rose": "blue bold", "": ""}
    for piece in trace_pieces(trace):
        shown = visible(piece.text)
        if piece.mark and not shown.strip(" \t"):
            shown = shown.replace("\n", "⏎\n").replace(" ", "␣")
        elif piece.mark:
            shown = shown.replace("\n", "⏎\n")
        text.append(shown, style=styles[piece.mark])
    return text


_PAGE_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; margin: 1.2rem auto; max-width: 62rem;
  padding: 0 1rem; }
h1 { font-size: 1.35rem; } h2 { font-size: 1.05rem; margin-top: 2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .88rem; }
.wide { overflow-x: auto; }
th, td { padding: .2rem .6rem; text-align: right; border-bottom: 1px solid #e4e4e4; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
.trace { white-space: pre-wrap; overflow-wrap: anywhere; font: 14px/1.9 ui-monospace, monospace; background: #fafafa;
  padding: .8rem; border: 1px solid #e4e4e4; border-radius: 4px; }
.fell { text-decoration: underline 2px dashed #a33b00; border-radius: 2px; }
.rose { text-decoration: underline 2px solid #00507f; border-radius: 2px; }
.note { color: #555; font-size: .88rem; }
@media print { body { max-width: none; font-size: 11px; } * { print-color-adjust: exact;
  -webkit-print-color-adjust: exact; } .trace { break-inside: auto; } }
"""


def trace_html(trace: "pandas.DataFrame") -> str:
    """One trace as an HTML element: every piece that changed is marked, with its numbers in its ``title``."""
    parts = []
    for piece in trace_pieces(trace):
        shown = visible(piece.text)
        if not piece.mark:
            parts.append(html.escape(shown))
            continue
        shown = shown.replace("\n", "⏎\n") if shown.strip(" \t") else shown.replace(" ", "␣").replace("\n", "⏎\n")
        strength = 0.15 + 0.55 * min(abs(piece.delta_p), 1.0)
        colour = f"rgba(213,94,0,{strength:.2f})" if piece.mark == "fell" else f"rgba(0,114,178,{strength:.2f})"
        title = (
            f"p {piece.p_before:.3f} → {piece.p_after:.3f} ({piece.delta_p:+.3f}), "
            f"rank {piece.rank_before} → {piece.rank_after}"
        )
        parts.append(
            f'<span class="{piece.mark}" style="background:{colour}" title="{title}">{html.escape(shown)}</span>'
        )
    return f'<div class="trace">{"".join(parts)}</div>'


def confidence_page(
    tokens: "pandas.DataFrame",
    *,
    before: str,
    after: str,
    summary: "pandas.DataFrame",
    groups: "pandas.DataFrame",
    traces: Sequence[str] = (),
    num_traces: int = 6,
) -> str:
    """A static page: what falls and rises in tables, and traces with the changed tokens marked. No script, no network.

    Args:
        traces: which, as in `pick_trace`; default: of each set the one most of whose tokens fell, then the next ones.
    """
    if not traces:
        keys = tokens["set"] + "/" + tokens["problem_id"] + "#" + tokens["sample"].astype(str)
        share = (tokens["delta_p"] <= FELL).groupby(keys).mean().sort_values(ascending=False, kind="stable")
        chosen = [
            next(key for key in share.index if str(key).startswith(f"{name}/")) for name in tokens["set"].unique()
        ]
        chosen += [key for key in share.index if key not in chosen]
        traces = [str(key) for key in chosen[:num_traces]]
    down, up = (tokens["delta_p"] <= FELL).mean(), (tokens["delta_p"] >= ROSE).mean()
    parts = [
        f"<h1>Token confidence: {html.escape(before)} → {html.escape(after)}</h1>",
        f"<p>{len(tokens):,} target tokens, teacher-forced. The probability of {down:.1%} of them fell by "
        f"{-FELL:g} or more, that of {up:.1%} rose by {ROSE:g} or more.</p>",
        '<p class="note"><span class="fell" style="background:rgba(213,94,0,.4)">dashed</span>: fell. '
        '<span class="rose" style="background:rgba(0,114,178,.4)">solid</span>: rose. '
        "Point at a token for its numbers. Intervals: 95 %, bootstrap over traces.</p>",
        "<h2>What falls, by kind of token and by who uses it</h2>",
        _html_table(groups_text(groups)),
        '<p class="note">token use, word use: whether the traces of all teachers, of some, of one or of none hold the '
        "token, or the word it stands in.</p>",
        f"<h2>Token ids whose probability fell most (of the {len(summary)} that occur often enough)</h2>",
        _html_table(summary_text(summary[summary["delta_p"] < 0].head(15))),
        "<h2>… and rose most</h2>",
        _html_table(summary_text(summary[summary["delta_p"] > 0].iloc[::-1].head(15))),
    ]
    for which in traces:
        parts += [f"<h2>{html.escape(which)}</h2>", trace_html(pick_trace(tokens, which))]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Token confidence: {html.escape(before)} → {html.escape(after)}</title>"
        f"<style>{_PAGE_STYLE}</style></head><body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def groups_text(groups: "pandas.DataFrame") -> list[list[str]]:
    """`compute_groups` as rows of text, headings first."""
    rows = [["group", "tokens", "share", "of fallen", "of risen", "mean Δp [95 %]", "mean Δlog p [95 %]"]]
    for row in groups.to_dict(orient="records"):
        rows.append(
            [
                f"{row['split'].replace('_', ' ')}: {row['group']}",
                f"{row['count']:,}",
                *(f"{row[key]:.1%}" for key in ("share", "share_of_fallen", "share_of_risen")),
                *(_interval(row, key) for key in ("delta_p", "delta_log_p")),
            ]
        )
    return rows


def summary_text(summary: "pandas.DataFrame") -> list[list[str]]:
    """`summarise_tokens` as rows of text, headings first."""
    rows = [["token", "id", "count", "p before", "p after", "mean Δp [95 %]", "mean Δlog p [95 %]"]]
    for row in summary.to_dict(orient="records"):
        shown = visible(row["text"]).replace("\n", "⏎").replace("\t", "⇥").replace(" ", "␣")
        rows.append(
            [
                shown,
                str(row["token_id"]),
                f"{row['count']:,}",
                *(f"{row[key]:.3f}" for key in ("p_before", "p_after")),
                *(_interval(row, key) for key in ("delta_p", "delta_log_p")),
            ]
        )
    return rows


def _interval(row: Mapping[Any, Any], key: str) -> str:
    return f"{row[key]:+.3f} [{row[f'{key}_low']:+.3f}, {row[f'{key}_high']:+.3f}]"


def _html_table(rows: Iterable[Sequence[str]]) -> str:
    heading, *body = rows
    lines = ["<tr>" + "".join(f"<th>{html.escape(cell)}</th>" for cell in heading) + "</tr>"]
    for row in body:
        cells = [f"<td>{html.escape(cell)}</td>" for cell in row]
        lines.append("<tr>" + "".join(cells) + "</tr>")
    return '<div class="wide"><table>' + "\n".join(lines) + "</table></div>"


# The figure


def draw_confidence(tables: Mapping[str, "pandas.DataFrame"]) -> Any:
    """Figure 5 from its tables: ``trace`` (one trace's tokens) above, ``groups`` below."""
    from matplotlib.patches import Rectangle

    trace, groups = tables["trace"], tables["groups"]
    width = 96
    lines = _lay_out(trace_pieces(trace), width)
    shown = lines[:24]
    with figures.house_style():
        height = 0.19 * len(shown) + 0.5
        figure, _ = figures.new_figure(width_in=9.0, height_in=height + 3.4)
        figure.clear()
        grid = figure.add_gridspec(2, 2, height_ratios=[height, 3.2])
        top = figure.add_subplot(grid[0, :])
        top.set_axis_off()
        top.set_xlim(0, width)
        top.set_ylim(len(shown), 0)
        for row, line in enumerate(shown):
            at = 0
            for text, mark, delta in line:
                if mark:
                    fell = mark == "fell"
                    box = Rectangle(
                        (at, row + 0.08),
                        len(text),
                        0.84,
                        facecolor="#D55E00" if fell else "#0072B2",
                        alpha=0.15 + 0.5 * min(abs(delta), 1),
                        linewidth=0,
                    )
                    top.add_patch(box)
                    style = (0, (2, 1.2)) if fell else "-"
                    colour = "#A33B00" if fell else "#00507F"
                    top.plot([at, at + len(text)], [row + 0.95] * 2, color=colour, linewidth=1, linestyle=style)
                for place, sign in enumerate(text):
                    top.text(
                        at + place + 0.5,
                        row + 0.5,
                        sign.replace("$", r"\$"),
                        ha="center",
                        va="center",
                        family="DejaVu Sans Mono",
                        fontsize=7.5,
                    )
                at += len(text)
        name = f"{trace['set'].iloc[0]}, problem {trace['problem_id'].iloc[0]}"
        more = f" (first {len(shown)} of {len(lines)} lines)" if len(lines) > len(shown) else ""
        top.set_title(
            f"A trace of {name}{more}: probability fell (orange, dashed) or rose (blue, solid) by {ROSE:g} or more"
        )
        titles = {"kind": "by kind of token", "use": "by who of the teachers uses it"}
        for column, key in enumerate(titles):
            part = groups[groups["split"].isin(["kind"] if key == "kind" else ["token_use", "word_use"])]
            _draw_groups(figure.add_subplot(grid[1, column]), part, titles[key])
    return figure


def _draw_groups(axes: Any, groups: "pandas.DataFrame", title: str) -> None:
    labels = []
    for place, row in enumerate(groups.to_dict(orient="records")):
        word = row["split"] == "word_use"
        error = [[row["delta_p"] - row["delta_p_low"]], [row["delta_p_high"] - row["delta_p"]]]
        axes.errorbar(
            row["delta_p"],
            place,
            xerr=error,
            fmt="D" if word else "o",
            color="#009E73" if word else "#0072B2",
            capsize=2.5,
            markersize=5,
        )
        users = {"all": "all teachers", "some": "some teachers", "one": "one teacher", "none": "no teacher"}
        what = users.get(row["group"], row["group"])
        if row["split"] != "kind":
            what = f"{'word' if word else 'token'} of {what}"
        labels.append(f"{what}\n{row['share']:.0%} of all, {row['share_of_fallen']:.0%} of fallen")
    axes.axvline(0, color="#000000", linewidth=0.8)
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_xlabel("mean change in probability (95 % over traces)")
    axes.set_title(title)


def _lay_out(pieces: Sequence[Piece], width: int) -> list[list[tuple[str, str, float]]]:
    """Lines of (text, mark, change), none wider than ``width`` signs; a new line in a trace is shown and obeyed."""
    lines: list[list[tuple[str, str, float]]] = [[]]
    used = 0
    for piece in pieces:
        for part in re.split(r"(\n)", visible(piece.text).replace("\t", " ")):
            text = "⏎" if part == "\n" else part
            while text:
                if used >= width:
                    lines.append([])
                    used = 0
                head, text = text[: width - used], text[width - used :]
                lines[-1].append((head, piece.mark, piece.delta_p))
                used += len(head)
            if part == "\n":
                lines.append([])
                used = 0
    return lines if lines[-1] else lines[:-1]
