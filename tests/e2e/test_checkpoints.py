"""Real ranks over gloo: tiny checkpoints of four families say in every layout what one rank says.

And one rank says what transformers says. Few layouts run by default: each of tensor parallel,
context parallel, attention replicas, experts spread, an all-to-all, dense layers elsewhere, a head
within a replica and attention that gathers inside is in at least one of them. The others, and
every eighth of all that the bundled model has, are `slow`.
"""

from dataclasses import replace

import pytest
import torch

from deployments.llm import LLM, SamplingParams
from tests.e2e.test_parallel import A2A, DP2, DP4, REPLICAS, all_of_them, name_of
from tests.workers.reference import expected_logits, save_tiny
from tests.workers.test_models import GROUPS, INDEX, LATENT, SHARP_YARN

WIDE = LATENT | GROUPS | {"hidden_size": 64, "v_head_dim": 16, "max_position_embeddings": 128}
SPARSE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
FAMILIES = {
    "llama": ("Llama", {"max_position_embeddings": 128}),
    "qwen3 moe": ("Qwen3Moe", {**SPARSE, "norm_topk_prob": True, "max_position_embeddings": 128}),
    "v3": ("DeepseekV3", {**WIDE, "rope_parameters": SHARP_YARN}),
    "v3.2": ("DeepseekV32", {**WIDE, **INDEX, "index_topk": 8}),
}
PROMPTS = [list(range(3, 40)), [258, 0, 17, 200, 33], [7, 9], list(range(90, 101)), [5] * 20]
LIMITS = (4, 24, 12, 3, 16)
"""Few tokens for some, so that replicas fall idle while others go on."""

SYMMETRIC = {"enable_symm_mem": True, "symm_mem_strict": True, "symm_mem_prealloc_gb": 0.2}
DEFAULT = [
    ("llama", {"tp_size": 4, "attn_cp_size": 2}),
    ("llama", {**DP2, "enable_dp_lm_head": True, **SYMMETRIC}),
    ("qwen3 moe", {**DP2, "ep_size": 2, "moe_dense_tp_size": 1}),
    ("qwen3 moe", {"tp_size": 4, "attn_cp_size": 2, "ep_size": 2}),
    ("v3", {"tp_size": 2, "ep_size": 2, "moe_dense_tp_size": 1}),
    ("v3", {**DP2, "ep_size": 2, "enable_dp_lm_head": True, "moe_dense_tp_size": 2}),
    ("v3", {**DP2, **A2A, "ep_size": 4, "disable_attn_tp_gather": True, "moe_dense_tp_size": 1}),
    ("v3", {"tp_size": 4, "attn_cp_size": 2, "moe_dense_tp_size": 2}),
    ("v3.2", {"tp_size": 2, "attn_cp_size": 2, **SYMMETRIC}),
    ("v3.2", {"tp_size": 2, **REPLICAS}),
    ("v3.2", {**DP4, **A2A, "ep_size": 4, "enable_dp_lm_head": True, "moe_dense_tp_size": 1}),
]


def greedy(folder, **settings):
    """Each prompt's tokens with their log-probabilities."""
    limits = {"device": "cpu", "kv_cache_gb": 0.02, "max_num_seqs": 4, "max_model_len": 96}
    params = [
        SamplingParams(temperature=0, max_tokens=n, ignore_eos=True, logprobs=0) for n in LIMITS
    ]
    params[-1] = replace(params[-1], prompt_logprobs=0)
    with LLM(model=str(folder), **limits, max_num_batched_tokens=16, **settings) as llm:
        return llm.generate(PROMPTS, params, detokenize=False)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders, and what one rank says of each: compared with transformers already."""
    made = {}
    for family, (name, changes) in FAMILIES.items():
        folder = tmp_path_factory.mktemp(family)
        theirs = save_tiny(folder, name, **changes)
        answers = greedy(folder, in_process=True)
        for prompt, answer in zip(PROMPTS, answers, strict=True):
            logits = expected_logits(theirs, [prompt + answer.ids])[len(prompt) - 1 : -1]
            assert logits.argmax(-1).tolist() == answer.ids
            told = torch.tensor([value.logprob for value in answer.logprobs])
            torch.testing.assert_close(told, logits.log_softmax(-1).amax(-1), atol=1e-4, rtol=1e-4)
        made[family] = folder, answers
    return made


def compare(folder, settings, one_rank):
    for ours, theirs in zip(greedy(folder, **settings), one_rank, strict=True):
        assert ours.ids == theirs.ids
        for mine, other in zip(ours.logprobs, theirs.logprobs, strict=True):
            assert mine.logprob == pytest.approx(other.logprob, abs=1e-4)
        assert set(ours.prompt_logprobs) == set(theirs.prompt_logprobs)
        for position, mine in ours.prompt_logprobs.items():
            other = theirs.prompt_logprobs[position]
            assert mine.logprob == pytest.approx(other.logprob, abs=1e-4)
    assert len(theirs.prompt_logprobs) == len(PROMPTS[-1]) - 1


def id_of(value):
    return value if isinstance(value, str) else name_of(value)


@pytest.mark.row("S6", "S7", "S8", "S10", "S11")
@pytest.mark.parametrize(("family", "settings"), DEFAULT, ids=id_of)
def test_real_ranks_say_what_one_rank_says(family, settings, models):
    folder, one_rank = models[family]
    compare(folder, settings, one_rank)


MORE = [
    ("v3.2", {"tp_size": 4, "disable_attn_tp_gather": True, "moe_dense_tp_size": 1}),
    ("v3.2", {"tp_size": 4, "attn_cp_size": 2, "disable_attn_tp_gather": True}),
    ("v3.2", {"tp_size": 4, "attn_cp_size": 4, **A2A, "ep_size": 4, "moe_dense_tp_size": 1}),
    ("v3.2", {**DP2, "attn_cp_size": 2, "ep_size": 2, "enable_dp_lm_head": True}),
    ("llama", {"tp_size": 4, "attn_cp_size": 4}),
    ("llama", {"tp_size": 4}),
    ("llama", {**DP4}),
    *(("qwen3 moe", settings) for settings in list(all_of_them())[2::8]),
    *(("v3", settings) for settings in list(all_of_them())[::8]),
    *(("v3.2", settings) for settings in list(all_of_them())[4::8]),
]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "settings"), MORE, ids=id_of)
def test_more_layouts_do_too(family, settings, models):
    folder, one_rank = models[family]
    compare(folder, settings, one_rank)
