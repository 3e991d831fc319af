"""The arena: slots from the configuration alone, registered once, nothing after ready."""

import threading
import time
from itertools import product

import pytest
import torch

from parallel.arena import (
    ALIGNMENT,
    Arena,
    ArenaTooSmall,
    ModelSizes,
    Need,
    SymmetryError,
    distinct_transports,
    lay_out,
    logit_needs,
    model_needs,
    within,
)
from parallel.groups import build_groups
from parallel.layout import GROUP_NAMES, Layout, LayoutError
from parallel.thread_world import run_thread_world
from tests.parallel.arenas import DP_ATTENTION, ROLES, open_arena, run_with_arena

SIZES = ModelSizes(hidden_size=64, vocab_size=1000, itemsize=2, num_rows=100, num_logit_rows=8)
OPS = ("all_reduce", "all_gather", "reduce_scatter")


class FakeTransport:
    """Remembers what was asked of it, in a list that all share."""

    def __init__(self, name, log):
        self.name, self.log = name, log

    def allocate(self, num_bytes, device):
        from parallel.arena import Block

        return Block(torch.empty(num_bytes, dtype=torch.uint8))

    def warm(self, device):
        self.log.append(("warm", self.name))

    def register(self, block):
        self.log.append(("register", self.name))


def groups_with_log(layout, rank):
    log = []
    return build_groups(layout, rank, lambda members: FakeTransport(members, log)), log


def test_slots_follow_each_other_aligned_and_without_gaps():
    plan = lay_out([Need("reduced", (name,), 700) for name in GROUP_NAMES], DP_ATTENTION)
    end = 0
    for slot in plan.slots:
        assert slot.offset == end
        assert slot.offset % ALIGNMENT == 0
        assert slot.num_bytes == 1024
        end = slot.offset + slot.num_bytes
    assert plan.num_bytes == end


def test_groups_of_one_rank_get_no_slot():
    plan = lay_out([Need("reduced", (name,), 1) for name in GROUP_NAMES], Layout(tp_size=2))
    names = {name for slot in plan.slots for name in slot.groups}
    assert names == {"tp", "attn_tp", "moe_tp", "dense_tp"}
    assert lay_out([Need("reduced", ("tp",), 1)], Layout()).num_bytes == 0


def layouts():
    for tp, dp, cp, dp_attention in product((1, 2, 4, 8), (1, 2, 4), (1, 2), (False, True)):
        try:
            yield Layout(tp_size=tp, dp_size=dp, attn_cp_size=cp, enable_dp_attention=dp_attention)
        except LayoutError:
            continue


@pytest.mark.row("S5", "S6")
def test_the_slots_of_a_model_are_the_same_on_all_ranks_of_every_layout():
    for layout in layouts():
        wanted = [(op, name) for op in OPS for name in ("attn_tp", "tp")]
        needs = model_needs(layout, SIZES, wanted) + logit_needs(
            layout, SIZES, spans_replicas=False
        )
        assert lay_out(needs, layout) == lay_out(list(needs), layout)
        for slot in lay_out(needs, layout).slots:
            for name in slot.groups:
                sizes = {len(layout.members(name, rank)) for rank in range(layout.world_size)}
                assert len(sizes) == 1


def test_a_replicas_slot_holds_its_rows_and_a_shared_one_all_replicas_rows():
    needs = model_needs(DP_ATTENTION, SIZES, [("all_reduce", "attn_tp"), ("all_gather", "tp")])
    by_name = {slot.name: slot.num_bytes for slot in lay_out(needs, DP_ATTENTION).slots}
    row = SIZES.hidden_size * SIZES.itemsize
    assert by_name == {
        "embedded.attn_tp": 100 * row,
        "reduced.attn_tp": 100 * row,
        "gather_in.tp": 50 * row + 256,  # rounded up to 512 bytes
        "global_dp.tp": 200 * row,
    }


def test_the_logits_have_their_own_slots():
    layout = Layout(tp_size=2)
    by_name = {
        slot.name: slot.num_bytes
        for slot in lay_out(logit_needs(layout, SIZES, spans_replicas=False), layout).slots
    }
    assert by_name == {"logits.attn_tp": 16384, "all_logits.attn_tp": 32256}


@pytest.mark.row("S6")
def test_a_need_over_the_cap_is_refused_with_both_numbers():
    plan = lay_out(
        [Need("reduced", ("tp",), 5 * 2**30), Need("logits", ("tp",), 1)], Layout(tp_size=2)
    )
    plan.check_cap(5.1)
    with pytest.raises(ArenaTooSmall) as refusal:
        plan.check_cap(4.0)
    assert str(refusal.value) == (
        "collectives need 5.00 GiB of symmetric memory (the largest slot, reduced.tp, 5.00 GiB) "
        "and symm_mem_prealloc_gb=4: raise it, or lower max_num_batched_tokens"
    )


@pytest.mark.row("S1")
def test_every_communicator_is_warmed_then_registered_once_in_one_order_on_all_ranks():
    layout = Layout(tp_size=8, dp_size=2, enable_dp_attention=True, ep_size=2, attn_cp_size=2)
    orders = []
    for rank in range(8):
        groups, log = groups_with_log(layout, rank)
        open_arena(groups, layout)
        mine = {group.members for group in groups.by_name().values() if group.size > 1}
        assert {members for what, members in log if what == "register"} == mine
        assert log == [
            (what, members)
            for _, transport in distinct_transports(groups.by_name())
            for members in (transport.name,)
            for what in ("warm", "register")
        ]
        names = [name for name, _ in distinct_transports(groups.by_name())]
        orders.append(names)
        assert groups.arena.num_registrations == len(mine)
    assert len({tuple(order) for order in orders}) == 1
    # moe_ep has the members of attn_dp here, and so its communicator.
    assert orders[0] == ["tp", "attn_tp", "attn_cp", "attn_dp", "moe_tp"]


@pytest.mark.row("S1")
def test_a_communicator_that_spans_nodes_is_left_out():
    layout = Layout(tp_size=4, dp_size=2, enable_dp_attention=True, ranks_per_node=2)
    groups, log = groups_with_log(layout, 1)
    open_arena(groups, layout)
    assert [members for what, members in log if what == "register"] == [(0, 1)]


@pytest.mark.row("S5")
def test_after_ready_nothing_is_allocated_or_registered():
    groups, log = groups_with_log(DP_ATTENTION, 0)
    open_arena(groups, DP_ATTENTION)
    groups.arena.seal()
    before = list(log)
    with pytest.raises(SymmetryError, match="was to be registered after the rank was ready"):
        groups.arena.register(groups.tp.transport)
    with pytest.raises(SymmetryError, match="was to be allocated after the rank was ready"):
        open_arena(groups, DP_ATTENTION)
    assert log == before


@pytest.mark.row("S5")
def test_an_engine_without_symmetric_memory_cannot_begin_it_after_ready():
    groups, log = groups_with_log(DP_ATTENTION, 0)
    groups.arena.seal()
    with pytest.raises(SymmetryError, match="after the rank was ready"):
        open_arena(groups, DP_ATTENTION)
    assert log == []


@pytest.mark.row("S12")
def test_inside_a_capture_nothing_is_allocated_or_registered(monkeypatch):
    groups, log = groups_with_log(DP_ATTENTION, 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(SymmetryError, match="was to be allocated inside the capture"):
        open_arena(groups, DP_ATTENTION)
    with pytest.raises(SymmetryError, match="was to be registered inside the capture"):
        groups.arena.register(groups.tp.transport)
    assert log == []


def test_an_arena_is_opened_once():
    groups, _ = groups_with_log(DP_ATTENTION, 0)
    open_arena(groups, DP_ATTENTION)
    with pytest.raises(SymmetryError, match="allocated once"):
        open_arena(groups, DP_ATTENTION)


def test_a_rank_alone_has_no_arena():
    groups, _ = groups_with_log(Layout(), 0)
    open_arena(groups, Layout())
    assert not groups.arena.is_open


@pytest.mark.row("S5")
def test_all_ranks_hand_out_the_same_offsets():
    def body(rank, groups):
        offsets = {}
        for role in ROLES:
            for name, group in groups.by_name().items():
                taken = groups.arena.take(role, group, (3, 5), torch.float32)
                if taken is not None:
                    offsets[role, name] = groups.arena.find(taken)
        return offsets

    first, *others = run_with_arena(DP_ATTENTION, body)
    assert len(first) == 5 * len(ROLES)
    assert all(other == first for other in others)


def test_a_slot_is_a_tensor_of_the_asked_shape_and_type():
    groups, _ = groups_with_log(DP_ATTENTION, 0)
    open_arena(groups, DP_ATTENTION)
    for shape, dtype in [((4, 8), torch.float32), ((7,), torch.bfloat16), ((0, 3), torch.int64)]:
        x = groups.arena.take("reduced", groups.tp, shape, dtype)
        assert (x.shape, x.dtype, x.is_contiguous()) == (shape, dtype, True)
        del x
    x = groups.arena.take("reduced", groups.tp, (1024,), torch.float32).fill_(1)
    y = groups.arena.take("reduced", groups.attn_tp, (1024,), torch.float32).fill_(2)
    assert (x.unique().tolist(), y.unique().tolist()) == ([1.0], [2.0])


def test_more_than_the_slot_holds_is_an_error():
    groups, _ = groups_with_log(DP_ATTENTION, 0)
    open_arena(groups, DP_ATTENTION)
    with pytest.raises(SymmetryError, match=r"are 4100 bytes and the slot reduced\.tp has 4096"):
        groups.arena.take("reduced", groups.tp, (1025,), torch.float32)


def test_a_registration_that_peers_do_not_join_ends_at_its_deadline():
    forever = threading.Event()
    start = time.monotonic()
    with pytest.raises(SymmetryError, match=r"registering on tp was not done within 0\.1 s"):
        within(0.1, forever.wait, "registering on tp", torch.device("cpu"))
    assert time.monotonic() - start < 20
    forever.set()


def test_a_registration_that_fails_says_why():
    def fail():
        raise ValueError("no such memory")

    with pytest.raises(ValueError, match="no such memory"):
        within(5, fail, "registering", torch.device("cpu"))


def test_a_rank_that_does_not_open_its_arena_is_named():
    def body(rank, groups):
        all_are_here.wait(60)
        if rank != 3:
            open_arena(groups, DP_ATTENTION)

    all_are_here = threading.Barrier(4)
    with pytest.raises(Exception, match=r"ranks \[3\] did not come"):
        run_thread_world(DP_ATTENTION, body, time_limit_s=1.0)


def test_a_closed_arena_knows_no_place():
    assert Arena().find(torch.ones(3)) is None
