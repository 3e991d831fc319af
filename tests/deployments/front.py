"""The HTTP front over a real server, before a driver that only counts or says one text."""

import json
import socket
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import uvicorn

from deployments.driver_client import DriverClient
from deployments.routes import build_api
from deployments.service import Service
from tests.deployments.fakes import FakeDriver, chat_tokenizer, counting

MODEL = "some/model"


ENDPOINTS = ["/v1/completions", "/v1/chat/completions"]


def wait_for(condition, timeout_s=60.0):
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
        tokenizer = settings.pop("tokenizer", None) or chat_tokenizer()
        self.service = Service(self.client, tokenizer, model=MODEL, **settings)
        listener = socket.socket()
        listener.bind(("127.0.0.1", 0))
        listener.listen()  # who comes before the server waits, and is not refused
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        config = uvicorn.Config(
            build_api(self.service), lifespan="on", log_level="critical", server_header=False
        )
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [listener]})
        self.thread.start()
        self.http = httpx.Client(base_url=self.url, timeout=60)

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
