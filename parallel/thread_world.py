"""A world of ranks that are threads of one process: collectives without processes.

The second implementation of `parallel.groups.Transport`, for tests that try many layouts: a
collective takes about a tenth of a millisecond. It is no way to serve a model. What real groups
would hang on is an error here: a member that does not come, or comes with another operation or
shape, is named.

    >>> import torch
    >>> from parallel.collectives import all_reduce
    >>> def body(rank, groups):
    ...     return all_reduce(torch.tensor([float(rank)]), groups.tp).item()
    >>> run_thread_world(Layout(tp_size=4), body)
    [6.0, 6.0, 6.0, 6.0]
"""

import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from parallel.arena import Block
from parallel.groups import Groups, build_groups
from parallel.layout import Layout

SLACK_S = 1.5
"""A collective's own limit begins with the collective; what it says is worth waiting for."""

PATIENCE_S = 0.1
"""How long a rank waits for its turn."""

Result = TypeVar("Result")


class Desync(RuntimeError):
    """The members of a group did not do the same thing."""


class _Offer(NamedTuple):
    """What a member brought to a collective."""

    op: str
    x: Tensor

    @property
    def kind(self) -> tuple[str, torch.Size, torch.dtype]:
        """What must be the same for every member."""
        return self.op, self.x.shape, self.x.dtype

    def __str__(self) -> str:
        return f"{self.op} of {tuple(self.x.shape)} {str(self.x.dtype).removeprefix('torch.')}"


class _Turn:
    """A rank's turn to compute, given up while it waits for others.

    PyTorch lets go of the interpreter in every operation: ranks that all want it back spend most of
    their time on that. So they take turns. It is a courtesy and no lock: a rank that is not given
    its turn for a while, because another waits for something that is no collective, goes on.
    """

    def __init__(self, of_all: threading.Lock) -> None:
        self._of_all = of_all
        self._is_mine = False

    def take(self) -> None:
        self._is_mine = self._of_all.acquire(timeout=PATIENCE_S)

    def give_up(self) -> None:
        if self._is_mine:
            self._is_mine = False
            self._of_all.release()


class _Round:
    """One collective of a group: what members brought, and then what each takes away."""

    def __init__(self) -> None:
        self.offers: dict[int, _Offer] = {}
        self.results: Sequence[Tensor] | None = None
        self.fault = ""

    @property
    def is_over(self) -> bool:
        return self.results is not None or bool(self.fault)


Combine = Callable[[list[Tensor]], Sequence[Tensor]]
"""What every member takes away, of what all of them brought; both in group order."""


class _Meeting:
    """Where the members of one group meet; `exchange` gives each its part of what all brought."""

    def __init__(self, members: tuple[int, ...], time_limit_s: float) -> None:
        self.members = members
        self._time_limit_s = time_limit_s
        self._changed = threading.Condition()
        self._round = _Round()
        self._broken: str | None = None

    def exchange(self, place: int, offer: _Offer, combine: Combine, turn: _Turn) -> Tensor:
        """Wait for all members; the last to come combines for all, as nobody writes meanwhile."""
        with self._changed:
            this = self._round
            this.offers[place] = offer
            if len(this.offers) == len(self.members):
                self._finish(this, combine)
        if not this.is_over:
            turn.give_up()
            with self._changed:
                self._wait(this, offer)
            turn.take()
        if this.results is None:
            raise Desync(this.fault)
        return this.results[place]

    def _finish(self, this: _Round, combine: Combine) -> None:
        offers = [this.offers[place] for place in range(len(self.members))]
        if any(offer.kind != offers[0].kind for offer in offers):
            brought = (f"rank {r}: {o}" for r, o in zip(self.members, offers, strict=True))
            this.fault = f"group {self.members} met with different calls: {'; '.join(brought)}"
        else:
            this.results = combine([offer.x for offer in offers])
        self._round = _Round()
        self._changed.notify_all()

    def break_up(self, reason: str) -> None:
        """Let everyone who waits here fail with `reason`."""
        with self._changed:
            self._broken = self._broken or reason
            self._changed.notify_all()

    def _wait(self, this: _Round, offer: _Offer) -> None:
        came = self._changed.wait_for(lambda: this.is_over or self._broken, self._time_limit_s)
        if this.is_over:
            return
        if came:
            raise threading.BrokenBarrierError(self._broken)
        absent = [r for i, r in enumerate(self.members) if i not in this.offers]
        raise Desync(
            f"{offer} over group {self.members}: ranks {absent} did not come in "
            f"{self._time_limit_s:g} s"
        )


class ThreadTransport:
    """One member's side of a meeting."""

    process_group = None

    def __init__(self, meeting: _Meeting, place: int, turn: _Turn) -> None:
        self._meeting = meeting
        self._place = place
        self._turn = turn

    def _exchange(self, op: str, x: Tensor, combine: Combine) -> Tensor:
        """NOTE: offers the memory of `x`, but not `x`: who holds `x` is for its owner to know."""
        return self._meeting.exchange(self._place, _Offer(op, x.detach()), combine, self._turn)

    def all_reduce(self, x: Tensor) -> None:
        x.copy_(self._exchange("all_reduce", x, lambda xs: [_sum(xs)] * len(xs)))

    def all_gather(self, out: Tensor, x: Tensor) -> None:
        out.copy_(self._exchange("all_gather", x, lambda xs: [torch.cat(xs)] * len(xs)))

    def start_all_gather(self, out: Tensor, x: Tensor) -> Callable[[], None]:
        """Made when it is waited for: who reads `out` or writes `x` before sees what is wrong."""
        return lambda: self.all_gather(out, x)

    def reduce_scatter(self, out: Tensor, x: Tensor) -> None:
        out.copy_(self._exchange("reduce_scatter", x, lambda xs: _sum(xs).chunk(len(xs))))

    def all_to_all(self, out: Tensor, x: Tensor) -> None:
        out.copy_(self._exchange("all_to_all", x, _transposed))

    def allocate(self, num_bytes: int, device: torch.device) -> Block:
        return Block(torch.empty(num_bytes, dtype=torch.uint8, device=device))

    def warm(self, device: torch.device) -> None:
        self.all_reduce(torch.zeros(1, device=device))

    def register(self, block: Block) -> None:
        """Ordinary memory is as good as any between threads; only the books are kept."""


def _sum(inputs: list[Tensor]) -> Tensor:
    """In rank order, so that all ranks get the same bits."""
    total = inputs[0].clone()
    for x in inputs[1:]:
        total += x
    return total


def _transposed(inputs: list[Tensor]) -> list[Tensor]:
    """To each the blocks that are for it, of everyone."""
    blocks = zip(*(x.chunk(len(inputs)) for x in inputs), strict=True)
    return [torch.cat(each) for each in blocks]


class _World:
    """All meetings of a world, made on first use."""

    def __init__(self, time_limit_s: float) -> None:
        self._time_limit_s = time_limit_s
        self._lock = threading.Lock()
        self._turn_of_all = threading.Lock()
        self._meetings: dict[tuple[int, ...], _Meeting] = {}
        self._broken: str | None = None

    def turn(self) -> _Turn:
        return _Turn(self._turn_of_all)

    def connect(self, members: tuple[int, ...], rank: int, turn: _Turn) -> ThreadTransport | None:
        if rank not in members:
            return None
        with self._lock:
            meeting = self._meetings.setdefault(members, _Meeting(members, self._time_limit_s))
            if self._broken is not None:
                meeting.break_up(self._broken)
        return ThreadTransport(meeting, members.index(rank), turn)

    def break_up(self, reason: str) -> None:
        with self._lock:
            self._broken = self._broken or reason
            for meeting in self._meetings.values():
                meeting.break_up(reason)


def run_thread_world(
    layout: Layout, body: Callable[[int, Groups], Result], *, time_limit_s: float = 100.0
) -> list[Result]:
    """Call `body(rank, groups)` in a thread for every rank; their results in rank order.

    The first rank that raises decides: the others are let go and its exception is raised here. A
    rank that is not back `time_limit_s` after the start is an error too.
    """
    world = _World(time_limit_s)
    results: dict[int, Result] = {}
    failures: list[BaseException] = []

    def run(rank: int) -> None:
        turn = world.turn()
        turn.take()
        try:
            groups = build_groups(layout, rank, lambda members: world.connect(members, rank, turn))
            results[rank] = body(rank, groups)
        except BaseException as error:
            failures.append(error)
            world.break_up(f"rank {rank} failed: {error}")
        finally:
            turn.give_up()

    deadline = time.monotonic() + time_limit_s
    threads = [
        threading.Thread(target=run, args=(rank,), name=f"rank {rank}", daemon=True)
        for rank in range(layout.world_size)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(deadline + SLACK_S - time.monotonic(), 0.0))
    if failures:
        raise failures[0]
    late = [rank for rank in range(layout.world_size) if rank not in results]
    if late:
        world.break_up("the time is over")
        raise Desync(f"ranks {late} were not back after {time_limit_s:g} s")
    return [results[rank] for rank in range(layout.world_size)]
