"""What HTTP and Serve cost, on one machine in one run.

    python -m tests.bench.bench_http                                 # the bundled model, on a CPU
    python -m tests.bench.bench_http --model 0.6b --out /tmp/rows    # a preset, on a GPU

1. Throughput at 64 requests under way: `LLM` (no HTTP) and the service (HAProxy, ingress, driver,
   `RayFleet`) in turns on the same prompts of token ids; the loss in per cent, and the CPU time
   that client, ingress and HAProxy take for a token.
2. Time to first token of one request alone: over HTTP and straight to the same driver's socket, in
   turns; what is between them is proxy, ingress and client.

Answers are greedy and must have the length asked for. The last line is JSON: medians, and whether
HTTP loses at most 3 % of the throughput and adds at most 3 ms to the first token. After `--limit-s`
it ends itself. What Ray costs below the engine is `tests.bench.bench_fleets`.
"""

import argparse
import asyncio
import contextlib
import json
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from deployments.bench_client import Target, ask_one, first_model, new_session, run_load
from deployments.bench_prompts import Ask, PromptShape, random_asks
from deployments.llm import LLM, SamplingParams
from tests.bench.engine_client import EngineClient
from tests.bench.limits import time_limit
from tests.bench.process_cpu import cpu_seconds
from tests.bench.ray_service import driver_info, ray_and_serve, service
from tests.bench.results import FOLDER, device_name, percentiles, record
from tests.bench.stand_in import model_settings
from workers.config import count_local_gpus

Note = Callable[[str, str, Sequence[float]], None]
"""note(case, unit, values)"""
OFFLINE, HTTP, LOST = "output, LLM", "output, HTTP", "lost to HTTP"
DIRECT, SERVED = "first token, straight to the driver", "first token, HTTP"
ADDED = "first token, added by HTTP"
WHO = {"": "the client", "ServeReplica:lockstep:Ingress": "the ingress", "haproxy": "HAProxy"}
"""Whose CPU time is measured, by a part of the command line; the client is this process."""
MOST_LOST, MOST_ADDED_MS = 3.0, 3.0
"""Goals: per cent of the throughput, and milliseconds before the first token."""


@dataclass(frozen=True, slots=True)
class Sizes:
    num_prompts: int
    input_len: int
    output_len: int
    num_rounds: int
    num_firsts: int


GPU_SIZES = Sizes(num_prompts=384, input_len=256, output_len=256, num_rounds=3, num_firsts=100)
CPU_SIZES = Sizes(num_prompts=64, input_len=16, output_len=32, num_rounds=3, num_firsts=40)


def bench_throughput(llm: LLM, url: str, sizes: Sizes, concurrency: int, note: Note) -> None:
    shape = PromptShape(
        input_len=sizes.input_len,
        output_len=sizes.output_len,
        range_ratio=0.5,
        as_ids=True,
        max_token_id=min(10_000, llm.vocab_size - 1),
    )
    asks = random_asks(shape, sizes.num_prompts, seed=0)
    warm = random_asks(shape, concurrency, seed=1)
    offline(llm, warm)
    asyncio.run(over_http(url, warm, concurrency))
    alone, served, losses = [], [], []
    costs: dict[str, list[float]] = {title: [] for title in WHO}
    num_tokens = sum(ask.max_tokens for ask in asks)
    for number in range(sizes.num_rounds):
        for is_http in (False, True) if number % 2 == 0 else (True, False):
            if is_http:
                began = {title: cpu_of(title) for title in WHO}
                served.append(asyncio.run(over_http(url, asks, concurrency)))
                for title, before in began.items():
                    costs[title].append((cpu_of(title) - before) / num_tokens * 1e6)
            else:
                alone.append(offline(llm, asks))
        losses.append((1 - served[-1] / alone[-1]) * 100)
    note(OFFLINE, "tok/s", alone)
    note(HTTP, "tok/s", served)
    note(LOST, "%", losses)
    for title, name in WHO.items():
        note(f"CPU of {name}, HTTP", "us/token", costs[title])


def cpu_of(title: str) -> float:
    return cpu_seconds(title) if title else time.process_time()


def offline(llm: LLM, asks: Sequence[Ask]) -> float:
    """Output tokens a second."""
    params = [
        SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=ask.max_tokens) for ask in asks
    ]
    began = time.perf_counter()
    answers = llm.generate([list(ask.prompt) for ask in asks], params, detokenize=False)
    seconds = time.perf_counter() - began
    check_lengths([len(answer.ids) for answer in answers], asks)
    return sum(ask.max_tokens for ask in asks) / seconds


async def over_http(url: str, asks: Sequence[Ask], concurrency: int) -> float:
    """Output tokens a second."""
    async with new_session() as session:
        target = await target_at(session, url)
        seconds, outcomes = await run_load(session, target, asks, [0.0] * len(asks), concurrency)
    failed = [outcome.error for outcome in outcomes if outcome.error]
    if failed:
        raise RuntimeError(f"{len(failed)} requests failed, the first with: {failed[0]}")
    check_lengths([outcome.num_output for outcome in outcomes], asks)
    return sum(ask.max_tokens for ask in asks) / seconds


async def target_at(session: Any, url: str) -> Target:
    model = await first_model(session, url, {})
    return Target(url=url, model=model, ignore_eos=True, timeout_s=100.0)


def check_lengths(lengths: Sequence[int], asks: Sequence[Ask]) -> None:
    if list(lengths) != [ask.max_tokens for ask in asks]:
        raise RuntimeError("an answer has not the length that was asked for")


async def bench_first_tokens(url: str, client: EngineClient, sizes: Sizes, note: Note) -> None:
    """The same lengths, other ids: in turns over HTTP and straight to the driver."""
    shape = PromptShape(input_len=sizes.input_len, output_len=4, as_ids=True, max_token_id=250)
    asks = random_asks(shape, 2 * (sizes.num_firsts + 5), seed=2)
    direct, served = [], []
    async with new_session() as session:
        target = await target_at(session, url)
        for straight, ask in zip(asks[::2], asks[1::2], strict=True):
            direct.append(client.ask(list(straight.prompt), 4)[0] * 1e3)
            outcome = await ask_one(session, target, ask, time.perf_counter())
            if outcome.error:
                raise RuntimeError(outcome.error)
            served.append(outcome.ttft * 1e3)
    direct, served = direct[5:], served[5:]
    note(DIRECT, "ms", direct)
    note(SERVED, "ms", served)
    note(ADDED, "ms", [b - a for a, b in zip(direct, served, strict=True)])


def judged(medians: dict[str, float], concurrency: int) -> dict[str, Any]:
    """The figures that have goals.

    >>> cases = [OFFLINE, HTTP, LOST, DIRECT, SERVED, ADDED]
    >>> told = judged(dict(zip(cases, [100.0, 98.0, 2.0, 5.0, 9.0, 4.0])), 64)
    >>> told["lost_percent"], told["lost_met"], told["ttft_added_ms"], told["ttft_added_met"]
    (2.0, True, 4.0, False)
    """
    lost, added = round(medians[LOST], 2), round(medians[ADDED], 3)
    return {
        "case": "http",
        "concurrency": concurrency,
        "offline_tok_s": round(medians[OFFLINE], 1),
        "http_tok_s": round(medians[HTTP], 1),
        "lost_percent": lost,
        "lost_met": lost <= MOST_LOST,
        "ttft_driver_ms": round(medians[DIRECT], 3),
        "ttft_http_ms": round(medians[SERVED], 3),
        "ttft_added_ms": added,
        "ttft_added_met": added <= MOST_ADDED_MS,
    }


def settings_of(args: argparse.Namespace, sizes: Sizes, folder: Path) -> dict[str, Any]:
    settings: dict[str, Any] = {
        "enable_prefix_caching": False,
        "max_num_seqs": args.concurrency,
        "tp_size": args.tp_size,
        "max_model_len": max(1024, 2 * (sizes.input_len + sizes.output_len)),
        "kv_cache_gb": 0.25 if args.device == "cpu" else args.kv_cache_gb,
        "device": args.device,
        "start_timeout_s": 120.0,
        "step_timeout_s": 30.0,
    }
    return settings | model_settings(args.model, folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--model", default="", help="a preset, a folder, or the bundled model")
    parser.add_argument("--device", default="cuda" if count_local_gpus() else "cpu")
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--num-ingress", type=int, default=1)
    parser.add_argument("--tp-size", type=int, default=1)
    parser.add_argument("--kv-cache-gb", type=float, default=20.0, help="of each engine on a GPU")
    parser.add_argument("--rounds", type=int, default=0, help="of throughput (default: 3)")
    parser.add_argument("--limit-s", type=float, default=210.0)
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of http.csv")
    parser.add_argument("--json", type=Path, help="write the last line there too")
    args = parser.parse_args()
    command = shlex.join(["python", "-m", "tests.bench.bench_http", *sys.argv[1:]])
    sizes = CPU_SIZES if args.device == "cpu" else GPU_SIZES
    if args.rounds:
        sizes = replace(sizes, num_rounds=args.rounds)
    device, name = device_name(args.device), args.model or "bundled"

    told: dict[str, float] = {}

    def note(case: str, unit: str, values: Sequence[float]) -> None:
        told[case] = percentiles(values)[1]
        record(
            "http",
            f"{name}, {args.concurrency} at once: {case}",
            unit,
            values,
            command,
            device,
            args.out,
        )

    def say(sentence: str) -> None:
        print(f"{time.perf_counter() - began:6.1f} s  {sentence}", flush=True)

    began = time.perf_counter()
    with (
        time_limit(args.limit_s),
        tempfile.TemporaryDirectory() as folder,
        ray_and_serve() as url,
    ):
        settings = settings_of(args, sizes, Path(folder))
        say("Ray is up")
        with LLM(**settings) as llm:
            say("LLM is up")
            with service(settings | {"num_ingress": args.num_ingress}):
                say("the service is up")
                bench_throughput(llm, url, sizes, args.concurrency, note)
                say("throughput is measured")
                client = EngineClient(driver_info())
                with contextlib.closing(client):
                    asyncio.run(bench_first_tokens(url, client, sizes, note))
                say("first tokens are measured")
        say("done")
    line = json.dumps({"model": name, "device": device} | judged(told, args.concurrency))
    if args.json:
        args.json.write_text(line + "\n")
    print(line)


if __name__ == "__main__":
    main()
