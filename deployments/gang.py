"""One epoch of the engine's ranks: from their first Hello to the last acknowledged step.

`Gang` is the driver's side of the conversation in `workers.protocol`. It turns messages into the
next messages (all have said Hello -> Start; all Ready -> Serve; all Started -> steps), drives the
lockstep domains, and notices what is wrong: a rank that says so, disagrees, is silent or late. Any
of that is a `GangFailed` that names the rank; the engine then ends the epoch and starts another.

Time comes in as `now` (seconds, monotonic), messages go out through `send`: tests need no socket.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from deployments.deadlock import Waits
from deployments.domain import Desync, Domain, StepDone, odd_ones
from deployments.scheduler import Plan, Scheduler
from parallel.padding_cost import PaddingCosts, slowest
from workers.architectures import plan_of
from workers.config import EngineConfig
from workers.protocol import (
    LEDGER_HALF,
    PROTOCOL_VERSION,
    STEP,
    Ack,
    Beat,
    Failed,
    FromWorker,
    Hello,
    Mask,
    Progress,
    Ready,
    Serve,
    Start,
    Started,
    Stop,
    encode,
    pack,
)

MISSED_BEATS = 8
"""So many heartbeats without a sign are a death (design decision 16)."""

LOADING_PATIENCE = 15
"""Until it serves a rank may be silent so much longer: loading can hold the interpreter."""

Send = Callable[..., None]
"""`send(rank, *frames)`."""


class Cause(StrEnum):
    """What ends epochs, in a few words that metrics can be labelled with."""

    DIED = "died"
    FAILED = "failed"
    """The rank said that it cannot go on, or was not fit to begin."""
    SILENT = "silent"
    HUNG = "hung"
    DESYNC = "desync"
    START = "start"
    """Not all ranks came up in time, or at all."""
    LINK = "link"
    """A rank does not read what it is sent."""


class GangFailed(Exception):
    """The epoch is over because of `rank` (or None); the message is for the operator."""

    def __init__(
        self, sentence: str, rank: int | None = None, *, cause: Cause = Cause.FAILED
    ) -> None:
        super().__init__(sentence)
        self.rank = rank
        self.cause = cause


def complaint(rank: int, reason: str) -> GangFailed:
    """A rank's own word that it cannot go on."""
    return GangFailed(f"rank {rank} failed: {reason}", rank)


@dataclass(frozen=True, slots=True)
class Model:
    """What the workers found in the checkpoint, the same on all ranks."""

    max_model_len: int
    vocab_size: int
    stop_token_ids: tuple[int, ...]
    num_pages: int
    """Pages of each replica."""
    buckets: tuple[int, ...] = ()
    """Rows of the decode graphs that all ranks capture."""
    prompt_buckets: tuple[int, ...] = ()
    """Rows of the graphs of steps with prompts that all ranks capture."""


class MaskDue(NamedTuple):
    """A replica's step that waits for a mask."""

    epoch: int
    domain: int
    step: int
    replica: int
    plan: Plan


class Gang:
    def __init__(
        self,
        config: EngineConfig,
        *,
        epoch: int,
        now: float,
        send: Send,
        on_progress: Callable[[str], None] = lambda sentence: None,
    ) -> None:
        self.config = config
        self.layout = config.layout
        self.plan = plan_of(config)
        self.epoch = epoch
        self.model: Model | None = None
        self.domains: list[Domain] = []
        self.serving = False
        self.num_steps = 0
        self._send = send
        self._on_progress = on_progress
        self._hello: dict[int, Hello] = {}
        self._ready: dict[int, Ready] = {}
        self._started: dict[int, Started] = {}
        self._progress: dict[int, Progress] = {}
        self._started_at = now
        self._last_heard: dict[int, float] = {}
        self._last_step: dict[int, int] = {}
        self._waits = Waits(self.layout, self.plan)
        self._sent_at: dict[tuple[int, int], float] = {}
        self._stages: list[str] = []
        self._shown = ""

    @property
    def schedulers(self) -> list[Scheduler]:
        """All replicas' schedulers, domain by domain."""
        return [scheduler for domain in self.domains for scheduler in domain.schedulers]

    def on_message(self, rank: int, message: FromWorker, now: float) -> list[StepDone]:
        """Take one message of this epoch; returns the steps it completes."""
        self._last_heard[rank] = now
        match message:
            case Ack():
                return self._on_ack(message)
            case Beat():
                self._last_step[rank] = message.step
                self._waits.note(message, now)
            case Progress():
                self._progress[rank] = message
                self._show_progress()
            case Hello():
                self._on_hello(message)
            case Ready():
                self._on_ready(message)
            case Started():
                self._on_started(message)
            case Failed():
                raise complaint(rank, message.reason)
        return []

    def pump(self, now: float) -> None:
        """Send every step that can be planned now."""
        for domain in self.domains if self.serving else ():
            while domain.can_step:
                step = domain.next_step()
                self._sent_at[domain.index, step.number] = step.sent_at = now
                self.num_steps += 1
                for body, ranks in zip(step.bodies, domain.replica_ranks, strict=True):
                    for rank in ranks:
                        self._send(rank, STEP, step.header, body, step.header_digest)

    def masks_due(self) -> list[MaskDue]:
        """Rows whose masks can be computed now; each is said once."""
        steps = [(domain, domain.take_mask_due()) for domain in self.domains]
        return [
            MaskDue(self.epoch, domain.index, step.number, replica, plan)
            for domain, step in steps
            if step is not None
            for replica, plan in enumerate(step.plans)
            if plan.masked_rows
        ]

    def send_mask(self, due: MaskDue, bits: bytes) -> None:
        """The step's rows may sample now; nothing happens if its epoch is over."""
        if due.epoch != self.epoch:
            return
        mask = encode(Mask(due.epoch, due.step, pack(due.plan.masked_rows), bits))
        for rank in self.domains[due.domain].replica_ranks[due.replica]:
            self._send(rank, b"k", mask)

    def check(self, now: float, *, awake_since: float = float("-inf")) -> None:
        """Raise `GangFailed` if a rank has been silent or a step under way for too long.

        Before `awake_since` nobody could be heard.
        """
        silence = MISSED_BEATS * self.config.beat_ms / 1000
        if not self.serving:
            silence *= LOADING_PATIENCE
        latest = now - silence
        silent = [rank for rank, heard in self._last_heard.items() if heard < latest]
        if awake_since > latest:
            silent = []
        if silent:
            raise GangFailed(
                f"{self._named(silent)} have not been heard for {silence:.1f} s "
                f"(heartbeats are {self.config.beat_ms} ms apart)",
                silent[0],
                cause=Cause.SILENT,
            )
        if not self.serving:
            if now - self._started_at > self.config.start_timeout_s:
                raise GangFailed(self._late_start(), cause=Cause.START)
            return
        for domain in self.domains:
            if domain.under_way:
                step = domain.under_way[0].number
                self._refuse_deadlock(domain, step, now)
                if now - self._sent_at[domain.index, step] > self.config.step_timeout_s:
                    raise self._late_step(domain, step)

    def _refuse_deadlock(self, domain: Domain, step: int, now: float) -> None:
        # NOTE: what a rank said that is silent now is old: it may be stopped or dead, and its
        # peers, who wait for it, must not be accused in its place. Its silence names it soon.
        fresh = 2 * self.config.beat_ms / 1000
        if any(now - self._last_heard.get(rank, 0.0) > fresh for rank in domain.ranks):
            return
        found = self._waits.deadlock(domain.late_ranks(), domain.ranks, now)
        if found is not None:
            rank, sentence = found
            raise GangFailed(f"{sentence} in step {step}", rank, cause=Cause.DESYNC)

    def oldest_step_age(self, now: float) -> float:
        """Seconds since the oldest step under way was sent; 0 when there is none."""
        return max((now - sent for sent in self._sent_at.values()), default=0.0)

    def step_of(self, rank: int | None) -> int | None:
        """The oldest step under way of the rank's domain, or of any; None when there is none."""
        domains = self.domains
        if rank is not None and domains:
            domains = [domains[self.layout.coordinates(rank).domain]]
        return min((d.under_way[0].number for d in domains if d.under_way), default=None)

    def where(self) -> list[Hello]:
        """What each rank said of itself: node, process, device."""
        return [hello for _, hello in sorted(self._hello.items())]

    def nodes(self) -> dict[str, list[int]]:
        """The ranks of every node, by its address; of those that have said Hello."""
        found: dict[str, list[int]] = {}
        for hello in self.where():
            found.setdefault(hello.node_ip, []).append(hello.rank)
        return found

    def _named(self, silent: list[int]) -> str:
        """These ranks, and the nodes of several that say nothing at all."""
        nodes = self.nodes()
        lost = [ip for ip, ranks in nodes.items() if len(nodes) > 1 and set(ranks) <= set(silent)]
        if not lost:
            return f"ranks {silent}"
        what = "node" if len(lost) == 1 else "nodes"
        return f"ranks {silent}, with all of {what} {', '.join(lost)},"

    def stop(self) -> None:
        """Tell every rank to leave."""
        message = encode(Stop(self.epoch))
        for rank in self._hello:
            self._send(rank, b"m", message)

    def _on_ack(self, ack: Ack) -> list[StepDone]:
        domain = self.domains[self.layout.coordinates(ack.rank).domain]
        self._last_step[ack.rank] = ack.step
        try:
            done = domain.on_ack(ack)
        except Desync as error:
            raise GangFailed(str(error), error.rank, cause=Cause.DESYNC) from error
        for step in done:
            del self._sent_at[domain.index, step.number]
        return done

    def _on_hello(self, hello: Hello) -> None:
        if hello.version != PROTOCOL_VERSION:
            raise GangFailed(
                f"rank {hello.rank} speaks protocol {hello.version} and the driver "
                f"{PROTOCOL_VERSION}: install the same version of lockstep on all nodes",
                hello.rank,
            )
        self._hello[hello.rank] = hello
        self._on_progress(f"{len(self._hello)} of {self.layout.world_size} ranks are up")
        if len(self._hello) < self.layout.world_size:
            return
        self._refuse_shared_devices()
        for domain in range(self.layout.num_domains):
            ranks = self.layout.domain_ranks(domain)
            first = self._hello[ranks[0]]
            message = encode(Start(self.epoch, first.node_ip, first.store_port))
            for rank in ranks:
                self._send(rank, b"m", message)

    def _refuse_shared_devices(self) -> None:
        owners: dict[str, int] = {}
        for rank, hello in sorted(self._hello.items()):
            if hello.device != "cpu" and hello.device in owners:
                raise GangFailed(
                    f"ranks {owners[hello.device]} and {rank} were both given GPU {hello.device}: "
                    "start one raylet a host, or give every raylet its own GPUs",
                    rank,
                )
            owners[hello.device] = rank

    def _on_ready(self, ready: Ready) -> None:
        if ready.plan != self.plan.digest:
            raise GangFailed(
                f"rank {ready.rank} compiled another collective plan than the driver: the "
                "config.json that it reads is another; give all nodes the same model folder",
                ready.rank,
                cause=Cause.DESYNC,
            )
        self._ready[ready.rank] = ready
        if len(self._ready) < self.layout.world_size:
            return
        every = list(self._ready.values())
        num_pages = min(one.max_pages for one in every)
        self.model = Model(
            every[0].max_model_len,
            every[0].vocab_size,
            every[0].stop_token_ids,
            num_pages,
            _common(one.buckets for one in every),
            _common(one.prompt_buckets for one in every),
        )
        longest = self.model.max_model_len
        if num_pages * self.config.page_size < longest:
            raise GangFailed(
                f"the cache holds {num_pages} pages of {self.config.page_size} tokens, less than "
                f"one request of max_model_len={longest}: lower max_model_len to "
                f"{num_pages * self.config.page_size} or give the cache more memory"
            )
        message = encode(Serve(self.epoch, num_pages))
        for rank in self._ready:
            self._send(rank, b"m", message)

    def _on_started(self, started: Started) -> None:
        self._started[started.rank] = started
        if len(self._started) < self.layout.world_size or self.model is None:
            return
        self._refuse_unlike_graphs()
        for index in range(self.layout.num_domains):
            schedulers = [
                Scheduler(
                    num_pages=self.model.num_pages,
                    page_size=self.config.page_size,
                    max_num_seqs=self.config.max_num_seqs,
                    max_num_batched_tokens=self.config.max_num_batched_tokens,
                    enable_prefix_caching=self.config.enable_prefix_caching,
                )
                for _ in range(self.layout.num_replicas)
            ]
            depth = 2 if self.config.overlap else 1
            costs = self._padding_costs(index)
            padding = self.config.padding
            self.domains.append(
                Domain(
                    self.layout,
                    index,
                    schedulers,
                    epoch=self.epoch,
                    depth=depth,
                    row_multiple=self.plan.row_multiple,
                    shares_rows=self.plan.crosses_replicas,
                    buckets=self.model.buckets,
                    prompt_buckets=self.model.prompt_buckets,
                    padding=None if padding in ("auto", "rule") else padding,
                    costs=costs,
                    most_held=self.config.prefill_delayer_max_delay_passes,
                    prompt_interval=self.config.prefill_decode_interval,
                )
            )
        self.serving = True

    def _padding_costs(self, domain: int) -> PaddingCosts | None:
        """Of the curves that the domain's ranks measured; None if any has none."""
        ranks = self.layout.domain_ranks(domain)
        curves = slowest([self._ready[rank].padding for rank in ranks])
        if curves is None:
            return None
        layout = self.layout
        costs = PaddingCosts(curves, attn_tp=layout.attn_tp_size, attn_cp=layout.attn_cp_size)
        self._on_progress(f"padding, ranks {ranks[0]} to {ranks[-1]}: {costs.summary()}")
        return costs

    def _refuse_unlike_graphs(self) -> None:
        """Ranks must have captured the same collectives, from the same slots at the same offsets.

        As in a step's ledger, those that reach over replicas are compared between all ranks of a
        domain, the others within each replica.
        """
        layout = self.layout
        for domain in range(layout.num_domains):
            halves = [(layout.domain_ranks(domain), slice(0, LEDGER_HALF))]
            for replica in range(layout.num_replicas):
                ranks = layout.replica_ranks(domain, replica)
                halves.append((ranks, slice(LEDGER_HALF, None)))
            for ranks, half in halves:
                odd, others = odd_ones({r: self._started[r].captured[half] for r in ranks})
                if odd:
                    raise GangFailed(
                        f"ranks {odd} captured other collectives in their graphs than ranks "
                        f"{others}: nothing was replayed",
                        odd[0],
                        cause=Cause.DESYNC,
                    )

    def _show_progress(self) -> None:
        """One line for all ranks: where the slowest is."""
        stages = list(dict.fromkeys([*self._stages, *(p.stage for p in self._progress.values())]))
        self._stages = stages
        stage, percent = min(
            (stages.index(p.stage), 100 * p.done // max(1, p.total) // 25 * 25)
            for p in self._progress.values()
        )
        line = f"{stages[stage]} {percent}%"
        if line != self._shown:
            self._shown = line
            self._on_progress(line)

    def _late_start(self) -> str:
        world = range(self.layout.world_size)
        for stage, seen in (("said Hello", self._hello), ("loaded the model", self._ready)):
            missing = [rank for rank in world if rank not in seen]
            if missing:
                return f"ranks {missing} have not {stage} within {self.config.start_timeout_s:g} s"
        missing = [rank for rank in world if rank not in self._started]
        return f"ranks {missing} have not started within {self.config.start_timeout_s:g} s"

    def _late_step(self, domain: Domain, step: int) -> GangFailed:
        """Who holds the step up: ranks that have not begun it, else those not done with it."""
        late = domain.late_ranks()
        behind = [rank for rank in late if self._last_step.get(rank, -1) < step]
        culprits = behind if behind and len(behind) < len(domain.ranks) else late
        doing = "have not begun" if culprits is behind else "have not finished"
        return GangFailed(
            f"ranks {culprits} {doing} step {step} within {self.config.step_timeout_s:g} s",
            culprits[0],
            cause=Cause.HUNG,
        )


def _common(every: Iterable[tuple[int, ...]]) -> tuple[int, ...]:
    """Buckets that all ranks have, ascending."""
    return tuple(sorted(set.intersection(*map(set, every))))
