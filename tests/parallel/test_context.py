"""The cut of a replica's rows: every row once, in order, evenly, and with even work."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.context import counts_by_part, cut_rows, part_counts

pytestmark = pytest.mark.row("S7")

STEPS = {
    "num_decodes": st.integers(0, 20),
    "chunk_lengths": st.lists(st.integers(1, 70), max_size=6),
    "num_parts": st.integers(1, 8),
}


def tokens_of(cut, part, num_decodes, lengths):
    """The rows that a part's decodes and pieces say it has, as the replica counts them."""
    ends = num_decodes + np.cumsum([0, *lengths])
    rows = list(range(num_decodes))[cut.decodes_of(part)]
    for piece in cut.pieces_of(part):
        assert piece.row == len(rows)
        assert 0 < piece.length <= lengths[piece.chunk] - piece.first
        first = int(ends[piece.chunk]) + piece.first
        rows += range(first, first + piece.length)
    return rows


@given(**STEPS)
def test_every_row_is_one_parts_and_pieces_say_which(num_decodes, chunk_lengths, num_parts):
    cut = cut_rows(num_decodes, chunk_lengths, num_parts)
    seen: list[int] = []
    for part in range(num_parts):
        rows = cut.rows_of(part).tolist()
        assert rows == sorted(rows) == tokens_of(cut, part, num_decodes, chunk_lengths)
        assert cut.row_T[rows].tolist() == list(range(len(rows)))
        seen += rows
    assert sorted(seen) == list(range(num_decodes + sum(chunk_lengths)))


@given(**STEPS)
def test_parts_differ_by_one_row_and_only_the_number_of_rows_says_how(
    num_decodes, chunk_lengths, num_parts
):
    cut = cut_rows(num_decodes, chunk_lengths, num_parts)
    total = num_decodes + sum(chunk_lengths)
    assert cut.counts == tuple(len(cut.rows_of(part)) for part in range(num_parts))
    assert cut.counts == part_counts(total, num_parts)
    assert max(cut.counts) - min(cut.counts) <= 1
    assert cut.longest == -(-total // num_parts)


@given(**STEPS)
def test_a_chunk_is_cut_zigzag(num_decodes, chunk_lengths, num_parts):
    """Blocks of equal length, but for one row: block b is part b's, or its mirror image's."""
    cut = cut_rows(num_decodes, chunk_lengths, num_parts)
    first = num_decodes
    for length, blocks in zip(chunk_lengths, cut.blocks_CB.tolist(), strict=True):
        assert sum(blocks) == length
        assert max(blocks) - min(blocks) <= 1
        owners = [p for b, n in enumerate(blocks) for p in [min(b, 2 * num_parts - 1 - b)] * n]
        assert cut.part_T[first : first + length].tolist() == owners
        first += length


@given(length=st.integers(1, 3000), start=st.integers(0, 3000), num_parts=st.integers(2, 8))
def test_attentions_work_is_even(length, start, num_parts):
    """Rows of a chunk behind a prefix, each reading all before it: no part has a row more of work
    than what two of the chunk's rows are, wherever the prefix ends."""
    cut = cut_rows(0, [length], num_parts)
    work = [int((start + cut.rows_of(part) + 1).sum()) for part in range(num_parts)]
    assert max(work) - min(work) <= 2 * (start + length)
    if length >= 64 * num_parts:
        assert max(work) <= 1.03 * sum(work) / num_parts


@given(**STEPS, seed=st.integers(0, 99))
def test_stacked_slots_are_put_back_in_order(num_decodes, chunk_lengths, num_parts, seed):
    cut = cut_rows(num_decodes, chunk_lengths, num_parts)
    total = num_decodes + sum(chunk_lengths)
    longest, place_T = cut.places()
    stack = np.full(num_parts * longest, -1)
    for part in range(num_parts):
        rows = cut.rows_of(part)
        stack[part * longest : part * longest + len(rows)] = rows
    assert stack[place_T].tolist() == list(range(total))

    random = np.random.default_rng(seed)
    wanted = random.permutation(total)[: random.integers(0, total + 1)]
    longest, place_N = cut.places_among(wanted)
    stack = np.full(num_parts * longest, -1)
    for part in range(num_parts):
        rows = cut.rows_of(part)[cut.own_among(wanted, part)]
        stack[part * longest : part * longest + len(rows)] = rows
    assert stack[place_N].tolist() == wanted.tolist()


@settings(max_examples=30)
@given(
    rows=st.lists(st.integers(0, 50), min_size=1, max_size=4),
    num_parts=st.integers(1, 8),
    multiple=st.integers(1, 4),
)
def test_padded_rows_divide_over_the_parts(rows, num_parts, multiple):
    unit = num_parts * multiple
    padded = [-(-count // unit) * unit for count in rows]
    real, wide = counts_by_part(rows, padded, num_parts)
    assert len(real) == len(wide) == num_parts * len(rows)
    assert all(count <= room for count, room in zip(real, wide, strict=True))
    replicas = range(0, len(real), num_parts)
    assert [sum(real[first : first + num_parts]) for first in replicas] == rows


def test_rows_that_do_not_divide_over_the_parts_are_refused():
    with pytest.raises(ValueError, match="do not divide over 2 parts each"):
        counts_by_part((3,), (3,), 2)
