"""Chunks over pages in any tiles: shapes that fill none, steps with others, caches of any size."""

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from kernels.fp8 import E4M3, Scales
from kernels.paged_attention import paged_attention_reference
from kernels.paged_prefill import (
    BLOCK_ROWS,
    LARGE_TILES,
    SHARED_TILES,
    PrefillTiles,
    choose_tiles,
    cut_chunks,
    paged_prefill,
)
from tests.kernels.test_paged_kernels import assert_near

pytestmark = pytest.mark.row("S13")

TILES = (
    None,
    LARGE_TILES,
    PrefillTiles(16, 16, 2, 4),
    PrefillTiles(64, 32, 5, 4, 128),
    PrefillTiles(128, 128, 3, 8),
    PrefillTiles(256, 64, 3, 8),
)
TOKENS = 320
"""Of a slot."""


# Without shrinking, which takes minutes in an interpreter: what fails is small enough to read.
@settings(
    max_examples=12,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    spans=st.lists(st.tuples(st.integers(1, 200), st.integers(0, 120)), min_size=1, max_size=3),
    gap=st.integers(0, 3),
    num_empty=st.integers(0, 2),
    sharing=st.integers(1, 7),
    num_kv_heads=st.integers(1, 2),
    dim=st.sampled_from([8, 16, 24]),
    page=st.sampled_from([1, 16, 64]),
    window=st.sampled_from([None, 1, 33, 100]),
    tiles=st.sampled_from(TILES),
)
def test_any_chunks_in_any_tiles_equal_the_reference(
    device, spans, gap, num_empty, sharing, num_kv_heads, dim, page, window, tiles
):
    """Rows between chunks, and blocks of no rows behind them, are nobody's."""
    generator = torch.Generator().manual_seed(len(spans) + dim)
    chunks, row = [], gap
    for slot, (count, before) in enumerate(spans):
        chunks.append((row, count, before, slot))
        row += count + gap
    num_pages = len(spans) * TOKENS // page
    cache = torch.randn(2, num_pages, page, num_kv_heads, dim, generator=generator).to(device)
    table = torch.randperm(num_pages, generator=generator).to(device, torch.int32)
    table = table.view(len(spans), -1)
    q = torch.randn(row, num_kv_heads * sharing, dim, generator=generator).to(device)
    out = torch.full_like(q, 7.0)
    blocks = torch.zeros(len(cut_chunks(chunks)) + num_empty, 4, dtype=torch.int64, device=device)
    blocks[: len(blocks) - num_empty] = torch.from_numpy(cut_chunks(chunks))
    paged_prefill(
        q, cache[0].flatten(0, 1), cache[1].flatten(0, 1), table, blocks, out, page_size=page,
        scale=0.3, sliding_window=window, tiles=tiles,
    )  # fmt: skip
    is_asked = torch.zeros(row, dtype=torch.bool, device=device)
    for first, count, _, _ in chunks:
        is_asked[first : first + count] = True
    expected = paged_attention_reference(
        q[is_asked], cache[0], cache[1], table.tolist(), query_lens=[count for count, _ in spans],
        kv_lens=[count + before for count, before in spans], scale=0.3, sliding_window=window,
    )  # fmt: skip
    assert_near(out[is_asked], expected)
    assert (out[~is_asked] == 7.0).all()


def attended(chunks, q, cache, table):
    out = torch.zeros_like(q)
    paged_prefill(
        q, cache[0], cache[1], table, torch.from_numpy(cut_chunks(chunks)).to(q.device), out,
        page_size=16, scale=0.3, sliding_window=None,
    )  # fmt: skip
    return out


def test_a_chunk_does_not_depend_on_what_else_is_in_its_step(device):
    """To the last bit, wherever its rows lie and whatever the others hold."""
    generator = torch.Generator().manual_seed(0)
    cache = torch.randn(2, 40 * 16, 2, 24, generator=generator).to(device)
    table = torch.randperm(40, generator=generator).to(device, torch.int32).view(2, 20)
    q = torch.randn(140, 6, 24, generator=generator).to(device)
    alone = attended([(0, 140, 45, 1)], q, cache, table)
    behind = torch.full((60, 6, 24), float("nan"), device=device)
    cache[:, (table[0].long()[:, None] * 16 + torch.arange(16, device=device)).flatten()] = 9.0
    among = attended([(0, 55, 3, 0), (57, 140, 45, 1)], torch.cat([behind[:57], q]), cache, table)
    assert torch.equal(among[57:], alone)


def test_pages_behind_two_to_the_31_numbers_are_read(device):
    """Offsets of 32 bits do not reach them; of the cache's gigabytes two pages are touched."""
    num_pages = 2**31 // (16 * 16) + 2
    stored = torch.empty(num_pages * 16, 1, 16, dtype=torch.uint8, device=device)
    pages = torch.randn(2, 16, 1, 16, generator=torch.Generator().manual_seed(0)).to(device)
    pages = pages.to(E4M3)
    table = torch.tensor([[num_pages - 1, 0]], dtype=torch.int32, device=device)
    for page, numbers in zip(table[0].tolist(), pages, strict=True):
        stored[page * 16 : page * 16 + 16] = numbers.view(torch.uint8)
    q = torch.randn(20, 2, 16, generator=torch.Generator().manual_seed(1)).to(device)
    out = torch.zeros_like(q)
    blocks = torch.from_numpy(cut_chunks([(0, 20, 0, 0)])).to(device)
    paged_prefill(
        q, stored.view(E4M3), stored.view(E4M3), table, blocks, out, page_size=16, scale=0.3,
        sliding_window=None, scales=Scales(1.0, 1.0),
    )  # fmt: skip
    expected = paged_attention_reference(
        q, pages.float(), pages.float(), [[0, 1]], query_lens=[20], kv_lens=[20], scale=0.3,
        sliding_window=None,
    )  # fmt: skip
    assert_near(out, expected)


@pytest.mark.parametrize(
    ("num_heads", "scale", "sentence"),
    [
        (BLOCK_ROWS + 1, 1.0, "129 heads share keys, but a program has 128 rows"),
        (2, 0.0, "multiplied by 0.0, which must be positive"),
        (2, -1.0, "multiplied by -1.0, which must be positive"),
    ],
)
def test_what_no_program_can_do_is_refused(num_heads, scale, sentence, device):
    q = torch.zeros(1, num_heads, 16, device=device)
    cache = torch.zeros(16, 1, 16, device=device)
    table = torch.zeros(1, 1, dtype=torch.int32, device=device)
    blocks = torch.from_numpy(cut_chunks([(0, 1, 0, 0)])).to(device)
    with pytest.raises(ValueError, match=sentence):
        paged_prefill(
            q, cache, cache, table, blocks, q, page_size=16, scale=scale, sliding_window=None
        )


def test_tiles_of_many_warps_are_for_short_numbers_and_small_heads():
    sixteen = (torch.bfloat16, torch.float16)
    assert {choose_tiles(each, each, 128) for each in sixteen} == {SHARED_TILES}
    others = [(torch.float32, torch.float32, 128), (torch.bfloat16, E4M3, 128)]
    others.append((torch.bfloat16, torch.bfloat16, 192))  # would not fit into 128 registers
    assert {choose_tiles(*each) for each in others} == {LARGE_TILES}
