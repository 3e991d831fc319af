"""Numbers of eight bits, as a cache may keep them: float8_e4m3fn times a scale. In plain torch.

    stored = nearest e4m3 of x / scale, at most 448 either way;   x is about stored * scale

e4m3 has a sign, 4 bits of exponent and 3 of mantissa: from 2^-6 to 448 an error of at most 1 part
in 16, below that steps of 2^-9 (Micikevicius et al., "FP8 Formats for Deep Learning", 2022). Ties
go to even.

    scale 2:  x = 3.3 is stored as 1.625 and read as 3.25;   x = 1000 is stored as 448, read as 896

When to use: where a cache of half the size is worth that error.
"""

from typing import NamedTuple

import torch
from torch import Tensor

E4M3 = torch.float8_e4m3fn
HIGHEST = 448.0


class Scales(NamedTuple):
    """What a layer's stored keys and values are times: None where they are stored as they are."""

    key: float | None
    value: float | None


NO_SCALES = Scales(None, None)


def computes_in_half(q_dtype: torch.dtype, cache_dtype: torch.dtype) -> bool:
    """Whether queries are made float16 to be multiplied with what a cache keeps.

    A GPU takes two numbers of e4m3 to float16 in one instruction and to bfloat16 in several;
    float16 holds them all, and queries up to 65504 with three bits more than bfloat16.
    """
    return q_dtype == torch.bfloat16 and cache_dtype == E4M3


def to_e4m3(x: Tensor, scale: float) -> Tensor:
    """What is stored for `x`; NaN stays NaN."""
    return (x.float() * (1.0 / scale)).clamp_(-HIGHEST, HIGHEST).to(E4M3)


def from_e4m3(stored: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """About what was stored."""
    return (stored.float() * scale).to(dtype)


def bits_of(x: Tensor) -> Tensor:
    """The same memory as bytes, if `x` is e4m3: torch moves bytes where it knows no float8."""
    return x.view(torch.uint8) if x.dtype == E4M3 else x


def refuse_other_scales(stored: Tensor, scales: Scales) -> None:
    """A cache of e4m3 comes with scales, any other without."""
    if scales.count(None) != (0 if stored.dtype == E4M3 else 2):
        raise ValueError(f"a cache of {stored.dtype} comes with {scales}")
