"""Causal attention of a step's rows over keys and values that lie in pages.

    out = softmax(q k^T * scale + mask) v,   k and v read through a sequence's page list

`decode_attention` takes one query row of every sequence and reads them all in one gather, each
padded to the longest; `chunk_attention` takes many rows of one sequence.

When to use: on a CPU, and anywhere as the reference that a faster kernel must equal. It copies the
keys and values that it reads, once a layer.

NOTE: what is past a sequence's end is masked, not skipped, so it must be finite: see
`workers.cache`.

Shapes: B sequences, T query rows, H heads, G kv heads, D head dim, L tokens of a sequence,
P pages, S tokens in a page, N pages that are read.
"""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from kernels.fp8 import E4M3, NO_SCALES, Scales, bits_of, from_e4m3, to_e4m3

MASK_ELEMENTS = 2**22
"""A chunk's mask is cut into blocks of rows no larger than this."""


def store_kv(
    rows_XGD: Tensor, kv_rows_T: Tensor, x_TGD: Tensor, scale: float | None = None
) -> None:
    """Write keys (or values) of T rows to their places among the cache's P * S tokens.

    `scale` is given if, and only if, the cache keeps e4m3 (`kernels.fp8`).
    """
    if scale is not None:
        x_TGD = to_e4m3(x_TGD, scale)
    bits_of(rows_XGD).index_copy_(0, kv_rows_T, bits_of(x_TGD))


def gather_kv(
    pages_PSGD: Tensor, pages_N: Tensor, scale: float | None, dtype: torch.dtype
) -> Tensor:
    """Keys (or values) of some pages, copied (N, S, G, D), as they are computed with."""
    if scale is None:
        return pages_PSGD.index_select(0, pages_N)
    stored = bits_of(pages_PSGD).index_select(0, pages_N).view(E4M3)
    return from_e4m3(stored, scale, dtype)


def decode_mask(
    positions_B: Tensor, width: int, *, sliding_window: int | None, dtype: torch.dtype
) -> Tensor:
    """0 where a decode at its position may look, -inf elsewhere; (B, 1, 1, L)."""
    places_L = torch.arange(width, device=positions_B.device)
    hidden_BL = places_L > positions_B[:, None]
    if sliding_window is not None:
        hidden_BL |= places_L <= positions_B[:, None] - sliding_window
    mask_BL = torch.zeros(hidden_BL.shape, dtype=dtype, device=positions_B.device)
    return mask_BL.masked_fill_(hidden_BL, float("-inf"))[:, None, None]


def decode_attention(
    q_BHD: Tensor,
    keys_PSGD: Tensor,
    values_PSGD: Tensor,
    pages_BN: Tensor,
    *,
    length: int,
    mask_B11L: Tensor | None,
    scale: float,
    scales: Scales = NO_SCALES,
) -> Tensor:
    """One row each of B sequences, padded to `length` tokens; (B, H, D).

    `pages_BN` is flat: N pages of the first sequence, then those of the next. The heads that share
    a kv head are taken as its query rows, which needs no copy of keys.
    """
    num_seqs, num_heads, head_dim = q_BHD.shape
    num_kv_heads = keys_PSGD.shape[2]
    shape = (num_seqs, -1, num_kv_heads, head_dim)
    key_scale, value_scale = scales
    k_NSGD = gather_kv(keys_PSGD, pages_BN, key_scale, q_BHD.dtype)
    v_NSGD = gather_kv(values_PSGD, pages_BN, value_scale, q_BHD.dtype)
    k_BLGD, v_BLGD = k_NSGD.view(shape)[:, :length], v_NSGD.view(shape)[:, :length]
    out = scaled_dot_product_attention(
        q_BHD.reshape(num_seqs, num_kv_heads, num_heads // num_kv_heads, head_dim),
        k_BLGD.transpose(1, 2),
        v_BLGD.transpose(1, 2),
        attn_mask=mask_B11L,
        scale=scale,
    )
    return out.reshape(num_seqs, num_heads, head_dim)


def chunk_attention(
    q_THD: Tensor,
    keys_PSGD: Tensor,
    values_PSGD: Tensor,
    pages_N: Tensor,
    *,
    start: int,
    scale: float,
    sliding_window: int | None,
    scales: Scales = NO_SCALES,
) -> Tensor:
    """Tokens `start` to `start + T` of one sequence over all its tokens before them; (T, H, D)."""
    num_rows = q_THD.shape[0]
    length = start + num_rows
    key_scale, value_scale = scales
    k_NSGD = gather_kv(keys_PSGD, pages_N, key_scale, q_THD.dtype)
    v_NSGD = gather_kv(values_PSGD, pages_N, value_scale, q_THD.dtype)
    k_GLD = k_NSGD.flatten(0, 1)[:length].transpose(0, 1)
    v_GLD = v_NSGD.flatten(0, 1)[:length].transpose(0, 1)
    q_HTD = q_THD.transpose(0, 1)
    if start == 0 and (sliding_window is None or sliding_window >= length):
        out = scaled_dot_product_attention(
            q_HTD[None], k_GLD[None], v_GLD[None], is_causal=True, scale=scale, enable_gqa=True
        )
        return out[0].transpose(0, 1)
    out_HTD = torch.empty_like(q_HTD)
    step = max(1, MASK_ELEMENTS // length)
    for row in range(0, num_rows, step):
        rows = slice(row, min(row + step, num_rows))
        seen = slice(0, start + rows.stop)
        mask = chunk_mask(start + row, rows.stop - row, sliding_window=sliding_window, like=q_THD)
        out_HTD[:, rows] = scaled_dot_product_attention(
            q_HTD[None, :, rows],
            k_GLD[None, :, seen],
            v_GLD[None, :, seen],
            attn_mask=mask,
            scale=scale,
            enable_gqa=True,
        )[0]
    return out_HTD.transpose(0, 1)


def chunk_mask(start: int, num_rows: int, *, sliding_window: int | None, like: Tensor) -> Tensor:
    """0 where rows at `start` and on may look, -inf elsewhere; (T, start + T)."""
    mask_TL = torch.full(
        (num_rows, start + num_rows), float("-inf"), dtype=like.dtype, device=like.device
    )
    mask_TL.triu_(start + 1)
    if sliding_window is not None:
        hidden = torch.ones(mask_TL.shape, dtype=torch.bool, device=like.device)
        mask_TL.masked_fill_(hidden.tril_(start - sliding_window), float("-inf"))
    return mask_TL


def paged_attention_reference(
    q_THD: Tensor,
    keys_PSGD: Tensor,
    values_PSGD: Tensor,
    pages: list[list[int]],
    *,
    query_lens: list[int],
    kv_lens: list[int],
    scale: float,
    sliding_window: int | None,
) -> Tensor:
    """What any attention over pages must equal: one sequence, row and head at a time, in float64.

    The rows of a sequence are its last `query_lens[i]` tokens of `kv_lens[i]`.
    """
    out_THD = torch.empty_like(q_THD)
    group = q_THD.shape[1] // keys_PSGD.shape[2]
    row = 0
    for page_list, num_queries, num_keys in zip(pages, query_lens, kv_lens, strict=True):
        k_LGD = keys_PSGD[page_list].flatten(0, 1)[:num_keys].double()
        v_LGD = values_PSGD[page_list].flatten(0, 1)[:num_keys].double()
        for position in range(num_keys - num_queries, num_keys):
            first = 0 if sliding_window is None else max(0, position + 1 - sliding_window)
            for head in range(q_THD.shape[1]):
                k_LD = k_LGD[first : position + 1, head // group]
                weights_L = (k_LD @ q_THD[row, head].double() * scale).softmax(0)
                out = weights_L @ v_LGD[first : position + 1, head // group]
                out_THD[row, head] = out.to(out_THD.dtype)
            row += 1
    return out_THD
