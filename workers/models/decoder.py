"""The stack that decoder-only models share: embedding, layers, final norm, head.

An architecture's file says what its layers are made of and hands them to `Decoder`. A layer whose
parts are connected differently is its own class with `DecoderLayer`'s methods.
"""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from kernels.fp8 import Scales
from parallel.context import counts_by_part
from parallel.dp_attention import Activation, RowCounts, RowSplit, Upload
from parallel.plan import PlanError, Rows
from parallel.symmetric import out_of_slot
from workers.batch import Attention, ForwardBatch
from workers.cache import RowShapes
from workers.layers.build import Build
from workers.layers.communicator import NormBoundary
from workers.layers.embedding import LMHead, VocabParallelEmbedding, VocabWeight, vocab_sources
from workers.layers.moe import MLP, SparseMLP
from workers.layers.norm import RMSNorm
from workers.layers.rotary import RotaryTable, Rotation
from workers.weights import OneOf, Source


class AttentionLayer(Protocol):
    """The first half of a layer: its projections around the step's attention over the cache."""

    @property
    def cache_shapes(self) -> RowShapes:
        """What this rank keeps of a token."""
        ...

    @property
    def kv_scale_2(self) -> Tensor | None:
        """What keys and values are times where a cache keeps e4m3; None of a latent."""
        ...

    def forward(
        self, x: Activation, rotation: Rotation, attention: Attention, split: RowSplit | None
    ) -> Activation: ...
    def sources(self) -> Sequence[Source | OneOf]: ...


class DecoderLayer:
    """Attention, then an MLP, each behind a norm of the residual stream."""

    def __init__(self, build: Build, layer: int, attention: AttentionLayer, mlp: MLP) -> None:
        prefix = f"model.layers.{layer}"
        plan = build.plan
        self._attention, self.mlp = attention, mlp
        self.cache_shapes, self.kv_scale_2 = attention.cache_shapes, attention.kv_scale_2
        self._input_norm = RMSNorm(build, f"{prefix}.input_layernorm")
        self._post_norm = RMSNorm(build, f"{prefix}.post_attention_layernorm")
        self._into_attention = NormBoundary(
            build, plan.into_attention(layer), self._input_norm, gathers_next=True
        )
        self._into_mlp = NormBoundary(build, plan.into_mlp(layer), self._post_norm)

    def forward(
        self,
        x: Activation,
        residual: Activation | None,
        rotation: Rotation,
        attention: Attention,
        split: RowSplit | None,
    ) -> tuple[Activation, Activation]:
        """What is yet to be added to the residual stream, and the stream."""
        x, residual = self._into_attention.forward(x, residual, split)
        x = self._attention.forward(x, rotation, attention, split)
        x, residual = self._into_mlp.forward(x, residual, split)
        return self.mlp.forward(x, split), residual

    def sources(self) -> list[Source | OneOf]:
        return [
            *self._input_norm.sources(),
            *self._attention.sources(),
            *self._post_norm.sources(),
            *self.mlp.sources(),
        ]


class Decoder:
    """A causal language model on one rank; what a runner needs to know of it are attributes."""

    def __init__(self, build: Build, layers: Sequence[DecoderLayer]) -> None:
        config, groups, plan = build.config, build.groups, build.plan
        self.architecture = config.architecture
        self.initializer_range = config.initializer_range
        self.num_layers = config.num_layers
        self.num_heads = config.num_heads // groups.attn_tp.size
        """Query heads that this rank holds."""
        self.cache_shapes = layers[0].cache_shapes
        """What this rank keeps of a token in each layer: all are alike."""
        self.hidden_size = config.hidden_size
        self.vocab_size = config.vocab_size
        self.max_position_embeddings = config.max_position_embeddings
        self.stop_token_ids = config.stop_token_ids
        self.dtype = build.dtype
        self.device = build.device

        name = "model.embed_tokens"
        embedding = VocabWeight(build, name, groups.attn_tp)
        head = embedding
        head_group = build.group(plan.head.group)
        if not config.tie_word_embeddings or head_group.members != groups.attn_tp.members:
            head_name = name if config.tie_word_embeddings else "lm_head"
            head = VocabWeight(build, head_name, head_group)
        drafts = range(config.num_layers, config.num_layers + config.num_draft_layers)
        self.unused_weights = (
            *(("lm_head.weight",) if config.tie_word_embeddings else ()),
            *(f"model.layers.{layer}." for layer in drafts),
        )
        self._vocabs = (embedding,) if head is embedding else (embedding, head)
        self._embed = VocabParallelEmbedding(embedding)
        self._head = LMHead(build, head)
        self._layers = tuple(layers)
        self._norm = RMSNorm(build, "model.norm")
        self._into_head = NormBoundary(build, plan.into_head, self._norm)
        self._rotary = RotaryTable(
            config.rope, config.head_dim, config.max_position_embeddings, build.device, build.dtype
        )
        self._groups = groups
        self._shares_rows = plan.is_scattered or plan.layout.num_parts > 1
        """Rows are moved between ranks, or padded; else nobody has to know whose they are."""
        self._last_split: tuple[RowCounts, RowSplit] | None = None
        self._captured_splits: dict[RowCounts, RowSplit] = {}
        """Kept for good, because graphs read their tensors."""

    def forward(self, batch: ForwardBatch) -> Tensor:
        """Hidden rows (T, D) behind the final norm."""
        needs_split = self._shares_rows or batch.num_live_P is not None
        split = self._split(batch) if needs_split else None
        positions_T = batch.positions_T if split is None else batch.positions_T[: split.num_real]
        rotation = self._rotary.at(positions_T)
        x = Activation(self._embed.forward(batch.input_ids_T), Rows.TP_ATTN_FULL)
        residual = None
        for layer in self._layers:
            x, residual = layer.forward(x, residual, rotation, batch.attention, split)
        x, _ = self._into_head.forward(x, residual, split)
        return out_of_slot(x.final(Rows.TP_ATTN_FULL), self._groups.attn_tp)

    def logits(
        self,
        hidden_RD: Tensor,
        num_logit_rows: tuple[int, ...] | None = None,
        *,
        out: Tensor | None = None,
    ) -> Tensor:
        """float32 (R, vocab_size); with a head that spans replicas, all of them say how many."""
        return self._head.forward(hidden_RD, num_logit_rows, out=out)

    def room_for_logits(self, num_rows: int) -> Tensor:
        """For `out` of `logits`, which takes as many of its first rows as there are."""
        return self._head.room_for(num_rows)

    @property
    def mlps(self) -> tuple[MLP, ...]:
        """The second half of every layer, in order."""
        return tuple(layer.mlp for layer in self._layers)

    def expert_loads(self) -> dict[int, Tensor]:
        """For each sparse layer how often its experts were chosen by rows that came here."""
        mlps = {number: layer.mlp for number, layer in enumerate(self._layers)}
        return {n: mlp.load.read() for n, mlp in mlps.items() if isinstance(mlp, SparseMLP)}

    def kv_scales(self) -> tuple[Scales, ...]:
        """By layer what the checkpoint says that stored keys and values are times; 1 if nothing."""
        scales = (layer.kv_scale_2 for layer in self._layers)
        return tuple(Scales(*scale_2.tolist()) for scale_2 in scales if scale_2 is not None)

    def _split(self, batch: ForwardBatch) -> RowSplit:
        """Who has which rows; the same as in the last step for as long as the counts are."""
        groups, counts = self._groups, batch.counts
        num_parts = groups.attn_cp.size
        if counts is None:
            if groups.attn_dp.size > 1 or num_parts > 1:
                raise PlanError("a step over several replicas must say how many rows each has")
            rows = (batch.input_ids_T.shape[0],)
            counts = RowCounts(rows, rows, ())
        groups.arena.rows_are_even = len(set(counts.padded)) == 1
        key = counts._replace(num_logit_rows=(), num_prompt_rows=())
        if batch.num_live_P is not None:
            if key not in self._captured_splits:
                self._captured_splits[key] = self._new_split(counts, batch.upload)
            split = self._captured_splits[key]
            split.follow(batch.num_live_P)
        else:
            if self._last_split is None or self._last_split[0] != key:
                self._last_split = (key, self._new_split(counts, batch.upload))
            split = self._last_split[1]
        split.context = batch.context
        if (split.context is None) != (num_parts == 1):
            raise PlanError("a step must say how to gather rows if, and only if, they are in parts")
        return split

    def _new_split(self, counts: RowCounts, upload: Upload) -> RowSplit:
        groups = self._groups
        num_parts = groups.attn_cp.size
        num_real, padded = counts_by_part(counts.num_real, counts.padded, num_parts)
        return RowSplit(
            rows=padded,
            num_real=num_real,
            attn_tp=groups.attn_tp.size,
            part=groups.attn_dp.rank * num_parts + groups.attn_cp.rank,
            place=groups.attn_tp.rank,
            in_one_buffer=counts.in_one_buffer,
            upload=upload,
        )

    def sources(self) -> list[Source | OneOf]:
        """What a checkpoint must hold, and where it goes on this rank."""
        sources: list[Source | OneOf] = []
        sources.extend(vocab_sources(self._vocabs))
        for part in (*self._layers, self._norm):
            sources.extend(part.sources())
        return sources
