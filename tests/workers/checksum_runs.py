"""Runs of the checksum model on one rank that does what a GPU does: its slots, kernels and buckets.

What it says is worked out by hand, so a wrong page, slot or position shows.
"""

from random import Random

from tests.workers.kernel_runner import kernel_runner
from tests.workers.random_driver import Planned, RandomDriver, Request, planned_header
from tests.workers.test_runner import ChecksumModel, next_token
from workers.config import EngineConfig
from workers.protocol import Header
from workers.runner import ModelRunner
from workers.step import PendingStep

NUM_PAGES = 14
SIZES = {"page_size": 4, "max_num_seqs": 4, "max_num_batched_tokens": 24}
DRIVER = {"max_num_seqs": 4, "num_pages": NUM_PAGES, "page_size": 4, "budget": 24}


class CountingModel(ChecksumModel):
    """Remembers how many rows each forward pass had."""

    def __init__(self) -> None:
        super().__init__()
        self.num_rows: list[int] = []

    def forward(self, batch):
        self.num_rows.append(len(batch.input_ids_T))
        return super().forward(batch)


def checksum_runner(model=None, *, use_kernels=True, **changes) -> ModelRunner:
    config = EngineConfig(**SIZES | changes)
    model = model or ChecksumModel()
    return kernel_runner(config, model=model, num_pages=NUM_PAGES, use_kernels=use_kernels)


def launch(runner: ModelRunner, planned: Planned, number: int = 0) -> tuple[Header, PendingStep]:
    """A step in the smallest bucket that holds it, if one does."""
    told = planned_header([planned], number, runner.buckets, prompt_buckets=runner.prompt_buckets)
    return told, runner.launch(told, planned.body, 0)


def streams(requests: list[Request], runner: ModelRunner) -> list[list[int]]:
    """What the requests are answered, with preemption, sharing and pauses at random."""
    driver = RandomDriver(requests, Random(3), chaos=0.3, **DRIVER)
    replayed = 0
    for number in range(2000):
        if driver.is_done:
            assert replayed or not runner.prompt_buckets
            return [request.output for request in requests]
        planned = driver.plan()
        told, pending = launch(runner, planned, number)
        if planned.body.chunk_slots and runner.prompt_buckets:
            assert told.bucket >= len(planned.positions), "a step that fits was not replayed"
            replayed += 1
        driver.feed(planned, runner.finish(pending).ids.tolist())
    raise TimeoutError("the requests do not end")


def greedy_requests(num_tokens: int) -> tuple[list[Request], list[list[int]]]:
    """Of several lengths, and what each is answered, worked out by hand."""
    random = Random(1)
    prompts = [[random.randrange(97) for _ in range(length)] for length in (1, 7, 9, 16)]
    answers: list[list[int]] = []
    for prompt in prompts:
        tokens = list(prompt)
        while len(tokens) < len(prompt) + num_tokens:
            tokens.append(next_token(tokens))
        answers.append(tokens[len(prompt) :])
    return [Request(prompt, num_tokens) for prompt in prompts], answers
