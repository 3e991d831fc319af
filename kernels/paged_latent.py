"""Attention over a compressed latent in pages: all heads read one row of W numbers a token.

    out = softmax(q rows^T * scale) rows[:, :R]       W = R + D: a latent, and a key that is rotated

The heads are the rows of a tensor-core product, so a token's row is read once for many of them, and
it is key and value at the same time. Two launches:

`latent_rows`: every query by itself, its tokens cut into parts as in `kernels.paged_decode`. Its
tokens are those before it in its sequence, or K tokens chosen for it (sparse attention).

`latent_chunks`: rows of prompts, several rows with some heads each in a program, which walks over
the sequence's tokens up to its last row; blocks of rows come from `cut_chunks`.

When to use: on a GPU. The first launch depends on nothing but the number of rows and the split, so
it can be captured in a CUDA graph.

    16 heads, 1 row:  a program has 16 x 1 queries;   16 heads, a chunk: 16 heads x 4 rows

Shapes: T rows, H heads, W, R and D as above, X tokens of the cache, S slots, N pages of a slot,
K chosen tokens, M blocks of rows.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from kernels.launch import begin, has_pdl, refuse_unless
from kernels.paged_prefill import cut_chunks
from kernels.split_kv import LOG2_E, MAX_SPLITS, Split, combine_kernel, part_of

LEAST_PART = 128
"""Tokens that are worth a program."""
MAX_BLOCKS = 65535
"""What CUDA allows a grid in its second direction."""


class Tiles(NamedTuple):
    """Heads and rows of a program, tokens that it reads at once, and how it is run."""

    heads: int
    rows: int
    tokens: int
    num_warps: int
    num_stages: int


def row_tiles(num_heads: int, dtype: torch.dtype) -> Tiles:
    """For single rows: as many heads as share a read, as long as their sums fit in registers.

    With R = 512 and 16 heads the compiler takes 190 registers of each thread, so two programs share
    an SM; with 32 heads 170 of twice as many threads; with 64 all 255.

    >>> row_tiles(16, torch.bfloat16), row_tiles(128, torch.bfloat16)
    (Tiles(heads=16, rows=1, tokens=32, num_warps=4, num_stages=2), \
Tiles(heads=64, rows=1, tokens=32, num_warps=8, num_stages=2))
    """
    heads = min(64, max(16, triton.next_power_of_2(num_heads)))
    if dtype == torch.float32:
        return Tiles(min(heads, 32), 1, 16, 4, 2)
    return Tiles(heads, 1, 32, 4 if heads == 16 else 8, 2)


def chunk_tiles(num_heads: int, dtype: torch.dtype) -> Tiles:
    """For chunks: 64 queries, of neighbouring rows if there are not so many heads.

    >>> chunk_tiles(16, torch.bfloat16)
    Tiles(heads=16, rows=4, tokens=32, num_warps=8, num_stages=2)
    """
    queries = 32 if dtype == torch.float32 else 64
    heads = min(queries, triton.next_power_of_2(num_heads))
    return Tiles(heads, queries // heads, 16 if dtype == torch.float32 else 32, 8, 2)


def choose_latent_split(
    num_rows: int, num_heads: int, longest: int, dtype: torch.dtype, *, num_programs: int
) -> Split:
    """Parts enough that `num_programs` programs are busy; one, where there are rows enough.

    >>> choose_latent_split(1, 16, 8192, torch.bfloat16, num_programs=264)
    Split(num_splits=64, min_part=128)
    >>> choose_latent_split(512, 16, 8192, torch.bfloat16, num_programs=264)
    Split(num_splits=1, min_part=128)
    """
    groups = num_rows * triton.cdiv(num_heads, row_tiles(num_heads, dtype).heads)
    wanted = num_programs // max(groups, 1)
    return Split(max(1, min(wanted, MAX_SPLITS, triton.cdiv(longest, LEAST_PART))), LEAST_PART)


@triton.jit
def _attend_tokens(
    tokens,
    seen,
    exists,
    q,
    q_turned,
    out,
    total,
    highest,
    table,
    rows_ptr,
    scale_log2,
    width,
    rank,
    RANK: tl.constexpr,
    TURNED: tl.constexpr,
    PAGE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One block of tokens for all queries of a program; `exists` guards reads, `seen` scores."""
    cols = tl.arange(0, RANK)
    turned_cols = tl.arange(0, TURNED)
    pages = tl.load(table + tokens // PAGE, mask=exists, other=0).to(tl.int64)
    row = rows_ptr + (pages * PAGE + tokens % PAGE) * width
    inside = exists[:, None] & (cols < rank)[None, :]
    latent = tl.load(row[:, None] + cols[None, :], mask=inside, other=0.0)
    inside = exists[:, None] & (turned_cols < width - rank)[None, :]
    turned = tl.load(row[:, None] + (rank + turned_cols)[None, :], mask=inside, other=0.0)
    scores = tl.dot(q, tl.trans(latent), input_precision=PRECISION)
    scores = tl.dot(q_turned, tl.trans(turned), scores, input_precision=PRECISION)
    scores = tl.where(seen, scores * scale_log2, float("-inf"))
    new_highest = tl.maximum(highest, tl.max(scores, axis=1))
    weights = tl.exp2(scores - new_highest[:, None])
    shrink = tl.exp2(highest - new_highest)
    total = total * shrink + tl.sum(weights, axis=1)
    out = out * shrink[:, None]
    out = tl.dot(weights.to(latent.dtype), latent, out, input_precision=PRECISION)
    return out, total, new_highest


@triton.jit(do_not_specialize=["num_splits", "min_part", "num_chosen"])
def _rows_kernel(
    q_ptr,
    rows_ptr,
    table_ptr,
    slot_ptr,
    position_ptr,
    chosen_ptr,
    out_ptr,
    partial_ptr,
    weight_ptr,
    scale_log2,
    table_stride,
    num_chosen,
    num_splits,
    min_part,
    num_heads,
    width,
    rank,
    SPARSE: tl.constexpr,
    HEADS: tl.constexpr,
    RANK: tl.constexpr,
    TURNED: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    PART: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    split = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    begin(PDL)
    position = tl.load(position_ptr + row).to(tl.int32)
    _, length, stop = part_of(position, 0, num_splits, min_part, PART)
    start = split * length
    if start >= stop:
        return
    end = tl.minimum(start + length, stop)
    head = tl.program_id(0) * HEADS + tl.arange(0, HEADS)
    cols = tl.arange(0, RANK)
    turned_cols = tl.arange(0, TURNED)
    in_heads = head < num_heads
    heads = row * num_heads + head
    inside = in_heads[:, None] & (cols < rank)[None, :]
    q = tl.load(q_ptr + heads[:, None] * width + cols[None, :], mask=inside, other=0.0)
    q_turned = tl.load(
        q_ptr + heads[:, None] * width + (rank + turned_cols)[None, :],
        mask=in_heads[:, None] & (turned_cols < width - rank)[None, :],
        other=0.0,
    )
    table = table_ptr + tl.load(slot_ptr + row) * table_stride
    highest = tl.full((HEADS,), float("-inf"), tl.float32)
    total = tl.zeros((HEADS,), tl.float32)
    out = tl.zeros((HEADS, RANK), tl.float32)
    for at in tl.range(start, end, BLOCK, num_stages=STAGES):
        tokens = at + tl.arange(0, BLOCK)
        exists = tokens < end
        if SPARSE:
            tokens = tl.load(chosen_ptr + row * num_chosen + tokens, mask=exists, other=0)
        out, total, highest = _attend_tokens(
            tokens, exists[None, :], exists, q, q_turned, out, total, highest, table, rows_ptr,
            scale_log2, width, rank, RANK=RANK, TURNED=TURNED, PAGE=PAGE, PRECISION=PRECISION,
        )  # fmt: skip
    out = out / total[:, None]
    if stop <= length:
        tl.store(out_ptr + heads[:, None] * rank + cols[None, :], out, mask=inside)
    else:
        parts = heads * num_splits + split
        tl.store(partial_ptr + parts[:, None] * rank + cols[None, :], out, mask=inside)
        tl.store(weight_ptr + parts, highest + tl.log2(total), mask=in_heads)


@triton.jit
def _chunks_kernel(
    q_ptr,
    rows_ptr,
    table_ptr,
    block_ptr,
    out_ptr,
    scale_log2,
    table_stride,
    num_heads,
    width,
    rank,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    RANK: tl.constexpr,
    TURNED: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    block = tl.num_programs(1) - 1 - tl.program_id(1)  # a chunk's last rows take longest
    first_row = tl.load(block_ptr + block * 4)
    num_rows = tl.load(block_ptr + block * 4 + 1).to(tl.int32)
    first_token = tl.load(block_ptr + block * 4 + 2).to(tl.int32)
    slot = tl.load(block_ptr + block * 4 + 3)
    query = tl.arange(0, HEADS * ROWS)
    row = query // HEADS
    head = tl.program_id(0) * HEADS + query % HEADS
    cols = tl.arange(0, RANK)
    turned_cols = tl.arange(0, TURNED)
    is_query = (row < num_rows) & (head < num_heads)
    heads = (first_row + row) * num_heads + head
    inside = is_query[:, None] & (cols < rank)[None, :]
    q = tl.load(q_ptr + heads[:, None] * width + cols[None, :], mask=inside, other=0.0)
    q_turned = tl.load(
        q_ptr + heads[:, None] * width + (rank + turned_cols)[None, :],
        mask=is_query[:, None] & (turned_cols < width - rank)[None, :],
        other=0.0,
    )
    positions = first_token + row
    table = table_ptr + slot * table_stride
    end = first_token + num_rows
    # NOTE: a row may see nothing in a block; its highest stays finite, so no NaN arises.
    highest = tl.full((HEADS * ROWS,), -1.0e30, tl.float32)
    total = tl.zeros((HEADS * ROWS,), tl.float32)
    out = tl.zeros((HEADS * ROWS, RANK), tl.float32)
    for at in tl.range(0, end, BLOCK, num_stages=STAGES):
        tokens = at + tl.arange(0, BLOCK)
        seen = tokens[None, :] <= positions[:, None]
        out, total, highest = _attend_tokens(
            tokens, seen, tokens < end, q, q_turned, out, total, highest, table, rows_ptr,
            scale_log2, width, rank, RANK=RANK, TURNED=TURNED, PAGE=PAGE, PRECISION=PRECISION,
        )  # fmt: skip
    out = out / total[:, None]
    tl.store(out_ptr + heads[:, None] * rank + cols[None, :], out, mask=inside)


def latent_rows(
    q_THW: Tensor,
    rows_XW: Tensor,
    table_SN: Tensor,
    slots_T: Tensor,
    positions_T: Tensor,
    out_THR: Tensor,
    *,
    page_size: int,
    split: Split,
    scale: float,
    chosen_TK: Tensor | None = None,
    tiles: Tiles | None = None,
) -> None:
    """Fill `out_THR`: row t reads tokens 0 to `positions_T[t]` of slot `slots_T[t]`.

    With `chosen_TK` it reads its first min(position + 1, K) numbers of tokens instead.
    """
    num_rows, num_heads, width = q_THW.shape
    rank = out_THR.shape[2]
    _check(q_THW, rows_XW, table_SN, out_THR)
    refuse_unless(
        len(slots_T) == len(positions_T) == num_rows,
        lambda: f"{num_rows} rows come with {len(slots_T)} slots and {len(positions_T)} positions",
    )
    refuse_unless(
        split.min_part % LEAST_PART == 0 and 0 < split.num_splits <= MAX_SPLITS,
        lambda: f"{split}: parts must be multiples of {LEAST_PART}, and at most {MAX_SPLITS}",
    )
    if num_rows == 0:
        return
    num_chosen = 0
    if chosen_TK is not None:
        num_chosen = chosen_TK.shape[1]
        refuse_unless(
            chosen_TK.shape[0] == num_rows and chosen_TK.is_contiguous() and num_chosen > 0,
            lambda: f"{num_rows} rows come with tokens {tuple(chosen_TK.shape)}",
        )
        positions_T = positions_T.clamp(max=num_chosen - 1)
    tiles = tiles or row_tiles(num_heads, q_THW.dtype)
    pdl = has_pdl(q_THW)
    parts = (num_rows, num_heads, split.num_splits) if split.num_splits > 1 else (1, 1, 1)
    partial = torch.empty(*parts, rank, dtype=torch.float32, device=q_THW.device)
    weight = torch.empty(parts, dtype=torch.float32, device=q_THW.device)
    _rows_kernel[(triton.cdiv(num_heads, tiles.heads), split.num_splits, num_rows)](
        q_THW,
        rows_XW,
        table_SN,
        slots_T,
        positions_T,
        positions_T if chosen_TK is None else chosen_TK,
        out_THR,
        partial,
        weight,
        scale * LOG2_E,
        table_SN.shape[1],
        num_chosen,
        split.num_splits,
        split.min_part,
        num_heads,
        width,
        rank,
        SPARSE=chosen_TK is not None,
        HEADS=tiles.heads,
        RANK=max(16, triton.next_power_of_2(rank)),
        TURNED=max(16, triton.next_power_of_2(width - rank)),
        PAGE=page_size,
        BLOCK=tiles.tokens,
        PART=LEAST_PART,
        STAGES=tiles.num_stages,
        PRECISION=_precision(q_THW),
        PDL=pdl,
        num_warps=tiles.num_warps,
        launch_pdl=pdl,
    )
    if split.num_splits > 1:
        combine_kernel[(num_rows, num_heads)](
            partial,
            weight,
            positions_T,
            out_THR,
            0,
            split.num_splits,
            split.min_part,
            num_heads,
            rank,
            SPLITS=MAX_SPLITS,
            DIM=max(16, triton.next_power_of_2(rank)),
            BLOCK=LEAST_PART,
            AT_ONCE=8,
            PDL=pdl,
            num_warps=4,
            launch_pdl=pdl,
        )


def cut_latent_chunks(
    chunks: Iterable[tuple[int, int, int, int]], num_heads: int, dtype: torch.dtype
) -> NDArray[np.int64]:
    """Blocks of rows as `latent_chunks` takes them: see `cut_chunks`."""
    return cut_chunks(chunks, chunk_tiles(num_heads, dtype).rows)


def latent_chunks(
    q_THW: Tensor,
    rows_XW: Tensor,
    table_SN: Tensor,
    blocks_M4: Tensor,
    out_THR: Tensor,
    *,
    page_size: int,
    scale: float,
) -> None:
    """Fill the rows of `out_THR` that `blocks_M4` names (see `cut_latent_chunks`)."""
    num_heads, width = q_THW.shape[1:]
    rank = out_THR.shape[2]
    _check(q_THW, rows_XW, table_SN, out_THR)
    refuse_unless(blocks_M4.is_contiguous(), "blocks of rows must be contiguous")
    if len(blocks_M4) == 0:
        return
    refuse_unless(
        len(blocks_M4) <= MAX_BLOCKS,
        lambda: (
            f"{len(blocks_M4)} blocks of rows are more than the {MAX_BLOCKS} of one launch: lower "
            "max_num_batched_tokens"
        ),
    )
    tiles = chunk_tiles(num_heads, q_THW.dtype)
    _chunks_kernel[(triton.cdiv(num_heads, tiles.heads), len(blocks_M4))](
        q_THW,
        rows_XW,
        table_SN,
        blocks_M4,
        out_THR,
        scale * LOG2_E,
        table_SN.shape[1],
        num_heads,
        width,
        rank,
        HEADS=tiles.heads,
        ROWS=tiles.rows,
        RANK=max(16, triton.next_power_of_2(rank)),
        TURNED=max(16, triton.next_power_of_2(width - rank)),
        PAGE=page_size,
        BLOCK=tiles.tokens,
        STAGES=tiles.num_stages,
        PRECISION=_precision(q_THW),
        num_warps=tiles.num_warps,
    )


def _precision(q_THW: Tensor) -> str:
    return "ieee" if q_THW.dtype == torch.float32 else "tf32"


def _check(q_THW: Tensor, rows_XW: Tensor, table_SN: Tensor, out_THR: Tensor) -> None:
    num_rows, num_heads, width = q_THW.shape
    refuse_unless(
        rows_XW.dim() == 2 and rows_XW.shape[1] == width and rows_XW.dtype == q_THW.dtype,
        lambda: (
            f"q {tuple(q_THW.shape)} of {q_THW.dtype} cannot read rows {tuple(rows_XW.shape)} of "
            f"{rows_XW.dtype}"
        ),
    )
    refuse_unless(
        out_THR.shape[:2] == (num_rows, num_heads) and 0 < out_THR.shape[2] < width,
        lambda: f"q {tuple(q_THW.shape)} cannot fill {tuple(out_THR.shape)}",
    )
    tensors = (q_THW, rows_XW, table_SN, out_THR)
    refuse_unless(all(each.is_contiguous() for each in tensors), "all tensors must be contiguous")
