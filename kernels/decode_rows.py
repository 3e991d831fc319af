"""The two ends of a captured decode step: rows from slots, and tokens back to slots.

Both run inside the CUDA graph, so a steady decode needs nothing of the host: `open_rows` reads
each row's last token and finds its place in the cache; `close_rows` takes the likeliest id of each
row, leaves it as the slot's last token, moves the row one position on, and writes ids and highest
logits where the host reads them: slot `turn` of a ring in pinned memory, which needs no copy.

`likeliest` is the argmax alone, for steps that are not captured. The lowest id wins a tie. A row
with a NaN has a highest logit of infinity, which is how poisoned rows are told.

When to use: on a GPU. Two launches read the logits once, where torch's max over a long row is one
slow launch.

Shapes: B rows, V vocabulary, S slots, N pages of a slot, K blocks of the vocabulary, R ring.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import begin, has_pdl, refuse_unless

BLOCK = 4096


class Rows(NamedTuple):
    """What a captured decode keeps on the device from one step to the next."""

    slots_B: Tensor
    positions_B: Tensor
    """int64; rows of `spare_slot` stay at 0."""
    last_token_S: Tensor
    turn_1: Tensor
    """int32; how many steps have been opened."""
    ring_R2B: Tensor
    """int32, pinned: ids, then the bits of the highest logits."""
    spare_slot: int
    """The slot of rows that nobody wants."""


@triton.jit(do_not_specialize=["num_rows"])
def _open_kernel(
    slot_ptr,
    position_ptr,
    last_token_ptr,
    table_ptr,
    turn_ptr,
    id_ptr,
    place_ptr,
    table_stride,
    num_rows,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = rows < num_rows
    begin(PDL)
    slots = tl.load(slot_ptr + rows, mask=inside, other=0)
    positions = tl.load(position_ptr + rows, mask=inside, other=0)
    ids = tl.load(last_token_ptr + slots, mask=inside, other=0)
    tl.store(id_ptr + rows, ids, mask=inside)
    pages = tl.load(table_ptr + slots * table_stride + positions // PAGE, mask=inside, other=0)
    tl.store(place_ptr + rows, pages.to(tl.int64) * PAGE + positions % PAGE, mask=inside)
    if tl.program_id(0) == 0:
        tl.store(turn_ptr, tl.load(turn_ptr) + 1)


@triton.jit
def _highest_kernel(
    logits_ptr,
    value_ptr,
    id_ptr,
    vocab_size,
    row_stride,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    block = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    ids = block * BLOCK + tl.arange(0, BLOCK)
    begin(PDL)
    logits = tl.load(
        logits_ptr + row * row_stride + ids, mask=ids < vocab_size, other=float("-inf")
    ).to(tl.float32)
    logits = tl.where(logits != logits, float("inf"), logits)
    value, at = tl.max(logits, axis=0, return_indices=True)
    tl.store(value_ptr + row * tl.num_programs(0) + block, value)
    tl.store(id_ptr + row * tl.num_programs(0) + block, block * BLOCK + at)


@triton.jit
def _close_kernel(
    value_ptr,
    id_ptr,
    out_id_ptr,
    out_value_ptr,
    slot_ptr,
    position_ptr,
    last_token_ptr,
    turn_ptr,
    ring_ptr,
    num_blocks,
    spare_slot,
    ring_turns,
    ring_rows,
    CLOSE: tl.constexpr,
    BLOCKS: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    blocks = tl.arange(0, BLOCKS)
    inside = blocks < num_blocks
    begin(PDL)
    values = tl.load(value_ptr + row * num_blocks + blocks, mask=inside, other=float("-inf"))
    value, block = tl.max(values, axis=0, return_indices=True)
    token = tl.load(id_ptr + row * num_blocks + block)
    tl.store(out_id_ptr + row, token.to(tl.int64))
    tl.store(out_value_ptr + row, value)
    if CLOSE:
        slot = tl.load(slot_ptr + row)
        tl.store(last_token_ptr + slot, token.to(tl.int64))
        if slot != spare_slot:
            tl.store(position_ptr + row, tl.load(position_ptr + row) + 1)
        turn = (tl.load(turn_ptr) % ring_turns) * 2 * ring_rows
        tl.store(ring_ptr + turn + row, token)
        tl.store(ring_ptr + turn + ring_rows + row, value.to(tl.int32, bitcast=True))


def open_rows(rows: Rows, table_SN: Tensor, *, page_size: int) -> tuple[Tensor, Tensor]:
    """(ids, places in the cache) of the rows, int64; counts the turn."""
    num_rows = len(rows.slots_B)
    refuse_unless(num_rows > 0, "a captured step has at least one row")
    refuse_unless(table_SN.is_contiguous(), "the page table must be contiguous")
    ids_B = torch.empty_like(rows.positions_B)
    places_B = torch.empty_like(rows.positions_B)
    pdl = has_pdl(table_SN)
    _open_kernel[(triton.cdiv(num_rows, 256),)](
        rows.slots_B,
        rows.positions_B,
        rows.last_token_S,
        table_SN,
        rows.turn_1,
        ids_B,
        places_B,
        table_SN.shape[1],
        num_rows,
        PAGE=page_size,
        BLOCK=256,
        PDL=pdl,
        launch_pdl=pdl,
    )
    return ids_B, places_B


def likeliest(logits_BV: Tensor) -> tuple[Tensor, Tensor]:
    """(highest logit, its id as int64) of each row."""
    return _close(logits_BV, None)


def close_rows(logits_BV: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
    """`likeliest`, told to the slots and to the host."""
    refuse_unless(
        len(logits_BV) == len(rows.slots_B) <= rows.ring_R2B.shape[2],
        lambda: f"{len(logits_BV)} rows of logits for {len(rows.slots_B)} rows",
    )
    return _close(logits_BV, rows)


def _close(logits_BV: Tensor, rows: Rows | None) -> tuple[Tensor, Tensor]:
    num_rows, vocab_size = logits_BV.shape
    refuse_unless(logits_BV.stride(1) == 1, "a row of logits must be contiguous")
    num_blocks = triton.cdiv(vocab_size, BLOCK)
    values_BK = torch.empty(num_rows, num_blocks, dtype=torch.float32, device=logits_BV.device)
    ids_BK = torch.empty(num_rows, num_blocks, dtype=torch.int32, device=logits_BV.device)
    pdl = has_pdl(logits_BV)
    if num_rows:
        _highest_kernel[(num_blocks, num_rows)](
            logits_BV,
            values_BK,
            ids_BK,
            vocab_size,
            logits_BV.stride(0),
            BLOCK=BLOCK,
            PDL=pdl,
            num_warps=8,
            launch_pdl=pdl,
        )
    return best_of_blocks(values_BK, ids_BK, rows)


def best_of_blocks(
    values_BK: Tensor, ids_BK: Tensor, rows: Rows | None = None
) -> tuple[Tensor, Tensor]:
    """(highest value, its id as int64) of each row, from its blocks' highest and their ids."""
    num_rows, num_blocks = values_BK.shape
    ids_B = torch.empty(num_rows, dtype=torch.int64, device=values_BK.device)
    highest_B = torch.empty(num_rows, dtype=torch.float32, device=values_BK.device)
    if num_rows == 0:
        return highest_B, ids_B
    pdl = has_pdl(values_BK)
    _close_kernel[(num_rows,)](
        values_BK,
        ids_BK,
        ids_B,
        highest_B,
        ids_B if rows is None else rows.slots_B,
        ids_B if rows is None else rows.positions_B,
        ids_B if rows is None else rows.last_token_S,
        ids_BK if rows is None else rows.turn_1,
        ids_BK if rows is None else rows.ring_R2B,
        num_blocks,
        -1 if rows is None else rows.spare_slot,
        1 if rows is None else rows.ring_R2B.shape[0],
        1 if rows is None else rows.ring_R2B.shape[2],
        CLOSE=rows is not None,
        BLOCKS=triton.next_power_of_2(num_blocks),
        PDL=pdl,
        num_warps=1,
        launch_pdl=pdl,
    )
    return highest_B, ids_B


def likeliest_reference(logits_BV: Tensor) -> tuple[Tensor, Tensor]:
    """What `likeliest` must equal, in plain torch."""
    seen_BV = logits_BV.float().masked_fill(logits_BV.isnan(), float("inf"))
    highest_B = seen_BV.amax(dim=-1)
    return highest_B, (seen_BV == highest_B[:, None]).int().argmax(dim=-1)
