"""Ranks under Ray beside ranks of a plain process: what Ray costs a token, which must be nothing.

    python -m tests.bench.bench_fleets                        # the bundled model, on a CPU
    python -m tests.bench.bench_fleets --model 8b --pairs 10 --out /tmp/rows --json /tmp/fleets.json

Two engines of the same settings stand side by side, one over `LocalFleet`, one over `RayFleet`.
One request decodes on either in turns, `--pairs` times; within a pair the order changes. A pair
gives one ratio of the time per output token, RayFleet over LocalFleet; told is their geometric mean
with its 95 % interval (Student's t over logarithms). The same is told of the median gap between two
tokens (`gap_`), which a stall on a busy machine does not move. Calls of Ray are counted in every
process of its, this one included, while tokens flow: there must be none.

The last line is JSON. `inside_1_percent` says whether the interval of the time per output token
lies from 0.99 to 1.01.
"""

import argparse
import contextlib
import json
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from deployments.config import ServiceConfig
from deployments.engine import Engine
from deployments.fleet import Fleet, LocalFleet
from tests.bench.engine_client import EngineClient
from tests.bench.limits import time_limit
from tests.bench.ray_service import own_ray
from tests.bench.results import FOLDER, device_name, ratio_interval, record
from tests.bench.stand_in import model_settings
from tests.e2e import ray_calls
from workers.config import count_local_gpus


def paired(
    local: Callable[[], list[float]], remote: Callable[[], list[float]], num_pairs: int
) -> tuple[list[list[float]], list[list[float]]]:
    """What both give, in turns; who is first changes from pair to pair."""
    figures: dict[Callable[[], list[float]], list[list[float]]] = {local: [], remote: []}
    for number in range(num_pairs):
        for one in (local, remote) if number % 2 == 0 else (remote, local):
            figures[one].append(one())
    return figures[local], figures[remote]


def summary(
    local: Sequence[Sequence[float]], remote: Sequence[Sequence[float]], num_calls: int
) -> dict[str, Any]:
    """From the gaps between the tokens of each run, in seconds.

    >>> told = summary([[0.001]] * 3, [[0.001], [0.001], [0.001002]], 0)
    >>> told["ratio"], told["inside_1_percent"], told["ray_calls"]
    (1.0007, True, 0)
    """
    told: dict[str, Any] = {
        "case": "fleets",
        "pairs": len(local),
        "tokens": sum(len(run) + 1 for run in (*local, *remote)),
        "ray_calls": num_calls,
    }
    for name, of in (("", statistics.fmean), ("gap_", statistics.median)):
        ours, theirs = [[of(run) * 1e3 for run in side] for side in (local, remote)]
        interval = ratio_interval([b / a for a, b in zip(ours, theirs, strict=True)])
        told[f"local_{name or 'tpot_'}ms"] = round(statistics.median(ours), 4)
        told[f"ray_{name or 'tpot_'}ms"] = round(statistics.median(theirs), 4)
        for word, value in zip(("low", "ratio", "high"), interval, strict=True):
            told[name + word] = round(value, 4)
    told["inside_1_percent"] = told["low"] >= 0.99 and told["high"] <= 1.01
    return told


def measure(settings: dict[str, Any], num_pairs: int, num_tokens: int) -> dict[str, Any]:
    """On a Ray that is up."""
    import ray

    from deployments.ray_fleet import RayFleet

    ray_calls.install()
    fleets = (LocalFleet(), RayFleet(cluster_wait_s=60, progress=lambda sentence: None))
    with contextlib.ExitStack() as stack:
        clients = []
        for fleet in fleets:
            engine = start(settings, fleet, ray.util.get_node_ip_address(), stack)
            client = EngineClient(engine.info())
            stack.callback(client.close)
            clients.append(client)
        prompt = [7 + number % 200 for number in range(16)]
        for client in clients:
            client.gaps(prompt, num_tokens)
        began = ray_calls.total()
        if not began:
            raise RuntimeError("starting ranks under Ray took no call: the counter counts nothing")
        local, remote = paired(
            *[lambda client=client: client.gaps(prompt, num_tokens) for client in clients],
            num_pairs,
        )
        num_calls = ray_calls.total() - began
    return summary(local, remote, num_calls)


def start(
    settings: dict[str, Any], fleet: Fleet, node_ip: str, stack: contextlib.ExitStack
) -> Engine:
    """An engine that is ready; both listen alike."""
    import ray

    engine = Engine(
        ServiceConfig.from_args(settings).engine,
        fleet,
        node_ip=node_ip,
        node_id=ray.get_runtime_context().get_node_id(),
        listen_tcp=True,
    )
    stack.callback(engine.stop)
    engine.start()
    engine.wait_ready()
    return engine


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.bench_fleets", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--model", default="", help="a preset, a folder, or the bundled model")
    parser.add_argument("--device", default="cuda" if count_local_gpus() else "cpu")
    parser.add_argument("--tp-size", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=400, help="of a run")
    parser.add_argument("--kv-cache-gb", type=float, default=0.0, help="of each engine")
    parser.add_argument("--limit-s", type=float, default=300.0)
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of fleets.csv")
    parser.add_argument("--json", type=Path, help="write the last line there too")
    args = parser.parse_args(argv)
    if args.pairs < 2:
        parser.error("an interval needs --pairs of 2 or more")
    words = sys.argv[1:] if argv is None else list(argv)
    command = shlex.join(["python", "-m", "tests.bench.bench_fleets", *words])
    began = time.perf_counter()
    with time_limit(args.limit_s), tempfile.TemporaryDirectory() as folder, own_ray(counts=True):
        settings = model_settings(args.model, Path(folder)) | {
            "device": args.device,
            "tp_size": args.tp_size,
            "max_num_seqs": 4,
            "max_model_len": max(1024, 2 * args.tokens),
            "kv_cache_gb": args.kv_cache_gb or (0.1 if args.device == "cpu" else 2.0),
            "enable_prefix_caching": False,
        }
        told = measure(settings, args.pairs, args.tokens)
    device, name = device_name(args.device), args.model or "bundled"
    for case, unit, figure in (
        ("token of 1 request, LocalFleet", "ms", "local_tpot_ms"),
        ("token of 1 request, RayFleet", "ms", "ray_tpot_ms"),
        ("RayFleet / LocalFleet, mean", "ratio", "ratio"),
        ("RayFleet / LocalFleet, 95 % from", "ratio", "low"),
        ("RayFleet / LocalFleet, 95 % to", "ratio", "high"),
        ("median gap, RayFleet / LocalFleet, mean", "ratio", "gap_ratio"),
        ("median gap, RayFleet / LocalFleet, 95 % from", "ratio", "gap_low"),
        ("median gap, RayFleet / LocalFleet, 95 % to", "ratio", "gap_high"),
        (f"Ray calls while {told['tokens']} tokens came", "count", "ray_calls"),
    ):
        record("fleets", f"{name}: {case}", unit, [told[figure]], command, device, args.out)
    told = {"model": name, "device": device} | told
    told["seconds"] = round(time.perf_counter() - began, 1)
    line = json.dumps(told)
    if args.json:
        args.json.write_text(line + "\n")
    print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
