"""The smallest value that min_p, top_k and top_p keep in each row, without sorting the vocabulary.

    min_p keeps values of at least the highest plus log(min_p); top_k the k highest of the row;
    top_p, of what these have left, the highest values until their probabilities reach p.

Each limit is found by bisection over the float32 numbers, whose order is that of their bits: 32
passes over the row at most, each a sum, the row being in the cache. Equal values stay together.

When to use: on a GPU, where sorting 150 thousand numbers of each row costs milliseconds. A row's
result does not depend on other rows; sums run as a tree, so a value whose probability lies on the
very edge may be kept here and not on a CPU, or the other way round.

Shapes: N rows, V vocabulary.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import begin, has_pdl, refuse_unless

BLOCK = 8192


@triton.jit
def _key(x):
    """An int32 that orders as the float does."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _value(key):
    """The float behind a key: the map is its own inverse."""
    bits = tl.where(key < 0, key ^ 0x7FFFFFFF, key)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _middle(low, high):
    """Between two keys, rounded up, without overflow."""
    wide = low.to(tl.int64) + high.to(tl.int64) + 1
    return (wide >> 1).to(tl.int32)


@triton.jit
def _count_from(row_ptr, vocab_size, temperature, key, BLOCK: tl.constexpr):
    """How many values of the row have at least this key."""
    count = tl.zeros((BLOCK,), tl.int32)
    for at in range(0, vocab_size, BLOCK):
        ids = at + tl.arange(0, BLOCK)
        x = tl.load(row_ptr + ids, mask=ids < vocab_size, other=float("-inf"))
        found = (_key(tl.div_rn(x, temperature)) >= key) & (ids < vocab_size)
        count += found.to(tl.int32)
    return tl.sum(count, axis=0)


@triton.jit
def _mass_above(row_ptr, vocab_size, temperature, highest, key, floor, BLOCK: tl.constexpr):
    """Weight of the values above this key and not below `floor`; the highest weighs 1."""
    mass = tl.zeros((BLOCK,), tl.float32)
    for at in range(0, vocab_size, BLOCK):
        ids = at + tl.arange(0, BLOCK)
        x = tl.load(row_ptr + ids, mask=ids < vocab_size, other=float("-inf"))
        x = tl.div_rn(x, temperature)
        mass += tl.where((_key(x) > key) & (x >= floor), tl.exp(x - highest), 0.0)
    return tl.sum(mass, axis=0)


@triton.jit
def _truncate_kernel(
    logits_ptr,
    temperature_ptr,
    k_ptr,
    p_ptr,
    min_p_ptr,
    lowest_ptr,
    vocab_size,
    row_stride,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    begin(PDL)
    row_ptr = logits_ptr + row * row_stride
    temperature = tl.load(temperature_ptr + row)
    k = tl.load(k_ptr + row).to(tl.int32)
    p = tl.load(p_ptr + row)
    highs = tl.full((BLOCK,), float("-inf"), tl.float32)
    for at in range(0, vocab_size, BLOCK):
        ids = at + tl.arange(0, BLOCK)
        x = tl.load(row_ptr + ids, mask=ids < vocab_size, other=float("-inf"))
        highs = tl.maximum(highs, x)
    highest = tl.div_rn(tl.max(highs, axis=0), temperature)
    min_p = tl.load(min_p_ptr + row)
    floor = highest + tl.log(tl.maximum(min_p, 1e-30))
    floor = tl.where(min_p > 0.0, floor, float("-inf"))
    bottom = _key(float("-inf") + highest * 0)
    top = _key(highest)
    lowest = floor
    total = 0.0
    if (k > 0) & (k < vocab_size):
        low, high = bottom, top
        while low < high:
            middle = _middle(low, high)
            if _count_from(row_ptr, vocab_size, temperature, middle, BLOCK) >= k:
                low = middle
            else:
                high = middle - 1
        value = _value(low)
        lowest = tl.maximum(floor, value)
        if p < 1.0:
            above = _count_from(row_ptr, vocab_size, temperature, low + 1, BLOCK)
            total = _mass_above(row_ptr, vocab_size, temperature, highest, low, floor, BLOCK)
            if value >= floor:
                total += (k - above).to(tl.float32) * tl.exp(value - highest)
    else:
        if p < 1.0:
            total = _mass_above(row_ptr, vocab_size, temperature, highest, bottom - 1, floor, BLOCK)
    if p < 1.0:
        # The lowest key above which less than p of the mass lies.
        low, high = bottom, top
        while low < high:
            middle = low + ((high.to(tl.int64) - low.to(tl.int64)) >> 1).to(tl.int32)
            mass = _mass_above(row_ptr, vocab_size, temperature, highest, middle, floor, BLOCK)
            if mass < p * total:
                high = middle
            else:
                low = middle + 1
        lowest = tl.maximum(lowest, _value(low))
    tl.store(lowest_ptr + row, lowest)


def lowest_kept(
    logits_NV: Tensor, temperature_N: Tensor, k_N: Tensor, p_N: Tensor, min_p_N: Tensor
) -> Tensor:
    """The smallest logit over temperature that is kept, (N,); k of 0, p of 1, min_p of 0 keep all.

    The number itself need not occur in the row: what is not below it is kept.
    """
    num_rows, vocab_size = logits_NV.shape
    refuse_unless(
        logits_NV.stride(1) == 1 and logits_NV.dtype == torch.float32,
        "a row of logits must be contiguous float32",
    )
    limits = (temperature_N, k_N, p_N, min_p_N)
    refuse_unless(
        all(each.numel() == num_rows and each.is_contiguous() for each in limits),
        lambda: f"{num_rows} rows need as many temperatures and limits",
    )
    lowest_N = torch.empty(num_rows, dtype=torch.float32, device=logits_NV.device)
    if num_rows == 0:
        return lowest_N
    pdl = has_pdl(logits_NV)
    _truncate_kernel[(num_rows,)](
        logits_NV,
        temperature_N,
        k_N,
        p_N,
        min_p_N,
        lowest_N,
        vocab_size,
        logits_NV.stride(0),
        BLOCK=min(BLOCK, triton.next_power_of_2(vocab_size)),
        PDL=pdl,
        num_warps=16,
        launch_pdl=pdl,
    )
    return lowest_N


def kept_reference(
    logits_V: Tensor, temperature: float, k: int, p: float, min_p: float
) -> list[int]:
    """The ids of a row that are not below what `lowest_kept` answers, in float64."""
    scaled_V = logits_V.double() / temperature
    weights_V = (scaled_V - scaled_V.max()).exp()
    values = sorted(set(scaled_V.tolist()), reverse=True)
    kth = values[-1] if k == 0 else scaled_V.sort(descending=True).values[k - 1].item()
    is_left_V = (weights_V >= min_p) & (scaled_V >= kth)
    order = scaled_V.argsort(descending=True)
    first = order if k == 0 else order[:k]
    total = weights_V[first][weights_V[first] >= min_p].sum().item()
    kept: set[float] = set()
    for value in values:
        above = weights_V[(scaled_V > value) & (weights_V >= min_p)].sum().item()
        if p == 1.0 or above < p * total:
            kept.add(value)
    return [i for i, x in enumerate(scaled_V.tolist()) if is_left_V[i] and x in kept]
