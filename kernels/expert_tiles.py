"""How the products of experts are cut into tiles: by measurement where there is one, else by rule.

Measurements lie in `expert_tiles.json`, which `python -m tests.bench.tune_experts` writes on a GPU:
for a device and the shape of a layer's experts, the quickest tiles for numbers of choices. They are
taken at the numbers of rows that decode graphs have, so a bucket runs what was measured at its own
size; a number in between takes the tiles of the next larger one, and one past the largest that
one's, where the rule cuts it like it, else the rule: what was measured for an expert's 128 rows
says nothing of 36.

No torch and no Triton: tiles are numbers.
"""

import json
from bisect import bisect_left
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

FILE = Path(__file__).with_name("expert_tiles.json")


class Tile(NamedTuple):
    """Rows and outputs of a program, how much of the inner dimension at once, and how it is run."""

    rows: int
    cols: int
    inner: int
    num_warps: int
    num_stages: int


class Tiles(NamedTuple):
    gate_up: Tile
    down: Tile


class ExpertShape(NamedTuple):
    """A rank's experts, which must be all there are for its measurements to hold."""

    num_experts: int
    num_chosen: int
    """By each row."""
    hidden: int
    width: int
    dtype: str


class TileTable(NamedTuple):
    """Measured tiles by number of choices; without any, the rule's."""

    measured: Mapping[int, Tiles] = {}

    def choose(self, num_choices: int, num_experts: int) -> Tiles:
        """
        >>> few = Tiles(Tile(16, 32, 64, 4, 2), Tile(16, 16, 64, 4, 2))
        >>> TileTable({8: few}).choose(5, 128) == few
        True
        >>> RULE.choose(5, 128) == tiles_by_rule(5, 128)
        True
        """
        by_rule = tiles_by_rule(num_choices, num_experts)
        if not self.measured:
            return by_rule
        sizes = sorted(self.measured)
        near = sizes[min(bisect_left(sizes, num_choices), len(sizes) - 1)]
        if num_choices != near and by_rule != tiles_by_rule(near, num_experts):
            return by_rule
        return self.measured[near]


RULE = TileTable()


def tiles_by_rule(num_choices: int, num_experts: int) -> Tiles:
    """By how many rows an expert has on average: few rows are a matter of reading weights.

    >>> [tiles_by_rule(number, 128).down.rows for number in (8, 1024, 65536)]
    [16, 16, 128]
    """
    rows = num_choices / num_experts
    if num_choices <= 64:
        return Tiles(Tile(16, 16, 128, 4, 4), Tile(16, 32, 128, 4, 4))
    if rows <= 16:
        return Tiles(Tile(16, 32, 128, 4, 3), Tile(16, 64, 128, 4, 3))
    if rows <= 96:
        return Tiles(Tile(64, 64, 64, 4, 3), Tile(64, 128, 64, 4, 3))
    return Tiles(Tile(128, 64, 64, 8, 3), Tile(128, 128, 64, 8, 3))


def read_table(device: str, shape: ExpertShape, file: Path = FILE) -> TileTable:
    """What was measured on such a device for such experts; nothing where nobody has."""
    for table in _tables(file):
        if (table["device"], table["shape"]) == (device, shape._asdict()):
            return TileTable(
                {
                    int(choices): Tiles(Tile(*found["gate_up"]), Tile(*found["down"]))
                    for choices, found in table["measured"].items()
                }
            )
    return RULE


def write_table(
    device: str,
    shape: ExpertShape,
    measured: Mapping[int, tuple[Tiles, float, float]],
    how: Mapping[str, str],
    file: Path = FILE,
) -> None:
    """Keep (tiles, microseconds of a layer, the rule's) by choices; a former table is replaced."""
    key = {"device": device, "shape": shape._asdict()}
    others = [one for one in _tables(file) if (one["device"], one["shape"]) != tuple(key.values())]
    rows = {
        str(choices): tiles._asdict() | {"us": round(us, 1), "rule_us": round(rule_us, 1)}
        for choices, (tiles, us, rule_us) in sorted(measured.items())
    }
    tables = [*others, key | {"how": dict(how), "measured": rows}]
    file.write_text(json.dumps(tables, indent=1) + "\n")


def _tables(file: Path) -> list[dict]:
    return json.loads(file.read_text()) if file.exists() else []
