"""Requests' spans as a collector gets them, from an ingress before a driver that only talks."""

import asyncio
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

from deployments.config import ServiceConfig
from deployments.driver_client import DriverClient
from deployments.messages import RequestFailed, Submit
from deployments.routes import build_api
from deployments.service import Service
from deployments.traces import FLUSH_S, Traces
from tests.deployments.collector import Collector, check_nested
from tests.deployments.fakes import FakeDriver, chat_tokenizer, saying

ROOT = Path(__file__).resolve().parents[2]
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
SECRET, TOLD = "blackberry", "raspberry"
PAUSE_S = 0.05
PAUSE_S = 0.05
CALLER_TRACE, CALLER_SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
CALLER = {"traceparent": f"00-{CALLER_TRACE}-{CALLER_SPAN}-01", "tracestate": "vendor=value"}


@pytest.fixture
def driver():
    with tempfile.TemporaryDirectory(prefix="ls-") as folder:
        driver = FakeDriver(Path(folder), saying(f"Eat {TOLD} jam!"))
        driver.step_s = 0.005
        driver.start()
        yield driver
        driver.stop()


@pytest.fixture
def collector():
    with Collector() as collector:
        yield collector


@asynccontextmanager
async def front(driver, endpoint):
    """A client of an ingress that traces; all spans are out when it is left."""
    client = DriverClient(driver.locate, name="ingress", node_id="node")
    traces = Traces(endpoint, instance="one")
    service = Service(client, chat_tokenizer(), model="m", traces=traces)
    transport = httpx.ASGITransport(build_api(service))
    await client.start()
    try:
        async with asyncio.timeout(60):
            while not client.ready:
                await asyncio.sleep(0.005)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            yield http, client
    finally:
        await client.close()
        await asyncio.to_thread(traces.close)


def body_of(path, **fields):
    asked = {"prompt": SECRET}
    if path == CHAT:
        asked = {"messages": [{"role": "user", "content": SECRET}]}
    return {"model": "m", "max_tokens": 60, **asked, **fields}


def traced(driver, collector, path=CHAT, *, meanwhile=None, headers=None, **fields):
    """The response, its span and the span's children. `meanwhile` gets the ingress's client."""

    async def main():
        async with front(driver, collector.url) as (http, client):
            asking = asyncio.create_task(
                http.post(path, json=body_of(path, **fields), headers=headers)
            )
            if meanwhile is not None:
                await asyncio.to_thread(meanwhile, client)
            return await asking

    response = asyncio.run(main())
    (span,) = collector.wait_for(1)
    for body in collector.bodies:
        assert SECRET.encode() not in body
        assert TOLD.encode() not in body
    return response, span, collector.children(span)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_a_request_is_a_span_with_three_children(driver, collector, path, stream):
    driver.most_tokens, driver.step_s = 1, 0.001

    def pause(client):
        wait_for(lambda: sum(client.counts.ttft.counts) == 1)
        time.sleep(PAUSE_S)
        driver.most_tokens = None

    response, span, children = traced(
        driver, collector, path, meanwhile=pause, stream=stream, temperature=0.25
    )
    assert response.status_code == 200
    assert collector.paths == ["/v1/traces"]
    assert (span.name, span.parent_id) == (f"POST {path}", "")
    assert not span.is_error
    assert span.resource["service.name"] == "lockstep"
    assert span.resource["service.instance.id"] == "one"
    num_output = len(f"Eat {TOLD} jam!") + 1
    told = {
        "http.request.method": "POST",
        "http.route": path,
        "http.response.status_code": 200,
        "gen_ai.operation.name": "chat" if path == CHAT else "text_completion",
        "gen_ai.request.model": "m",
        "gen_ai.request.id": response.headers["x-request-id"],
        "gen_ai.request.max_tokens": 60,
        "gen_ai.request.temperature": 0.25,
        "gen_ai.request.stream": stream,
        "gen_ai.usage.output_tokens": num_output,
        "gen_ai.response.finish_reasons": ["stop"],
        "lockstep.outcome": "finished",
    }
    assert told.items() <= span.attributes.items()
    assert span.attributes["gen_ai.usage.input_tokens"] >= len(SECRET)
    assert span.attributes["gen_ai.response.id"] in response.text
    assert len(children) == 3
    check_nested(span, children)
    queue, prefill, decode = children
    before = (queue.start - span.start) / 1e9
    to_first = span.attributes["gen_ai.latency.time_to_first_token"]
    assert before + queue.seconds + prefill.seconds == pytest.approx(to_first, abs=1e-6)
    assert queue.seconds < prefill.seconds
    assert decode.seconds > PAUSE_S
    assert decode.attributes["gen_ai.usage.output_tokens"] == num_output
    assert span.seconds < 60
    assert abs(time.time() - span.end / 1e9) < 60


def test_the_driver_says_how_long_a_request_queued(driver, collector):
    driver.queue_s = 100.0  # more than there was: all of the time before the first token
    _, span, children = traced(driver, collector)
    queue, prefill, _ = children
    check_nested(span, children)
    assert queue.seconds > prefill.seconds == 0


def test_a_callers_trace_goes_on(driver, collector):
    _, span, _ = traced(driver, collector, headers=CALLER)
    assert (span.trace_id, span.parent_id) == (CALLER_TRACE, CALLER_SPAN)


def test_a_caller_that_does_not_sample_is_obeyed(driver, collector):
    async def main():
        async with front(driver, collector.url) as (http, _):
            unsampled = {"traceparent": CALLER["traceparent"][:-1] + "0"}
            await http.post(CHAT, json=body_of(CHAT), headers=unsampled)
            await http.post(COMPLETIONS, json=body_of(COMPLETIONS))

    asyncio.run(main())
    assert [span.name for span in collector.wait_for(1)] == [f"POST {COMPLETIONS}"]


@pytest.mark.parametrize("header", ["", "00-zz", "00-" + "0" * 32 + "-1-01", "é" * 600])
def test_a_broken_traceparent_begins_a_trace(driver, collector, header):
    response, span, _ = traced(driver, collector, headers={"traceparent": header.encode()})
    assert response.status_code == 200
    assert span.parent_id == ""


def test_every_choice_has_its_phases(driver, collector):
    _, span, children = traced(driver, collector, n=3)
    check_nested(span, children)
    assert [one.attributes["lockstep.choice"] for one in children] == [0] * 3 + [1] * 3 + [2] * 3
    assert span.attributes["gen_ai.request.choice.count"] == 3


@pytest.mark.parametrize(
    ("fields", "status", "kind"),
    [({"temperature": -1}, 400, None), ({"model": "another"}, 404, "model_not_found")],
)
def test_a_refused_request_is_no_error_of_ours(driver, collector, fields, status, kind):
    response, span, children = traced(driver, collector, **fields)
    assert response.status_code == status
    assert (span.is_error, span.said, children) == (False, "", [])
    assert span.attributes["lockstep.outcome"] == "rejected"
    assert span.attributes["error.type"] == (kind or response.json()["error"]["code"] or "400")


def test_a_failure_in_the_middle_is_an_error(driver, collector):
    driver.most_tokens = 5

    def fail(_):
        wait_for(lambda: driver.is_held)
        driver.say(RequestFailed(driver.of(Submit)[0].request, "numerical_error"))

    response, span, children = traced(driver, collector, stream=True, meanwhile=fail)
    assert '"error"' in response.text
    assert (span.is_error, span.said) == (True, "")
    assert span.attributes["error.type"] == "numerical_error"
    assert span.attributes["lockstep.outcome"] == "failed"
    check_nested(span, children)


def test_a_resumed_request_is_one_trace_with_an_event(driver, collector):
    driver.most_tokens = 5

    def restart(client):
        wait_for(lambda: sum(client.counts.itl.counts) == 4)
        driver.most_tokens = None
        driver.restart()

    _, span, children = traced(driver, collector, stream=True, meanwhile=restart)
    assert span.attributes["lockstep.outcome"] == "finished"
    (resumed,) = span.events
    name, at, told = resumed
    assert (name, told["lockstep.epoch"]) == ("resumed", 2)
    _, _, decode = children
    assert 0 < told["lockstep.num_tokens"] < decode.attributes["gen_ai.usage.output_tokens"]
    assert decode.start < at < decode.end
    check_nested(span, children)


@pytest.mark.parametrize("status", [400, 503])
def test_a_collector_that_fails_disturbs_nobody(driver, collector, status, monkeypatch):
    monkeypatch.setattr("deployments.traces.FLUSH_S", 0.3)
    collector.status = status

    async def main():
        async with front(driver, collector.url) as (http, _):
            return [await http.post(CHAT, json=body_of(CHAT)) for _ in range(3)]

    began = time.monotonic()
    assert [response.status_code for response in asyncio.run(main())] == [200] * 3
    assert time.monotonic() - began < FLUSH_S + 20  # it would be tried again for a minute
    wait_for(lambda: collector.bodies)


def test_a_collector_that_hangs_is_not_waited_for(driver, collector):
    collector.wait_s = 20.0

    async def main():
        async with front(driver, collector.url) as (http, _):
            response = await http.post(CHAT, json=body_of(CHAT))
            began = time.monotonic()
        return response, time.monotonic() - began

    response, closing_s = asyncio.run(main())
    assert response.status_code == 200
    assert closing_s < FLUSH_S + 5


def test_a_collector_that_is_gone_disturbs_nobody(driver, monkeypatch):
    monkeypatch.setattr("deployments.traces.FLUSH_S", 0.3)
    with Collector() as collector:
        gone = collector.url

    async def main():
        async with front(driver, gone) as (http, _):
            return await http.post(CHAT, json=body_of(CHAT))

    assert asyncio.run(main()).status_code == 200


def test_the_endpoint_may_name_the_path(driver, collector):
    async def main():
        async with front(driver, f"{collector.url}/here/v1/traces/") as (http, _):
            await http.post(CHAT, json=body_of(CHAT))

    asyncio.run(main())
    wait_for(lambda: collector.paths)
    assert collector.paths == ["/here/v1/traces"]


def test_the_sdks_own_variables_say_who_we_are_and_hold_the_key(driver, collector, monkeypatch):
    monkeypatch.setenv("OTEL_SERVICE_NAME", "llama")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "x-key=secret")
    _, span, _ = traced(driver, collector)
    assert span.resource["service.name"] == "llama"
    assert [headers["x-key"] for headers in collector.headers] == ["secret"]


def test_off_there_is_no_thread_and_no_import():
    """The engine's process has nothing of OpenTelemetry, an ingress has what Serve itself loads."""
    lines = """
import sys, threading
import deployments.engine, deployments.llm
print([name for name in sys.modules if name.startswith("opentelemetry")])
import deployments.ingress
def seen():
    exporter = "opentelemetry.exporter.otlp.proto.http.trace_exporter"
    names = [name for name in (exporter, "deployments.traces") if name in sys.modules]
    return names, [one.name for one in threading.enumerate() if "Otel" in one.name]
assert deployments.ingress._traces("", "one") is None
print(seen())
deployments.ingress._traces("http://127.0.0.1:9", "one")
print(seen())
"""
    done = subprocess.run(
        [sys.executable, "-c", lines], cwd=ROOT, capture_output=True, text=True, timeout=280
    )
    engine, off, on = done.stdout.splitlines()
    assert engine == "[]"
    assert off == "([], [])"
    assert "deployments.traces" in on
    assert "OtelBatch" in on


@pytest.mark.parametrize(
    "endpoint",
    [
        "collector:4318",
        "ftp://collector",
        "http://",
        "http://a b",
        "http://a:x",
        "http://a?b=c",
        "http://:key@a",
    ],
)
def test_what_is_no_url_is_refused(endpoint):
    with pytest.raises(ValueError, match="is no URL of a collector: it must look like http://"):
        ServiceConfig.from_args({"otlp_endpoint": endpoint})


def test_without_the_extra_the_setting_is_refused_with_what_to_install():
    lines = """
import sys
sys.modules["opentelemetry.exporter"] = None
from deployments.cli import main
sys.exit(main(["serve", "--otlp-endpoint", "http://collector:4318"]))
"""
    done = subprocess.run(
        [sys.executable, "-c", lines], cwd=ROOT, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 2
    assert done.stderr == (
        "lockstep: otlp_endpoint=http://collector:4318 needs OpenTelemetry's exporter, which is "
        "not installed: pip install 'lockstep[otel]', or unset it\n"
    )


def wait_for(condition, timeout_s=60.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_no_thread_is_left(driver, collector):
    before = threading.enumerate()
    traced(driver, collector)
    assert not [one for one in threading.enumerate() if one not in before and "Otel" in one.name]
