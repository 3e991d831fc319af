"""Attention on a GPU: the page table lives on the device, and our Triton kernels read it.

Over keys and values, or over a latent (a cache whose first part is one row for all heads); with an
indexer, over the tokens that it chooses wherever a sequence has more of them than it may read.

`DeviceTable` mirrors `BatchState.page_table_SN` by what changed, so a step that nobody joins and
that grows no page uploads nothing. It has one slot more than there are requests: the spare one,
whose page is nobody's, for the rows that fill a captured step up.

`GpuAttention` serves any step: decodes first, then chunks' rows. `prepare` takes a step's rows from
the host; `prepare_decodes` takes rows that are on the device already, as a CUDA graph needs it.

Shapes: T rows, B decodes, H heads, G kv heads, D head dim, W numbers of a latent's row of which R
are values too, K tokens that are read, N pages of a slot, M blocks of rows.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.index_scores import index_scores
from kernels.paged_attention import store_kv
from kernels.paged_decode import Cut, cut_sequences, num_shares_of, paged_decode
from kernels.paged_latent import choose_latent_split, cut_latent_chunks, latent_chunks, latent_rows
from kernels.paged_prefill import cut_chunks, paged_prefill
from kernels.rope_store import rope_store
from kernels.split_kv import Split
from workers.batch import IndexRows, ProjectionAttention, StepRows, TableChange
from workers.cache import PagedCache

LATENT_PROGRAMS_PER_SM = 2
CPU_SMS = 4
"""As if a CPU, where the interpreter runs kernels for tests, had so many multiprocessors."""
CHOICE_BYTES = 2**27
"""For an indexer's scores and what it chooses by them, where rows are not captured in a graph; kept
free beside the largest step that is measured."""
ROW_MULTIPLE = 16
"""Rows of int64 from such a multiple on are aligned as the first are, so no kernel is compiled."""

Upload = Callable[[NDArray[np.int64]], Tensor]


def rows_at_once(longest: int, num_chosen: int) -> int:
    """Rows whose tokens are chosen in one go, so that they fit in `CHOICE_BYTES`.

    A row takes a score of 4 bytes for each token, and for each that is chosen its score and number,
    12 bytes; so 16 rows fit up to two million tokens.

    >>> rows_at_once(8192, 2048), rows_at_once(163840, 2048)
    (2336, 192)
    """
    most = CHOICE_BYTES // (4 * longest + 12 * num_chosen)
    return max(ROW_MULTIPLE, most // ROW_MULTIPLE * ROW_MULTIPLE)


class DeviceTable:
    """The slots' page lists on the device; `spare_slot` has `spare_page` for its only page."""

    def __init__(
        self, num_slots: int, num_pages_a_slot: int, spare_page: int, device: torch.device
    ) -> None:
        shape = (num_slots + 1, num_pages_a_slot)
        self.table_SN = torch.zeros(shape, dtype=torch.int32, device=device)
        self.spare_slot = num_slots
        self.table_SN[num_slots] = spare_page

    def update(self, changes: Sequence[TableChange], upload: Upload) -> None:
        """Write what a step's body changed, all in one go."""
        if not changes:
            return
        width = self.table_SN.shape[1]
        places = [
            np.arange(len(change.pages)) + (change.slot * width + change.first)
            for change in changes
        ]
        pages = np.concatenate([change.pages for change in changes])
        both = np.stack([np.concatenate(places), pages]).astype(np.int64)
        places_N, pages_N = upload(both.astype(np.int64)).unbind()
        self.table_SN.view(-1).index_copy_(0, places_N, pages_N.int())


class _Decodes(NamedTuple):
    slots_B: Tensor
    positions_B: Tensor
    split: Split | None
    """Of a latent; what has heads of its own is cut on the device."""
    cuts: dict[int | None, Cut]
    """By sliding window; found by the first layer that needs them."""


class GpuAttention(ProjectionAttention):
    """Made once; one of the two `prepare`s is called before each forward."""

    def __init__(
        self,
        cache: PagedCache,
        table: DeviceTable,
        max_model_len: int,
        *,
        num_heads: int,
        max_decodes: int,
    ) -> None:
        """`max_decodes` are the rows of the largest step of decodes, padding included."""
        self._cache = cache
        self._table = table
        self._max_model_len = max_model_len
        self._num_heads = num_heads
        device = cache.device
        rows_or_keys = cache.layer(0)[0]
        self._is_latent = rows_or_keys.dim() == 3
        self._has_index = self._is_latent and len(cache.parts) == 2
        self._num_kv_heads = 1 if self._is_latent else rows_or_keys.shape[2]
        num_sms = CPU_SMS
        if device.type == "cuda":
            num_sms = torch.cuda.get_device_properties(device).multi_processor_count
        self._num_latent_programs = LATENT_PROGRAMS_PER_SM * num_sms
        self._num_shares = num_shares_of(self._num_kv_heads, num_sms)
        num_counters = max_decodes * self._num_kv_heads
        self._counters_C = torch.zeros(num_counters, dtype=torch.int32, device=device)
        self._places_T = torch.empty(0, dtype=torch.int64, device=device)
        self._slots_T = self._positions_T = self._places_T
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
            split = self._latent_split(count, longest)
            self._decodes = _Decodes(slots_B, positions_T[:count], split, {})
        if rows.chunks:
            chunks = [(chunk.row, chunk.length, chunk.start, chunk.slot) for chunk in rows.chunks]
            blocks = cut_chunks(chunks)
            if self._is_latent:
                dtype = self._cache.parts[0].dtype
                blocks = cut_latent_chunks(chunks, self._num_heads, dtype)
            self._blocks_M4 = upload(blocks)
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
        self._blocks_M4 = None
        self._is_captured = True
        split = self._latent_split(len(slots_B), self._max_model_len)
        self._decodes = _Decodes(slots_B, positions_B, split, {})

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
        """See `workers.batch.Attention`."""
        keys_XGD, values_XGD = self._cache.rows(layer)
        store_kv(keys_XGD, self._places_T, k_UGD)
        store_kv(values_XGD, self._places_T, v_UGD)
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
            qkv_TND, norm_ND, rotation_T3C, self._places_T, keys_XGD, values_XGD, eps=eps
        )
        return self._attend(layer, q_THD, scale, sliding_window)

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
        """See `workers.batch.Attention`."""
        rows_XW, *keys = self._cache.rows(layer)
        store_kv(rows_XW, self._places_T, row_UW)
        q_THW = q_THW.contiguous()
        out_THR = q_THW.new_empty(*q_THW.shape[:2], num_values)
        if index is not None:
            store_kv(keys[0], self._places_T, index.key_UE)
            if self._longest > index.num_chosen:
                self._read_chosen(q_THW, rows_XW, keys[0], index, out_THR, scale)
                return out_THR
        decodes, page_size = self._decodes, self._cache.page_size
        if decodes is not None and decodes.split is not None:
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
        return out_THR

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
        num_rows, num_heads, _ = q_THW.shape
        q_TJE, weight_TJ = index.q_TJE.contiguous(), index.weight_TJ.contiguous()
        at_once = num_rows  # captured: all, and a graph's memory is measured
        if not self._is_captured:
            at_once = rows_at_once(self._longest, index.num_chosen)
        for first in range(0, num_rows, at_once):
            rows = slice(first, first + at_once)
            slots_T, positions_T = self._slots_T[rows], self._positions_T[rows]
            # NOTE: no name keeps scores or choice while the next rows' are made.
            split = choose_latent_split(
                len(slots_T),
                num_heads,
                index.num_chosen,
                q_THW.dtype,
                num_programs=self._num_latent_programs,
            )
            latent_rows(
                q_THW[rows],
                rows_XW,
                self._table.table_SN,
                slots_T,
                positions_T,
                out_THR[rows],
                page_size=self._cache.page_size,
                split=split,
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
            )
        return out_THD

    def _cut(self, decodes: _Decodes, window: int | None) -> Cut:
        if window not in decodes.cuts:
            decodes.cuts[window] = cut_sequences(
                decodes.positions_B, self._num_shares, sliding_window=window
            )
        return decodes.cuts[window]

    def _latent_split(self, num_seqs: int, longest: int) -> Split | None:
        if not self._is_latent:
            return None
        return choose_latent_split(
            num_seqs,
            self._num_heads,
            longest,
            self._cache.parts[0].dtype,
            num_programs=self._num_latent_programs,
        )
