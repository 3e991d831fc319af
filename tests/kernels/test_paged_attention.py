import pytest
import torch

from kernels.paged_attention import (
    chunk_attention,
    chunk_mask,
    decode_attention,
    decode_mask,
    paged_attention_reference,
    store_kv,
)

WINDOWS = [None, 1, 3, 100]


def random_cache(num_pages: int, page_size: int, num_kv_heads: int, head_dim: int):
    generator = torch.Generator().manual_seed(0)
    shape = (2, num_pages, page_size, num_kv_heads, head_dim)
    return torch.randn(shape, generator=generator).unbind()


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(4, 4), (6, 2), (3, 1)])
def test_decodes_equal_the_reference(window, num_heads, num_kv_heads):
    keys, values = random_cache(7, 4, num_kv_heads, 5)
    pages, kv_lens = [[6, 1, 2], [3, 3, 3], [0, 5, 0]], [11, 1, 8]
    q = torch.randn(3, num_heads, 5, generator=torch.Generator().manual_seed(1))
    positions = torch.tensor(kv_lens) - 1
    mask = decode_mask(positions, 11, sliding_window=window, dtype=q.dtype)
    flat = torch.tensor(pages, dtype=torch.int32).flatten()
    out = decode_attention(q, keys, values, flat, length=11, mask_B11L=mask, scale=0.3)
    expected = paged_attention_reference(
        q, keys, values, pages, query_lens=[1, 1, 1], kv_lens=kv_lens, scale=0.3,
        sliding_window=window,
    )  # fmt: skip
    torch.testing.assert_close(out, expected)


def test_a_lone_decode_needs_no_mask():
    keys, values = random_cache(4, 4, 2, 8)
    q = torch.randn(1, 4, 8)
    pages = torch.tensor([3, 1], dtype=torch.int32)
    out = decode_attention(q, keys, values, pages, length=6, mask_B11L=None, scale=1.0)
    expected = paged_attention_reference(
        q, keys, values, [[3, 1]], query_lens=[1], kv_lens=[6], scale=1.0, sliding_window=None
    )
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize(("start", "num_rows"), [(0, 1), (0, 9), (3, 1), (4, 6)])
def test_a_chunk_equals_the_reference(window, start, num_rows):
    keys, values = random_cache(7, 4, 2, 5)
    q = torch.randn(num_rows, 6, 5, generator=torch.Generator().manual_seed(1))
    pages = [5, 0, 2]
    out = chunk_attention(
        q, keys, values, torch.tensor(pages), start=start, scale=0.3, sliding_window=window
    )
    expected = paged_attention_reference(
        q, keys, values, [pages], query_lens=[num_rows], kv_lens=[start + num_rows], scale=0.3,
        sliding_window=window,
    )  # fmt: skip
    torch.testing.assert_close(out, expected)


def test_a_long_chunk_is_cut_into_blocks_of_rows(monkeypatch):
    monkeypatch.setattr("kernels.paged_attention.MASK_ELEMENTS", 40)
    keys, values = random_cache(7, 4, 1, 5)
    q = torch.randn(9, 2, 5)
    out = chunk_attention(q, keys, values, torch.arange(4), start=5, scale=1.0, sliding_window=4)
    expected = paged_attention_reference(
        q, keys, values, [[0, 1, 2, 3]], query_lens=[9], kv_lens=[14], scale=1.0, sliding_window=4
    )
    torch.testing.assert_close(out, expected)


def test_a_chunks_mask_ends_at_each_rows_own_place():
    mask = chunk_mask(2, 3, sliding_window=2, like=torch.zeros(1))
    assert mask.isfinite().int().tolist() == [[0, 1, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 1, 1]]


def test_keys_are_stored_at_their_places():
    rows = torch.zeros(8, 1, 2)
    store_kv(rows, torch.tensor([6, 1]), torch.tensor([[[1.0, 2.0]], [[3.0, 4.0]]]))
    assert rows[6, 0].tolist() == [1.0, 2.0]
    assert rows[1, 0].tolist() == [3.0, 4.0]
    assert rows.count_nonzero() == 4
