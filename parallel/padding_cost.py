"""How many rows each replica is given in a step, by what that costs: curves measured at start.

The cost of a step, as far as padding changes it, in microseconds on one rank:

    exchange(way, rows moved) + mlps(rows computed)

Both are curves over rows of all replicas together, for all layers whose MLPs work on them, and
both come from the machine (`workers.padding_times`). The ways to exchange:

    equal    every rank's share is as long as the others': gather and reduce-scatter
    slots    the same in slots of the longest share, with copies into the slots and out of them
    buffer   all rows summed in one buffer

MAX_LEN moves and computes the longest count times the replicas, `equal`. SUM_LEN computes the true
counts; it moves `slots` as MAX_LEN would, or the true counts in a `buffer`. What a replica does
with its own rows is left out: the longest one, for which the others wait, has the same rows in
both. (Where ranks share cores, which a test machine's do, that makes padding look cheaper.)

So the cost model departs from the rule (`parallel.padding`) where counts are nearly equal: a step
with prompts is SUM_LEN by the rule, and a few rows of padding cost less than copies into slots and
out of them. And it takes the quicker way to be SUM_LEN, where the rule takes what moves fewer rows.
Decodes that are replayed from graphs are padded to their bucket before anyone asks.

    >>> curves = PaddingCurves((4, 40), (10, 20), (15, 30), (12, 60), mlps=(1, 40))
    >>> costs = PaddingCosts(curves, attn_tp=1, attn_cp=1)
    >>> [pad_by_cost(rows, costs, row_multiple=1) for rows in ((9, 10), (1, 20))]
    [Padded(mode='max_len', rows=(10, 10)), Padded(mode='sum_slots', rows=(1, 20))]
"""

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import NamedTuple

from parallel.padding import Padded, PaddingMode, align_rows, pad_rows, slots_move_less

MODES: tuple[PaddingMode, ...] = ("max_len", "sum_slots", "sum_buffer")
"""The first of the cheapest is chosen."""


class PaddingCurves(NamedTuple):
    """Microseconds in a step, at some numbers of rows of all replicas together."""

    rows: tuple[int, ...]
    """Ascending."""
    equal: tuple[float, ...]
    slots: tuple[float, ...]
    """Rows are the slots'."""
    buffer: tuple[float, ...]
    mlps: tuple[float, ...]
    """Of rows that are padding: they are multiplied like others, and choose no experts."""


def slowest(by_rank: Sequence[PaddingCurves | None]) -> PaddingCurves | None:
    """One set of curves for all ranks: at each size the slowest rank's, and never falling.

    What else a machine does only adds to a figure, so of a smaller size that took longer than a
    larger one the larger one's is believed. None if a rank has none, or has timed other sizes.

    >>> one = PaddingCurves((2, 8), (5.0, 4.0), (6.0, 9.0), (7.0, 8.0), (1.0, 2.0))
    >>> slowest([one, one._replace(slots=(7.0, 8.0))])[1:3]
    ((4.0, 4.0), (7.0, 9.0))
    """
    curves = [one for one in by_rank if one is not None]
    if len(curves) < len(by_rank) or len({one.rows for one in curves}) != 1:
        return None

    def merged(figures: Iterable[Sequence[float]]) -> tuple[float, ...]:
        slow = [max(each) for each in zip(*figures, strict=True)]
        return tuple(accumulate(slow[::-1], min))[::-1]

    rows, *kinds = zip(*curves, strict=True)
    return PaddingCurves(rows[0], *(merged(figures) for figures in kinds))


class PaddingCosts:
    """What a step costs on one layout, by its padding."""

    def __init__(self, curves: PaddingCurves, *, attn_tp: int, attn_cp: int) -> None:
        """`curves` do not fall; a replica is `attn_cp` parts of `attn_tp` ranks."""
        self._curves, self._attn_tp, self._attn_cp = curves, attn_tp, attn_cp

    def of(self, padded: Padded) -> float:
        """Microseconds of what padding changes in a step with such rows."""
        curves, total = self._curves, sum(padded.rows)
        share = -(-max(padded.rows) // (self._attn_cp * self._attn_tp))
        num_ranks = len(padded.rows) * self._attn_cp * self._attn_tp
        moved = num_ranks * share
        if moved == total:
            figures = curves.equal
        elif self._sums_buffer(padded.mode, num_ranks, share, total):
            figures, moved = curves.buffer, total
        else:
            figures = curves.slots
        return _at(curves.rows, figures, moved) + _at(curves.rows, curves.mlps, total)

    def summary(self) -> str:
        """The curves in one line, for a log."""
        curves = self._curves
        parts = [
            f"{rows} rows {equal:.0f}, {slots:.0f}, {buffer:.0f} + {mlps:.0f}"
            for rows, equal, slots, buffer, mlps in zip(*curves, strict=True)
        ]
        return f"µs a step by exchange (equal, slots, buffer) + MLPs: {'; '.join(parts)}"

    @staticmethod
    def _sums_buffer(mode: PaddingMode, num_ranks: int, share: int, total: int) -> bool:
        if mode in ("sum_slots", "sum_buffer"):
            return mode == "sum_buffer"
        return not slots_move_less(num_ranks, share, total)


def pad_by_cost(num_rows: Sequence[int], costs: PaddingCosts, *, row_multiple: int) -> Padded:
    """Every replica's rows in the mode that costs least; a tie goes to MAX_LEN.

    Nobody is padded if nobody has to be, and then it is MAX_LEN too.
    """
    aligned = align_rows(num_rows, row_multiple)
    if len(set(aligned)) == 1:
        return Padded("max_len", aligned)
    every = [
        pad_rows(aligned, has_prompts=False, row_multiple=row_multiple, mode=mode) for mode in MODES
    ]
    return min(every, key=costs.of)


def _at(rows: Sequence[int], micros: Sequence[float], count: int) -> float:
    """On the line through the two sizes about it, or the nearest two; no rows cost nothing."""
    if count == 0:
        return 0.0
    if len(rows) == 1:
        return micros[0]
    place = min(max(1, bisect_left(rows, count)), len(rows) - 1)
    low, high = rows[place - 1], rows[place]
    slope = (micros[place] - micros[place - 1]) / (high - low)
    return max(0.0, micros[place - 1] + slope * (count - low))
