"""Attention of a step over the paged cache: what is prepared once a step, and which kernel runs.

`PagedAttention` splits a step's rows into its decodes and its chunks, prepares for each what all
layers share (page lists, masks), and calls a kernel a layer: torch's, for CPUs and as the
reference. `workers.gpu_attention` and `workers.gpu_latent_attention` are those of GPUs.

Shapes: T rows, B decodes, H heads, G kv heads, D head dim, W numbers of a latent's row, N pages.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.fp8 import NO_SCALES, Scales
from kernels.latent_attention import sparse_latent_attention
from kernels.paged_attention import chunk_attention, decode_attention, decode_mask, store_kv
from workers.batch import (
    BatchState,
    Chunk,
    HeadAttention,
    IndexRows,
    LatentRowAttention,
    StepRows,
)
from workers.cache import PagedCache


class _Decodes(NamedTuple):
    """The step's decodes, padded to the longest."""

    num_seqs: int
    positions_B: Tensor
    length: int
    pages_BN: Tensor
    masks: dict[int | None, Tensor]
    """By sliding window; made by the first layer that needs it."""


class PagedAttention(HeadAttention, LatentRowAttention):
    """Over either cache. Made once; `prepare` is called once a step, before the model's forward."""

    def __init__(self, cache: PagedCache, state: BatchState, device: torch.device) -> None:
        self._cache = cache
        self._state = state
        self._device = device
        self._kv_rows_T = self._positions_T = torch.empty(0, dtype=torch.int64, device=device)
        self._longest = 0
        self._decodes: _Decodes | None = None
        self._chunks: list[tuple[Chunk, Tensor]] = []
        self._pages_of = (-1, -1)
        self._pages_BN = torch.empty(0, dtype=torch.int32, device=device)

    def prepare(
        self,
        rows: StepRows,
        positions_T: Tensor,
        kv_rows_T: Tensor,
        upload: Callable[[NDArray[np.int64]], Tensor],
    ) -> None:
        """Take the step's rows that attend here; the tensors are `rows`' own, on the device."""
        self._kv_rows_T, self._positions_T = kv_rows_T, positions_T
        self._longest = int(rows.positions_T.max(initial=-1)) + 1
        self._decodes = self._prepare_decodes(rows, positions_T)
        self._chunks = [(chunk, self._chunk_pages(chunk)) for chunk in rows.chunks]

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
        store_kv(keys_XGD, self._kv_rows_T, k_UGD, scales.key)
        store_kv(values_XGD, self._kv_rows_T, v_UGD, scales.value)
        return self._attend(self._cache.layer(layer), q_THD, scale, sliding_window, scales)

    def attend_latent(
        self,
        layer: int,
        q_THW: Tensor,
        row_UW: Tensor,
        *,
        num_values: int,
        scale: float,
        index: IndexRows | None,
    ) -> Tensor:
        """See `workers.batch.LatentRowAttention`."""
        rows_XW, *keys = self._cache.rows(layer)
        store_kv(rows_XW, self._kv_rows_T, row_UW)
        if index is not None:
            store_kv(keys[0], self._kv_rows_T, index.key_UE)
            if self._longest > index.num_chosen:
                return self._attend_sparsely(layer, q_THW, index, num_values, scale)
        rows_PS1W = self._cache.layer(layer)[0].unsqueeze(2)
        pages = (rows_PS1W, rows_PS1W)
        return self._attend(pages, q_THW, scale, None, NO_SCALES)[..., :num_values]

    def _attend_sparsely(
        self, layer: int, q_THW: Tensor, index: IndexRows, num_values: int, scale: float
    ) -> Tensor:
        rows_PSW, keys_PSE = self._cache.layer(layer)
        parts: list[Tensor] = []
        for rows, pages_N, length in self._sequences():
            out = sparse_latent_attention(
                q_THW[rows],
                rows_PSW.index_select(0, pages_N).flatten(0, 1)[:length],
                index.q_TJE[rows],
                index.weight_TJ[rows],
                keys_PSE.index_select(0, pages_N).flatten(0, 1)[:length],
                self._positions_T[rows],
                num_chosen=index.num_chosen,
                num_values=num_values,
                scale=scale,
            )
            parts.append(out)
        return torch.cat(parts)

    def _sequences(self) -> Iterator[tuple[slice, Tensor, int]]:
        """Each sequence's rows, its pages and the tokens in them that a row may see."""
        decodes = self._decodes
        if decodes is not None:
            for row, pages_N in enumerate(decodes.pages_BN.view(decodes.num_seqs, -1)):
                yield slice(row, row + 1), pages_N, decodes.length
        for chunk, pages_N in self._chunks:
            yield slice(chunk.row, chunk.row + chunk.length), pages_N, chunk.stop

    def _attend(
        self,
        kv: tuple[Tensor, ...],
        q_THD: Tensor,
        scale: float,
        window: int | None,
        scales: Scales,
    ) -> Tensor:
        """Over keys and values in pages (P, S, G, D)."""
        decodes = self._decodes
        if decodes is not None and not self._chunks:
            return self._decode(kv, q_THD, decodes, scale, window, scales)
        parts: list[Tensor] = []
        if decodes is not None:
            q_BHD = q_THD[: decodes.num_seqs]
            parts.append(self._decode(kv, q_BHD, decodes, scale, window, scales))
        for chunk, pages_N in self._chunks:
            q_CHD = q_THD[chunk.row : chunk.row + chunk.length]
            parts.append(self._chunk(kv, q_CHD, chunk, pages_N, scale, window, scales))
        if not parts:  # a part of a replica may have no rows to read for
            return q_THD
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _decode(
        self,
        kv: tuple[Tensor, ...],
        q_BHD: Tensor,
        decodes: _Decodes,
        scale: float,
        window: int | None,
        scales: Scales,
    ) -> Tensor:
        keys_PSGD, values_PSGD = kv
        return decode_attention(
            q_BHD,
            keys_PSGD,
            values_PSGD,
            decodes.pages_BN,
            length=decodes.length,
            mask_B11L=self._mask(decodes, window, q_BHD.dtype),
            scale=scale,
            scales=scales,
        )

    def _chunk(
        self,
        kv: tuple[Tensor, ...],
        q_CHD: Tensor,
        chunk: Chunk,
        pages_N: Tensor,
        scale: float,
        window: int | None,
        scales: Scales,
    ) -> Tensor:
        keys_PSGD, values_PSGD = kv
        return chunk_attention(
            q_CHD,
            keys_PSGD,
            values_PSGD,
            pages_N,
            start=chunk.start,
            scale=scale,
            sliding_window=window,
            scales=scales,
        )

    def _prepare_decodes(self, rows: StepRows, positions_T: Tensor) -> _Decodes | None:
        count = len(rows.decode_slots_B)
        if count == 0:
            return None
        length = int(rows.positions_T[:count].max()) + 1
        num_pages = -(-length // self._cache.page_size)
        # The page lists are those of the step before unless a slot came, went or grew.
        if self._pages_of != (self._state.table_version, num_pages):
            table = self._state.page_table_SN[rows.decode_slots_B, :num_pages]
            self._pages_BN = torch.from_numpy(table.reshape(-1)).to(self._device)
            self._pages_of = (self._state.table_version, num_pages)
        return _Decodes(count, positions_T[:count], length, self._pages_BN, {})

    def _chunk_pages(self, chunk: Chunk) -> Tensor:
        num_pages = -(-chunk.stop // self._cache.page_size)
        pages = self._state.page_table_SN[chunk.slot, :num_pages].copy()
        return torch.from_numpy(pages).to(self._device)

    def _mask(self, decodes: _Decodes, window: int | None, dtype: torch.dtype) -> Tensor | None:
        if window is not None and window >= decodes.length:
            window = None
        if window is None and decodes.num_seqs == 1:
            return None
        if window not in decodes.masks:
            decodes.masks[window] = decode_mask(
                decodes.positions_B, decodes.length, sliding_window=window, dtype=dtype
            )
        return decodes.masks[window]
