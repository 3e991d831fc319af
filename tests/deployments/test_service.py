"""Requests for tokens over HTTP: answers, streams, clients and engines that leave."""

import itertools
import json
import socket
import tempfile
import threading
import time
from pathlib import Path

import httpx
import openai
import pytest

from deployments import service
from deployments.chat_template import ASIDE, ChatTemplate, Effort
from deployments.messages import Cancel, Finish, IngressBeat, Submit
from deployments.tokenizer import ChatTokenizer
from tests.deployments.fakes import EOS, FakeDriver, byte_tokenizer, counting
from tests.deployments.front import (
    ENDPOINTS,
    MODEL,
    Front,
    body_for,
    check_error,
    running,
    streamed_text,
    text_of,
    wait_for,
)


@pytest.fixture(scope="module")
def client(shared_front):
    with openai.OpenAI(base_url=f"{shared_front.url}/v1", api_key="none", max_retries=0) as client:
        yield client


# OpenAI's own client.


def test_openai_completion(client, front):
    answer = client.completions.create(model=MODEL, prompt="hello", max_tokens=100)
    assert answer.choices[0].text == "Hello, wörld!"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.prompt_tokens_details.cached_tokens == 2
    assert answer._request_id.startswith("req_")


def test_openai_chat(client, front):
    messages = [{"role": "user", "content": "hello"}]
    answer = client.chat.completions.create(model=MODEL, messages=messages)
    assert answer.choices[0].message.content == "Hello, wörld!"
    assert answer.choices[0].message.role == "assistant"
    messages += [answer.choices[0].message, {"role": "user", "content": "again"}]
    client.chat.completions.create(model=MODEL, messages=messages)


def test_openai_streams(client, front):
    chunks = list(
        client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "hello"}],
            stream=True,
            stream_options={"include_usage": True},
            logprobs=True,
            top_logprobs=1,
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    said = [chunk.choices[0].delta.content or "" for chunk in chunks[:-1]]
    assert "".join(said) == "Hello, wörld!"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage.completion_tokens == len("Hello, wörld!".encode()) + 1
    assert chunks[1].choices[0].logprobs.content[0].token == "H"
    pieces = client.completions.create(model=MODEL, prompt="x", max_tokens=50, stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == "Hello, wörld!"


def test_openai_extra_fields_and_models(client, front):
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    extra = {
        "top_k": 5,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "cache_salt": "s",
        "min_tokens": 1,
    }
    client.completions.create(model=MODEL, prompt="x", extra_body=extra, seed=3)
    submit = front.driver.of(Submit)[-1]
    assert (submit.sampling.top_k, submit.sampling.seed, submit.salt) == (5, 3, "s")


def test_openai_errors_are_typed(client, front):
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL, prompt="x", temperature=9)
    assert (caught.value.param, caught.value.code) == ("temperature", "invalid_value")
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="other", prompt="x")
    assert missing.value.code == "model_not_found"
    front.driver.refusal = (429, "full", None, None)
    with pytest.raises(openai.RateLimitError):
        client.completions.create(model=MODEL, prompt="x")


# Answers.


@pytest.mark.parametrize("path", ENDPOINTS)
def test_streamed_and_whole_say_the_same(front, path):
    for stop in (None, "wö", ["rld", "o, w"], "never"):
        whole = text_of(front.post(path, stop=stop, max_tokens=60))
        assert streamed_text(front.events(path, stop=stop, max_tokens=60)) == whole
    assert whole == "Hello, wörld!"


@pytest.mark.parametrize("path", ENDPOINTS)
def test_a_stop_string_stops_the_driver(front, path):
    front.driver.reply = counting
    response = front.post(path, stop="3 4", max_tokens=200)
    assert text_of(response) == "0 1 2 "
    assert response.json()["choices"][0]["finish_reason"] == "stop"
    wait_for(lambda: front.driver.of(Finish))
    assert front.driver.of(Finish)[0].index == 9
    assert front.driver.of(Cancel) == []
    assert front.driver.num_running == 0


@pytest.mark.parametrize("path", ENDPOINTS)
def test_n_answers(front, path):
    response = front.post(path, n=3, max_tokens=5)
    assert [choice["index"] for choice in response.json()["choices"]] == [0, 1, 2]
    keys = {(s.sampling.seed, s.sampling.nonce) for s in front.driver.of(Submit)}
    assert len({seed for seed, _ in keys}) == 1
    assert {nonce for _, nonce in keys} == {0, 1, 2}
    events = front.events(path, n=3, max_tokens=5)
    assert [streamed_text(events, choice) for choice in range(3)] == ["Hello"] * 3


def test_several_prompts(front):
    front.driver.reply = lambda prompt, index, sampling: [*prompt, EOS][index]
    response = front.post("/v1/completions", prompt=["ab", "cd"], n=2)
    assert [c["text"] for c in response.json()["choices"]] == ["ab", "ab", "cd", "cd"]


def test_echo_and_prompt_logprobs(front):
    response = front.post("/v1/completions", echo=True, logprobs=1, max_tokens=1, prompt_logprobs=0)
    choice = response.json()["choices"][0]
    assert choice["text"] == "helloH"
    assert len(choice["logprobs"]["token_logprobs"]) == 6
    assert len(choice["prompt_logprobs"]) == 5


def test_ignore_eos_goes_on(front):
    response = front.post("/v1/completions", ignore_eos=True, max_tokens=30)
    assert response.json()["choices"][0]["finish_reason"] == "length"
    assert response.json()["usage"]["completion_tokens"] == 30


def test_a_long_body_is_planned_aside(front):
    error = check_error(front.post(ENDPOINTS[0], prompt="x" * 2**20), 400)
    assert error["code"] == "context_length_exceeded"
    assert "1048576" in error["message"]
    assert "512" in error["message"]


@pytest.mark.parametrize("path", ENDPOINTS)
def test_a_refusal_before_the_first_token_has_its_status(front, path):
    for stream in (False, True):
        front.driver.refusal = (429, "full", None, None)
        response = front.post(path, stream=stream)
        check_error(response, 429, code="rate_limit_exceeded")
        assert response.headers["retry-after"] == "1"
        front.driver.refusal = (400, "too many", "max_tokens", "context_length_exceeded")
        check_error(front.post(path, stream=stream), 400, param="max_tokens")


def test_refused_requests_are_counted_by_generation(front):
    counts = front.client.counts
    before = counts.received, counts.rejected, counts.finished
    front.post(ENDPOINTS[0], n=2, max_tokens=1)
    front.post(ENDPOINTS[0], n=20)
    after = counts.received, counts.rejected, counts.finished
    assert [b - a for a, b in zip(before, after, strict=True)] == [3, 1, 2]

    def is_told():
        return any(
            beat.received == counts.received and beat.rejected == counts.rejected
            for beat in front.driver.of(IngressBeat)
        )

    wait_for(is_told)
    assert all(beat.is_balanced for beat in front.driver.of(IngressBeat))


SPINS = """{% for m in messages %}{% if m.content == "spin" %}{% for a in range(99999) %}
{% for b in range(99999) %}{% endfor %}{% endfor %}{% endif %}{{ m.content }}{% endfor %}"""


def test_a_template_that_spins_holds_up_nobody_else(monkeypatch):
    """A token comes every 5 ms; on the event loop the template would hold them up for 2 s."""
    monkeypatch.setattr(service, "ASIDE", Effort(2.0, ASIDE.num_chars))
    tokenizer = ChatTokenizer(byte_tokenizer(), ChatTemplate(SPINS, {}))
    with running(tokenizer=tokenizer) as front:
        front.driver.step_s = 0.005
        refused, came = [], []

        def spin():
            body = body_for(ENDPOINTS[1], messages=[{"role": "user", "content": "spin"}])
            refused.append(httpx.post(front.url + ENDPOINTS[1], json=body, timeout=100))

        spins = threading.Thread(target=spin)
        body = body_for(ENDPOINTS[1], max_tokens=490, stream=True)
        with front.http.stream("POST", ENDPOINTS[1], json=body) as stream:
            for _ in stream.iter_lines():
                if not came:
                    spins.start()
                came.append(time.monotonic())
                if refused:
                    break
        spins.join()
    error = check_error(refused[0], 400, param="messages", code="template_timeout")
    assert error["message"].startswith("The model's chat template takes more than 2 s for these")
    assert max(b - a for a, b in itertools.pairwise(came)) < 1.5


# Clients that leave.


@pytest.mark.parametrize("path", ENDPOINTS)
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_cancels(front, path, stream):
    front.driver.reply = counting
    front.driver.most_tokens = 5
    payload = json.dumps(body_for(path, stream=stream, n=2, max_tokens=300)).encode()
    connection = socket.create_connection(front.url.removeprefix("http://").split(":"))
    connection.sendall(
        f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        f"content-length: {len(payload)}\r\n\r\n".encode()
        + payload
    )
    wait_for(lambda: front.driver.num_running == 2)
    if stream:
        assert connection.recv(1000)
    wait_for(lambda: front.driver.is_held)
    connection.close()
    wait_for(lambda: len(front.driver.of(Cancel)) == 2)  # there is no next token to fail on
    wait_for(lambda: front.client.num_live == 0)
    assert front.driver.num_running == 0


# Engines that leave.


@pytest.mark.parametrize("path", ENDPOINTS)
def test_a_stream_survives_a_restart(path):
    with running() as front:
        expected = text_of(front.post(path, max_tokens=100))
        front.driver.most_tokens = 30

        def restart():
            wait_for(lambda: front.driver.is_held)
            front.driver.most_tokens = None
            front.driver.restart()

        restarts = threading.Thread(target=restart)
        restarts.start()
        assert streamed_text(front.events(path, max_tokens=100)) == expected
        restarts.join()
        assert front.driver.of(Submit)[-1].epoch == 2


def test_an_engine_that_does_not_come_back():
    with running(resume_wait_s=0.2) as front:
        front.driver.most_tokens = 30

        def withdraw():
            wait_for(lambda: front.driver.is_held)
            front.driver.ready = False

        withdraws = threading.Thread(target=withdraw)
        withdraws.start()
        events = front.events(ENDPOINTS[1], max_tokens=400)
        withdraws.join()
        assert "[DONE]" not in events
        assert json.loads(events[-1])["error"]["code"] == "engine_unavailable"
        assert "error" not in json.loads(events[-2])
        check_error(front.http.get("/readyz"), 503, code="engine_unavailable")
        check_error(front.http.get("/health"), 503)
        assert front.http.get("/livez").status_code == 200
        response = front.post(ENDPOINTS[0])
        check_error(response, 503)
        assert int(response.headers["retry-after"]) > 0
        front.driver.ready, front.driver.most_tokens = True, None
        wait_for(lambda: front.http.get("/health").status_code == 200)
        assert front.post(ENDPOINTS[0]).status_code == 200


def test_before_the_engine_is_there():
    with tempfile.TemporaryDirectory(prefix="ls-") as folder:
        driver = FakeDriver(Path(folder))
        driver.ready = False
        driver.start()
        front = Front(driver)
        try:
            wait_for(lambda: front.http.get("/livez").status_code == 200)
            check_error(front.http.get("/readyz"), 503)
            check_error(front.post(ENDPOINTS[0]), 503)
            assert front.http.get("/v1/models").status_code == 200
        finally:
            front.close()
            driver.stop()
