"""Ranks that wait for each other in collectives for ever: seen from their heartbeats, long before a
step's time is over.

A beat says which of the step's collectives its rank waits in. If all that have not finished a step
stand still, and one of them waits for a member that has gone past it, nothing will ever move. Who
left a collective out is who is not where the collective plan says; what is merely slow is none of
this. Pure: no clock, no socket.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from parallel.layout import GROUP_NAMES, Layout
from parallel.plan import Plan
from workers.protocol import Beat

STILL_S = 1.0
"""Standing still so long, by its beats, a rank is taken to wait."""


class Wait(NamedTuple):
    """The collective that a rank waits in: which of the step's, and what it is."""

    step: int
    number: int
    op: str
    group: str


class Waits:
    def __init__(self, layout: Layout, plan: Plan) -> None:
        self._planned = [(one.op, one.group) for one in plan.collectives]
        self._members = {
            (str(name), rank): layout.members(name, rank)
            for name in GROUP_NAMES
            for rank in range(layout.world_size)
        }
        self._waits: dict[int, tuple[Wait, float]] = {}

    def note(self, beat: Beat, now: float) -> None:
        wait = Wait(beat.step, beat.collective, beat.op, beat.group)
        known = self._waits.get(beat.rank)
        if not beat.collective:
            self._waits.pop(beat.rank, None)
        elif known is None or known[0] != wait:
            self._waits[beat.rank] = (wait, now)

    def deadlock(
        self, late: Sequence[int], ranks: Sequence[int], now: float
    ) -> tuple[int, str] | None:
        """(who is at fault, what is wrong) if none of the `late` ranks will ever come."""
        since = [self._waits.get(rank, (None, now))[1] for rank in late]
        if not late or now - max(since) <= STILL_S:
            return None
        waits = {rank: self._waits[rank][0] for rank in late}
        done = [rank for rank in ranks if rank not in waits]
        if done:
            return done[0], f"ranks {done} left out a collective that ranks {list(late)} wait in"
        if not any(self._is_hopeless(rank, waits) for rank in late):
            return None
        odd = self._off_plan(waits)
        where = "; ".join(
            f"rank {rank} in {wait.op} over {wait.group}, its no. {wait.number}"
            for rank, wait in waits.items()
        )
        return odd[0], f"ranks {odd} left out a collective, and all wait: {where}"

    def _is_hopeless(self, rank: int, waits: Mapping[int, Wait]) -> bool:
        """Whether a member that `rank` waits for is in another collective, as far on or further."""
        mine = waits[rank]
        members = self._members.get((mine.group, rank), ())
        theirs = [waits[member] for member in members if member in waits]
        return any(
            (each.step, each.number) >= (mine.step, mine.number)
            and (each.op, each.group) != (mine.op, mine.group)
            for each in theirs
        )

    def _off_plan(self, waits: Mapping[int, Wait]) -> list[int]:
        """Ranks that are not where the plan says; if it says that of all or none, the last."""
        odd = [
            rank
            for rank, wait in waits.items()
            if self._planned[wait.number - 1 : wait.number] != [(wait.op, wait.group)]
        ]
        return odd if 0 < len(odd) < len(waits) else [max(waits)]
