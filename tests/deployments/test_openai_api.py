import json
import math

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.driver_client import Event
from deployments.errors import NotFound, RequestError
from deployments.openai_api import Answer, ModelLimits, check_model, plan_chat, plan_completion
from deployments.schemas import parse_chat, parse_completion
from tests.deployments.fakes import EOS, chat_tokenizer, logprobs
from tests.deployments.test_tokenizer import truncated
from workers.protocol import TokenLogprobs, unpack

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


# Requests.


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


# Answers.


def events_of(tokens, *, choice=0, reason="length", with_logprobs=-1):
    last = len(tokens) - 1
    return [
        Event(
            choice,
            index,
            token,
            logprobs(token, with_logprobs) if with_logprobs >= 0 else None,
            reason if index == last else None,
        )
        for index, token in enumerate(tokens)
    ]


def answer_to(plan):
    return Answer(plan, TOKENIZER, answer_id="id", created=1, model="m")


def as_json(struct):
    return json.loads(msgspec.json.encode(struct))


def whole(plan, events, *, prompt_logprobs=None):
    answer = answer_to(plan)
    answer.feed(events)
    answer.collect(events)
    num = len(plan.specs)
    return as_json(answer.body([3] * num, prompt_logprobs or [{}] * num))


def stream(plan, events, *, size=1, prompt_logprobs=None):
    answer = answer_to(plan)
    chunks = []
    for start in range(0, len(events), size):
        some = events[start : start + size]
        answer.feed(some)
        chunks += answer.stream(some, prompt_logprobs or [{}] * len(plan.specs))
    return [as_json(chunk) for chunk in chunks]


def said(chunks, choice=0):
    mine = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == choice]
    return "".join(c["delta"].get("content", "") if "delta" in c else c["text"] for c in mine)


def test_a_completion_has_openais_shape():
    body = whole(completion(), events_of([*b"hi"]))
    assert body == {
        "id": "id",
        "object": "text_completion",
        "created": 1,
        "model": "m",
        "choices": [{"index": 0, "text": "hi", "logprobs": None, "finish_reason": "length"}],
        "usage": {
            "prompt_tokens": 5,
            "completion_tokens": 2,
            "total_tokens": 7,
            "prompt_tokens_details": {"cached_tokens": 3},
        },
    }


def test_a_chat_has_openais_shape():
    body = whole(chat(), events_of([*b"hi", EOS], reason="stop"))
    message = {"role": "assistant", "content": "hi", "refusal": None}
    assert body["object"] == "chat.completion"
    assert body["choices"] == [
        {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
    ]
    assert body["usage"]["completion_tokens"] == 3


def test_a_chat_stream_has_openais_shape():
    chunks = stream(chat(), events_of([*"é".encode(), EOS], reason="stop"))
    assert [c["choices"][0]["delta"] for c in chunks] == [
        {"role": "assistant", "content": ""},
        {"content": "é"},
        {},
    ]
    assert [c["choices"][0]["finish_reason"] for c in chunks] == [None, None, "stop"]
    assert all(c["object"] == "chat.completion.chunk" and "usage" not in c for c in chunks)


def test_usage_is_null_until_the_last_event_if_asked_for():
    plan = chat(stream=True, stream_options={"include_usage": True})
    events = events_of([*b"hi"])
    assert [c["usage"] for c in stream(plan, events)] == [None] * 4
    answer = answer_to(plan)
    answer.feed(events)
    last = as_json(answer.usage_event([4]))
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 2


def test_a_prompt_with_several_samples_counts_once():
    plan = completion(["abc", "de"], n=2)
    events = [event for choice in range(4) for event in events_of([65], choice=choice)]
    usage = whole(plan, events)["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (5, 4)
    assert usage["prompt_tokens_details"]["cached_tokens"] == 6


def test_tokens_that_come_together_make_one_event():
    assert len(stream(completion(), events_of([*b"hello"]), size=5)) == 1


def test_a_stop_string_ends_the_text_and_tells_the_driver():
    answer = answer_to(completion(stop="<end>"))
    events = events_of([*b"hi<end>more"])
    assert [answer.feed([event]) for event in events] == [*[[]] * 6, [(0, 7)], *[[]] * 4]
    answer.collect(events)
    choice = as_json(answer.body([0], [{}]))["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("hi", "stop")
    assert answer.usage([0]).completion_tokens == 7


def test_what_was_kept_back_for_a_stop_string_is_shown_in_the_end():
    body = whole(completion(stop="<end>"), events_of([*b"hi<en"]))
    assert body["choices"][0]["text"] == "hi<en"


def test_a_stop_id_of_the_users_is_not_text():
    body = whole(completion(stop_token_ids=[66]), events_of([65, 66], reason="stop"))
    assert body["choices"][0]["text"] == "A"


def test_stop_strings_wait_for_min_tokens():
    plan = completion(stop="a", min_tokens=3)
    body = whole(plan, events_of([*b"aaba"]))
    assert body["choices"][0]["text"] == "aab"


def test_an_unfinished_character_ends_as_a_replacement():
    events = events_of([0xE2, 0x82])
    assert whole(completion(), events)["choices"][0]["text"] == "\ufffd"
    assert said(stream(completion(), events)) == "\ufffd"


@settings(max_examples=200)
@given(
    st.text("ab€é\0", max_size=30),
    st.lists(st.text("ab€é", min_size=1, max_size=4), max_size=4),
    st.integers(1, 7),
)
def test_streamed_and_whole_say_the_same(text, stops, size):
    events = events_of([*text.encode(), EOS], reason="stop")
    expected = truncated(text, stops)
    for plan in (completion(stop=stops), chat(stop=stops)):
        choice = whole(plan, events)["choices"][0]
        assert (choice["text"] if "text" in choice else choice["message"]["content"]) == expected
        assert said(stream(plan, events, size=size)) == expected


def test_chat_logprobs():
    plan = chat(logprobs=True, top_logprobs=2)
    events = events_of([65, 0xC3], with_logprobs=2)
    first, second = whole(plan, events)["choices"][0]["logprobs"]["content"]
    assert first == {
        "token": "A",
        "logprob": -0.5,
        "bytes": [65],
        "top_logprobs": [
            {"token": "A", "logprob": -0.5, "bytes": [65]},
            {"token": "B", "logprob": -1.5, "bytes": [66]},
        ],
    }
    assert (second["token"], second["bytes"]) == ("bytes:\\xc3", [0xC3])
    chunks = stream(plan, events)
    listed = [c["choices"][0]["logprobs"] for c in chunks]
    assert [entry for one in listed if one for entry in one["content"]] == [first, second]


def test_chat_logprobs_without_alternatives():
    events = events_of([65], with_logprobs=0)
    entry = whole(chat(logprobs=True), events)["choices"][0]["logprobs"]["content"][0]
    assert entry["top_logprobs"] == []


def test_completion_logprobs():
    events = events_of([*"aé".encode(), 66], with_logprobs=2)
    found = whole(completion(logprobs=2), events)["choices"][0]["logprobs"]
    assert found["tokens"] == ["a", "bytes:\\xc3", "bytes:\\xa9", "B"]
    assert found["token_logprobs"] == [-0.5] * 4
    assert found["text_offset"] == [0, 1, 2, 2]
    assert found["top_logprobs"][0] == {"a": -0.5, "b": -1.5}
    assert whole(completion(logprobs=0), events)["choices"][0]["logprobs"]["top_logprobs"] is None


def test_infinity_is_a_number_json_has():
    event = Event(0, 0, 65, TokenLogprobs(65, -math.inf, 1, (), ()), "length")
    found = whole(completion(logprobs=0), [event])["choices"][0]["logprobs"]
    assert found["token_logprobs"] == [-9999.0]


PROMPT_FOUND = [{place: logprobs(token, 1) for place, token in enumerate(b"hello")}]


def test_echo_repeats_the_prompt_with_its_logprobs():
    plan = completion(echo=True, logprobs=1, max_tokens=1)
    assert plan.specs[0].sampling.num_prompt_logprobs == 1
    events = events_of([33], with_logprobs=1)
    choice = whole(plan, events, prompt_logprobs=PROMPT_FOUND)["choices"][0]
    assert choice["text"] == "hello!"
    assert choice["logprobs"]["tokens"] == [*"hello!"]
    assert choice["logprobs"]["token_logprobs"] == [None, *[-0.5] * 5]
    assert choice["logprobs"]["top_logprobs"][:2] == [None, {"e": -0.5}]
    assert choice["logprobs"]["text_offset"] == [0, 1, 2, 3, 4, 5]
    assert "prompt_logprobs" not in choice
    streamed = stream(plan, events, prompt_logprobs=PROMPT_FOUND)
    assert streamed[0]["choices"][0] == choice


def test_echo_alone_generates_nothing_to_see():
    plan = completion([104, 105], echo=True, max_tokens=0)
    body = whole(plan, events_of([33]))
    assert body["choices"][0]["text"] == "hi"
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["usage"]["completion_tokens"] == 0


def test_prompt_logprobs_by_id():
    body = whole(completion(prompt_logprobs=1), events_of([33]), prompt_logprobs=PROMPT_FOUND)
    first, second, *_ = body["choices"][0]["prompt_logprobs"]
    assert first is None
    assert second == {"101": {"logprob": -0.5, "rank": 1, "decoded_token": "e"}}
    plan = chat(prompt_logprobs=1)
    body = whole(plan, events_of([33]), prompt_logprobs=PROMPT_FOUND)
    assert len(body["prompt_logprobs"]) == len(plan.prompts[0])
