"""Everything a rank is told when it starts: JSON on a pipe, never an argument, never pickled.

The driver fills the upper half, the fleet that places the rank the lower. Nothing here starts
anything; `deployments.fleet` does.

    >>> spec = WorkerSpec(epoch=1, rank=0, config=EngineConfig(), token="ab" * 16, ipc_address="")
    >>> WorkerSpec.from_json(spec.to_json()) == spec
    True
"""

import msgspec
from msgspec import Struct

from workers.config import EngineConfig, Failpoint

STEPS, BEATS = b"s", b"b"
"""The two channels of a rank: its step loop's socket and its heartbeat's."""


class WorkerSpec(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    epoch: int
    rank: int
    config: EngineConfig
    token: str
    """32 hexadecimal digits, fresh each epoch: a socket that does not name them is not heard."""
    ipc_address: str
    """Where the driver listens for ranks of its own node."""
    tcp_address: str = ""
    """And for the others; empty if there are none."""
    server_key: str = ""
    """CURVE keys (Z85), used over tcp: the driver's public one and the pair it accepts."""
    client_public_key: str = ""
    client_secret_key: str = ""
    failpoints: tuple[Failpoint, ...] = ()
    runner: str = "workers.runner:ModelRunner"
    """`module:class` that computes the steps; tests have a small one."""

    device: str = "cpu"
    """`cpu` or `cuda:<index>`."""
    node_ip: str = "127.0.0.1"
    """Address of the rank's node: what it binds, and what it tells the others."""
    with_driver: bool = True
    """The rank is on the driver's node, so it takes ipc."""
    ranks_on_node: int = 1

    def to_json(self) -> bytes:
        return msgspec.json.encode(self)

    @classmethod
    def from_json(cls, data: bytes) -> "WorkerSpec":
        return msgspec.json.decode(data, type=cls)

    @property
    def address(self) -> str:
        return self.ipc_address if self.with_driver else self.tcp_address

    def identity(self, channel: bytes) -> bytes:
        """What the rank's socket calls itself. It cannot be guessed, so it cannot be taken over."""
        return identity(self.token, self.epoch, self.rank, channel)


class ZygoteMessage(Struct, frozen=True):
    """What `workers.zygote` tells `deployments.forks` of a rank."""

    pid: int
    ended: str = ""
    """How it ended: `signal SIGKILL` or `exit code 1`; empty when it has just begun."""


def identity(token: str, epoch: int, rank: int, channel: bytes) -> bytes:
    return channel + bytes.fromhex(token) + epoch.to_bytes(8, "big") + rank.to_bytes(4, "big")


def read_failpoints(text: str) -> tuple[Failpoint, ...]:
    """The value of `LOCKSTEP_FAILPOINTS`; empty is none."""
    return msgspec.json.decode(text, type=tuple[Failpoint, ...]) if text else ()
