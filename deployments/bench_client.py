"""Sends requests to an OpenAI-compatible service and notes when what comes back. The socket edge.

A request is a `POST` with `stream`; its outcome has the time of every chunk that holds output, and
the token counts of the `usage` that the service sends last. Nothing is tried again: a request that
fails is an outcome with the reason.

The client costs 12 to 14 microseconds of CPU a chunk (measured with 64 streams), so one core takes
60 thousand tokens a second, sent one by one.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp
import msgspec
from msgspec import Struct

from deployments.bench_figures import Outcome
from deployments.bench_prompts import Ask

MAX_REASON = 300
"""Characters kept of what a service says about a request that it refuses."""


class _Delta(Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[Any] | None = None

    @property
    def has_output(self) -> bool:
        return bool(self.content or self.reasoning_content or self.reasoning or self.tool_calls)


class _Choice(Struct):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None

    @property
    def has_output(self) -> bool:
        """The role at a chat's begin, or a bare end, is none; a token may have an empty text."""
        if self.delta is not None:
            return self.delta.has_output
        return bool(self.text) or self.finish_reason is None


class _Usage(Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Chunk(Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_decode = msgspec.json.Decoder(_Chunk).decode


class RequestRefused(Exception):
    """This request has no answer; the message says why."""


class EventLines:
    """Server-sent events out of bytes that come in any pieces.

    >>> lines = EventLines()
    >>> lines.feed(b'data: {"a"'), lines.feed(b':1}\\n\\ndata: [DO'), lines.feed(b"NE]\\r\\n")
    ([], [b'{"a":1}'], [b'[DONE]'])
    """

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        """The payloads that are complete now."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [line[5:].strip() for line in lines if line.startswith(b"data:")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Who is asked, and how."""

    url: str
    """Without `/v1`."""
    model: str
    api_key: str = ""
    use_chat: bool = False
    """Text is sent as the first message of a chat."""
    ignore_eos: bool = False
    temperature: float = 0.0
    timeout_s: float = 600.0

    @property
    def headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.api_key}"} if self.api_key else {}

    def address(self, ask: Ask) -> str:
        chat = self.use_chat or ask.is_chat
        return f"{self.url}/v1/chat/completions" if chat else f"{self.url}/v1/completions"

    def body(self, ask: Ask) -> bytes:
        body: dict[str, Any] = {
            "model": self.model,
            "max_tokens": ask.max_tokens,
            "temperature": self.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.ignore_eos:
            body["ignore_eos"] = True
        if ask.is_chat:
            body["messages"] = ask.prompt
        elif self.use_chat:
            body["messages"] = [{"role": "user", "content": ask.prompt}]
        else:
            body["prompt"] = ask.prompt
        return msgspec.json.encode(body)


def new_session() -> aiohttp.ClientSession:
    """As many connections as requests: waiting for one would be counted as the service's time."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0),
        headers={"content-type": "application/json"},
    )


async def first_model(session: aiohttp.ClientSession, url: str, headers: dict[str, str]) -> str:
    """The model that a service names first; `RequestRefused` says why there is none."""
    timeout = aiohttp.ClientTimeout(total=30)
    try:
        async with session.get(f"{url}/v1/models", headers=headers, timeout=timeout) as response:
            data = await response.read()
            if response.status != 200:
                raise RequestRefused(f"{url}/v1/models answered {_reason(response.status, data)}")
        return str(msgspec.json.decode(data)["data"][0]["id"])
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        raise RequestRefused(f"no service answers at {url}: {_name(error)}") from error
    except (msgspec.DecodeError, LookupError, TypeError) as error:
        raise RequestRefused(f"{url}/v1/models names no model: give one with --model") from error


async def ask_one(
    session: aiohttp.ClientSession,
    target: Target,
    ask: Ask,
    began: float,
    on_chunks: Callable[[int], None] = lambda count: None,
) -> Outcome:
    """Send one request and read it to its end; failures are in the outcome."""
    body = target.body(ask)
    sent = time.perf_counter()
    outcome = Outcome(sent=sent - began)
    try:
        async with (
            asyncio.timeout(target.timeout_s),
            session.post(target.address(ask), data=body, headers=target.headers) as response,
        ):
            if response.status != 200:
                raise RequestRefused(_reason(response.status, await response.read()))
            await _read(response, outcome, sent, on_chunks)
    except RequestRefused as error:
        outcome.error = str(error)
    except TimeoutError:
        outcome.error = f"no end after {target.timeout_s:g} s"
    except (aiohttp.ClientError, OSError) as error:
        outcome.error = _name(error)
    outcome.num_input = outcome.num_input or ask.num_input or 0
    return outcome


async def _read(
    response: aiohttp.ClientResponse,
    outcome: Outcome,
    sent: float,
    on_chunks: Callable[[int], None],
) -> None:
    lines, num_done, is_over, last = EventLines(), 0, False, 0.0
    async for data in response.content.iter_any():
        now = time.perf_counter() - sent
        for payload in lines.feed(data):
            if payload == b"[DONE]":
                is_over = True
                continue
            try:
                chunk = _decode(payload)
            except msgspec.DecodeError as error:
                raise RequestRefused(f"a chunk is not understood: {error}") from error
            if chunk.error is not None:
                raise RequestRefused(f"the stream failed: {_text(payload)}")
            if chunk.usage is not None:
                outcome.num_input = chunk.usage.prompt_tokens
                outcome.num_output = chunk.usage.completion_tokens
            if chunk.choices:
                last = now
                if chunk.choices[0].has_output:
                    outcome.chunks.append(now)
        if len(outcome.chunks) > num_done:
            on_chunks(len(outcome.chunks) - num_done)
            num_done = len(outcome.chunks)
    if not is_over:
        raise RequestRefused("the stream ended without [DONE]")
    outcome.num_output = outcome.num_output or len(outcome.chunks)
    if not outcome.chunks:
        if not outcome.num_output:
            raise RequestRefused("the answer has no tokens")
        outcome.chunks.append(last)


async def run_load(
    session: aiohttp.ClientSession,
    target: Target,
    asks: Sequence[Ask],
    times: Sequence[float],
    max_concurrency: int | None,
    *,
    on_chunks: Callable[[int], None] = lambda count: None,
    on_done: Callable[[Outcome], None] = lambda outcome: None,
) -> tuple[float, list[Outcome]]:
    """(seconds from the first to the last, outcomes in the order of `asks`).

    Each is sent at its time, or later while `max_concurrency` others are under way.
    """
    room = asyncio.Semaphore(max_concurrency or len(asks))
    began = time.perf_counter()

    async def one(ask: Ask) -> Outcome:
        async with room:
            outcome = await ask_one(session, target, ask, began, on_chunks)
        on_done(outcome)
        return outcome

    jobs: list[asyncio.Task[Outcome]] = []
    try:
        for ask, at in zip(asks, times, strict=True):
            wait = began + at - time.perf_counter()
            if wait > 0:
                await asyncio.sleep(wait)
            jobs.append(asyncio.create_task(one(ask)))
        outcomes = await asyncio.gather(*jobs)
    finally:
        for job in jobs:
            job.cancel()
    return time.perf_counter() - began, outcomes


def _reason(status: int, data: bytes) -> str:
    return f"{status}: {_text(data)}"


def _text(data: bytes) -> str:
    """An error body's own sentence, or its beginning."""
    try:
        told = msgspec.json.decode(data)
    except msgspec.DecodeError:
        told = None
    if isinstance(told, dict) and isinstance(told.get("error"), dict):
        told = told["error"]
    if isinstance(told, dict) and told.get("message"):
        return " ".join(str(told["message"]).split())[:MAX_REASON]
    return " ".join(data.decode(errors="replace").split())[:MAX_REASON] or "no reason given"


def _name(error: BaseException) -> str:
    return (str(error) or type(error).__name__)[:MAX_REASON]
