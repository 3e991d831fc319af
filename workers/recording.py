"""How a rank's CUDA graphs are captured: on a stream of their own, into memory that all share.

A graph works on memory that belongs to the graphs alone, and one that is captured after a larger
one fits into its memory. What it returns lies there too, until another graph of the rank runs. Its
collectives are kept as the ledger recorded them, and count at each replay.

On a CPU nothing is captured: what a GPU would replay is run as it is, which is how it is tested.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from parallel.groups import Call, Ledger


class Recording(NamedTuple):
    graph: torch.cuda.CUDAGraph | None
    """None on a CPU."""
    out: Tensor
    """What a replay leaves."""
    calls: tuple[Call, ...]
    """The collectives that it makes."""


class Recorder:
    """Of one rank; `record` is collective where what is recorded is."""

    def __init__(self, device: torch.device, ledger: Ledger) -> None:
        self._device, self._ledger = device, ledger
        is_gpu = device.type == "cuda"
        self._pool = torch.cuda.graph_pool_handle() if is_gpu else None
        self._stream = torch.cuda.Stream(device) if is_gpu else None

    def record(self, run: Callable[[], Tensor]) -> Recording:
        """Run once as it is, then capture. Nothing may depend on the host's values but shapes."""
        out = run()  # compiles, and makes what libraries make at first use
        calls = self._ledger.cut()
        if self._pool is None:
            return Recording(None, out, calls)
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        # NOTE: `torch.cuda.graph` would also collect garbage and empty the cache for each bucket.
        with torch.cuda.stream(self._stream):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            out = run()
            graph.capture_end()
        return Recording(graph, out, self._ledger.cut())
