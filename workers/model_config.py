"""What a model folder says of its model: config.json and generation_config.json, checked once.

Both spellings are read: `rope_theta` with `rope_scaling`, and transformers 5's `rope_parameters`.
Nothing here knows an architecture; what a family means by a field it leaves out comes from the
registry (`workers.models.MODELS`), and no code in the folder is ever imported.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, get_args

import msgspec
from msgspec import Struct

from workers.errors import BadModelConfig, BadSplit, UnknownArchitecture

DTypeName = Literal["float32", "bfloat16", "float16"]
RopeKind = Literal["default", "linear", "llama3", "yarn"]
File = TypeVar("File")


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding: the base and how it is stretched to longer contexts."""

    theta: float
    kind: RopeKind = "default"
    factor: float = 1.0
    original_max_positions: int = 0
    """Longest sequence before it was stretched."""
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    """Cosines and sines are multiplied by it (yarn)."""
    score_factor: float = 1.0
    """Attention scores are multiplied by it as well, in DeepSeek's models."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexConfig:
    """Sparse attention (DeepSeek-V3.2): an indexer says which tokens a row reads."""

    num_heads: int
    head_dim: int
    num_chosen: int
    """Tokens that a row reads; all, if it has no more before it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentConfig:
    """Attention over a compressed latent (DeepSeek's MLA, arXiv 2405.04434)."""

    query_rank: int | None
    """Queries are made from so few numbers; None makes them from the hidden row."""
    rank: int
    """Numbers of the latent that keys and values are made from: what is cached of them."""
    plain_dim: int
    """Of a query or key head, the part that is not rotated; the rotated part is `head_dim`."""
    value_dim: int
    is_interleaved: bool
    """The checkpoint has the coordinates of a rotated pair side by side."""
    scale: float
    """Of the scores, before softmax."""
    index: IndexConfig | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeConfig:
    """The sparse layers of a mixture-of-experts model."""

    num_experts: int
    num_experts_per_token: int
    intermediate_size: int
    norm_topk_prob: bool
    sparse_step: int
    dense_layers: frozenset[int]
    num_groups: int = 1
    """Neighbouring experts form groups, and a row chooses among its best groups' experts."""
    num_groups_chosen: int = 1
    scale: float = 1.0
    """Of the chosen experts' weights."""
    shared_size: int = 0
    """Intermediate columns of the experts that every row goes through, together."""

    def is_sparse(self, layer: int) -> bool:
        return layer not in self.dense_layers and (layer + 1) % self.sparse_step == 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """One model's sizes and choices, complete and consistent."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    """Of the dense layers."""
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    """Of keys and values; with a latent, of the part that is rotated."""
    max_position_embeddings: int
    """Longest sequence, rope scaling included."""
    rms_norm_eps: float
    rope: RopeConfig
    dtype: DTypeName
    """Of the checkpoint."""
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    sliding_window: int | None
    use_sliding_window: bool
    max_window_layers: int
    layer_types: tuple[str, ...] | None
    initializer_range: float
    moe: MoeConfig | None
    stop_token_ids: tuple[int, ...]
    """config.json's eos ids, then those that generation_config.json adds."""
    latent: LatentConfig | None = None
    num_draft_layers: int = 0
    """Layers behind the last that guess tokens further ahead; they are not run."""

    @classmethod
    def read(
        cls, folder: Path, defaults_by_architecture: Mapping[str, Mapping[str, object]]
    ) -> "ModelConfig":
        """Read a folder's config; the mapping's keys are the architectures there is code for."""
        path = folder / "config.json"
        fields = _read_object(path)
        architecture = _architecture(fields, defaults_by_architecture, path)
        fields = {**defaults_by_architecture[architecture], **fields}
        file = _convert(fields, _ConfigFile, path)
        _check_offered(file, fields, path)
        _check_sizes(file, path)
        rope, max_positions = _rope(file, path)
        return cls(
            architecture=architecture,
            vocab_size=file.vocab_size,
            hidden_size=file.hidden_size,
            intermediate_size=file.intermediate_size,
            num_layers=file.num_hidden_layers,
            num_heads=file.num_attention_heads,
            num_kv_heads=file.kv_heads,
            head_dim=file.head_size,
            max_position_embeddings=max_positions,
            rms_norm_eps=file.rms_norm_eps,
            rope=rope,
            dtype=_dtype(file, path),
            tie_word_embeddings=file.tie_word_embeddings,
            attention_bias=file.attention_bias,
            mlp_bias=file.mlp_bias,
            sliding_window=file.sliding_window,
            use_sliding_window=file.use_sliding_window,
            max_window_layers=file.max_window_layers,
            layer_types=file.layer_types,
            initializer_range=file.initializer_range,
            moe=_moe(file, path),
            stop_token_ids=_stop_token_ids(file, folder),
            latent=_latent(file, rope),
            num_draft_layers=file.num_nextn_predict_layers,
        )

    def layer_windows(self, window: int | None, *, first_layer: int) -> tuple[int | None, ...]:
        """Each layer's sliding window: as `layer_types` says, else from `first_layer` on."""
        if self.layer_types is not None:
            return tuple(
                window if kind == "sliding_attention" else None for kind in self.layer_types
            )
        return tuple(window if i >= first_layer else None for i in range(self.num_layers))

    def has_dense_layers(self) -> bool:
        moe = self.moe
        return moe is None or not all(moe.is_sparse(i) for i in range(self.num_layers))


def check_split(config: ModelConfig, *, attn_tp: int, dense_tp: int, moe_tp: int) -> None:
    """Refuse group sizes that do not divide the model, naming the sizes that do."""
    reason = (
        _attention_split(config, attn_tp)
        or _dense_split(config, dense_tp)
        or _expert_split(config, moe_tp)
    )
    if reason is None:
        return
    works = [
        str(size)
        for size in range(1, config.num_heads + 1)
        if not (
            _attention_split(config, size)
            or _dense_split(config, size)
            or _expert_split(config, size)
        )
    ]
    raise BadSplit(f"{reason}; tp_size can be {', '.join(works)}")


def _attention_split(config: ModelConfig, ranks: int) -> str | None:
    heads, kv_heads = config.num_heads, config.num_kv_heads
    if heads % ranks:
        return f"{heads} attention heads do not divide over {ranks} ranks"
    if kv_heads % ranks and ranks % kv_heads:
        return f"{kv_heads} key-value heads neither divide over {ranks} ranks nor divide them"
    return None


def _dense_split(config: ModelConfig, ranks: int) -> str | None:
    if config.has_dense_layers() and config.intermediate_size % ranks:
        return f"intermediate_size={config.intermediate_size} does not divide over {ranks} ranks"
    return None


def _expert_split(config: ModelConfig, ranks: int) -> str | None:
    if config.moe is not None and config.moe.intermediate_size % ranks:
        size = config.moe.intermediate_size
        return f"the experts' intermediate size {size} does not divide over {ranks} ranks"
    return None


class _RopeFile(Struct, frozen=True, kw_only=True):
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


class _ConfigFile(Struct, frozen=True, kw_only=True):
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
    eos_token_id: int | tuple[int, ...] = ()

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


class _GenerationFile(Struct, frozen=True):
    eos_token_id: int | tuple[int, ...] = ()


def _read_object(path: Path) -> dict[str, Any]:
    """The file's fields; null means left out."""
    try:
        fields = msgspec.json.decode(path.read_bytes())
    except FileNotFoundError:
        raise BadModelConfig(
            f"{path} does not exist: `model` must be a folder with a Hugging Face config.json, "
            "tokenizer.json and safetensors files"
        ) from None
    except (OSError, msgspec.DecodeError) as error:
        raise BadModelConfig(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(fields, dict):
        raise BadModelConfig(f"{path} holds a {type(fields).__name__}, not an object")
    return {key: value for key, value in fields.items() if value is not None}


def _convert(fields: dict[str, Any], kind: type[File], path: Path) -> File:
    try:
        return msgspec.convert(fields, kind, strict=True)
    except msgspec.ValidationError as error:
        raise BadModelConfig(f"{path}: {error}") from error


def _architecture(fields: dict[str, Any], known: Mapping[str, object], path: Path) -> str:
    named = fields.get("architectures")
    offered = ", ".join(sorted(known))
    if not isinstance(named, list) or not named:
        raise BadModelConfig(
            f"{path} names no architecture: add `architectures` with one of {offered}"
        )
    for name in named:
        if name in known:
            return name
    raise UnknownArchitecture(
        f"{path} asks for {named[0]} and there is {offered}; workers/models/README.md says how "
        "to add one"
    )


def _check_offered(file: _ConfigFile, fields: dict[str, Any], path: Path) -> None:
    quantized = cast(dict[str, Any], fields.get("quantization_config") or {})
    is_cache_alone = quantized.get("kv_cache_scheme") and not quantized.get("config_groups")
    if quantized and not is_cache_alone:
        method = quantized.get("quant_method", "unknown")
        raise BadModelConfig(
            f"{path} describes weights quantized by {method}, which is not offered: use the "
            "model's bfloat16, float16 or float32 checkpoint"
        )
    if file.hidden_act != "silu":
        raise BadModelConfig(f"{path} asks for hidden_act={file.hidden_act} and there is silu")
    kinds = set(file.layer_types or ()) - {"full_attention", "sliding_attention"}
    if file.index_topk is not None:
        kinds -= {"indexed_attention"}
    if kinds:
        raise BadModelConfig(
            f"{path} has layers of type {', '.join(sorted(kinds))} and there is full_attention "
            "and sliding_attention"
        )


def _check_sizes(file: _ConfigFile, path: Path) -> None:
    positive = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
        "num_attention_heads", "max_position_embeddings", "kv_heads", "head_size",
    )  # fmt: skip
    for name in positive:
        if getattr(file, name) < 1:
            raise BadModelConfig(f"{path}: {name}={getattr(file, name)} must be at least 1")
    heads, kv_heads = file.num_attention_heads, file.kv_heads
    if heads % kv_heads:
        raise BadModelConfig(
            f"{path}: num_attention_heads={heads} does not divide by num_key_value_heads={kv_heads}"
        )
    if file.kv_lora_rank is None and file.head_dim is None and file.hidden_size % heads:
        raise BadModelConfig(
            f"{path}: hidden_size={file.hidden_size} does not divide by num_attention_heads="
            f"{heads}, and head_dim is not given"
        )
    if file.head_size % 2:
        raise BadModelConfig(f"{path}: head_dim={file.head_size} must be even to be rotated")
    if file.layer_types is not None and len(file.layer_types) != file.num_hidden_layers:
        raise BadModelConfig(
            f"{path}: layer_types has {len(file.layer_types)} entries for "
            f"{file.num_hidden_layers} layers"
        )
    if file.sliding_window is not None and file.sliding_window < 1:
        raise BadModelConfig(f"{path}: sliding_window={file.sliding_window} must be at least 1")


def _dtype(file: _ConfigFile, path: Path) -> DTypeName:
    name = (file.dtype or file.torch_dtype or "float32").removeprefix("torch.")
    if name not in get_args(DTypeName):
        raise BadModelConfig(
            f"{path} asks for dtype={name} and there is {', '.join(get_args(DTypeName))}"
        )
    return cast(DTypeName, name)


def _rope(file: _ConfigFile, path: Path) -> tuple[RopeConfig, int]:
    """The rotary embedding, and the longest sequence it is good for."""
    fields = file.rope_parameters if file.rope_parameters is not None else file.rope_scaling
    fields = {key: value for key, value in (fields or {}).items() if value is not None}
    rope = _convert(fields, _RopeFile, path)
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


def _yarn_attention_factor(rope: _RopeFile, factor: float) -> float:
    """By how much yarn sharpens attention over longer contexts."""
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return _sharpened(factor, rope.mscale) / _sharpened(factor, rope.mscale_all_dim)
    return _sharpened(factor, 1.0)


def _sharpened(factor: float, scale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def _latent(file: _ConfigFile, rope: RopeConfig) -> LatentConfig | None:
    if file.kv_lora_rank is None:
        return None
    index = None
    if file.index_topk is not None:
        index = IndexConfig(
            num_heads=file.index_n_heads,
            head_dim=file.index_head_dim,
            num_chosen=file.index_topk,
        )
    width = file.qk_nope_head_dim + file.qk_rope_head_dim
    return LatentConfig(
        query_rank=file.q_lora_rank,
        rank=file.kv_lora_rank,
        plain_dim=file.qk_nope_head_dim,
        value_dim=file.v_head_dim,
        is_interleaved=file.rope_interleave,
        scale=width**-0.5 * rope.score_factor,
        index=index,
    )


def _moe(file: _ConfigFile, path: Path) -> MoeConfig | None:
    num_experts = file.num_experts or file.num_local_experts or file.n_routed_experts
    if not num_experts:
        return None
    chosen = file.num_experts_per_tok
    if chosen is None or not 1 <= chosen <= num_experts:
        raise BadModelConfig(
            f"{path}: num_experts_per_tok={chosen} must be from 1 to {num_experts}, the number of "
            "experts"
        )
    if file.decoder_sparse_step < 1:
        raise BadModelConfig(
            f"{path}: decoder_sparse_step={file.decoder_sparse_step} must be at least 1"
        )
    _check_routing(file, num_experts, chosen, path)
    width = file.moe_intermediate_size or file.intermediate_size
    is_grouped = file.topk_method != "greedy"
    return MoeConfig(
        num_experts=num_experts,
        num_experts_per_token=chosen,
        intermediate_size=width,
        norm_topk_prob=file.norm_topk_prob,
        sparse_step=file.decoder_sparse_step,
        dense_layers=_dense_layers(file),
        num_groups=file.n_group if is_grouped else 1,
        num_groups_chosen=file.topk_group if is_grouped else 1,
        scale=file.routed_scaling_factor,
        shared_size=width * file.n_shared_experts,
    )


def _dense_layers(file: _ConfigFile) -> frozenset[int]:
    """Layers that have no experts, in any of the spellings."""
    layers = {*file.mlp_only_layers, *range(file.first_k_dense_replace)}
    if file.mlp_layer_types is not None:
        layers = {i for i, kind in enumerate(file.mlp_layer_types) if kind == "dense"}
    return frozenset(layers)


def _check_routing(file: _ConfigFile, num_experts: int, chosen: int, path: Path) -> None:
    """What only DeepSeek's files say of experts."""
    if file.moe_layer_freq != 1:
        raise BadModelConfig(
            f"{path}: moe_layer_freq={file.moe_layer_freq} is not offered: experts must be in "
            "every layer from first_k_dense_replace on"
        )
    if file.topk_method == "greedy":
        return
    groups, open_groups = file.n_group, file.topk_group
    if groups < 1 or num_experts % groups or not 1 <= open_groups <= groups:
        raise BadModelConfig(
            f"{path}: {num_experts} experts cannot form n_group={groups} equal groups of which "
            f"topk_group={open_groups} are open"
        )
    if chosen > num_experts // groups * open_groups:
        raise BadModelConfig(
            f"{path}: num_experts_per_tok={chosen} is more than topk_group={open_groups} groups of "
            f"{num_experts // groups} experts have"
        )


def _stop_token_ids(file: _ConfigFile, folder: Path) -> tuple[int, ...]:
    path = folder / "generation_config.json"
    generation = _GenerationFile()
    if path.exists():
        generation = _convert(_read_object(path), _GenerationFile, path)
    ids: list[int] = []
    for eos in (file.eos_token_id, generation.eos_token_id):
        ids.extend((eos,) if isinstance(eos, int) else eos)
    for token in ids:
        if not 0 <= token < file.vocab_size:
            raise BadModelConfig(
                f"{folder}: eos_token_id {token} is outside the vocabulary of {file.vocab_size}"
            )
    return tuple(dict.fromkeys(ids))
