"""A draw from each row's distribution: a race of exponentials, fused with the argmax.

    score(id) = logit / temperature - log(noise(seed, nonce, position, id));   the highest wins

The noise is that of `kernels.philox`: a function of the request and the token's position, so the
same request draws the same token in whatever row of whatever batch, if its logits are the same.

When to use: on a GPU. The logits are read once; in torch the words alone are a hundred passes over
int64. The words are exact; logarithms are a GPU's own, so two ids whose scores are equal to the
last bits may win in different order than on a CPU.

Shapes: N rows, V vocabulary, K blocks of the vocabulary.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.decode_rows import best_of_blocks
from kernels.launch import begin, has_pdl, refuse_unless
from kernels.philox import exponential_noise, words_all

BLOCK = 2048
LARGEST_UNIFORM = tl.constexpr(1.0 - 2.0**-24)
WORD_UNIT = tl.constexpr(2.0**-32)


@triton.jit
def _log_noise(word):
    """log(-log(1 - u)) for a word's uniform u: see `kernels.philox.exponential_noise`."""
    uniform = tl.minimum(word.to(tl.float32) * WORD_UNIT + WORD_UNIT / 2, LARGEST_UNIFORM)
    rest = 1.0 - uniform
    # log1p(-u) by way of log: the quotient undoes the rounding of 1 - u.
    log1p = tl.where(rest == 1.0, -uniform, tl.log(rest) * (uniform / (1.0 - rest)))
    return tl.log(-log1p)


@triton.jit
def _score(logits_ptr, ids, vocab_size, temperature, lowest, word):
    inside = ids < vocab_size
    logits = tl.load(logits_ptr + ids, mask=inside, other=float("-inf"))
    scaled = tl.div_rn(logits, temperature)
    return tl.where(inside & (scaled >= lowest), scaled - _log_noise(word), float("-inf"))


@triton.jit
def _race_kernel(
    logits_ptr,
    temperature_ptr,
    lowest_ptr,
    seed_ptr,
    nonce_ptr,
    position_ptr,
    value_ptr,
    id_ptr,
    vocab_size,
    row_stride,
    HAS_LOWEST: tl.constexpr,
    QUARTER: tl.constexpr,
    PDL: tl.constexpr,
):
    block = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    begin(PDL)
    temperature = tl.load(temperature_ptr + row)
    lowest = float("-inf")
    if HAS_LOWEST:
        lowest = tl.load(lowest_ptr + row)
    seed = tl.load(seed_ptr + row)
    nonce = tl.load(nonce_ptr + row)
    fours = block * QUARTER + tl.arange(0, QUARTER)
    zero = fours * 0
    position = zero + tl.load(position_ptr + row).to(tl.int32)
    nonce_low = zero + (nonce & 0xFFFFFFFF).to(tl.uint32).to(tl.int32, bitcast=True)
    nonce_high = zero + (nonce >> 32).to(tl.int32)
    w0, w1, w2, w3 = tl.philox(seed, fours, position, nonce_low, nonce_high)
    row_logits = logits_ptr + row * row_stride
    ids = fours * 4
    best = _score(row_logits, ids, vocab_size, temperature, lowest, w0)
    best_ids = ids
    score = _score(row_logits, ids + 1, vocab_size, temperature, lowest, w1)
    best_ids = tl.where(score > best, ids + 1, best_ids)
    best = tl.maximum(best, score)
    score = _score(row_logits, ids + 2, vocab_size, temperature, lowest, w2)
    best_ids = tl.where(score > best, ids + 2, best_ids)
    best = tl.maximum(best, score)
    score = _score(row_logits, ids + 3, vocab_size, temperature, lowest, w3)
    best_ids = tl.where(score > best, ids + 3, best_ids)
    best = tl.maximum(best, score)
    value, at = tl.max(best, axis=0, return_indices=True)
    winner = tl.sum(tl.where(tl.arange(0, QUARTER) == at, best_ids, 0), axis=0)
    tl.store(value_ptr + row * tl.num_programs(0) + block, value)
    tl.store(id_ptr + row * tl.num_programs(0) + block, winner)


def draw(
    logits_NV: Tensor,
    temperature_N: Tensor,
    lowest_N: Tensor | None,
    seed_N: Tensor,
    nonce_N: Tensor,
    position_N: Tensor,
) -> Tensor:
    """One id a row (int64), among those whose logit over temperature is not below `lowest_N`."""
    num_rows, vocab_size = logits_NV.shape
    refuse_unless(
        logits_NV.stride(1) == 1 and logits_NV.dtype == torch.float32,
        "a row of logits must be contiguous float32",
    )
    keys = (temperature_N, seed_N, nonce_N, position_N)
    refuse_unless(
        all(each.numel() == num_rows and each.is_contiguous() for each in keys),
        lambda: f"{num_rows} rows need as many temperatures, seeds, nonces and positions",
    )
    num_blocks = triton.cdiv(vocab_size, BLOCK)
    values_NK = torch.empty(num_rows, num_blocks, dtype=torch.float32, device=logits_NV.device)
    ids_NK = torch.empty(num_rows, num_blocks, dtype=torch.int32, device=logits_NV.device)
    pdl = has_pdl(logits_NV)
    if num_rows:
        _race_kernel[(num_blocks, num_rows)](
            logits_NV,
            temperature_N,
            temperature_N if lowest_N is None else lowest_N,
            seed_N,
            nonce_N,
            position_N,
            values_NK,
            ids_NK,
            vocab_size,
            logits_NV.stride(0),
            HAS_LOWEST=lowest_N is not None,
            QUARTER=BLOCK // 4,
            PDL=pdl,
            num_warps=4,
            launch_pdl=pdl,
        )
    return best_of_blocks(values_NK, ids_NK)[1]


def draw_reference(
    logits_NV: Tensor,
    temperature_N: Tensor,
    lowest_N: Tensor | None,
    seed_N: Tensor,
    nonce_N: Tensor,
    position_N: Tensor,
) -> Tensor:
    """What `draw` must equal, in plain torch."""
    scaled_NV = logits_NV / temperature_N[:, None]
    noise_NV = exponential_noise(words_all(seed_N, nonce_N, position_N, logits_NV.shape[1]))
    score_NV = scaled_NV - noise_NV.log_()
    if lowest_N is not None:
        score_NV.masked_fill_(scaled_NV < lowest_N[:, None], float("-inf"))
    return score_NV.argmax(dim=-1)
