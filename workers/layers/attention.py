"""Attention's projections around the step's `Attention`, which owns the cache."""

import torch
from torch import Tensor

from parallel.context_gather import ContextGather
from parallel.dp_attention import Activation, RowSplit
from workers.batch import Attention, HeadAttention, ProjectionAttention
from workers.layers.build import Build, even_share
from workers.layers.fast import rope_rows
from workers.layers.linear import (
    ColumnParallelLinear,
    even_columns,
    kv_columns,
)
from workers.layers.norm import UnitRms
from workers.layers.rotary import Rotation
from workers.layers.whole_rows import attention_output, on_real_rows, on_whole_rows
from workers.weights import OneOf, Part, Source, everything


class QueryKeyNorm:
    """RMS norm of every query and key head, all N of them in one go (Qwen3)."""

    def __init__(self, build: Build, prefix: str, num_heads: int, num_kv_heads: int) -> None:
        self._prefix = prefix
        self._num_heads = num_heads
        self._unit = UnitRms(build, build.config.head_dim)
        self.weight_ND = build.empty(num_heads + num_kv_heads, build.config.head_dim)
        """The queries' weight, once for each head, then the keys'."""

    def forward(self, x_TND: Tensor, weight_ND: Tensor) -> Tensor:
        """Of heads whose rows of the weight these are."""
        return self._unit.forward(x_TND, weight_ND)

    def sources(self) -> list[Source]:
        dim = self.weight_ND.shape[1]
        rows = {"q_norm": slice(0, self._num_heads), "k_norm": slice(self._num_heads, None)}
        return [
            Source(
                name=f"{self._prefix}.{name}.weight",
                shape=(dim,),
                parts=(Part((slice(0, dim),), self.weight_ND[here]),),
                dummy="ones",
            )
            for name, here in rows.items()
        ]


class SelfAttention:
    """Causal attention with grouped keys and values, split by heads over attn_tp.

    It works on all rows of a replica. If the replica is in parts (context parallelism) it works on
    those of one; keys and values of all parts are gathered while the queries are computed, and
    every part stores them all.
    """

    def __init__(
        self,
        build: Build,
        layer: int,
        *,
        qkv_bias: bool,
        out_bias: bool,
        qk_norm: bool,
        sliding_window: int | None,
    ) -> None:
        config, group, place = build.config, build.groups.attn_tp, build.plan.attention
        prefix = f"model.layers.{layer}.self_attn"
        dim = config.head_dim
        query = even_share(config.num_heads, group, f"{prefix} heads")
        self._layer = layer
        self._scale = dim**-0.5
        self._eps = config.rms_norm_eps
        self._window = sliding_window
        self._head_dim = dim
        self._num_heads = query.stop - query.start
        self._num_kv_heads = max(config.num_kv_heads // group.size, 1)
        self.cache_shapes = ((self._num_kv_heads, dim),) * 2
        """Keys and values of a token. A key-value head may be on several ranks."""
        self._num_rotated = self._num_heads + self._num_kv_heads
        pieces = (
            even_columns(f"{prefix}.q_proj", config.num_heads * dim, group),
            kv_columns(f"{prefix}.k_proj", config.num_kv_heads, dim, group),
            kv_columns(f"{prefix}.v_proj", config.num_kv_heads, dim, group),
        )
        self._qkv = ColumnParallelLinear(build, config.hidden_size, pieces, bias=qkv_bias)
        self._qk_norm = None
        if qk_norm:
            self._qk_norm = QueryKeyNorm(build, prefix, self._num_heads, self._num_kv_heads)
        self.kv_scale_2 = torch.ones(2, dtype=torch.float32, device=build.device)
        """What stored keys and values are times, in a cache of fewer bits; 1 unless told."""
        self._scale_names = (f"{prefix}.k_scale", f"{prefix}.v_scale")
        self._out = attention_output(build, prefix, config.num_heads * dim, bias=out_bias)
        self._group = group
        self._rows = place.rows

    def forward(
        self, x: Activation, rotation: Rotation, attention: Attention, split: RowSplit | None
    ) -> Activation:
        if not isinstance(attention, HeadAttention):
            raise TypeError(f"{type(attention).__name__} reads no keys and values of heads")
        return on_whole_rows(
            lambda x_TD: self._attend(x_TD, rotation, attention, split),
            x,
            self._rows,
            split,
            self._group,
        )

    def _attend(
        self, x_TD: Tensor, rotation: Rotation, attention: HeadAttention, split: RowSplit | None
    ) -> Activation:
        if split is not None and split.context is not None:
            return self._attend_in_part(x_TD, rotation, attention, split.context)
        num_rows = x_TD.shape[0]
        num_real = num_rows if split is None else split.num_real
        num_projected = self._num_rotated + self._num_kv_heads
        qkv_TND = self._qkv.forward(x_TD).view(num_rows, num_projected, self._head_dim)
        out_TN = on_real_rows(
            lambda qkv_TND: self._read(qkv_TND, rotation, attention),
            qkv_TND,
            self._num_heads * self._head_dim,
            num_here=num_real,
            num_read=num_real,
        )
        return self._out.forward(out_TN)

    def _attend_in_part(
        self, x_TD: Tensor, rotation: Rotation, attention: HeadAttention, context: ContextGather
    ) -> Activation:
        """Rows of one part; the replica may have rows where this part has none."""
        out_TN = on_real_rows(
            lambda x_TD: self._read_in_part(x_TD, rotation, attention, context),
            x_TD,
            self._num_heads * self._head_dim,
            num_here=context.num_here,
            num_read=context.num_rows,
        )
        return self._out.forward(out_TN)

    def _read_in_part(
        self, x_TD: Tensor, rotation: Rotation, attention: HeadAttention, context: ContextGather
    ) -> Tensor:
        """Keys and values first: the queries are computed while those of all parts come."""
        norm_ND = None if self._qk_norm is None else self._qk_norm.weight_ND
        num_heads, num_kv_heads = self._num_heads, self._num_kv_heads
        width = num_heads * self._head_dim
        send_LND = context.slot(x_TD, 2 * num_kv_heads, self._head_dim)
        kv_TND = self._qkv.forward_columns(x_TD, slice(width, None))
        self._turn(
            kv_TND.view(-1, 2 * num_kv_heads, self._head_dim),
            None if norm_ND is None else norm_ND[num_heads:],
            rotation,
            send_LND[: context.num_here],
            num_rotated=num_kv_heads,
        )
        pending = context.start(send_LND)
        q_TN = self._qkv.forward_columns(x_TD, slice(0, width))
        q_THD = q_TN.view(-1, num_heads, self._head_dim)
        turned_THD = torch.empty_like(q_THD)
        norm_HD = None if norm_ND is None else norm_ND[:num_heads]
        self._turn(q_THD, norm_HD, rotation, turned_THD, num_rotated=num_heads)
        k_UGD, v_UGD = pending.wait().split(num_kv_heads, dim=1)
        out_THD = attention.attend(
            self._layer, turned_THD, k_UGD, v_UGD, scale=self._scale, sliding_window=self._window
        )
        return out_THD.flatten(1)

    def _turn(
        self,
        x_TND: Tensor,
        norm_RD: Tensor | None,
        rotation: Rotation,
        out_TND: Tensor,
        *,
        num_rotated: int,
    ) -> None:
        """Normalise, if there are weights, and rotate the first heads; copy the others."""
        if x_TND.is_cuda:
            rope_rows(
                x_TND, norm_RD, rotation.rows_T3C, out_TND, num_rotated=num_rotated, eps=self._eps
            )
            return
        turned_TRD = x_TND[:, :num_rotated]
        if self._qk_norm is not None and norm_RD is not None:
            turned_TRD = self._qk_norm.forward(turned_TRD, norm_RD)
        out_TND[:, :num_rotated] = rotation.apply(turned_TRD)
        out_TND[:, num_rotated:] = x_TND[:, num_rotated:]

    def _read(self, qkv_TND: Tensor, rotation: Rotation, attention: HeadAttention) -> Tensor:
        """What the rows read of their sequences, heads side by side."""
        if isinstance(attention, ProjectionAttention):
            return self._attend_projection(qkv_TND, rotation, attention)
        qk_TND, v_TGD = qkv_TND.split_with_sizes((self._num_rotated, self._num_kv_heads), 1)
        if self._qk_norm is not None:
            qk_TND = self._qk_norm.forward(qk_TND, self._qk_norm.weight_ND)
        turned_TND = rotation.apply(qk_TND)
        q_THD, k_TGD = turned_TND.split_with_sizes((self._num_heads, self._num_kv_heads), 1)
        out_THD = attention.attend(
            self._layer, q_THD, k_TGD, v_TGD, scale=self._scale, sliding_window=self._window
        )
        return out_THD.flatten(1)

    def _attend_projection(
        self, qkv_TND: Tensor, rotation: Rotation, attention: ProjectionAttention
    ) -> Tensor:
        norm = self._qk_norm
        out_THD = attention.attend_projection(
            self._layer,
            qkv_TND,
            None if norm is None else norm.weight_ND,
            rotation.rows_T3C,
            eps=self._eps,
            scale=self._scale,
            sliding_window=self._window,
        )
        return out_THD.flatten(1)

    def sources(self) -> list[Source | OneOf]:
        norm = [] if self._qk_norm is None else self._qk_norm.sources()
        places = zip(self.kv_scale_2.unbind(), self._scale_names, strict=True)
        scales = tuple(everything(into, name, "ones") for into, name in places)
        return [*self._qkv.sources(), *norm, OneOf(((), scales)), *self._out.sources()]
