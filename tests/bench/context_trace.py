"""A runner that traces one step of a long prompt, and what the trace says of its gathers.

With context parallelism keys and values go round on a stream of their own while queries are
computed. Here is how that is seen: the gathers' kernels, and the time in which the main stream's
ran beside them. The first rank writes one JSON object to `context.json` in the model's folder.
"""

import json
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from parallel.groups import Groups
from parallel.layout import Layout
from workers.config import EngineConfig
from workers.protocol import Body, Header
from workers.runner import ModelRunner, ReportProgress
from workers.step import PendingStep

NUM_CHUNKS_BEFORE = 6
"""Full chunks that are read before the one that is traced: the warm prompt's, and some more."""


class Kernel(NamedTuple):
    """Work of the GPU, in microseconds."""

    start: float
    end: float
    stream: int
    name: str


def summary(kernels: Sequence[Kernel]) -> dict[str, Any]:
    """How long gathers on a side stream took, and how much of it the main stream worked too.

    >>> work = [Kernel(0, 10, 7, "gemm"), Kernel(12, 20, 7, "gemm"), Kernel(4, 16, 9, "nccl_AG")]
    >>> told = summary(work)
    >>> told["gathers"], told["gather_us"], told["beside_compute_us"], told["overlap"]
    (1, 12, 10, 0.833)
    """
    if not kernels:
        return {"gathers": 0}
    main = Counter(kernel.stream for kernel in kernels).most_common(1)[0][0]
    gathers = [k for k in kernels if k.stream != main and "nccl" in k.name.lower()]
    computing = _union((k.start, k.end) for k in kernels if k.stream == main)
    total = sum(kernel.end - kernel.start for kernel in gathers)
    beside = sum(_shared(kernel, computing) for kernel in gathers)
    return {
        "step_us": round(max(k.end for k in kernels) - min(k.start for k in kernels), 1),
        "gathers": len(gathers),
        "gather_us": round(total, 1),
        "beside_compute_us": round(beside, 1),
        "overlap": round(beside / total, 3) if total else 0.0,
        "kernels": dict(Counter(kernel.name.partition("(")[0] for kernel in gathers)),
        "main_stream_nccl_us": round(
            sum(k.end - k.start for k in kernels if k.stream == main and "nccl" in k.name.lower()),
            1,
        ),
    }


def _union(spans: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    joined: list[tuple[float, float]] = []
    for start, end in sorted(spans):
        if joined and start <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(joined[-1][1], end)
        else:
            joined.append((start, end))
    return joined


def _shared(kernel: Kernel, spans: Sequence[tuple[float, float]]) -> float:
    return sum(max(0.0, min(kernel.end, end) - max(kernel.start, start)) for start, end in spans)


class TracedRunner(ModelRunner):
    """`ModelRunner` that looks at one full chunk closely."""

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
        self._path = Path(config.model) / "context.json"
        self._is_traced = device.type == "cuda" and rank == 0
        self._full = config.max_num_batched_tokens
        self._num_full = 0

    def launch(self, header: Header, body: Body, replica: int) -> PendingStep:
        self._num_full += header.num_rows[replica] == self._full
        if not self._is_traced or self._num_full <= NUM_CHUNKS_BEFORE:
            return super().launch(header, body, replica)
        self._is_traced = False
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as recorded:
            pending = super().launch(header, body, replica)
            torch.cuda.synchronize()
        self._path.write_text(json.dumps(summary(_kernels(recorded))))
        return pending


def _kernels(recorded: profile) -> list[Kernel]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    return [
        Kernel(e["ts"], e["ts"] + e["dur"], int(e["args"].get("stream", -1)), e["name"])
        for e in events
        if e.get("cat") == "kernel"
    ]
