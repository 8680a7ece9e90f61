"""What a recipe may say: the schema, YAML with ``key=value`` overrides, and every check that needs no model.

A recipe is one YAML file (README, "A recipe"). Paths in it resolve against its folder; paths in an override resolve
against the working folder, because a person typed them there. All faults of a recipe are collected and reported
together in one `UserError`, a line each.
"""

import contextlib
import dataclasses
import functools
import os
import re
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_serializer,
    model_validator,
)
from yaml import YAMLError

from motkit.bundle import bundled_files
from motkit.errors import UserError, nearest
from motkit.importing import columns_fault, is_hub_source
from motkit.traces import verifier_fault

_NAME = r"^[a-z0-9][a-z0-9._-]*$"
Value = typing.TypeVar("Value")
_HUB_ID = re.compile(r"^[\w.-]+(/[\w.-]+)?$")

# SFTConfig fields that the loop itself decides, with where to say it instead.
_RESERVED_TRAIN_FIELDS = {
    **dict.fromkeys(["seed", "data_seed"], "set the recipe's 'seed'"),
    **dict.fromkeys(["output_dir", "resume_from_checkpoint", "run_name"], "the run directory decides it (--run)"),
    **dict.fromkeys(["logging_nan_inf_filter"], "a non-finite loss always stops the branch"),
    **dict.fromkeys(["logging_strategy", "logging_steps"], "every step is always logged to metrics.jsonl"),
    **dict.fromkeys(
        ["save_strategy", "save_only_model"], "branches always save resumable checkpoints; set 'save_steps'"
    ),
    **dict.fromkeys(["load_best_model_at_end"], "the stopping rule is fixed beforehand: 'max_steps'"),
    **dict.fromkeys(["do_eval", "eval_strategy", "eval_steps", "eval_on_start"], "use the recipe's 'evaluate'"),
    **dict.fromkeys(["truncation_mode"], "traces are never cut; see 'filter.over_long'"),
    **dict.fromkeys(["completion_only_loss", "assistant_only_loss"], "the loss is always on the whole trace only"),
    **dict.fromkeys(
        ["dataset_text_field", "dataset_kwargs", "chat_template_path", "eos_token", "pad_token", "label_names"],
        "traces are rendered with the student's own tokenizer and template",
    ),
    **dict.fromkeys(["num_train_epochs"], "a branch's length is 'max_steps'"),
    **dict.fromkeys(["push_to_hub", "hub_model_id", "hub_strategy", "hub_token"], "push the folder 'final' yourself"),
    **dict.fromkeys(["auto_find_batch_size", "ignore_data_skip"], "a resumed branch must repeat the same batches"),
    **dict.fromkeys(["trust_remote_code", "model_init_kwargs"], "checkpoints load with plain transformers"),
    **dict.fromkeys(["fsdp", "deepspeed", "local_rank"], "one process trains a branch in this version"),
}


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Sampling(_Section):
    """How text is sampled; temperature 0 is greedy."""

    temperature: float = Field(default=0.0, ge=0.0)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    max_tokens: int = Field(default=1024, ge=1)


class TeacherSampling(Sampling):
    """How a teacher is asked: ``n`` samples of every problem, each a request of its own.

    ``extra``: further fields as the engine itself names them (``stop``, ``top_k``, ``chat_template_kwargs``, …), sent
    in the body of every request or given to vLLM's SamplingParams. A null takes out a field that motkit would send
    (``{max_tokens: null, max_completion_tokens: 4096}`` for an endpoint that wants it so).
    """

    n: int = Field(default=1, ge=1)
    temperature: float = Field(default=0.6, ge=0.0)
    top_p: float = Field(default=0.95, gt=0.0, le=1.0)
    max_tokens: int = Field(default=32768, ge=1)
    extra: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _samples_differ(self) -> "TeacherSampling":
        if self.n > 1 and self.temperature == 0.0:
            raise ValueError("'n' above 1 needs 'temperature' above 0 (greedy samples are all the same)")
        return self


class Price(_Section):
    """Price of a million tokens, in any currency: of the prompts, and of what is generated."""

    input: float = Field(ge=0.0)
    output: float = Field(ge=0.0)


_HTTP_SETTINGS = {"base_url", "api_key_env", "concurrency", "timeout_s", "max_retries"}
_VLLM_SETTINGS = {"engine_args", "python", "serve"}
# Arguments of vLLM that say where and how fast a text is made, not which.
PLACEMENT_ARGS = frozenset(
    [
        "tensor_parallel_size",
        "pipeline_parallel_size",
        "data_parallel_size",
        "enable_expert_parallel",
        "gpu_memory_utilization",
        "max_num_seqs",
        "max_num_batched_tokens",
        "enforce_eager",
        "swap_space",
        "cpu_offload_gb",
        "kv_cache_memory_bytes",
        "distributed_executor_backend",
        "disable_log_stats",
        "api_server_count",
        "download_dir",
        "load_format",
    ]
)
# Settings of a teacher of the same kind: a run goes on when they change.
_PLACEMENT = re.compile(
    r"keep_branches|evaluate\.python|"
    r"teachers\.\d+\.(base_url|api_key_env|concurrency|timeout_s|max_retries|batch_size|serve|python|"
    rf"max_response_bytes|price_per_million_tokens\..*|engine_args\.({'|'.join(sorted(PLACEMENT_ARGS))}))"
)


class Teacher(_Section):
    """A teacher: the traces that it wrote (``traces``), or a model that `motkit generate` asks (``model``, ``engine``).

    The settings below ``engine`` go with some engines only; what does not go together is refused.

    * ``openai``: an OpenAI-compatible endpoint at ``base_url``, or a `vllm serve` that motkit starts for the time it is
      needed (``serve: true``);
    * ``vllm``: vLLM's offline engine in a process of its own; with ``serve: true`` the same as ``openai`` with it;
    * ``transformers``: batches through the model in this process.
    """

    name: str = Field(pattern=_NAME, description="becomes a folder: lower-case letters, digits, '.', '_', '-'")
    traces: str | None = Field(default=None, min_length=1, description="JSONL of traces, or hf://owner/name of the hub")
    columns: dict[str, str] = Field(default_factory=dict, description="what we need → the source's column")
    model: str | None = Field(default=None, min_length=1, description="a folder, a hub id, or the endpoint's own name")
    engine: Literal["vllm", "openai", "transformers"] | None = None
    system: str | None = Field(default=None, min_length=1, description="system message before every problem")
    sampling: TeacherSampling = TeacherSampling()
    max_response_bytes: int = Field(default=4_000_000, ge=1, description="a longer answer is rejected and counted")
    price_per_million_tokens: Price | None = None
    base_url: str | None = Field(default=None, pattern=r"^https?://\S+$")
    api_key_env: str | None = Field(default=None, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", description="holds the key")
    concurrency: int = Field(default=32, ge=1, le=4096, description="requests in flight")
    timeout_s: float = Field(default=3600.0, gt=0.0, description="for one attempt at one request")
    max_retries: int = Field(default=6, ge=0)
    serve: bool = False
    engine_args: dict[str, Any] = Field(default_factory=dict, description="vLLM's own: tensor_parallel_size, …")
    python: str | None = Field(default=None, min_length=1, description="interpreter of vLLM's environment")
    batch_size: int = Field(default=8, ge=1, description="samples at a time (transformers)")

    @field_validator("name")
    @classmethod
    def _not_taken(cls, name: str) -> str:
        if name in {"union", "merged"}:
            raise ValueError(f"'{name}' is a name that the run directory uses itself")
        return name

    @field_validator("columns")
    @classmethod
    def _known_columns(cls, columns: dict[str, str]) -> dict[str, str]:
        return _without_fault(columns, columns_fault(columns, "traces"))

    @field_validator("price_per_million_tokens", mode="before")
    @classmethod
    def _one_price(cls, value: Any) -> Any:
        return {"input": value, "output": value} if isinstance(value, int | float) else value

    @model_validator(mode="after")
    def _goes_together(self) -> "Teacher":
        faults = []
        if self.traces is None and self.model is None:
            faults.append("give 'traces' (a file of traces) or 'model' and 'engine' (to generate them)")
        elif self.traces is not None and self.model is not None:
            faults.append("'traces' and 'model' exclude each other; remove one")
        if self.model is not None and self.engine is None:
            faults.append("'model' needs 'engine': vllm, openai or transformers")
        given = {field for field in self.model_fields_set if getattr(self, field) is not None}
        for field in sorted(given - self._settings()):
            if self.model is None:
                faults.append(f"'{field}' goes with 'model', not with 'traces'; remove it")
            elif self.engine is not None:
                served = " without 'serve: true'" if not self.serve and self.engine != "transformers" else ""
                faults.append(f"'{field}' does not go with 'engine: {self.engine}'{served}; remove it")
        if self.engine == "openai" and self.base_url is None and not self.serve:
            faults.append("'engine: openai' needs 'base_url' (such as http://127.0.0.1:8000/v1) or 'serve: true'")
        if self.serve and self.base_url is not None:
            faults.append("'serve: true' starts its own server; remove 'base_url'")
        if self.engine == "transformers" and self.sampling.extra:
            faults.append("'sampling.extra' does not go with 'engine: transformers'; remove it")
        if faults:
            raise ValueError("\n".join(faults))
        return self

    @property
    def over_http(self) -> bool:
        """Whether the teacher is asked over HTTP."""
        return self.engine == "openai" or self.serve

    def _settings(self) -> set[str]:
        """Names of the settings that go with this kind of teacher."""
        if self.model is None:
            return {"name", "traces", "columns"}
        common = {"name", "traces", "model", "engine", "system", "sampling", "max_response_bytes"}
        common |= {"price_per_million_tokens"}
        if self.engine == "transformers":
            return common | {"batch_size"}
        if self.engine == "vllm":
            return common | _VLLM_SETTINGS | (_HTTP_SETTINGS if self.serve else set())
        return common | _HTTP_SETTINGS | (_VLLM_SETTINGS if self.serve else {"serve"})

    @model_serializer(mode="wrap")
    def _only_its_settings(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        settings = self._settings()
        return {key: value for key, value in handler(self).items() if key in settings and value is not None}


class ProblemSample(_Section):
    """A random subset of the problems, the same for the same seed."""

    count: int = Field(ge=1)
    seed: int = Field(default=0, ge=0)


class ProblemSource(_Section):
    """Seed problems that are not simply a file of ours: a hub dataset, other columns, a subset."""

    path: str = Field(min_length=1, description="JSONL of problems, or hf://owner/name of the hub")
    columns: dict[str, str] = Field(default_factory=dict, description="what we need → the source's column")
    sample: ProblemSample | None = None

    @field_validator("columns")
    @classmethod
    def _known_columns(cls, columns: dict[str, str]) -> dict[str, str]:
        return _without_fault(columns, columns_fault(columns, "problems"))


class TraceFilter(_Section):
    """Which of a teacher's traces are trained on."""

    verifier: str = Field(default="math", description="motkit.verify; a problem's own goes first, unless 'none'")
    keep_per_problem: int = Field(default=1, ge=1)
    keep: Literal["first", "shortest", "random"] = "first"
    over_long: Literal["drop", "error"] = "drop"
    min_per_teacher: int = Field(default=1, ge=1)

    @field_validator("verifier", mode="before")
    @classmethod
    def _known_verifier(cls, verifier: Any) -> Any:
        verifier = "none" if verifier is None else verifier  # YAML: 'verifier: null'
        return _without_fault(verifier, verifier_fault(verifier) if isinstance(verifier, str) else None)


class Lora(_Section):
    """A branch trains adapters on the frozen student: W + (alpha / r)·B·A per targeted module (arXiv 2106.09685).

    Fields of peft's LoraConfig, without the prefix of ``lora_alpha`` and ``lora_dropout``. ``r`` and ``alpha`` default
    as there; ``target_modules`` defaults to all linear layers but the output head, where peft asks or guesses.
    """

    r: int = Field(default=8, ge=1, description="rank")
    alpha: int = Field(default=8, ge=1, description="the update is scaled by alpha / r")
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0, description="of what goes into A, while training")
    target_modules: str | tuple[str, ...] = Field(
        default="all-linear", min_length=1, description="'all-linear', a list of names, or a regular expression"
    )
    exclude_modules: str | tuple[str, ...] | None = None
    layers_to_transform: int | tuple[int, ...] | None = None
    use_rslora: bool = Field(default=False, description="scale by alpha / √r (arXiv 2312.03732)")


# Further fields of LoraConfig, with why a branch does not have them.
_UNSUPPORTED_LORA_FIELDS = {
    **dict.fromkeys(
        ["modules_to_save", "trainable_token_indices"],
        "an adapter branch trains its adapters only; train the whole student without 'lora'",
    ),
    **dict.fromkeys(["bias", "lora_bias"], "biases stay frozen"),
    **dict.fromkeys(
        ["use_dora", "use_qalora", "use_bdlora", "alora_invocation_tokens", "kasa_config", "monteclora_config"],
        "the merge averages updates of the form scaling·B·A, which this is not",
    ),
    **dict.fromkeys(
        ["init_lora_weights", "loftq_config", "eva_config", "corda_config", "lora_ga_config"],
        "adapters begin at zero (peft's default): other beginnings change the frozen weights",
    ),
    **dict.fromkeys(["target_parameters"], "adapters on fused expert parameters cannot be merged here yet"),
    **dict.fromkeys(["rank_pattern", "alpha_pattern"], "one rank and one alpha for every module"),
    **dict.fromkeys(["task_type", "inference_mode", "base_model_name_or_path"], "motkit sets this field itself"),
}


class MergedAdapter(_Section):
    """The merged update once more, as one adapter: truncated by singular values, which loses something.

    ``r``: its rank; default: that of ``train.lora``. The exact update has up to K·r after one round.
    """

    r: int | None = Field(default=None, ge=1)


class Precision(_Section):
    """Storage types of weights: between rounds, and of the published student."""

    carry: Literal["float32", "bfloat16"] = "float32"
    publish: Literal["float32", "bfloat16", "float16"] = "bfloat16"


# Settings under which scores of AIME are commonly given: avg@16; the paper's are not stated in full.
_AIME: dict[str, Any] = {
    "samples": 16,
    "sampling": {"temperature": 0.6, "top_p": 0.95, "max_tokens": 32768},
    "verifier": "math",
}
PRESETS: dict[str, dict[str, Any]] = {
    "aime24": {**_AIME, "problems": "hf://HuggingFaceH4/aime_2024"},
    "aime25": {**_AIME, "problems": "hf://math-ai/aime25:test"},
}


class Evaluation(_Section):
    """Held-out problems (accuracy) and held-out traces (mean loss), scored after every round.

    A ``preset`` (`PRESETS`) gives what the recipe itself does not.
    """

    preset: str | None = None
    problems: str | ProblemSource | None = None
    verifier: str | None = Field(default=None, description="default: the filter's, or 'math' if that is 'none'")
    traces: dict[str, str] = Field(default_factory=dict, description="name of a set of traces → JSONL")
    samples: int = Field(default=1, ge=1)
    sampling: Sampling = Sampling()
    batch_size: int = Field(default=32, ge=1, description="problems at a time (transformers)")
    engine: Literal["auto", "transformers", "vllm"] = Field(
        default="auto", description="auto: vllm where there are a GPU and vLLM, else transformers"
    )
    engine_args: dict[str, Any] = Field(default_factory=dict, description="vLLM's own: tensor_parallel_size, …")
    python: str | None = Field(default=None, min_length=1, description="interpreter of vLLM's environment")
    branches: bool = Field(default=True, description="score every branch, or the merges alone")
    every_steps: int | None = Field(default=None, ge=1, description="score branches also in between: Figure 3")

    @model_validator(mode="before")
    @classmethod
    def _filled_in(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        preset = value.get("preset")
        if preset is not None and preset not in PRESETS:
            raise ValueError(f"preset: unknown {preset!r}; known: {', '.join(PRESETS)}")
        value = {**PRESETS.get(preset or "", {}), **value}
        if isinstance(value.get("traces"), str):
            value["traces"] = {"heldout": value["traces"]}
        return value

    @field_validator("verifier")
    @classmethod
    def _known_verifier(cls, verifier: str | None) -> str | None:
        if verifier == "none":
            raise ValueError("'none' would score every answer as right; name a verifier that judges")
        return _without_fault(verifier, verifier and verifier_fault(verifier))

    @model_validator(mode="after")
    def _something_to_do(self) -> "Evaluation":
        if self.problems is None and not self.traces:
            raise ValueError("nothing to evaluate: give 'problems', 'traces' or both")
        if self.traces and self.problems is None:
            raise ValueError("'traces' need 'problems': the problems that they answer")
        if self.samples > 1 and self.sampling.temperature == 0.0:
            raise ValueError("'samples' above 1 needs 'sampling.temperature' above 0 (greedy samples are all the same)")
        if self.engine == "transformers" and (self.engine_args or self.python):
            raise ValueError("'engine_args' and 'python' are vLLM's; remove them, or set 'engine: vllm'")
        return self

    @property
    def problem_source(self) -> ProblemSource | None:
        """``problems`` in the long form."""
        return ProblemSource(path=self.problems) if isinstance(self.problems, str) else self.problems


class Server(_Section):
    """The outer optimizer, whose gradient is the mean update of a round (`motkit.merge_server`)."""

    learning_rate: float = Field(default=1.0, gt=0.0, allow_inf_nan=False)
    momentum: float = Field(default=0.0, ge=0.0, lt=1.0)
    nesterov: bool = False

    @model_validator(mode="after")
    def _goes_together(self) -> "Server":
        if self.nesterov and not self.momentum:
            raise ValueError("'nesterov' needs 'momentum' above 0")
        return self


class Recipe(_Section):
    """A whole experiment. Every path in it is absolute once loaded."""

    student: str = Field(min_length=1, description="a checkpoint folder or a hub id")
    problems: str | ProblemSource = Field(description="JSONL of problems, or a mapping with 'path'")
    teachers: tuple[Teacher, ...] = Field(min_length=1)
    filter: TraceFilter = TraceFilter()
    branches: Literal["per_teacher", "union"] = "per_teacher"
    rounds: int = Field(ge=1)
    train: dict[str, Any]
    merge: str | dict[str, Any] = "mot"
    merged_adapter: MergedAdapter | None = Field(default=None, description="true, or {r: N}; goes with train.lora")
    weights: str | dict[str, float] | None = Field(default=None, description="auto, accuracy, or teacher → number ≥ 0")
    server: Server | None = None
    precision: Precision = Precision()
    keep_branches: Literal["all", "last", "none"] = Field(
        default="all", description="whose branch checkpoints stay on the disk once their round is finished"
    )
    evaluate: Evaluation | None = None
    seed: int = Field(default=42, ge=0, lt=2**31)

    @model_validator(mode="after")
    def _unique_teachers(self) -> "Recipe":
        names = [teacher.name for teacher in self.teachers]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"teachers: the name {', '.join(twice)} is used more than once")
        return self

    @field_validator("train")
    @classmethod
    def _full_lora(cls, train: dict[str, Any]) -> dict[str, Any]:
        """``lora`` with its defaults written out, so that the record says what was trained."""
        with contextlib.suppress(ValidationError):  # load_recipe reports its faults
            if train.get("lora") is not None:
                return {**train, "lora": Lora.model_validate(train["lora"]).model_dump(mode="json")}
        return {key: value for key, value in train.items() if key != "lora" or value is not None}

    @field_validator("merged_adapter", mode="before")
    @classmethod
    def _yes_or_no(cls, value: Any) -> Any:
        return {True: {}, False: None}[value] if isinstance(value, bool) else value

    @model_validator(mode="after")
    def _adapters_to_merge(self) -> "Recipe":
        if self.merged_adapter is not None and "lora" not in self.train:
            raise ValueError("merged_adapter: goes with 'train.lora': a merge of whole students is no low-rank update")
        return self

    @model_validator(mode="after")
    def _weights_of_teachers(self) -> "Recipe":
        weights, names = self.weights, [teacher.name for teacher in self.teachers]
        if weights is None:
            return self
        faults = []
        if self.branches == "union":
            faults.append("weights: 'branches: union' has one branch; leave 'weights' out")
        if isinstance(weights, str):
            if weights not in ("auto", "accuracy"):
                faults.append(f"weights: got {weights!r}, expected auto, accuracy or a mapping of teachers to numbers")
            elif weights == "auto" and (self.evaluate is None or not self.evaluate.traces):
                faults.append("weights: auto needs held-out traces; give 'evaluate.traces', or a number per teacher")
            elif self.evaluate is None:
                faults.append(
                    "weights: accuracy asks the branches with the engine and max_tokens of 'evaluate'; give it, or a "
                    "number per teacher"
                )
        else:
            faults += [f"weights.{name}: missing; give every teacher a number" for name in names if name not in weights]
            for name, weight in weights.items():
                if name not in names:
                    faults.append(f"weights.{name}: no such teacher{nearest(name, names)}")
                elif not 0 <= weight < float("inf"):
                    faults.append(f"weights.{name}: got {weight}, expected a number of at least 0")
            if not faults and not sum(weights.values()) > 0:
                faults.append("weights: all are 0; give at least one teacher a number above 0")
        if faults:
            raise ValueError("\n".join(faults))
        return self

    @field_validator("problems")
    @classmethod
    def _a_source(cls, problems: str | ProblemSource) -> str | ProblemSource:
        if problems == "":
            raise ValueError("empty; give the path of a JSONL file")
        return problems

    @property
    def problem_source(self) -> ProblemSource:
        """``problems`` in the long form."""
        return ProblemSource(path=self.problems) if isinstance(self.problems, str) else self.problems

    @property
    def evaluation_verifier(self) -> str:
        """What judges the student's answers: the same as the teachers', unless that is ``none``."""
        own = self.evaluate.verifier if self.evaluate else None
        return own or (self.filter.verifier if self.filter.verifier != "none" else "math")

    @property
    def seed_problem_verifier(self) -> str:
        """What judges the student's answers to the seed problems: the same as the teachers', if that is any."""
        return self.filter.verifier if self.filter.verifier != "none" else self.evaluation_verifier

    @property
    def lora(self) -> Lora | None:
        """How branches train adapters; None if they train the whole student."""
        return Lora.model_validate(self.train["lora"]) if "lora" in self.train else None

    @property
    def branch_names(self) -> tuple[str, ...]:
        """Names of the branches of a round: one per teacher, or ``union``."""
        return tuple(teacher.name for teacher in self.teachers) if self.branches == "per_teacher" else ("union",)

    @property
    def kept_steps(self) -> tuple[int, ...]:
        """Steps of a branch, before its last, whose weights are kept and scored (``evaluate.every_steps``)."""
        every = self.evaluate.every_steps if self.evaluate else None
        return tuple(range(every, self.train["max_steps"], every)) if every else ()

    @property
    def scored_names(self) -> tuple[str, ...]:
        """What is scored in every round: ``NAME@STEP`` in between, branches, ``merged``."""
        between = [f"{name}@{step}" for name in self.branch_names for step in self.kept_steps]
        branches = self.branch_names if self.evaluate is None or self.evaluate.branches else ()
        return (*between, *branches, "merged")

    def to_yaml(self) -> str:
        """The resolved recipe as YAML; `load_recipe` of it gives an equal recipe."""
        return OmegaConf.to_yaml(OmegaConf.create(self.model_dump(mode="json")))

    def differences(self, other: "Recipe") -> list[str]:
        """``field: theirs → ours`` for every field that differs from ``other``.

        Where a teacher's endpoint is, how fast it is asked and which branches stay on the disk is no part of the
        experiment and is left out.
        """
        ours, theirs = _flatten(self.model_dump(mode="json")), _flatten(other.model_dump(mode="json"))
        return [
            f"{key}: {theirs.get(key, 'absent')!r} → {ours.get(key, 'absent')!r}"
            for key in sorted(ours.keys() | theirs.keys())
            if ours.get(key) != theirs.get(key) and not _PLACEMENT.fullmatch(key)
        ]


def _without_fault(value: Value, fault: str | None) -> Value:
    if fault:
        raise ValueError(fault)
    return value


def recipe_path(recipe: str | Path) -> Path:
    """The YAML file behind a path (a file, or a folder with ``recipe.yaml``) or the bare name of a bundled recipe.

    Raises:
        UserError: there is no such file or name.
    """
    path = Path(recipe).expanduser()
    if path.is_dir() and (path / "recipe.yaml").is_file():
        path = path / "recipe.yaml"
    if path.is_file():
        return path.resolve()
    bundled = bundled_files("recipes")
    if str(recipe) in bundled:
        return bundled[str(recipe)]
    raise UserError(f"{recipe}: no such recipe file, and no bundled recipe of that name{nearest(str(recipe), bundled)}")


def recipe_name(path: Path) -> str:
    """Name of the run that a recipe makes by default: the file's stem, or the folder's name for ``recipe.yaml``."""
    return path.parent.name if path.name == "recipe.yaml" else path.stem


def load_recipe(recipe: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read, override and check a recipe.

    Args:
        recipe: path of a YAML file, of a folder with ``recipe.yaml``, or the bare name of a bundled recipe.
        overrides: ``key=value`` with a dotted key (``train.max_steps=10``, ``teachers.0.traces=a.jsonl``); the value
            is read as YAML, so it is typed.

    Returns:
        The recipe, with absolute paths; a hub id stays as it is.

    Raises:
        UserError: one line per fault, all of them at once: file, key, got, expected, remedy.
    """
    path = recipe_path(recipe)
    values = read_yaml_mapping(path)
    _resolve_paths(values, path.parent)
    for override in overrides:
        _apply_override(values, override)
    faults: list[str] = []
    result: Recipe | None = None
    try:
        result = Recipe.model_validate(values)
    except ValidationError as error:
        # A tuple of which an entry is at fault is then found too short as well.
        found = [fault for fault in error.errors() if fault["type"] != "too_short" or not fault["input"]]
        faults += [line for fault in found for line in _describe(fault).split("\n")]
    if isinstance(values.get("train"), dict):
        faults += _train_faults(values["train"])
    faults += _missing_files(values, path)
    if faults or result is None:
        raise UserError("\n".join(f"{_short(path)}: {fault}" for fault in faults))
    return result


def read_evaluation(values: Mapping[str, Any]) -> Evaluation:
    """An ``evaluate`` section that comes from a command's options; paths resolve against the working folder.

    Raises:
        UserError: one line per fault.
    """
    nested = {"evaluate": dict(values)}
    _resolve_paths(nested, Path.cwd())
    try:
        settings = Evaluation.model_validate(nested["evaluate"])
    except ValidationError as error:
        raise UserError("\n".join(line for fault in error.errors() for line in _describe(fault).split("\n"))) from None
    files = [*settings.traces.values()]
    if settings.problem_source and not is_hub_source(settings.problem_source.path):
        files.append(settings.problem_source.path)
    faults = [f"file not found: {_short(Path(file))}" for file in files if not Path(file).is_file()]
    if faults:
        raise UserError("\n".join(faults))
    return settings


def read_yaml_mapping(path: Path) -> dict[str, Any]:
    """A YAML file whose top is a mapping, read safely: no tags that build objects, no key given twice.

    Raises:
        UserError: the file cannot be read, is not YAML, or is not a mapping.
    """
    try:
        loaded = OmegaConf.load(path)
        values = OmegaConf.to_container(loaded, resolve=False)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (YAMLError, OmegaConfBaseException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{_short(path)}: not readable YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UserError(f"{_short(path)}: expected a mapping of keys at the top, got a {type(values).__name__}")
    return typing.cast(dict[str, Any], values)


@functools.cache
def sft_config_fields() -> dict[str, Any]:
    """Name → type of every field of TRL's SFTConfig. Imports trl, which takes seconds."""
    from trl import SFTConfig

    hints = typing.get_type_hints(SFTConfig)
    return {field.name: hints[field.name] for field in dataclasses.fields(SFTConfig) if field.init}


def _train_faults(train: Mapping[str, Any]) -> list[str]:
    faults = []
    fields = sft_config_fields()
    for key, value in train.items():
        if key == "lora":
            faults += _lora_faults(value)
        elif key in _RESERVED_TRAIN_FIELDS:
            faults.append(f"train.{key}: motkit sets this field itself; remove it: {_RESERVED_TRAIN_FIELDS[key]}")
        elif key not in fields:
            faults.append(f"train.{key}: not a field of TRL's SFTConfig{nearest(key, fields)}")
        elif not _fits(fields[key], value):
            expected = getattr(fields[key], "__name__", None) or str(fields[key])
            faults.append(f"train.{key}: got {value!r}, expected {expected}")
    faults += _report_to_faults(train.get("report_to"))
    steps = train.get("max_steps")
    if steps is None:
        faults.append("train.max_steps: missing; give the optimizer steps of a branch in one round (the paper: 50)")
    elif isinstance(steps, int) and steps < 1:
        faults.append(f"train.max_steps: got {steps!r}, expected a whole number of at least 1")
    return faults


def _lora_faults(lora: Any) -> list[str]:
    if lora is None:
        return []
    if not isinstance(lora, dict):
        return [f"train.lora: got {lora!r}, expected a mapping such as {{r: 8, alpha: 16}}"]
    renamed = {"lora_alpha": "alpha", "lora_dropout": "dropout"}
    faults = [
        f"train.lora.{key}: here it is called '{ours}'; rename it" for key, ours in renamed.items() if key in lora
    ]
    lora = {key: value for key, value in lora.items() if key not in renamed}
    faults += [
        f"train.lora.{key}: not supported: {_UNSUPPORTED_LORA_FIELDS[key]}; remove it"
        for key in lora
        if key in _UNSUPPORTED_LORA_FIELDS
    ]
    try:
        Lora.model_validate({key: value for key, value in lora.items() if key not in _UNSUPPORTED_LORA_FIELDS})
    except ValidationError as error:
        for fault in error.errors():
            key = str(fault["loc"][0])
            if fault["type"] == "extra_forbidden":
                faults.append(f"train.lora.{key}: unknown key{nearest(key, Lora.model_fields)}")
            else:
                faults.append(f"train.lora.{key}: got {fault['input']!r}, {fault['msg'][0].lower()}{fault['msg'][1:]}")
    return list(dict.fromkeys(faults))


def _report_to_faults(targets: Any) -> list[str]:
    """Said before a branch trains: a target that transformers does not know, or whose package is missing."""
    listed = [targets] if isinstance(targets, str) else targets if isinstance(targets, list) else []
    if not set(listed) - {"none", "all"}:
        return []
    from transformers.integrations.integration_utils import (
        INTEGRATION_TO_CALLBACK,
        get_available_reporting_integrations,
    )

    faults, known, installed = [], set(INTEGRATION_TO_CALLBACK), get_available_reporting_integrations()
    for target in listed:
        if target not in known | {"none", "all"}:
            faults.append(f"train.report_to: unknown target {target!r}{nearest(str(target), known)}")
        elif target not in installed and target not in {"none", "all"}:
            faults.append(f"train.report_to: {target} is not installed; pip install {target}, or leave it out")
    return faults


def _fits(kind: Any, value: Any) -> bool:
    try:
        # Strict, so that "fifty" or "1e-5 " is not coerced; int is fine for float.
        TypeAdapter(kind, config=ConfigDict(arbitrary_types_allowed=True)).validate_python(value)
        return not (isinstance(value, str) and kind in (int, float, bool))
    except ValidationError:
        return False
    except Exception:  # a type that pydantic cannot describe: SFTConfig itself checks it
        return True


def _is_path_key(key: str) -> bool:
    return bool(
        re.fullmatch(
            r"student|problems(\.path)?|merge|teachers\.\d+\.(traces|model|python)|"
            r"evaluate\.(problems(\.path)?|python|traces(\..+)?)",
            key,
        )
    )


def _is_model_key(key: str) -> bool:
    return key == "student" or key.endswith(".model")


def _is_remote(values: Mapping[str, Any], key: str) -> bool:
    """Whether the key is a teacher's ``model`` that an endpoint knows by a name of its own: no path here."""
    match = re.fullmatch(r"teachers\.(\d+)\.model", key)
    teachers = values.get("teachers")
    if match is None or not isinstance(teachers, list) or int(match[1]) >= len(teachers):
        return False
    teacher = teachers[int(match[1])]
    return isinstance(teacher, dict) and teacher.get("engine") == "openai" and not teacher.get("serve")


def _resolve_path(key: str, value: str, folder: Path) -> str:
    path = Path(value).expanduser()
    resolved = path if path.is_absolute() else folder / path
    if key == "merge" and not resolved.is_file():
        return value  # the bare name of a merge config
    if is_hub_source(value):
        return value
    if key.endswith(".python"):
        # Not resolved: the interpreter of a virtual environment is a link, and knows by its place where it is.
        return os.path.abspath(resolved)
    made_here = value.startswith("data/") and (folder / "make_data.py").is_file()
    if _is_model_key(key) and not (resolved.exists() or made_here or value.startswith(".")) and _HUB_ID.match(value):
        return value  # a hub id, or the name of a model at an endpoint
    return str(resolved.resolve())


def _resolve_paths(values: dict[str, Any], folder: Path) -> None:
    for key, holder, name in list(_leaves(values)):
        if _is_path_key(key) and isinstance(holder[name], str) and not _is_remote(values, key):
            holder[name] = _resolve_path(key, holder[name], folder)


def _leaves(value: Any, prefix: str = "") -> Iterable[tuple[str, Any, Any]]:
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, inner in pairs:
        key = f"{prefix}.{name}" if prefix else str(name)
        if isinstance(inner, dict | list):
            yield from _leaves(inner, key)
        else:
            yield key, value, name


def _flatten(value: Any) -> dict[str, Any]:
    return {key: holder[name] for key, holder, name in _leaves(value)}


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise UserError(f"override {override!r}: expected key=value, such as train.max_steps=10")
    key = re.sub(r"\[(\d+)\]", r".\1", key.strip())
    try:
        value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]), resolve=False)["value"]  # type: ignore[index,call-overload]
    except (YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"override {override!r}: the value is not YAML: {' '.join(str(error).split())}") from error
    if _is_path_key(key) and isinstance(value, str) and not _is_remote(values, key):
        value = _resolve_path(key, value, Path.cwd())
    holder: Any = values
    *parents, last = key.split(".")
    for part in parents:
        if isinstance(holder, list) and part.isdigit() and int(part) < len(holder):
            holder = holder[int(part)]
        elif isinstance(holder, dict):
            holder = holder.setdefault(part, {})
        else:
            raise UserError(f"override {override!r}: there is no {part!r} to set something in")
    if isinstance(holder, dict):
        holder[last] = value
    elif isinstance(holder, list) and last.isdigit() and int(last) < len(holder):
        holder[int(last)] = value
    else:
        raise UserError(f"override {override!r}: there is no {last!r} to set")


def _section_fields(location: Sequence[str | int]) -> list[str]:
    """Known keys at a place of the recipe."""
    model: Any = Recipe
    for part in location:
        if isinstance(part, int):
            continue
        annotation = model.model_fields[part].annotation if part in getattr(model, "model_fields", {}) else None
        inner = [kind for kind in (annotation, *typing.get_args(annotation)) if isinstance(kind, type)]
        model = next((kind for kind in inner if issubclass(kind, BaseModel)), None)
        if model is None:
            return []
    return list(model.model_fields)


def _describe(fault: Any) -> str:
    location = [
        part for part in fault["loc"] if part not in {"str", "dict[str,any]", "dict[str,float]", "ProblemSource"}
    ]
    where = ".".join(f"[{part}]" if isinstance(part, int) else str(part) for part in location).replace(".[", "[")
    if fault["type"] == "extra_forbidden":
        return f"{where}: unknown key{nearest(str(location[-1]), _section_fields(location[:-1]))}"
    if fault["type"] == "missing":
        return f"{where}: missing; this key is needed"
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "value_error":
        return "\n".join(f"{where}: {line}" if where else line for line in message.split("\n"))
    if fault["type"] == "string_pattern_mismatch" and location[-1] == "name":
        message = "expected lower-case letters, digits, '.', '_' and '-', beginning with a letter or digit"
    if fault["type"] == "string_pattern_mismatch" and location[-1] == "base_url":
        message = "expected a URL such as http://127.0.0.1:8000/v1"
    return f"{where}: got {fault['input']!r}, {message[0].lower()}{message[1:]}"


def _missing_files(values: dict[str, Any], path: Path) -> list[str]:
    remedy = missing_data_remedy(path)
    faults = []
    for key, holder, name in _leaves(values):
        value = holder[name]
        if not _is_path_key(key) or key == "merge" or not isinstance(value, str) or is_hub_source(value):
            continue
        if key.endswith(".model") and _is_remote(values, key):
            continue
        file = Path(value)
        where = re.sub(r"\.(\d+)", r"[\1]", key)
        if _is_model_key(key):
            if file.is_absolute() and not (file / "config.json").is_file():
                faults.append(f"{where}: no checkpoint (config.json) in {_short(file)}{remedy}")
        elif not file.is_file():
            faults.append(f"{where}: file not found: {_short(file)}{remedy}")
    return faults


def missing_data_remedy(path: Path) -> str:
    """What to say when data of the recipe at ``path`` is missing: the script beside it that makes the data, if any."""
    script = path.parent / "make_data.py"
    if script.is_file():
        return f"; make it with 'python {_short(script)}'"
    return "; correct the path, or override it with key=value"


def _short(path: Path) -> str:
    """The path as a person would type it here."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
