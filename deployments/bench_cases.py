"""The cases that engines are compared by: requests, times and figures, whichever engine answers.

    cases = Cases(generate, Workload())
    for line in cases.run(): ...          {"case": "bs1_tpot_ms", "value": 5.13, "ttft_ms": 12.1}

Time per output token of one request, and of 32 and 128 requests of 1024 tokens; throughput of 256
requests of mixed lengths (100 to 1024 in, 100 to 1024 out, drawn with seed 0). Prompts are random
ids, answers are greedy and ignore the end of sequence, so any weights will do. Every answer must
have its length. The clock and the requests are the same for us and for others; nothing of ours is
needed to run them.
"""

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar


class Answered(Protocol):
    ids: list[int]
    """Output tokens."""


NUM_SAMPLED = 8
"""Answers of a case that may be read again to be checked."""

A = TypeVar("A", bound=Answered)

Generate = Callable[[Sequence[list[int]], Sequence[int]], list[A]]
"""Answers prompts, all at once, each with as many tokens as are asked of it; greedy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Sizes of the cases."""

    alone_prompt: int = 128
    alone_output: int = 256
    batches: tuple[int, ...] = (32, 128)
    batch_prompt: int = 1024
    batch_output: int = 128
    num_mixed: int = 256
    mixed_lengths: tuple[int, int] = (100, 1024)
    max_id: int = 10000

    @property
    def cases(self) -> tuple[str, ...]:
        """Names of the cases, in their order."""
        batches = (self.batch_case(size) for size in self.batches)
        return ("bs1_tpot_ms", *batches, f"offline{self.num_mixed}_out_tok_s")

    def batch_case(self, size: int) -> str:
        length = "1k" if self.batch_prompt == 1024 else str(self.batch_prompt)
        return f"bs{size}_{length}_tpot_ms"


FULL = Workload()

QUICK = Workload(
    alone_prompt=16,
    alone_output=16,
    batches=(4,),
    batch_prompt=32,
    batch_output=16,
    num_mixed=8,
    mixed_lengths=(4, 24),
)
"""To try the command where there is no GPU."""


class WrongAnswer(RuntimeError):
    """What was timed was not what was asked for."""


@dataclass(frozen=True, slots=True)
class Timed(Generic[A]):
    """What a case has timed."""

    case: str
    prompts: list[list[int]]
    """What was asked at once, or as much of it as is to be run again."""
    answers: list[A]
    """In the same order."""


class Cases(Generic[A]):
    """Runs the cases on an engine that is up."""

    def __init__(self, generate: Generate[A], workload: Workload) -> None:
        self._generate, self._workload = generate, workload
        self._random = random.Random(0)
        self.timed: list[Timed[A]] = []
        """Of the cases so far."""

    def run(self, names: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
        """Each case's name, value and what else is known of it; `names` of none are all."""
        work = self._workload
        names = names or work.cases
        self._run([self._prompt(64)], [16])
        if work.cases[0] in names:
            yield self._alone(work.cases[0])
        for size in work.batches:
            if work.batch_case(size) in names:
                yield self._batch(work.batch_case(size), size)
        if work.cases[-1] in names:
            yield self._mixed(work.cases[-1])

    def _alone(self, case: str) -> dict[str, Any]:
        work = self._workload
        prompts = [self._prompt(work.alone_prompt)]
        first_s = min(self._run(prompts, [1])[0] for _ in range(2))
        runs = [self._run(prompts, [work.alone_output + 1]) for _ in range(2)]
        all_s, answers = min(runs, key=lambda run: run[0])
        self.timed.append(Timed(case, prompts, answers))
        return {
            "case": case,
            "value": round((all_s - first_s) / work.alone_output * 1e3, 3),
            "ttft_ms": round(first_s * 1e3, 1),
        }

    def _batch(self, case: str, size: int) -> dict[str, Any]:
        work = self._workload
        prompts = [self._prompt(work.batch_prompt) for _ in range(size)]
        first_s, _ = self._run(prompts, [1] * size)
        all_s, answers = self._run(prompts, [work.batch_output + 1] * size)
        self.timed.append(Timed(case, prompts, answers))
        return {
            "case": case,
            "value": round((all_s - first_s) / work.batch_output * 1e3, 3),
            "prefill_tok_s": round(size * work.batch_prompt / first_s),
        }

    def _mixed(self, case: str) -> dict[str, Any]:
        """The requests of `num_mixed` lengths; a sample of them is run again to be checked."""
        work = self._workload
        draw = random.Random(0)
        prompts = [
            [draw.randint(0, work.max_id) for _ in range(draw.randint(*work.mixed_lengths))]
            for _ in range(work.num_mixed)
        ]
        lengths = [draw.randint(*work.mixed_lengths) for _ in range(work.num_mixed)]
        seconds, answers = self._run(prompts, lengths)
        picked = sample(work.num_mixed)
        self.timed.append(Timed(case, [prompts[n] for n in picked], [answers[n] for n in picked]))
        return {
            "case": case,
            "value": round(sum(lengths) / seconds),
            "out_tokens": sum(lengths),
            "s": round(seconds, 2),
        }

    def _prompt(self, length: int) -> list[int]:
        low = min(10, self._workload.max_id)
        return [self._random.randint(low, self._workload.max_id) for _ in range(length)]

    def _run(self, prompts: Sequence[list[int]], lengths: Sequence[int]) -> tuple[float, list[A]]:
        """(seconds, answers), each of which has its length."""
        began = time.perf_counter()
        answers = self._generate(prompts, lengths)
        seconds = time.perf_counter() - began
        came = [len(answer.ids) for answer in answers]
        if came != list(lengths):
            raise WrongAnswer(
                f"answers of {sum(came)} tokens came, and {sum(lengths)} were asked for"
            )
        return seconds, answers


def sample(num: int, num_picked: int = NUM_SAMPLED) -> list[int]:
    """Which of `num` answers are read again: evenly many, the first among them.

    >>> sample(4, 2)
    [0, 2]
    """
    num_picked = min(num, num_picked)
    return [number * num // num_picked for number in range(num_picked)]
