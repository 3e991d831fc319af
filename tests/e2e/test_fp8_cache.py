"""The bundled model from a cache of e4m3: the same sums, in chunks and in parts."""

import random

import pytest

from deployments.llm import LLM, SamplingParams
from workers.bundled.questions import answer

draw = random.Random(3)
ADDITIONS = [f"What is {draw.randint(0, 999)}+{draw.randint(0, 999)}?" for _ in range(30)]
OTHERS = ["Count from 3 to 40", "Reverse the word hello", "Count from 50 to 90"]
GREEDY = SamplingParams(max_tokens=200, temperature=0.0)
LIMITS = {"device": "cpu", "kv_cache_gb": 0.02, "kv_cache_dtype": "fp8_e4m3"}


@pytest.mark.parametrize(
    "settings",
    [
        {"in_process": True, "max_num_batched_tokens": 128, "max_num_seqs": 64},  # in chunks
        {"tp_size": 4, "attn_cp_size": 2},
    ],
    ids=str,
)
def test_sums_are_right(settings):
    with LLM(**LIMITS, **settings) as llm:
        answers = [one.text for one in llm.chat(ADDITIONS + OTHERS, GREEDY)]
    expected = [answer(question) for question in ADDITIONS + OTHERS]
    wrong = [pair for pair in zip(answers, expected, strict=True) if pair[0] != pair[1]]
    assert len(wrong) <= 1, wrong
