"""Sends requests' spans to an OpenTelemetry collector (OTLP over HTTP), from a thread of its own.

The only module that imports opentelemetry, and it is imported only where `otlp_endpoint` is set.
Nothing here is global: what others in the process trace (Ray can) goes its own way. The SDK's
environment variables (OTEL_SERVICE_NAME, OTEL_RESOURCE_ATTRIBUTES, OTEL_EXPORTER_OTLP_HEADERS,
OTEL_TRACES_SAMPLER, OTEL_BSP_*) mean what they always do.
"""

import logging
import threading
import time
from collections.abc import Mapping

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from deployments.spans import Span

log = logging.getLogger("lockstep.traces")

FLUSH_S = 2.0
"""How long closing may take to deliver what is left."""

PATH = "/v1/traces"


class Traces:
    """The ingress's line to a collector that may be slow, wrong or gone: requests do not notice."""

    def __init__(self, endpoint: str, *, instance: str) -> None:
        """`endpoint` is a collector's URL, with or without /v1/traces; `instance` names us."""
        base = endpoint.rstrip("/")
        exporter = OTLPSpanExporter(endpoint=base if base.endswith(PATH) else base + PATH)
        ours = Resource({"service.name": "lockstep", "service.instance.id": instance})
        self._provider = TracerProvider(
            resource=ours.merge(OTELResourceDetector().detect()),
            shutdown_on_exit=False,  # it would wait for a collector that is gone
        )
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("lockstep")
        self._propagator = TraceContextTextMapPropagator()

    def record(self, span: Span, caller: Mapping[str, str]) -> None:
        """Queue a request's spans; `caller` holds its `traceparent` and `tracestate`, if any.

        Never raises: a trace is not worth a request.
        """
        try:
            wall_ns = time.time_ns() - time.monotonic_ns()
            context = self._propagator.extract(caller)
            self._send(span, context, SpanKind.SERVER, wall_ns)
        except Exception:
            log.exception("a trace was lost")

    def _send(self, span: Span, context: Context, kind: SpanKind, wall_ns: int) -> None:
        def wall(at: float) -> int:
            return wall_ns + round(at * 1e9)

        sent = self._tracer.start_span(
            span.name,
            context=context,
            kind=kind,
            attributes=span.attributes,
            start_time=wall(span.start),
        )
        if sent.is_recording():
            for event in span.events:
                sent.add_event(event.name, event.attributes, wall(event.at))
            if span.error:
                sent.set_status(Status(StatusCode.ERROR))
            inside = set_span_in_context(sent)
            for child in span.children:
                self._send(child, inside, SpanKind.INTERNAL, wall_ns)
        sent.end(wall(span.end))

    def close(self) -> None:
        """Deliver what is left, for two seconds at most."""
        # NOTE: the SDK's own shutdown waits half a minute for a collector that does not answer.
        flushing = threading.Thread(target=self._provider.shutdown, daemon=True)
        flushing.start()
        flushing.join(FLUSH_S)
