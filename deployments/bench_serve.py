"""`lockstep bench serve`: how fast a running service is, over HTTP, as its users meet it.

Drives any OpenAI-compatible URL with streaming requests. What is asked and when is
`deployments.bench_prompts`, what is made of the answers `deployments.bench_figures`; this is the
run between them: the options, the progress on stderr, the table, the JSON file and the plot.
"""

import asyncio
import contextlib
import datetime
import importlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
from tqdm import tqdm

from deployments.bench_client import RequestRefused, Target, first_model, new_session, run_load
from deployments.bench_figures import (
    Outcome,
    read_goals,
    read_metrics,
    read_percentiles,
    reasons,
    summary,
    table,
)
from deployments.bench_options import ServeOptions
from deployments.bench_prompts import Ask, PromptShape, arrivals, random_asks, read_asks

WARM_UP_RUN = 1_000_003
"""A run whose prompts no other has."""


def read_concurrencies(text: str) -> list[int | None]:
    """`1,8,64` as one run each; nothing is one run without a limit.

    >>> read_concurrencies("1,8"), read_concurrencies("")
    ([1, 8], [None])
    """
    if not text:
        return [None]
    found = [int(word) if word.strip().isdecimal() else 0 for word in text.split(",")]
    if min(found) < 1:
        raise ValueError(f"max_concurrency=`{text}` must be numbers from 1, like 1,8,64")
    return list(found)


def bench_serve(options: ServeOptions) -> int:
    """The exit code: 0 if all requests were answered, 1 if one failed or nobody answers."""
    limits = read_concurrencies(options.max_concurrency)
    goals = read_goals(options.goodput)
    metrics = read_metrics(options.percentile_metrics)
    percentiles = read_percentiles(options.metric_percentiles)
    times = arrivals(
        options.num_prompts, options.request_rate, options.burstiness, seed=options.seed
    ).tolist()
    if options.plot:
        plotting()  # told before the run, not after it
    asks_of = _asks(options)
    target = Target(
        url=options.url.rstrip("/").removesuffix("/v1"),
        model=options.model,
        api_key=_api_key(options),
        use_chat=options.endpoint == "chat",
        ignore_eos=options.ignore_eos,
        temperature=options.temperature,
        timeout_s=options.timeout_s,
    )
    runs: list[dict[str, Any]] = []

    def on_run(model: str, limit: int | None, took: float, outcomes: list[Outcome]) -> None:
        figures = summary(outcomes, duration=took, percentiles=percentiles, goals=goals)
        runs.append(_about(options, model, limit) | figures)
        print(f"\n{_title(options, limit)}\n{table(figures, metrics, percentiles)}", flush=True)
        for reason in reasons(outcomes):
            print(f"failed {reason}", flush=True)

    try:
        asyncio.run(_drive(options, target, asks_of, times, limits, on_run))
    except RequestRefused as error:
        print(f"lockstep: {error}", file=sys.stderr)
        return 1
    if options.json:
        told = runs if len(runs) > 1 else runs[0]
        Path(options.json).write_text(json.dumps(told, indent=1) + "\n")
    if options.plot:
        plot(runs, Path(options.plot))
    return 1 if any(run["failed"] for run in runs) else 0


async def _drive(
    options: ServeOptions,
    target: Target,
    asks_of: Callable[[int, int], list[Ask]],
    times: Sequence[float],
    limits: Sequence[int | None],
    on_run: Callable[[str, int | None, float, list[Outcome]], None],
) -> None:
    """One run for each limit, told to `on_run` with its seconds and outcomes."""
    async with new_session() as session:
        if not target.model:
            model = await first_model(session, target.url, target.headers)
            target = replace(target, model=model)
        await _warm_up(session, target, asks_of(WARM_UP_RUN, options.num_warmups))
        for number, limit in enumerate(limits):
            asks = asks_of(number, options.num_prompts)
            with _progress(len(asks), limit) as (on_chunks, on_done):
                took, outcomes = await run_load(
                    session, target, asks, times, limit, on_chunks=on_chunks, on_done=on_done
                )
            on_run(target.model, limit, took, outcomes)


async def _warm_up(session: aiohttp.ClientSession, target: Target, asks: Sequence[Ask]) -> None:
    """One after the other, not counted; one that fails ends the benchmark."""
    for ask in asks:
        _, [outcome] = await run_load(session, target, [ask], [0.0], None)
        if outcome.error:
            raise RequestRefused(f"{target.url} did not answer a first request: {outcome.error}")


@contextlib.contextmanager
def _progress(num: int, limit: int | None) -> Iterator[Any]:
    """A bar on stderr of requests done, with the tokens a second of the last moments."""
    count, told = 0, time.perf_counter()
    name = f"{limit} at once" if limit else "requests"
    with tqdm(total=num, desc=name, unit="req", file=sys.stderr, mininterval=0.2) as bar:

        def on_chunks(more: int) -> None:
            nonlocal count, told
            count += more
            now = time.perf_counter()
            if now - told > 0.5:
                bar.set_postfix_str(f"{count / (now - told):.0f} chunks/s")
                count, told = 0, now

        def on_done(outcome: Outcome) -> None:
            bar.update()

        yield on_chunks, on_done


def shape_of(options: ServeOptions) -> PromptShape | None:
    """Of random prompts; None where a file has them."""
    if options.dataset:
        return None
    return PromptShape(
        input_len=options.input_len,
        output_len=options.output_len,
        range_ratio=options.range_ratio,
        prefix_len=options.prefix_len,
        num_prefixes=options.num_prefixes,
        as_ids=options.token_ids,
        max_token_id=options.max_token_id,
    )


def _asks(options: ServeOptions) -> Callable[[int, int], list[Ask]]:
    """What gives the first so many requests of a run. A file's are the same in all runs."""
    shape = shape_of(options)
    if shape is not None:
        return lambda run, num: random_asks(shape, num, seed=options.seed, run=run)
    most = max(options.num_prompts, options.num_warmups)
    try:
        with Path(options.dataset).open() as lines:
            asks = read_asks(lines, most, options.output_len, source=options.dataset)
    except OSError as error:
        raise ValueError(f"the dataset {options.dataset} cannot be read: {error}") from error
    return lambda run, num: asks[:num]


def _api_key(options: ServeOptions) -> str:
    if not options.api_key_file:
        return options.api_key
    try:
        return Path(options.api_key_file).read_text().strip()
    except OSError as error:
        raise ValueError(f"the API key cannot be read: {error}") from error


def _about(options: ServeOptions, model: str, limit: int | None) -> dict[str, Any]:
    """What a run was, beside its figures; JSON knows no infinity, so the rate may be a word."""
    rate = options.request_rate
    return {
        "date": datetime.datetime.now().strftime("%Y%m%d-%H%M%S"),
        "endpoint_type": f"openai-{options.endpoint}",
        "url": options.url,
        "model_id": model,
        "num_prompts": options.num_prompts,
        "seed": options.seed,
        "request_rate": "inf" if math.isinf(rate) else rate,
        "burstiness": options.burstiness,
        "max_concurrency": limit,
    }


def _title(options: ServeOptions, limit: int | None) -> str:
    rate = options.request_rate
    sent = "no arrival rate" if math.isinf(rate) else f"{rate:g} a second"
    bound = f", at most {limit} under way" if limit else ""
    return f"{options.num_prompts} requests, {sent}{bound}"


def plotting() -> Any:
    """matplotlib's pyplot without a screen, or a sentence."""
    try:
        matplotlib = importlib.import_module("matplotlib")
        matplotlib.use("Agg")
        return importlib.import_module("matplotlib.pyplot")
    except ImportError as error:
        raise ValueError(
            "--plot needs matplotlib, which is not installed: pip install 'lockstep[plot]'"
        ) from error


def plot(runs: Sequence[dict[str, Any]], path: Path) -> None:
    """Throughput against latency, one point a run."""
    pyplot = plotting()
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    throughput = [run["output_throughput"] for run in runs]
    for axis, name, text in (
        (axes[0], "tpot", "time per output token, median (ms)"),
        (axes[1], "ttft", "time to first token, median (ms)"),
    ):
        latency = [run[f"median_{name}_ms"] for run in runs]
        axis.plot(latency, throughput, marker="o")
        for run, x, y in zip(runs, latency, throughput, strict=True):
            label = str(run["max_concurrency"] or "all")
            axis.annotate(label, (x, y), textcoords="offset points", xytext=(4, 4))
        axis.set_xlabel(text)
        axis.set_ylabel("output tokens a second")
        axis.margins(0.1)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    figure.suptitle(f"{runs[0]['model_id']}: one point for each number of requests under way")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
