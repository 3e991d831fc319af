"""A sum over a few GPUs in one kernel: every rank writes its rows into its peers' memory.

    push_reduce:           x <- sum over ranks of x
    push_reduce_rms_norm:  residual <- residual + sum of x;  out = residual / rms(residual) * weight

A word on the wire is eight bytes: two bfloat16 numbers, and the number of the call. Eight bytes
arrive together, so a word whose call number is right is there: nobody waits at a barrier, and one
way over NVLink is all it takes (the LL protocol of NCCL; push instead of pull as in vLLM 44891). A
program has one row. It writes the row to all peers, waits for theirs and adds them up in the order
of ranks in float32, so all ranks get the same bits.

Every row counts its calls on the device, so a CUDA graph can hold the kernel. Two halves of the
inbox take turns: who begins call n + 2 has the peers' rows of call n + 1, and they send those after
they have read call n. Ranks must make the same calls with the same number of rows.

A peer that does not come in `num_polls` looks (a fraction of a microsecond each) leaves NaN in the
row: the kernel ends, and the engine finds a poisoned row instead of a GPU that never returns.

When to use: on GPUs of one NVLink domain, for few rows: twice the bytes cross the wire, in exchange
for the shortest way. `parallel.sums` measures where that ends.

Shapes: T rows, D columns, W ranks.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import begin, has_pdl, refuse_unless

WORD_BYTES = 8
MAX_COLUMNS = 16384
NUM_POLLS = 1 << 27
"""More than a minute: a peer may have to wait for its host, and a dead one is found sooner."""


class Inbox(NamedTuple):
    """Memory of one rank that its peers write to, and where theirs is."""

    words_N: Tensor
    """int64, zero at first: (2 halves, W senders, rows, columns / 2), flat."""
    peers_W: Tensor
    """int64: the address of every rank's `words_N`, as this rank sees it."""
    calls_T: Tensor
    """int32, zero at first: how often each row has been summed."""
    num_cols: int
    """Of the widest row."""
    rank: int

    @property
    def world(self) -> int:
        return len(self.peers_W)

    @property
    def max_rows(self) -> int:
        return len(self.calls_T)


def inbox_words(world: int, max_rows: int, num_cols: int) -> int:
    """Numbers of int64 in an inbox."""
    return 2 * world * max_rows * (num_cols // 2)


@triton.jit
def _low(word):
    """The first of two bfloat16 numbers, as float32."""
    return (word << 16).to(tl.float32, bitcast=True)


@triton.jit
def _high(word):
    return (word & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _bits(x):
    """float32 rounded to bfloat16, as the low half of an int32."""
    return x.to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32) & 65535


@triton.jit
def _joined(low, high):
    return _bits(low) | (_bits(high) << 16)


@triton.jit
def _push_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    inbox_ptr,
    peers_ptr,
    calls_ptr,
    num_words,
    row_words,
    max_rows,
    num_polls,
    eps,
    RANK: tl.constexpr,
    WORLD: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    words = tl.arange(0, BLOCK)
    inside = words < num_words
    if NORM:
        weight = tl.load(weight_ptr + words, mask=inside, other=0)
    begin(PDL)
    call = tl.load(calls_ptr + row) + 1
    mine = tl.load(x_ptr + row * num_words + words, mask=inside, other=0)
    half = (call & 1).to(tl.int64) * WORLD
    sent = (mine.to(tl.int64) & 0xFFFFFFFF) | (call.to(tl.int64) << 32)
    for peer in tl.static_range(WORLD):
        if peer != RANK:
            theirs = tl.load(peers_ptr + peer).to(tl.pointer_type(tl.int64))
            place = ((half + RANK) * max_rows + row) * row_words
            tl.store(theirs + place + words, sent, mask=inside)
    low = tl.zeros((BLOCK,), tl.float32)
    high = tl.zeros((BLOCK,), tl.float32)
    num_late = 0
    for peer in tl.static_range(WORLD):
        if peer == RANK:
            low += _low(mine)
            high += _high(mine)
        else:
            place = inbox_ptr + ((half + peer) * max_rows + row) * row_words + words
            came = tl.load(place, mask=inside, other=0, volatile=True)
            late = tl.sum((((came >> 32).to(tl.int32) != call) & inside).to(tl.int32), axis=0)
            polls = 0
            while (late > 0) & (polls < num_polls):
                came = tl.load(place, mask=inside, other=0, volatile=True)
                late = tl.sum((((came >> 32).to(tl.int32) != call) & inside).to(tl.int32), axis=0)
                polls += 1
            num_late += late
            low += _low(came.to(tl.int32))
            high += _high(came.to(tl.int32))
    tl.store(calls_ptr + row, call)
    if num_late > 0:
        low = low * float("nan")
        high = high * float("nan")
    at = row * num_words + words
    if NORM:
        residual = tl.load(residual_ptr + at, mask=inside, other=0)
        total = _joined(_low(residual) + low, _high(residual) + high)
        tl.store(residual_ptr + at, total, mask=inside)
        low, high = _low(total), _high(total)
        squares = tl.sum(tl.where(inside, low * low + high * high, 0.0), axis=0)
        inverse_rms = tl.rsqrt(squares / (2 * num_words) + eps)
        low = low * inverse_rms * _low(weight)
        high = high * inverse_rms * _high(weight)
    tl.store(out_ptr + at, _joined(low, high), mask=inside)


def fits(x_TD: Tensor, inbox: Inbox) -> bool:
    """Whether rows of this kind can be summed through the inbox."""
    return (
        x_TD.dtype == torch.bfloat16
        and x_TD.dim() == 2
        and 0 < x_TD.shape[0] <= inbox.max_rows
        and x_TD.shape[1] <= inbox.num_cols
        and x_TD.shape[1] % 2 == 0
        and x_TD.is_contiguous()
        and x_TD.data_ptr() % 4 == 0
    )


def push_reduce(x_TD: Tensor, inbox: Inbox, *, num_polls: int = NUM_POLLS) -> Tensor:
    """Sum `x` over the ranks, in place, and return it."""
    _refuse_unfit(x_TD, inbox)
    return _launch(x_TD, None, None, x_TD, inbox, 0.0, num_polls)


def push_reduce_rms_norm(
    x_TD: Tensor,
    residual_TD: Tensor,
    weight_D: Tensor,
    inbox: Inbox,
    *,
    eps: float,
    out: Tensor | None = None,
    num_polls: int = NUM_POLLS,
) -> Tensor:
    """Add the sum of `x` over the ranks to `residual`, in place; the norm of that."""
    _refuse_unfit(x_TD, inbox)
    out = torch.empty_like(x_TD) if out is None else out
    like = (residual_TD, out)
    refuse_unless(
        all(each.shape == x_TD.shape and each.dtype == x_TD.dtype for each in like)
        and weight_D.shape == x_TD.shape[1:]
        and weight_D.dtype == x_TD.dtype
        and all(each.is_contiguous() for each in (*like, weight_D)),
        lambda: (
            f"x {tuple(x_TD.shape)} {x_TD.dtype}, residual {tuple(residual_TD.shape)}, out and "
            f"weight {tuple(weight_D.shape)} must be (T, D), (T, D), (T, D) and (D,), contiguous, "
            "of one type"
        ),
    )
    return _launch(x_TD, residual_TD, weight_D, out, inbox, eps, num_polls)


def _refuse_unfit(x_TD: Tensor, inbox: Inbox) -> None:
    refuse_unless(
        fits(x_TD, inbox) and x_TD.shape[1] <= MAX_COLUMNS,
        lambda: (
            f"x {tuple(x_TD.shape)} {x_TD.dtype} must be contiguous bfloat16 with at most "
            f"{inbox.max_rows} rows and {min(inbox.num_cols, MAX_COLUMNS)} columns, an even number"
        ),
    )


def _launch(
    x_TD: Tensor,
    residual_TD: Tensor | None,
    weight_D: Tensor | None,
    out_TD: Tensor,
    inbox: Inbox,
    eps: float,
    num_polls: int,
) -> Tensor:
    num_rows, num_cols = x_TD.shape
    num_words = num_cols // 2
    block = triton.next_power_of_2(num_words)
    pdl = has_pdl(x_TD)
    x = x_TD.view(torch.int32)
    _push_kernel[(num_rows,)](
        x,
        x if residual_TD is None else residual_TD.view(torch.int32),
        x if weight_D is None else weight_D.view(torch.int32),
        out_TD.view(torch.int32),
        inbox.words_N,
        inbox.peers_W,
        inbox.calls_T,
        num_words,
        inbox.num_cols // 2,
        inbox.max_rows,
        num_polls,
        eps,
        RANK=inbox.rank,
        WORLD=inbox.world,
        NORM=weight_D is not None,
        BLOCK=block,
        PDL=pdl,
        num_warps=min(16, max(4, block // 256)),
        launch_pdl=pdl,
    )
    return out_TD


def push_reduce_reference(x_WTD: Tensor) -> Tensor:
    """What `push_reduce` must equal, of all ranks' rows in plain torch."""
    total = torch.zeros_like(x_WTD[0], dtype=torch.float32)
    for x_TD in x_WTD:
        total += x_TD.float()
    return total.to(x_WTD.dtype)
