"""The whole line: HTTP, Serve, driver, ranks on two replicas of two, and back."""

import asyncio
import json
import os
import random
import signal
import time

import httpx
import openai
import pytest

from tests.e2e import ray_calls
from tests.e2e.conftest import LIMIT_S, await_so, deployed, driver_handle, metric, wait_ready
from tests.e2e.machine import slowdown
from workers.bundled.questions import answer

CANCELLED = 'lockstep_requests_ended_total{outcome="cancelled"}'


@pytest.fixture(scope="module")
def url(cluster):
    with deployed(cluster, tp_size=2, dp_size=2, max_num_seqs=32) as url:
        yield url


@pytest.fixture
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def questions(num, seed=0):
    rng = random.Random(seed)
    made = []
    for _ in range(num):
        kind = rng.randrange(3)
        if kind == 0:
            made.append(f"What is {rng.randrange(1000)}+{rng.randrange(1000)}?")
        elif kind == 1:
            first = rng.randrange(1, 60)
            made.append(f"Count from {first} to {first + rng.randrange(5, 25)}")
        else:
            made.append(f"Add {rng.randrange(100)} and {rng.randrange(1000)}.")
    return made


async def ask(http, url, question, *, stream, on_text=lambda: None, **more):
    """`on_text` is called whenever a stream has said something."""
    body = {
        "model": "bundled",
        "messages": [{"role": "user", "content": question}],
        "temperature": 0,
        "stream": stream,
    } | more
    if not stream:
        response = await http.post(f"{url}/v1/chat/completions", json=body)
        response.raise_for_status()
        return response.json()["choices"][0]["message"]["content"]
    text, ended = "", False
    async with http.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line == "data: [DONE]":
                ended = True
            elif line.startswith("data: "):
                choices = json.loads(line[6:])["choices"]
                text += choices[0]["delta"].get("content") or ""
                if text:
                    on_text()
    assert ended, "the stream ended without [DONE]"
    return text


async def ask_all(url, asked, **more):
    limits = httpx.Limits(max_connections=len(asked))
    async with httpx.AsyncClient(timeout=LIMIT_S, limits=limits) as http:
        jobs = [ask(http, url, q, stream=i % 2 == 0, **more) for i, q in enumerate(asked)]
        return await asyncio.gather(*jobs)


def test_four_ranks_serve(url):
    ranks = driver_handle().ranks.remote().result()
    assert [hello.rank for hello in ranks] == [0, 1, 2, 3]
    assert len({hello.pid for hello in ranks}) == 4


@pytest.mark.row("C1")
def test_two_hundred_mixed_requests_are_all_right(url):
    asked = questions(200)
    assert asyncio.run(ask_all(url, asked)) == [answer(question) for question in asked]


def test_streamed_and_whole_texts_are_equal(url):
    asked = questions(24, seed=1)
    first = asyncio.run(ask_all(url, asked))
    second = asyncio.run(ask_all(url, asked[1:] + asked[:1]))
    assert second == first[1:] + first[:1]


def test_the_openai_client_is_served(client):
    models = [model.id for model in client.models.list()]
    chat = client.chat.completions.create(
        model=models[0],
        messages=[{"role": "user", "content": "What is 128+305?"}],
        temperature=0,
        logprobs=True,
        top_logprobs=2,
    )
    assert chat.choices[0].message.content == "433"
    assert chat.choices[0].finish_reason == "stop"
    assert [t.token for t in chat.choices[0].logprobs.content][:3] == ["4", "3", "3"]
    assert chat.usage.completion_tokens == 4


def test_wrong_requests_are_openai_errors(client):
    with pytest.raises(openai.BadRequestError, match="context") as caught:
        client.completions.create(model="bundled", prompt="x" * 5000)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="gpt-4", prompt="x")


def test_a_client_that_leaves_frees_its_pages(url):
    handle = driver_handle()
    before = metric(handle, CANCELLED)

    async def leave_early(http):
        body = {"model": "bundled", "prompt": "x", "max_tokens": 3000, "ignore_eos": True}
        body["stream"] = True
        async with http.stream("POST", f"{url}/v1/completions", json=body) as response:
            async for _ in response.aiter_lines():
                return

    async def many():
        async with httpx.AsyncClient(timeout=LIMIT_S) as http:
            await asyncio.gather(*[leave_early(http) for _ in range(20)])

    asyncio.run(many())
    await_so(lambda: metric(handle, CANCELLED) - before == 20)
    for name in ("running", "waiting"):
        await_so(lambda name=name: metric(handle, f"lockstep_requests_{name}") == 0)
    pages = metric(handle, "lockstep_pages")
    await_so(lambda: metric(handle, "lockstep_pages_free") == pages)


@pytest.mark.row("C5")
def test_no_ray_call_is_made_for_a_token(url):
    """Serve's own periodic calls go on; tokens must not add any."""

    def calls_and_seconds(work):
        calls, began = ray_calls.total(), time.monotonic()
        work()
        return ray_calls.total() - calls, time.monotonic() - began

    num_tokens = 32 * 120
    asked = ["Count from 1 to 99"] * 32
    busy_calls, busy_s = calls_and_seconds(
        lambda: asyncio.run(ask_all(url, asked, max_tokens=120, ignore_eos=True))
    )
    # As long without tokens as with them: whatever else the machine does is in both.
    idle_calls, idle_s = calls_and_seconds(lambda: time.sleep(max(4.0, busy_s)))
    expected = (idle_calls + 10) / idle_s * busy_s
    assert idle_calls > 0, "the counter counts nothing"
    assert busy_calls - expected < num_tokens / 100


def test_a_killed_rank_is_noticed_and_no_stream_notices(url):
    asked = [f"Count from {n} to {n + 40}" for n in range(1, 13)]
    before = asyncio.run(ask_all(url, asked))
    handle = driver_handle()
    victim = handle.ranks.remote().result()[3].pid
    epoch = metric(handle, "lockstep_epoch")
    looks = []

    async def disturbed():
        limits = httpx.Limits(max_connections=40)
        async with httpx.AsyncClient(timeout=LIMIT_S, limits=limits) as http:
            begun = asyncio.Event()
            jobs = [
                asyncio.create_task(ask(http, url, q, stream=True, on_text=begun.set))
                for q in asked
            ]
            await begun.wait()
            os.kill(victim, signal.SIGKILL)
            killed = time.monotonic()
            while not all(job.done() for job in jobs):
                response = await http.get(f"{url}/readyz")
                looks.append((response.status_code, time.monotonic() - killed))
            return await asyncio.gather(*jobs)

    after = asyncio.run(disturbed())
    assert after == before
    wait_ready(url)
    assert metric(handle, "lockstep_requests_resumed_total") > 0, "no stream was disturbed"
    # A busy machine may cost another epoch besides, and let its peers complain first.
    assert metric(handle, "lockstep_epoch") > epoch
    assert handle.endpoint.remote().result().epoch > epoch
    noticed = [seconds for status, seconds in looks if status == 503]
    assert noticed, f"the service was ready all the time: {looks}"
    assert noticed[0] < 1.0 * slowdown()
