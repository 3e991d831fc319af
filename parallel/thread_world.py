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
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from parallel.arena import Block
from parallel.groups import Groups, build_groups
from parallel.layout import Layout

SLACK_S = 1.5
"""A collective's own limit begins with the collective; what it says is worth waiting for."""

Result = TypeVar("Result")


class Desync(RuntimeError):
    """The members of a group did not do the same thing."""


class _Offer(NamedTuple):
    """What a member brought to a collective."""

    op: str
    x: Tensor

    def __str__(self) -> str:
        return f"{self.op} of {tuple(self.x.shape)} {str(self.x.dtype).removeprefix('torch.')}"


def _offer(op: str, x: Tensor) -> _Offer:
    """NOTE: of the same memory as `x`, but not `x`: who holds `x` is for its owner to know."""
    return _Offer(op, x.detach())


class _Meeting:
    """Where the members of one group meet; `exchange` shows each what all of them brought."""

    def __init__(self, members: tuple[int, ...], time_limit_s: float) -> None:
        self.members = members
        self._time_limit_s = time_limit_s
        self._changed = threading.Condition()
        self._offers: dict[int, _Offer] = {}
        self._num_done = 0
        self._round = 0
        self._broken: str | None = None

    def exchange(self, place: int, offer: _Offer, read: Callable[[list[Tensor]], Tensor]) -> Tensor:
        """Wait for all members, and return `read` of their tensors once all have read them."""
        with self._changed:
            self._offers[place] = offer
            self._changed.notify_all()
            self._wait(lambda: len(self._offers) == len(self.members), offer)
            offers = [self._offers[i] for i in range(len(self.members))]
        if len({str(brought) for brought in offers}) > 1:
            brought = (f"rank {r}: {o}" for r, o in zip(self.members, offers, strict=True))
            raise Desync(f"group {self.members} met with different calls: {'; '.join(brought)}")
        result = read([brought.x for brought in offers])
        with self._changed:
            here = self._round
            self._num_done += 1
            if self._num_done == len(self.members):
                self._num_done, self._round = 0, here + 1
                self._offers.clear()
                self._changed.notify_all()
            self._wait(lambda: self._round > here, offer)
        return result

    def break_up(self, reason: str) -> None:
        """Let everyone who waits here fail with `reason`."""
        with self._changed:
            self._broken = self._broken or reason
            self._changed.notify_all()

    def _wait(self, arrived: Callable[[], bool], offer: _Offer) -> None:
        came = self._changed.wait_for(lambda: arrived() or self._broken, self._time_limit_s)
        if arrived():
            return
        if came:
            raise threading.BrokenBarrierError(self._broken)
        absent = [r for i, r in enumerate(self.members) if i not in self._offers]
        raise Desync(
            f"{offer} over group {self.members}: ranks {absent} did not come in "
            f"{self._time_limit_s:g} s"
        )


class ThreadTransport:
    """One member's side of a meeting."""

    process_group = None

    def __init__(self, meeting: _Meeting, place: int) -> None:
        self._meeting = meeting
        self._place = place

    def all_reduce(self, x: Tensor) -> None:
        total = self._meeting.exchange(self._place, _offer("all_reduce", x), _sum)
        x.copy_(total)

    def all_gather(self, out: Tensor, x: Tensor) -> None:
        out.copy_(self._meeting.exchange(self._place, _offer("all_gather", x), torch.cat))

    def start_all_gather(self, out: Tensor, x: Tensor) -> Callable[[], None]:
        """Made when it is waited for: who reads `out` or writes `x` before sees what is wrong."""
        return lambda: self.all_gather(out, x)

    def reduce_scatter(self, out: Tensor, x: Tensor) -> None:
        def my_block(inputs: list[Tensor]) -> Tensor:
            return _sum([block.chunk(len(inputs))[self._place] for block in inputs])

        out.copy_(self._meeting.exchange(self._place, _offer("reduce_scatter", x), my_block))

    def all_to_all(self, out: Tensor, x: Tensor) -> None:
        def my_blocks(inputs: list[Tensor]) -> Tensor:
            return torch.cat([block.chunk(len(inputs))[self._place] for block in inputs])

        out.copy_(self._meeting.exchange(self._place, _offer("all_to_all", x), my_blocks))

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


class _World:
    """All meetings of a world, made on first use."""

    def __init__(self, time_limit_s: float) -> None:
        self._time_limit_s = time_limit_s
        self._lock = threading.Lock()
        self._meetings: dict[tuple[int, ...], _Meeting] = {}
        self._broken: str | None = None

    def connect(self, members: tuple[int, ...], rank: int) -> ThreadTransport | None:
        if rank not in members:
            return None
        with self._lock:
            meeting = self._meetings.setdefault(members, _Meeting(members, self._time_limit_s))
            if self._broken is not None:
                meeting.break_up(self._broken)
        return ThreadTransport(meeting, members.index(rank))

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
        try:
            groups = build_groups(layout, rank, lambda members: world.connect(members, rank))
            results[rank] = body(rank, groups)
        except BaseException as error:
            failures.append(error)
            world.break_up(f"rank {rank} failed: {error}")

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
