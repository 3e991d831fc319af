"""The driver's end of the wire to all ranks of one epoch: one ROUTER, never blocking.

It knows who may speak: every rank's two sockets carry a name made of a secret of this epoch, so a
straggler of an old epoch, a stray process or a rank that claims to be another is dropped and
counted. What the messages mean is the engine's business.

    link = WorkerLink(context, epoch=3, config=config, ipc_folder=folder, node_ip=ip, gate=gate)
    fleet.start(link.specs())
    poller.register(link.socket, zmq.POLLIN)
    for rank, message in link.receive(): ...
"""

import secrets
from collections.abc import Sequence
from pathlib import Path

import msgspec
import zmq

from deployments.sockets import Bound, CurveKeys, Gate, bind_router
from workers.config import EngineConfig, Failpoint
from workers.protocol import ECHO, Beat, FromWorker, decode_from_worker
from workers.spec import BEATS, STEPS, WorkerSpec, identity

MAX_QUEUED = 1000
"""Messages a rank may be behind; the engine has a few steps in flight, so this is never near."""

MAX_AT_ONCE = 1000
"""Messages one `receive` reads, so that a chatterbox cannot hold the step loop."""


class LinkFull(Exception):
    """A rank is not connected, or does not read; the message names it."""

    def __init__(self, rank: int, why: str) -> None:
        super().__init__(f"rank {rank} {why}")
        self.rank = rank


class WorkerLink:
    def __init__(
        self,
        context: zmq.Context,
        *,
        epoch: int,
        config: EngineConfig,
        ipc_folder: Path,
        node_ip: str = "127.0.0.1",
        gate: Gate | None = None,
    ) -> None:
        """With a `gate` ranks of other nodes can connect too, over tcp with CURVE."""
        self._epoch, self._config = epoch, config
        self._token = secrets.token_hex(16)
        self._keys = CurveKeys.fresh() if gate else None
        self._gate, self._domain = gate, f"workers-{epoch}-{self._token[:8]}"
        self._bound: Bound = bind_router(
            context,
            ipc_path=ipc_folder / f"w{epoch}",
            max_queued=MAX_QUEUED,
            node_ip=node_ip,
            keys=self._keys,
            gate=gate,
            domain=self._domain,
        )
        self.socket: zmq.Socket = self._bound.socket
        """For the engine's poller."""
        self.ipc_address, self.tcp_address = self._bound.ipc_address, self._bound.tcp_address
        ranks = range(config.layout.world_size)
        self._names = [identity(self._token, epoch, rank, STEPS) for rank in ranks]
        self._speakers = {name: (rank, STEPS) for rank, name in enumerate(self._names)}
        for rank in ranks:
            self._speakers[identity(self._token, epoch, rank, BEATS)] = (rank, BEATS)
        self.num_dropped = 0
        """Messages from strangers, of other epochs, or that do not decode."""

    def specs(
        self,
        *,
        failpoints: Sequence[Failpoint] = (),
        runner: str = "workers.runner:ModelRunner",
    ) -> list[WorkerSpec]:
        """What each rank of the epoch is told, for `Fleet.start`."""
        keys = self._keys
        return [
            WorkerSpec(
                epoch=self._epoch,
                rank=rank,
                config=self._config,
                token=self._token,
                ipc_address=self.ipc_address,
                tcp_address=self.tcp_address,
                server_key=keys.server_public if keys else "",
                client_public_key=keys.client_public if keys else "",
                client_secret_key=keys.client_secret if keys else "",
                failpoints=tuple(failpoints),
                runner=runner,
            )
            for rank in range(len(self._names))
        ]

    def send(self, rank: int, *frames: bytes) -> None:
        """Queues a message for a rank, or raises `LinkFull`; it never blocks."""
        try:
            self.socket.send_multipart((self._names[rank], *frames), zmq.NOBLOCK)
        except zmq.Again as error:
            raise LinkFull(rank, f"has {MAX_QUEUED} messages unread") from error
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            raise LinkFull(rank, "is not connected") from error

    def receive(self) -> list[tuple[int, FromWorker]]:
        """What has come since last time, with the rank it came from. Beats are echoed."""
        received: list[tuple[int, FromWorker]] = []
        for _ in range(MAX_AT_ONCE):
            try:
                name, *frames = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            spoken = self._understand(name, frames)
            if spoken is None:
                self.num_dropped += 1
                continue
            if isinstance(spoken[1], Beat):
                self._echo(name)
            received.append(spoken)
        return received

    def close(self) -> None:
        self._bound.close()
        if self._gate:
            self._gate.revoke(self._domain)

    def _understand(self, name: bytes, frames: list[bytes]) -> tuple[int, FromWorker] | None:
        speaker = self._speakers.get(name)
        if speaker is None or len(frames) != 1:
            return None
        rank, channel = speaker
        try:
            message = decode_from_worker(frames[0])
        except msgspec.DecodeError:  # a ValidationError is one too
            return None
        if message.epoch != self._epoch or message.rank != rank:
            return None
        if isinstance(message, Beat) != (channel == BEATS):
            return None
        return rank, message

    def _echo(self, name: bytes) -> None:
        try:
            self.socket.send_multipart((name, ECHO), zmq.NOBLOCK)
        except zmq.ZMQError as error:
            if error.errno not in (zmq.EAGAIN, zmq.EHOSTUNREACH):
                raise
