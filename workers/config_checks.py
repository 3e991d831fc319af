"""What a config.json may ask for that is not offered, or that does not fit together."""

from pathlib import Path

from workers.config_json import ConfigFile
from workers.errors import BadModelConfig


def check_offered(file: ConfigFile, path: Path) -> None:
    quantized = file.quantization_config
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
        kinds -= {"indexed_attention", "deepseek_sparse_attention"}  # by transformers' version
    if kinds:
        raise BadModelConfig(
            f"{path} has layers of type {', '.join(sorted(kinds))} and there is full_attention "
            "and sliding_attention"
        )


def check_sizes(file: ConfigFile, path: Path) -> None:
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
    if file.index_topk is not None and file.index_head_dim < file.qk_rope_head_dim:
        raise BadModelConfig(
            f"{path}: index_head_dim={file.index_head_dim} must be at least qk_rope_head_dim="
            f"{file.qk_rope_head_dim}"
        )


def check_routing(file: ConfigFile, num_experts: int, chosen: int, path: Path) -> None:
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
