"""How far the teachers agree: the task vectors of a merge's branches compared with one another and with the merge.

One pass over the tensors of all checkpoints, a span at a time; nothing else is kept but sums. The task vector of branch
k is δ_k = θ_k − θ_start, the merged update is u = θ_merged − θ_start, both from the checkpoints as they are stored.
"""

import contextlib
import csv
import functools
import io
import itertools
import math
import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from motkit import spans
from motkit.crew import Crew
from motkit.errors import UserError
from motkit.merge_inputs import Checkpoint, TensorRecord, check_compatible, listed, read_checkpoint

COLUMNS = ("layer", "metric", "first", "second", "value")
MODEL = "model"
HEADINGS = ["layer", "task vectors", "cosine", "same sign", "merged", "survival"]


@dataclass(frozen=True)
class Agreement:
    """One value: ``layer`` is `MODEL`, a layer's number, or embed, lm_head, norm; ``first`` and ``second`` are teachers
    where the metric is of one or of two.

    Metrics:

    * ``task_vector_norm`` (first): ‖δ_k‖;
    * ``cosine`` (first, second): ⟨δ_i, δ_j⟩ / (‖δ_i‖ ‖δ_j‖);
    * ``sign_agreement`` (first, second): of the elements that both changed, the share that both moved the same way
      (chance gives about 0.5);
    * ``merged_norm``: ‖u‖;
    * ``survival``: ‖u‖ / mean_k ‖δ_k‖. For the plain mean of K branches it is 1 where all agree and 1/√K where they
      have nothing in common.

    A ratio with a denominator of 0 is NaN.
    """

    layer: str
    metric: str
    first: str
    second: str
    value: float


@dataclass
class _Sums:
    """Sums over the elements of one layer: inner products of the task vectors and of the update (the last row), and for
    every pair of task vectors how many elements both changed, and in the same direction."""

    inner: Any
    both: Any
    same: Any


_Part = tuple[str, int, Any, Any, Any]  # tensor, where its span begins, and the three of `_Sums`


def _total(parts: Iterable[_Part]) -> _Sums:
    """Sorted before they are summed, so that the order in which they were found does not matter."""
    ordered = sorted(parts, key=lambda part: part[:2])
    inner, both, same = (functools.reduce(operator.add, column) for column in list(zip(*ordered, strict=True))[2:])
    return _Sums(inner, both, same)


def layer_of(name: str) -> str:
    """The layer that a tensor belongs to: its number, or embed, lm_head or norm; else the tensor's own name."""
    numbered = re.search(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.", name)
    if numbered:
        return numbered[1]
    for group, pattern in (("embed", r"embed|wte|wpe"), ("lm_head", r"lm_head|embed_out"), ("norm", r"norm|ln_f")):
        if re.search(pattern, name):
            return group
    return name.removesuffix(".weight")


def measure_agreement(
    start: Path, branches: Mapping[str, Path], merged: Path, *, quiet: bool = True
) -> list[Agreement]:
    """Compare the branches of a merge.

    Args:
        start: where the round began.
        branches: teacher → checkpoint.
        merged: what the merge made of them.

    Returns:
        The whole model first, then layer by layer.

    Raises:
        UserError: checkpoints whose tensors differ by name or shape.
    """
    import torch

    checkpoints, faults = check_compatible(
        [read_checkpoint(path) for path in (start, *branches.values(), merged)], same_shapes=True, same_vocabulary=True
    )
    if faults:
        raise UserError(listed(faults))
    names = sorted(name for name in checkpoints[0].names if _comparable(name, checkpoints))
    records = {name: [checkpoint.tensors[name] for checkpoint in checkpoints] for name in names}
    layers = {name: layer_of(name) for name in names}
    found: list[_Part] = []
    jobs = ((name, span) for name in names for span in spans.ranges(records[name][0].numel))
    total = sum(record.stop - record.start for group in records.values() for record in group)
    with contextlib.ExitStack() as stack:
        files = stack.enter_context(spans.Files())
        bar = stack.enter_context(spans.progress_bar("Comparing branches", total, quiet))

        def make_space() -> list[Any]:
            return [torch.empty(spans.SPAN * 8, dtype=torch.uint8) for _ in checkpoints]

        def look(buffers: list[Any], job: Any) -> int:
            name, (begin, end) = job
            values = files.read(records[name], buffers, begin, end)
            found.append((name, begin, *_inner_products(values)))
            return sum(value.numel() * value.element_size() for value in values)

        _, reports = Crew(make_space, total, bar.update).run(jobs, look, lambda: found)
    by_layer: dict[str, list[_Part]] = {}
    for part in itertools.chain.from_iterable(reports):
        by_layer.setdefault(layers[part[0]], []).append(part)
    ordered = sorted(by_layer, key=lambda layer: (not layer.isdigit(), int(layer) if layer.isdigit() else layer))
    result = _report(MODEL, _total(itertools.chain.from_iterable(by_layer.values())), list(branches))
    for layer in ordered:
        result += _report(layer, _total(by_layer[layer]), list(branches))
    return result


def _comparable(name: str, checkpoints: Sequence[Checkpoint]) -> bool:
    records: list[TensorRecord | None] = [checkpoint.tensors.get(name) for checkpoint in checkpoints]
    return all(
        record is not None and record.dtype in spans.TORCH_NAMES and name in checkpoint.names
        for record, checkpoint in zip(records, checkpoints, strict=True)
    )


def _inner_products(values: Sequence[Any]) -> tuple[Any, Any, Any]:
    """(K+1, K+1) inner products, (K, K) elements that both changed, (K, K) in the same direction; numpy, float64."""
    import torch

    from motkit.merge_float import CHUNK_CPU

    width, size = len(values) - 1, values[0].numel()
    inner = torch.zeros(width, width, dtype=torch.float64)
    both = torch.zeros(width - 1, width - 1, dtype=torch.float64)
    signed = torch.zeros_like(both)
    deltas = torch.empty(width, min(CHUNK_CPU, size), dtype=torch.float64)
    for begin in range(0, size, CHUNK_CPU):
        end = min(begin + CHUNK_CPU, size)
        start = values[0][begin:end].to(torch.float32).to(torch.float64)
        chunk = deltas[:, : end - begin]
        for row, value in zip(chunk, values[1:], strict=True):
            row.copy_(value[begin:end].to(torch.float32)).sub_(start)
        inner += chunk @ chunk.T
        # No difference of float32 values is too small for float32; and counts up to 2^24 are exact.
        signs = chunk[:-1].to(torch.float32).sign_()
        signed += signs @ signs.T
        changed = signs.abs_()
        both += changed @ changed.T
    return inner.numpy(), both.numpy(), ((both + signed) / 2).numpy()


def _report(layer: str, sums: _Sums, teachers: Sequence[str]) -> list[Agreement]:
    def ratio(above: float, below: float) -> float:
        return above / below if below else math.nan

    norms = [math.sqrt(float(sums.inner[k, k])) for k in range(len(teachers) + 1)]
    merged = norms.pop()
    rows = [Agreement(layer, "task_vector_norm", t, "", norm) for t, norm in zip(teachers, norms, strict=True)]
    pairs = [(i, j) for i in range(len(teachers)) for j in range(i + 1, len(teachers))]
    for i, j in pairs:
        cosine = ratio(float(sums.inner[i, j]), norms[i] * norms[j])
        rows.append(Agreement(layer, "cosine", teachers[i], teachers[j], cosine))
    for i, j in pairs:
        share = ratio(float(sums.same[i, j]), float(sums.both[i, j]))
        rows.append(Agreement(layer, "sign_agreement", teachers[i], teachers[j], share))
    rows.append(Agreement(layer, "merged_norm", "", "", merged))
    rows.append(Agreement(layer, "survival", "", "", ratio(merged, sum(norms) / len(norms))))
    return rows


def agreement_csv(rows: Sequence[Agreement]) -> str:
    """The rows as CSV. Six digits: the last bits of a sum depend on the machine, and a resumed run repeats the file."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in rows:
        writer.writerow([row.layer, row.metric, row.first, row.second, f"{row.value:.6g}"])
    return text.getvalue()


def read_agreement(file: Path) -> list[Agreement]:
    """The rows of an ``agreement.csv``; none if there is no such file."""
    if not file.is_file():
        return []
    with file.open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    return [Agreement(r["layer"], r["metric"], r["first"], r["second"], float(r["value"])) for r in rows]


def agreement_rows(values: Sequence[Agreement]) -> list[list[str]]:
    """A row of a table per layer (`HEADINGS`): means over teachers or pairs of them, and what became of them."""
    metrics = ("task_vector_norm", "cosine", "sign_agreement", "merged_norm", "survival")
    rows = []
    for layer in dict.fromkeys(value.layer for value in values):
        cells = []
        for metric in metrics:
            found = [v.value for v in values if (v.layer, v.metric) == (layer, metric) and not math.isnan(v.value)]
            cells.append(f"{sum(found) / len(found):.3g}" if found else "")
        rows.append([layer, *cells])
    return rows
