"""A rank that runs on a CPU what a GPU runs: kernels in Triton's interpreter, decodes in buckets.

Slow, and as real as a CPU can have it: buckets are gone through before the rank is ready, with
progress told, as they are where they are captured.
"""

from collections.abc import Callable

import torch

from parallel.groups import Groups
from parallel.layout import Layout
from workers.config import EngineConfig
from workers.runner import ModelRunner

KERNEL_RUNNER = "tests.workers.kernel_runner:KernelRunner"


class KernelRunner(ModelRunner):
    def __init__(
        self,
        config: EngineConfig,
        layout: Layout,
        rank: int,
        groups: Groups,
        device: torch.device,
        progress: Callable[[str, int, int], None],
    ) -> None:
        super().__init__(config, layout, rank, groups, device, progress, use_kernels=True)
