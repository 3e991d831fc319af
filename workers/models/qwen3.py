"""Qwen3: every query and key head is normalised; the head size is the config's own."""

from workers.layers.attention import SelfAttention
from workers.layers.build import Build
from workers.layers.mlp import GatedMLP
from workers.models.decoder import Decoder, DecoderLayer


def build_qwen3(build: Build) -> Decoder:
    config = build.config
    window = config.sliding_window if config.use_sliding_window else None
    windows = config.layer_windows(window, first_layer=config.max_window_layers)
    return Decoder(build, [_layer(build, layer, w) for layer, w in enumerate(windows)])


def _layer(build: Build, layer: int, window: int | None) -> DecoderLayer:
    bias = build.config.attention_bias
    attention = SelfAttention(
        build, layer, qkv_bias=bias, out_bias=bias, qk_norm=True, sliding_window=window
    )
    mlp = GatedMLP(build, f"model.layers.{layer}.mlp", place=build.plan.mlps[layer])
    return DecoderLayer(build, layer, attention, mlp)
