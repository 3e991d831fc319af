"""Ranks that wait for each other for ever are seen by their beats; slow ones are let be."""

import pytest

from deployments.deadlock import STILL_S, Waits
from parallel.layout import Layout
from parallel.plan import ModelLayers, PlanSettings, compile_plan
from workers.protocol import Beat

FOUR = Layout(tp_size=4, dp_size=2, enable_dp_attention=True)
PLAN = compile_plan(FOUR, PlanSettings(), ModelLayers("LlamaForCausalLM", (False, False)))
SUM = ("all_reduce", "attn_tp")
GATHER = ("all_gather", "tp")
LATER = 1.0 + STILL_S + 0.1


def waits_of(places, at=1.0):
    """Beats of step 5 that say where each rank waits: {rank: (number, op, group)}."""
    waits = Waits(FOUR, PLAN)
    for rank, place in places.items():
        waits.note(Beat(1, rank, 5, *place), at)
    return waits


def planned(number):
    one = PLAN.collectives[number - 1]
    return number, one.op, one.group


def number_of(op, group):
    """Where the plan first has it, counted from one."""
    return next(n for n in range(1, 99) if planned(n)[1:] == (op, group))


def test_ranks_that_are_done_left_out_what_the_others_wait_in():
    waits = waits_of({0: planned(3), 1: planned(3)})
    assert waits.deadlock([0, 1], range(4), LATER) == (
        2,
        "ranks [2, 3] left out a collective that ranks [0, 1] wait in",
    )


def test_who_is_not_where_the_plan_says_left_one_out():
    number = number_of(*GATHER)
    inside = number - 1
    places = {0: planned(number), 1: planned(number), 2: planned(inside), 3: (inside, *GATHER)}
    rank, sentence = waits_of(places).deadlock(range(4), range(4), LATER)
    assert rank == 3
    assert sentence.startswith("ranks [3] left out a collective, and all wait: rank 0 in ")
    assert f"rank 3 in all_gather over tp, its no. {inside}" in sentence


@pytest.mark.parametrize(
    "places",
    [
        {rank: planned(3) for rank in range(4)},
        {0: planned(1), 1: planned(1), 2: planned(3), 3: planned(3)},
        {0: planned(1), 1: planned(1)},
    ],
    ids=["one large collective", "one replica is ahead", "two compute"],
)
def test_slow_ranks_are_let_be(places):
    assert waits_of(places).deadlock(range(4), range(4), LATER) is None


def test_ranks_that_move_are_let_be():
    waits = waits_of({0: planned(3), 1: planned(3)})
    waits.note(Beat(1, 1, 5, *planned(4)), LATER - 0.5)
    assert waits.deadlock([0, 1], range(4), LATER) is None
    waits.note(Beat(1, 1, 5), LATER)
    assert waits.deadlock([0, 1], range(4), LATER + 9) is None
    assert waits.deadlock([], range(4), LATER + 9) is None
