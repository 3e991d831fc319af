"""Attention over a latent on a GPU, kernel by kernel, in microseconds and as a share of the memory.

    python -m tests.bench.bench_latent                 16 heads, as DeepSeek-V2-Lite on one GPU
    python -m tests.bench.bench_latent --heads 128     as DeepSeek-V3's heads on one GPU

Sizes are DeepSeek's: a latent of 512, 64 rotated numbers, an indexer of 64 heads of 128 numbers,
2048 tokens read. A decode's bytes are the rows that it reads once; of chunks the rate is of
products, 2 * (576 + 512) for each head and token seen.
"""

import argparse
from collections.abc import Callable
from functools import partial

import torch
from triton.testing import do_bench

from kernels.index_scores import index_scores
from kernels.paged_latent import (
    choose_latent_split,
    cut_latent_chunks,
    latent_chunks,
    latent_rows,
)

RANK, TURNED, INDEX_HEADS, INDEX_DIM, NUM_CHOSEN, PAGE = 512, 64, 64, 128, 2048, 16
WIDTH = RANK + TURNED


def microseconds(run: Callable[[], object]) -> float:
    return 1000 * float(do_bench(run, warmup=50, rep=200))  # pyright: ignore[reportArgumentType]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--heads", type=int, default=16)
    heads = parser.parse_args().heads
    kind = {"dtype": torch.bfloat16, "device": "cuda"}
    num_programs = 2 * torch.cuda.get_device_properties(0).multi_processor_count
    print("kernel     rows  tokens        us")
    for num_rows, length in ((1, 1024), (1, 32768), (32, 1024), (32, 8192), (128, 8192)):
        num_pages = -(-length // PAGE)
        table = torch.randperm(num_rows * num_pages, device="cuda").int().view(num_rows, num_pages)
        rows = torch.randn(num_rows * num_pages * PAGE, WIDTH, **kind)
        q, out = (
            torch.randn(num_rows, heads, WIDTH, **kind),
            torch.empty(num_rows, heads, RANK, **kind),
        )
        slots = torch.arange(num_rows, device="cuda")
        positions = torch.full((num_rows,), length - 1, device="cuda")
        split = choose_latent_split(num_rows, heads, length, q.dtype, num_programs=num_programs)
        read = partial(
            latent_rows, q, rows, table, slots, positions, out, page_size=PAGE, split=split,
            scale=0.1,
        )  # fmt: skip
        took = microseconds(read)
        rate = num_rows * length * WIDTH * 2 / took / 1e6
        how = f"{rate:.2f} TB/s, {split.num_splits} parts"
        print(f"decode   {num_rows:6d}{length:8d}{took:10.1f}   {how}")
        if length <= NUM_CHOSEN:
            continue
        keys = torch.randn(len(rows), INDEX_DIM, **kind)
        index_q = torch.randn(num_rows, INDEX_HEADS, INDEX_DIM, **kind)
        weight = torch.randn(num_rows, INDEX_HEADS, device="cuda")
        score = partial(
            index_scores, index_q, weight, keys, table, slots, positions, num_tokens=length,
            page_size=PAGE,
        )  # fmt: skip
        scores = score()
        best = scores.topk(NUM_CHOSEN, dim=1).indices
        print(f"scores   {num_rows:6d}{length:8d}{microseconds(score):10.1f}")
        choose = partial(torch.topk, scores, NUM_CHOSEN, dim=1)
        print(f"topk     {num_rows:6d}{length:8d}{microseconds(choose):10.1f}")
        split = choose_latent_split(num_rows, heads, NUM_CHOSEN, q.dtype, num_programs=num_programs)
        sparse = partial(read, split=split, chosen_TK=best)
        print(f"sparse   {num_rows:6d}{length:8d}{microseconds(sparse):10.1f}")
    for num_rows, start in ((1024, 0), (8192, 0), (2048, 30720)):
        length = start + num_rows
        table = torch.randperm(length // PAGE, device="cuda").int().view(1, -1)
        rows, q = torch.randn(length, WIDTH, **kind), torch.randn(num_rows, heads, WIDTH, **kind)
        out = torch.empty(num_rows, heads, RANK, **kind)
        blocks = cut_latent_chunks([(0, num_rows, start, 0)], heads, q.dtype)
        blocks_M4 = torch.from_numpy(blocks).cuda()
        took = microseconds(
            partial(latent_chunks, q, rows, table, blocks_M4, out, page_size=PAGE, scale=0.1)
        )
        seen = num_rows * (start + num_rows / 2)
        rate = seen * heads * 2 * (WIDTH + RANK) / took / 1e6
        print(f"chunk    {num_rows:6d}{length:8d}{took:10.1f}   {rate:.0f} TFLOP/s")


if __name__ == "__main__":
    main()
