"""Sequences cut into a number of parts that the host chooses, and the parts' sums added up.

A sequence is cut into at most `num_splits` parts of at least `min_part` tokens. One that is a
single part is written at once; the programs of others leave partial sums, which `combine_kernel`
weighs by their sums of exponentials in a second launch.

When to use: for attention whose parts are too wide to be added up by the last program that leaves
one (`kernels.paged_decode` does that), as those over a latent are.

    length 1000, num_splits 4, min_part 256: parts of 256 tokens, the last of 232
    length  300: parts of 256 and 44;   length 200: one part, no second pass
"""

from typing import NamedTuple

import triton
import triton.language as tl

from kernels.launch import begin

MAX_SPLITS = 128
LOG2_E = 1.4426950408889634


class Split(NamedTuple):
    """How sequences are cut."""

    num_splits: int
    min_part: int


@triton.jit
def part_of(position, window, num_splits, min_part, BLOCK: tl.constexpr):
    """(first token, tokens of a part, one past the last token)."""
    stop = position + 1
    first = 0
    if window > 0:
        first = tl.maximum(stop - window, 0)
    length = tl.maximum(min_part, tl.cdiv(stop - first, num_splits))
    return first, tl.cdiv(length, BLOCK) * BLOCK, stop


@triton.jit(do_not_specialize=["num_splits", "min_part", "window"])
def combine_kernel(
    partial_ptr,
    weight_ptr,
    position_ptr,
    out_ptr,
    window,
    num_splits,
    min_part,
    num_heads,
    head_dim,
    SPLITS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    AT_ONCE: tl.constexpr,
    PDL: tl.constexpr,
):
    seq = tl.program_id(0).to(tl.int64)
    head = seq * num_heads + tl.program_id(1)
    begin(PDL)
    position = tl.load(position_ptr + seq).to(tl.int32)
    first, length, stop = part_of(position, window, num_splits, min_part, BLOCK)
    num_parts = tl.cdiv(stop - first, length)
    if num_parts == 1:
        return
    dims = tl.arange(0, DIM)
    in_head = dims < head_dim
    splits = tl.arange(0, SPLITS)
    weights = tl.load(
        weight_ptr + head * num_splits + splits, mask=splits < num_parts, other=float("-inf")
    )
    highest = tl.max(weights, axis=0)
    total = tl.sum(tl.exp2(weights - highest), axis=0)
    out = tl.zeros((DIM,), tl.float32)
    for at in range(0, num_parts, AT_ONCE):
        parts = at + tl.arange(0, AT_ONCE)
        used = parts < num_parts
        share = tl.load(weight_ptr + head * num_splits + parts, mask=used, other=float("-inf"))
        partial = tl.load(
            partial_ptr + (head * num_splits + parts)[:, None] * head_dim + dims[None, :],
            mask=used[:, None] & in_head[None, :],
            other=0.0,
        )
        out += tl.sum(partial * tl.exp2(share - highest)[:, None], axis=0)
    tl.store(out_ptr + head * head_dim + dims, out / total, mask=in_head)
