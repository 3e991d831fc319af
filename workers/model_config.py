"""What the engine knows of a model: its sizes and choices, whatever its folder calls them.

`workers.model_folder` reads them. Nothing here knows an architecture.
"""

from dataclasses import dataclass
from typing import Literal

from workers.errors import BadModelConfig

DTypeName = Literal["float32", "bfloat16", "float16"]
RopeKind = Literal["default", "linear", "llama3", "yarn"]


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

    query_rank: int
    """Numbers that its queries are made from."""
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

    def layer_windows(self, window: int | None, *, first_layer: int) -> tuple[int | None, ...]:
        """Each layer's sliding window: as `layer_types` says, else from `first_layer` on."""
        if self.layer_types is not None:
            return tuple(
                window if kind == "sliding_attention" else None for kind in self.layer_types
            )
        return tuple(window if i >= first_layer else None for i in range(self.num_layers))

    @property
    def experts(self) -> MoeConfig:
        """`moe` of an architecture that has experts, which reading its folder has made sure of."""
        if self.moe is None:
            raise BadModelConfig(f"{self.architecture} without experts")
        return self.moe

    @property
    def attention_latent(self) -> LatentConfig:
        """`latent` of an architecture whose attention has one; see `experts`."""
        if self.latent is None:
            raise BadModelConfig(f"{self.architecture} without a latent")
        return self.latent

    def has_dense_layers(self) -> bool:
        moe = self.moe
        return moe is None or not all(moe.is_sparse(i) for i in range(self.num_layers))
