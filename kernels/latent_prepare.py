"""What attention over a latent is given, in two passes where torch would make a dozen.

`latent_keys`: a projection's rows hold Q numbers that queries are made from, R of the latent and D
of the key that all heads share. The first two are normalised by root mean square, the key is
rotated, and latent and key become the row that is kept of a token.

`turn_queries`: the D numbers of every head that carry its position are rotated and put behind the
R numbers that its query asks of the latent.

When to use: on a GPU. Everything between is in float32 and rounded once. A row's rotation is three
rows of C = D / 2 numbers, as in `kernels.rope_store`; the pairs are coordinates c and C + c of
what comes out, and of what comes in too, unless they lie there side by side (`interleaved`).

    D = 4, interleaved: in [a0, b0, a1, b1] -> out [a0', a1', b0', b1']

Shapes: T rows, H heads, N plain numbers of a head, W = R + D, P = Q + R + D.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import begin, has_pdl, refuse_unless

HEADS_AT_ONCE = 16


@triton.jit
def _pair_places(cols, half, INTERLEAVED: tl.constexpr):
    """Where the first and the second coordinate of each pair come from."""
    if INTERLEAVED:
        first, second = 2 * cols, 2 * cols + 1
    else:
        first, second = cols, half + cols
    return first, second


@triton.jit
def _keys_kernel(
    x_ptr,
    query_norm_ptr,
    latent_norm_ptr,
    rotation_ptr,
    query_ptr,
    row_ptr,
    num_query,
    rank,
    half,
    eps,
    QUERY: tl.constexpr,
    RANK: tl.constexpr,
    HALF: tl.constexpr,
    HAS_QUERY: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    begin(PDL)
    x = x_ptr + row * (num_query + rank + 2 * half)
    if HAS_QUERY:
        cols = tl.arange(0, QUERY)
        inside = cols < num_query
        query = tl.load(x + cols, mask=inside, other=0.0).to(tl.float32)
        query *= tl.rsqrt(tl.sum(query * query, axis=0) / num_query + eps)
        query *= tl.load(query_norm_ptr + cols, mask=inside, other=0.0).to(tl.float32)
        tl.store(query_ptr + row * num_query + cols, query, mask=inside)
    cols = tl.arange(0, RANK)
    inside = cols < rank
    latent = tl.load(x + num_query + cols, mask=inside, other=0.0).to(tl.float32)
    latent *= tl.rsqrt(tl.sum(latent * latent, axis=0) / rank + eps)
    latent *= tl.load(latent_norm_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    out = row_ptr + row * (rank + 2 * half)
    tl.store(out + cols, latent, mask=inside)
    cols = tl.arange(0, HALF)
    inside = cols < half
    first, second = _pair_places(cols, half, INTERLEAVED)
    low = tl.load(x + num_query + rank + first, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(x + num_query + rank + second, mask=inside, other=0.0).to(tl.float32)
    angle = rotation_ptr + row * 3 * half + cols
    cos = tl.load(angle, mask=inside, other=0.0).to(tl.float32)
    sin = tl.load(angle + 2 * half, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + rank + cols, low * cos - high * sin, mask=inside)
    tl.store(out + rank + half + cols, high * cos + low * sin, mask=inside)


@triton.jit
def _queries_kernel(
    x_ptr,
    rotation_ptr,
    q_ptr,
    num_heads,
    num_plain,
    rank,
    half,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    cols = tl.arange(0, HALF)
    begin(PDL)
    inside = (heads < num_heads)[:, None] & (cols < half)[None, :]
    first, second = _pair_places(cols, half, INTERLEAVED)
    x = x_ptr + (row * num_heads + heads)[:, None] * (num_plain + 2 * half) + num_plain
    low = tl.load(x + first[None, :], mask=inside, other=0.0).to(tl.float32)
    high = tl.load(x + second[None, :], mask=inside, other=0.0).to(tl.float32)
    angle = rotation_ptr + row * 3 * half + cols
    cos = tl.load(angle, mask=cols < half, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(angle + 2 * half, mask=cols < half, other=0.0).to(tl.float32)[None, :]
    out = q_ptr + (row * num_heads + heads)[:, None] * (rank + 2 * half) + rank + cols[None, :]
    tl.store(out, low * cos - high * sin, mask=inside)
    tl.store(out + half, high * cos + low * sin, mask=inside)


def latent_keys(
    x_TP: Tensor,
    query_norm_Q: Tensor | None,
    latent_norm_R: Tensor,
    rotation_T3C: Tensor,
    *,
    eps: float,
    interleaved: bool,
) -> tuple[Tensor | None, Tensor]:
    """(what queries are made from (T, Q), or None without its norm; what is kept (T, W))."""
    num_rows, width = x_TP.shape
    half, rank = rotation_T3C.shape[2], len(latent_norm_R)
    num_query = 0 if query_norm_Q is None else len(query_norm_Q)
    refuse_unless(
        width == num_query + rank + 2 * half,
        lambda: f"rows of {width} are not {num_query} for queries, {rank} and {2 * half} rotated",
    )
    _check(x_TP, rotation_T3C, num_rows)
    query_TQ = x_TP.new_empty(num_rows, num_query)
    row_TW = x_TP.new_empty(num_rows, rank + 2 * half)
    if num_rows:
        pdl = has_pdl(x_TP)
        _keys_kernel[(num_rows,)](
            x_TP,
            latent_norm_R if query_norm_Q is None else query_norm_Q,
            latent_norm_R,
            rotation_T3C,
            query_TQ,
            row_TW,
            num_query,
            rank,
            half,
            eps,
            QUERY=triton.next_power_of_2(max(num_query, 1)),
            RANK=triton.next_power_of_2(rank),
            HALF=triton.next_power_of_2(half),
            HAS_QUERY=query_norm_Q is not None,
            INTERLEAVED=interleaved,
            PDL=pdl,
            num_warps=4,
            launch_pdl=pdl,
        )
    return (None if query_norm_Q is None else query_TQ), row_TW


def turn_queries(x_THX: Tensor, rotation_T3C: Tensor, q_THW: Tensor, *, interleaved: bool) -> None:
    """Fill the last D numbers of every head of `q_THW` from the last D of `x_THX`, rotated."""
    num_rows, num_heads, width = x_THX.shape
    half = rotation_T3C.shape[2]
    refuse_unless(
        q_THW.shape[:2] == (num_rows, num_heads) and min(width, q_THW.shape[2]) > 2 * half,
        lambda: (
            f"queries {tuple(x_THX.shape)} with {2 * half} rotated cannot fill {tuple(q_THW.shape)}"
        ),
    )
    _check(x_THX, rotation_T3C, num_rows)
    refuse_unless(q_THW.is_contiguous(), "all tensors must be contiguous")
    if num_rows == 0:
        return
    pdl = has_pdl(x_THX)
    _queries_kernel[(num_rows, triton.cdiv(num_heads, HEADS_AT_ONCE))](
        x_THX,
        rotation_T3C,
        q_THW,
        num_heads,
        width - 2 * half,
        q_THW.shape[2] - 2 * half,
        half,
        HEADS=HEADS_AT_ONCE,
        HALF=triton.next_power_of_2(half),
        INTERLEAVED=interleaved,
        PDL=pdl,
        num_warps=4,
        launch_pdl=pdl,
    )


def turned_reference(x_TXD: Tensor, rotation_T3C: Tensor, *, interleaved: bool) -> Tensor:
    """Rotated heads, in plain torch."""
    x = x_TXD.float()
    if interleaved:
        low, high = x[..., 0::2], x[..., 1::2]
    else:
        low, high = x.chunk(2, dim=-1)
    cos_T1C, _, sin_T1C = rotation_T3C.float().unsqueeze(1).unbind(2)
    turned = torch.cat((low * cos_T1C - high * sin_T1C, high * cos_T1C + low * sin_T1C), dim=-1)
    return turned.to(x_TXD.dtype)


def _check(x: Tensor, rotation_T3C: Tensor, num_rows: int) -> None:
    refuse_unless(
        rotation_T3C.shape[:2] == (num_rows, 3),
        lambda: f"{num_rows} rows come with rotation {tuple(rotation_T3C.shape)}",
    )
    refuse_unless(
        x.is_contiguous() and rotation_T3C.is_contiguous(), "all tensors must be contiguous"
    )
