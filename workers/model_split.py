"""Whether a model divides over groups of so many ranks."""

from workers.errors import BadSplit
from workers.model_config import ModelConfig


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
