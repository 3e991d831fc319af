"""Products of a few dozen rows with a weight: out = x weight^T, the weight as the tall operand.

Up to some 64 rows a product is a matter of reading the weight once. Here its rows are the M of the
tensor cores' tiles and `x` is the narrow side, so no tile is mostly padding; where a weight has too
few rows to fill the GPU, its columns are split, and a second launch adds the parts in order.

When to use: on a GPU, for the numbers of rows and the shapes that `choose_tiles` knows: those where
it was measured quicker than cuBLAS (tests/bench/LOG.md).

Shapes: T rows, K columns, N outputs, S parts of the columns.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from kernels.launch import begin, has_pdl, refuse_unless

MAX_ROWS = 128


class Tiles(NamedTuple):
    """Weight rows and columns of a tile, parts of the columns, and how a program is run."""

    outs: int
    inner: int
    splits: int
    num_stages: int
    num_warps: int


def choose_tiles(num_rows: int, num_in: int, num_out: int) -> Tiles | None:
    """The tiles for a product, or None where cuBLAS is as quick.

    >>> choose_tiles(32, 12288, 4096)
    Tiles(outs=64, inner=128, splits=2, num_stages=4, num_warps=4)
    >>> choose_tiles(32, 4096, 24576) is None
    True
    """
    if num_rows > 32 or not 1024 <= num_out <= 4096 or num_in < 1024:
        return None
    return Tiles(64, 128, min(8, 128 * 64 // num_out), 4, 4)


@triton.jit(do_not_specialize=["num_rows"])
def _narrow_kernel(
    x_ptr,
    weight_ptr,
    out_ptr,
    num_rows,
    num_out,
    num_in,
    PART: tl.constexpr,
    ROWS: tl.constexpr,
    OUTS: tl.constexpr,
    INNER: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    outs = tl.program_id(0) * OUTS + tl.arange(0, OUTS)
    split = tl.program_id(1)
    rows = tl.arange(0, ROWS)
    inners = tl.arange(0, INNER)
    in_rows, in_outs = rows < num_rows, outs < num_out
    weights = weight_ptr + outs.to(tl.int64)[:, None] * num_in
    xs = x_ptr + rows[None, :] * num_in
    total = tl.zeros((OUTS, ROWS), tl.float32)
    start = split * PART  # a constant: a load of several numbers needs to know that it is aligned
    end = tl.minimum(start + PART, num_in)
    begin(PDL)
    for at in tl.range(start, end, INNER, num_stages=STAGES):
        k = at + inners
        inside = k < end
        weight = tl.load(weights + k[None, :], mask=in_outs[:, None] & inside[None, :], other=0.0)
        x = tl.load(xs + k[:, None], mask=inside[:, None] & in_rows[None, :], other=0.0)
        total = tl.dot(weight, x, total, input_precision=PRECISION)
    place = (split * num_rows + rows).to(tl.int64)[:, None] * num_out + outs[None, :]
    tl.store(out_ptr + place, tl.trans(total), mask=in_rows[:, None] & in_outs[None, :])


@triton.jit(do_not_specialize=["num_numbers"])
def _add_parts_kernel(
    part_ptr, out_ptr, num_numbers, SPLITS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = places < num_numbers
    begin(PDL)
    total = tl.load(part_ptr + places, mask=inside, other=0.0)
    for split in tl.static_range(1, SPLITS):
        total += tl.load(part_ptr + split * num_numbers + places, mask=inside, other=0.0)
    tl.store(out_ptr + places, total, mask=inside)


def narrow_linear(
    x_TK: Tensor,
    weight_NK: Tensor,
    *,
    tiles: Tiles,
    out_dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """(T, N); written to `out` where the caller has a place for it."""
    num_rows, num_in = x_TK.shape
    num_out = weight_NK.shape[0]
    refuse_unless(
        weight_NK.shape[1] == num_in,
        lambda: f"x {tuple(x_TK.shape)} and weight {tuple(weight_NK.shape)} do not belong together",
    )
    refuse_unless(0 < num_rows <= MAX_ROWS, lambda: f"{num_rows} rows are not from 1 to {MAX_ROWS}")
    refuse_unless(
        x_TK.is_contiguous() and weight_NK.is_contiguous(), "x and weight must be contiguous"
    )
    device, pdl = x_TK.device, has_pdl(x_TK)
    if out is None:
        out = torch.empty(num_rows, num_out, dtype=out_dtype or x_TK.dtype, device=device)
    refuse_unless(
        out.shape == (num_rows, num_out) and out.is_contiguous(),
        lambda: f"out {tuple(out.shape)} must be contiguous and {(num_rows, num_out)}",
    )
    target = out
    if tiles.splits > 1:
        target = torch.empty(tiles.splits, num_rows, num_out, dtype=torch.float32, device=device)
    part = triton.cdiv(triton.cdiv(num_in, tiles.splits), tiles.inner) * tiles.inner
    _narrow_kernel[(triton.cdiv(num_out, tiles.outs), tiles.splits)](
        x_TK,
        weight_NK,
        target,
        num_rows,
        num_out,
        num_in,
        PART=part,
        ROWS=max(16, triton.next_power_of_2(num_rows)),
        OUTS=tiles.outs,
        INNER=tiles.inner,
        STAGES=tiles.num_stages,
        PRECISION="ieee" if x_TK.dtype == torch.float32 else "tf32",
        PDL=pdl,
        num_warps=tiles.num_warps,
        launch_pdl=pdl,
    )
    if tiles.splits > 1:
        _add_parts_kernel[(triton.cdiv(out.numel(), 1024),)](
            target,
            out,
            out.numel(),
            SPLITS=tiles.splits,
            BLOCK=1024,
            PDL=pdl,
            num_warps=4,
            launch_pdl=pdl,
        )
    return out


def narrow_linear_reference(x_TK: Tensor, weight_NK: Tensor) -> Tensor:
    """What `narrow_linear` must equal, in plain torch."""
    return functional.linear(x_TK.float(), weight_NK.float()).to(x_TK.dtype)
