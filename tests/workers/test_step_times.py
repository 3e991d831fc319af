import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.step_times import Span, gpu_figures

KERNELS = st.lists(
    st.tuples(st.floats(0.1, 9.0), st.floats(-0.05, 3.0), st.sampled_from("abc")), max_size=6
)
"""(length, gap after it, name); a gap below 0 overlaps."""


@settings(max_examples=100)
@given(KERNELS, st.integers(2, 6), st.floats(0.0, 50.0))
def test_equal_steps_are_cut_into_equal_pieces(kernels, num_steps, between):
    spans, now = [], 0.0
    for _ in range(num_steps):
        began = now
        spans.append(Span(now, now + 1.0, "once"))
        now += 1.0
        for length, gap, name in kernels:
            spans.append(Span(now, now + length, name))
            now += length + gap
        now = max(now, *(span.end for span in spans)) + between
        period = now - began
    figures = gpu_figures(spans, num_steps)
    assert len(figures["busy"]) == len(figures["idle"]) == num_steps - 1
    gaps = sum(max(0.0, gap) for _, gap, _ in kernels)
    for busy, idle, gap in zip(figures["busy"], figures["idle"], figures["gap"], strict=True):
        assert between - 1e-6 <= gap <= idle + 1e-6
        assert busy + idle == pytest.approx(period)
        assert between - 1e-6 <= idle <= between + gaps + 1e-6
        assert busy >= 1.0 - 1e-6
    total = sum(micros for _, micros, _ in figures["kernels"])
    assert total == pytest.approx(sum(length for length, _, _ in kernels) + 1.0)


def test_without_a_kernel_that_runs_once_steps_are_counted_off():
    spans = [Span(10.0 * n + k, 10.0 * n + k + 1, "same") for n in range(4) for k in (0, 1)]
    figures = gpu_figures(spans, 4)
    assert figures["busy"] == [2.0] * 3
    assert figures["idle"] == [8.0] * 3
    assert figures["gap"] == [8.0] * 3
    assert figures["kernels"] == [["same", 2.0, 2.0]]
