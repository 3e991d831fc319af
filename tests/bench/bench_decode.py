"""A decode step on a GPU, as its graph runs it: what a choice in a kernel is worth in a whole step.

    python -m tests.bench.bench_decode --model 8b
    python -m tests.bench.bench_decode --model 8b --rows 64 256 --variants ranks=1 ranks=4,shares=8

Random weights and a cache of random numbers; sequences have from 100 to twice `--context` tokens.
For each number of rows the same step is captured and replayed for each variant, from the same
tokens, with `all` (every choice as it is) first and last: microseconds a step by the GPU's clock,
the median of `--rounds` rounds of `--steps` steps; the first run over the last is the noise. `same`
is the share of tokens that are those of the first run.

A variant sets choices as NAME=VALUE,NAME=VALUE: `shares` and `ranks` say how sequences are cut and
in which order their parts are launched (`kernels.paged_decode`).

On a CPU (`--device cpu --model ""`, and TRITON_INTERPRET=1) it shows that it works, and no times.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from deployments.presets import PRESETS, write_preset
from kernels import paged_decode
from parallel.groups import single_rank_groups
from parallel.layout import Layout
from workers import bundled
from workers.batch import StepRows
from workers.cache import PagedCache
from workers.config import EngineConfig
from workers.context import ContextParts
from workers.device_table import DeviceTable
from workers.gpu_attention import GpuAttention
from workers.graphs import DecodeGraphs
from workers.recording import Recorder
from workers.runner import load_model
from workers.transfers import Transfers

PAGE_SIZE = 16
CHOICES = {
    "ranks": (paged_decode, "LENGTH_RANKS"),
    "shares": (paged_decode, "SHARES_PER_SM"),
}
"""Where a choice is."""
VARIANTS = ("ranks=1", "ranks=8", "shares=4", "shares=8")


@contextmanager
def chosen(variant: str) -> Iterator[None]:
    """Within it the choices are the variant's; `all` changes nothing."""
    pairs = [] if variant == "all" else [each.split("=") for each in variant.split(",")]
    places = [(*CHOICES[name], int(value)) for name, value in pairs]
    before = [getattr(module, constant) for module, constant, _ in places]
    for module, constant, value in places:
        setattr(module, constant, value)
    try:
        yield
    finally:
        for (module, constant, _), value in zip(places, before, strict=True):
            setattr(module, constant, value)


class Decodes:
    """A model whose slots all decode, over a cache of random numbers."""

    def __init__(self, config: EngineConfig, device: torch.device, rows: int, context: int) -> None:
        self._config, self._device, self._rows = config, device, rows
        self._groups = single_rank_groups()
        layout, told = Layout(), lambda stage, done, total: None
        self._model = load_model(config, layout, 0, self._groups, device, told)
        generator = torch.Generator().manual_seed(0)
        least = min(100, context)
        lengths = torch.randint(least, 2 * context - least + 1, (rows,), generator=generator)
        self._positions_B = lengths.to(device)
        pages_a_slot = -(-(2 * context + config.page_size) // config.page_size)
        num_pages = int((lengths // config.page_size + 1).sum()) + 1
        shapes = self._model.cache_shapes
        self._cache = PagedCache(
            self._model.num_layers, shapes, num_pages=num_pages, page_size=config.page_size,
            dtype=self._model.dtype, device=device,
        )  # fmt: skip
        for part in self._cache.parts:
            part.normal_()
        self._table = DeviceTable(rows, pages_a_slot, num_pages - 1, device)
        pages = torch.randperm(num_pages - 1, generator=generator).int()
        first = 0
        for slot, length in enumerate(lengths.tolist()):
            count = length // config.page_size + 1
            self._table.table_SN[slot, :count] = pages[first : first + count].to(device)
            first += count
        self._last_S = torch.zeros(rows + 1, dtype=torch.int64, device=device)

    def graphs(self, num_rows: int) -> DecodeGraphs:
        """With one bucket, captured anew; nothing has run yet."""
        attention = GpuAttention(self._cache, self._table, max_decodes=num_rows)
        transfers = Transfers(self._device)
        graphs = DecodeGraphs(
            self._model, attention, self._table, self._last_S, self._groups.ledger,
            Recorder(self._device, self._groups.ledger),
            ContextParts(self._groups.attn_cp, transfers.upload), transfers.upload,
            page_size=self._config.page_size, buckets=(num_rows,), num_replicas=1,
        )  # fmt: skip
        graphs.capture_one(num_rows)
        return graphs

    def run(self, num_rows: int, *, steps: int, rounds: int) -> tuple[float, list[int]]:
        """(microseconds a step, tokens of the first rows after the last of them)."""
        graphs = self.graphs(num_rows)
        slots = torch.arange(num_rows).numpy()
        times, tokens = [], []
        for number in range(rounds + 1):
            self._last_S.copy_(torch.arange(len(self._last_S)) % 1000 + 3)
            # Each round starts from the same positions, and room is left to the end of a page.
            positions = self._positions_B[:num_rows] // PAGE_SIZE * PAGE_SIZE
            rows = _rows_of(slots, positions.cpu().numpy())
            start, end = _events(self._device)
            for step in range(steps):
                if step == 1:
                    start()
                graphs.launch(rows, num_rows, (num_rows,))
            took = end()
            if number:
                times.append(took / max(1, steps - 1))
            tokens = self._last_S[:num_rows].tolist()
        return statistics.median(times), tokens


def _rows_of(slots: NDArray[np.int64], positions: NDArray[np.int64]) -> StepRows:
    return StepRows(slots.copy(), (), positions, positions, slots, slots, ())


def _events(device: torch.device):
    """(start, end): `end` waits and gives microseconds since `start`."""
    if device.type == "cpu":
        began = [0.0]
        return (
            lambda: began.__setitem__(0, time.perf_counter()),
            lambda: (time.perf_counter() - began[0]) * 1e6,
        )
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def end() -> float:
        last.record()
        last.synchronize()
        return first.elapsed_time(last) * 1e3

    return first.record, end


def measure(args: argparse.Namespace, folder: Path) -> None:
    config = EngineConfig(
        model=str(write_preset(args.model, folder) if args.model else bundled.path()),
        load_format="dummy" if args.model else "auto",
        page_size=PAGE_SIZE,
    )
    device = torch.device(args.device)
    with torch.inference_mode():
        decodes = Decodes(config, device, max(args.rows), args.context)
        for num_rows in args.rows:
            first: list[int] = []
            for variant in ("all", *args.variants, "all"):
                with chosen(variant):
                    took, tokens = decodes.run(num_rows, steps=args.steps, rounds=args.rounds)
                first = first or tokens
                same = sum(a == b for a, b in zip(first, tokens, strict=True)) / num_rows
                line = {"rows": num_rows, "variant": variant, "us": round(took, 1)}
                print(json.dumps(line | {"same": round(same, 3)}), flush=True)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m tests.bench.bench_decode", description=__doc__.splitlines()[0]
    )
    made.add_argument("--model", default="8b", choices=(*PRESETS, ""), help="nothing: the bundled")
    made.add_argument("--rows", type=int, nargs="+", default=[256, 192, 128, 64, 32, 8, 1])
    made.add_argument("--context", type=int, default=1000, help="tokens of a sequence, on average")
    made.add_argument("--variants", nargs="*", default=VARIANTS)
    made.add_argument("--steps", type=int, default=PAGE_SIZE, help="of a round; at most a page")
    made.add_argument("--rounds", type=int, default=3)
    made.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    return made


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    if not 1 < args.steps <= PAGE_SIZE:
        raise SystemExit(f"--steps={args.steps} must be from 2 to {PAGE_SIZE}: they fill a page")
    with tempfile.TemporaryDirectory() as folder:
        measure(args, Path(folder))


if __name__ == "__main__":
    main()
