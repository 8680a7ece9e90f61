"""A real `vllm serve` on loopback, for the tests marked ``vllm`` and for the benchmark."""

import contextlib
import os
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from motkit import vllm_child

ROOT = Path(__file__).parent.parent
# vLLM's CPU attention refuses the pico-models' heads of 8 dimensions; 64 it takes.
SERVABLE = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64}
# One core for the server is enough for a pico-model, and the cache is 1 GB instead of most of the memory.
SMALL = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "WARNING"}


def find_vllm_python() -> str | None:
    """``MOTKIT_VLLM_PYTHON``, else what 'make vllm' made, else None."""
    named = os.environ.get("MOTKIT_VLLM_PYTHON")
    if named:
        return named
    made = ROOT / ".venv-vllm"
    return str(made / "bin" / "python") if (made / "installed").is_file() else None


def vllm_command(python: str, *arguments: object) -> list[str]:
    return [python, str(Path(vllm_child.__file__)), *map(str, arguments)]


def vllm_environment() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | SMALL


@contextlib.contextmanager
def vllm_serve(python: str, model: Path, log: Path, *arguments: object, seconds: float = 300.0) -> Iterator[str]:
    """Yields the root URL of a healthy server."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = vllm_command(python, "serve", model, "--host", "127.0.0.1", "--port", port, *arguments)
    with log.open("wb") as said:
        server = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=said, stderr=said, env=vllm_environment(), start_new_session=True
        )
    try:
        url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + seconds
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
                if answer.status == 200:
                    break
            if server.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"vllm serve does not start:\n{log.read_text(errors='replace')[-3000:]}")
            time.sleep(0.5)
        yield url
    finally:
        server.stdin.close()  # it ends with all that it started
        server.wait()
