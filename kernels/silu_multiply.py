"""The gate of an MLP: silu of the first half of the columns, times the second half.

When to use: on a GPU, between the two products of a gated MLP. One pass over the rows, rounded
once; torch makes two and rounds twice.

Shapes: T rows, I columns of each half.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from kernels.launch import begin, has_pdl, refuse_unless

BLOCK = 1024


@triton.jit
def _silu_multiply_kernel(gate_up_ptr, out_ptr, width, BLOCK: tl.constexpr, PDL: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < width
    begin(PDL)
    gate = tl.load(gate_up_ptr + row * 2 * width + cols, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + (row * 2 + 1) * width + cols, mask=inside, other=0.0)
    out = gate / (1.0 + tl.exp(-gate)) * up.to(tl.float32)
    tl.store(out_ptr + row * width + cols, out, mask=inside)


def silu_multiply(gate_up: Tensor) -> Tensor:
    """(T, 2 * I) to (T, I)."""
    num_rows, num_cols = gate_up.shape
    refuse_unless(
        num_cols % 2 == 0 and gate_up.is_contiguous(),
        lambda: (
            f"gate_up {tuple(gate_up.shape)} must be contiguous, with an even number of columns"
        ),
    )
    out = gate_up.new_empty(num_rows, num_cols // 2)
    if out.numel() == 0:
        return out
    pdl = has_pdl(gate_up)
    _silu_multiply_kernel[(num_rows, triton.cdiv(num_cols // 2, BLOCK))](
        gate_up, out, num_cols // 2, BLOCK=BLOCK, PDL=pdl, num_warps=4, launch_pdl=pdl
    )
    return out


def silu_multiply_reference(gate_up: Tensor) -> Tensor:
    """What `silu_multiply` must equal, in plain torch."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return torch.mul(functional.silu(gate), up).to(gate_up.dtype)
