"""The contract: which memory a collective may work on, per collective and group."""

import random
import threading

import pytest
import torch

from parallel.arena import SymmetryError
from parallel.collectives import (
    all_gather_rows,
    all_reduce,
    all_to_all_rows,
    reduce_scatter_rows,
)
from parallel.groups import Call, Group, Ledger
from parallel.layout import Layout
from parallel.sums import SumTable
from parallel.symmetric import (
    BOTH,
    get_global_dp_buffer,
    get_local_dp_buffer,
    is_allocation_symmetric,
    required_sides,
    use_symmetric_memory,
)
from parallel.thread_world import Desync, run_thread_world
from tests.parallel.arenas import DP_ATTENTION, open_arena, run_with_arena

TWO = Layout(tp_size=2)
ROW = torch.ones(1, 8)


def in_slot(group, x, role="reduced"):
    memory = use_symmetric_memory(group, role, op="all_reduce")
    assert memory is not None
    return memory.empty(x.shape, x).copy_(x)


def paths(groups):
    """(group, op, path, reason) of every collective of the step."""
    return [(call.group, call.op, call.path, call.reason) for call in groups.ledger.cut()]


@pytest.mark.row("S5")
def test_memory_of_the_groups_own_slots_is_symmetric():
    def body(rank, groups):
        all_reduce(in_slot(groups.tp, ROW), groups.tp)
        all_reduce(in_slot(groups.attn_tp, ROW), groups.attn_tp)
        share = get_local_dp_buffer(groups.tp, (1, 8), ROW)
        reduce_scatter_rows(in_slot(groups.tp, ROW.repeat(4, 1)), groups.tp, out=share)
        out = get_global_dp_buffer(groups.tp, (4, 8), ROW)
        all_gather_rows(in_slot(groups.tp, ROW, "gather_in"), groups.tp, out=out)
        return paths(groups)

    for seen in run_with_arena(DP_ATTENTION, body):
        assert seen == [
            ("tp", "all_reduce", "symmetric", ""),
            ("attn_tp", "all_reduce", "symmetric", ""),
            ("tp", "reduce_scatter", "symmetric", ""),
            ("tp", "all_gather", "symmetric", ""),
        ]


@pytest.mark.row("S4", "S5")
@pytest.mark.parametrize("op", ["all_reduce", "all_gather", "reduce_scatter"])
def test_another_groups_slot_raises_and_names_op_group_tensor_and_slot(op):
    def body(rank, groups):
        x = in_slot(groups.attn_tp, ROW.repeat(4, 1))
        with pytest.raises(SymmetryError) as refusal:
            {
                "all_reduce": all_reduce,
                "all_gather": all_gather_rows,
                "reduce_scatter": reduce_scatter_rows,
            }[op](x, groups.tp)
        assert groups.ledger.num_collectives == 0
        return str(refusal.value)

    sentence = (
        f"{op} over tp (0, 1, 2, 3): its send tensor (4, 8) torch.float32 is in slot "
        "reduced.attn_tp, which is declared for attn_tp"
    )
    assert run_with_arena(DP_ATTENTION, body) == [sentence] * 4


@pytest.mark.row("S4")
@pytest.mark.parametrize("get", [get_local_dp_buffer, get_global_dp_buffer])
def test_a_dp_buffer_is_of_the_group_that_is_named(get):
    def body(rank, groups):
        for group in (groups.tp, groups.attn_tp, groups.attn_dp):
            buffer = get(group, (2, 8), ROW)
            place = groups.arena.find(buffer)
            assert place is not None
            assert place.slot.groups == (group.name,)
            all_reduce(buffer.fill_(1.0), group)
        wrong = get(groups.attn_tp, (2, 8), ROW)
        with pytest.raises(SymmetryError, match="declared for attn_tp"):
            all_reduce(wrong, groups.tp)
        return [path for _, _, path, _ in paths(groups)]

    assert run_with_arena(DP_ATTENTION, body) == [["symmetric"] * 3] * 4


@pytest.mark.row("S4")
@pytest.mark.parametrize("get", [get_local_dp_buffer, get_global_dp_buffer])
def test_a_dp_buffer_without_a_group_cannot_be_asked_for(get):
    with pytest.raises(TypeError, match="group"):
        get(shape=(1, 8), like=ROW)


@pytest.mark.row("S5")
def test_a_twin_communicator_is_not_the_one_that_was_registered():
    def body(rank, groups):
        twin = Group("tp", groups.tp.members, rank, Twin(), groups.ledger, groups.arena)
        with pytest.raises(SymmetryError, match="the arena is not registered there"):
            all_reduce(in_slot(groups.tp, ROW), twin)

    run_with_arena(TWO, body)


class Twin:
    """A communicator that nobody registered anything on."""


@pytest.mark.row("S5")
def test_a_group_with_the_same_members_shares_the_registration():
    def body(rank, groups):
        all_reduce(in_slot(groups.tp, ROW), groups.attn_tp)
        return paths(groups)

    assert run_with_arena(TWO, body) == [[("attn_tp", "all_reduce", "symmetric", "")]] * 2


@pytest.mark.row("S5")
def test_without_strict_mode_a_bug_is_counted():
    def body(rank, groups):
        all_reduce(ROW.clone(), groups.tp)
        all_reduce(in_slot(groups.attn_tp, ROW), groups.tp)
        groups.ledger.take()
        return dict(groups.ledger.counts)

    assert run_with_arena(DP_ATTENTION, body, is_strict=False)[0] == {
        ("tp", "all_reduce", "fallback", "outside"): 1,
        ("tp", "all_reduce", "fallback", "wrong_group"): 1,
    }


def test_memory_outside_the_arena_raises():
    def body(rank, groups):
        with pytest.raises(SymmetryError, match="lies outside the symmetric arena"):
            all_reduce(ROW.clone(), groups.tp)

    run_with_arena(TWO, body)


@pytest.mark.row("S2")
def test_uneven_replicas_close_the_gate_of_their_common_groups_only():
    def body(rank, groups):
        gates = {}
        for groups.arena.rows_are_even in (True, False):
            gates[groups.arena.rows_are_even] = [
                name for name, group in groups.by_name().items()
                if group.size > 1 and is_allocation_symmetric(group)
            ]  # fmt: skip
        return gates

    layout = Layout(tp_size=4, dp_size=2, enable_dp_attention=True, moe_dense_tp_size=2)
    for gates in run_thread_world(layout, body):
        assert gates[True] == ["tp", "attn_tp", "attn_dp", "moe_tp", "dense_tp"]
        assert gates[False] == ["attn_tp", "dense_tp"]
    for gates in run_thread_world(Layout(tp_size=4), body):
        assert gates[False] == gates[True]


@pytest.mark.row("S2")
def test_an_uneven_step_keeps_its_attention_collectives_symmetric():
    def body(rank, groups):
        groups.arena.rows_are_even = False
        num_rows = 1 + rank // 2
        all_reduce(in_slot(groups.attn_tp, ROW.repeat(num_rows, 1)), groups.attn_tp)
        disabled = not is_allocation_symmetric(groups.tp)
        assert (
            use_symmetric_memory(groups.tp, "reduced", op="all_reduce", disabled=disabled) is None
        )
        assert groups.arena.find(get_global_dp_buffer(groups.tp, (3, 8), ROW)) is None
        all_reduce(ROW.clone(), groups.tp)
        return paths(groups)

    for seen in run_with_arena(DP_ATTENTION, body):
        assert seen == [
            ("attn_tp", "all_reduce", "symmetric", ""),
            ("tp", "all_reduce", "chosen", "uneven_rows"),
        ]


def test_a_gathers_input_is_copied_to_its_slot_and_that_is_noted():
    def body(rank, groups):
        gathered = all_gather_rows(ROW * rank, groups.tp)
        shared = reduce_scatter_rows(gathered * 1.0, groups.attn_tp)
        assert gathered[:, 0].tolist() == [0.0, 1.0, 2.0, 3.0]
        assert shared.shape == (2, 8)
        return paths(groups)

    assert run_with_arena(DP_ATTENTION, body) == [
        [("tp", "all_gather", "symmetric", "copied"),
         ("attn_tp", "reduce_scatter", "symmetric", "copied")]
    ] * 4  # fmt: skip


@pytest.mark.row("S12")
def test_a_gather_or_scatter_in_place_is_refused():
    def body(rank, groups):
        whole = in_slot(groups.tp, ROW.repeat(2, 1))
        mine = whole[rank : rank + 1]
        with pytest.raises(ValueError, match=r"all_gather over tp .* overlap: in place"):
            all_gather_rows(mine, groups.tp, out=whole)
        with pytest.raises(ValueError, match=r"reduce_scatter over tp .* overlap: in place"):
            reduce_scatter_rows(whole, groups.tp, out=mine)
        return groups.ledger.num_collectives

    assert run_with_arena(TWO, body) == [0, 0]


def test_what_has_no_symmetric_kernel_is_chosen():
    def body(rank, groups):
        all_reduce(torch.ones(2, dtype=torch.int64), groups.tp)
        all_reduce(torch.ones(2, dtype=torch.float64), groups.tp)
        all_to_all_rows(torch.ones(2, 3), groups.tp)
        all_reduce(torch.ones(0, 8), groups.tp)
        return [(path, reason) for _, _, path, reason in paths(groups)]

    assert run_with_arena(TWO, body)[0] == [
        ("chosen", "dtype"),
        ("chosen", "dtype"),
        ("chosen", "no_kernel"),
        ("chosen", "empty"),
    ]


def test_a_group_over_nodes_uses_ordinary_memory_by_choice():
    layout = Layout(tp_size=4, dp_size=2, enable_dp_attention=True, ranks_per_node=2)

    def body(rank, groups):
        assert use_symmetric_memory(groups.tp, "reduced", op="all_reduce") is None
        all_reduce(ROW.clone(), groups.tp)
        all_reduce(in_slot(groups.attn_tp, ROW), groups.attn_tp)
        return paths(groups)

    assert run_with_arena(layout, body)[0] == [
        ("tp", "all_reduce", "chosen", "spans_nodes"),
        ("attn_tp", "all_reduce", "symmetric", ""),
    ]


def test_a_size_that_is_measured_to_be_quicker_elsewhere_is_put_there():
    def body(rank, groups):
        open_arena(groups, TWO)
        table = SumTable((32, 64), {"ring": (9.0, 9.0), "symmetric": (3.0, 11.0)})
        groups.tp.sums.open(table, None)
        memory = use_symmetric_memory(groups.tp, "reduced", op="all_reduce")
        all_reduce(memory.empty((1, 8), ROW), groups.tp)
        all_reduce(memory.empty((2, 8), ROW), groups.tp)
        return [(path, reason) for _, _, path, reason in paths(groups)]

    assert run_thread_world(TWO, body)[0] == [("symmetric", ""), ("chosen", "measured")]


def test_the_table_of_sides_asks_for_both_where_nothing_is_measured():
    for op in ("all_reduce", "all_gather", "reduce_scatter"):
        assert required_sides(op, (2, 28)) == BOTH
        assert required_sides(op, (2, 99)) == BOTH


@pytest.mark.row("S12")
def test_another_offset_on_one_rank_shows_in_the_ledger():
    def body(rank, groups):
        if rank == 1:
            groups.arena.place = lambda slot: slot.offset + 512
        all_reduce(in_slot(groups.tp, ROW), groups.tp)
        return groups.ledger.take()

    first, second = run_with_arena(TWO, body, is_strict=False)
    assert first != second
    with pytest.raises(SymmetryError, match=r"begins 512 bytes inside slot reduced\.tp"):
        run_with_arena(TWO, body)


@pytest.mark.row("S12")
def test_offsets_that_are_wrong_on_all_ranks_are_compared_too():
    def body(rank, groups):
        groups.arena.place = lambda slot: slot.offset + 512 * (1 + rank * shift)
        all_reduce(in_slot(groups.tp, ROW), groups.tp)
        return groups.ledger.take()

    digests = {}
    for shift in (0, 1):
        digests[shift] = run_with_arena(TWO, body, is_strict=False)
    assert digests[0][0] == digests[0][1]
    assert digests[1][0] != digests[1][1]


@pytest.mark.row("S12")
def test_a_graphs_collectives_are_recorded_at_capture_and_counted_at_replay():
    def body(rank, groups):
        all_reduce(in_slot(groups.tp, ROW), groups.tp)
        eager = groups.ledger.take()
        all_reduce(in_slot(groups.tp, ROW), groups.tp)
        captured = groups.ledger.cut()
        groups.ledger.replay(captured)
        assert groups.ledger.take() == eager
        groups.ledger.replay(captured)
        groups.ledger.take()
        return sum(groups.ledger.counts.values())

    assert run_with_arena(TWO, body) == [3, 3]


def test_replicas_with_other_rows_differ_in_their_own_half_alone():
    def body(rank, groups):
        all_reduce(torch.ones(1 + rank // 2, 4), groups.attn_tp)
        all_reduce(torch.ones(3, 4), groups.tp)
        return groups.ledger.take()

    digests = run_thread_world(DP_ATTENTION, body)
    assert len({digest[:16] for digest in digests}) == 1
    assert digests[0] == digests[1] != digests[2] == digests[3]


def test_a_skipped_collective_shows_in_the_half_it_belongs_to():
    full, own, shared = Ledger(), Ledger(), Ledger()
    for ledger in (full, own, shared):
        if ledger is not own:
            ledger.record(Call("all_reduce", "attn_tp", (1,)))
        if ledger is not shared:
            ledger.record(Call("all_reduce", "tp", (1,), is_shared=True))
    whole, without_own, without_shared = (each.take() for each in (full, own, shared))
    assert (without_own[:16] == whole[:16], without_own[16:] == whole[16:]) == (True, False)
    assert (without_shared[:16] == whole[:16], without_shared[16:] == whole[16:]) == (False, True)


@pytest.mark.row("S5", "S12")
def test_ten_thousand_mixed_steps_register_nothing_and_agree_on_every_offset():
    num_steps = 10_000
    rng = random.Random(0)
    kinds = [
        (rng.random() < 0.3, tuple(rng.randrange(1, 5) for _ in range(2))) for _ in range(40)
    ]  # (uneven, rows of the replicas)
    order = [rng.randrange(len(kinds)) for _ in range(num_steps)]

    def body(rank, groups):
        place = rank // 2
        before = groups.arena.num_registrations
        digests, num_wrong = [], 0
        for index in order:
            uneven, rows = kinds[index]
            rows = rows if uneven else (max(rows),) * 2
            groups.arena.rows_are_even = len(set(rows)) == 1
            for group, count in ((groups.attn_tp, rows[place]), (groups.tp, sum(rows))):
                gate = not is_allocation_symmetric(group)
                memory = use_symmetric_memory(group, "reduced", op="all_reduce", disabled=gate)
                x = ROW.new_empty(count, 8) if memory is None else memory.empty((count, 8), ROW)
                num_wrong += not torch.equal(
                    all_reduce(x.fill_(1.0), group), torch.full_like(x, group.size)
                )
                del x
            digests.append(groups.ledger.take())
        assert groups.arena.num_registrations == before
        assert num_wrong == 0
        return digests, groups.ledger.counts

    results = run_with_arena(DP_ATTENTION, body, time_limit_s=110)
    for digests, counts in results:
        assert [d[:16] for d in digests] == [d[:16] for d in results[0][0]]
        assert sum(counts.values()) == 2 * num_steps
        assert not [key for key in counts if key[2] == "fallback"]
        assert counts["attn_tp", "all_reduce", "symmetric", ""] == num_steps
    assert results[0][0] == results[1][0]
    assert results[2][0] == results[3][0]


def test_a_rank_that_leaves_one_out_is_found_by_its_digest():
    def body(rank, groups):
        both_are_here.wait(60)
        if rank == 0:
            all_reduce(ROW.clone(), groups.tp)
        return groups.ledger.take()

    both_are_here = threading.Barrier(2)
    with pytest.raises(Desync, match=r"ranks \[1\] did not come"):
        run_thread_world(TWO, body, time_limit_s=1.0)
