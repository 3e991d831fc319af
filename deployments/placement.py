"""Where ranks go: arithmetic on what a cluster has. No Ray here, so a laptop can test 64 GPUs.

An engine asks for one bundle a node, each with room for all the node's ranks: ranks of a
tensor-parallel group are neighbours in number, so they land inside one node. `deployments.fleet`
does what is decided here.

    >>> need = Need(num_nodes=1, ranks_per_node=4, gpus_per_rank=1, cpus_per_rank=0.1)
    >>> need.bundles()
    [{'CPU': 0.4, 'GPU': 4}]
    >>> str(need.shortage([NodeFree("10.0.0.1", gpus=2, cpus=8)]))
    'needs 4 GPUs on one node; the largest node has 2 free'
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal, NamedTuple

from deployments.errors import ClusterError, ClusterTooSmall, TooFewNodes
from workers.config import EngineConfig


class NodeFree(NamedTuple):
    """What a node has left."""

    ip: str
    gpus: float
    cpus: float
    node_id: str = ""


class Seat(NamedTuple):
    """What a rank's process has found out about where it is."""

    node_id: str
    node_ip: str
    pid: int
    ray_gpu: int | None
    """The GPU index that Ray assigned; None on a CPU."""
    gpu_uuids: tuple[str, ...]
    """All GPUs that the process sees, in order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """What an engine wants of a cluster."""

    num_nodes: int
    ranks_per_node: int
    gpus_per_rank: int
    cpus_per_rank: float

    @classmethod
    def of(
        cls, config: EngineConfig, device: Literal["cpu", "cuda"], cpus_per_rank: float
    ) -> "Need":
        return cls(
            num_nodes=config.num_nodes,
            ranks_per_node=config.ranks_per_node,
            gpus_per_rank=int(device == "cuda"),
            cpus_per_rank=cpus_per_rank,
        )

    @property
    def gpus_per_node(self) -> int:
        return self.gpus_per_rank * self.ranks_per_node

    @property
    def cpus_per_node(self) -> float:
        return round(self.cpus_per_rank * self.ranks_per_node, 4)

    def bundles(self) -> list[dict[str, float]]:
        bundle: dict[str, float] = {"CPU": self.cpus_per_node}
        if self.gpus_per_rank:
            bundle["GPU"] = self.gpus_per_node
        return [dict(bundle) for _ in range(self.num_nodes)]

    def selectors(self, avoided: Collection[str]) -> list[dict[str, str]]:
        """Ray's label selectors of the bundles, so that none goes to a node of these ids."""
        selector = {"ray.io/node-id": f"!in({','.join(sorted(avoided))})"} if avoided else {}
        return [dict(selector) for _ in range(self.num_nodes)]

    @property
    def strategy(self) -> Literal["STRICT_PACK", "STRICT_SPREAD"]:
        return "STRICT_PACK" if self.num_nodes == 1 else "STRICT_SPREAD"

    @property
    def remedy(self) -> str:
        """What to change when a cluster stays too small."""
        if self.num_nodes > 1:
            return "add a node, or lower num_nodes"
        return "add a larger node, or lower tp_size or dp_size"

    def shortage(self, nodes: Sequence[NodeFree]) -> ClusterTooSmall | None:
        """What is missing, in one sentence; None if it fits by the numbers."""
        kinds = (
            ("GPU", self.gpus_per_node, [node.gpus for node in nodes]),
            ("CPU", self.cpus_per_node, [node.cpus for node in nodes]),
        )
        for what, needed, free in kinds:
            num_fitting = sum(amount >= needed for amount in free)
            if num_fitting >= self.num_nodes or needed == 0:
                continue
            if self.num_nodes == 1:
                return ClusterTooSmall(_short(needed), _short(max(free, default=0)), what)
            return TooFewNodes(_short(needed), self.num_nodes, num_fitting, what)
        return None


def _short(amount: float) -> float:
    """Whole numbers without their point: they are for a sentence."""
    return int(amount) if amount == int(amount) else round(amount, 4)


def choose_device(config: EngineConfig, num_gpus: int) -> Literal["cpu", "cuda"]:
    """`auto` takes GPUs where the cluster has one for every rank."""
    if config.device != "auto":
        return config.device
    return "cuda" if num_gpus >= config.layout.world_size else "cpu"


def seating(bundle_nodes: Sequence[str], *, driver_node: str, ranks_per_node: int) -> list[int]:
    """The bundle of every rank, when bundle i is on `bundle_nodes[i]`.

    The driver's own node comes first, so that rank 0, which carries the tokens, is close to it.

    >>> seating(["b", "a"], driver_node="a", ranks_per_node=2)
    [1, 1, 0, 0]
    """
    order = sorted(
        range(len(bundle_nodes)),
        key=lambda i: (bundle_nodes[i] != driver_node, bundle_nodes[i], i),
    )
    return [bundle for bundle in order for _ in range(ranks_per_node)]


def told_in_words(seats: Sequence[Seat]) -> str:
    """Which ranks are on which node: "ranks 0-1 on 10.0.0.1, 2-3 on 10.0.0.2"."""
    parts: list[str] = []
    first = 0
    for (_, node_ip), group in groupby(seats, key=lambda seat: (seat.node_id, seat.node_ip)):
        last = first + len(list(group)) - 1
        ranks = f"{first}-{last}" if last > first else f"{first}"
        parts.append(f"{ranks} on {node_ip}")
        first = last + 1
    return f"rank{'s' if len(seats) > 1 else ''} {', '.join(parts)}"


def gpu_indices(seats: Sequence[Seat]) -> list[int]:
    """Which of the GPUs it sees each rank takes.

    Ray's own choice holds as long as it gives every rank a GPU of its own. Two Ray nodes on one
    machine both offer GPU 0: then the ranks that see the same GPUs take them in turn.
    """
    by_ray = [_index_by_ray(seat) for seat in seats]
    if _all_differ(seats, by_ray):
        return [index for index in by_ray if index is not None]
    taken: dict[tuple[str, ...], int] = {}
    indices: list[int] = []
    for seat in seats:
        index = taken.get(seat.gpu_uuids, 0)
        taken[seat.gpu_uuids] = index + 1
        indices.append(index)
    for uuids, num_ranks in taken.items():
        if num_ranks > len(uuids):
            raise ClusterError(
                f"{num_ranks} ranks were placed on one machine where each sees {len(uuids)} "
                f"{'GPU' if len(uuids) == 1 else 'GPUs'}: start Ray there with --num-gpus="
                f"{len(uuids)} in all, or check CUDA_VISIBLE_DEVICES"
            )
    if not _all_differ(seats, indices):
        raise ClusterError(
            "two ranks would share a GPU: they see overlapping but unequal sets of GPUs; "
            "give all Ray nodes of a machine the same CUDA_VISIBLE_DEVICES"
        )
    return indices


def _index_by_ray(seat: Seat) -> int | None:
    if len(seat.gpu_uuids) == 1:
        return 0  # the process sees its own GPU only, whatever Ray calls it
    return seat.ray_gpu


def _all_differ(seats: Sequence[Seat], indices: Sequence[int | None]) -> bool:
    chosen: set[str] = set()
    for seat, index in zip(seats, indices, strict=True):
        if index is None or not index < len(seat.gpu_uuids):
            return False
        chosen.add(seat.gpu_uuids[index])
    return len(chosen) == len(seats)
