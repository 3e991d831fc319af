"""An engine on several nodes, each a namespace with an address of its own, on one machine."""

import asyncio
import contextlib
import json
import os
import random
import shlex
import signal
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from ray.job_submission import JobStatus, JobSubmissionClient

from tests.deployments.test_metrics import is_balanced, requests_in, scrape
from tests.e2e.conftest import PATIENT, wait_ready
from tests.e2e.nodes import ROOT, network, peers, refusal
from tests.e2e.test_batch import check_all, pids_of, whole_lines, write_questions
from tests.e2e.test_line import ask_all, questions
from workers.bundled.questions import answer

PORT = 8000
NOT_SENT = [".git", ".venv", ".helm-venv", "shared", "docs"]
"""What a job's working folder does without."""

SETTINGS = {
    "device": "cpu",
    "tp_size": 2,
    "dp_size": 2,
    "enable_dp_attention": True,
    "num_nodes": 2,
    "kv_cache_gb": 0.1,
    "max_num_seqs": 64,
    "host": "0.0.0.0",
    "metrics_port": 9464,
}


@pytest.fixture(autouse=True)
def _namespaces():
    if refusal():
        pytest.skip(refusal())


class Service:
    """Three nodes, the first of which has the driver and the HTTP port."""

    def __init__(self, hosts):
        self.hosts = hosts
        self.head = hosts[0]
        self.url = f"http://{self.head.ip}:{PORT}"
        self.metrics = f"http://{self.head.ip}:{SETTINGS['metrics_port']}/metrics"

    def on_a_node(self, *words):
        command = (sys.executable, "-m", "tests.e2e.on_a_node", self.head.address, *words)
        return json.loads(self.head.run(*command))

    def said(self):
        """What our processes on the first node printed, for a test that fails."""
        logs = Path(self.head.folder, "ray", "session_latest", "logs").glob("worker-*")
        lines = [line for log in logs for line in log.read_text().splitlines()]
        return "\n".join(line[:300] for line in lines if "lockstep" in line)


@contextlib.contextmanager
def service(*, ingress_on, dashboard=False, **settings):
    with network(3) as hosts:
        head, *others = hosts
        head.start_head("--num-cpus=3", '--resources={"head": 1}', dashboard=dashboard)
        for number, other in enumerate(others):
            other.join(head, "--num-cpus=1", f'--resources={{"other{number}": 1}}')
        for host in hosts:
            host.await_up(dashboard=dashboard and host is head)
        one = Service(hosts)
        asked = {"port": PORT, "driver_on": "head", "ingress_on": ingress_on}
        one.where = one.on_a_node("serve", json.dumps(asked | {"settings": SETTINGS | settings}))
        wait_ready(one.url)
        try:
            yield one
        except BaseException:
            print(one.said())
            raise


@pytest.mark.row("C4")
def test_ranks_of_two_nodes_are_one_engine_over_tcp():
    """Four ranks, attention's tp 2 x dp 2: each replica's two lie inside one node."""
    with service(ingress_on="other1", tp_size=4, **PATIENT) as one:
        ranks = one.where["ranks"]
        places = [rank["node_ip"] for rank in ranks]
        assert places[0] == places[1] != places[2] == places[3]
        assert set(places) <= {host.ip for host in one.hosts}
        driver = urlsplit(one.where["endpoint"]).hostname
        assert driver == one.head.ip
        for rank in ranks:
            assert rank["pid"] in host_at(one, rank["node_ip"]).pids()
            others = {address for address, _ in peers(rank["pid"])}
            assert others & set(places) - {rank["node_ip"]}, "no collective leaves the node"
            assert driver in others or rank["node_ip"] == driver, "no wire to the driver's node"
        rendezvous = (ranks[0]["node_ip"], ranks[0]["store_port"])
        assert rendezvous in peers(ranks[3]["pid"])
        asked = questions(100)
        assert asyncio.run(ask_all(one.url, asked)) == [answer(question) for question in asked]


def host_at(one, address):
    return next(host for host in one.hosts if host.ip == address)


@pytest.mark.slow
@pytest.mark.parametrize(("how", "tp_size"), [("kill", 4), ("unplug", 2)])
def test_a_lost_node_is_named_and_another_takes_its_ranks(how, tp_size):
    with service(ingress_on="head", tp_size=tp_size) as one:
        places = {rank["node_ip"] for rank in one.where["ranks"]}
        lost = next(host for host in one.hosts if host.ip in places - {one.head.ip})
        asked = questions(100, seed=2)
        answers, noticed_s, back_s, reasons = asyncio.run(
            disturbed(one.url, asked, getattr(lost, how))
        )
        assert answers == [answer(question) for question in asked]
        assert noticed_s < 3
        assert any(lost.ip in reason and "rank" in reason for reason in reasons), reasons
        now = {rank["node_ip"] for rank in one.on_a_node("ask")["ranks"]}
        assert now == {host.ip for host in one.hosts} - {lost.ip}
        found = httpx.get(one.metrics, timeout=10).text
        assert 'lockstep_epochs_lost_total{cause="silent"} 1.0' in found
        assert "lockstep_epoch 2.0" in found
        # Ray alone takes 15 s to give a node up; 60 is for machines with other things to do.
        print(f"{how}: noticed after {noticed_s:.2f} s, back after {back_s:.1f} s: {reasons}")
        assert back_s < 60


async def disturbed(url, asked, lose):
    """The answers, when the loss was noticed and over, and what the page was told meanwhile."""
    async with httpx.AsyncClient(timeout=20) as http:

        async def is_ready():
            return (await http.get(f"{url}/readyz")).status_code == 200

        async def until(state):
            while await is_ready() is not state:
                assert time.monotonic() < began + 90, f"ready did not turn {state}"
                await asyncio.sleep(0.02)
            return time.monotonic() - began

        jobs = asyncio.create_task(ask_all(url, asked))
        await asyncio.sleep(0.5)
        began = time.monotonic()
        await asyncio.to_thread(lose)
        noticed_s = await until(False)
        watching = asyncio.create_task(reasons_told(http, url))
        back_s = await until(True)
        return await jobs, noticed_s, back_s, await watching


async def reasons_told(http, url):
    """Why the engine was not ready, as the live page hears it for some seconds."""
    found = []
    async with http.stream("GET", f"{url}/api/engine") as response:
        async for line in response.aiter_lines():
            state = (json.loads(line[6:]) if line.startswith("data: ") else {}).get("state") or {}
            if state.get("reason") and state["reason"] not in found:
                found.append(state["reason"])
    return found


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_job_killed_five_times_asks_a_running_service_for_each_line_once(tmp_path):
    asked = write_questions(tmp_path / "in.jsonl", 1000)
    out, rng = tmp_path / "out.jsonl", random.Random()
    kept, num_kills, concurrency = set(), 5, 32
    with service(ingress_on="head", dashboard=True) as one:
        jobs = JobSubmissionClient(one.head.dashboard)
        command = ["python", "-m", "deployments.batch", "-i", tmp_path / "in.jsonl", "-o", out]
        command += ["--url", one.url, "--concurrency", concurrency]
        for number in range(num_kills + 1):
            target = len(whole_lines(out)) + rng.randrange(20, 150)
            job = jobs.submit_job(
                entrypoint=shlex.join(map(str, command)),
                submission_id=f"batch-{number}",
                runtime_env={"working_dir": str(ROOT), "excludes": NOT_SENT},
            )
            if number < num_kills:
                wait_until(lambda target=target: len(whole_lines(out)) >= target, jobs, job)
                time.sleep(rng.random() * 0.05)
                for pid in pids_of(out):
                    os.kill(pid, signal.SIGKILL)
                kept |= set(whole_lines(out))
            wait_until(lambda job=job: jobs.get_job_status(job).is_terminal(), jobs, job)
        assert jobs.get_job_status(job) == JobStatus.SUCCEEDED
        assert f"{len(asked) - len(kept)} lines in " in jobs.get_job_logs(job)
        check_all(out, asked, kept)
        counts = requests_in(scrape(one.metrics))
    assert is_balanced(counts)
    assert counts["finished"] >= len(asked)
    assert len(asked) <= counts["received"] <= len(asked) + num_kills * concurrency


def wait_until(condition, jobs, job, timeout_s=400):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, jobs.get_job_logs(job)[-3000:]
        time.sleep(0.02)
