"""What the engine tells Prometheus: one endpoint, on the driver's own port, for all ranks.

Ranks' figures come with their acks and ingresses' with their heartbeats, so a scrape asks nobody.
Requests are counted where HTTP is spoken, by the ingresses; of one that died, those still in
flight count as failed, so that at all times

    received = rejected + finished + failed + cancelled + in flight.
"""

from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from threading import Thread
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from deployments.config import ServiceSettings
from deployments.engine import Engine


class EngineCollector:
    """Reads the engine's figures at each scrape."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        engine = self._engine
        counters, health = engine.counters, engine.health()
        yield _gauge("lockstep_ready", "1 if every rank serves", float(health.ready))
        yield _gauge("lockstep_epoch", "Times the ranks have been started", health.epoch)
        yield _gauge("lockstep_requests_waiting", "Requests without a slot", engine.num_waiting)
        yield _gauge("lockstep_requests_running", "Requests in a slot", engine.num_running)
        yield _gauge("lockstep_pages_free", "Pages without a holder", engine.num_free_pages)
        yield _gauge("lockstep_pages", "Pages of all replicas", engine.num_pages)
        for name, text, value in (
            ("steps", "Steps all ranks agreed on", counters.num_steps),
            ("prompt_tokens", "Prompt tokens computed", counters.num_prompt_tokens),
            (
                "cached_tokens",
                "Prompt tokens found in the prefix cache",
                counters.num_cached_tokens,
            ),
            ("output_tokens", "Tokens sampled", counters.num_output_tokens),
            ("preemptions", "Requests sent back to wait for pages", engine.num_preemptions),
            ("recoveries", "Epochs lost and replaced", counters.num_recoveries),
        ):
            yield CounterMetricFamily(f"lockstep_{name}", text, value=value)
        yield _gauge(
            "lockstep_last_recovery_seconds",
            "From the loss of the last epoch to serving again",
            counters.last_recovery_s,
        )
        steps = GaugeMetricFamily(
            "lockstep_step_seconds", "Time of each rank's last step", labels=["rank"]
        )
        for rank, seconds in sorted(counters.step_seconds.items()):
            steps.add_metric([str(rank)], seconds)
        yield steps
        build = GaugeMetricFamily("lockstep_build_info", "Version in use", labels=["version"])
        build.add_metric([_version()], 1)
        yield build

    def _requests(self) -> Iterator[Metric]:
        totals = self._engine.request_totals()
        received = CounterMetricFamily(
            "lockstep_requests_received", "Requests that reached an ingress", value=totals.received
        )
        yield received
        ended = CounterMetricFamily(
            "lockstep_requests_ended", "Requests by how they ended", labels=["outcome"]
        )
        for outcome in ("rejected", "finished", "failed", "cancelled"):
            ended.add_metric([outcome], getattr(totals, outcome))
        yield ended
        yield _gauge("lockstep_requests_in_flight", "Requests not ended", totals.in_flight)


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, text, value=value)


def _version() -> str:
    try:
        return version("lockstep")
    except PackageNotFoundError:  # run from a source tree that is not installed
        return "source"


class MetricsServer:
    """`/metrics` over HTTP, in a thread of its own."""

    def __init__(self, engine: Engine, settings: ServiceSettings) -> None:
        self.address = ""
        self._server: WSGIServer | None = None
        self._thread: Thread | None = None
        if settings.metrics_port < 0:
            return
        registry = CollectorRegistry()
        registry.register(EngineCollector(engine))
        self._server, self._thread = start_http_server(
            settings.metrics_port, addr=settings.host, registry=registry
        )
        self.address = f"{settings.host}:{self._server.server_port}"

    def close(self) -> None:
        if self._server is not None and self._thread is not None:
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()
