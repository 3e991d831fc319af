"""The driver's ROUTER to its ingresses: who is there, what they ask, what they are told.

Nothing here blocks: an ingress that does not read its messages loses its connection and its
requests, and holds up nobody. Should it live, it is told so at its next word and asks again on
another line. What does not decode is counted, logged and, if it asked for something, refused.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field

import msgspec
import zmq

from deployments.messages import (
    Forgotten,
    FromIngress,
    IngressBeat,
    Refused,
    ToIngress,
    decode_from_ingress,
    unreadable_submit,
)
from workers.protocol import encode

log = logging.getLogger("lockstep.engine")

UNDECODABLE = (ValueError, msgspec.DecodeError, RecursionError)
LOG_EVERY_S = 1.0
"""Messages that cannot be read are logged no more often."""


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
        self._logged_at = float("-inf")

    def receive(self, now: float) -> Iterator[tuple[Ingress, FromIngress]]:
        """All messages that are waiting, with who sent them."""
        while True:
            try:
                frames = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            identity, data = frames[0], b"".join(frames[1:])
            try:
                message = decode_from_ingress(data)
            except UNDECODABLE as error:
                self._on_undecodable(identity, data, error, now)
                continue
            ingress = self.ingresses.get(identity)
            if ingress is None:
                if not (isinstance(message, IngressBeat) and message.opens):
                    self.send(identity, Forgotten())
                    continue
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

    def _on_undecodable(self, identity: bytes, data: bytes, error: Exception, now: float) -> None:
        self.num_undecodable += 1
        request = unreadable_submit(data)
        sentence = f"the driver cannot read the request ({error}): are both of one version?"
        if request is not None:
            self.send(identity, Refused(request, 500, sentence))
        if now - self._logged_at >= LOG_EVERY_S:
            self._logged_at = now
            log.error(
                "a message of %d bytes from %s cannot be read (%s), the %d. of its kind; %s",
                len(data),
                identity.decode(errors="replace"),
                error,
                self.num_undecodable,
                "it was ignored" if request is None else f"request {request} was refused",
            )

    def silent(self, now: float, limit_s: float, *, awake_since: float) -> list[Ingress]:
        """Ingresses that have not been heard for `limit_s`; they are forgotten.

        Before `awake_since` nobody could be heard.
        """
        latest = now - limit_s
        if awake_since > latest:
            return []
        gone = [one for one in self.ingresses.values() if one.last_heard < latest]
        for one in gone:
            del self.ingresses[one.identity]
        return gone
