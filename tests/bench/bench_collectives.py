"""Every way to sum a few rows over 2 to 8 GPUs of one machine, timed in CUDA graphs and checked.

    python -m tests.bench.bench_collectives                 # 2 GPUs, hidden 4096, bfloat16
    python -m tests.bench.bench_collectives --world 4 --hidden 2048 --limit-s 60

One JSON line a size: microseconds of NCCL from ordinary memory (`ring`) and from the symmetric
arena (`symmetric`), of torch's `one_shot` and `two_shot`, of our `push`, and which is `best`; null
where a way does not take so much, or gave a wrong sum on any rank. Then, for few rows, `fused`
(sum, residual and norm in one kernel) beside `apart` (the best sum, then one kernel for the rest),
with the largest difference from a dense reference in float32. The last lines say what could not be
set up, and how long it took.

The ranks are processes that this one starts; they are ended at the time limit.
"""

import argparse
import json
import math
import multiprocessing
import multiprocessing.connection
import queue
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.push_reduce import push_reduce_rms_norm
from kernels.rms_norm import add_rms_norm, add_rms_norm_reference
from parallel.arena import Need, lay_out
from parallel.collectives import all_reduce
from parallel.groups import Group, build_groups, connect_torch
from parallel.layout import Layout
from parallel.peer_memory import ROWS, PeerMemory, measure, open_sums
from parallel.symmetric import nccl_version, place_in_slot

FUSED_ROWS = (1, 2, 8, 32, 128)
EPS = 1e-6


def run_rank(rank: int, world: int, hidden: int, store: str, said: Any) -> None:
    """A rank; the first one says what it found."""
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl", init_method=f"file://{store}", rank=rank, world_size=world,
        timeout=timedelta(seconds=40), device_id=device,
    )  # fmt: skip
    layout = Layout(tp_size=world)
    groups = build_groups(layout, rank, connect_torch(range(world), rank, timedelta(seconds=40)))
    dtype, lines = torch.bfloat16, []
    plan = lay_out([Need("reduced", ("tp",), max(ROWS) * hidden * dtype.itemsize)], layout)
    groups.arena.open(plan, groups.by_name(), device, is_strict=False)
    open_sums([groups.tp], device, hidden, dtype, lines.append)
    table, peers = groups.tp.sums.table, groups.tp.sums.peers
    if table is None:
        raise RuntimeError("nothing was measured")
    again = measure(
        groups.tp, peers if isinstance(peers, PeerMemory) else None, device, hidden, dtype
    )
    for at, size in enumerate(table.sizes):
        figures = {
            path: finite(min(micros[at], again.micros[path][at]))
            for path, micros in table.micros.items()
        }
        line = {"op": "all_reduce", "rows": size // (hidden * dtype.itemsize), "bytes": size}
        say(said, rank, line | figures | {"best": table.best(size)})
    if isinstance(peers, PeerMemory):
        for num_rows in FUSED_ROWS:
            say(said, rank, fused(groups.tp, peers, num_rows, hidden, device))
    about = {"torch": torch.__version__, "nccl": nccl_version(), "world": world, "hidden": hidden}
    gpu = torch.cuda.get_device_name(device)
    say(said, rank, {"gpu": gpu, "said": lines} | about)
    torch.cuda.synchronize(device)
    dist.barrier()
    dist.destroy_process_group()


def say(said: Any, rank: int, line: dict[str, Any]) -> None:
    if rank == 0:
        said.put(line)


def finite(micros: float) -> float | None:
    return round(micros, 2) if math.isfinite(micros) else None


def fused(
    group: Group, peers: PeerMemory, num_rows: int, hidden: int, device: torch.device
) -> dict[str, Any]:
    """The kernel that does all beside the best sum and a norm, and how far each is from dense."""
    generator = torch.Generator(device).manual_seed(num_rows)
    every_WTD = torch.randn(group.size, num_rows, hidden, generator=generator, device=device)
    every_WTD = every_WTD.to(torch.bfloat16)
    weight_D = torch.rand(hidden, generator=generator, device=device).to(torch.bfloat16)
    stream_TD = torch.randn(num_rows, hidden, generator=generator, device=device).to(torch.bfloat16)
    total_TD = every_WTD.float().sum(0)
    reference_TD = add_rms_norm_reference(total_TD, stream_TD.float(), weight_D.float(), eps=EPS)

    def in_one(x_TD: Tensor) -> Tensor:
        return push_reduce_rms_norm(x_TD, stream_now, weight_D, peers.inbox, eps=EPS)

    def one_by_one(x_TD: Tensor) -> Tensor:
        place = place_in_slot(group, x_TD.shape, x_TD, op="all_reduce")
        x_TD = x_TD if place is None else place.copy_(x_TD)
        return add_rms_norm(all_reduce(x_TD, group), stream_now, weight_D, eps=EPS)

    line: dict[str, Any] = {"op": "all_reduce+rms_norm", "rows": num_rows}
    for name, way in (("fused", in_one), ("apart", one_by_one)):
        stream_now = stream_TD.clone()
        out_TD = way(every_WTD[group.rank].clone())
        line[f"{name}_error"] = round((out_TD.float() - reference_TD).abs().max().item(), 5)
        line[name] = finite(in_graph(way, every_WTD[group.rank].clone(), device))
    group.ledger.cut()
    return line


def in_graph(way: Callable[[Tensor], Tensor], x_TD: Tensor, device: torch.device) -> float:
    """Microseconds of a call among twenty."""
    x_TD.zero_()
    way(x_TD)
    torch.cuda.synchronize(device)
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)
    with torch.cuda.stream(side):
        graph.capture_begin(capture_error_mode="thread_local")
        for _ in range(20):
            way(x_TD)
        graph.capture_end()
    graph.replay()
    times = []
    for _ in range(5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / 20)
    return min(times)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.bench_collectives")
    parser.add_argument("--world", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--limit-s", type=float, default=60.0)
    args = parser.parse_args(argv)
    count = torch.cuda.device_count()
    if count < args.world:
        print(f"{args.world} GPUs are needed and there are {count}", file=sys.stderr)
        return 2
    began = time.monotonic()
    context = multiprocessing.get_context("spawn")
    said = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            context.Process(
                target=run_rank, args=(rank, args.world, args.hidden, f"{folder}/store", said)
            )
            for rank in range(args.world)
        ]
        for process in ranks:
            process.start()
        while any(process.is_alive() for process in ranks):
            if time.monotonic() - began > args.limit_s:
                break
            show_all(said, 0.2)
        show_all(said, 0.2)
        late = [rank for rank, process in enumerate(ranks) if process.is_alive()]
        for process in ranks:
            process.kill()
            process.join()
    failed = [rank for rank, process in enumerate(ranks) if process.exitcode]
    seconds = round(time.monotonic() - began, 1)
    print(json.dumps({"wall_s": seconds, "late": late, "failed": failed}))
    return 1 if failed or late else 0


def show_all(said: Any, wait_s: float) -> None:
    """Print what the first rank has said, waiting a little for it."""
    while True:
        try:
            print(json.dumps(said.get(timeout=wait_s)), flush=True)
        except queue.Empty:
            return


if __name__ == "__main__":
    sys.exit(main())
