"""Triton's attention over pages against the reference that looks at one row and head at a time."""

import pytest
import torch

from kernels.paged_attention import paged_attention_reference
from kernels.paged_decode import Split, choose_split, paged_decode
from kernels.paged_prefill import cut_chunks, paged_prefill

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
@pytest.mark.parametrize("split", [Split(1, 64), Split(3, 64)], ids=str)
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "dim"), SHAPES)
def test_decodes_equal_the_reference(num_heads, num_kv_heads, dim, split, window, dtype, device):
    keys, values, table = cache_of(num_kv_heads, dim, dtype, device)
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(3, num_heads, dim, generator=generator).to(device, dtype)
    slots, kv_lens = [2, 0, 3], [1, 64, 150]
    out = torch.full_like(q, float("nan"))
    paged_decode(
        q,
        keys.flatten(0, 1),
        values.flatten(0, 1),
        table,
        torch.tensor(slots, device=device),
        torch.tensor(kv_lens, device=device) - 1,
        out,
        page_size=16,
        split=split,
        scale=0.3,
        sliding_window=window,
    )
    expected = paged_attention_reference(
        q, keys, values, [table[slot].tolist() for slot in slots], query_lens=[1, 1, 1],
        kv_lens=kv_lens, scale=0.3, sliding_window=window,
    )  # fmt: skip
    assert_near(out, expected)


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


def test_a_split_fills_the_gpu_and_no_more():
    assert choose_split(1, 8, 64, num_programs=1000).num_splits == 1
    assert choose_split(1, 8, 8192, num_programs=1000).num_splits * 8 >= 1000
    assert choose_split(512, 8, 8192, num_programs=1000).num_splits == 8


def test_what_does_not_belong_together_is_refused(device):
    q = torch.zeros(1, 3, 16, device=device)
    cache = torch.zeros(16, 2, 16, device=device)
    table = torch.zeros(1, 1, dtype=torch.int32, device=device)
    one = torch.zeros(1, dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match="3 heads cannot share"):
        paged_decode(
            q, cache, cache, table, one, one, q, page_size=16, split=Split(1, 64), scale=1.0,
            sliding_window=None,
        )  # fmt: skip
