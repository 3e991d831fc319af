"""Which way ranks sum: the table's logic, and what layers do with what it says."""

import math
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from parallel.arena import ModelSizes, lay_out, logit_needs, model_needs
from parallel.collectives import all_gather_columns, all_reduce, all_reduce_add_norm
from parallel.groups import TorchTransport, build_groups
from parallel.layout import Layout
from parallel.peer_memory import communicators
from parallel.sums import PATHS, SumTable, agreed_table
from parallel.symmetric import moved_to_slot, place_in_slot
from parallel.thread_world import run_thread_world
from workers.config import Failpoint
from workers.failpoints import Failpoints, Skipping

pytestmark = pytest.mark.row("S2")

TWO = Layout(tp_size=2)
FIGURES = st.lists(st.floats(1.0, 500.0), min_size=3, max_size=3)
BY_RANK = st.lists(
    st.dictionaries(st.sampled_from(PATHS[1:]), FIGURES).flatmap(
        lambda others: FIGURES.map(lambda ring: {"ring": ring} | others)
    ),
    min_size=1,
    max_size=4,
)


@given(BY_RANK, st.integers(1, 400))
def test_no_path_is_chosen_that_a_rank_lacks_and_none_is_slower(by_rank, num_bytes):
    table = agreed_table((10, 100, 300), by_rank)
    path = table.best(num_bytes)
    assert all(path in one for one in by_rank)
    at = min(sum(size < num_bytes for size in table.sizes), 2)
    slowest = max(one[path][at] for one in by_rank)
    common = [p for p in PATHS if all(p in one for one in by_rank)]
    if num_bytes > 300:
        common = [p for p in common if p in ("ring", "symmetric")]
        assert path in common
    assert slowest == min(max(one[p][at] for one in by_rank) for p in common)


def test_a_path_that_was_wrong_on_one_rank_is_never_chosen():
    table = agreed_table(
        (8,), [{"ring": [9.0], "push": [3.0]}, {"ring": [9.0], "push": [math.inf]}]
    )
    assert table.best(8) == "ring"


def test_a_line_says_which_path_from_which_size_on():
    table = SumTable((1, 2, 4), {"ring": (9.0, 9.0, 9.0), "push": (3.0, 3.0, 12.0)})
    assert table.summary() == "push, ring from 4 bytes"
    assert table.lines()[1].split() == ["1", "9.0", "3.0", "push"]


class Peers:
    """The peers' ways, by the group's own sum: what is asked of them is what is looked at."""

    def __init__(self, group) -> None:
        self.group, self.buffer = group, torch.zeros(64)

    def staging(self, shape, like):
        return self.buffer[: math.prod(shape)].view(*shape)

    def takes(self, path, x):
        return path == "push" or x.data_ptr() == self.buffer.data_ptr()

    def reduce(self, path, x):
        self.group.transport.all_reduce(x)
        return x

    def reduce_rms_norm(self, x_TD, residual_TD, weight_D, eps, out):
        self.group.transport.all_reduce(x_TD)
        residual_TD += x_TD
        return residual_TD * weight_D


class EveryWay(Peers):
    def takes(self, path, x):
        return True


def run(table: SumTable, body):
    def on_rank(rank, groups):
        groups.tp.sums.open(table, Peers(groups.tp))
        got = body(rank, groups.tp)
        groups.ledger.take()
        return got, dict(groups.ledger.counts)

    return run_thread_world(TWO, on_rank)


def always(path: str) -> SumTable:
    return SumTable((1000,), {"ring": (9.0,), path: (1.0,)})


def test_rows_are_pushed_from_wherever_they_lie():
    results = run(always("push"), lambda rank, tp: all_reduce(torch.full((2, 3), rank + 1.0), tp))
    for out, counts in results:
        assert (out == 3.0).all()
        assert counts == {("tp", "all_reduce", "chosen", "push"): 1}


def test_a_product_is_written_where_two_rounds_read_it():
    def body(rank, tp):
        place = place_in_slot(tp, (2, 3), torch.empty(0), op="all_reduce")
        assert place.data_ptr() == tp.sums.peers.buffer.data_ptr()
        assert place_in_slot(tp, (2, 3), torch.empty(0), op="reduce_scatter") is None
        moved = moved_to_slot(torch.ones(2, 3), tp, role="reduced", op="all_reduce")
        assert moved.data_ptr() == place.data_ptr()
        staged = all_reduce(place.fill_(rank + 1.0), tp).clone()
        return staged, all_reduce(torch.full((2, 3), rank + 1.0), tp)

    for (staged, elsewhere), counts in run(always("two_shot"), body):
        assert (staged == 3.0).all()
        assert (elsewhere == 3.0).all()
        assert counts == {("tp", "all_reduce", "chosen", "two_shot"): 1}


def test_sum_residual_and_norm_are_one_only_where_pushing_is_quickest():
    def body(rank, tp):
        x, stream = torch.full((2, 3), rank + 1.0), torch.ones(2, 3)
        return all_reduce_add_norm(x, stream, torch.full((3,), 2.0), 1e-6, tp), stream

    for (normal, stream), _ in run(always("push"), body):
        assert (stream == 4.0).all()
        assert (normal == 8.0).all()
    for (normal, stream), counts in run(always("one_shot"), body):
        assert normal is None
        assert (stream == 1.0).all()
        assert counts == {}


@pytest.mark.parametrize("best", ["ring", "symmetric"])
def test_logits_are_gathered_from_the_arena_however_quick_a_sum_of_their_size_is(best):
    sizes = ModelSizes(8, 16, 4, num_rows=4, num_logit_rows=4)
    needs = model_needs(TWO, sizes, [("all_reduce", "attn_tp")])
    plan = lay_out([*needs, *logit_needs(TWO, sizes, spans_replicas=False)], TWO)
    times = {"ring": (2.0,), "symmetric": (2.0,)} | {best: (1.0,)}

    def body(rank, groups):
        groups.arena.open(plan, groups.by_name(), torch.device("cpu"), is_strict=True)
        group = groups.attn_tp
        group.sums.open(SumTable((10**9,), times), None)
        mine = moved_to_slot(torch.full((4, 8), float(rank)), group, role="logits", op="all_gather")
        whole = all_gather_columns(mine, group, role="all_logits")
        groups.ledger.take()
        return whole, dict(groups.ledger.counts)

    for whole, counts in run_thread_world(TWO, body):
        assert (whole[:, :8] == 0).all()
        assert (whole[:, 8:] == 1).all()
        assert list(counts) == [("attn_tp", "all_gather", "symmetric", "")]


def test_ranks_that_sum_in_different_ways_have_different_digests():
    def body(rank, groups):
        table = always(("push", "two_shot")[rank])
        groups.tp.sums.open(table, EveryWay(groups.tp))
        all_reduce(torch.ones(2, 3), groups.tp)
        return groups.ledger.take()

    first, second = run_thread_world(TWO, body)
    assert first != second


def test_a_rank_with_a_planted_fault_meets_its_peers_on_the_same_communicators():
    """Setting up peers' memory is collective: who stays away leaves the others waiting."""
    process_group = dist.ProcessGroupGloo(dist.HashStore(), 0, 1, timedelta(seconds=5))
    transport = TorchTransport(process_group)
    faults = Failpoints([Failpoint("skip_collective", rank=1, step=6)], epoch=1, rank=1)
    layout = Layout(tp_size=2)
    found = [
        communicators([groups.tp, groups.attn_tp])
        for wrapped in (transport, Skipping(transport, faults))
        for groups in [build_groups(layout, 1, lambda members, wrapped=wrapped: wrapped)]
    ]
    names = [[(group.name, its) for group, its in each] for each in found]
    assert names == [[("tp", process_group)]] * 2


def test_ranks_without_a_communicator_of_torchs_have_none_to_open():
    def on_rank(rank, groups):
        return communicators([groups.tp])

    assert run_thread_world(TWO, on_rank) == [[], []]
