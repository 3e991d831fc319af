"""The bundled model knows what it was taught, and was never shown what it is asked."""

import json
from hashlib import sha256
from itertools import islice
from random import Random

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from workers.bundled import path
from workers.bundled.network import Network, NetworkConfig, generate
from workers.bundled.questions import (
    ADDITION,
    COUNTING,
    MAX_ANSWER_BYTES,
    REVERSING,
    TASKS,
    WORDINGS,
    answer,
    draw,
    held_out,
    is_held_out,
    training_pairs,
)
from workers.bundled.rows import IM_END, SHORT, answer_ids, pack_rows, prompt_ids

EVENLY = dict.fromkeys(TASKS, 1.0)


def document(name):
    return json.loads((path() / name).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_file(str(path() / "tokenizer.json"))


@pytest.fixture(scope="module")
def network():
    network = Network(NetworkConfig())
    weights = load_file(path() / "model.safetensors")
    network.load_state_dict({name: weight.float() for name, weight in weights.items()})
    return network


def test_training_never_yields_a_held_out_question():
    for question, _ in islice(training_pairs(Random(0), EVENLY), 30_000):
        assert int(sha256(question.encode()).hexdigest(), 16) % 10 != 0
        assert not is_held_out(question)


def test_a_held_out_problem_is_held_out_in_every_wording():
    for question, reply in held_out(ADDITION, 200, seed=3):
        operands = "".join(c if c.isdigit() else " " for c in question).split()
        assert all(is_held_out(wording.format(*operands)) for wording in WORDINGS[ADDITION])
        assert sum(map(int, operands)) == int(reply)


@pytest.mark.parametrize("task", TASKS)
def test_the_oracle_agrees_with_the_generator(task):
    rng = Random(1)
    pairs = [draw(task, rng) for _ in range(3000)] + held_out(task, 300, seed=4)
    assert all(answer(question) == reply for question, reply in pairs)
    assert all(len(reply.encode()) <= MAX_ANSWER_BYTES for _, reply in pairs)


@pytest.mark.parametrize("task", TASKS)
def test_a_held_out_sample_has_no_repeats_and_depends_on_its_seed_only(task):
    sample = held_out(task, 300, seed=5)
    assert len(set(sample)) == 300
    assert sample == held_out(task, 300, seed=5)
    assert sample != held_out(task, 300, seed=6)


@pytest.mark.parametrize(
    ("question", "reply"),
    [
        ("What is 128+305?", "433"),
        ("999 + 999 =", "1998"),
        ("Add 0 and 7.", "7"),
        ("Count from 3 to 5.", "3 4 5"),
        ("Reverse the word hello", "olleh"),
        ("Spell hello backwards", "olleh"),
        ("What is 1000+1?", None),
        ("What is 01+1?", None),
        ("Count from 9 to 3", None),
        ("Count from 0 to 999", None),
        ("Reverse the word Hello", None),
        ("Reverse the word ab", None),
        ("Who are you?", None),
    ],
)
def test_the_oracle_answers_what_is_taught_and_nothing_else(question, reply):
    assert answer(question) == reply


def test_a_row_weighs_only_answers_and_their_end_token(tokenizer):
    ids, weights = pack_rows("a row", 1, SHORT)
    ids = list(memoryview(ids).cast("H"))
    assert len(ids) == len(weights) == SHORT.length
    answers = tokenizer.decode(
        [token for token, weight in zip(ids, weights, strict=True) if weight],
        skip_special_tokens=False,
    )
    turns = tokenizer.decode(ids, skip_special_tokens=False).split("<|im_start|>")
    questions = [turn[5:].split("<|im_end|>")[0] for turn in turns if turn.startswith("user\n")]
    assert answers == "".join(f"{answer(question)}<|im_end|>" for question in questions)


def test_the_checkpoint_is_at_most_4_megabytes():
    assert sum(file.stat().st_size for file in path().iterdir()) <= 4_000_000


def test_the_config_has_the_promised_shape():
    config = document("config.json")
    expected = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "mlp_only_layers": [0],
        "decoder_sparse_step": 1,
        "norm_topk_prob": True,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "tie_word_embeddings": True,
        "max_position_embeddings": 4096,
        "vocab_size": 259,
    }
    assert {name: config[name] for name in expected} == expected
    assert config["num_attention_heads"] * config["head_dim"] == config["hidden_size"]


def test_the_config_is_the_one_the_network_is_built_from():
    config = document("config.json")
    fields = {name: config[name] for name in NetworkConfig.__dataclass_fields__}
    fields["mlp_only_layers"] = tuple(fields["mlp_only_layers"])
    assert NetworkConfig(**fields) == NetworkConfig()


def test_generation_ends_with_a_turn_or_a_text(tokenizer):
    assert document("generation_config.json")["eos_token_id"] == [
        tokenizer.token_to_id("<|im_end|>"),
        tokenizer.token_to_id("<|endoftext|>"),
    ]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "What is 128+305?",
        " two  spaces\n\ttab\r\n",
        "naïve Füße 東京 🙂👩‍👩‍👧 \u0000\u007f\u00a0\u00ad",
        "e\u0301 is not \u00e9",
        "".join(chr(c) for c in [*range(0x800), *range(0xFFF0, 0x10010)]),
    ],
    ids=["empty", "question", "spaces", "scripts", "unnormalised", "many"],
)
def test_the_tokenizer_gives_every_byte_its_own_id(tokenizer, text):
    ids = tokenizer.encode(text).ids
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text


def test_special_tokens_are_single_tokens_and_not_text(tokenizer):
    ids = tokenizer.encode("<|im_start|>user\nHi<|im_end|><|endoftext|>").ids
    assert ids == [257, *b"user\nHi", 258, 256]
    assert tokenizer.decode(ids) == "user\nHi"


def test_the_chat_template_renders_what_was_trained(tokenizer):
    jinja2 = pytest.importorskip("jinja2")
    template = jinja2.Environment().from_string(document("tokenizer_config.json")["chat_template"])
    messages = [
        {"role": "system", "content": "Answer briefly."},
        {"role": "user", "content": "What is 1+1?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "Count from 3 to 5"},
    ]
    text = template.render(messages=messages, add_generation_prompt=True)
    expected = prompt_ids(["What is 1+1?", "Count from 3 to 5"], ["2"], "Answer briefly.")
    assert tokenizer.encode(text).ids == expected


def test_the_network_is_the_one_transformers_builds(network):
    transformers = pytest.importorskip("transformers")
    model = transformers.Qwen3MoeForCausalLM.from_pretrained(path(), dtype=torch.float32)
    ids = torch.tensor([prompt_ids(["What is 128+305?", "Count from 3 to 40"], ["433"])])
    with torch.inference_mode():
        torch.testing.assert_close(network(ids)[0], model(ids).logits, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("task", [ADDITION, COUNTING])
def test_the_measured_accuracy_is_at_least_99_in_100(task):
    assert document("training.json")["accuracy"][task] >= 0.99


@pytest.mark.parametrize(
    ("task", "num_questions", "num_right"),
    [(ADDITION, 40, 40), (COUNTING, 3, 3), (REVERSING, 20, 18)],
)
def test_held_out_questions_are_answered(network, task, num_questions, num_right):
    pairs = held_out(task, num_questions, seed=7)
    replies = generate(
        network,
        [prompt_ids([question]) for question, _ in pairs],
        eos_token_id=IM_END,
        max_tokens=max(len(answer_ids(reply)) for _, reply in pairs),
    )
    expected = [list(reply.encode()) for _, reply in pairs]
    assert sum(map(list.__eq__, replies, expected)) >= num_right
