"""Steps of decodes and a chunk of a prompt: launched kernel by kernel, and replayed from a graph.

    python -m tests.bench.bench_prefill_graphs --model 8b
    python -m tests.bench.bench_prefill_graphs --model 30b-a3b --decodes 8 --chunks 32 480
    python -m tests.bench.bench_prefill_graphs --model 8b --set '{"kv_cache_dtype": "fp8_e4m3"}'

One GPU, random weights, no driver. For each length of the chunk the same steps run three times from
the same prompts: launched, replayed, launched again (A, B, A). A step lets a prompt in, reads it
whole beside the decodes, and lets it go in the next. Medians in microseconds: `launch`, the host's
time for a step; `step`, from one step's tokens to the next's with two under way; `busy`, the time
in which a kernel ran. `same` is the share of tokens that are those of the first time; where it is
not 1 for the last run, which is launched too, that is noise. With random weights two tokens are
often nearly as likely, and a request that has once gone another way stays on it. One line of JSON
for each run.

On a CPU (`--device cpu --model ""`, and TRITON_INTERPRET=1) it shows that it works, and no times.
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from deployments.presets import PRESETS, write_preset
from parallel.groups import single_rank_groups
from parallel.layout import Layout
from parallel.padding import choose_prompt_bucket
from tests.headers import header_of
from workers import bundled
from workers.config import EngineConfig
from workers.protocol import Admit, Body, Mode, Sampling, pack
from workers.runner import ModelRunner
from workers.step_times import Span, gpu_figures

NUM_WARM, NUM_PROFILED = 4, 8
GREEDY = Sampling(temperature=0.0)


class Case(NamedTuple):
    decodes: int
    context: int
    chunk: int
    steps: int
    """That are timed."""

    @property
    def num_steps(self) -> int:
        return NUM_WARM + self.steps + NUM_PROFILED

    @property
    def longest(self) -> int:
        """Tokens of the first request: it decodes beside the others' prompts, and then in steps."""
        return self.context + self.decodes + self.num_steps


class Steps:
    """Makes a case's bodies: always the same ones, each request on pages of its own."""

    def __init__(self, case: Case, page_size: int, vocab_size: int) -> None:
        self._case, self._page_size = case, page_size
        self._ids = range(3, min(10_000, vocab_size))
        self._pages_a_slot = -(-case.longest // page_size)

    @property
    def num_pages(self) -> int:
        return self._case.decodes * self._pages_a_slot + -(-self._case.chunk // self._page_size)

    def prompts(self) -> Iterator[Body]:
        """One a step, of the requests that will decode."""
        for slot in range(self._case.decodes):
            pages = range(slot * self._pages_a_slot, (slot + 1) * self._pages_a_slot)
            yield self._reading(slot, self._case.context, pages)

    def chunk(self, number: int) -> Body:
        case, slot = self._case, self._case.decodes
        first = case.decodes * self._pages_a_slot
        return self._reading(
            slot, case.chunk, range(first, self.num_pages), seed=number + 1,
            leaves=pack([slot]) if number else b"",
        )  # fmt: skip

    def _reading(
        self, slot: int, length: int, pages: range, *, seed: int = 0, leaves: bytes = b""
    ) -> Body:
        draw = random.Random(1000 * slot + seed)
        tokens = pack(draw.choices(self._ids, k=length))
        return Body(
            leaves=leaves,
            admits=(Admit(slot, tokens, length, 0, pack(pages), GREEDY),),
            chunk_slots=pack([slot]),
            chunk_lengths=pack([length]),
        )


class Run(NamedTuple):
    figures: dict[str, Any]
    tokens: list[int]


def run(runner: ModelRunner, case: Case, steps: Steps, *, by_graph: bool) -> Run:
    """From prompts to the last step; the runner is left without requests."""
    for number, body in enumerate(steps.prompts()):
        told = header_of((number + case.context,), (number + 1,))
        runner.finish(runner.launch(told, body, 0))
    num_rows = case.decodes + case.chunk
    bucket = choose_prompt_bucket((num_rows,), (1,), runner.prompt_buckets) if by_graph else 0
    if by_graph and not bucket:
        raise SystemExit(f"no graph holds {num_rows} rows: there are {runner.prompt_buckets}")
    told = header_of((num_rows,), (case.decodes + 1,), bucket=bucket, mode=Mode.MIXED)
    launches: list[float] = []
    ends: list[float] = []
    tokens: list[int] = []
    under_way = []
    recorded = profile(activities=[ProfilerActivity.CUDA]) if torch.cuda.is_available() else None
    for number in range(case.num_steps):
        if recorded is not None and number == NUM_WARM + case.steps:
            torch.cuda.synchronize()
            recorded.start()
        began = time.perf_counter()
        under_way.append(runner.launch(told, steps.chunk(number), 0))
        launches.append(time.perf_counter() - began)
        if len(under_way) == 2:
            tokens += runner.finish(under_way.pop(0)).ids.tolist()
            ends.append(time.perf_counter())
    tokens += runner.finish(under_way.pop()).ids.tolist()
    figures: dict[str, Any] = {"bucket": bucket}
    timed = slice(NUM_WARM, NUM_WARM + case.steps)
    gaps = [later - sooner for sooner, later in pairwise(ends)]
    figures["launch"] = round(statistics.median(launches[timed]) * 1e6)
    figures["step"] = round(statistics.median(gaps[timed]) * 1e6)
    if recorded is not None:
        torch.cuda.synchronize()
        recorded.stop()
        spans = [
            Span(event.time_range.start, event.time_range.end, event.name)
            for event in recorded.events() or ()
            if event.device_type.name == "CUDA"
        ]
        gpu = gpu_figures(spans, NUM_PROFILED)
        figures["busy"] = round(statistics.median(gpu["busy"]))
        figures["kernels"] = [
            [name[:60], round(micros, 1), round(count, 1)] for name, micros, count in gpu["kernels"]
        ]
    slots = range(case.decodes + 1)
    runner.finish(runner.launch(header_of((0,)), Body(leaves=pack(slots)), 0))
    return Run(figures, tokens)


def measure(args: argparse.Namespace, folder: Path) -> None:
    cases = [Case(args.decodes, args.context, chunk, args.steps) for chunk in args.chunks]
    most = max(args.decodes + chunk for chunk in args.chunks)
    chosen: dict[str, Any] = {
        "model": str(write_preset(args.model, folder) if args.model else bundled.path()),
        "load_format": "dummy" if args.model else "auto",
        "max_num_seqs": max(64, args.decodes + 1) if args.model else args.decodes + 1,
        "max_num_batched_tokens": max(args.context + args.decodes, most),
        "max_model_len": max(cases[0].longest, most),
        "prefill_graph_max_tokens": max(512, most) if args.model else most,
    }
    device = torch.device(args.device)
    if device.type == "cpu":
        chosen["kv_cache_gb"] = 0.05
    began = time.perf_counter()
    runner = ModelRunner(
        EngineConfig(**chosen | json.loads(args.set)),
        Layout(),
        0,
        single_rank_groups(),
        device,
        lambda stage, done, total: None,
        use_kernels=True,
    )
    page_size = EngineConfig(**chosen | json.loads(args.set)).page_size
    every = [Steps(case, page_size, runner.vocab_size) for case in cases]
    runner.allocate(max(steps.num_pages for steps in every))
    print(f"ready after {time.perf_counter() - began:.1f} s", file=sys.stderr, flush=True)
    for case, steps in zip(cases, every, strict=True):
        first: list[int] = []
        for by_graph in (False, True, False):
            figures, tokens = run(runner, case, steps, by_graph=by_graph)
            first = first or tokens
            same = sum(a == b for a, b in zip(first, tokens, strict=True)) / len(first)
            about = {"decodes": case.decodes, "context": case.context, "chunk": case.chunk}
            how = "replayed" if by_graph else "launched"
            kernels = figures.pop("kernels", [])
            line = about | {"how": how, "same": round(same, 4)} | figures
            if args.kernels:
                line["kernels"] = kernels
            print(json.dumps(line), flush=True)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m tests.bench.bench_prefill_graphs", description=__doc__.splitlines()[0]
    )
    choices = (*PRESETS, "")
    made.add_argument("--model", default="8b", choices=choices, help="nothing is the bundled one")
    made.add_argument("--decodes", type=int, default=32)
    made.add_argument("--context", type=int, default=1024, help="tokens behind each decode")
    made.add_argument("--chunks", type=int, nargs="+", default=[32, 128, 256, 480])
    made.add_argument("--steps", type=int, default=20, help="that are timed, in each run")
    made.add_argument("--kernels", action="store_true", help="name the longest kernels of a step")
    made.add_argument("--set", default="{}", help="further settings, as JSON")
    made.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    return made


def main(argv: Sequence[str] | None = None) -> None:
    with tempfile.TemporaryDirectory() as folder:
        measure(parser().parse_args(argv), Path(folder))


if __name__ == "__main__":
    main()
