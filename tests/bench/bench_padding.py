"""Rows of attention replicas, padded by the rule and by measured cost: what each choice takes.

    python -m tests.bench.bench_padding --world 2                     # over gloo
    python -m tests.bench.bench_padding --world 2 --device cuda --model 30b-a3b --layers 12

Ranks are processes of their own, each an attention replica with a `ModelRunner` and no driver. They
measure their curves as at an engine's start. Then each count vector's step is run padded in every
mode, one mode after another and all over again, so that what else the machine does falls on all
alike. One JSON line a vector: what the rule and the cost model choose, milliseconds of each mode
(the slowest rank's; the quickest round, and the median), and what the model predicts for the part
that padding changes. The last line: all vectors' time as the model chooses over that of the rule,
and of the rule's choice over the same measured again, which is noise; both with 95 % intervals over
rounds. And how often each choice was within 3 % of the best, by quickest rounds.

A vector is of prompts, one a replica, or of decodes: that many requests of one token each. On GPUs
decodes are replayed from graphs and nothing is chosen, so they are left out.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import FileStore  # pyright: ignore[reportPrivateImportUsage]

from deployments.bench import PRESETS
from deployments.domain import PADDING
from parallel.groups import build_groups, connect_torch
from parallel.padding import Padded, PaddingMode, pad_rows, slots_move_less
from parallel.padding_cost import MODES, PaddingCosts, PaddingCurves, pad_by_cost, slowest
from tests.bench.results import ratio_interval
from tests.headers import header_of
from workers.config import EngineConfig, rank_environment
from workers.protocol import Admit, Body, Mode, Sampling, pack
from workers.runner import ModelRunner

PAGE = 16
WITHIN = 1.03


class Vector(NamedTuple):
    rows: tuple[int, ...]
    has_prompts: bool

    @property
    def name(self) -> str:
        return f"{'prompts' if self.has_prompts else 'decodes'} {' '.join(map(str, self.rows))}"


def vectors(world: int, most: int, *, decodes: bool) -> list[Vector]:
    """Alike but for a few rows, half of them idle, one alone; of several lengths."""
    shapes = [
        lambda n: (n,) * (world - 1) + (n - max(1, n // 50),),
        lambda n: tuple(n * (place + 1) // world for place in range(world)),
        lambda n: (n,) * (world // 2) + (0,) * (world - world // 2),
        lambda n: (n,) + (0,) * (world - 1),
    ]
    found = [Vector(shape(n), True) for n in (16, 128, most) for shape in shapes]
    if decodes:
        found += [Vector(shape(n), False) for n in (4, 32) for shape in shapes[:1] + shapes[2:]]
    return list(dict.fromkeys(found))


class Steps:
    """Steps of one rank's runner, each of new requests alone."""

    def __init__(self, runner: ModelRunner, rank: int, num_pages: int) -> None:
        self._runner, self._rank, self._num_pages = runner, rank, num_pages
        self._taken = 0

    def run(self, vector: Vector, padded: Padded) -> float:
        """Seconds of a step."""
        count = vector.rows[self._rank]
        lengths = [count] if vector.has_prompts and count else [1] * count
        admits, page = [], 0
        for slot, length in enumerate(lengths):
            num = -(-(length + 1) // PAGE)
            tokens = pack([3 + 7 * place % 200 for place in range(length)])
            pages = pack(range(page, page + num))
            admits.append(Admit(slot, tokens, length, 0, pages, Sampling(temperature=0.0)))
            page += num
        body = Body(
            leaves=pack(range(self._taken)),
            admits=tuple(admits),
            chunk_slots=pack(range(len(lengths))),
            chunk_lengths=pack(lengths),
        )
        self._taken = len(lengths)
        logit_rows = tuple(min(n, 1) if vector.has_prompts else n for n in vector.rows)
        padding = PADDING[padded.mode]
        header = header_of(
            vector.rows, logit_rows, padded_rows=padded.rows, mode=Mode.EXTEND, padding=padding
        )
        dist.barrier()
        began = time.perf_counter()
        self._runner.finish(self._runner.launch(header, body, self._rank))
        return time.perf_counter() - began


def run_rank(args: argparse.Namespace, rank: int) -> None:
    device = torch.device("cuda", rank) if args.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    store = FileStore(f"{args.folder}/store", args.world)
    backend = "nccl" if device.type == "cuda" else "gloo"
    limit = timedelta(seconds=args.limit_s)
    dist.init_process_group(
        backend, store=store, rank=rank, world_size=args.world, timeout=limit,
        device_id=device if device.type == "cuda" else None,
    )  # fmt: skip
    every = EngineConfig(
        tp_size=args.world, dp_size=args.world, enable_dp_attention=True, padding="auto",
        device=args.device, page_size=PAGE, max_num_seqs=64, max_num_batched_tokens=args.most,
        max_model_len=args.most + PAGE, kv_cache_gb=args.cache_gb, **json.loads(args.set),
    )  # fmt: skip
    if args.model:
        every = msgspec.structs.replace(every, model=args.folder, load_format="dummy")
    layout = every.layout
    groups = build_groups(layout, rank, connect_torch(range(args.world), rank, limit))
    began = time.perf_counter()
    runner = ModelRunner(every, layout, rank, groups, device, lambda stage, done, total: None)
    curves, loading_s = runner.padding_curves, time.perf_counter() - began
    if curves is None:
        raise ValueError("the plan exchanges no rows between replicas: nothing to compare")
    num_pages = min(64 + 2 * args.most // PAGE, runner.max_pages)
    runner.allocate(num_pages)
    groups.arena.seal()
    everyone = gathered(curves, args.world, store, rank)
    agreed = slowest(everyone)
    if agreed is None:
        raise ValueError("ranks have measured other sizes")
    costs = PaddingCosts(agreed, attn_tp=1, attn_cp=1)
    if rank == 0:
        say({"curves": agreed._asdict(), "loading_s": round(loading_s, 2)})
    compare(args, costs, Steps(runner, rank, num_pages), rank)
    dist.barrier()
    dist.destroy_process_group()


def gathered(mine: PaddingCurves, world: int, store: FileStore, rank: int) -> list[PaddingCurves]:
    store.set(f"curves{rank}", msgspec.json.encode(mine).decode())
    found = [store.get(f"curves{other}") for other in range(world)]
    return [msgspec.json.decode(one, type=PaddingCurves) for one in found]


def compare(args: argparse.Namespace, costs: PaddingCosts, steps: Steps, rank: int) -> None:
    """Every vector's step in every mode, and in the rule's once more, in turn."""
    every = vectors(args.world, args.most, decodes=args.device == "cpu")
    totals = torch.zeros(3, args.rounds, dtype=torch.float64)  # rule, rule again, model
    good = {"rule": 0, "model": 0}
    for vector in every:
        modes = [
            pad_rows(vector.rows, has_prompts=True, row_multiple=1, mode=mode) for mode in MODES
        ]
        by_rule = pad_rows(vector.rows, has_prompts=vector.has_prompts, row_multiple=1)
        rule = MODES.index(way_of(by_rule))
        model = MODES.index(pad_by_cost(vector.rows, costs, row_multiple=1).mode)
        turns = [*modes, modes[rule]]
        seconds = torch.zeros(args.rounds, len(turns))
        for padded in turns:
            steps.run(vector, padded)
        for number in range(args.rounds):
            for place, padded in enumerate(turns):
                seconds[number, place] = steps.run(vector, padded)
        on_device = seconds.to(args.device)
        dist.all_reduce(on_device, op=dist.ReduceOp.MAX)
        took = on_device.cpu() * 1e3
        again = took[:, -1]
        totals += torch.stack([took[:, rule], again, again if model == rule else took[:, model]])
        quickest = took.min(0).values.tolist()
        for who, mode in (("rule", rule), ("model", model)):
            good[who] += quickest[mode] <= WITHIN * min(quickest[:-1])
        if rank == 0:
            say({
                "case": vector.name,
                "rule": MODES[rule],
                "model": MODES[model],
                "quickest_ms": named(quickest),
                "median_ms": named(took.median(0).values.tolist()),
                "predicted_ms": named([costs.of(padded) / 1e3 for padded in modes]),
            })  # fmt: skip
    if rank == 0:
        once, again, model = totals
        say({
            "model_to_rule": interval(model / once),
            "rule_to_itself": interval(again / once),
            "within_3_percent": good,
            "of": len(every),
        })  # fmt: skip


def named(figures: Sequence[float]) -> dict[str, float]:
    return {mode: round(each, 2) for mode, each in zip(MODES, figures, strict=False)}


def interval(ratios: Tensor) -> list[float]:
    """Low, mean, high of the rounds' ratios of all vectors together."""
    return [round(each, 3) for each in ratio_interval(ratios.tolist())]


def way_of(padded: Padded) -> PaddingMode:
    """The mode with its way, as `RowSplit` works it out."""
    if padded.mode != "sum_len":
        return padded.mode
    moves_less = slots_move_less(len(padded.rows), max(padded.rows), sum(padded.rows))
    return "sum_slots" if moves_less else "sum_buffer"


def say(line: dict[str, Any]) -> None:
    print(json.dumps(line), flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.bench_padding")
    parser.add_argument("--world", type=int, default=4)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", default="", help="a preset with random weights; else bundled")
    parser.add_argument("--layers", type=int, default=12, help="of a preset")
    parser.add_argument("--most", type=int, default=512, help="rows of the longest replica")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--cache-gb", type=float, default=0.1)
    parser.add_argument("--set", default="{}", help="more settings, as JSON")
    parser.add_argument("--limit-s", type=float, default=300.0)
    parser.add_argument("--rank", type=int, default=-1, help=argparse.SUPPRESS)
    parser.add_argument("--folder", default="", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.rank >= 0:
        run_rank(args, args.rank)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        if args.model:
            config = PRESETS[args.model] | {"num_hidden_layers": args.layers}
            (Path(folder) / "config.json").write_text(json.dumps(config))
        command = [
            sys.executable, "-m", "tests.bench.bench_padding",
            *(sys.argv[1:] if argv is None else argv), "--folder", folder,
        ]  # fmt: skip
        ranks = [
            subprocess.Popen([*command, "--rank", str(rank)], env=rank_environment())
            for rank in range(args.world)
        ]
        deadline = time.monotonic() + args.limit_s
        try:
            return max(abs(rank.wait(max(1.0, deadline - time.monotonic()))) for rank in ranks)
        finally:
            for rank in ranks:
                if rank.poll() is None:
                    rank.kill()


if __name__ == "__main__":
    sys.exit(main())
