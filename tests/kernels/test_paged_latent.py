"""Attention over a latent in pages, and an indexer's scores, against plain torch."""

import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels.index_scores import index_scores
from kernels.latent_attention import causal, chosen, latent_attention
from kernels.latent_attention import index_scores as index_scores_reference
from kernels.paged_latent import (
    choose_latent_split,
    cut_latent_chunks,
    latent_chunks,
    latent_rows,
)
from kernels.paged_prefill import cut_chunks
from kernels.split_kv import Split

pytestmark = pytest.mark.row("S13")

DTYPES = [torch.float32, torch.bfloat16 if torch.cuda.is_available() else torch.float16]
PAGE, NUM_PAGES = 16, 40
SHAPES = [(1, 16, 16), (4, 24, 8), (17, 40, 6), (70, 16, 10)]
"""Heads, numbers of the latent, numbers that are rotated."""


def numbers(*shape: int, dtype: torch.dtype, device: str, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device, dtype)


def table_of(device: str) -> torch.Tensor:
    """Ten pages each of four slots, in no order."""
    pages = torch.randperm(NUM_PAGES, generator=torch.Generator().manual_seed(0))
    return pages.to(torch.int32).view(4, 10).to(device)


def sequence(cache_XW: torch.Tensor, table_SN: torch.Tensor, slot: int) -> torch.Tensor:
    return cache_XW.view(NUM_PAGES, PAGE, -1)[table_SN[slot].long()].flatten(0, 1)


def assert_near(actual: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = 1e-5 if actual.dtype == torch.float32 else 2e-2
    torch.testing.assert_close(actual.float(), expected.float(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("split", [Split(1, 128), Split(3, 128)], ids=str)
@pytest.mark.parametrize(("num_heads", "rank", "turned"), SHAPES)
def test_decodes_equal_the_reference(num_heads, rank, turned, split, dtype, device):
    width = rank + turned
    cache = numbers(NUM_PAGES * PAGE, width, dtype=dtype, device=device, seed=0)
    table = table_of(device)
    slots, positions = [2, 0, 3, 1], [0, 63, 130, 159]
    q = numbers(4, num_heads, width, dtype=dtype, device=device, seed=1)
    out = torch.full((4, num_heads, rank), float("nan"), dtype=dtype, device=device)
    latent_rows(
        q, cache, table, torch.tensor(slots, device=device),
        torch.tensor(positions, device=device), out, page_size=PAGE, split=split, scale=0.2,
    )  # fmt: skip
    for row, (slot, position) in enumerate(zip(slots, positions, strict=True)):
        rows = sequence(cache, table, slot)[: position + 1].float()
        seen = torch.ones(1, position + 1, dtype=torch.bool, device=device)
        expected = latent_attention(
            q[row : row + 1].float(), rows, seen, num_values=rank, scale=0.2
        )
        assert_near(out[row : row + 1], expected)


@pytest.mark.parametrize("split", [Split(1, 128), Split(2, 128)], ids=str)
@pytest.mark.parametrize("num_chosen", [3, 140])
def test_a_sparse_row_reads_what_is_chosen_for_it_and_no_more(num_chosen, split, device):
    num_heads, rank, width = 5, 20, 28
    kind = {"dtype": torch.float32, "device": device}
    cache = numbers(NUM_PAGES * PAGE, width, **kind, seed=0)
    table = table_of(device)
    slots = torch.tensor([1, 3, 3], device=device)
    positions = torch.tensor([1, 141, 159], device=device)
    scores = numbers(3, 160, **kind, seed=2)
    seen = causal(positions, 160)
    best = scores.masked_fill(~seen, -torch.inf).topk(num_chosen, dim=1).indices
    q = numbers(3, num_heads, width, **kind, seed=1)
    out = torch.full((3, num_heads, rank), float("nan"), device=device)
    latent_rows(
        q, cache, table, slots, positions, out, page_size=PAGE, split=split, scale=0.3,
        chosen_TK=best,
    )  # fmt: skip
    read = chosen(scores, seen, num_chosen)
    for row in range(3):
        rows = sequence(cache, table, int(slots[row]))
        expected = latent_attention(
            q[row : row + 1], rows, read[row : row + 1], num_values=rank, scale=0.3
        )
        assert_near(out[row : row + 1], expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_heads", "rank", "turned"), SHAPES)
def test_chunks_equal_the_reference(num_heads, rank, turned, dtype, device):
    width = rank + turned
    cache = numbers(NUM_PAGES * PAGE, width, dtype=dtype, device=device, seed=0)
    table = table_of(device)
    chunks = [(1, 37, 0, 2), (38, 3, 70, 1)]
    q = numbers(41, num_heads, width, dtype=dtype, device=device, seed=1)
    out = torch.full((41, num_heads, rank), 7.0, dtype=dtype, device=device)
    blocks = torch.from_numpy(cut_latent_chunks(chunks, num_heads, dtype)).to(device)
    latent_chunks(q, cache, table, blocks, out, page_size=PAGE, scale=0.2)
    for first, count, start, slot in chunks:
        here = slice(first, first + count)
        rows = sequence(cache, table, slot)[: start + count].float()
        positions = torch.arange(start, start + count, device=device)
        expected = latent_attention(
            q[here].float(), rows, causal(positions, start + count), num_values=rank, scale=0.2
        )
        assert_near(out[here], expected)
    assert (out[0] == 7.0).all()


def blocks_one_by_one(chunks, most_rows: int) -> np.ndarray:
    blocks = [
        (row + at, min(most_rows, count - at), token + at, slot)
        for row, count, token, slot in chunks
        for at in range(0, count, most_rows)
    ]
    return np.array(blocks, np.int64).reshape(-1, 4)


def seconds(call) -> float:
    """The quickest of a few."""
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - began)
    return best


NATURALS = st.integers(0, 500)


@given(st.lists(st.tuples(NATURALS, NATURALS, NATURALS, NATURALS)), st.integers(1, 130))
def test_blocks_are_those_cut_one_by_one(chunks, most_rows):
    blocks = cut_chunks(chunks, most_rows)
    assert blocks.flags["C_CONTIGUOUS"]
    assert np.array_equal(blocks, blocks_one_by_one(chunks, most_rows))


def test_a_long_prompt_of_many_heads_is_cut_without_a_loop_over_its_tokens():
    """With 64 heads or more a block is one row."""
    chunks = [(3, 30_000, 7, 1), (30_003, 2000, 0, 2)]
    quick = seconds(lambda: cut_latent_chunks(chunks, 128, torch.bfloat16))
    assert len(cut_latent_chunks(chunks, 128, torch.bfloat16)) == 32_000
    assert quick < seconds(lambda: blocks_one_by_one(chunks, 1)) / 4


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_heads", "key_dim"), [(1, 16), (5, 20), (64, 32)])
def test_index_scores_equal_the_reference(num_heads, key_dim, dtype, device):
    keys = numbers(NUM_PAGES * PAGE, key_dim, dtype=dtype, device=device, seed=0)
    table = table_of(device)
    slots = torch.tensor([2, 0, 3, 3], device=device)
    positions = torch.tensor([0, 63, 130, 149], device=device)
    q = numbers(4, num_heads, key_dim, dtype=dtype, device=device, seed=1)
    weight = numbers(4, num_heads, dtype=torch.float32, device=device, seed=2)
    scores = index_scores(q, weight, keys, table, slots, positions, num_tokens=150, page_size=PAGE)
    for row in range(4):
        here = slice(row, row + 1)
        expected = index_scores_reference(
            q[here], weight[here], sequence(keys, table, int(slots[row]))[:150]
        )
        seen = causal(positions[here], 150)
        expected = expected.masked_fill(~seen, -torch.inf)
        torch.testing.assert_close(scores[here], expected, rtol=1e-4, atol=1e-4)


def test_a_split_fills_the_gpu_and_takes_little_memory_for_many_rows():
    bfloat16 = torch.bfloat16
    assert choose_latent_split(1, 128, 100, bfloat16, num_programs=264).num_splits == 1
    assert choose_latent_split(1, 128, 8192, bfloat16, num_programs=264).num_splits == 64
    assert choose_latent_split(300, 16, 8192, bfloat16, num_programs=264).num_splits == 1


def test_what_does_not_belong_together_is_refused(device):
    q = torch.zeros(2, 3, 24, device=device)
    cache, out = torch.zeros(16, 24, device=device), torch.zeros(2, 3, 16, device=device)
    table = torch.zeros(1, 1, dtype=torch.int32, device=device)
    one = torch.zeros(1, dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match="2 rows come with 1 slots"):
        latent_rows(q, cache, table, one, one, out, page_size=16, split=Split(1, 128), scale=1.0)
    with pytest.raises(ValueError, match="cannot read rows"):
        latent_rows(
            q, cache[:, :20], table, one, one, out, page_size=16, split=Split(1, 128), scale=1.0
        )
    blocks = torch.zeros(65536, 4, dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match="65536 blocks of rows are more than the 65535"):
        latent_chunks(q, cache, table, blocks, out, page_size=16, scale=1.0)
    with pytest.raises(ValueError, match="17 tokens of at most 16"):
        index_scores(
            q[:1], torch.zeros(1, 3, device=device), cache, table, one, one, num_tokens=17,
            page_size=16,
        )  # fmt: skip
