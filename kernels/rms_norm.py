"""Root-mean-square norm of rows, alone or of the sum with the residual stream.

    rms_norm:      out = x / rms(x) * weight
    add_rms_norm:  residual <- x + residual;  out = residual / rms(residual) * weight

When to use: on a GPU, for rows up to 16384 wide. Each row is read once, where torch's add and norm
read it three times. The sum is rounded to the residual's dtype before it is squared, because the
next layer reads the rounded value.

Shapes: T rows, D columns.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import begin, has_pdl, refuse_unless

MAX_COLUMNS = 16384


@triton.jit
def _rms_norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    num_cols,
    eps,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * num_cols
    cols = tl.arange(0, BLOCK)
    inside = cols < num_cols
    weight = tl.load(weight_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    begin(PDL)
    x = tl.load(x_ptr + row + cols, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        residual = tl.load(residual_ptr + row + cols, mask=inside, other=0.0).to(tl.float32)
        total = (x + residual).to(residual_ptr.dtype.element_ty)
        tl.store(residual_ptr + row + cols, total, mask=inside)
        x = total.to(tl.float32)
    inverse_rms = tl.rsqrt(tl.sum(x * x) / num_cols + eps)
    tl.store(out_ptr + row + cols, x * inverse_rms * weight, mask=inside)


def rms_norm(x_TD: Tensor, weight_D: Tensor, *, eps: float, out: Tensor | None = None) -> Tensor:
    """Normalise each row of `x`; written to `out` where the caller has a place for it."""
    return _launch(x_TD, None, weight_D, eps, out)


def add_rms_norm(
    x_TD: Tensor,
    residual_TD: Tensor,
    weight_D: Tensor,
    *,
    eps: float,
    out: Tensor | None = None,
) -> Tensor:
    """Normalise `x + residual`, leaving the sum in `residual_TD`."""
    return _launch(x_TD, residual_TD, weight_D, eps, out)


def _launch(
    x_TD: Tensor, residual_TD: Tensor | None, weight_D: Tensor, eps: float, out: Tensor | None
) -> Tensor:
    num_rows, num_cols = x_TD.shape
    summed_TD = x_TD if residual_TD is None else residual_TD
    refuse_unless(
        summed_TD.shape == x_TD.shape and weight_D.shape == (num_cols,),
        lambda: (
            f"x {tuple(x_TD.shape)}, residual {tuple(summed_TD.shape)} and weight "
            f"{tuple(weight_D.shape)} must be (T, D), (T, D) and (D,)"
        ),
    )
    refuse_unless(
        x_TD.is_contiguous() and summed_TD.is_contiguous() and weight_D.is_contiguous(),
        "x, residual and weight must be contiguous: the kernel steps by D",
    )
    refuse_unless(
        num_cols <= MAX_COLUMNS, lambda: f"rows of {num_cols} are longer than {MAX_COLUMNS}"
    )
    out_TD = torch.empty_like(x_TD) if out is None else out
    refuse_unless(
        out_TD.shape == x_TD.shape and out_TD.dtype == x_TD.dtype and out_TD.is_contiguous(),
        lambda: f"out {tuple(out_TD.shape)} must be contiguous and like x {tuple(x_TD.shape)}",
    )
    if num_rows == 0:
        return out_TD
    pdl = has_pdl(x_TD)
    block = triton.next_power_of_2(num_cols)
    _rms_norm_kernel[(num_rows,)](
        x_TD,
        summed_TD,
        weight_D,
        out_TD,
        num_cols,
        eps,
        ADD=residual_TD is not None,
        BLOCK=block,
        PDL=pdl,
        num_warps=min(16, max(4, block // 512)),
        launch_pdl=pdl,
    )
    return out_TD


def rms_norm_reference(x_TD: Tensor, weight_D: Tensor, *, eps: float) -> Tensor:
    """What `rms_norm` must equal, in plain torch."""
    x = x_TD.float()
    normal = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return (normal * weight_D.float()).to(x_TD.dtype)


def add_rms_norm_reference(
    x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, *, eps: float
) -> Tensor:
    """What `add_rms_norm` must equal, in plain torch."""
    residual_TD.copy_(x_TD.float() + residual_TD.float())
    return rms_norm_reference(residual_TD, weight_D, eps=eps)
