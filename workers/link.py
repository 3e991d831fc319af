"""A rank's two sockets to its driver: one for steps, one for heartbeats. No tensors here.

The heartbeat has a thread and a socket of its own, so it beats while the main thread computes and
stops when the process is stopped. The driver echoes every beat; a rank that has heard no echo for
`SILENCE_S` is alone and ends itself. (A driver that dies on the rank's own node is noticed sooner:
by the parent-death signal, or by Ray.)
"""

import threading
import time
from collections.abc import Callable

import zmq

from workers.protocol import MAX_MESSAGE_BYTES, Beat, FromWorker, encode
from workers.spec import BEATS, STEPS, WorkerSpec

SILENCE_S = 60.0
"""A driver that computes something long, as a grammar, may be silent for seconds."""

SEND_TIMEOUT_MS = 10_000
LAST_WORDS_MS = 1_000


class DriverLost(Exception):
    """The driver takes no more messages."""


def connect(context: zmq.Context, spec: WorkerSpec, channel: bytes) -> zmq.Socket:
    """A bounded DEALER to the driver: ipc on its node, tcp with CURVE from elsewhere."""
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.IDENTITY, spec.identity(channel))
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.SNDHWM, 1000)
    socket.setsockopt(zmq.RCVHWM, 1000)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
    socket.setsockopt(zmq.RECONNECT_IVL, 50)
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
    if not spec.with_driver:
        socket.setsockopt(zmq.CURVE_SERVERKEY, spec.server_key.encode())
        socket.setsockopt(zmq.CURVE_PUBLICKEY, spec.client_public_key.encode())
        socket.setsockopt(zmq.CURVE_SECRETKEY, spec.client_secret_key.encode())
        socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
        socket.setsockopt(zmq.TCP_KEEPALIVE_IDLE, 10)
        socket.setsockopt(zmq.TCP_KEEPALIVE_INTVL, 5)
        socket.setsockopt(zmq.TCP_KEEPALIVE_CNT, 3)
        socket.setsockopt(zmq.IPV6, int("[" in spec.address))
    socket.connect(spec.address)
    return socket


class DriverLink:
    """The step loop's socket. One thread uses it."""

    def __init__(self, context: zmq.Context, spec: WorkerSpec) -> None:
        self._socket = connect(context, spec, STEPS)

    def send(self, message: FromWorker) -> None:
        if not self._socket.poll(SEND_TIMEOUT_MS, zmq.POLLOUT):
            raise DriverLost(f"the driver has read nothing for {SEND_TIMEOUT_MS // 1000} s")
        self._socket.send(encode(message), zmq.NOBLOCK)

    def receive(self, timeout_ms: int) -> list[bytes] | None:
        """The next message's frames, or None if there is none within `timeout_ms`."""
        if not self._socket.poll(timeout_ms):
            return None
        return self._socket.recv_multipart(zmq.NOBLOCK)

    def close(self) -> None:
        """Closes, giving what was sent last a moment to leave."""
        self._socket.close(linger=LAST_WORDS_MS)


class Pulse(threading.Thread):
    """Beats every `beat_ms` until `stop`; calls `alone()` once the driver has been silent too long.

    `step()` is asked for the number of the step that the rank is in, `waiting()` for the
    collective that it waits in (which of the step's, op, group).
    """

    def __init__(
        self,
        context: zmq.Context,
        spec: WorkerSpec,
        *,
        step: Callable[[], int],
        alone: Callable[[], None],
        waiting: Callable[[], tuple[int, str, str]] = lambda: (0, "", ""),
        silence_s: float = SILENCE_S,
    ) -> None:
        super().__init__(name=f"beat-{spec.rank}", daemon=True)
        self._context, self._spec = context, spec
        self._step, self._alone, self._silence_s = step, alone, silence_s
        self._waiting = waiting
        self._ended = threading.Event()

    def run(self) -> None:
        socket = connect(self._context, self._spec, BEATS)
        heard = time.monotonic()
        try:
            while not self._ended.wait(self._spec.config.beat_ms / 1000):
                beat = Beat(self._spec.epoch, self._spec.rank, self._step(), *self._waiting())
                if socket.poll(0, zmq.POLLOUT):
                    socket.send(encode(beat), zmq.NOBLOCK)
                while socket.poll(0):
                    socket.recv_multipart(zmq.NOBLOCK)
                    heard = time.monotonic()
                if time.monotonic() - heard > self._silence_s:
                    self._alone()
                    return
        finally:
            socket.close()

    def stop(self) -> None:
        self._ended.set()
        self.join()
