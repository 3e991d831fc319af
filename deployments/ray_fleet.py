"""Ranks under Ray: a placement group with one actor a rank, each of which forks its rank.

`RayFleet` is the `Fleet` of `lockstep serve`; Ray starts, places and watches, and is on no token's
path. Only this module knows how a rank is run under Ray.
"""

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from enum import Enum
from typing import Any, NamedTuple

import msgspec
import ray
from ray._private import state
from ray.exceptions import ActorDiedError, RayError, RayTaskError
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from deployments.errors import ClusterError
from deployments.fleet import FORK_TIMEOUT_S, KILL_TIMEOUT_S, Death, describe
from deployments.forks import Fork, ForkServer, readable
from deployments.placement import (
    Need,
    NodeFree,
    Seat,
    choose_device,
    gpu_indices,
    seating,
    told_in_words,
)
from workers.config import passed_on_environment
from workers.spec import WorkerSpec

log = logging.getLogger("lockstep.ray_fleet")

END_TIMEOUT_S = 3.0
"""For an actor to end its rank; one that takes longer is ended itself."""

ROOM_WAIT_S = 2.0
"""For Ray to count what was just released, before a node that does not answer is asked again."""

ENDS_ITSELF_S = 2.0
"""For a process of this node to end as Ray or its zygote wants; then it is ended by a signal."""

PROGRESS_S = 1.0
LOOK_AGAIN_S = 0.5


class RankHost:
    """A Ray actor that holds one rank's GPU and forks the rank, epoch after epoch.

    The rank is a process of its own, so a gang that died is back after a fork, not after a new
    actor and an import of torch, and its death is named by its signal. Should the actor die, the
    zygote goes with it, and the rank with the zygote. `wait` keeps one of the actor's threads.
    """

    def __init__(self, preload: str) -> None:
        self._lock = threading.Lock()
        self._forks = ForkServer(preload)
        self._fork: Fork | None = None

    def where(self, with_gpus: bool) -> tuple[Any, ...]:
        """The fields of a `Seat`."""
        context = ray.get_runtime_context()
        assigned = context.get_accelerator_ids().get("GPU", [])
        return (
            context.get_node_id(),
            ray.util.get_node_ip_address(),
            os.getpid(),
            int(assigned[0]) if assigned else None,
            gpu_uuids_here() if with_gpus else (),
        )

    def fork(self, spec_json: bytes, name: str) -> int:
        """Starts the rank; its pid."""
        with self._lock:
            self._fork = self._forks.fork(spec_json, name, FORK_TIMEOUT_S)
            return self._fork.pid

    def wait(self) -> str:
        """Returns when the rank has ended: how."""
        while True:
            readable(self._forks.fileno(), LOOK_AGAIN_S)
            with self._lock:
                if self._fork is None:
                    return "it was ended"
                how = self._forks.take_ends().get(self._fork.pid)
            if how is not None:
                return how

    def end(self) -> None:
        """Ends the rank, if it still runs; returns when it is gone."""
        with self._lock:
            self._forks.kill()
            self._fork = None


class RayFleet:
    """Ranks under Ray actors in a placement group of this process, which ends with this process.

    Group and actors are kept from epoch to epoch while all of them live, so a restart costs forks,
    and nobody else takes the GPUs in between. When an actor is lost, `kill` releases everything,
    and the next `start` looks for room again: first on other nodes than one that did not answer,
    which Ray goes on to count for a quarter of a minute. `progress` hears what is missing while the
    cluster is too small, again when that has changed; after `cluster_wait_s` it is an error. Then
    it hears where the ranks are.
    """

    def __init__(
        self,
        *,
        cluster_wait_s: float = 30.0,
        cpus_per_rank: float = 0.1,
        progress: Callable[[str], None] = print,
    ) -> None:
        self._cluster_wait_s, self._cpus_per_rank = cluster_wait_s, cpus_per_rank
        self._progress = progress
        self._wake = os.eventfd(0, os.EFD_NONBLOCK)
        self._group: PlacementGroup | None = None
        self._hosts: list[Any] = []
        self._seats: list[Seat] = []
        self._silent: dict[str, str] = {}
        """Addresses of nodes that did not answer when ranks were ended last, by their ids."""
        self._actors: list[Local] = []
        self._ranks: list[Local] = []
        """Of those on this node: what nobody else ends is ended by its pidfd."""
        self._watch: Watch | None = None

    @property
    def wake(self) -> int:
        return self._wake

    @property
    def spans_nodes(self) -> bool:
        return True

    def start(self, specs: Sequence[WorkerSpec]) -> None:
        self.kill()
        config = specs[0].config
        device = choose_device(config, int(ray.cluster_resources().get("GPU", 0)))
        need = Need.of(config, device, self._cpus_per_rank)
        try:
            if not self._seats:
                preload = specs[0].runner.partition(":")[0]
                self._seats = self._seat(self._reserve(need), need, preload, config.start_timeout_s)
                told = told_in_words(self._seats)
                log.info("%s", told)
                self._progress(told)
            self._watch = self._fork(self._place(specs, device, need.ranks_per_node))
        except BaseException:
            self._release()
            raise

    def deaths(self) -> list[Death]:
        return self._watch.take() if self._watch else []

    def kill(self) -> None:
        if self._hosts and not self._end_ranks():
            self._release()
        await_ends(self._ranks, time.monotonic() + KILL_TIMEOUT_S)
        self._ranks = []
        self._stop_watching()

    def stop(self) -> None:
        self.kill()  # while there are actors to say that their ranks are gone
        if self._silent:
            nodes = ", ".join(self._silent.values())
            log.warning("no answer from %s: whether ranks there have ended is not known", nodes)
        self._release()
        os.close(self._wake)

    def _reserve(self, need: Need) -> PlacementGroup:
        """The placement group, once the cluster has room for it."""
        group = self._group = placement_group(
            need.bundles(),
            strategy=need.strategy,
            bundle_label_selector=need.selectors(self._avoided(need)),
        )
        began = looked = time.monotonic()
        told = ""
        while state_of(group) != "CREATED":
            time.sleep(0.02)
            now = time.monotonic()
            if now - looked < PROGRESS_S and now - began < self._cluster_wait_s:
                continue
            looked = now
            missing = self._shortage(need) or ClusterError(
                f"needs {need.num_nodes} placement bundles of {need.bundles()[0]}; Ray has not "
                "placed them, though the nodes seem to have room"
            )
            if now - began >= self._cluster_wait_s:
                raise ClusterError(
                    f"{missing}; gave up after {self._cluster_wait_s:g} s (cluster_wait_s): "
                    f"{need.remedy}"
                ) from missing
            if str(missing) != told:
                told = str(missing)
                self._progress(told)
        return group

    def _avoided(self, need: Need) -> list[str]:
        """Ids of the nodes to do without: silent ones, if there is room on the others."""
        deadline = time.monotonic() + ROOM_WAIT_S
        while self._silent and time.monotonic() < deadline:
            if self._shortage(need) is None:
                return list(self._silent)
            time.sleep(0.1)
        return []

    def _shortage(self, need: Need) -> ClusterError | None:
        """What is missing on the nodes that answer."""
        short = need.shortage([node for node in free_nodes() if node.node_id not in self._silent])
        if short is None or not self._silent:
            return short
        return ClusterError(f"{short}; no answer from {', '.join(self._silent.values())}")

    def _seat(
        self, group: PlacementGroup, need: Need, preload: str, timeout_s: float
    ) -> list[Seat]:
        """An actor for every rank, and what each has found out about its place."""
        nodes = placement_group_table(group)["bundles_to_node_id"]
        bundles = seating(
            [nodes[i] for i in range(need.num_nodes)],
            driver_node=ray.get_runtime_context().get_node_id(),
            ranks_per_node=need.ranks_per_node,
        )
        environment = passed_on_environment() | {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}
        rank_host = ray.remote(RankHost)
        for bundle in bundles:
            host = rank_host.options(
                max_restarts=0,
                max_concurrency=2,
                num_cpus=need.cpus_per_rank,
                num_gpus=need.gpus_per_rank,
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, bundle),
                runtime_env={"env_vars": environment},
            ).remote(preload)
            self._hosts.append(host)
        with_gpus = bool(need.gpus_per_rank)
        seats = [
            Seat(*each) for each in self._ask("where", [(with_gpus,)] * len(bundles), timeout_s)
        ]
        here = ray.get_runtime_context().get_node_id()
        self._actors = opened(("a Ray actor", seat.pid) for seat in seats if seat.node_id == here)
        return seats

    def _place(
        self, specs: Sequence[WorkerSpec], device: str, ranks_per_node: int
    ) -> list[WorkerSpec]:
        here = ray.get_runtime_context().get_node_id()
        indices = gpu_indices(self._seats) if device == "cuda" else []
        return [
            msgspec.structs.replace(
                spec,
                device=f"cuda:{indices[spec.rank]}" if indices else "cpu",
                node_ip=seat.node_ip,
                with_driver=seat.node_id == here,
                ranks_on_node=ranks_per_node,
            )
            for spec, seat in zip(specs, self._seats, strict=True)
        ]

    def _fork(self, specs: list[WorkerSpec]) -> "Watch":
        """A process for every rank, and who waits for its end."""
        arguments = [(spec.to_json(), f"epoch {spec.epoch} rank {spec.rank}") for spec in specs]
        pids = self._ask("fork", arguments, FORK_TIMEOUT_S)
        ranks = list(zip(specs, pids, strict=True))
        self._ranks = opened((f"rank {spec.rank}", pid) for spec, pid in ranks if spec.with_driver)
        waits = [host.wait.remote() for host in self._hosts]
        who = [(spec.rank, pid, spec.node_ip) for spec, pid in ranks]
        return Watch(dict(zip(waits, who, strict=True)), self._wake)

    def _ask(
        self, method: str, arguments: Sequence[tuple[Any, ...]], timeout_s: float
    ) -> list[Any]:
        """Calls a method of every host at once; their answers."""
        calls = zip(self._hosts, arguments, strict=True)
        try:
            answers = [getattr(host, method).remote(*each) for host, each in calls]
            return ray.get(answers, timeout=timeout_s)
        except RayTaskError as error:
            raise ClusterError(f"a rank could not be started: {first_line(error.cause)}") from error
        except RayError as error:
            raise ClusterError(f"a rank could not be started: {first_line(error)}") from error

    def _end_ranks(self) -> bool:
        """Ends the ranks and keeps their hosts; False if a host does not answer."""
        ends = [host.end.remote() for host in self._hosts]
        ray.wait(ends, num_returns=len(ends), timeout=END_TIMEOUT_S)
        answers = [answered(end) for end in ends]
        heard = {ray.get_runtime_context().get_node_id()}
        told = list(zip(self._seats, answers, strict=False))  # a start that failed has no seats
        heard |= {seat.node_id for seat, answer in told if answer is not Answer.NONE}
        self._silent = {seat.node_id: seat.node_ip for seat, _ in told if seat.node_id not in heard}
        return all(answer is Answer.DONE for answer in answers)

    def _release(self) -> None:
        """Gives everything back: ranks, actors, placement group."""
        for host in self._hosts:
            ray.kill(host, no_restart=True)
        if self._group is not None:
            # NOTE: a stopped process ignores Ray's kill; removing its group ends it by a signal.
            remove_placement_group(self._group)
        self._await_gone()
        self._stop_watching()
        self._group, self._hosts, self._seats = None, [], []

    def _await_gone(self) -> None:
        """Waits, not for ever, until Ray and this machine know nothing of the hosts."""
        deadline = time.monotonic() + KILL_TIMEOUT_S
        await_ends(self._actors, deadline)
        self._actors = []
        while self._group is not None and time.monotonic() < deadline:
            if state_of(self._group) == "REMOVED":
                return
            time.sleep(0.02)

    def _stop_watching(self) -> None:
        if self._watch is not None:
            self._watch.close()
            self._watch = None


class Local(NamedTuple):
    """A process on the driver's node, called as a log line would."""

    name: str
    pidfd: int


def opened(processes: Iterable[tuple[str, int]]) -> list[Local]:
    """Of processes of this node, (what it is, pid) each, those that are still there."""
    found: list[Local] = []
    for what, pid in processes:
        with suppress(ProcessLookupError):
            found.append(Local(f"{what} (pid {pid})", os.pidfd_open(pid)))
    return found


def await_ends(processes: Sequence[Local], deadline: float) -> None:
    """Returns when these are gone, or at the deadline (monotonic), having told which are not.

    What does not end soon is ended by a signal. Closes the pidfds.
    """
    soon = min(deadline, time.monotonic() + ENDS_ITSELF_S)
    for _, pidfd in processes:
        if not readable(pidfd, soon - time.monotonic()):
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    left = [name for name, fd in processes if not readable(fd, deadline - time.monotonic())]
    if left:
        log.warning("%s did not end in time, though killed, and may hold memory", ", ".join(left))
    for _, pidfd in processes:
        os.close(pidfd)


class Watch:
    """Waits for the ranks' ends in a thread of its own, and says which has ended and how."""

    def __init__(self, waits: dict[Any, tuple[int, int, str]], wake: int) -> None:
        """`waits` names (rank, pid, node's address) for each pending `RankHost.wait`."""
        self._waits, self._wake = waits, wake
        self._deaths: list[Death] = []
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="rank-watch", daemon=True)
        self._thread.start()

    def take(self) -> list[Death]:
        with self._lock:
            taken, self._deaths = self._deaths, []
            if readable(self._wake, 0):
                os.eventfd_read(self._wake)
            return taken

    def close(self) -> None:
        self._closed.set()
        self._thread.join(KILL_TIMEOUT_S)
        self.take()

    def _run(self) -> None:
        while self._waits and not self._closed.is_set():
            ended, _ = ray.wait(list(self._waits), num_returns=1, timeout=LOOK_AGAIN_S)
            for wait in ended:
                death = describe(*self._waits.pop(wait), how_it_ended(wait))
                with self._lock:
                    self._deaths.append(death)
                    os.eventfd_write(self._wake, 1)


class Answer(Enum):
    """What a host said when it was asked to end its rank."""

    DONE = "done"
    DEAD = "dead"
    """Ray says that the actor is dead: its node has been heard of, or given up."""
    NONE = "none"


def answered(end: Any) -> Answer:
    """Does not wait."""
    try:
        ray.get(end, timeout=0)
    except (ActorDiedError, RayTaskError):
        return Answer.DEAD
    except RayError:
        return Answer.NONE
    return Answer.DONE


def how_it_ended(wait: Any) -> str:
    try:
        return ray.get(wait)
    except RayTaskError as error:
        return first_line(error.cause)
    except RayError as error:
        return f"its Ray actor is lost ({first_line(error)})"


def gpu_uuids_here() -> tuple[str, ...]:
    """UUIDs of the GPUs that a process started here sees. This one stays free of torch and CUDA."""
    line = "from workers.worker import gpu_uuids; print(*gpu_uuids())"
    done = subprocess.run(
        [sys.executable, "-c", line], capture_output=True, text=True, timeout=FORK_TIMEOUT_S
    )
    if done.returncode:
        raise ClusterError(f"GPUs cannot be listed: {done.stderr.strip().splitlines()[-1:]}")
    return tuple(done.stdout.split())


def state_of(group: PlacementGroup) -> str:
    return placement_group_table(group).get("state", "")


def first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:500]


def free_nodes() -> list[NodeFree]:
    """What every living node has left."""
    # NOTE: Ray has no public call for this; `ray.available_resources()` sums over the nodes.
    available = state.available_resources_per_node()
    return [
        NodeFree(
            node["NodeManagerAddress"], free.get("GPU", 0.0), free.get("CPU", 0.0), node["NodeID"]
        )
        for node in ray.nodes()
        if node["Alive"] and (free := available.get(node["NodeID"])) is not None
    ]
