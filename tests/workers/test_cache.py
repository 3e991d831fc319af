import torch

from workers.cache import KVCache, bytes_per_page, pages_that_fit

CPU = torch.device("cpu")


def cache(num_pages: int) -> KVCache:
    return KVCache(
        2,
        num_pages=num_pages,
        page_size=4,
        num_kv_heads=3,
        head_dim=5,
        dtype=torch.bfloat16,
        device=CPU,
    )


def test_a_page_takes_the_bytes_it_says():
    data = cache(7).data
    one = bytes_per_page(2, page_size=4, num_kv_heads=3, head_dim=5, dtype=torch.bfloat16)
    assert data.numel() * data.itemsize == 7 * one


def test_pages_fit_in_bytes_up_to_what_can_be_used():
    assert pages_that_fit(1000, 300, most=100) == 3
    assert pages_that_fit(1000, 300, most=2) == 2
    assert pages_that_fit(-5, 300, most=2) == 0


def test_rows_and_pages_are_views_of_one_memory():
    pages = cache(3)
    pages.rows(1)[0][9] = 1.0
    assert pages.keys(1)[2, 1].eq(1).all()
    assert pages.data.sum() == 15


def test_clearing_a_page_leaves_the_others():
    pages = cache(3)
    pages.data.fill_(float("nan"))
    pages.clear([0, 2])
    assert pages.data[:, :, [0, 2]].eq(0).all()
    assert pages.data[:, :, 1].isnan().all()
