"""An OpenAI-compatible server on loopback that misbehaves on purpose, and counts what it is asked.

    python unruly_server.py [SECONDS]    prints its port; answers every request properly after SECONDS

In tests: ``with UnrulyServer(faults) as server``. A fault is the name of a method below, served to a request before its
proper answer; which request gets which is fixed by the faults' order and the order of arrival. The answer to a prompt
``…k+2?`` is ``\\boxed{k+2}``.
"""

import collections
import http.server
import json
import re
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any


def completion(content: Any, finish_reason: Any = "stop", **message: Any) -> dict[str, Any]:
    return {
        "id": "x",
        "object": "chat.completion",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": content, **message},
                     "finish_reason": finish_reason}],
        "usage": {"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12},
    }  # fmt: skip


def proper_answer(body: dict[str, Any]) -> dict[str, Any]:
    number = int(re.search(r"(\d+)\+2\?", body["messages"][-1]["content"])[1])
    return completion(rf"\boxed{{{number + 2}}}", reasoning=f"seed {body['seed']}")


class UnrulyServer(http.server.ThreadingHTTPServer):
    """``asked``: how often each (prompt, seed) came, ``answered``: how often it was answered in full."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(
        self,
        faults: Sequence[str] = (),
        answer: Callable[[dict[str, Any]], Any] = proper_answer,
        seconds: float = 0.0,
    ) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.faults, self.answer, self.seconds = collections.deque(faults), answer, seconds
        self.asked: collections.Counter[Any] = collections.Counter()
        self.answered: collections.Counter[Any] = collections.Counter()
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.in_flight = self.most_in_flight = 0
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def __enter__(self) -> "UnrulyServer":
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *exception: Any) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, *arguments: Any) -> None:
        """A client that hangs up is no news."""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: UnrulyServer

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        key = body["messages"][-1]["content"], body.get("seed")
        server = self.server
        with server.lock:
            server.asked[key] += 1
            server.bodies.append(body)
            server.headers.append({name.lower(): value for name, value in self.headers.items()})
            server.in_flight += 1
            server.most_in_flight = max(server.most_in_flight, server.in_flight)
            fault = server.faults.popleft() if server.faults else None
        try:
            if fault is not None:
                getattr(self, fault)()
                return
            time.sleep(server.seconds)
            answer = server.answer(body)
            self.send(answer if isinstance(answer, bytes) else json.dumps(answer).encode())
            with server.lock:
                server.answered[key] += 1
        finally:
            with server.lock:
                server.in_flight -= 1

    def send(self, content: bytes, status: int = 200, length: int | None = None, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content) if length is None else length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content)

    # Faults

    def too_many(self) -> None:
        self.send(b'{"error": {"message": "slow down"}}', 429)

    def too_many_retry_after(self) -> None:
        self.send(b'{"error": {"message": "slow down"}}', 429, Retry_After="1")

    def broken(self) -> None:
        self.send(b"<html>500</html>", 500)

    def overloaded(self) -> None:
        self.send(b'{"error": {"message": "loading"}}', 503)

    def refused(self) -> None:
        self.send(b'{"error": {"message": "prompt too long"}}', 400)

    def unauthorized(self) -> None:
        self.send(b'{"error": {"message": "no such key"}}', 401)

    def hangs(self) -> None:
        time.sleep(30)

    def slow(self) -> None:
        """A byte every tenth of a second: each read succeeds, the whole never ends."""
        self.send(b"", length=100_000)
        for _ in range(300):
            self.wfile.write(b" ")
            time.sleep(0.1)

    def half(self) -> None:
        content = json.dumps(completion("half an answer")).encode()
        self.send(content[: len(content) // 2])

    def drops(self) -> None:
        """Half of what was announced, then a reset of the connection."""
        content = json.dumps(completion("never whole")).encode()
        self.send(content[: len(content) // 2], length=len(content))
        self.wfile.flush()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True

    def hangs_up(self) -> None:
        self.connection.shutdown(socket.SHUT_RDWR)
        self.close_connection = True

    def no_json(self) -> None:
        self.send(b"I am a proxy's login page")

    def wrong_schema(self) -> None:
        self.send(b'{"choices": "none"}')

    def no_choices(self) -> None:
        self.send(b'{"choices": [], "error": {"message": "upstream failed"}}')

    def content_is_a_number(self) -> None:
        self.send(json.dumps(completion(7)).encode())

    def null_finish(self) -> None:
        self.send(json.dumps(completion("x", None)).encode())

    def a_list(self) -> None:
        self.send(b"[[[]]]")

    def deep(self) -> None:
        self.send(b"[" * 200_000)

    def not_utf8(self) -> None:
        self.send(b'{"choices": "\xff\xfe"}')

    def wrong_compression(self) -> None:
        self.send(b"this is no gzip", Content_Encoding="gzip")


FAULTS = [
    "too_many", "too_many_retry_after", "broken", "overloaded", "hangs", "slow", "half", "drops", "hangs_up", "no_json",
    "wrong_schema", "no_choices", "content_is_a_number", "null_finish", "a_list", "deep", "not_utf8",
    "wrong_compression",
]  # fmt: skip

if __name__ == "__main__":
    server = UnrulyServer(seconds=float(sys.argv[1]) if len(sys.argv) > 1 else 0.0)
    with server:
        print(server.server_address[1], flush=True)
        sys.stdin.read()
