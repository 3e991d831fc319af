"""Attention on a GPU over keys and values of heads: our Triton kernels read the pages.

`GpuAttention` serves any step: decodes first, then chunks' rows. `prepare` takes a step's rows from
the host; `prepare_decodes` takes rows that are on the device already, as a CUDA graph needs it, and
`prepare_mixed` takes such with chunks.
`workers.gpu_latent_attention` is its like for caches of latents, `workers.attention` for CPUs.

Shapes: T rows, B decodes, H heads, G kv heads, D head dim, N heads of a projection, M blocks of
rows, X tokens of the cache.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.launch import num_sms_of
from kernels.paged_attention import store_kv
from kernels.paged_decode import Cut, cut_sequences, num_shares_of, paged_decode
from kernels.paged_prefill import cut_chunks, paged_prefill
from kernels.rope_store import rope_store
from parallel.dp_attention import Upload
from workers.batch import ProjectionAttention, StepRows
from workers.cache import PagedCache
from workers.device_table import DeviceTable


class _Decodes(NamedTuple):
    slots_B: Tensor
    positions_B: Tensor
    cuts: dict[int | None, Cut]
    """By sliding window; found by the first layer that needs them."""


class GpuAttention(ProjectionAttention):
    """Made once; one of the `prepare`s is called before each forward."""

    unmeasured_bytes = 0
    """A step of long sequences takes no more than one of short ones."""

    def __init__(self, cache: PagedCache, table: DeviceTable, *, max_decodes: int) -> None:
        """`max_decodes` are the rows of the largest step of decodes, padding included."""
        self._cache = cache
        self._table = table
        device = cache.device
        num_kv_heads = cache.layer(0)[0].shape[2]
        self._num_shares = num_shares_of(num_kv_heads, num_sms_of(device))
        num_counters = max_decodes * num_kv_heads
        self._counters_C = torch.zeros(num_counters, dtype=torch.int32, device=device)
        self._places_T = torch.empty(0, dtype=torch.int64, device=device)
        self._decodes: _Decodes | None = None
        self._blocks_M4: Tensor | None = None

    def prepare(
        self, rows: StepRows, positions_T: Tensor, places_T: Tensor, upload: Upload
    ) -> None:
        """Take a step's rows; the tensors are `rows`' own, on the device."""
        self._places_T = places_T
        self._decodes = self._blocks_M4 = None
        count = len(rows.decode_slots_B)
        if count:
            self._decodes = _Decodes(upload(rows.decode_slots_B), positions_T[:count], {})
        if rows.chunks:
            self._blocks_M4 = upload(cut_chunks(chunk.span for chunk in rows.chunks))

    def prepare_decodes(self, slots_B: Tensor, positions_B: Tensor, places_B: Tensor) -> None:
        """Take decodes whose slots, positions and places are read when the kernels run."""
        self._places_T = places_B
        self._decodes = _Decodes(slots_B, positions_B, {})
        self._blocks_M4 = None

    def prepare_mixed(
        self, slots_B: Tensor, positions_B: Tensor, places_T: Tensor, blocks_M4: Tensor
    ) -> None:
        """Take decodes and chunks that are read when the kernels run, for a CUDA graph.

        The first rows may be decodes and are none at position -1; a block may have no rows.
        """
        self._places_T = places_T
        self._decodes = _Decodes(slots_B, positions_B, {})
        self._blocks_M4 = blocks_M4

    def attend(
        self,
        layer: int,
        q_THD: Tensor,
        k_UGD: Tensor,
        v_UGD: Tensor,
        *,
        scale: float,
        sliding_window: int | None,
    ) -> Tensor:
        """See `workers.batch.HeadAttention`."""
        keys_XGD, values_XGD = self._cache.rows(layer)
        scales = self._cache.scales(layer)
        store_kv(keys_XGD, self._places_T, k_UGD, scales.key)
        store_kv(values_XGD, self._places_T, v_UGD, scales.value)
        return self._attend(layer, q_THD.contiguous(), scale, sliding_window)

    def attend_projection(
        self,
        layer: int,
        qkv_TND: Tensor,
        norm_ND: Tensor | None,
        rotation_T3C: Tensor,
        *,
        eps: float,
        scale: float,
        sliding_window: int | None,
    ) -> Tensor:
        """See `workers.batch.ProjectionAttention`."""
        keys_XGD, values_XGD = self._cache.rows(layer)
        q_THD = rope_store(
            qkv_TND,
            norm_ND,
            rotation_T3C,
            self._places_T,
            keys_XGD,
            values_XGD,
            eps=eps,
            scales=self._cache.scales(layer),
        )
        return self._attend(layer, q_THD, scale, sliding_window)

    def _attend(self, layer: int, q_THD: Tensor, scale: float, window: int | None) -> Tensor:
        keys_XGD, values_XGD = self._cache.rows(layer)
        out_THD = torch.empty_like(q_THD)
        decodes = self._decodes
        if decodes is not None:
            count = len(decodes.slots_B)
            paged_decode(
                q_THD[:count],
                keys_XGD,
                values_XGD,
                self._table.table_SN,
                decodes.slots_B,
                decodes.positions_B,
                self._cut(decodes, window),
                out_THD[:count],
                self._counters_C,
                page_size=self._cache.page_size,
                scale=scale,
                sliding_window=window,
                scales=self._cache.scales(layer),
            )
        if self._blocks_M4 is not None:
            paged_prefill(
                q_THD,
                keys_XGD,
                values_XGD,
                self._table.table_SN,
                self._blocks_M4,
                out_THD,
                page_size=self._cache.page_size,
                scale=scale,
                sliding_window=window,
                scales=self._cache.scales(layer),
            )
        return out_THD

    def _cut(self, decodes: _Decodes, window: int | None) -> Cut:
        if window not in decodes.cuts:
            decodes.cuts[window] = cut_sequences(
                decodes.positions_B, self._num_shares, sliding_window=window
            )
        return decodes.cuts[window]
