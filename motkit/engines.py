"""How a teacher is asked: the interface of an engine, and the engine ``openai``.

An engine is an asynchronous generator: (teacher, requests, log) → an `Answer` or a `Failure` for each request, in the
order in which they are known. It raises `UserError` when there is no use in going on. What a teacher sends is data:
it is decoded, split into reasoning and response, and stored; nothing evaluates, renders or follows it.
"""

import asyncio
import email.utils
import functools
import json
import os
import random
import time
import urllib.parse
import urllib.request
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from motkit.errors import UserError
from motkit.recipe import Teacher
from motkit.render import THINK_CLOSE, THINK_OPEN
from motkit.samples import Request

_CONNECT_SECONDS = 30.0
_FIRST_DELAY_S, _LONGEST_DELAY_S, _LONGEST_RETRY_AFTER_S = 0.5, 60.0, 300.0

# Every other request would be answered the same way.
_HOPELESS = {
    401: "set api_key_env to the environment variable that holds the key",
    402: "the account has to be paid",
    404: "correct base_url or model",
}


@dataclass(frozen=True)
class Answer:
    """A sample. ``seconds``: from request to answer. Token counts are the teacher's own; None where it gives none."""

    request: Request
    reasoning: str
    response: str
    finish_reason: str
    prompt_tokens: int | None
    tokens: int | None
    seconds: float


@dataclass(frozen=True)
class Failure:
    """No sample. ``rejected``: asking the same again would end the same; it is recorded and not asked again.

    ``limit_bytes``: the limit that the answer was over, if that is why.
    """

    request: Request
    reason: str
    rejected: bool
    limit_bytes: int | None = None


Outcome = Answer | Failure


class Engine(Protocol):
    """``log``: a file for what the engine's own processes print."""

    def __call__(self, teacher: Teacher, requests: Sequence[Request], log: Path) -> AsyncGenerator[Outcome, None]: ...


def split_reasoning(text: str) -> tuple[str, str]:
    """(reasoning, response) of a text with inline think tags.

    The template may have opened the tag already, so a closing one is enough; reasoning that never ends is all
    reasoning. Without tags all of it is the response.
    """
    head, closed, tail = text.partition(THINK_CLOSE)
    if closed:
        return head.strip().removeprefix(THINK_OPEN).strip("\n"), tail.strip()
    if text.lstrip().startswith(THINK_OPEN):
        return text.lstrip().removeprefix(THINK_OPEN).strip("\n"), ""
    return "", text.strip()


def clean_text(text: str) -> str:
    """The text as it can be stored: a lone surrogate, which no encoding has, becomes U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


async def ask_endpoint(
    teacher: Teacher, requests: Sequence[Request], log: Path, base_url: str | None = None
) -> AsyncGenerator[Outcome, None]:
    """The engine ``openai``: at most ``concurrency`` requests in flight, each retried by itself.

    Not streamed: an answer counts when it is whole, and streaming costs the server and us time per token.

    Args:
        base_url: of a server that motkit started, instead of the recipe's.

    Raises:
        UserError: no key, a wrong key, or an unknown model.
    """
    import aiohttp

    key = os.environ.get(teacher.api_key_env, "") if teacher.api_key_env else "none"
    if not key:
        raise UserError(
            f"teacher {teacher.name}: api_key_env: the environment variable {teacher.api_key_env} is not set; export it"
        )
    url = base_url or teacher.base_url
    assert url is not None
    slots = min(teacher.concurrency, len(requests))
    outcomes: asyncio.Queue[Outcome | Exception] = asyncio.Queue()
    pending = iter(requests)
    async with aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=slots),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=min(_CONNECT_SECONDS, teacher.timeout_s)),
        headers={"Authorization": f"Bearer {key}", "Content-Type": "application/json", "Accept": "application/json"},
        cookie_jar=aiohttp.DummyCookieJar(),
        # A proxy of the environment is not for a server that motkit started on this machine.
        proxy=_proxy(url) if base_url is None else None,
    ) as session:
        ask = functools.partial(_ask, session, f"{url.rstrip('/')}/chat/completions", teacher)

        async def work() -> None:
            for request in pending:
                try:
                    outcomes.put_nowait(await ask(request))
                except Exception as error:
                    outcomes.put_nowait(error)

        workers = [asyncio.create_task(work()) for _ in range(slots)]
        try:
            for _ in requests:
                outcome = await outcomes.get()
                if isinstance(outcome, Exception):
                    raise outcome
                yield outcome
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)


def _proxy(url: str) -> str | None:
    """The proxy that the environment names for this URL (``HTTPS_PROXY``, ``NO_PROXY``, …).

    Looked up once: aiohttp's own ``trust_env`` does so for every request, and takes passwords from a netrc as well.
    """
    parts, proxies = urllib.parse.urlsplit(url), urllib.request.getproxies()
    if urllib.request.proxy_bypass(parts.netloc):
        return None
    return proxies.get(parts.scheme) or proxies.get("all")


async def _ask(session: Any, url: str, teacher: Teacher, request: Request) -> Outcome:
    """One request, until it is answered, rejected, or ``max_retries`` are used up."""
    body = _body(teacher, request)
    reason = ""
    for attempt in range(teacher.max_retries + 1):
        started = time.perf_counter()
        retry_after: float | None = None
        try:
            async with asyncio.timeout(teacher.timeout_s):
                answer = await _post(session, url, body, teacher.max_response_bytes)
            return _parse(answer, request, time.perf_counter() - started)
        except _TooLong:
            limit = teacher.max_response_bytes
            return Failure(request, f"the answer is longer than max_response_bytes ({limit})", True, limit)
        except _Refused as error:
            reason = f"HTTP {error.status}: {error}"
            if error.status in _HOPELESS:
                raise UserError(
                    f"teacher {teacher.name}: {teacher.model}: {url}: {reason}; {_HOPELESS[error.status]}"
                ) from error
            if error.status < 500 and error.status not in (408, 409, 425, 429):
                return Failure(request, reason, error.status in (400, 413, 422))
            retry_after = _retry_after_s(error.headers)
        except (_Dropped, _Malformed) as error:
            reason = _short(str(error))
        except TimeoutError:
            reason = f"no answer in {teacher.timeout_s:g} s (timeout_s)"
        if attempt < teacher.max_retries:
            await asyncio.sleep(_delay_s(attempt, retry_after))
    return Failure(request, f"{reason} ({teacher.max_retries + 1} attempts)", False)


class _TooLong(Exception):
    """An answer of more bytes than allowed."""


class _Refused(Exception):
    """An answer with an HTTP status that is no success, and what it says."""

    def __init__(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        super().__init__(_short(_refusal(body)) or "without a word")
        self.status, self.headers = status, headers


class _Dropped(Exception):
    """No connection, or one that ended before the answer did."""


class _Malformed(Exception):
    """An answer, but not in the form of a chat completion."""


def _refusal(body: bytes) -> str:
    """The message of an error, as OpenAI's, FastAPI's and plain servers send it."""
    try:
        value = json.loads(body)
        error = value.get("error", value)
        said = error if isinstance(error, str) else error.get("message") or error.get("detail")
        return str(said or value)
    except (ValueError, AttributeError, RecursionError):
        return body.decode("utf-8", "replace")


def _body(teacher: Teacher, request: Request) -> bytes:
    """A chat completion as it is asked for; a field that is null is not sent."""
    sampling = teacher.sampling
    fields = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_tokens": sampling.max_tokens,
        "seed": request.seed,
        **sampling.extra,
    }
    given = {key: value for key, value in fields.items() if value is not None}
    return json.dumps({"model": teacher.model, "messages": request.messages, **given}).encode()


async def _post(session: Any, url: str, body: bytes, max_response_bytes: int) -> bytes:
    """The body of the answer; reading stops at the limit, whatever the sender says of the length."""
    import aiohttp

    # JSON may take six bytes for one of the text (\u001b), and holds fields besides.
    limit = max_response_bytes * 6 + 65536
    chunks: list[bytes] = []
    length = 0
    try:
        async with session.post(url, data=body) as answer:
            async for chunk in answer.content.iter_any():
                chunks.append(chunk)
                length += len(chunk)
                if length > limit:
                    raise _TooLong
            if answer.status >= 300:
                raise _Refused(answer.status, b"".join(chunks), answer.headers)
    except aiohttp.InvalidURL as error:
        raise UserError(f"{url}: is no URL; correct base_url") from error
    except aiohttp.ClientConnectorError as error:
        raise _Dropped(f"no connection to {error.host}:{error.port}: {error.os_error}") from error
    except aiohttp.ConnectionTimeoutError as error:
        raise _Dropped(f"no connection to {url} in {_CONNECT_SECONDS:g} s") from error
    except (aiohttp.ClientError, OSError, ValueError) as error:  # a reset, half a body, a wrong compression
        if isinstance(error, TimeoutError) and not isinstance(error, aiohttp.ClientError):
            raise  # ours
        said = f"{type(error).__name__}: {error}".rstrip(": ")
        raise _Dropped(f"the connection ended after {length} bytes ({said})") from error
    whole = b"".join(chunks)
    if len(whole) <= max_response_bytes:
        return whole
    try:
        message = json.loads(whole)["choices"][0]["message"]
        texts = [message.get(key) for key in ("content", "reasoning", "reasoning_content")]
        num_bytes = sum(len(text.encode("utf-8", "surrogatepass")) for text in texts if isinstance(text, str))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return whole  # malformed, as `_parse` will say
    if num_bytes > max_response_bytes:
        raise _TooLong
    return whole


def _parse(body: bytes, request: Request, seconds: float) -> Answer:
    """A chat completion of one choice."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise _Malformed(f"the answer is not JSON: {body[:60]!r}") from error
    try:
        choice = value["choices"][0]
        message, finish_reason = choice["message"], choice["finish_reason"]
        content = message.get("content")
        reasoning = message.get("reasoning") or message.get("reasoning_content") or ""
        usage = value.get("usage") or {}
        counts = [usage.get("prompt_tokens"), usage.get("completion_tokens")]
    except (LookupError, TypeError, AttributeError) as error:
        raise _Malformed(f"the answer is no chat completion: {body[:60]!r}") from error
    if not isinstance(finish_reason, str) or not isinstance(content, str | None) or not isinstance(reasoning, str):
        raise _Malformed(f"the answer's content or finish_reason is no text: {body[:60]!r}")
    prompt_tokens, tokens = (count if type(count) is int and count >= 0 else None for count in counts)
    content = clean_text(content or "")
    reasoning, response = (clean_text(reasoning), content.strip()) if reasoning else split_reasoning(content)
    return Answer(request, reasoning, response, clean_text(finish_reason), prompt_tokens, tokens, seconds)


def _delay_s(attempt: int, retry_after: float | None) -> float:
    """Exponential, with jitter so that requests that failed together do not return together."""
    if retry_after is not None:
        return min(retry_after, _LONGEST_RETRY_AFTER_S) + random.uniform(0.0, 0.25)
    return min(_FIRST_DELAY_S * 2.0**attempt, _LONGEST_DELAY_S) * random.uniform(0.5, 1.5)


def _retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Seconds that the server asks us to wait: ``retry-after-ms``, or ``Retry-After`` in seconds or as a date."""
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        try:
            seconds = float(headers.get(name, "")) * unit
        except ValueError:
            continue
        return seconds if 0.0 <= seconds < float("inf") else None
    try:
        date = email.utils.parsedate_to_datetime(headers.get("retry-after", ""))
        return max(0.0, date.timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None


def _short(text: str) -> str:
    return " ".join(text.split())[:200]
