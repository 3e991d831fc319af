"""The groups a rank belongs to, and the seam through which they communicate.

A `Group` names its members and carries a `Transport`; the collectives in `collectives.py` are the
only callers of transports. There are two: torch.distributed (gloo or NCCL) for real ranks, and a
thread world for tests that try every layout in one process. Groups with the same members share
one transport, so a layout makes as few communicators as it can, and memory that is symmetric on
one of such groups is symmetric on all.

`Groups` is built once a worker, from the layout, and handed down; nothing here is global.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.arena import Arena, Block
from parallel.layout import GROUP_NAMES, GroupName, Layout
from parallel.sums import Sums


class Transport(Protocol):
    """Collectives over one set of ranks; every member calls the same ones in the same order."""

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        """torch's own, beneath whatever wraps it on this rank; None on all members, or on none."""
        ...

    def all_reduce(self, x: Tensor) -> None:
        """Sum `x` over the ranks, in place."""
        ...

    def all_gather(self, out: Tensor, x: Tensor) -> None:
        """`out` (W * N, ...) becomes the ranks' `x` (N, ...) in group order."""
        ...

    def start_all_gather(self, out: Tensor, x: Tensor) -> Callable[[], None]:
        """`all_gather`, begun; what it returns is called to wait for it.

        Until then `x` must not be written, and `out` neither read nor written.
        """
        ...

    def reduce_scatter(self, out: Tensor, x: Tensor) -> None:
        """`out` (N, ...) becomes this rank's block of the sum of all `x` (W * N, ...)."""
        ...

    def all_to_all(self, out: Tensor, x: Tensor) -> None:
        """Block i of `out` (W * N, ...) becomes this rank's block of rank i's `x` (W * N, ...)."""
        ...

    def allocate(self, num_bytes: int, device: torch.device) -> Block:
        """Memory that `register` can make symmetric; not collective."""
        ...

    def warm(self, device: torch.device) -> None:
        """Make sure that the communicator is up."""
        ...

    def register(self, block: Block) -> None:
        """Make `block` symmetric on this communicator, if its back end knows such memory."""
        ...


class CollectiveError(RuntimeError):
    """A collective was begun and not waited for, or the other way round."""


class Call(NamedTuple):
    """One collective as the ledger keeps it."""

    op: str
    group: str
    shape: Sequence[int]
    is_shared: bool = False
    """Whether it reaches over attention replicas, so that all ranks of the domain call the same."""
    path: str = ""
    """`symmetric`, `chosen` or `fallback`; empty where symmetric memory is off."""
    reason: str = ""
    """Why it is not symmetric."""
    places: tuple[tuple[str, int], ...] = ()
    """(slot, offset) of what it reads and what it writes."""
    way: str = ""
    """Which of several ways to sum; ranks that took different ones would wait for each other."""


PathCounts = Counter[tuple[str, str, str, str]]
"""(group, op, path, reason) -> collectives."""


class Ledger:
    """What collectives this rank took part in during a step, as one digest to compare.

    Ranks of a group that did not call the same operations on the same shapes, from the same slots
    at the same offsets, in the same order, have different ledgers: a desync, or memory that is not
    symmetric, is seen in the step it happens. The first half of a digest is of the collectives all
    ranks of the domain take part in, the second of those inside one attention replica, whose
    shapes are the replica's own.

    A CUDA graph's collectives are recorded at capture: `cut` takes them out, `replay` puts them in.
    """

    def __init__(self) -> None:
        self.counts: PathCounts = Counter()
        """Over all steps that were taken."""
        self.inside = 0
        """Which of the step's has not returned; 0 for none."""
        self._begun: dict[GroupName, int] = {}
        """By group, which of the step's has been begun and not been waited for."""
        self._calls: list[Call] = []
        self._last: list[Call] | None = None
        self._last_digest = b""
        self._last_counts: PathCounts = Counter()

    @property
    def num_collectives(self) -> int:
        """Of the step under way."""
        return len(self._calls)

    def waiting(self) -> tuple[int, str, str]:
        """(which of the step's, op, group) of the collective that has not returned; 0 for none.

        Another thread may ask.
        """
        calls, number = self._calls, self.inside
        if not 0 < number <= len(calls):
            return 0, "", ""
        return number, calls[number - 1].op, calls[number - 1].group

    def record(self, call: Call) -> None:
        self._calls.append(call)

    def begin(self, group: GroupName) -> None:
        """The collective recorded last goes on until `end`; a group has one such at a time."""
        if group in self._begun:
            raise CollectiveError(
                f"a second gather over {group} was begun before the first was waited for"
            )
        self._begun[group] = len(self._calls)

    def end(self, group: GroupName) -> int:
        """Which of the step's collectives it was that is waited for now."""
        if group not in self._begun:
            raise CollectiveError(f"nothing over {group} goes on in this step to be waited for")
        return self._begun.pop(group)

    def take(self) -> bytes:
        """The step's digest; starts the next step's. Steps alike cost a comparison."""
        calls = self._close()
        if calls != self._last:
            self._last = calls
            self._last_digest = digest_of(calls)
            paths = ((call.group, call.op, call.path, call.reason) for call in calls if call.path)
            self._last_counts = Counter(paths)
        for key, count in self._last_counts.items():
            self.counts[key] += count
        return self._last_digest

    def cut(self) -> tuple[Call, ...]:
        """Takes out what the step under way has recorded so far, for a graph's capture."""
        return tuple(self._close())

    def replay(self, calls: Sequence[Call]) -> None:
        """Records a captured graph's collectives, which it is about to make."""
        self._calls.extend(calls)

    def _close(self) -> list[Call]:
        """The step's calls, all of which are over."""
        if self._begun:
            raise CollectiveError(
                f"a gather over {', '.join(self._begun)} was begun in this step and not waited for"
            )
        calls, self._calls = self._calls, []
        return calls

    def forget_last(self) -> None:
        """As if the last collective had not been called, for planted faults."""
        self._calls.pop()


def digest_of(calls: Sequence[Call]) -> bytes:
    """Of the calls that all ranks of the domain make, then of those inside one replica."""
    shared = [call for call in calls if call.is_shared]
    return _digest(shared) + _digest([call for call in calls if not call.is_shared])


def _digest(calls: Sequence[Call]) -> bytes:
    text = ";".join(f"{c.op} {c.group} {tuple(c.shape)} {c.path} {c.places} {c.way}" for c in calls)
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """One rank's view of a group: who is in it, where this rank stands, how they talk."""

    name: GroupName
    members: tuple[int, ...]
    """Global ranks, ascending; index in this tuple is the rank within the group."""
    rank: int
    """This rank's place among `members`."""
    transport: Transport | None
    """None for a group of one, which never communicates."""
    ledger: Ledger
    arena: Arena = field(default_factory=Arena)
    """This rank's symmetric memory, the same for all its groups."""
    spans_nodes: bool = False
    """It reaches over NVLink domains, where symmetric kernels do not."""
    is_shared: bool = False
    """It reaches over attention replicas, whose rows may differ."""
    sums: Sums = field(default_factory=Sums)
    """How its members sum, the same for all groups with these members."""

    @property
    def size(self) -> int:
        return len(self.members)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Groups:
    """Every group of one rank. A layer is handed the one its collectives run on."""

    tp: Group
    attn_tp: Group
    attn_cp: Group
    attn_dp: Group
    moe_tp: Group
    moe_ep: Group
    moe_dp: Group
    dense_tp: Group
    ledger: Ledger = field(default_factory=Ledger)
    arena: Arena = field(default_factory=Arena)

    def by_name(self) -> Mapping[GroupName, Group]:
        return {name: getattr(self, name) for name in GROUP_NAMES}


def build_groups(
    layout: Layout,
    rank: int,
    connect: Callable[[tuple[int, ...]], Transport | None],
    *,
    arena: Arena | None = None,
) -> Groups:
    """The groups of global `rank`; `connect` is called once per distinct member list of its domain.

    Creating a communicator is collective over the domain, so every rank asks for every member list
    of its domain in the same order, its own or not; `connect` answers None where it is no member.
    """
    place = layout.coordinates(rank)
    replica = frozenset(layout.replica_ranks(place.domain, place.attn_dp))
    transports: dict[tuple[int, ...], Transport | None] = {}
    for name in GROUP_NAMES:
        for members in layout.groups(name):
            if layout.coordinates(members[0]).domain != place.domain or len(members) == 1:
                continue
            if members not in transports:
                transports[members] = connect(members)
    ledger, arena = Ledger(), arena or Arena()
    sums: dict[tuple[int, ...], Sums] = {}

    def group(name: GroupName) -> Group:
        members = layout.members(name, rank)
        return Group(
            name,
            members,
            members.index(rank),
            transports.get(members),
            ledger,
            arena,
            spans_nodes=layout.spans_nodes(members),
            is_shared=not replica.issuperset(members),
            sums=sums.setdefault(members, Sums()),
        )

    return Groups(**{name: group(name) for name in GROUP_NAMES}, ledger=ledger, arena=arena)


def single_rank_groups() -> Groups:
    """The groups of a world of one: every collective is the identity."""
    return build_groups(Layout(), 0, lambda members: None)


class TorchTransport:
    """torch.distributed over gloo or NCCL."""

    def __init__(self, process_group: dist.ProcessGroup) -> None:
        self._process_group = process_group
        self._side: torch.cuda.Stream | None = None

    @property
    def process_group(self) -> dist.ProcessGroup:
        return self._process_group

    def all_reduce(self, x: Tensor) -> None:
        dist.all_reduce(x, group=self._process_group)

    def all_gather(self, out: Tensor, x: Tensor) -> None:
        _all_gather(out, x, group=self._process_group)

    def start_all_gather(self, out: Tensor, x: Tensor) -> Callable[[], None]:
        """On a GPU on a stream of its own, which a graph's capture follows and joins."""
        if not x.is_cuda:
            work = _all_gather(out, x, group=self._process_group, async_op=True)
            return lambda: _finish(work)
        side = self._side
        if side is None:
            side = self._side = torch.cuda.Stream(x.device, priority=-1)
        side.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(side):
            _all_gather(out, x, group=self._process_group)
        return lambda: torch.cuda.current_stream(x.device).wait_stream(side)

    def reduce_scatter(self, out: Tensor, x: Tensor) -> None:
        _reduce_scatter(out, x, group=self._process_group)

    def all_to_all(self, out: Tensor, x: Tensor) -> None:
        dist.all_to_all_single(out, x, group=self._process_group)

    def allocate(self, num_bytes: int, device: torch.device) -> Block:
        """On a GPU from NCCL's allocator, in a pool of its own; nothing else is ever put there."""
        if device.type != "cuda":
            return Block(torch.empty(num_bytes, dtype=torch.uint8))
        backend = self._process_group._get_backend(device)
        pool = torch.cuda.MemPool(backend.mem_allocator)  # pyright: ignore[reportAttributeAccessIssue]
        with torch.cuda.use_mem_pool(pool, device=device):
            return Block(torch.empty(num_bytes, dtype=torch.uint8, device=device), pool)

    def warm(self, device: torch.device) -> None:
        """NCCL opens a communicator at its first collective."""
        dist.all_reduce(torch.zeros(1, device=device), group=self._process_group)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def register(self, block: Block) -> None:
        """NOTE: what the pool hands out later would be registered too, at once and collectively:
        the way peers hang. So nothing is taken from it but the arena."""
        if block.pool is not None:
            backend = self._process_group._get_backend(block.bytes_N.device)
            backend.register_mem_pool(block.pool, symm=True)  # pyright: ignore[reportAttributeAccessIssue]


def connect_torch(
    ranks: Sequence[int], rank: int, timeout: timedelta
) -> Callable[[tuple[int, ...]], Transport | None]:
    """Communicators over members of a world of `ranks`, for `build_groups`.

    Every rank calls it for every member list, in one order, also for those it is no member of.
    """

    def connect(members: tuple[int, ...]) -> Transport | None:
        group = dist.group.WORLD
        if members != tuple(ranks):
            group = dist.new_group([member - ranks[0] for member in members], timeout=timeout)
        if rank not in members or not isinstance(group, dist.ProcessGroup):
            return None
        return TorchTransport(group)

    return connect


def _finish(work: dist.Work | None) -> None:
    if work is not None:
        work.wait()


# torch 2.13 renamed these two and warns of the old names; 2.11 has only those.
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
