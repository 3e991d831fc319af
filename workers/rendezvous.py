"""How the ranks of one lockstep domain find each other. No Ray, and no port is ever probed.

The first rank of a domain binds its own node's address, port 0, and keeps the listening socket; the
port reaches the others through the driver (`Hello`, `Start`). The socket then becomes torch's
TCPStore, which on its own would listen on all interfaces. A store names its epoch and session, so
a rank that was left behind by a restart is refused, not mixed in.

A domain of one rank needs none of this, and does none of it.
"""

import fcntl
import os
import socket
import struct
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from parallel.groups import Groups, Transport, build_groups, connect_torch
from workers.protocol import Start
from workers.spec import WorkerSpec

BACKLOG = 1024
MEMBERSHIP = "lockstep/membership"
SIOCGIFADDR = 0x8915


class RendezvousError(RuntimeError):
    """The rank may not join, or nobody is there to join; the message is a sentence."""


class Rendezvous:
    """One rank's part: `port` for its `Hello`, then `join`."""

    def __init__(self, spec: WorkerSpec) -> None:
        self._spec, self._layout = spec, spec.config.layout
        domain = self._layout.coordinates(spec.rank).domain
        self._ranks = self._layout.domain_ranks(domain)
        self._listener = None
        if len(self._ranks) > 1 and spec.rank == self._ranks[0]:
            self._listener = listen(spec.node_ip)

    @property
    def port(self) -> int:
        """Where this rank listens; 0 if it is not the one that does."""
        return self._listener.getsockname()[1] if self._listener else 0

    def join(self, start: Start, *, wrap: Callable[[Transport], Transport] | None = None) -> Groups:
        """The rank's groups, when all ranks of the domain are here. `wrap` sees each transport."""
        if start.epoch != self._spec.epoch:
            raise RendezvousError(
                f"rank {self._spec.rank} of epoch {self._spec.epoch} was asked into epoch "
                f"{start.epoch}: it has been left behind by a restart"
            )
        if len(self._ranks) == 1:
            return build_groups(self._layout, self._spec.rank, lambda members: None)
        # NOTE: longer than the driver's patience with a step: the driver knows who is behind,
        # the rank that waits does not, so its own timeout is for when there is no driver.
        timeout = timedelta(seconds=2 * self._spec.config.step_timeout_s + 5)
        store = self._store(start, timeout)
        device = torch.device(self._spec.device)
        if device.type == "cpu":
            # NOTE: gloo takes its address from the host's name, which may be another interface's.
            os.putenv("GLOO_SOCKET_IFNAME", interface_of(self._spec.node_ip))
        dist.init_process_group(
            "gloo" if device.type == "cpu" else "nccl",
            store=PrefixStore(f"epoch{self._spec.epoch}", store),
            rank=self._spec.rank - self._ranks[0],
            world_size=len(self._ranks),
            timeout=timeout,
            device_id=None if device.type == "cpu" else device,
        )

        connect_plain = connect_torch(self._ranks, self._spec.rank, timeout)

        def connect(members: tuple[int, ...]) -> Transport | None:
            transport = connect_plain(members)
            return wrap(transport) if wrap and transport else transport

        return build_groups(self._layout, self._spec.rank, connect)

    def close(self) -> None:
        """Leaves the groups in good order. A rank that fails just goes."""
        if self._listener:
            self._listener.close()
        if dist.is_initialized():
            dist.destroy_process_group()

    def _store(self, start: Start, timeout: timedelta) -> TCPStore:
        membership = f"{self._spec.epoch} {self._spec.token}"
        if self._listener:
            host, port = self._spec.node_ip, self.port
            listener, self._listener = self._listener, None
            store = TCPStore(
                host,
                port,
                len(self._ranks),
                is_master=True,
                timeout=timeout,
                wait_for_workers=False,
                master_listen_fd=listener.detach(),
            )
            store.set(MEMBERSHIP, membership)
            return store
        try:
            store = TCPStore(
                start.store_host,
                start.store_port,
                len(self._ranks),
                is_master=False,
                timeout=timeout,
                wait_for_workers=False,
            )
            found = store.get(MEMBERSHIP).decode()
        except RuntimeError as error:
            raise RendezvousError(
                f"rank {self._spec.rank} found no store at {start.store_host}:{start.store_port} "
                f"within {timeout.total_seconds():g} s: rank {self._ranks[0]} is gone or "
                "unreachable"
            ) from error
        if found != membership:
            raise RendezvousError(
                f"the store at {start.store_host}:{start.store_port} is of epoch "
                f"{found.split()[0]}; rank {self._spec.rank} is of epoch {self._spec.epoch} and "
                "has been left behind"
            )
        return store


def listen(address: str) -> socket.socket:
    """A listening socket on one address and a port that nobody else can have."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return socket.create_server((address, 0), family=family, backlog=BACKLOG)


def interface_of(address: str) -> str:
    """The network interface that has `address`; the loopback's if none has (IPv6, for one)."""
    names = [name for _, name in socket.if_nameindex()]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for name in names:
            request = struct.pack("256s", name.encode()[:15])
            try:
                reply = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, request)
            except OSError:
                continue  # it has no address
            if socket.inet_ntoa(reply[20:24]) == address:
                return name
    return "lo"
