"""The ranks of one engine: starts them, hears of their deaths, ends them. Says nothing to them.

`LocalFleet` forks ranks on this machine, for tests, for `LLM` and for a single node without Ray.
`deployments.ray_fleet` has the other one. Either lives as long as its engine; `start` ... `kill`
is one epoch. Messages go through `deployments.worker_link`, so Ray is on no token's path.

    fleet.start(link.specs())
    poller.register(fleet.wake, zmq.POLLIN)
    for death in fleet.deaths(): ...
    fleet.kill()
"""

import os
import select
import threading
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import msgspec

from deployments.errors import ClusterError, ClusterTooSmall
from deployments.forks import ForkFailed, ForkServer, readable
from deployments.placement import choose_device
from workers.config import count_local_gpus
from workers.spec import WorkerSpec

FORK_TIMEOUT_S = 120.0
"""For the zygote's imports, on a machine with a cold cache."""

KILL_TIMEOUT_S = 10.0


class Death(NamedTuple):
    rank: int
    sentence: str
    """`rank 1 (pid 123 on 10.0.0.2) died: signal SIGKILL`"""

    @property
    def by_signal(self) -> bool:
        """Killed, or crashed: not ended by what it was doing."""
        return " died: signal " in self.sentence


class Fleet(Protocol):
    """What the engine needs of whoever runs its ranks. One thread calls it."""

    @property
    def wake(self) -> int:
        """A file descriptor, the same for good, that is readable when `deaths` has something."""
        ...

    @property
    def spans_nodes(self) -> bool:
        """Ranks may be on other nodes than the driver: they need tcp."""
        ...

    def start(self, specs: Sequence[WorkerSpec]) -> None:
        """Starts one epoch's ranks; returns when all have a process, which is not yet ready."""
        ...

    def deaths(self) -> list[Death]:
        """Ranks that have ended since last asked, for whatever reason. Does not wait."""
        ...

    def kill(self) -> None:
        """Ends every rank and frees what they held; returns when they are gone. Idempotent."""
        ...

    def stop(self) -> None:
        """The last call: `kill`, and what outlives epochs."""
        ...


def describe(rank: int, pid: int, node_ip: str, how: str) -> Death:
    return Death(rank, f"rank {rank} (pid {pid} on {node_ip}) died: {how}")


class LocalFleet:
    """Ranks as processes of this machine, forked from a zygote; or one as a thread of this one.

    Processes end with their driver, however it ends: the zygote notices the closed socket and
    kills them, and should the zygote die first, the kernel does.
    """

    def __init__(self, *, in_process: bool = False) -> None:
        self._in_process = in_process
        self._epoll = select.epoll()
        self._forks: ForkServer | None = None
        self._preloaded = ""
        self._ranks: dict[int, int] = {}
        """Rank by pid."""
        self._thread: RankThread | None = None

    @property
    def wake(self) -> int:
        return self._epoll.fileno()

    @property
    def spans_nodes(self) -> bool:
        return False

    def start(self, specs: Sequence[WorkerSpec]) -> None:
        self.kill()
        placed = self._place(specs)
        if self._in_process:
            self._start_thread(placed)
            return
        try:
            forks = self._zygote(specs[0].runner.partition(":")[0])
            for spec in placed:
                name = f"epoch {spec.epoch} rank {spec.rank}"
                self._ranks[forks.fork(spec.to_json(), name, FORK_TIMEOUT_S).pid] = spec.rank
        except ForkFailed as error:
            self.kill()
            raise ClusterError(str(error)) from error
        except BaseException:
            self.kill()
            raise

    def deaths(self) -> list[Death]:
        if self._thread is not None:
            return self._thread.deaths()
        if self._forks is None:
            return []
        ends = self._forks.take_ends()
        if self._forks.is_gone:
            self._drop_zygote()
        return [
            describe(self._ranks.pop(pid), pid, "127.0.0.1", how)
            for pid, how in ends.items()
            if pid in self._ranks
        ]

    def kill(self) -> None:
        if self._thread is not None:
            self._epoll.unregister(self._thread.wake)
            self._thread.close()
            self._thread = None
        if self._forks is not None:
            self._forks.kill()
            if self._forks.is_gone:
                self._drop_zygote()
        self._ranks.clear()

    def stop(self) -> None:
        self.kill()
        self._drop_zygote()
        self._epoll.close()

    def _place(self, specs: Sequence[WorkerSpec]) -> list[WorkerSpec]:
        config = specs[0].config
        num_gpus = count_local_gpus()
        device = choose_device(config, num_gpus)
        if device == "cuda" and num_gpus < len(specs):
            raise ClusterTooSmall(len(specs), num_gpus)
        return [
            msgspec.structs.replace(
                spec,
                device=f"cuda:{spec.rank}" if device == "cuda" else "cpu",
                ranks_on_node=len(specs),
            )
            for spec in specs
        ]

    def _zygote(self, preload: str) -> ForkServer:
        if self._forks is not None and self._preloaded != preload:
            self._drop_zygote()
        if self._forks is None:
            self._forks, self._preloaded = ForkServer(preload), preload
            self._epoll.register(self._forks, select.EPOLLIN)
        return self._forks

    def _drop_zygote(self) -> None:
        if self._forks is not None:
            self._epoll.unregister(self._forks)
            self._forks.close()
            self._forks = None

    def _start_thread(self, specs: list[WorkerSpec]) -> None:
        if len(specs) != 1:
            raise ClusterError(
                f"in_process runs one rank, and the layout has {len(specs)}: use processes"
            )
        self._thread = RankThread(specs[0])
        self._epoll.register(self._thread.wake, select.EPOLLIN)


class RankThread:
    """One rank as a thread of this process."""

    def __init__(self, spec: WorkerSpec) -> None:
        from workers.worker import Worker, find_runner  # brings torch

        self._rank = spec.rank
        self._end = ""
        self.wake = os.eventfd(0)
        self._worker = Worker(spec, find_runner(spec.runner), end_process=lambda code: None)
        self._thread = threading.Thread(target=self._run, name=f"rank-{spec.rank}", daemon=True)
        self._thread.start()

    def deaths(self) -> list[Death]:
        if not readable(self.wake, 0):
            return []
        os.eventfd_read(self.wake)
        return [describe(self._rank, os.getpid(), "127.0.0.1", self._end)]

    def close(self) -> None:
        """Asks the rank to leave; a thread cannot be killed, so it ends at its next step."""
        self._worker.leave()
        self._thread.join(KILL_TIMEOUT_S)
        if not self._thread.is_alive():
            os.close(self.wake)

    def _run(self) -> None:
        try:
            self._worker.run()
            self._end = "it left"
        except Exception as error:
            self._end = f"{type(error).__name__}: {error}"
        os.eventfd_write(self.wake, 1)
