"""An engine on several nodes, each a namespace with an address of its own, on one machine."""

import asyncio
import contextlib
import json
import sys
from urllib.parse import urlsplit

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
        return json.loads(self.head.run(sys.executable, "-m", "tests.e2e.on_a_node", *words))


@contextlib.contextmanager
def service(*, ingress_on, **settings):
    with network(3) as hosts:
        head, *others = hosts
        head.start_head("--num-cpus=2", '--resources={"head": 1}')
        for number, other in enumerate(others):
            other.join(head, "--num-cpus=1", f'--resources={{"other{number}": 1}}')
        for host in hosts:
            host.await_up()
        one = Service(hosts)
        asked = {"port": PORT, "driver_on": "head", "ingress_on": ingress_on}
        one.where = one.on_a_node("serve", json.dumps(asked | {"settings": SETTINGS | settings}))
        wait_ready(one.url)
        yield one


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
