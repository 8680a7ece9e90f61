"""Teachers and seed problems → samples: what is missing is asked for, and on disk the moment it arrives.

Here too: text out of a model in this process, which evaluation and the engine ``transformers`` use.
"""

import asyncio
import concurrent.futures
import contextlib
import functools
import queue
import sys
import threading
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from tqdm import tqdm

from motkit import importing
from motkit.checkpoint import end_token_ids, find_checkpoint, load_tokenizer
from motkit.engines import Answer, Engine, Failure, Outcome, ask_endpoint, clean_text, split_reasoning
from motkit.errors import UserError
from motkit.recipe import Evaluation, Recipe, Teacher
from motkit.rundir import RunDir, digest, read_json, storage_errors, write_json
from motkit.samples import REJECTED, Request, SampleFile, read_samples, requests_of, tally
from motkit.summary import load_recorded_recipe
from motkit.traces import SeedProblem, Trace
from motkit.vllm_process import ask_vllm, continue_prompts, has_vllm

# Answers that wait to be judged for the progress bar, and how long it waits for them at the end.
_MOST_UNJUDGED, _LAST_JUDGED_SECONDS = 4096, 2.0


@dataclass(frozen=True)
class Generation:
    """One sampled continuation. ``finish_reason`` is ``stop`` at an end token, ``length`` at the limit."""

    text: str
    num_tokens: int
    finish_reason: str


def generate_texts(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    samples: int,
    temperature: float,
    top_p: float,
    max_tokens: int,
    end_ids: Sequence[int],
    batch_size: int,
    seed: int,
    known: Mapping[tuple[int, int], Generation] | None = None,
    on_result: Callable[[int, int, Generation], None] = lambda prompt, sample, generation: None,
) -> list[list[Generation]]:
    """Continue each prompt, batched by length with padding on the left.

    Args:
        model: a causal LM in evaluation mode, on its device.
        prompts: token ids of each prompt.
        samples: continuations of each prompt.
        temperature: 0 is greedy.
        max_tokens: limit of a continuation, in tokens.
        end_ids: token ids that end a continuation; they are not part of its text.
        batch_size: prompts at a time.
        seed: of the sampling, set before every batch, so that a batch does not depend on those before it.
        known: (prompt, sample) → a generation of an attempt that was interrupted; a batch of which all are known is not
            made again.
        on_result: called with (prompt, sample, generation) for each that is made, after its batch.

    Returns:
        For each prompt, in the order given, its ``samples`` generations.
    """
    import torch
    from transformers import GenerationConfig

    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end_ids[0]
    greedy = temperature == 0.0
    # A fresh config: what the checkpoint's own generation_config would add (top_k, penalties) is not asked for here.
    model.generation_config = GenerationConfig(
        do_sample=not greedy,
        **({} if greedy else {"temperature": temperature, "top_p": top_p, "top_k": 0}),
        num_return_sequences=samples,
        max_new_tokens=max_tokens,
        eos_token_id=list(end_ids),
        pad_token_id=pad_id,
    )
    results: list[list[Generation]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        if known and all((index, sample) in known for index in batch for sample in range(samples)):
            for index in batch:
                results[index] = [known[index, sample] for sample in range(samples)]
            continue
        longest = max(len(prompts[index]) for index in batch)
        padding = [longest - len(prompts[index]) for index in batch]
        ids = torch.tensor([[pad_id] * pad + list(prompts[index]) for pad, index in zip(padding, batch, strict=True)])
        mask = torch.tensor([[0] * pad + [1] * (longest - pad) for pad in padding])
        torch.manual_seed(seed + start)
        with torch.inference_mode():
            output = model.generate(input_ids=ids.to(model.device), attention_mask=mask.to(model.device))
        for row, continuation in enumerate(output[:, longest:].tolist()):
            results[batch[row // samples]].append(_generation(tokenizer, continuation, end_ids))
            number, sample = batch[row // samples], row % samples
            on_result(number, sample, results[number][sample])
    return results


def _generation(tokenizer: Any, continuation: Sequence[int], end_ids: Sequence[int]) -> Generation:
    """The text of T token ids up to the first that ends it."""
    end = next((at for at, token in enumerate(continuation) if token in end_ids), None)
    kept = continuation[:end]
    text = tokenizer.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return Generation(text, len(kept) + (end is not None), "length" if end is None else "stop")


def continue_with_vllm(
    checkpoint: str | Path,
    prompts: Sequence[Sequence[int]],
    *,
    samples: int,
    temperature: float,
    top_p: float,
    max_tokens: int,
    end_ids: Sequence[int],
    seed: int,
    engine_args: Mapping[str, Any] | None = None,
    python: str | None = None,
    log: Path,
    known: Mapping[tuple[int, int], Generation] | None = None,
    on_ready: Callable[[str], None] = lambda version: None,
    on_result: Callable[[int, int, Generation], None] = lambda prompt, sample, generation: None,
) -> list[list[Generation]]:
    """Continue each prompt as `generate_texts` does, with a checkpoint folder and vLLM in a process of its own.

    The text is made here, from the token ids, with the checkpoint's tokenizer: it is what `generate_texts` makes of
    them. vLLM is asked for all at once and batches by itself; its memory is free again when this returns.

    Args:
        checkpoint: folder of the model and its tokenizer.
        prompts: token ids of each prompt.
        samples: continuations of each prompt.
        temperature: 0 is greedy.
        max_tokens: limit of a continuation, in tokens. One that reaches the model's own limit ends there (``length``).
        end_ids: token ids that end a continuation, and nothing else does; they are not part of its text.
        seed: of the sampling. Every continuation has a seed of its own, drawn from this, its prompt's token ids and its
            number, so that it does not depend on which others are asked for.
        engine_args: of ``vllm.LLM``. Unless they say otherwise, ``dtype`` is bfloat16 (what vLLM would choose for a
            float32 checkpoint is float16) and ``max_model_len`` what the longest continuation needs.
        python: the interpreter that has vLLM; default: ``MOTKIT_VLLM_PYTHON``, else ours.
        log: file to which everything that vLLM prints is appended.
        known: (prompt, sample) → a generation that is there already, from an attempt that was interrupted: returned as
            it is, and not asked for.
        on_ready: called with vLLM's version once the model is loaded, before anything is sampled.
        on_result: called with (prompt, sample, generation) for each that arrives, as soon as it does.

    Returns:
        For each prompt, in the order given, its ``samples`` generations.

    Raises:
        UserError: there is no vLLM, it does not start, or it refuses a prompt; what had arrived was handed over.
    """
    checkpoint, found = Path(checkpoint).resolve(), dict(known or {})
    seeds: dict[int, dict[int, int]] = {}
    for number, prompt in enumerate(prompts):
        missing = [sample for sample in range(samples) if (number, sample) not in found]
        if missing:
            seeds[number] = {sample: int(digest([seed, list(prompt), sample])[:7], 16) for sample in missing}
    if seeds:
        tokenizer = load_tokenizer(checkpoint)
        needed = max(len(prompts[number]) for number in seeds) + max_tokens
        greedy = {"temperature": 0.0} if temperature == 0.0 else {"temperature": temperature, "top_p": top_p}
        sampling = {**greedy, "max_tokens": max_tokens, "stop_token_ids": list(end_ids), "ignore_eos": True}
        arguments = {"dtype": "bfloat16", "max_model_len": _longest(checkpoint, needed), **(engine_args or {})}

        async def ask() -> None:
            asked = continue_prompts(
                checkpoint,
                dict(enumerate(prompts)),
                seeds,
                sampling,
                engine_args=arguments,
                python=python,
                log=log,
                on_ready=on_ready,
            )
            async with contextlib.aclosing(asked) as answers:
                async for number, sample, token_ids, _ in answers:
                    found[number, sample] = _generation(tokenizer, token_ids, end_ids)
                    on_result(number, sample, found[number, sample])

        _run_to_end(ask)
    return [[found[number, sample] for sample in range(samples)] for number in range(len(prompts))]


def _longest(checkpoint: Path, needed: int) -> int:
    """``needed`` tokens, or as many as the model has positions."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(checkpoint).get_text_config()
    return min(needed, getattr(config, "max_position_embeddings", None) or needed)


def evaluation_engine(settings: Evaluation) -> str:
    """``transformers`` or ``vllm``: what ``engine: auto`` means on this machine."""
    import torch

    if settings.engine != "auto":
        return settings.engine
    return "vllm" if torch.cuda.is_available() and has_vllm(settings.python) else "transformers"


def text_generator(engine: str, settings: Evaluation, log: Path) -> Callable[..., list[list[Generation]]]:
    """`generate_texts`; for ``vllm`` the same from a checkpoint's folder, through a process of its own."""
    if engine == "transformers":
        return generate_texts
    return functools.partial(continue_with_vllm, engine_args=settings.engine_args, python=settings.python, log=log)


async def ask_transformers(teacher: Teacher, requests: Sequence[Request], log: Path) -> AsyncGenerator[Outcome, None]:
    """The engine ``transformers``: batches of `generate_texts`, in bfloat16 on a GPU and float32 on a CPU.

    A batch is seeded with its first request's seed: a text depends on which others are in its batch.

    Raises:
        UserError: the model cannot be found or loaded.
    """
    import torch
    from transformers import AutoModelForCausalLM

    assert teacher.model is not None
    folder = find_checkpoint(teacher.model)
    tokenizer = load_tokenizer(folder)
    end_ids = sorted(end_token_ids(folder, tokenizer))
    gpu = torch.cuda.is_available()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16 if gpu else torch.float32)
    model = model.to("cuda" if gpu else "cpu").eval()
    sampling = teacher.sampling
    prompts = {request.fingerprint: _prompt_ids(tokenizer, request) for request in requests}
    order = sorted(requests, key=lambda request: len(prompts[request.fingerprint]))
    for start in range(0, len(order), teacher.batch_size):
        batch = order[start : start + teacher.batch_size]
        started = time.perf_counter()
        generations = await asyncio.to_thread(
            generate_texts,
            model,
            tokenizer,
            [prompts[request.fingerprint] for request in batch],
            samples=1,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=sampling.max_tokens,
            end_ids=end_ids,
            batch_size=len(batch),
            seed=batch[0].seed,
        )
        seconds = time.perf_counter() - started
        for request, (generation,) in zip(batch, generations, strict=True):
            text, limit = clean_text(generation.text), teacher.max_response_bytes
            if len(text.encode()) > limit:
                yield Failure(request, f"the answer is longer than max_response_bytes ({limit})", True, limit)
                continue
            reasoning, response = split_reasoning(text)
            num_prompt_tokens = len(prompts[request.fingerprint])
            yield Answer(
                request,
                reasoning,
                response,
                generation.finish_reason,
                num_prompt_tokens,
                generation.num_tokens,
                seconds,
            )


def _prompt_ids(tokenizer: Any, request: Request) -> list[int]:
    """T token ids of the messages in the model's own template; a base model's prompt ends with an empty line."""
    if tokenizer.chat_template is None:
        text = (tokenizer.bos_token or "") + "".join(f"{message['content']}\n\n" for message in request.messages)
    else:
        text = tokenizer.apply_chat_template(list(request.messages), tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _engine(teacher: Teacher) -> Engine:
    if teacher.engine == "transformers":
        return ask_transformers
    return ask_vllm if teacher.engine == "vllm" or teacher.serve else ask_endpoint


def generate_traces(
    recipe: Recipe,
    run: str | Path,
    *,
    teachers: Sequence[str] = (),
    verify: Callable[[SeedProblem, str, str], Any] | None = None,
    progress: bool = True,
    say: Callable[[str], None] = lambda line: print(line, file=sys.stderr),
) -> dict[str, dict[str, Any]]:
    """Ask every teacher that has a model for the samples that are missing.

    1. Hold the run; list what the recipe asks of each teacher.
    2. Look up what ``RUN/generated/<teacher>.jsonl`` holds of it: from this recipe or an earlier one, whole or cut.
    3. Ask for the rest, a teacher at a time; every sample is appended the moment it arrives.
    4. Record tokens, seconds and cost in ``RUN/generated/report.json``.

    A sample that fails although it is retried is left out, counted, and asked for again next time. One that was cut
    off while it was in flight, by a kill, is asked for again as well: nothing of it had arrived.

    Args:
        recipe: from `motkit.load_recipe`.
        run: the run's folder; made if it does not exist.
        teachers: names; default: every teacher with a model.
        verify: (problem, response, finish_reason) → verdict with ``correct``, for the progress bar's count of what is
            right (`motkit.verify.Verifier.one`); called in a thread of its own.
        progress: a bar per teacher on stderr.
        say: receives a line per teacher.

    Returns:
        What ``report.json`` holds of each teacher that was asked, see `_Generation._record`.

    Raises:
        UserError: an unknown teacher, one that does not answer, or samples that are missing at the end; what arrived
            stays.
    """
    folder = RunDir(Path(run).resolve())
    asked = _teachers_to_ask(recipe, teachers)
    _, problems = importing.seed_problems(recipe, folder.source("problems"))
    with storage_errors(folder.root), folder.hold():
        _refuse_other_teachers(folder, recipe)
        reports = read_json(folder.generated_report)
        missing: list[str] = []
        for teacher in asked:
            generation = _Generation(folder, teacher, problems, recipe.seed, reports, verify, progress, say)
            _run_to_end(generation.run)
            if generation.failures:
                missing.append(
                    f"teacher {teacher.name}: {len(generation.failures)} of {len(generation.requests)} samples are "
                    f"missing (for example {next(iter(generation.failures.items()))}); run the same command again to "
                    "ask for those alone"
                )
        if missing:
            raise UserError("\n".join(missing))
        return {teacher.name: reports[teacher.name] for teacher in asked}


def generated_traces(
    recipe: Recipe, folder: RunDir, teacher: Teacher, problems: Mapping[str, SeedProblem]
) -> list[Trace]:
    """The samples of a teacher with a model, as `read_traces` gives those of a file.

    Raises:
        UserError: some are missing.
    """
    requests = requests_of(teacher, problems, recipe.seed)
    path = folder.generated(teacher.name)
    traces = read_samples(path, requests, teacher.max_response_bytes)
    if len(traces) < len(requests):
        raise UserError(
            f"teacher {teacher.name}: {len(requests) - len(traces)} of {len(requests)} samples are missing in {path}; "
            f"run 'motkit generate RECIPE --run {folder.root} --teacher {teacher.name}' with this recipe first"
        )
    return traces


def _teachers_to_ask(recipe: Recipe, names: Sequence[str]) -> list[Teacher]:
    known = {teacher.name: teacher for teacher in recipe.teachers}
    for name in names:
        if name not in known:
            raise UserError(f"--teacher {name}: the recipe has no such teacher; it has {', '.join(known)}")
        if known[name].model is None:
            raise UserError(f"--teacher {name}: has 'traces' already; only a teacher with 'model' is asked")
    chosen = [teacher for teacher in recipe.teachers if teacher.model and (not names or teacher.name in names)]
    if not chosen:
        raise UserError("the recipe has no teacher to ask: all have 'traces'; give one 'model' and 'engine' instead")
    return chosen


def _refuse_other_teachers(folder: RunDir, recipe: Recipe) -> None:
    """Rounds that have begun go on with the samples that they began with."""
    if not folder.recipe.is_file():
        return
    changed = recipe.differences(load_recorded_recipe(folder))
    changed = [line for line in changed if line.startswith(("teachers.", "problems:", "seed:"))]
    if changed:
        lines = "\n".join(f"  {line}" for line in changed)
        raise UserError(
            f"{folder.root}: its rounds began with other teachers; restore the recipe, or choose another folder with "
            f"--run:\n{lines}"
        )


def _run_to_end(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """`asyncio.run`, also where an event loop runs already (a notebook)."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        asyncio.run(work())
        return
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        thread.submit(lambda: asyncio.run(work())).result()


class _Judging:
    """How many answers are right, for the progress bar, judged in a thread so that no request waits for it.

    Answers that come faster than they can be judged are not counted, rather than kept; and where the verifier itself
    fails the count ends: the filter, which judges them all, says why.
    """

    def __init__(self, verify: Callable[[SeedProblem, str, str], Any] | None) -> None:
        self.right = self.judged = 0
        self._verify, self._stop = verify, False
        self._waiting: queue.SimpleQueue[tuple[SeedProblem, str, str] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        if self._verify is not None:
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._verify is not None:
            self._stop = True
            self._waiting.put(None)
            self._thread.join()

    def add(self, problem: SeedProblem, response: str, finish_reason: str) -> None:
        if self._thread.is_alive() and self._waiting.qsize() < _MOST_UNJUDGED:
            self._waiting.put((problem, response, finish_reason))

    def finish(self, seconds: float) -> None:
        """Wait for what has been added, but not longer than this."""
        if self._verify is not None:
            self._waiting.put(None)
            self._thread.join(seconds)

    def _run(self) -> None:
        assert self._verify is not None
        with contextlib.suppress(UserError):
            while (answer := self._waiting.get()) is not None and not self._stop:
                self.right += self._verify(*answer).correct is True
                self.judged += 1


class _Generation:
    """One teacher's samples in one process."""

    def __init__(
        self,
        folder: RunDir,
        teacher: Teacher,
        problems: Mapping[str, SeedProblem],
        seed: int,
        reports: dict[str, Any],
        verify: Callable[[SeedProblem, str, str], Any] | None,
        progress: bool,
        say: Callable[[str], None],
    ) -> None:
        self.folder, self.teacher, self.problems = folder, teacher, problems
        self.reports, self.verify, self.progress, self.say = reports, verify, progress, say
        self.requests = requests_of(teacher, problems, seed)
        self.path = folder.generated(teacher.name)
        self.failures: dict[str, str] = {}
        self.asking_since: float | None = None
        self.new_tokens = 0
        earlier = reports.get(teacher.name, {})
        self.seconds_before, self.asking_seconds_before = (
            earlier.get("seconds", 0.0),
            earlier.get("asking_seconds", 0.0),
        )

    async def run(self) -> None:
        with SampleFile(self.path) as self.file:
            limit = self.teacher.max_response_bytes
            self.tally = tally(self.path, self.requests, limit)
            self.wanted = {(request.problem_id, request.sample): request.fingerprint for request in self.requests}
            missing = [request for request in self.requests if request.label not in self.tally.current]
            have, name = len(self.requests) - len(missing), self.teacher.name
            stale = f", {self.tally.stale} stale" if self.tally.stale else ""
            there = f"generate {name}: {have} of {len(self.requests)} samples are there{stale}"
            log = self._log if self.teacher.engine == "vllm" or self.teacher.serve else None
            asks = f"starts vLLM (it logs to {log}) and asks for the rest" if log else "asks for the rest"
            self.say(f"{there}; {asks if missing else 'nothing to ask'}")
            self.started = time.perf_counter()
            try:
                if missing:
                    with self._bar(have) as self.bar, _Judging(self.verify if self.progress else None) as self.judging:
                        await self._ask(missing)
                        await asyncio.to_thread(self.judging.finish, _LAST_JUDGED_SECONDS)
                        self._show()
            finally:
                self._record()
        report = self.reports[name]
        if missing:
            cost = f", cost {report['cost']:.2f}" if report["cost"] is not None else ""
            before = report["seconds"] - report["asking_seconds"]
            self.say(
                f"generate {name}: {report['answered']} answered, {report['truncated']} truncated, "
                f"{report['rejected']} rejected, {report['missing']} missing; {report['tokens']} tokens in "
                f"{report['asking_seconds']:.0f} s{f', after {before:.0f} s of loading' if before >= 5 else ''}{cost}"
            )

    @property
    def _log(self) -> Path:
        return self.folder.logs / f"generate_{self.teacher.name}.log"

    async def _ask(self, missing: Sequence[Request]) -> None:
        engine = _engine(self.teacher)
        # A setting that the teacher refuses looks like a refusal of every single request. So rejections count from the
        # first answer on; and a teacher that has stopped answering is not asked hundreds of times more.
        answered = not all(self.tally.current.values())
        rejections: list[Failure] = []
        in_a_row, too_many = 0, max(8, self.teacher.concurrency if self.teacher.over_http else 0)
        async with contextlib.aclosing(engine(self.teacher, missing, self._log)) as outcomes:
            async for outcome in outcomes:
                if isinstance(outcome, Answer):
                    answered, in_a_row = True, 0
                    self._append(_row(outcome, self.teacher), outcome)
                elif outcome.rejected and (answered or outcome.limit_bytes is not None):
                    self._append(_rejected_row(outcome, self.teacher), outcome)
                elif outcome.rejected:
                    rejections.append(outcome)
                else:
                    in_a_row += 1
                    self.failures[outcome.request.label] = outcome.reason
                if answered and rejections:
                    for rejection in rejections:
                        self._append(_rejected_row(rejection, self.teacher), rejection)
                    rejections.clear()
                if in_a_row + len(rejections) >= min(too_many, len(missing)):
                    reason = rejections[0].reason if rejections else outcome.reason  # type: ignore[union-attr]
                    raise UserError(
                        f"teacher {self.teacher.name}: none of {in_a_row + len(rejections)} requests in a row was "
                        f"answered: {reason}; what had arrived stays: mend it and run the same command again"
                    )
        self.failures |= {rejection.request.label: rejection.reason for rejection in rejections}

    def _append(self, row: Mapping[str, Any], outcome: Outcome) -> None:
        synced = self.file.append(row)
        self.tally.add(row, self.wanted, self.teacher.max_response_bytes)
        if isinstance(outcome, Answer):
            problem = self.problems[outcome.request.problem_id]
            self.judging.add(problem, outcome.response, outcome.finish_reason)
        if self.asking_since is None:  # what came before was loading the model
            self.asking_since = time.perf_counter() - (outcome.seconds if isinstance(outcome, Answer) else 0.0)
        self.new_tokens += row.get("tokens") or 0
        self._show()
        self.bar.update()
        if synced:
            self._record()

    def _show(self) -> None:
        if self.asking_since is None or not self.progress:
            return
        rate = self.new_tokens / max(time.perf_counter() - self.asking_since, 1e-3)
        judged = f", {self.judging.right}/{self.judging.judged} right" if self.judging.judged else ""
        self.bar.set_postfix_str(f"{rate:.0f} tokens/s{judged}", refresh=False)

    def _bar(self, have: int) -> Any:
        return tqdm(
            total=len(self.requests),
            initial=have,
            desc=self.teacher.name,
            unit="sample",
            smoothing=0.05,
            disable=not self.progress,
            file=sys.stderr,
        )

    def _record(self) -> None:
        """``generated/report.json``: this teacher's part, while it runs as at its end.

        Of the samples that the recipe asks for: answered (``truncated`` of them cut at max_tokens), rejected, missing,
        and their tokens, as the teacher counts them (``without_usage``: samples whose teacher did not). ``seconds`` of
        every attempt so far, and without the loading of the model. ``cost`` is of every line of the file, stale ones
        too: they were paid for. An attempt that brought no sample is not in it.
        """
        tally, teacher = self.tally, self.teacher
        now = time.perf_counter()
        asking_seconds = 0.0 if self.asking_since is None else now - self.asking_since
        rejected = sum(tally.current.values())
        price = teacher.price_per_million_tokens
        cost = None
        if price is not None:
            cost = (tally.paid_prompt_tokens * price.input + tally.paid_tokens * price.output) / 1e6
        self.reports[teacher.name] = {
            "model": teacher.model,
            "engine": teacher.engine,
            "asked": len(self.requests),
            "answered": len(tally.current) - rejected,
            "truncated": tally.truncated,
            "rejected": rejected,
            "missing": len(self.requests) - len(tally.current),
            "stale": tally.stale,
            "prompt_tokens": tally.prompt_tokens,
            "tokens": tally.tokens,
            "without_usage": tally.without_usage,
            "seconds": round(self.seconds_before + now - self.started, 3),
            "asking_seconds": round(self.asking_seconds_before + asking_seconds, 3),
            "cost": cost,
        }
        write_json(self.folder.generated_report, self.reports)


def _row(answer: Answer, teacher: Teacher) -> dict[str, Any]:
    """An answer as its line: a trace, and what it took."""
    return {
        "problem_id": answer.request.problem_id,
        "sample": answer.request.sample,
        "reasoning": answer.reasoning,
        "response": answer.response,
        "finish_reason": answer.finish_reason,
        "model": teacher.model,
        "prompt_tokens": answer.prompt_tokens,
        "tokens": answer.tokens,
        "seconds": round(answer.seconds, 3),
        "request": answer.request.fingerprint,
    }


def _rejected_row(failure: Failure, teacher: Teacher) -> dict[str, Any]:
    row: dict[str, Any] = {
        "problem_id": failure.request.problem_id,
        "sample": failure.request.sample,
        "reasoning": "",
        "response": "",
        "finish_reason": REJECTED,
        "model": teacher.model,
        "reason": clean_text(failure.reason),
        "request": failure.request.fingerprint,
    }
    return row if failure.limit_bytes is None else {**row, "limit_bytes": failure.limit_bytes}
