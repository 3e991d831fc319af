"""The rotary embedding that a config.json describes, in either spelling.

Both are read: `rope_theta` with `rope_scaling`, and transformers 5's `rope_parameters`.
"""

import math
from pathlib import Path
from typing import cast, get_args

from workers.config_json import ConfigFile, RopeFile, convert
from workers.errors import BadModelConfig
from workers.model_config import RopeConfig, RopeKind


def read_rope(file: ConfigFile, path: Path) -> tuple[RopeConfig, int]:
    """The rotary embedding, and the longest sequence it is good for."""
    fields = file.rope_parameters if file.rope_parameters is not None else file.rope_scaling
    fields = {key: value for key, value in (fields or {}).items() if value is not None}
    rope = convert(fields, RopeFile, path)
    if any(isinstance(value, dict) for value in fields.values()):
        raise BadModelConfig(f"{path} has rope parameters by layer type, which is not offered")
    kind = rope.rope_type or rope.type or "default"
    theta = rope.rope_theta if rope.rope_theta is not None else file.rope_theta
    limit = file.max_position_embeddings
    if kind == "dynamic":
        raise BadModelConfig(
            f"{path} asks for dynamic rope scaling, which rotates a token differently as its "
            "sequence grows, so cached keys would be wrong: remove the scaling to serve "
            f"{limit} positions, or use yarn"
        )
    if kind not in get_args(RopeKind):
        raise BadModelConfig(
            f"{path} asks for rope scaling of type {kind} and there is "
            f"{', '.join(get_args(RopeKind))}"
        )
    if rope.partial_rotary_factor != 1.0 or file.partial_rotary_factor != 1.0:
        raise BadModelConfig(f"{path}: partial_rotary_factor other than 1 is not offered")
    if kind == "default":
        return RopeConfig(theta=theta), limit
    if rope.factor is None or rope.factor <= 0:
        raise BadModelConfig(f"{path}: rope scaling of type {kind} needs a factor above 0")
    original = rope.original_max_position_embeddings or limit
    if kind == "linear" and rope.original_max_position_embeddings is None:
        limit = int(limit * rope.factor)
    if kind == "yarn":
        limit = max(limit, int(original * rope.factor))
    config = RopeConfig(
        theta=theta,
        kind=cast(RopeKind, kind),
        factor=rope.factor,
        original_max_positions=original,
        low_freq_factor=rope.low_freq_factor,
        high_freq_factor=rope.high_freq_factor,
        beta_fast=rope.beta_fast,
        beta_slow=rope.beta_slow,
        truncate=rope.truncate,
        attention_factor=_yarn_attention_factor(rope, rope.factor) if kind == "yarn" else 1.0,
        score_factor=_sharpened(rope.factor, rope.mscale_all_dim or 0.0) ** 2,
    )
    return config, limit


def _yarn_attention_factor(rope: RopeFile, factor: float) -> float:
    """By how much yarn sharpens attention over longer contexts."""
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return _sharpened(factor, rope.mscale) / _sharpened(factor, rope.mscale_all_dim)
    return _sharpened(factor, 1.0)


def _sharpened(factor: float, scale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0
