"""The HTTP front over a real server and a driver that only counts or says one text."""

import asyncio
import json
import socket
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import openai
import pytest
import uvicorn

from deployments import ingress
from deployments.driver_client import DriverClient
from deployments.ingress import Keys, Service, build_api, read_keys
from deployments.messages import Cancel, Finish, IngressBeat, Submit
from tests.deployments.fakes import EOS, FakeDriver, chat_tokenizer, counting, saying

MODEL = "some/model"
ENDPOINTS = ["/v1/completions", "/v1/chat/completions"]


def wait_for(condition, timeout_s=5.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail("waited too long")
        time.sleep(0.002)


class Front:
    """An ingress behind uvicorn in a thread, its fake driver, and a client for it."""

    def __init__(self, driver: FakeDriver, **settings) -> None:
        self.driver = driver
        resume_wait_s = settings.pop("resume_wait_s", 5.0)
        self.client = DriverClient(
            driver.locate, name="ingress", node_id="node", resume_wait_s=resume_wait_s
        )
        self.service = Service(self.client, chat_tokenizer(), model=MODEL, **settings)
        listener = socket.socket()
        listener.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        config = uvicorn.Config(
            build_api(self.service), lifespan="on", log_level="critical", server_header=False
        )
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [listener]})
        self.thread.start()
        self.http = httpx.Client(base_url=self.url, timeout=20)

    def post(self, path: str, **fields) -> httpx.Response:
        return self.http.post(path, json=body_for(path, **fields))

    def events(self, path: str, **fields) -> list[str]:
        """The data of every server-sent event."""
        text = self.post(path, stream=True, **fields).text
        assert text.endswith("\n\n")
        events = text.removesuffix("\n\n").split("\n\n")
        assert all(event.startswith("data: ") and "\n" not in event for event in events)
        return [event.removeprefix("data: ") for event in events]

    def close(self) -> None:
        self.http.close()
        self.server.should_exit = True
        self.thread.join()


def body_for(path: str, **fields) -> dict:
    body: dict = {"model": MODEL}
    if path.endswith("chat/completions"):
        body["messages"] = [{"role": "user", "content": "hello"}]
    elif path.endswith("completions"):
        body["prompt"] = "hello"
    body |= fields
    return {name: value for name, value in body.items() if value is not ...}


@contextmanager
def running(reply=counting, **settings):
    with tempfile.TemporaryDirectory(prefix="ls-") as folder:
        driver = FakeDriver(Path(folder), reply)
        driver.start()
        front = Front(driver, **settings)
        try:
            wait_for(lambda: front.http.get("/readyz").status_code == 200)
            yield front
        finally:
            front.close()
            driver.stop()


@pytest.fixture(scope="module")
def shared_front():
    with running(saying("Hello, wörld!")) as front:
        yield front


@pytest.fixture
def front(shared_front):
    """The shared one, as it was."""
    shared_front.driver.step_s = 0.001
    shared_front.driver.reply = saying("Hello, wörld!")
    shared_front.driver.refusal = None
    shared_front.driver.received.clear()
    return shared_front


@pytest.fixture(scope="module")
def client(shared_front):
    with openai.OpenAI(base_url=f"{shared_front.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def text_of(response: httpx.Response) -> str:
    choice = response.json()["choices"][0]
    return choice["text"] if "text" in choice else choice["message"]["content"]


def streamed_text(events: list[str], choice: int = 0) -> str:
    assert events[-1] == "[DONE]"
    assert events.count("[DONE]") == 1
    text = ""
    for event in map(json.loads, events[:-1]):
        for one in event["choices"]:
            if one["index"] == choice:
                text += one["text"] if "text" in one else one["delta"].get("content", "")
    return text


def check_error(response: httpx.Response, status: int, *, param=..., code=...) -> dict:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"].startswith("req_")
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    for leak in ("Traceback", "site-packages", "/home", "0x", "msgspec", ".py"):
        assert leak not in error["message"]
    if param is not ...:
        assert error["param"] == param
    if code is not ...:
        assert error["code"] == code
    return error


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


def test_the_stream_has_its_headers(front):
    with front.http.stream("POST", ENDPOINTS[0], json=body_for(ENDPOINTS[0], stream=True)) as got:
        got.read()
    assert got.headers["content-type"].startswith("text/event-stream")
    assert got.headers["cache-control"] == "no-store"
    assert got.headers["x-content-type-options"] == "nosniff"


def test_requests_are_named(front):
    named = front.http.get("/v1/models", headers={"x-request-id": "mine"}).headers
    assert named["x-client-request-id"] == "mine"
    assert named["x-request-id"] != front.http.get("/v1/models").headers["x-request-id"]
    for odd in ("x" * 129, "caf\u00e9", "a\tb"):
        headers = {b"x-request-id": odd.encode()}
        assert "x-client-request-id" not in front.http.get("/livez", headers=headers).headers


# Errors.


@pytest.mark.parametrize("path", ENDPOINTS)
def test_what_is_not_a_json_post(front, path):
    check_error(front.http.get(path), 405)
    assert front.http.get(path).headers["allow"] == "POST"
    check_error(front.http.delete(path), 405)
    data = json.dumps(body_for(path)).encode()
    for kind in (
        "text/plain",
        "application/x-www-form-urlencoded",
        "application/json; charset=utf-16",
    ):
        check_error(front.http.post(path, content=data, headers={"content-type": kind}), 415)
    json_type = {"content-type": "application/json"}
    zipped = {**json_type, "content-encoding": "gzip"}
    check_error(front.http.post(path, content=data, headers=zipped), 415)
    utf8 = {"content-type": "Application/JSON; charset=UTF-8"}
    assert front.http.post(path, content=data, headers=utf8).status_code == 200


@pytest.mark.parametrize(
    "path", ["/index.html", "/v1", "/v1/completions/", "/metrics", "/docs", "/openapi.json"]
)
def test_there_are_no_other_routes(front, path):
    check_error(front.http.get(path), 404, code="unknown_url")
    check_error(front.http.post(path, json={}), 404, code="unknown_url")


def test_a_body_that_is_too_large(front):
    data = b'{"model": "' + b"x" * (4 * 2**20) + b'"}'
    headers = {"content-type": "application/json"}
    check_error(front.http.post(ENDPOINTS[0], content=data, headers=headers), 413)

    def pieces():
        for start in range(0, len(data), 2**16):
            yield data[start : start + 2**16]

    check_error(front.http.post(ENDPOINTS[0], content=pieces(), headers=headers), 413)


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


@pytest.mark.parametrize("path", ENDPOINTS)
def test_our_own_fault_says_nothing(front, path, monkeypatch, caplog):
    def broken(*_):
        raise RuntimeError("/home/secret 0x7f00")

    monkeypatch.setattr(ingress, "check_model", broken)
    error = check_error(front.post(path), 500)
    assert error["message"] == "The server had an error while processing your request."
    assert "a request failed" in caplog.text


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


# Clients that leave.


@pytest.mark.parametrize("path", ENDPOINTS)
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_cancels(front, path, stream):
    front.driver.reply = counting
    front.driver.step_s = 0.05
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
    left = time.monotonic()
    connection.close()
    wait_for(lambda: len(front.driver.of(Cancel)) == 2)
    assert time.monotonic() - left < 0.04  # before the next token
    wait_for(lambda: front.client.num_live == 0)
    front.driver.step_s = 0.001
    assert front.driver.num_running == 0


# Engines that leave.


@pytest.mark.parametrize("path", ENDPOINTS)
def test_a_stream_survives_a_restart(path):
    with running() as front:
        front.driver.step_s = 0.003
        expected = text_of(front.post(path, max_tokens=100))
        restarts = threading.Timer(0.1, front.driver.restart)
        restarts.start()
        assert streamed_text(front.events(path, max_tokens=100)) == expected
        restarts.join()
        assert front.driver.of(Submit)[-1].epoch == 2


def test_an_engine_that_does_not_come_back():
    with running(resume_wait_s=0.2) as front:
        front.driver.step_s = 0.003
        withdrawn = threading.Timer(0.1, lambda: setattr(front.driver, "ready", False))
        withdrawn.start()
        events = front.events(ENDPOINTS[1], max_tokens=400)
        assert "[DONE]" not in events
        assert json.loads(events[-1])["error"]["code"] == "engine_unavailable"
        assert "error" not in json.loads(events[-2])
        check_error(front.http.get("/readyz"), 503, code="engine_unavailable")
        check_error(front.http.get("/health"), 503)
        assert front.http.get("/livez").status_code == 200
        response = front.post(ENDPOINTS[0])
        check_error(response, 503)
        assert int(response.headers["retry-after"]) > 0
        front.driver.ready = True
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


# Keys.


def test_a_key_opens_every_route_but_the_probes():
    digest = "2c70e12b7a0646f92279f427c7b38e7334d8e5389cff167a1dc30e73f826b683"  # of "key"
    with running(api_keys=("plain-key", digest)) as front:
        for path in ("/livez", "/readyz", "/health"):
            assert front.http.get(path).status_code == 200
        for method, path in (("GET", "/v1/models"), ("POST", ENDPOINTS[0]), ("GET", "/metrics")):
            for header in ({}, {"authorization": "Bearer no"}, {"authorization": "Basic key"}):
                response = front.http.request(method, path, headers=header)
                check_error(response, 401, code="invalid_api_key")
                assert response.headers["www-authenticate"] == "Bearer"
        assert (front.client.counts.received, front.client.counts.rejected) == (9, 9)
        salts = set()
        for key in ("plain-key", "key"):
            headers = {"authorization": f"Bearer {key}"}
            body = body_for(ENDPOINTS[0], cache_salt="s")
            assert front.http.post(ENDPOINTS[0], json=body, headers=headers).status_code == 200
            salts.add(front.driver.of(Submit)[-1].salt)
        assert len(salts) == 2
        assert all(salt.endswith("/s") and "key" not in salt for salt in salts)


def test_the_digest_itself_is_no_key():
    digest = "2c70e12b7a0646f92279f427c7b38e7334d8e5389cff167a1dc30e73f826b683"
    keys = Keys([digest])
    assert keys.tenant("Bearer key")
    with pytest.raises(ingress.Unauthorized):
        keys.tenant(f"Bearer {digest}")


# Bad input, everywhere: never a 5xx, and the service is as it was.

NUMBERS = {
    "temperature": [-1, 2.0001, "1", True, [], 1e300],
    "top_p": [0, 1.1, "x"],
    "top_k": [-2, 2**31, 1.5],
    "n": [0, 9, 10**9, 1.0, True],
    "max_tokens": [0, -1, 512, 513, 10**12, "5"],
    "min_tokens": [-1, 17000],
    "seed": [2**64, 1.5, "x"],
    "presence_penalty": [-2.1, 2.1],
    "frequency_penalty": [-2.1, 2.1],
    "repetition_penalty": [0, -1],
    "logit_bias": [{"abc": 1}, {"-1": 1}, {"260": 1}, {"1": 101}, {"1": "x"}, [1], {str(2**70): 1}],
    "stop": ["", ["a"] * 5, "x" * 257, [1], {}],
    "stop_token_ids": [[-1], [260], [2**31], "x", ["1"]],
    "stream": [1, "true"],
    "stream_options": [{"include_usage": True}, 5],
    "prompt_logprobs": [-1, 21, True],
    "cache_salt": ["", "\n", "x" * 129, 5],
    "model": [None, 5, "", "other", ...],
    "tools": [[{}]],
    "response_format": [{"type": "xml"}, {"type": "json_schema"}, "json_object", {}],
    "guided_json": [5, "", [1]],
    "guided_regex": ["", 5, "x" * (2**16 + 1)],
    "guided_choice": [[], [""], "yes", [1]],
    "structured_outputs": [{"regexp": "x"}, {"regex": "x", "choice": ["x"]}, "x"],
    "nonsense": [None],
}
PROMPTS = ["", [], [[]], [""], [-1], [260], [2**31], [2**70], ["a", 1], [[1], "a"], [None], 5, None]
PROMPTS += [["a"] * 65, {}, True, [1.5], "a" * 512, "a" * 513, [65] * 600, ["a", ""], ...]
MESSAGES = [
    [],
    None,
    5,
    "x",
    [5],
    [{}],
    [{"role": "user"}],
    [{"role": "robot", "content": "x"}],
    ...,
]
MESSAGES += [
    [{"role": "user", "content": None}],
    [{"role": "user", "content": 5}],
    [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}],
    [{"role": "user", "content": [{"type": "text", "text": 5}]}],
    [{"role": "tool", "content": "x"}],
    [{"role": "assistant", "tool_calls": [{}]}],
    [{"role": "user", "content": "x", "name": "n" * 1000}],
    [{"role": "user", "content": "x"}] * 3000,
    [{"role": "user", "content": "x" * 600}],
]
GOOD_PROMPTS = [" ", "\0", "\u200d\u202e\ufeff", "e" + "\u0301" * 100, "</s><s>", [EOS], [0], [259]]


def bad_bodies():
    for path in ENDPOINTS:
        for name, values in NUMBERS.items():
            yield from ((path, {name: value}) for value in values)
    yield from ((ENDPOINTS[0], {"prompt": prompt}) for prompt in PROMPTS)
    yield from ((ENDPOINTS[1], {"messages": messages}) for messages in MESSAGES)
    yield from ((ENDPOINTS[0], {"logprobs": value}) for value in (-1, 21, True, "1"))
    yield from ((ENDPOINTS[1], {"logprobs": value}) for value in (1, "yes"))


def test_bad_bodies_are_bad_requests(front):
    before = front.post(ENDPOINTS[0], seed=1).json()["choices"]
    front.driver.received.clear()
    for path, fields in bad_bodies():
        response = front.post(path, **fields)
        is_other = fields.get("model") in ("", "other")
        error = check_error(response, 404 if is_other else 400)
        assert error["param"] is not None, (fields, error)
        assert len(error["message"]) < 400
    assert front.driver.of(Submit) == []
    assert front.client.num_live == 0
    assert front.post(ENDPOINTS[0], seed=1).json()["choices"] == before


def test_odd_prompts_are_answered(front):
    for prompt in GOOD_PROMPTS:
        assert front.post(ENDPOINTS[0], prompt=prompt).status_code == 200
        if isinstance(prompt, str):
            messages = [{"role": "user", "content": prompt}]
            assert front.post(ENDPOINTS[1], messages=messages).status_code == 200


@pytest.mark.parametrize("path", ENDPOINTS)
@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"null",
        b"[" * 1_000_000,
        b'{"model": NaN}',
        b'{"model": "\\ud800"}',
        b'{"model": "\xff"}',
        b"\xef\xbb\xbf{}",
        b"{} {}",
        b'{"tools": ' + b'{"a":' * 100_000,
        b'{"model": "m", "seed": ' + b"9" * 5000 + b"}",
    ],
    ids=lambda data: repr(data[:12]),
)
def test_rubbish_is_a_bad_request(front, path, data):
    headers = {"content-type": "application/json"}
    check_error(front.http.post(path, content=data, headers=headers), 400)


# Without a server.


def test_a_client_that_leaves_while_it_speaks_is_told_nothing():
    sent = []

    async def main():
        messages = [
            {"type": "http.request", "body": b"{", "more_body": True},
            {"type": "http.disconnect"},
        ]
        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/completions",
            "headers": [(b"content-type", b"application/json")],
        }

        async def receive():
            return messages.pop(0)

        async def send(message):
            sent.append(message)

        async def locate():
            raise OSError

        client = DriverClient(locate, name="ingress", node_id="node")
        await build_api(Service(client, chat_tokenizer(), model=MODEL))(scope, receive, send)
        await client.close()

    asyncio.run(main())
    assert sent == []


def test_a_body_that_does_not_come_is_not_waited_for(front, monkeypatch):
    monkeypatch.setattr(ingress, "BODY_TIMEOUT_S", 0.05)
    connection = socket.create_connection(front.url.removeprefix("http://").split(":"))
    connection.sendall(
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        b"content-length: 100\r\n\r\n{"
    )
    assert connection.recv(1000).startswith(b"HTTP/1.1 408")
    connection.close()


def test_keys_come_from_a_file_too(tmp_path):
    file = tmp_path / "keys"
    file.write_text("# ours\nsecret-one\n\n  secret-two \n")
    assert read_keys(str(file)) == ["secret-one", "secret-two"]
    assert read_keys("") == []


@pytest.mark.parametrize(
    ("content", "sentence"), [(None, "cannot be read"), ("# none\n", "holds no key")]
)
def test_a_key_file_without_keys_never_opens_the_service(tmp_path, content, sentence):
    file = tmp_path / "keys"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ValueError, match=sentence):
        read_keys(str(file))
