"""Llama 3.x (and older ones of the same shape)."""

from workers.layers.attention import SelfAttention
from workers.layers.build import Build
from workers.layers.mlp import GatedMLP
from workers.models.decoder import Decoder, DecoderLayer


def build_llama(build: Build) -> Decoder:
    return Decoder(build, [_layer(build, layer) for layer in range(build.config.num_layers)])


def _layer(build: Build, layer: int) -> DecoderLayer:
    config = build.config
    attention = SelfAttention(
        build,
        layer,
        qkv_bias=config.attention_bias,
        out_bias=config.attention_bias,
        qk_norm=False,
        sliding_window=None,
    )
    prefix = f"model.layers.{layer}.mlp"
    mlp = GatedMLP(build, prefix, place=build.plan.mlps[layer], bias=config.mlp_bias)
    return DecoderLayer(build, layer, attention, mlp)
