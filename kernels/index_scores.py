"""How well tokens in pages suit a row, by an indexer's heads (DeepSeek-V3.2).

    score = sum over heads j of weight_j * relu(q_j . key)      -inf for tokens behind the row

A program takes one row and a block of tokens: the heads are the rows of a tensor-core product.

When to use: on a GPU, before a `topk`. Every row has as many scores as `num_tokens`, so the launch
depends on no length and can be captured in a CUDA graph.

Shapes: T rows, J heads, E numbers of a key, X tokens of the cache, S slots, N pages of a slot,
L tokens that are scored.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import begin, has_pdl, refuse_unless

BLOCK_TOKENS = 128


@triton.jit(do_not_specialize=["num_tokens"])
def _score_kernel(
    q_ptr,
    weight_ptr,
    keys_ptr,
    table_ptr,
    slot_ptr,
    position_ptr,
    score_ptr,
    table_stride,
    num_tokens,
    num_heads,
    key_dim,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64)
    tokens = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    begin(PDL)
    position = tl.load(position_ptr + row)
    score = score_ptr + row * num_tokens + tokens
    exists = tokens <= position
    inside = tokens < num_tokens
    if tl.program_id(0) * BLOCK > position:
        tl.store(score, tl.full((BLOCK,), float("-inf"), tl.float32), mask=inside)
        return
    heads = tl.arange(0, HEADS)
    cols = tl.arange(0, DIM)
    in_q = (heads < num_heads)[:, None] & (cols < key_dim)[None, :]
    places = (row * num_heads + heads)[:, None] * key_dim + cols[None, :]
    q = tl.load(q_ptr + places, mask=in_q, other=0.0)
    weight = tl.load(weight_ptr + row * num_heads + heads, mask=heads < num_heads, other=0.0)
    table = table_ptr + tl.load(slot_ptr + row) * table_stride
    pages = tl.load(table + tokens // PAGE, mask=exists & inside, other=0).to(tl.int64)
    places = (pages * PAGE + tokens % PAGE) * key_dim
    in_keys = (exists & inside)[:, None] & (cols < key_dim)[None, :]
    keys = tl.load(keys_ptr + places[:, None] + cols[None, :], mask=in_keys, other=0.0)
    products = tl.dot(q, tl.trans(keys), input_precision=PRECISION)
    scores = tl.sum(tl.maximum(products, 0.0) * weight[:, None], axis=0)
    tl.store(score, tl.where(exists, scores, float("-inf")), mask=inside)


def index_scores(
    q_TJE: Tensor,
    weight_TJ: Tensor,
    keys_XE: Tensor,
    table_SN: Tensor,
    slots_T: Tensor,
    positions_T: Tensor,
    *,
    num_tokens: int,
    page_size: int,
) -> Tensor:
    """float32 (T, num_tokens): what row t gives tokens 0 to `positions_T[t]` of its slot."""
    num_rows, num_heads, key_dim = q_TJE.shape
    refuse_unless(
        weight_TJ.shape == (num_rows, num_heads) and weight_TJ.dtype == torch.float32,
        lambda: (
            f"q {tuple(q_TJE.shape)} comes with {weight_TJ.dtype} weights {tuple(weight_TJ.shape)}"
        ),
    )
    refuse_unless(
        keys_XE.shape[1] == key_dim and keys_XE.dtype == q_TJE.dtype,
        lambda: (
            f"q {tuple(q_TJE.shape)} cannot score keys {tuple(keys_XE.shape)} of {keys_XE.dtype}"
        ),
    )
    refuse_unless(
        len(slots_T) == len(positions_T) == num_rows
        and 0 < num_tokens <= table_SN.shape[1] * page_size,
        lambda: (
            f"{num_rows} rows come with {len(slots_T)} slots, {len(positions_T)} positions, and "
            f"{num_tokens} tokens of at most {table_SN.shape[1] * page_size}"
        ),
    )
    tensors = (q_TJE, weight_TJ, keys_XE, table_SN)
    refuse_unless(all(each.is_contiguous() for each in tensors), "all tensors must be contiguous")
    score_TL = torch.empty(num_rows, num_tokens, dtype=torch.float32, device=q_TJE.device)
    if num_rows == 0:
        return score_TL
    pdl = has_pdl(q_TJE)
    _score_kernel[(triton.cdiv(num_tokens, BLOCK_TOKENS), num_rows)](
        q_TJE,
        weight_TJ,
        keys_XE,
        table_SN,
        slots_T,
        positions_T,
        score_TL,
        table_SN.shape[1],
        num_tokens,
        num_heads,
        key_dim,
        HEADS=max(16, triton.next_power_of_2(num_heads)),
        DIM=max(16, triton.next_power_of_2(key_dim)),
        PAGE=page_size,
        BLOCK=BLOCK_TOKENS,
        PRECISION="ieee" if q_TJE.dtype == torch.float32 else "tf32",
        PDL=pdl,
        num_warps=4,
        launch_pdl=pdl,
    )
    return score_TL
