"""Context parallelism in a runner: this rank's part of a replica's step, on host and device.

Slots and pages are the replica's, with the same state on all its ranks, and so are sampling and
results. In between each part computes rows of its own, which `parallel.context` deals out.

Shapes: T rows of this part, U of the replica, N rows wanted, M of them here, R that sample.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from parallel.context import Cut, Places, cut_rows
from parallel.context_gather import ContextGather, Wanted
from parallel.groups import Group
from workers.batch import Chunk, Int64s, StepRows

Upload = Callable[[NDArray[np.int64]], Tensor]


class StepPart:
    """The rows of one step that this rank computes, and the way to those of the other parts."""

    def __init__(self, group: Group, cut: Cut, upload: Upload) -> None:
        self._cut, self._part, self._upload = cut, group.rank, upload
        places = cut.places()
        self.gather = ContextGather(
            group,
            num_here=cut.counts[group.rank],
            longest=places.longest,
            places_U=upload(places.place_N),
        )
        self.decodes = cut.decodes_of(group.rank)
        """Which of the replica's decodes are this part's."""
        self._decoding: tuple[Int64s, Int64s] | None = None
        """The replica's slots that decode, and this part's of them."""
        self._last: tuple[Int64s, Wanted] | None = None
        self._all: Wanted | None = None

    def rows_of(self, rows: StepRows) -> StepRows:
        """This part's. `kv_rows_T` alone stays the replica's: all of its rows are stored."""
        cut, part = self._cut, self._part
        chunks: list[Chunk] = []
        for piece in cut.pieces_of(part):
            chunk = rows.chunks[piece.chunk]
            start = chunk.start + piece.first
            chunks.append(Chunk(chunk.slot, start, piece.length, piece.row, chunk.tokens))
        own_R = cut.part_T[rows.logit_rows_R] == part
        return rows._replace(
            decode_slots_B=self._own_slots(rows.decode_slots_B),
            chunks=tuple(chunks),
            positions_T=rows.positions_T[cut.rows_of(part)],
            logit_rows_R=cut.own_among(rows.logit_rows_R, part),
            logit_slots_R=rows.logit_slots_R[own_R],
        )

    def _own_slots(self, slots_B: Int64s) -> Int64s:
        """The same array while the same slots decode, and contiguous: it is uploaded."""
        if self._decoding is None or self._decoding[0] is not slots_B:
            self._decoding = slots_B, np.ascontiguousarray(slots_B[self.decodes])
        return self._decoding[1]

    def take(self, x_TD: Tensor, rows_N: Int64s) -> Tensor:
        """Some rows of the replica (N, D), on all its parts, from whoever computed them."""
        if self._last is None or self._last[0] is not rows_N:
            own_M = self._cut.own_among(rows_N, self._part)
            self._last = rows_N, self._wanted(own_M, self._cut.places_among(rows_N))
        return self.gather.take(x_TD, self._last[1])

    def take_all(self, x_TD: Tensor) -> Tensor:
        """All rows of the replica (U, D), without padding."""
        if self._all is None:
            own_M = np.arange(self._cut.counts[self._part])
            self._all = self._wanted(own_M, self._cut.places())
        return self.gather.take(x_TD, self._all)

    def _wanted(self, own_M: Int64s, places: Places) -> Wanted:
        return Wanted(self._upload(own_M), places.longest, self._upload(places.place_N))


class ContextParts:
    """Makes a step's `StepPart`; decodes that go on are cut but once."""

    def __init__(self, group: Group, upload: Upload) -> None:
        self._group, self._upload = group, upload
        self._last: tuple[Int64s, StepPart] | None = None

    @property
    def num_parts(self) -> int:
        return self._group.size

    def part_of(self, rows: StepRows) -> StepPart | None:
        """None if this rank computes all of the replica's rows."""
        if self._group.size == 1:
            return None
        slots_B, lengths = rows.decode_slots_B, [chunk.length for chunk in rows.chunks]
        if self._last is not None and self._last[0] is slots_B and not lengths:
            return self._last[1]
        cut = cut_rows(len(slots_B), lengths, self._group.size)
        part = StepPart(self._group, cut, self._upload)
        self._last = None if lengths else (slots_B, part)
        return part

    def part_of_bucket(self, num_rows: int) -> StepPart | None:
        """Of so many decodes: what a graph of this bucket keeps, the same in every step."""
        if self._group.size == 1:
            return None
        return StepPart(self._group, cut_rows(num_rows, (), self._group.size), self._upload)
