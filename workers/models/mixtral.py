"""Mixtral: all layers sparse, the chosen experts' weights always made to sum to one."""

from workers.errors import BadModelConfig
from workers.layers.attention import SelfAttention
from workers.layers.build import Build
from workers.layers.moe import ExpertNames, FusedExpertNames, SparseMLP
from workers.model_config import MoeConfig
from workers.models.decoder import Decoder, DecoderLayer

DEFAULTS: dict[str, object] = {
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
}


def build_mixtral(build: Build) -> Decoder:
    config = build.config
    if config.moe is None:
        raise BadModelConfig(f"{config.architecture} needs num_local_experts in config.json")
    windows = config.layer_windows(config.sliding_window, first_layer=0)
    return Decoder(build, [_layer(build, i, config.moe, w) for i, w in enumerate(windows)])


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
    mlp = SparseMLP(build, moe, names, fused, norm_topk_prob=True)
    return DecoderLayer(build, layer, attention, mlp)
