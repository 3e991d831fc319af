"""Steps of decodes alone between steps that read prompts (`prefill_decode_interval`)."""

from statistics import median

import pytest

from deployments.domain import Domain
from deployments.requests import Request
from deployments.scheduler import Scheduler
from parallel.layout import Layout

BUDGET = 16


def domain_of(num_replicas: int = 1, interval: int = 0, budget: int = BUDGET) -> Domain:
    schedulers = [
        Scheduler(num_pages=8192, page_size=16, max_num_seqs=8, max_num_batched_tokens=budget)
        for _ in range(num_replicas)
    ]
    layout = Layout(
        tp_size=num_replicas, dp_size=num_replicas, enable_dp_attention=num_replicas > 1
    )
    return Domain(layout, 0, schedulers, epoch=1, depth=1, prompt_interval=interval)


def ask(domain: Domain, number: int, num_prompt: int, max_tokens: int, replica: int = 0) -> None:
    domain.schedulers[replica].add(
        Request(
            key=(b"a", number),
            tokens=[number % 50] * num_prompt,
            num_prompt=num_prompt,
            max_tokens=max_tokens,
            arrival=number,
        )
    )


def one_step(domain: Domain) -> tuple[list[tuple[int, int]], list[tuple[bytes, int]]]:
    """((decodes, prompt rows) of each replica, who got a token)."""
    step = domain.next_step()
    domain.under_way.clear()
    for scheduler, plan in zip(domain.schedulers, step.plans, strict=True):
        scheduler.apply(step.number, [9] * len(plan.sampled))
    rows = [(len(plan.decodes), plan.num_rows - len(plan.decodes)) for plan in step.plans]
    return rows, [request.key for plan in step.plans for request in plan.sampled]


def steps(domain: Domain, num: int) -> list[list[tuple[int, int]]]:
    return [one_step(domain)[0] for _ in range(num)]


def begun(domain: Domain, replica: int = 0) -> None:
    """Somebody decodes."""
    ask(domain, 0, 1, 100, replica)
    one_step(domain)


def test_a_step_full_of_prompts_is_followed_by_so_many_of_decodes_alone():
    domain = domain_of(interval=4)
    begun(domain)
    ask(domain, 1, 40, 3)
    full, alone = [(1, 15)], [(1, 0)]
    assert steps(domain, 10) == [full, *[alone] * 4, full, *[alone] * 4]
    assert steps(domain, 4) == [[(1, 10)], [(2, 0)], [(2, 0)], [(1, 0)]]
    ask(domain, 2, 5, 3)  # after ten of fifteen rows, two steps and not four
    assert steps(domain, 1) == [[(1, 5)]]


def test_prompts_are_read_on_and_on_where_nothing_decodes():
    domain = domain_of(interval=4)
    ask(domain, 1, 40, 3)
    assert steps(domain, 3) == [[(0, 16)], [(0, 16)], [(0, 8)]]


def test_a_short_prompt_holds_nothing_up():
    domain = domain_of(interval=4)
    begun(domain)
    for number in range(1, 4):
        ask(domain, number, 3, 5)
        assert steps(domain, 1) == [[(number, 3)]]


def test_what_is_owed_is_forgotten_when_decodes_end():
    domain = domain_of(interval=8)
    ask(domain, 0, 1, 3)
    one_step(domain)
    ask(domain, 1, 40, 3)
    assert steps(domain, 3) == [[(1, 15)], [(1, 0)], [(0, 16)]]


def test_prompts_of_one_replica_give_way_to_decodes_of_another():
    domain = domain_of(2, interval=2)
    begun(domain, replica=1)
    ask(domain, 1, 40, 3, replica=0)
    read, alone = [(0, 16), (1, 0)], [(0, 0), (1, 0)]
    assert steps(domain, 5) == [read, alone, alone, read, alone]


MS_STEP, ROWS_A_MS, ATTENTION = 4.0, 42.0, 1.6e-6
"""Of 8b on one H200: a step of decodes alone, rows of prompts, and times their context (LOG.md)."""


def replay(interval: int) -> tuple[float, float, float]:
    """(median and longest time between a stream's tokens, time to read all prompts), in ms.

    Four streams decode while six prompts of 30,000 tokens are read one after another.
    """
    domain = domain_of(interval=interval, budget=8192)
    for number in range(4):
        ask(domain, number, 1, 4000)
    one_step(domain)
    for number in range(4, 10):
        ask(domain, number, 30_000, 1)
    now, waited, last = 0.0, set(range(4, 10)), dict.fromkeys(range(4), 0.0)
    gaps: list[float] = []
    while waited:
        [(_, prompt_rows)], keys = one_step(domain)
        context = 15_000 if prompt_rows else 0
        now += max(MS_STEP, prompt_rows / ROWS_A_MS + ATTENTION * prompt_rows * context)
        for _, number in keys:
            if number in last:
                gaps.append(now - last[number])
                last[number] = now
            waited.discard(number)
    return median(gaps), max(gaps), now


@pytest.mark.parametrize(("interval", "quicker", "dearer"), [(4, 20, 1.06), (8, 20, 1.1)])
def test_streams_go_on_beside_long_prompts_for_little_of_their_time(interval, quicker, dearer):
    without, longest_without, all_without = replay(0)
    between, longest, all_prompts = replay(interval)
    assert without > quicker * between
    assert longest <= longest_without
    assert all_prompts < dearer * all_without
