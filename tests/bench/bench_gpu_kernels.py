# ruff: noqa: B023  (what a loop measures is called within its turn)
"""Our kernels on a GPU against what they could reach: microseconds, and share of the ceiling.

    python -m tests.bench.bench_gpu_kernels            all of them
    python -m tests.bench.bench_gpu_kernels e4m3       some: rows, linear, decode, prefill, e4m3

Every timing is of replays of a CUDA graph that holds the kernel many times over rotating inputs,
so that neither launches nor the cache decide. The ceilings are measured in the same run.
"""

import itertools
import sys
from collections.abc import Callable

import torch
from torch.nn import functional
from torch.nn.attention.bias import causal_lower_right

from kernels.fp8 import NO_SCALES, Scales, to_e4m3
from kernels.paged_decode import cut_sequences, num_shares_of, paged_decode
from kernels.paged_prefill import (
    LARGE_TILES,
    SHARED_TILES,
    PrefillTiles,
    cut_chunks,
    paged_prefill,
)
from kernels.rms_norm import add_rms_norm
from kernels.silu_multiply import silu_multiply
from kernels.skinny_linear import skinny_linear
from tests.bench import kernel_times

DEVICE = "cuda"
BF16 = torch.bfloat16


def micros(run: Callable[[int], object], num_inputs: int) -> float:
    return kernel_times.micros(run, num_inputs, torch.device(DEVICE))


def copy_rate() -> float:
    """TB/s. NOTE: not a copy node of a graph, which is a third slower than a kernel."""
    x = torch.randn(2**29, device=DEVICE)
    y = torch.empty_like(x)
    return 2 * x.nbytes / micros(lambda i: torch.mul(x, 2.0, out=y), 3) / 1e6


def show_linear(rate: float) -> None:
    print("product of few rows with a weight: us (TB/s / copy), cuBLAS, then ours by (tile, warps)")
    shapes = [(1024, 4096), (2048, 1024), (1024, 6144), (3072, 1024), (1024, 151936),
              (4096, 6144), (4096, 4096), (4096, 24576), (12288, 4096), (4096, 151936)]  # fmt: skip
    for (num_in, num_out), rows in itertools.product(shapes, (1, 2)):
        count = max(3, min(40, 2**30 // (num_in * num_out * 2)))
        weights = [torch.randn(num_out, num_in, dtype=BF16, device=DEVICE) for _ in range(count)]
        x = torch.randn(rows, num_in, dtype=BF16, device=DEVICE)
        size = weights[0].nbytes / 1e6
        cublas = micros(lambda i: functional.linear(x, weights[i]), count)
        cells = [f"{cublas:6.1f} ({size / cublas / rate:.2f})"]
        for tile, warps in itertools.product((4096, 8192, 16384), (4, 8)):
            took = micros(
                lambda i: skinny_linear(x, weights[i], tile=tile, num_warps=warps),
                count,
            )
            cells.append(f"{tile}/{warps} {took:6.1f} ({size / took / rate:.2f})")
        print(f"  {rows} x {num_in} -> {num_out}: " + "  ".join(cells), flush=True)


def decode_inputs(
    num_seqs: int, length: int, heads: int, kv_heads: int, copies: int, *, is_even: bool = True
):
    pages = -(-length * (1 if is_even else 2) // 16)
    table = torch.randperm(num_seqs * pages, device=DEVICE).to(torch.int32).view(num_seqs, pages)
    caches = [
        torch.randn(2, num_seqs * pages * 16, kv_heads, 128, dtype=BF16, device=DEVICE)
        for _ in range(copies)
    ]
    q = torch.randn(num_seqs, heads, 128, dtype=BF16, device=DEVICE)
    slots = torch.arange(num_seqs, device=DEVICE)
    positions = torch.full((num_seqs,), length - 1, device=DEVICE)
    if not is_even:
        positions = torch.linspace(0, 2 * length - 2, num_seqs, device=DEVICE).long()
    return table, caches, q, slots, positions


def show_decode(rate: float) -> None:
    """Sequences of equal lengths, and of lengths from 1 to twice as much."""
    print("decode attention: us (TB/s / copy) by (stages, warps)")
    num_sms = torch.cuda.get_device_properties(DEVICE).multi_processor_count
    for num_seqs, length, heads in ((1, 300, 32), (1, 1088, 32), (1, 6000, 32), (8, 1088, 32),
                                    (32, 1088, 32), (48, 1400, 32), (128, 1088, 32),
                                    (128, 1088, 16), (256, 620, 32), (256, 1000, 16)):  # fmt: skip
        copies = int(max(2, min(40, 600 // (num_seqs * length * 0.004))))
        for is_even in (True, False):
            table, caches, q, slots, positions = decode_inputs(
                num_seqs, length, heads, 8, copies, is_even=is_even
            )
            size = 2 * (int(positions.sum()) + num_seqs) * 8 * 128 * 2 / 1e6
            out = torch.empty_like(q)
            counters = torch.zeros(num_seqs * 8, dtype=torch.int32, device=DEVICE)
            cut = cut_sequences(positions, num_shares_of(8, num_sms), sliding_window=None)
            cells = []
            for stages, warps in ((2, 4), (3, 4), (2, 8)):
                took = micros(
                    lambda i: paged_decode(
                        q, caches[i][0], caches[i][1], table, slots, positions, cut, out,
                        counters, page_size=16, scale=0.1, sliding_window=None,
                        num_stages=stages, num_warps=warps,
                    ),
                    copies,
                )  # fmt: skip
                cells.append(f"{took:7.1f} ({size / took / rate:.2f}) {stages} {warps}")
            what = "even" if is_even else "uneven"
            print(f"  {num_seqs} x {length} {what}, {heads}/8 heads: {'; '.join(cells)}")
    print(flush=True)


PREFILL_SHAPES = ((8, 1024, 0), (1, 8192, 0), (64, 128, 0), (1, 2048, 30000))
"""Chunks, rows of each, tokens before them."""
PREFILL_TILES = (
    LARGE_TILES,
    SHARED_TILES,
    PrefillTiles(128, 64, 3, 8, 160),
    PrefillTiles(128, 64, 5, 8),
    PrefillTiles(128, 32, 3, 8, 128),
    PrefillTiles(256, 32, 3, 16, 128),
    PrefillTiles(256, 64, 3, 16, 128),
    PrefillTiles(128, 128, 5, 8),
)


class Prefill:
    """Equal chunks of 32 heads that share 8 heads of keys, and what attention over them costs."""

    def __init__(self, num_chunks: int, length: int, before: int) -> None:
        self.length, self.before = length, before
        self.chunks = [(i * length, length, before, i) for i in range(num_chunks)]
        # A multiple of 256 tokens, so that one compilation serves all shapes.
        tokens = -(-(before + length) // 256) * 256
        self.table, [self.cache], _, _, _ = decode_inputs(num_chunks, tokens, 32, 8, 1)
        self.q = torch.randn(num_chunks * length, 32, 128, dtype=BF16, device=DEVICE)
        self.out = torch.empty_like(self.q)
        self.blocks = torch.from_numpy(cut_chunks(self.chunks)).to(DEVICE)
        self.flops = 4 * num_chunks * length * (before + length / 2) * 32 * 128

    def __str__(self) -> str:
        behind = f" behind {self.before}" if self.before else ""
        return f"{len(self.chunks)} x {self.length}{behind}"

    def run(
        self, keys: torch.Tensor, values: torch.Tensor, tiles: PrefillTiles, scales: Scales
    ) -> None:
        paged_prefill(
            self.q, keys, values, self.table, self.blocks, self.out, page_size=16, scale=0.1,
            sliding_window=None, scales=scales, tiles=tiles,
        )  # fmt: skip

    def cell(self, took: float) -> str:
        return f"{took:8.1f} us {self.flops / took / 1e6:4.0f}"

    def error(self) -> float:
        """Of some rows of `out`, against float32: the distance over what they should be."""
        found, expected = [], []
        for row, count, before, slot in (self.chunks[0], self.chunks[-1]):
            at = torch.linspace(0, count - 1, 16, device=DEVICE).long()
            pages = self.cache.view(2, -1, 16, 8, 128)[:, self.table[slot].long()]
            keys, values = pages.flatten(1, 2)[:, : before + count].float()
            q = self.q[row + at].float().view(-1, 8, 4, 128)
            scores = torch.einsum("rgsd,xgd->rgsx", q, keys) * 0.1
            unseen = torch.arange(len(keys), device=DEVICE) > (before + at)[:, None]
            weights = scores.masked_fill(unseen[:, None, None], -torch.inf).softmax(-1)
            expected.append(torch.einsum("rgsx,xgd->rgsd", weights, values).reshape(-1, 32, 128))
            found.append(self.out[row + at].float())
        distance = torch.cat(found) - torch.cat(expected)
        return float(distance.norm() / torch.cat(expected).norm())

    def torch_micros(self) -> float:
        """Of torch's flash attention, over keys that do not lie in pages."""
        q = self.q.view(-1, self.length, 32, 128).transpose(1, 2)
        shape = (2, len(self.chunks), 8, self.before + self.length, 128)
        k, v = torch.randn(shape, dtype=BF16, device=DEVICE)
        if not self.before:
            attend = functional.scaled_dot_product_attention
            return micros(lambda i: attend(q, k, v, is_causal=True, enable_gqa=True), 3)
        k, v = (each.repeat_interleave(4, 1) for each in (k, v))
        mask = causal_lower_right(self.length, self.before + self.length)
        return micros(lambda i: functional.scaled_dot_product_attention(q, k, v, mask), 3)


def show_prefill() -> None:
    print("prefill attention: us, TFLOP/s, error by (rows, tokens, stages, warps, registers)")
    for shape in PREFILL_SHAPES:
        prefill = Prefill(*shape)
        print(f"  {prefill}")
        for tiles in PREFILL_TILES:
            prefill.out.zero_()
            took = micros(lambda i: prefill.run(*prefill.cache, tiles, NO_SCALES), 3)
            error = prefill.error()
            if not error < 0.01:
                raise ValueError(f"{tuple(tiles)} are off by {error}: what is attended is wrong")
            print(f"    {prefill.cell(took)} {error:.4f}  {tuple(tiles)}", flush=True)
        print(f"    {prefill.cell(prefill.torch_micros())} torch", flush=True)


def show_e4m3(rate: float) -> None:
    """Attention from a cache of eight bits: half the bytes, and each number is converted."""
    print("e4m3: us (TB/s / copy for decodes, TFLOP/s for prefill) by (stages, warps, registers)")
    num_sms = torch.cuda.get_device_properties(DEVICE).multi_processor_count
    scales = Scales(1.0, 1.0)
    options = {"page_size": 16, "scale": 0.1, "sliding_window": None}
    for num_seqs, length, heads in (
        (1, 1088, 32), (1, 6000, 32), (32, 1088, 32), (128, 1088, 32), (256, 1000, 16),
    ):  # fmt: skip
        copies = int(max(2, min(40, 600 // (num_seqs * length * 0.004))))
        table, caches, q, slots, positions = decode_inputs(num_seqs, length, heads, 8, copies)
        stored = [[to_e4m3(part, 1.0) for part in cache] for cache in caches]
        out = torch.empty_like(q)
        counters = torch.zeros(num_seqs * 8, dtype=torch.int32, device=DEVICE)
        cut = cut_sequences(positions, num_shares_of(8, num_sms), sliding_window=None)
        shared = (table, slots, positions, cut, out, counters)
        size = 2 * num_seqs * length * 8 * 128 / 1e6
        cells = []
        for stages, warps, registers in ((2, 4, None), (2, 4, 112), (2, 8, None), (2, 8, 64)):
            took = micros(
                lambda i: paged_decode(
                    q, *stored[i], *shared, **options, scales=scales, num_stages=stages,
                    num_warps=warps, max_registers=registers,
                ),
                copies,
            )  # fmt: skip
            cells.append(f"{took:7.1f} ({size / took / rate:.2f}) {stages} {warps} {registers}")
        took = micros(lambda i: paged_decode(q, *caches[i], *shared, **options), copies)
        cells.append(f"bf16 {took:7.1f} ({2 * size / took / rate:.2f})")
        print(f"  {num_seqs} x {length}, {heads}/8 heads: {'; '.join(cells)}", flush=True)
    for shape in PREFILL_SHAPES[:2]:
        prefill = Prefill(*shape)
        stored = [to_e4m3(part, 1.0) for part in prefill.cache]
        cells = []
        for tiles in (*PREFILL_TILES[:2], *PREFILL_TILES[3:5], PrefillTiles(128, 64, 3, 8)):
            took = micros(lambda i: prefill.run(*stored, tiles, scales), 3)
            cells.append(f"{prefill.cell(took)} {tuple(tiles)}")
        took = micros(lambda i: prefill.run(*prefill.cache, LARGE_TILES, NO_SCALES), 3)
        cells.append(f"bf16 {prefill.cell(took)}")
        print(f"  prefill {prefill}: {'; '.join(cells)}", flush=True)


def show_rows(rate: float) -> None:
    print("rows: us (TB/s / copy)")
    for rows, width in ((1, 1024), (1, 4096), (128, 4096), (8192, 4096)):
        count = max(2, min(20, 2**30 // (rows * width * 8)))
        x = torch.randn(count, rows, width, dtype=BF16, device=DEVICE)
        residual, weight = torch.randn_like(x), torch.ones(width, dtype=BF16, device=DEVICE)
        took = micros(lambda i: add_rms_norm(x[i], residual[i], weight, eps=1e-6), count)
        size = rows * width * 8 / 1e6
        gate = torch.randn(count, rows, 2 * width, dtype=BF16, device=DEVICE)
        silu = micros(lambda i: silu_multiply(gate[i]), count)
        print(
            f"  {rows} x {width}: add_rms_norm {took:.1f} ({size / took / rate:.2f})"
            f"  silu_multiply {silu:.1f} ({rows * width * 6 / 1e6 / silu / rate:.2f})",
            flush=True,
        )


def main() -> None:
    rate = copy_rate()
    print(f"device copy: {rate:.2f} TB/s, read and written")
    parts: dict[str, Callable[[], None]] = {
        "rows": lambda: show_rows(rate),
        "linear": lambda: show_linear(rate),
        "decode": lambda: show_decode(rate),
        "prefill": show_prefill,
        "e4m3": lambda: show_e4m3(rate),
    }
    for name in sys.argv[1:] or parts:
        parts[name]()


if __name__ == "__main__":
    main()
