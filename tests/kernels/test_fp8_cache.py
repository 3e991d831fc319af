"""A cache of e4m3: what is stored is the nearest number there is; what is read is that, scaled."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.fp8 import E4M3, HIGHEST, NO_SCALES, Scales, from_e4m3, to_e4m3
from kernels.paged_attention import paged_attention_reference, store_kv
from kernels.paged_decode import cut_sequences, paged_decode
from kernels.paged_prefill import cut_chunks, paged_prefill
from kernels.rope_store import rope_store, rope_store_reference
from tests.kernels.test_paged_kernels import DTYPES, SHAPES, assert_near, cache_of

SCALES = Scales(0.037, 1.9)
NUMBERS = torch.arange(256, dtype=torch.uint8).view(E4M3).float()
"""All there are."""
FINITE = NUMBERS[NUMBERS.isfinite()].unique()


def nearest(x: float) -> set[float]:
    """The e4m3 numbers nearest to `x`, found by looking at all."""
    distance = (FINITE.double() - x).abs()
    return set(FINITE[distance == distance.min()].tolist())


def is_even(number: float) -> bool:
    """Its last bit is 0."""
    return int((number == NUMBERS).nonzero()[0]) % 2 == 0


@settings(max_examples=300)
@given(st.floats(width=32, allow_nan=False))
def test_the_nearest_number_is_stored_and_of_two_the_even_one(x):
    [stored] = to_e4m3(torch.tensor([x]), 1.0).float().tolist()
    candidates = nearest(max(-HIGHEST, min(HIGHEST, x)))
    assert stored in candidates
    assert len(candidates) == 1 or is_even(stored)


def test_the_numbers_of_the_docstring():
    stored = to_e4m3(torch.tensor([3.3, 1000.0]), 2.0)
    assert stored.float().tolist() == [1.625, 448.0]
    assert from_e4m3(stored, 2.0, torch.float32).tolist() == [3.25, 896.0]


def test_nan_stays_nan():
    assert to_e4m3(torch.tensor([math.nan]), 0.5).float().isnan().all()


def e4m3_cache(num_kv_heads: int, dim: int, dtype: torch.dtype, device: str):
    """Stored keys and values, what they mean, and the slots' pages."""
    keys, values, table = cache_of(num_kv_heads, dim, dtype, device)
    stored = to_e4m3(keys, SCALES.key), to_e4m3(values, SCALES.value)
    meant = from_e4m3(stored[0], SCALES.key, dtype), from_e4m3(stored[1], SCALES.value, dtype)
    return stored, meant, table


@pytest.mark.row("S13")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_norm", [True, False])
@pytest.mark.parametrize(
    ("num_rows", "num_heads", "num_kv_heads", "dim"), [(1, 1, 1, 2), (3, 4, 2, 16), (2, 20, 10, 12)]
)
def test_rows_are_stored_as_their_reference_stores_them(
    num_rows, num_heads, num_kv_heads, dim, with_norm, dtype, device
):
    torch.manual_seed(0)
    qkv = (torch.randn(num_rows, num_heads + 2 * num_kv_heads, dim) * 9).to(device, dtype)
    norm = None
    if with_norm:
        norm = torch.randn(num_heads + num_kv_heads, dim).to(device, dtype)
    angle = torch.rand(num_rows, dim // 2)
    rotation = torch.stack((angle.cos(), -angle.sin(), angle.sin()), 1).to(device, dtype)
    places = torch.tensor([7, 0, 3], device=device)[:num_rows]
    mine = torch.zeros(2, 9, num_kv_heads, dim, dtype=torch.uint8, device=device).view(E4M3)
    theirs = torch.zeros_like(mine.view(torch.uint8)).view(E4M3)
    q = rope_store(qkv, norm, rotation, places, *mine, eps=1e-6, scales=SCALES)
    expected = rope_store_reference(qkv, norm, rotation, places, *theirs, eps=1e-6, scales=SCALES)
    assert_near(q, expected)
    values = mine[1].view(torch.uint8), theirs[1].view(torch.uint8)
    differs = values[0] != values[1]
    assert (mine[1].float() == theirs[1].float()).all(), differs.sum()
    # A key's last float32 bit may fall on the other side of a tie: then it is the next number.
    mine, theirs = mine[0].float(), theirs[0].float()
    torch.testing.assert_close(mine, theirs, rtol=1 / 7, atol=2**-9)
    assert (mine != theirs).float().mean() < 0.02


@pytest.mark.row("S13")
def test_every_number_and_every_middle_of_two_is_stored_exactly(device):
    """As values, which are not turned: all bits but the sign of zero are torch's."""
    between = (FINITE[1:] + FINITE[:-1]) / 2
    x = torch.cat([FINITE, between, torch.tensor([449.0, -1e30, math.inf, -math.inf, 2.0**-12])])
    x = torch.cat([x, torch.zeros(-len(x) % 16)]).view(-1, 1, 16).to(device)
    num_rows = len(x)
    qkv = torch.cat([torch.zeros(num_rows, 2, 16, device=device), x], 1)
    rotation = torch.zeros(num_rows, 3, 8, device=device)
    places = torch.arange(num_rows, device=device)
    cache = torch.zeros(2, num_rows, 1, 16, dtype=torch.uint8, device=device).view(E4M3)
    rope_store(qkv, None, rotation, places, *cache, eps=0.0, scales=Scales(1.0, 1.0))
    assert torch.equal(cache[1].float(), to_e4m3(x, 1.0).float())


@pytest.mark.row("S13")
@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16], ids=str)
@pytest.mark.parametrize("window", [None, 70], ids=str)
@pytest.mark.parametrize("num_shares", [1, 50])
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "dim"), SHAPES)
def test_decodes_read_what_is_stored(
    num_heads, num_kv_heads, dim, num_shares, window, dtype, device
):
    stored, (keys, values), table = e4m3_cache(num_kv_heads, dim, dtype, device)
    slots, kv_lens = [2, 0, 3, 1], [1, 64, 150, 65]
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(len(slots), num_heads, dim, generator=generator).to(device, dtype)
    positions = torch.tensor(kv_lens, device=device) - 1
    out = torch.full_like(q, float("nan"))
    paged_decode(
        q,
        stored[0].flatten(0, 1),
        stored[1].flatten(0, 1),
        table,
        torch.tensor(slots, device=device),
        positions,
        cut_sequences(positions, num_shares, sliding_window=window),
        out,
        torch.zeros(len(slots) * num_kv_heads, dtype=torch.int32, device=device),
        page_size=16,
        scale=0.3,
        sliding_window=window,
        scales=SCALES,
    )
    expected = paged_attention_reference(
        q, keys, values, [table[slot].tolist() for slot in slots], query_lens=[1] * len(slots),
        kv_lens=kv_lens, scale=0.3, sliding_window=window,
    )  # fmt: skip
    assert_near(out, expected)


@pytest.mark.row("S13")
@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16], ids=str)
@pytest.mark.parametrize("window", [None, 70], ids=str)
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "dim"), SHAPES)
def test_chunks_read_what_is_stored(num_heads, num_kv_heads, dim, window, dtype, device):
    stored, (keys, values), table = e4m3_cache(num_kv_heads, dim, dtype, device)
    chunks = [(1, 131, 0, 2), (132, 3, 70, 1)]
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(135, num_heads, dim, generator=generator).to(device, dtype)
    out = torch.full_like(q, 7.0)
    paged_prefill(
        q,
        stored[0].flatten(0, 1),
        stored[1].flatten(0, 1),
        table,
        torch.from_numpy(cut_chunks(chunks)).to(device),
        out,
        page_size=16,
        scale=0.3,
        sliding_window=window,
        scales=SCALES,
    )
    expected = paged_attention_reference(
        q[1:], keys, values, [table[slot].tolist() for slot in (2, 1)], query_lens=[131, 3],
        kv_lens=[131, 73], scale=0.3, sliding_window=window,
    )  # fmt: skip
    assert_near(out[1:], expected)
    assert (out[0] == 7.0).all()


def test_scales_without_e4m3_and_e4m3_without_scales_are_refused(device):
    q = torch.zeros(1, 3, 16, device=device)
    plain = torch.zeros(16, 1, 16, device=device)
    rotation = torch.zeros(1, 3, 8, device=device)
    place = torch.zeros(1, dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match=r"a cache of torch\.float32 comes with Scales\(key=0.037"):
        rope_store(q, None, rotation, place, plain, plain, eps=0.0, scales=SCALES)
    stored = to_e4m3(plain, 1.0)
    for scales in (NO_SCALES, Scales(1.0, None)):
        with pytest.raises(ValueError, match=r"a cache of torch\.float8_e4m3fn comes with"):
            rope_store(q, None, rotation, place, stored, stored, eps=0.0, scales=scales)


def test_rows_go_to_their_places_as_bytes():
    rows = torch.zeros(4, 1, 2, dtype=torch.uint8).view(E4M3)
    store_kv(rows, torch.tensor([3, 1]), torch.tensor([[[3.3, 1000.0]], [[-3.3, 0.0]]]), 2.0)
    expected = [[0.0, 0.0], [-1.625, 0.0], [0.0, 0.0], [1.625, 448.0]]
    assert rows.float().squeeze(1).tolist() == expected
