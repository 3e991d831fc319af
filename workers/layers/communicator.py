"""Between two halves of a layer: what the plan says happens to their rows, done.

A `NormBoundary` takes what attention or an MLP gave, pays the sum it owes, adds it to the residual
stream, normalises, and hands on rows in the layout that the next half works on. Which collectives
that takes is settled by `parallel.plan` when the model is built; how rows move is in
`parallel.dp_attention`. A half that gave other rows than the plan expects, or owes its sum to
another group, is an error here, never a wrong number.
"""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from parallel.collectives import all_reduce, all_reduce_add_norm
from parallel.dp_attention import (
    Activation,
    RowSplit,
    gather_all,
    gather_replica,
    place_for_gather,
    sum_to_share,
    sum_to_shares,
    take_share,
)
from parallel.groups import Group
from parallel.plan import Boundary, Move, PlanError, Rows
from parallel.symmetric import out_of_slot
from workers.layers.build import Build

Mover = Callable[[Tensor, RowSplit | None], Tensor]


class Norm(Protocol):
    weight_D: Tensor
    eps: float

    def forward(self, x_TD: Tensor, out: Tensor | None = None) -> Tensor:
        """Written to `out` where the caller has a place for it."""
        ...

    def add(self, x_TD: Tensor, residual_TD: Tensor, out: Tensor | None = None) -> Tensor:
        """Add `x` to the residual stream, in place, and normalise the sum."""
        ...


class NormBoundary:
    def __init__(
        self, build: Build, boundary: Boundary, norm: Norm, *, gathers_next: bool = False
    ) -> None:
        """`gathers_next` if the next half begins by gathering its scattered rows itself."""
        self._residual = boundary.residual
        self._norm = norm
        self._owed = build.group(boundary.owed) if boundary.owed else None
        self._source = boundary.collect.source
        self._stream = boundary.widen.target
        self._attn_tp = build.groups.attn_tp
        self._target = boundary.spread.target
        self._collect = _mover(boundary.collect, build)
        self._cut_residual = _mover(Move(boundary.residual, boundary.collect.target), build)
        self._widen = _mover(boundary.widen, build)
        self._spread = _mover(boundary.spread, build)
        stays = self._widen is None and self._cut_residual is None
        self._summed_over = self._owed if stays and boundary.collect.op == "all_reduce" else None
        """The group, where sum, residual and norm are next to each other: one kernel may do all."""

        self._gathered_over = None
        """The group that gathers what the norm gives, which is then written to its slot."""
        if boundary.spread.op == "all_gather":
            self._gathered_over = build.group(boundary.spread.group)
        elif gathers_next and self._target is Rows.SCATTERED:
            self._gathered_over = self._attn_tp

    def _place(self, like_TD: Tensor, split: RowSplit | None) -> Tensor | None:
        """Where the norm writes, if rows like these are gathered next."""
        if self._gathered_over is None or split is None:
            return None
        to_all = self._target is Rows.FULL
        return place_for_gather(like_TD, split, self._gathered_over, to_all=to_all)

    def forward(
        self, x: Activation, residual: Activation | None, split: RowSplit | None
    ) -> tuple[Activation, Activation]:
        """(rows for the next half, residual stream). Without a residual stream, `x` begins it."""
        x_TD, rows, owed = x
        if rows is not self._source or owed is not self._owed:
            x_TD = x.addend(self._source, self._owed)
        normal_TD = None
        if self._summed_over is not None and residual is not None:
            normal_TD = all_reduce_add_norm(
                x_TD,
                residual.final(self._residual),
                self._norm.weight_D,
                self._norm.eps,
                self._summed_over,
                out=self._place(x_TD, split),
            )
        if self._collect is not None and normal_TD is None:
            x_TD = self._collect(x_TD, split)
        if residual is None:
            stream_TD, normal_TD = x_TD, self._norm.forward(x_TD, self._place(x_TD, split))
            residual = Activation(stream_TD, self._stream)
        else:
            stream_TD, at, _ = residual
            if at is not self._residual:
                stream_TD = residual.final(self._residual)
            if self._cut_residual is not None:
                stream_TD = self._cut_residual(stream_TD, split)
            if normal_TD is not None:
                pass  # added, and normalised
            elif self._widen is None:
                normal_TD = self._norm.add(x_TD, stream_TD, self._place(stream_TD, split))
            else:
                stream_TD = out_of_slot(self._widen(stream_TD.add_(x_TD), split), self._attn_tp)
                normal_TD = self._norm.forward(stream_TD, self._place(stream_TD, split))
        if self._spread is not None:
            normal_TD = self._spread(normal_TD, split)
        if stream_TD is not residual.tensor:
            residual = Activation(stream_TD, self._stream)
        return Activation(normal_TD, self._target), residual


def _mover(move: Move, build: Build) -> Mover | None:
    """What makes `move`; None where rows stay as they are."""
    if move.op is None:
        return None if move.source is move.target else _with_split(take_share)
    group = build.group(move.group)
    if move.op == "all_reduce":
        return lambda x_TD, split: all_reduce(x_TD, group)
    if move.op == "reduce_scatter":
        return _over(sum_to_share if move.source is Rows.FULL else sum_to_shares, group)
    if move.op == "all_gather":
        return _over(gather_all if move.target is Rows.FULL else gather_replica, group)
    raise PlanError(f"no boundary moves rows by {move.op}")


def _over(function: Callable[[Tensor, RowSplit, Group], Tensor], group: Group) -> Mover:
    return _with_split(lambda x_TD, split: function(x_TD, split, group))


def _with_split(function: Callable[[Tensor, RowSplit], Tensor]) -> Mover:
    def move(x_TD: Tensor, split: RowSplit | None) -> Tensor:
        if split is None:
            raise PlanError(
                "rows are moved between ranks in a step that does not say whose they are"
            )
        return function(x_TD, split)

    return move
