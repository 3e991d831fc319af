"""Attention on a GPU over a latent: a cache with one row a token, the same for all heads.

With an indexer the cache has its keys too, and wherever a sequence has more tokens than a row may
read, every row is read over the tokens that the indexer chooses for it.

`GpuLatentAttention` serves any step: decodes first, then chunks' rows. `prepare` takes a step's
rows from the host; `prepare_decodes` takes rows that are on the device already, as a CUDA graph
needs it. `workers.gpu_attention` is its like for keys and values of heads.

Shapes: T rows, B decodes, H heads, W numbers of a latent's row of which R are values too, K tokens
that are read, J heads of E numbers of the indexer, M blocks of rows, X tokens of the cache.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kernels.index_scores import index_scores
from kernels.launch import num_sms_of
from kernels.paged_attention import store_kv
from kernels.paged_latent import choose_latent_split, cut_latent_chunks, latent_chunks, latent_rows
from kernels.split_kv import Split
from parallel.dp_attention import Upload
from workers.batch import IndexRows, LatentRowAttention, StepRows
from workers.cache import PagedCache
from workers.device_table import DeviceTable

PROGRAMS_PER_SM = 2
CHOICE_BYTES = 2**27
"""For an indexer's scores and what it chooses by them, where rows are not captured in a graph; kept
free beside the largest step that is measured."""
ROW_MULTIPLE = 16
"""Rows of int64 from such a multiple on are aligned as the first are, so no kernel is compiled."""


def rows_at_once(longest: int, num_chosen: int) -> int:
    """Rows whose tokens are chosen in one go, so that they fit in `CHOICE_BYTES`.

    A row takes a score of 4 bytes for each token, and for each that is chosen its score and number,
    12 bytes; so 16 rows fit up to two million tokens.

    >>> rows_at_once(8192, 2048), rows_at_once(163840, 2048)
    (2336, 192)
    """
    most = CHOICE_BYTES // (4 * longest + 12 * num_chosen)
    return max(ROW_MULTIPLE, most // ROW_MULTIPLE * ROW_MULTIPLE)


class _Decodes(NamedTuple):
    slots_B: Tensor
    positions_B: Tensor
    split: Split


class GpuLatentAttention(LatentRowAttention):
    """Made once; one of the two `prepare`s is called before each forward."""

    def __init__(
        self, cache: PagedCache, table: DeviceTable, max_model_len: int, *, num_heads: int
    ) -> None:
        self._cache = cache
        self._table = table
        self._max_model_len = max_model_len
        self._num_heads = num_heads
        self._has_index = len(cache.parts) == 2
        self._num_programs = PROGRAMS_PER_SM * num_sms_of(cache.device)
        self._places_T = torch.empty(0, dtype=torch.int64, device=cache.device)
        self._slots_T = self._positions_T = self._places_T
        """Of all rows: an indexer chooses for each by itself. Slots only where there is one."""
        self._longest = 0
        self._decodes: _Decodes | None = None
        self._blocks_M4: Tensor | None = None
        self._is_captured = False

    @property
    def unmeasured_bytes(self) -> int:
        """What a step of long sequences takes beyond one of short ones, and of captured ones."""
        return CHOICE_BYTES if self._has_index else 0

    def prepare(
        self, rows: StepRows, positions_T: Tensor, places_T: Tensor, upload: Upload
    ) -> None:
        """Take a step's rows; the tensors are `rows`' own, on the device."""
        self._places_T, self._positions_T = places_T, positions_T
        self._longest = int(rows.positions_T.max(initial=-1)) + 1
        self._decodes = self._blocks_M4 = None
        self._is_captured = False
        count = len(rows.decode_slots_B)
        if count:
            longest = int(rows.positions_T[:count].max()) + 1
            slots_B = upload(rows.decode_slots_B)
            self._decodes = _Decodes(slots_B, positions_T[:count], self._split(count, longest))
        if rows.chunks:
            spans = [chunk.span for chunk in rows.chunks]
            dtype = self._cache.parts[0].dtype
            self._blocks_M4 = upload(cut_latent_chunks(spans, self._num_heads, dtype))
        if self._has_index:
            lengths = [chunk.length for chunk in rows.chunks]
            of_chunks = np.repeat([chunk.slot for chunk in rows.chunks], lengths)
            slots_T = np.concatenate([rows.decode_slots_B, of_chunks.astype(np.int64)])
            self._slots_T = upload(slots_T)

    def prepare_decodes(self, slots_B: Tensor, positions_B: Tensor, places_B: Tensor) -> None:
        """Take decodes whose slots, positions and places are read when the kernels run."""
        self._places_T = places_B
        self._slots_T, self._positions_T = slots_B, positions_B
        self._longest = self._max_model_len
        split = self._split(len(slots_B), self._max_model_len)
        self._decodes = _Decodes(slots_B, positions_B, split)
        self._blocks_M4 = None
        self._is_captured = True

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
        store_kv(rows_XW, self._places_T, row_UW)
        q_THW = q_THW.contiguous()
        out_THR = q_THW.new_empty(*q_THW.shape[:2], num_values)
        if index is not None:
            store_kv(keys[0], self._places_T, index.key_UE)
            if self._longest > index.num_chosen:
                self._read_chosen(q_THW, rows_XW, keys[0], index, out_THR, scale)
                return out_THR
        self._read_all(q_THW, rows_XW, out_THR, scale)
        return out_THR

    def _read_all(self, q_THW: Tensor, rows_XW: Tensor, out_THR: Tensor, scale: float) -> None:
        """Every row over all tokens up to itself."""
        decodes, page_size = self._decodes, self._cache.page_size
        if decodes is not None:
            count = len(decodes.slots_B)
            latent_rows(
                q_THW[:count],
                rows_XW,
                self._table.table_SN,
                decodes.slots_B,
                decodes.positions_B,
                out_THR[:count],
                page_size=page_size,
                split=decodes.split,
                scale=scale,
            )
        if self._blocks_M4 is not None:
            table_SN, blocks_M4 = self._table.table_SN, self._blocks_M4
            latent_chunks(
                q_THW, rows_XW, table_SN, blocks_M4, out_THR, page_size=page_size, scale=scale
            )

    def _read_chosen(
        self,
        q_THW: Tensor,
        rows_XW: Tensor,
        keys_XE: Tensor,
        index: IndexRows,
        out_THR: Tensor,
        scale: float,
    ) -> None:
        """Every row, of decodes and of chunks, over the tokens that suit it best."""
        num_rows = q_THW.shape[0]
        q_TJE, weight_TJ = index.q_TJE.contiguous(), index.weight_TJ.contiguous()
        at_once = num_rows  # captured: all, and a graph's memory is measured
        if not self._is_captured:
            at_once = rows_at_once(self._longest, index.num_chosen)
        for first in range(0, num_rows, at_once):
            rows = slice(first, first + at_once)
            slots_T, positions_T = self._slots_T[rows], self._positions_T[rows]
            # NOTE: no name keeps scores or choice while the next rows' are made.
            latent_rows(
                q_THW[rows],
                rows_XW,
                self._table.table_SN,
                slots_T,
                positions_T,
                out_THR[rows],
                page_size=self._cache.page_size,
                split=self._split(len(slots_T), index.num_chosen),
                scale=scale,
                chosen_TK=index_scores(
                    q_TJE[rows],
                    weight_TJ[rows],
                    keys_XE,
                    self._table.table_SN,
                    slots_T,
                    positions_T,
                    num_tokens=self._longest,
                    page_size=self._cache.page_size,
                )
                .topk(index.num_chosen, dim=1)
                .indices,
            )

    def _split(self, num_rows: int, longest: int) -> Split:
        return choose_latent_split(
            num_rows,
            self._num_heads,
            longest,
            self._cache.parts[0].dtype,
            num_programs=self._num_programs,
        )
