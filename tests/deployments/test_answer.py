"""Tokens that become answers: whole, and as streams that say the same."""

import json

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.answer import Answer
from deployments.generations import Event
from tests.deployments.fakes import EOS, logprobs
from tests.deployments.test_request_plan import TOKENIZER, chat, completion
from tests.deployments.test_tokenizer import truncated


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


def test_echo_alone_generates_nothing_to_see():
    plan = completion([104, 105], echo=True, max_tokens=0)
    body = whole(plan, events_of([33]))
    assert body["choices"][0]["text"] == "hi"
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["usage"]["completion_tokens"] == 0
