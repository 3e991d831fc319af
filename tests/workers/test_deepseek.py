"""DeepSeek's attention over the paged cache, step by step, against transformers in float32."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from parallel.groups import single_rank_groups
from parallel.layout import Layout
from tests.headers import header_of
from tests.workers.reference import expected_logits, load, save_tiny
from tests.workers.test_models import GROUPS, INDEX, LATENT, SHARP_YARN
from workers.config import EngineConfig
from workers.errors import BadCheckpoint, BadModelConfig
from workers.models import read_model_config
from workers.protocol import Admit, Body, Sampling, pack
from workers.runner import ModelRunner

FAMILIES = {
    "v2": ("DeepseekV2", {**LATENT, "q_lora_rank": None}),
    "v3": ("DeepseekV3", {**LATENT, **GROUPS, "rope_parameters": SHARP_YARN}),
    "v3.2": ("DeepseekV32", {**LATENT, **GROUPS, **INDEX, "index_topk": 6}),
}
PROMPTS = [list(range(3, 20)), [258, 0, 17, 200, 33], [7]]
NUM_TOKENS = 20
ASK = Sampling(temperature=0.0, num_logprobs=0, num_prompt_logprobs=0)


def new_runner(folder, use_kernels: bool = False) -> ModelRunner:
    config = EngineConfig(
        model=str(folder), kv_cache_gb=0.01, page_size=4, max_num_seqs=4,
        max_num_batched_tokens=12,
    )  # fmt: skip
    groups, cpu = single_rank_groups(), torch.device("cpu")
    runner = ModelRunner(
        config, Layout(), 0, groups, cpu, lambda stage, done, total: None, use_kernels=use_kernels
    )
    runner.allocate(min(64, runner.max_pages))
    return runner


def step(runner: ModelRunner, body: Body, num_rows: int, num_logit_rows: int):
    header = header_of((num_rows,), (num_logit_rows,))
    return runner.finish(runner.launch(header, body, 0))


def tokens_and_logprobs(
    runner: ModelRunner, num_tokens: int = NUM_TOKENS
) -> tuple[list[list[int]], list[list[float]]]:
    """Greedy; prompts are read one after another, in chunks of ten, beside others' decodes."""
    tokens = [list(prompt) for prompt in PROMPTS]
    logprobs: list[list[float]] = [[] for _ in PROMPTS]
    decoding: list[int] = []

    def run(body: Body, chunk: int, is_last: bool, slot: int):
        rows = len(decoding) + chunk
        result = step(runner, body, rows, len(decoding) + is_last)
        for _, _, values in result.prompt_logprobs:
            logprobs[slot] += [value.logprob for value in values]
        sampled = [*decoding, slot] if is_last else list(decoding)
        by_row = dict(result.logprobs)
        for row, (owner, token) in enumerate(zip(sampled, result.ids.tolist(), strict=True)):
            tokens[owner].append(token)
            logprobs[owner].append(by_row[row].logprob)

    for slot, prompt in enumerate(PROMPTS):
        pages = pack(range(10 * slot, 10 * slot + 10))
        admits = (Admit(slot, pack(prompt), len(prompt), 0, pages, ASK),)
        for first in range(0, len(prompt), 10):
            count = min(10, len(prompt) - first)
            is_last = first + count == len(prompt)
            body = Body(admits=admits, chunk_slots=pack([slot]), chunk_lengths=pack([count]))
            run(body, count, is_last, slot)
            admits = ()
        decoding.append(slot)
    for _ in range(num_tokens):
        run(Body(), 0, False, 0)
    return tokens, logprobs


@pytest.mark.row("S7")
@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_and_decodes_give_transformers_tokens_and_log_probabilities(family, tmp_path):
    name, changes = FAMILIES[family]
    theirs = save_tiny(tmp_path, name, **changes)
    tokens, logprobs = tokens_and_logprobs(new_runner(tmp_path))
    for prompt, mine, values in zip(PROMPTS, tokens, logprobs, strict=True):
        assert len(mine) > len(prompt) + 12
        logits = expected_logits(theirs, [mine])[:-1]
        expected = logits.log_softmax(-1)
        told = expected.gather(1, torch.tensor(mine[1:]).unsqueeze(1)).squeeze(1)
        torch.testing.assert_close(torch.tensor(values), told, atol=1e-4, rtol=1e-4)
        assert logits.argmax(-1).tolist()[len(prompt) - 1 :] == mine[len(prompt) :]


@pytest.mark.parametrize("family", ["v3", "v3.2"])
def test_kernels_and_captured_steps_give_the_tokens_of_plain_torch(family, tmp_path):
    """In Triton's interpreter: prompts in chunks beside decodes, then decodes by their buckets."""
    name, changes = FAMILIES[family]
    save_tiny(tmp_path, name, **changes)
    tokens, logprobs = tokens_and_logprobs(new_runner(tmp_path), 2)
    with_kernels = new_runner(tmp_path, use_kernels=True)
    their_tokens, their_logprobs = tokens_and_logprobs(with_kernels, 2)
    assert with_kernels._steps._graphs is not None
    assert their_tokens == tokens
    for mine, theirs in zip(logprobs, their_logprobs, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-4)


def test_draft_layers_of_a_checkpoint_are_left_alone_and_other_layers_are_not(tmp_path):
    save_tiny(tmp_path, "DeepseekV3", **LATENT, **GROUPS)
    file = sorted(tmp_path.glob("*.safetensors"))[-1]
    index_file = tmp_path / "model.safetensors.index.json"
    index = json.loads(index_file.read_text())
    held = load_file(file)
    for name in ("model.layers.3.eh_proj.weight", "model.layers.3.self_attn.q_a_proj.weight"):
        held[name] = torch.zeros(3, 3)
        index["weight_map"][name] = file.name
    save_file(held, file, metadata={"format": "pt"})
    index_file.write_text(json.dumps(index))
    load(tmp_path)

    fields = json.loads((tmp_path / "config.json").read_text())
    fields["num_nextn_predict_layers"] = 0
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(BadCheckpoint, match=r"model\.layers\.3\.eh_proj\.weight"):
        load(tmp_path)


REFUSED = {
    "float8": (
        {"quantization_config": {"quant_method": "fp8"}},
        "weights quantized by fp8, which is not offered",
    ),
    "uneven groups": ({"n_group": 3}, "8 experts cannot form n_group=3 equal groups"),
    "closed groups": ({"topk_group": 5}, "of which topk_group=5 are open"),
    "too many chosen": ({"topk_group": 1}, "num_experts_per_tok=3 is more than topk_group=1"),
    "experts in some layers": ({"moe_layer_freq": 2}, "moe_layer_freq=2 is not offered"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_offered_is_refused(case, tmp_path):
    changes, sentence = REFUSED[case]
    save_tiny(tmp_path, "DeepseekV3", **LATENT, **GROUPS)
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(fields | changes))
    with pytest.raises(BadModelConfig, match=sentence):
        read_model_config(tmp_path)


INDEX_REFUSED = {
    "plain queries": ({"q_lora_rank": None}, "DeepseekV32ForCausalLM needs q_lora_rank above 0"),
    "narrow keys": (
        {"index_head_dim": 2},
        f"index_head_dim=2 must be at least qk_rope_head_dim={LATENT['qk_rope_head_dim']}",
    ),
}


@pytest.mark.parametrize("case", INDEX_REFUSED)
def test_an_indexer_that_cannot_be_built_is_refused(case, tmp_path):
    changes, sentence = INDEX_REFUSED[case]
    save_tiny(tmp_path, "DeepseekV32", **LATENT, **GROUPS, **INDEX, index_topk=4)
    fields = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(fields | changes))
    with pytest.raises(BadModelConfig, match=sentence):
        read_model_config(tmp_path)


@pytest.mark.parametrize(
    ("family", "shapes"), [("v2", ((28,),)), ("v3", ((28,),)), ("v3.2", ((28,), (16,)))]
)
def test_a_token_keeps_its_latent_with_one_key_and_what_the_indexer_needs(family, shapes, tmp_path):
    name, changes = FAMILIES[family]
    save_tiny(tmp_path, name, **changes)
    assert load(tmp_path).cache_shapes == shapes
