"""The draw of one id a row, and which ids it is among: in plain torch, for CPUs.

`kernels.draw` and `kernels.truncate` are a GPU's, and say the same. The draw is a race of
exponentials keyed by (seed, nonce, position): see `kernels.philox`. The lowest id wins a tie.

Shapes: N rows, V vocabulary, K candidates of a row.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.philox import exponential_noise, words_all, words_at

NEVER = -math.inf

WIDEST_RACE = 26.0
"""An id whose logit is further below the highest loses the race whatever it draws: noise goes from
-log(1 - 2**-33) to -log(2**-24), whose logarithms are 25.7 apart."""

HEAD = 256
"""How many ids of a row are sorted before all are."""


class Truncation(NamedTuple):
    """Which ids may be drawn, by row; k of 0, p of 1 and min_p of 0 keep all."""

    k_N: Tensor
    p_N: Tensor
    min_p_N: Tensor


def draw(
    scaled_NV: Tensor,
    lowest_N1: Tensor | None,
    seed_N: Tensor,
    nonce_N: Tensor,
    position_N: Tensor,
) -> Tensor:
    """One id a row from softmax of `scaled_NV`, among those not below `lowest_N1`."""
    if scaled_NV.device.type == "cpu":
        # Most ids cannot win, and on a CPU their noise is what a draw costs.
        can_win_N1 = scaled_NV.amax(dim=-1, keepdim=True) - WIDEST_RACE
        floor_N1 = can_win_N1 if lowest_N1 is None else torch.maximum(can_win_N1, lowest_N1)
        kept_NV = scaled_NV >= floor_N1
        if int(kept_NV.sum()) * 8 < scaled_NV.numel():
            return _race_among(scaled_NV, kept_NV, seed_N, nonce_N, position_N)
    noise_NV = exponential_noise(words_all(seed_N, nonce_N, position_N, scaled_NV.shape[-1]))
    score_NV = scaled_NV - noise_NV.log_()
    if lowest_N1 is not None:
        score_NV.masked_fill_(scaled_NV < lowest_N1, NEVER)
    return score_NV.argmax(dim=-1)


def _race_among(
    scaled_NV: Tensor, kept_NV: Tensor, seed_N: Tensor, nonce_N: Tensor, position_N: Tensor
) -> Tensor:
    """`draw` with noise for the ids of `kept_NV` only: the same noise, so the same ids."""
    row, token = kept_NV.nonzero(as_tuple=True)
    words = words_at(seed_N[row], nonce_N[row], position_N[row], token[:, None]).squeeze(-1)
    score_NV = torch.full_like(scaled_NV, NEVER)
    score_NV[row, token] = scaled_NV[row, token] - exponential_noise(words).log_()
    return score_NV.argmax(dim=-1)


def lowest_kept(scaled_NV: Tensor, truncation: Truncation) -> Tensor:
    """The smallest value that min_p, top_k and top_p keep, in that order; (N, 1).

    Each looks at what the one before has left, as if its probabilities were made anew. A few ids
    of each row usually decide it, so on a CPU all are sorted only if they do not.
    """
    vocab_size = scaled_NV.shape[-1]
    highest_N1 = scaled_NV.amax(dim=-1, keepdim=True)
    floor_N1 = highest_N1 + truncation.min_p_N[:, None].log()
    weights_NV = (scaled_NV - highest_N1).exp_().masked_fill_(scaled_NV < floor_N1, 0.0)
    k_N1 = torch.where(truncation.k_N == 0, vocab_size, truncation.k_N)[:, None]
    limits = _Limits(
        highest_N1, floor_N1, weights_NV.sum(-1, keepdim=True), k_N1, truncation.p_N[:, None]
    )
    if scaled_NV.device.type == "cpu":
        num_head = max(HEAD, int(truncation.k_N.max()))
        if num_head < vocab_size:
            lowest_N1, is_found_N1 = _last_kept(scaled_NV, num_head, limits)
            if bool(is_found_N1.all()):
                return lowest_N1
    return _last_kept(scaled_NV, vocab_size, limits)[0]


class _Limits(NamedTuple):
    """What decides the last id that a row keeps, (N, 1) each."""

    highest_N1: Tensor
    floor_N1: Tensor
    """Of min_p."""
    total_N1: Tensor
    """Weight of what min_p keeps; the highest weighs 1."""
    k_N1: Tensor
    p_N1: Tensor


def _last_kept(scaled_NV: Tensor, num_sorted: int, limits: _Limits) -> tuple[Tensor, Tensor]:
    """The last value kept, and whether it is surely among the `num_sorted` highest.

    NOTE: sums run along the sorted order, never as a tree, so that they are the same numbers
    however many values are sorted, and a row keeps the same ids whatever else is in the batch.
    """
    vocab_size = scaled_NV.shape[-1]
    sorted_NK = scaled_NV.topk(num_sorted, dim=-1).values
    weights_NK = (sorted_NK - limits.highest_N1).exp_()
    weights_NK.masked_fill_(sorted_NK < limits.floor_N1, 0.0)
    weights_NK *= torch.arange(num_sorted, device=scaled_NV.device) < limits.k_N1
    until_NK = weights_NK.cumsum(dim=-1)
    before_NK = torch.cat([torch.zeros_like(until_NK[:, :1]), until_NK[:, :-1]], dim=-1)
    is_limited_N1 = limits.k_N1 < vocab_size
    mass_N1 = limits.p_N1 * torch.where(is_limited_N1, until_NK[:, -1:], limits.total_N1)
    is_whole_N1 = limits.p_N1 == 1.0
    num_kept_N1 = ((weights_NK > 0) & ((before_NK < mass_N1) | is_whole_N1)).sum(-1, keepdim=True)
    last_N1 = sorted_NK.gather(-1, (num_kept_N1 - 1).clamp_(min=0))
    # A row without top_k and top_p is cut by min_p alone, however little of it was sorted.
    lowest_N1 = torch.where(is_whole_N1 & ~is_limited_N1, limits.floor_N1, last_N1)
    return lowest_N1, is_limited_N1 | is_whole_N1 | (until_NK[:, -1:] >= mass_N1)
