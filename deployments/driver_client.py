"""An ingress's line to the driver: requests out, tokens back, each exactly once.

`DriverClient` finds the driver, keeps one ZMQ socket to it and remembers of every unfinished
generation its prompt and the tokens it has passed on. That is all that is needed to go on
elsewhere: when the driver comes back under a new epoch the generation is sent again with those
tokens, and it continues where it stopped. A token counts only as (request, next index, live
epoch); whatever else arrives is dropped. This module knows nothing of HTTP or text.

    waiting ──driver ready──> submitted ──last token, Finish, Cancel──> gone
       ^                          │
       └── new epoch, no beats ───┘        waiting longer than `resume_wait_s` ──> EngineUnavailable

The socket is a plain one read from asyncio's `add_reader`: zmq.asyncio costs a future a message.
"""

import asyncio
import logging
import secrets
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

import msgspec
import zmq
from msgspec import Struct

from deployments.counting import Outcome, RequestCounts
from deployments.errors import (
    EngineUnavailable,
    GenerationFailed,
    Overloaded,
    RequestError,
    ServiceError,
)
from deployments.messages import (
    FINISH_LENGTH,
    FINISH_STOP,
    Cancel,
    DriverBeat,
    EngineInfo,
    EngineView,
    Finish,
    FromIngress,
    Grammar,
    Refused,
    RequestFailed,
    Submit,
    ToIngress,
    Tokens,
    Watch,
    decode_to_ingress,
)
from deployments.watching import EngineWatch
from workers.protocol import MAX_MESSAGE_BYTES, Sampling, TokenLogprobs, encode, pack

logger = logging.getLogger("lockstep.driver_client")

MISSED_BEATS = 8
"""So many beats without one from the driver, and it is looked for again."""

HIGH_WATER_MARK = 16384
"""Messages ZMQ may hold in either direction."""

LAST_WORD_MS = 100
"""How long closing may take to tell the driver how all requests ended."""

LOCATE_TIMEOUT_S = 10.0
LOCATE_PAUSE_S = 0.25


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


class _Generation:
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


class Generations:
    """The generations of one HTTP request: iterate to get what arrived since the last look.

    Leaving the `async with` cancels whatever has not ended.
    """

    def __init__(self, client: "DriverClient", num_choices: int) -> None:
        self._client = client
        self._events: list[Event] = []
        self._error: ServiceError | None = None
        self._wakeup: asyncio.Future[None] | None = None
        self.live: dict[int, _Generation] = {}
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
            self._client.drop(generation, Finish(generation.request, index), Outcome.FINISHED)

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
            self._client.drop(generation, Cancel(generation.request), outcome)
        self.live.clear()


class DriverClient:
    """Submits generations to whichever driver is alive and hands their tokens back."""

    def __init__(
        self,
        locate: Callable[[], Awaitable[EngineInfo]],
        *,
        name: str,
        node_id: str,
        resume_wait_s: float = 60.0,
    ) -> None:
        self._locate = locate
        self._name = f"{name[:200]}-{secrets.token_hex(6)}"
        self._node_id = node_id
        self._resume_wait_s = resume_wait_s
        self._context = zmq.Context()
        self._socket: zmq.Socket[bytes] | None = None
        self._fd = -1
        self._outbox: deque[bytes] = deque()
        self._search: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._generations: dict[int, _Generation] = {}
        self._next_request = 0
        self._epoch: int | None = None
        self._engine_ready = False
        self._was_ready = False
        self._last_beat = 0.0
        self._closed = False
        self.info: EngineInfo | None = None
        """What the driver serves; `None` until it has been found once."""
        self.counts = RequestCounts()
        """What became of the generations asked for here; the beats carry it."""
        self.watch = EngineWatch()
        """For the live page."""
        self.num_dropped = 0
        """Messages and tokens that were not this epoch's, not next or not readable."""

    async def start(self) -> None:
        """Begin to look for the driver; returns at once."""
        if self._timer is None and not self._closed:
            self._look_for_driver()
            self._tick()

    async def close(self) -> None:
        """Fail what is unfinished and close the socket."""
        self._closed = True
        for generation in list(self._generations.values()):
            generation.group.fail(EngineUnavailable())
        if self._timer is not None:
            self._timer.cancel()
        if self._search is not None:
            self._search.cancel()
            await asyncio.gather(self._search, return_exceptions=True)
        if self._socket is not None:
            self._send_beat()  # the last word: nothing is in flight
            self._socket.setsockopt(zmq.LINGER, LAST_WORD_MS)
        self._disconnect()
        self._context.term()

    @property
    def ready(self) -> bool:
        """The driver's last beat said ready, and it is younger than eight beats."""
        return self._engine_ready and self._now() - self._last_beat < MISSED_BEATS * self._beat_s

    @property
    def num_live(self) -> int:
        return len(self._generations)

    def ask_for_views(self) -> None:
        """The driver sends views for some seconds from now; each tick asks again if need be."""
        if not self._outbox:
            self._send(Watch(self.watch.last_sample))

    def generate(self, specs: Sequence[GenerateSpec], *, began: float | None = None) -> Generations:
        """Start one generation for each spec; call it inside the event loop.

        While the engine restarts they wait; before it was ever ready they are refused. `began` is
        when the client asked (the loop's time), if that was earlier.
        """
        if self._closed or not self._was_ready:
            raise EngineUnavailable
        group = Generations(self, len(specs))
        now = self._now()
        began = now if began is None else began
        self.counts.received += len(specs)
        for choice, spec in enumerate(specs):
            request = self._new_request()
            generation = _Generation(group, choice, request, spec, began=began, now=now)
            group.live[choice] = generation
            group.courses.append(generation.course)
            self._generations[generation.request] = generation
            self._submit_if_ready(generation)
        return group

    def drop(self, generation: _Generation, farewell: Cancel | Finish, outcome: Outcome) -> None:
        """Forget a generation; the driver is told if it has it. For `Generations`."""
        known = self._generations.pop(generation.request, None)
        if known is not None:
            self._count(generation, outcome)
            if generation.submitted:
                self._send(farewell)

    def _count(self, generation: _Generation, outcome: Outcome) -> None:
        generation.course.num_tokens = len(generation.tokens)
        generation.course.ended_at = time.monotonic()
        self.counts.end(outcome)
        if outcome is Outcome.FINISHED:
            self.counts.e2e.observe(self._now() - generation.began)

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    @property
    def _beat_s(self) -> float:
        return self.info.beat_ms / 1000 if self.info is not None else LOCATE_PAUSE_S

    def _new_request(self) -> int:
        self._next_request += 1
        return self._next_request

    # Finding the driver, and losing it.

    def _look_for_driver(self) -> None:
        if not self._closed and (self._search is None or self._search.done()):
            self._search = asyncio.get_running_loop().create_task(self._find())

    async def _find(self) -> None:
        while True:
            try:
                info = await asyncio.wait_for(self._locate(), LOCATE_TIMEOUT_S)
                break
            except Exception as error:  # whatever a dead driver's handle raises: ask again
                logger.info("the driver was not found, asking again: %r", error)
                await asyncio.sleep(LOCATE_PAUSE_S)
        self._connect(info)

    def _connect(self, info: EngineInfo) -> None:
        """A fresh socket with a fresh identity: nothing of an older line can arrive on it."""
        self._disconnect()
        self.watch.forget()
        self.info = info
        socket = self._context.socket(zmq.DEALER)
        identity = f"{self._name}-{secrets.token_hex(6)}"
        socket.setsockopt(zmq.IDENTITY, identity.encode())
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.SNDHWM, HIGH_WATER_MARK)
        socket.setsockopt(zmq.RCVHWM, HIGH_WATER_MARK)
        socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        socket.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
        if info.node_id == self._node_id and info.ipc_address:
            socket.connect(info.ipc_address)
        else:
            socket.curve_serverkey = info.server_key.encode()
            socket.curve_publickey = info.client_public_key.encode()
            socket.curve_secretkey = info.client_secret_key.encode()
            socket.connect(info.tcp_address)
        self._socket = socket
        self._fd = socket.fileno()
        asyncio.get_running_loop().add_reader(self._fd, self._drain)
        self._last_beat = self._now()
        self._send_beat()

    def _disconnect(self) -> None:
        self._engine_ready = False
        self._epoch = None
        self._outbox.clear()
        if self._socket is not None:
            asyncio.get_running_loop().remove_reader(self._fd)
            self._socket.close()
            self._socket = None
        self._hold_all()

    def _tick(self) -> None:
        """Once a beat: say that we live, see whether the driver does, end what waits too long."""
        self._timer = asyncio.get_running_loop().call_later(self._beat_s, self._tick)
        self._drain()  # a busy loop may have beats unread: they count
        if self._socket is not None:
            if self._now() - self._last_beat > MISSED_BEATS * self._beat_s:
                logger.warning("no beat from the driver for %d beats: looking for it", MISSED_BEATS)
                self._disconnect()
                self._look_for_driver()
            else:
                self._send_beat()
                if self.watch.num_streams:
                    self.ask_for_views()
        self._submit_all()
        self._end_overdue()

    def _send_beat(self) -> None:
        if not self._outbox:
            self._send(self.counts.beat(self._name, in_flight=len(self._generations)))

    def _end_overdue(self) -> None:
        limit = self._now() - self._resume_wait_s
        for generation in list(self._generations.values()):
            if generation.waiting_since is not None and generation.waiting_since < limit:
                generation.group.fail(EngineUnavailable())

    # Sending.

    def _submit_if_ready(self, generation: _Generation) -> None:
        if not self._engine_ready or self._epoch is None or generation.submitted:
            return
        spec = generation.spec
        generation.num_submits += 1
        self.counts.resumed += generation.num_submits == 2
        self._note_sent(generation, self._epoch)
        generation.submitted = True
        generation.waiting_since = None
        self._send(
            Submit(
                epoch=self._epoch,
                request=generation.request,
                tokens=spec.prompt + pack(generation.tokens),
                num_prompt=spec.num_prompt,
                max_tokens=spec.max_tokens,
                stop_token_ids=spec.stop_token_ids,
                sampling=spec.sampling,
                salt=spec.salt,
                grammar=spec.grammar,
            )
        )

    def _note_sent(self, generation: _Generation, epoch: int) -> None:
        course, num_tokens = generation.course, len(generation.tokens)
        now = time.monotonic()
        if not num_tokens:
            course.sent_at = now
        if generation.num_submits > 1:
            if course.resumed and course.resumed[-1][1:] == (epoch, num_tokens):
                course.resumed.pop()  # it was refused for want of room: this is one more try
            course.resumed.append((now, epoch, num_tokens))

    def _submit_all(self) -> None:
        if self._engine_ready:
            for generation in self._generations.values():
                if not generation.submitted:
                    self._submit_if_ready(generation)
                generation.waiting_since = None

    def _hold_all(self, *, resubmit: bool = True) -> None:
        """No engine works on anything now; `resubmit` if it has forgotten everything too."""
        now = self._now()
        for generation in self._generations.values():
            if resubmit:
                generation.submitted = False
            if generation.waiting_since is None:
                generation.waiting_since = now

    def _send_again(self, generation: _Generation) -> None:
        """Tokens were lost on the way: ask for them under a new number."""
        self._generations.pop(generation.request)
        self._send(Cancel(generation.request))
        generation.request = self._new_request()
        generation.submitted = False
        generation.waiting_since = self._now()
        self._generations[generation.request] = generation
        self._submit_if_ready(generation)

    def _send(self, message: FromIngress) -> None:
        if self._socket is not None:
            self._outbox.append(encode(message))
            self._flush()

    def _flush(self) -> None:
        if self._socket is None or not self._outbox:
            return
        try:
            while self._outbox:
                self._socket.send(self._outbox[0], zmq.NOBLOCK)
                self._outbox.popleft()
        except zmq.Again:
            pass  # the high-water mark: the descriptor or the next tick brings us back
        # NOTE: the descriptor is edge-triggered, and a send may swallow the edge of a message
        # that came in meanwhile: without this look it would lie there until the next one.
        if int(self._socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
            asyncio.get_running_loop().call_soon(self._drain)

    # Receiving.

    def _drain(self) -> None:
        """Read until there is nothing left: the descriptor tells of a change only once."""
        while self._socket is not None:
            try:
                data = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                break
            try:
                message = decode_to_ingress(data)
            except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
                self.num_dropped += 1
                continue
            self._on_message(message)
        self._flush()

    def _on_message(self, message: ToIngress) -> None:
        match message:
            case Tokens():
                self._on_tokens(message)
            case DriverBeat():
                self._on_beat(message)
            case Refused():
                self._on_refused(message)
            case RequestFailed():
                self._on_failed(message)
            case EngineView():
                self.watch.on_view(message)

    def _on_beat(self, beat: DriverBeat) -> None:
        self._last_beat = self._now()
        if beat.epoch != self._epoch:
            self._epoch = beat.epoch
            self._engine_ready = False
            self._hold_all()
        if beat.ready:
            self._was_ready = True
            self._engine_ready = True
            self._submit_all()
        elif self._engine_ready:
            self._engine_ready = False
            self._hold_all(resubmit=False)

    def _on_refused(self, refused: Refused) -> None:
        generation = self._generations.get(refused.request)
        if generation is None:
            return
        generation.submitted = False
        if generation.tokens and refused.status in (429, 503):
            generation.waiting_since = generation.waiting_since or self._now()
            return  # a stream that has begun waits for room; the next tick asks again
        generation.group.fail(_refusal(refused))

    def _on_failed(self, failed: RequestFailed) -> None:
        generation = self._generations.get(failed.request)
        if generation is not None:
            generation.submitted = False
            generation.group.fail(GenerationFailed(failed.code))

    def _on_tokens(self, message: Tokens) -> None:
        if message.epoch != self._epoch or not (
            len(message.requests) == len(message.indexes) == len(message.tokens)
        ):
            self.num_dropped += 1
            return
        self._note_prompts(message)
        logprobs = {(request, index): found for request, index, found in message.logprobs}
        reasons = dict(message.finished)
        last = dict(zip(message.requests, message.indexes, strict=True)) if reasons else {}
        now = self._now()
        ttft, itl = self.counts.ttft, self.counts.itl
        for request, index, token in zip(
            message.requests, message.indexes, message.tokens, strict=True
        ):
            generation = self._generations.get(request)
            if generation is None:
                continue
            if index != len(generation.tokens):
                self.num_dropped += 1
                if index > len(generation.tokens):
                    self._send_again(generation)
                continue
            reason = reasons.get(request) if last.get(request) == index else None
            (itl if generation.tokens else ttft).observe(now - generation.last_token_at)
            generation.last_token_at = now
            generation.tokens.append(token)
            if reason in (FINISH_STOP, FINISH_LENGTH):
                self._forget(generation, Outcome.FINISHED)
            else:
                reason = None
            found = logprobs.get((request, index))
            generation.group.push(Event(generation.choice, index, token, found, reason))
        for request, reason in message.finished:
            self._on_finished(request, reason)

    def _note_prompts(self, message: Tokens) -> None:
        for request, num_cached, queue_s in message.begun:
            generation = self._generations.get(request)
            if generation is not None and not generation.tokens:
                generation.group.num_cached[generation.choice] = num_cached
                generation.course.queue_s = queue_s
                generation.course.first_token_at = time.monotonic()
        for request, first, found in message.prompt_logprobs:
            generation = self._generations.get(request)
            if generation is not None:
                positions = generation.group.prompt_logprobs[generation.choice]
                positions.update(enumerate(found, start=first))

    def _on_finished(self, request: int, reason: str) -> None:
        """A generation that ended without its last token: by an error, or the token was lost."""
        generation = self._generations.get(request)
        if generation is None:
            return
        if reason in (FINISH_STOP, FINISH_LENGTH):
            self._send_again(generation)
            return
        self._forget(generation, Outcome.FAILED)
        generation.group.fail(ServiceError(f"the driver ended the request: {reason}"))

    def _forget(self, generation: _Generation, outcome: Outcome) -> None:
        if self._generations.pop(generation.request, None) is not None:
            self._count(generation, outcome)
        generation.group.live.pop(generation.choice, None)


def _refusal(refused: Refused) -> ServiceError:
    """The driver's refusal as the error of that HTTP status."""
    if refused.status == 429:
        return Overloaded(refused.message)
    if refused.status == 503:
        return EngineUnavailable(refused.message)
    if 400 <= refused.status < 500:
        return RequestError(refused.message, param=refused.param, code=refused.code)
    return ServiceError(refused.message)
