"""vLLM on the cases of `lockstep bench offline`: the same requests, timed by the same code.

    python -m tests.bench.peer_vllm 8b                      model, random weights
    python -m tests.bench.peer_vllm 8b 2 --set '{"max_num_seqs": 256}'

Runs from the project's folder with an interpreter that has vLLM; of ours it needs no package. One
JSON line a case, as `tests.bench.compare` reads them:

    python -m tests.bench.compare --models 8b --peer-name "vLLM 0.24.0" \\
        --peer-command "/path/of/vllm/bin/python -m tests.bench.peer_vllm {model} {tp}"

Tokens come as ids, without a tokenizer; prefix caching is off on both sides.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from deployments.bench_cases import FULL, Cases
from deployments.presets import PRESETS, write_preset

SETTINGS: dict[str, Any] = {
    "skip_tokenizer_init": True,
    "load_format": "dummy",
    "max_model_len": 8192,
    "gpu_memory_utilization": 0.85,
    "enable_prefix_caching": False,
    "max_num_seqs": 512,
    "seed": 0,
    "disable_log_stats": True,
}


class Answer(NamedTuple):
    ids: list[int]


def run(model: str, tp_size: int, settings: dict[str, Any], cases: Sequence[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = write_preset(model, Path(folder))
        began = time.perf_counter()
        from vllm import LLM, SamplingParams  # pyright: ignore[reportMissingImports]

        llm = LLM(model=str(path), tensor_parallel_size=tp_size, **SETTINGS | settings)
        about = {"engine": "vllm", "model": model, "tp": tp_size}
        startup_s = round(time.perf_counter() - began, 1)
        print(json.dumps(about | {"case": "startup_s", "value": startup_s}), flush=True)

        def generate(prompts: Sequence[list[int]], lengths: Sequence[int]) -> list[Answer]:
            params = [
                SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=n, detokenize=False)
                for n in lengths
            ]
            asked = [{"prompt_token_ids": ids} for ids in prompts]
            answers = llm.generate(asked, params, use_tqdm=False)
            return [Answer(list(answer.outputs[0].token_ids)) for answer in answers]

        for case in Cases(generate, FULL).run(cases):
            print(json.dumps(about | case), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description="vLLM on the cases of `lockstep bench offline`.")
    parser.add_argument("model", choices=PRESETS)
    parser.add_argument("tp_size", nargs="?", type=int, default=1, help="GPUs")
    parser.add_argument("--cases", default="", help="names with commas between; all")
    parser.add_argument("--set", type=json.loads, default={}, help="JSON: arguments of vllm.LLM")
    args = parser.parse_args()
    run(args.model, args.tp_size, args.set, [name for name in args.cases.split(",") if name])
    return 0


if __name__ == "__main__":
    sys.exit(main())
