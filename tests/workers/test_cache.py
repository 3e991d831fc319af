import pytest
import torch

from workers.cache import PagedCache, bytes_per_page, pages_that_fit

CPU = torch.device("cpu")
KEYS_AND_VALUES = ((3, 5), (3, 5))
LATENT_AND_INDEX = ((9,), (4,))


def cache(num_pages: int, shapes=KEYS_AND_VALUES) -> PagedCache:
    return PagedCache(2, shapes, num_pages=num_pages, page_size=4, dtype=torch.bfloat16, device=CPU)


@pytest.mark.parametrize("shapes", [KEYS_AND_VALUES, LATENT_AND_INDEX], ids=str)
def test_a_page_takes_the_bytes_it_says(shapes):
    pages = cache(7, shapes)
    held = sum(part.numel() * part.itemsize for part in pages.parts)
    assert pages.num_bytes == held
    assert held == 7 * bytes_per_page(2, shapes, page_size=4, dtype=torch.bfloat16)


def test_pages_fit_in_bytes_up_to_what_can_be_used():
    assert pages_that_fit(1000, 300, most=100) == 3
    assert pages_that_fit(1000, 300, most=2) == 2
    assert pages_that_fit(-5, 300, most=2) == 0


def test_rows_and_pages_are_views_of_one_memory():
    pages = cache(3)
    pages.rows(1)[0][9] = 1.0
    assert pages.layer(1)[0][2, 1].eq(1).all()
    assert [int(part.sum()) for part in pages.parts] == [15, 0]


@pytest.mark.parametrize("shapes", [KEYS_AND_VALUES, LATENT_AND_INDEX], ids=str)
def test_clearing_a_page_leaves_the_others(shapes):
    pages = cache(3, shapes)
    for part in pages.parts:
        part.fill_(float("nan"))
    pages.clear([0, 2])
    for part in pages.parts:
        assert part[:, [0, 2]].eq(0).all()
        assert part[:, 1].isnan().all()
