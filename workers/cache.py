"""The paged key-value cache of one rank: one allocation, cut into pages.

A page holds `page_size` consecutive tokens of one sequence in every layer. Which page belongs to
whom is the driver's business (it hands page ids out); a slot's page list is `workers.batch`'s.

    >>> cache = KVCache(2, num_pages=4, page_size=16, num_kv_heads=1, head_dim=8,
    ...                 dtype=torch.float32, device=torch.device("cpu"))
    >>> cache.keys(0).shape
    torch.Size([4, 16, 1, 8])
    >>> bytes_per_page(2, page_size=16, num_kv_heads=1, head_dim=8, dtype=torch.float32)
    2048

Shapes: P pages, S tokens in a page, G kv heads, D head dim.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def bytes_per_page(
    num_layers: int, *, page_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
) -> int:
    """Memory of one page: keys and values of all layers."""
    return num_layers * 2 * page_size * num_kv_heads * head_dim * dtype.itemsize


def pages_that_fit(num_bytes: int, page_bytes: int, *, most: int) -> int:
    """Pages in `num_bytes`, but no more than could ever be used."""
    return min(max(num_bytes, 0) // page_bytes, most)


class KVCache:
    """Keys and values (layers, 2, pages, page size, kv heads, head dim). All pages are alike."""

    def __init__(
        self,
        num_layers: int,
        *,
        num_pages: int,
        page_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        # NOTE: zeros, not empty. Attention in torch reads whole pages and multiplies what is past
        # a sequence's end by 0, and 0 times a stray NaN is NaN.
        self.data = torch.zeros(
            num_layers, 2, num_pages, page_size, num_kv_heads, head_dim, dtype=dtype, device=device
        )
        self._layers = [(layer[0], layer[1]) for layer in self.data]
        tokens = (num_pages * page_size, num_kv_heads, head_dim)
        self._rows = [(keys.view(tokens), values.view(tokens)) for keys, values in self._layers]

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, (P, S, G, D) each: views, made once."""
        return self._layers[layer]

    def rows(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer as one row a token, (P * S, G, D) each."""
        return self._rows[layer]

    def keys(self, layer: int) -> Tensor:
        return self._layers[layer][0]

    def values(self, layer: int) -> Tensor:
        return self._layers[layer][1]

    def clear(self, pages: Sequence[int]) -> None:
        """Zero `pages` in all layers: their last owner may have left NaN in them."""
        index = torch.tensor(pages, dtype=torch.int64, device=self.data.device)
        self.data.index_fill_(2, index, 0)
