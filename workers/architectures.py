"""What is known of every architecture without building it: no torch, so the driver may read it.

`workers.models` has the code of each, under the same names. `read_model_config` reads a folder,
`plan_of` says what its layers' collectives would be under an engine's settings.
"""

from collections.abc import Mapping
from pathlib import Path

from parallel.plan import ModelLayers, Plan, compile_plan
from workers import bundled
from workers.config import EngineConfig
from workers.model_config import ModelConfig
from workers.model_folder import Architecture, read_folder

LATENT = {"kv_lora_rank": 512}

DEEPSEEK_V3 = LATENT | {
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 2048,
    "first_k_dense_replace": 3,
    "topk_method": "noaux_tc",
    "n_group": 8,
    "topk_group": 4,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
}

ARCHITECTURES: Mapping[str, Architecture] = {
    "DeepseekV2ForCausalLM": Architecture(
        defaults=LATENT | {"n_routed_experts": 64, "n_shared_experts": 2},
        gathers_in_attention=True,
        experts="n_routed_experts",
        needs=("kv_lora_rank",),
        may_normalise=False,
    ),
    "DeepseekV3ForCausalLM": Architecture(
        defaults=DEEPSEEK_V3,
        gathers_in_attention=True,
        experts="n_routed_experts",
        needs=("kv_lora_rank",),
    ),
    "DeepseekV32ForCausalLM": Architecture(
        defaults=DEEPSEEK_V3 | {"index_topk": 2048},
        gathers_in_attention=True,
        experts="n_routed_experts",
        needs=("kv_lora_rank",),
    ),
    "LlamaForCausalLM": Architecture(),
    "MixtralForCausalLM": Architecture(
        defaults={
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
        },
        gathers_in_attention=True,
        experts="num_local_experts",
    ),
    "Qwen2ForCausalLM": Architecture(defaults={"sliding_window": 4096}),
    "Qwen3ForCausalLM": Architecture(defaults={"sliding_window": 4096, "head_dim": 128}),
    "Qwen3MoeForCausalLM": Architecture(
        defaults={
            "sliding_window": 4096,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
        },
        gathers_in_attention=True,
        experts="num_experts",
    ),
}


def read_model_config(folder: Path) -> ModelConfig:
    """The folder's config.json; refuses architectures that are not in `ARCHITECTURES`."""
    return read_folder(folder, ARCHITECTURES)


def layers_of(config: ModelConfig) -> ModelLayers:
    """What a plan must know of a model."""
    moe = config.moe
    return ModelLayers(
        config.architecture,
        tuple(moe is not None and moe.is_sparse(layer) for layer in range(config.num_layers)),
        ARCHITECTURES[config.architecture].gathers_in_attention,
    )


def folder_of(config: EngineConfig) -> Path:
    """Where the configured model lies."""
    return Path(config.model) if config.model else bundled.path()


def plan_of(config: EngineConfig) -> Plan:
    """The collective plan of the configured model; a ValueError says why there is none."""
    layers = layers_of(read_model_config(folder_of(config)))
    return compile_plan(config.layout, config.plan_settings, layers)
