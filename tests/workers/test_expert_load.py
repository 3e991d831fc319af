"""What ranks tell of their experts' loads: all rows once, whoever routes them."""

import pytest
import torch

from parallel.plan import PlanSettings
from parallel.thread_world import run_thread_world
from tests.workers.reference import CPU, SEQUENCES, batch_of, save_tiny
from tests.workers.test_models import GROUPS, LATENT
from workers import expert_load
from workers.config import EngineConfig
from workers.expert_load import ExpertTally
from workers.models import build_model, read_model_config
from workers.weights import dummy_weights

NUM_ROWS = sum(map(len, SEQUENCES))
NUM_CHOICES = NUM_ROWS * LATENT["num_experts_per_tok"] * 2
"""Two of the three layers have experts."""


def told(config: EngineConfig, folder) -> list[list[tuple[int, ...]]]:
    """What each rank tells after each of five steps of the same rows."""

    def body(rank, groups):
        settings = PlanSettings(moe_a2a_backend=config.moe_a2a_backend)
        model = build_model(read_model_config(folder), groups, CPU, torch.float32, settings)
        dummy_weights(model, seed=1)
        tally = ExpertTally(model, config, groups, lambda tensor: tensor)
        said = []
        for _ in range(5):
            batch = batch_of(SEQUENCES)
            model.forward(batch)
            said.append(tally.step_done())
        return said

    return run_thread_world(config.layout, body)


@pytest.mark.row("S11")
@pytest.mark.parametrize("backend", ["none", "torch"])
def test_every_choice_is_told_once(backend, tmp_path, monkeypatch):
    monkeypatch.setattr(expert_load, "TOLD_EVERY", 1)
    save_tiny(tmp_path, "DeepseekV3", **LATENT, **GROUPS)
    config = EngineConfig(tp_size=4, ep_size=4, moe_a2a_backend=backend)
    by_rank = told(config, tmp_path)
    tellers = [said for said in by_rank if said[-1]]
    assert len(tellers) == (1 if backend == "none" else 4)
    for said in tellers:
        assert said[0] == ()
        assert said[1] == (0,) * 4
    per_step = [sum(sum(said[step]) for said in tellers) for step in (2, 3, 4)]
    assert per_step == [NUM_CHOICES, 2 * NUM_CHOICES, 3 * NUM_CHOICES]


def test_ranks_tell_the_same_whatever_moves_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(expert_load, "TOLD_EVERY", 1)
    save_tiny(tmp_path, "DeepseekV3", **LATENT, **GROUPS)
    totals = []
    for backend in ("none", "torch"):
        config = EngineConfig(tp_size=4, ep_size=4, moe_a2a_backend=backend)
        tellers = [said[-1] for said in told(config, tmp_path) if said[-1]]
        totals.append([sum(each) for each in zip(*tellers, strict=True)])
    assert totals[0] == totals[1]
    assert len(set(totals[0])) > 1


def test_a_dense_model_tells_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(expert_load, "TOLD_EVERY", 1)
    save_tiny(tmp_path, "Llama")
    assert told(EngineConfig(), tmp_path) == [[()] * 5]
