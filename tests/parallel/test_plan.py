"""What follows from layouts: collectives of every boundary, padding, and what a step must know."""

import itertools
from typing import NamedTuple

import pytest

from parallel.layout import Layout
from parallel.plan import ModelLayers, Plan, PlanError, PlanSettings, Rows, compile_plan

S, T, F = Rows.SCATTERED, Rows.TP_ATTN_FULL, Rows.FULL
MIXED = ModelLayers("Mixed", sparse=(False, True, True, False), gathers_in_attention=True)
DENSE = ModelLayers("Dense", sparse=(False, False))


def plan_of(model=MIXED, *, a2a=False, dp_lm_head=False, disable=False, **sizes) -> Plan:
    sizes.setdefault("enable_dp_attention", sizes.get("dp_size", 1) > 1)
    if a2a:
        sizes.setdefault("ep_size", sizes["tp_size"])
    settings = PlanSettings(dp_lm_head, "torch" if a2a else "none", disable)
    return compile_plan(Layout(**sizes), settings, model)


def said(plan: Plan, index: int) -> list[str]:
    """Collectives of a boundary: 2i into attention of layer i, 2i + 1 into its MLP."""
    return [str(one) for one in plan.boundaries[index].collectives]


@pytest.mark.row("S14")
def test_one_rank_needs_nothing():
    assert plan_of(tp_size=1).collectives == ()


@pytest.mark.row("S14")
def test_plain_tensor_parallelism_is_one_sum_behind_each_half():
    plan = plan_of(DENSE, tp_size=4)
    assert [said(plan, i) for i in range(5)] == [
        [], ["all_reduce over attn_tp"], ["all_reduce over tp"], ["all_reduce over attn_tp"],
        ["all_reduce over tp"],
    ]  # fmt: skip
    assert (plan.row_multiple, plan.crosses_replicas, plan.require_mlp_sync) == (1, False, False)


@pytest.mark.row("S10")
def test_replicas_gather_their_rows_for_the_mlp_and_get_them_back():
    plan = plan_of(DENSE, tp_size=8, dp_size=2)
    assert said(plan, 1) == ["reduce_scatter over attn_tp", "all_gather over tp"]
    assert said(plan, 2) == ["reduce_scatter over tp", "all_gather over attn_tp"]
    assert said(plan, 4) == said(plan, 2)
    whole = plan_of(DENSE, tp_size=8, dp_size=8)
    assert said(whole, 1) == ["all_gather over tp"]
    assert said(whole, 2) == ["reduce_scatter over tp"]


@pytest.mark.row("S7")
def test_parts_of_a_replica_are_to_the_rest_of_a_model_what_replicas_are():
    for dp, cp, model in itertools.product((1, 2), (2, 4), (DENSE, MIXED)):
        parts = plan_of(model, tp_size=8, dp_size=dp, attn_cp_size=cp)
        replicas = plan_of(model, tp_size=8, dp_size=dp * cp)
        assert parts.boundaries == replicas.boundaries
        assert parts.mlps == replicas.mlps
        inside = [stage for stage in parts.stages() if stage.where == "attention"]
        assert {str(one) for stage in inside for one in stage.collectives} == {
            "all_gather over attn_cp"
        }
        assert parts.row_multiple == cp * replicas.row_multiple
        assert parts.crosses_replicas == (dp > 1)


@pytest.mark.row("S7")
def test_a_head_has_the_rows_of_all_parts_and_is_split_over_those_that_have_them():
    def logits(**settings):
        plan = plan_of(DENSE, tp_size=8, **settings)
        return plan.head, [str(one) for one in list(plan.stages())[-1].collectives]

    first = "all_gather over attn_cp"
    assert logits(attn_cp_size=2) == ((T, "tp"), [first, "all_gather over tp"])
    assert logits(attn_cp_size=2, dp_size=2) == (
        (F, "tp"), [first, "all_gather over attn_dp", "all_to_all over tp"]
    )  # fmt: skip
    assert logits(attn_cp_size=2, dp_size=2, dp_lm_head=True) == (
        (T, "attn_tp"), [first, "all_gather over attn_tp"]
    )  # fmt: skip
    assert logits(attn_cp_size=4, dp_size=2, dp_lm_head=True) == ((T, None), [first])


@pytest.mark.row("S8")
def test_attention_that_gathers_inside_pads_rows_to_the_parts_alone():
    sparse = ModelLayers("Sparse", sparse=(True, True), gathers_in_attention=True)
    plan = plan_of(sparse, tp_size=8, attn_cp_size=2, a2a=True, disable=True)
    assert (plan.row_multiple, plan.require_attn_tp_gather) == (2, False)
    inside = next(stage for stage in plan.stages() if stage.where == "attention")
    assert [str(one) for one in inside.collectives] == [
        "all_gather over attn_tp", "all_gather over attn_cp", "reduce_scatter over attn_tp"
    ]  # fmt: skip


@pytest.mark.row("S9")
def test_dense_layers_on_the_attention_group_keep_rows_and_stream_as_they_are():
    plan = plan_of(DENSE, tp_size=8, dp_size=2, moe_dense_tp_size=4, dp_lm_head=True)
    for layer in range(2):
        boundary = plan.into_mlp(layer)
        assert said(plan, 2 * layer + 1) == ["all_reduce over attn_tp"]
        assert (boundary.residual, boundary.widen.target, boundary.spread.target) == (T, T, T)
    assert not plan.crosses_replicas
    assert plan.row_multiple == 1


@pytest.mark.row("S9")
def test_plans_that_differ_anywhere_have_different_digests():
    dense = ModelLayers("LlamaForCausalLM", sparse=(False, False))
    layout = Layout(tp_size=4, dp_size=2, enable_dp_attention=True)
    mixed = dense._replace(sparse=(False, True))
    plans = [
        compile_plan(layout, PlanSettings(), dense),
        compile_plan(layout, PlanSettings(), mixed),
        compile_plan(layout, PlanSettings(enable_dp_lm_head=True), dense),
        compile_plan(Layout(tp_size=4), PlanSettings(), dense),
    ]
    assert len({plan.digest for plan in plans}) == 4
    assert compile_plan(layout, PlanSettings(), dense).digest == plans[0].digest


def test_unset_and_tp_size_are_the_same_plan():
    for dp, a2a in itertools.product((1, 2, 8), (False, True)):
        unset = plan_of(tp_size=8, dp_size=dp, a2a=a2a)
        named = plan_of(tp_size=8, dp_size=dp, a2a=a2a, moe_dense_tp_size=8)
        assert unset.boundaries == named.boundaries


@pytest.mark.row("S9")
def test_dense_layers_on_one_rank_take_scattered_rows():
    plan = plan_of(DENSE, tp_size=4, moe_dense_tp_size=1)
    assert said(plan, 1) == ["reduce_scatter over attn_tp"]
    assert said(plan, 2) == ["all_gather over attn_tp"]
    assert plan.row_multiple == 4


@pytest.mark.row("S14")
def test_a_stream_that_the_next_mlp_wants_whole_is_gathered_instead_of_its_norm():
    plan = plan_of(tp_size=8, dp_size=2, moe_dense_tp_size=4)
    into_last = plan.into_attention(3)
    assert (into_last.collect.target, into_last.widen.target, into_last.spread.target) == (S, T, T)
    assert said(plan, 6) == ["reduce_scatter over tp", "all_gather over attn_tp"]
    into_second = plan.into_attention(2)
    assert (into_second.collect.target, into_second.widen.target) == (S, S)


@pytest.mark.row("S8")
def test_attention_that_gathers_inside_leaves_nothing_to_gather_between_layers():
    sparse = ModelLayers("Sparse", sparse=(True, True), gathers_in_attention=True)
    plan = plan_of(sparse, tp_size=8, dp_size=2, a2a=True, disable=True, dp_lm_head=True)
    assert [said(plan, i) for i in range(5)] == [[], [], [], [], ["all_gather over attn_tp"]]
    assert plan.attention.rows is S
    assert plan.row_multiple == 1
    assert not plan.require_attn_tp_gather
    assert not plan.require_gathered_buffer


@pytest.mark.row("S8")
def test_without_dp_attention_the_switch_leaves_no_sync_either():
    sparse = ModelLayers("Sparse", sparse=(True, True), gathers_in_attention=True)
    on = plan_of(sparse, tp_size=8, a2a=True)
    off = plan_of(sparse, tp_size=8, a2a=True, disable=True)
    assert (on.require_attn_tp_gather, on.require_mlp_sync, on.row_multiple) == (True, True, 8)
    assert (off.require_attn_tp_gather, off.require_mlp_sync, off.row_multiple) == (
        False, False, 1,
    )  # fmt: skip


ALL = [
    (model, tp, dp, dense, a2a, lm_head, disable)
    for model in (MIXED, MIXED._replace(sparse=(True, False, False, True)), DENSE)
    for tp, dp in ((1, 1), (2, 1), (2, 2), (8, 1), (8, 2), (8, 8))
    for dense in dict.fromkeys((None, 1, tp // dp, tp))
    for a2a, lm_head, disable in itertools.product((False, True), repeat=3)
    if (lm_head is False or dp > 1)
    and (model is not DENSE or not a2a)
    and (model.gathers_in_attention or not disable)
]


@pytest.mark.row("S14")
def test_layouts_join_and_every_sum_is_taken_once():
    for model, tp, dp, dense, a2a, lm_head, disable in ALL:
        plan = plan_of(
            model, tp_size=tp, dp_size=dp, moe_dense_tp_size=dense, a2a=a2a, dp_lm_head=lm_head,
            disable=disable,
        )  # fmt: skip
        residual, came = T, T
        for index, boundary in enumerate(plan.boundaries):
            moves = (boundary.collect, boundary.widen, boundary.spread)
            assert (boundary.residual, boundary.collect.source) == (residual, came)
            assert moves[0].target is moves[1].source
            assert moves[1].target is moves[2].source
            sums = [m for m in moves if m.op in ("all_reduce", "reduce_scatter")]
            assert [m.group for m in sums] == ([boundary.owed] if boundary.owed else [])
            residual, came = boundary.widen.target, boundary.spread.target
            layer, is_mlp = divmod(index, 2)
            if boundary is not plan.into_head:
                assert came is (plan.mlps[layer].rows if is_mlp else plan.attention.rows)
        assert came is T


@pytest.mark.row("S14")
def test_every_transition_between_two_layouts_occurs():
    seen = {
        (move.source, move.target, move.op)
        for model, tp, dp, dense, a2a, lm_head, disable in ALL
        for boundary in plan_of(
            model, tp_size=tp, dp_size=dp, moe_dense_tp_size=dense, a2a=a2a, dp_lm_head=lm_head,
            disable=disable,
        ).boundaries
        for move in (boundary.collect, boundary.widen, boundary.spread)
    }  # fmt: skip
    assert seen == {
        (S, S, None), (T, T, None),
        (T, T, "all_reduce"), (T, S, "reduce_scatter"), (T, S, None),
        (S, T, "all_gather"), (S, F, "all_gather"), (F, S, "reduce_scatter"),
        (T, F, "all_gather"), (F, T, "reduce_scatter"),
    }  # fmt: skip


class Line(NamedTuple):
    """A line of SGLang's table (its flags at tp_size 8) and what it says."""

    dp: int
    dense: int | None
    dp_lm_head: bool
    a2a: bool
    mlp: bool
    attn: bool
    buffer: bool
    sync: bool


def sglang(dp: int, dense: int | None, dp_lm_head: bool, a2a: bool, *, disable=False) -> Line:
    """Its predicates, as they are in the source."""
    dp_attention, tp = dp > 1, 8
    spared = dense is not None and dp_lm_head and a2a and dense <= tp // dp
    mlp = dp_attention and not spared
    attn = not disable and (a2a or dense is not None) and (dp < tp if dp_attention else True)
    return Line(dp, dense, dp_lm_head, a2a, mlp, attn, mlp or attn, dp_attention or mlp or attn)


def ours(dp: int, dense: int | None, dp_lm_head: bool, a2a: bool, *, disable=False) -> Line:
    plan = plan_of(
        tp_size=8, dp_size=dp, moe_dense_tp_size=dense, a2a=a2a, dp_lm_head=dp_lm_head,
        disable=disable,
    )  # fmt: skip
    return Line(
        dp, dense, dp_lm_head, a2a, plan.require_mlp_tp_gather, plan.require_attn_tp_gather,
        plan.require_gathered_buffer, plan.require_mlp_sync,
    )  # fmt: skip


LINES = [
    (dp, dense, dp_lm_head, a2a)
    for dp, dp_lm_head, a2a in itertools.product((1, 2, 8), (False, True), (False, True))
    for dense in (None, 1, 8, *((4,) if dp == 2 else ()))
    if dp > 1 or not dp_lm_head
]


def difference(dp: int, dense: int | None, a2a: bool) -> str | None:
    """Where the two differ on purpose, for a model with dense and sparse layers."""
    if dense == 8 and not a2a:
        return "tp_size means unset: naming it gathers nothing that was not gathered"
    if dense == 4 and not a2a:
        return "dense layers on the attention group reduce; no row is scattered or gathered"
    return None


@pytest.mark.row("S14")
@pytest.mark.parametrize("line", LINES, ids=str)
def test_predicates_are_sglangs_but_for_stated_differences(line):
    dp, dense, _, a2a = line
    theirs, mine = sglang(*line), ours(*line)
    if difference(dp, dense, a2a) is None:
        assert mine == theirs
    elif dp < 8:
        assert theirs.attn
        assert not mine.attn
        assert mine.mlp == theirs.mlp


@pytest.mark.row("S8")
@pytest.mark.parametrize("line", LINES, ids=str)
def test_with_the_switch_no_rows_are_gathered_for_attention(line):
    mine, theirs = ours(*line, disable=True), sglang(*line, disable=True)
    assert not mine.attn
    assert (mine.mlp, mine.buffer, mine.sync) == (theirs.mlp, theirs.buffer, theirs.sync)


@pytest.mark.row("S10")
def test_replicas_that_share_nothing_need_no_sync_where_sglang_has_one():
    plan = plan_of(DENSE, tp_size=8, dp_size=2, moe_dense_tp_size=4, dp_lm_head=True)
    assert not plan.require_mlp_sync
    assert sglang(2, 4, True, False).sync


REFUSED = [
    (
        MIXED,
        {"tp_size": 4, "dp_lm_head": True},
        "enable_dp_lm_head splits the head within attention replicas, and there is one without "
        "enable_dp_attention: set that too, or leave it off",
    ),
    (
        DENSE,
        {"tp_size": 4, "disable": True},
        "disable_attn_tp_gather is for models that gather and scatter rows inside attention, and "
        "Dense is none: leave it off",
    ),
    (
        DENSE,
        {"tp_size": 4, "a2a": True},
        "moe_a2a_backend=torch: Dense has no experts to send rows to",
    ),
    (
        DENSE,
        {"tp_size": 4, "ep_size": 2},
        "ep_size=2, moe_dp_size=1: Dense has no experts to place; set both to 1",
    ),
    (
        MIXED,
        {"tp_size": 4, "moe_dp_size": 2},
        "moe_dp_size=2: replicated experts take rows that are scattered, so moe_a2a_backend must "
        "be torch; or set moe_dp_size to 1",
    ),
    (
        MIXED,
        {"tp_size": 8, "a2a": True, "ep_size": 2, "moe_dp_size": 2},
        "moe_a2a_backend=torch sends rows to whole experts, and ep_size=2 x moe_dp_size=2 leaves "
        "each split over 2 ranks: set ep_size to 4",
    ),
]


@pytest.mark.row("S14")
@pytest.mark.parametrize(("model", "settings", "sentence"), REFUSED)
def test_what_has_no_plan_is_refused_with_a_sentence(model, settings, sentence):
    with pytest.raises(PlanError) as refusal:
        plan_of(model, **settings)
    assert str(refusal.value) == sentence
