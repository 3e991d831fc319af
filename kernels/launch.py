"""How our Triton kernels are launched: what they share, and nothing of what they compute.

Programmatic dependent launch (PDL) lets a kernel start while the one before it still runs. A
kernel that takes part calls `begin` before it touches anything that an earlier kernel wrote or
reads; what it may load before are weights, which nobody writes. On a Hopper GPU this hides most of
a launch's 1 to 2 microseconds, in a CUDA graph too.

Triton compiles a kernel anew for integers that are 1 or a multiple of 16. Those that change from
step to step are named in `do_not_specialize`, or a request would wait for the compiler.
"""

import time
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

HOPPER = (9, 0)
CPU_SMS = 4
"""As if a CPU, where the interpreter runs kernels for tests, had so many multiprocessors."""


@triton.jit
def begin(PDL: tl.constexpr):
    """Let the next kernel start, and wait for those before to be done."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


def has_pdl(x: Tensor) -> bool:
    """Whether kernels on `x`'s device may overlap their beginnings."""
    return x.is_cuda and _is_hopper(x.device)


@cache
def _is_hopper(device: torch.device) -> bool:
    """Asked at every launch, and answered by torch in microseconds."""
    return torch.cuda.get_device_capability(device) >= HOPPER


def num_sms_of(device: torch.device) -> int:
    """Multiprocessors, by which work is cut."""
    if device.type != "cuda":
        return CPU_SMS
    return torch.cuda.get_device_properties(device).multi_processor_count


def refuse_unless(holds: bool, sentence: str | Callable[[], str]) -> None:
    """A launcher's check: kernels trust their arguments.

    A sentence that says what there is costs more than many a launch, so it is made when it is said.
    """
    if not holds:
        raise ValueError(sentence if isinstance(sentence, str) else sentence())


def tell_of_compilations(tell: Callable[[str, float], None]) -> None:
    """Call `tell(kernel, seconds)` for each kernel that Triton compiles in this process from here.

    Kernels are compiled before a rank is ready; one that is compiled later kept requests waiting,
    because an argument that should not be specialised was, or a shape was not warmed up.
    """
    began: list[float] = []

    def before(**about: Any) -> None:
        began.append(time.perf_counter())

    def after(**about: Any) -> None:
        tell(about["fn"].name, time.perf_counter() - (began.pop() if began else 0.0))

    triton.knobs.runtime.jit_cache_hook = before
    triton.knobs.runtime.jit_post_compile_hook = after
