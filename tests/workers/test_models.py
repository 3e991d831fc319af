"""Every family, and every variant that a config.json can ask for, against transformers."""

import pytest
import torch

from parallel.layout import Layout
from parallel.plan import PlanError
from parallel.thread_world import run_thread_world
from tests.workers.reference import (
    CPU,
    SEQUENCES,
    batch_of,
    expected_logits,
    load,
    logits_of,
    no_progress,
    save_tiny,
)
from workers.errors import BadSplit
from workers.models import MODELS, build_model, read_model_config
from workers.weights import dummy_weights, load_weights

YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
MOE = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
LATENT = {
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 16,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.7,
}
GROUPS = {"n_group": 4, "topk_group": 2}
INDEX = {"index_n_heads": 8, "index_head_dim": 16}
SHARP_YARN = YARN | {"mscale": 0.7, "mscale_all_dim": 0.9}
WINDOW = {"use_sliding_window": True, "sliding_window": 4}

CASES = {
    "llama": ("Llama", {}),
    "llama tied": ("Llama", {"tie_word_embeddings": True}),
    "llama biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama one kv head": ("Llama", {"num_key_value_heads": 1, "head_dim": 16}),
    "llama llama3 rope": ("Llama", {"rope_parameters": LLAMA3}),
    "llama yarn": ("Llama", {"rope_parameters": YARN}),
    "llama yarn untruncated": ("Llama", {"rope_parameters": {**YARN, "truncate": False}}),
    "llama linear rope": ("Llama", {"rope_parameters": LINEAR}),
    "qwen2": ("Qwen2", {}),
    "qwen2 tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2 window": ("Qwen2", {**WINDOW, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "qwen3 window": ("Qwen3", {**WINDOW, "max_window_layers": 2, "head_dim": 8}),
    "qwen3 biases": ("Qwen3", {"attention_bias": True, "head_dim": 8}),
    "qwen3 moe": ("Qwen3Moe", {**MOE, "norm_topk_prob": True}),
    "qwen3 moe unnormalised": ("Qwen3Moe", {**MOE, "norm_topk_prob": False}),
    "qwen3 moe dense layers": ("Qwen3Moe", {**MOE, "mlp_only_layers": [0]}),
    "qwen3 moe sparse step": ("Qwen3Moe", {**MOE, "decoder_sparse_step": 2}),
    "qwen3 moe window": ("Qwen3Moe", {**MOE, **WINDOW}),
    "deepseek v2": ("DeepseekV2", {**LATENT, "topk_method": "greedy"}),
    "deepseek v2 groups": (
        "DeepseekV2",
        {**LATENT, **GROUPS, "topk_method": "group_limited_greedy", "rope_parameters": SHARP_YARN},
    ),
    "deepseek v2 direct queries": ("DeepseekV2", {**LATENT, "q_lora_rank": None}),
    "deepseek v2 biases": ("DeepseekV2", {**LATENT, "attention_bias": True}),
    "deepseek v3": ("DeepseekV3", {**LATENT, **GROUPS}),
    "deepseek v3 yarn": ("DeepseekV3", {**LATENT, **GROUPS, "rope_parameters": SHARP_YARN}),
    "deepseek v3 unnormalised": (
        "DeepseekV3",
        {**LATENT, **GROUPS, "norm_topk_prob": False, "attention_bias": True},
    ),
    "deepseek v3 halves": (
        "DeepseekV3",
        {**LATENT, **GROUPS, "rope_interleave": False, "q_lora_rank": None},
    ),
    "deepseek v3.2 all tokens": ("DeepseekV32", {**LATENT, **GROUPS, **INDEX, "index_topk": 24}),
    "deepseek v3.2": ("DeepseekV32", {**LATENT, **GROUPS, **INDEX, "index_topk": 5}),
    "deepseek v3.2 yarn": (
        "DeepseekV32",
        {**LATENT, **GROUPS, **INDEX, "index_topk": 7, "rope_parameters": SHARP_YARN},
    ),
    "mixtral": ("Mixtral", {"num_local_experts": 4}),
    "mixtral window": ("Mixtral", {"num_local_experts": 4, "sliding_window": 4}),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(case, tmp_path):
    family, changes = CASES[case]
    theirs = save_tiny(tmp_path, family, **changes)
    expected = expected_logits(theirs, SEQUENCES)
    torch.testing.assert_close(logits_of(load(tmp_path), SEQUENCES), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "case", ["qwen3 moe", "mixtral", "deepseek v2", "deepseek v3", "deepseek v3.2"]
)
def test_checkpoints_with_fused_experts_are_read(case, tmp_path):
    family, changes = CASES[case]
    theirs = save_tiny(tmp_path / "by expert", family, **changes)
    theirs.save_pretrained(tmp_path / "fused", save_original_format=False)
    expected = logits_of(load(tmp_path / "by expert"), SEQUENCES)
    assert torch.equal(logits_of(load(tmp_path / "fused"), SEQUENCES), expected)


LAYOUTS = {
    "tp 2": Layout(tp_size=2),
    "tp 4, kv heads shared": Layout(tp_size=4),
    "tp 4, 2 x 2 experts": Layout(tp_size=4, ep_size=2),
    "ep 4, padded experts": Layout(tp_size=4, ep_size=4),
    "two replicas": Layout(tp_size=2, dp_size=2),
    "dense layers whole": Layout(tp_size=2, moe_dense_tp_size=1),
    "two attention replicas": Layout(tp_size=4, dp_size=2, enable_dp_attention=True),
    "four attention replicas": Layout(tp_size=4, dp_size=4, enable_dp_attention=True),
    "dense layers in a replica": Layout(
        tp_size=4, dp_size=2, enable_dp_attention=True, moe_dense_tp_size=2
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "case",
    [
        "llama biases",
        "qwen2 tied",
        "qwen3",
        "qwen3 moe dense layers",
        "mixtral",
        "deepseek v2 biases",
        "deepseek v3.2",
    ],
)
def test_every_layout_gives_the_logits_of_one_rank(case, layout, tmp_path):
    family, changes = CASES[case]
    if LAYOUTS[layout].ep_size > 1 and family in ("Llama", "Qwen2", "Qwen3"):
        pytest.skip("no experts to place")
    save_tiny(tmp_path, family, **changes)
    expected = logits_of(load(tmp_path), SEQUENCES)
    for logits in run_thread_world(
        LAYOUTS[layout],
        lambda rank, groups: logits_of(load(tmp_path, groups), SEQUENCES, groups.attn_dp.size),
    ):
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def test_ranks_of_a_layout_agree_bit_for_bit_and_keep_equal_ledgers(tmp_path):
    save_tiny(tmp_path, "Qwen3Moe", **MOE)

    def body(rank, groups):
        return logits_of(load(tmp_path, groups), SEQUENCES), groups.ledger.take()

    (first, ledger), *others = run_thread_world(Layout(tp_size=4, ep_size=2), body)
    for logits, other_ledger in others:
        assert torch.equal(logits, first)
        assert other_ledger == ledger


def test_a_vocabulary_smaller_than_the_padding_of_the_last_rank(tmp_path):
    save_tiny(tmp_path, "Llama", vocab_size=5, bos_token_id=0, eos_token_id=1)
    expected = logits_of(load(tmp_path), [[0, 4, 2]])
    for logits in run_thread_world(
        Layout(tp_size=4), lambda rank, groups: logits_of(load(tmp_path, groups), [[0, 4, 2]])
    ):
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("case", ["qwen3", "qwen3 moe"])
def test_a_step_without_rows_takes_part_in_all_collectives(case, tmp_path):
    family, changes = CASES[case]
    save_tiny(tmp_path, family, **changes)

    def body(rank, groups):
        model = load(tmp_path, groups)
        model.forward(batch_of([SEQUENCES[0]]))
        before = groups.ledger.num_collectives
        empty = model.forward(batch_of([[]]))
        return empty.shape, groups.ledger.num_collectives, before

    for shape, total, first in run_thread_world(Layout(tp_size=2), body):
        assert tuple(shape) == (0, 32)
        assert total == 2 * first


def test_a_model_says_what_its_runner_must_know(tmp_path):
    save_tiny(tmp_path, "Qwen3", head_dim=16)
    models = run_thread_world(Layout(tp_size=4), lambda rank, groups: load(tmp_path, groups))
    for model in models:
        assert model.num_layers == 3
        assert (model.num_heads, model.cache_shapes) == (1, ((1, 16), (1, 16)))
        assert (model.vocab_size, model.max_position_embeddings) == (259, 64)
        assert model.dtype == torch.float32
        assert model.stop_token_ids == (2,)


@pytest.mark.parametrize("case", ["llama", "qwen3 moe"])
def test_dummy_weights_are_the_same_model_in_every_layout(case, tmp_path):
    family, changes = CASES[case]
    layout = Layout(tp_size=4, ep_size=1 if family == "Llama" else 2)
    save_tiny(tmp_path, family, **changes)

    def body(rank, groups):
        model = build_model(read_model_config(tmp_path), groups, CPU, torch.float32)
        dummy_weights(model, seed=7)
        return logits_of(model, SEQUENCES)

    (expected,) = run_thread_world(Layout(), body)
    assert expected.std() > 0
    for logits in run_thread_world(layout, body):
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def test_bfloat16_runs_and_its_logits_are_float32(tmp_path):
    theirs = save_tiny(tmp_path, "Qwen3Moe", **MOE, norm_topk_prob=True)
    config = read_model_config(tmp_path)
    (logits,) = run_thread_world(
        Layout(), lambda rank, groups: _bfloat16_logits(config, groups, tmp_path)
    )
    assert logits.dtype == torch.float32
    expected = expected_logits(theirs, SEQUENCES)
    assert torch.nn.functional.cosine_similarity(logits, expected).min() > 0.95


REFUSED = {
    "heads": (
        Layout(tp_size=3),
        {},
        "4 attention heads do not divide over 3 ranks; tp_size can be 1, 2, 4",
    ),
    "kv heads": (
        Layout(tp_size=2),
        {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3},
        "3 key-value heads neither divide over 2 ranks nor divide them; tp_size can be 1, 3, 6",
    ),
    "intermediate": (
        Layout(tp_size=4),
        {"intermediate_size": 50},
        "intermediate_size=50 does not divide over 4 ranks; tp_size can be 1, 2",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_split_that_does_not_work_is_refused(case, tmp_path):
    layout, changes, sentence = REFUSED[case]
    save_tiny(tmp_path, "Llama", **changes)
    with pytest.raises((BadSplit, PlanError)) as refusal:
        run_thread_world(layout, lambda rank, groups: load(tmp_path, groups))
    assert str(refusal.value) == sentence


@pytest.mark.parametrize(
    ("layout", "sentence"),
    [
        (
            Layout(tp_size=4),
            "the experts' intermediate size 18 does not divide over 4 ranks; tp_size can be 1, 2",
        ),
        (
            Layout(tp_size=2, moe_dp_size=2),
            "moe_dp_size=2: replicated experts take rows that are scattered, so moe_a2a_backend "
            "must be torch; or set moe_dp_size to 1",
        ),
    ],
)
def test_experts_that_do_not_split_are_refused(layout, sentence, tmp_path):
    save_tiny(tmp_path, "Qwen3Moe", **MOE | {"moe_intermediate_size": 18})
    with pytest.raises((BadSplit, PlanError)) as refusal:
        run_thread_world(layout, lambda rank, groups: load(tmp_path, groups))
    assert str(refusal.value) == sentence


def test_every_registered_architecture_is_tested():
    tested = {f"{family}ForCausalLM" for family, _ in CASES.values()}
    assert tested == set(MODELS)


def _bfloat16_logits(config, groups, folder):
    model = build_model(config, groups, CPU, torch.bfloat16)
    load_weights(model, folder, no_progress)
    return logits_of(model, SEQUENCES)
