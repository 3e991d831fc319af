"""An OpenTelemetry collector on the loopback address: takes OTLP over HTTP and keeps the spans."""

import threading
import time
from dataclasses import dataclass
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span as Sent

KINDS = {Sent.SPAN_KIND_SERVER: "server", Sent.SPAN_KIND_INTERNAL: "internal"}


@dataclass
class Received:
    """A span as it came; times in nanoseconds since 1970."""

    name: str
    kind: str
    trace_id: str
    span_id: str
    parent_id: str
    start: int
    end: int
    attributes: dict
    events: list[tuple[str, int, dict]]
    is_error: bool
    said: str
    resource: dict

    @property
    def seconds(self) -> float:
        return (self.end - self.start) / 1e9


class Collector:
    """Answers with `status` after `wait_s`."""

    def __init__(self) -> None:
        self.status = 200
        self.wait_s = 0.0
        self.bodies: list[bytes] = []
        self.paths: list[str] = []
        self.headers: list[Message] = []
        self._spans: list[Received] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                time.sleep(collector.wait_s)
                collector.paths.append(self.path)
                collector.headers.append(self.headers)
                collector.bodies.append(body)
                if collector.status == 200:
                    collector._spans += read_spans(body)
                self.send_response(collector.status)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "Collector":
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def requests(self) -> list[Received]:
        """The spans of requests, in the order in which they began."""
        found = [span for span in self._spans if span.kind == "server"]
        return sorted(found, key=lambda span: span.start)

    def children(self, parent: Received) -> list[Received]:
        found = [span for span in self._spans if span.parent_id == parent.span_id]
        assert all(span.trace_id == parent.trace_id for span in found)
        return sorted(found, key=lambda span: (span.attributes["lockstep.choice"], span.start))

    def wait_for(self, num_requests: int, timeout_s: float = 60.0) -> list[Received]:
        deadline = time.monotonic() + timeout_s
        while len(self.requests()) < num_requests:
            assert time.monotonic() < deadline, f"{len(self.requests())} of {num_requests} came"
            time.sleep(0.01)
        return self.requests()


def read_spans(body: bytes) -> list[Received]:
    request = ExportTraceServiceRequest.FromString(body)
    return [
        Received(
            name=span.name,
            kind=KINDS[span.kind],
            trace_id=span.trace_id.hex(),
            span_id=span.span_id.hex(),
            parent_id=span.parent_span_id.hex(),
            start=span.start_time_unix_nano,
            end=span.end_time_unix_nano,
            attributes=plain(span.attributes),
            events=[(one.name, one.time_unix_nano, plain(one.attributes)) for one in span.events],
            is_error=span.status.code == span.status.STATUS_CODE_ERROR,
            said=span.status.message,
            resource=plain(group.resource.attributes),
        )
        for group in request.resource_spans
        for scope in group.scope_spans
        for span in scope.spans
    ]


def plain(attributes) -> dict:
    return {one.key: value_of(one.value) for one in attributes}


def value_of(value):
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [value_of(one) for one in value.array_value.values]
    return getattr(value, kind)


def check_nested(parent: Received, children: list[Received]) -> None:
    """Each generation's queue, prefill and decode follow each other, inside the request."""
    assert [span.name for span in children] == ["queue", "prefill", "decode"] * (len(children) // 3)
    for at in range(0, len(children), 3):
        queue, prefill, decode = children[at : at + 3]
        assert parent.start <= queue.start <= queue.end == prefill.start
        assert prefill.end == decode.start <= decode.end <= parent.end
