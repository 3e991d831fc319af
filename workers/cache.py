"""The paged cache of one rank: what every token leaves in every layer, cut into pages.

What that is, the model's attention says (`RowShapes`): keys and values, or a compressed latent.
A page holds `page_size` consecutive tokens of one sequence in every layer. Which page belongs to
whom is the driver's business (it hands page ids out); a slot's page list is `workers.batch`'s.

    >>> shapes = ((1, 8), (1, 8))  # keys and values of one head
    >>> cache = PagedCache(2, shapes, num_pages=4, page_size=16,
    ...                    dtype=torch.float32, device=torch.device("cpu"))
    >>> keys, values = cache.layer(0)
    >>> keys.shape
    torch.Size([4, 16, 1, 8])
    >>> bytes_per_page(2, shapes, page_size=16, dtype=torch.float32)
    2048

Shapes: P pages, S tokens in a page.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.fp8 import E4M3, NO_SCALES, Scales

RowShapes = tuple[tuple[int, ...], ...]
"""A token's parts in a layer: ((G, D), (G, D)) are keys and values of G heads of D numbers."""


def bytes_per_page(
    num_layers: int, shapes: RowShapes, *, page_size: int, dtype: torch.dtype
) -> int:
    """Memory of one page: all parts of all layers."""
    return num_layers * page_size * sum(map(math.prod, shapes)) * dtype.itemsize


def is_latent(shapes: RowShapes) -> bool:
    """Whether a token has one row of numbers for all heads, not keys and values of heads."""
    return len(shapes[0]) == 1


def pages_that_fit(num_bytes: int, page_bytes: int, *, most: int) -> int:
    """Pages in `num_bytes`, but no more than could ever be used."""
    return min(max(num_bytes, 0) // page_bytes, most)


class PagedCache:
    """One tensor a part, (layers, pages, page size, *shape). All pages are alike."""

    def __init__(
        self,
        num_layers: int,
        shapes: RowShapes,
        *,
        num_pages: int,
        page_size: int,
        dtype: torch.dtype,
        device: torch.device,
        scales: Sequence[Scales] = (),
    ) -> None:
        """`scales` has an entry a layer if `dtype` is e4m3 (`kernels.fp8`), else none."""
        self.num_pages = num_pages
        self.page_size = page_size
        self.device = device
        self._shapes = shapes
        # NOTE: zeros, not empty. Attention in torch reads whole pages and multiplies what is past
        # a sequence's end by 0, and 0 times a stray NaN is NaN.
        self._bits = tuple(
            torch.zeros(
                (num_layers, num_pages, page_size, *shape),
                dtype=torch.uint8 if dtype == E4M3 else dtype,
                device=device,
            )
            for shape in shapes
        )
        self.parts = tuple(part.view(dtype) for part in self._bits)
        self._scales = tuple(scales) or (NO_SCALES,) * num_layers
        layers = range(num_layers)
        self._layers = [tuple(part[layer] for part in self.parts) for layer in layers]
        self._rows = [tuple(part[layer].flatten(0, 1) for part in self.parts) for layer in layers]

    @property
    def is_latent(self) -> bool:
        """It keeps one row of numbers a token for all heads, not keys and values of heads."""
        return is_latent(self._shapes)

    @property
    def num_bytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    def layer(self, layer: int) -> tuple[Tensor, ...]:
        """A layer's parts, (P, S, *shape) each: views, made once."""
        return self._layers[layer]

    def rows(self, layer: int) -> tuple[Tensor, ...]:
        """A layer's parts as one row a token, (P * S, *shape) each."""
        return self._rows[layer]

    def scales(self, layer: int) -> Scales:
        """What a layer's stored keys and values are times."""
        return self._scales[layer]

    def clear(self, pages: Sequence[int]) -> None:
        """Zero `pages` in all layers: their last owner may have left NaN in them."""
        index = torch.tensor(pages, dtype=torch.int64, device=self.device)
        for part in self._bits:
            part.index_fill_(1, index, 0)
