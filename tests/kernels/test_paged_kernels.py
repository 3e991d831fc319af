"""Triton's attention over pages against the reference that looks at one row and head at a time."""

import pytest
import torch

from kernels.paged_attention import paged_attention_reference
from kernels.paged_decode import (
    LENGTH_RANKS,
    Cut,
    cut_sequences,
    num_shares_of,
    paged_decode,
)
from kernels.paged_prefill import cut_chunks, paged_prefill

pytestmark = pytest.mark.row("S13")

# NOTE: the interpreter multiplies the bits of bfloat16 as if they were integers.
DTYPES = [torch.float32, torch.bfloat16 if torch.cuda.is_available() else torch.float16]
SHAPES = [(4, 4, 16), (6, 2, 16), (3, 1, 24)]
"""Heads, kv heads, head dim."""


def cache_of(num_kv_heads: int, dim: int, dtype: torch.dtype, device: str):
    """Keys and values of 40 pages of 16 tokens, and page lists of four slots."""
    generator = torch.Generator().manual_seed(0)
    shape = (2, 40, 16, num_kv_heads, dim)
    keys, values = torch.randn(shape, generator=generator).to(device, dtype).unbind()
    table = torch.randperm(40, generator=generator).to(torch.int32).view(4, 10)
    return keys, values, table.to(device)


def assert_near(actual: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = 1e-5 if actual.dtype == torch.float32 else 2e-2
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [None, 1, 70], ids=str)
@pytest.mark.parametrize("num_shares", [1, 4, 50])
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "dim"), SHAPES)
def test_decodes_equal_the_reference(
    num_heads, num_kv_heads, dim, num_shares, window, dtype, device
):
    keys, values, table = cache_of(num_kv_heads, dim, dtype, device)
    generator = torch.Generator().manual_seed(1)
    slots, kv_lens = [2, 0, 3, 1], [1, 64, 150, 65]
    q = torch.randn(len(slots), num_heads, dim, generator=generator).to(device, dtype)
    counters = torch.zeros(len(slots) * num_kv_heads, dtype=torch.int32, device=device)
    positions = torch.tensor(kv_lens, device=device) - 1
    expected = paged_attention_reference(
        q, keys, values, [table[slot].tolist() for slot in slots], query_lens=[1] * len(slots),
        kv_lens=kv_lens, scale=0.3, sliding_window=window,
    )  # fmt: skip
    for _ in range(2):  # after each launch the counters are as they were
        out = torch.full_like(q, float("nan"))
        paged_decode(
            q,
            keys.flatten(0, 1),
            values.flatten(0, 1),
            table,
            torch.tensor(slots, device=device),
            positions,
            cut_sequences(positions, num_shares, sliding_window=window),
            out,
            counters,
            page_size=16,
            scale=0.3,
            sliding_window=window,
        )
        assert not counters.any()
        assert_near(out, expected)


@pytest.mark.parametrize("num_seqs", [1, 3, 128, 300])
@pytest.mark.parametrize("num_shares", [1, 5, 49])
@pytest.mark.parametrize("window", [None, 100], ids=str)
def test_no_part_is_longer_than_a_fair_share_and_no_block_is_left_out(
    num_seqs, num_shares, window, device
):
    generator = torch.Generator().manual_seed(num_seqs)
    positions = torch.randint(0, 700, (num_seqs,), generator=generator)
    blocks = [-(-min(int(p) + 1, window or 10**9) // 64) for p in positions]
    fair = -(-sum(blocks) // num_shares)
    cut = cut_sequences(positions.to(device), num_shares, sliding_window=window)
    lengths, items = cut.lengths_B.tolist(), cut.items_I3.tolist()
    expected = []
    edges = [-(-fair * rank // LENGTH_RANKS) for rank in range(LENGTH_RANKS)]
    for seq, (count, length) in enumerate(zip(blocks, lengths, strict=True)):
        num_parts = -(-count // length)
        assert num_parts == -(-count // fair)  # no more parts than needed, of equal lengths
        assert length <= fair
        rank = sum(length > edge for edge in edges)
        expected += [(-rank, seq, part, num_parts) for part in range(num_parts)]
    expected.sort()  # the longest first, and one sequence's parts side by side
    assert items[: len(expected)] == [list(item) for _, *item in expected]
    assert not any(num_parts for _, _, num_parts in items[len(expected) :])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [None, 1, 70], ids=str)
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "dim"), SHAPES)
def test_chunks_equal_the_reference(num_heads, num_kv_heads, dim, window, dtype, device):
    keys, values, table = cache_of(num_kv_heads, dim, dtype, device)
    chunks = [(1, 131, 0, 2), (132, 3, 70, 1)]
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(135, num_heads, dim, generator=generator).to(device, dtype)
    out = torch.full_like(q, 7.0)
    paged_prefill(
        q,
        keys.flatten(0, 1),
        values.flatten(0, 1),
        table,
        torch.from_numpy(cut_chunks(chunks)).to(device),
        out,
        page_size=16,
        scale=0.3,
        sliding_window=window,
    )
    expected = paged_attention_reference(
        q[1:], keys, values, [table[slot].tolist() for slot in (2, 1)], query_lens=[131, 3],
        kv_lens=[131, 73], scale=0.3, sliding_window=window,
    )  # fmt: skip
    assert_near(out[1:], expected)
    assert (out[0] == 7.0).all()


def test_all_heads_together_have_some_shares_for_each_multiprocessor():
    assert num_shares_of(8, 132) * 8 <= 132 * 6 < (num_shares_of(8, 132) + 1) * 8
    assert num_shares_of(128, 1) == 1


def test_what_does_not_belong_together_is_refused(device):
    q = torch.zeros(1, 3, 16, device=device)
    cache = torch.zeros(16, 2, 16, device=device)
    table = torch.zeros(1, 1, dtype=torch.int32, device=device)
    one = torch.zeros(1, dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match="3 heads cannot share"):
        paged_decode(
            q, cache, cache, table, one, one, Cut(table, table[0]), q, table[0], page_size=16,
            scale=1.0, sliding_window=None,
        )  # fmt: skip
