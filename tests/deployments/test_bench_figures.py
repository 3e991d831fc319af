import itertools
import statistics as plain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.bench_figures import (
    METRICS,
    Outcome,
    meets,
    most_at_once,
    read_goals,
    read_metrics,
    read_percentiles,
    reasons,
    summary,
    table,
)

FIELD_NAMES = {
    "duration", "completed", "failed", "total_input_tokens", "total_output_tokens",
    "request_throughput", "output_throughput", "total_token_throughput", "request_goodput",
}  # fmt: skip
FIELD_NAMES |= {
    f"{stat}_{name}_ms" for stat in ("mean", "median", "std", "p99") for name in METRICS
}
"""Of `vllm bench serve`'s JSON."""


@st.composite
def outcomes(draw):
    if draw(st.integers(0, 4)) == 0:
        return Outcome(sent=draw(st.floats(0, 5)), error="500: no")
    gaps = draw(st.lists(st.floats(1e-4, 2.0), min_size=1, max_size=8))
    return Outcome(
        sent=draw(st.floats(0, 5)),
        chunks=np.cumsum(gaps).tolist(),
        num_input=draw(st.integers(1, 100)),
        num_output=len(gaps) + draw(st.integers(0, 5)),
    )


MANY = st.lists(outcomes(), min_size=1, max_size=12)


@settings(max_examples=80)
@given(MANY, st.floats(0.1, 100.0))
def test_the_figures_are_what_plain_arithmetic_says(found, duration):
    figures = summary(found, duration=duration, goals={"ttft": 500.0})
    done = [one for one in found if not one.error]
    assert set(figures) >= FIELD_NAMES
    assert figures["completed"] + figures["failed"] == len(found)
    assert figures["request_throughput"] == pytest.approx(len(done) / duration)
    tokens = sum(one.num_output for one in done)
    assert figures["output_throughput"] * duration == pytest.approx(tokens)
    assert figures["request_goodput"] <= figures["request_throughput"] + 1e-9
    if done:
        firsts = [one.chunks[0] * 1e3 for one in done]
        assert figures["mean_ttft_ms"] == pytest.approx(plain.fmean(firsts))
        assert figures["median_ttft_ms"] == pytest.approx(plain.median(firsts))
        assert figures["std_ttft_ms"] == pytest.approx(plain.pstdev(firsts), abs=1e-6)
        for one in done:
            assert sum(one.itls) == pytest.approx(one.latency - one.ttft)
            assert one.tpot * (one.num_output - 1) == pytest.approx(
                one.latency - one.ttft if one.num_output > 1 else 0
            )


@settings(max_examples=80)
@given(MANY, st.lists(st.floats(0.5, 100.0), min_size=2, max_size=4))
def test_percentiles_do_not_fall_and_stay_within_what_was_seen(found, percentiles):
    asked = sorted(percentiles)
    figures = summary(found, duration=1.0, percentiles=asked)
    for name in METRICS:
        values = [figures[f"p{percentile:g}_{name}_ms"] for percentile in asked]
        assert all(a <= b + 1e-9 for a, b in itertools.pairwise(values))
    done = [one.latency * 1e3 for one in found if not one.error]
    if done:
        assert min(done) - 1e-9 <= figures[f"p{asked[0]:g}_e2el_ms"] <= max(done) + 1e-9


@settings(max_examples=80)
@given(MANY, st.floats(1.0, 3000.0), st.floats(1.0, 3000.0))
def test_a_stricter_goal_is_met_by_no_more(found, one_limit, other_limit):
    low, high = sorted((one_limit, other_limit))
    for name in ("ttft", "tpot", "e2el"):
        strict = [meets(one, {name: low}) for one in found]
        lax = [meets(one, {name: high}) for one in found]
        assert all(b or not a for a, b in zip(strict, lax, strict=True))
        both = [meets(one, {name: high, "e2el": low}) for one in found]
        assert sum(both) <= sum(lax)


def test_goodput_counts_those_within_all_limits():
    fast = Outcome(0.0, [0.1, 0.2], 5, 2)
    late = Outcome(0.0, [0.3, 0.4], 5, 2)
    failed = Outcome(0.0, error="500")
    figures = summary([fast, late, failed], duration=2.0, goals={"ttft": 200.0, "tpot": 150.0})
    assert figures["request_goodput"] == 0.5
    assert "request_goodput" not in summary([fast], duration=2.0)


@settings(max_examples=50)
@given(MANY)
def test_as_many_are_under_way_as_at_some_begin(found):
    done = [one for one in found if not one.error]
    at_begins = [
        sum(other.sent <= one.sent < other.sent + other.latency for other in done) for one in done
    ]
    assert most_at_once(done) == max(at_begins, default=0)


def test_nothing_done_is_all_zeros():
    figures = summary([Outcome(0.0, error="x")], duration=1.0)
    assert figures["failed"] == 1
    assert figures["mean_ttft_ms"] == figures["p99_itl_ms"] == 0.0


def test_the_table_has_all_rows_and_columns():
    figures = summary([Outcome(0.0, [0.1, 0.2], 5, 2)], duration=1.0, percentiles=(50, 99.9))
    shown = table(figures, ["ttft", "itl"], (50, 99.9))
    assert "p99.9" in shown
    assert "Time to first token" in shown
    assert "Time per output token" not in shown
    assert len({len(line) for line in shown.splitlines()[-3:]}) == 1


def test_reasons_are_counted():
    found = [Outcome(0.0, error="500: a")] * 3 + [Outcome(0.0, error="refused")]
    assert reasons(found) == ["3 times: 500: a", "1 times: refused"]


@pytest.mark.parametrize(
    ("read", "text", "sentence"),
    [
        (read_goals, ["itl:5"], "write ttft:MS, tpot:MS or e2el:MS"),
        (read_goals, ["ttft"], "goal `ttft` is not understood"),
        (read_goals, ["ttft:x"], "`x` where a number must be"),
        (read_goals, ["ttft:-1"], "it must be above 0"),
        (read_percentiles, "50,101", "must be from 0 to 100"),
        (read_percentiles, "50;99", "where a number must be"),
        (read_metrics, "ttft,speed", "and not `speed`"),
    ],
)
def test_what_cannot_be_read_is_said(read, text, sentence):
    with pytest.raises(ValueError, match=sentence):
        read(text)
