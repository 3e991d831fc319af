"""ZMQ sockets with bounds, and who may connect to them. What is said on them is elsewhere.

Inside a node a socket is a file in a folder that only this user can enter. Between nodes it is tcp
with CURVE, and a list of the client keys that are let in; keys are made at start and live in
memory. Every socket has a high-water mark and a largest message, and closes without waiting.
"""

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import zmq
from zmq.auth.thread import ThreadAuthenticator

from workers.protocol import MAX_MESSAGE_BYTES

MAX_IPC_PATH = 100
"""A Unix socket's name has 108 bytes."""

ROOM_FOR_NAMES = 40
"""What a folder and the sockets in it add to the temporary folder's name."""

HANDSHAKE_MS = 5_000


@dataclass(frozen=True, slots=True, kw_only=True)
class CurveKeys:
    """A server's key pair and the one client pair that it accepts, in Z85."""

    server_public: str
    server_secret: str
    client_public: str
    client_secret: str

    @classmethod
    def fresh(cls) -> "CurveKeys":
        server_public, server_secret = zmq.curve_keypair()
        client_public, client_secret = zmq.curve_keypair()
        return cls(
            server_public=server_public.decode(),
            server_secret=server_secret.decode(),
            client_public=client_public.decode(),
            client_secret=client_secret.decode(),
        )


class Gate:
    """The allow-list of one ZMQ context: which client keys may enter which domain.

    A context can have one; it is a thread, started by the first `admit`.
    """

    def __init__(self, context: zmq.Context) -> None:
        self._context = context
        self._authenticator: ThreadAuthenticator | None = None
        self._admitted: dict[str, frozenset[bytes]] = {}

    def admit(self, domain: str, *client_keys: str) -> None:
        """Only these keys enter `domain` from now on."""
        self._admitted[domain] = frozenset(key.encode() for key in client_keys)
        if self._authenticator is None:
            self._authenticator = ThreadAuthenticator(self._context)
            self._authenticator.start()
        self._authenticator.configure_curve_callback(domain, self)

    def revoke(self, domain: str) -> None:
        self._admitted.pop(domain, None)

    def callback(self, domain: str, key: bytes) -> bool:
        """What the authenticator asks, in its own thread."""
        return key in self._admitted.get(domain, frozenset())

    def close(self) -> None:
        if self._authenticator is not None:
            self._authenticator.stop()
            self._authenticator = None


class IpcFolder:
    """A folder for Unix sockets that only this user can enter, gone after `close`."""

    def __init__(self) -> None:
        parent = tempfile.gettempdir()
        if len(parent) > MAX_IPC_PATH - ROOM_FOR_NAMES:
            parent = "/tmp"
        self.path = Path(tempfile.mkdtemp(prefix="lockstep-", dir=parent))
        """Mode 0700, as `mkdtemp` makes it."""

    def close(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)


@dataclass(frozen=True, slots=True)
class Bound:
    """A bound ROUTER and where it can be reached; `tcp_address` is empty if it is not on tcp."""

    socket: zmq.Socket
    ipc_address: str
    tcp_address: str

    def close(self) -> None:
        self.socket.close(linger=0)
        Path(self.ipc_address.removeprefix("ipc://")).unlink(missing_ok=True)


def bind_router(
    context: zmq.Context,
    *,
    ipc_path: Path,
    max_queued: int,
    node_ip: str = "",
    keys: CurveKeys | None = None,
    gate: Gate | None = None,
    domain: str = "",
) -> Bound:
    """A ROUTER on `ipc_path`, and with `keys` and `gate` also on tcp: `node_ip`, any free port.

    Sending to a peer that is not there, or whose queue of `max_queued` messages is full, raises
    instead of dropping. A peer that comes back under its identity replaces its old connection.
    """
    if len(str(ipc_path)) > MAX_IPC_PATH:
        raise ValueError(f"{ipc_path} is longer than the {MAX_IPC_PATH} bytes a Unix socket allows")
    socket = context.socket(zmq.ROUTER)
    try:
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.SNDHWM, max_queued)
        socket.setsockopt(zmq.RCVHWM, max_queued)
        socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
        socket.bind(f"ipc://{ipc_path}")
        tcp_address = ""
        if keys is not None and gate is not None:
            # NOTE: options count for later binds only: ipc above has no CURVE, tcp below has.
            gate.admit(domain, keys.client_public)
            tcp_address = _bind_tcp(socket, node_ip, keys, domain)
    except BaseException:
        socket.close(linger=0)
        raise
    return Bound(socket, f"ipc://{ipc_path}", tcp_address)


def _bind_tcp(socket: zmq.Socket, node_ip: str, keys: CurveKeys, domain: str) -> str:
    socket.setsockopt(zmq.CURVE_SERVER, 1)
    socket.setsockopt(zmq.CURVE_PUBLICKEY, keys.server_public.encode())
    socket.setsockopt(zmq.CURVE_SECRETKEY, keys.server_secret.encode())
    socket.setsockopt(zmq.ZAP_DOMAIN, domain.encode())
    socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
    socket.setsockopt(zmq.TCP_KEEPALIVE_IDLE, 10)
    socket.setsockopt(zmq.TCP_KEEPALIVE_INTVL, 5)
    socket.setsockopt(zmq.TCP_KEEPALIVE_CNT, 3)
    host = f"[{node_ip}]" if ":" in node_ip else node_ip
    socket.setsockopt(zmq.IPV6, int(":" in node_ip))
    socket.bind(f"tcp://{host}:0")
    return socket.getsockopt_string(zmq.LAST_ENDPOINT)
