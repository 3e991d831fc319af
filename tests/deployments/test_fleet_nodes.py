"""Ranks on two Ray nodes: who is placed where, and that the far ones come over tcp and CURVE."""

import tempfile

import pytest
import ray
import zmq
from ray.cluster_utils import Cluster

from deployments.errors import ClusterError
from deployments.ray_fleet import RayFleet
from deployments.sockets import Gate, IpcFolder
from deployments.worker_link import WorkerLink
from tests.workers.fakes import FAKE_RUNNER, TinyDriver
from workers.config import EngineConfig

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]
TWO_NODES = EngineConfig(tp_size=2, dp_size=2, num_nodes=2, device="cpu")


@pytest.fixture(scope="module")
def node_ip():
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(dir="/tmp") as folder:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        small = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
        head = small | {"include_dashboard": False, "temp_dir": folder}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        cluster.add_node(**small)
        ray.init(address=cluster.address, log_to_driver=False)
        yield ray.util.get_node_ip_address()
        ray.shutdown()
        cluster.shutdown()


@pytest.fixture
def start():
    """Starts epoch after epoch on a fleet; the spec of each rank as it was placed."""
    context, folder = zmq.Context(), IpcFolder()
    gate, links = Gate(context), []

    def epoch(fleet, config, node_ip):
        link = WorkerLink(
            context,
            epoch=len(links) + 1,
            config=config,
            ipc_folder=folder.path,
            node_ip=node_ip,
            gate=gate,
        )
        links.append(link)
        fleet.start(link.specs(runner=FAKE_RUNNER))
        return TinyDriver(link, config, epoch=len(links))

    yield epoch
    for link in links:
        link.close()
    gate.close()
    folder.close()
    context.destroy(linger=0)


def test_a_replica_is_inside_a_node_and_the_far_one_steps_too(node_ip, start):
    told = []
    fleet = RayFleet(cluster_wait_s=20, progress=told.append)
    for _ in range(2):
        driver = start(fleet, TWO_NODES, node_ip)
        driver.handshake()
        for step in range(20):
            driver.run_step(step % 2)
        assert driver.link.num_dropped == 0
    here = ray.get_runtime_context().get_node_id()
    nodes = [seat.node_id for seat in fleet._seats]
    assert nodes[0] == nodes[1] == here
    assert nodes[2] == nodes[3] != here
    assert told == [f"ranks 0-1 on {node_ip}, 2-3 on {fleet._seats[2].node_ip}"], "once"
    fleet.stop()


def test_nodes_that_are_too_small_are_counted(node_ip, start):
    fleet = RayFleet(cluster_wait_s=1.0, cpus_per_rank=1, progress=lambda sentence: None)
    with pytest.raises(ClusterError) as caught:
        start(fleet, TWO_NODES, node_ip)
    assert str(caught.value) == (
        "needs 2 CPUs on each of 2 nodes; 0 nodes have them free; "
        "gave up after 1 s (cluster_wait_s): add a node, or lower num_nodes"
    )
    fleet.stop()
