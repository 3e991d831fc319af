"""Rows of a step over attention replicas: who has which, and how they are brought together.

With context parallelism a replica is several *parts* with rows of their own (`parallel.context`),
and all that is said of replicas here holds of parts; without it a replica is one part.

Every rank knows every replica's row count from the step's header, so all that follows is worked
out without asking: a `RowSplit` is the arithmetic of one step, and the functions below it move rows
between the three layouts of `parallel.plan.Rows`. Each makes one collective, over the group that it
is given:

    gather_replica   SCATTERED -> TP_ATTN_FULL   all-gather over attn_tp
    sum_to_shares    TP_ATTN_FULL -> SCATTERED   reduce-scatter over attn_tp
    gather_all       SCATTERED -> FULL           all-gather over tp
    sum_to_share     FULL -> SCATTERED           reduce-scatter over tp

Where the ranks' shares are unequal, every rank's part of a collective is as long as the longest
share, or, where that would move more than all rows twice, the rows are summed in one buffer that is
zero where a rank has nothing; a step's header may say which. What is exchanged has the same shape
on all ranks either way.

    >>> split = RowSplit(rows=(4, 2), num_real=(3, 2), attn_tp=2, part=0, place=1)
    >>> split.shares, split.share, split.own
    ((2, 2, 1, 1), slice(2, 4, None), slice(0, 4, None))
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from parallel.collectives import (
    all_gather_rows,
    all_reduce,
    all_to_all_rows,
    reduce_scatter_rows,
    side_by_side,
)
from parallel.context_gather import ContextGather
from parallel.groups import Group
from parallel.padding import slots_move_less
from parallel.plan import Rows
from parallel.symmetric import (
    get_global_dp_buffer,
    get_local_dp_buffer,
    is_allocation_symmetric,
    place_in_slot,
    use_symmetric_memory,
)

Upload = Callable[[NDArray[np.generic]], Tensor]
"""To the device, without waiting for it."""


class UnreducedError(RuntimeError):
    """Rows that are a part of a sum, or a part of the rows, were taken for the whole."""


class Activation(NamedTuple):
    """Rows of a step together with what they are."""

    tensor: Tensor
    rows: Rows
    owed: Group | None = None
    """Each rank of this group holds an addend; None if the values are final."""

    def final(self, rows: Rows) -> Tensor:
        """The tensor, for one who needs final values in layout `rows`."""
        if self.owed is not None or self.rows is not rows:
            raise UnreducedError(
                f"rows are {self} and {rows.value}, summed, are needed: a collective is missing"
            )
        return self.tensor

    def addend(self, rows: Rows, owed: Group | None) -> Tensor:
        """The tensor, for one who is about to sum it over `owed`."""
        mine, theirs = self.owed, owed
        if self.rows is not rows or (mine and mine.members) != (theirs and theirs.members):
            over = f"owed over {theirs.name}" if theirs else "summed"
            raise UnreducedError(
                f"rows are {self} and {rows.value}, {over}, are needed: the layer was built for "
                "another group than the plan's"
            )
        return self.tensor

    def __str__(self) -> str:
        return f"{self.rows.value}, {f'owed over {self.owed.name}' if self.owed else 'summed'}"


class RowCounts(NamedTuple):
    """What a step's header says of rows, for every replica of the domain."""

    num_real: tuple[int, ...]
    """Rows that are tokens."""
    padded: tuple[int, ...]
    """Rows as the model sees them, in all parts of the replica together; the rest is padding."""
    num_logit_rows: tuple[int, ...]
    num_prompt_rows: tuple[int, ...] = ()
    """Rows whose next prompt token's log-probability is wanted; empty if no replica has any."""
    in_one_buffer: bool | None = None
    """Whether rows in uneven shares are summed in one buffer; None: if that moves less."""


class RowSplit:
    """The rows of one step, as one rank sees them.

    Part p's rows come p-th in FULL. A part's rows are cut into `attn_tp` shares of equal length,
    the last ones shorter or empty where they do not divide.
    """

    context: ContextGather | None = None
    """How attention brings together the rows of its replica's parts, set anew in every step; None
    if a replica is one part."""

    def __init__(
        self,
        *,
        rows: tuple[int, ...],
        num_real: tuple[int, ...],
        attn_tp: int,
        part: int,
        place: int,
        in_one_buffer: bool | None = None,
        upload: Upload = torch.from_numpy,
    ) -> None:
        """`part` is this rank's among all parts, `place` this rank's in its attention-TP group."""
        self.num_rows = rows[part]
        """Rows of this part."""
        self.num_real = num_real[part]
        self.total = sum(rows)
        lengths = [-(-count // attn_tp) for count in rows]
        self.shares = tuple(
            min(length, max(0, count - number * length))
            for count, length in zip(rows, lengths, strict=True)
            for number in range(attn_tp)
        )
        """Rows of every tp rank, scattered."""
        self.longest = max(self.shares)
        start = sum(rows[:part])
        self.own = slice(start, start + self.num_rows)
        """This part's rows in FULL."""
        self.share_length = lengths[part]
        mine = part * attn_tp + place
        first = place * self.share_length
        self.share = slice(min(first, self.num_rows), min(first + self.share_length, self.num_rows))
        """This rank's share of its part's rows."""
        self.share_in_all = slice(start + self.share.start, start + self.share.stop)
        self.num_share = self.shares[mine]
        self.is_even = len(set(self.shares)) == 1
        if in_one_buffer is None:
            in_one_buffer = not slots_move_less(len(self.shares), self.longest, self.total)
        self.uses_slots = not in_one_buffer
        """Uneven shares are exchanged in slots of the longest, not summed in one buffer."""
        self._rows, self._num_real, self._upload = rows, num_real, upload
        self._part = part
        self._num_live_P: Tensor | None = None
        self._slots: Tensor | None = None
        self._live: dict[Rows, Tensor | None] = {}

    @property
    def slots(self) -> Tensor:
        """For each row of FULL its place among the ranks' slots."""
        if self._slots is None:
            parts = [
                np.arange(rank * self.longest, rank * self.longest + share)
                for rank, share in enumerate(self.shares)
            ]
            self._slots = self._upload(np.concatenate(parts))
        return self._slots

    def follow(self, num_live_P: Tensor) -> None:
        """From here on which rows are tokens is read off `num_live_P` when kernels run.

        For a step that is captured: its parts are padded alike, and how many of each part's rows
        are tokens changes from one replay to the next. Called at the beginning of every pass.
        """
        self._num_live_P = num_live_P
        self._live.clear()

    def live(self, rows: Rows) -> Tensor | None:
        """Which rows are tokens (bool), in a layout; None if all are."""
        if self._num_live_P is None and self._rows == self._num_real:
            return None
        if rows not in self._live:
            counts_P = self._num_live_P
            self._live[rows] = (
                self._upload(self._live_rows(rows))
                if counts_P is None
                else self._rows_below(counts_P, rows)
            )
        return self._live[rows]

    def _rows_below(self, num_live_P: Tensor, rows: Rows) -> Tensor:
        """Computed on the device; all parts have equally many rows."""
        place_T = torch.arange(self.num_rows, device=num_live_P.device)
        if rows is Rows.FULL:
            return (place_T < num_live_P.unsqueeze(1)).flatten()
        own_T = place_T < num_live_P[self._part]
        return own_T if rows is Rows.TP_ATTN_FULL else own_T[self.share]

    def _live_rows(self, rows: Rows) -> NDArray[np.bool_]:
        if rows is Rows.FULL:
            counts = zip(self._rows, self._num_real, strict=True)
            return np.concatenate([np.arange(count) < real for count, real in counts])
        own_T = np.arange(self.num_rows) < self.num_real
        return own_T if rows is Rows.TP_ATTN_FULL else own_T[self.share]


def _lengthened(x_TD: Tensor, length: int) -> Tensor:
    """With rows of zeros at the end, if it is shorter than `length`."""
    missing = length - x_TD.shape[0]
    if missing == 0:
        return x_TD
    return torch.cat([x_TD, x_TD.new_zeros(missing, *x_TD.shape[1:])])


def _stretched(x_TD: Tensor, length: int, group: Group) -> Tensor:
    """`length` rows, for a collective whose results past the real rows are cut off.

    Rows at the beginning of a slot are followed by whatever the slot holds there: nothing is moved.
    """
    place = group.arena.find(x_TD) if group.arena.is_open and x_TD.shape[0] else None
    if x_TD.shape[0] == length or place is None or place.offset != place.slot.offset:
        return _lengthened(x_TD, length)
    if length * x_TD[0].numel() * x_TD.itemsize > place.slot.num_bytes:
        return _lengthened(x_TD, length)
    return x_TD.as_strided((length, *x_TD.shape[1:]), x_TD.stride())


def place_for_gather(
    like_SD: Tensor, split: RowSplit, group: Group, *, to_all: bool
) -> Tensor | None:
    """Where to write rows that `gather_all`, or `gather_replica`, is to read; None for anywhere."""
    length = split.longest if to_all else split.share_length
    arena, num_rows = group.arena, like_SD.shape[0]
    if not arena.is_open or not num_rows or arena.slot_of("gather_in", group) is None:
        return None
    if to_all and not (split.is_even or split.uses_slots):
        return None
    disabled = not is_allocation_symmetric(group)
    memory = use_symmetric_memory(group, "gather_in", op="all_gather", disabled=disabled)
    shape = (length, *like_SD.shape[1:])
    return None if memory is None else memory.empty(shape, like_SD)[:num_rows]


def _times(group: Group, x_TD: Tensor) -> tuple[int, ...]:
    """The shape of all members' rows."""
    return (group.size * x_TD.shape[0], *x_TD.shape[1:])


def take_share(x_TD: Tensor, split: RowSplit) -> Tensor:
    """This rank's share of its replica's rows: no collective, no copy."""
    return x_TD[split.share]


def gather_replica(x_SD: Tensor, split: RowSplit, attn_tp: Group) -> Tensor:
    """All rows of this rank's replica, from its ranks' shares."""
    x_SD = _stretched(x_SD, split.share_length, attn_tp)
    out = get_local_dp_buffer(attn_tp, _times(attn_tp, x_SD), x_SD)
    return all_gather_rows(x_SD, attn_tp, out=out)[: split.num_rows]


def sum_to_shares(x_TD: Tensor, split: RowSplit, attn_tp: Group) -> Tensor:
    """This rank's share of the replica's rows, summed over the replica's ranks."""
    length = split.share_length * attn_tp.size
    return reduce_scatter_rows(_stretched(x_TD, length, attn_tp), attn_tp)[: split.num_share]


def gather_all(x_SD: Tensor, split: RowSplit, tp: Group) -> Tensor:
    """All rows of all replicas, from the shares of all ranks."""
    if split.is_even or split.uses_slots:
        x_SD = _stretched(x_SD, split.longest, tp)
        out = get_global_dp_buffer(tp, _times(tp, x_SD), x_SD)
        slots = all_gather_rows(x_SD, tp, out=out)
        return slots if split.is_even else slots.index_select(0, split.slots)
    all_ND = x_SD.new_zeros(split.total, *x_SD.shape[1:])
    all_ND[split.share_in_all] = x_SD
    return all_reduce(all_ND, tp, in_one_buffer=True)


def sum_to_share(x_ND: Tensor, split: RowSplit, tp: Group) -> Tensor:
    """This rank's share of all rows, summed over all ranks."""
    if not split.is_even and not split.uses_slots:
        return all_reduce(x_ND, tp, in_one_buffer=True)[split.share_in_all]
    slots = x_ND
    if not split.is_even:
        shape = (tp.size * split.longest, *x_ND.shape[1:])
        place = place_in_slot(tp, shape, x_ND, role="scatter_in", op="reduce_scatter")
        slots = x_ND.new_zeros(shape) if place is None else place.zero_()
        slots.index_copy_(0, split.slots, x_ND)
    out = get_local_dp_buffer(tp, (split.longest, *x_ND.shape[1:]), x_ND)
    return reduce_scatter_rows(slots, tp, out=out)[: split.num_share]


def gather_logit_rows(x_RD: Tensor, counts: tuple[int, ...], attn_dp: Group) -> Tensor:
    """Every replica's rows (P, M, D) of which `counts` are its own; M is the most of them."""
    longest = max(counts)
    slots = all_gather_rows(_lengthened(x_RD, longest), attn_dp)
    return slots.view(attn_dp.size, longest, *x_RD.shape[1:])


def answer_logit_rows(x_PMV: Tensor, count: int, tp: Group, *, out: Tensor | None = None) -> Tensor:
    """Of this rank's columns (P, M, V) of all rows, send every rank those of its own rows.

    What comes back are all columns (count, W * V) of this rank's; those of several rows are
    written to `out` where the caller has a place for them.
    """
    num_replicas, longest, width = x_PMV.shape
    to_each = x_PMV.repeat_interleave(tp.size // num_replicas, 0).view(-1, width)
    mine_WMV = all_to_all_rows(to_each, tp).view(tp.size, longest, width)[:, :count]
    return side_by_side(mine_WMV, out)
