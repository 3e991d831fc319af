"""An engine on several nodes, each a namespace with an address of its own, on one machine."""

import asyncio
import contextlib
import json
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from tests.e2e.conftest import wait_ready
from tests.e2e.nodes import network, peers, refusal
from tests.e2e.test_line import ask_all, questions
from workers.bundled.questions import answer

pytestmark = [
    pytest.mark.timeout(180),
    pytest.mark.skipif(bool(refusal()), reason=refusal() or "namespaces can be made"),
]
PORT = 8000
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
def service(*, ingress_on, **settings):
    with network(3) as hosts:
        head, *others = hosts
        head.start_head("--num-cpus=3", '--resources={"head": 1}')
        for number, other in enumerate(others):
            other.join(head, "--num-cpus=1", f'--resources={{"other{number}": 1}}')
        for host in hosts:
            host.await_up()
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
    with service(ingress_on="other1") as one:
        ranks = one.where["ranks"]
        places = [rank["node_ip"] for rank in ranks]
        assert len(set(places)) == 2
        assert set(places) <= {host.ip for host in one.hosts}
        driver = urlsplit(one.where["endpoint"]).hostname
        assert driver == one.head.ip
        for rank in ranks:
            assert rank["pid"] in host_at(one, rank["node_ip"]).pids()
            others = {address for address, _ in peers(rank["pid"])}
            assert others & set(places) - {rank["node_ip"]}, "no collective leaves the node"
            assert (driver in others) == (rank["node_ip"] != driver), "tcp between nodes only"
        rendezvous = (ranks[0]["node_ip"], ranks[0]["store_port"])
        assert rendezvous in peers(ranks[1]["pid"])
        asked = questions(100)
        assert asyncio.run(ask_all(one.url, asked)) == [answer(question) for question in asked]


def host_at(one, address):
    return next(host for host in one.hosts if host.ip == address)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["kill", "unplug"])
def test_a_lost_node_is_named_and_another_takes_its_ranks(how):
    with service(ingress_on="head") as one:
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
        print(f"{how}: noticed after {noticed_s:.2f} s, back after {back_s:.1f} s: {reasons}")
        assert back_s < 45


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
