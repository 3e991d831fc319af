"""The table of `lockstep bench step`, from the times of both sides of the wire. Pure."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np


class TooFewSteps(Exception):
    """There is nothing to make figures of."""


class Case(NamedTuple):
    rows: int
    context: int


@dataclass(slots=True)
class DriverTimes:
    """The driver's part of each step, in seconds, by its number."""

    plan: dict[int, float] = field(default_factory=dict)
    send: dict[int, float] = field(default_factory=dict)
    accept: dict[int, float] = field(default_factory=dict)
    """From reading the last ack to the scheduler's having its tokens."""
    accepted: dict[int, float] = field(default_factory=dict)
    """When that was."""


def read_case(text: str) -> Case:
    """
    >>> read_case("32:1024")
    Case(rows=32, context=1024)
    """
    rows, _, context = text.partition(":")
    if not rows.isdecimal() or not context.isdecimal() or int(rows) < 1 or int(context) < 1:
        raise ValueError(f"case `{text}` is not understood: write ROWS:CONTEXT, like 32:1024")
    return Case(int(rows), int(context))


def figures_of(told: dict[str, Any], driver: DriverTimes) -> dict[str, float]:
    """Medians in microseconds of the steps that the rank has timed."""
    ranks: dict[str, list[float]] = {"launch": [], "wait": [], "finish": [], "back": []}
    parts: dict[str, list[float]] = {"plan": [], "send": [], "accept": []}
    ends: list[float] = []
    for step, _, launch, wait, finish, finished in told["steps"]:
        if step not in driver.plan or step not in driver.accepted:
            continue
        for name, value in (("launch", launch), ("wait", wait), ("finish", finish)):
            ranks[name].append(value)
        ranks["back"].append(driver.accepted[step] - finished)
        for name in parts:
            parts[name].append(getattr(driver, name)[step])
        ends.append(driver.accepted[step])
    if len(ends) < 2:
        raise TooFewSteps("too few steps were timed on both sides")
    every = {
        "step": np.diff(ends).tolist(),
        "plan": parts["plan"],
        "send": parts["send"],
        "launch": ranks["launch"],
        "finish": ranks["finish"],
        "host": [a + b for a, b in zip(ranks["launch"], ranks["finish"], strict=True)],
        "wait": ranks["wait"],
        "back": ranks["back"],
        "accept": parts["accept"],
    }
    figures = {name: statistics.median(values) * 1e6 for name, values in every.items()}
    if "gpu" in told:
        idle = told["gpu"]["idle"]
        figures["busy"] = statistics.median(told["gpu"]["busy"])
        figures["idle50"], figures["idle80"] = (float(np.percentile(idle, p)) for p in (50, 80))
        figures["gap50"] = statistics.median(told["gpu"]["gap"])
    return figures


HEADINGS = {
    "step": "step",
    "plan": "plan",
    "send": "send",
    "launch": "launch",
    "finish": "finish",
    "host": "worker host",
    "wait": "GPU wait",
    "back": "tokens back",
    "accept": "accept",
    "busy": "GPU busy",
    "idle50": "idle p50",
    "idle80": "idle p80",
    "gap50": "longest gap",
}
MOST_GAP_US = 30.0
"""Goal: how long the GPU waits between two decode steps, median."""


def header(figures: dict[str, float]) -> str:
    return f"{'rows:context':<14}" + "".join(f"{HEADINGS[name]:>12}" for name in figures)


def row(case: Case, figures: dict[str, float]) -> str:
    name = f"{case.rows}:{case.context}"
    return f"{name:<14}" + "".join(f"{value:>12.1f}" for value in figures.values())


def figures_line(
    model: str, measured: Sequence[tuple[Case, dict[str, float], dict[str, Any]]]
) -> dict[str, Any]:
    """All figures of a run, for programs; gaps only where a GPU was there.

    >>> figures = {"step": 900.0, "plan": 9.0, "send": 2.0, "accept": 4.0, "gap50": 12.0}
    >>> line = figures_line("8b", [(Case(1, 128), figures, {})])
    >>> line["gap_p50_us"], line["gap_met"], line["cases"][0]["driver_us"]
    ({'1:128': 12.0}, True, 15.0)
    """
    gaps = {
        f"{case.rows}:{case.context}": _tenths(told["gap50"])
        for case, told, _ in measured
        if "gap50" in told
    }
    cases = [
        {"rows": case.rows, "context": case.context}
        | {f"{name}_us": _tenths(value) for name, value in told.items()}
        | {"driver_us": _tenths(sum(told[part] for part in ("plan", "send", "accept")))}
        | ({"kernels": gpu["kernels"]} if gpu else {})
        for case, told, gpu in measured
    ]
    line: dict[str, Any] = {"case": "step", "model": model or "bundled"}
    if gaps:
        line |= {"gap_p50_us": gaps, "gap_met": max(gaps.values()) <= MOST_GAP_US}
    return line | {"cases": cases}


def _tenths(value: float) -> float:
    return round(value, 1)


def kernel_lines(gpu: dict[str, Any]) -> list[str]:
    return [
        f"  {micros:9.1f} us {count:6.1f} x {micros / count:8.2f}  {name[:90]}"
        for name, micros, count in gpu.get("kernels", ())
    ]
