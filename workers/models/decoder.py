"""The stack that decoder-only models share: embedding, layers, final norm, head.

An architecture's file says what its layers are made of and hands them to `Decoder`. A layer whose
parts are connected differently is its own class with `DecoderLayer`'s methods.
"""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from workers.batch import Attention, ForwardBatch
from workers.errors import BadSplit
from workers.layers.attention import SelfAttention
from workers.layers.build import Build
from workers.layers.embedding import LMHead, VocabParallelEmbedding, VocabWeight
from workers.layers.norm import RMSNorm
from workers.layers.rotary import RotaryTable, Rotation
from workers.weights import OneOf, Source


class MLP(Protocol):
    """The second half of a layer: dense or sparse."""

    def forward(self, x_TD: Tensor) -> Tensor: ...
    def sources(self) -> Sequence[Source | OneOf]: ...


class DecoderLayer:
    """Attention, then an MLP, each behind a norm of the residual stream."""

    def __init__(self, build: Build, layer: int, attention: SelfAttention, mlp: MLP) -> None:
        prefix = f"model.layers.{layer}"
        self.input_norm = RMSNorm(build, f"{prefix}.input_layernorm")
        self._attention = attention
        self._post_norm = RMSNorm(build, f"{prefix}.post_attention_layernorm")
        self._mlp = mlp

    def forward(
        self, x_TD: Tensor, residual_TD: Tensor, rotation: Rotation, attention: Attention
    ) -> Tensor:
        """From rows behind `input_norm` to what is yet to be added to the residual stream."""
        x_TD = self._attention.forward(x_TD, rotation, attention)
        return self._mlp.forward(self._post_norm.add(x_TD, residual_TD))

    def sources(self) -> list[Source | OneOf]:
        return [
            *self.input_norm.sources(),
            *self._attention.sources(),
            *self._post_norm.sources(),
            *self._mlp.sources(),
        ]


class Decoder:
    """A causal language model on one rank; what a runner needs to know of it are attributes."""

    def __init__(self, build: Build, layers: Sequence[DecoderLayer]) -> None:
        config, groups = build.config, build.groups
        if groups.attn_dp.size > 1 or groups.attn_cp.size > 1:
            raise BadSplit(
                f"{config.architecture} was asked for with {groups.attn_dp.size} data-parallel and "
                f"{groups.attn_cp.size} context-parallel attention parts and its layers move no "
                "rows between them: set enable_dp_attention off and attn_cp_size to 1"
            )
        self.architecture = config.architecture
        self.initializer_range = config.initializer_range
        self.num_layers = config.num_layers
        self.num_heads = config.num_heads // groups.attn_tp.size
        """Query heads that this rank holds."""
        self.num_kv_heads = max(config.num_kv_heads // groups.attn_tp.size, 1)
        """Key-value heads that this rank holds; a head may be on several ranks."""
        self.head_dim = config.head_dim
        self.vocab_size = config.vocab_size
        self.max_position_embeddings = config.max_position_embeddings
        self.stop_token_ids = config.stop_token_ids
        self.dtype = build.dtype
        self.device = build.device

        embedding = VocabWeight(build, "model.embed_tokens")
        head = embedding if config.tie_word_embeddings else VocabWeight(build, "lm_head")
        self.unused_weights = frozenset({"lm_head.weight"} if head is embedding else ())
        self._vocabs = (embedding,) if head is embedding else (embedding, head)
        self._embed = VocabParallelEmbedding(embedding)
        self._head = LMHead(head, config.vocab_size)
        self._layers = tuple(layers)
        self._norm = RMSNorm(build, "model.norm")
        following = [*(layer.input_norm for layer in layers[1:]), self._norm]
        self._layers_and_next_norms = tuple(zip(layers, following, strict=True))
        self._rotary = RotaryTable(
            config.rope, config.head_dim, config.max_position_embeddings, build.device, build.dtype
        )

    def forward(self, batch: ForwardBatch) -> Tensor:
        """Hidden rows (T, D) behind the final norm."""
        rotation = self._rotary.at(batch.positions_T)
        residual_TD = self._embed.forward(batch.input_ids_T)
        x_TD = self._layers[0].input_norm.forward(residual_TD)
        for layer, next_norm in self._layers_and_next_norms:
            x_TD = layer.forward(x_TD, residual_TD, rotation, batch.attention)
            x_TD = next_norm.add(x_TD, residual_TD)
        return x_TD

    def logits(self, hidden_RD: Tensor) -> Tensor:
        """float32 (R, vocab_size), gathered over the attention-TP group."""
        return self._head.forward(hidden_RD)

    def sources(self) -> list[Source | OneOf]:
        """What a checkpoint must hold, and where it goes on this rank."""
        sources: list[Source | OneOf] = []
        for part in (*self._vocabs, *self._layers, self._norm):
            sources.extend(part.sources())
        return sources
