"""The symmetric arena: where in a rank's memory the tensors of its collectives lie.

NCCL's symmetric kernels read and write a peer's memory at the offset that this rank uses in its
own. So memory must be registered on the communicator that uses it (else another kernel is taken,
without a word), and the offset must be the same on all ranks (else the result is wrong, without a
word). Both are settled here before the first step: slots are a pure function of the configuration,
one allocation holds them all, it is registered on every communicator of the rank in one fixed
order, and after `seal` nothing is allocated or registered any more.

What is not here: which collective may use which slot (`parallel.symmetric`), and any choice that
depends on a step. On a CPU the arena is ordinary memory with the same books, so that the contract
and the ledger are the same there.

    >>> from parallel.layout import Layout
    >>> layout = Layout(tp_size=4, dp_size=2, enable_dp_attention=True)
    >>> plan = lay_out([Need("reduced", ("attn_tp",), 1000), Need("reduced", ("tp",), 50)], layout)
    >>> [(slot.name, slot.offset, slot.num_bytes) for slot in plan.slots]
    [('reduced.attn_tp', 0, 1024), ('reduced.tp', 1024, 512)]
"""

import math
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from parallel.layout import GROUP_NAMES, GroupName, Layout

ALIGNMENT = 512
GIB = 2**30

Role = Literal[
    "embedded", "reduced", "logits", "all_logits", "local_dp", "global_dp", "scattered",
    "gather_in", "scatter_in", "cp_in", "cp_kv",
]  # fmt: skip
"""What a slot is for. One that is held while another of its role is written needs its own role."""


class SymmetryError(RuntimeError):
    """A collective's memory breaks the contract; the message names op, group, tensor and slot."""


class ArenaTooSmall(ValueError):
    """The configuration needs more symmetric memory than it allows."""


class Need(NamedTuple):
    """Memory that some collective wants: for what, over which groups it is used, how much."""

    role: Role
    groups: tuple[GroupName, ...]
    num_bytes: int


class Slot(NamedTuple):
    """A range of the arena, at one offset on all ranks."""

    name: str
    role: Role
    groups: tuple[GroupName, ...]
    """Groups whose collectives may use it."""
    offset: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class ArenaPlan:
    """All slots, in order of their offsets, without gaps."""

    slots: tuple[Slot, ...]

    @property
    def num_bytes(self) -> int:
        return self.slots[-1].offset + self.slots[-1].num_bytes if self.slots else 0

    def check_cap(self, cap_gb: float) -> None:
        """Refuse a need over `symm_mem_prealloc_gb`, naming both numbers and the largest slot."""
        if self.num_bytes <= cap_gb * GIB:
            return
        largest = max(self.slots, key=lambda slot: slot.num_bytes)
        raise ArenaTooSmall(
            f"collectives need {self.num_bytes / GIB:.2f} GiB of symmetric memory (the largest "
            f"slot, {largest.name}, {largest.num_bytes / GIB:.2f} GiB) and symm_mem_prealloc_gb="
            f"{cap_gb:g}: raise it, or lower max_num_batched_tokens"
        )


def lay_out(needs: Iterable[Need], layout: Layout) -> ArenaPlan:
    """Give every need a slot; groups of one rank need none, and equal needs share one."""
    wanted: dict[tuple[Role, tuple[GroupName, ...]], int] = {}
    for need in needs:
        groups: tuple[GroupName, ...] = tuple(
            name for name in need.groups if len(layout.groups(name)[0]) > 1
        )
        if groups:
            key = need.role, groups
            wanted[key] = max(need.num_bytes, wanted.get(key, 0))
    slots: list[Slot] = []
    offset = 0
    for (role, groups), num_bytes in wanted.items():
        length = max(-(-num_bytes // ALIGNMENT), 1) * ALIGNMENT
        slots.append(Slot(".".join((role, *groups)), role, groups, offset, length))
        offset += length
    return ArenaPlan(tuple(slots))


class ModelSizes(NamedTuple):
    """What of a model decides how large its collectives' tensors are."""

    hidden_size: int
    vocab_size: int
    itemsize: int
    num_rows: int
    """Rows of one replica in the largest step."""
    num_logit_rows: int
    context_bytes: int = 0
    """What one row leaves in the cache of a layer on one rank: gathered over attn_cp."""


def model_needs(
    layout: Layout,
    sizes: ModelSizes,
    collectives: Iterable[tuple[str, GroupName]],
    *,
    has_uneven_shares: bool = False,
) -> list[Need]:
    """The slots for a model's (op, group) pairs, in the order given.

    A group inside one part of a replica works on the part's rows, one that reaches over parts on
    the rows of all, each padded to the longest. Rows are aligned as a step's are. With uneven
    shares what is scattered is first put at equal distances, in a slot of its own. What goes over
    attn_cp is no layer's input or output: see `context_needs`.
    """
    local = _rows_of_part(layout, sizes)
    width = sizes.hidden_size * sizes.itemsize
    needs = [Need("embedded", ("attn_tp",), local * width)]
    for op, name in collectives:
        if name == "attn_cp":
            continue
        num_ranks = len(layout.groups(name)[0])
        is_shared = num_ranks > layout.attn_tp_size
        rows = local * (layout.num_parts if is_shared else 1)
        whole, part = rows * width, max(rows // num_ranks, sizes.num_logit_rows) * width
        if op in ("all_reduce", "reduce_scatter"):
            needs.append(Need("reduced", (name,), whole))
        if op == "reduce_scatter":
            needs.append(Need("local_dp" if is_shared else "scattered", (name,), part))
            if not is_shared or has_uneven_shares:
                needs.append(Need("scatter_in", (name,), whole))
        if op == "all_gather":
            gathered = Need("global_dp" if is_shared else "local_dp", (name,), num_ranks * part)
            needs += [Need("gather_in", (name,), part), gathered]
    return needs


def _rows_of_part(layout: Layout, sizes: ModelSizes) -> int:
    """Of one part of a replica in the largest step, padded as a step's are."""
    unit = layout.attn_tp_size * layout.attn_cp_size
    return -(-sizes.num_rows // unit) * layout.attn_tp_size


def context_needs(layout: Layout, sizes: ModelSizes) -> list[Need]:
    """Of context parallelism, each gather padded to the longest part: what rows leave in the cache
    on its side stream, and hidden rows (of the head, or a float32 a row) beside it."""
    num_parts = layout.attn_cp_size
    longest = _rows_of_part(layout, sizes)
    cached = longest * sizes.context_bytes
    hidden = max(sizes.num_logit_rows * sizes.hidden_size * sizes.itemsize, longest * 4)
    return [
        Need("cp_in", ("attn_cp",), cached),
        Need("cp_kv", ("attn_cp",), num_parts * cached),
        Need("gather_in", ("attn_cp",), hidden),
        Need("local_dp", ("attn_cp",), num_parts * hidden),
    ]


def logit_needs(
    layout: Layout,
    sizes: ModelSizes,
    *,
    spans_replicas: bool,
    group: GroupName = "attn_tp",
    itemsize: int = 4,
) -> list[Need]:
    """The head's. Within a replica every rank's columns of float32 logits are gathered over
    `group`; over replicas their hidden rows are, and the columns come back by an all-to-all."""
    if spans_replicas:
        part = sizes.num_logit_rows * sizes.hidden_size * sizes.itemsize
        whole = layout.attn_dp_size * part
        return [Need("gather_in", ("attn_dp",), part), Need("global_dp", ("attn_dp",), whole)]
    num_ranks = len(layout.groups(group)[0])
    part = sizes.num_logit_rows * -(-sizes.vocab_size // num_ranks) * itemsize
    whole = num_ranks * part
    return [Need("logits", (group,), part), Need("all_logits", (group,), whole)]


class Block(NamedTuple):
    """The arena's memory, and the pool it came from if it is NCCL's."""

    bytes_N: Tensor
    pool: Any = None


class Registrar(Protocol):
    """The part of a transport that an arena needs."""

    def allocate(self, num_bytes: int, device: torch.device) -> Block:
        """Memory that can be registered; not collective."""
        ...

    def warm(self, device: torch.device) -> None:
        """Make sure that the communicator is up. Collective over its members."""
        ...

    def register(self, block: Block) -> None:
        """Make the block symmetric on this communicator. Collective over its members."""
        ...


class Member(Protocol):
    """What an arena needs to know of a group."""

    @property
    def name(self) -> GroupName: ...
    @property
    def members(self) -> tuple[int, ...]: ...
    @property
    def spans_nodes(self) -> bool: ...
    @property
    def transport(self) -> Registrar | None: ...


class Place(NamedTuple):
    """Where a tensor lies in the arena."""

    slot: Slot
    offset: int


class Arena:
    """One rank's symmetric memory. Closed until `open`, final after `seal`."""

    def __init__(self, *, place: Callable[[Slot], int] = lambda slot: slot.offset) -> None:
        """`place` says where a slot begins; tests plant faults there."""
        self.is_open = False
        self.is_strict = False
        self.rows_are_even = True
        """Whether all replicas have the same rows in this step, padding included."""
        self.plan = ArenaPlan(())
        self.num_registrations = 0
        self.place = place
        self._is_sealed = False
        self._block: Block | None = None
        self._base = self._end = 0
        self._starts: list[int] = []
        self._registered: set[int] = set()
        self._by_name: dict[tuple[Role, GroupName], Slot] = {}
        self._by_members: dict[tuple[Role, tuple[int, ...]], Slot] = {}
        self._users: dict[str, frozenset[int]] = {}
        self._typed: dict[torch.dtype, Tensor] = {}

    def open(
        self,
        plan: ArenaPlan,
        groups: Mapping[GroupName, Member],
        device: torch.device,
        *,
        is_strict: bool,
        time_limit_s: float = 60.0,
    ) -> None:
        """Allocate and register; collective over every group, in the order of `GROUP_NAMES`."""
        self._refuse_if_too_late("allocated")
        if self.is_open:
            raise SymmetryError("the symmetric arena is allocated once, and it has been")
        transports = distinct_transports(groups)
        if not transports or not plan.slots:
            return
        self._block = transports[0][1].allocate(plan.num_bytes, device)
        for name, transport in transports:
            transport.warm(device)
            within(
                time_limit_s,
                lambda transport=transport: self._register(transport),
                f"registering the symmetric arena on the communicator of {name} "
                f"{groups[name].members}",
                device,
            )
        self._index(plan, groups)
        self.is_open, self.is_strict = True, is_strict

    def seal(self) -> None:
        """Ready: from here on nothing is allocated or registered."""
        self._is_sealed = True

    def register(self, transport: Registrar) -> None:
        """Register the arena on one more communicator; refused after `seal` and in a capture."""
        self._refuse_if_too_late("registered")
        self._register(transport)

    def take(
        self, role: Role, group: Member, shape: Sequence[int], dtype: torch.dtype
    ) -> Tensor | None:
        """The slot of this role and group as a tensor; None if none was declared.

        What was in it is gone: who keeps a tensor beyond the next of its role keeps a copy.
        """
        slot = self.slot_of(role, group)
        if slot is None:
            return None
        itemsize = dtype.itemsize
        if math.prod(shape) * itemsize > slot.num_bytes:
            raise SymmetryError(
                f"{tuple(shape)} of {dtype} are {math.prod(shape) * itemsize} bytes and the slot "
                f"{slot.name} has {slot.num_bytes}: a step is larger than the arena was planned for"
            )
        whole = self._typed.get(dtype)
        if whole is None:
            whole = self._typed[dtype] = self._bytes().view(dtype)
        stride = _strides(shape)
        return torch.as_strided(whole, tuple(shape), stride, self.place(slot) // itemsize)

    def slot_of(self, role: Role, group: Member) -> Slot | None:
        """By the group's name, else that of another group with the same members."""
        slot = self._by_name.get((role, group.name))
        return slot or self._by_members.get((role, group.members))

    def find(self, x: Tensor) -> Place | None:
        """Where `x` begins in the arena; None if it lies elsewhere."""
        address = x.data_ptr()
        if not self._base <= address < self._end:
            return None
        offset = address - self._base
        return Place(self.plan.slots[bisect_right(self._starts, offset) - 1], offset)

    def is_registered(self, transport: object) -> bool:
        return id(transport) in self._registered

    def may_use(self, slot: Slot, transport: object) -> bool:
        """Whether the slot declares a group that talks over `transport`."""
        return id(transport) in self._users[slot.name]

    def _register(self, transport: Registrar) -> None:
        transport.register(self._block or Block(torch.empty(0)))
        self._registered.add(id(transport))
        self.num_registrations += 1

    def _bytes(self) -> Tensor:
        if self._block is None:
            raise SymmetryError("the symmetric arena is not open")
        return self._block.bytes_N

    def _index(self, plan: ArenaPlan, groups: Mapping[GroupName, Member]) -> None:
        self.plan = plan
        self._base = self._bytes().data_ptr()
        self._end = self._base + plan.num_bytes
        self._starts = [slot.offset for slot in plan.slots]
        for slot in plan.slots:
            users = [groups[name] for name in slot.groups]
            self._users[slot.name] = frozenset(id(user.transport) for user in users)
            for user in users:
                self._by_name.setdefault((slot.role, user.name), slot)
                self._by_members.setdefault((slot.role, user.members), slot)

    def _refuse_if_too_late(self, what: str) -> None:
        if self._is_sealed:
            raise SymmetryError(
                f"symmetric memory was to be {what} after the rank was ready: peers that do not "
                "do the same would wait for ever; plan the slot at start"
            )
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise SymmetryError(
                f"symmetric memory was to be {what} inside the capture of a CUDA graph: plan the "
                "slot at start"
            )


def distinct_transports(groups: Mapping[GroupName, Member]) -> list[tuple[GroupName, Registrar]]:
    """Every communicator of a rank that stays in one NVLink domain, once, in the order of names.

    All ranks find the same order, because groups of one kind are alike; groups of one kind that
    exclude each other register at the same time.
    """
    found: dict[int, tuple[GroupName, Registrar]] = {}
    for name in GROUP_NAMES:
        transport = groups[name].transport
        if transport is not None and not groups[name].spans_nodes:
            found.setdefault(id(transport), (name, transport))
    return list(found.values())


def within(seconds: float, call: Callable[[], None], what: str, device: torch.device) -> None:
    """Make a call that peers could hang; past the deadline raise and leave it behind."""
    failures: list[BaseException] = []

    def run() -> None:
        try:
            if device.type == "cuda":
                torch.cuda.set_device(device)
            call()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run, name=what, daemon=True)
    thread.start()
    thread.join(seconds)
    if failures:
        raise failures[0]
    if thread.is_alive():
        raise SymmetryError(f"{what} was not done within {seconds:g} s: a member did not come")


def _strides(shape: Sequence[int]) -> tuple[int, ...]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))
