"""Mixtral: all layers sparse, the chosen experts' weights always made to sum to one."""

from workers.layers.attention import SelfAttention
from workers.layers.build import Build
from workers.layers.moe import ExpertNames, FusedExpertNames, SoftmaxRouter, SparseMLP
from workers.model_config import MoeConfig
from workers.models.decoder import Decoder, DecoderLayer


def build_mixtral(build: Build) -> Decoder:
    config = build.config
    windows = config.layer_windows(config.sliding_window, first_layer=0)
    return Decoder(build, [_layer(build, i, config.experts, w) for i, w in enumerate(windows)])


def _layer(build: Build, layer: int, moe: MoeConfig, window: int | None) -> DecoderLayer:
    attention = SelfAttention(
        build, layer, qkv_bias=False, out_bias=False, qk_norm=False, sliding_window=window
    )
    prefix = f"model.layers.{layer}.block_sparse_moe"
    names = ExpertNames(
        router=f"{prefix}.gate.weight",
        gate=f"{prefix}.experts.{{expert}}.w1.weight",
        up=f"{prefix}.experts.{{expert}}.w3.weight",
        down=f"{prefix}.experts.{{expert}}.w2.weight",
    )
    fused = FusedExpertNames(
        router=f"model.layers.{layer}.mlp.gate.weight",
        gate_up=f"model.layers.{layer}.mlp.experts.gate_up_proj",
        down=f"model.layers.{layer}.mlp.experts.down_proj",
    )
    router = SoftmaxRouter(moe.num_experts_per_token, normalise=True)
    mlp = SparseMLP(build, moe, names, fused, place=build.plan.mlps[layer], router=router)
    return DecoderLayer(build, layer, attention, mlp)
