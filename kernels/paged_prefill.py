"""Causal attention of chunks of prompts over keys and values in pages: flash attention.

A program takes up to `BLOCK_ROWS` rows of one chunk and one head, and walks over the sequence's
tokens up to its last row. The rows of a step are cut into such blocks on the host (`cut_chunks`),
once for all layers; the keys of the chunk itself are in the cache already.

When to use: on a GPU, for chunks of any length at any start, several in a launch.

    two chunks, of 130 rows from token 0 of slot 3 and 5 rows from token 64 of slot 1, behind 2
    decodes: blocks (row, count, token, slot) = (2, 128, 0, 3), (130, 2, 128, 3), (132, 5, 64, 1)

Shapes: T rows, H heads, G kv heads, D head dim, X tokens of the cache, S slots, N pages of a slot,
C chunks, M blocks of rows.
"""

from collections.abc import Iterable

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from kernels.fp8 import NO_SCALES, Scales, refuse_other_scales
from kernels.launch import refuse_unless

BLOCK_ROWS = 128
BLOCK_TOKENS = 64
LOG2_E = 1.4426950408889634


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
    scale_log2,
    window,
    token_stride,
    head_offset,
    head_dim,
    MASKED: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One block of tokens; without `MASKED` every row sees all of it."""
    tokens = at + tl.arange(0, BLOCK)
    exists = tokens < end
    in_head = dims < head_dim
    if MASKED:
        pages = tl.load(table + tokens // PAGE, mask=exists, other=0).to(tl.int64)
        inside = exists[:, None] & in_head[None, :]
    else:
        pages = tl.load(table + tokens // PAGE).to(tl.int64)
        inside = in_head[None, :]
    offsets = ((pages * PAGE + tokens % PAGE) * token_stride + head_offset)[:, None] + dims[None, :]
    keys = tl.load(keys_ptr + offsets, mask=inside, other=0.0).to(q.dtype)
    scores = tl.dot(q, tl.trans(keys), input_precision=PRECISION) * scale_log2
    if MASKED:
        seen = tokens[None, :] <= positions[:, None]
        if window > 0:
            seen = seen & (tokens[None, :] > positions[:, None] - window)
        scores = tl.where(seen, scores, float("-inf"))
    # NOTE: a row may see nothing in a block; its highest stays finite, so no NaN arises.
    new_highest = tl.maximum(highest, tl.max(scores, axis=1))
    weights = tl.exp2(scores - new_highest[:, None])
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
    num_heads,
    num_kv_heads,
    head_dim,
    PAGE: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    SKIP: tl.constexpr,
):
    block = tl.num_programs(1) - 1 - tl.program_id(1)  # a chunk's last rows take longest
    head = tl.program_id(0)
    first_row = tl.load(block_ptr + block * 4)
    num_rows = tl.load(block_ptr + block * 4 + 1).to(tl.int32)
    if SKIP:  # noqa: SIM102 - without it, the program has no such branch at all
        if num_rows == 0:
            return
    first_token = tl.load(block_ptr + block * 4 + 2).to(tl.int32)
    slot = tl.load(block_ptr + block * 4 + 3)
    head_offset = head // (num_heads // num_kv_heads) * head_dim
    rows = tl.arange(0, ROWS)
    dims = tl.arange(0, DIM)
    inside_q = (rows < num_rows)[:, None] & (dims < head_dim)[None, :]
    q_offsets = ((first_row + rows) * num_heads + head)[:, None] * head_dim + dims[None, :]
    q = tl.load(q_ptr + q_offsets, mask=inside_q, other=0.0)
    positions = first_token + rows
    table = table_ptr + slot * table_stride
    token_stride = num_kv_heads * head_dim
    end = first_token + num_rows
    start = 0
    masked_from = (first_token + 1) // BLOCK * BLOCK
    if window > 0:
        start = tl.maximum(first_token + 1 - window, 0) // BLOCK * BLOCK
        masked_from = start
    highest = tl.full((ROWS,), -1.0e30, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    out = tl.zeros((ROWS, DIM), tl.float32)
    for at in tl.range(start, masked_from, BLOCK, num_stages=STAGES):
        out, total, highest = _attend_block(
            at, end, q, out, total, highest, table, keys_ptr, values_ptr, positions, dims,
            scale_log2, window, token_stride, head_offset, head_dim,
            MASKED=False, PAGE=PAGE, BLOCK=BLOCK, PRECISION=PRECISION,
        )  # fmt: skip
    for at in tl.range(masked_from, end, BLOCK, num_stages=STAGES):
        out, total, highest = _attend_block(
            at, end, q, out, total, highest, table, keys_ptr, values_ptr, positions, dims,
            scale_log2, window, token_stride, head_offset, head_dim,
            MASKED=True, PAGE=PAGE, BLOCK=BLOCK, PRECISION=PRECISION,
        )  # fmt: skip
    out = out / tl.where(total == 0.0, 1.0, total)[:, None]
    if value_scale is not None:
        out *= value_scale
    tl.store(out_ptr + q_offsets, out, mask=inside_q)


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
    has_empty: bool = False,
    num_stages: int = 3,
    num_warps: int = 4,
) -> None:
    """Fill the rows of `out_THD` that `blocks_M4` names; the others are left alone.

    With `has_empty` many blocks may have no rows: their programs end at once.
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
    if len(blocks_M4) == 0:
        return
    _prefill_kernel[(num_heads, len(blocks_M4))](
        q_THD,
        keys_XGD,
        values_XGD,
        table_SN,
        blocks_M4,
        out_THD,
        (scale if scales.key is None else scale * scales.key) * LOG2_E,
        scales.value,
        0 if sliding_window is None else sliding_window,
        table_SN.shape[1],
        num_heads,
        num_kv_heads,
        head_dim,
        PAGE=page_size,
        DIM=max(16, triton.next_power_of_2(head_dim)),
        ROWS=BLOCK_ROWS,
        BLOCK=BLOCK_TOKENS,
        STAGES=num_stages,
        PRECISION="ieee" if q_THD.dtype == torch.float32 else "tf32",
        SKIP=has_empty,
        num_warps=num_warps,
    )
