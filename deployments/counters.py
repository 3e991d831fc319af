"""What an engine has done since it started, over all epochs: the driver's half of /metrics.

`Counters` is written by the engine's thread and read by whoever scrapes, without a lock: every
series exists from the start, so no dictionary grows while it is read. What is counted every step
costs a few additions a rank; nothing is counted a row or a request.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from deployments.counting import (
    QUEUE_BOUNDS,
    RECOVERY_BOUNDS,
    SKEW_BOUNDS,
    STEP_BOUNDS,
    TURN_BOUNDS,
    Histogram,
)
from deployments.domain import StepDone
from deployments.gang import Cause
from parallel.layout import Layout
from workers.protocol import Ack

Collective = tuple[str, str, str, str]
"""(group, operation, path, reason): `path` is symmetric, chosen or fallback."""


@dataclass(slots=True)
class Counters:
    num_steps: int = 0
    num_prompt_tokens: int = 0
    """Computed, again after a preemption or a restart."""
    num_queried_tokens: int = 0
    """Prompt tokens of requests that got their first token."""
    num_cached_tokens: int = 0
    """Of those, how many were found in the prefix cache."""
    num_output_tokens: int = 0
    num_preemptions: int = 0
    """In epochs that are over."""
    num_rows: int = 0
    num_padding_rows: int = 0
    """Rows that the model computed for nobody, so that replicas are of one size."""
    num_idle_replicas: int = 0
    """Replicas without rows, added up over the steps that they entered."""
    num_plan_bytes: int = 0
    num_poisoned: int = 0
    """Requests ended because their logits were not finite."""
    last_recovery_s: float = 0.0
    last_failure: str = ""
    """Why the last epoch was lost; names the rank."""
    outcomes: dict[str, int] = field(default_factory=dict)
    """Requests that ended here, by finish reason."""
    losses: dict[Cause, int] = field(default_factory=lambda: dict.fromkeys(Cause, 0))
    """Epochs lost."""
    recoveries: dict[Cause, Histogram] = field(
        default_factory=lambda: {cause: Histogram(RECOVERY_BOUNDS) for cause in Cause}
    )
    """From the loss of an epoch to serving again."""
    queue: Histogram = field(default_factory=lambda: Histogram(QUEUE_BOUNDS))
    """From a request's arrival here to its first plan."""
    turns: Histogram = field(default_factory=lambda: Histogram(TURN_BOUNDS))
    """The loop's turns: how long a message may wait to be read."""
    steps: dict[int, Histogram] = field(default_factory=dict)
    """By rank."""
    skews: dict[int, Histogram] = field(default_factory=dict)
    """By domain: its slowest rank's time less its fastest's."""
    collectives: dict[Collective, int] = field(default_factory=dict)
    """Those that could run on symmetric memory, summed over the ranks that report them."""
    told: dict[tuple[int, Collective], int] = field(default_factory=dict)
    """By rank, its last word of the epoch `told_epoch`: ranks count from their start."""
    told_epoch: int = 0
    expert_rows: dict[int, int] = field(default_factory=dict)
    """By moe_ep rank: how often its experts were chosen, over all layers and domains."""
    told_expert_rows: dict[int, tuple[int, ...]] = field(default_factory=dict)
    """By rank, its last word of the epoch `told_epoch`."""
    expert_imbalance: float = 1.0
    """The busiest moe_ep rank's rows over the mean, when ranks last told."""

    @classmethod
    def of(cls, layout: Layout) -> "Counters":
        return cls(
            steps={rank: Histogram(STEP_BOUNDS) for rank in range(layout.world_size)},
            skews={domain: Histogram(SKEW_BOUNDS) for domain in range(layout.num_domains)},
            expert_rows=dict.fromkeys(range(layout.ep_size), 0),
        )

    @property
    def num_recoveries(self) -> int:
        return sum(sum(histogram.counts) for histogram in self.recoveries.values())

    def recovered(self, cause: Cause, seconds: float) -> None:
        self.recoveries[cause].observe(seconds)
        self.last_recovery_s = seconds

    def step_done(self, step: StepDone) -> None:
        """Everything about a step but its tokens."""
        header = step.header
        num_rows = sum(header.num_rows)
        self.num_steps += 1
        self.num_rows += num_rows
        self.num_padding_rows += sum(header.padded_rows) - num_rows
        self.num_idle_replicas += header.num_rows.count(0)
        self.num_plan_bytes += step.num_bytes
        slowest, fastest = 0.0, float("inf")
        if header.epoch != self.told_epoch:
            self._forget_told(header.epoch)
        for rank, ack in step.acks.items():
            seconds = ack.seconds
            self.steps[rank].observe(seconds)
            slowest, fastest = max(slowest, seconds), min(fastest, seconds)
            if ack.collectives:
                self._collectives_of(ack)
        self._experts_of([ack for ack in step.acks.values() if ack.expert_rows])
        self.skews[step.domain].observe(slowest - fastest)
        for plan in step.plans:
            for chunk in plan.chunks:
                self.num_prompt_tokens += chunk.num_tokens
                queued_at = chunk.request.queued_at
                if queued_at is not None:
                    chunk.request.queued_at = None
                    # NOTE: a plan bears the time at which its turn of the loop began, and the
                    # request may have come in the same turn.
                    chunk.request.queue_s = max(0.0, step.sent_at - queued_at)
                    self.queue.observe(chunk.request.queue_s)

    def _forget_told(self, epoch: int) -> None:
        """Ranks of a new epoch count from nothing."""
        self.told_epoch = epoch
        self.told.clear()
        self.told_expert_rows.clear()

    def _experts_of(self, acks: Sequence[Ack]) -> None:
        new = dict.fromkeys(self.expert_rows, 0)
        for ack in acks:
            before = self.told_expert_rows.get(ack.rank, (0,) * len(ack.expert_rows))
            self.told_expert_rows[ack.rank] = ack.expert_rows
            for place, (now, then) in enumerate(zip(ack.expert_rows, before, strict=True)):
                new[place] += now - then
        total = sum(new.values())
        if total:
            self.expert_imbalance = max(new.values()) * len(new) / total
            for place, rows in new.items():
                self.expert_rows[place] += rows

    def _collectives_of(self, ack: Ack) -> None:
        for group, op, path, reason, count in ack.collectives:
            labels = (group, op, path, reason)
            new = count - self.told.get((ack.rank, labels), 0)
            self.told[ack.rank, labels] = count
            self.collectives[labels] = self.collectives.get(labels, 0) + new

    def first_token(self, num_prompt: int, num_cached: int) -> None:
        self.num_queried_tokens += num_prompt
        self.num_cached_tokens += num_cached
