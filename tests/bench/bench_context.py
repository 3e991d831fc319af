"""Context parallelism beside tensor parallelism: one long prompt read, one token after another.

    python -m tests.bench.bench_context                      two GPUs, preset 8b, a prompt of 32k
    python -m tests.bench.bench_context --layouts 0 1        some of the layouts
    python -m tests.bench.bench_context --device cpu --model "" --prompt 200 --budget 64

For each layout one JSON line: seconds to the first token of a prompt of random ids (the best of
three), milliseconds a token of a request alone behind a short prompt, and, where gathers have a
stream of their own, what a trace of one chunk says of them (`tests.bench.context_trace`): how many,
by which kernels, how long, and how much of that time other kernels ran too. Random weights. Each
layout has processes of its own and `--seconds` to be done; what does not fit into `--total` seconds
is left out, and said.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deployments.bench import greedy
from deployments.llm import LLM
from deployments.presets import PRESETS
from workers import bundled

CONTEXT = {"tp_size": 2, "attn_cp_size": 2}
LAYOUTS: tuple[dict[str, Any], ...] = (
    {**CONTEXT, "enable_symm_mem": True},
    {"tp_size": 2},
    {"tp_size": 1},
    {**CONTEXT, "moe_dense_tp_size": 1, "enable_symm_mem": True},
    CONTEXT,
)
NUM_PROMPTS, NUM_TOKENS, SHORT = 3, 64, 128


def measure(settings: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """One layout, in this process and its ranks."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.model in PRESETS:
            (folder / "config.json").write_text(json.dumps(PRESETS[args.model]))
        else:
            for file in (Path(args.model) if args.model else bundled.path()).iterdir():
                (folder / file.name).symlink_to(file.resolve())
        chosen = {
            "model": str(folder),
            "load_format": "dummy" if args.model in PRESETS else "auto",
            "device": args.device,
            "max_model_len": max(args.prompt, SHORT) + NUM_TOKENS + 1,
            "max_num_batched_tokens": args.budget,
            "max_num_seqs": 4,
            "enable_prefix_caching": False,
        }
        if args.device == "cpu":
            chosen["kv_cache_gb"] = 0.05
        began = time.perf_counter()
        with LLM(runner="tests.bench.context_trace:TracedRunner", **chosen | settings) as llm:
            told: dict[str, Any] = {"startup_s": round(time.perf_counter() - began, 1)}
            timed(llm, args.prompt, 1)
            told["prefill_s"] = round(
                min(timed(llm, args.prompt, 1) for _ in range(NUM_PROMPTS)), 4
            )
            timed(llm, SHORT, 1)
            first_s = min(timed(llm, SHORT, 1) for _ in range(2))
            all_s = min(timed(llm, SHORT, NUM_TOKENS + 1) for _ in range(2))
            told["tpot_ms"] = round((all_s - first_s) / NUM_TOKENS * 1e3, 3)
        trace = folder / "context.json"
        if trace.exists():
            told["trace"] = json.loads(trace.read_text())
    return told


def timed(llm: LLM, num_prompt: int, num_tokens: int) -> float:
    """Seconds from a prompt of random ids to the last of its tokens."""
    highest = min(10_000, llm.vocab_size - 1)
    prompt = [random.randint(1, highest) for _ in range(num_prompt)]
    began = time.perf_counter()
    (answer,) = llm.generate([prompt], greedy(num_tokens), detokenize=False)
    if len(answer.ids) != num_tokens:
        raise RuntimeError(f"{len(answer.ids)} tokens came, and {num_tokens} were asked for")
    return time.perf_counter() - began


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m tests.bench.bench_context", description=__doc__)
    made.add_argument("--model", default="8b", help="a preset, a folder, or nothing: the bundled")
    made.add_argument("--prompt", type=int, default=32768, help="tokens of the long prompt")
    made.add_argument("--budget", type=int, default=8192, help="max_num_batched_tokens")
    made.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    made.add_argument("--layouts", type=int, nargs="*", help="which, by number from 0; else all")
    made.add_argument("--seconds", type=float, default=100.0, help="for one layout")
    made.add_argument("--total", type=float, default=175.0, help="for all of them")
    made.add_argument("--only", default="", help=argparse.SUPPRESS)
    return made


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    args = parser().parse_args(words)
    if args.only:
        print(json.dumps(measure(json.loads(args.only), args)), flush=True)
        return 0
    deadline = time.monotonic() + args.total
    bad = 0
    for number in range(len(LAYOUTS)) if args.layouts is None else args.layouts:
        layout = LAYOUTS[number]
        left = min(args.seconds, deadline - time.monotonic())
        told = run(layout, words, left) if left > 10 else {"skipped": "no time is left"}
        bad += "error" in told
        about = {"model": args.model or "bundled", "prompt": args.prompt, **layout}
        print(json.dumps(about | told), flush=True)
    return 1 if bad else 0


def run(layout: dict[str, Any], words: Sequence[str], seconds: float) -> dict[str, Any]:
    """`measure` in a process of its own, which is ended with its ranks when its time is over."""
    command = [sys.executable, "-m", "tests.bench.bench_context", *words]
    process = subprocess.Popen(
        [*command, "--only", json.dumps(layout)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.terminate()
        process.communicate()
        return {"error": f"not done within {seconds:.0f} s"}
    if process.returncode:
        return {"error": (err.strip().splitlines() or ["no reason given"])[-1]}
    return json.loads(out.strip().splitlines()[-1])


if __name__ == "__main__":
    sys.exit(main())
