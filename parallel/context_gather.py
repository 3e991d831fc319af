"""Rows of a replica whose parts lie on its context-parallel ranks, brought together.

What attention leaves in the cache, be it keys and values, a latent or an indexer's keys, every
part must have of all of the replica's rows. A `ContextGather` is made once a step, and every layer
uses it so:

    send_LC = gather.slot(like, width)      optional: where to write the part's own rows
    pending = gather.start(x_TC)            this part's rows set out; `x_TC` may be `send_LC`
    ...                                     compute what does not need them: the queries
    x_UC = pending.wait()                   every row of the replica, in the replica's own order

Rows are padded to the longest part, gathered over attn_cp on a side stream, into symmetric memory
where there is any, trimmed, and put back in order (SGLang pull requests 17756 and 24040). What the
padding holds is never read. One gather goes on at a time: who has several things to bring joins
them to one row. A part without rows takes part; a replica without rows does not gather at all
(`num_rows` is 0), on all its ranks alike.

`take` is for hidden rows: some of the replica's rows, from whoever has them, to all parts.

Shapes: T rows of this part, U of the replica, L of the longest part; N rows wanted, M of them here.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from parallel.arena import Role
from parallel.collectives import PendingGather, all_gather_rows, start_all_gather_rows
from parallel.groups import Group
from parallel.symmetric import get_local_dp_buffer, use_symmetric_memory


class PendingRows(NamedTuple):
    """Rows on their way."""

    pending: PendingGather
    places_U: Tensor

    def wait(self) -> Tensor:
        """All of the replica's rows (U, ...), in its order. To be called once, in the same step."""
        return self.pending.wait().index_select(0, self.places_U)


class Wanted(NamedTuple):
    """Some of a replica's rows, as `take` needs to know them (`parallel.context.Places`)."""

    own_M: Tensor
    """Which of this part's rows are wanted."""
    longest: int
    """The most that any part brings."""
    places_N: Tensor
    """Where each lies among the parts' slots."""


class ContextGather:
    """One step's rows of a replica over its parts, as one rank sees them."""

    def __init__(self, group: Group, *, num_here: int, longest: int, places_U: Tensor) -> None:
        """`places_U` (int64, on the device) says for each of the replica's rows where it lies among
        the parts' slots of `longest` rows; `num_here` of them are this part's own."""
        self.num_here = num_here
        self.num_rows = len(places_U)
        """Rows of the replica."""
        self._group, self._longest, self._places_U = group, longest, places_U
        self._slot: Tensor | None = None

    def slot(self, like: Tensor, *shape: int) -> Tensor:
        """Where this part's rows (L, *shape) can be written, so that `start` need not copy them."""
        self._slot = self._memory("cp_in", like, (self._longest, *shape))
        return self._slot

    def start(self, x_TC: Tensor) -> PendingRows:
        """Begin to gather what this part's rows bring (T, ...); or `slot`'s tensor (L, ...)."""
        send_LC, self._slot = self._slot, None
        if send_LC is None or x_TC is not send_LC:
            if x_TC.shape[0] != self.num_here:
                raise ValueError(
                    f"{x_TC.shape[0]} rows set out over {self._group.name}, and this rank's part "
                    f"of the step has {self.num_here}"
                )
            send_LC = self._memory("cp_in", x_TC, (self._longest, *x_TC.shape[1:]))
            send_LC[: self.num_here] = x_TC
        shape = (self._group.size * self._longest, *send_LC.shape[1:])
        out = self._memory("cp_kv", send_LC, shape)
        return PendingRows(start_all_gather_rows(send_LC, self._group, out=out), self._places_U)

    def take(self, x_TD: Tensor, wanted: Wanted) -> Tensor:
        """The wanted rows (N, D) on every part, in the order in which they are wanted."""
        group, tail = self._group, x_TD.shape[1:]
        send_LD = self._memory("gather_in", x_TD, (wanted.longest, *tail))
        torch.index_select(x_TD, 0, wanted.own_M, out=send_LD[: len(wanted.own_M)])
        out = get_local_dp_buffer(group, (group.size * wanted.longest, *tail), send_LD)
        return all_gather_rows(send_LD, group, out=out).index_select(0, wanted.places_N)

    def _memory(self, role: Role, like: Tensor, shape: tuple[int, ...]) -> Tensor:
        memory = use_symmetric_memory(self._group, role, op="all_gather")
        return like.new_empty(shape) if memory is None else memory.empty(shape, like)
