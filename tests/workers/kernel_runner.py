"""Ranks that run on a CPU what a GPU runs: kernels in Triton's interpreter, decodes in buckets.

Slow, and as real as a CPU can have it: buckets are gone through before the rank is ready, with
progress told, as they are where they are captured.
"""

from collections.abc import Callable

import torch

from parallel.groups import Groups, single_rank_groups
from parallel.layout import Layout
from workers.config import EngineConfig
from workers.models import Model
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


def kernel_runner(
    config: EngineConfig,
    rank: int = 0,
    groups: Groups | None = None,
    *,
    num_pages: int,
    model: Model | None = None,
    use_kernels: bool = True,
) -> ModelRunner:
    """A rank of this process that is ready; of `model` if there is one, else of the configured.

    Without kernels it runs what a CPU runs: for comparing.
    """
    made = {} if model is None else {"make_model": lambda *parts: model}
    runner = ModelRunner(
        config, config.layout, rank, groups or single_rank_groups(), torch.device("cpu"),
        lambda stage, done, total: None, use_kernels=use_kernels, **made,
    )  # fmt: skip
    runner.allocate(min(num_pages, runner.max_pages))
    return runner
