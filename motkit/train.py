"""One branch: a student checkpoint fine-tuned on one set of traces with TRL's SFTTrainer.

The only module that runs TRL. Full fine-tuning: weights, gradients and optimizer in float32, with bfloat16 autocast on
a GPU that has it (paper: not stated; float32 master weights are what the merge needs).

With ``lora`` the student stays frozen and adapters are trained on it, new ones in every round: the merge has become
part of the student. All branches of a round begin with the same random A (their seed is the same) and B = 0.

Such a branch leaves both the adapter and a whole checkpoint, base + update rounded once to float32: evaluation, every
merge method and the analyses read checkpoints, and ``mot`` averages the adapters' updates themselves, so that the
rounding of the checkpoints never enters the merge. The checkpoints take the disk of full fine-tuning while they stay;
``keep_branches`` prunes them, the adapters remain.
"""

import contextlib
import copy
import json
import math
import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from motkit import adapters, rundir
from motkit.checkpoint import copy_tokenizer, load_tokenizer, tensors
from motkit.errors import UserError
from motkit.recipe import Lora
from motkit.render import RenderedTrace

DEFAULT_SAVE_STEPS = 25
_SEAL = "sealed.json"


@dataclass(frozen=True)
class BranchReport:
    """What a branch did. ``tokens`` are those the model read, padding excluded; ``flops_formula`` says how ``flops``
    was counted: 6·P·tokens, or with adapters 4·P·tokens + 6·P_adapter·tokens, because frozen weights need no gradient
    (forward 2, backward through the activations 2, weight gradients 2; recomputed activations are not counted)."""

    steps: int
    tokens: int
    flops: float
    flops_formula: str
    train_seconds: float
    final_loss: float
    resumed_from_step: int


def train_branch(
    *,
    student: Path,
    traces: Sequence[RenderedTrace],
    out: Path,
    work: Path,
    metrics: Path,
    settings: Mapping[str, Any],
    seed: int,
    keep_steps: Sequence[int] = (),
    name: str,
    parameters: int,
    reports: Path,
    adapter_out: Path | None = None,
    base_name: str = "",
    progress: bool = True,
) -> BranchReport:
    """Fine-tune a copy of ``student`` on ``traces`` and save it.

    Args:
        student: checkpoint folder; loaded in float32 whatever its dtype.
        traces: rendered and none longer than ``settings["max_length"]``.
        out: folder to save the checkpoint into (float32 safetensors, the student's tokenizer byte for byte).
        work: folder for the trainer's own resumable checkpoints; what a killed call left there is resumed from, if it
            is complete. The caller deletes it once ``out`` is published.
        metrics: JSONL file with a line per step: step, loss, learning_rate, grad_norm, tokens, seconds.
        settings: fields of SFTConfig and ``lora``, as checked by the recipe.
        seed: of the order of the traces (and of dropout, if the student has any).
        keep_steps: steps after which the weights are also saved, into ``work/steps/000040``.
        name: of the branch, for progress, messages and ``report_to``.
        parameters: P, for the FLOPs.
        reports: folder for what ``report_to`` writes.
        adapter_out: with ``lora``: folder to save the adapter into, in peft's format, float32.
        base_name: with ``lora``: what the adapter names as its base.

    Raises:
        UserError: a non-finite loss or gradient norm, settings that SFTConfig or peft refuse, or a storage fault.
    """
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from transformers.trainer_callback import PrinterCallback, ProgressCallback
    from trl import SFTConfig, SFTTrainer

    settings = dict(settings)
    lora = Lora.model_validate(settings.pop("lora")) if "lora" in settings else None
    resume = _last_sealed_checkpoint(work)
    tokenizer = load_tokenizer(student)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # only fills batches: padding is masked
    model = AutoModelForCausalLM.from_pretrained(student, dtype=torch.float32)
    # The trainer aligns these with the tokenizer; the published student keeps its own.
    original_config, original_generation_config = copy.deepcopy((model.config, model.generation_config))
    on_gpu = torch.cuda.is_available() and not settings.get("use_cpu", False)
    defaults = {
        "bf16": on_gpu and torch.cuda.is_bf16_supported(),
        "save_steps": DEFAULT_SAVE_STEPS,
        "save_total_limit": 2,
        "report_to": "none",
    }
    rows = Dataset.from_list([{"input_ids": trace.input_ids, "labels": trace.labels} for trace in traces])
    with rundir.storage_errors(work):
        try:
            config = SFTConfig(
                **{
                    **defaults,
                    **settings,
                    "output_dir": str(work),
                    "run_name": name,
                    "seed": seed,
                    "save_strategy": "steps",
                    "logging_strategy": "steps",
                    "logging_steps": 1,
                    "logging_nan_inf_filter": False,
                    "disable_tqdm": True,
                    # Rows come with labels and within max_length: the trainer has nothing to prepare but packing.
                    "dataset_kwargs": {"skip_prepare_dataset": not settings.get("packing", False)},
                }
            )
        except (ValueError, TypeError) as error:
            raise UserError(f"train: SFTConfig refuses these settings: {' '.join(str(error).split())}") from error
        with _reporting_to(reports, config.report_to):
            trainer = SFTTrainer(
                model=model,
                args=config,
                train_dataset=rows,
                processing_class=tokenizer,
                peft_config=_lora_config(lora) if lora else None,
            )
            trainer.remove_callback(PrinterCallback)
            trainer.remove_callback(ProgressCallback)
            first_step = int(resume.name.rpartition("-")[2]) if resume else 0
            steps_log = _StepLog(metrics, first_step)
            bar = tqdm(
                total=config.max_steps,
                initial=first_step,
                desc=name,
                unit="step",
                disable=not progress,
                file=sys.stderr,
                leave=False,
            )

            def save(folder: Path, adapter: Path | None) -> None:
                saved = trainer.accelerator.unwrap_model(trainer.model)
                if adapter is not None:
                    _save_adapter(saved, adapter, base_name)
                    adapters.materialise_checkpoint(student, adapter, folder)
                    return
                aligned = saved.config, saved.generation_config
                saved.config, saved.generation_config = original_config, original_generation_config
                saved.config.dtype = torch.float32
                saved.save_pretrained(folder)
                saved.config, saved.generation_config = aligned
                copy_tokenizer(student, folder)

            def keep(step: int) -> None:
                if step in keep_steps:
                    for kind in ("steps", "adapters"):
                        (work / kind).mkdir(exist_ok=True)
                        if (work / kind / f"{step:06d}").exists():  # of an attempt that was killed
                            shutil.rmtree(work / kind / f"{step:06d}")
                    save(work / "steps" / f"{step:06d}", work / "adapters" / f"{step:06d}" if lora else None)

            trainer.add_callback(_branch_callback(name, steps_log, bar, keep))
            started = time.perf_counter()
            try:
                trainer.train(resume_from_checkpoint=str(resume) if resume else None)
            finally:
                bar.close()
            seconds = time.perf_counter() - started
        save(out, adapter_out if lora else None)
        adapter_parameters = 0
        if lora:
            adapter_parameters = trainer.accelerator.unwrap_model(trainer.model).num_parameters(only_trainable=True)
    return BranchReport(
        steps=config.max_steps,
        tokens=steps_log.tokens,
        flops=(4.0 * parameters + 6.0 * adapter_parameters if lora else 6.0 * parameters) * steps_log.tokens,
        flops_formula="4·P·tokens + 6·P_adapter·tokens" if lora else "6·P·tokens",
        train_seconds=steps_log.seconds_before + seconds,
        final_loss=steps_log.last_loss,
        resumed_from_step=first_step,
    )


def count_adapter_parameters(student: Path, lora: Lora) -> int:
    """Number of parameters that a LoRA branch trains; no weights are loaded.

    Raises:
        UserError: modules that the student does not have, or whose update a merge cannot average.
    """
    import torch
    from peft import get_peft_model
    from peft.tuners.lora import Linear
    from peft.tuners.tuners_utils import BaseTunerLayer
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(student))
        head = model.get_output_embeddings()
        stored = {name for name, _ in tensors(student)}
        try:
            wrapped = get_peft_model(model, _lora_config(lora), low_cpu_mem_usage=True)
        except ValueError as error:
            raise UserError(f"train.lora: peft refuses these settings: {' '.join(str(error).split())}") from error
    faults = []
    for name, layer in wrapped.named_modules():
        if not isinstance(layer, BaseTunerLayer):
            continue
        name = name.removeprefix("base_model.model.").removesuffix(".base_layer")
        if not isinstance(layer, Linear) or layer.get_base_layer() is head:
            what = "the output head" if layer.get_base_layer() is head else type(layer.get_base_layer()).__name__
            faults.append(
                f"train.lora.target_modules: reaches {name} ({what}), whose adapter cannot be merged; name linear "
                "layers, such as [q_proj, k_proj, v_proj, o_proj]"
            )
        elif f"{name}.weight" not in stored:
            faults.append(
                f"train.lora.target_modules: reaches {name}, but the student's files hold no tensor {name}.weight; "
                "name other layers"
            )
    if faults:
        more = [f"… and {len(faults) - 5} more of these faults"] if len(faults) > 5 else []
        raise UserError("\n".join([*dict.fromkeys(faults[:5]), *more]))
    return sum(parameter.numel() for parameter in wrapped.parameters() if parameter.requires_grad)


def _lora_config(lora: Lora) -> Any:
    from peft import LoraConfig

    def plain(value: Any) -> Any:
        return list(value) if isinstance(value, tuple) else value

    return LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=plain(lora.target_modules),
        exclude_modules=plain(lora.exclude_modules),
        layers_to_transform=plain(lora.layers_to_transform),
        use_rslora=lora.use_rslora,
        task_type="CAUSAL_LM",
    )


def _save_adapter(model: Any, out: Path, base_name: str) -> None:
    from peft import get_peft_model_state_dict

    factors = get_peft_model_state_dict(model, save_embedding_layers=False)
    adapters.write_adapter(out, model.peft_config["default"], factors, base_name)


def resumable_step(work: Path) -> int:
    """Step of the last complete trainer checkpoint in ``work``; 0 if there is none. Changes nothing."""
    return max((step for step, folder in _trainer_checkpoints(work) if _is_sealed(folder)), default=0)


def _trainer_checkpoints(work: Path) -> list[tuple[int, Path]]:
    return sorted(
        (int(folder.name.rpartition("-")[2]), folder)
        for folder in work.glob("checkpoint-*")
        if folder.name.rpartition("-")[2].isdigit()
    )


def _last_sealed_checkpoint(work: Path) -> Path | None:
    """The last complete trainer checkpoint. Incomplete ones are deleted: the trainer would resume from them unchecked,
    with a fresh optimizer where optimizer.pt is missing."""
    sealed = None
    for _, folder in _trainer_checkpoints(work):
        if _is_sealed(folder):
            sealed = folder
        else:
            shutil.rmtree(folder)
    return sealed


def _seal(folder: Path) -> None:
    """Record what a complete trainer checkpoint holds, after its content is on the disk."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in files:
        rundir.sync(path)
    rundir.write_json(folder / _SEAL, {path.relative_to(folder).as_posix(): path.stat().st_size for path in files})


def _is_sealed(folder: Path) -> bool:
    try:
        sizes = json.loads((folder / _SEAL).read_text(encoding="utf-8"))
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


class _StepLog:
    """metrics.jsonl: a line per step. A resumed branch keeps the lines up to where it resumes."""

    def __init__(self, path: Path, first_step: int) -> None:
        kept = []
        if path.is_file():
            for line in path.read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(ValueError):  # a torn last line
                    row = json.loads(line)
                    if row["step"] <= first_step:
                        kept.append(row)
        last = kept[-1] if kept else {}
        self.tokens_before: int = last.get("tokens", 0)
        self.seconds_before: float = last.get("seconds", 0.0)
        self.tokens = self.tokens_before
        self.last_loss: float = last.get("loss", math.nan)
        self._started = time.perf_counter()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        self._file = path.open("a", encoding="utf-8")

    def add(self, step: int, logs: Mapping[str, float]) -> None:
        self.tokens = self.tokens_before + int(logs["num_tokens"])
        self.last_loss = float(logs["loss"])
        row = {
            "step": step,
            "loss": float(logs["loss"]),
            "learning_rate": float(logs["learning_rate"]),
            "grad_norm": float(logs["grad_norm"]),
            "tokens": self.tokens,
            "seconds": round(self.seconds_before + time.perf_counter() - self._started, 3),
        }
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _branch_callback(name: str, log: _StepLog, bar: Any, keep: Callable[[int], None]) -> Any:
    from transformers import TrainerCallback

    class BranchCallback(TrainerCallback):
        """Logs each step, stops on what is not finite, and seals the trainer's checkpoints."""

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if not logs or "loss" not in logs:
                return
            for key in ("loss", "grad_norm"):
                if not math.isfinite(logs[key]):
                    raise UserError(
                        f"branch {name}: step {state.global_step}: {key} is {logs[key]}; lower train.learning_rate, "
                        "set train.max_grad_norm, or check that the student's weights are finite"
                    )
            log.add(state.global_step, logs)
            bar.set_postfix(loss=f"{logs['loss']:.3f}", refresh=False)
            bar.update(1)

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            keep(state.global_step)
            if state.global_step >= state.max_steps:
                control.should_save = False  # the branch itself is saved next; its optimizer is not needed again

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            _seal(Path(args.output_dir) / f"checkpoint-{state.global_step}")

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            log.close()

    return BranchCallback()


@contextlib.contextmanager
def _reporting_to(folder: Path, targets: Sequence[str]) -> Iterator[None]:
    """Give each branch a run of its own in tensorboard, wandb and trackio."""
    variable, before = "TENSORBOARD_LOGGING_DIR", os.environ.get("TENSORBOARD_LOGGING_DIR")
    if "tensorboard" in targets:
        os.environ[variable] = str(folder)
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(variable, None)
        else:
            os.environ[variable] = before
        for target in ("wandb", "trackio"):
            # Left open, the next branch would write into this branch's run.
            if target in targets and target in sys.modules:
                sys.modules[target].finish()
