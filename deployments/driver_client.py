"""An ingress's line to the driver: requests out, tokens back, each exactly once.

`DriverClient` finds the driver, keeps one socket to it and remembers of every unfinished
generation its prompt and the tokens it has passed on. That is all that is needed to go on
elsewhere: when the driver comes back under a new epoch the generation is sent again with those
tokens, and it continues where it stopped. A token counts only as (request, next index, live
epoch); whatever else arrives is dropped. This module knows nothing of HTTP or text.

    waiting ──driver ready──> submitted ──last token, Finish, Cancel──> gone
       ^                          │
       └── new epoch, no beats, ──┘        waiting longer than `resume_wait_s` ──> EngineUnavailable
           Forgotten
"""

import asyncio
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence

from deployments.counting import Outcome, RequestCounts
from deployments.driver_socket import DriverSocket
from deployments.errors import (
    EngineStopping,
    EngineUnavailable,
    GenerationFailed,
    Overloaded,
    RequestError,
    ServiceError,
)
from deployments.generations import Event, GenerateSpec, Generation, Generations
from deployments.messages import (
    FINISH_LENGTH,
    FINISH_STOP,
    Cancel,
    DriverBeat,
    EngineInfo,
    EngineView,
    Finish,
    Forgotten,
    Refused,
    RequestFailed,
    Submit,
    ToIngress,
    Tokens,
    Watch,
)
from deployments.watching import EngineWatch
from workers.protocol import pack

logger = logging.getLogger("lockstep.driver_client")

MISSED_BEATS = 8
"""So many beats without one from the driver, and it is looked for again."""

AWAY_BEATS = 2
"""A tick that comes so many beats after the one before found this process held up, and the
driver's beats with it: its silence does not count from before."""

LOCATE_TIMEOUT_S = 10.0
LOCATE_PAUSE_S = 0.25


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
        self._resume_wait_s = resume_wait_s
        self._socket = DriverSocket(self._on_message, name=self._name, node_id=node_id)
        self._search: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._generations: dict[int, Generation] = {}
        self._next_request = 0
        self._epoch: int | None = None
        self._engine_ready = False
        self._was_ready = False
        self._last_beat = 0.0
        self._last_tick = self._awake_since = 0.0
        self._draining = False
        self._closed = False
        self.info: EngineInfo | None = None
        """What the driver serves; `None` until it has been found once."""
        self.counts = RequestCounts()
        """What became of the generations asked for here; the beats carry it."""
        self.watch = EngineWatch()
        """For the live page."""
        self._num_stale = 0

    async def start(self) -> None:
        """Begin to look for the driver; returns at once."""
        if self._timer is None and not self._closed:
            self._look_for_driver()
            self._tick()

    async def close(self) -> None:
        """Fail what is unfinished and close the socket."""
        self._closed = True
        self._fail_all(EngineUnavailable())
        if self._timer is not None:
            self._timer.cancel()
        if self._search is not None:
            self._search.cancel()
            await asyncio.gather(self._search, return_exceptions=True)
        self._send_beat()  # the last word: nothing is in flight
        self._socket.end()
        self._disconnect()

    @property
    def ready(self) -> bool:
        """The last beat said ready and not draining, and it is younger than eight beats."""
        is_fresh = self._now() - self._last_beat < MISSED_BEATS * self._beat_s
        return self._engine_ready and not self._draining and is_fresh

    @property
    def num_live(self) -> int:
        return len(self._generations)

    @property
    def num_dropped(self) -> int:
        """Messages and tokens that were not this epoch's, not next or not readable."""
        return self._num_stale + self._socket.num_unreadable

    def ask_for_views(self) -> None:
        """The driver sends views for some seconds from now; each tick asks again if need be."""
        if not self._socket.is_congested:
            self._socket.send(Watch(self.watch.last_sample))

    def generate(self, specs: Sequence[GenerateSpec], *, began: float | None = None) -> Generations:
        """Start one generation for each spec; call it inside the event loop.

        While the engine restarts they wait; before it was ever ready they are refused, and once its
        driver was told to stop, until another is found. `began` is when the client asked (the
        loop's time), if that was earlier.
        """
        if self._draining:
            raise EngineStopping
        if self._closed or not self._was_ready:
            raise EngineUnavailable
        group = Generations(self._drop, len(specs))
        now = self._now()
        began = now if began is None else began
        self.counts.received += len(specs)
        for choice, spec in enumerate(specs):
            request = self._new_request()
            generation = Generation(group, choice, request, spec, began=began, now=now)
            group.live[choice] = generation
            group.courses.append(generation.course)
            self._generations[generation.request] = generation
            self._submit_if_ready(generation)
        return group

    def _drop(self, generation: Generation, farewell: Cancel | Finish, outcome: Outcome) -> None:
        """Forget a generation; the driver is told if it has it."""
        known = self._generations.pop(generation.request, None)
        if known is not None:
            self._count(generation, outcome)
            if generation.submitted:
                self._socket.send(farewell)

    def _fail_all(self, error: ServiceError) -> None:
        for generation in list(self._generations.values()):
            generation.group.fail(error)

    def _count(self, generation: Generation, outcome: Outcome) -> None:
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
        self._disconnect()
        self.watch.forget()
        self.info = info
        self._socket.open(info)
        self._last_beat = self._now()
        self._send_beat(opens=True)

    def _disconnect(self) -> None:
        self._engine_ready = False
        self._epoch = None
        self._socket.close()
        self._hold_all()

    def _tick(self) -> None:
        """Once a beat: say that we live, see whether the driver does, end what waits too long."""
        self._timer = asyncio.get_running_loop().call_later(self._beat_s, self._tick)
        now = self._now()
        if now - self._last_tick > AWAY_BEATS * self._beat_s:
            self._awake_since = now
        self._last_tick = now
        self._socket.drain()  # a busy loop may have beats unread: they count
        if self._socket.is_open:
            heard = max(self._last_beat, self._awake_since)
            if now - heard > MISSED_BEATS * self._beat_s:
                logger.warning("no beat from the driver for %d beats: looking for it", MISSED_BEATS)
                self._disconnect()
                self._look_for_driver()
            else:
                self._send_beat()
                if self.watch.num_streams:
                    self.ask_for_views()
        self._submit_all()
        self._end_overdue()

    def _send_beat(self, *, opens: bool = False) -> None:
        if not self._socket.is_congested:
            num_live = len(self._generations)
            self._socket.send(self.counts.beat(self._name, in_flight=num_live, opens=opens))

    def _end_overdue(self) -> None:
        limit = self._now() - self._resume_wait_s
        for generation in list(self._generations.values()):
            if generation.waiting_since is not None and generation.waiting_since < limit:
                generation.group.fail(EngineUnavailable())

    # Sending.

    def _submit_if_ready(self, generation: Generation) -> None:
        if not self._engine_ready or self._epoch is None or generation.submitted:
            return
        spec = generation.spec
        generation.num_submits += 1
        self.counts.resumed += generation.num_submits == 2
        again = generation.num_submits > 1
        generation.course.note_sent(self._epoch, len(generation.tokens), again=again)
        generation.submitted = True
        generation.waiting_since = None
        self._socket.send(
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

    def _send_again(self, generation: Generation) -> None:
        """Tokens were lost on the way: ask for them under a new number."""
        self._generations.pop(generation.request)
        self._socket.send(Cancel(generation.request))
        generation.request = self._new_request()
        generation.submitted = False
        generation.waiting_since = self._now()
        self._generations[generation.request] = generation
        self._submit_if_ready(generation)

    # Receiving.

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
            case Forgotten():
                self._on_forgotten()

    def _on_beat(self, beat: DriverBeat) -> None:
        self._last_beat = self._now()
        self._draining = beat.draining
        if beat.over:
            self._engine_ready = False
            self._fail_all(EngineStopping())
            return
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

    def _on_forgotten(self) -> None:
        """The driver lives and works on nothing of ours any more: all is asked again, on a line
        that it does not take for the old one."""
        logger.warning("the driver had given this ingress up: asking again for what is unfinished")
        if self.info is not None:
            self._connect(self.info)

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
            self._num_stale += 1
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
                self._num_stale += 1
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

    def _forget(self, generation: Generation, outcome: Outcome) -> None:
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
