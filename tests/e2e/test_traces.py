"""Traces of the whole line: Serve, driver, ranks, and a collector that gets them."""

import asyncio
import json
import os
import signal

import httpx
import pytest

from tests.deployments.collector import Collector, check_nested
from tests.e2e.conftest import LIMIT_S, deployed, driver_handle

QUESTION, ANSWER = "What is 128+305?", "433"
CALLER_TRACE, CALLER_SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
CHAT = "/v1/chat/completions"


def body_of(question, **fields):
    messages = [{"role": "user", "content": question}]
    return {"model": "bundled", "messages": messages, "temperature": 0} | fields


async def ask_all(url):
    """Four requests of four kinds, and two at once; the first one's answer and id."""
    async with httpx.AsyncClient(base_url=url, timeout=LIMIT_S) as http:
        caller = {"traceparent": f"00-{CALLER_TRACE}-{CALLER_SPAN}-01"}
        whole = await http.post(CHAT, json=body_of(QUESTION), headers=caller)
        assert ANSWER in whole.json()["choices"][0]["message"]["content"]
        streamed = await http.post(CHAT, json=body_of(QUESTION, stream=True))
        assert "data: [DONE]" in streamed.text
        refused = await http.post(CHAT, json=body_of(QUESTION, max_tokens=10**6))
        assert refused.status_code == 400
        endless = body_of("Count from 1 to 99", stream=True, max_tokens=3500, ignore_eos=True)
        async with http.stream("POST", CHAT, json=endless) as response:
            async for _ in response.aiter_bytes():
                break
        counting = body_of("Count from 1 to 30")
        await asyncio.gather(*[http.post(CHAT, json=counting) for _ in range(2)])
    return whole.json(), whole.headers["x-request-id"]


async def ask_and_kill(url, victim):
    """A stream during which the rank that serves it, process `victim`, dies."""
    counting = body_of("Count from 1 to 60", stream=True, max_tokens=1500, ignore_eos=True)
    text, is_killed = "", False
    async with (
        httpx.AsyncClient(base_url=url, timeout=LIMIT_S) as http,
        http.stream("POST", CHAT, json=counting) as response,
    ):
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                text += json.loads(line[6:])["choices"][0]["delta"].get("content") or ""
            if not is_killed and "5" in text:
                is_killed = True
                os.kill(victim, signal.SIGKILL)
    assert text.startswith(" ".join(map(str, range(1, 61))))


def test_requests_leave_traces(cluster):
    with Collector() as collector:
        with deployed(cluster, otlp_endpoint=collector.url, max_num_seqs=1) as url:
            answer, request_id = asyncio.run(ask_all(url))
            (rank,) = driver_handle().ranks.remote().result()
            asyncio.run(ask_and_kill(url, rank.pid))
        # The service is gone: what its last seconds left was delivered when it ended.
        whole, streamed, refused, left, *both, resumed = collector.wait_for(7, timeout_s=60)
        check_texts_are_absent(collector)

    assert {span.name for span in collector.requests()} == {f"POST {CHAT}"}
    assert (whole.trace_id, whole.parent_id) == (CALLER_TRACE, CALLER_SPAN)
    assert whole.attributes["gen_ai.request.id"] == request_id
    assert whole.attributes["gen_ai.response.id"] == answer["id"]
    assert whole.attributes["gen_ai.usage.input_tokens"] == answer["usage"]["prompt_tokens"]
    assert whole.attributes["gen_ai.usage.output_tokens"] == answer["usage"]["completion_tokens"]
    outcomes = [span.attributes["lockstep.outcome"] for span in collector.requests()]
    assert outcomes == ["finished", "finished", "rejected", "cancelled", *["finished"] * 3]
    assert not any(span.is_error for span in collector.requests())
    assert collector.children(refused) == []
    for span in (whole, streamed, left, *both, resumed):
        children = collector.children(span)
        assert len(children) == 3
        check_nested(span, children)
    check_sums(collector, whole)
    check_sums(collector, streamed)
    check_one_waited_for_the_other(collector, *both)
    assert left.attributes["gen_ai.usage.output_tokens"] < 3500
    assert {name for name, _, _ in resumed.events} == {"resumed"}
    assert resumed.events[-1][2]["lockstep.epoch"] > 1


def check_sums(collector, span):
    queue, prefill, decode = collector.children(span)
    assert queue.seconds > 0
    assert prefill.seconds > 0
    assert decode.seconds > 0
    assert span.attributes["gen_ai.latency.e2e"] == pytest.approx(span.seconds, abs=1e-6)
    before = (queue.start - span.start) / 1e9
    to_first = span.attributes["gen_ai.latency.time_to_first_token"]
    assert before + queue.seconds + prefill.seconds == pytest.approx(to_first, abs=1e-6)


def check_one_waited_for_the_other(collector, *both):
    """The engine runs one request at a time."""
    begun = [collector.children(span) for span in both]
    first, second = sorted(begun, key=lambda children: children[2].end)
    assert second[1].end >= first[2].end


def check_texts_are_absent(collector):
    for body in collector.bodies:
        assert b"128+305" not in body
        assert b"Count" not in body
        assert b"16 17 18" not in body
