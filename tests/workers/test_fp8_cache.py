"""An engine whose cache keeps e4m3: how far it is from transformers, and what it asks for."""

import json
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from kernels.fp8 import E4M3, NO_SCALES, Scales, from_e4m3, to_e4m3
from parallel.groups import single_rank_groups
from parallel.layout import Layout
from tests.workers.reference import (
    DenseAttention,
    batch_of,
    expected_logits,
    load,
    save_tiny,
)
from tests.workers.test_deepseek import FAMILIES as LATENT_FAMILIES
from tests.workers.test_deepseek import tokens_and_logprobs
from workers.config import EngineConfig
from workers.errors import BadCheckpoint
from workers.preflight import check
from workers.runner import ModelRunner

ONE = Scales(1.0, 1.0)
FAMILIES = {
    "llama": ("Llama", {}),
    "qwen3": ("Qwen3", {"head_dim": 16, "num_attention_heads": 6}),
    "qwen2 window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 4}),
}


def config_of(folder: Path, **changes) -> EngineConfig:
    settings = {"page_size": 4, "max_num_seqs": 4, "max_num_batched_tokens": 12}
    return EngineConfig(
        model=str(folder),
        **{"kv_cache_dtype": "fp8_e4m3", "kv_cache_gb": 0.01, **settings} | changes,
    )


def new_runner(folder: Path, use_kernels: bool = False, **changes) -> ModelRunner:
    runner = ModelRunner(
        config_of(folder, **changes),
        Layout(),
        0,
        single_rank_groups(),
        torch.device("cpu"),
        lambda stage, done, total: None,
        use_kernels=use_kernels,
    )
    runner.allocate(min(64, runner.max_pages))
    return runner


class DenseE4M3(DenseAttention):
    """Whole sequences, each of whose keys and values is what e4m3 keeps of it."""

    def __init__(self, length: int, scales: tuple[Scales, ...]) -> None:
        super().__init__([length])
        self._scales = scales

    def attend(self, layer, q_THD, k_TGD, v_TGD, **options):
        key, value = self._scales[layer]
        k_TGD = from_e4m3(to_e4m3(k_TGD, key), key, torch.float32)
        v_TGD = from_e4m3(to_e4m3(v_TGD, value), value, torch.float32)
        return super().attend(layer, q_THD, k_TGD, v_TGD, **options)


def dense_logprobs(folder: Path, tokens: list[int], scales: tuple[Scales, ...]) -> torch.Tensor:
    """Of each token after the first."""
    batch = replace(batch_of([tokens]), attention=DenseE4M3(len(tokens), scales))
    model = load(folder)
    with torch.inference_mode():
        told = model.logits(model.forward(batch), (len(tokens),))[:-1].log_softmax(-1)
    return told.gather(1, torch.tensor(tokens[1:]).unsqueeze(1)).squeeze(1)


class Errors(NamedTuple):
    """Of log-probabilities, each of a token after the tokens that were really generated."""

    dense: torch.Tensor
    """To a model that keeps no cache and rounds as it should."""
    exact: torch.Tensor
    """To transformers, which rounds nothing."""


def errors_of(folder: Path, theirs, scales: tuple[Scales, ...] = (), **changes) -> Errors:
    tokens, logprobs = tokens_and_logprobs(new_runner(folder, **changes))
    dense, exact = [], []
    for mine, values in zip(tokens, logprobs, strict=True):
        told = torch.tensor(values)
        expected = expected_logits(theirs, [mine])[:-1].log_softmax(-1)
        expected = expected.gather(1, torch.tensor(mine[1:]).unsqueeze(1)).squeeze(1)
        exact.append((told - expected).abs())
        dense.append((told - dense_logprobs(folder, mine, scales or (ONE,) * 3)).abs())
    return Errors(torch.cat(dense), torch.cat(exact))


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_and_decodes_say_what_rounded_keys_and_values_say(family, tmp_path):
    """Random weights are ten times as large as real ones begin: the error is, too."""
    name, changes = FAMILIES[family]
    errors = errors_of(tmp_path, save_tiny(tmp_path, name, **changes))
    assert errors.dense.max() < 1e-4
    assert errors.exact.mean() < 0.1
    assert 1e-3 < errors.exact.max() < 0.5


@pytest.mark.slow
def test_kernels_and_captured_steps_give_what_plain_torch_gives(tmp_path):
    save_tiny(tmp_path, "Llama")
    tokens, logprobs = tokens_and_logprobs(new_runner(tmp_path), 2)
    with_kernels = new_runner(tmp_path, use_kernels=True)
    their_tokens, their_logprobs = tokens_and_logprobs(with_kernels, 2)
    assert with_kernels._steps._graphs is not None
    assert their_tokens == tokens
    for mine, theirs in zip(logprobs, their_logprobs, strict=True):
        assert mine == pytest.approx(theirs, abs=0.01)


def test_as_many_bytes_hold_more_tokens(tmp_path):
    save_tiny(tmp_path, "Llama")
    limits = {"kv_cache_gb": 2e-5}
    exact = new_runner(tmp_path, kv_cache_dtype="auto", dtype="bfloat16", **limits)
    short = new_runner(tmp_path, dtype="bfloat16", **limits)
    assert short.max_pages // 2 == exact.max_pages
    assert short._steps.cache.parts[0].dtype == E4M3


def add(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """To the checkpoint, in a file of their own."""
    save_file(tensors, folder / "scales.safetensors")
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"] |= dict.fromkeys(tensors, "scales.safetensors")
    index.write_text(json.dumps(content))


def scales_of(layer: int, key: float, value: float, shape=()) -> dict[str, torch.Tensor]:
    prefix = f"model.layers.{layer}.self_attn"
    return {
        f"{prefix}.k_scale": torch.full(shape, key, dtype=torch.bfloat16),
        f"{prefix}.v_scale": torch.full(shape, value),
    }


@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
def test_the_checkpoints_scales_are_read_and_matter(shape, tmp_path, capfd):
    """What is too large for e4m3 is not, divided by its scale."""
    theirs = save_tiny(tmp_path, "Llama", num_hidden_layers=2)
    for file in tmp_path.glob("*.safetensors"):
        tensors = load_file(file)
        for name in tensors:
            if "v_proj" in name:
                tensors[name] *= 4096
            if "o_proj" in name:
                tensors[name] /= 4096
        save_file(tensors, file)
    unscaled = errors_of(tmp_path, theirs)
    assert "has no k_scale and v_scale" in capfd.readouterr().out
    add(tmp_path, scales_of(0, 0.5, 32.0, shape) | scales_of(1, 0.25, 64.0, shape))
    runner = new_runner(tmp_path)
    assert [runner._steps.cache.scales(layer) for layer in range(2)] == [
        Scales(0.5, 32.0),
        Scales(0.25, 64.0),
    ]
    scaled = errors_of(tmp_path, theirs, (Scales(0.5, 32.0), Scales(0.25, 64.0)))
    assert capfd.readouterr().out == ""
    assert scaled.dense.max() < 1e-4
    assert scaled.exact.mean() < 0.1
    assert unscaled.exact.mean() > 10 * scaled.exact.mean()


def test_scales_are_read_past_where_the_cache_is_exact(tmp_path):
    theirs = save_tiny(tmp_path, "Llama", num_hidden_layers=1)
    add(tmp_path, scales_of(0, 0.5, 2.0))
    assert errors_of(tmp_path, theirs, kv_cache_dtype="auto").exact.max() < 1e-4
    assert new_runner(tmp_path, kv_cache_dtype="auto")._steps.cache.scales(0) == NO_SCALES


@pytest.mark.parametrize("wrong", [0.0, -1.0, float("inf"), float("nan")])
def test_a_scale_that_is_none_is_refused(wrong, tmp_path):
    save_tiny(tmp_path, "Llama", num_hidden_layers=1)
    add(tmp_path, scales_of(0, 0.5, wrong))
    with pytest.raises(ValueError, match=r"layer 0 of the checkpoint has k_scale 0\.5 and v_scale"):
        new_runner(tmp_path)


def test_one_scale_without_the_other_is_refused(tmp_path):
    save_tiny(tmp_path, "Llama", num_hidden_layers=1)
    add(tmp_path, {"model.layers.0.self_attn.k_scale": torch.ones(())})
    with pytest.raises(BadCheckpoint, match=r"lacks 1 tensor \(model\.layers\.0\.self_attn\.v_sc"):
        new_runner(tmp_path, kv_cache_dtype="auto")


@pytest.mark.parametrize("family", ["v3", "v3.2"])
def test_a_latent_is_not_kept_in_e4m3(family, tmp_path):
    name, changes = LATENT_FAMILIES[family]
    save_tiny(tmp_path, name, **changes)
    (tmp_path / "tokenizer.json").write_text("{}")
    check(config_of(tmp_path, kv_cache_dtype="auto"))
    for refused in (lambda: check(config_of(tmp_path)), lambda: new_runner(tmp_path)):
        with pytest.raises(ValueError, match="this model caches a latent: take kv_cache_dtype=aut"):
            refused()
