"""The models there are, by the name that config.json gives them.

    config = read_model_config(folder)
    model = build_model(config, groups, torch.device("cpu"), torch.float32)
    load_weights(model, folder, progress)          # or dummy_weights(model, seed)
    hidden_TD = model.forward(batch)
    logits_RV = model.logits(hidden_TD[batch.logit_rows_R])

README.md in this folder says how to add one.
"""

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from kernels.fp8 import Scales
from parallel.groups import Groups
from parallel.layout import Layout
from parallel.plan import PlanSettings, compile_plan
from workers.architectures import layers_of, read_model_config
from workers.batch import ForwardBatch
from workers.cache import RowShapes
from workers.layers.build import Build
from workers.layers.moe import MLP
from workers.model_config import ModelConfig
from workers.model_split import check_split
from workers.models.deepseek import build_deepseek_v2, build_deepseek_v3
from workers.models.llama import build_llama
from workers.models.mixtral import build_mixtral
from workers.models.qwen2 import build_qwen2
from workers.models.qwen3 import build_qwen3
from workers.models.qwen3_moe import build_qwen3_moe
from workers.weights import OneOf, Source

__all__ = ["MODELS", "Model", "build_model", "layout_of", "read_model_config"]


class Model(Protocol):
    """One rank's part of a causal language model."""

    architecture: str
    initializer_range: float
    unused_weights: tuple[str, ...]
    num_layers: int
    num_heads: int
    """Query heads that this rank holds."""
    cache_shapes: RowShapes
    """What this rank keeps of a token in each layer."""
    hidden_size: int
    vocab_size: int
    max_position_embeddings: int
    stop_token_ids: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def forward(self, batch: ForwardBatch) -> Tensor:
        """Hidden rows (T, D) behind the final norm."""
        ...

    def logits(
        self,
        hidden_RD: Tensor,
        num_logit_rows: tuple[int, ...] | None = None,
        *,
        out: Tensor | None = None,
    ) -> Tensor:
        """float32 (R, vocab_size), the same on all attention-TP ranks.

        With a head that spans replicas `num_logit_rows` says how many rows each of them has, and
        all ranks call this in the same step. `out` (R, ...) are rows of `room_for_logits`: what is
        returned lies there, but a single row that comes from several ranks where it arrived.
        """
        ...

    def room_for_logits(self, num_rows: int) -> Tensor:
        """For `out` of `logits`, which takes as many of its first rows as there are."""
        ...

    @property
    def mlps(self) -> tuple[MLP, ...]:
        """The second half of every layer, in order."""
        ...

    def expert_loads(self) -> dict[int, Tensor]:
        """For each sparse layer how often its experts were chosen by rows that came here."""
        ...

    def kv_scales(self) -> tuple[Scales, ...]:
        """By layer what the checkpoint says that stored keys and values are times; 1 if nothing."""
        ...

    def sources(self) -> list[Source | OneOf]:
        """What a checkpoint must hold, and where it goes on this rank."""
        ...


MODELS: Mapping[str, Callable[[Build], Model]] = {
    "DeepseekV2ForCausalLM": build_deepseek_v2,
    "DeepseekV3ForCausalLM": build_deepseek_v3,
    "DeepseekV32ForCausalLM": build_deepseek_v3,
    "LlamaForCausalLM": build_llama,
    "MixtralForCausalLM": build_mixtral,
    "Qwen2ForCausalLM": build_qwen2,
    "Qwen3ForCausalLM": build_qwen3,
    "Qwen3MoeForCausalLM": build_qwen3_moe,
}


DEFAULT_SETTINGS = PlanSettings()


def build_model(
    config: ModelConfig,
    groups: Groups,
    device: torch.device,
    dtype: torch.dtype,
    settings: PlanSettings = DEFAULT_SETTINGS,
) -> Model:
    """This rank's model, its weights allocated and not yet filled."""
    layout = layout_of(groups)
    plan = compile_plan(layout, settings, layers_of(config))
    check_split(
        config,
        attn_tp=layout.attn_tp_size,
        dense_tp=layout.dense_tp_size,
        moe_tp=layout.moe_tp_size,
    )
    return MODELS[config.architecture](Build(config, groups, device, dtype, plan))


def layout_of(groups: Groups) -> Layout:
    """The layout of one domain, from the sizes of its groups."""
    return Layout(
        tp_size=groups.tp.size,
        dp_size=groups.attn_dp.size,
        enable_dp_attention=groups.attn_dp.size > 1,
        attn_cp_size=groups.attn_cp.size,
        ep_size=groups.moe_ep.size,
        moe_dp_size=groups.moe_dp.size,
        moe_dense_tp_size=groups.dense_tp.size,
    )
