"""The fields of a model folder's JSON files that are read, under the files' own names.

A null means that the field is left out. What is not read is not looked at.
"""

from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec
from msgspec import Struct

from workers.errors import BadModelConfig

File = TypeVar("File")


class RopeFile(Struct, frozen=True, kw_only=True):
    """`rope_parameters`, or `rope_scaling` with its older key `type`."""

    rope_type: str | None = None
    type: str | None = None
    rope_theta: float | None = None
    factor: float | None = None
    original_max_position_embeddings: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    partial_rotary_factor: float = 1.0


class ConfigFile(Struct, frozen=True, kw_only=True):
    """The fields of config.json that are read, under its own names."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None
    partial_rotary_factor: float = 1.0
    dtype: str | None = None
    torch_dtype: str | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    sliding_window: int | None = None
    use_sliding_window: bool = False
    max_window_layers: int = 28
    layer_types: tuple[str, ...] | None = None
    initializer_range: float = 0.02
    num_experts: int | None = None
    num_local_experts: int | None = None
    num_experts_per_tok: int | None = None
    moe_intermediate_size: int | None = None
    norm_topk_prob: bool = False
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] = ()
    n_routed_experts: int | None = None
    n_shared_experts: int = 0
    n_group: int = 1
    topk_group: int = 1
    topk_method: str = "greedy"
    scoring_func: str | None = None
    routed_scaling_factor: float = 1.0
    first_k_dense_replace: int = 0
    moe_layer_freq: int = 1
    mlp_layer_types: tuple[Literal["dense", "sparse"], ...] | None = None
    q_lora_rank: int | None = None
    kv_lora_rank: int | None = None
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    rope_interleave: bool = True
    index_topk: int | None = None
    index_n_heads: int = 64
    index_head_dim: int = 128
    num_nextn_predict_layers: int = 0
    quantization_config: dict[str, Any] = {}
    eos_token_id: int | tuple[int, ...] = ()

    @property
    def expert_count(self) -> int:
        """Under whichever name; 0 without experts."""
        return self.num_experts or self.num_local_experts or self.n_routed_experts or 0

    @property
    def kv_heads(self) -> int:
        if self.kv_lora_rank is not None:
            return 1  # all heads share the latent
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def head_size(self) -> int:
        if self.kv_lora_rank is not None:
            return self.qk_rope_head_dim
        return self.head_dim or self.hidden_size // self.num_attention_heads


class GenerationFile(Struct, frozen=True):
    eos_token_id: int | tuple[int, ...] = ()


def read_object(path: Path) -> dict[str, Any]:
    """The file's fields; null means left out."""
    try:
        fields = msgspec.json.decode(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise BadModelConfig(
            f"{path} does not exist: `model` must be a folder with a Hugging Face config.json, "
            "tokenizer.json and safetensors files"
        ) from None
    except (OSError, msgspec.DecodeError) as error:
        raise BadModelConfig(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(fields, dict):
        raise BadModelConfig(f"{path} holds a {type(fields).__name__}, not an object")
    return {key: value for key, value in fields.items() if value is not None}


def convert(fields: dict[str, Any], kind: type[File], path: Path) -> File:
    try:
        return msgspec.convert(fields, kind, strict=True)
    except msgspec.ValidationError as error:
        raise BadModelConfig(f"{path}: {error}") from error
