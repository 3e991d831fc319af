"""One scrape of the driver tells of everything, and in every scrape the requests add up.

Two HTTP fronts and a real engine of two processes serve the bundled model, while a thread scrapes.
"""

import asyncio
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import httpx
import pytest
import uvicorn
import yaml
from prometheus_client.parser import text_string_to_metric_families

from deployments.config import ServiceSettings
from deployments.driver_client import DriverClient
from deployments.engine import Engine
from deployments.fleet import LocalFleet
from deployments.gang import Cause
from deployments.metrics import MetricsServer
from deployments.routes import build_api
from deployments.service import Service
from deployments.tokenizer import ChatTokenizer
from workers import bundled
from workers.config import EngineConfig

OUTCOMES = ("rejected", "finished", "failed", "cancelled")
NEVER_FALL = ("received", *OUTCOMES, "resumed")


class Front:
    """An ingress behind uvicorn, in a thread of its own."""

    def __init__(self, engine, tokenizer, **settings):
        async def locate():
            return engine.info()

        self.client = DriverClient(locate, name="ingress", node_id=engine.node_id, **settings)
        service = Service(self.client, tokenizer, model="bundled")
        listener = socket.socket()
        listener.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        config = uvicorn.Config(build_api(service), lifespan="on", log_level="critical")
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self._run, args=(listener,))
        self.thread.start()

    def wait_ready(self):
        wait_for(lambda: self.server.started)
        wait_for(lambda: httpx.get(f"{self.url}/readyz", timeout=60).status_code == 200)

    def _run(self, listener):
        async def main():
            self.loop = asyncio.get_running_loop()
            await self.server.serve(sockets=[listener])

        asyncio.run(main())

    def vanish(self):
        """Say nothing more, like a process that was killed."""

        def cut():
            self.client._timer.cancel()
            self.client._disconnect()

        self.loop.call_soon_threadsafe(cut)

    def close(self):
        self.server.should_exit = True
        self.thread.join()


class Scraper(threading.Thread):
    """Scrapes as fast as it can and keeps what it saw of the requests."""

    def __init__(self, url):
        super().__init__()
        self.url = url
        self.seen = []
        self.over = threading.Event()

    def run(self):
        while not self.over.is_set():
            self.seen.append(requests_in(scrape(self.url)))
            time.sleep(0.01)

    def stop(self):
        self.over.set()
        self.join()


class Rig:
    """The engine, its metrics server and two fronts."""

    def __init__(self, stack):
        config = EngineConfig(
            tp_size=2,
            device="cpu",
            max_num_seqs=4,
            max_queued_requests=6,
            kv_cache_gb=0.1,
            beat_ms=200,  # two cores may be shared: nobody is to seem dead
        )
        self.engine = Engine(config, LocalFleet())
        stack.callback(self.engine.stop)
        self.engine.start()
        self.engine.wait_ready()
        metrics = MetricsServer(self.engine, ServiceSettings(metrics_port=0))
        stack.callback(metrics.close)
        self.url = f"http://{metrics.address}/metrics"
        tokenizer = ChatTokenizer.load(bundled.path())
        self.fronts = []
        for _ in range(2):
            self.fronts.append(Front(self.engine, tokenizer, resume_wait_s=60.0))
            stack.callback(self.fronts[-1].close)
            self.fronts[-1].wait_ready()


@pytest.fixture(scope="module")
def rig():
    with ExitStack() as stack:
        yield Rig(stack)


@contextmanager
def scraping(url):
    scraper = Scraper(url)
    scraper.start()
    try:
        yield scraper
    finally:
        scraper.stop()


def wait_for(condition, timeout_s=60.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail("waited too long")
        time.sleep(0.01)


def scrape(url):
    """Every sample: (name, labels) to value."""
    text = httpx.get(url, timeout=60).text
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(samples, name, **labels):
    return samples[f"lockstep_{name}", tuple(sorted(labels.items()))]


def requests_in(samples):
    counts = {name: value(samples, f"requests_{name}_total") for name in ("received", "resumed")}
    counts["in_flight"] = value(samples, "requests_in_flight")
    for outcome in OUTCOMES:
        counts[outcome] = value(samples, "requests_ended_total", outcome=outcome)
    return counts


def is_balanced(counts):
    return counts["received"] == counts["in_flight"] + sum(counts[name] for name in OUTCOMES)


def chat(question, **fields):
    message = {"role": "user", "content": question}
    return {"model": "bundled", "messages": [message], "temperature": 0} | fields


LONG = {"model": "bundled", "prompt": "x", "max_tokens": 3000, "ignore_eos": True, "stream": True}


async def ends(http, url, kind):
    """How one request of this kind ended, as the client sees it: outcome by generation."""
    if kind == "leave":
        async with http.stream("POST", f"{url}/v1/completions", json=LONG) as response:
            if response.status_code == 429:
                return ["rejected"]
            async for _ in response.aiter_lines():
                return ["cancelled"]
    body, num = chat("What is 1+2?"), 1
    if kind == "two":
        body, num = chat("What is 12+30?", n=2), 2
    elif kind == "stop string":
        body = chat("Count from 1 to 9", stop="3")
    elif kind == "wrong":
        body = chat("What is 1+2?", n=99)
    elif kind == "unreadable":
        body = chat("?", temperature="hot")
    elif kind == "unknown model":
        body = chat("?", model="another")
    elif kind == "no such route":
        assert (await http.get(f"{url}/v1/models/another")).status_code == 404
        assert (await http.get(f"{url}/v1/chat/completions")).status_code == 405
        assert (await http.post(f"{url}/v1/embeddings", json={})).status_code == 404
        assert (await http.get(f"{url}/v1/models")).status_code == 200  # asks for nothing
        return ["rejected"] * 3
    response = await http.post(f"{url}/v1/chat/completions", json=body)
    outcome = {200: "finished", 400: "rejected", 404: "rejected", 429: "rejected", 503: "failed"}
    return [outcome[response.status_code]] * num


KINDS = (
    *("chat", "two", "stop string", "wrong", "unreadable", "unknown model", "no such route"),
    "leave",
)


async def hammer(fronts, num, seed=0):
    """`num` requests of all kinds at once, over all fronts; how each generation ended."""
    rng = random.Random(seed)
    limits = httpx.Limits(max_connections=num)
    async with httpx.AsyncClient(timeout=100, limits=limits) as http:
        jobs = []
        for _ in range(num):
            job = ends(http, rng.choice(fronts).url, rng.choice(KINDS))
            jobs.append(asyncio.create_task(job))
            await asyncio.sleep(rng.random() * 0.03)
        return [outcome for outcomes in await asyncio.gather(*jobs) for outcome in outcomes]


def settled(rig):
    """The counts once nothing is in flight and every front's last word has come."""

    def is_told():
        counts = requests_in(scrape(rig.url))
        asked = sum(front.client.counts.received for front in rig.fronts)
        return (counts["in_flight"], counts["received"]) == (0, asked)

    wait_for(is_told)
    return requests_in(scrape(rig.url))


def check(seen):
    assert len(seen) > 1
    assert [counts for counts in seen if not is_balanced(counts)] == []
    for before, after in itertools.pairwise(seen):
        assert all(before[name] <= after[name] for name in NEVER_FALL)


@pytest.mark.row("C6")
def test_in_every_scrape_the_requests_add_up(rig):
    before = settled(rig)
    with scraping(rig.url) as scraper:
        outcomes = asyncio.run(hammer(rig.fronts, 150))
        after = settled(rig)
    check(scraper.seen)
    assert max(counts["in_flight"] for counts in scraper.seen) > 0
    gained = {name: after[name] - before[name] for name in OUTCOMES}
    assert gained == {name: outcomes.count(name) for name in OUTCOMES}
    assert set(outcomes) == {"finished", "rejected", "cancelled"}
    assert after["received"] - before["received"] == len(outcomes)


def test_when_a_rank_dies_requests_fail_or_resume_and_still_add_up(rig):
    before, epoch = settled(rig), rig.engine.health().epoch

    async def under_way():
        """One that is answered while the rank dies, and leaves when that is over."""
        url, counts = f"{rig.fronts[0].url}/v1/completions", rig.fronts[0].client.counts
        num_resumed = counts.resumed
        async with (
            httpx.AsyncClient(timeout=100) as http,
            http.stream("POST", url, json=LONG) as response,
        ):
            lines = response.aiter_lines()
            await anext(lines)
            os.kill(rig.engine.ranks()[1].pid, signal.SIGKILL)
            async for _ in lines:
                if counts.resumed > num_resumed:
                    break
        return ["cancelled"]

    async def disturbed():
        both = await asyncio.gather(under_way(), hammer(rig.fronts, 40, seed=1))
        return list(itertools.chain(*both))

    with scraping(rig.url) as scraper:
        outcomes = asyncio.run(disturbed())
        wait_for(lambda: rig.engine.health().ready and rig.engine.health().epoch > epoch)
        after = settled(rig)
    check(scraper.seen)
    assert after["received"] - before["received"] == len(outcomes)
    assert after["failed"] + after["resumed"] > before["failed"] + before["resumed"]
    samples = scrape(rig.url)
    # The dead rank's neighbour may be the first to say so.
    causes = [c for c in Cause if value(samples, "epochs_lost_total", cause=c) == 1]
    assert causes in ([Cause.DIED], [Cause.FAILED])
    assert value(samples, "recoveries_total") == 1
    assert value(samples, "recovery_seconds_count", cause=causes[0]) == 1
    assert value(samples, "recovery_seconds_sum", cause=causes[0]) < 30


@pytest.mark.row("C6")
def test_the_figures_of_the_work_done(rig):
    with httpx.Client(base_url=rig.fronts[0].url, timeout=60) as http:
        for _ in range(2):
            http.post("/v1/chat/completions", json=chat("Count from 10 to 40")).raise_for_status()
    settled(rig)
    samples = scrape(rig.url)
    for name in (
        *("time_to_first_token", "inter_token_latency", "request", "queue", "loop_lag"),
        *("step", "step_skew"),
    ):
        labels = {"step": {"rank": "1"}, "step_skew": {"domain": "0"}}.get(name, {})
        count = value(samples, f"{name}_seconds_count", **labels)
        assert count > 0
        assert value(samples, f"{name}_seconds_bucket", le="+Inf", **labels) == count
        assert 0 < value(samples, f"{name}_seconds_sum", **labels) < 200
    finished = requests_in(samples)["finished"]
    assert value(samples, "request_seconds_count") == finished
    assert value(samples, "inter_token_latency_seconds_count") > 50
    for name in ("steps", "prompt_tokens", "output_tokens", "cached_tokens", "rows", "plan_bytes"):
        assert value(samples, f"{name}_total") > 0
    assert value(samples, "cached_tokens_total") < value(samples, "queried_tokens_total")
    assert value(samples, "pages_used") == 0
    assert value(samples, "pages_cached") > 0
    assert value(samples, "pages_free") == value(samples, "pages")
    assert (value(samples, "ranks_up"), value(samples, "ranks")) == (2, 2)
    assert value(samples, "ready") == 1


def test_a_counted_collective_is_shown(rig):
    labels = ("attn_tp", "all_reduce", "fallback", "unregistered")
    rig.engine.counters.collectives[labels] = 3
    found = value(
        scrape(rig.url),
        "symm_mem_collectives_total",
        group="attn_tp",
        op="all_reduce",
        path="fallback",
        reason="unregistered",
    )
    assert found == 3


def test_requests_of_an_ingress_that_died_have_failed(rig):
    before = settled(rig)
    dying = rig.fronts[1]

    async def main():
        async with httpx.AsyncClient(timeout=100) as http:
            jobs = [asyncio.create_task(ends_late(http, dying.url)) for _ in range(3)]
            await asyncio.to_thread(
                wait_for, lambda: requests_in(scrape(rig.url))["in_flight"] == 3
            )
            dying.vanish()
            await asyncio.to_thread(
                wait_for, lambda: requests_in(scrape(rig.url))["in_flight"] == 0
            )
            for job in jobs:
                job.cancel()
            await asyncio.gather(*jobs, return_exceptions=True)

    with scraping(rig.url) as scraper:
        asyncio.run(main())
    check(scraper.seen)
    after = requests_in(scrape(rig.url))
    assert after["failed"] - before["failed"] == 3
    assert after["received"] - before["received"] == 3
    wait_for(lambda: rig.engine.num_running == 0)


async def ends_late(http, url):
    async with http.stream("POST", f"{url}/v1/completions", json=LONG) as response:
        async for _ in response.aiter_lines():
            pass


# What is drawn and what is alerted on.

HELM = Path(__file__).resolve().parents[2] / "helm"
KEYWORDS = {"and", "or", "unless", "bool", "offset"}
ADDED_BY_PROMETHEUS = {"namespace", "job", "le"}
ALERTS = {
    *("NotReady", "MetricsAbsent", "RankDown", "RecoveryLoop", "StepSkew", "Desync", "QueueTime"),
    *("KVFull", "PreemptionStorm", "RejectRate", "RequestsFail"),
}


def dashboard_queries():
    dashboard = json.loads((HELM / "dashboards" / "lockstep.json").read_text())
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            yield panel["title"], target["expr"]


def alert_rules():
    groups = yaml.safe_load((HELM / "alerts" / "lockstep.yaml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def names_in(query):
    """The metrics that a PromQL query asks for, and the labels that it groups or selects by."""
    query, labels = re.sub(r'"[^"]*"', '""', query), set()
    for listed in re.findall(r"\b(?:by|on|without|ignoring)\s*\(([^)]*)\)", query):
        labels |= {label.strip() for label in listed.split(",")}
    for matchers in re.findall(r"\{([^}]*)\}", query):
        labels |= set(re.findall(r"(\w+)\s*[=!]", matchers))
    bare = re.sub(r"\{[^}]*\}|\[[^\]]*\]", "", query)
    bare = re.sub(r"\b(?:by|on|without|ignoring)\s*\([^)]*\)", "", bare)
    metrics = set(re.findall(r"\b([a-zA-Z_:][\w:]*)\b(?!\s*\()", bare)) - KEYWORDS
    return metrics, labels


@pytest.mark.parametrize(
    ("query", "metrics", "labels"),
    [
        ("up == 0", {"up"}, set()),
        ('sum by (a, b) (rate(x_total{c="by (d)"}[5m])) / y', {"x_total", "y"}, {"a", "b", "c"}),
        ("histogram_quantile(0.9, sum by (le)(rate(x_bucket[$i])))", {"x_bucket"}, {"le"}),
        ("a and on (b) 1e3 * c offset 5m", {"a", "c"}, {"b"}),
    ],
)
def test_names_are_found_in_queries(query, metrics, labels):
    assert names_in(query) == (metrics, labels)


def live(rig):
    """Metric names of a scrape, with their labels."""
    labels = ("attn_tp", "all_reduce", "symmetric", "")
    rig.engine.counters.collectives.setdefault(labels, 1)
    found = {}
    for name, pairs in scrape(rig.url):
        found.setdefault(name, set()).update(label for label, _ in pairs)
    return found


def test_every_query_asks_for_metrics_and_labels_that_there_are(rig):
    found = live(rig)
    queries = [*dashboard_queries(), *((rule["alert"], rule["expr"]) for rule in alert_rules())]
    assert len(queries) > 40
    for title, query in queries:
        metrics, labels = names_in(query)
        assert metrics, f"{title}: {query}"
        assert metrics <= set(found), f"{title}: {query}"
        known = ADDED_BY_PROMETHEUS.union(*(found[name] for name in metrics))
        assert labels <= known, f"{title}: {query}"


def test_every_metric_is_drawn(rig):
    drawn = set().union(*(names_in(query)[0] for _, query in dashboard_queries()))
    drawn |= {re.sub(r"_(sum|count|bucket)$", "", name) for name in drawn}
    shown = {re.sub(r"_(sum|count|bucket)$", "", name) for name in live(rig)}
    assert {name for name in shown if not name.endswith("_created")} <= drawn


def test_every_alert_has_a_summary_and_a_runbook():
    rules = alert_rules()
    assert {rule["alert"] for rule in rules} == {f"Lockstep{name}" for name in ALERTS}
    for rule in rules:
        assert rule["annotations"]["summary"]
        assert len(rule["annotations"]["runbook"]) > 40
        assert rule["labels"]["severity"] in ("critical", "warning")


def test_promtool_takes_the_alerts():
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed; names are tested by the parser above")
    command = [promtool, "check", "rules", HELM / "alerts" / "lockstep.yaml"]
    subprocess.run(command, check=True, capture_output=True, timeout=280)


LOAD_S = 60
PROMETHEUS = """
global: {{scrape_interval: 500ms, evaluation_interval: 500ms}}
rule_files: ["{rules}"]
scrape_configs:
  - job_name: lockstep
    static_configs: [{{targets: ["{target}"]}}]
"""


@contextmanager
def prometheus(folder, target):
    """A real one that scrapes `target` and knows the alerts; gives its API's URL."""
    binary = shutil.which("prometheus")
    if binary is None:
        pytest.skip("prometheus is not installed (Debian's package has it, with promtool)")
    rules = HELM / "alerts" / "lockstep.yaml"
    (folder / "config.yaml").write_text(PROMETHEUS.format(rules=rules, target=target))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    flags = {
        "config.file": folder / "config.yaml",
        "storage.tsdb.path": folder / "data",
        "web.listen-address": address,
        "web.console.templates": folder,
        "web.console.libraries": folder,
    }
    command = [binary, *(f"--{name}={value}" for name, value in flags.items())]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        yield f"http://{address}/api/v1"
    finally:
        process.terminate()
        process.wait(60)


def answers(api, query):
    """Does the query return any series with a number to draw?"""
    query = query.replace("$__rate_interval", "30s")
    found = httpx.get(f"{api}/query", params={"query": query}, timeout=60).json()
    assert found["status"] == "success", query
    return any(math.isfinite(float(one["value"][1])) for one in found["data"]["result"])


def firing(api):
    with suppress(httpx.HTTPError):
        found = httpx.get(f"{api}/alerts", timeout=60).json()["data"]["alerts"]
        return {alert["labels"]["alertname"] for alert in found if alert["state"] == "firing"}
    return set()


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_real_prometheus_draws_every_panel_and_tells_of_a_killed_rank(rig, tmp_path):
    live(rig)
    with prometheus(tmp_path, rig.url.split("/")[2]) as api:
        wait_for(lambda: is_scraped(api))
        began = time.monotonic()
        while time.monotonic() - began < LOAD_S:
            asyncio.run(hammer(rig.fronts[:1], 30, seed=2))
            assert firing(api) == set()
        # Without a recovery there is no time that one took.
        assert set(silent(api)) <= {"Recovery time"}
        before = rig.engine.counters.num_recoveries
        os.kill(rig.engine.ranks()[0].pid, signal.SIGKILL)
        wait_for(lambda: "LockstepRankDown" in firing(api))
        wait_for(lambda: rig.engine.counters.num_recoveries > before)
        asyncio.run(hammer(rig.fronts[:1], 30, seed=2))
        wait_for(lambda: silent(api) == [])


def silent(api):
    """Panels with a query that has nothing to draw."""
    return [title for title, query in dashboard_queries() if not answers(api, query)]


def is_scraped(api):
    with suppress(httpx.HTTPError, json.JSONDecodeError):  # it says 503 in words while it starts
        return answers(api, "lockstep_ready")
    return False
