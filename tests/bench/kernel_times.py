"""How long a kernel takes: replays of a CUDA graph that holds it once for each of several inputs,
so that neither launches nor what a cache still holds decide."""

import time
from collections.abc import Callable

import torch


def micros(
    run: Callable[[int], object], num_inputs: int, device: torch.device, *, repeats: int = 5
) -> float:
    """Median microseconds of `run(i)`; on a CPU, where this shows only that it works, of one go."""
    began = time.perf_counter()
    for i in range(num_inputs):
        run(i)
    if device.type != "cuda":
        return (time.perf_counter() - began) / num_inputs * 1e6
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(num_inputs):
            run(i)
    graph.replay()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / num_inputs * 1e3)
    return sorted(times)[repeats // 2]
