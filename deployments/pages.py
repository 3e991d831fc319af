"""Who owns which page of a replica's key-value cache, and which pages hold a known beginning.

A page holds `page_size` tokens of one sequence. Full pages are named by a hash over everything
from the start of the sequence to the page's end, so requests that begin alike can share them:
a page's `refs` count the requests that hold it. A page without holders stays findable by its hash
until its memory is needed; the one unused for longest goes first.

Nothing here knows tensors, time or requests; `PagePool` is a data structure.

    >>> pool = PagePool(num_pages=4, page_size=2)
    >>> mine = pool.allocate(2)
    >>> names = page_names([7, 8, 9, 10], page_size=2, salt="")
    >>> pool.publish(mine[0], names[0]); pool.publish(mine[1], names[1])
    >>> pool.release(mine)
    >>> pool.find(names) == mine
    True
"""

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence

from workers.protocol import pack


def page_name(parent: bytes, tokens: Sequence[int], salt: str) -> bytes:
    """sha256 over the page before, the page's tokens, and the salt that separates tenants."""
    return hashlib.sha256(parent + pack(tokens) + salt.encode()).digest()


def page_names(tokens: Sequence[int], *, page_size: int, salt: str) -> list[bytes]:
    """The names of all full pages of `tokens`, in order."""
    names: list[bytes] = []
    parent = b""
    for start in range(0, len(tokens) - page_size + 1, page_size):
        parent = page_name(parent, tokens[start : start + page_size], salt)
        names.append(parent)
    return names


class PagePool:
    """`num_pages` pages, each free, cached (free but findable) or held by one or more requests."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self._refs = [0] * num_pages
        self._names: list[bytes | None] = [None] * num_pages
        self._by_name: dict[bytes, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_pages))
        self.num_cached = 0
        """Free pages that still can be found by name."""

    @property
    def num_free(self) -> int:
        """Pages without a holder, cached ones included."""
        return len(self._free)

    def refs(self, page: int) -> int:
        return self._refs[page]

    def pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    def find(self, names: Iterable[bytes]) -> list[int]:
        """The pages of the longest known beginning; they are not held yet."""
        found: list[int] = []
        for name in names:
            page = self._by_name.get(name)
            if page is None:
                break
            found.append(page)
        return found

    def num_free_among(self, pages: Iterable[int]) -> int:
        """How many of `pages` have no holder: holding them takes that many from `num_free`."""
        return sum(self._refs[page] == 0 for page in pages)

    def hold(self, pages: Iterable[int]) -> None:
        """One more holder for each page."""
        for page in pages:
            if self._refs[page] == 0:
                del self._free[page]
                self.num_cached -= self._names[page] is not None
            self._refs[page] += 1

    def allocate(self, num_pages: int) -> list[int]:
        """Fresh pages with one holder; what they held is forgotten."""
        if num_pages > len(self._free):
            raise ValueError(f"{num_pages} pages were asked for and {len(self._free)} are free")
        pages: list[int] = []
        for _ in range(num_pages):
            page, _ = self._free.popitem(last=False)
            name = self._names[page]
            if name is not None:
                del self._by_name[name]
                self._names[page] = None
                self.num_cached -= 1
            self._refs[page] = 1
            pages.append(page)
        return pages

    def release(self, pages: Sequence[int]) -> None:
        """One holder fewer for each page of a sequence; its end is reused before its beginning."""
        for page in reversed(pages):
            if self._refs[page] == 0:
                raise ValueError(f"page {page} is released and nobody holds it")
            self._refs[page] -= 1
            if self._refs[page] == 0:
                self._free[page] = None
                if self._names[page] is None:
                    self._free.move_to_end(page, last=False)
                else:
                    self.num_cached += 1

    def publish(self, page: int, name: bytes) -> None:
        """`page` is full and computed: let others find it. The first page of a name stays its."""
        if self._refs[page] == 0:
            raise ValueError(f"page {page} is published and nobody holds it")
        if name not in self._by_name and self._names[page] is None:
            self._by_name[name] = page
            self._names[page] = name

    def forget(self, pages: Iterable[int]) -> None:
        """Nobody finds these held pages any more: what is in them is wrong."""
        for page in pages:
            name = self._names[page]
            if name is not None:
                del self._by_name[name]
                self._names[page] = None

    def forget_all(self) -> None:
        """Drop every name; the pages' contents are void."""
        self._by_name.clear()
        self._names = [None] * self.num_pages
        self.num_cached = 0
