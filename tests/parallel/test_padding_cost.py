"""The cost model of padding: never worse than the rule by its own curves, and what else it is."""

from itertools import accumulate

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from parallel.context import counts_by_part
from parallel.dp_attention import RowSplit
from parallel.padding import Padded, align_rows, pad_rows
from parallel.padding_cost import MODES, PaddingCosts, PaddingCurves, pad_by_cost, slowest

pytestmark = pytest.mark.row("S10")

COUNTS = st.lists(st.integers(0, 60), min_size=1, max_size=8)
RISING = st.lists(st.floats(0.0, 50.0), min_size=4, max_size=4).map(lambda x: tuple(accumulate(x)))
CURVES = st.tuples(RISING, RISING, RISING, RISING).map(
    lambda figures: PaddingCurves((4, 16, 64, 256), *figures)
)
LAYOUTS = st.sampled_from(((1, 1), (2, 1), (1, 2), (2, 2), (3, 1)))
"""(attn_tp, attn_cp)"""


def costs_of(curves, layout=(1, 1)) -> PaddingCosts:
    return PaddingCosts(curves, attn_tp=layout[0], attn_cp=layout[1])


def per_row(equal, slots, buffer, mlps) -> PaddingCosts:
    """What a row costs, and a call nothing."""
    curves = [(each, 1000.0 * each) for each in (equal, slots, buffer, mlps)]
    return costs_of(PaddingCurves((1, 1000), *curves))


@given(counts=COUNTS, has_prompts=st.booleans(), curves=CURVES, layout=LAYOUTS)
def test_it_is_never_worse_than_the_rule_by_its_own_curves(counts, has_prompts, curves, layout):
    costs, multiple = costs_of(curves, layout), layout[0] * layout[1]
    chosen = pad_by_cost(counts, costs, row_multiple=multiple)
    rule = pad_rows(counts, has_prompts=has_prompts, row_multiple=multiple)
    assert costs.of(chosen) <= costs.of(rule)


@given(counts=COUNTS, curves=CURVES, layout=LAYOUTS)
def test_it_is_never_3_percent_slower_than_the_better_of_max_len_and_sum_len(
    counts, curves, layout
):
    """Curves of any shape, convex or not. (Between measured sizes: `test_padding_choice`.)"""
    costs, multiple = costs_of(curves, layout), layout[0] * layout[1]
    chosen = pad_by_cost(counts, costs, row_multiple=multiple)
    for mode in ("max_len", "sum_len"):
        other = pad_rows(counts, has_prompts=False, row_multiple=multiple, mode=mode)
        assert costs.of(chosen) <= 1.03 * costs.of(other)


@given(counts=COUNTS, curves=CURVES, layout=LAYOUTS)
def test_no_row_is_lost_and_none_padded_beyond_the_mode(counts, curves, layout):
    multiple = layout[0] * layout[1]
    mode, rows = pad_by_cost(counts, costs_of(curves, layout), row_multiple=multiple)
    aligned = align_rows(counts, multiple)
    assert rows == ((max(aligned),) * len(counts) if mode == "max_len" else aligned)


@given(counts=COUNTS, curves=CURVES, place=st.integers(0, 7), more=st.integers(1, 9))
def test_rows_more_never_cost_less(counts, curves, place, more):
    assume(len(set(counts)) > 1)
    longer = list(counts)
    longer[place % len(counts)] += more
    costs = costs_of(curves)
    before, after = (
        costs.of(pad_by_cost(each, costs, row_multiple=1)) for each in (counts, longer)
    )
    assert after >= before - 1e-9


@given(counts=COUNTS, curves=CURVES, layout=LAYOUTS, extra=st.floats(0.01, 100.0))
def test_the_dearer_a_row_is_the_fewer_are_padded(counts, curves, layout, extra):
    multiple = layout[0] * layout[1]
    dearer = curves._replace(
        mlps=tuple(each + extra * n for n, each in zip(curves.rows, curves.mlps, strict=True))
    )
    few, many = (
        sum(pad_by_cost(counts, costs_of(each, layout), row_multiple=multiple).rows)
        for each in (dearer, curves)
    )
    assert few <= many


@given(counts=COUNTS, layout=LAYOUTS, is_scattered=st.booleans(), mode=st.sampled_from(MODES))
def test_it_counts_the_way_that_ranks_will_take(counts, layout, is_scattered, mode):
    """Told by figures that are the same at all sizes: 1 equal, 2 slots, 3 one buffer."""
    attn_tp, attn_cp = layout
    assume(any(counts))
    multiple = attn_cp * (1 if is_scattered else attn_tp)
    costs = costs_of(PaddingCurves((1, 2), (1.0, 1.0), (2.0, 2.0), (3.0, 3.0), (0.0, 0.0)), layout)
    padded = pad_rows(counts, has_prompts=True, row_multiple=multiple, mode=mode)
    _, rows = counts_by_part(padded.rows, padded.rows, attn_cp)
    in_one_buffer = {"sum_slots": False, "sum_buffer": True}.get(mode)
    split = RowSplit(
        rows=rows, num_real=rows, attn_tp=attn_tp, part=0, place=0, in_one_buffer=in_one_buffer
    )
    assert costs.of(padded) == (1 if split.is_even else 2 if split.uses_slots else 3)


def test_a_tie_goes_to_the_longest():
    assert pad_by_cost((3, 1), per_row(1, 1, 2, 0), row_multiple=1).mode == "max_len"
    assert pad_by_cost((3, 1), per_row(1, 1, 1.5, 0), row_multiple=1).mode == "max_len"


@pytest.mark.parametrize(
    ("costs", "counts", "mode"),
    [
        (per_row(1, 2, 3, 0.1), (100, 98), "max_len"),  # the rule says sum_len for prompts
        (per_row(1, 1.1, 3, 5.0), (100, 10), "sum_slots"),
        (per_row(1, 1.1, 1.2, 5.0), (100, 10), "sum_buffer"),
        (per_row(1, 0.1, 0.1, 5.0), (7, 7), "max_len"),
        (per_row(1, 1, 1, 1), (0, 0), "max_len"),
    ],
)
def test_what_costs_least_is_chosen(costs, counts, mode):
    padded = pad_by_cost(counts, costs, row_multiple=1)
    assert padded == Padded(mode, (max(counts),) * 2 if mode == "max_len" else counts)


def test_between_two_sizes_before_the_first_and_past_the_last_costs_lie_on_a_line():
    costs = costs_of(PaddingCurves((2, 10, 20), (5, 13, 14), (0, 0, 0), (0, 0, 0), (0, 0, 0)))
    found = {rows: costs.of(Padded("max_len", (rows,))) for rows in (0, 1, 2, 6, 10, 15, 20, 40)}
    assert found == {0: 0.0, 1: 4, 2: 5, 6: 9, 10: 13, 15: 13.5, 20: 14, 40: 16}


def test_one_size_alone_is_taken_for_all():
    costs = costs_of(PaddingCurves((4,), (5.0,), (6.0,), (7.0,), (1.0,)))
    assert costs.of(Padded("max_len", (50, 50))) == 6.0


FIGURES = st.lists(st.floats(0.0, 99.0), min_size=3, max_size=3).map(tuple)
BY_RANK = st.lists(
    st.tuples(FIGURES, FIGURES, FIGURES, FIGURES).map(lambda all: PaddingCurves((1, 2, 3), *all)),
    min_size=1,
    max_size=4,
)


@given(by_rank=BY_RANK)
def test_ranks_agree_on_the_slowest_whatever_their_order_and_no_curve_falls(by_rank):
    agreed = slowest(by_rank)
    assert agreed == slowest(by_rank[::-1])
    for name in ("equal", "slots", "buffer", "mlps"):
        figures = getattr(agreed, name)
        assert list(figures) == sorted(figures)
        slow = [max(each) for each in zip(*(getattr(one, name) for one in by_rank), strict=True)]
        assert all(figure <= most for figure, most in zip(figures, slow, strict=True))
        assert figures[-1] == slow[-1]
        assert figures[0] == min(slow)


def test_without_all_ranks_curves_there_are_none():
    one = PaddingCurves((1,), (1.0,), (1.0,), (1.0,), (1.0,))
    assert slowest([one, None]) is None
    assert slowest([one, one._replace(rows=(2,))]) is None
    assert slowest([]) is None
