"""What config.json may say, in both spellings, and the sentence for what it may not."""

import json
from pathlib import Path
from typing import Any

import pytest

from deployments.presets import write_preset
from workers.errors import BadModelConfig, BadSplit, UnknownArchitecture
from workers.model_config import ModelConfig
from workers.model_split import check_split
from workers.models import read_model_config

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "torch_dtype": "bfloat16",
}
QWEN2 = LLAMA | {"architectures": ["Qwen2ForCausalLM"]}
QWEN3 = LLAMA | {"architectures": ["Qwen3ForCausalLM"]}
MOE = LLAMA | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}


def write(folder: Path, fields: dict[str, Any], generation: dict[str, Any] | None = None) -> Path:
    (folder / "config.json").write_text(json.dumps(fields))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def read(folder: Path, fields: dict[str, Any]) -> ModelConfig:
    return read_model_config(write(folder, fields))


def test_sizes_are_read_under_one_set_of_names(tmp_path):
    config = read(tmp_path, LLAMA)
    assert (config.num_layers, config.num_heads, config.num_kv_heads) == (4, 8, 2)
    assert (config.head_dim, config.vocab_size, config.hidden_size) == (8, 100, 64)
    assert (config.dtype, config.tie_word_embeddings, config.moe) == ("bfloat16", False, None)


def test_a_config_without_kv_heads_has_as_many_as_heads(tmp_path):
    fields = {k: v for k, v in LLAMA.items() if k != "num_key_value_heads"}
    assert read(tmp_path, fields).num_kv_heads == 8


def test_null_means_left_out(tmp_path):
    nulls = {"head_dim": None, "rope_scaling": None, "sliding_window": None, "eos_token_id": None}
    config = read(tmp_path, LLAMA | nulls)
    assert (config.head_dim, config.rope.kind, config.stop_token_ids) == (8, "default", ())


def test_what_a_family_means_by_a_field_it_leaves_out(tmp_path):
    assert read(tmp_path, QWEN3).head_dim == 128
    mixtral = read(tmp_path, LLAMA | {"architectures": ["MixtralForCausalLM"]})
    assert mixtral.rope.theta == 1e6
    assert mixtral.moe is not None
    assert (mixtral.moe.num_experts, mixtral.moe.num_experts_per_token) == (8, 2)
    assert mixtral.moe.intermediate_size == 96


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_both_names_of_the_dtype_are_read(name, tmp_path):
    fields = {k: v for k, v in LLAMA.items() if k != "torch_dtype"}
    assert read(tmp_path, fields | {name: "float16"}).dtype == "float16"


def test_old_and_new_spelling_of_rope_are_the_same(tmp_path):
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling["original_max_position_embeddings"] = 32
    old = {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **scaling}}
    new = {"rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", **scaling}}
    config = read(tmp_path, LLAMA | old)
    assert config == read(tmp_path, LLAMA | new)
    assert (config.rope.theta, config.rope.kind) == (5e5, "llama3")
    assert config.max_position_embeddings == 128


@pytest.mark.parametrize(
    ("scaling", "limit"),
    [
        ({"rope_type": "linear", "factor": 4.0}, 512),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 256),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}, 128),
    ],
)
def test_scaling_lengthens_what_can_be_served(scaling, limit, tmp_path):
    assert read(tmp_path, LLAMA | {"rope_scaling": scaling}).max_position_embeddings == limit


def test_yarn_sharpens_attention_as_its_fields_say(tmp_path):
    yarn = {"rope_type": "yarn", "factor": 4.0}
    factor = read(tmp_path, LLAMA | {"rope_scaling": yarn}).rope.attention_factor
    assert factor == pytest.approx(1.1386294361)
    given = yarn | {"attention_factor": 0.5}
    assert read(tmp_path, LLAMA | {"rope_scaling": given}).rope.attention_factor == 0.5
    both = yarn | {"mscale": 1.0, "mscale_all_dim": 1.0}
    assert read(tmp_path, LLAMA | {"rope_scaling": both}).rope.attention_factor == 1.0


def test_windows_follow_layer_types_where_there_are_any(tmp_path):
    config = read(tmp_path, QWEN2 | {"max_window_layers": 2})
    assert config.layer_windows(16, first_layer=2) == (None, None, 16, 16)
    kinds = ["sliding_attention", "full_attention"] * 2
    config = read(tmp_path, QWEN2 | {"layer_types": kinds})
    assert config.layer_windows(16, first_layer=2) == (16, None, 16, None)


@pytest.mark.parametrize("kind", ["indexed_attention", "deepseek_sparse_attention"])
def test_an_indexers_layers_are_named_by_what_saved_them(kind, tmp_path):
    fields = json.loads((write_preset("v32-mini", tmp_path) / "config.json").read_text())
    kinds = {"layer_types": [kind] * fields["num_hidden_layers"]}
    latent = read(tmp_path, fields | kinds).latent
    assert latent is not None
    assert latent.index is not None
    with pytest.raises(BadModelConfig, match=f"has layers of type {kind}"):
        read(tmp_path, LLAMA | {"layer_types": [kind] * 4})


def test_sparse_layers_are_those_of_the_step_without_the_dense_ones(tmp_path):
    config = read(tmp_path, MOE | {"decoder_sparse_step": 2, "mlp_only_layers": [3]})
    assert config.moe is not None
    assert [config.moe.is_sparse(layer) for layer in range(4)] == [False, True, False, False]


def test_both_names_of_the_number_of_experts_are_read(tmp_path):
    fields = {k: v for k, v in MOE.items() if k != "num_experts"}
    assert read(tmp_path, MOE) == read(tmp_path, fields | {"num_local_experts": 8})


def test_stop_ids_are_both_files_eos_ids(tmp_path):
    write(tmp_path, LLAMA | {"eos_token_id": 7}, {"eos_token_id": [9, 7, 8]})
    assert read_model_config(tmp_path).stop_token_ids == (7, 9, 8)


def test_auto_map_is_ignored_and_its_code_not_run(tmp_path):
    (tmp_path / "modeling_evil.py").write_text("raise SystemExit('imported')")
    config = read(tmp_path, LLAMA | {"auto_map": {"AutoModelForCausalLM": "modeling_evil.Evil"}})
    assert config.architecture == "LlamaForCausalLM"


THERE_IS = (
    "DeepseekV2ForCausalLM, DeepseekV32ForCausalLM, DeepseekV3ForCausalLM, LlamaForCausalLM, "
    "MixtralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM, Qwen3MoeForCausalLM"
)

REFUSED = {
    "architecture": (
        {"architectures": ["T5ForConditionalGeneration"]},
        f"asks for T5ForConditionalGeneration and there is {THERE_IS}; workers/models/README.md "
        "says how to add one",
    ),
    "no architecture": (
        {"architectures": []},
        f"names no architecture: add `architectures` with one of {THERE_IS}",
    ),
    "missing field": (
        {"hidden_size": None},
        ": Object missing required field `hidden_size`",
    ),
    "wrong type": (
        {"hidden_size": "64"},
        ": Expected `int`, got `str` - at `$.hidden_size`",
    ),
    "zero": (
        {"num_hidden_layers": 0},
        ": num_hidden_layers=0 must be at least 1",
    ),
    "kv heads": (
        {"num_key_value_heads": 3},
        ": num_attention_heads=8 does not divide by num_key_value_heads=3",
    ),
    "hidden size": (
        {"hidden_size": 63},
        ": hidden_size=63 does not divide by num_attention_heads=8, and head_dim is not given",
    ),
    "odd head": (
        {"head_dim": 7},
        ": head_dim=7 must be even to be rotated",
    ),
    "dynamic rope": (
        {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
        "asks for dynamic rope scaling, which rotates a token differently as its sequence grows, "
        "so cached keys would be wrong: remove the scaling to serve 128 positions, or use yarn",
    ),
    "other rope": (
        {"rope_scaling": {"rope_type": "longrope", "factor": 2.0}},
        "asks for rope scaling of type longrope and there is default, linear, llama3, yarn",
    ),
    "no factor": (
        {"rope_scaling": {"rope_type": "yarn"}},
        ": rope scaling of type yarn needs a factor above 0",
    ),
    "rope by layer": (
        {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
        "has rope parameters by layer type, which is not offered",
    ),
    "partial rope": (
        {"partial_rotary_factor": 0.5},
        ": partial_rotary_factor other than 1 is not offered",
    ),
    "activation": (
        {"hidden_act": "gelu"},
        "asks for hidden_act=gelu and there is silu",
    ),
    "dtype": (
        {"torch_dtype": "float8_e4m3fn"},
        "asks for dtype=float8_e4m3fn and there is float32, bfloat16, float16",
    ),
    "quantized": (
        {"quantization_config": {"quant_method": "awq"}},
        "describes weights quantized by awq, which is not offered: use the model's bfloat16, "
        "float16 or float32 checkpoint",
    ),
    "quantized in a word": (
        {"quantization_config": "awq"},
        ": Expected `object`, got `str` - at `$.quantization_config`",
    ),
    "layer types": (
        {"layer_types": ["linear_attention"] * 4},
        "has layers of type linear_attention and there is full_attention and sliding_attention",
    ),
    "number of layer types": (
        {"layer_types": ["full_attention"]},
        ": layer_types has 1 entries for 4 layers",
    ),
    "window": (
        {"sliding_window": 0},
        ": sliding_window=0 must be at least 1",
    ),
    "experts": (
        {"num_experts": 4, "num_experts_per_tok": 5},
        ": num_experts_per_tok=5 must be from 1 to 4, the number of experts",
    ),
    "sparse step": (
        {"num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 0},
        ": decoder_sparse_step=0 must be at least 1",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_offered_is_refused_with_a_sentence(case, tmp_path):
    changes, sentence = REFUSED[case]
    with pytest.raises(BadModelConfig) as refusal:
        read(tmp_path, LLAMA | changes)
    said = str(refusal.value).removeprefix(str(tmp_path / "config.json")).removeprefix(" ")
    assert said == sentence


@pytest.mark.parametrize(
    ("architecture", "changes", "sentence"),
    [
        ("Qwen3MoeForCausalLM", {}, "needs num_experts above 0"),
        ("MixtralForCausalLM", {"num_local_experts": 0}, "needs num_local_experts above 0"),
        (
            "DeepseekV3ForCausalLM",
            {"n_routed_experts": 0, "kv_lora_rank": 0},
            "needs n_routed_experts and kv_lora_rank above 0",
        ),
        (
            "DeepseekV3ForCausalLM",
            {"index_topk": 4, "q_lora_rank": None},
            "needs q_lora_rank above 0",
        ),
        (
            "DeepseekV2ForCausalLM",
            {"num_experts_per_tok": 2, "norm_topk_prob": True},
            "with norm_topk_prob=true is not offered: its implementations disagree on what that "
            "means, and no published model has it",
        ),
    ],
)
def test_a_model_that_lacks_what_its_family_is_made_of_is_refused(
    architecture, changes, sentence, tmp_path
):
    with pytest.raises(BadModelConfig) as refusal:
        read(tmp_path, LLAMA | {"architectures": [architecture]} | changes)
    assert str(refusal.value).endswith(f"config.json: {architecture} {sentence}")


def test_a_checkpoint_whose_cache_alone_is_quantized_is_read(tmp_path):
    quantized = {"quant_method": "compressed-tensors", "kv_cache_scheme": {"num_bits": 8}}
    read(tmp_path, LLAMA | {"quantization_config": quantized | {"config_groups": {}}})
    quantized["config_groups"] = {"group_0": {"weights": {"num_bits": 8}}}
    with pytest.raises(BadModelConfig, match="weights quantized by compressed-tensors"):
        read(tmp_path, LLAMA | {"quantization_config": quantized})


def test_an_unknown_architecture_is_an_error_of_its_own(tmp_path):
    with pytest.raises(UnknownArchitecture):
        read(tmp_path, LLAMA | {"architectures": ["GPT2LMHeadModel"]})


def test_a_missing_config_is_refused(tmp_path):
    with pytest.raises(BadModelConfig) as refusal:
        read_model_config(tmp_path / "nowhere")
    assert str(refusal.value) == (
        f"{tmp_path / 'nowhere' / 'config.json'} does not exist: `model` must be a folder with a "
        "Hugging Face config.json, tokenizer.json and safetensors files"
    )


def test_the_file_in_place_of_its_folder_is_refused(tmp_path):
    write(tmp_path, LLAMA)
    with pytest.raises(BadModelConfig, match="`model` must be a folder with"):
        read_model_config(tmp_path / "config.json")


def test_a_config_that_is_no_json_object_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("[1, 2]")
    with pytest.raises(BadModelConfig, match=r"config\.json holds a list, not an object$"):
        read_model_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(BadModelConfig, match=r"config\.json cannot be read as JSON: "):
        read_model_config(tmp_path)


def test_a_stop_id_outside_the_vocabulary_is_refused(tmp_path):
    write(tmp_path, LLAMA, {"eos_token_id": 100})
    with pytest.raises(BadModelConfig) as refusal:
        read_model_config(tmp_path)
    assert str(refusal.value) == (f"{tmp_path}: eos_token_id 100 is outside the vocabulary of 100")


def test_a_split_that_works_passes_and_others_name_those_that_do(tmp_path):
    config = read(tmp_path, MOE)
    check_split(config, attn_tp=4, dense_tp=4, moe_tp=2)
    with pytest.raises(BadSplit) as refusal:
        check_split(config, attn_tp=3, dense_tp=3, moe_tp=3)
    assert str(refusal.value) == (
        "8 attention heads do not divide over 3 ranks; tp_size can be 1, 2, 4, 8"
    )
