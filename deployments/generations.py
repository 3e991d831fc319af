"""Generations as an ingress knows them: asked for, followed token by token, ended once.

A `GenerateSpec` is all that an engine must be told, whatever engine it is. `Generation` is what is
kept of one until it ends: with its spec and the tokens so far it can go on elsewhere. The
`Generations` of one HTTP request are iterated for what arrived. Nothing here knows of sockets
(`deployments.driver_client` moves generations along), HTTP or text.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self, TypeAlias

from msgspec import Struct

from deployments.counting import Outcome
from deployments.errors import Overloaded, RequestError, ServiceError
from deployments.messages import Cancel, Finish, Grammar
from workers.protocol import Sampling, TokenLogprobs


class GenerateSpec(Struct, frozen=True, kw_only=True):
    """One generation, whatever engine it ends up on: seed and nonce are fixed here."""

    prompt: bytes
    """Prompt ids (int32), as `workers.protocol.pack` writes them."""
    max_tokens: int
    stop_token_ids: tuple[int, ...]
    sampling: Sampling
    salt: str = ""
    grammar: Grammar | None = None

    @property
    def num_prompt(self) -> int:
        return len(self.prompt) // 4


class Event(Struct, frozen=True, gc=False):
    """One output token of the generation number `choice`."""

    choice: int
    index: int
    token: int
    logprobs: TokenLogprobs | None
    finish_reason: str | None


@dataclass(slots=True)
class Course:
    """When what happened to a generation (`time.monotonic`); whole once it has ended.

    NOTE: not the loop's clock, which under uvloop stands still while a callback runs.
    """

    accepted_at: float
    """It could have been sent to the driver."""
    sent_at: float
    """It was sent to the driver that gave its first token."""
    queue_s: float = 0.0
    """How long it waited there for its first plan."""
    first_token_at: float | None = None
    ended_at: float = 0.0
    """Its last token was here, or it was given up."""
    num_tokens: int = 0
    resumed: list[tuple[float, int, int]] = field(default_factory=list)
    """(when, epoch, tokens it had) each time it was sent again."""

    def note_sent(self, epoch: int, num_tokens: int, *, again: bool) -> None:
        """It goes to the driver of `epoch` with the `num_tokens` that it has."""
        now = time.monotonic()
        if not num_tokens:
            self.sent_at = now
        if again:
            if self.resumed and self.resumed[-1][1:] == (epoch, num_tokens):
                self.resumed.pop()  # it was refused for want of room: this is one more try
            self.resumed.append((now, epoch, num_tokens))


class Generation:
    """What is kept of a generation until it ends. `tokens` is only ever appended to."""

    __slots__ = (
        *("began", "choice", "course", "group", "last_token_at", "num_submits", "request", "spec"),
        *("submitted", "tokens", "waiting_since"),
    )

    def __init__(
        self,
        group: "Generations",
        choice: int,
        request: int,
        spec: GenerateSpec,
        *,
        began: float,
        now: float,
    ) -> None:
        self.group = group
        self.choice = choice
        self.request = request
        self.spec = spec
        self.began = began
        """When the client asked."""
        self.last_token_at = began
        called_at = time.monotonic()
        self.course = Course(accepted_at=called_at, sent_at=called_at)
        self.num_submits = 0
        self.tokens: list[int] = []
        self.submitted = False
        """The live driver has it, in its live epoch."""
        self.waiting_since: float | None = now
        """Since when no engine works on it."""


Drop: TypeAlias = Callable[[Generation, Cancel | Finish, Outcome], None]
"""Forgets a generation, and tells the driver if it has it."""


class Generations:
    """The generations of one HTTP request: iterate to get what arrived since the last look.

    Leaving the `async with` cancels whatever has not ended.
    """

    def __init__(self, drop: Drop, num_choices: int) -> None:
        self._drop = drop
        self._events: list[Event] = []
        self._error: ServiceError | None = None
        self._wakeup: asyncio.Future[None] | None = None
        self.live: dict[int, Generation] = {}
        """Choices that have not ended."""
        self.cancelled = False
        self.num_cached = [0] * num_choices
        """Prompt tokens found in the prefix cache, by choice."""
        self.prompt_logprobs: list[dict[int, TokenLogprobs]] = [{} for _ in range(num_choices)]
        """By choice, then by position in the prompt."""
        self.courses: list[Course] = []
        """By choice."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if isinstance(error, Exception) and not isinstance(error, OSError):
            self._drop_all(Outcome.FAILED)  # we could not answer, though the engine went on
        self.cancel()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> list[Event]:
        while not self._events:
            if self._error is not None:
                raise self._error
            if not self.live:
                raise StopAsyncIteration
            self._wakeup = asyncio.get_running_loop().create_future()
            try:
                await self._wakeup
            finally:
                self._wakeup = None
        events, self._events = self._events, []
        return events

    def finish(self, choice: int, index: int) -> None:
        """Output tokens of `choice` from `index` on are not wanted. Again does nothing."""
        generation = self.live.pop(choice, None)
        if generation is not None:
            self._drop(generation, Finish(generation.request, index), Outcome.FINISHED)

    def cancel(self) -> None:
        """Nothing more is wanted. Idempotent, and safe from any callback of the loop."""
        if self.live:
            self.cancelled = True
        self._drop_all(Outcome.CANCELLED)
        self.wake()

    def fail(self, error: ServiceError) -> None:
        """End with `error` once the events before it have been read."""
        if self._error is None and not self.cancelled:
            self._error = error
        is_refusal = isinstance(error, RequestError | Overloaded)
        self._drop_all(Outcome.REJECTED if is_refusal else Outcome.FAILED)
        self.wake()

    def push(self, event: Event) -> None:
        self._events.append(event)
        self.wake()

    def wake(self) -> None:
        if self._wakeup is not None and not self._wakeup.done():
            self._wakeup.set_result(None)

    def _drop_all(self, outcome: Outcome) -> None:
        for generation in self.live.values():
            self._drop(generation, Cancel(generation.request), outcome)
        self.live.clear()
