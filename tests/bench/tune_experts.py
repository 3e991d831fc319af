"""Find the quickest tiles for a model's experts on this GPU; writes `kernels/expert_tiles.json`.

    python -m tests.bench.tune_experts 30b-a3b --limit-s 240
    python -m tests.bench.tune_experts 30b-a3b --tp-size 2 --file tiles.json

For each number of rows, those of the decode graphs and some of prompts, a whole layer is timed in a
CUDA graph whose calls have routings of their own, so that weights come from memory: first with
every tile for the gate and up products, then, with the best of these, for the down products. A
candidate counts only if its result is the rule's but for rounding, and one that is not at least 2 %
quicker than the rule does not replace it. Kernels are compiled by several processes beforehand.

At the deadline the sizes that are done are written.
"""

import argparse
import itertools
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
import triton
from torch import Tensor

from deployments.presets import PRESETS
from kernels.expert_tiles import (
    FILE,
    ExpertShape,
    Tile,
    Tiles,
    TileTable,
    tiles_by_rule,
    write_table,
)
from kernels.fused_moe import fused_moe
from tests.bench.kernel_times import micros
from tests.bench.results import commit, versions

ROWS = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 512, 1024, 2048, 8192)
NUM_ROUTINGS = 8
LEAST_GAIN = 0.98
"""Of the rule's time, or it stays: what is less is noise."""
TOLERANCE = 2e-2

Measure = Callable[[Tiles], float]
"""Microseconds of a layer; infinite if the tiles do not work."""


def candidates(num_choices: int, num_experts: int) -> list[Tile]:
    """Tiles that may be good: few rows read weights in wide pieces, many rows compute.

    >>> {tile.rows for tile in candidates(8, 128)}, {tile.rows for tile in candidates(65536, 128)}
    ({16}, {64, 128})
    """
    rows = num_choices / num_experts
    if rows <= 8:
        sizes = itertools.product((16,), (16, 32, 64, 128), (64, 128, 256), (4,), (3, 4, 5))
    elif rows <= 64:
        sizes = itertools.product((16, 32, 64), (64, 128), (64, 128), (4,), (3, 4))
    else:
        sizes = itertools.product((64, 128), (64, 128, 256), (64,), (4, 8), (3, 4))
    tiles = [Tile(*size) for size in sizes]
    return [tile for tile in tiles if tile.cols * tile.inner <= 16384]


def tune(measure: Measure, rule: Tiles, tiles: Iterable[Tile]) -> tuple[Tiles, float, float]:
    """(best, its microseconds, the rule's): one product at a time, the other as good as known."""
    tiles, rule_us = list(tiles), measure(rule)
    best, best_us = rule, rule_us
    for name in ("gate_up", "down"):
        for tile in tiles:
            tried = best._replace(**{name: tile})
            us = measure(tried)
            if us < best_us:
                best, best_us = tried, us
    rule_us = min(rule_us, measure(rule))  # the first of many timings is often slow
    if best == rule or best_us > LEAST_GAIN * rule_us:
        return rule, rule_us, rule_us
    return best, best_us, rule_us


class Layer:
    """Random experts, and routings for so many rows."""

    def __init__(self, shape: ExpertShape, device: torch.device) -> None:
        self._shape, self._device = shape, device
        dtype, hidden, width = getattr(torch, shape.dtype), shape.hidden, shape.width
        new = {"device": device, "dtype": dtype}
        self._gate_up_END = torch.randn(shape.num_experts, 2 * width, hidden, **new) / hidden**0.5
        self._down_EDI = torch.randn(shape.num_experts, hidden, width, **new) / width**0.5

    def measure(self, num_rows: int) -> Measure:
        shape = self._shape
        x_TD = torch.randn(
            num_rows, shape.hidden, device=self._device, dtype=self._gate_up_END.dtype
        )
        routings = [self._routing(num_rows) for _ in range(NUM_ROUTINGS)]
        outs = [torch.empty_like(x_TD) for _ in routings]

        def run(number: int, tiles: Tiles) -> None:
            weight_TK, expert_TK = routings[number]
            fused_moe(
                x_TD, weight_TK, expert_TK, self._gate_up_END, self._down_EDI, first=0,
                num_real=shape.num_experts, out=outs[number],
                table=TileTable({num_rows * shape.num_chosen: tiles}),
            )  # fmt: skip

        for number in range(NUM_ROUTINGS):
            run(number, tiles_by_rule(num_rows * shape.num_chosen, shape.num_experts))
        expected = [out.clone() for out in outs]

        def measure(tiles: Tiles) -> float:
            for out in outs:
                out.fill_(torch.nan)
            try:
                took = micros(lambda number: run(number, tiles), NUM_ROUTINGS, self._device)
            except triton.OutOfResources:
                return float("inf")
            near = (
                torch.allclose(out, wanted, rtol=TOLERANCE, atol=TOLERANCE)
                for out, wanted in zip(outs, expected, strict=True)
            )
            return took if all(near) else float("inf")

        return measure

    def _routing(self, num_rows: int) -> tuple[Tensor, Tensor]:
        scores = torch.rand(num_rows, self._shape.num_experts, device=self._device)
        chosen = scores.topk(self._shape.num_chosen)
        weight_TK = chosen.values / chosen.values.sum(-1, keepdim=True)
        return weight_TK.to(self._gate_up_END.dtype), chosen.indices


def sizes_of(shape: ExpertShape, rows: Iterable[int]) -> Iterator[tuple[int, int, list[Tile]]]:
    """(rows, choices, candidates)."""
    for num_rows in rows:
        num_choices = num_rows * shape.num_chosen
        yield num_rows, num_choices, candidates(num_choices, shape.num_experts)


def compile_share(shape: ExpertShape, rows: tuple[int, ...], share: int, num_shares: int) -> None:
    """Compile every `num_shares`-th candidate, which the others then find in Triton's cache."""
    layer = Layer(shape, torch.device("cuda"))
    seen = dict.fromkeys(tile for *_, tiles in sizes_of(shape, rows) for tile in tiles)
    measure = layer.measure(1)
    for tile in list(seen)[share::num_shares]:
        measure(Tiles(tile, tile))


def shape_of(model: str, tp_size: int) -> ExpertShape:
    """
    >>> shape_of("30b-a3b", 2)
    ExpertShape(num_experts=128, num_chosen=8, hidden=2048, width=384, dtype='bfloat16')
    """
    config = PRESETS[model]
    num_experts = config.get("num_experts") or config.get("n_routed_experts")
    if num_experts is None:
        raise ValueError(f"{model} has no experts")
    return ExpertShape(
        num_experts,
        config["num_experts_per_tok"],
        config["hidden_size"],
        config["moe_intermediate_size"] // tp_size,
        config["torch_dtype"],
    )


def run(
    shape: ExpertShape, rows: Iterable[int], device: torch.device, file: Path, limit_s: float
) -> None:
    deadline = time.monotonic() + limit_s
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    layer = Layer(shape, device)
    measured: dict[int, tuple[Tiles, float, float]] = {}
    for num_rows, num_choices, tiles in sizes_of(shape, rows):
        if time.monotonic() > deadline:
            print(f"{limit_s:.0f} s are over before {num_rows} rows", flush=True)
            break
        rule = tiles_by_rule(num_choices, shape.num_experts)
        found = tune(layer.measure(num_rows), rule, tiles)
        measured[num_choices] = found
        best, us, rule_us = found
        print(f"{num_rows} rows: {us:.1f} us, by rule {rule_us:.1f}: {best}", flush=True)
    if not measured:
        return
    how = {
        "command": f"python -m tests.bench.tune_experts {' '.join(sys.argv[1:])}",
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "versions": versions("torch", "triton"),
    }
    write_table(name, shape, measured, how, file)


def main() -> int:
    parser = argparse.ArgumentParser(description="Find the quickest tiles for a model's experts.")
    parser.add_argument("model", choices=PRESETS)
    parser.add_argument("--tp-size", type=int, default=1)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--file", type=Path, default=FILE)
    parser.add_argument("--limit-s", type=float, default=240.0)
    parser.add_argument("--processes", type=int, default=12, help="that compile")
    args = parser.parse_args()
    shape, rows = shape_of(args.model, args.tp_size), tuple(sorted(args.rows))
    began = time.monotonic()
    shares = [(shape, rows, share, args.processes) for share in range(args.processes)]
    with multiprocessing.get_context("spawn").Pool(args.processes) as pool:
        pool.starmap(compile_share, shares)
    took = time.monotonic() - began
    print(f"compiled in {took:.0f} s", flush=True)
    run(shape, rows, torch.device("cuda"), args.file, args.limit_s - took)
    return 0


if __name__ == "__main__":
    sys.exit(main())
