"""Which rank does what: the arithmetic of one engine.

A `Layout` turns sizes into the coordinates of every rank and the members of every group. It knows
nothing of devices, process groups or Ray, so the driver can size a placement group with it and a
test can check 64 GPUs on a laptop.

Attention splits a tensor-parallel group into `attn_dp` replicas of `attn_cp` context-parallel
parts of `attn_tp` ranks, attn_tp fastest; the experts split the same ranks into `moe_dp` x `ep` x
`moe_tp`, moe_tp fastest. Without DP attention, `dp_size` multiplies the ranks instead: each
replica is a lockstep domain of its own that shares no collective with the others.

    >>> layout = Layout(tp_size=4, dp_size=2, enable_dp_attention=True)
    >>> layout.world_size, layout.num_domains, layout.num_replicas
    (4, 1, 2)
    >>> layout.coordinates(3)
    Coordinates(domain=0, tp=3, attn_dp=1, attn_cp=0, attn_tp=1, moe_dp=0, moe_ep=0, moe_tp=3)
    >>> layout.groups("attn_tp")
    ((0, 1), (2, 3))
    >>> Layout(tp_size=2, dp_size=2).groups("tp")
    ((0, 1), (2, 3))
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

GroupName = Literal["tp", "attn_tp", "attn_cp", "attn_dp", "moe_tp", "moe_ep", "moe_dp", "dense_tp"]
GROUP_NAMES: tuple[GroupName, ...] = (
    "tp", "attn_tp", "attn_cp", "attn_dp", "moe_tp", "moe_ep", "moe_dp", "dense_tp"
)  # fmt: skip


class LayoutError(ValueError):
    """Sizes that do not fit together; the message says which one to change."""


class Coordinates(NamedTuple):
    """Where a rank stands. `domain` counts lockstep domains, the rest count within one."""

    domain: int
    tp: int
    attn_dp: int
    attn_cp: int
    attn_tp: int
    moe_dp: int
    moe_ep: int
    moe_tp: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    tp_size: int = 1
    dp_size: int = 1
    enable_dp_attention: bool = False
    """`dp_size` divides the tensor-parallel group instead of multiplying it."""
    attn_cp_size: int = 1
    ep_size: int = 1
    moe_dp_size: int = 1
    moe_dense_tp_size: int | None = None
    """Ranks a dense layer of a MoE model is split over: None or tp_size (all), 1, attn_tp_size."""
    pp_size: int = 1
    ranks_per_node: int | None = None
    """Ranks inside one NVLink domain; None if all are."""

    def __post_init__(self) -> None:
        for name in ("tp_size", "dp_size", "attn_cp_size", "ep_size", "moe_dp_size"):
            if getattr(self, name) < 1:
                raise LayoutError(f"{name}={getattr(self, name)} must be at least 1")
        if self.pp_size != 1:
            raise LayoutError(
                f"pp_size={self.pp_size}: pipeline parallelism is not offered; use tp_size, "
                "dp_size or ep_size to spread the model"
            )
        if self.ranks_per_node is not None and self.ranks_per_node < 1:
            raise LayoutError(f"ranks_per_node={self.ranks_per_node} must be at least 1")
        if self.tp_size % (self.attn_dp_size * self.attn_cp_size):
            what = f"attn_cp_size={self.attn_cp_size}"
            if self.enable_dp_attention:
                what = f"dp_size={self.dp_size} x {what}"
            raise LayoutError(
                f"tp_size={self.tp_size} does not divide by {what}: attention gives every part "
                "the same number of ranks"
            )
        if self.tp_size % (self.ep_size * self.moe_dp_size):
            raise LayoutError(
                f"tp_size={self.tp_size} does not divide by ep_size={self.ep_size} x "
                f"moe_dp_size={self.moe_dp_size}: experts give every part the same number of ranks"
            )
        allowed = {1, self.attn_tp_size, self.tp_size}
        if self.moe_dense_tp_size is not None and self.moe_dense_tp_size not in allowed:
            raise LayoutError(
                f"moe_dense_tp_size={self.moe_dense_tp_size} must be unset or one of "
                f"{sorted(allowed)} (1, the attention-TP size or tp_size={self.tp_size})"
            )

    @property
    def attn_dp_size(self) -> int:
        """Attention replicas inside one lockstep domain."""
        return self.dp_size if self.enable_dp_attention else 1

    @property
    def attn_tp_size(self) -> int:
        return self.tp_size // self.attn_dp_size // self.attn_cp_size

    @property
    def moe_tp_size(self) -> int:
        return self.tp_size // self.ep_size // self.moe_dp_size

    @property
    def dense_tp_size(self) -> int:
        return self.tp_size if self.moe_dense_tp_size is None else self.moe_dense_tp_size

    @property
    def num_domains(self) -> int:
        """Lockstep domains: sets of ranks that share any collective."""
        return 1 if self.enable_dp_attention else self.dp_size

    @property
    def num_replicas(self) -> int:
        """Attention-DP copies in one domain."""
        return self.attn_dp_size

    @property
    def num_parts(self) -> int:
        """Parts of one domain with rows of their own: `attn_cp_size` of every replica."""
        return self.attn_dp_size * self.attn_cp_size

    @property
    def world_size(self) -> int:
        return self.tp_size * self.num_domains

    def coordinates(self, rank: int) -> Coordinates:
        if not 0 <= rank < self.world_size:
            raise LayoutError(f"rank {rank} is outside a world of {self.world_size}")
        domain, tp = divmod(rank, self.tp_size)
        attn_rest, attn_tp = divmod(tp, self.attn_tp_size)
        attn_dp, attn_cp = divmod(attn_rest, self.attn_cp_size)
        moe_rest, moe_tp = divmod(tp, self.moe_tp_size)
        moe_dp, moe_ep = divmod(moe_rest, self.ep_size)
        return Coordinates(domain, tp, attn_dp, attn_cp, attn_tp, moe_dp, moe_ep, moe_tp)

    def domain_ranks(self, domain: int) -> range:
        return range(domain * self.tp_size, (domain + 1) * self.tp_size)

    def replica_ranks(self, domain: int, replica: int) -> range:
        """The ranks that hold one attention-DP copy: they all get the same body."""
        size = self.tp_size // self.attn_dp_size
        first = domain * self.tp_size + replica * size
        return range(first, first + size)

    def groups(self, name: GroupName) -> tuple[tuple[int, ...], ...]:
        """Members of every group of one kind, ordered by first member; they partition the world."""
        length, stride = {
            "tp": (self.tp_size, 1),
            "attn_tp": (self.attn_tp_size, 1),
            "attn_cp": (self.attn_cp_size, self.attn_tp_size),
            "attn_dp": (self.attn_dp_size, self.attn_tp_size * self.attn_cp_size),
            "moe_tp": (self.moe_tp_size, 1),
            "moe_ep": (self.ep_size, self.moe_tp_size),
            "moe_dp": (self.moe_dp_size, self.moe_tp_size * self.ep_size),
            "dense_tp": (self.dense_tp_size, 1),
        }[name]
        return tuple(
            tuple(range(first, first + length * stride, stride))
            for first in range(self.world_size)
            if first // stride % length == 0
        )

    def members(self, name: GroupName, rank: int) -> tuple[int, ...]:
        """The group of one kind that `rank` is in."""
        return next(group for group in self.groups(name) if rank in group)

    def spans_nodes(self, members: tuple[int, ...]) -> bool:
        """Whether a group reaches over NVLink domains, where symmetric kernels do not."""
        if self.ranks_per_node is None:
            return False
        return len({rank // self.ranks_per_node for rank in members}) > 1
