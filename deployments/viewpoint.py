"""The driver's side of the live page: what is remembered for whoever looks, and what it costs.

Once a second a `Sample` of the last second is kept, a few minutes of them, so that a page which
has just been opened has something to plot. Everything else (the steps one by one, each rank's last
step) is noted only while an ingress has asked to `watch` in the last seconds: steady decode with
nobody looking pays for one look at a flag a step.

No clock, no socket: the engine says what time it is, and sends what is due.
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence

from deployments.counters import Counters
from deployments.counting import TTFT_BOUNDS
from deployments.domain import StepDone
from deployments.messages import (
    Distribution,
    EngineState,
    RankState,
    ReplicaState,
    Sample,
    StepState,
)
from deployments.scheduler import Scheduler
from workers.config import EngineConfig
from workers.protocol import Hello

WATCH_S = 3.0
"""An ingress asks again with each of its beats while somebody looks through it."""

SAMPLE_S = 1.0
MAX_SAMPLES = 300
MAX_STEPS = 64
"""Steps that one view tells of; of more the latest."""
MAX_REASON = 300


class Viewpoint:
    def __init__(self, config: EngineConfig, counters: Counters) -> None:
        self.is_watched = False
        self._config = config
        self._layout = config.layout
        self._counters = counters
        self._watchers: dict[bytes, tuple[float, int]] = {}
        """Until when, and the last sample the ingress has."""
        self._samples: deque[Sample] = deque(maxlen=MAX_SAMPLES)
        self._num_samples = 0
        self._sampled_at: float | None = None
        self._before = (0, 0, 0)
        """Steps, output tokens and prompt tokens at the last sample."""
        self._ttft: dict[bytes, Distribution] = {}
        """What each ingress had counted at the last sample."""
        self._steps: deque[StepState] = deque(maxlen=MAX_STEPS)
        self._acks: dict[int, tuple[int, float]] = {}
        """Last step and its seconds, by rank."""
        self._epoch = 0

    # Who looks

    def watch(self, identity: bytes, since: int, now: float) -> None:
        self._watchers[identity] = now + WATCH_S, since
        self.is_watched = True

    def watchers(self, now: float) -> int:
        """How many ingresses are to be told; with none, nothing is noted any more."""
        if self.is_watched:
            self._watchers = {key: one for key, one in self._watchers.items() if one[0] > now}
            if not self._watchers:
                self.is_watched = False
                self._steps.clear()
                self._acks.clear()
        return len(self._watchers)

    def due(self) -> Iterator[tuple[bytes, tuple[Sample, ...]]]:
        """Each watcher and the samples it does not have."""
        for identity, (until, since) in list(self._watchers.items()):
            self._watchers[identity] = until, self._num_samples - 1
            yield identity, tuple(one for one in self._samples if one.number > since)

    # What is noted

    def on_step(self, step: StepDone) -> None:
        """Call it while `is_watched`."""
        header = step.header
        slowest = 0.0
        for rank, ack in step.acks.items():
            self._acks[rank] = step.number, ack.seconds
            slowest = max(slowest, ack.seconds)
        self._steps.append(
            StepState(step.domain, step.number, header.num_rows, header.padded_rows, slowest)
        )

    def sample(
        self, now: float, schedulers: Sequence[Scheduler], ttft: Mapping[bytes, Distribution]
    ) -> None:
        """Call it with every beat: it keeps a sample when a second is over.

        `ttft` is what each live ingress has counted since it started.
        """
        if self._sampled_at is None:
            self._sampled_at, self._ttft = now, dict(ttft)
        seconds = now - self._sampled_at
        if seconds < SAMPLE_S:
            return
        counters = self._counters
        before = self._before
        after = (counters.num_steps, counters.num_output_tokens, counters.num_prompt_tokens)
        num_first, mean, p95 = _since(self._ttft, ttft)
        self._samples.append(
            Sample(
                number=self._num_samples,
                seconds=seconds,
                num_steps=after[0] - before[0],
                num_output_tokens=after[1] - before[1],
                num_prompt_tokens=after[2] - before[2],
                num_first_tokens=num_first,
                mean_ttft_s=mean,
                p95_ttft_s=p95,
                num_running=sum(one.num_running for one in schedulers),
                num_waiting=sum(len(one.waiting) for one in schedulers),
            )
        )
        self._num_samples += 1
        self._sampled_at, self._before, self._ttft = now, after, dict(ttft)

    # What is shown

    def state(
        self,
        schedulers: Sequence[Scheduler],
        hellos: Sequence[Hello],
        *,
        epoch: int,
        reason: str,
        num_preemptions: int,
    ) -> EngineState:
        """Everything of this moment; the steps noted so far are told once."""
        counters = self._counters
        if epoch != self._epoch:
            self._epoch = epoch
            self._acks.clear()  # of ranks that are gone
        steps = tuple(self._steps)
        self._steps.clear()
        return EngineState(
            epoch=epoch,
            ready=not reason,
            reason=_line(reason),
            num_recoveries=counters.num_recoveries,
            last_recovery_s=counters.last_recovery_s,
            last_failure=_line(counters.last_failure),
            num_steps=counters.num_steps,
            num_output_tokens=counters.num_output_tokens,
            num_preemptions=num_preemptions,
            replicas=self._replicas(schedulers),
            ranks=self._ranks(hellos),
            steps=steps,
            enable_symm_mem=self._config.enable_symm_mem,
            collectives=tuple((*path, num) for path, num in sorted(counters.collectives.items())),
        )

    def _replicas(self, schedulers: Sequence[Scheduler]) -> tuple[ReplicaState, ...]:
        """Domain by domain, as the schedulers are; without any the engine is starting."""
        states = []
        for place in range(self._layout.num_domains * self._layout.num_replicas):
            domain, replica = divmod(place, self._layout.num_replicas)
            ranks = tuple(self._layout.replica_ranks(domain, replica))
            if place >= len(schedulers):
                states.append(ReplicaState(domain=domain, replica=replica, ranks=ranks))
                continue
            scheduler = schedulers[place]
            states.append(
                ReplicaState(
                    domain=domain,
                    replica=replica,
                    ranks=ranks,
                    num_running=scheduler.num_running,
                    num_waiting=len(scheduler.waiting),
                    num_pages=scheduler.pool.num_pages,
                    num_free_pages=scheduler.pool.num_free,
                    num_cached_pages=scheduler.pool.num_cached,
                )
            )
        return tuple(states)

    def _ranks(self, hellos: Sequence[Hello]) -> tuple[RankState, ...]:
        devices = {hello.rank: hello.device for hello in hellos}
        states = []
        for rank in range(self._layout.world_size):
            step, seconds = self._acks.get(rank, (-1, 0.0))
            device = devices.get(rank, "")
            states.append(RankState(rank=rank, device=device, step=step, seconds=seconds))
        return tuple(states)


def _line(sentence: str) -> str:
    """The first line, and not all of a long one."""
    line = sentence.partition("\n")[0]
    return line if len(line) <= MAX_REASON else line[:MAX_REASON].rstrip() + "…"


def _since(
    before: Mapping[bytes, Distribution], after: Mapping[bytes, Distribution]
) -> tuple[int, float, float]:
    """How many values came, their mean and their 95th percentile."""
    counts, total = [0] * (len(TTFT_BOUNDS) + 1), 0.0
    for identity, now in after.items():
        was = before.get(identity, Distribution())
        if now.counts == was.counts or len(now.counts) != len(counts):
            continue
        old = was.counts or (0,) * len(counts)
        counts = [all_ + new - o for all_, new, o in zip(counts, now.counts, old, strict=True)]
        total += now.total - was.total
    num = sum(counts)
    if num <= 0:
        return 0, 0.0, 0.0
    mean = total / num
    return num, mean, max(mean, quantile(counts, total, 0.95))


def quantile(counts: Sequence[int], total: float, share: float) -> float:
    """A quantile of times counted by `TTFT_BOUNDS`, evenly spread within a bucket.

    `total` is their sum: none can be further above the lower end of its bucket than all are
    together. So one value alone is told as it was.

    >>> quantile([0, 0, 10, *[0] * 11], 0.16, 0.5)
    0.015
    >>> quantile([0, 0, 1, *[0] * 11], 0.012, 0.95)
    0.012
    """
    lowers = (0.0, *TTFT_BOUNDS)
    slack = total - sum(count * lower for count, lower in zip(counts, lowers, strict=True))
    wanted = share * sum(counts)
    for count, lower, upper in zip(counts, lowers, (*TTFT_BOUNDS, 2 * lowers[-1]), strict=True):
        if count and wanted <= count:
            return lower + min((upper - lower) * wanted / count, max(0.0, slack))
        wanted -= count
    return lowers[-1]
