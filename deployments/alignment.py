"""When prompts begin in a lockstep domain: at once, or together with those of other replicas.

A step takes as long as its longest replica, so a prompt on one replica holds up the decodes of all;
prompts of several replicas, read in one step, hold them up once. Where requests queue for slots or
pages, a prompt begins whenever a request ends somewhere, and that is in nearly every step. So a
prompt for which there is room may be held for a few steps, until those that queue on other replicas
have room too. (SGLang's prefill delayer waits for prompts that may never come, and was reported to
fall into either of two regimes, issue 35241. Here only prompts that are known to wait are awaited:
while nobody queues, nothing is held.)

A hold begins if fewer than three quarters of the replicas with a queue have room for its first
prompt, nobody reads a prompt, and there is a decode for each replica to go on with. It ends when
all of them have room, or one of the others is no longer so, or after `most` steps.

    >>> align(Prompts.GO, [1, 0], [3, 2], [9, 9], num_reading=0, num_held=0, most=8)
    <Prompts.HELD: 'held'>
    >>> align(Prompts.HELD, [2, 1], [3, 2], [9, 9], num_reading=0, num_held=3, most=8)
    <Prompts.GO: 'go'>
    >>> align(Prompts.GO, [1, 0], [1, 0], [9, 9], num_reading=0, num_held=0, most=8)
    <Prompts.GO: 'go'>
"""

from collections.abc import Sequence
from enum import StrEnum

BEGIN = 0.75
"""Share of the queueing replicas with room below which a hold begins; one goes on until all have.
(Chosen on the traces of `tests/deployments/test_routing.py`.)"""


class Prompts(StrEnum):
    """What a step does with prompts for which there is room."""

    HELD = "held"
    GO = "go"


def align(
    last: Prompts,
    num_ready: Sequence[int],
    num_waiting: Sequence[int],
    num_decodes: Sequence[int],
    *,
    num_reading: int,
    num_held: int,
    most: int,
) -> Prompts:
    """Whether prompts begin in this step; each list has a number for each replica.

    `last` is what the step before did, and `num_held` how many steps in a row, up to now, held
    prompts. `num_ready` counts requests that could begin now, `num_waiting` all that wait,
    `num_decodes` those that get a token in this step anyhow; `num_reading` are prompts that have
    begun and are not read to their end. At most `most` steps in a row are held; 0 holds none.
    """
    num_open = sum(count > 0 for count in num_ready)
    num_queues = sum(count > 0 for count in num_waiting)
    if num_open == 0 or num_held >= most or num_reading or sum(num_decodes) < len(num_decodes):
        return Prompts.GO
    enough = num_queues if last is Prompts.HELD else BEGIN * num_queues
    return Prompts.GO if num_open >= enough else Prompts.HELD
