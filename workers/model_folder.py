"""What a model folder says of its model: config.json and generation_config.json, checked once.

Nothing here knows an architecture; what a family means by a field it leaves out, and what it cannot
do without, comes from the registry (`workers.architectures`). No code in the folder is ever
imported.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast, get_args

from workers.config_checks import check_offered, check_routing, check_sizes
from workers.config_json import ConfigFile, GenerationFile, convert, read_object
from workers.config_rope import read_rope
from workers.errors import BadModelConfig, UnknownArchitecture
from workers.model_config import (
    DTypeName,
    IndexConfig,
    LatentConfig,
    ModelConfig,
    MoeConfig,
    RopeConfig,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    defaults: Mapping[str, object] = field(default_factory=dict)
    """What the family means by fields that its config.json leaves out."""
    gathers_in_attention: bool = False
    """Its attention can gather and scatter rows inside the block (`disable_attn_tp_gather`)."""
    experts: str = ""
    """What its config.json calls the number of experts, if it cannot be without."""
    needs: tuple[str, ...] = ()
    """Other sizes that its config.json must give."""
    may_normalise: bool = True
    """It says what `norm_topk_prob` means: that the chosen experts' weights sum to one."""


def read_folder(folder: Path, architectures: Mapping[str, Architecture]) -> ModelConfig:
    """Read a folder's config; the mapping's keys are the architectures there is code for."""
    path = folder / "config.json"
    fields = read_object(path)
    architecture = _architecture(fields, architectures, path)
    family = architectures[architecture]
    file = convert({**family.defaults, **fields}, ConfigFile, path)
    check_offered(file, path)
    check_sizes(file, path)
    missing = [name for name in family.needs if not getattr(file, name)]
    if file.kv_lora_rank and file.index_topk is not None and not file.q_lora_rank:
        missing.append("q_lora_rank")  # an indexer's queries are made from it
    if family.experts and not file.expert_count:
        missing.insert(0, family.experts)
    if missing:
        raise BadModelConfig(f"{path}: {architecture} needs {' and '.join(missing)} above 0")
    if file.norm_topk_prob and not family.may_normalise:
        raise BadModelConfig(
            f"{path}: {architecture} with norm_topk_prob=true is not offered: its implementations "
            "disagree on what that means, and no published model has it"
        )
    rope, max_positions = read_rope(file, path)
    return ModelConfig(
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


def _dtype(file: ConfigFile, path: Path) -> DTypeName:
    name = (file.dtype or file.torch_dtype or "float32").removeprefix("torch.")
    if name not in get_args(DTypeName):
        raise BadModelConfig(
            f"{path} asks for dtype={name} and there is {', '.join(get_args(DTypeName))}"
        )
    return cast(DTypeName, name)


def _latent(file: ConfigFile, rope: RopeConfig) -> LatentConfig | None:
    if file.kv_lora_rank is None:
        return None
    index = None
    if file.index_topk is not None:
        index = IndexConfig(
            query_rank=file.q_lora_rank or 0,
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


def _moe(file: ConfigFile, path: Path) -> MoeConfig | None:
    num_experts = file.expert_count
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
    check_routing(file, num_experts, chosen, path)
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


def _dense_layers(file: ConfigFile) -> frozenset[int]:
    """Layers that have no experts, in any of the spellings."""
    layers = {*file.mlp_only_layers, *range(file.first_k_dense_replace)}
    if file.mlp_layer_types is not None:
        layers = {i for i, kind in enumerate(file.mlp_layer_types) if kind == "dense"}
    return frozenset(layers)


def _stop_token_ids(file: ConfigFile, folder: Path) -> tuple[int, ...]:
    path = folder / "generation_config.json"
    generation = GenerationFile()
    if path.exists():
        generation = convert(read_object(path), GenerationFile, path)
    ids: list[int] = []
    for eos in (file.eos_token_id, generation.eos_token_id):
        ids.extend((eos,) if isinstance(eos, int) else eos)
    for token in ids:
        if not 0 <= token < file.vocab_size:
            raise BadModelConfig(
                f"{folder}: eos_token_id {token} is outside the vocabulary of {file.vocab_size}"
            )
    return tuple(dict.fromkeys(ids))
