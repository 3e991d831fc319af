"""One HTTP request and its response, over ASGI's plain calls.

An `Exchange` reads the body (bounded in size and time), notices a client that leaves, and writes
one answer, a page or a stream of server-sent events, with the headers that every response has. It
knows no routes and does not look into bodies.
"""

import asyncio
import re
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import msgspec

from deployments import page
from deployments.answer import Answer
from deployments.counting import Outcome
from deployments.errors import (
    MethodNotAllowed,
    RequestTimeout,
    ServiceError,
    TooLarge,
    Unauthorized,
    UnsupportedMediaType,
)
from deployments.generations import Generations
from deployments.request_plan import Plan
from deployments.schemas import MAX_BODY_BYTES

BODY_TIMEOUT_S = 30.0

SECURITY_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"cache-control", b"no-store"),
    (b"referrer-policy", b"no-referrer"),
)
NOTHING_RUNS = b"default-src 'none'"
"""Content-Security-Policy of all that is not the page."""

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]

encode_json = msgspec.json.Encoder().encode


class ClientGone(Exception):
    """Nobody is there to answer."""


class Exchange:
    """One HTTP request and its response."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, *, names_itself: bool) -> None:
        self.method: str = scope["method"]
        root = scope.get("root_path", "")
        self.path: str = scope["path"].removeprefix(root) or "/"
        self.query: bytes = scope.get("query_string", b"")
        self._raw_headers: list[tuple[bytes, bytes]] = list(scope["headers"])
        self.headers = {key.decode("latin-1"): value for key, value in self._raw_headers}
        self.begun = False
        self.status = 0
        """Of the response, once it has begun."""
        self.request_id = ""
        self.error: ServiceError | None = None
        """Why it failed, if it did."""
        self.generating: tuple[Plan, Answer, Generations] | None = None
        """What the engine does for it, if anybody traces."""
        self.scheme: str = scope.get("scheme", "http")
        self._receive = receive
        self._send = send
        self._ended = False
        self._policy = NOTHING_RUNS
        self._extra_headers = self._identity(names_itself)

    @property
    def outcome(self) -> Outcome:
        """How it ended, once it has."""
        if self.error is not None:
            return outcome_of(self.error)
        return Outcome.FINISHED if self._ended else Outcome.CANCELLED

    @property
    def hosts(self) -> list[str]:
        """What the `Host` header says, empty if there is none; a forged request may have two."""
        found = [value.decode("latin-1") for key, value in self._raw_headers if key == b"host"]
        return found or [""]

    def header(self, name: str) -> str:
        return self.headers.get(name, b"").decode("latin-1")

    async def body(self) -> bytes:
        """All of a JSON body, or an error as soon as it is too long or too late."""
        self._check_is_json()
        length = self.header("content-length")
        if length.isdecimal() and int(length[:20]) > MAX_BODY_BYTES:
            raise TooLarge(MAX_BODY_BYTES)
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                return await self._read()
        except TimeoutError:
            raise RequestTimeout from None

    async def _read(self) -> bytes:
        body = bytearray()
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            body += message.get("body", b"")
            if len(body) > MAX_BODY_BYTES:
                raise TooLarge(MAX_BODY_BYTES)
            if not message.get("more_body", False):
                return bytes(body)

    def _check_is_json(self) -> None:
        kind, _, parameters = self.header("content-type").lower().partition(";")
        charset = re.search(r"charset=\"?([\w-]+)", parameters)
        if kind.strip() != "application/json" or (charset and charset[1] not in ("utf-8", "utf8")):
            raise UnsupportedMediaType
        if self.header("content-encoding").strip().lower() not in ("", "identity"):
            raise UnsupportedMediaType

    async def until_gone(self) -> None:
        """Returns when the client has left."""
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def answer(self, status: int, body: bytes, *headers: tuple[bytes, bytes]) -> None:
        length = (b"content-length", str(len(body)).encode())
        await self._start(status, (b"content-type", b"application/json"), length, *headers)
        await self.write(b"" if self.method == "HEAD" else body, more=False)

    async def show(self, shown: page.Page) -> None:
        self._policy = shown.policy
        length = (b"content-length", str(len(shown.html)).encode())
        await self._start(200, (b"content-type", b"text/html; charset=utf-8"), length)
        await self.write(b"" if self.method == "HEAD" else shown.html, more=False)

    async def begin_events(self) -> None:
        # NOTE: a proxy that buffers would turn the stream into one late answer.
        await self._start(
            200,
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"x-accel-buffering", b"no"),
        )

    async def write(self, data: bytes, *, more: bool) -> None:
        self._ended = not more
        await self._send({"type": "http.response.body", "body": data, "more_body": more})

    async def fail(self, error: ServiceError) -> None:
        """The error as a response, or as the stream's last event if it has begun."""
        self.error = error
        body = encode_json(error.body())
        if not self.begun:
            await self.answer(error.status, body, *_error_headers(error))
        elif not self._ended:
            await self.write(event_of(body), more=False)

    async def _start(self, status: int, *headers: tuple[bytes, bytes]) -> None:
        self.begun = True
        self.status = status
        policy = (b"content-security-policy", self._policy)
        every = [*headers, *SECURITY_HEADERS, policy, *self._extra_headers]
        await self._send({"type": "http.response.start", "status": status, "headers": every})

    def _identity(self, names_itself: bool) -> list[tuple[bytes, bytes]]:
        """Our id of the request, and the client's own if it is fit to be shown."""
        found = []
        theirs = self.headers.get("x-request-id", b"")
        is_showable = re.fullmatch(rb"[\x20-\x7e]{1,128}", theirs)
        if names_itself:
            self.request_id = "req_" + secrets.token_hex(16)
            found.append((b"x-request-id", self.request_id.encode()))
        elif is_showable:
            self.request_id = theirs.decode()
        if is_showable:
            found.append((b"x-client-request-id", theirs))
        return found


def outcome_of(error: Exception) -> Outcome:
    """How a request is counted that ended before its first generation began."""
    if isinstance(error, ClientGone):
        return Outcome.CANCELLED
    is_refusal = isinstance(error, ServiceError) and error.status != 500
    return Outcome.REJECTED if is_refusal else Outcome.FAILED


def event_of(data: bytes) -> bytes:
    """A server-sent event."""
    return b"data: " + data + b"\n\n"


def _error_headers(error: ServiceError) -> list[tuple[bytes, bytes]]:
    headers = []
    if error.retry_after_s is not None:
        headers.append((b"retry-after", str(error.retry_after_s).encode()))
    if isinstance(error, Unauthorized):
        headers.append((b"www-authenticate", b"Bearer"))
    if isinstance(error, MethodNotAllowed):
        headers.append((b"allow", error.allowed.encode()))
    return headers
