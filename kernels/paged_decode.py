"""Attention of one query row a sequence over keys and values in pages: split-KV flash decoding.

Each program takes one sequence, one kv head and one part of the sequence, with the queries that
share the head as the rows of a tensor-core product. A sequence is cut into at most `num_splits`
parts of at least `min_part` tokens, so a lone long sequence fills the GPU and many short ones are
not cut at all. A sequence that is one part is written at once; others leave partial sums, which
`combine_kernel` weighs by their sums of exponentials.

When to use: on a GPU, for decodes. The launch depends on nothing but the number of rows and
`num_splits`, so it can be captured in a CUDA graph: lengths and pages are read on the device.

    length 1000, num_splits 4, min_part 256: parts of 256 tokens, the last of 232
    length  300: parts of 256 and 44;   length 200: one part, no second pass

Shapes: B sequences, H heads, G kv heads, D head dim, X tokens of the cache, S slots, N pages of a
slot, K parts.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import begin, has_pdl, refuse_unless

BLOCK_TOKENS = 64
LOG2_E = 1.4426950408889634
MAX_SPLITS = 128


class Split(NamedTuple):
    """How sequences are cut."""

    num_splits: int
    min_part: int


def choose_split(num_seqs: int, num_kv_heads: int, max_len: int, *, num_programs: int) -> Split:
    """Enough parts that `num_programs` programs are busy, none shorter than is worth a program.

    >>> choose_split(1, 8, 8192, num_programs=1056)
    Split(num_splits=128, min_part=64)
    >>> choose_split(256, 8, 8192, num_programs=1056)
    Split(num_splits=8, min_part=256)
    """
    groups = num_seqs * num_kv_heads
    min_part = 64 if groups * 4 <= num_programs else 128 if groups * 2 <= num_programs else 256
    wanted = max(8, -(-num_programs // groups))
    return Split(max(1, min(wanted, MAX_SPLITS, -(-max_len // min_part))), min_part)


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
def _decode_kernel(
    q_ptr,
    keys_ptr,
    values_ptr,
    table_ptr,
    slot_ptr,
    position_ptr,
    out_ptr,
    partial_ptr,
    weight_ptr,
    scale_log2,
    window,
    table_stride,
    num_splits,
    min_part,
    num_kv_heads,
    head_dim,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    PAGE: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    kv_head = tl.program_id(0)
    split = tl.program_id(1)
    seq = tl.program_id(2).to(tl.int64)
    begin(PDL)
    position = tl.load(position_ptr + seq).to(tl.int32)
    first, length, stop = part_of(position, window, num_splits, min_part, BLOCK)
    start = first + split * length
    if start >= stop:
        return
    end = tl.minimum(start + length, stop)
    members = tl.arange(0, GROUP_PAD)
    dims = tl.arange(0, DIM)
    in_group = members < GROUP
    in_head = dims < head_dim
    heads = seq * num_kv_heads * GROUP + kv_head * GROUP + members
    q = tl.load(
        q_ptr + heads[:, None] * head_dim + dims[None, :],
        mask=in_group[:, None] & in_head[None, :],
        other=0.0,
    )
    table = table_ptr + tl.load(slot_ptr + seq) * table_stride
    token_stride = num_kv_heads * head_dim
    highest = tl.full((GROUP_PAD,), float("-inf"), tl.float32)
    total = tl.zeros((GROUP_PAD,), tl.float32)
    out = tl.zeros((GROUP_PAD, DIM), tl.float32)
    for at in tl.range(start, end, BLOCK, num_stages=STAGES):
        tokens = at + tl.arange(0, BLOCK)
        seen = tokens < end
        pages = tl.load(table + tokens // PAGE, mask=seen, other=0).to(tl.int64)
        rows = (pages * PAGE + tokens % PAGE) * token_stride + kv_head * head_dim
        offsets = rows[:, None] + dims[None, :]
        inside = seen[:, None] & in_head[None, :]
        keys = tl.load(keys_ptr + offsets, mask=inside, other=0.0)
        scores = tl.dot(q, tl.trans(keys), input_precision=PRECISION) * scale_log2
        scores = tl.where(seen[None, :], scores, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(scores, axis=1))
        weights = tl.exp2(scores - new_highest[:, None])
        shrink = tl.exp2(highest - new_highest)
        values = tl.load(values_ptr + offsets, mask=inside, other=0.0)
        total = total * shrink + tl.sum(weights, axis=1)
        out = out * shrink[:, None]
        out = tl.dot(weights.to(values.dtype), values, out, input_precision=PRECISION)
        highest = new_highest
    out = out / total[:, None]
    inside = in_group[:, None] & in_head[None, :]
    if stop - first <= length:
        tl.store(out_ptr + heads[:, None] * head_dim + dims[None, :], out, mask=inside)
    else:
        parts = heads * num_splits + split
        tl.store(partial_ptr + parts[:, None] * head_dim + dims[None, :], out, mask=inside)
        tl.store(weight_ptr + parts, highest + tl.log2(total), mask=in_group)


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


def paged_decode(
    q_BHD: Tensor,
    keys_XGD: Tensor,
    values_XGD: Tensor,
    table_SN: Tensor,
    slots_B: Tensor,
    positions_B: Tensor,
    out_BHD: Tensor,
    *,
    page_size: int,
    split: Split,
    scale: float,
    sliding_window: int | None,
    block: int = BLOCK_TOKENS,
    num_stages: int = 2,
    num_warps: int = 4,
) -> None:
    """Fill `out_BHD`: row b attends tokens 0 to `positions_B[b]` of slot `slots_B[b]`."""
    num_seqs, num_heads, head_dim = q_BHD.shape
    num_kv_heads = keys_XGD.shape[1]
    refuse_unless(
        num_heads % num_kv_heads == 0 and keys_XGD.shape == values_XGD.shape,
        f"{num_heads} heads cannot share the heads of keys {tuple(keys_XGD.shape)} and values "
        f"{tuple(values_XGD.shape)}",
    )
    refuse_unless(
        out_BHD.shape == q_BHD.shape and len(slots_B) == len(positions_B) == num_seqs,
        f"q {tuple(q_BHD.shape)} comes with out {tuple(out_BHD.shape)}, {len(slots_B)} slots and "
        f"{len(positions_B)} positions",
    )
    tensors = (q_BHD, keys_XGD, values_XGD, table_SN, out_BHD)
    refuse_unless(all(each.is_contiguous() for each in tensors), "all tensors must be contiguous")
    refuse_unless(
        split.min_part % block == 0 and 0 < split.num_splits <= MAX_SPLITS,
        f"{split}: parts must be multiples of {block}, and at most {MAX_SPLITS}",
    )
    if num_seqs == 0:
        return
    pdl = has_pdl(q_BHD)
    window = 0 if sliding_window is None else sliding_window
    group, dim = num_heads // num_kv_heads, max(16, triton.next_power_of_2(head_dim))
    parts = (num_seqs, num_heads, split.num_splits) if split.num_splits > 1 else (1, 1, 1)
    partial = torch.empty(*parts, head_dim, dtype=torch.float32, device=q_BHD.device)
    weight = torch.empty(parts, dtype=torch.float32, device=q_BHD.device)
    _decode_kernel[(num_kv_heads, split.num_splits, num_seqs)](
        q_BHD,
        keys_XGD,
        values_XGD,
        table_SN,
        slots_B,
        positions_B,
        out_BHD,
        partial,
        weight,
        scale * LOG2_E,
        window,
        table_SN.shape[1],
        split.num_splits,
        split.min_part,
        num_kv_heads,
        head_dim,
        GROUP=group,
        GROUP_PAD=max(16, triton.next_power_of_2(group)),
        PAGE=page_size,
        DIM=dim,
        BLOCK=block,
        STAGES=num_stages,
        PRECISION="ieee" if q_BHD.dtype == torch.float32 else "tf32",
        PDL=pdl,
        num_warps=num_warps,
        launch_pdl=pdl,
    )
    if split.num_splits == 1:
        return
    combine_kernel[(num_seqs, num_heads)](
        partial,
        weight,
        positions_B,
        out_BHD,
        window,
        split.num_splits,
        split.min_part,
        num_heads,
        head_dim,
        SPLITS=MAX_SPLITS,
        DIM=dim,
        BLOCK=block,
        AT_ONCE=16,
        PDL=pdl,
        num_warps=2,
        launch_pdl=pdl,
    )
