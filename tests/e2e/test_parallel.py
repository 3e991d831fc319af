"""Real ranks over gloo: whatever the layout, the bundled model says what one rank says.

A few combinations that cover every pair of settings that matters run by default, the others are
`slow`. The requests are chosen so that replicas are uneven, idle for a while, and that prompts and
decodes meet in one step.
"""

import asyncio
import itertools

import pytest

from deployments.llm import LLM, SamplingParams
from tests.e2e.conftest import deployed
from tests.e2e.test_line import ask_all, questions
from workers.bundled.questions import answer

QUESTIONS = (
    "What is 128+305?",
    "Count from 3 to 20",
    "Add 5 and 900.",
    "What is 7+8?",
    "Count from 10 to 17",
    "Reverse the word stone",
    "What is 999+1?",
)
LIMITS = (4, 24, 6, 3, 12, 16, 8)
"""Few tokens for some, so that replicas fall idle while others go on."""

REPLICAS = {"dp_size": 2, "enable_dp_attention": True}
DP2 = {"tp_size": 4, **REPLICAS}
DP4 = {"tp_size": 4, "dp_size": 4, "enable_dp_attention": True}
A2A = {"moe_a2a_backend": "torch"}

DEFAULT = [
    {"tp_size": 2, **REPLICAS, "padding": "auto"},
    {**DP2, "padding": "max_len"},
    {**DP2, "ep_size": 2, "enable_dp_lm_head": True, "moe_dense_tp_size": 2},
    {**DP2, **A2A, "ep_size": 4, "moe_dense_tp_size": 1},
    {**DP2, **A2A, "ep_size": 2, "moe_dp_size": 2, "disable_attn_tp_gather": True},
    {**DP4, "ep_size": 4, "moe_dense_tp_size": 1},
    {**DP4, **A2A, "ep_size": 4, "enable_dp_lm_head": True, "moe_dense_tp_size": 1},
    {"tp_size": 4, **A2A, "ep_size": 4},
    {"tp_size": 4, **A2A, "ep_size": 4, "disable_attn_tp_gather": True, "moe_dense_tp_size": 1},
    {"tp_size": 2, "ep_size": 2, "moe_dense_tp_size": 1},
    {"tp_size": 2, "attn_cp_size": 2},
    {"tp_size": 4, "attn_cp_size": 2, **A2A, "ep_size": 4, "disable_attn_tp_gather": True},
    {
        **DP2,
        "attn_cp_size": 2,
        "ep_size": 2,
        "padding": "auto",
        "enable_symm_mem": True,
        "symm_mem_strict": True,
    },
]


def all_of_them():
    """Every combination on two and four ranks that the bundled model has a plan for."""
    for tp, dp, cp, dense, (backend, ep, moe_dp), lm_head, inside in itertools.product(
        (2, 4), (1, 2, 4), (1, 2), (None, 1, 2), (("none", 1, 1), ("none", 2, 1), ("none", 4, 1),
        ("torch", 4, 1), ("torch", 2, 2), ("torch", 2, 1)), (False, True), (False, True),
    ):  # fmt: skip
        spread = ep * moe_dp
        if tp % (dp * cp) or tp % spread or (backend == "torch" and spread < tp):
            continue
        if (lm_head and dp == 1) or (dense == 2 and 2 not in (tp, tp // dp // cp)):
            continue
        settings = {"tp_size": tp, "ep_size": ep, "moe_dp_size": moe_dp, "moe_a2a_backend": backend}
        settings |= {"attn_cp_size": cp}
        if dp > 1:
            settings |= {"dp_size": dp, "enable_dp_attention": True, "enable_dp_lm_head": lm_head}
        if dense is not None:
            settings["moe_dense_tp_size"] = dense
        yield settings | {"disable_attn_tp_gather": inside}


def greedy(**settings):
    """Texts, and each request's tokens with their log-probabilities."""
    limits = {"device": "cpu", "kv_cache_gb": 0.05, "max_num_seqs": 4, "max_model_len": 256}
    params = [SamplingParams(temperature=0, max_tokens=n, logprobs=0) for n in LIMITS]
    with LLM(**limits, max_num_batched_tokens=24, **settings) as llm:
        return llm.chat(QUESTIONS, params)


@pytest.fixture(scope="module")
def one_rank():
    return greedy()


def name_of(settings):
    short = {"enable_dp_attention": "dpa", "moe_a2a_backend": "a2a", "moe_dense_tp_size": "dense"}
    return "-".join(f"{short.get(name, name)}={value}" for name, value in settings.items())


def compare(settings, one_rank):
    for ours, theirs in zip(greedy(**settings), one_rank, strict=True):
        assert ours.ids == theirs.ids
        assert ours.text == theirs.text
        for mine, other in zip(ours.logprobs, theirs.logprobs, strict=True):
            assert mine.logprob == pytest.approx(other.logprob, abs=1e-4)


@pytest.mark.row("S10")
@pytest.mark.row("S11")
@pytest.mark.parametrize("settings", DEFAULT, ids=name_of)
def test_real_ranks_say_what_one_rank_says(settings, one_rank):
    compare(settings, one_rank)


def told_of_prompt(**settings):
    """A prompt longer than a step, twice: the second time its pages are found in the cache."""
    limits = {"device": "cpu", "kv_cache_gb": 0.05, "max_num_seqs": 2, "max_model_len": 256}
    prompt = "".join(QUESTIONS[:4])
    params = SamplingParams(temperature=0, max_tokens=4, prompt_logprobs=2)
    with LLM(**limits, max_num_batched_tokens=7, page_size=4, **settings) as llm:
        told = llm.generate([prompt], params)[0]
        again = llm.generate([prompt], SamplingParams(temperature=0, max_tokens=4))[0]
    return told, again


@pytest.mark.row("S7")
def test_parts_tell_a_prompts_logprobs_and_find_its_prefix():
    told, again = told_of_prompt(tp_size=2, attn_cp_size=2)
    expected, _ = told_of_prompt()
    assert told.ids == again.ids == expected.ids
    assert again.num_cached > 32
    num_prompt = len(told.prompt_ids)
    assert list(told.prompt_logprobs) == list(range(1, num_prompt))
    for position, mine in told.prompt_logprobs.items():
        other = expected.prompt_logprobs[position]
        assert mine.token == other.token == told.prompt_ids[position]
        assert mine.logprob == pytest.approx(other.logprob, abs=1e-4)
        assert mine.top_ids == other.top_ids


@pytest.mark.row("S10")
def test_attention_replicas_serve_over_http(cluster):
    asked = questions(24, seed=5)
    with deployed(cluster, tp_size=2, max_num_seqs=4, **REPLICAS) as url:
        answers = asyncio.run(ask_all(url, asked))
    right = [answer(q) == text for q, text in zip(asked, answers, strict=True)]
    assert sum(right) >= 0.9 * len(asked)


@pytest.mark.slow
@pytest.mark.parametrize("settings", list(all_of_them()), ids=name_of)
def test_all_other_combinations_do_too(settings, one_rank):
    compare(settings, one_rank)
