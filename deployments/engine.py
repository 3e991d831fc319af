"""The engine: requests in, tokens out, and ranks kept in step between them.

`Engine` runs one thread with one poller over three things: the ingresses' ROUTER, the workers'
ROUTER and the fleet's death notices. A turn reads what has come, feeds it to the `Gang` of the
present epoch, sends the plans that can be made, and tells the ingresses. When a rank dies, lies,
is silent or late, the epoch ends: readiness is withdrawn at once, every rank is ended, and a new
epoch starts; the ingresses keep their requests and send them again. Starting and ending ranks takes
seconds, so a helper thread does it while this one goes on answering.

The engine knows nothing of Ray or HTTP: `LLM`, the tests and the Serve driver all use this class.
"""

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import zmq
from msgspec import Struct

from deployments.counters import Counters
from deployments.counting import Accounts
from deployments.domain import StepDone
from deployments.first_cause import first_cause
from deployments.fleet import Fleet
from deployments.gang import MISSED_BEATS, Cause, Gang, GangFailed, MaskDue, Model
from deployments.grammar import GrammarRefused, Matcher, Vocabulary
from deployments.grammars import Grammars, Masks, Opened
from deployments.ingress_link import Ingress, IngressLink
from deployments.messages import (
    Cancel,
    DriverBeat,
    EngineInfo,
    EngineView,
    Finish,
    FromIngress,
    Grammar,
    IngressBeat,
    Refused,
    RequestFailed,
    Submit,
    ToIngress,
    Tokens,
    Watch,
)
from deployments.pages import page_names
from deployments.requests import GRAMMAR_ERROR, NUMERICAL_ERROR, Request
from deployments.requests import Finish as FinishReason
from deployments.scheduler import RequestTooLarge, Scheduler, route
from deployments.sockets import CurveKeys, Gate, IpcFolder, bind_router
from deployments.viewpoint import Viewpoint
from deployments.worker_link import LinkFull, WorkerLink
from workers import bundled
from workers.architectures import plan_of
from workers.config import EngineConfig, Environment
from workers.protocol import Hello, TokenLogprobs, unpack
from workers.spec import read_failpoints

log = logging.getLogger("lockstep.engine")

MAX_QUEUED = 10_000
"""Messages an ingress may be behind before it loses its connection."""

RESTART_WINDOW_S = 600.0
"""More than `max_restarts` epochs lost within this time and the engine gives up: whoever watches
it (Serve, Kubernetes) starts it on fresh ground."""


class EngineFailed(RuntimeError):
    """The engine could not start, or has given up; the message says why."""


class Health(Struct, frozen=True):
    """What `/readyz` and Serve's health check look at."""

    ready: bool
    epoch: int
    reason: str
    """Why it is not ready; empty when it is."""
    oldest_step_s: float
    """Age of the oldest step under way."""
    hopeless: bool = False
    """It has given up."""


class Engine:
    def __init__(
        self,
        config: EngineConfig,
        fleet: Fleet,
        *,
        node_ip: str = "127.0.0.1",
        node_id: str = "local",
        listen_tcp: bool = False,
        on_progress: Callable[[str], None] = lambda sentence: None,
        runner: str = "workers.runner:ModelRunner",
    ) -> None:
        """`listen_tcp` opens (CURVE-encrypted) ports on `node_ip` for ranks and ingresses on
        other nodes; without it there are only unix sockets."""
        plan_of(config)  # refuses a combination that no collective plan exists for
        self.config = config
        self.fleet = fleet
        self.node_ip = node_ip
        self.node_id = node_id
        self.counters = Counters.of(config.layout)
        self.accounts = Accounts()
        """What the ingresses count."""
        self._viewpoint = Viewpoint(config, self.counters)
        self._on_progress = on_progress
        self._runner = runner
        self._context = zmq.Context()
        self._folder = IpcFolder()
        self._gate = Gate(self._context) if listen_tcp else None
        self._keys = CurveKeys.fresh()
        self._ingress_socket = bind_router(
            self._context,
            ipc_path=self._folder.path / "driver",
            max_queued=MAX_QUEUED,
            node_ip=node_ip,
            keys=self._keys,
            gate=self._gate,
            domain="ingresses",
        )
        self._ingresses = IngressLink(self._ingress_socket.socket)
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="lockstep-fleet")
        self._launching: Future[None] | None = None
        self._gang: Gang | None = None
        self._link: WorkerLink | None = None
        self._requests: dict[tuple[bytes, int], tuple[Request, Scheduler]] = {}
        self._grammars = Grammars(self._load_vocabulary)
        self._opening: dict[tuple[bytes, int], tuple[Request, Grammar]] = {}
        """Requests whose grammar is being compiled."""
        self._model: Model | None = None
        """As it was found when the first epoch began to serve."""
        self._num_arrivals = 0
        self._epoch = 0
        self._lost_at: float | None = None
        self._loss_cause = Cause.FAILED
        self._losses: deque[float] = deque()
        self._reason = "starting"
        self._hopeless: str | None = None
        self._ready = threading.Event()
        self._over = threading.Event()
        self._stopping = False
        self._next_beat = 0.0
        self._thread = threading.Thread(target=self._run, name="lockstep-engine", daemon=True)

    # What other threads may call

    def start(self) -> None:
        self._thread.start()

    @property
    def thread_ident(self) -> int:
        """Of the loop's thread, for its CPU clock."""
        return self._thread.ident or 0

    def wait_ready(self) -> None:
        """Return when all ranks serve; raise `EngineFailed` if they never will."""
        while not self._ready.wait(0.05):
            if self._over.is_set():
                raise EngineFailed(self._hopeless or "the engine was stopped")

    def info(self) -> EngineInfo:
        """Where ingresses connect and what is served; call after `wait_ready`."""
        gang = self._gang
        model = gang.model if gang else None
        if model is None:
            raise EngineFailed(f"the engine is not ready: {self._reason}")
        return EngineInfo(
            epoch=self._epoch,
            node_id=self.node_id,
            ipc_address=self._ingress_socket.ipc_address,
            tcp_address=self._ingress_socket.tcp_address,
            server_key=self._keys.server_public,
            client_public_key=self._keys.client_public,
            client_secret_key=self._keys.client_secret,
            max_model_len=model.max_model_len,
            vocab_size=model.vocab_size,
            stop_token_ids=model.stop_token_ids,
            beat_ms=self.config.beat_ms,
        )

    def ranks(self) -> list[Hello]:
        """Where every rank of the present epoch runs."""
        gang = self._gang
        return gang.where() if gang else []

    def health(self) -> Health:
        gang = self._gang
        return Health(
            ready=self._ready.is_set(),
            epoch=self._epoch,
            reason=self._hopeless or ("" if self._ready.is_set() else self._reason),
            oldest_step_s=gang.oldest_step_age(time.monotonic()) if gang else 0.0,
            hopeless=self._hopeless is not None,
        )

    @property
    def num_waiting(self) -> int:
        return sum(len(scheduler.waiting) for scheduler in self._schedulers())

    @property
    def num_running(self) -> int:
        return sum(scheduler.num_running for scheduler in self._schedulers())

    @property
    def num_pages(self) -> int:
        return sum(scheduler.pool.num_pages for scheduler in self._schedulers())

    @property
    def num_free_pages(self) -> int:
        return sum(scheduler.pool.num_free for scheduler in self._schedulers())

    @property
    def num_cached_pages(self) -> int:
        return sum(scheduler.pool.num_cached for scheduler in self._schedulers())

    @property
    def num_preemptions(self) -> int:
        before = self.counters.num_preemptions
        return before + sum(scheduler.num_preemptions for scheduler in self._schedulers())

    def _schedulers(self) -> list[Scheduler]:
        gang = self._gang
        return gang.schedulers if gang else []

    def stop(self) -> None:
        """End every rank and release everything; returns when that is done."""
        self._stopping = True
        if self._thread.is_alive():
            self._thread.join()

    # The loop

    def _run(self) -> None:
        try:
            self._launch(time.monotonic())
            while not self._stopping and self._hopeless is None:
                self._turn()
        except Exception:
            log.exception("the engine's loop failed")
            self._hopeless = "the engine's loop failed; its log has the traceback"
        finally:
            self._ready.clear()
            self._tell_all()
            self._close()
            self._over.set()

    def _turn(self) -> None:
        """One turn of the loop: read, advance, plan, tell."""
        self._poll()
        now = time.monotonic()
        for ingress, message in self._ingresses.receive(now):
            self._on_ingress(ingress, message)
            if ingress.is_new:
                ingress.is_new = False
                self._send(ingress.identity, self._beat())
        try:
            self._advance(now)
        except GangFailed as failure:
            self._lose_epoch(failure, now)
        if now >= self._next_beat:
            self._next_beat = now + self.config.beat_ms / 1000
            self._tell_all()
            self._tell_viewers(now)
            self._drop_silent_ingresses(now)
        self.counters.turns.observe(time.monotonic() - now)

    def _poll(self) -> None:
        poller = zmq.Poller()
        poller.register(self._ingresses.socket, zmq.POLLIN)
        poller.register(self._grammars.wake, zmq.POLLIN)
        if self._launching is None:
            poller.register(self.fleet.wake, zmq.POLLIN)
        if self._link is not None:
            poller.register(self._link.socket, zmq.POLLIN)
        wait_s = max(0.0, self._next_beat - time.monotonic())
        if self._launching is not None:
            wait_s = min(wait_s, 0.02)
        poller.poll(round(wait_s * 1000))

    def _advance(self, now: float) -> None:
        if self._launching is not None and self._launching.done():
            launched, self._launching = self._launching, None
            error = launched.exception()
            if error is not None:
                raise GangFailed(str(error), cause=Cause.START) from error
        if self._launching is None:  # until then the fleet belongs to the helper thread
            for death in sorted(self.fleet.deaths(), key=lambda death: not death.by_signal):
                raise GangFailed(death.sentence, death.rank, cause=Cause.DIED)
        gang, link = self._gang, self._link
        if gang is None or link is None:
            return
        for rank, message in link.receive():
            for step in gang.on_message(rank, message, now):
                self._on_step(step)
        gang.check(now)
        if gang.serving and not self._ready.is_set():
            self._on_serving(now)
        self._take_grammars(gang)
        self._ask_masks(gang)  # first, so that they are computed while the next step is planned
        gang.pump(now)
        self._ask_masks(gang)
        self._tell_failed()

    # Epochs

    def _launch(self, now: float) -> None:
        """Start the next epoch's ranks, in the helper thread."""
        self._epoch += 1
        link = self._link = WorkerLink(
            self._context,
            epoch=self._epoch,
            config=self.config,
            ipc_folder=self._folder.path,
            node_ip=self.node_ip,
            gate=self._gate if self.fleet.spans_nodes else None,
        )

        def send(rank: int, *frames: bytes) -> None:
            try:
                link.send(rank, *frames)
            except LinkFull as error:
                raise GangFailed(str(error), rank, cause=Cause.LINK) from error

        self._gang = Gang(
            self.config, epoch=self._epoch, now=now, send=send, on_progress=self._on_progress
        )
        specs = link.specs(
            failpoints=read_failpoints(Environment.read().failpoints), runner=self._runner
        )

        def relaunch() -> None:
            self.fleet.kill()
            self.fleet.start(specs)

        self._launching = self._executor.submit(relaunch)

    def _on_serving(self, now: float) -> None:
        self._reason = ""
        self._model = self._model or (self._gang.model if self._gang else None)
        self._losses_within(now)
        if self._lost_at is not None:
            self.counters.recovered(self._loss_cause, now - self._lost_at)
            known = {"epoch": self._epoch}
            took = now - self._lost_at
            log.warning("epoch %d serves after %.2f s", self._epoch, took, extra=known)
            self._lost_at = None
        self._ready.set()
        self._on_progress(f"ready: epoch {self._epoch}")
        self._tell_all()

    def _lose_epoch(self, failure: GangFailed, now: float) -> None:
        """Withdraw readiness first of all, then end the ranks and start again."""
        was_ready = self._ready.is_set()
        self._ready.clear()
        self._reason = str(failure)
        self._tell_all()
        failure = self._first_cause(failure)
        self._reason = str(failure)
        self.counters.last_failure = str(failure)
        known = {"epoch": self._epoch, "rank": failure.rank}
        step = self._gang.step_of(failure.rank) if self._gang is not None else None
        if step is not None:
            known["step"] = step
        log.error("epoch %d is over: %s", self._epoch, failure, extra=known)
        self._on_progress(str(failure))
        self._requests.clear()
        self._opening.clear()
        self._grammars.forget_tickets()
        self.counters.losses[failure.cause] += 1
        self.counters.num_preemptions = self.num_preemptions
        self._gang = None
        if self._link is not None:
            self._link.close()
            self._link = None
        self._losses.append(now)
        if not was_ready and self._model is None:
            self._hopeless = str(failure)  # it has never served: trying again would not help
        elif self._losses_within(now) > self.config.max_restarts:
            self._hopeless = (
                f"{len(self._losses)} epochs were lost within {RESTART_WINDOW_S:.0f} s, "
                f"the last one because: {failure}"
            )
        else:
            if self._lost_at is None:
                self._lost_at, self._loss_cause = now, failure.cause
            self._launch(now)

    def _first_cause(self, noticed: GangFailed) -> GangFailed:
        gang, link = self._gang, self._link
        if gang is None or link is None or self._launching is not None:
            return noticed  # while it launches, the fleet belongs to the helper thread
        nodes = gang.nodes()
        nodes.pop(self.node_ip, None)
        return first_cause(
            noticed,
            deaths=self.fleet.deaths,
            link=link,
            other_nodes=nodes,
            beat_ms=self.config.beat_ms,
        )

    def _losses_within(self, now: float) -> int:
        while self._losses and now - self._losses[0] > RESTART_WINDOW_S:
            self._losses.popleft()
        return len(self._losses)

    def _close(self) -> None:
        if self._gang is not None:
            with contextlib.suppress(GangFailed):
                self._gang.stop()
        self._executor.submit(self.fleet.stop).result()
        self._executor.shutdown()
        self._grammars.close()
        if self._link is not None:
            self._link.close()
        self._ingress_socket.close()
        if self._gate is not None:
            self._gate.close()
        self._context.destroy(linger=0)
        self._folder.close()

    # Requests

    def _on_ingress(self, ingress: Ingress, message: FromIngress) -> None:
        match message:
            case Submit():
                self._on_submit(ingress, message)
            case Cancel():
                self._end(ingress.identity, message.request, FinishReason.CANCELLED)
            case Finish():
                self._end(ingress.identity, message.request, FinishReason.STOP)
            case IngressBeat():
                self.accounts.heard(ingress.identity, message)
            case Watch():
                self._viewpoint.watch(ingress.identity, message.since, time.monotonic())

    def _on_submit(self, ingress: Ingress, submit: Submit) -> None:
        gang = self._gang
        if submit.epoch != self._epoch or gang is None or not gang.serving or gang.model is None:
            return  # the ingress hears of the epoch it should have named, and submits again
        key = (ingress.identity, submit.request)
        request = Request(
            key=key,
            tokens=unpack(submit.tokens).tolist(),
            num_prompt=submit.num_prompt,
            max_tokens=submit.max_tokens,
            stop_token_ids=frozenset(submit.stop_token_ids),
            sampling=submit.sampling,
            salt=submit.salt,
            queued_at=time.monotonic(),
        )
        refusal = self._refusal(request, gang)
        if refusal is not None:
            self._send(ingress.identity, refusal)
        elif submit.grammar is None:
            self._add(request, gang)
        else:
            self._opening[key] = request, submit.grammar
            opened = self._grammars.open(key, submit.grammar)
            if opened is not None:
                self._on_opened(opened, gang)

    def _add(self, request: Request, gang: Gang) -> None:
        """Give a request to a replica."""
        identity, number = request.key
        schedulers = gang.schedulers
        page_size = self.config.page_size
        chosen = route(
            schedulers,
            len(request.tokens),
            lambda: page_names(request.tokens, page_size=page_size, salt=request.salt),
        )
        request.arrival = self._num_arrivals
        try:
            schedulers[chosen].add(request)
        except RequestTooLarge as error:
            self._send(
                identity, Refused(number, 400, str(error), "max_tokens", "context_length_exceeded")
            )
            return
        self._num_arrivals += 1
        self._requests[request.key] = (request, schedulers[chosen])

    def _refusal(self, request: Request, gang: Gang) -> Refused | None:
        """The driver's own guard, whatever the ingress has checked already."""
        number = request.key[1]
        model = gang.model
        if model is None or request.key in self._requests or request.key in self._opening:
            return Refused(number, 400, "this request is already running", "request")
        if request.num_prompt > len(request.tokens):
            return Refused(number, 400, "the prompt is longer than the tokens sent", "prompt")
        if request.num_output >= request.max_tokens:
            return Refused(number, 400, "nothing is left to generate", "max_tokens")
        if any(not 0 <= token < model.vocab_size for token in request.tokens):
            sentence = f"token ids must be from 0 to {model.vocab_size - 1}"
            return Refused(number, 400, sentence, "prompt")
        if request.num_prompt + request.max_tokens > model.max_model_len:
            sentence = (
                f"{request.num_prompt} prompt tokens and {request.max_tokens} output tokens are "
                f"more than the model's {model.max_model_len}"
            )
            return Refused(number, 400, sentence, "max_tokens", "context_length_exceeded")
        num_waiting = sum(len(scheduler.waiting) for scheduler in gang.schedulers)
        if num_waiting >= self.config.max_queued_requests:
            sentence = f"{num_waiting} requests are waiting already; try again later"
            return Refused(number, 429, sentence, None, "rate_limit_exceeded")
        return None

    def _end(self, identity: bytes, number: int, finish: FinishReason) -> None:
        """The client is gone, or has all it wants: no later plan names the request."""
        self._opening.pop((identity, number), None)
        found = self._requests.pop((identity, number), None)
        if found is None:
            return
        request, scheduler = found
        scheduler.cancel(request, finish)
        self._count(request)

    def _count(self, request: Request) -> None:
        if request.finish is not None:
            outcomes = self.counters.outcomes
            outcomes[request.finish] = outcomes.get(request.finish, 0) + 1

    def _drop_silent_ingresses(self, now: float) -> None:
        for gone in self._ingresses.silent(now, MISSED_BEATS * self.config.beat_ms / 1000):
            self._lose_ingress(gone.identity)

    def _send(self, identity: bytes, message: ToIngress) -> None:
        """An ingress that cannot be told has lost what it asked for."""
        if not self._ingresses.send(identity, message):
            self._lose_ingress(identity)

    def _lose_ingress(self, identity: bytes) -> None:
        self.accounts.lost(identity)
        self._cancel_all_of(identity)

    def _cancel_all_of(self, identity: bytes) -> None:
        asked = [*self._requests, *self._opening]
        for owner, number in [key for key in asked if key[0] == identity]:
            self._end(owner, number, FinishReason.CANCELLED)

    # Grammars

    def _load_vocabulary(self) -> Vocabulary:
        """Of the served model; called in another thread."""
        folder = Path(self.config.model) if self.config.model else bundled.path()
        model = self._model
        if model is None:
            raise GrammarRefused("the model is not there yet")
        return Vocabulary.load(folder, model.vocab_size, model.stop_token_ids)

    def _take_grammars(self, gang: Gang) -> None:
        """What the grammars' threads have done: requests that can begin, masks that can go."""
        all_opened, all_masks = self._grammars.results()
        for opened in all_opened:
            self._on_opened(opened, gang)
        for masks in all_masks:
            due = masks.ticket
            if isinstance(due, MaskDue) and due.epoch == gang.epoch:
                self._on_masks(due, masks, gang)

    def _on_opened(self, opened: Opened, gang: Gang) -> None:
        found = self._opening.pop(opened.ticket, None)
        if found is None:
            return
        request, grammar = found
        identity, number = request.key
        if opened.matcher is None:
            field = grammar.field or "grammar"
            sentence = f"'{field}' cannot be used: {opened.reason}."
            self._send(identity, Refused(number, 400, sentence, field, "invalid_grammar"))
        elif not opened.matcher.accept_all(request.tokens[request.num_prompt :]):
            self._send(identity, RequestFailed(number, GRAMMAR_ERROR))
        else:
            request.matcher = opened.matcher
            self._add(request, gang)

    def _ask_masks(self, gang: Gang) -> None:
        for due in gang.masks_due():
            sampled = due.plan.sampled
            rows = [self._matcher_of(sampled[row]) for row in due.plan.masked_rows]
            self._grammars.ask(Masks(due, self._vocab_size, rows))

    def _matcher_of(self, request: Request) -> tuple[Matcher, frozenset[int]] | None:
        """With the ids that must not end it yet; None once it has ended and its token is lost."""
        if request.matcher is None or request.finish is not None or self._model is None:
            return None
        ends = frozenset(self._model.stop_token_ids)
        if request.num_output >= request.sampling.min_tokens:
            ends -= request.stop_token_ids
        return request.matcher, ends

    @property
    def _vocab_size(self) -> int:
        return self._model.vocab_size if self._model is not None else 0

    def _on_masks(self, due: MaskDue, masks: Masks, gang: Gang) -> None:
        gang.send_mask(due, b"".join(masks.bits))
        sampled = due.plan.sampled
        domain = gang.domains[due.domain]
        for place in masks.failed:
            request = sampled[due.plan.masked_rows[place]]
            domain.schedulers[due.replica].fail(request, GRAMMAR_ERROR)

    def _tell_failed(self) -> None:
        """Requests that ended for a fault of ours, each alone."""
        for scheduler in self._schedulers():
            failed, scheduler.failed = scheduler.failed, []
            for request in failed:
                identity, number = request.key
                known = {"epoch": self._epoch}
                log.warning("request %d ended: %s", number, request.failure, extra=known)
                self._requests.pop(request.key, None)
                self._count(request)
                self.counters.num_poisoned += request.failure == NUMERICAL_ERROR
                self._send(identity, RequestFailed(number, request.failure))

    # Tokens

    def _on_step(self, step: StepDone) -> None:
        """Hand each ingress what this step gave its requests, in one message."""
        counters = self.counters
        counters.step_done(step)
        if self._viewpoint.is_watched:
            self._viewpoint.on_step(step)
        outbox: dict[bytes, Tokens] = {}
        box = Tokens(self._epoch, [], [], [], [])
        owner: bytes | None = None
        for accepted in step.accepted:
            for entry in accepted:
                if entry is None:
                    continue
                request, index, token = entry
                identity, number = request.key
                if identity is not owner:  # neighbours mostly have one owner
                    owner = identity
                    box = outbox.setdefault(identity, Tokens(self._epoch, [], [], [], []))
                box.requests.append(number)
                box.indexes.append(index)
                box.tokens.append(token)
                if request.finish is not None:
                    box.finished.append((number, request.finish))
                    self._requests.pop(request.key, None)
                    self._count(request)
            counters.num_output_tokens += len(accepted)
        self._add_extras(step, outbox)
        for identity, box in outbox.items():
            self._send(identity, box)

    def _add_extras(self, step: StepDone, outbox: dict[bytes, Tokens]) -> None:
        """Log-probabilities and prefix hits, for the requests that have some."""
        for plan, accepted in zip(step.plans, step.accepted, strict=True):
            first_tokens = accepted[len(plan.decodes) :]
            for entry in first_tokens:
                if entry is not None and entry[1] == 0:
                    identity, number = entry[0].key
                    num_cached = max(0, entry[0].num_cached)
                    outbox[identity].begun.append((number, num_cached, entry[0].queue_s))
                    self.counters.first_token(entry[0].num_prompt, num_cached)
        for ack in step.acks.values():
            if ack.logprobs or ack.prompt_logprobs:
                replica = self.config.layout.coordinates(ack.rank).attn_dp
                self._add_logprobs(step, replica, ack.logprobs, outbox)
                self._add_prompt_logprobs(step, replica, ack.prompt_logprobs, outbox)

    def _add_logprobs(
        self,
        step: StepDone,
        replica: int,
        logprobs: tuple[tuple[int, TokenLogprobs], ...],
        outbox: dict[bytes, Tokens],
    ) -> None:
        accepted = step.accepted[replica]
        for row, values in logprobs:
            entry = accepted[row]
            if entry is not None:
                identity, number = entry[0].key
                outbox[identity].logprobs.append((number, entry[1], values))

    def _add_prompt_logprobs(
        self,
        step: StepDone,
        replica: int,
        prompt_logprobs: tuple[tuple[int, int, tuple[TokenLogprobs, ...]], ...],
        outbox: dict[bytes, Tokens],
    ) -> None:
        owners = {chunk.slot: chunk.request for chunk in step.plans[replica].chunks}
        for slot, position, values in prompt_logprobs:
            request = owners[slot]
            if request.finish is None or request.num_output > 0:
                identity, number = request.key
                box = outbox.setdefault(identity, Tokens(self._epoch, [], [], [], [], [], [], []))
                box.prompt_logprobs.append((number, position, values))

    def _beat(self) -> DriverBeat:
        return DriverBeat(
            epoch=self._epoch,
            ready=self._ready.is_set(),
            num_waiting=self.num_waiting,
            num_running=self.num_running,
        )

    def _tell_all(self) -> None:
        beat = self._beat()
        for identity in list(self._ingresses.ingresses):
            self._send(identity, beat)

    def _tell_viewers(self, now: float) -> None:
        """Keep the history of the live page, and show it to those who look."""
        viewpoint = self._viewpoint
        schedulers = self._schedulers()
        heard = {key: one.counters.ttft for key, one in self._ingresses.ingresses.items()}
        viewpoint.sample(now, schedulers, heard)
        if viewpoint.watchers(now):
            health = self.health()
            state = viewpoint.state(
                schedulers,
                self.ranks(),
                epoch=health.epoch,
                reason=health.reason,
                num_preemptions=self.num_preemptions,
            )
            for identity, samples in viewpoint.due():
                self._send(identity, EngineView(state, samples))
