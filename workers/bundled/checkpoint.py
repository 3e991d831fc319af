"""A trained network as a Hugging Face checkpoint folder.

Config, tokenizer and weights are written with torch and the standard library alone, so that
training needs nothing else installed. The files are small enough to read.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from workers.bundled.network import NetworkConfig
from workers.bundled.rows import ENDOFTEXT, IM_END, IM_START

MAX_POSITIONS = 4096

SPECIAL_TOKENS = {
    "<|endoftext|>": ENDOFTEXT,
    "<|im_start|>": IM_START,
    "<|im_end|>": IM_END,
}

CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


def save_checkpoint(folder: Path, config: NetworkConfig, weights: Mapping[str, Tensor]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    documents = {
        "config.json": model_config(config),
        "generation_config.json": generation_config(),
        "tokenizer.json": tokenizer(),
        "tokenizer_config.json": tokenizer_config(),
    }
    for name, document in documents.items():
        save_json(folder / name, document)
    save_weights(folder / "model.safetensors", weights)


def save_json(path: Path, document: Mapping[str, object]) -> None:
    path.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def save_weights(path: Path, weights: Mapping[str, Tensor]) -> None:
    """Write bf16 tensors in the safetensors format: length of the header, header, bytes."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    data = bytearray(sum(2 * weight.numel() for weight in weights.values()))
    flat = torch.frombuffer(data, dtype=torch.bfloat16)
    start = 0
    for name, weight in sorted(weights.items()):
        end = start + weight.numel()
        flat[start:end] = weight.flatten()
        entries[name] = {
            "dtype": "BF16",
            "shape": list(weight.shape),
            "data_offsets": [2 * start, 2 * end],
        }
        start = end
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)


def model_config(config: NetworkConfig) -> dict[str, object]:
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        **asdict(config),
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": ENDOFTEXT,
        "decoder_sparse_step": 1,
        "eos_token_id": IM_END,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_position_embeddings": MAX_POSITIONS,
        "norm_topk_prob": True,
        "output_router_logits": False,
        "pad_token_id": ENDOFTEXT,
        "rope_scaling": None,
        "router_aux_loss_coef": 0.001,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
    }


def generation_config() -> dict[str, object]:
    return {
        "bos_token_id": ENDOFTEXT,
        "do_sample": False,
        "eos_token_id": [IM_END, ENDOFTEXT],
        "pad_token_id": ENDOFTEXT,
    }


def tokenizer() -> dict[str, object]:
    """A byte-level BPE without merges: the id of a byte is its value."""
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": False,
        "use_regex": False,
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": token_id,
                "content": content,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for content, token_id in SPECIAL_TOKENS.items()
        ],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {letter: byte for byte, letter in enumerate(byte_letters())},
            "merges": [],
        },
    }


def tokenizer_config() -> dict[str, object]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(token_id): {
                "content": content,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": True,
            }
            for content, token_id in SPECIAL_TOKENS.items()
        },
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "model_max_length": MAX_POSITIONS,
        "pad_token": "<|endoftext|>",
        "unk_token": None,
    }


def byte_letters() -> list[str]:
    """The letter that stands for each byte in a byte-level vocabulary, GPT-2's table.

    Bytes that print stand for themselves in Latin-1; the others take the letters from U+0100 on.
    """
    printed = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printed]
    return [chr(b) if b in printed else chr(0x100 + others.index(b)) for b in range(256)]
