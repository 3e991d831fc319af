"""What a decode step costs on a GPU, without driver or sockets, and where its time goes.

    python -m tests.bench.bench_gpu_steps 8b 1:128 32:1024 128:1024

For each `rows:context`: milliseconds a step with two steps under way, time of a launch on the host,
and a table of kernels with their share, from torch's profiler over a few steps.
"""

import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from deployments.bench import PRESETS
from parallel.groups import single_rank_groups
from parallel.layout import Layout
from workers.config import EngineConfig
from workers.protocol import Admit, Body, Header, Sampling, pack
from workers.runner import ModelRunner

PAGE = 16
NUM_STEPS = 100


def header(num_rows: int, num_logit_rows: int) -> Header:
    return Header(1, 0, 3, (num_rows,), (num_logit_rows,), 0, (num_rows,), 0, (), b"")


def new_runner(preset: str) -> ModelRunner:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(PRESETS[preset]))
        runner = ModelRunner(
            EngineConfig(model=folder, load_format="dummy", max_model_len=8192, kv_cache_gb=40.0),
            Layout(),
            0,
            single_rank_groups(),
            torch.device("cuda:0"),
            lambda stage, done, total: None,
        )
    runner.allocate(runner.max_pages)
    return runner


def fill(runner: ModelRunner, rows: int, context: int) -> None:
    """Requests of `context` tokens in slots 0 to `rows`, read in steps of 8192 tokens."""
    room = 2 * NUM_STEPS + 40
    pages = -(-(context + room) // PAGE)
    tokens = np.random.default_rng(0).integers(0, 10000, (rows, context))
    at_once = max(1, (8192 - rows) // context)
    for first in range(0, rows, at_once):
        slots = range(first, min(rows, first + at_once))
        admits = tuple(
            Admit(
                slot, pack(tokens[slot]), context, 0, pack(range(slot * pages, (slot + 1) * pages)),
                Sampling(temperature=0.0),
            )
            for slot in slots
        )  # fmt: skip
        body = Body(
            admits=admits, chunk_slots=pack(slots), chunk_lengths=pack([context] * len(slots))
        )
        count = first + len(slots) * context
        runner.finish(runner.launch(header(count, first + len(slots)), body, 0))


def decode(runner: ModelRunner, rows: int, num_steps: int) -> tuple[float, float]:
    """(ms a step, ms of a launch on the host)."""
    torch.cuda.synchronize()
    began, on_host = time.perf_counter(), 0.0
    older = runner.launch(header(rows, rows), Body(), 0)
    for _ in range(num_steps - 1):
        start = time.perf_counter()
        newer = runner.launch(header(rows, rows), Body(), 0)
        on_host += time.perf_counter() - start
        runner.finish(older)
        older = newer
    runner.finish(older)
    return (time.perf_counter() - began) / num_steps * 1e3, on_host / (num_steps - 1) * 1e3


def leave(runner: ModelRunner, rows: int) -> None:
    runner.finish(runner.launch(header(0, 0), Body(leaves=pack(range(rows))), 0))


def kernels_of(runner: ModelRunner, rows: int, num_steps: int = 6) -> None:
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        decode(runner, rows, num_steps)
    spans = sorted(
        (event.time_range.start, event.time_range.end, event.name)
        for event in recorded.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    )
    total, counts, idle = Counter(), Counter(), 0.0
    last = spans[0][0]
    for start, end, name in spans:
        total[name] += end - start
        counts[name] += 1
        idle += max(0.0, start - last)
        last = max(last, end)
    span = last - spans[0][0]
    print(f"  {span / num_steps:.0f} us a step, of which {idle / num_steps:.0f} idle")
    for name, micros in total.most_common(12):
        each = micros / counts[name]
        often = f"{counts[name] / num_steps:6.1f} x {each:7.2f}"
        print(f"  {micros / num_steps:8.1f} us {often}  {name[:90]}")


def main() -> None:
    preset, *cases = sys.argv[1:]
    began = time.perf_counter()
    runner = new_runner(preset)
    print(f"{preset}: up after {time.perf_counter() - began:.1f} s", flush=True)
    for case in cases:
        rows, context = map(int, case.split(":"))
        fill(runner, rows, context)
        decode(runner, rows, 20)
        step_ms, host_ms = decode(runner, rows, NUM_STEPS)
        print(f"{preset} {case}: {step_ms:.3f} ms a step, {host_ms:.3f} ms a launch", flush=True)
        kernels_of(runner, rows)
        leave(runner, rows)


if __name__ == "__main__":
    main()
