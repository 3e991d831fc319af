"""`lockstep bench offline`: how fast the engine is without HTTP, one JSON line a case.

The cases are those that engines are commonly compared by: time to start, time per output token of
one request and of 32 and 128 requests of 1024 tokens, and the throughput of 256 requests of mixed
lengths (100 to 1024 in, 100 to 1024 out, drawn with seed 0). Prompts are random ids, answers are
greedy and ignore the end of sequence, so any weights will do: a preset name (`8b`) stands for a
model of that shape with random weights.

What is timed is checked: every answer must have its length, and after the last case a sample of
each case's answers is read as prompts (`deployments.bench_tokens`): one line `tokens_ok` a case. If
one is false the exit code is 1.
"""

import json
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from deployments.bench_tokens import Timed, greedy, read_again, sample, verdicts
from deployments.config import ServiceConfig
from deployments.llm import LLM, Answer
from deployments.presets import PRESETS, write_preset
from workers import bundled
from workers.architectures import read_model_config

DEFAULTS: dict[str, Any] = {
    "max_model_len": 8192,
    "gpu_memory_utilization": 0.85,
    "enable_prefix_caching": False,
}
"""Settings of a benchmark where the command line names no others."""


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


class Bench:
    """Runs the cases on an engine that is up."""

    def __init__(self, llm: LLM, workload: Workload) -> None:
        self._llm, self._workload = llm, workload
        self._random = random.Random(0)
        self._timed: list[Timed] = []

    def cases(self, names: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
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

    def checks(self) -> list[dict[str, Any]]:
        """Whether the tokens of the cases so far are right, a line each."""
        return verdicts([read_again(self._llm, timed) for timed in self._timed])

    def _alone(self, case: str) -> dict[str, Any]:
        work = self._workload
        prompts = [self._prompt(work.alone_prompt)]
        first_s = min(self._run(prompts, [1])[0] for _ in range(2))
        runs = [self._run(prompts, [work.alone_output + 1]) for _ in range(2)]
        all_s, answers = min(runs, key=lambda run: run[0])
        self._timed.append(Timed(case, prompts, answers))
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
        self._timed.append(Timed(case, prompts, answers))
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
        picked = sample(answers)
        self._timed.append(Timed(case, [prompts[n] for n in picked], [answers[n] for n in picked]))
        return {
            "case": case,
            "value": round(sum(lengths) / seconds),
            "out_tokens": sum(lengths),
            "s": round(seconds, 2),
        }

    def _prompt(self, length: int) -> list[int]:
        low = min(10, self._workload.max_id)
        return [self._random.randint(low, self._workload.max_id) for _ in range(length)]

    def _run(
        self, prompts: Sequence[Sequence[int]], lengths: Sequence[int]
    ) -> tuple[float, list[Answer]]:
        """(seconds, answers), each of which has its length."""
        params = [greedy(length) for length in lengths]
        began = time.perf_counter()
        answers = self._llm.generate(prompts, params, detokenize=False)
        seconds = time.perf_counter() - began
        short = [len(answer.ids) for answer in answers]
        if short != list(lengths):
            raise WrongAnswer(f"answers of {sum(short)} tokens came, and {sum(lengths)} were asked")
        return seconds, answers


def offline(
    settings: dict[str, Any],
    *,
    workload: Workload = Workload(),
    cases: Sequence[str] = (),
    check_tokens: bool = True,
    show: Callable[[str], None] = print,
) -> int:
    """Run the cases, all if none is named; the exit code."""
    unknown = [case for case in cases if case not in workload.cases]
    if unknown:
        raise ValueError(f"there is no case {unknown[0]!r}: there are {', '.join(workload.cases)}")
    name = settings.get("model", "")
    with tempfile.TemporaryDirectory() as folder:
        chosen = DEFAULTS | settings
        if name in PRESETS:
            chosen |= {"model": str(write_preset(name, Path(folder))), "load_format": "dummy"}
        model = read_model_config(Path(chosen["model"]) if chosen.get("model") else bundled.path())
        if "max_model_len" not in settings:
            limit = min(DEFAULTS["max_model_len"], model.max_position_embeddings)
            chosen["max_model_len"] = limit
        workload = replace(workload, max_id=min(workload.max_id, model.vocab_size - 1))
        ServiceConfig.from_args(chosen)  # a misspelt setting is told before anything starts
        began = time.perf_counter()
        with LLM(**chosen) as llm:
            about = {"engine": "lockstep", "model": name, "tp": llm.config.tp_size}
            startup_s = round(time.perf_counter() - began, 1)
            show(json.dumps(about | {"case": "startup_s", "value": startup_s}))
            bench = Bench(llm, workload)
            for case in bench.cases(cases):
                show(json.dumps(about | case))
            checks = bench.checks() if check_tokens else []
            for check in checks:
                show(json.dumps(about | check))
    return 0 if all(check["value"] for check in checks) else 1
