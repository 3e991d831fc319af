"""Attention over a compressed latent: DeepSeek's MLA, with its projections absorbed.

A token keeps one row that all heads share: R numbers that keys and values are made from, and a key
of D numbers that carries its position. Nothing is ever decompressed: what would make keys of the
latent is applied to the queries instead, and what would make values of it to what they read.

    q . (W_k latent) = (W_k^T q) . latent        sum_s p_s (W_v latent_s) = W_v (sum_s p_s latent_s)

Heads are split over attn_tp; what makes the latent is on all ranks, and so is the cache.

`Indexer` is DeepSeek-V3.2's: a small attention of its own says which tokens a row reads. Following
transformers it works in the model's type: a Hadamard transform of queries and keys, which leaves
their products as they are, and their rounding to 8 bits are left out.

Shapes: T rows, H heads, R numbers of the latent, D rotated numbers, N plain ones, V of a value,
W = R + D; J heads of E numbers of the indexer.
"""

import torch
from torch import Tensor

from parallel.context_gather import ContextGather
from parallel.dp_attention import Activation, RowSplit
from workers.batch import Attention, IndexRows, LatentRowAttention
from workers.cache import RowShapes
from workers.layers import fast
from workers.layers.build import Build, even_share
from workers.layers.linear import ColumnParallelLinear, Columns, even_columns
from workers.layers.norm import LayerNorm, RMSNorm
from workers.layers.rotary import Rotation
from workers.layers.whole_rows import attention_output, on_real_rows, on_whole_rows
from workers.model_config import IndexConfig, LatentConfig
from workers.weights import Source

NORM_EPS = 1e-6
"""Of the norms inside attention, whatever config.json says of the others."""


class LatentAttention:
    def __init__(self, build: Build, layer: int, latent: LatentConfig) -> None:
        config, group, place = build.config, build.groups.attn_tp, build.plan.attention
        prefix = f"model.layers.{layer}.self_attn"
        heads = even_share(config.num_heads, group, f"{prefix} heads")
        self._layer, self._latent = layer, latent
        self._num_heads = heads.stop - heads.start
        self._rotated_dim = config.head_dim
        self._query_dim = latent.plain_dim + config.head_dim
        query_width = config.num_heads * self._query_dim
        row_width = latent.rank + config.head_dim
        compress = [_whole(f"{prefix}.kv_a_proj_with_mqa", row_width)]
        query_name = f"{prefix}.q_proj"
        if latent.query_rank is not None:
            compress.insert(0, _whole(f"{prefix}.q_a_proj", latent.query_rank))
            query_name = f"{prefix}.q_b_proj"
        self._compress = ColumnParallelLinear(
            build, config.hidden_size, compress, bias=config.attention_bias
        )
        self._query_norm = None
        if latent.query_rank is not None:
            name = f"{prefix}.q_a_layernorm"
            self._query_norm = RMSNorm(build, name, latent.query_rank, NORM_EPS)
        self._query = ColumnParallelLinear(
            build,
            latent.query_rank or config.hidden_size,
            (even_columns(query_name, query_width, group),),
            bias=False,
        )
        self._latent_norm = RMSNorm(build, f"{prefix}.kv_a_layernorm", latent.rank, NORM_EPS)
        columns = config.num_heads * (latent.plain_dim + latent.value_dim)
        self._expand = ColumnParallelLinear(
            build, latent.rank, (even_columns(f"{prefix}.kv_b_proj", columns, group),), bias=False
        )
        by_head = self._expand.weight_ND.view(self._num_heads, -1, latent.rank)
        self._keys_HNR = by_head[:, : latent.plain_dim]
        self._values_HRV = by_head[:, latent.plain_dim :].transpose(1, 2)
        width = config.num_heads * latent.value_dim
        self._out = attention_output(build, prefix, width, bias=config.attention_bias)
        self._indexer = None
        if latent.index is not None:
            self._indexer = Indexer(build, f"{prefix}.indexer", latent.index)
        self.kv_scale_2 = None
        self.cache_shapes: RowShapes = ((row_width,),)
        """The row of a token, and its key for the indexer; the same on all attn_tp ranks."""
        if latent.index is not None:
            self.cache_shapes += ((latent.index.head_dim,),)
        self._group = group
        self._rows = place.rows

    def forward(
        self, x: Activation, rotation: Rotation, attention: Attention, split: RowSplit | None
    ) -> Activation:
        if not isinstance(attention, LatentRowAttention):
            raise TypeError(f"{type(attention).__name__} reads no latents")
        return on_whole_rows(
            lambda x_TD: self._attend(x_TD, rotation, attention, split),
            x,
            self._rows,
            split,
            self._group,
        )

    def _attend(
        self,
        x_TD: Tensor,
        rotation: Rotation,
        attention: LatentRowAttention,
        split: RowSplit | None,
    ) -> Activation:
        context = None if split is None else split.context
        num_here = x_TD.shape[0] if split is None else split.num_real
        out_TN = on_real_rows(
            lambda x_TD: self._read(x_TD, rotation, attention, context),
            x_TD,
            self._num_heads * self._latent.value_dim,
            num_here=num_here,
            num_read=num_here if context is None else context.num_rows,
        )
        return self._out.forward(out_TN)

    def _read(
        self,
        x_TD: Tensor,
        rotation: Rotation,
        attention: LatentRowAttention,
        context: ContextGather | None,
    ) -> Tensor:
        """What the rows read of their sequences, heads side by side.

        If the replica is in parts, what its rows leave in the cache is gathered from all of them,
        while this part's queries are computed.
        """
        latent, num_rows = self._latent, x_TD.shape[0]
        query_TQ, kept_TC = self._compressed(x_TD, rotation)
        index_weight_TJ = None
        if self._indexer is not None:
            index_key_TE, index_weight_TJ = self._indexer.keys(x_TD, rotation)
            kept_TC = torch.cat((kept_TC, index_key_TE), 1)
        pending = None if context is None else context.start(kept_TC)
        q_THW = self._queries(query_TQ, rotation)
        kept_UC = kept_TC if pending is None else pending.wait()
        row_UW, index_key_UE = kept_UC.tensor_split((latent.rank + self._rotated_dim,), 1)
        index = None
        if self._indexer is not None and index_weight_TJ is not None:
            index_q_TJE = self._indexer.queries(query_TQ, rotation)
            num_chosen = self._indexer.num_chosen
            index = IndexRows(index_q_TJE, index_weight_TJ, index_key_UE, num_chosen)
        out_THR = attention.attend_latent(
            self._layer,
            q_THW,
            row_UW,
            num_values=latent.rank,
            scale=latent.scale,
            index=index,
        )
        out_HTV = torch.bmm(out_THR.transpose(0, 1), self._values_HRV)
        return out_HTV.transpose(0, 1).reshape(num_rows, self._num_heads * latent.value_dim)

    def _compressed(self, x_TD: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
        """What queries are made from (T, Q), and what is kept of the rows (T, W)."""
        latent, query_norm = self._latent, self._query_norm
        parts_TP = self._compress.forward(x_TD)
        if parts_TP.is_cuda:
            query_TQ, row_TW = fast.latent_keys(
                parts_TP,
                None if query_norm is None else query_norm.weight_D,
                self._latent_norm.weight_D,
                rotation.rows_T3C,
                eps=NORM_EPS,
                interleaved=latent.is_interleaved,
            )
            return x_TD if query_TQ is None else query_TQ, row_TW
        query_TQ, latent_TR, key_TD = parts_TP.split_with_sizes(
            (latent.query_rank or 0, latent.rank, self._rotated_dim), 1
        )
        key_TD = self._turn(key_TD.unsqueeze(1), rotation).squeeze(1)
        row_TW = torch.cat((self._latent_norm.forward(latent_TR), key_TD), 1)
        return x_TD if query_norm is None else query_norm.forward(query_TQ), row_TW

    def _queries(self, query_TQ: Tensor, rotation: Rotation) -> Tensor:
        """What every head asks of the tokens' rows (T, H, W)."""
        latent, num_rows = self._latent, query_TQ.shape[0]
        query_THX = self._query.forward(query_TQ).view(num_rows, self._num_heads, self._query_dim)
        plain_HTN = query_THX[:, :, : latent.plain_dim].transpose(0, 1)
        if query_THX.is_cuda:
            width = latent.rank + self._rotated_dim
            q_THW = query_THX.new_empty(num_rows, self._num_heads, width)
            torch.bmm(plain_HTN, self._keys_HNR, out=q_THW[:, :, : latent.rank].transpose(0, 1))
            rows_T3C, interleaved = rotation.rows_T3C, latent.is_interleaved
            fast.turn_queries(query_THX, rows_T3C, q_THW, interleaved=interleaved)
            return q_THW
        absorbed_HTR = torch.bmm(plain_HTN, self._keys_HNR)
        turned_THD = self._turn(query_THX[:, :, latent.plain_dim :], rotation)
        return torch.cat((absorbed_HTR.transpose(0, 1), turned_THD), 2)

    def _turn(self, x_TXD: Tensor, rotation: Rotation) -> Tensor:
        return rotation.apply(_halved(x_TXD) if self._latent.is_interleaved else x_TXD.contiguous())

    def sources(self) -> list[Source]:
        parts = (self._compress, self._query_norm, self._query, self._latent_norm, self._expand)
        inside = [source for part in parts if part is not None for source in part.sources()]
        index = [] if self._indexer is None else self._indexer.sources()
        return [*inside, *index, *self._out.sources()]


class Indexer:
    """Queries, weights and keys that say which tokens a row reads; whole on every rank."""

    def __init__(self, build: Build, prefix: str, index: IndexConfig) -> None:
        config = build.config
        self._index = index
        self._rotated_dim = config.head_dim
        self._query = ColumnParallelLinear(
            build,
            index.query_rank,
            (_whole(f"{prefix}.wq_b", index.num_heads * index.head_dim),),
            bias=False,
        )
        self._key_and_weight = ColumnParallelLinear(
            build,
            config.hidden_size,
            (
                _whole(f"{prefix}.wk", index.head_dim),
                _whole(f"{prefix}.weights_proj", index.num_heads),
            ),
            bias=False,
        )
        self._norm = LayerNorm(build, f"{prefix}.k_norm", index.head_dim, NORM_EPS)
        self._scale = (index.head_dim * index.num_heads) ** -0.5
        self.num_chosen = index.num_chosen

    def keys(self, x_TD: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
        """The rows' keys, and their heads' weights (float32, all scales included)."""
        index = self._index
        key_TE, weight_TJ = self._key_and_weight.forward(x_TD).split_with_sizes(
            (index.head_dim, index.num_heads), 1
        )
        key_TE = self._norm.forward(key_TE)
        key_TE = self._turn(key_TE.unsqueeze(1), rotation).squeeze(1)
        return key_TE, weight_TJ.float() * self._scale

    def queries(self, query_TQ: Tensor, rotation: Rotation) -> Tensor:
        """From what attention makes its own queries from."""
        index, num_rows = self._index, query_TQ.shape[0]
        query_TJE = self._query.forward(query_TQ).view(num_rows, index.num_heads, index.head_dim)
        return self._turn(query_TJE, rotation)

    def _turn(self, x_TXE: Tensor, rotation: Rotation) -> Tensor:
        """The first coordinates are rotated, as two halves; the rest stay as they are."""
        rest = self._index.head_dim - self._rotated_dim
        turned, plain = x_TXE.split_with_sizes((self._rotated_dim, rest), 2)
        return torch.cat((rotation.apply(turned.contiguous()), plain), 2)

    def sources(self) -> list[Source]:
        return [
            *self._query.sources(),
            *self._key_and_weight.sources(),
            *self._norm.sources(),
        ]


def _whole(name: str, total: int) -> Columns:
    """All columns, on every rank."""
    return Columns(name, total, slice(0, total))


def _halved(x_TXD: Tensor) -> Tensor:
    """The first of each pair that lies side by side, then the second of each."""
    return x_TXD.unflatten(-1, (x_TXD.shape[-1] // 2, 2)).transpose(2, 3).flatten(2)
