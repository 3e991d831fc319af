"""`lockstep bench offline`: how fast the engine is without HTTP, one JSON line a case.

Time to start, then the cases of `deployments.bench_cases`, which `tests/bench/peer_vllm.py` asks of
vLLM. A preset name (`8b`) stands for a model of that shape with random weights.

What is timed is checked: after the last case a sample of each case's answers is read as prompts
(`deployments.bench_tokens`): one line `tokens_ok` a case. If one is false the exit code is 1.
"""

import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from deployments.bench_cases import FULL, Cases, Generate, Workload
from deployments.bench_tokens import greedy, read_again, verdicts
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


def generate_on(llm: LLM) -> Generate[Answer]:
    """How `Cases` asks an engine of ours."""

    def generate(prompts: Sequence[list[int]], lengths: Sequence[int]) -> list[Answer]:
        params = [greedy(length) for length in lengths]
        return llm.generate(prompts, params, detokenize=False)

    return generate


def offline(
    settings: dict[str, Any],
    *,
    workload: Workload = FULL,
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
            bench = Cases(generate_on(llm), workload)
            for case in bench.run(cases):
                show(json.dumps(about | case))
            timed = bench.timed if check_tokens else []
            checks = verdicts([read_again(llm, one) for one in timed])
            for check in checks:
                show(json.dumps(about | check))
    return 0 if all(check["value"] for check in checks) else 1
