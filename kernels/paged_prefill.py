"""Causal attention of chunks of prompts over keys and values in pages: flash attention.

A program takes some tokens of one chunk for all the heads that share keys, and walks over the
sequence's tokens up to its last one: the rows of its products are those tokens' queries, token by
token. So a short chunk fills a program's rows with heads, and what lies on the diagonal, half of
which is for nothing, is small. The rows of a step are cut into blocks on the host (`cut_chunks`),
once for all layers, and a block into programs here; the keys of the chunk itself are in the cache
already.

When to use: on a GPU, for chunks of any length at any start, several in a launch.

    two chunks, of 130 rows from token 0 of slot 3 and 5 rows from token 64 of slot 1, behind 2
    decodes: blocks (row, count, token, slot) = (2, 128, 0, 3), (130, 2, 128, 3), (132, 5, 64, 1)

    4 heads share keys, programs have 128 rows: 32 tokens each, 4 programs a block, of which the
    second block needs 1 and the third 1; the others end at once, as those of blocks of no rows do

Shapes: T rows, H heads, G kv heads, D head dim, X tokens of the cache, S slots, N pages of a slot,
C chunks, M blocks of rows.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from kernels.fp8 import NO_SCALES, Scales, computes_in_half, refuse_other_scales
from kernels.launch import refuse_unless

BLOCK_ROWS = 128
LOG2_E = 1.4426950408889634


class PrefillTiles(NamedTuple):
    """Rows of a program, tokens that it reads at once, and how it is run.

    With 3 or 4 stages the keys and values of the next tokens are read while these are attended to,
    with 5 those after them too: stages come in twos, because a page's number is read before it.
    """

    rows: int
    tokens: int
    num_stages: int
    num_warps: int
    max_registers: int | None = None
    """Of a thread. 128 let two programs of 8 warps share a multiprocessor."""


LARGE_TILES = PrefillTiles(128, 64, 3, 4)
"""For any numbers and heads."""
SHARED_TILES = PrefillTiles(128, 64, 3, 8, 128)
"""For a Hopper GPU: two programs of 8 warps share a multiprocessor, so that one computes while the
other waits: 516 TFLOP/s against 446 for a prompt of 8192 (tests/bench/LOG.md)."""


def choose_tiles(q_dtype: torch.dtype, cache_dtype: torch.dtype, head_dim: int) -> PrefillTiles:
    """What was quickest for numbers of 16 bits and heads of up to 128 of them; `LARGE_TILES` else.

    >>> choose_tiles(torch.bfloat16, torch.bfloat16, 128) is SHARED_TILES
    True
    """
    fits = q_dtype.itemsize == cache_dtype.itemsize == 2 and head_dim <= 128
    return SHARED_TILES if fits else LARGE_TILES


def cut_chunks(
    chunks: Iterable[tuple[int, int, int, int]], most_rows: int = BLOCK_ROWS
) -> NDArray[np.int64]:
    """Blocks (M, 4) of (row, rows, token, slot) for chunks of the same four.

    >>> cut_chunks([(2, 130, 0, 3), (132, 5, 64, 1)]).tolist()
    [[2, 128, 0, 3], [130, 2, 128, 3], [132, 5, 64, 1]]
    """
    row_C, count_C, token_C, slot_C = np.array(list(chunks), np.int64).reshape(-1, 4).T
    num_blocks_C = -(-count_C // most_rows)
    chunk_M = np.repeat(np.arange(len(count_C)), num_blocks_C)
    first_C = np.cumsum(num_blocks_C) - num_blocks_C
    at_M = most_rows * (np.arange(len(chunk_M)) - first_C[chunk_M])
    blocks_M4 = np.empty((len(chunk_M), 4), np.int64)
    blocks_M4[:, 0] = row_C[chunk_M] + at_M
    blocks_M4[:, 1] = np.minimum(most_rows, count_C[chunk_M] - at_M)
    blocks_M4[:, 2] = token_C[chunk_M] + at_M
    blocks_M4[:, 3] = slot_C[chunk_M]
    return blocks_M4


@triton.jit
def _attend_block(
    at,
    end,
    q,
    out,
    total,
    highest,
    table,
    keys_ptr,
    values_ptr,
    positions,
    dims,
    in_head,
    scale_log2,
    window,
    TOKEN_STRIDE: tl.constexpr,
    MASKED: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Tokens `at` to `at + BLOCK`; without `MASKED` every row sees all of them."""
    order = tl.arange(0, BLOCK)
    if BLOCK % PAGE == 0:  # what does not depend on `at` is worked out once
        pages_ptr, in_page = table + at // PAGE + order // PAGE, order % PAGE
    else:
        pages_ptr, in_page = table + (at + order) // PAGE, (at + order) % PAGE
    if MASKED:
        exists = at + order < end
        pages = tl.load(pages_ptr, mask=exists, other=0)
        inside = exists[:, None] & in_head
    else:
        pages = tl.load(pages_ptr)
        inside = in_head
    if WIDE:
        pages = pages.to(tl.int64)
    offsets_in_page = (in_page * TOKEN_STRIDE)[:, None] + dims[None, :]
    offsets = (pages * (PAGE * TOKEN_STRIDE))[:, None] + offsets_in_page
    keys = tl.load(keys_ptr + offsets, mask=inside, other=0.0).to(q.dtype)
    scores = tl.dot(q, tl.trans(keys), input_precision=PRECISION)
    if MASKED:
        last = positions - at
        seen = order[None, :] <= last[:, None]
        if window is not None:
            seen = seen & (order[None, :] > last[:, None] - window)
        scores = tl.where(seen, scores, float("-inf"))
    # NOTE: a row may see nothing in a block; its highest stays finite, so no NaN arises.
    new_highest = tl.maximum(highest, tl.max(scores, axis=1) * scale_log2)
    weights = tl.exp2(scores * scale_log2 - new_highest[:, None])
    shrink = tl.exp2(highest - new_highest)
    values = tl.load(values_ptr + offsets, mask=inside, other=0.0).to(q.dtype)
    total = total * shrink + tl.sum(weights, axis=1)
    out = out * shrink[:, None]
    out = tl.dot(weights.to(values.dtype), values, out, input_precision=PRECISION)
    return out, total, new_highest


@triton.jit
def _prefill_kernel(
    q_ptr,
    keys_ptr,
    values_ptr,
    table_ptr,
    block_ptr,
    out_ptr,
    scale_log2,
    value_scale,
    window,
    table_stride,
    KV_HEADS: tl.constexpr,
    SHARING: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    HALF: tl.constexpr,
):
    kv_head = tl.program_id(0)
    TOKENS: tl.constexpr = ROWS // SHARING
    # What comes last in a chunk takes longest, so it begins first.
    skipped = (tl.num_programs(1) - 1 - tl.program_id(1)) * TOKENS
    block_ptr += (tl.num_programs(2) - 1 - tl.program_id(2)) * 4
    num_tokens = tl.minimum(tl.load(block_ptr + 1).to(tl.int32) - skipped, TOKENS)
    if num_tokens <= 0:
        return
    first_row = tl.load(block_ptr) + skipped
    first_token = tl.load(block_ptr + 2).to(tl.int32) + skipped
    table = table_ptr + tl.load(block_ptr + 3) * table_stride
    rows = tl.arange(0, ROWS)
    dims = tl.arange(0, DIM)
    in_head = (dims < HEAD_DIM)[None, :] if HEAD_DIM < DIM else tl.full((1, DIM), True, tl.int1)
    heads = rows // SHARING * (KV_HEADS * SHARING) + rows % SHARING
    q_offsets = (heads * HEAD_DIM)[:, None] + dims[None, :]
    first_q = (first_row * KV_HEADS + kv_head) * (SHARING * HEAD_DIM)
    inside_q = (rows < num_tokens * SHARING)[:, None] & in_head
    q = tl.load(q_ptr + first_q + q_offsets, mask=inside_q, other=0.0)
    if HALF:
        q = q.to(tl.float16)
    positions = first_token + rows // SHARING
    keys_ptr += kv_head * HEAD_DIM
    values_ptr += kv_head * HEAD_DIM
    end = first_token + num_tokens
    start = 0
    masked_from = (first_token + 1) // BLOCK * BLOCK
    if window is not None:
        start = tl.maximum(first_token + 1 - window, 0) // BLOCK * BLOCK
        masked_from = start
    highest = tl.full((ROWS,), -1.0e30, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    out = tl.zeros((ROWS, DIM), tl.float32)
    for at in tl.range(start, masked_from, BLOCK, num_stages=STAGES):
        out, total, highest = _attend_block(
            at, end, q, out, total, highest, table, keys_ptr, values_ptr, positions, dims, in_head,
            scale_log2, window, TOKEN_STRIDE=KV_HEADS * HEAD_DIM,
            MASKED=False, PAGE=PAGE, BLOCK=BLOCK, WIDE=WIDE, PRECISION=PRECISION,
        )  # fmt: skip
    for at in tl.range(masked_from, end, BLOCK, num_stages=STAGES):
        out, total, highest = _attend_block(
            at, end, q, out, total, highest, table, keys_ptr, values_ptr, positions, dims, in_head,
            scale_log2, window, TOKEN_STRIDE=KV_HEADS * HEAD_DIM,
            MASKED=True, PAGE=PAGE, BLOCK=BLOCK, WIDE=WIDE, PRECISION=PRECISION,
        )  # fmt: skip
    factor = 1.0 / tl.where(total == 0.0, 1.0, total)
    if value_scale is not None:
        factor *= value_scale
    tl.store(out_ptr + first_q + q_offsets, out * factor[:, None], mask=inside_q)


def paged_prefill(
    q_THD: Tensor,
    keys_XGD: Tensor,
    values_XGD: Tensor,
    table_SN: Tensor,
    blocks_M4: Tensor,
    out_THD: Tensor,
    *,
    page_size: int,
    scale: float,
    sliding_window: int | None,
    scales: Scales = NO_SCALES,
    tiles: PrefillTiles | None = None,
) -> None:
    """Fill the rows of `out_THD` that `blocks_M4` names; the others are left alone.

    A block has up to `BLOCK_ROWS` rows and may have none. `tiles` are `choose_tiles`' if none are
    given. ValueError: see the sentences below.
    """
    _, num_heads, head_dim = q_THD.shape
    num_kv_heads = keys_XGD.shape[1]
    refuse_unless(
        num_heads % num_kv_heads == 0 and keys_XGD.shape == values_XGD.shape,
        lambda: (
            f"{num_heads} heads cannot share the heads of keys {tuple(keys_XGD.shape)} and values "
            f"{tuple(values_XGD.shape)}"
        ),
    )
    refuse_unless(out_THD.shape == q_THD.shape, "out must have the shape of q")
    tensors = (q_THD, keys_XGD, values_XGD, table_SN, blocks_M4, out_THD)
    refuse_unless(all(each.is_contiguous() for each in tensors), "all tensors must be contiguous")
    refuse_other_scales(keys_XGD, scales)
    sharing = num_heads // num_kv_heads
    tiles = tiles or choose_tiles(q_THD.dtype, keys_XGD.dtype, head_dim)
    refuse_unless(
        sharing <= tiles.rows,
        lambda: f"{sharing} heads share keys, but a program has {tiles.rows} rows: take more",
    )
    refuse_unless(scale > 0, lambda: f"scores are multiplied by {scale}, which must be positive")
    if len(blocks_M4) == 0:
        return
    num_programs = triton.cdiv(BLOCK_ROWS, tiles.rows // sharing)
    _prefill_kernel[(num_kv_heads, num_programs, len(blocks_M4))](
        q_THD,
        keys_XGD,
        values_XGD,
        table_SN,
        blocks_M4,
        out_THD,
        (scale if scales.key is None else scale * scales.key) * LOG2_E,
        scales.value,
        sliding_window,
        table_SN.shape[1],
        KV_HEADS=num_kv_heads,
        SHARING=sharing,
        HEAD_DIM=head_dim,
        PAGE=page_size,
        DIM=max(16, triton.next_power_of_2(head_dim)),
        ROWS=tiles.rows,
        BLOCK=tiles.tokens,
        STAGES=tiles.num_stages,
        WIDE=keys_XGD.numel() >= 2**31,
        PRECISION="ieee" if q_THD.dtype == torch.float32 else "tf32",
        HALF=computes_in_half(q_THD.dtype, keys_XGD.dtype),
        num_warps=tiles.num_warps,
        maxnreg=tiles.max_registers,
    )
