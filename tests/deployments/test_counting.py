"""Counts add up: at every ingress, at the driver, and after ingresses died and came back."""

import hypothesis.strategies as st
import pytest
from hypothesis import given

from deployments import counting
from deployments.counting import Accounts, Histogram, Outcome, RequestCounts
from deployments.messages import Distribution, IngressBeat

NEVER_FALL = ("received", "rejected", "finished", "failed", "cancelled", "resumed")


def test_a_value_on_a_bound_is_in_that_bucket():
    histogram = Histogram((0.1, 1.0))
    for value in (0.05, 0.1, 0.100001, 1.0, 7.0):
        histogram.observe(value)
    assert histogram.counts == [2, 2, 1]
    assert histogram.total == pytest.approx(8.250001)


def test_bounds_go_up():
    every = [value for name, value in vars(counting).items() if name.endswith("_BOUNDS")]
    assert len(every) == 8
    assert all(list(bounds) == sorted(set(bounds)) for bounds in every)


def test_a_histogram_with_other_bounds_is_left_out():
    histogram = Histogram((0.1, 1.0))
    histogram.add(Distribution((1, 2, 3), 4.0))
    histogram.add(Distribution((1, 1), 9.0))
    histogram.add(Distribution())
    assert histogram.distribution() == Distribution((1, 2, 3), 4.0)


def beat(name="a", **counts):
    return IngressBeat(ingress=name, **counts)


def counted(accounts):
    totals = accounts.totals()
    return {name: getattr(totals, name) for name in (*NEVER_FALL, "in_flight")}


def test_what_a_dead_ingress_had_under_way_has_failed():
    accounts = Accounts()
    accounts.heard(b"1", beat("a", received=10, finished=6, in_flight=4))
    accounts.heard(b"2", beat("b", received=5, rejected=1, cancelled=1, failed=1, in_flight=2))
    accounts.lost(b"1")
    totals = accounts.totals()
    assert (totals.received, totals.finished, totals.failed, totals.in_flight) == (15, 6, 5, 2)
    assert totals.is_balanced


def test_one_that_was_thought_dead_has_received_its_requests_again():
    accounts = Accounts()
    accounts.heard(b"1", beat("a", received=10, finished=6, in_flight=4))
    accounts.lost(b"1")
    accounts.heard(b"2", beat("a", received=11, finished=10, in_flight=1))
    accounts.lost(b"1")  # its old socket is found silent only now
    totals = accounts.totals()
    assert (totals.received, totals.finished, totals.failed, totals.in_flight) == (15, 10, 4, 1)
    assert totals.is_balanced


def test_of_many_dead_ingresses_the_sum_is_kept():
    accounts = Accounts()
    for number in range(2 * counting.MAX_LOST):
        name = f"{number}"
        accounts.heard(name.encode(), beat(name, received=3, finished=2, in_flight=1))
        accounts.lost(name.encode())
    assert len(accounts._accounts) <= counting.MAX_LOST + 1
    totals = accounts.totals()
    num = 2 * counting.MAX_LOST
    assert (totals.received, totals.finished, totals.failed) == (3 * num, 2 * num, num)


EVENTS = st.lists(
    st.tuples(
        st.integers(0, 2),
        st.sampled_from(["receive", "end", "turn away", "beat", "lost", "other socket"]),
        st.sampled_from(list(Outcome)),
    ),
    max_size=60,
)


@given(EVENTS)
def test_whatever_happens_the_sum_is_right_and_nothing_goes_down(events):
    accounts = Accounts()
    ingresses = [RequestCounts() for _ in range(3)]
    in_flight, sockets = [0, 0, 0], [0, 0, 0]
    before = counted(accounts)
    for who, event, outcome in events:
        counts, socket = ingresses[who], f"{who}-{sockets[who]}".encode()
        if event == "receive":
            counts.received += 1
            in_flight[who] += 1
        elif event == "end" and in_flight[who]:
            counts.end(outcome)
            in_flight[who] -= 1
        elif event == "turn away":
            counts.turn_away(outcome, 2)
        elif event == "beat":
            accounts.heard(socket, counts.beat(f"{who}", in_flight=in_flight[who]))
        elif event == "lost":
            accounts.lost(socket)
        elif event == "other socket":
            sockets[who] += 1
        after = counted(accounts)
        assert accounts.totals().is_balanced
        assert all(before[name] <= after[name] for name in NEVER_FALL)
        before = after
