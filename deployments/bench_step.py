"""`lockstep bench step`: what a decode step is made of, from its plan to its tokens.

For each `rows:context` so many requests decode at once, planned and sent as the engine does it
(`Gang`, `WorkerLink`, `LocalFleet`: its own parts, with a clock between them), with no client and
no ingress. The rank's side is `workers.step_times`. Times are microseconds, the median of a hundred
steps; the step before is still under way while a step is planned, sent and launched, so the parts
add up to more than a step.

On a GPU a few more steps run under torch's profiler: the time a step in which a kernel ran, the
time in which none did (`idle`, which is the gap between steps and any within), the longest gap of
a step, and the kernels that take longest. The last line has all figures as JSON.
"""

import contextlib
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import zmq

from deployments.bench import DEFAULTS
from deployments.bench_step_table import (
    Case,
    DriverTimes,
    TooFewSteps,
    figures_line,
    figures_of,
    header,
    kernel_lines,
    read_case,
    row,
)
from deployments.config import ServiceConfig
from deployments.fit import check_fit
from deployments.fleet import LocalFleet
from deployments.gang import Gang, GangFailed
from deployments.presets import PRESETS, write_preset
from deployments.requests import Request
from deployments.sockets import IpcFolder
from deployments.worker_link import WorkerLink
from workers import bundled
from workers.config import EngineConfig
from workers.protocol import Sampling

RUNNER = "workers.step_times:TimedRunner"
NUM_STEPS = 180
"""More than `workers.step_times` wants to see."""
CASE_TIMEOUT_S = 120.0


def bench_step(
    words: Sequence[str],
    settings: dict[str, Any],
    *,
    json_file: str = "",
    show: Callable[[str], None] = print,
) -> int:
    """Measure all cases, print the table and a line of JSON, that too in a file; the exit code."""
    cases = [read_case(word) for word in words]
    with tempfile.TemporaryDirectory() as folder:
        config = _config(settings, cases, Path(folder))
        try:
            measured = _measure_all(config, cases, show)
        except (GangFailed, TooFewSteps) as error:
            print(f"lockstep: {error}", file=sys.stderr)
            return 1
    line = json.dumps(figures_line(settings.get("model", ""), measured))
    if json_file:
        Path(json_file).write_text(line + "\n")
    show(line)
    return 0


def _measure_all(
    config: EngineConfig, cases: Sequence[Case], show: Callable[[str], None]
) -> list[tuple[Case, dict[str, float], dict[str, Any]]]:
    """(case, figures, what the GPU did) of each."""
    began = time.perf_counter()
    measured = []
    with StepBench(config) as bench:
        show(f"ready after {time.perf_counter() - began:.1f} s; microseconds a step, medians")
        for number, case in enumerate(cases):
            figures, gpu = bench.measure(case)
            measured.append((case, figures, gpu))
            if number == 0:
                show(header(figures))
            for line in (row(case, figures), *kernel_lines(gpu)):
                show(line)
    return measured


def _config(settings: dict[str, Any], cases: Sequence[Case], folder: Path) -> EngineConfig:
    """The engine's settings, with a model folder of our own that ranks can leave times in."""
    name = settings.get("model", "")
    chosen: dict[str, Any] = {"max_num_seqs": max(256, *(case.rows for case in cases))}
    chosen |= {key: value for key, value in DEFAULTS.items() if key != "max_model_len"}
    if name in PRESETS:
        folder = write_preset(name, folder)
        chosen |= {"load_format": "dummy", "max_model_len": DEFAULTS["max_model_len"]}
    else:
        source = Path(name) if name else bundled.path()
        if not source.is_dir():
            presets = ", ".join(PRESETS)
            raise ValueError(f"model={name!r} is neither a folder nor a preset ({presets})")
        for file in source.iterdir():
            (folder / file.name).symlink_to(file.resolve())
    config = ServiceConfig.from_args(chosen | settings | {"model": str(folder)}).engine
    check_fit(config)
    if config.layout.num_domains > 1:
        raise ValueError(
            f"dp_size={config.dp_size} makes {config.layout.num_domains} copies that step by "
            "themselves: measure one of them, or set enable_dp_attention"
        )
    return config


class StepBench:
    """A driver with one gang and no ingresses."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._stack = contextlib.ExitStack()
        self._num_requests = 0
        self._times = DriverTimes()
        self._sent_from = self._sent_to = 0.0

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _start(self) -> None:
        context = zmq.Context()
        self._stack.callback(context.destroy, linger=0)
        folder = IpcFolder()
        self._stack.callback(folder.close)
        self._link = WorkerLink(context, epoch=1, config=self._config, ipc_folder=folder.path)
        self._stack.callback(self._link.close)
        self._gang = Gang(self._config, epoch=1, now=time.perf_counter(), send=self._send)
        self._fleet = LocalFleet()
        self._stack.callback(self._fleet.stop)
        self._fleet.start(self._link.specs(runner=RUNNER))
        self._poller = zmq.Poller()
        self._poller.register(self._link.socket, zmq.POLLIN)
        self._poller.register(self._fleet.wake, zmq.POLLIN)
        while not self._gang.serving:
            self._turn()

    def measure(self, case: Case) -> tuple[dict[str, float], dict[str, Any]]:
        """(figures in microseconds, what the GPU did; nothing on a CPU)"""
        self._refuse_too_large(case)
        self._times = DriverTimes()
        requests = [self._request(case) for _ in range(case.rows)]
        schedulers = self._gang.schedulers
        owners = [schedulers[number % len(schedulers)] for number in range(case.rows)]
        for request, scheduler in zip(requests, owners, strict=True):
            scheduler.add(request)
        file = Path(self._config.model) / "times-0.jsonl"
        num_before = _num_lines(file)
        deadline = time.perf_counter() + CASE_TIMEOUT_S
        while any(request.finish is None for request in requests):
            self._turn()
            if time.perf_counter() > deadline:
                raise GangFailed(f"{case.rows}:{case.context} took over {CASE_TIMEOUT_S:g} s")
        if _num_lines(file) == num_before:
            raise GangFailed(
                f"{case.rows} requests of {case.context} tokens did not decode side by side: a "
                "larger cache (kv_cache_gb) or fewer rows would let them"
            )
        told = json.loads(file.read_text().splitlines()[-1])
        return figures_of(told, self._times), told.get("gpu", {})

    def _refuse_too_large(self, case: Case) -> None:
        model = self._gang.model
        if model is None:
            raise GangFailed("the ranks do not serve")
        length = case.context + self._num_tokens(case)
        if length > model.max_model_len:
            raise ValueError(
                f"case {case.rows}:{case.context} needs {length} tokens a request and the model "
                f"takes {model.max_model_len}: lower the context, or raise max_model_len"
            )
        num_replicas = len(self._gang.schedulers)
        page = self._config.page_size
        needed = -(-case.rows // num_replicas) * -(-length // page)
        if needed > model.num_pages:
            raise ValueError(
                f"case {case.rows}:{case.context} needs {needed} pages of {page} tokens and the "
                f"cache has {model.num_pages}: lower the rows or raise kv_cache_gb"
            )

    def _num_tokens(self, case: Case) -> int:
        """So many that all decode side by side for `NUM_STEPS`, though some began later."""
        per_step = self._config.max_num_batched_tokens - case.rows
        return NUM_STEPS + -(-case.rows * case.context // max(1, per_step)) + 2

    def _request(self, case: Case) -> Request:
        number, self._num_requests = self._num_requests, self._num_requests + 1
        draw = random.Random(number)
        model = self._gang.model
        highest = min(10_000, (model.vocab_size if model else 2) - 1)
        tokens = [draw.randint(min(10, highest), highest) for _ in range(case.context)]
        return Request(
            key=(b"bench", number),
            tokens=tokens,
            num_prompt=case.context,
            max_tokens=self._num_tokens(case),
            sampling=Sampling(temperature=0.0),
            arrival=number,
        )

    def _turn(self) -> None:
        """As the engine's: read, agree, plan, send."""
        self._poller.poll(20)
        for death in self._fleet.deaths():
            raise GangFailed(death.sentence, death.rank)
        times, gang = self._times, self._gang
        for rank, message in self._link.receive():
            began = time.perf_counter()
            for step in gang.on_message(rank, message, began):
                ended = time.perf_counter()
                times.accept[step.number] = ended - began
                times.accepted[step.number] = ended
        now = time.perf_counter()
        gang.check(now)
        num_before = gang.num_steps
        self._sent_from = 0.0
        began = time.perf_counter()
        gang.pump(now)
        if gang.num_steps == num_before + 1:
            number = gang.num_steps - 1
            times.plan[number] = self._sent_from - began
            times.send[number] = self._sent_to - self._sent_from

    def _send(self, rank: int, *frames: bytes) -> None:
        self._sent_from = self._sent_from or time.perf_counter()
        self._link.send(rank, *frames)
        self._sent_to = time.perf_counter()


def _num_lines(file: Path) -> int:
    return len(file.read_text().splitlines()) if file.exists() else 0
