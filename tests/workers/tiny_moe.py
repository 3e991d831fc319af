"""A tiny Qwen3-MoE model with random weights, its replicas driven at random.

Ranks are threads; each drives all replicas by itself, from the same seed, so all see the same
headers.
"""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np
import torch

from parallel.groups import Groups
from tests.workers.kernel_runner import kernel_runner
from tests.workers.random_driver import RandomDriver, Request, planned_header
from workers.config import EngineConfig
from workers.protocol import Header
from workers.runner import ModelRunner
from workers.step import StepResult

VOCAB = 64
MODEL = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "vocab_size": VOCAB,
    "hidden_size": 32, "num_hidden_layers": 2, "mlp_only_layers": [0], "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 32, "moe_intermediate_size": 16,
    "num_experts": 8, "num_experts_per_tok": 2, "decoder_sparse_step": 1, "norm_topk_prob": True,
    "rope_theta": 10000.0, "rms_norm_eps": 1e-6, "attention_bias": False, "hidden_act": "silu",
    "bos_token_id": 0, "eos_token_id": 1, "initializer_range": 0.3, "torch_dtype": "float32",
    "max_position_embeddings": 64, "tie_word_embeddings": True, "use_sliding_window": False,
}  # fmt: skip
FOLDER = tempfile.TemporaryDirectory()
Path(FOLDER.name, "config.json").write_text(json.dumps(MODEL))
SIZES = {
    "model": FOLDER.name, "load_format": "dummy", "page_size": 4, "max_num_seqs": 3,
    "max_num_batched_tokens": 24, "max_model_len": 32, "kv_cache_gb": 0.05, "device": "cpu",
}  # fmt: skip
NUM_PAGES = 24
DRIVER = {"max_num_seqs": 3, "num_pages": NUM_PAGES, "page_size": 4, "budget": 24}
DP2 = {"tp_size": 2, "dp_size": 2, "enable_dp_attention": True}
DP2_TP2 = {"tp_size": 4, "dp_size": 2, "enable_dp_attention": True}
A2A = {"moe_a2a_backend": "torch"}


def tiny_runner(config: EngineConfig, rank=0, groups=None, *, use_kernels=True) -> ModelRunner:
    return kernel_runner(config, rank, groups, num_pages=NUM_PAGES, use_kernels=use_kernels)


def alone(requests: Sequence[Request]) -> list[list[int]]:
    """One rank, no kernels, no buckets, one request after another."""
    runner = tiny_runner(EngineConfig(**SIZES), use_kernels=False)
    driver = RandomDriver(list(requests), Random(0), chaos=0.0, **DRIVER | {"max_num_seqs": 1})
    while not driver.is_done:
        planned = driver.plan()
        result = runner.finish(runner.launch(planned.header(), planned.body, 0))
        driver.feed(planned, result.ids.tolist())
    return [request.output for request in requests]


class Step(NamedTuple):
    header: Header
    result: StepResult


def drive(
    runner: ModelRunner, groups: Groups, requests: Sequence[Sequence[Request]], **sizes: Any
) -> list[Step]:
    """This rank's steps until every replica's requests are answered."""
    drivers = [
        RandomDriver(list(mine), Random(7 + replica), **sizes)
        for replica, mine in enumerate(requests)
    ]
    replica, steps = groups.attn_dp.rank, []
    while not all(driver.is_done for driver in drivers):
        plans = [driver.plan() for driver in drivers]
        header = planned_header(
            plans, len(steps), runner.buckets, runner._row_multiple, runner.prompt_buckets
        )
        result = runner.finish(runner.launch(header, plans[replica].body, replica))
        told = tell(groups, header, replica, result.ids)
        for driver, plan, ids in zip(drivers, plans, told, strict=True):
            driver.feed(plan, ids)
        steps.append(Step(header, result))
        assert len(steps) < 400, "the requests do not end"
    return steps


def tell(groups: Groups, header: Header, replica: int, ids: np.ndarray) -> list[list[int]]:
    """What every replica sampled, as the driver's acks would say it."""
    if groups.attn_dp.size == 1:
        return [ids.tolist()]
    most = max(header.num_logit_rows)
    mine = torch.zeros(most, dtype=torch.int64)
    mine[: len(ids)] = torch.from_numpy(ids.astype(np.int64))
    out = torch.zeros(groups.attn_dp.size * most, dtype=torch.int64)
    if most:
        groups.attn_dp.transport.all_gather(out, mine)
    counts = header.num_logit_rows
    return [out[r * most :][: counts[r]].tolist() for r in range(groups.attn_dp.size)]
