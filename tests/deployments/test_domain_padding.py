"""What a step's header says of the replicas' rows: the driver pads, and nobody asks."""

import pytest

from deployments.domain import Domain
from deployments.requests import Request
from deployments.scheduler import Scheduler
from parallel.layout import Layout
from parallel.padding import buckets_up_to
from parallel.padding_cost import PaddingCosts, PaddingCurves
from workers.architectures import plan_of
from workers.config import EngineConfig
from workers.protocol import Mode, Padding, decode_header

pytestmark = pytest.mark.row("S10")


def domain(num_replicas=4, row_multiple=1, shares_rows=True, buckets=(), **padding):
    schedulers = [
        Scheduler(num_pages=64, page_size=4, max_num_seqs=8, max_num_batched_tokens=64)
        for _ in range(num_replicas)
    ]
    layout = Layout(tp_size=8, dp_size=num_replicas, enable_dp_attention=True)
    return Domain(
        layout,
        0,
        schedulers,
        epoch=1,
        depth=99,
        row_multiple=row_multiple,
        shares_rows=shares_rows,
        buckets=buckets,
        **padding,
    )


def add(one, replica, length, max_tokens=8):
    number = sum(len(s.waiting) for s in one.schedulers)
    request = Request(
        key=(b"a", number),
        tokens=[5] * length,
        num_prompt=length,
        max_tokens=max_tokens,
        arrival=number,
    )
    one.schedulers[replica].add(request)


def headers(one, count):
    return [decode_header(one.next_step().header) for _ in range(count)]


def test_prompts_stay_uneven_and_decodes_are_padded_to_the_longest():
    one = domain()
    for replica, length in ((0, 3), (1, 5), (1, 2), (2, 1)):
        add(one, replica, length)
    prompts, decodes = headers(one, 2)
    assert (prompts.mode, prompts.padding) == (Mode.EXTEND, Padding.SUM_LEN)
    assert prompts.num_rows == prompts.padded_rows == (3, 7, 1, 0)
    assert (decodes.mode, decodes.padding) == (Mode.DECODE, Padding.MAX_LEN)
    assert (decodes.num_rows, decodes.padded_rows) == ((1, 2, 1, 0), (2, 2, 2, 2))


def test_few_decodes_among_many_replicas_are_not_padded():
    one = domain()
    for _ in range(3):
        add(one, 2, 1)
    _, decodes = headers(one, 2)
    assert (decodes.padding, decodes.padded_rows) == (Padding.SUM_LEN, (0, 0, 3, 0))


def test_rows_are_rounded_up_only_where_the_plan_wants_it():
    one = domain(num_replicas=2, row_multiple=4)
    add(one, 0, 5)
    add(one, 1, 2)
    prompts, decodes = headers(one, 2)
    assert prompts.padded_rows == (8, 4)
    assert decodes.padded_rows == (4, 4)


def test_replicas_that_share_nothing_are_never_padded_to_each_other():
    one = domain(shares_rows=False)
    add(one, 0, 5)
    add(one, 3, 1)
    for header in headers(one, 2):
        assert header.padding == Padding.NONE
        assert header.padded_rows == header.num_rows


@pytest.mark.row("S12")
def test_the_bucket_is_chosen_first_and_pads_idle_replicas_too():
    one = domain(buckets=(1, 2, 4))
    for replica, count in ((0, 3), (2, 1)):
        for _ in range(count):
            add(one, replica, 2)
    prompts, decodes = headers(one, 2)
    assert (prompts.bucket, prompts.padded_rows) == (0, (6, 0, 2, 0))
    assert (decodes.mode, decodes.padding, decodes.bucket) == (Mode.DECODE, Padding.MAX_LEN, 4)
    assert (decodes.num_rows, decodes.padded_rows) == ((3, 0, 1, 0), (4, 4, 4, 4))
    add(one, 3, 5)
    (mixed,) = headers(one, 1)
    assert (mixed.mode, mixed.bucket, mixed.padding) == (Mode.MIXED, 0, Padding.SUM_LEN)


def test_more_decodes_than_any_graph_holds_run_eagerly():
    one = domain(num_replicas=2, buckets=(1, 2))
    for _ in range(3):
        add(one, 0, 2)
    _, decodes = headers(one, 2)
    assert (decodes.bucket, decodes.padded_rows) == (0, (3, 3))


def test_one_replica_is_padded_to_a_bucket_without_a_gather():
    one = domain(num_replicas=1, shares_rows=False, buckets=(1, 4))
    add(one, 0, 2)
    add(one, 0, 2)
    _, decodes = headers(one, 2)
    assert (decodes.bucket, decodes.padding, decodes.padded_rows) == (4, Padding.NONE, (4,))


@pytest.mark.row("S8")
@pytest.mark.parametrize(
    ("settings", "rows"),
    [
        ({"tp_size": 1}, 1),
        ({"tp_size": 8}, 1),
        ({"tp_size": 8, "dp_size": 8, "enable_dp_attention": True}, 1),
        ({"tp_size": 2, "dp_size": 4}, 1),
        # A reduce-scatter gives each of a replica's ranks, or parts, a share of its rows.
        ({"tp_size": 8, "dp_size": 2, "enable_dp_attention": True}, 4),
        ({"tp_size": 8, "moe_dense_tp_size": 1}, 8),
        ({"tp_size": 2, "attn_cp_size": 2}, 2),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else str(value),
)
def test_a_lone_decode_runs_in_the_bucket_of_one_row_where_nothing_is_scattered(settings, rows):
    config = EngineConfig(**settings)
    plan, layout = plan_of(config), config.layout
    schedulers = [
        Scheduler(num_pages=64, page_size=4, max_num_seqs=8, max_num_batched_tokens=64)
        for _ in range(layout.num_replicas)
    ]
    one = Domain(
        layout, 0, schedulers, epoch=1, depth=99, row_multiple=plan.row_multiple,
        shares_rows=plan.crosses_replicas, buckets=buckets_up_to(8, plan.row_multiple),
    )  # fmt: skip
    add(one, 0, 3)
    _, decode = headers(one, 2)
    assert decode.bucket == rows
    assert set(decode.padded_rows) == {rows}


def always(way):
    """Costs by which one way of exchanging rows is the quickest, and computing them is free."""
    figures = dict.fromkeys(("equal", "slots", "buffer"), (9.0, 90.0)) | {way: (1.0, 10.0)}
    return PaddingCosts(PaddingCurves((1, 100), **figures, mlps=(0.0, 0.0)), attn_tp=1, attn_cp=1)


@pytest.mark.parametrize(
    ("way", "padding", "rows"),
    [
        ("equal", Padding.MAX_LEN, (7, 7, 7, 7)),
        ("slots", Padding.SUM_SLOTS, (3, 7, 1, 0)),
        ("buffer", Padding.SUM_BUFFER, (3, 7, 1, 0)),
    ],
)
def test_with_costs_prompts_and_decodes_take_what_is_quickest(way, padding, rows):
    one = domain(costs=always(way))
    for replica, length in ((0, 3), (1, 5), (1, 2), (2, 1)):
        add(one, replica, length)
    prompts, decodes = headers(one, 2)
    assert (prompts.padding, prompts.padded_rows) == (padding, rows)
    assert decodes.padding == padding
    assert decodes.padded_rows == ((2,) * 4 if way == "equal" else (1, 2, 1, 0))


def test_what_is_set_is_obeyed_whatever_it_costs():
    for mode, padding, rows in (
        ("max_len", Padding.MAX_LEN, (5, 5)),
        ("sum_len", Padding.SUM_LEN, (5, 2)),
    ):
        one = domain(num_replicas=2, padding=mode, costs=always("buffer"))
        add(one, 0, 5)
        add(one, 1, 2)
        (prompts,) = headers(one, 1)
        assert (prompts.padding, prompts.padded_rows) == (padding, rows)


@pytest.mark.row("S12")
def test_costs_do_not_touch_what_graphs_replay():
    one = domain(buckets=(1, 2, 4), costs=always("buffer"))
    add(one, 0, 3)
    prompts, decodes = headers(one, 2)
    assert prompts.padding == Padding.SUM_BUFFER
    assert (decodes.padding, decodes.bucket, decodes.padded_rows) == (Padding.MAX_LEN, 1, (1,) * 4)


def test_costs_mean_nothing_where_replicas_share_nothing():
    one = domain(shares_rows=False, costs=always("equal"))
    add(one, 0, 5)
    (prompts,) = headers(one, 1)
    assert (prompts.padding, prompts.padded_rows) == (Padding.NONE, (5, 0, 0, 0))
