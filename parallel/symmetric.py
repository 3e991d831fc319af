"""Whose memory a collective works on: slots handed out by group, and the contract that is checked.

Who wants a collective's tensor asks for it by group, and there is no default: memory that is
symmetric on one group falls back silently on another. What a collective was then given is judged
when it is called, per collective and group:

    symmetric   every side that NCCL wants lies in a slot declared for this very communicator
    chosen      another path is right here: the group spans NVLink domains, the replicas' rows are
                uneven, op or type have no symmetric kernel, or another way is measured to be
                quicker (`parallel.sums`)
    fallback    none of that: a bug. `symm_mem_strict` raises, otherwise it is counted

    with DP attention, per layer       memory                     group of its collective
    o_proj's product                   reduced.attn_tp            attn_tp, never gated
    its sum, one rank's share          scattered.attn_tp          attn_tp
    the share for the gather           gather_in.tp               tp, if `is_allocation_symmetric`
    rows of all replicas               global_dp.tp               tp, the same
    the MLP's product                  reduced.tp                 tp, the same
    its sum, one rank's share          local_dp.tp                tp, the same
    rows of the replica                local_dp.attn_tp           attn_tp, never gated

The gate is per group: inside one attention replica all ranks have the same rows whatever the other
replicas have, so a step with uneven replicas keeps its attention-TP collectives symmetric.
"""

from collections.abc import Sequence
from functools import cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.cuda import nccl

from parallel.arena import Place, Role, SymmetryError
from parallel.groups import Group

Op = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all"]
Side = Literal["send", "receive"]
BOTH: tuple[Side, ...] = ("send", "receive")

SIDES: dict[tuple[int, int], dict[Op, tuple[Side, ...]]] = {
    (2, 28): {"all_reduce": BOTH, "all_gather": BOTH, "reduce_scatter": BOTH},
}
"""Sides that must be symmetric for a symmetric kernel, by NCCL version and operation. Measured on
2.28.9 (two H200, no multicast); of other versions nothing is, and there both are asked for."""

REDUCIBLE = (torch.float32, torch.float16, torch.bfloat16)
"""Types whose sums have symmetric kernels; a gather has them for all."""


class Verdict(NamedTuple):
    """What a collective ran on."""

    path: str
    reason: str
    places: tuple[tuple[str, int], ...]


NOT_JUDGED = Verdict("", "", ())


def required_sides(op: Op, nccl: tuple[int, int]) -> tuple[Side, ...]:
    return SIDES.get(nccl, {}).get(op, BOTH)


def is_allocation_symmetric(group: Group) -> bool:
    """Whether all ranks of `group` have tensors of equal size in this step.

    Always inside one replica, and so without DP attention; over replicas if they are padded to the
    longest (MAX_LEN).
    """
    return not group.is_shared or group.arena.rows_are_even


class SlotMemory(NamedTuple):
    """Memory of one role for collectives over one group."""

    group: Group
    role: Role
    op: Op

    def empty(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """A tensor of `like`'s type there; ordinary if that is quicker at this size."""
        if self.op == "all_reduce":
            num_bytes = _count(shape) * like.itemsize
            if self.group.sums.prefers_ordinary(num_bytes):
                return like.new_empty(shape)
        slot = self.group.arena.take(self.role, self.group, shape, like.dtype)
        return like.new_empty(shape) if slot is None else slot


def use_symmetric_memory(
    group: Group, role: Role, *, op: Op, disabled: bool = False
) -> SlotMemory | None:
    """Where the tensor of a collective over `group` is to lie; None where ordinary memory will do.

    `op` reads or writes it: an all-reduce alone may be quicker from ordinary memory at some sizes.
    `disabled` is the caller's gate, for what is not equally large on all ranks.
    """
    if not group.arena.is_open or disabled or group.size == 1 or group.spans_nodes:
        return None
    return SlotMemory(group, role, op)


def place_in_slot(
    group: Group,
    shape: Sequence[int],
    like: Tensor,
    *,
    role: Role = "reduced",
    op: Op,
) -> Tensor | None:
    """Where to write what is then summed over `group`; None where ordinary memory will do.

    `op` is how it will be summed: a reduce-scatter reads the arena's slot whatever the size. There
    is no default, because another one's is where a gather's input went missing.
    """
    if group.size == 1:
        return None
    if op == "all_reduce" and role == "reduced" and group.sums.table is not None:
        staged = group.sums.place(shape, _count(shape) * like.itemsize, like)
        if staged is not None:
            return staged
    if not group.arena.is_open:
        return None
    memory = use_symmetric_memory(group, role, op=op, disabled=not is_allocation_symmetric(group))
    return None if memory is None else memory.empty(shape, like)


def moved_to_slot(x: Tensor, group: Group, *, role: Role, op: Op) -> Tensor:
    """`x`, copied to the slot if it lies elsewhere: for producers that cannot write there."""
    if group.size == 1 or (group.arena.is_open and group.arena.find(x) is not None):
        return x
    place = place_in_slot(group, x.shape, x, role=role, op=op)
    return x if place is None else place.copy_(x)


def out_of_slot(x: Tensor, group: Group) -> Tensor:
    """`x`, copied if it lies in a slot: for what is kept when the slot is written again."""
    return x.clone() if group.arena.is_open and group.arena.find(x) is not None else x


def get_local_dp_buffer(group: Group, shape: Sequence[int], like: Tensor) -> Tensor:
    """Where a collective over `group` writes rows of this rank's own replica.

    A context-parallel gather names the attention-CP group, the combine of the experts TP, a
    scatter TP if every replica is one rank and the attention-TP group otherwise.
    """
    return _buffer("local_dp", group, shape, like)


def get_global_dp_buffer(group: Group, shape: Sequence[int], like: Tensor) -> Tensor:
    """Where a collective over `group` writes rows of all replicas."""
    return _buffer("global_dp", group, shape, like)


def _buffer(role: Role, group: Group, shape: Sequence[int], like: Tensor) -> Tensor:
    disabled = not is_allocation_symmetric(group)
    memory = use_symmetric_memory(group, role, op="all_gather", disabled=disabled)
    return like.new_empty(shape) if memory is None else memory.empty(shape, like)


def judge(
    op: Op, group: Group, send: Tensor, receive: Tensor, *, in_one_buffer: bool = False
) -> Verdict:
    """What the collective about to be made runs on; in strict mode a fallback raises.

    `in_one_buffer`: rows in uneven shares are summed in a buffer of all rows, which no slot is for.
    """
    arena = group.arena
    if not arena.is_open:
        return NOT_JUDGED
    if group.spans_nodes:
        return Verdict("chosen", "spans_nodes", ())
    if send.numel() == 0:
        return Verdict("chosen", "empty", ())
    if op == "all_to_all":
        return Verdict("chosen", "no_kernel", ())
    if op != "all_gather" and send.dtype not in REDUCIBLE:
        return Verdict("chosen", "dtype", ())
    tensors: dict[Side, Tensor] = {"send": send, "receive": receive}
    places: dict[Side, Place | None] = {side: arena.find(x) for side, x in tensors.items()}
    flaws: list[tuple[Side, str]] = [
        (side, _flaw(group, places[side])) for side in required_sides(op, nccl_version())
    ]
    seen = tuple((place.slot.name, place.offset) for place in places.values() if place is not None)
    flawed: list[tuple[Side, str]] = [(side, flaw) for side, flaw in flaws if flaw]
    if not flawed:
        return Verdict("symmetric", "", seen)
    if all(flaw == "outside" for _, flaw in flawed):
        reason = "uneven_rows" if in_one_buffer else _excuse(op, group, send)
        if reason:
            return Verdict("chosen", reason, seen)
    side, flaw = flawed[0]
    if arena.is_strict:
        raise SymmetryError(_sentence(op, group, side, tensors[side], flaw, places[side]))
    return Verdict("fallback", flaw, seen)


@cache
def nccl_version() -> tuple[int, int]:
    """Of the NCCL that this torch was built with; 0.0 for none. Does not wake CUDA."""
    if torch.version.cuda is None:
        return (0, 0)
    major, minor, *_ = nccl.version()
    return (major, minor)


def _flaw(group: Group, place: Place | None) -> str:
    if place is None:
        return "outside"
    if not group.arena.is_registered(group.transport):
        return "unregistered"
    if not group.arena.may_use(place.slot, group.transport):
        return "wrong_group"
    return "" if place.offset == place.slot.offset else "part_of_slot"


def _excuse(op: Op, group: Group, send: Tensor) -> str:
    """Why memory outside the arena is right for this collective, if it is."""
    if not is_allocation_symmetric(group):
        return "uneven_rows"
    if op == "all_reduce" and group.sums.prefers_ordinary(send.nbytes):
        return "measured"
    return ""


def _sentence(op: Op, group: Group, side: Side, x: Tensor, flaw: str, place: Place | None) -> str:
    what = f"{op} over {group.name} {group.members}: its {side} tensor {tuple(x.shape)} {x.dtype}"
    if place is None:
        return f"{what} lies outside the symmetric arena; take it with use_symmetric_memory"
    if flaw == "part_of_slot":
        return (
            f"{what} begins {place.offset - place.slot.offset} bytes inside slot "
            f"{place.slot.name}: elsewhere than on other ranks"
        )
    declared = ", ".join(place.slot.groups)
    if flaw == "unregistered":
        return f"{what} is in slot {place.slot.name}, and the arena is not registered there"
    return f"{what} is in slot {place.slot.name}, which is declared for {declared}"


def _count(shape: Sequence[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
