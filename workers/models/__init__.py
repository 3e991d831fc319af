"""The models there are, by the name that config.json gives them.

    config = read_model_config(folder)
    model = build_model(config, groups, torch.device("cpu"), torch.float32)
    load_weights(model, folder, progress)          # or dummy_weights(model, seed)
    hidden_TD = model.forward(batch)
    logits_RV = model.logits(hidden_TD[batch.logit_rows_R])

README.md in this folder says how to add one.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from parallel.groups import Groups
from workers.batch import ForwardBatch
from workers.layers.build import Build
from workers.model_config import ModelConfig, check_split
from workers.models.llama import DEFAULTS as LLAMA_DEFAULTS
from workers.models.llama import build_llama
from workers.models.mixtral import DEFAULTS as MIXTRAL_DEFAULTS
from workers.models.mixtral import build_mixtral
from workers.models.qwen2 import DEFAULTS as QWEN2_DEFAULTS
from workers.models.qwen2 import build_qwen2
from workers.models.qwen3 import DEFAULTS as QWEN3_DEFAULTS
from workers.models.qwen3 import build_qwen3
from workers.models.qwen3_moe import DEFAULTS as QWEN3_MOE_DEFAULTS
from workers.models.qwen3_moe import build_qwen3_moe
from workers.weights import OneOf, Source


class Model(Protocol):
    """One rank's part of a causal language model."""

    architecture: str
    initializer_range: float
    unused_weights: frozenset[str]
    num_layers: int
    num_heads: int
    """Query heads that this rank holds."""
    num_kv_heads: int
    """Key-value heads that this rank holds: what a cache needs room for."""
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    stop_token_ids: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def forward(self, batch: ForwardBatch) -> Tensor:
        """Hidden rows (T, D) behind the final norm."""
        ...

    def logits(self, hidden_RD: Tensor) -> Tensor:
        """float32 (R, vocab_size), the same on all attention-TP ranks."""
        ...

    def sources(self) -> list[Source | OneOf]:
        """What a checkpoint must hold, and where it goes on this rank."""
        ...


class Architecture(NamedTuple):
    build: Callable[[Build], Model]
    defaults: Mapping[str, object]
    """What the family means by fields that its config.json leaves out."""


MODELS: Mapping[str, Architecture] = {
    "LlamaForCausalLM": Architecture(build_llama, LLAMA_DEFAULTS),
    "MixtralForCausalLM": Architecture(build_mixtral, MIXTRAL_DEFAULTS),
    "Qwen2ForCausalLM": Architecture(build_qwen2, QWEN2_DEFAULTS),
    "Qwen3ForCausalLM": Architecture(build_qwen3, QWEN3_DEFAULTS),
    "Qwen3MoeForCausalLM": Architecture(build_qwen3_moe, QWEN3_MOE_DEFAULTS),
}


def read_model_config(folder: Path) -> ModelConfig:
    """The folder's config.json; refuses architectures that are not in `MODELS`."""
    return ModelConfig.read(folder, {name: model.defaults for name, model in MODELS.items()})


def build_model(
    config: ModelConfig, groups: Groups, device: torch.device, dtype: torch.dtype
) -> Model:
    """This rank's model, its weights allocated and not yet filled."""
    check_split(
        config,
        attn_tp=groups.attn_tp.size,
        dense_tp=groups.tp.size if config.moe is None else groups.dense_tp.size,
        moe_tp=groups.moe_tp.size,
    )
    return MODELS[config.architecture].build(Build(config, groups, device, dtype))
