"""Rows of unequal replicas, brought together and taken apart again by threads that are ranks."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from parallel.dp_attention import (
    Activation,
    RowSplit,
    UnreducedError,
    answer_logit_rows,
    gather_all,
    gather_logit_rows,
    gather_replica,
    sum_to_share,
    sum_to_shares,
    take_share,
)
from parallel.layout import Layout
from parallel.plan import Rows
from parallel.thread_world import run_thread_world

pytestmark = pytest.mark.row("S10")

COUNTS = [(4, 4), (4, 2), (0, 3), (7, 0), (1, 1), (0, 0), (5, 6), (1, 9)]
LAYOUTS = [Layout(tp_size=tp, dp_size=2, enable_dp_attention=True) for tp in (2, 4, 8)]


def split_of(groups, rows, num_real=None) -> RowSplit:
    return RowSplit(
        rows=rows,
        num_real=num_real or rows,
        attn_tp=groups.attn_tp.size,
        part=groups.attn_dp.rank,
        place=groups.attn_tp.rank,
    )


def rows_of(replica: int, count: int) -> torch.Tensor:
    """Rows that say whose they are."""
    return torch.arange(count).view(-1, 1) + torch.tensor([[100.0, 1000.0]]) * (replica + 1)


def all_rows(rows) -> torch.Tensor:
    return torch.cat([rows_of(replica, count) for replica, count in enumerate(rows)])


@given(
    rows=st.lists(st.integers(0, 30), min_size=1, max_size=4),
    attn_tp=st.sampled_from([1, 2, 3, 4, 8]),
)
def test_shares_cover_every_row_once(rows, attn_tp):
    places = itertools.product(range(len(rows)), range(attn_tp))
    splits = [
        RowSplit(rows=tuple(rows), num_real=tuple(rows), attn_tp=attn_tp, part=r, place=p)
        for r, p in places
    ]
    covered = [i for s in splits for i in range(s.share_in_all.start, s.share_in_all.stop)]
    assert covered == list(range(sum(rows)))
    assert [s.num_share for s in splits] == list(splits[0].shares)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"tp{layout.tp_size}")
@pytest.mark.parametrize("rows", COUNTS)
def test_scattered_rows_become_all_rows_in_order(layout, rows):
    def body(rank, groups):
        split = split_of(groups, rows)
        mine = rows_of(groups.attn_dp.rank, split.num_rows)
        share = take_share(mine, split)
        assert torch.equal(gather_replica(share, split, groups.attn_tp), mine)
        return gather_all(share, split, groups.tp)

    for result in run_thread_world(layout, body):
        assert torch.equal(result, all_rows(rows))


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"tp{layout.tp_size}")
@pytest.mark.parametrize("rows", COUNTS)
def test_sums_arrive_where_the_rows_belong(layout, rows):
    def body(rank, groups):
        split = split_of(groups, rows)
        mine = rows_of(groups.attn_dp.rank, split.num_rows)
        within = sum_to_shares(mine * (groups.attn_tp.rank + 1), split, groups.attn_tp)
        across = sum_to_share(all_rows(rows) * (rank + 1), split, groups.tp)
        share, parts = take_share(mine, split), groups.attn_tp.size
        assert torch.equal(within, share * (parts * (parts + 1) // 2))
        assert torch.equal(across, share * (layout.tp_size * (layout.tp_size + 1) // 2))

    run_thread_world(layout, body)


def test_what_is_exchanged_has_one_shape_on_all_ranks():
    def body(rank, groups):
        for rows in COUNTS:
            split = split_of(groups, rows)
            share = take_share(rows_of(groups.attn_dp.rank, split.num_rows), split)
            sum_to_share(gather_all(share, split, groups.tp), split, groups.tp)
        return groups.ledger.cut()

    first, *others = run_thread_world(LAYOUTS[1], body)
    assert all(other == first for other in others)
    assert {call.op for call in first} == {"all_gather", "reduce_scatter", "all_reduce"}


def test_every_replica_gets_all_columns_of_its_own_rows():
    weight = torch.arange(16.0).view(8, 2)

    def body(rank, groups):
        replica = groups.attn_dp.rank
        hidden = rows_of(replica, (3, 1)[replica])
        part = weight.chunk(4)[rank]
        rows_PMD = gather_logit_rows(hidden, (3, 1), groups.attn_dp)
        columns = answer_logit_rows(rows_PMD @ part.T, len(hidden), groups.tp)
        assert torch.equal(columns, hidden @ weight.T)
        room = torch.zeros(len(hidden), 8)
        written = answer_logit_rows(rows_PMD @ part.T, len(hidden), groups.tp, out=room)
        assert torch.equal(written, columns)
        assert (written is room) == (len(hidden) > 1)

    run_thread_world(LAYOUTS[1], body)


def test_live_rows_are_those_that_are_tokens():
    split = RowSplit(rows=(4, 2), num_real=(3, 0), attn_tp=2, part=0, place=1)
    assert split.live(Rows.FULL).tolist() == [True, True, True, False, False, False]
    assert split.live(Rows.TP_ATTN_FULL).tolist() == [True, True, True, False]
    assert split.live(Rows.SCATTERED).tolist() == [True, False]
    unpadded = RowSplit(rows=(4, 2), num_real=(4, 2), attn_tp=2, part=0, place=1)
    assert unpadded.live(Rows.FULL) is None


def test_what_a_split_takes_to_the_device_goes_by_the_upload_it_is_given():
    """The runner's waits for nothing; a plain copy would wait for all steps that are under way."""
    uploaded = []

    def upload(array):
        uploaded.append(torch.from_numpy(array))
        return uploaded[-1]

    split = RowSplit(
        rows=(4, 3), num_real=(3, 3), attn_tp=2, part=0, place=1, upload=upload
    )  # fmt: skip
    made = [split.slots, *(split.live(rows) for rows in Rows)]
    assert split.slots.tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert split.live(Rows.FULL).tolist() == [True, True, True, False, True, True, True]
    assert all(one is other for one, other in zip(made, uploaded, strict=True))


def test_inputs_are_left_as_they_were():
    def body(rank, groups):
        split = split_of(groups, (3, 5))
        share = take_share(rows_of(groups.attn_dp.rank, split.num_rows), split).clone()
        kept = share.clone()
        gather_all(share, split, groups.tp)
        gather_replica(share, split, groups.attn_tp)
        return torch.equal(share, kept)

    assert all(run_thread_world(LAYOUTS[1], body))


@pytest.mark.row("S14")
def test_rows_of_another_layout_are_refused():
    with pytest.raises(UnreducedError, match="rows are SCATTERED, summed and FULL, summed, are"):
        Activation(torch.zeros(1), Rows.SCATTERED).final(Rows.FULL)
