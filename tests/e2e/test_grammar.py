"""Answers that follow a grammar, from HTTP to the sampler and back, with the bundled model.

The model was never taught JSON: where a document is valid, the masks have made it so.
"""

import asyncio
import contextlib
import json
import re

import httpx
import pytest

from deployments.driver_client import DriverClient
from deployments.llm import LLM, SamplingParams
from deployments.messages import Grammar
from deployments.routes import build_api
from deployments.service import Service
from workers.bundled.questions import answer

SETTINGS = {"device": "cpu", "kv_cache_gb": 0.1}
SCHEMA = {
    "type": "object",
    "properties": {
        "sum": {"type": "integer", "minimum": 0, "maximum": 9999},
        "sure": {"type": "boolean"},
        "words": {"type": "array", "items": {"enum": ["odd", "even"]}, "maxItems": 2},
    },
    "required": ["sum", "sure", "words"],
    "additionalProperties": False,
}
DIGITS = Grammar("regex", "[0-9]+")
DOCUMENT = Grammar("json", json.dumps(SCHEMA))
QUESTIONS = ["What is 128+305?", "Count from 3 to 20", "Add 77 and 8.", "Count from 50 to 60"]


def is_valid(text):
    document = json.loads(text)
    assert list(document) == ["sum", "sure", "words"]
    assert isinstance(document["sum"], int)
    assert 0 <= document["sum"] <= 9999
    assert isinstance(document["sure"], bool)
    assert len(document["words"]) <= 2
    assert set(document["words"]) <= {"odd", "even"}
    return True


def mixed(num=8):
    """Questions with and without a grammar, drawn at random."""
    grammars = [DIGITS, None, DOCUMENT, None]
    return [QUESTIONS[i % 4] for i in range(num)], [
        SamplingParams(max_tokens=120, seed=i, grammar=grammars[i % 4]) for i in range(num)
    ]


def texts(answers):
    return [(one.text, one.finish_reason) for one in answers]


@pytest.fixture(scope="module")
def llm():
    with LLM(in_process=True, **SETTINGS) as llm:
        yield llm


@pytest.fixture(scope="module")
def reference(llm):
    """What a single rank says to the mixed questions."""
    return texts(llm.chat(*mixed()))


def test_an_answer_in_digits_is_in_digits(llm):
    greedy = SamplingParams(max_tokens=60, temperature=0.0, grammar=DIGITS)
    answers = llm.chat([*QUESTIONS, "Say hello"], greedy)
    assert all(re.fullmatch("[0-9]+", one.text) for one in answers)
    assert answers[0].text == answer(QUESTIONS[0])
    assert {one.finish_reason for one in answers} == {"stop"}


def test_every_drawn_document_is_valid(llm):
    params = [SamplingParams(max_tokens=300, seed=seed, grammar=DOCUMENT) for seed in range(20)]
    answers = llm.chat([QUESTIONS[0]] * 20, params)
    assert all(is_valid(one.text) for one in answers)
    assert {one.finish_reason for one in answers} == {"stop"}
    assert len({one.text for one in answers}) > 5


def test_what_cannot_go_on_ends_with_its_last_token(llm):
    [one] = llm.chat(["x"], SamplingParams(grammar=Grammar("regex", "ab{2}c")))
    assert (one.text, one.finish_reason, len(one.ids)) == ("abbc", "stop", 4)


def test_max_tokens_still_counts(llm):
    params = SamplingParams(max_tokens=5, grammar=Grammar("regex", "x{9}"))
    [one] = llm.chat(["x"], params)
    assert (one.text, one.finish_reason) == ("xxxxx", "length")


@pytest.mark.parametrize(
    "changes",
    [
        {"min_tokens": 6},
        {"ignore_eos": True, "max_tokens": 9},
        {"temperature": 0.7, "top_k": 3, "top_p": 0.9, "min_p": 0.01},
        {"repetition_penalty": 1.3, "presence_penalty": 1.0},
        {"logprobs": 2},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_every_other_parameter_keeps_to_the_grammar(llm, changes):
    params = SamplingParams(**{"max_tokens": 40, "seed": 3, "grammar": DIGITS} | changes)
    [one] = llm.chat([QUESTIONS[0]], params)
    assert re.fullmatch("[0-9]+", one.text)
    assert len(one.text) >= params.min_tokens
    if params.ignore_eos:
        assert (len(one.text), one.finish_reason) == (9, "length")


def test_a_draw_among_few_is_a_draw_among_the_allowed(llm):
    """top_k counts what the grammar has left, not what it has barred."""
    choices = Grammar("regex", "q|z")
    params = [
        SamplingParams(seed=seed, top_k=2, temperature=5.0, grammar=choices) for seed in range(20)
    ]
    answers = [one.text for one in llm.chat([QUESTIONS[0]] * 20, params)]
    assert set(answers) == {"q", "z"}


def test_logprobs_are_those_of_the_model(llm):
    [one] = llm.chat(["x"], SamplingParams(grammar=Grammar("regex", "~"), logprobs=3))
    [found] = one.logprobs
    assert found.token == ord("~")
    assert found.rank > 3
    assert ord("~") not in found.top_ids


def test_neighbours_say_what_they_say_alone(llm, reference):
    asked, params = mixed()
    free = [number for number, one in enumerate(params) if one.grammar is None]
    alone = llm.chat([asked[i] for i in free], [params[i] for i in free])
    assert texts(alone) == [reference[i] for i in free]


def test_without_overlap_the_answers_are_the_same(reference):
    with LLM(in_process=True, overlap=False, **SETTINGS) as llm:
        assert texts(llm.chat(*mixed())) == reference


def test_two_ranks_say_the_same_and_so_do_those_that_follow_them(monkeypatch, reference):
    fault = {"action": "kill", "rank": 1, "step": 9}
    monkeypatch.setenv("LOCKSTEP_FAILPOINTS", json.dumps([fault]))
    with LLM(tp_size=2, **SETTINGS) as llm:
        assert texts(llm.chat(*mixed())) == reference
        assert llm.engine.counters.num_recoveries == 1
        assert texts(llm.chat(*mixed())) == reference


def test_few_pages_and_many_requests_change_nothing(reference):
    small = {"device": "cpu", "kv_cache_gb": 0.0004, "max_model_len": 200, "page_size": 4}
    with LLM(in_process=True, max_num_seqs=8, **small) as llm:
        asked, params = mixed(24)
        got = texts(llm.chat(asked, params))
        assert got[:8] == reference
        assert llm.engine.num_preemptions > 0


# Over HTTP


@contextlib.asynccontextmanager
async def served(llm):
    """An HTTP client of an ingress before the engine of `llm`."""

    async def locate():
        return llm.engine.info()

    client = DriverClient(locate, name="test", node_id="local")
    service = Service(client, llm.tokenizer, model="bundled")
    transport = httpx.ASGITransport(build_api(service))
    await client.start()
    while not client.ready:
        await asyncio.sleep(0.01)
    try:
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            yield http
    finally:
        await client.close()


async def ask(http, **fields):
    body = {
        "model": "bundled",
        "messages": [{"role": "user", "content": QUESTIONS[0]}],
        "max_tokens": 200,
        "seed": 5,
    } | fields
    return await http.post("/v1/chat/completions", json=body)


def streamed(response):
    events = [line[6:] for line in response.text.splitlines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    deltas = [json.loads(event)["choices"][0]["delta"] for event in events[:-1]]
    return "".join(delta.get("content") or "" for delta in deltas)


def in_service(llm, *bodies):
    async def run():
        async with served(llm) as http:
            return await asyncio.gather(*[ask(http, **body) for body in bodies])

    return asyncio.run(run())


def content(response):
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["message"]["content"]


def test_a_stream_says_what_the_whole_answer_says(llm):
    asked = {
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    }
    whole, stream = in_service(llm, asked, asked | {"stream": True})
    assert is_valid(content(whole))
    assert streamed(stream) == content(whole)


def test_the_other_ways_to_ask(llm):
    free, chosen, written, ruled, newer = in_service(
        llm,
        {"response_format": {"type": "text"}, "temperature": 0},
        {"guided_choice": ["seven (7)", "eight [8]"]},
        {"guided_json": json.dumps(SCHEMA)},
        {"guided_grammar": 'start: "<" /[0-9]{3}/ ">"'},
        {"structured_outputs": {"regex": "a[bc]{4}d"}},
    )
    assert content(free) == answer(QUESTIONS[0])
    assert content(chosen) in ("seven (7)", "eight [8]")
    assert is_valid(content(written))
    assert re.fullmatch("<[0-9]{3}>", content(ruled))
    assert re.fullmatch("a[bc]{4}d", content(newer))


@pytest.mark.parametrize(
    ("asked", "param", "sentence"),
    [
        (
            {"guided_regex": "["},
            "guided_regex",
            "'guided_regex' cannot be used: error: unclosed character class.",
        ),
        (
            {"structured_outputs": {"regex": "a*" * 30000}},
            "structured_outputs.regex",
            "'structured_outputs.regex' cannot be used: it takes too long to compile.",
        ),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": {"type": "objekt"}},
                }
            },
            "response_format.json_schema.schema",
            "'response_format.json_schema.schema' cannot be used: Invalid type: objekt.",
        ),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_bad_grammar_is_a_bad_request(llm, asked, param, sentence, stream):
    bad, free = in_service(llm, asked | {"stream": stream}, {"temperature": 0})
    assert bad.status_code == 400
    assert bad.json()["error"] == {
        "message": sentence,
        "type": "invalid_request_error",
        "param": param,
        "code": "invalid_grammar",
    }
    assert content(free) == answer(QUESTIONS[0])


def test_a_grammar_that_fails_ends_its_request_alone(llm, monkeypatch):
    monkeypatch.setattr("deployments.grammars.MAX_MASK_S", -1.0)
    bad, free = in_service(llm, {"guided_regex": "[0-9]+"}, {"temperature": 0})
    assert bad.status_code == 500
    assert (bad.json()["error"]["type"], bad.json()["error"]["code"]) == (
        "server_error",
        "grammar_error",
    )
    assert content(free) == answer(QUESTIONS[0])


def test_a_poisoned_row_ends_its_request_alone(monkeypatch):
    fault = {"action": "poison", "rank": 0, "step": 2}
    monkeypatch.setenv("LOCKSTEP_FAILPOINTS", json.dumps([fault]))
    with LLM(in_process=True, **SETTINGS) as llm:
        counters = llm.engine.counters
        answers = in_service(llm, *[{"temperature": 0}] * 3)
        assert sorted(one.status_code for one in answers) == [200, 200, 500]
        for one in answers:
            if one.status_code == 200:
                assert content(one) == answer(QUESTIONS[0])
            else:
                assert one.json()["error"]["code"] == "numerical_error"
                assert one.json()["error"]["type"] == "server_error"
        assert counters.num_recoveries == 0
        assert counters.outcomes["error"] == 1
