"""Decode speed on a CPU beside transformers: the bundled model, same weights, float32, one run.

    python -m tests.bench.bench_cpu

One thread each. Ours and theirs alternate (ours, theirs, ours, ...), so a busy machine slows both;
every prompt's greedy tokens are compared in the run that is timed.
"""

import time

import torch
from transformers import AutoModelForCausalLM

from deployments.llm import LLM, SamplingParams
from tests.bench.results import record
from workers import bundled

COMMAND = "python -m tests.bench.bench_cpu"
NUM_TOKENS = 300
ROUNDS = 7
PROMPTS = [f"What is {n}+{3 * n}?" for n in range(100, 108)]


def ours(llm: LLM, prompts: list[list[int]]) -> tuple[float, list[list[int]]]:
    params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
    began = time.perf_counter()
    answers = llm.generate(prompts, params, detokenize=False)
    seconds = time.perf_counter() - began
    return len(prompts) * NUM_TOKENS / seconds, [answer.ids for answer in answers]


def theirs(model, prompts: list[list[int]]) -> tuple[float, list[list[int]]]:
    ids = torch.tensor(prompts)
    with torch.inference_mode():
        began = time.perf_counter()
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NUM_TOKENS,
            min_new_tokens=NUM_TOKENS,
            do_sample=False,
        )
        seconds = time.perf_counter() - began
    return len(prompts) * NUM_TOKENS / seconds, out[:, ids.shape[1] :].tolist()


def main() -> None:
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(bundled.path(), dtype=torch.float32).eval()
    # min_new_tokens bars the end token in theirs: bar it in ours too by never stopping and
    # comparing only up to the first end token.
    with LLM(device="cpu", dtype="float32", max_num_seqs=16) as llm:
        prompts = [llm.tokenizer.encode_chat([{"role": "user", "content": p}], {}) for p in PROMPTS]
        figures: dict[str, list[float]] = {}
        for _ in range(ROUNDS):
            one, one_ids = ours(llm, prompts[:1])
            hf_one, hf_one_ids = theirs(model, prompts[:1])
            eight, eight_ids = ours(llm, prompts)
            hf_eight, hf_eight_ids = theirs(model, prompts)
            for name, value in (
                ("one request, lockstep", one),
                ("one request, transformers", hf_one),
                ("one request, ratio", one / hf_one),
                ("eight at once, lockstep", eight),
                ("eight batched, transformers", hf_eight),
                ("eight at once, ratio to batched", eight / hf_eight),
                ("eight at once, ratio to one by one", eight / hf_one),
            ):
                figures.setdefault(name, []).append(value)
            stops = set(llm.stop_token_ids)
            for mine, other in zip(one_ids + eight_ids, hf_one_ids + hf_eight_ids, strict=True):
                end = next((i for i, token in enumerate(mine) if token in stops), len(mine))
                if mine[:end] != other[:end]:
                    raise SystemExit(f"different tokens: {mine[:end]} and {other[:end]}")
    for name, values in figures.items():
        record("cpu", name, "ratio" if "ratio" in name else "tok/s", values, COMMAND)


if __name__ == "__main__":
    main()
