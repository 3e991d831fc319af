"""Rotate the first heads of every row, behind a norm if they have one, and copy the other heads.

    out[t, n] = rotate(norm(x[t, n]))  for n < num_rotated,   x[t, n] for the rest

When to use: on a GPU, where queries, or keys and values, are wanted by themselves: with context
parallelism keys and values go to other ranks before anyone stores them. Where nobody does,
`kernels.rope_store` writes them to the cache in the same pass. A row's rotation is as there.
Everything between is in float32 and rounded once.

Shapes: T rows, N heads, R of them rotated, D head dim, C = D / 2.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import refuse_unless

HEADS_AT_ONCE = 8


@triton.jit
def _rope_rows_kernel(
    x_ptr,
    norm_ptr,
    rotation_ptr,
    out_ptr,
    num_heads,
    num_rotated,
    half,
    eps,
    NORM: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    cols = tl.arange(0, HALF)
    inside = (heads < num_heads)[:, None] & (cols < half)[None, :]
    turns = (heads < num_rotated)[:, None] & inside
    offsets = heads[:, None] * (2 * half) + cols[None, :]
    source = x_ptr + row * num_heads * (2 * half) + offsets
    low = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(source + half, mask=inside, other=0.0).to(tl.float32)
    normal_low, normal_high = low, high
    if NORM:
        squares = tl.sum(low * low + high * high, axis=1)
        inverse_rms = tl.rsqrt(squares / (2 * half) + eps)[:, None]
        weight = norm_ptr + offsets
        normal_low = low * inverse_rms * tl.load(weight, mask=turns, other=0.0).to(tl.float32)
        normal_high = (
            high * inverse_rms * tl.load(weight + half, mask=turns, other=0.0).to(tl.float32)
        )
    angle = rotation_ptr + row * 3 * half + cols
    cos = tl.load(angle, mask=cols < half, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(angle + 2 * half, mask=cols < half, other=0.0).to(tl.float32)[None, :]
    target = out_ptr + row * num_heads * (2 * half) + offsets
    tl.store(target, tl.where(turns, normal_low * cos - normal_high * sin, low), mask=inside)
    tl.store(
        target + half, tl.where(turns, normal_high * cos + normal_low * sin, high), mask=inside
    )


def rope_rows(
    x_TND: Tensor,
    norm_RD: Tensor | None,
    rotation_T3C: Tensor,
    out_TND: Tensor,
    *,
    num_rotated: int,
    eps: float,
) -> None:
    """Fill `out_TND`, which may be `x_TND`."""
    num_rows, num_heads, head_dim = x_TND.shape
    half = head_dim // 2
    refuse_unless(
        out_TND.shape == x_TND.shape and 0 <= num_rotated <= num_heads,
        lambda: (
            f"{num_rotated} heads of {tuple(x_TND.shape)} cannot be rotated into "
            f"{tuple(out_TND.shape)}"
        ),
    )
    refuse_unless(
        rotation_T3C.shape == (num_rows, 3, half),
        lambda: f"{num_rows} rows of {head_dim} come with rotation {tuple(rotation_T3C.shape)}",
    )
    refuse_unless(
        norm_RD is None or norm_RD.shape == (num_rotated, head_dim),
        "the norm must have a row for each head that is rotated",
    )
    tensors = (x_TND, rotation_T3C, out_TND, *(() if norm_RD is None else (norm_RD,)))
    refuse_unless(all(each.is_contiguous() for each in tensors), "all tensors must be contiguous")
    if num_rows == 0:
        return
    _rope_rows_kernel[(num_rows, triton.cdiv(num_heads, HEADS_AT_ONCE))](
        x_TND,
        x_TND if norm_RD is None else norm_RD,
        rotation_T3C,
        out_TND,
        num_heads,
        num_rotated,
        half,
        eps,
        NORM=norm_RD is not None,
        HEADS=HEADS_AT_ONCE,
        HALF=triton.next_power_of_2(half),
        num_warps=4,
    )


def rope_rows_reference(
    x_TND: Tensor,
    norm_RD: Tensor | None,
    rotation_T3C: Tensor,
    out_TND: Tensor,
    *,
    num_rotated: int,
    eps: float,
) -> None:
    """What `rope_rows` must equal, in plain torch."""
    x = x_TND[:, :num_rotated].float()
    if norm_RD is not None:
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * norm_RD.float()
    cos_T1C, _, sin_T1C = rotation_T3C.float().unsqueeze(1).unbind(2)
    low, high = x.chunk(2, dim=-1)
    turned = torch.cat((low * cos_T1C - high * sin_T1C, high * cos_T1C + low * sin_T1C), dim=-1)
    out_TND[:, num_rotated:] = x_TND[:, num_rotated:]
    out_TND[:, :num_rotated] = turned.to(x_TND.dtype)
