"""Which steps with prompts the driver has replayed: it knows all replicas' rows and chunks."""

import pytest

from deployments.domain import Domain
from tests.deployments.test_domain_padding import add, domain, headers
from tests.deployments.test_gang import gang, hello
from workers.architectures import plan_of
from workers.config import EngineConfig
from workers.protocol import Mode, Padding, Ready, Started

pytestmark = [pytest.mark.row("S10"), pytest.mark.row("S12")]

BUCKETS = (16, 32, 64)


def test_a_step_with_prompts_takes_the_bucket_that_holds_every_replica():
    one = domain(buckets=(1, 2, 4), prompt_buckets=BUCKETS)
    add(one, 0, 20)
    add(one, 2, 3)
    prompts, decodes = headers(one, 2)
    assert (prompts.mode, prompts.bucket, prompts.padding) == (Mode.EXTEND, 32, Padding.MAX_LEN)
    assert (prompts.num_rows, prompts.padded_rows) == ((20, 0, 3, 0), (32,) * 4)
    assert (decodes.mode, decodes.bucket, decodes.padded_rows) == (Mode.DECODE, 1, (1,) * 4)
    add(one, 1, 5)
    (mixed,) = headers(one, 1)
    assert (mixed.mode, mixed.bucket, mixed.num_rows) == (Mode.MIXED, 16, (1, 5, 1, 0))


def test_many_chunks_take_a_larger_bucket_and_too_many_none():
    one = domain(num_replicas=2, prompt_buckets=(16, 32, 64))
    for _ in range(4):
        add(one, 1, 2, max_tokens=1)
    assert [header.bucket for header in headers(one, 1)] == [16]
    one = domain(num_replicas=2, prompt_buckets=(16, 80))
    for _ in range(5):
        add(one, 1, 2, max_tokens=1)
    assert [header.bucket for header in headers(one, 1)] == [80]
    one = domain(num_replicas=2, prompt_buckets=BUCKETS)
    for _ in range(5):
        add(one, 1, 2, max_tokens=1)
    (told,) = headers(one, 1)
    assert (told.bucket, told.padded_rows, told.padding) == (0, (0, 10), Padding.SUM_LEN)


def test_more_rows_than_any_bucket_holds_are_padded_as_ever():
    one = domain(prompt_buckets=(16, 32))
    add(one, 0, 33)
    (told,) = headers(one, 1)
    assert (told.bucket, told.padded_rows) == (0, (33, 0, 0, 0))


def test_one_replica_is_padded_to_a_bucket_without_a_gather():
    one = domain(num_replicas=1, shares_rows=False, prompt_buckets=BUCKETS)
    add(one, 0, 17)
    (told,) = headers(one, 1)
    assert (told.bucket, told.padded_rows, told.padding) == (32, (32,), Padding.NONE)


def test_the_driver_takes_the_buckets_that_every_rank_captures(monkeypatch):
    config = EngineConfig(tp_size=2, page_size=4, prefill_graph_max_tokens=64)
    one, _ = gang(config)
    for rank in range(2):
        one.on_message(rank, hello(rank), 1.0)
    for rank, mine in enumerate(((16, 32, 64), (16, 64))):
        plan = plan_of(config).digest
        ready = Ready(1, rank, 40, 100, 300, (2,), (1, 2), None, plan, mine)
        one.on_message(rank, ready, 1.0)
    made = []
    init = Domain.__init__
    monkeypatch.setattr(
        Domain, "__init__", lambda *parts, **named: made.append(named) or init(*parts, **named)
    )
    for rank in range(2):
        one.on_message(rank, Started(1, rank, b""), 1.0)
    assert one.model.prompt_buckets == made[0]["prompt_buckets"] == (16, 64)
    assert made[0]["buckets"] == (1, 2)


def test_a_negative_limit_is_refused():
    with pytest.raises(ValueError, match="prefill_graph_max_tokens=-1 must not be negative"):
        EngineConfig(prefill_graph_max_tokens=-1)
