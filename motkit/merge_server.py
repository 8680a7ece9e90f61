"""The server's optimizer: a merge taken as the gradient of an outer optimizer over the rounds.

MoT is federated averaging with teachers for clients, so what is known there about the server's step applies. With the
round's start θ_t, its merge m_t, the mean update Δ_t = m_t − θ_t and the velocity v (v_0 = 0):

    v_{t+1} = momentum · v_t + Δ_t
    θ_{t+1} = θ_t + learning_rate · v_{t+1}                        FedAvgM (Hsu et al. 2019, arXiv 1909.06335)
    θ_{t+1} = θ_t + learning_rate · (Δ_t + momentum · v_{t+1})     nesterov, as in DiLoCo (arXiv 2311.08105)

These are the steps of ``torch.optim.SGD`` on the gradient −Δ_t. With a learning rate of 1 and no momentum the merge
stays as it is. Sums are float64, the result is rounded once, the velocity is kept in float32.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from motkit import spans
from motkit.crew import Crew
from motkit.errors import UserError
from motkit.merge_inputs import ITEM_BYTES, TensorRecord, check_compatible, listed, read_checkpoint, read_header

STEM = "velocity"


def server_step(
    start: Path,
    merged: Path,
    velocity: Path | None,
    out: Path,
    out_velocity: Path,
    *,
    learning_rate: float,
    momentum: float,
    nesterov: bool,
    out_dtype: str,
    quiet: bool = True,
) -> None:
    """Write the weights after the server's step, and the new velocity.

    Args:
        start: checkpoint where the round began.
        merged: the merge of the round's branches, in float32 (a narrower one would be rounded twice).
        velocity: folder that the step of the round before wrote; None in the first round.
        out: an existing folder; gets the weights, in ``out_dtype``, and nothing else of a checkpoint.
        out_velocity: an existing folder; gets the velocity.

    Raises:
        UserError: start, merge and velocity do not have the same tensors.
    """
    import torch

    from motkit.merge_float import CHUNK_CPU, cast_rounded, widen

    (before, after), faults = check_compatible(
        [read_checkpoint(start), read_checkpoint(merged)], same_shapes=True, same_vocabulary=True
    )
    if not faults and before.names != after.names:
        faults = [
            f"{merged}: {name}: not in both the round's start and its merge, so no update can be taken; "
            "merge with one of motkit's methods"
            for name in sorted(before.names ^ after.names)
        ]
    old: dict[str, TensorRecord] = {}
    for file in sorted(velocity.glob("*.safetensors")) if velocity is not None else ():
        old |= read_header(file)
    floats = sorted(name for name in after.names if after.tensors[name].is_float)
    for name in floats if velocity is not None else ():
        if name not in old or old[name].shape != after.tensors[name].shape:
            faults.append(f"{velocity}: {name}: missing, or of another shape than in {merged}")
    if faults:
        raise UserError(listed(faults))

    code = spans.SAFETENSORS_NAMES[out_dtype]
    names = sorted(after.names)
    layout = {n: (code if after.tensors[n].is_float else after.tensors[n].dtype, after.tensors[n].shape) for n in names}
    written = spans.lay_out(out, layout)
    new = spans.lay_out(out_velocity, {name: ("F32", after.tensors[name].shape) for name in floats}, STEM)
    records = {
        name: [before.tensors[name], after.tensors[name], *([old[name]] if velocity is not None else [])]
        for name in floats
    }

    def jobs() -> Iterator[tuple[str, int, int]]:
        return ((name, begin, end) for name in floats for begin, end in spans.ranges(after.tensors[name].numel))

    def make_space() -> tuple[list[Any], Any, Any, list[Any], Any]:
        buffers = [torch.empty(spans.SPAN * 4, dtype=torch.uint8) for _ in range(3)]
        weight_bytes = torch.empty(spans.SPAN * 4, dtype=torch.uint8)
        float64 = [torch.empty(CHUNK_CPU, dtype=torch.float64) for _ in range(5)]
        return buffers, weight_bytes, torch.empty(spans.SPAN), float64, torch.empty(CHUNK_CPU)

    with contextlib.ExitStack() as stack:
        files = stack.enter_context(spans.Files())
        targets = stack.enter_context(spans.Targets({r.file for r in (*written.values(), *new.values())}))
        total = sum(record.stop - record.start for group in records.values() for record in group)
        bar = stack.enter_context(spans.progress_bar("Server step", total, quiet))

        def step(space: Any, job: tuple[str, int, int]) -> int:
            buffers, weight_bytes, speeds, float64, float32 = space
            name, begin, end = job
            group = records[name]
            values = files.read(group, buffers[: len(group)], begin, end)
            result = weight_bytes[: (end - begin) * ITEM_BYTES[code]].view(spans.torch_dtype(code))
            for a in range(0, end - begin, CHUNK_CPU):
                b = min(a + CHUNK_CPU, end - begin)
                theta, update, speed, scratch, signs = (each[: b - a] for each in float64)
                narrow = float32[: b - a]
                widen(values[0][a:b], theta, narrow)
                widen(values[1][a:b], update, narrow).sub_(theta)
                if velocity is not None:
                    speed.copy_(values[2][a:b]).mul_(momentum).add_(update)
                else:
                    speed.copy_(update)
                speeds[a:b].copy_(speed)
                if nesterov:
                    theta.add_(update.add_(speed, alpha=momentum), alpha=learning_rate)
                else:
                    theta.add_(speed, alpha=learning_rate)
                cast_rounded(theta, result[a:b], scratch, signs, narrow)
            targets.write(written[name], begin * ITEM_BYTES[code], memoryview(result.view(torch.uint8).numpy()))
            targets.write(new[name], begin * 4, memoryview(speeds[: end - begin].view(torch.uint8).numpy()))
            return sum(value.numel() * value.element_size() for value in values)

        def advance(count: int) -> None:
            bar.update(count)
            targets.keep_up(count)

        Crew(make_space, total, advance).run(jobs(), step)
        for name in names:
            if not after.tensors[name].is_float:
                for begin, end in spans.ranges(after.tensors[name].numel):
                    spans.copy_span(files, after.tensors[name], written[name], targets, begin, end)
