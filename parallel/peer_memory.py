"""Sums over memory that the GPUs of one NVLink domain write to directly, and their measurement.

`PeerMemory` holds what `parallel.sums` calls the peers' ways: two buffers of torch symmetric memory
a communicator, met by all its members once at start. `open_sums` sets it up, times every way, and
fills the communicators' tables. If torch symmetric memory cannot be had (its back end is taken, the
peers' GPUs are not visible), that is said in one line, and NCCL's two ways are left.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.arena import SymmetryError
from parallel.groups import Group, Transport
from parallel.sums import PATHS, SumPath, SumTable, agreed_table
from parallel.symmetric import use_symmetric_memory

PUSH_ROWS = 128
"""More rows are never pushed: each costs twice its bytes."""
STAGED_ROWS = 2048
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
"""What is measured."""
NUM_CALLS, NUM_REPLAYS = 10, 4
START_POLLS = 1 << 21
"""While it is measured a peer that does not come is given up after a second or two."""

Say = Callable[[str], None]


class PeerMemory:
    """Symmetric memory of torch's for one communicator; making it is collective."""

    def __init__(
        self, group: dist.ProcessGroup, device: torch.device, num_cols: int, dtype: torch.dtype
    ) -> None:
        import torch.distributed._symmetric_memory as symm_mem
        from torch._C._distributed_c10d import _SymmetricMemory

        from kernels.push_reduce import Inbox, inbox_words

        self._name, self._dtype = group.group_name, dtype
        self.num_polls = START_POLLS

        def shared(count: int, kind: torch.dtype) -> tuple[Tensor, list[int]]:
            x = _SymmetricMemory.empty_strided_p2p((count,), (1,), kind, device)
            handle = symm_mem.rendezvous(x, self._name)
            x.zero_()
            return x, [int(address) for address in handle.buffer_ptrs]

        world = group.size()
        self._staging_N, _ = shared(STAGED_ROWS * num_cols, dtype)
        words_N, addresses = shared(inbox_words(world, PUSH_ROWS, num_cols), torch.int64)
        torch.cuda.synchronize(device)
        self.inbox = Inbox(
            words_N,
            torch.tensor(addresses, dtype=torch.int64, device=device),
            torch.zeros(PUSH_ROWS, dtype=torch.int32, device=device),
            num_cols,
            group.rank(),
        )

    def staging(self, shape: Sequence[int], like: Tensor) -> Tensor:
        count = math.prod(shape)
        if count > len(self._staging_N) or like.dtype != self._dtype:
            return like.new_empty(shape)
        return self._staging_N[:count].view(*shape)

    def takes(self, path: SumPath, x: Tensor) -> bool:
        from kernels.push_reduce import fits

        if path == "push":
            return fits(x, self.inbox)
        return x.data_ptr() == self._staging_N.data_ptr() and x.is_contiguous()

    def reduce(self, path: SumPath, x: Tensor) -> Tensor:
        from kernels.push_reduce import push_reduce

        if path == "push":
            return push_reduce(x, self.inbox, num_polls=self.num_polls)
        if path == "one_shot":
            return torch.ops.symm_mem.one_shot_all_reduce(x, "sum", self._name)
        return torch.ops.symm_mem.two_shot_all_reduce_(x, "sum", self._name)

    def reduce_rms_norm(
        self, x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float, out: Tensor | None
    ) -> Tensor:
        from kernels.push_reduce import push_reduce_rms_norm

        return push_reduce_rms_norm(
            x_TD, residual_TD, weight_D, self.inbox, eps=eps, out=out, num_polls=self.num_polls
        )


class Way(NamedTuple):
    """One path at one size: where its input lies, and the sum."""

    x_TD: Tensor
    reduce: Callable[[Tensor], Tensor]


def open_sums(
    groups: Sequence[Group], device: torch.device, num_cols: int, dtype: torch.dtype, say: Say
) -> None:
    """Measure and open the sums of each communicator; every rank calls it at the same point.

    `groups` come in one order on all ranks; those with the same members share a communicator.
    """
    for group, process_group in communicators(groups):
        peers = _meet(group, process_group, device, num_cols, dtype, say)
        table = measure(group, peers, device, num_cols, dtype)
        if peers is not None:
            from kernels.push_reduce import NUM_POLLS

            peers.num_polls = NUM_POLLS
        group.sums.open(table, peers)
        if group.rank == 0:
            say(f"sums over {group.name} {group.members}: {table.summary()}")


def communicators(groups: Sequence[Group]) -> list[tuple[Group, dist.ProcessGroup]]:
    """Each communicator of torch's inside one NVLink domain once, with the first of its groups.

    NOTE: all members meet on it, so nothing that one rank alone knows may decide: not that a
    transport is wrapped there, for a planted fault.
    """
    found: dict[dist.ProcessGroup, Group] = {}
    for group in groups:
        process_group = None if group.transport is None else group.transport.process_group
        if process_group is not None and not group.spans_nodes:
            found.setdefault(process_group, group)
    return [(group, process_group) for process_group, group in found.items()]


def _meet(
    group: Group,
    process_group: dist.ProcessGroup,
    device: torch.device,
    num_cols: int,
    dtype: torch.dtype,
    say: Say,
) -> PeerMemory | None:
    """Peer memory, if every member could set it up."""
    peers, reason = None, ""
    try:
        peers = PeerMemory(process_group, device, num_cols, dtype)
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
    # NOTE: it is also a barrier: nobody writes into an inbox before it is empty.
    everyone = torch.tensor([float(peers is not None)], device=device)
    _transport(group).all_reduce(everyone)
    if everyone.item() == group.size:
        return peers
    say(
        f"sums over {group.name} {group.members} are NCCL's: torch symmetric memory cannot be set "
        f"up on every rank ({reason or 'on another rank'})"
    )
    return None


def measure(
    group: Group, peers: PeerMemory | None, device: torch.device, num_cols: int, dtype: torch.dtype
) -> SumTable:
    """Every path at every size, timed in graphs and checked; the same table on all ranks."""
    width = num_cols * dtype.itemsize
    figures: dict[SumPath, list[float]] = {}
    for path in _paths(group, peers):
        # Once for nothing: a kernel is compiled, and ranks that have it already must not judge.
        first = way_of(path, group, peers, (1, num_cols), device, dtype)
        if first is not None:
            is_right(first, group)
        figures[path] = []
        for num_rows in ROWS:
            way = way_of(path, group, peers, (num_rows, num_cols), device, dtype)
            figures[path].append(math.inf if way is None else timed(way, group, device))
    # NOTE: a path that is wrong on one rank is not chosen on any: infinite figures win the maximum.
    paths: list[SumPath] = list(figures)
    mine_PS = torch.tensor([figures[path] for path in paths], device=device)
    all_WPS = torch.empty(group.size, *mine_PS.shape, device=device)
    _transport(group).all_gather(all_WPS.view(-1, len(ROWS)), mine_PS)
    by_rank = [dict(zip(paths, one, strict=True)) for one in all_WPS.tolist()]
    return agreed_table([rows * width for rows in ROWS], by_rank)


def _paths(group: Group, peers: PeerMemory | None) -> list[SumPath]:
    has_slot = group.arena.is_open and group.arena.slot_of("reduced", group) is not None
    offered = {"ring": True, "symmetric": has_slot}
    return [path for path in PATHS if offered.get(path, peers is not None)]


def way_of(
    path: SumPath,
    group: Group,
    peers: PeerMemory | None,
    shape: tuple[int, int],
    device: torch.device,
    dtype: torch.dtype,
) -> Way | None:
    """None if the path does not take tensors of this shape."""
    like = torch.empty(0, dtype=dtype, device=device)
    transport = _transport(group)

    def by_nccl(x: Tensor) -> Tensor:
        transport.all_reduce(x)
        return x

    if path == "ring":
        return Way(like.new_empty(shape), by_nccl)
    if path == "symmetric":
        memory = use_symmetric_memory(group, "reduced", op="all_gather")
        try:
            return None if memory is None else Way(memory.empty(shape, like), by_nccl)
        except SymmetryError:  # the arena is planned for smaller steps
            return None
    if peers is None:
        return None
    x = like.new_empty(shape) if path == "push" else peers.staging(shape, like)
    return Way(x, lambda x: peers.reduce(path, x)) if peers.takes(path, x) else None


def timed(way: Way, group: Group, device: torch.device) -> float:
    """Microseconds of a call in a graph, the quickest of a few replays; infinite if it is wrong."""
    if not is_right(way, group):
        return math.inf
    way.x_TD.zero_()
    torch.cuda.synchronize(device)
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)
    with torch.cuda.stream(side):
        graph.capture_begin(capture_error_mode="thread_local")
        for _ in range(NUM_CALLS):
            way.reduce(way.x_TD)
        graph.capture_end()
    times: list[float] = []
    graph.replay()
    for _ in range(NUM_REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / NUM_CALLS)
    return min(times) if is_right(way, group) else math.inf


def is_right(way: Way, group: Group) -> bool:
    """Whether the sum is right on every rank: all go on with a path, or none does.

    Of small whole numbers, exact in every type, that tell ranks and places apart.
    """
    x_TD = way.x_TD
    count = torch.arange(x_TD.numel(), device=x_TD.device).view(x_TD.shape) % 5
    x_TD.copy_(count + group.rank)
    expected = count * group.size + group.size * (group.size - 1) // 2
    try:
        right = (way.reduce(x_TD) == expected).all().float().view(1)
    except (RuntimeError, ValueError):  # this size is not taken
        right = torch.zeros(1, device=x_TD.device)
    _transport(group).all_reduce(right)
    return right.item() == group.size


def _transport(group: Group) -> Transport:
    if group.transport is None:
        raise TypeError(f"group {group.name} of ranks {group.members} has no communicator")
    return group.transport
