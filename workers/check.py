"""`lockstep check`: every collective of a layout, over real communicators, proved to be symmetric.

    python -m workers.check --world 2 --json result.json

starts one process a rank, opens a symmetric arena as an engine does, and makes every kind of
collective over every group of the layout, eagerly and in a CUDA graph, each compared with a dense
reference. What it ran on is proved by the name of the kernel that the profiler saw: symmetric
kernels are called `ncclSymkDevKernel_*`. On a CPU there are none, and the ledger's verdict stands
in. At last it does what must not be done, a collective over a twin of the group that the memory was
registered for, and that must be reported; a real engine would raise with `symm_mem_strict`.

It needs torch alone, no Ray and no driver, so it runs on a bare GPU machine. What the ranks print
is one JSON object each; the profiler's trace of the first rank is kept, and `verdicts_of` works the
kernels out of it again.
"""

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import FileStore  # pyright: ignore[reportPrivateImportUsage]

from parallel.arena import Need, SymmetryError, lay_out
from parallel.collectives import (
    all_gather_rows,
    all_reduce,
    reduce_scatter_rows,
    start_all_gather_rows,
)
from parallel.groups import (
    Group,
    Groups,
    Ledger,
    TorchTransport,
    build_groups,
    connect_torch,
)
from parallel.layout import GROUP_NAMES, Layout
from parallel.sums import SumTable
from parallel.symmetric import nccl_version, use_symmetric_memory
from workers.config import rank_environment

SYMMETRIC_KERNEL = "ncclSymkDevKernel_"
TIMEOUT = timedelta(seconds=60)
NUM_ROWS, NUM_REPLAYS = 64, 3
MARK = "lockstep "
"""Begins the profiler's names of cases."""


@dataclass(slots=True)
class Case:
    """One collective over one group, as it went."""

    op: str
    group: str
    members: tuple[int, ...]
    mode: str
    """`eager`, `graph`, or `twin` for the one that must be reported."""
    path: str
    reason: str
    is_correct: bool
    kernel: str = ""
    """What the profiler saw; empty on a CPU."""

    @property
    def name(self) -> str:
        return f"{self.op} {self.group} {self.mode}"

    @property
    def is_good(self) -> bool:
        if self.mode == "twin":
            return self.path == "fallback" and not self.kernel.startswith(SYMMETRIC_KERNEL)
        proved = not self.kernel or self.kernel.startswith(SYMMETRIC_KERNEL)
        return self.is_correct and self.path == "symmetric" and proved


class Sizes(NamedTuple):
    device: torch.device
    dtype: torch.dtype
    width: int


def sizes_for(device: torch.device) -> Sizes:
    if device.type == "cuda":
        return Sizes(device, torch.bfloat16, 4096)
    return Sizes(device, torch.float32, 64)


# A rank


def run_rank(layout: Layout, rank: int, store_path: str, device_name: str) -> dict[str, Any]:
    """All cases of one rank; `trace` is what the profiler saw."""
    device = torch.device(device_name, rank) if device_name == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=FileStore(store_path, layout.world_size),
        rank=rank,
        world_size=layout.world_size,
        timeout=TIMEOUT,
        device_id=device if device.type == "cuda" else None,
    )
    try:
        ranks = layout.domain_ranks(layout.coordinates(rank).domain)
        groups = build_groups(layout, rank, connect_torch(ranks, rank, TIMEOUT))
        twin = twin_of(groups.tp)
        sizes = sizes_for(device)
        began = time.perf_counter()
        open_arena(groups, layout, sizes)
        open_s = time.perf_counter() - began
        with profiled(device) as trace, torch.inference_mode():
            cases = list(run_cases(groups, sizes))
            if twin is not None:
                cases.append(run_twin(groups.tp, twin, sizes))
        rules = broken_rules(groups, device)
        with torch.inference_mode():  # the arena's tensors were made in it
            sums = ways_to_sum(groups, sizes)
    finally:
        dist.destroy_process_group()
    add_kernels(cases, trace)
    return {
        "rank": rank,
        "open_s": round(open_s, 3),
        "cases": [asdict(case) for case in cases],
        "rules": rules,
        "sums": sums,
        "trace": trace,
    }


def ways_to_sum(groups: Groups, sizes: Sizes) -> list[str]:
    """The table of every communicator, as an engine measures it at start; none on a CPU."""
    lines: list[str] = []
    if sizes.device.type != "cuda":
        return lines
    from parallel.peer_memory import open_sums

    every = [group for group in groups.by_name().values() if group.size > 1]
    open_sums(every, sizes.device, sizes.width, sizes.dtype, lines.append)
    tables: list[SumTable] = []
    for group in every:
        table = group.sums.table
        if table is not None and all(table is not one for one in tables):
            tables.append(table)
            lines += [f"{group.name} {group.members}, microseconds in a graph:", *table.lines()]
    return lines


def twin_of(group: Group) -> Group | None:
    """A group with the same members and a communicator of its own, unknown to the arena."""
    if group.size == 1:
        return None
    made = dist.new_group(list(group.members), timeout=TIMEOUT)
    transport = TorchTransport(made) if isinstance(made, dist.ProcessGroup) else None
    return Group("tp", group.members, group.rank, transport, Ledger(), group.arena)


def open_arena(groups: Groups, layout: Layout, sizes: Sizes) -> None:
    """Slots for every group, larger than any case's tensors."""
    needs: list[Need] = []
    for name in GROUP_NAMES:
        part = NUM_ROWS * sizes.width * sizes.dtype.itemsize
        whole = part * len(layout.groups(name)[0])
        needs += [
            Need("reduced", (name,), part),
            Need("gather_in", (name,), part),
            Need("local_dp", (name,), whole),
            Need("scatter_in", (name,), whole),
            Need("scattered", (name,), part),
            Need("cp_in", (name,), part),
            Need("cp_kv", (name,), whole),
        ]
    plan = lay_out(needs, layout)
    groups.arena.open(plan, groups.by_name(), sizes.device, is_strict=False)
    groups.arena.seal()


def run_cases(groups: Groups, sizes: Sizes) -> Iterator[Case]:
    modes = ("eager", "graph") if sizes.device.type == "cuda" else ("eager",)
    for group in groups.by_name().values():
        if group.size > 1:
            for op in OPERATIONS:
                for mode in modes:
                    yield run_case(op, group, mode, sizes)


def run_case(op: str, group: Group, mode: str, sizes: Sizes) -> Case:
    """One collective into and out of the arena, its result compared with every rank's input."""
    operate = OPERATIONS[op]
    run = run_in_graph if mode == "graph" else run_eagerly
    group.ledger.cut()
    got = run(f"{op} {group.name} {mode}", lambda: operate.make(group, sizes), sizes.device)
    call = group.ledger.cut()[-1]
    is_correct = torch.equal(got, operate.expect(group, sizes))
    return Case(op, group.name, group.members, mode, call.path, call.reason, is_correct)


def run_twin(group: Group, twin: Group, sizes: Sizes) -> Case:
    """Memory of the TP group, summed over another communicator with the same members."""
    x = slot_for(group, "reduced", input_of(group.rank, NUM_ROWS, sizes))
    got = run_eagerly("all_reduce tp twin", lambda: all_reduce(x, twin), sizes.device)
    call = twin.ledger.cut()[-1]
    is_correct = torch.equal(got, expect_sum(group, sizes))
    return Case("all_reduce", "tp", twin.members, "twin", call.path, call.reason, is_correct)


def run_eagerly(name: str, make: Callable[[], Tensor], device: torch.device) -> Tensor:
    with torch.profiler.record_function(MARK + name):
        got = make()
        synchronize(device)
    return got


def run_in_graph(name: str, make: Callable[[], Tensor], device: torch.device) -> Tensor:
    """Captured and replayed a few times; only replays are looked at."""
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        make()
    torch.cuda.current_stream(device).wait_stream(side)
    synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = make()
    with torch.profiler.record_function(MARK + name):
        for _ in range(NUM_REPLAYS):
            graph.replay()
        synchronize(device)
    return got.clone()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def input_of(place: int, num_rows: int, sizes: Sizes) -> Tensor:
    """Small integers, exact in every type, that tell members and rows apart."""
    rows = torch.arange(num_rows, device=sizes.device) % 7 + 8 * place
    return rows.to(sizes.dtype).unsqueeze(1).expand(num_rows, sizes.width)


def slot_for(group: Group, role: Any, x: Tensor) -> Tensor:
    """`x` copied to the group's slot."""
    memory = use_symmetric_memory(group, role, op="all_gather")
    if memory is None:
        raise SymmetryError(f"the arena is closed for {group.name}")
    return memory.empty(x.shape, x).copy_(x)


def make_sum(group: Group, sizes: Sizes) -> Tensor:
    return all_reduce(slot_for(group, "reduced", input_of(group.rank, NUM_ROWS, sizes)), group)


def make_gather(group: Group, sizes: Sizes) -> Tensor:
    x = slot_for(group, "gather_in", input_of(group.rank, NUM_ROWS, sizes))
    return all_gather_rows(x, group, role="local_dp")


def make_gather_aside(group: Group, sizes: Sizes) -> Tensor:
    """On a stream of its own, while the main one computes: as keys and values of parts go round."""
    x = slot_for(group, "cp_in", input_of(group.rank, NUM_ROWS, sizes))
    shape = (group.size * NUM_ROWS, sizes.width)
    memory = use_symmetric_memory(group, "cp_kv", op="all_gather")
    out = x.new_empty(shape) if memory is None else memory.empty(shape, x)
    pending = start_all_gather_rows(x, group, out=out)
    x.new_ones(NUM_ROWS, NUM_ROWS).mm(x.new_ones(NUM_ROWS, NUM_ROWS))
    return pending.wait()


def make_scatter(group: Group, sizes: Sizes) -> Tensor:
    x = slot_for(group, "scatter_in", input_of(group.rank, NUM_ROWS * group.size, sizes))
    return reduce_scatter_rows(x, group, role="scattered")


def expect_sum(group: Group, sizes: Sizes) -> Tensor:
    parts = [input_of(place, NUM_ROWS, sizes).float() for place in range(group.size)]
    return torch.stack(parts).sum(0).to(sizes.dtype)


def expect_gather(group: Group, sizes: Sizes) -> Tensor:
    return torch.cat([input_of(place, NUM_ROWS, sizes) for place in range(group.size)])


def expect_scatter(group: Group, sizes: Sizes) -> Tensor:
    whole = [input_of(place, NUM_ROWS * group.size, sizes).float() for place in range(group.size)]
    return torch.stack(whole).sum(0).chunk(group.size)[group.rank].to(sizes.dtype)


class Operation(NamedTuple):
    make: Callable[[Group, Sizes], Tensor]
    expect: Callable[[Group, Sizes], Tensor]


OPERATIONS = {
    "all_reduce": Operation(make_sum, expect_sum),
    "all_gather": Operation(make_gather, expect_gather),
    "gather_aside": Operation(make_gather_aside, expect_gather),
    "reduce_scatter": Operation(make_scatter, expect_scatter),
}


def broken_rules(groups: Groups, device: torch.device) -> list[str]:
    """Rules of a sealed arena that did not hold: it must refuse more memory, in a capture too."""
    transport = groups.tp.transport
    if transport is None:
        return []
    broken = []
    with contextlib.suppress(SymmetryError):
        groups.arena.register(transport)
        broken.append("memory was registered after the arena was sealed")
    if device.type == "cuda":
        fresh = type(groups.arena)()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph), contextlib.suppress(SymmetryError):
            fresh.register(transport)
            broken.append("memory was registered inside the capture of a graph")
    return broken


# The profiler's trace


@contextlib.contextmanager
def profiled(device: torch.device) -> Iterator[list[dict[str, Any]]]:
    """A list that holds the trace's events that matter, once the block is left."""
    events: list[dict[str, Any]] = []
    if device.type != "cuda":
        yield events
        return
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        yield events
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events += kept_events(json.loads(path.read_text())["traceEvents"])


def kept_events(events: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Cases, launches and NCCL's kernels, with the fields that tie them together."""
    kept: list[dict[str, Any]] = []
    for event in events:
        category, name = event.get("cat", ""), event.get("name", "")
        is_case = category == "user_annotation" and name.startswith(MARK)
        is_launch = category in ("cuda_runtime", "cuda_driver") and "aunch" in name
        is_kernel = category == "kernel" and "nccl" in name
        if is_case or is_launch or is_kernel:
            args = event.get("args", {})
            kept.append(
                {"cat": category, "name": name, "ts": event["ts"], "dur": event.get("dur", 0)}
                | {key: args[key] for key in ("correlation",) if key in args}
            )
    return kept


def kernels_of(events: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
    """For each case the NCCL kernels that were launched within it."""
    kernels: dict[int, list[str]] = {}
    for event in events:
        if event["cat"] == "kernel":
            kernels.setdefault(event["correlation"], []).append(event["name"])
    found: dict[str, list[str]] = {}
    for case in events:
        if case["cat"] != "user_annotation":
            continue
        names = found.setdefault(case["name"].removeprefix(MARK), [])
        for event in events:
            inside = case["ts"] <= event["ts"] <= case["ts"] + case["dur"]
            if inside and event["cat"] in ("cuda_runtime", "cuda_driver"):
                names += kernels.get(event.get("correlation", -1), [])
    return found


def add_kernels(cases: Sequence[Case], events: Sequence[dict[str, Any]]) -> None:
    """Name each case's kernel; several different ones are all named."""
    if not events:
        return
    kernels = kernels_of(events)
    for case in cases:
        names = sorted({name.partition("(")[0] for name in kernels.get(case.name, [])})
        case.kernel = ", ".join(names) or "none seen"


def verdicts_of(result: dict[str, Any]) -> dict[str, bool]:
    """Whether each case of a stored result is good, worked out from its trace again."""
    cases = [Case(**(case | {"kernel": ""})) for case in result["cases"]]
    add_kernels(cases, result["trace"])
    return {case.name: case.is_good for case in cases}


# All ranks


def check(layout: Layout, device: str) -> dict[str, Any]:
    """Run every rank in a process of its own; the first rank's result, judged by all of them."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "workers.check", "--store", f"{folder}/store"]
        command += ["--device", device, "--layout", json.dumps(asdict(layout))]
        ranks = [
            subprocess.Popen(
                [*command, "--rank", str(rank)],
                stdout=subprocess.PIPE,
                text=True,
                env=rank_environment(),
            )
            for rank in range(layout.world_size)
        ]
        results, bad = [], []
        for rank, process in enumerate(ranks):
            out, _ = process.communicate(timeout=300)
            if process.returncode:
                bad.append(f"rank {rank} ended with exit code {process.returncode}")
            else:
                results.append(json.loads(out.splitlines()[-1]))
    for result in results:
        bad += [f"rank {result['rank']}: {rule}" for rule in result["rules"]]
        cases = [Case(**case) for case in result["cases"]]
        bad += [f"rank {result['rank']}: {case.name}" for case in cases if not case.is_good]
    version = ".".join(str(part) for part in nccl_version())
    return {
        "layout": asdict(layout),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "torch": torch.__version__,
        "nccl": version if device == "cuda" else "",
        "open_s": max((result["open_s"] for result in results), default=0.0),
        "bad": bad,
        "sums": results[0]["sums"] if results else [],
        "cases": results[0]["cases"] if results else [],
        "trace": results[0]["trace"] if results else [],
    }


def show(result: dict[str, Any]) -> str:
    """The table that a person reads."""
    lines = [f"{'op':15} {'group':9} {'members':12} {'mode':6} {'path':10} {'':13} kernel, result"]
    if not any(case["kernel"] for case in result["cases"]):
        lines.insert(0, "over gloo on a CPU: the ledger is checked, there are no kernels to see")
    for case in result["cases"]:
        members = ",".join(str(rank) for rank in case["members"])
        right = "right" if case["is_correct"] else "WRONG"
        lines.append(
            f"{case['op']:15} {case['group']:9} {members:12} {case['mode']:6} {case['path']:10} "
            f"{case['reason']:13} {case['kernel'] or 'ledger only'}  {right}"
        )
    lines.append(f"the arena was opened and registered in {result['open_s']:.3f} s")
    usual = [case for case in result["cases"] if case["mode"] != "twin"]
    fallbacks = sum(case["path"] == "fallback" for case in usual)
    twins = [case for case in result["cases"] if case["mode"] == "twin"]
    reported = sum(case["path"] == "fallback" for case in twins)
    lines.append(f"{len(usual)} collectives, {fallbacks} fallbacks")
    lines.append(f"{reported} of {len(twins)} collectives over an unregistered twin reported")
    lines += result.get("sums", [])
    lines += [f"NOT GOOD: {each}" for each in result["bad"]]
    return "\n".join(lines)


def dump(result: dict[str, Any]) -> str:
    """JSON with one case, and one event of the trace, a line."""
    lines = [
        f"{json.dumps(key)}: {json.dumps(value)}"
        if key not in ("cases", "trace")
        else f"{json.dumps(key)}: [\n  " + ",\n  ".join(map(json.dumps, value)) + "\n ]"
        for key, value in result.items()
    ]
    return "{\n " + ",\n ".join(lines) + "\n}\n"


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="lockstep check", description="Try every collective.")
    made.add_argument("--world", type=int, default=0, help="ranks; the same as --tp-size")
    made.add_argument("--tp-size", type=int, default=0)
    made.add_argument("--dp-size", type=int, default=1, help="attention replicas among the ranks")
    made.add_argument("--attn-cp-size", type=int, default=1)
    made.add_argument("--ep-size", type=int, default=1)
    made.add_argument("--moe-dp-size", type=int, default=1)
    made.add_argument("--device", choices=("cpu", "cuda"), default="")
    made.add_argument("--json", default="", metavar="FILE", help="where to store the result")
    for hidden in ("--store", "--layout"):
        made.add_argument(hidden, default="", help=argparse.SUPPRESS)
    made.add_argument("--rank", type=int, default=-1, help=argparse.SUPPRESS)
    return made


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.rank >= 0:
        torch.set_num_threads(1)
        layout = Layout(**json.loads(args.layout))
        print(json.dumps(run_rank(layout, args.rank, args.store, device)))
        return 0
    try:
        layout = Layout(
            tp_size=args.tp_size or args.world or 1,
            dp_size=args.dp_size,
            enable_dp_attention=args.dp_size > 1,
            attn_cp_size=args.attn_cp_size,
            ep_size=args.ep_size,
            moe_dp_size=args.moe_dp_size,
        )
    except ValueError as error:
        print(f"lockstep: {error}", file=sys.stderr)
        return 2
    if device == "cuda" and torch.cuda.device_count() < layout.world_size:
        count = torch.cuda.device_count()
        print(f"lockstep: {layout.world_size} GPUs are needed and there are {count}; try "
              "--device cpu", file=sys.stderr)  # fmt: skip
        return 2
    result = check(layout, device)
    print(show(result))
    if args.json:
        command = "python -m workers.check " + " ".join(sys.argv[1:] if argv is None else argv)
        Path(args.json).write_text(dump({"command": command} | result))
    return 1 if result["bad"] else 0


if __name__ == "__main__":
    sys.exit(main())
