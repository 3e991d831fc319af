"""Requests that are checked against the model, and the generations they ask for."""

import json

import pytest

from deployments.errors import NotFound, RequestError
from deployments.request_plan import ModelLimits, check_model, plan_chat, plan_completion
from deployments.schemas import parse_chat, parse_completion
from tests.deployments.fakes import EOS, chat_tokenizer
from workers.protocol import unpack

TOKENIZER = chat_tokenizer()


LIMITS = ModelLimits(max_model_len=100, vocab_size=260, eos_token_ids=(EOS,))


def completion(prompt="hello", **fields):
    body = {"model": "m", "prompt": prompt, **fields}
    return plan_completion(parse_completion(json.dumps(body).encode()), TOKENIZER, LIMITS, seed=9)


def chat(messages="hello", **fields):
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    body = {"model": "m", "messages": messages, **fields}
    return plan_chat(parse_chat(json.dumps(body).encode()), TOKENIZER, LIMITS, seed=9)


def refusal(plan, *args, **fields) -> RequestError:
    with pytest.raises(RequestError) as caught:
        plan(*args, **fields)
    return caught.value


def prompts(plan):
    return [unpack(spec.prompt).tolist() for spec in plan.specs]


def test_a_prompt_may_be_written_in_four_ways():
    assert prompts(completion("hi")) == [[*b"hi"]]
    assert prompts(completion(["hi", "é"])) == [[*b"hi"], [*"é".encode()]]
    assert prompts(completion([1, 2])) == [[1, 2]]
    assert prompts(completion([[1, 2], [259]])) == [[1, 2], [259]]


@pytest.mark.parametrize(
    "prompt",
    ["", [], [[]], [""], [-1], [260], [2**31], [2**70], ["a", 1], ["a", [1]], [1, [1]], ["a"] * 65],
    ids=repr,
)
def test_a_bad_prompt_is_refused(prompt):
    assert refusal(completion, prompt).param == "prompt"


def test_samples_share_the_seed_and_differ_by_nonce():
    keys = [(s.sampling.seed, s.sampling.nonce) for s in completion(["a", "b"], n=2).specs]
    assert keys == [(9, 0), (9, 1), (9, 2), (9, 3)]
    assert [s.sampling.seed for s in completion(seed=5).specs] == [5]
    assert [s.sampling.seed for s in chat(seed=-1).specs] == [2**63 - 1]


def test_sampling_is_passed_on():
    fields = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "presence_penalty": 0.2,
        "frequency_penalty": 0.3,
        "repetition_penalty": 1.1,
        "min_tokens": 3,
    }
    for plan in (completion, chat):
        sampling = plan(**fields, logit_bias={"5": -100}, max_tokens=9).specs[0].sampling
        assert {name: getattr(sampling, name) for name in fields} == fields
        assert sampling.logit_bias == ((5, -100.0),)
    assert completion(temperature=0).specs[0].sampling.temperature == 0
    assert completion(top_k=-1).specs[0].sampling.top_k == 0


def test_who_ends_a_generation():
    assert completion().specs[0].stop_token_ids == (EOS,)
    assert completion(stop_token_ids=[7, EOS]).specs[0].stop_token_ids == (EOS, 7)
    assert completion(ignore_eos=True).specs[0].stop_token_ids == ()
    assert completion(ignore_eos=True, stop_token_ids=[7]).specs[0].stop_token_ids == (7,)
    assert completion(stop="x").stops == ("x",)
    assert completion(stop=["x", "y"]).stops == ("x", "y")


def test_how_many_tokens_may_come():
    assert completion("a" * 50).specs[0].max_tokens == 16
    assert completion("a" * 95).specs[0].max_tokens == 5
    assert completion("a" * 95, max_tokens=5).specs[0].max_tokens == 5
    num_prompt = len(prompts(chat("a"))[0])
    assert chat("a").specs[0].max_tokens == 100 - num_prompt
    assert chat("a", max_tokens=3).specs[0].max_tokens == 3
    assert chat("a", max_completion_tokens=4).specs[0].max_tokens == 4


def test_a_context_that_is_too_short_is_told_in_numbers():
    error = refusal(completion, "a" * 100)
    assert (error.param, error.code) == ("prompt", "context_length_exceeded")
    assert "context is 100 tokens and the prompt has 100" in error.message
    error = refusal(completion, "a" * 95, max_tokens=6)
    assert (error.param, error.code) == ("max_tokens", "context_length_exceeded")
    assert "100 tokens, and 95 in the prompt and 6 to generate are 101" in error.message
    assert refusal(chat, "a" * 100).param == "messages"
    assert refusal(completion, min_tokens=17).param == "min_tokens"


@pytest.mark.parametrize("ids", [[260], [2**31 - 1]])
def test_ids_are_checked_against_the_model(ids):
    assert refusal(completion, stop_token_ids=ids).param == "stop_token_ids"
    assert refusal(chat, logit_bias={str(ids[0]): 1}).param == "logit_bias"
    assert refusal(chat, logit_bias={"-1": 1}).param == "logit_bias"
    completion([259], stop_token_ids=[259], logit_bias={"259": 1})


def test_messages_become_what_templates_know():
    plan = chat(
        [
            {"role": "developer", "content": "be"},
            {
                "role": "user",
                "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
            },
            {"role": "assistant", "content": None, "refusal": None, "tool_calls": None},
        ]
    )
    text = "".join("<s>" if i == 257 else chr(i) for i in prompts(plan)[0])
    assert text == "<s>system: be\n<s>user: ab\n<s>assistant: \n<s>assistant: "


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "tool", "content": "x", "tool_call_id": "1"}, "messages[0].role"),
        ({"role": "user"}, "messages[0].content"),
        ({"role": "assistant", "tool_calls": [{}]}, "messages[0].tool_calls"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "messages[0].content[0].type"),
        ({"role": "user", "content": [{"type": "text"}]}, "messages[0].content[0].text"),
        ({"role": "user", "content": [{"type": "text", "x": 1}]}, "messages[0].content[0].x"),
    ],
)
def test_a_bad_message_is_named(message, param):
    assert refusal(chat, [message]).param == param


def test_another_model_is_not_found():
    check_model("m", "m")
    with pytest.raises(NotFound) as caught:
        check_model("gpt-5", "m")
    assert (caught.value.status, caught.value.code) == (404, "model_not_found")
