"""Qwen3-MoE: Qwen3's attention, with sparse layers between dense ones."""

from workers.layers.attention import SelfAttention
from workers.layers.build import Build
from workers.layers.mlp import GatedMLP
from workers.layers.moe import MLP, ExpertNames, FusedExpertNames, SoftmaxRouter, SparseMLP
from workers.model_config import MoeConfig
from workers.models.decoder import Decoder, DecoderLayer


def build_qwen3_moe(build: Build) -> Decoder:
    config = build.config
    window = config.sliding_window if config.use_sliding_window else None
    windows = config.layer_windows(window, first_layer=0)
    return Decoder(build, [_layer(build, i, config.experts, w) for i, w in enumerate(windows)])


def _layer(build: Build, layer: int, moe: MoeConfig, window: int | None) -> DecoderLayer:
    bias = build.config.attention_bias
    attention = SelfAttention(
        build, layer, qkv_bias=bias, out_bias=bias, qk_norm=True, sliding_window=window
    )
    prefix = f"model.layers.{layer}.mlp"
    place = build.plan.mlps[layer]
    mlp: MLP
    if moe.is_sparse(layer):
        names = ExpertNames(
            router=f"{prefix}.gate.weight",
            gate=f"{prefix}.experts.{{expert}}.gate_proj.weight",
            up=f"{prefix}.experts.{{expert}}.up_proj.weight",
            down=f"{prefix}.experts.{{expert}}.down_proj.weight",
        )
        fused = FusedExpertNames(
            router=f"{prefix}.gate.weight",
            gate_up=f"{prefix}.experts.gate_up_proj",
            down=f"{prefix}.experts.down_proj",
        )
        router = SoftmaxRouter(moe.num_experts_per_token, normalise=moe.norm_topk_prob)
        mlp = SparseMLP(build, moe, names, fused, place=place, router=router)
    else:
        mlp = GatedMLP(build, prefix, place=place)
    return DecoderLayer(build, layer, attention, mlp)
