"""One request and its response: headers, bodies that are too long, too late or not JSON."""

import asyncio
import json
import socket

import pytest

from deployments import exchange
from deployments.driver_client import DriverClient
from deployments.routes import build_api
from deployments.service import Service
from tests.deployments.fakes import chat_tokenizer
from tests.deployments.front import ENDPOINTS, MODEL, body_for, check_error


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


def test_a_body_that_is_too_large(front):
    data = b'{"model": "' + b"x" * (4 * 2**20) + b'"}'
    headers = {"content-type": "application/json"}
    check_error(front.http.post(ENDPOINTS[0], content=data, headers=headers), 413)

    def pieces():
        for start in range(0, len(data), 2**16):
            yield data[start : start + 2**16]

    check_error(front.http.post(ENDPOINTS[0], content=pieces(), headers=headers), 413)


def test_a_body_that_does_not_come_is_not_waited_for(front, monkeypatch):
    monkeypatch.setattr(exchange, "BODY_TIMEOUT_S", 0.05)
    connection = socket.create_connection(front.url.removeprefix("http://").split(":"))
    connection.sendall(
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        b"content-length: 100\r\n\r\n{"
    )
    assert connection.recv(1000).startswith(b"HTTP/1.1 408")
    connection.close()


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
