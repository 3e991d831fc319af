"""Threads as ranks: the same collectives, and an error where real groups would hang."""

import threading
import time

import pytest
import torch

from parallel import thread_world
from parallel.collectives import (
    all_gather_columns,
    all_gather_rows,
    all_reduce,
    all_to_all_rows,
    reduce_scatter_rows,
)
from parallel.layout import Layout
from parallel.thread_world import Desync, run_thread_world

FOUR = Layout(tp_size=4)


def mine(rank: int, num_rows: int = 1) -> torch.Tensor:
    """Rows of [rank, 10 * rank]."""
    return torch.tensor([[float(rank), 10.0 * rank]]).repeat(num_rows, 1)


def test_all_reduce_sums_in_place_on_every_rank():
    def body(rank, groups):
        x = mine(rank)
        assert all_reduce(x, groups.tp) is x
        return x.tolist()

    assert run_thread_world(FOUR, body) == [[[6.0, 60.0]]] * 4


def test_rows_are_gathered_in_rank_order():
    results = run_thread_world(FOUR, lambda r, g: all_gather_rows(mine(r, 2), g.tp)[:, 0].tolist())
    assert results == [[0, 0, 1, 1, 2, 2, 3, 3]] * 4


def test_columns_are_gathered_in_rank_order():
    results = run_thread_world(FOUR, lambda r, g: all_gather_columns(mine(r, 2), g.tp).tolist())
    assert results == [[[0, 0, 1, 10, 2, 20, 3, 30]] * 2] * 4


def test_reduce_scatter_leaves_each_rank_its_block_of_the_sum():
    def body(rank, groups):
        rows = torch.arange(8.0).view(8, 1) + 100 * rank
        return reduce_scatter_rows(rows, groups.tp).flatten().tolist()

    assert run_thread_world(FOUR, body) == [
        [600.0, 604.0], [608.0, 612.0], [616.0, 620.0], [624.0, 628.0]
    ]  # fmt: skip


def test_groups_of_one_world_do_not_mix():
    layout = Layout(tp_size=4, dp_size=2, enable_dp_attention=True)

    def body(rank, groups):
        within = all_reduce(torch.tensor([float(rank)]), groups.attn_tp).item()
        across = all_reduce(torch.tensor([float(rank)]), groups.attn_dp).item()
        return within, across

    assert run_thread_world(layout, body) == [(1.0, 2.0), (1.0, 4.0), (5.0, 2.0), (5.0, 4.0)]


def test_many_collectives_in_a_row_never_see_the_one_before():
    def body(rank, groups):
        return [all_reduce(torch.tensor([float(i)]), groups.tp).item() for i in range(200)]

    assert run_thread_world(FOUR, body) == [[4.0 * i for i in range(200)]] * 4


def test_empty_rows_are_exchanged_too():
    shapes = run_thread_world(FOUR, lambda r, g: all_gather_rows(torch.zeros(0, 3), g.tp).shape)
    assert shapes == [torch.Size([0, 3])] * 4


def test_a_member_that_does_not_come_is_named():
    def body(rank, groups):
        all_are_here.wait(60)
        if rank != 2:
            all_reduce(mine(rank), groups.tp)

    all_are_here = threading.Barrier(4)
    with pytest.raises(Desync) as failure:
        run_thread_world(FOUR, body, time_limit_s=1.0)
    assert str(failure.value) == (
        "all_reduce of (1, 2) float32 over group (0, 1, 2, 3): ranks [2] did not come in 1 s"
    )


def test_members_that_call_different_things_are_told_so():
    def body(rank, groups):
        if rank == 0:
            all_gather_rows(mine(rank), groups.tp)
        else:
            all_reduce(mine(rank, 2), groups.tp)

    with pytest.raises(Desync) as failure:
        run_thread_world(Layout(tp_size=2), body)
    assert str(failure.value) == (
        "group (0, 1) met with different calls: rank 0: all_gather of (1, 2) float32; "
        "rank 1: all_reduce of (2, 2) float32"
    )


def test_the_first_failure_is_raised_and_nobody_waits_for_the_failed_rank():
    def body(rank, groups):
        if rank == 1:
            raise KeyError("broken on rank 1")
        all_reduce(mine(rank), groups.tp)

    start = time.monotonic()
    with pytest.raises(KeyError, match="broken on rank 1"):
        run_thread_world(FOUR, body, time_limit_s=20)
    assert time.monotonic() - start < 15


def test_a_rank_that_never_returns_is_named():
    def body(rank, groups):
        if rank == 1:
            may_return.wait()

    may_return = threading.Event()
    with pytest.raises(Desync, match=r"ranks \[1\] were not back after 0\.5 s"):
        run_thread_world(Layout(tp_size=2), body, time_limit_s=0.5)
    may_return.set()


def test_a_rank_that_was_not_given_its_turn_goes_on_and_gives_up_nobodys():
    of_all = threading.Lock()
    first, second = thread_world._Turn(of_all), thread_world._Turn(of_all)
    first.take()
    second.take()  # returns, though the first has it
    second.give_up()
    assert of_all.locked()
    first.give_up()
    assert not of_all.locked()


def test_all_blocks_are_exchanged_in_rank_order():
    def body(rank, groups):
        return all_to_all_rows(torch.arange(4.0).view(4, 1) + 10 * rank, groups.tp).flatten()

    results = run_thread_world(FOUR, body)
    assert torch.stack(results).tolist() == [[d + 10 * s for s in range(4)] for d in range(4)]
