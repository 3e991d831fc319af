"""Which way ranks sum: measured at start for each communicator and size, and the same on all ranks.

NCCL's kernels move large sums well, and take many microseconds for a few rows, which is what a
decode has. There are other ways, over memory that GPUs of one NVLink domain write to directly:

    ring        NCCL, from ordinary memory
    symmetric   NCCL's symmetric kernels, from the arena (`enable_symm_mem`)
    one_shot    torch symmetric memory: every rank reads all peers' rows
    two_shot    the same in two rounds: each rank sums its part, then all read the parts
    push        `kernels.push_reduce`: every rank writes its rows to all peers; also with the norm

Which is quickest depends on size, ranks and machine, so each is timed in a CUDA graph, and checked,
when the groups are built. Every rank takes the slowest rank's figure, so all choose alike. What
cannot be set up, or sums wrongly on any rank, is not in the table; NCCL always is. Multicast is not
used. Until `Sums.open`, and on a CPU, sums are NCCL's or gloo's.

    >>> table = SumTable((8192, 65536), {"ring": (12.5, 14.0), "push": (3.0, 15.0)})
    >>> table.best(100), table.best(8193), table.best(10**9)
    ('push', 'ring', 'ring')
"""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import Final, Literal, NamedTuple, Protocol

from torch import Tensor

SumPath = Literal["ring", "symmetric", "one_shot", "two_shot", "push"]
NCCL: Final[tuple[SumPath, ...]] = ("ring", "symmetric")
PATHS: Final[tuple[SumPath, ...]] = (*NCCL, "one_shot", "two_shot", "push")


class SumTable(NamedTuple):
    """Microseconds of every path that there is, at each of some sizes."""

    sizes: tuple[int, ...]
    """Bytes, ascending."""
    micros: Mapping[SumPath, tuple[float, ...]]
    """Infinite where a path does not take so much, or gave a wrong sum."""

    def best(self, num_bytes: int) -> SumPath:
        """The quickest at the next measured size; past the last, NCCL's quicker one there."""
        at = bisect_left(self.sizes, num_bytes)
        paths = PATHS if at < len(self.sizes) else NCCL
        at = min(at, len(self.sizes) - 1)
        offered: list[SumPath] = [path for path in paths if path in self.micros]
        return min(offered, key=lambda path: self.micros[path][at])

    def lines(self) -> list[str]:
        """For a reader: one line a size, the quickest path last."""
        head = "".join(f"{path:>11}" for path in self.micros)
        rows = [f"{'bytes':>10}{head}"]
        for at, size in enumerate(self.sizes):
            figures = "".join(f"{self.micros[path][at]:11.1f}" for path in self.micros)
            rows.append(f"{size:>10}{figures}  {self.best(size)}")
        return rows

    def summary(self) -> str:
        """Which path from which size on, in one line."""
        parts: list[str] = []
        last = ""
        for size in self.sizes:
            path = self.best(size)
            if path != last:
                parts.append(f"{path} from {size} bytes" if parts else path)
            last = path
        return ", ".join(parts)


def agreed_table(
    sizes: Sequence[int], by_rank: Sequence[Mapping[SumPath, Sequence[float]]]
) -> SumTable:
    """One table of all ranks' figures: the slowest rank's, and none that a rank could not take.

    >>> agreed_table((8,), [{"ring": [9.0], "push": [3.0]}, {"ring": [9.5], "push": [4.0]}]).micros
    {'ring': (9.5,), 'push': (4.0,)}
    """
    common: list[SumPath] = [path for path in PATHS if all(path in one for one in by_rank)]
    micros: dict[SumPath, tuple[float, ...]] = {
        path: tuple(max(figures) for figures in zip(*(one[path] for one in by_rank), strict=True))
        for path in common
    }
    return SumTable(tuple(sizes), micros)


class PeerSums(Protocol):
    """The ways that are not NCCL's, on the GPUs of one communicator."""

    def staging(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """Where `one_shot` and `two_shot` want their input."""
        ...

    def takes(self, path: SumPath, x: Tensor) -> bool:
        """Whether `x` can be summed in this way, where it lies."""
        ...

    def reduce(self, path: SumPath, x: Tensor) -> Tensor:
        """The sum of `x`, in place or not."""
        ...

    def reduce_rms_norm(
        self, x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float, out: Tensor | None
    ) -> Tensor:
        """By `push`: add the sum to the residual stream, in place; its norm."""
        ...


class Sums:
    """How the ranks of one communicator sum. Closed until `open`."""

    def __init__(self) -> None:
        self.table: SumTable | None = None
        self.peers: PeerSums | None = None
        self._best: dict[int, SumPath] = {}

    def open(self, table: SumTable, peers: PeerSums | None) -> None:
        self.table, self.peers = table, peers
        self._best.clear()

    def path(self, num_bytes: int) -> SumPath | None:
        """The way that so much is summed; None where nothing was measured."""
        if self.table is None:
            return None
        found = self._best.get(num_bytes)
        if found is None:
            found = self._best[num_bytes] = self.table.best(num_bytes)
        return found

    def prefers_ordinary(self, num_bytes: int) -> bool:
        """Whether a sum of so much is quicker from memory outside the arena."""
        return self.path(num_bytes) not in (None, "symmetric")

    def place(self, shape: Sequence[int], num_bytes: int, like: Tensor) -> Tensor | None:
        """Where to write what is then summed, if that is neither the arena nor just anywhere."""
        if self.peers is None or self.path(num_bytes) not in ("one_shot", "two_shot"):
            return None
        return self.peers.staging(shape, like)

    def peer_path(self, x: Tensor) -> SumPath | None:
        """The quickest way for `x`, where it lies, if that is none of NCCL's."""
        if self.peers is None:
            return None
        path = self.path(x.nbytes)
        if path is None or path in NCCL or not self.peers.takes(path, x):
            return None
        return path
