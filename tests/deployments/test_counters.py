"""What a step adds to the engine's counts."""

from types import SimpleNamespace

import msgspec
import pytest

from deployments.counters import Counters
from deployments.domain import StepDone
from deployments.gang import Cause
from parallel.layout import Layout
from tests.headers import header_of
from workers.protocol import Ack, Mode, Padding

PATHS = ("attn_tp", "all_reduce", "symmetric", ""), ("tp", "all_gather", "fallback", "sizes")


def header(num_rows, padded_rows, epoch=1):
    return header_of(
        num_rows, padded_rows=padded_rows, epoch=epoch, mode=Mode.DECODE, padding=Padding.MAX_LEN
    )


def ack(rank, seconds=0.01, collectives=(), epoch=1, expert_rows=()):
    one = Ack(epoch, rank, 0, b"", b"", b"", seconds)
    return msgspec.structs.replace(one, collectives=collectives, expert_rows=expert_rows)


def done(acks, *, num_rows=(3, 0), padded_rows=(4, 4), chunks=(), epoch=1):
    return StepDone(
        number=0,
        plans=[SimpleNamespace(chunks=list(chunks)), SimpleNamespace(chunks=[])],
        accepted=[[], []],
        acks={one.rank: one for one in acks},
        domain=0,
        header=header(num_rows, padded_rows, epoch),
        num_bytes=70,
        sent_at=5.0,
    )


@pytest.fixture
def counters():
    return Counters.of(Layout(tp_size=2, dp_size=1))


def test_rows_padding_and_idle_replicas(counters):
    for _ in range(3):
        counters.step_done(done([ack(0), ack(1)]))
    assert (counters.num_rows, counters.num_padding_rows, counters.num_idle_replicas) == (9, 15, 3)
    assert (counters.num_steps, counters.num_plan_bytes) == (3, 210)


def test_skew_is_between_the_slowest_and_the_fastest_rank(counters):
    counters.step_done(done([ack(0, 0.010), ack(1, 0.034)]))
    assert counters.skews[0].total == pytest.approx(0.024)
    assert [counters.steps[rank].total for rank in (0, 1)] == [0.010, 0.034]


def test_a_request_has_waited_until_its_first_plan_once(counters):
    request = SimpleNamespace(queued_at=3.5)
    chunk = SimpleNamespace(num_tokens=8, request=request)
    for _ in range(2):
        counters.step_done(done([ack(0), ack(1)], chunks=[chunk]))
    assert (sum(counters.queue.counts), counters.queue.total) == (1, 1.5)
    assert counters.num_prompt_tokens == 16


def test_collectives_are_summed_over_ranks_and_go_on_after_a_restart(counters):
    first, second = PATHS
    counters.step_done(done([ack(0, collectives=((*first, 5),)), ack(1)]))
    both = ((*first, 8), (*second, 1))
    counters.step_done(done([ack(0, collectives=both), ack(1, collectives=((*first, 7),))]))
    assert counters.collectives == {first: 15, second: 1}
    again = ack(0, collectives=((*first, 2),), epoch=2)
    counters.step_done(done([again, ack(1, epoch=2)], epoch=2))
    assert counters.collectives == {first: 17, second: 1}


def test_rows_of_experts_are_summed_over_ranks_and_their_imbalance_is_of_late():
    counters = Counters.of(Layout(tp_size=2, ep_size=2))
    counters.step_done(done([ack(0, expert_rows=(6, 2)), ack(1, expert_rows=(0, 4))]))
    assert (counters.expert_rows, counters.expert_imbalance) == ({0: 6, 1: 6}, 1.0)
    counters.step_done(done([ack(0), ack(1)]))
    counters.step_done(done([ack(0, expert_rows=(9, 2)), ack(1, expert_rows=(0, 5))]))
    assert (counters.expert_rows, counters.expert_imbalance) == ({0: 9, 1: 7}, 1.5)
    counters.step_done(done([ack(0, expert_rows=(1, 1), epoch=2), ack(1, epoch=2)], epoch=2))
    assert counters.expert_rows == {0: 10, 1: 8}


def test_every_cause_has_its_series_from_the_start(counters):
    assert counters.losses == dict.fromkeys(Cause, 0)
    counters.recovered(Cause.DIED, 2.0)
    counters.recovered(Cause.HUNG, 60.0)
    assert (counters.num_recoveries, counters.last_recovery_s) == (2, 60.0)
