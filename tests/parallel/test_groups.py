"""Groups: whom a rank talks to, how many communicators that takes, and the ledger of calls."""

import pytest
import torch

from parallel.collectives import (
    all_gather_columns,
    all_gather_rows,
    all_reduce,
    reduce_scatter_rows,
)
from parallel.groups import Call, Group, Ledger, build_groups, single_rank_groups
from parallel.layout import GROUP_NAMES, Layout
from parallel.thread_world import run_thread_world

DP_ATTENTION = Layout(tp_size=8, dp_size=2, enable_dp_attention=True, ep_size=2)


def asked_for(layout: Layout, rank: int) -> list[tuple[int, ...]]:
    """The member lists for which `rank` asks for a communicator, in order."""
    asked = []
    build_groups(layout, rank, asked.append)
    return asked


@pytest.mark.parametrize(
    "layout", [Layout(), Layout(tp_size=4), Layout(tp_size=2, dp_size=3), DP_ATTENTION]
)
def test_all_ranks_of_a_domain_ask_for_the_same_communicators_in_the_same_order(layout):
    for domain in range(layout.num_domains):
        first, *others = [asked_for(layout, rank) for rank in layout.domain_ranks(domain)]
        assert all(asked == first for asked in others)


@pytest.mark.row("S1")
def test_groups_with_the_same_members_share_a_communicator():
    assert asked_for(Layout(tp_size=4), 0) == [(0, 1, 2, 3)]
    asked = asked_for(DP_ATTENTION, 0)
    assert len(asked) == len(set(asked))


def test_replicas_that_share_no_collective_ask_only_for_their_own():
    assert asked_for(Layout(tp_size=2, dp_size=2), 3) == [(2, 3)]


def test_a_group_knows_its_members_and_its_place():
    for rank in range(8):
        groups = build_groups(DP_ATTENTION, rank, lambda members: None)
        for name in GROUP_NAMES:
            group = getattr(groups, name)
            assert group.name == name
            assert group.members == DP_ATTENTION.members(name, rank)
            assert group.members[group.rank] == rank
            assert group.size == len(group.members)
            assert group.ledger is groups.ledger


def test_groups_of_one_return_their_input_and_record_nothing():
    groups = single_rank_groups()
    x = torch.ones(2, 3)
    for collective in (all_reduce, all_gather_rows, all_gather_columns, reduce_scatter_rows):
        assert collective(x, groups.tp) is x
    assert groups.ledger.num_collectives == 0
    assert groups.ledger.take() == Ledger().take()


def test_a_group_without_a_communicator_is_an_error_that_names_it():
    group = Group("tp", (0, 1), 0, None, Ledger())
    with pytest.raises(RuntimeError) as failure:
        all_reduce(torch.ones(1), group)
    assert str(failure.value) == "group tp of ranks (0, 1) has no communicator on this rank"


def test_rows_that_do_not_divide_are_refused():
    group = Group("attn_tp", (0, 1), 0, None, Ledger())
    with pytest.raises(ValueError, match="3 rows do not divide over the 2 ranks of attn_tp"):
        reduce_scatter_rows(torch.ones(3, 1), group)


def test_ledgers_of_ranks_that_did_the_same_are_equal():
    def body(rank, groups):
        all_reduce(torch.ones(2, 3), groups.tp)
        all_gather_rows(torch.ones(1, 3), groups.attn_tp)
        return groups.ledger.num_collectives, groups.ledger.take()

    first, *others = run_thread_world(Layout(tp_size=3), body)
    assert first[0] == 2
    assert all(other == first for other in others)


@pytest.mark.parametrize(
    "calls",
    [
        [("all_reduce", "tp", (2, 3)), ("all_gather", "tp", (1, 3))],
        [("all_gather", "tp", (1, 3))],
        [("all_gather", "tp", (1, 3)), ("all_reduce", "attn_tp", (2, 3))],
        [("all_gather", "tp", (1, 3)), ("all_reduce", "tp", (3, 2))],
    ],
    ids=["order", "skipped", "group", "shape"],
)
def test_ledgers_tell_apart(calls):
    expected, ledger = Ledger(), Ledger()
    for call in [("all_gather", "tp", (1, 3)), ("all_reduce", "tp", (2, 3))]:
        expected.record(Call(*call))
    for call in calls:
        ledger.record(Call(*call))
    assert ledger.take() != expected.take()


def test_a_ledger_starts_afresh_each_step():
    ledger = Ledger()
    ledger.record(Call("all_reduce", "tp", (1,)))
    first = ledger.take()
    ledger.record(Call("all_reduce", "tp", (1,)))
    assert ledger.take() == first
