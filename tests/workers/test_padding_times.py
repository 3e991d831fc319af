"""What ranks time of padding before they are ready: the same sizes, and nothing stays behind."""

import pytest
import torch

from parallel.padding_cost import PaddingCurves, slowest
from parallel.plan import Rows
from parallel.thread_world import run_thread_world
from workers import padding_times
from workers.architectures import plan_of
from workers.config import EngineConfig
from workers.padding_times import FEW, exchanges_of
from workers.runner import ModelRunner

pytestmark = pytest.mark.row("S10")

CPU = torch.device("cpu")
SIZES = {
    "page_size": 16, "max_num_seqs": 2, "max_num_batched_tokens": 80, "max_model_len": 64,
    "kv_cache_gb": 0.02, "device": "cpu",
}  # fmt: skip
DP2 = {"tp_size": 4, "dp_size": 2, "enable_dp_attention": True}
LAYOUTS = [
    DP2,
    {**DP2, "tp_size": 2},
    {**DP2, "attn_cp_size": 2, "ep_size": 2},
    {**DP2, "enable_symm_mem": True, "symm_mem_strict": True},
    {**DP2, "disable_attn_tp_gather": True, "enable_symm_mem": True, "symm_mem_strict": True},
]


def curves_of(**settings):
    """Each rank's, with what its ledger and arena hold afterwards."""
    config = EngineConfig(**SIZES, padding="auto", **settings)

    def body(rank, groups):
        runner = ModelRunner(config, config.layout, rank, groups, CPU, lambda *progress: None)
        ledger, arena = groups.ledger, groups.arena
        return runner.padding_curves, ledger.num_collectives, dict(ledger.counts), arena

    return run_thread_world(config.layout, body, time_limit_s=100)


@pytest.mark.parametrize("settings", LAYOUTS, ids=lambda settings: "-".join(settings))
def test_all_ranks_time_the_same_sizes_and_leave_no_trace_of_it(settings):
    every = curves_of(**settings)
    curves = slowest([one for one, *_ in every])
    assert isinstance(curves, PaddingCurves)
    tp = settings["tp_size"]
    most = 80 // (tp // 2)  # rows of a rank's share in the largest step of one of two replicas
    assert curves.rows[0] == FEW * tp
    assert curves.rows[-1] == most * tp
    assert list(curves.rows) == sorted(set(curves.rows))
    for figures in curves[1:]:
        assert len(figures) == len(curves.rows)
        assert all(0 < micros < 60e6 for micros in figures)
    for _, num_collectives, counts, arena in every:
        assert num_collectives == 0  # else the first step's digest would have them
        assert counts == {}
        assert arena.rows_are_even
        assert arena.is_open == bool(settings.get("enable_symm_mem"))


def test_sizes_that_would_take_too_long_are_left_out_by_all_ranks(monkeypatch):
    monkeypatch.setattr(padding_times, "LIMIT_S", 0.0)
    every = curves_of(**DP2)
    assert {one.rows for one, *_ in every} == {(4, 4 * 40)}


@pytest.mark.parametrize(
    ("settings", "padding"),
    [
        (DP2, "rule"),
        (DP2, "max_len"),
        ({"tp_size": 2}, "auto"),
        ({**DP2, "moe_dense_tp_size": 2, "moe_a2a_backend": "torch", "ep_size": 4}, "auto"),
    ],
)
def test_nothing_is_timed_where_nothing_hangs_on_it(settings, padding):
    config = EngineConfig(**SIZES, padding=padding, **settings)

    def body(rank, groups):
        runner = ModelRunner(config, config.layout, rank, groups, CPU, lambda *progress: None)
        return runner.padding_curves

    assert set(run_thread_world(config.layout, body)) == {None}


def test_a_plan_says_in_how_many_layers_rows_of_replicas_meet():
    def count(**settings):
        return exchanges_of(plan_of(EngineConfig(**settings)))

    plan = plan_of(EngineConfig(**DP2))
    assert count(**DP2) == len(plan.mlps) == 4
    assert all(mlp.rows is Rows.FULL for mlp in plan.mlps)
    assert count(**DP2, moe_dense_tp_size=2) == sum(plan.model.sparse)
    assert count(tp_size=4, attn_cp_size=4) == 0
