"""How our Triton kernels are launched: what they share, and nothing of what they compute.

Programmatic dependent launch (PDL) lets a kernel start while the one before it still runs. A
kernel that takes part calls `begin` before it touches anything that an earlier kernel wrote or
reads; what it may load before are weights, which nobody writes. On a Hopper GPU this hides most of
a launch's 1 to 2 microseconds, in a CUDA graph too.

Triton compiles a kernel anew for integers that are 1 or a multiple of 16. Those that change from
step to step are named in `do_not_specialize`, or a request would wait for the compiler.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

HOPPER = (9, 0)


@triton.jit
def begin(PDL: tl.constexpr):
    """Let the next kernel start, and wait for those before to be done."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


def has_pdl(x: Tensor) -> bool:
    """Whether kernels on `x`'s device may overlap their beginnings."""
    return x.is_cuda and torch.cuda.get_device_capability(x.device) >= HOPPER


def refuse_unless(holds: bool, sentence: str) -> None:
    """A launcher's check: kernels trust their arguments."""
    if not holds:
        raise ValueError(sentence)
