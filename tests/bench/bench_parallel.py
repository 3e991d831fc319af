"""Layouts of several GPUs, end to end and beside one GPU: the same tokens, and what a token costs.

    python -m tests.bench.bench_parallel                            # all cases of two GPUs
    python -m tests.bench.bench_parallel one dp2 dp2-symm --model moe --layers 12
    python -m tests.bench.bench_parallel --sanity                   # on a CPU, the bundled model

`one` is one GPU; it runs first, because the others are compared with it. Each case is a process of
its own with a time limit, and one JSON line:

    startup_s     until the engine is ready
    tpot_ms       time per output token at batch 1, 8 and 64, of steps in which all of them decode
    bucket_1      rows that a step of one request launches
    replayed      share of the timed steps that every rank replayed from a graph
    first_tokens  prompts whose first token is the one of one GPU
    same_tokens   tokens until the first that differs, over all tokens
    apart         largest and mean difference of log-probabilities, up to where tokens differ
    tie           at the first token that differs, how much likelier one GPU found its own
    graph_apart   the same figures, of decodes against an eager pass over the same tokens
    sync_us       MLP sync, which makes no collective: planning the header's rows and bucket
                  (driver), and reading the header and checking its chain (rank), medians
    collectives   by path and reason, over all ranks; `fallbacks` must be 0

With random weights in bfloat16 many likeliest tokens are near ties, so tokens may part; a case is
`good` if first tokens differ by ties only, no tie is wider than `TIE`, mean differences stay under
`MEAN_APART`, and there is no fallback.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from deployments.domain import Domain, Step
from deployments.llm import LLM, Answer, SamplingParams
from deployments.presets import PRESETS
from deployments.scheduler import Plan
from workers.protocol import Mode
from workers.worker import StepChain

TIE, MEAN_APART = 0.3, 0.05
REPLICAS = {"dp_size": 2, "enable_dp_attention": True}
TP2, DP2 = {"tp_size": 2}, {"tp_size": 2, **REPLICAS}
A2A = {"moe_a2a_backend": "torch", "ep_size": 2}
SYMM = {"enable_symm_mem": True}
SPREAD = TP2 | A2A | {"moe_dense_tp_size": 1}
CASES: dict[str, dict[str, Any]] = {
    "one": {},
    "tp2": TP2,
    "tp2-symm": TP2 | SYMM,
    "dp2": DP2,
    "dp2-symm": DP2 | SYMM,
    "dp2-ep2": DP2 | {"ep_size": 2},
    "dp2-a2a": DP2 | A2A,
    "cp2": TP2 | {"attn_cp_size": 2},
    "cp2-symm": TP2 | SYMM | {"attn_cp_size": 2},
    "gather-on": SPREAD,
    "gather-off": SPREAD | {"disable_attn_tp_gather": True},
}
"""On two GPUs; `gather-*` are `disable_attn_tp_gather` unset and set."""
LARGER = {
    "tp4": {"tp_size": 4},
    "tp4-symm": {"tp_size": 4} | SYMM,
    "dp2tp2": {"tp_size": 4, **REPLICAS},
    "dp2tp2-symm": {"tp_size": 4, **REPLICAS} | SYMM,
}
MODELS = {"moe": "30b-a3b", "dense": "8b", "deepseek": "v2-lite", "small": "0.6b"}


class Work(NamedTuple):
    """Sizes; `max_id` keeps prompts inside the vocabulary."""

    prompts: int = 12
    prompt: int = 96
    output: int = 48
    batches: tuple[int, ...] = (1, 8, 64)
    timed: int = 128
    max_id: int = 10000


SANITY = Work(prompts=4, prompt=9, output=6, batches=(1, 2), timed=8, max_id=250)


def greedy(length: int, logprobs: int | None = None) -> SamplingParams:
    return SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=length, logprobs=logprobs)


class Headers:
    """What the driver planned while it was watched, and how long the shared part of it took."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.planned_at: list[float] = []
        """When each of the steps was planned."""
        self.pad_us: list[float] = []
        step, pad = Domain.next_step, Domain._pad

        def timed_pad(domain: Domain, plans: list[Plan], num_rows: tuple[int, ...], mode: int):
            began = time.perf_counter()
            made = pad(domain, plans, num_rows, mode)
            self.pad_us.append((time.perf_counter() - began) * 1e6)
            return made

        def kept_step(domain: Domain) -> Step:
            made = step(domain)
            self.steps.append(made)
            self.planned_at.append(time.perf_counter())
            return made

        Domain._pad, Domain.next_step = timed_pad, kept_step  # type: ignore[method-assign]

    def clear(self) -> None:
        self.steps.clear()
        self.planned_at.clear()

    def decode_ms(self, num_rows: int, since: int) -> float:
        """From step to step while so many rows decode and nothing else is computed, on average;
        of the steps from number `since` on.

        Prompts are read in one step or in several, as they come: a difference of two runs would
        have those in it.
        """
        stretches: list[list[float]] = [[]]
        for step, at in zip(self.steps[since:], self.planned_at[since:], strict=True):
            if step.told.mode == Mode.DECODE and sum(step.told.num_rows) == num_rows:
                stretches[-1].append(at)
            elif stretches[-1]:
                stretches.append([])
        longest = max(stretches, key=len)
        if len(longest) < 2:
            raise ValueError(f"no two steps in a row decoded {num_rows} rows")
        return (longest[-1] - longest[0]) / (len(longest) - 1) * 1e3

    def read_us(self, num_replicas: int) -> float:
        """What a rank takes to read a header and to check that it follows the last."""
        if len(self.steps) < 3:
            return 0.0
        times: list[float] = []
        for before, after in zip(self.steps, self.steps[1:], strict=False):
            chain = StepChain(epoch=before.told.epoch, rank=0, replica=0)
            chain._previous, chain.step = before.header_digest, before.number
            began = time.perf_counter()
            chain.accept(after.header, after.bodies[0], after.header_digest)
            times.append((time.perf_counter() - began) * 1e6)
        return statistics.median(times)


def run_case(name: str, settings: dict[str, Any], work: Work, folder: Path) -> dict[str, Any]:
    headers = Headers()
    began = time.perf_counter()
    with LLM(**settings) as llm:
        out: dict[str, Any] = {"startup_s": round(time.perf_counter() - began, 1)}
        draw = random.Random(0)
        prompts = [
            [draw.randint(3, work.max_id) for _ in range(work.prompt + number % 5)]
            for number in range(work.prompts)
        ]
        answers = llm.generate(prompts, greedy(work.output, 5), detokenize=False)
        out |= {"graph_apart": against_prefill(llm, answers)}
        out |= compare(name, answers, folder)
        headers.clear()
        out["tpot_ms"] = {size: time_batch(llm, headers, size, work) for size in work.batches}
        decodes = [step.told for step in headers.steps if step.told.mode == 1]
        ones = Counter(told.bucket for told in decodes if sum(told.num_rows) == 1)
        out["bucket_1"] = ones.most_common(1)[0][0] if ones else 0
        out["replayed"] = round(sum(told.bucket > 0 for told in decodes) / max(1, len(decodes)), 3)
        out["sync_us"] = {
            "driver": round(statistics.median(headers.pad_us), 2),
            "rank": round(headers.read_us(llm.config.layout.num_replicas), 2),
        }
        counts = llm.engine.counters.collectives
        paths: Counter[str] = Counter()
        for (_, op, path, reason), number in counts.items():
            paths[" ".join(filter(None, (op, path, reason)))] += number
        out["collectives"] = dict(paths)
        out["fallbacks"] = sum(n for (_, _, path, _), n in counts.items() if path == "fallback")
        out["recoveries"] = llm.engine.counters.num_recoveries
    apart = [out[key]["mean"] for key in ("apart", "graph_apart") if key in out]
    ties = out.get("tie", [])
    out["good"] = not (
        out["fallbacks"]
        or out["recoveries"]
        or max(apart) > MEAN_APART
        or max(ties, default=0) > TIE
    )
    return out


def compare(name: str, answers: Sequence[Answer], folder: Path) -> dict[str, Any]:
    """With what one GPU said; `one` itself is kept."""
    path = folder / "one.json"
    mine = [(answer.ids, [tops_of(each) for each in answer.logprobs]) for answer in answers]
    if name == "one" or not path.exists():
        path.write_text(json.dumps(mine))
        return {}
    same = total = first = 0
    apart: list[float] = []
    ties: list[float] = []
    for (ids, tops), (other_ids, other_tops) in zip(
        mine, json.loads(path.read_text()), strict=True
    ):
        agree = next(
            (i for i, (a, b) in enumerate(zip(ids, other_ids, strict=True)) if a != b), None
        )
        count = len(ids) if agree is None else agree
        first += count > 0
        same, total = same + count, total + len(ids)
        for token, top, other in zip(ids[:count], tops, other_tops, strict=False):
            apart.append(abs(top[str(token)] - other[str(token)]))
        if agree is not None:
            theirs = other_tops[agree]
            other = theirs.get(str(ids[agree]), min(theirs.values()) - 1.0)
            ties.append(round(theirs[str(other_ids[agree])] - other, 4))
    return {
        "first_tokens": f"{first}/{len(mine)}",
        "same_tokens": round(same / total, 3),
        "apart": figures(apart),
        "tie": ties,
    }


def tops_of(values: Any) -> dict[str, float]:
    tops = dict(zip(map(str, values.top_ids), values.top_logprobs, strict=True))
    return tops | {str(values.token): values.logprob}


def against_prefill(llm: LLM, answers: Sequence[Answer]) -> dict[str, float]:
    """Each token's log-probability when it was decoded, and at the end of a prompt that has all
    before it: read eagerly, in one piece."""
    apart: list[float] = []
    for answer in answers[:4]:
        places = range(1, len(answer.ids), max(1, len(answer.ids) // 6))
        prompts = [answer.prompt_ids + answer.ids[:place] for place in places]
        again = llm.generate(prompts, greedy(1, 5), detokenize=False)
        for place, one in zip(places, again, strict=True):
            theirs = tops_of(one.logprobs[0])
            token = str(answer.ids[place])
            decoded = tops_of(answer.logprobs[place])[token]
            apart.append(abs(decoded - theirs.get(token, decoded - 9.0)))
    return figures(apart)


def figures(values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {"largest": 0.0, "mean": 0.0}
    return {"largest": round(max(values), 4), "mean": round(statistics.fmean(values), 5)}


def time_batch(llm: LLM, headers: Headers, size: int, work: Work) -> float:
    draw = random.Random(size)
    prompts = [[draw.randint(3, work.max_id) for _ in range(work.prompt)] for _ in range(size)]
    llm.generate(prompts, greedy(8), detokenize=False)
    best = []
    for _ in range(2):
        before = len(headers.steps)
        llm.generate(prompts, greedy(work.timed + 1), detokenize=False)
        best.append(headers.decode_ms(size, before))
    return round(min(best), 3)


def settings_of(args: argparse.Namespace, case: dict[str, Any], folder: Path) -> dict[str, Any]:
    if args.sanity:
        return case | {
            "device": "cpu", "kv_cache_gb": 0.1, "max_num_seqs": 8, "max_model_len": 256,
            "enable_prefix_caching": False,
        }  # fmt: skip
    config = dict(PRESETS[MODELS[args.model]])
    if args.layers:
        config["num_hidden_layers"] = args.layers
    (folder / "config.json").write_text(json.dumps(config))
    return case | {
        "model": str(folder), "load_format": "dummy", "max_model_len": 4096, "max_num_seqs": 64,
        "max_num_batched_tokens": 4096, "kv_cache_gb": 8.0, "enable_prefix_caching": False,
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.bench_parallel")
    parser.add_argument("case", nargs="*", help=f"of {', '.join([*CASES, *LARGER])}")
    parser.add_argument("--model", choices=MODELS, default="moe")
    parser.add_argument("--layers", type=int, default=12, help="0 for all of the model's")
    parser.add_argument("--set", default="{}", help="settings for all cases, as JSON")
    parser.add_argument("--limit-s", type=float, default=150.0, help="of one case")
    parser.add_argument("--sanity", action="store_true", help="the bundled model on a CPU")
    parser.add_argument("--run", default="", help=argparse.SUPPRESS)
    parser.add_argument("--folder", default="", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    every = CASES | LARGER
    unknown = [name for name in args.case if name not in every]
    if unknown:
        parser.error(f"no case {unknown[0]}; there are {', '.join(every)}")
    if args.run:
        folder = Path(args.folder)
        settings = settings_of(args, every[args.run] | json.loads(args.set), folder)
        work = SANITY if args.sanity else Work()
        print(json.dumps({"case": args.run} | run_case(args.run, settings, work, folder)))
        return 0
    names = args.case or list(CASES)
    names = ["one", *(name for name in names if name != "one")]
    num_bad = 0
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            line = in_a_process(args, name, folder, argv if argv is not None else sys.argv[1:])
            print(json.dumps(line), flush=True)
            num_bad += not line.get("good", False)
    return 1 if num_bad else 0


def in_a_process(
    args: argparse.Namespace, name: str, folder: str, argv: Sequence[str]
) -> dict[str, Any]:
    options = [word for word in argv if word not in args.case]
    command = [sys.executable, "-m", "tests.bench.bench_parallel", *options]
    began = time.perf_counter()
    process = subprocess.Popen(
        [*command, "--run", name, "--folder", folder],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        out, err = process.communicate(timeout=args.limit_s)
    except subprocess.TimeoutExpired:
        process.terminate()  # its ranks notice that their driver is gone
        try:
            process.communicate(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
        return {"case": name, "error": f"not done in {args.limit_s:g} s"}
    if process.returncode:
        return {"case": name, "error": " | ".join((err or out).splitlines()[-6:])}
    line = json.loads(out.splitlines()[-1])
    return line | {"wall_s": round(time.perf_counter() - began, 1)}


if __name__ == "__main__":
    sys.exit(main())
