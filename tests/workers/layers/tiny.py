"""The least that a layer can be built with."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from parallel.groups import Groups
from parallel.plan import PlanSettings, compile_plan
from workers.architectures import layers_of
from workers.layers.build import Build
from workers.model_config import IndexConfig, LatentConfig, ModelConfig, RopeConfig
from workers.models import layout_of
from workers.weights import Source

CONFIG = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=259,
    hidden_size=32,
    intermediate_size=48,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    rms_norm_eps=1e-6,
    rope=RopeConfig(theta=10000.0),
    dtype="float32",
    tie_word_embeddings=False,
    attention_bias=False,
    mlp_bias=False,
    sliding_window=None,
    use_sliding_window=False,
    max_window_layers=0,
    layer_types=None,
    initializer_range=0.02,
    moe=None,
    stop_token_ids=(),
)

LATENT = LatentConfig(
    query_rank=12, rank=10, plain_dim=6, value_dim=6, is_interleaved=True, scale=0.3
)
INDEX = IndexConfig(query_rank=12, num_heads=4, head_dim=8, num_chosen=2)


def latent_of(architecture: str) -> LatentConfig | None:
    """What an architecture's attention needs beside `CONFIG`."""
    if "V32" in architecture:
        return replace(LATENT, index=INDEX)
    return LATENT if "Deepseek" in architecture else None


def build_on(groups: Groups, dtype: torch.dtype = torch.float32, **changes: Any) -> Build:
    config = replace(CONFIG, **changes)
    plan = compile_plan(layout_of(groups), PlanSettings(), layers_of(config))
    return Build(config, groups, torch.device("cpu"), dtype, plan)


def fill(sources: Sequence[Source], full: Mapping[str, Tensor]) -> None:
    """What the loader does, from a dictionary."""
    for source in sources:
        assert source.shape == full[source.name].shape
        for part in source.parts:
            part.into.copy_(full[source.name][part.region])
