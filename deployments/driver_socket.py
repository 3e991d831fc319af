"""One ZMQ socket from an ingress to a driver, without waiting on either side.

The socket is a plain one read from asyncio's `add_reader`: zmq.asyncio costs a future a message.
What ZMQ has no room for lies in an outbox. A line that is thought dead is thrown away with its
socket, and the next has a fresh identity: nothing of the older one can arrive on it.
"""

import asyncio
import secrets
from collections import deque
from collections.abc import Callable

import msgspec
import zmq

from deployments.messages import EngineInfo, FromIngress, ToIngress, decode_to_ingress
from workers.protocol import MAX_MESSAGE_BYTES, encode

HIGH_WATER_MARK = 16384
"""Messages ZMQ may hold in either direction."""

LAST_WORD_MS = 100
"""How long closing may take to send what is still to be said."""


class DriverSocket:
    """Opened and closed many times; whatever arrives while it is open goes to `on_message`."""

    def __init__(self, on_message: Callable[[ToIngress], None], *, name: str, node_id: str) -> None:
        self._on_message = on_message
        self._name = name
        self._node_id = node_id
        self._context = zmq.Context()
        self._socket: zmq.Socket[bytes] | None = None
        self._fd = -1
        self._outbox: deque[bytes] = deque()
        self.num_unreadable = 0
        """Messages that were none of a driver's."""

    @property
    def is_open(self) -> bool:
        return self._socket is not None

    @property
    def is_congested(self) -> bool:
        """Messages wait for room, so what can be said again later need not join them."""
        return bool(self._outbox)

    def open(self, info: EngineInfo) -> None:
        """Connect to the driver at `info`; by ipc if it is on this node, else encrypted."""
        self.close()
        socket = self._context.socket(zmq.DEALER)
        identity = f"{self._name}-{secrets.token_hex(6)}"
        socket.setsockopt(zmq.IDENTITY, identity.encode())
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.SNDHWM, HIGH_WATER_MARK)
        socket.setsockopt(zmq.RCVHWM, HIGH_WATER_MARK)
        socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        socket.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
        if info.node_id == self._node_id and info.ipc_address:
            socket.connect(info.ipc_address)
        else:
            socket.curve_serverkey = info.server_key.encode()
            socket.curve_publickey = info.client_public_key.encode()
            socket.curve_secretkey = info.client_secret_key.encode()
            socket.connect(info.tcp_address)
        self._socket = socket
        self._fd = socket.fileno()
        asyncio.get_running_loop().add_reader(self._fd, self.drain)

    def close(self, linger_ms: int = 0) -> None:
        """Throw the line away, with what was to be sent but for `linger_ms` of patience."""
        self._outbox.clear()
        if self._socket is not None:
            asyncio.get_running_loop().remove_reader(self._fd)
            self._socket.close(linger=linger_ms)
            self._socket = None

    def end(self) -> None:
        """For good: the last words are sent."""
        self.close(LAST_WORD_MS)
        self._context.term()

    def send(self, message: FromIngress) -> None:
        """Send, or keep until there is room; a closed line drops it."""
        if self._socket is not None:
            self._outbox.append(encode(message))
            self._flush()

    def drain(self) -> None:
        """Read until there is nothing left: the descriptor tells of a change only once."""
        while self._socket is not None:
            try:
                data = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                break
            try:
                message = decode_to_ingress(data)
            except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
                self.num_unreadable += 1
                continue
            self._on_message(message)
        self._flush()

    def _flush(self) -> None:
        if self._socket is None or not self._outbox:
            return
        try:
            while self._outbox:
                self._socket.send(self._outbox[0], zmq.NOBLOCK)
                self._outbox.popleft()
        except zmq.Again:
            pass  # the high-water mark: the descriptor or the next tick brings us back
        # NOTE: the descriptor is edge-triggered, and a send may swallow the edge of a message
        # that came in meanwhile: without this look it would lie there until the next one.
        if int(self._socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
            asyncio.get_running_loop().call_soon(self.drain)
