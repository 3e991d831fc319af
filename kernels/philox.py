"""Philox4x32-10: random numbers that are a function of a key and a counter, with no state.

    draw(seed, nonce, position, id) -> uint32

The key is the seed; the counter is (id // 4, position, nonce) and `id % 4` picks one of the four
words that a call gives. So the noise of a request's token does not depend on the row it has, on
what else is in the batch, or on how often it was drawn before.

`exponential_noise` turns words into exponential variables E. The id that maximises p / E, or
log p - log E, is a draw from p: a race that needs neither a sort nor the sum of p.

When to use: on a CPU, and as the reference. A GPU kernel that fuses the draw with the argmax must
give the same words: Philox is exact.

    >>> words = philox4x32([0, 0, 0, 0], [0, 0])
    >>> [f"{word:08x}" for word in words]
    ['6627e8d5', 'e169c58d', 'bc57ac4c', '9b00dbd8']

Shapes: R rows, V ids of the vocabulary, K ids of a row that are asked for.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
NUM_ROUNDS = 10
LOW = 0xFFFFFFFF

Words = Any
"""A tensor, an array or a number: what has integer operators."""

LARGEST_UNIFORM = 1.0 - 2.0**-24
"""The largest float32 below 1; log(1 - u) must stay finite."""


def philox4x32(counter: Sequence[Words], key: Sequence[Words]) -> tuple[Words, ...]:
    """Four words for a counter of four words and a key of two, all in 0..2**32-1.

    Words are int64 tensors or uint64 arrays, which broadcast against each other, or plain numbers.
    The low 64 bits of an int64 product are right whatever its sign says, so a shift is masked.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for turn in range(NUM_ROUNDS):
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        # NOTE: c1 and c3 carry garbage above bit 31 until they become part of c0 and c2.
        c0 = ((p1 >> 32) ^ c1 ^ (k0 + turn * WEYL[0])) & LOW
        c2 = ((p0 >> 32) ^ c3 ^ (k1 + turn * WEYL[1])) & LOW
        c1, c3 = p1, p0
    return c0, c1 & LOW, c2, c3 & LOW


def words_all(seed_R: Tensor, nonce_R: Tensor, position_R: Tensor, vocab_size: int) -> Tensor:
    """The words of every id, (R, V)."""
    blocks = torch.arange((vocab_size + 3) // 4, device=seed_R.device)
    words = _words(seed_R, nonce_R, position_R, blocks[None])
    return torch.stack(words, dim=-1).flatten(1)[:, :vocab_size].contiguous()


def words_at(seed_R: Tensor, nonce_R: Tensor, position_R: Tensor, ids_RK: Tensor) -> Tensor:
    """The words of some ids of each row, (R, K): equal to those that `words_all` has there."""
    words = torch.stack(_words(seed_R, nonce_R, position_R, ids_RK >> 2), dim=-1)
    return words.gather(-1, (ids_RK & 3).unsqueeze(-1)).squeeze(-1)


def _words(
    seed_R: Tensor, nonce_R: Tensor, position_R: Tensor, blocks_RK: Tensor
) -> tuple[Tensor, ...]:
    if seed_R.device.type != "cpu":
        return _call(seed_R, nonce_R, position_R, blocks_RK)
    # A call is a hundred small operations, which cost numpy a third of what they cost torch.
    inputs = (seed_R, nonce_R, position_R, blocks_RK)
    words = _call(*(tensor.numpy().view(np.uint64) for tensor in inputs))
    return tuple(torch.from_numpy(word.view(np.int64)) for word in words)


def _call(seed_R: Words, nonce_R: Words, position_R: Words, blocks_RK: Words) -> tuple[Words, ...]:
    seed_R1, nonce_R1, position_R1 = seed_R[:, None], nonce_R[:, None], position_R[:, None]
    counter = (blocks_RK, position_R1, nonce_R1 & LOW, nonce_R1 >> 32)
    return philox4x32(counter, (seed_R1 & LOW, seed_R1 >> 32))


def exponential_noise(words: Tensor) -> Tensor:
    """Words as exponential variables in float32: finite, above 0.

    -log(1 - u) rather than -log(u): the race is won by small values, and floats are finest near 0.
    """
    uniform = words.to(torch.float32).mul_(2.0**-32).add_(2.0**-33)
    return uniform.clamp_(max=LARGEST_UNIFORM).neg_().log1p_().neg_()
