"""Two engines' figures side by side: medians, ratios and goals. Pure.

A line is what a benchmark prints for a case: `{"case": "bs1_tpot_ms", "value": 4.0, ...}`. Lines of
a side may come from several runs; a row has the 20th, 50th and 80th percentile of each side, and
the ratio of the medians, ours over the peer's.
"""

import json
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from tests.bench.results import percentiles

MOST_DRIFT = 0.03
"""Our own runs, before and after the peer's, may differ by so much; beyond it the row says so."""


class Goal(NamedTuple):
    model: str
    tp: int
    case: str
    limit: float
    of: str = "ratio"
    """`ratio`, or `ours`: the best of our own runs."""

    @property
    def is_upper(self) -> bool:
        return not self.case.endswith("_tok_s")

    def __str__(self) -> str:
        unit = " s" if self.of == "ours" else ""
        return f"{'<=' if self.is_upper else '>='} {self.limit:g}{unit}"

    def met_by(self, value: float) -> bool:
        return value <= self.limit if self.is_upper else value >= self.limit


GOALS = (
    Goal("8b", 1, "startup_s", 30.0, "ours"),
    Goal("8b", 1, "bs1_tpot_ms", 0.85),
    Goal("8b", 1, "bs32_1k_tpot_ms", 0.95),
    Goal("8b", 1, "bs128_1k_tpot_ms", 0.95),
    Goal("8b", 1, "offline256_out_tok_s", 1.15),
    Goal("0.6b", 1, "bs1_tpot_ms", 0.5),
    Goal("0.6b", 1, "offline256_out_tok_s", 1.25),
    Goal("30b-a3b", 1, "bs1_tpot_ms", 0.85),
    Goal("30b-a3b", 1, "offline256_out_tok_s", 1.2),
    Goal("8b", 2, "bs1_tpot_ms", 0.8),
    Goal("8b", 2, "offline256_out_tok_s", 1.1),
)
FLOORS = (Goal("8b", 1, "bs1_tpot_ms", 1.0), Goal("8b", 1, "offline256_out_tok_s", 1.0))
"""Must hold: no worse than the peer."""


class Line(NamedTuple):
    """One case of one run."""

    side: str
    """`ours` or `peer`."""
    model: str
    tp: int
    case: str
    value: float
    more: dict[str, Any]
    """What else the benchmark said."""


class Row(NamedTuple):
    model: str
    tp: int
    case: str
    ours: tuple[float, ...]
    """Values of the runs."""
    peer: tuple[float, ...]
    tokens: dict[str, Any] | None
    """Our `tokens_ok` line of this case, a bad one if there is one."""

    @property
    def ratio(self) -> float | None:
        """None where a side has no value."""
        if not self.ours or not self.peer:
            return None
        return percentiles(self.ours)[1] / percentiles(self.peer)[1]

    @property
    def drift(self) -> float:
        """How much our runs differ: 0.01 is one per cent."""
        return max(self.ours) / min(self.ours) - 1 if self.ours else 0.0

    @property
    def verdict(self) -> tuple[str, str]:
        """(the goal, `met`, `missed` or `below the floor`); empty where there is none, or no value.

        >>> Row("8b", 1, "bs1_tpot_ms", (4.0, 4.2), (5.0,), None).verdict
        ('<= 0.85', 'met')
        """
        mine = (self.model, self.tp, self.case)
        goal = next((goal for goal in GOALS if goal[:3] == mine), None)
        if goal is None:
            return "", ""
        best = min(self.ours, default=None) if goal.is_upper else max(self.ours, default=None)
        value = best if goal.of == "ours" else self.ratio
        if value is None:
            return str(goal), ""
        if goal.met_by(value):
            return str(goal), "met"
        is_low = any(floor[:3] == mine and not floor.met_by(value) for floor in FLOORS)
        return str(goal), "below the floor" if is_low else "missed"

    @property
    def tokens_ok(self) -> str:
        return "" if self.tokens is None else str(bool(self.tokens["value"])).lower()

    @property
    def apart(self) -> str:
        """Largest difference of log-probabilities."""
        if self.tokens is None:
            return ""
        return str(self.tokens.get("logprob_apart", {}).get("largest", ""))


def read_line(text: str, side: str, model: str, tp: int) -> Line | None:
    """None for what is no case with a value that can be compared: engines print other things too.

    >>> read_line('{"case": "startup_s", "value": 80.1}', "peer", "8b", 1).value
    80.1
    >>> read_line("INFO loading", "peer", "8b", 1)
    """
    try:
        found = json.loads(text)
    except ValueError:
        return None
    if not isinstance(found, dict) or not isinstance(found.get("case"), str):
        return None
    value = found.get("value")
    if found["case"] != "tokens_ok":
        if isinstance(value, bool) or not isinstance(value, int | float):
            return None
        if not math.isfinite(value) or value <= 0:
            return None
    elif not isinstance(value, bool) or not isinstance(found.get("of"), str):
        return None
    more = {name: each for name, each in found.items() if name not in ("case", "value")}
    return Line(side, model, tp, found["case"], value, more)


def rows_of(lines: Sequence[Line]) -> list[Row]:
    """A row for each case of each model, in the order in which they came first."""
    keys = dict.fromkeys(
        (line.model, line.tp, line.case) for line in lines if line.case != "tokens_ok"
    )
    return [_row(lines, *key) for key in keys]


def _row(lines: Sequence[Line], model: str, tp: int, case: str) -> Row:
    mine = [line for line in lines if (line.model, line.tp) == (model, tp)]
    values = {
        side: tuple(each.value for each in mine if (each.side, each.case) == (side, case))
        for side in ("ours", "peer")
    }
    checks = [
        {"value": line.value} | line.more
        for line in mine
        if line.case == "tokens_ok" and line.side == "ours" and line.more["of"] == case
    ]
    checks.sort(key=lambda check: check["value"])  # a bad one first
    return Row(model, tp, case, values["ours"], values["peer"], checks[0] if checks else None)


def unit_of(case: str) -> str:
    for end, unit in (("_ms", "ms"), ("_tok_s", "tok/s"), ("_s", "s")):
        if case.endswith(end):
            return unit
    return ""


def table(rows: Sequence[Row], peer_name: str) -> str:
    """What a person reads."""
    lines = [f"{'model':<10}{'case':<22}{'ours':>10}{peer_name:>14}{'ratio':>8}  goal"]
    for row in rows:
        name = row.model or "bundled"
        if row.tp > 1:
            name += f" x{row.tp}"
        sides = [f"{percentiles(each)[1]:.4g}" if each else "-" for each in (row.ours, row.peer)]
        ratio = "-" if row.ratio is None else f"{row.ratio:.3f}"
        said = [" ".join(filter(None, row.verdict))]
        if row.drift > MOST_DRIFT and row.case != "startup_s":
            said.append(f"our runs differ by {row.drift:.1%}")
        if row.tokens_ok == "false" and row.tokens and row.tokens.get("wrong") == 0:
            said.append(f"NOT RIGHT: log-probabilities up to {row.apart} apart")
        elif row.tokens_ok == "false":
            said.append("WRONG TOKENS")
        elif row.tokens_ok:
            said.append(f"tokens right, {row.apart} apart")
        lines.append(
            f"{name:<10}{row.case:<22}{sides[0]:>10}{sides[1]:>14}{ratio:>8}  "
            + "; ".join(filter(None, said))
        )
    return "\n".join(lines)
