"""A runner that notes what each decode step takes on its rank, for `lockstep bench step`.

Steps of decodes alone with equal rows are counted. After `NUM_WARM` of them the host's times of
`NUM_TIMED` are kept; on a GPU the next `NUM_PROFILED` run under torch's profiler. Then one JSON
line is added to `times-<rank>.jsonl` in the model's folder, which is the benchmark's own. Times are
seconds of the monotonic clock, which all processes of a machine share.
"""

import json
import time
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from parallel.groups import Groups
from parallel.layout import Layout
from workers.config import EngineConfig
from workers.protocol import Body, Header, Mode
from workers.runner import ModelRunner, ReportProgress
from workers.step import PendingStep, StepResult

NUM_WARM, NUM_TIMED, NUM_PROFILED = 20, 100, 32
NUM_KERNELS = 12
"""Kernels that are named, the longest first."""


class Span(NamedTuple):
    """Work of the GPU, in microseconds."""

    start: float
    end: float
    name: str


def gpu_figures(spans: Sequence[Span], num_steps: int) -> dict[str, Any]:
    """What the GPU did in `num_steps` equal steps: for each but the last, in microseconds, the time
    in which a kernel ran, the time in which none did, and the longest of the latter's pieces.

    A step is cut where a kernel begins that runs once a step: wherever that is, each piece has one
    gap between two steps in it, and the longest gap is at least that one. Kernels that overlap
    count once.

    >>> work = [Span(0, 2, "a"), Span(2, 3, "b"), Span(5, 7, "a"), Span(7, 8, "b")]
    >>> figures = gpu_figures(work, 2)
    >>> figures["busy"], figures["idle"], figures["gap"], figures["kernels"]
    ([3.0], [2.0], [2.0], [['a', 2.0, 1.0], ['b', 1.0, 1.0]])
    """
    spans = sorted(spans)
    counts = Counter(span.name for span in spans)
    total = dict.fromkeys(counts, 0.0)
    for start, end, name in spans:
        total[name] += end - start
    longest = sorted(total.items(), key=lambda each: each[1], reverse=True)
    cuts = _cuts(spans, counts, num_steps)
    steps = list(pairwise(cuts))
    gaps = [_gaps(spans, begin, end) for begin, end in steps]
    idle = [float(sum(each)) for each in gaps]
    return {
        "busy": [end - begin - rest for (begin, end), rest in zip(steps, idle, strict=True)],
        "idle": idle,
        "gap": [float(max(each, default=0.0)) for each in gaps],
        "kernels": [
            [name, micros / num_steps, counts[name] / num_steps]
            for name, micros in longest[:NUM_KERNELS]
        ],
    }


def _cuts(spans: Sequence[Span], counts: Counter[str], num_steps: int) -> list[float]:
    once = next((span.name for span in spans if counts[span.name] == num_steps), None)
    if once is not None:
        return [span.start for span in spans if span.name == once]
    return [spans[number * len(spans) // num_steps].start for number in range(num_steps)]


def _gaps(spans: Sequence[Span], begin: float, end: float) -> list[float]:
    """Lengths of the times from `begin` to `end` in which none of `spans`, in order, ran."""
    gaps, done = [], begin
    for span in spans:
        if span.start >= end:
            break
        if span.start > done:
            gaps.append(span.start - done)
        done = max(done, span.end)
    return [*gaps, end - done] if done < end else gaps


class StepTimes(NamedTuple):
    """Of one step on this rank."""

    step: int
    launched: float
    """When its launch began."""
    launch: float
    wait: float
    """For the GPU, before it could be finished."""
    finish: float
    finished: float
    """When its tokens were there."""


class TimedRunner(ModelRunner):
    """`ModelRunner` with a clock."""

    def __init__(
        self,
        config: EngineConfig,
        layout: Layout,
        rank: int,
        groups: Groups,
        device: torch.device,
        progress: ReportProgress,
    ) -> None:
        super().__init__(config, layout, rank, groups, device, progress)
        self._file = Path(config.model) / f"times-{rank}.jsonl"
        self._has_gpu = device.type == "cuda"
        self._rows: tuple[int, ...] = ()
        self._num_decodes = 0
        """Steps of decodes alone, one after the other, with equal rows."""
        self._launches: dict[int, tuple[int, float, float]] = {}
        """(step, begin, end) of the launches that are not finished, by the id of their record."""
        self._times: list[StepTimes] = []
        self._profile: profile | None = None

    def launch(self, header: Header, body: Body, replica: int) -> PendingStep:
        same = header.mode == Mode.DECODE and header.num_rows == self._rows
        self._rows = header.num_rows if header.mode == Mode.DECODE else ()
        self._num_decodes = self._num_decodes + 1 if same else 0
        if self._num_decodes == 0:
            self._times.clear()
        last_timed = NUM_WARM + NUM_TIMED
        if self._num_decodes == last_timed and self._has_gpu:
            self._begin_profile()
        elif self._num_decodes == last_timed + NUM_PROFILED or (
            self._num_decodes == last_timed and not self._has_gpu
        ):
            self._write()
        began = time.perf_counter()
        pending = super().launch(header, body, replica)
        if NUM_WARM <= self._num_decodes < last_timed:
            self._launches[id(pending)] = (header.step, began, time.perf_counter())
        return pending

    def finish(self, pending: PendingStep) -> StepResult:
        began = time.perf_counter()
        if pending.done is not None:
            pending.done.synchronize()
        ready = time.perf_counter()
        result = super().finish(pending)
        ended = time.perf_counter()
        launched = self._launches.pop(id(pending), None)
        if launched is not None:
            step, begin, end = launched
            self._times.append(
                StepTimes(step, begin, end - begin, ready - began, ended - ready, ended)
            )
        return result

    def _begin_profile(self) -> None:
        torch.cuda.synchronize()
        self._profile = profile(activities=[ProfilerActivity.CUDA])
        self._profile.start()

    def _write(self) -> None:
        figures: dict[str, Any] = {"rows": sum(self._rows), "steps": self._times}
        if self._profile is not None:
            torch.cuda.synchronize()
            self._profile.stop()
            figures["gpu"] = gpu_figures(_spans(self._profile), NUM_PROFILED)
            self._profile = None
        with self._file.open("a") as file:
            file.write(json.dumps(figures) + "\n")


def _spans(recorded: profile) -> list[Span]:
    return [
        Span(event.time_range.start, event.time_range.end, event.name)
        for event in recorded.events() or ()
        if event.device_type.name == "CUDA"
    ]
