"""What the engine tells Prometheus: one endpoint, on the driver's own port, for all ranks.

Ranks' figures come with their acks and ingresses' with their heartbeats, so a scrape asks nobody.
Requests are counted where HTTP is spoken, by the ingresses, one for each generation, and one for
each that was turned away at the door (401, 404, 405); of an ingress that died, those still in
flight count as failed, so that in every scrape

    received = rejected + finished + failed + cancelled + in flight.

Labels are bounded: ranks, domains, causes, outcomes, collectives; never a request or a client.
"""

from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from itertools import accumulate
from threading import Thread
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.utils import floatToGoString

from deployments.config import ServiceSettings
from deployments.counting import (
    E2E_BOUNDS,
    ITL_BOUNDS,
    TTFT_BOUNDS,
    Histogram,
    Outcome,
)
from deployments.engine import Engine
from deployments.gang import Cause


class EngineCollector:
    """Reads the engine's figures at each scrape."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        yield from self._requests()
        yield from self._load()
        yield from self._work()
        yield from self._ranks()
        yield from self._epochs()
        build = GaugeMetricFamily("lockstep_build_info", "Version in use", labels=["version"])
        build.add_metric([_version()], 1)
        yield build

    def _requests(self) -> Iterator[Metric]:
        """What clients saw, all ingresses together."""
        totals = self._engine.accounts.totals()
        yield _counter(
            "requests_received",
            "Generations asked for",
            totals.received,
        )
        ended = CounterMetricFamily(
            "lockstep_requests_ended", "Generations by how they ended", labels=["outcome"]
        )
        for outcome in Outcome:
            ended.add_metric([outcome], getattr(totals, outcome))
        yield ended
        yield _gauge("requests_in_flight", "Generations that have not ended", totals.in_flight)
        yield _counter(
            "requests_resumed", "Generations that outlived a restart of the engine", totals.resumed
        )
        for name, text, bounds, seen in (
            ("time_to_first_token_seconds", "From request to token", TTFT_BOUNDS, totals.ttft),
            ("inter_token_latency_seconds", "From token to token", ITL_BOUNDS, totals.itl),
            ("request_seconds", "From request to last token", E2E_BOUNDS, totals.e2e),
        ):
            histogram = Histogram(bounds)
            histogram.add(seen)
            yield _histogram(name, text, histogram)
        yield _histogram("queue_seconds", "From driver to plan", self._engine.counters.queue)

    def _load(self) -> Iterator[Metric]:
        engine = self._engine
        pages, free = engine.num_pages, engine.num_free_pages
        for name, text, value in (
            ("requests_waiting", "Requests without a slot", engine.num_waiting),
            ("requests_running", "Requests in a slot", engine.num_running),
            ("pages", "Pages of all replicas", pages),
            ("pages_free", "Pages without a holder, cached ones included", free),
            ("pages_cached", "Free pages that a prompt may still find", engine.num_cached_pages),
            ("pages_used", "Pages that requests hold", max(0, pages - free)),
        ):
            yield _gauge(name, text, value)

    def _work(self) -> Iterator[Metric]:
        engine, counters = self._engine, self._engine.counters
        for name, text, value in (
            ("steps", "Steps all ranks agreed on", counters.num_steps),
            ("prompt_tokens", "Prompt tokens computed", counters.num_prompt_tokens),
            ("queried_tokens", "Prompt tokens looked up in the cache", counters.num_queried_tokens),
            ("cached_tokens", "Prompt tokens found in the cache", counters.num_cached_tokens),
            ("output_tokens", "Tokens sampled and handed on", counters.num_output_tokens),
            ("preemptions", "Requests sent back to wait for pages", engine.num_preemptions),
            ("rows", "Rows computed for requests", counters.num_rows),
            ("padding_rows", "Rows computed for nobody", counters.num_padding_rows),
            ("idle_replicas", "Replicas without rows, summed by step", counters.num_idle_replicas),
            ("plan_bytes", "Bytes of headers and bodies", counters.num_plan_bytes),
            ("poisoned_requests", "Ended by logits that are not finite", counters.num_poisoned),
            ("undecodable_messages", "Of ingresses, not readable", engine.num_undecodable),
        ):
            yield _counter(name, text, value)
        yield _histogram("loop_lag_seconds", "Turns of the driver's loop", counters.turns)
        collectives = CounterMetricFamily(
            "lockstep_symm_mem_collectives",
            "Collectives by the path they took",
            labels=["group", "op", "path", "reason"],
        )
        for labels, count in list(counters.collectives.items()):
            collectives.add_metric(labels, count)
        yield collectives
        experts = CounterMetricFamily(
            "lockstep_expert_rows",
            "Rows for the experts of a moe_ep rank, over all layers",
            labels=["moe_ep"],
        )
        for place, count in counters.expert_rows.items():
            experts.add_metric([str(place)], count)
        yield experts
        yield _gauge(
            "expert_imbalance",
            "The busiest moe_ep rank's rows over the mean, lately",
            counters.expert_imbalance,
        )

    def _ranks(self) -> Iterator[Metric]:
        engine, counters = self._engine, self._engine.counters
        health = engine.health()
        yield _gauge("ready", "1 if every rank serves", float(health.ready))
        yield _gauge("ranks", "Ranks of the engine", engine.config.layout.world_size)
        yield _gauge("ranks_up", "Ranks of the present epoch", len(engine.ranks()))
        yield _gauge("oldest_step_seconds", "Age of the oldest step", health.oldest_step_s)
        yield _histograms("step_seconds", "A rank's time for a step", "rank", counters.steps)
        yield _histograms(
            "step_skew_seconds", "Slowest rank less fastest, by step", "domain", counters.skews
        )

    def _epochs(self) -> Iterator[Metric]:
        engine, counters = self._engine, self._engine.counters
        yield _gauge("epoch", "Times the ranks have been started", engine.health().epoch)
        lost = CounterMetricFamily("lockstep_epochs_lost", "By what ended them", labels=["cause"])
        for cause, count in counters.losses.items():
            lost.add_metric([cause], count)
        yield lost
        yield _counter("desyncs", "Ranks that did not agree", counters.losses[Cause.DESYNC])
        yield _counter("recoveries", "Epochs lost and replaced", counters.num_recoveries)
        yield _histograms(
            "recovery_seconds",
            "From the loss of an epoch to serving again",
            "cause",
            counters.recoveries,
        )
        yield _gauge("last_recovery_seconds", "The same, of the last one", counters.last_recovery_s)


def _counter(name: str, text: str, value: float) -> CounterMetricFamily:
    return CounterMetricFamily(f"lockstep_{name}", text, value=value)


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"lockstep_{name}", text, value=value)


def _histogram(name: str, text: str, histogram: Histogram) -> HistogramMetricFamily:
    buckets, total = _buckets(histogram)
    return HistogramMetricFamily(f"lockstep_{name}", text, buckets=buckets, sum_value=total)


def _histograms(
    name: str,
    text: str,
    label: str,
    histograms: Mapping[int, Histogram] | Mapping[Cause, Histogram],
) -> HistogramMetricFamily:
    family = HistogramMetricFamily(f"lockstep_{name}", text, labels=[label])
    for value, histogram in histograms.items():
        family.add_metric([str(value)], *_buckets(histogram))
    return family


def _buckets(histogram: Histogram) -> tuple[list[tuple[str, float]], float]:
    """Prometheus counts in each bucket what is in the smaller ones too."""
    total = histogram.total
    bounds = [*map(floatToGoString, histogram.bounds), "+Inf"]
    return list(zip(bounds, accumulate(list(histogram.counts)), strict=True)), total


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
