"""The rule by which rows are padded, against its statement in words, and what it must not do."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.padding import (
    buckets_up_to,
    choose_bucket,
    choose_padding,
    choose_prompt_bucket,
    chunks_in_bucket,
    pad_rows,
    prompt_buckets_up_to,
)

pytestmark = pytest.mark.row("S10")

COUNTS = st.lists(st.integers(0, 40), min_size=1, max_size=8)


@pytest.mark.parametrize(
    ("counts", "mode"),
    [
        ((8, 8, 8, 8, 0, 0, 0, 0), "max_len"),  # a tie
        ((8, 8, 8, 7, 0, 0, 0, 0), "sum_len"),
        ((1,), "max_len"),
        ((0, 0), "max_len"),
        ((5, 0), "max_len"),
        ((5, 0, 0), "sum_len"),
    ],
)
def test_decodes_take_what_moves_fewer_rows(counts, mode):
    assert choose_padding(counts, has_prompts=False) == mode


def test_prompts_are_never_padded_to_the_longest():
    assert choose_padding((7, 7), has_prompts=True) == "sum_len"
    assert choose_padding((7,), has_prompts=True) == "max_len"


@given(counts=COUNTS, has_prompts=st.booleans(), multiple=st.integers(1, 8))
def test_no_row_is_lost_and_none_padded_without_need(counts, has_prompts, multiple):
    mode, rows = pad_rows(counts, has_prompts=has_prompts, row_multiple=multiple)
    assert all(row >= count for row, count in zip(rows, counts, strict=True))
    assert all(row % multiple == 0 for row in rows)
    if mode == "max_len":
        assert len(set(rows)) == 1
        assert rows[0] - max(counts) < multiple
    else:
        assert all(row - count < multiple for row, count in zip(rows, counts, strict=True))


@given(counts=COUNTS)
def test_the_mode_moves_no_more_rows_than_the_other(counts):
    """Gathering equal parts moves each part to all; summing a buffer moves it twice."""
    cost = {"max_len": max(counts) * len(counts), "sum_len": 2 * sum(counts)}
    assert cost[choose_padding(counts, has_prompts=False)] == min(cost.values())


@pytest.mark.row("S12")
@given(counts=COUNTS, most=st.integers(1, 40), multiple=st.sampled_from((1, 2, 3, 4, 8)))
def test_a_bucket_holds_every_replica_and_no_smaller_one_does(counts, most, multiple):
    buckets = buckets_up_to(most, multiple)
    assert list(buckets) == sorted(set(buckets))
    assert buckets[-1] - multiple < most <= buckets[-1]
    assert all(bucket % multiple == 0 for bucket in buckets)
    bucket = choose_bucket(counts, buckets)
    if not 0 < max(counts) <= buckets[-1]:
        assert bucket == 0
    else:
        assert next(size for size in buckets if size >= max(counts)) == bucket


@pytest.mark.row("S12")
@given(
    counts=st.lists(st.tuples(st.integers(0, 600), st.integers(0, 40)), min_size=1, max_size=4),
    most=st.integers(0, 900),
    multiple=st.sampled_from((1, 2, 3, 8)),
)
def test_a_prompt_bucket_holds_every_replicas_rows_and_chunks_and_no_smaller_one_does(
    counts, most, multiple
):
    buckets = prompt_buckets_up_to(most, multiple)
    assert list(buckets) == sorted(set(buckets))
    assert bool(buckets) == bool(most)
    assert not buckets or buckets[-1] - multiple < most <= buckets[-1]
    assert all(bucket % multiple == 0 for bucket in buckets)
    rows, chunks = max(r for r, _ in counts), max(c for _, c in counts)
    fitting = [b for b in buckets if 0 < rows <= b and chunks <= chunks_in_bucket(b)]
    chosen = choose_prompt_bucket([r for r, _ in counts], [c for _, c in counts], buckets)
    assert chosen == (fitting[0] if fitting else 0)
