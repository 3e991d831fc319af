"""From a projection's rows to attention's inputs, in one pass: norm, rotate, write to the cache.

    q = rotate(norm(q));   keys[place] = rotate(norm(k));   values[place] = v

When to use: on a GPU, before attention over pages. Torch would read and write the rows six times.
Everything between is in float32 and rounded once.

A row's rotation is three rows of C = D / 2 numbers: cosines, minus sines, sines (as
`workers.layers.rotary` makes them). A pair is a coordinate of the first half of a head and the same
of the second; only the cosines and the sines are read.

    x = [1, 2], cos = [0.6], sin = [0.8]:   out = [1 * 0.6 - 2 * 0.8, 2 * 0.6 + 1 * 0.8] = [-1, 2]

Shapes: T rows, N heads of a projection (H queries, then G keys, then G values), D head dim,
X tokens of the cache.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.fp8 import NO_SCALES, Scales, refuse_other_scales
from kernels.launch import begin, has_pdl, refuse_unless
from kernels.paged_attention import store_kv

HEADS_AT_ONCE = 8


@triton.jit
def _nearest_e4m3(x):
    """The e4m3 number nearest to a float32, as a float32: a cast to float8e4nv keeps it.

    Beside 1.5 * 2^23 steps of e4m3 a float32 has room for whole steps only, so adding and taking
    them away rounds, ties to even. NOTE: Triton's interpreter truncates where a GPU's cast rounds.
    """
    x = tl.clamp(x, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
    binade = (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    large = tl.maximum(binade, 0.015625, propagate_nan=tl.PropagateNan.ALL) * 1572864.0
    return (x + large) - large


@triton.jit
def _rope_store_kernel(
    qkv_ptr,
    norm_ptr,
    rotation_ptr,
    place_ptr,
    q_ptr,
    keys_ptr,
    values_ptr,
    num_heads,
    num_kv_heads,
    half,
    eps,
    inverse_key_scale,
    inverse_value_scale,
    NORM: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    num_q_parts = tl.cdiv(num_heads, HEADS)
    num_kv_parts = tl.cdiv(num_kv_heads, HEADS)
    is_query = part < num_q_parts
    is_value = part >= num_q_parts + num_kv_parts
    # `first` counts heads in the projection, `head` within queries, keys or values.
    head = part * HEADS
    count = num_heads
    first = 0
    if not is_query:
        head = (part - num_q_parts) * HEADS
        count = num_kv_heads
        first = num_heads
        if is_value:
            head -= num_kv_parts * HEADS
            first += num_kv_heads
    heads = head + tl.arange(0, HEADS)
    cols = tl.arange(0, HALF)
    inside = (heads < count)[:, None] & (cols < half)[None, :]
    offsets = heads[:, None] * (2 * half) + cols[None, :]
    num_projected = num_heads + 2 * num_kv_heads
    begin(PDL)
    source = qkv_ptr + (row * num_projected + first) * (2 * half) + offsets
    low = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(source + half, mask=inside, other=0.0).to(tl.float32)
    if not is_value:
        if NORM:
            squares = tl.sum(low * low + high * high, axis=1)
            inverse_rms = tl.rsqrt(squares / (2 * half) + eps)[:, None]
            weight = norm_ptr + first * (2 * half) + offsets
            low *= inverse_rms * tl.load(weight, mask=inside, other=0.0).to(tl.float32)
            high *= inverse_rms * tl.load(weight + half, mask=inside, other=0.0).to(tl.float32)
        angle = rotation_ptr + row * 3 * half + cols
        cos = tl.load(angle, mask=cols < half, other=0.0).to(tl.float32)[None, :]
        sin = tl.load(angle + 2 * half, mask=cols < half, other=0.0).to(tl.float32)[None, :]
        turned = low * cos - high * sin
        high = high * cos + low * sin
        low = turned
    if is_query:
        target = q_ptr + row * num_heads * (2 * half) + offsets
        tl.store(target, low, mask=inside)
        tl.store(target + half, high, mask=inside)
    else:
        place = tl.load(place_ptr + row).to(tl.int64) * num_kv_heads * (2 * half)
        there = keys_ptr + place + offsets
        if is_value:
            there = values_ptr + place + offsets
        if inverse_key_scale is not None:
            inverse_scale = tl.where(is_value, inverse_value_scale, inverse_key_scale)
            low = _nearest_e4m3(low * inverse_scale)
            high = _nearest_e4m3(high * inverse_scale)
        tl.store(there, low, mask=inside)
        tl.store(there + half, high, mask=inside)


def rope_store(
    qkv_TND: Tensor,
    norm_ND: Tensor | None,
    rotation_T3C: Tensor,
    places_T: Tensor,
    keys_XGD: Tensor,
    values_XGD: Tensor,
    *,
    eps: float,
    scales: Scales = NO_SCALES,
) -> Tensor:
    """The queries (T, H, D); keys and values of the rows are in the cache.

    `norm_ND` has the weights of the H + G heads that are normalised, or is None; `scales` are those
    of a cache of e4m3, whose numbers are rounded once, from float32.
    """
    num_rows, num_projected, head_dim = qkv_TND.shape
    num_kv_heads = keys_XGD.shape[1]
    num_heads = num_projected - 2 * num_kv_heads
    half = head_dim // 2
    refuse_unless(
        num_heads > 0 and keys_XGD.shape == values_XGD.shape and keys_XGD.shape[2] == head_dim,
        lambda: (
            f"qkv {tuple(qkv_TND.shape)}, keys {tuple(keys_XGD.shape)} and values "
            f"{tuple(values_XGD.shape)} do not belong together"
        ),
    )
    refuse_unless(
        rotation_T3C.shape == (num_rows, 3, half) and places_T.shape == (num_rows,),
        lambda: (
            f"{num_rows} rows of {head_dim} come with rotation {tuple(rotation_T3C.shape)} and "
            f"places {tuple(places_T.shape)}"
        ),
    )
    refuse_unless(
        norm_ND is None or norm_ND.shape == (num_heads + num_kv_heads, head_dim),
        "the norm must have a row for each query and key head",
    )
    tensors = (qkv_TND, rotation_T3C, places_T, keys_XGD, values_XGD)
    refuse_unless(all(each.is_contiguous() for each in tensors), "all tensors must be contiguous")
    refuse_other_scales(keys_XGD, scales)
    q_THD = qkv_TND.new_empty(num_rows, num_heads, head_dim)
    if num_rows == 0:
        return q_THD
    pdl = has_pdl(qkv_TND)
    num_q_parts = triton.cdiv(num_heads, HEADS_AT_ONCE)
    num_kv_parts = triton.cdiv(num_kv_heads, HEADS_AT_ONCE)
    _rope_store_kernel[(num_rows, num_q_parts + 2 * num_kv_parts)](
        qkv_TND,
        qkv_TND if norm_ND is None else norm_ND,
        rotation_T3C,
        places_T,
        q_THD,
        keys_XGD,
        values_XGD,
        num_heads,
        num_kv_heads,
        half,
        eps,
        None if scales.key is None else 1.0 / scales.key,
        None if scales.value is None else 1.0 / scales.value,
        NORM=norm_ND is not None,
        HEADS=HEADS_AT_ONCE,
        HALF=triton.next_power_of_2(half),
        PDL=pdl,
        num_warps=4,
        launch_pdl=pdl,
    )
    return q_THD


def rope_store_reference(
    qkv_TND: Tensor,
    norm_ND: Tensor | None,
    rotation_T3C: Tensor,
    places_T: Tensor,
    keys_XGD: Tensor,
    values_XGD: Tensor,
    *,
    eps: float,
    scales: Scales = NO_SCALES,
) -> Tensor:
    """What `rope_store` must equal, in plain torch."""
    num_kv_heads = keys_XGD.shape[1]
    num_heads = qkv_TND.shape[1] - 2 * num_kv_heads
    x_TND = qkv_TND[:, : num_heads + num_kv_heads].float()
    if norm_ND is not None:
        x_TND = x_TND * torch.rsqrt(x_TND.square().mean(-1, keepdim=True) + eps) * norm_ND.float()
    cos_T1C, _, sin_T1C = rotation_T3C.float().unsqueeze(1).unbind(2)
    low, high = x_TND.chunk(2, dim=-1)
    exact = torch.cat((low * cos_T1C - high * sin_T1C, high * cos_T1C + low * sin_T1C), dim=-1)
    turned = exact.to(qkv_TND.dtype)
    k_TGD = exact[:, num_heads:] if scales.key is not None else turned[:, num_heads:]
    store_kv(keys_XGD, places_T, k_TGD, scales.key)
    store_kv(values_XGD, places_T, qkv_TND[:, num_heads + num_kv_heads :], scales.value)
    return turned[:, :num_heads].contiguous()
