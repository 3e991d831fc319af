"""Products of one or two rows with a weight: out = x weight^T, at the speed of reading the weight.

A program reads a few whole rows of the weight in one go, before it waits for the kernel that
makes `x`; every load is under way before the first is used. With `gated`, row n of the first half
of the weight and row n of the second are one program's, and out = silu(gate) * up.

When to use: on a GPU, for at most `MAX_ROWS` rows, where cuBLAS launches kernels made for tiles.
More rows need each `x` more often than the weight, and cuBLAS wins.

Shapes: T rows, K columns, N outputs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from kernels.launch import has_pdl, refuse_unless

MAX_ROWS = 2
MAX_COLUMNS = 16384
MAX_COLUMNS_OF_TWO = 8192
SHORT = 2048
TILES = {(1, True): (8192, 4), (1, False): (4096, 8), (2, True): (8192, 4), (2, False): (8192, 4)}
"""By rows, and by whether a row is short: numbers of the weight that a program reads at once, and
its warps. Measured on an H200."""


@triton.jit
def _skinny_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    num_out,
    num_in,
    ROWS: tl.constexpr,
    GATED: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    outs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = tl.arange(0, BLOCK_K)
    inside = (outs < num_out)[:, None] & (cols < num_in)[None, :]
    offsets = outs.to(tl.int64)[:, None] * num_in + cols[None, :]
    weight = tl.load(weight_ptr + offsets, mask=inside, other=0.0)
    if GATED:
        up = tl.load(weight_ptr + num_out * num_in + offsets, mask=inside, other=0.0)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    for row in tl.static_range(ROWS):
        x = tl.load(x_ptr + row * num_in + cols, mask=cols < num_in, other=0.0).to(tl.float32)
        out = tl.sum(weight.to(tl.float32) * x[None, :], axis=1)
        if BIAS:
            out += tl.load(bias_ptr + outs, mask=outs < num_out, other=0.0).to(tl.float32)
        if GATED:
            ups = tl.sum(up.to(tl.float32) * x[None, :], axis=1)
            if BIAS:
                ups += tl.load(bias_ptr + num_out + outs, mask=outs < num_out, other=0.0)
            out = out / (1.0 + tl.exp(-out)) * ups
        tl.store(out_ptr + row * num_out + outs, out, mask=outs < num_out)


def skinny_linear(
    x_TK: Tensor,
    weight_NK: Tensor,
    bias_N: Tensor | None = None,
    *,
    gated: bool = False,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    tile: int | None = None,
    num_warps: int | None = None,
) -> Tensor:
    """(T, N), or (T, N / 2) if gated; written to `out` where the caller has a place for it."""
    num_rows, num_in = x_TK.shape
    num_out = weight_NK.shape[0] // 2 if gated else weight_NK.shape[0]
    refuse_unless(
        weight_NK.shape[1] == num_in and (not gated or weight_NK.shape[0] % 2 == 0),
        lambda: f"x {tuple(x_TK.shape)} and weight {tuple(weight_NK.shape)} do not belong together",
    )
    refuse_unless(
        0 < num_rows <= MAX_ROWS and num_in <= MAX_COLUMNS,
        lambda: f"x {tuple(x_TK.shape)} has more than {MAX_ROWS} rows or {MAX_COLUMNS} columns",
    )
    refuse_unless(
        x_TK.is_contiguous() and weight_NK.is_contiguous(), "x and weight must be contiguous"
    )
    if out is None:
        out = torch.empty(num_rows, num_out, dtype=out_dtype or x_TK.dtype, device=x_TK.device)
    refuse_unless(
        out.shape == (num_rows, num_out) and out.is_contiguous(),
        lambda: f"out {tuple(out.shape)} must be contiguous and {(num_rows, num_out)}",
    )
    best_tile, best_warps = TILES[num_rows, num_in <= SHORT]
    tile, num_warps = tile or best_tile, num_warps or best_warps
    block_k = triton.next_power_of_2(num_in)
    block_n = max(1, tile // block_k // (2 if gated else 1))
    pdl = has_pdl(x_TK)
    _skinny_kernel[(triton.cdiv(num_out, block_n),)](
        x_TK,
        weight_NK,
        weight_NK if bias_N is None else bias_N,
        out,
        num_out,
        num_in,
        ROWS=num_rows,
        GATED=gated,
        BIAS=bias_N is not None,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        PDL=pdl,
        num_warps=num_warps,
        launch_pdl=pdl,
    )
    return out


def fits(x_TK: Tensor) -> bool:
    """Whether `skinny_linear` is the way to multiply `x` by a weight."""
    num_rows, num_in = x_TK.shape
    if not x_TK.is_cuda or not 0 < num_rows <= MAX_ROWS:
        return False
    return num_in <= (MAX_COLUMNS if num_rows == 1 else MAX_COLUMNS_OF_TWO)


def skinny_linear_reference(
    x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None, *, gated: bool = False
) -> Tensor:
    """What `skinny_linear` must equal, in plain torch."""
    bias = None if bias_N is None else bias_N.float()
    out = functional.linear(x_TK.float(), weight_NK.float(), bias)
    if gated:
        gate, up = out.chunk(2, dim=-1)
        out = functional.silu(gate) * up
    return out.to(x_TK.dtype)
