"""Which replica a request goes to, on traces: never worse than taking turns, and never unstable.

Replicas step together, as under attention data parallelism: a step takes as long as the longest of
them. Time is counted, not measured, so a trace gives the same figures on any machine.
"""

import random
from functools import cache
from typing import NamedTuple

import pytest

from deployments.pages import page_names
from deployments.requests import Request
from deployments.scheduler import Scheduler, route

pytestmark = pytest.mark.row("S10")

NUM_REPLICAS, PAGE, BUDGET = 4, 16, 256
STEP, ROW = 1.0, 0.02
"""What a step takes, and each row of the replica that has most."""


class Ask(NamedTuple):
    at: float
    prompt: tuple[int, ...]
    max_tokens: int


class Figures(NamedTuple):
    longest: int
    """Rows of the longest replica, added up over all steps."""
    first_p99: float
    """From arrival to the first token."""
    token_p99: float
    """From one token of a request to the next."""
    gap: float
    """The longest of these."""


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


def replay(asks: list[Ask], choose) -> Figures:
    """The figures of a trace; `choose(schedulers, number, ask)` is the replica."""
    schedulers = [
        Scheduler(num_pages=2048, page_size=PAGE, max_num_seqs=64, max_num_batched_tokens=BUDGET)
        for _ in range(NUM_REPLICAS)
    ]
    now, step, next_ask = 0.0, 0, 0
    longest = 0
    told: dict[tuple[bytes, int], float] = {}
    firsts: list[float] = []
    gaps: list[float] = []
    while next_ask < len(asks) or any(one.has_work for one in schedulers):
        if not any(one.has_work for one in schedulers):
            now = max(now, asks[next_ask].at)
        while next_ask < len(asks) and asks[next_ask].at <= now:
            ask = asks[next_ask]
            request = Request(
                key=(b"", next_ask), tokens=list(ask.prompt), num_prompt=len(ask.prompt),
                max_tokens=ask.max_tokens, arrival=next_ask,
            )  # fmt: skip
            schedulers[choose(schedulers, next_ask, ask)].add(request)
            next_ask += 1
        plans = [one.plan_step(step) for one in schedulers]
        rows = [plan.num_rows for plan in plans]
        now += STEP + ROW * max(rows)
        longest += max(rows)
        for scheduler, plan in zip(schedulers, plans, strict=True):
            sampled = [request.key for request in plan.sampled]
            scheduler.apply(step, [7] * len(sampled), ())
            for key in sampled:
                if key in told:
                    gaps.append(now - told[key])
                else:
                    firsts.append(now - asks[key[1]].at)
                told[key] = now
        step += 1
    assert len(firsts) == len(asks)
    return Figures(longest, at_99(firsts), at_99(gaps), max(gaps))


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
