"""Qwen2 and Qwen2.5: biases on q, k and v only, and a sliding window on the later layers."""

from workers.layers.attention import SelfAttention
from workers.layers.build import Build
from workers.layers.mlp import GatedMLP
from workers.models.decoder import Decoder, DecoderLayer


def build_qwen2(build: Build) -> Decoder:
    config = build.config
    window = config.sliding_window if config.use_sliding_window else None
    windows = config.layer_windows(window, first_layer=config.max_window_layers)
    return Decoder(build, [_layer(build, layer, w) for layer, w in enumerate(windows)])


def _layer(build: Build, layer: int, window: int | None) -> DecoderLayer:
    attention = SelfAttention(
        build, layer, qkv_bias=True, out_bias=False, qk_norm=False, sliding_window=window
    )
    mlp = GatedMLP(build, f"model.layers.{layer}.mlp", place=build.plan.mlps[layer])
    return DecoderLayer(build, layer, attention, mlp)
