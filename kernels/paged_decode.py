"""Attention of one query row a sequence over keys and values in pages: split-KV flash decoding.

A program takes one sequence's part and one kv head, with the queries that share the head as the
rows of a tensor-core product. How sequences are cut is found on the device, once a step for all
layers (`cut_sequences`): no part is longer than a program's fair share of all tokens there are, so
a lone sequence fills the GPU, many of equal length are not cut at all, and of unequal ones the long
are cut, and the longest parts are begun first. Parts are left in memory, and the program that
leaves a sequence's last one adds them up, weighed by their sums of exponentials: no second launch.

    fair share 2 blocks:  aaaaa b ccc  ->  aa aa a, b, cc c

What is launched depends on nothing but the number of rows, so it can be captured in a CUDA graph.

When to use: on a GPU, for decodes of any number and length.

Shapes: B sequences, H heads, G kv heads, D head dim, X tokens of the cache, S slots, N pages of a
slot, I items (parts), C counters.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.fp8 import NO_SCALES, Scales, computes_in_half, refuse_other_scales
from kernels.launch import begin, has_pdl, refuse_unless

BLOCK_TOKENS = 64
SHARES_PER_SM = 6
"""A fair share is what so many programs to each multiprocessor would do. 4 is best for sequences of
equal lengths, 8 for unequal ones, by some percent."""
HALF_REGISTERS = 112
"""Of a thread that reads e4m3: four programs share a multiprocessor and not three, which takes 120
us instead of 143 for 128 sequences of 1088 tokens (139 from bfloat16)."""
SEQS_AT_ONCE = 256
LENGTH_RANKS = 4
"""Parts are launched by length in so many ranks, the longest first: a long one that begins last
keeps the whole GPU waiting. 2 to 5 % of a step of 128 to 256 sequences of unequal lengths."""
LOG2_E = 1.4426950408889634


class Cut(NamedTuple):
    """How a step's sequences are cut into items."""

    items_I3: Tensor
    """int32: each item's sequence, which of its parts it is, and how many it has (0: no item)."""
    lengths_B: Tensor
    """int32: blocks of each sequence's parts."""


@triton.jit
def _read_of(position, window, BLOCK: tl.constexpr):
    """(first token, one past the last, blocks) that a row at `position` reads."""
    stop = position + 1
    first = tl.where(window > 0, tl.maximum(stop - window, 0), 0)
    return first, stop, tl.cdiv(stop - first, BLOCK)


@triton.jit(do_not_specialize=["num_seqs", "num_shares", "num_items", "window"])
def _cut_kernel(
    position_ptr,
    item_ptr,
    length_ptr,
    num_seqs,
    num_shares,
    num_items,
    window,
    SEQS: tl.constexpr,
    RANKS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    places = tl.arange(0, SEQS)
    total = 0
    for at in range(0, num_seqs, SEQS):
        here = at + places < num_seqs
        position = tl.load(position_ptr + at + places, mask=here, other=0).to(tl.int32)
        _, _, blocks = _read_of(position, window, BLOCK)
        total += tl.sum(tl.where(here, blocks, 0))
    share = tl.maximum(tl.cdiv(total, num_shares), 1)
    used = 0
    for rank in range(RANKS):
        most = tl.cdiv(share * (RANKS - rank), RANKS)
        least = tl.cdiv(share * (RANKS - 1 - rank), RANKS)
        for at in range(0, num_seqs, SEQS):
            seqs = at + places
            here = seqs < num_seqs
            position = tl.load(position_ptr + seqs, mask=here, other=0).to(tl.int32)
            _, _, blocks = _read_of(position, window, BLOCK)
            reads = here & (blocks > 0)
            blocks = tl.maximum(blocks, 1)
            length = tl.cdiv(blocks, tl.cdiv(blocks, share))
            tl.store(length_ptr + seqs, length, mask=here)
            now = reads & (length > least) & (length <= most)
            num_parts = tl.where(now, tl.cdiv(blocks, length), 0)
            first = used + tl.cumsum(num_parts, 0) - num_parts
            for part in range(tl.max(num_parts)):
                item = item_ptr + 3 * (first + part)
                exists = part < num_parts
                tl.store(item, seqs, mask=exists)
                tl.store(item + 1, part, mask=exists)
                tl.store(item + 2, num_parts, mask=exists)
            used += tl.sum(num_parts)
    for at in range(used, num_items, SEQS):
        tl.store(item_ptr + 3 * (at + places) + 2, 0, mask=at + places < num_items)


def num_shares_of(num_kv_heads: int, num_sms: int) -> int:
    """Among how many programs the tokens of one kv head are thought to be shared.

    >>> num_shares_of(8, 132)
    99
    """
    return max(1, num_sms * SHARES_PER_SM // num_kv_heads)


def cut_sequences(positions_B: Tensor, num_shares: int, *, sliding_window: int | None) -> Cut:
    """Cut what rows at `positions_B` read into parts of at most a `num_shares`-th of all blocks.

    A row at position -1 reads nothing: it has no part, and `paged_decode` leaves its output alone.
    """
    num_seqs, device = len(positions_B), positions_B.device
    refuse_unless(
        num_seqs > 0 and num_shares > 0,
        lambda: f"{num_seqs} sequences cannot be cut for {num_shares} programs",
    )
    num_items = num_seqs + num_shares  # at most: each sequence has one part that is not full
    items = torch.empty(num_items, 3, dtype=torch.int32, device=device)
    lengths = torch.empty(num_seqs, dtype=torch.int32, device=device)
    pdl = has_pdl(positions_B)
    _cut_kernel[(1,)](
        positions_B,
        items,
        lengths,
        num_seqs,
        num_shares,
        num_items,
        0 if sliding_window is None else sliding_window,
        SEQS=SEQS_AT_ONCE,
        RANKS=LENGTH_RANKS,
        BLOCK=BLOCK_TOKENS,
        PDL=pdl,
        num_warps=8,
        launch_pdl=pdl,
    )
    return Cut(items, lengths)


@triton.jit(do_not_specialize=["window"])
def _decode_kernel(
    q_ptr,
    keys_ptr,
    values_ptr,
    table_ptr,
    slot_ptr,
    position_ptr,
    item_ptr,
    length_ptr,
    out_ptr,
    partial_ptr,
    weight_ptr,
    counter_ptr,
    scale_log2,
    value_scale,
    window,
    table_stride,
    num_kv_heads,
    head_dim,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    PAGE: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    HALF: tl.constexpr,
    PDL: tl.constexpr,
):
    kv_head = tl.program_id(0)
    item = tl.program_id(1)
    begin(PDL)
    num_parts = tl.load(item_ptr + 3 * item + 2)
    if num_parts == 0:
        return
    seq = tl.load(item_ptr + 3 * item).to(tl.int64)
    part = tl.load(item_ptr + 3 * item + 1)
    position = tl.load(position_ptr + seq).to(tl.int32)
    first, stop, _ = _read_of(position, window, BLOCK)
    length = tl.load(length_ptr + seq) * BLOCK
    start = first + part * length
    end = tl.minimum(start + length, stop)
    members = tl.arange(0, GROUP_PAD)
    dims = tl.arange(0, DIM)
    in_group = members < GROUP
    in_head = dims < head_dim
    heads = (seq * num_kv_heads + kv_head) * GROUP + members
    q_offsets = heads[:, None] * head_dim + dims[None, :]
    inside_q = in_group[:, None] & in_head[None, :]
    q = tl.load(q_ptr + q_offsets, mask=inside_q, other=0.0)
    if HALF:
        q = q.to(tl.float16)
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
        keys = tl.load(keys_ptr + offsets, mask=inside, other=0.0).to(q.dtype)
        scores = tl.dot(q, tl.trans(keys), input_precision=PRECISION) * scale_log2
        scores = tl.where(seen[None, :], scores, float("-inf"))
        new_highest = tl.maximum(highest, tl.max(scores, axis=1))
        weights = tl.exp2(scores - new_highest[:, None])
        shrink = tl.exp2(highest - new_highest)
        values = tl.load(values_ptr + offsets, mask=inside, other=0.0).to(q.dtype)
        total = total * shrink + tl.sum(weights, axis=1)
        out = out * shrink[:, None]
        out = tl.dot(weights.to(values.dtype), values, out, input_precision=PRECISION)
        highest = new_highest
    out = out / total[:, None]
    if value_scale is not None:
        out *= value_scale
    if num_parts == 1:
        tl.store(out_ptr + q_offsets, out, mask=inside_q)
    else:
        place = (item * num_kv_heads + kv_head).to(tl.int64) * GROUP + members
        tl.store(partial_ptr + place[:, None] * head_dim + dims[None, :], out, mask=inside_q)
        tl.store(weight_ptr + place, highest + tl.log2(total), mask=in_group)
        tl.debug_barrier()  # every warp's stores come before the count
        counter = counter_ptr + seq * num_kv_heads + kv_head
        if tl.atomic_add(counter, 1) == num_parts - 1:
            tl.store(counter, 0)  # for the next launch
            group_out = out_ptr + (seq * num_kv_heads + kv_head) * GROUP * head_dim
            _add_parts(
                partial_ptr, weight_ptr, group_out, item - part, num_parts, kv_head, num_kv_heads,
                head_dim, GROUP, GROUP_PAD, DIM,
            )  # fmt: skip


@triton.jit
def _add_parts(
    partial_ptr,
    weight_ptr,
    out_ptr,
    first_item,
    num_parts,
    kv_head,
    num_kv_heads,
    head_dim,
    GROUP: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    DIM: tl.constexpr,
):
    """Add a sequence's parts up: others wrote them, so they are read past this one's cache.

    NOTE: one after another. Several at once take registers that cost the whole kernel a place on
    each multiprocessor: 159 us instead of 141 for 128 sequences that are not cut at all.
    """
    members = tl.arange(0, GROUP_PAD)
    dims = tl.arange(0, DIM)
    in_group = members < GROUP
    inside = in_group[:, None] & (dims < head_dim)[None, :]
    highest = tl.full((GROUP_PAD,), -1.0e30, tl.float32)
    total = tl.zeros((GROUP_PAD,), tl.float32)
    out = tl.zeros((GROUP_PAD, DIM), tl.float32)
    for part in range(num_parts):
        row = ((first_item + part) * num_kv_heads + kv_head).to(tl.int64) * GROUP + members
        weight = tl.load(weight_ptr + row, mask=in_group, other=-1.0e30, cache_modifier=".cg")
        place = row[:, None] * head_dim + dims[None, :]
        partial = tl.load(partial_ptr + place, mask=inside, other=0.0, cache_modifier=".cg")
        new_highest = tl.maximum(highest, weight)
        shrink, grow = tl.exp2(highest - new_highest), tl.exp2(weight - new_highest)
        total = total * shrink + grow
        out = out * shrink[:, None] + partial * grow[:, None]
        highest = new_highest
    out = out / total[:, None]
    tl.store(out_ptr + members[:, None] * head_dim + dims[None, :], out, mask=inside)


def paged_decode(
    q_BHD: Tensor,
    keys_XGD: Tensor,
    values_XGD: Tensor,
    table_SN: Tensor,
    slots_B: Tensor,
    positions_B: Tensor,
    cut: Cut,
    out_BHD: Tensor,
    counters_C: Tensor,
    *,
    page_size: int,
    scale: float,
    sliding_window: int | None,
    scales: Scales = NO_SCALES,
    num_stages: int = 2,
    num_warps: int = 4,
    max_registers: int | None = None,
) -> None:
    """Fill `out_BHD`: row b attends tokens 0 to `positions_B[b]` of slot `slots_B[b]`; none at -1.

    `cut` is `cut_sequences`' for these positions and this window. `counters_C` (int32) has at least
    B * G zeros, and has zeros again when the launch is done.
    """
    num_seqs, num_heads, head_dim = q_BHD.shape
    num_kv_heads = keys_XGD.shape[1]
    refuse_unless(
        num_heads % num_kv_heads == 0 and keys_XGD.shape == values_XGD.shape,
        lambda: (
            f"{num_heads} heads cannot share the heads of keys {tuple(keys_XGD.shape)} and values "
            f"{tuple(values_XGD.shape)}"
        ),
    )
    refuse_unless(
        out_BHD.shape == q_BHD.shape and len(slots_B) == len(positions_B) == num_seqs,
        lambda: (
            f"q {tuple(q_BHD.shape)} comes with out {tuple(out_BHD.shape)}, {len(slots_B)} slots "
            f"and {len(positions_B)} positions"
        ),
    )
    tensors = (q_BHD, keys_XGD, values_XGD, table_SN, *cut, out_BHD, counters_C)
    refuse_unless(all(each.is_contiguous() for each in tensors), "all tensors must be contiguous")
    refuse_unless(
        len(counters_C) >= num_seqs * num_kv_heads,
        lambda: (
            f"{len(counters_C)} counters are fewer than {num_seqs} sequences x {num_kv_heads} heads"
        ),
    )
    refuse_unless(
        len(cut.lengths_B) == num_seqs,
        lambda: f"the cut is of {len(cut.lengths_B)} sequences and there are {num_seqs}",
    )
    refuse_other_scales(keys_XGD, scales)
    half = computes_in_half(q_BHD.dtype, keys_XGD.dtype)
    if max_registers is None and half and head_dim <= 128:
        max_registers = HALF_REGISTERS
    pdl = has_pdl(q_BHD)
    group, dim = num_heads // num_kv_heads, max(16, triton.next_power_of_2(head_dim))
    parts = (len(cut.items_I3), num_kv_heads, group)
    partial = torch.empty(*parts, head_dim, dtype=torch.float32, device=q_BHD.device)
    weight = torch.empty(parts, dtype=torch.float32, device=q_BHD.device)
    _decode_kernel[(num_kv_heads, len(cut.items_I3))](
        q_BHD,
        keys_XGD,
        values_XGD,
        table_SN,
        slots_B,
        positions_B,
        cut.items_I3,
        cut.lengths_B,
        out_BHD,
        partial,
        weight,
        counters_C,
        (scale if scales.key is None else scale * scales.key) * LOG2_E,
        scales.value,
        0 if sliding_window is None else sliding_window,
        table_SN.shape[1],
        num_kv_heads,
        head_dim,
        GROUP=group,
        GROUP_PAD=max(16, triton.next_power_of_2(group)),
        PAGE=page_size,
        DIM=dim,
        BLOCK=BLOCK_TOKENS,
        STAGES=num_stages,
        PRECISION="ieee" if q_BHD.dtype == torch.float32 else "tf32",
        HALF=half,
        PDL=pdl,
        num_warps=num_warps,
        maxnreg=max_registers,
        launch_pdl=pdl,
    )
