"""Up to how many rows a step with prompts is worth a CUDA graph, and why some have none.

Launched kernel by kernel, a step costs the host the same for one row as for thousands. While that
is more than what the GPU computes in the meantime, the GPU waits, and a replay is quicker though
its rows are padded. Where it is less, a graph would only compute padding.

    36 layers of 193 million weights (8b): 22 ms of launches, in which one H200 computes 932 rows
"""

from parallel.layout import Layout
from workers.model_config import ModelConfig

LAUNCH_S = 0.6e-3
"""What launching a layer costs the host, in seconds: 18 to 30 ms were measured for 36."""
FLOPS = 600e12
"""What a GPU computes a second in products of a thousand rows; an H200's ceiling is 790e12."""


def weights_a_token(config: ModelConfig) -> int:
    """How many weights of the layers a token is multiplied with, over all ranks; heads with values
    of their own, and no latents."""
    hidden, moe = config.hidden_size, config.moe
    heads = 2 * config.num_heads + 2 * config.num_kv_heads  # q and o, k and v
    total = config.num_layers * hidden * heads * config.head_dim
    for layer in range(config.num_layers):
        width = config.intermediate_size
        if moe is not None and moe.is_sparse(layer):
            width = moe.num_experts_per_token * moe.intermediate_size + moe.shared_size
        total += 3 * hidden * width
    return total


def rows_worth_capturing(config: ModelConfig, layout: Layout) -> int:
    """Rows of a replica that its GPUs compute while the host launches a step."""
    seconds_a_row = 2 * weights_a_token(config) / layout.attn_tp_size / FLOPS
    return int(config.num_layers * LAUNCH_S / seconds_a_row)


def why_not_captured(*, attn_cp_size: int, is_latent: bool) -> str:
    """Why no step with prompts can be captured; empty if some can."""
    if attn_cp_size > 1:
        return "with attn_cp_size > 1 every prompt is cut in its own way"
    if is_latent:
        return "this model's attention reads latents"
    return ""
