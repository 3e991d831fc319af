"""Which replica a request goes to, and when its prompt begins, on traces: never unstable.

A request's replica is never worse than taking turns. Prompts that wait for those of other replicas
end sooner where requests queue, and nothing changes where none do.

Replicas step together, as under attention data parallelism: a step takes as long as the longest of
them. Time is counted, not measured, so a trace gives the same figures on any machine.
"""

import random
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.alignment import Prompts, align
from deployments.domain import Domain
from deployments.pages import page_names
from deployments.requests import Request
from deployments.scheduler import Scheduler, route
from parallel.layout import Layout

pytestmark = pytest.mark.row("S10")

NUM_REPLICAS, PAGE, BUDGET = 4, 16, 256
LAYOUT = Layout(tp_size=NUM_REPLICAS, dp_size=NUM_REPLICAS, enable_dp_attention=True)
STEP, ROW = 1.0, 0.02
"""What a step takes, and each row of the replica that has most."""


class Ask(NamedTuple):
    at: float
    prompt: tuple[int, ...]
    max_tokens: int


class Figures(NamedTuple):
    longest: int
    """Rows of the longest replica, added up over all steps."""
    imbalance: float
    """That, by what it would be if rows were spread evenly in every step."""
    first_p99: float
    """From arrival to the first token."""
    token_p99: float
    """From one token of a request to the next."""
    token_mean: float
    gap: float
    """The longest of these."""
    end: float
    """When the last token came."""
    held: int
    """The most steps in a row in which prompts were held."""


def words(draw: random.Random, length: int) -> tuple[int, ...]:
    return tuple(draw.randrange(10, 1000) for _ in range(length))


def mixed(draw: random.Random, number: int) -> tuple[tuple[int, ...], int]:
    return words(draw, draw.randint(8, 200)), draw.randint(4, 60)


def heavy_tail(draw: random.Random, number: int) -> tuple[tuple[int, ...], int]:
    long = draw.random() < 0.1
    return words(draw, 1200 if long else draw.randint(8, 60)), draw.randint(4, 40)


def in_turns(draw: random.Random, number: int) -> tuple[tuple[int, ...], int]:
    """Every fourth is long: who takes turns gives them all to one replica."""
    return words(draw, 800 if number % NUM_REPLICAS == 0 else 24), draw.randint(8, 24)


def families(draw: random.Random, number: int) -> tuple[tuple[int, ...], int]:
    """Six long beginnings, each of many prompts."""
    begin = words(random.Random(draw.randrange(6)), 480)
    return begin + words(draw, draw.randint(8, 40)), draw.randint(4, 30)


KINDS = {"mixed": mixed, "heavy tail": heavy_tail, "in turns": in_turns, "families": families}


def trace(kind: str, seed: int, count: int = 160, every: float = 2.5) -> list[Ask]:
    draw, now, asks = random.Random(seed), 0.0, []
    for number in range(count):
        now += draw.expovariate(1 / every)
        asks.append(Ask(now, *KINDS[kind](draw, number)))
    return asks


def replay(asks: Sequence[Ask], choose, *, num_seqs: int = 64, most_held: int = 0) -> Figures:
    """The figures of a trace; `choose(schedulers, number, ask)` is the replica."""
    schedulers = [
        Scheduler(
            num_pages=2048, page_size=PAGE, max_num_seqs=num_seqs, max_num_batched_tokens=BUDGET
        )
        for _ in range(NUM_REPLICAS)
    ]
    domain = Domain(LAYOUT, 0, schedulers, epoch=1, depth=1, shares_rows=True, most_held=most_held)
    now, next_ask, held = 0.0, 0, 0
    longest = total = 0
    told: dict[tuple[bytes, int], float] = {}
    firsts: list[float] = []
    gaps: list[float] = []
    while next_ask < len(asks) or domain.can_step:
        if not domain.can_step:
            now = max(now, asks[next_ask].at)
        while next_ask < len(asks) and asks[next_ask].at <= now:
            ask = asks[next_ask]
            request = Request(
                key=(b"", next_ask), tokens=list(ask.prompt), num_prompt=len(ask.prompt),
                max_tokens=ask.max_tokens, arrival=next_ask,
            )  # fmt: skip
            schedulers[choose(schedulers, next_ask, ask)].add(request)
            next_ask += 1
        step = domain.next_step()
        domain.under_way.clear()
        held = max(held, domain.num_held)
        rows = step.told.num_rows
        now += STEP + ROW * max(rows)
        longest += max(rows)
        total += sum(rows)
        for scheduler, plan in zip(schedulers, step.plans, strict=True):
            sampled = [request.key for request in plan.sampled]
            scheduler.apply(step.number, [7] * len(sampled), ())
            for key in sampled:
                if key in told:
                    gaps.append(now - told[key])
                else:
                    firsts.append(now - asks[key[1]].at)
                told[key] = now
    assert len(firsts) == len(asks)
    imbalance = NUM_REPLICAS * longest / total
    mean = sum(gaps) / len(gaps)
    return Figures(longest, imbalance, at_99(firsts), at_99(gaps), mean, max(gaps), now, held)


def at_99(values: list[float]) -> float:
    return sorted(values)[int(0.99 * (len(values) - 1))]


def ours(schedulers, number, ask) -> int:
    return route(
        schedulers, len(ask.prompt), lambda: page_names(ask.prompt, page_size=PAGE, salt="")
    )


def taking_turns(schedulers, number, ask) -> int:
    return number % NUM_REPLICAS


def fewest_tokens(schedulers, number, ask) -> int:
    return min(range(NUM_REPLICAS), key=lambda place: schedulers[place].remaining_tokens)


@cache
def figures(kind: str, seed: int, choose) -> Figures:
    return replay(trace(kind, seed), choose)


@pytest.mark.parametrize("other", [taking_turns, fewest_tokens])
@pytest.mark.parametrize("kind", KINDS)
def test_no_trace_is_answered_later_than_by_taking_turns_or_by_tokens_alone(kind, other):
    for seed in range(5):
        mine, theirs = figures(kind, seed, ours), figures(kind, seed, other)
        assert mine.longest <= 1.02 * theirs.longest, seed
        assert mine.first_p99 <= 1.02 * theirs.first_p99, seed
        assert mine.token_p99 <= 1.05 * theirs.token_p99, seed


def test_a_beginning_that_is_cached_is_worth_going_to():
    """Far fewer rows are computed than if only tokens were counted."""
    mine, theirs = (
        sum(figures("families", seed, choose).longest for seed in range(5))
        for choose in (ours, fewest_tokens)
    )
    assert mine < 0.95 * theirs


def test_one_replica_is_not_given_everything_for_what_it_has_cached():
    """Over twenty traces where prompts share beginnings, none falls into another regime."""
    firsts = [figures("families", seed, ours).first_p99 for seed in range(20)]
    assert max(firsts) < 2.0 * min(firsts)


def test_who_decodes_gets_a_token_in_every_step_beside_endless_prompts():
    draw = random.Random(3)
    asks = [Ask(0.0, words(draw, 20), 200) for _ in range(NUM_REPLICAS)]
    asks += [Ask(1.0 + number, words(draw, 1500), 2) for number in range(60)]
    assert replay(asks, ours).gap <= STEP + ROW * BUDGET + 1e-9


# Prompts that wait for each other

MOST = 8


def queue(seed: int, count: int = 100) -> list[Ask]:
    """A batch: all there is comes at once."""
    draw = random.Random(seed)
    return [
        Ask(0.0, words(draw, draw.randint(50, 250)), draw.randint(20, 80)) for _ in range(count)
    ]


def crowded(kind: str, seed: int) -> list[Ask]:
    """More than there are slots for, so that requests queue."""
    return queue(seed) if kind == "queue" else trace(kind, seed, every=0.6)


@cache
def crowd(kind: str, seed: int, most_held: int, choose=ours) -> Figures:
    return replay(crowded(kind, seed), choose, num_seqs=8, most_held=most_held)


def ratio(kind: str, name: str, num_seeds: int, choose=ours) -> float:
    """Of a figure with prompts that wait to that without, and with another way to choose."""
    mine = sum(getattr(crowd(kind, seed, MOST), name) for seed in range(num_seeds))
    return mine / sum(getattr(crowd(kind, seed, 0, choose), name) for seed in range(num_seeds))


@pytest.mark.parametrize("kind", KINDS)
def test_where_nobody_queues_no_prompt_waits_for_others(kind):
    """To the last step as without: it cannot be worse there, and it does not help either."""
    for seed in range(2):
        held = replay(trace(kind, seed), ours, most_held=MOST)
        assert held == figures(kind, seed, ours)
        assert held.held == 0


@pytest.mark.parametrize("kind", ["queue", *KINDS])
def test_where_requests_queue_prompts_that_wait_for_each_other_end_sooner(kind):
    """Over 6 seeds: a single trace goes another way after the first step that differs."""
    assert ratio(kind, "end", 6) < 0.97
    assert ratio(kind, "first_p99", 6) < 0.97
    assert ratio(kind, "token_p99", 6) < 1.01
    assert ratio(kind, "token_mean", 6) < 0.93
    assert ratio(kind, "longest", 6) < 0.93


@pytest.mark.parametrize("other", [taking_turns, fewest_tokens])
@pytest.mark.parametrize("kind", KINDS)
def test_they_are_never_worse_than_other_ways_to_choose_without_waiting(kind, other):
    for name in ("end", "first_p99", "token_p99", "token_mean", "longest"):
        assert ratio(kind, name, 6, other) < 1.01, name


@pytest.mark.parametrize("kind", ["queue", "mixed"])
def test_twenty_repeats_fall_into_one_regime(kind):
    """What waiting saves is about the same in each: none loses, and none is far from the others."""
    saved = [crowd(kind, seed, MOST).end / crowd(kind, seed, 0).end for seed in range(20)]
    assert sum(saved) / len(saved) < 0.92
    assert max(saved) < 0.98
    assert max(saved) - min(saved) < 0.15


def test_no_prompt_waits_for_longer_than_was_set():
    for most in (1, 3, MOST):
        held = [crowd(kind, 0, most).held for kind in ("queue", "mixed", "heavy tail")]
        assert max(held) == most


def test_who_decodes_gets_a_token_in_every_step_though_prompts_wait():
    draw = random.Random(3)
    asks = [Ask(0.0, words(draw, 20), 200) for _ in range(3 * NUM_REPLICAS)]
    asks += [Ask(1.0 + number, words(draw, 1500), 2) for number in range(60)]
    found = replay(asks, ours, num_seqs=4, most_held=MOST)
    assert found.gap <= STEP + ROW * BUDGET + 1e-9


COUNTS = st.integers(0, 3)
REPLICAS = st.lists(st.tuples(COUNTS, COUNTS, COUNTS), min_size=1, max_size=8)
"""(with room, more that wait, decodes) of each."""


@given(
    replicas=REPLICAS,
    last=st.sampled_from(Prompts),
    num_reading=st.sampled_from((0, 0, 2)),
    num_held=st.integers(0, 5),
    most=st.integers(0, 5),
)
def test_prompts_are_held_only_for_some_that_queue_and_while_others_decode(
    replicas, last, num_reading, num_held, most
):
    ready, more, decodes = map(list, zip(*replicas, strict=True))
    waiting = [a + b for a, b in zip(ready, more, strict=True)]
    held = align(
        last, ready, waiting, decodes, num_reading=num_reading, num_held=num_held, most=most
    )
    if held is Prompts.HELD:
        assert num_held < most
        assert num_reading == 0
        assert sum(decodes) >= len(replicas)
        assert any(ready)
        assert any(w and not r for w, r in zip(waiting, ready, strict=True))
        # A hold that goes on is given up no sooner than one would begin.
        again = align(
            Prompts.HELD, ready, waiting, decodes,
            num_reading=num_reading, num_held=num_held, most=most,
        )  # fmt: skip
        assert again is Prompts.HELD


def test_a_hold_goes_on_where_none_would_begin():
    """Three of four have room: not worth beginning, worth waiting for the last."""
    state = {"num_reading": 0, "num_held": 1, "most": MOST}
    ready, waiting, decodes = [1, 1, 2, 0], [1, 1, 2, 5], [3, 3, 3, 3]
    assert align(Prompts.GO, ready, waiting, decodes, **state) is Prompts.GO
    assert align(Prompts.HELD, ready, waiting, decodes, **state) is Prompts.HELD
    assert align(Prompts.GO, [1, 0, 0, 0], waiting, decodes, **state) is Prompts.HELD
