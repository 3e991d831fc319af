"""Ports that no other cluster of tests on this machine uses.

A free port that the kernel names is anybody's a moment later, the next outgoing connection's too;
and what Serve chooses itself (replicas from 30000 on, its own proxy on 8500, shared through
SO_REUSEPORT) is the same for every cluster, so that one answers for another. Here each cluster has
a block of its own, below those that the kernel gives away. The block is held by the name of a Unix
socket, which the kernel takes back however its holder ends.
"""

import contextlib
import random
import socket
from collections.abc import Iterator
from pathlib import Path

from workers.config import is_free

FIRST, SIZE, NUM_BLOCKS = 20_000, 60, 160
HTTP, METRICS, STATS, PROXY, GRPC_PROXY, DASHBOARD, AGENT, GCS, REPLICAS = range(9)

PATIENCE = {
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "120",
    "RAY_SERVE_HAPROXY_STARTUP_TIMEOUT_S": "120",
    "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": "3600",
}
"""Serve kills a proxy that is not up after 5 s, which it may take on a busy machine; and, two
minutes after a change of its routes, the HAProxy from before with the streams still on it."""


class Ports:
    """The block's ports, by what they are for."""

    def __init__(self, first: int) -> None:
        self.first = first
        self.http = first + HTTP
        self.dashboard, self.agent = first + DASHBOARD, first + AGENT
        self.gcs = first + GCS

    def serve_environment(self, folder: Path | str) -> dict[str, str]:
        """What Serve's processes must find, so that they keep to the block and to `folder`."""
        ports = {
            "RAY_SERVE_HAPROXY_METRICS_PORT": METRICS,
            "RAY_SERVE_HAPROXY_STATS_PORT": STATS,
            "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": PROXY,
            "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": GRPC_PROXY,
            "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": REPLICAS,
            "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": SIZE - 1,
        }
        return (
            {name: str(self.first + place) for name, place in ports.items()}
            | {
                "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": f"{folder}/haproxy.cfg",
                "RAY_SERVE_HAPROXY_SOCKET_PATH": f"{folder}/admin.sock",
                "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": f"{folder}/metrics.sock",
                "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": f"{folder}",
                "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": f"{folder}/state",
            }
            | PATIENCE
        )


@contextlib.contextmanager
def own_ports() -> Iterator[Ports]:
    """A block in which nobody listens, ours until the end."""
    blocks = range(FIRST, FIRST + SIZE * NUM_BLOCKS, SIZE)
    for first in random.sample(blocks, NUM_BLOCKS):
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as holder:
            if takes(holder, first) and all(map(is_free, range(first, first + SIZE))):
                yield Ports(first)
                return
    raise RuntimeError(f"no block of {SIZE} ports is free from {FIRST} on")


def takes(holder: socket.socket, first: int) -> bool:
    try:
        holder.bind(f"\0lockstep-tests-{first}")
    except OSError:
        return False
    return True
