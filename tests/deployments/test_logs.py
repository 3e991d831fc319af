"""Every line is an object; no line says what a prompt said."""

import io
import json
import logging

import pytest

from deployments import service
from deployments.errors import ServiceError
from deployments.logs import REQUESTS, ROOT, JsonFormatter, configure_logs
from tests.deployments.front import ENDPOINTS, body_for, running

CANARY = "canary-7f3a"


@pytest.fixture
def lines():
    """What our loggers write in JSON; everything is put back afterwards."""
    ours, requests = logging.getLogger(ROOT), logging.getLogger(REQUESTS)
    before = ours.level, ours.handlers, ours.propagate, requests.level
    configure_logs("json")
    stream = io.StringIO()
    ours.handlers[0].setStream(stream)
    yield lambda: [json.loads(line) for line in stream.getvalue().splitlines()]
    ours.level, ours.handlers, ours.propagate, requests.level = before
    logging.Logger.manager._clear_cache()


def formatted(**fields):
    record = logging.makeLogRecord({"name": "lockstep.engine", "levelname": "ERROR", **fields})
    return json.loads(JsonFormatter().format(record))


def test_a_line_has_what_is_known():
    line = formatted(msg="epoch %d is over", args=(3,), epoch=3, rank=1, unknown="x")
    ts = line.pop("ts")
    assert ts.endswith("+00:00")
    assert line == {
        "level": "error",
        "logger": "lockstep.engine",
        "event": "epoch 3 is over",
        "epoch": 3,
        "rank": 1,
    }


def test_two_lines_of_text_are_one_line_of_json():
    assert "\n" not in JsonFormatter().format(logging.makeLogRecord({"msg": "a\nb"}))


def test_an_error_outside_requests_is_told_whole():
    try:
        raise OSError("no space left")
    except OSError as error:
        line = formatted(msg="failed", exc_info=(OSError, error, error.__traceback__))
    assert "no space left" in line["exception"]


def test_requests_have_lines_with_their_ids(lines):
    with running() as front:
        answered = front.post(ENDPOINTS[0], max_tokens=2)
        refused = front.post(ENDPOINTS[0], n=99)
        front.http.get("/readyz")
        front.http.get(f"/{CANARY}")
    ends = [line for line in lines() if line["logger"] == REQUESTS]
    assert [(line["path"], line["status"]) for line in ends] == [
        (ENDPOINTS[0], 200),
        (ENDPOINTS[0], 400),
        ("another", 404),
    ]
    ids = [response.headers["x-request-id"] for response in (answered, refused)]
    assert [line["request_id"] for line in ends][:2] == ids
    assert all(line["seconds"] >= 0 for line in ends)
    assert CANARY not in json.dumps(lines())


@pytest.mark.parametrize("error", [RuntimeError, ServiceError, UnicodeError])
def test_prompts_are_never_logged(lines, monkeypatch, error):
    def fails(request, *args, **kwargs):
        raise error(f"cannot read {request}" if error is not ServiceError else "no reason")

    with running() as front:
        for path in ENDPOINTS:
            body = body_for(path, messages=[{"role": "user", "content": CANARY}], prompt=CANARY)
            body.pop("prompt" if "chat" in path else "messages")
            for more in ({"max_tokens": 1}, {"n": 99}, {"stop": [CANARY]}, {CANARY: 1}):
                front.http.post(path, json=body | more)
            front.http.post(path, content=CANARY, headers={"content-type": "application/json"})
            for name in ("plan_chat", "plan_completion"):
                with monkeypatch.context() as patch:
                    patch.setattr(service, name, fails)
                    front.http.post(path, json=body)
    written = lines()
    assert sum(line["level"] == "error" for line in written) == 2
    assert all(line["request_id"] for line in written if line["level"] == "error")
    assert CANARY not in json.dumps(written)
