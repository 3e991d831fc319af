"""Attention over a compressed latent, in plain torch: on a CPU, and what faster kernels must equal.

A token has one row of W numbers that all heads share as their key; its first R numbers are their
value too (DeepSeek's MLA with absorbed projections, arXiv 2405.04434):

    out = softmax(q rows^T * scale, over the tokens a query sees) rows[:, :R]

A sparse query sees only K tokens, those an indexer scores highest (DeepSeek-V3.2):

    score = sum over heads j of weight_j * relu(q_j . key)

Shapes: T queries, L tokens of their sequence, H heads, W and R as above; J heads of an indexer,
E numbers of its keys.
"""

import torch
from torch import Tensor

BLOCK_ELEMENTS = 2**24
"""Scores that are held at once."""


def causal(positions_T: Tensor, num_tokens: int) -> Tensor:
    """Which tokens a query at its position may see (bool); (T, L)."""
    return torch.arange(num_tokens, device=positions_T.device) <= positions_T[:, None]


def index_scores(q_TJE: Tensor, weight_TJ: Tensor, keys_LE: Tensor) -> Tensor:
    """float32 (T, L), without regard to who comes after whom."""
    products_TJL = (q_TJE.float() @ keys_LE.float().t()).relu_()
    return (weight_TJ.float().unsqueeze(1) @ products_TJL).squeeze(1)


def chosen(score_TL: Tensor, seen_TL: Tensor, num_chosen: int) -> Tensor:
    """Which tokens are read (bool): the best of those that are seen, all if they are few."""
    if num_chosen >= score_TL.shape[1]:
        return seen_TL
    best_TK = score_TL.masked_fill(~seen_TL, -torch.inf).topk(num_chosen, dim=1).indices
    return torch.zeros_like(seen_TL).scatter_(1, best_TK, True) & seen_TL


def latent_attention(
    q_THW: Tensor, rows_LW: Tensor, seen_TL: Tensor, *, num_values: int, scale: float
) -> Tensor:
    """(T, H, R); every query sees at least one token."""
    score_THL = (q_THW @ rows_LW.t()) * scale
    score_THL = score_THL.masked_fill(~seen_TL.unsqueeze(1), -torch.inf)
    weight_THL = score_THL.softmax(-1, dtype=torch.float32).to(rows_LW.dtype)
    return weight_THL @ rows_LW[:, :num_values]


def sparse_latent_attention(
    q_THW: Tensor,
    rows_LW: Tensor,
    index_q_TJE: Tensor,
    index_weight_TJ: Tensor,
    index_keys_LE: Tensor,
    positions_T: Tensor,
    *,
    num_chosen: int,
    num_values: int,
    scale: float,
) -> Tensor:
    """Queries of one sequence, each over the tokens that its indexer chooses; (T, H, R)."""
    num_rows, num_heads, _ = q_THW.shape
    heads = max(num_heads, index_q_TJE.shape[1])
    at_once = max(1, BLOCK_ELEMENTS // (heads * rows_LW.shape[0]))
    parts: list[Tensor] = []
    for first in range(0, num_rows, at_once):
        rows = slice(first, first + at_once)
        seen_TL = causal(positions_T[rows], rows_LW.shape[0])
        score_TL = index_scores(index_q_TJE[rows], index_weight_TJ[rows], index_keys_LE)
        read_TL = chosen(score_TL, seen_TL, num_chosen)
        parts.append(
            latent_attention(q_THW[rows], rows_LW, read_TL, num_values=num_values, scale=scale)
        )
    return torch.cat(parts)
