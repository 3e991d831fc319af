"""Log-probabilities in answers, under OpenAI's names."""

import math

from deployments.generations import Event
from tests.deployments.fakes import logprobs
from tests.deployments.test_answer import events_of, stream, whole
from tests.deployments.test_request_plan import chat, completion
from workers.protocol import TokenLogprobs


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


def test_prompt_logprobs_by_id():
    body = whole(completion(prompt_logprobs=1), events_of([33]), prompt_logprobs=PROMPT_FOUND)
    first, second, *_ = body["choices"][0]["prompt_logprobs"]
    assert first is None
    assert second == {"101": {"logprob": -0.5, "rank": 1, "decoded_token": "e"}}
    plan = chat(prompt_logprobs=1)
    body = whole(plan, events_of([33]), prompt_logprobs=PROMPT_FOUND)
    assert len(body["prompt_logprobs"]) == len(plan.prompts[0])
