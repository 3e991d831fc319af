"""Models over attention replicas: padding that holds anything, the idle, and who sums where."""

import itertools
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from parallel.collectives import all_reduce
from parallel.dp_attention import Activation, RowCounts, RowSplit
from parallel.groups import build_groups, single_rank_groups
from parallel.layout import Layout
from parallel.padding import pad_rows
from parallel.plan import PlanError, PlanSettings, Rows, compile_plan
from parallel.thread_world import run_thread_world
from tests.workers.exact import part_of, sparse_config
from tests.workers.layers.tiny import CONFIG, latent_of
from tests.workers.reference import DenseAttention
from workers.architectures import ARCHITECTURES, layers_of
from workers.batch import ForwardBatch
from workers.layers.attention import SelfAttention
from workers.layers.build import Build
from workers.layers.linear import RowParallelLinear
from workers.layers.mlp import GatedMLP
from workers.layers.moe import ExpertNames, FusedExpertNames, SoftmaxRouter, SparseMLP
from workers.models import MODELS, build_model, layout_of
from workers.weights import dummy_weights

CPU = torch.device("cpu")
PAD_ID = 36
"""An id that no request uses, so its embedding can be anything."""
PADS = {"zero": 0.0, "nan": float("nan"), "inf": float("inf"), "random": None}
FLOATS = replace(
    sparse_config((0,), 3), tie_word_embeddings=False, initializer_range=0.3, rms_norm_eps=1e-6
)


def model_with_pads(groups, settings, value):
    """Random weights; padding's embedding is `value`, or drawn anew."""
    model = build_model(FLOATS, groups, CPU, torch.float32, settings)
    dummy_weights(model, seed=3)
    vocab = model._embed._vocab
    if vocab.take.start <= PAD_ID < vocab.take.stop:
        row_D = vocab.weight_VD[PAD_ID - vocab.take.start]
        row_D.copy_(torch.randn(len(row_D)) if value is None else torch.full_like(row_D, value))
    return model


def tokens_of(replica: int, count: int) -> list[int]:
    return [(7 * replica + 5 * i) % PAD_ID for i in range(count)]


def batch(replica: int, counts: RowCounts | None, count: int, num_rows: int) -> ForwardBatch:
    ids = tokens_of(replica, count) + [PAD_ID] * (num_rows - count)
    return ForwardBatch(
        input_ids_T=torch.tensor(ids, dtype=torch.int64),
        positions_T=torch.arange(count),
        logit_rows_R=torch.arange(count),
        attention=DenseAttention([count]),
        counts=counts,
    )


def alone(replica: int, count: int) -> torch.Tensor:
    model = model_with_pads(single_rank_groups(), PlanSettings(), 0.0)
    with torch.inference_mode():
        return model.logits(model.forward(batch(replica, None, count, count)))


def idle_steps(dp: int, row_multiple: int) -> Iterator[RowCounts]:
    """Every subset of idle replicas but all; both modes; more padding than there need be."""
    for busy in itertools.product((False, True), repeat=dp):
        if not any(busy):
            continue
        num_real = tuple(3 + replica if here else 0 for replica, here in enumerate(busy))
        for mode in ("max_len", "sum_len"):
            padded = pad_rows(num_real, has_prompts=False, row_multiple=row_multiple, mode=mode)
            more = tuple(rows + 2 * row_multiple for rows in padded.rows)
            yield RowCounts(num_real, more, num_real)


COMBINATIONS = [
    (Layout(tp_size=4, dp_size=2, enable_dp_attention=True, ep_size=2), PlanSettings()),
    (Layout(tp_size=4, dp_size=4, enable_dp_attention=True, ep_size=4), PlanSettings(True)),
    (
        Layout(tp_size=4, dp_size=2, enable_dp_attention=True, ep_size=4, moe_dense_tp_size=2),
        PlanSettings(False, "torch"),
    ),
    (
        Layout(tp_size=4, dp_size=2, enable_dp_attention=True, ep_size=4, moe_dense_tp_size=1),
        PlanSettings(True, "torch", True),
    ),
    (Layout(tp_size=4, attn_cp_size=4, ep_size=2), PlanSettings()),
    (
        Layout(tp_size=8, dp_size=2, enable_dp_attention=True, attn_cp_size=2, ep_size=8),
        PlanSettings(False, "torch"),
    ),
]


@pytest.mark.row("S7")
@pytest.mark.row("S10")
@pytest.mark.row("S11")
@pytest.mark.parametrize(("layout", "settings"), COMBINATIONS)
def test_what_padding_holds_reaches_no_live_row(layout, settings):
    plan = compile_plan(layout, settings, layers_of(FLOATS))
    steps = list(idle_steps(layout.dp_size, plan.row_multiple))

    def body(rank, groups):
        replica = groups.attn_dp.rank
        models = {kind: model_with_pads(groups, settings, value) for kind, value in PADS.items()}
        for counts in steps:
            logits = {}
            for kind, model in models.items():
                count = counts.num_real[replica]
                ids = tokens_of(replica, count)
                here = part_of([ids], counts, groups, PAD_ID, DenseAttention)
                hidden = here.all_rows(model.forward(here.batch), count)
                logits[kind] = model.logits(hidden, counts.num_logit_rows)
            for kind in PADS:
                assert torch.equal(logits[kind], logits["zero"]), (kind, counts)
            if counts.num_real[replica]:
                expected = alone(replica, counts.num_real[replica])
                torch.testing.assert_close(logits["zero"], expected, atol=1e-5, rtol=1e-5)
        return {kind: model.expert_loads() for kind, model in models.items()}

    with torch.inference_mode():
        for loads in run_thread_world(layout, body):
            for kind, layer in itertools.product(PADS, (1, 2)):
                assert torch.equal(loads[kind][layer], loads["zero"][layer])


@pytest.mark.row("S11")
def test_experts_are_counted_once_for_every_token_that_chose_them():
    layout = Layout(tp_size=4, dp_size=2, enable_dp_attention=True, ep_size=4)
    counts = RowCounts((5, 3), (8, 8), (5, 3))

    def body(backend):
        def run(rank, groups):
            replica = groups.attn_dp.rank
            model = model_with_pads(groups, PlanSettings(False, backend), 0.0)
            model.forward(batch(replica, counts, counts.num_real[replica], 8))
            return model.expert_loads()

        return run

    everywhere = run_thread_world(layout, body("none"))
    scattered = run_thread_world(layout, body("torch"))
    for layer in (1, 2):
        assert everywhere[0][layer].sum() == 2 * (5 + 3)
        assert all(torch.equal(loads[layer], everywhere[0][layer]) for loads in everywhere)
        assert torch.equal(sum(loads[layer] for loads in scattered), everywhere[0][layer])


@pytest.mark.row("S10")
def test_a_step_that_hides_its_row_counts_is_refused():
    layout = Layout(tp_size=2, dp_size=2, enable_dp_attention=True)

    def body(rank, groups):
        model = model_with_pads(groups, PlanSettings(), 0.0)
        with pytest.raises(PlanError, match="must say how many rows each has"):
            model.forward(batch(rank, None, 2, 2))
        with pytest.raises(PlanError, match="a step does not say how many rows each has"):
            model.logits(torch.zeros(1, FLOATS.hidden_size))

    run_thread_world(layout, body)


def row_parallel_layers(part: object, seen: set[int]) -> Iterator[RowParallelLinear]:
    """All of them that can be reached from a model."""
    if id(part) in seen or isinstance(part, torch.Tensor):
        return
    seen.add(id(part))
    if isinstance(part, RowParallelLinear):
        yield part
    elif isinstance(part, (list, tuple)):
        for each in part:
            yield from row_parallel_layers(each, seen)
    elif type(part).__module__.startswith("workers."):
        for each in vars(part).values() if hasattr(part, "__dict__") else ():
            yield from row_parallel_layers(each, seen)


PLACED = [
    Layout(tp_size=4),
    Layout(tp_size=4, dp_size=2, enable_dp_attention=True),
    Layout(tp_size=4, dp_size=2, enable_dp_attention=True, moe_dense_tp_size=2),
    Layout(tp_size=4, dp_size=2, enable_dp_attention=True, moe_dense_tp_size=1),
    Layout(tp_size=4, dp_size=4, enable_dp_attention=True),
]


@pytest.mark.row("S3")
@pytest.mark.parametrize("layout", PLACED)
@pytest.mark.parametrize("architecture", MODELS)
def test_every_row_parallel_layer_sums_over_the_plans_group(architecture, layout):
    moe = FLOATS.moe if "Moe" in architecture or "Deepseek" in architecture else None
    if "Mixtral" in architecture:
        moe = replace(FLOATS.moe, dense_layers=frozenset())
    latent = latent_of(architecture)
    if latent is not None:
        moe = replace(FLOATS.moe, norm_topk_prob=False, shared_size=16)
    config = replace(CONFIG, architecture=architecture, num_layers=3, moe=moe, latent=latent)
    plan = compile_plan(layout, PlanSettings(), layers_of(config))
    assert len(plan.boundaries) == 7
    groups = build_groups(layout, 3, lambda members: None)
    model = build_model(config, groups, CPU, torch.float32)
    for number, layer in enumerate(model._layers):
        attention = list(row_parallel_layers(layer._attention, set()))
        assert [one.group.members for one in attention] == [groups.attn_tp.members]
        dense = list(row_parallel_layers(layer.mlp, set()))
        place = plan.mlps[number]
        assert len(dense) == (1 if latent or not layers_of(config).sparse[number] else 0)
        for one in dense:
            assert one.place == place
            assert one.group.size == len(layout.members(place.group, 3) if place.group else [3])
            within = place.rows is Rows.TP_ATTN_FULL and place.group == "attn_tp"
            assert one.use_dp_attention_reduce == within


@pytest.mark.row("S8")
def test_architectures_say_whether_attention_gathers_inside():
    assert set(ARCHITECTURES) == set(MODELS)
    settings = PlanSettings(disable_attn_tp_gather=True)
    for architecture, facts in ARCHITECTURES.items():
        layers = layers_of(replace(CONFIG, architecture=architecture))
        if facts.gathers_in_attention:
            assert compile_plan(Layout(tp_size=2), settings, layers).row_multiple == 1
        else:
            with pytest.raises(PlanError, match=f"{architecture} is none: leave it off"):
                compile_plan(Layout(tp_size=2), settings, layers)


@pytest.mark.row("S8")
@pytest.mark.parametrize(("inside", "expected"), [(False, 4), (True, 1)])
def test_a_lone_decode_is_one_row_to_attention_if_it_gathers_inside(inside, expected, monkeypatch):
    layout = Layout(tp_size=4, ep_size=4, moe_dense_tp_size=1)
    settings = PlanSettings(False, "torch", inside)
    row_multiple = compile_plan(layout, settings, layers_of(FLOATS)).row_multiple
    counts = RowCounts((1,), (row_multiple,), (1,))
    seen: list[int] = []
    forward = SelfAttention._attend

    def spy(self, x_TD, *others):
        seen.append(x_TD.shape[0])
        return forward(self, x_TD, *others)

    whole = alone(0, 1)
    monkeypatch.setattr(SelfAttention, "_attend", spy)

    def body(rank, groups):
        model = model_with_pads(groups, settings, 0.0)
        return model.logits(model.forward(batch(0, counts, 1, row_multiple))[:1])

    for logits in run_thread_world(layout, body):
        torch.testing.assert_close(logits, whole, atol=1e-5, rtol=1e-5)
    assert set(seen) == {expected}


SHARED = [
    (Layout(tp_size=4, ep_size=2), PlanSettings()),
    (Layout(tp_size=4, dp_size=2, enable_dp_attention=True), PlanSettings()),
    (
        Layout(tp_size=4, dp_size=2, enable_dp_attention=True, ep_size=4),
        PlanSettings(False, "torch"),
    ),
]


@pytest.mark.row("S11")
@pytest.mark.parametrize(("layout", "settings"), SHARED)
def test_shared_experts_are_added_once_wherever_rows_are(layout, settings):
    x_TD = torch.randn(8, FLOATS.hidden_size, generator=torch.Generator().manual_seed(0))
    rows = (8 // layout.attn_dp_size,) * layout.attn_dp_size

    def summed(groups, settings):
        plan = compile_plan(layout_of(groups), settings, layers_of(FLOATS))
        build = Build(FLOATS, groups, CPU, torch.float32, plan)
        place = plan.mlps[1]
        layer = SparseMLP(
            build,
            FLOATS.moe,
            ExpertNames("r", "g{expert}", "u{expert}", "d{expert}"),
            FusedExpertNames("r", "gu", "d"),
            place=place,
            router=SoftmaxRouter(2, normalise=True),
            shared=GatedMLP(build, "shared", place=place, width=8),
        )
        dummy_weights(Weights(layer), seed=1)
        split = RowSplit(
            rows=rows if groups.tp.size > 1 else (8,),
            num_real=rows if groups.tp.size > 1 else (8,),
            attn_tp=groups.attn_tp.size,
            part=groups.attn_dp.rank,
            place=groups.attn_tp.rank,
        )
        here = {Rows.FULL: slice(None), Rows.TP_ATTN_FULL: split.own}
        mine = here.get(place.rows, split.share_in_all)
        out = layer.forward(Activation(x_TD[mine], place.rows), split)
        owed = out.owed
        whole = out.tensor if owed is None else all_reduce(out.tensor.clone(), owed)
        return mine, whole

    _, expected = summed(single_rank_groups(), PlanSettings())
    for mine, out in run_thread_world(layout, lambda rank, groups: summed(groups, settings)):
        torch.testing.assert_close(out, expected[mine], atol=1e-5, rtol=1e-5)


class Weights:
    """A layer, for the filler of random weights."""

    architecture, initializer_range, unused_weights = "test", 0.3, ()

    def __init__(self, layer) -> None:
        self.sources = layer.sources
