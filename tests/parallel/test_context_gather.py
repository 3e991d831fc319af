"""Rows of parts on their way to all of them: in order, symmetric, and waited for in time."""

import time

import pytest
import torch

from parallel.arena import SymmetryError
from parallel.collectives import start_all_gather_rows
from parallel.context import cut_rows
from parallel.context_gather import ContextGather, Wanted
from parallel.groups import CollectiveError, single_rank_groups
from parallel.layout import Layout
from parallel.symmetric import use_symmetric_memory
from tests.parallel.arenas import run_with_arena

pytestmark = [pytest.mark.row("S6"), pytest.mark.row("S7")]

LAYOUTS = [
    Layout(tp_size=2, attn_cp_size=2),
    Layout(tp_size=4, attn_cp_size=2),
    Layout(tp_size=8, dp_size=2, enable_dp_attention=True, attn_cp_size=4),
]
STEPS = [(0, (9,)), (5, ()), (1, ()), (3, (1, 17, 4)), (0, (1, 1, 1)), (2, (2, 7))]
"""(decodes, lengths of chunks): also fewer rows than there are parts."""


def gather_of(group, cut) -> ContextGather:
    places = cut.places()
    return ContextGather(
        group,
        num_here=cut.counts[group.rank],
        longest=places.longest,
        places_U=torch.from_numpy(places.place_N),
    )


def rows_of(replica: int, count: int) -> torch.Tensor:
    return torch.arange(count * 6).view(count, 2, 3).float() + 1000 * replica


def poison(arena) -> None:
    """Whatever is not written to a slot is not a number."""

    def place(slot):
        arena._block.bytes_N[slot.offset : slot.offset + slot.num_bytes].fill_(255)
        return slot.offset

    arena.place = place


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("in_slot", [False, True], ids=["copied", "written in place"])
def test_every_part_gets_all_rows_of_its_replica_in_order(layout, in_slot):
    def body(rank, groups):
        poison(groups.arena)
        group, replica = groups.attn_cp, groups.attn_dp.rank
        for number, (num_decodes, lengths) in enumerate(STEPS):
            cut = cut_rows(num_decodes, lengths, group.size)
            whole = rows_of(replica, num_decodes + sum(lengths)) + number
            own = whole[cut.rows_of(group.rank)]
            gather = gather_of(group, cut)
            sent = own
            if in_slot:
                sent = gather.slot(own, 2, 3)
                sent[: len(own)] = own
            assert torch.equal(gather.start(sent).wait(), whole)
            call = groups.ledger.cut()[-1]
            assert (call.op, call.group, call.path) == ("all_gather", "attn_cp", "symmetric")
            assert [name for name, _ in call.places] == ["cp_in.attn_cp", "cp_kv.attn_cp"]
            assert call.shape[0] == max(cut.counts)  # no rank's part is padded further

    run_with_arena(layout, body)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_some_rows_are_taken_from_whoever_has_them(layout):
    wanted_rows = [[4, 0, 8], [7], list(range(9))]

    def body(rank, groups):
        poison(groups.arena)
        group, cut = groups.attn_cp, cut_rows(0, (9,), groups.attn_cp.size)
        whole = rows_of(groups.attn_dp.rank, 9)
        own = whole[cut.rows_of(group.rank)]
        padded = torch.cat([own, torch.full((1, 2, 3), torch.nan)])
        for rows in wanted_rows:
            rows_N = torch.tensor(rows)
            places = cut.places_among(rows_N.numpy())
            wanted = Wanted(
                torch.from_numpy(cut.own_among(rows_N.numpy(), group.rank)),
                places.longest,
                torch.from_numpy(places.place_N),
            )
            assert torch.equal(gather_of(group, cut).take(padded, wanted), whole[rows_N])
            call = groups.ledger.cut()[-1]
            assert (call.group, call.path) == ("attn_cp", "symmetric")

    run_with_arena(layout, body)


TWO = Layout(tp_size=4, attn_cp_size=2)


def test_a_gather_that_is_not_waited_for_ends_the_step():
    def body(rank, groups):
        gather = gather_of(groups.attn_cp, cut_rows(3, (), 2))
        pending = gather.start(torch.ones(gather.num_here, 1))
        with pytest.raises(CollectiveError, match="begun in this step and not waited for"):
            groups.ledger.take()
        with pytest.raises(CollectiveError, match="a second gather over attn_cp was begun"):
            gather.start(torch.ones(gather.num_here, 1))
        pending.wait()
        with pytest.raises(CollectiveError, match="nothing over attn_cp goes on"):
            pending.wait()

    run_with_arena(TWO, body)


def test_another_groups_memory_is_refused_before_the_gather_begins():
    def body(rank, groups):
        x = torch.ones(2, 4)
        foreign = use_symmetric_memory(groups.tp, "cp_in", op="all_gather").empty(x.shape, x)
        out = use_symmetric_memory(groups.attn_cp, "cp_kv", op="all_gather").empty((4, 4), x)
        with pytest.raises(SymmetryError, match=r"all_gather over attn_cp .* declared for tp"):
            start_all_gather_rows(foreign, groups.attn_cp, out=out)
        with pytest.raises(ValueError, match="overlap"):
            start_all_gather_rows(out[:2], groups.attn_cp, out=out)
        return groups.ledger.num_collectives

    assert run_with_arena(TWO, body) == [0] * 4


def test_other_rows_than_the_parts_are_refused():
    def body(rank, groups):
        gather = gather_of(groups.attn_cp, cut_rows(4, (), 2))
        with pytest.raises(ValueError, match="3 rows set out over attn_cp, and this rank's part"):
            gather.start(torch.ones(3, 1))

    run_with_arena(TWO, body)
    group = single_rank_groups().attn_cp
    with pytest.raises(ValueError, match="which is one rank, has nothing to wait for"):
        start_all_gather_rows(torch.ones(1), group, out=torch.ones(1))


def test_who_waits_can_be_told_by_another_thread():
    """A rank that is late is seen by what the other waits in, not where that began."""
    seen = []
    ledgers = {}

    def body(rank, groups):
        ledgers[rank] = groups.ledger
        gather = gather_of(groups.attn_cp, cut_rows(4, (), 2))
        assert groups.ledger.waiting() == (0, "", "")
        pending = gather.start(torch.ones(2, 1))
        assert groups.ledger.waiting() == (0, "", "")
        if rank == 1:
            deadline = time.monotonic() + 25
            while time.monotonic() < deadline and not seen:
                time.sleep(0.002)
                told = ledgers[0].waiting() if 0 in ledgers else (0, "", "")
                seen.extend([told] if told[0] else [])
        pending.wait()

    run_with_arena(Layout(tp_size=2, attn_cp_size=2), body)
    assert seen == [(1, "all_gather", "attn_cp")]
