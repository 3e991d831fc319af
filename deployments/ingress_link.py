"""The driver's ROUTER to its ingresses: who is there, what they ask, what they are told.

Nothing here blocks: an ingress that does not read its messages loses its connection and its
requests, and holds up nobody. What does not decode is dropped and counted.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import msgspec
import zmq

from deployments.messages import FromIngress, IngressBeat, ToIngress, decode_from_ingress
from workers.protocol import encode


@dataclass(slots=True)
class Ingress:
    """One connected ingress, known by the identity of its socket."""

    identity: bytes
    last_heard: float
    is_new: bool = True
    """It has not been told yet how the engine is."""
    counters: IngressBeat = field(default_factory=IngressBeat)


class IngressLink:
    def __init__(self, socket: zmq.Socket) -> None:
        """`socket` is a bound ROUTER with ROUTER_MANDATORY set."""
        self.socket = socket
        self.ingresses: dict[bytes, Ingress] = {}
        self.num_undecodable = 0

    def receive(self, now: float) -> Iterator[tuple[Ingress, FromIngress]]:
        """All messages that are waiting, with who sent them."""
        while True:
            try:
                frames = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                identity, data = frames
                message = decode_from_ingress(data)
            except (ValueError, msgspec.DecodeError, RecursionError):
                self.num_undecodable += 1
                continue
            ingress = self.ingresses.get(identity)
            if ingress is None:
                ingress = self.ingresses[identity] = Ingress(identity, now)
            ingress.last_heard = now
            if isinstance(message, IngressBeat):
                ingress.counters = message
            yield ingress, message

    def send(self, identity: bytes, message: ToIngress) -> bool:
        """False if the ingress is gone or does not read; it is forgotten then."""
        try:
            self.socket.send_multipart((identity, encode(message)), zmq.NOBLOCK)
        except zmq.ZMQError:
            self.ingresses.pop(identity, None)
            return False
        return True

    def silent(self, now: float, limit_s: float) -> list[Ingress]:
        """Ingresses that have not been heard for `limit_s`; they are forgotten."""
        gone = [one for one in self.ingresses.values() if now - one.last_heard > limit_s]
        for one in gone:
            del self.ingresses[one.identity]
        return gone
