"""vLLM in a process of its own, and perhaps an environment of its own: the engine ``vllm``, `vllm serve` on loan, and
continuations of token ids.

The process, with its GPU memory, is gone when the generation ends, however it ends.
"""

import asyncio
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from motkit.engines import Answer, Failure, Outcome, ask_endpoint, clean_text, split_reasoning
from motkit.errors import UserError
from motkit.recipe import Teacher
from motkit.samples import Request

PYTHON_VARIABLE = "MOTKIT_VLLM_PYTHON"
# Loading hundreds of gigabytes and compiling takes long; a process that has ended is noticed at once.
_START_SECONDS = 3600.0


def has_vllm(python: str | None = None) -> bool:
    """Whether there is a vLLM to start: ``python`` or ``MOTKIT_VLLM_PYTHON`` names an interpreter, or ours has it.

    That the named one has vLLM is seen when it starts.
    """
    return bool(python or os.environ.get(PYTHON_VARIABLE)) or importlib.util.find_spec("vllm") is not None


def vllm_python(python: str | None, who: str) -> str:
    """The interpreter that has vLLM: the recipe's ``python``, else ``MOTKIT_VLLM_PYTHON``, else ours.

    Raises:
        UserError: there is no such interpreter, or none was named and ours has no vLLM.
    """
    named = python or os.environ.get(PYTHON_VARIABLE)
    if named:
        found = shutil.which(named)
        if found is None:
            raise UserError(
                f"{who}: {'python' if python else PYTHON_VARIABLE}: no interpreter at {named}; correct the path"
            )
        return found
    if not has_vllm():
        raise UserError(
            f"{who}: vLLM is not installed here; install motkit[vllm], or set 'python' (or the "
            f"variable {PYTHON_VARIABLE}) to the interpreter of an environment that has it"
        )
    return sys.executable


async def ask_vllm(teacher: Teacher, requests: Sequence[Request], log: Path) -> AsyncGenerator[Outcome, None]:
    """The engine ``vllm``: offline; with ``serve: true`` over HTTP.

    Raises:
        UserError: vLLM does not start, or ends before its work does.
    """
    if teacher.serve:
        async with (
            serving(teacher, log) as url,
            contextlib.aclosing(ask_endpoint(teacher, requests, log, url)) as outcomes,
        ):
            async for outcome in outcomes:
                yield outcome
        return
    sampling = {
        "temperature": teacher.sampling.temperature,
        "top_p": teacher.sampling.top_p,
        "max_tokens": teacher.sampling.max_tokens,
        **teacher.sampling.extra,
    }
    lines = (
        {
            "id": number,
            "messages": request.messages,
            "sampling": {key: value for key, value in {"seed": request.seed, **sampling}.items() if value is not None},
        }
        for number, request in enumerate(requests)
    )
    first = {"model": teacher.model, "engine_args": teacher.engine_args}
    who = f"teacher {teacher.name}"
    async with contextlib.aclosing(_answers(first, lines, teacher.python, who, log)) as answers:
        async for answer, seconds in answers:
            yield _outcome(answer, teacher, requests, seconds)


async def continue_prompts(
    checkpoint: Path,
    prompts: Mapping[int, Sequence[int]],
    seeds: Mapping[int, Mapping[int, int]],
    sampling: Mapping[str, Any],
    *,
    engine_args: Mapping[str, Any],
    python: str | None,
    log: Path,
    on_ready: Callable[[str], None],
) -> AsyncGenerator[tuple[int, int, list[int], str], None]:
    """Continuations of prompts, as soon as each is known: (prompt, sample, its token ids, finish_reason).

    Args:
        prompts: number → token ids.
        seeds: number of the prompt → number of the sample → seed, of every continuation that is asked for.
        sampling: fields of vLLM's SamplingParams. Texts are not made: the token ids come back.
        on_ready: called with vLLM's version once the model is loaded, before anything is sampled.

    Raises:
        UserError: vLLM does not start, refuses a prompt, or ends before its work does.
    """
    who = f"{checkpoint}: vLLM"
    lines = (
        {
            "id": number,
            "prompt_token_ids": list(prompts[number]),
            "seeds": list(of_prompt.items()),
            "sampling": {**sampling, "detokenize": False},
        }
        for number, of_prompt in seeds.items()
    )
    first = {"model": str(checkpoint), "engine_args": dict(engine_args)}
    left = sum(map(len, seeds.values()))
    async with contextlib.aclosing(_answers(first, lines, python, who, log, on_ready)) as answers:
        async for answer, _ in answers:
            if "error" in answer:
                raise UserError(
                    f"{who}: prompt {answer['id']} of {len(prompts[answer['id']])} tokens: {answer['error']}"
                )
            yield answer["id"], answer["sample"], answer["token_ids"], answer["finish_reason"]
            left -= 1
    assert left == 0


async def _answers(
    first: Mapping[str, Any],
    lines: Iterable[Mapping[str, Any]],
    python: str | None,
    who: str,
    log: Path,
    on_ready: Callable[[str], None] = lambda version: None,
) -> AsyncGenerator[tuple[dict[str, Any], float], None]:
    """What `motkit.vllm_child` says to ``first`` and ``lines``: (answer, seconds since the model was loaded)."""
    async with _child(python, who, ["generate"], log, stdout=asyncio.subprocess.PIPE) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        feeding = asyncio.create_task(_feed(child.stdin, first, lines))
        started = time.perf_counter()
        try:
            while True:
                raw = await child.stdout.readline()
                if not raw.endswith(b"\n"):
                    raise UserError(f"{who}: vLLM ended early; {_last_words(log)}")
                answer = json.loads(raw)
                if "ready" in answer:
                    started = time.perf_counter()
                    on_ready(answer["ready"])
                elif "end" in answer:
                    return
                else:
                    yield answer, time.perf_counter() - started
        finally:
            feeding.cancel()
            await asyncio.gather(feeding, return_exceptions=True)


async def _feed(stdin: asyncio.StreamWriter, first: Mapping[str, Any], lines: Iterable[Mapping[str, Any]]) -> None:
    for value in (first, *lines, {"end": True}):
        stdin.write(json.dumps(value).encode() + b"\n")
        await stdin.drain()


def _outcome(answer: Mapping[str, Any], teacher: Teacher, requests: Sequence[Request], seconds: float) -> Outcome:
    request = requests[answer["id"]]
    if "error" in answer:
        return Failure(request, answer["error"], True)
    text = clean_text(answer["text"])
    limit = teacher.max_response_bytes
    if len(text.encode()) > limit:
        return Failure(request, f"the answer is longer than max_response_bytes ({limit})", True, limit)
    reasoning, response = split_reasoning(text)
    return Answer(
        request, reasoning, response, answer["finish_reason"], answer["prompt_tokens"], answer["tokens"], seconds
    )


@contextlib.asynccontextmanager
async def serving(teacher: Teacher, log: Path) -> AsyncIterator[str]:
    """A `vllm serve` of the teacher's model on a free port of 127.0.0.1; yields its base URL once it is healthy.

    Raises:
        UserError: it ends, or is not healthy in an hour.
    """
    assert teacher.model is not None
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = [teacher.model, "--host", "127.0.0.1", "--port", str(port), "--served-model-name", teacher.model]
    arguments += _flags(teacher.engine_args)
    who = f"teacher {teacher.name}"
    async with _child(teacher.python, who, ["serve", *arguments], log, stdout=None) as child:
        deadline = time.monotonic() + _START_SECONDS
        while not await asyncio.to_thread(_is_healthy, f"http://127.0.0.1:{port}/health"):
            if child.returncode is not None or time.monotonic() > deadline:
                raise UserError(f"{who}: vllm serve does not start; {_last_words(log)}")
            await asyncio.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"


def _flags(engine_args: Mapping[str, Any]) -> list[str]:
    """Engine arguments as `vllm serve` takes them: ``{max_model_len: 2048}`` → ``--max-model-len=2048``."""
    flags = []
    for key, value in engine_args.items():
        name = key.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{name}" if value else f"--no-{name}")
        elif value is not None:
            flags.append(f"--{name}={value if isinstance(value, str) else json.dumps(value)}")
    return flags


@contextlib.asynccontextmanager
async def _child(
    python: str | None, who: str, arguments: Sequence[str], log: Path, *, stdout: int | None
) -> AsyncIterator[asyncio.subprocess.Process]:
    """`motkit.vllm_child` under vLLM's interpreter, in a session of its own, which is ended whole on the way out."""
    python = vllm_python(python, who)
    environment = dict(os.environ)
    if python != sys.executable:
        environment.pop("PYTHONPATH", None)  # of our environment, not of vLLM's
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as said:
        child = await asyncio.create_subprocess_exec(
            python,
            str(Path(__file__).with_name("vllm_child.py")),
            *arguments,
            stdin=asyncio.subprocess.PIPE,
            stdout=stdout if stdout is not None else said,
            stderr=said,
            env=environment,
            start_new_session=True,
            limit=2**28,  # bytes of a line
        )
    try:
        yield child
    finally:
        if arguments[0] == "serve" and child.stdin is not None:
            # A server that is asked shuts down in order; the offline engine has nothing left to lose.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError, TimeoutError):
                child.stdin.write(b'{"end": true}\n')
                await asyncio.wait_for(child.wait(), 40.0)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        await child.wait()


def _is_healthy(url: str) -> bool:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except (OSError, urllib.error.URLError):
        return False


def _last_words(log: Path) -> str:
    """The last line of a log that looks like an error, and where the rest is."""
    lines = [line.strip() for line in log.read_bytes()[-100_000:].decode("utf-8", "replace").splitlines()]
    errors = [line for line in lines if "Error: " in line and "See stack trace" not in line]
    said = (errors or [line for line in lines if line] or ["nothing was printed"])[-1]
    return f"it said: {said[-300:]!r}; all of it: {log}"
