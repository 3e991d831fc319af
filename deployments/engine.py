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

import zmq
from msgspec import Struct

from deployments.counters import Counters
from deployments.counting import Accounts
from deployments.domain import StepDone
from deployments.first_cause import first_cause
from deployments.fleet import Fleet
from deployments.gang import MISSED_BEATS, Cause, Gang, GangFailed, Model
from deployments.ingress_link import Ingress, IngressLink
from deployments.messages import (
    Cancel,
    DriverBeat,
    EngineInfo,
    EngineView,
    Finish,
    FromIngress,
    IngressBeat,
    Submit,
    ToIngress,
    Watch,
)
from deployments.outbox import outbox_of
from deployments.request_book import RequestBook
from deployments.requests import Finish as FinishReason
from deployments.scheduler import Scheduler
from deployments.sockets import CurveKeys, Gate, IpcFolder, bind_router
from deployments.viewpoint import Viewpoint
from deployments.worker_link import LinkFull, WorkerLink
from workers.architectures import plan_of
from workers.config import EngineConfig, Environment
from workers.protocol import Hello
from workers.spec import read_failpoints

log = logging.getLogger("lockstep.engine")

MAX_QUEUED = 10_000
"""Messages an ingress may be behind before it loses its connection."""

DRAIN_LOOK_BEATS = 2
"""Between two looks at what is in flight."""

AWAY_BEATS = 2
"""A turn of the loop that begins so many beats after the one before found the process held up: what
was sent meanwhile may not be here yet, so nobody's silence counts from before it."""

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
        self._book = RequestBook(config, self.counters, self._send)
        self._model: Model | None = None
        """As it was found when the first epoch began to serve."""
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
        self._last_turn = self._awake_since = time.monotonic()
        self._draining_until: float | None = None
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

    @property
    def num_in_flight(self) -> int:
        """Generations that have not ended, as the ingresses last said or as the ranks have them."""
        return max(self.num_waiting + self.num_running, self.accounts.totals().in_flight)

    @property
    def is_draining(self) -> bool:
        return self._draining_until is not None

    @property
    def num_undecodable(self) -> int:
        """Messages of ingresses that could not be read."""
        return self._ingresses.num_undecodable

    def _schedulers(self) -> list[Scheduler]:
        gang = self._gang
        return gang.schedulers if gang else []

    def drain(self, limit_s: float) -> None:
        """From now on ingresses refuse what is new; what runs may go on for `limit_s`.

        Returns at once. Called again it may only shorten the time.
        """
        until = time.monotonic() + limit_s
        self._draining_until = min(until, self._draining_until or until)

    def wait_drained(self) -> None:
        """Return when nothing is in flight, when a drain's time is over, or the loop has ended."""
        # A look follows a pause: ingresses say with each beat what they have under way.
        while not self._over.wait(DRAIN_LOOK_BEATS * self.config.beat_ms / 1000):
            late = self._draining_until is not None and time.monotonic() >= self._draining_until
            if late or not self.num_in_flight:
                return

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
        if now - self._last_turn > AWAY_BEATS * self.config.beat_ms / 1000:
            self._awake_since = now
        self._last_turn = now
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
        poller.register(self._book.wake, zmq.POLLIN)
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
        gang.check(now, awake_since=self._awake_since)
        if gang.serving and not self._ready.is_set():
            self._on_serving(now)
        self._book.take_grammars(gang)
        self._book.ask_masks(
            gang
        )  # first, so that they are computed while the next step is planned
        gang.pump(now)
        self._book.ask_masks(gang)
        self._book.tell_failed(gang)

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
        self._book.forget()
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
        self._book.close()
        if self._link is not None:
            self._link.close()
        self._ingress_socket.close()
        if self._gate is not None:
            self._gate.close()
        self._context.destroy(linger=0)
        self._folder.close()

    # Ingresses

    def _on_ingress(self, ingress: Ingress, message: FromIngress) -> None:
        match message:
            case Submit():
                gang = self._gang
                if gang is None or not gang.serving or message.epoch != gang.epoch:
                    return  # it hears of the epoch it should have named, and submits again
                if gang.model is not None:
                    self._book.submit(ingress.identity, message, gang, gang.model)
            case Cancel():
                self._book.end(ingress.identity, message.request, FinishReason.CANCELLED)
            case Finish():
                self._book.end(ingress.identity, message.request, FinishReason.STOP)
            case IngressBeat():
                self.accounts.heard(ingress.identity, message)
            case Watch():
                self._viewpoint.watch(ingress.identity, message.since, time.monotonic())

    def _drop_silent_ingresses(self, now: float) -> None:
        limit_s = MISSED_BEATS * self.config.beat_ms / 1000
        for gone in self._ingresses.silent(now, limit_s, awake_since=self._awake_since):
            num_lost = self._lose_ingress(gone.identity)
            if num_lost:
                name = gone.identity.decode(errors="replace")
                sentence = "ingress %s has not been heard for %.1f s: its %d requests were stopped"
                log.warning(sentence, name, limit_s, num_lost)

    def _send(self, identity: bytes, message: ToIngress) -> None:
        """An ingress that cannot be told has lost what it asked for."""
        if not self._ingresses.send(identity, message):
            self._lose_ingress(identity)

    def _lose_ingress(self, identity: bytes) -> int:
        """How many requests that ended."""
        self.accounts.lost(identity)
        return self._book.cancel_all_of(identity)

    def _on_step(self, step: StepDone) -> None:
        """Hand each ingress what this step gave its requests, in one message."""
        self.counters.step_done(step)
        if self._viewpoint.is_watched:
            self._viewpoint.on_step(step)
        outbox = outbox_of(step, epoch=self._epoch, layout=self.config.layout)
        self._book.on_outbox(outbox)
        for identity, box in outbox.boxes.items():
            self._send(identity, box)

    def _beat(self) -> DriverBeat:
        return DriverBeat(
            epoch=self._epoch,
            ready=self._ready.is_set(),
            num_waiting=self.num_waiting,
            num_running=self.num_running,
            draining=self.is_draining,
            over=self.is_draining and self._stopping,
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
