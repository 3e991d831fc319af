"""DeepSeek-V2, -V3 and -V3.2: attention over a latent; dense layers first, then experts.

V2 chooses experts by a softmax (arXiv 2405.04434), V3 by a sigmoid and a learned bias (arXiv
2412.19437), V3.2 reads only the tokens that an indexer chooses (arXiv 2512.02556). Layers behind
the last that guess further tokens (multi-token prediction) may be in a checkpoint; they are not
read.
"""

from workers.layers.build import Build
from workers.layers.latent_attention import LatentAttention
from workers.layers.mlp import GatedMLP
from workers.layers.moe import MLP, ExpertNames, FusedExpertNames, GroupedRouter, SparseMLP
from workers.models.decoder import Decoder, DecoderLayer


def build_deepseek_v2(build: Build) -> Decoder:
    return _build(build, has_bias=False)


def build_deepseek_v3(build: Build) -> Decoder:
    """V3 and V3.2."""
    return _build(build, has_bias=True)


def _build(build: Build, *, has_bias: bool) -> Decoder:
    config = build.config
    layers = range(config.num_layers)
    return Decoder(build, [_layer(build, i, has_bias=has_bias) for i in layers])


def _layer(build: Build, layer: int, *, has_bias: bool) -> DecoderLayer:
    moe = build.config.experts
    attention = LatentAttention(build, layer, build.config.attention_latent)
    prefix = f"model.layers.{layer}.mlp"
    mlp_bias = build.config.mlp_bias
    place = build.plan.mlps[layer]
    mlp: MLP
    if not moe.is_sparse(layer):
        mlp = GatedMLP(build, prefix, place=place, bias=mlp_bias)
        return DecoderLayer(build, layer, attention, mlp)
    names = ExpertNames(
        router=f"{prefix}.gate.weight",
        gate=f"{prefix}.experts.{{expert}}.gate_proj.weight",
        up=f"{prefix}.experts.{{expert}}.up_proj.weight",
        down=f"{prefix}.experts.{{expert}}.down_proj.weight",
    )
    fused = FusedExpertNames(
        router=f"{prefix}.gate.weight",
        gate_up=f"{prefix}.experts.gate_up_proj",
        down=f"{prefix}.experts.down_proj",
    )
    bias_name = f"{prefix}.gate.e_score_correction_bias" if has_bias else None
    shared = None
    if moe.shared_size:
        name = f"{prefix}.shared_experts"
        shared = GatedMLP(build, name, place=place, width=moe.shared_size, bias=mlp_bias)
    router = GroupedRouter(build, moe, bias_name)
    mlp = SparseMLP(build, moe, names, fused, place=place, router=router, shared=shared)
    return DecoderLayer(build, layer, attention, mlp)
