"""Context parallelism: which of a replica's rows each of its ranks computes in a step.

A replica's `attn_cp` parts share every step's rows. Outside attention a part is like an attention
replica, with rows of its own; attention needs the keys and values of all, which are gathered
(`parallel.context_gather`) and kept by every part. Here is the arithmetic alone: each rank works it
out from the step's body, and nobody asks anybody.

- Decodes are dealt out in turn, decode i to part i % attn_cp. So of rows that fill up a step of
  decodes each part has its share, behind those that are tokens, whatever their number.
- A chunk of a prompt is cut in its order into 2 * attn_cp blocks, and part c takes blocks c and
  2 * attn_cp - 1 - c (zigzag): a later row attends to more than an earlier one, and so all parts
  have the same work. (SGLang pull requests 17756 and 19329 have such a split for long prompts; here
  it is the only one, and any chunk will do, of one token too.)
- Where a count does not divide, the rows left over go to the parts in turn, over all decodes and
  chunks of the step: so a part's number of rows depends on the replica's alone (`part_counts`), no
  two differ by more than one, and what is padded to a multiple of the parts is cut evenly.

    >>> cut = cut_rows(num_decodes=1, chunk_lengths=(9,), num_parts=2)
    >>> cut.counts, [cut.rows_of(part).tolist() for part in range(2)]
    ((5, 5), [[0, 1, 2, 8, 9], [3, 4, 5, 6, 7]])
    >>> cut.pieces_of(0)
    (Piece(chunk=0, first=0, length=2, row=1), Piece(chunk=0, first=7, length=2, row=3))

Shapes: T rows of a replica's step, decodes first; N some of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Int64s = NDArray[np.int64]


def part_counts(num_rows: int, num_parts: int) -> tuple[int, ...]:
    """Rows of each part of a replica: no two differ by more than one, the first have more.

    >>> part_counts(7, 4)
    (2, 2, 2, 1)
    """
    each, more = divmod(num_rows, num_parts)
    return tuple(each + (part < more) for part in range(num_parts))


def counts_by_part(
    num_real: Sequence[int], padded: Sequence[int], num_parts: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(rows that are tokens, rows with padding) of every part, from every replica's.

    All parts of a replica are padded alike.

    >>> counts_by_part((5, 0), (6, 2), num_parts=2)
    ((3, 2, 0, 0), (3, 3, 1, 1))
    """
    if any(count % num_parts for count in padded):
        raise ValueError(
            f"rows {tuple(padded)} of the replicas do not divide over {num_parts} parts each: a "
            "step's rows are padded to a multiple of attn_cp_size"
        )
    real = tuple(count for rows in num_real for count in part_counts(rows, num_parts))
    return real, tuple(rows // num_parts for rows in padded for _ in range(num_parts))


class Piece(NamedTuple):
    """Neighbouring rows of a chunk that one part computes."""

    chunk: int
    """Which of the step's chunks."""
    first: int
    """Where the piece begins in it."""
    length: int
    row: int
    """Where its rows begin among the part's."""


class Places(NamedTuple):
    """Some rows of a replica, as they lie in the stacked slots of its parts."""

    longest: int
    """Rows of a slot: what the parts are padded to."""
    place_N: Int64s
    """For each of the rows where it lies in the stack."""


@dataclass(frozen=True, slots=True, eq=False)
class Cut:
    """The rows of one step of one replica over its parts."""

    num_parts: int
    num_decodes: int
    part_T: Int64s
    """Whose each row is."""
    row_T: Int64s
    """Which of that part's rows it is. A part's rows are in the replica's order."""
    counts: tuple[int, ...]
    """Rows of each part."""
    blocks_CB: Int64s
    """Lengths of the 2 * num_parts blocks of every chunk."""

    @property
    def longest(self) -> int:
        return max(self.counts)

    def rows_of(self, part: int) -> Int64s:
        """Which of the replica's rows a part computes, ascending."""
        return np.flatnonzero(self.part_T == part)

    def decodes_of(self, part: int) -> slice:
        """Which of the decodes a part computes."""
        return slice(part, self.num_decodes, self.num_parts)

    def pieces_of(self, part: int) -> tuple[Piece, ...]:
        """The part's rows of chunks; its two blocks of a chunk are one piece if they touch."""
        row = part_counts(self.num_decodes, self.num_parts)[part]
        early, late = part, 2 * self.num_parts - 1 - part
        pieces: list[Piece] = []
        for chunk, blocks in enumerate(self.blocks_CB.tolist()):
            between = sum(blocks[early + 1 : late])
            lengths = (blocks[early], blocks[late]) if between else (blocks[early] + blocks[late],)
            first = sum(blocks[:early])
            for length in lengths:
                if length:
                    pieces.append(Piece(chunk, first, length, row))
                first += length + between
                row += length
        return tuple(pieces)

    def places(self) -> Places:
        """Of all rows."""
        return Places(self.longest, self.part_T * self.longest + self.row_T)

    def places_among(self, rows_N: Int64s) -> Places:
        """Of some rows, if each part brings only those of them that are its own, in their order."""
        part_N = self.part_T[rows_N]
        numbers_N = np.zeros(len(rows_N), np.int64)
        longest = 0
        for part in range(self.num_parts):
            own_N = part_N == part
            count = int(own_N.sum())
            numbers_N[own_N] = np.arange(count)
            longest = max(longest, count)
        return Places(longest, part_N * longest + numbers_N)

    def own_among(self, rows_N: Int64s, part: int) -> Int64s:
        """Which of its own rows a part brings, if these rows are wanted."""
        return self.row_T[rows_N[self.part_T[rows_N] == part]]


def cut_rows(num_decodes: int, chunk_lengths: Sequence[int], num_parts: int) -> Cut:
    """How a step of decodes and chunks is cut for the parts of one replica."""
    blocks_CB = _blocks(chunk_lengths, num_parts, num_decodes)
    forth = np.arange(num_parts)
    owners = np.tile(np.concatenate([forth, forth[::-1]]), len(chunk_lengths))
    dealt = np.arange(num_decodes) % num_parts
    part_T = np.concatenate([dealt, np.repeat(owners, blocks_CB.reshape(-1))])
    counts = part_counts(len(part_T), num_parts)
    row_T = np.empty(len(part_T), np.int64)
    for part, count in enumerate(counts):
        row_T[part_T == part] = np.arange(count)
    return Cut(num_parts, num_decodes, part_T, row_T, counts, blocks_CB)


def _blocks(lengths: Sequence[int], num_parts: int, num_dealt: int) -> Int64s:
    """Lengths of every chunk's blocks; `num_dealt` rows have been dealt out before.

    Every block has the same length; of the rows left over each part in turn gets one, in its early
    block, and those that get a second have it in their late one.
    """
    length_C = np.asarray(lengths, np.int64).reshape(-1)
    each_C, more_C = np.divmod(length_C, 2 * num_parts)
    first_C = (num_dealt + np.cumsum(more_C) - more_C) % num_parts
    turn_CP = (np.arange(num_parts) - first_C[:, None]) % num_parts
    early_CP = turn_CP < more_C[:, None]
    late_CP = turn_CP + num_parts < more_C[:, None]
    one_more_CB = np.concatenate([early_CP, late_CP[:, ::-1]], axis=1)
    return each_C[:, None] + one_more_CB.astype(np.int64)
