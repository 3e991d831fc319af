"""From what each request met to the figures people compare. Pure.

Names are those of the JSON of `vllm bench serve`. Per request: ttft is the time from sending it to
its first chunk with output, itl the gap between two chunks, tpot the mean gap a token after the
first, e2el the time to the last chunk. A chunk may hold several tokens, so `tokens_per_chunk`
stands beside itl.

    >>> one = Outcome(sent=0.0, chunks=[0.25, 0.5, 1.0], num_input=5, num_output=3)
    >>> figures = summary([one], duration=1.5)
    >>> figures["mean_ttft_ms"], figures["median_tpot_ms"], figures["output_throughput"]
    (250.0, 375.0, 2.0)
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

METRICS = {
    "ttft": "Time to first token",
    "tpot": "Time per output token (without the first)",
    "itl": "Time between chunks",
    "e2el": "End-to-end latency",
}


@dataclass(slots=True)
class Outcome:
    """How one request went. Times are seconds; those in `chunks` since it was sent."""

    sent: float
    """Since the run began."""
    chunks: list[float] = field(default_factory=list)
    num_input: int = 0
    num_output: int = 0
    error: str = ""
    """Why it failed; empty if it did not."""

    @property
    def ttft(self) -> float:
        return self.chunks[0] if self.chunks else 0.0

    @property
    def latency(self) -> float:
        return self.chunks[-1] if self.chunks else 0.0

    @property
    def tpot(self) -> float:
        """0 for one token, which has no gap."""
        gaps = self.num_output - 1
        return (self.latency - self.ttft) / gaps if gaps > 0 else 0.0

    @property
    def itls(self) -> list[float]:
        return [later - sooner for sooner, later in pairwise(self.chunks)]


def read_goals(words: Sequence[str]) -> dict[str, float]:
    """`ttft:200 tpot:50` as limits in milliseconds.

    >>> read_goals(["ttft:200", "e2el:5000"])
    {'ttft': 200.0, 'e2el': 5000.0}
    """
    goals: dict[str, float] = {}
    for word in words:
        name, colon, limit = word.partition(":")
        if name not in ("ttft", "tpot", "e2el") or not colon:
            raise ValueError(
                f"goodput goal `{word}` is not understood: write ttft:MS, tpot:MS or e2el:MS"
            )
        goals[name] = _positive(limit, f"goodput goal `{word}`")
    return goals


def read_percentiles(text: str) -> list[float]:
    """`50,99` as numbers.

    >>> read_percentiles("50,99.9")
    [50.0, 99.9]
    """
    found = [_positive(each, f"metric_percentiles=`{text}`") for each in text.split(",")]
    if max(found) > 100:
        raise ValueError(f"metric_percentiles=`{text}` must be from 0 to 100")
    return found


def read_metrics(text: str) -> list[str]:
    found = text.split(",")
    for name in found:
        if name not in METRICS:
            known = ",".join(METRICS)
            raise ValueError(f"percentile_metrics=`{text}` may name {known}, and not `{name}`")
    return found


def _positive(text: str, what: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"{what} has `{text}` where a number must be") from None
    if not 0 < value < math.inf:
        raise ValueError(f"{what} has {text}, and it must be above 0")
    return value


def meets(outcome: Outcome, goals: Mapping[str, float]) -> bool:
    """Whether a request that did not fail is within all limits."""
    took = {"ttft": outcome.ttft, "tpot": outcome.tpot, "e2el": outcome.latency}
    return not outcome.error and all(took[name] * 1e3 <= limit for name, limit in goals.items())


def summary(
    outcomes: Sequence[Outcome],
    *,
    duration: float,
    percentiles: Sequence[float] = (99,),
    goals: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """All figures of a run of `duration` seconds."""
    done = [outcome for outcome in outcomes if not outcome.error]
    num_input = sum(outcome.num_input for outcome in done)
    num_output = sum(outcome.num_output for outcome in done)
    num_chunks = sum(len(outcome.chunks) for outcome in done)
    seconds = max(duration, 1e-9)
    figures: dict[str, Any] = {
        "duration": duration,
        "completed": len(done),
        "failed": len(outcomes) - len(done),
        "total_input_tokens": num_input,
        "total_output_tokens": num_output,
        "request_throughput": len(done) / seconds,
        "output_throughput": num_output / seconds,
        "total_token_throughput": (num_input + num_output) / seconds,
        "max_concurrent_requests": most_at_once(done),
        "tokens_per_chunk": num_output / num_chunks if num_chunks else 0.0,
    }
    if goals:
        figures["request_goodput"] = sum(meets(one, goals) for one in outcomes) / seconds
    values = {
        "ttft": [outcome.ttft for outcome in done],
        "tpot": [outcome.tpot for outcome in done if outcome.num_output > 1],
        "itl": [gap for outcome in done for gap in outcome.itls],
        "e2el": [outcome.latency for outcome in done],
    }
    for name, seconds_each in values.items():
        figures |= statistics(name, np.array(seconds_each) * 1e3, percentiles)
    return figures


def statistics(name: str, values_ms: np.ndarray, percentiles: Sequence[float]) -> dict[str, float]:
    """Mean, median, deviation and percentiles, named as the field names them; 0 of nothing.

    >>> statistics("itl", np.array([1.0, 3.0]), [99])["p99_itl_ms"]
    2.98
    """
    values = values_ms if len(values_ms) else np.zeros(1)
    found = {
        f"mean_{name}_ms": float(np.mean(values)),
        f"median_{name}_ms": float(np.median(values)),
        f"std_{name}_ms": float(np.std(values)),
    }
    for percentile in percentiles:
        found[f"p{percentile:g}_{name}_ms"] = float(np.percentile(values, percentile))
    return found


def most_at_once(outcomes: Sequence[Outcome]) -> int:
    """Requests under way at one time, at most."""
    changes = [(one.sent, 1) for one in outcomes]
    changes += [(one.sent + one.latency, -1) for one in outcomes]
    most = now = 0
    for _, change in sorted(changes):  # at one time ends (-1) come first
        now += change
        most = max(most, now)
    return most


def table(figures: Mapping[str, Any], metrics: Sequence[str], percentiles: Sequence[float]) -> str:
    """The same for people."""
    rows = [
        ("Requests done", f"{figures['completed']}"),
        ("Requests failed", f"{figures['failed']}"),
        ("Duration (s)", f"{figures['duration']:.2f}"),
        ("Input tokens", f"{figures['total_input_tokens']}"),
        ("Output tokens", f"{figures['total_output_tokens']}"),
        ("Requests a second", f"{figures['request_throughput']:.2f}"),
    ]
    if "request_goodput" in figures:
        rows.append(("Requests a second within goals", f"{figures['request_goodput']:.2f}"))
    rows += [
        ("Output tokens a second", f"{figures['output_throughput']:.1f}"),
        ("All tokens a second", f"{figures['total_token_throughput']:.1f}"),
        ("Most requests at once", f"{figures['max_concurrent_requests']}"),
        ("Tokens a chunk", f"{figures['tokens_per_chunk']:.2f}"),
    ]
    lines = [f"{name:<42}{value:>12}" for name, value in rows]
    columns = ["mean", "median", "std", *(f"p{percentile:g}" for percentile in percentiles)]
    lines += ["", f"{'milliseconds':<42}" + "".join(f"{column:>12}" for column in columns)]
    for name in metrics:
        values = (figures[f"{column}_{name}_ms"] for column in columns)
        lines.append(f"{METRICS[name]:<42}" + "".join(f"{value:>12.2f}" for value in values))
    return "\n".join(lines)


def reasons(outcomes: Sequence[Outcome], num: int = 3) -> list[str]:
    """The commonest reasons why requests failed, with their counts."""
    counts = Counter(outcome.error for outcome in outcomes if outcome.error)
    return [f"{count} times: {reason}" for reason, count in counts.most_common(num)]
