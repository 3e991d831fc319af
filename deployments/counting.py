"""What is counted about requests, and how the counts of many ingresses add up.

An ingress counts generations and its clients' waiting times (`RequestCounts`); its heartbeats carry
both, added up since it started. The driver keeps the last word of every ingress (`Accounts`) and
adds them up at each scrape. An ingress that died cannot end its requests, so the driver writes
them off as failed; should it turn out to live, they have been received a second time. So at all
times, for one ingress and for all,

    received = rejected + finished + failed + cancelled + in flight

and no count but `in_flight` ever goes down. Nothing here knows of sockets, HTTP or Prometheus.

    >>> counts = RequestCounts()
    >>> counts.received += 2
    >>> counts.finished += 1
    >>> counts.beat("a", in_flight=1).is_balanced
    True
"""

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from msgspec import Struct
from msgspec.structs import replace

from deployments.messages import Distribution, IngressBeat

TTFT_BOUNDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
ITL_BOUNDS = (
    *(0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03),
    *(0.05, 0.1, 0.2, 0.5, 1.0, 5.0, 20.0),
)
E2E_BOUNDS = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
QUEUE_BOUNDS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
STEP_BOUNDS = (
    *(0.001, 0.002, 0.004, 0.006, 0.008, 0.012, 0.016, 0.024, 0.032),
    *(0.05, 0.1, 0.2, 0.5, 1.0, 5.0, 30.0),
)
SKEW_BOUNDS = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1.0, 5.0)
TURN_BOUNDS = (0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.05, 0.1, 0.25, 1.0, 5.0)
RECOVERY_BOUNDS = (0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0)
"""Upper bounds of the buckets of every histogram there is, in seconds."""

MAX_LOST = 256
"""Dead ingresses that are remembered one by one, should they turn out to live."""


class Outcome(StrEnum):
    """How a generation left its ingress; each leaves exactly once."""

    REJECTED = "rejected"
    """Never begun: the request was wrong, or there was no room or no engine for it."""
    FINISHED = "finished"
    FAILED = "failed"
    CANCELLED = "cancelled"
    """Its client left."""


class Histogram:
    """How often a value fell into each bucket; the last one has no bound."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def add(self, other: Distribution) -> None:
        """What another process has seen; one with other bounds is left out."""
        if len(other.counts) == len(self.counts):
            self.counts = [
                mine + more for mine, more in zip(self.counts, other.counts, strict=True)
            ]
            self.total += other.total

    def distribution(self) -> Distribution:
        return Distribution(tuple(self.counts), self.total)


@dataclass(slots=True)
class RequestCounts:
    """One ingress's generations since it started; one HTTP request may be several.

    A request that is turned away at the door (no key, no such route or model) counts as one.
    """

    received: int = 0
    rejected: int = 0
    finished: int = 0
    failed: int = 0
    cancelled: int = 0
    resumed: int = 0
    """Sent to an engine more than once, because a restart lost them."""
    ttft: Histogram = field(default_factory=lambda: Histogram(TTFT_BOUNDS))
    itl: Histogram = field(default_factory=lambda: Histogram(ITL_BOUNDS))
    e2e: Histogram = field(default_factory=lambda: Histogram(E2E_BOUNDS))

    def end(self, outcome: Outcome, num: int = 1) -> None:
        """`num` that were received are over."""
        setattr(self, outcome, getattr(self, outcome) + num)

    def turn_away(self, outcome: Outcome, num: int = 1) -> None:
        """Received and over at once."""
        self.received += num
        self.end(outcome, num)

    def beat(self, ingress: str, *, in_flight: int, opens: bool = False) -> IngressBeat:
        return IngressBeat(
            ingress=ingress,
            received=self.received,
            rejected=self.rejected,
            finished=self.finished,
            failed=self.failed,
            cancelled=self.cancelled,
            in_flight=in_flight,
            resumed=self.resumed,
            ttft=self.ttft.distribution(),
            itl=self.itl.distribution(),
            e2e=self.e2e.distribution(),
            opens=opens,
        )


class Account(Struct, frozen=True):
    """What the driver knows of one ingress."""

    beat: IngressBeat
    """Its last word."""
    identity: bytes
    """The socket that it came on."""
    is_lost: bool = False
    num_written_off: int = 0
    """Failed here, though the ingress, which was thought dead, goes on with them."""


class Accounts:
    """The last word of every ingress, dead ones included. One thread writes, any may read."""

    def __init__(self) -> None:
        self._accounts: dict[str, Account] = {}

    def heard(self, identity: bytes, beat: IngressBeat) -> None:
        key = beat.ingress or identity.hex()
        before = self._accounts.get(key)
        written_off = 0
        if before is not None:
            written_off = before.num_written_off + before.beat.in_flight * before.is_lost
        self._accounts[key] = Account(beat, identity, num_written_off=written_off)

    def lost(self, identity: bytes) -> None:
        """Whoever spoke on this socket last is dead: what it had under way has failed."""
        for key, account in self._accounts.items():
            if account.identity == identity and not account.is_lost:
                self._accounts[key] = replace(account, is_lost=True)
                break
        self._forget_some()

    def totals(self) -> IngressBeat:
        """All ingresses as if they were one."""
        return total(map(_settled, list(self._accounts.values())))

    def _forget_some(self) -> None:
        """The longest lost become one that is never heard again."""
        lost = [key for key, account in self._accounts.items() if account.is_lost]
        if len(lost) > MAX_LOST:
            oldest = lost[: len(lost) - MAX_LOST + 1]
            beats = [_settled(self._accounts[key]) for key in oldest]
            merged = Account(total(beats), b"", is_lost=True)
            # NOTE: a reader must see either all of them or their sum.
            kept = {key: one for key, one in self._accounts.items() if key not in oldest}
            self._accounts = {"": merged, **kept}


def _settled(account: Account) -> IngressBeat:
    beat, written_off = account.beat, account.num_written_off
    in_flight = beat.in_flight
    failed = beat.failed + written_off
    if account.is_lost:
        failed, in_flight = failed + in_flight, 0
    return replace(beat, received=beat.received + written_off, failed=failed, in_flight=in_flight)


def total(beats: Iterable[IngressBeat]) -> IngressBeat:
    """The sum of several ingresses' counts."""
    counts, in_flight = RequestCounts(), 0
    for beat in beats:
        counts.received += beat.received
        for outcome in Outcome:
            counts.end(outcome, getattr(beat, outcome))
        counts.resumed += beat.resumed
        in_flight += beat.in_flight
        counts.ttft.add(beat.ttft)
        counts.itl.add(beat.itl)
        counts.e2e.add(beat.e2e)
    return counts.beat("", in_flight=in_flight)
