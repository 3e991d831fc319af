"""The collectives the model needs: one function a kind, each taking the group it runs over.

No function reads a global: a call site shows who is talking to whom. A group of one returns its
input untouched, so single-GPU code is the same code. Every call is judged against the contract of
symmetric memory (`parallel.symmetric`) and recorded in the group's ledger before it is made, so a
rank that skips one, or makes one on other memory, is found by its digest.

    function               reads                       writes
    all_reduce             x of every member           x, in place, at one offset on all ranks
    all_gather_rows        x of every member           out: a slot of its own, never a part of x
    start_all_gather_rows  the same, on a side stream until it is waited for
    reduce_scatter_rows    this rank's rows of all x   out: a slot of its own, never a part of x
    all_to_all_rows        this rank's block of all x  out: ordinary memory, there is no kernel

No collective reads or writes at an offset that depends on the rank: a gather from, or a scatter
into, the rank's own rows of the whole would, and is refused.
"""

from collections.abc import Callable

from torch import Tensor

from parallel.arena import Role
from parallel.groups import Call, Group, Transport
from parallel.symmetric import (
    Op,
    is_allocation_symmetric,
    judge,
    out_of_slot,
    use_symmetric_memory,
)


def _transport(group: Group) -> Transport:
    if group.transport is None:
        raise RuntimeError(
            f"group {group.name} of ranks {group.members} has no communicator on this rank"
        )
    return group.transport


def _enter(
    op: Op,
    group: Group,
    send: Tensor,
    receive: Tensor,
    note: str = "",
    *,
    in_one_buffer: bool = False,
) -> Transport:
    """Judge and record a collective that is about to be made."""
    transport = _transport(group)
    path, reason, places = judge(op, group, send, receive, in_one_buffer=in_one_buffer)
    call = Call(op, group.name, send.shape, group.is_shared, path, reason or note, places)
    group.ledger.record(call)
    group.ledger.inside = group.ledger.num_collectives
    return transport


def all_reduce(x: Tensor, group: Group, *, in_one_buffer: bool = False) -> Tensor:
    """Sum `x` over `group`, and return the sum: `x` itself, or memory that holds for a step.

    `in_one_buffer` says that `x` are all rows of ranks whose shares are uneven: ordinary memory is
    right for them.
    """
    if group.size == 1:
        return x
    path = group.sums.peer_path(x)
    if path is not None and group.sums.peers is not None:
        _record_peer_sum(group, x, path)
        return group.sums.peers.reduce(path, x)
    transport = _enter("all_reduce", group, x, x, in_one_buffer=in_one_buffer)
    transport.all_reduce(x)
    group.ledger.inside = 0
    return x


def all_reduce_add_norm(
    x_TD: Tensor,
    residual_TD: Tensor,
    weight_D: Tensor,
    eps: float,
    group: Group,
    *,
    out: Tensor | None = None,
) -> Tensor | None:
    """Add the sum of `x` over `group` to the residual stream, in place, and normalise, all in one.

    None, and nothing is done, where one kernel for it is not the quickest way: the caller sums.
    """
    if group.size == 1 or group.sums.peers is None or group.sums.peer_path(x_TD) != "push":
        return None
    _record_peer_sum(group, x_TD, "push")
    return group.sums.peers.reduce_rms_norm(x_TD, residual_TD, weight_D, eps, out)


def _record_peer_sum(group: Group, x: Tensor, path: str) -> None:
    shape, is_shared = x.shape, group.is_shared
    group.ledger.record(
        Call("all_reduce", group.name, shape, is_shared, "chosen", reason=path, way=path)
    )


def all_gather_rows(
    x_TD: Tensor, group: Group, *, out: Tensor | None = None, role: Role | None = None
) -> Tensor:
    """Stack every rank's rows (T, ...) in group order: (W * T, ...). All ranks hold equal T.

    The result is written to `out`, or to the group's slot of `role`, or to where the group's
    gathers go.
    """
    if group.size == 1:
        return x_TD
    if out is not None:
        _refuse_overlap("all_gather", group, x_TD, out)
    x_TD, reason = _staged(x_TD.contiguous(), group, "gather_in")
    if out is None:
        role = role or ("global_dp" if group.is_shared else "local_dp")
        out = _output(x_TD, group, role, (group.size * x_TD.shape[0], *x_TD.shape[1:]))
    transport = _enter("all_gather", group, x_TD, out, reason)
    transport.all_gather(out, x_TD)
    group.ledger.inside = 0
    return out


class PendingGather:
    """A gather that goes on while its caller computes something else."""

    def __init__(self, group: Group, x: Tensor, out: Tensor, finish: Callable[[], None]) -> None:
        self._group, self._finish = group, finish
        self._x, self._out = x, out  # kept: neither's memory is anyone else's until it is done

    def wait(self) -> Tensor:
        """The ranks' rows (W * T, ...): complete for what the current stream does from here."""
        ledger = self._group.ledger
        ledger.inside = ledger.end(self._group.name)
        self._finish()
        ledger.inside = 0
        return self._out


def start_all_gather_rows(x_TD: Tensor, group: Group, *, out: Tensor) -> PendingGather:
    """Begin to stack every rank's rows (T, ...) into `out` (W * T, ...), and do not wait.

    Both are the group's slots where memory is symmetric: nothing is copied here. The gather must be
    waited for in the same step and before the next one over this group; until then nobody writes
    `x` or touches `out`. On a GPU it has a stream of its own and begins when what the current
    stream has been given is done.
    """
    if group.size == 1:
        raise ValueError(f"a gather over {group.name}, which is one rank, has nothing to wait for")
    _refuse_overlap("all_gather", group, x_TD, out)
    transport = _enter("all_gather", group, x_TD, out)
    group.ledger.begin(group.name)
    pending = PendingGather(group, x_TD, out, transport.start_all_gather(out, x_TD))
    group.ledger.inside = 0
    return pending


def all_gather_columns(
    x_TD: Tensor, group: Group, *, out: Tensor | None = None, role: Role | None = None
) -> Tensor:
    """Join every rank's columns (T, D) in group order: (T, W * D).

    Those of several rows are written to `out` where the caller has a place for them.
    """
    if group.size == 1:
        return x_TD
    stacked = all_gather_rows(x_TD, group, role=role).view(group.size, *x_TD.shape)
    return out_of_slot(side_by_side(stacked, out), group)  # of a single row it is a view


def side_by_side(x_WTD: Tensor, out: Tensor | None = None) -> Tensor:
    """Every rank's columns of the same rows, joined: (T, W * D), of a single row a view of `x`.

    Several rows are written to `out` where the caller has a place for them.
    """
    num_ranks, num_rows, width = x_WTD.shape
    x_TWD = x_WTD.transpose(0, 1)
    if out is None or num_rows == 1:
        return x_TWD.reshape(num_rows, num_ranks * width)
    out.view(num_rows, num_ranks, width).copy_(x_TWD)
    return out


def reduce_scatter_rows(
    x_TD: Tensor, group: Group, *, out: Tensor | None = None, role: Role | None = None
) -> Tensor:
    """Sum over `group` and keep this rank's block of rows: (W * T, ...) becomes (T, ...).

    The result is written to `out`, or to the group's slot of `role`, or to where the group's
    scatters go.
    """
    if group.size == 1:
        return x_TD
    _refuse_uneven(x_TD, group)
    if out is not None:
        _refuse_overlap("reduce_scatter", group, x_TD, out)
    x_TD, reason = _staged(x_TD.contiguous(), group, "scatter_in")
    if out is None:
        role = role or ("local_dp" if group.is_shared else "scattered")
        out = _output(x_TD, group, role, (x_TD.shape[0] // group.size, *x_TD.shape[1:]))
    transport = _enter("reduce_scatter", group, x_TD, out, reason)
    transport.reduce_scatter(out, x_TD)
    group.ledger.inside = 0
    return out


def all_to_all_rows(x_TD: Tensor, group: Group) -> Tensor:
    """Send block i of the rows to rank i of `group`; the ranks' blocks for this one, in order."""
    if group.size == 1:
        return x_TD
    _refuse_uneven(x_TD, group)
    x_TD = x_TD.contiguous()
    out = x_TD.new_empty(x_TD.shape)
    transport = _enter("all_to_all", group, x_TD, out)
    transport.all_to_all(out, x_TD)
    group.ledger.inside = 0
    return out


def _staged(x: Tensor, group: Group, role: Role) -> tuple[Tensor, str]:
    """A gather's or scatter's input in its slot: copied there, and noted, if it lies elsewhere.

    A part of a slot, as one rank's share of its rows, is elsewhere on every rank.
    """
    arena = group.arena
    if not arena.is_open or x.numel() == 0:
        return x, ""
    place = arena.find(x)
    if place is not None and place.offset == place.slot.offset:
        return x, ""
    memory = use_symmetric_memory(
        group, role, op="all_gather", disabled=not is_allocation_symmetric(group)
    )
    if memory is None or arena.slot_of(role, group) is None:
        return x, ""
    return memory.empty(x.shape, x).copy_(x), "copied"


def _output(x: Tensor, group: Group, role: Role, shape: tuple[int, ...]) -> Tensor:
    """Symmetric if the input is: one side alone is worth nothing."""
    if not group.arena.is_open or group.arena.find(x) is None:
        return x.new_empty(shape)
    memory = use_symmetric_memory(group, role, op="all_gather")
    return x.new_empty(shape) if memory is None else memory.empty(shape, x)


def _refuse_uneven(x: Tensor, group: Group) -> None:
    if x.shape[0] % group.size:
        raise ValueError(
            f"{x.shape[0]} rows do not divide over the {group.size} ranks of {group.name}; "
            "pad them first"
        )


def _refuse_overlap(op: Op, group: Group, send: Tensor, receive: Tensor) -> None:
    """In place, each rank would read or write at an offset of its own."""
    if send.numel() == 0 or send.device != receive.device:
        return
    first, second = sorted((send, receive), key=lambda x: x.data_ptr())
    if first.data_ptr() + first.nbytes > second.data_ptr():
        raise ValueError(
            f"{op} over {group.name} was given {tuple(send.shape)} and {tuple(receive.shape)} that "
            "overlap: in place it would work at another offset on every rank; give it its own slot"
        )
