"""The groups a rank belongs to, and the seam through which they communicate.

A `Group` names its members and carries a `Transport`; the collectives in `collectives.py` are the
only callers of transports. There are two: torch.distributed (gloo or NCCL) for real ranks, and a
thread world for tests that try every layout in one process. Groups with the same members share
one transport, so a layout makes as few communicators as it can.

`Groups` is built once a worker, from the layout, and handed down; nothing here is global.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch.distributed as dist
from torch import Tensor

from parallel.layout import GROUP_NAMES, GroupName, Layout


class Transport(Protocol):
    """Collectives over one set of ranks; every member calls the same ones in the same order."""

    def all_reduce(self, x: Tensor) -> None:
        """Sum `x` over the ranks, in place."""
        ...

    def all_gather(self, out: Tensor, x: Tensor) -> None:
        """`out` (W * N, ...) becomes the ranks' `x` (N, ...) in group order."""
        ...

    def reduce_scatter(self, out: Tensor, x: Tensor) -> None:
        """`out` (N, ...) becomes this rank's block of the sum of all `x` (W * N, ...)."""
        ...


class Ledger:
    """What collectives this rank took part in during a step, as one digest to compare.

    Ranks of a group that did not call the same operations on the same shapes in the same order
    have different ledgers: a desync is seen in the step it happens.
    """

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=16)
        self.num_collectives = 0

    def record(self, op: str, group: str, shape: Sequence[int]) -> None:
        self._hash.update(f"{op} {group} {tuple(shape)};".encode())
        self.num_collectives += 1

    def take(self) -> bytes:
        """The step's digest; starts the next step's."""
        taken = self._hash.digest()
        self._hash = hashlib.blake2b(digest_size=16)
        return taken


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


def build_groups(
    layout: Layout, rank: int, connect: Callable[[tuple[int, ...]], Transport | None]
) -> Groups:
    """The groups of global `rank`; `connect` is called once per distinct member list of its domain.

    Creating a communicator is collective over the domain, so every rank asks for every member list
    of its domain in the same order, its own or not; `connect` answers None where it is no member.
    """
    domain = layout.coordinates(rank).domain
    transports: dict[tuple[int, ...], Transport | None] = {}
    for name in GROUP_NAMES:
        for members in layout.groups(name):
            if layout.coordinates(members[0]).domain != domain or len(members) == 1:
                continue
            if members not in transports:
                transports[members] = connect(members)
    ledger = Ledger()

    def group(name: GroupName) -> Group:
        members = layout.members(name, rank)
        return Group(name, members, members.index(rank), transports.get(members), ledger)

    return Groups(**{name: group(name) for name in GROUP_NAMES}, ledger=ledger)


def single_rank_groups() -> Groups:
    """The groups of a world of one: every collective is the identity."""
    return build_groups(Layout(), 0, lambda members: None)


class TorchTransport:
    """torch.distributed over gloo or NCCL."""

    def __init__(self, process_group: dist.ProcessGroup) -> None:
        self.process_group = process_group

    def all_reduce(self, x: Tensor) -> None:
        dist.all_reduce(x, group=self.process_group)

    def all_gather(self, out: Tensor, x: Tensor) -> None:
        _all_gather(out, x, group=self.process_group)

    def reduce_scatter(self, out: Tensor, x: Tensor) -> None:
        _reduce_scatter(out, x, group=self.process_group)


# torch 2.13 renamed these two and warns of the old names; 2.11 has only those.
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
