"""Which collectives a model's layers need, worked out once from sizes, settings and layers.

A step's rows lie in one of three layouts (`Rows`). Attention and the MLP of a layer each want
theirs, and between the two is a `Boundary`: the rows are summed over the group that still owes a
sum, added to the residual stream, normalised, and brought to where they are wanted. `compile_plan`
says for every boundary which collectives that takes, over which group, and refuses with a sentence
what it cannot do. `workers.layers.communicator` executes boundaries; the driver reads
`row_multiple` off the plan to pad with; `lockstep plan` prints it.

Context parallelism (`parallel.context`) splits a replica's rows over its attn_cp parts. Outside
attention a part is like a replica: TP_ATTN_FULL are the rows of one part, FULL those of all parts
of all replicas. Inside attention what rows leave in the cache is gathered over attn_cp, and behind
the last layer the rows that the head reads are.

Arithmetic only: no torch, no process group. Whether a step's replicas hold equal numbers of rows
(`parallel.padding`) does not change the plan, only how many rows its collectives move.

    >>> layers = ModelLayers("Qwen3MoeForCausalLM", sparse=(False, True))
    >>> layout = Layout(tp_size=4, dp_size=2, enable_dp_attention=True)
    >>> plan = compile_plan(layout, PlanSettings(), layers)
    >>> [str(one) for one in plan.boundaries[1].collectives]
    ['reduce_scatter over attn_tp', 'all_gather over tp']
    >>> plan.row_multiple, plan.require_gathered_buffer
    (2, True)
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Literal, NamedTuple

from parallel.layout import GroupName, Layout

A2ABackend = Literal["none", "torch"]
Op = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all"]


class PlanError(ValueError):
    """A combination that no plan exists for; the message says which setting to change."""


class Rows(Enum):
    """Where the rows of a step are. Four ranks, two replicas with rows ab and cd:

    SCATTERED a|b|c|d, TP_ATTN_FULL ab|ab|cd|cd, FULL abcd on all ranks. The same if they are the
    two parts of one replica.
    """

    SCATTERED = "SCATTERED"
    TP_ATTN_FULL = "TP_ATTN_FULL"
    FULL = "FULL"


class Collective(NamedTuple):
    """One collective and the group it runs over."""

    op: Op
    group: GroupName

    def __str__(self) -> str:
        return f"{self.op} over {self.group}"


class Place(NamedTuple):
    """Where a layer works: on which rows, and over which ranks its weights are split."""

    rows: Rows
    group: GroupName | None
    """None: every rank holds the whole layer."""


class Move(NamedTuple):
    """Rows from one layout to another, with at most one collective.

    With `op` None, rows stay or a rank keeps the part of them that it has already.
    """

    source: Rows
    target: Rows
    op: Op | None = None
    group: GroupName | None = None

    @property
    def collectives(self) -> tuple[Collective, ...]:
        return (Collective(self.op, self.group),) if self.op and self.group else ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Boundary:
    """From one half of a layer to the next, through the residual stream and a norm.

    First `collect` brings what came to `collect.target` and takes the sum that `owed` owes; there
    it is added to the residual stream. `widen` then moves the stream itself, if the next halves
    want it whole. The norm is computed on `widen.target`, and `spread` brings its rows on.
    """

    owed: GroupName | None
    """The group over which what comes in is yet to be summed."""
    residual: Rows
    """Where the residual stream is when the boundary begins; it goes on from `widen.target`."""
    collect: Move
    widen: Move
    spread: Move

    @property
    def collectives(self) -> tuple[Collective, ...]:
        return (*self.collect.collectives, *self.widen.collectives, *self.spread.collectives)


class PlanSettings(NamedTuple):
    """The settings that a plan depends on, beside the layout."""

    enable_dp_lm_head: bool = False
    moe_a2a_backend: A2ABackend = "none"
    disable_attn_tp_gather: bool = False


class ModelLayers(NamedTuple):
    """What a plan must know of a model."""

    architecture: str
    sparse: tuple[bool, ...]
    """For each layer whether its MLP is a mixture of experts."""
    gathers_in_attention: bool = False
    """Its attention can gather and scatter rows itself, inside the block."""


class Stage(NamedTuple):
    """One place in the model and its collectives, for a reader."""

    layer: int | None
    where: str
    path: tuple[Rows, ...]
    """The layouts that rows go through here."""
    owed: GroupName | None
    """Who owes a sum when rows come here."""
    collectives: tuple[Collective, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What every rank of a domain does between layers, the same on all of them."""

    layout: Layout
    settings: PlanSettings
    model: ModelLayers
    attention: Place
    mlps: tuple[Place, ...]
    head: Place
    boundaries: tuple[Boundary, ...]
    """Into attention and into the MLP of every layer, in order, and into the head."""

    @property
    def digest(self) -> bytes:
        """16 bytes that stand for all of the plan (BLAKE2b)."""
        return hashlib.blake2b(repr(self).encode(), digest_size=16).digest()

    @property
    def head_spans_replicas(self) -> bool:
        """All replicas' rows meet in the head, so each says in a step's header how many it has."""
        return self.head.rows is Rows.FULL

    def into_attention(self, layer: int) -> Boundary:
        return self.boundaries[2 * layer]

    def into_mlp(self, layer: int) -> Boundary:
        return self.boundaries[2 * layer + 1]

    @property
    def into_head(self) -> Boundary:
        return self.boundaries[-1]

    def stages(self) -> Iterator[Stage]:
        """All of a forward pass, in order."""
        full, attn_tp = Rows.TP_ATTN_FULL, self.layout.attn_tp_size > 1
        context = (Collective("all_gather", "attn_cp"),) if self.layout.attn_cp_size > 1 else ()
        embedding = (Collective("all_reduce", "attn_tp"),) if attn_tp else ()
        yield Stage(None, "embedding", (full,), None, embedding)
        for layer, mlp in enumerate(self.mlps):
            yield _stage(layer, "into attention", self.into_attention(layer))
            if self.attention.rows is Rows.SCATTERED:
                path, owed = (Rows.SCATTERED, full, Rows.SCATTERED), None
                inside = (
                    Collective("all_gather", "attn_tp"),
                    *context,
                    Collective("reduce_scatter", "attn_tp"),
                )
            else:
                path, owed, inside = (full,), None, context
            yield Stage(layer, "attention", path, owed, inside)
            kind = "experts" if self.model.sparse[layer] else "dense MLP"
            yield _stage(layer, f"into {kind}", self.into_mlp(layer))
            yield Stage(layer, kind, (mlp.rows,), None, self._inside_mlp(layer))
        yield _stage(None, "into head", self.into_head)
        yield Stage(None, "logits", (self.head.rows,), None, self._logits())

    @property
    def collectives(self) -> tuple[Collective, ...]:
        return tuple(one for stage in self.stages() for one in stage.collectives)

    @property
    def is_scattered(self) -> bool:
        """Whether anywhere a rank holds only its share of its replica's rows."""
        if self.layout.attn_tp_size == 1:
            return False
        moves = [m for b in self.boundaries for m in (b.collect, b.widen, b.spread)]
        return any(Rows.SCATTERED in (move.source, move.target) for move in moves)

    @property
    def row_multiple(self) -> int:
        """What a replica's rows are padded to a multiple of, so that its parts are alike."""
        num_parts = self.layout.attn_cp_size
        if self.attention.rows is Rows.SCATTERED:
            return num_parts  # the block pads inside its own collectives
        return num_parts * (self.layout.attn_tp_size if self.is_scattered else 1)

    def sum_op(self, group: GroupName | None) -> Op:
        """How the sum of products split over `group` is taken; both ways count as reduce-scatter,
        which is the choosier of its memory."""
        ops = {boundary.collect.op for boundary in self.boundaries if boundary.owed == group}
        if self.attention.rows is Rows.SCATTERED and group == self.attention.group:
            ops.add("reduce_scatter")
        return "reduce_scatter" if "reduce_scatter" in ops else "all_reduce"

    @property
    def crosses_replicas(self) -> bool:
        """Whether ranks of different attention replicas meet in any collective of a step."""
        return any(self._crosses(one.group) for one in set(self.collectives))

    @property
    def require_mlp_tp_gather(self) -> bool:
        """Rows of all replicas, or of all parts of one, are gathered, for an MLP or the head."""
        if self.layout.num_parts == 1:
            return False
        return self.head.rows is Rows.FULL or any(mlp.rows is Rows.FULL for mlp in self.mlps)

    @property
    def require_attn_tp_gather(self) -> bool:
        """Between layers, rows scattered over attn_tp for an MLP are gathered for attention."""
        if self.attention.rows is Rows.SCATTERED:
            return False
        return any(mlp.rows is Rows.SCATTERED for mlp in self.mlps)

    @property
    def require_gathered_buffer(self) -> bool:
        return self.require_mlp_tp_gather or self.require_attn_tp_gather

    @property
    def require_mlp_sync(self) -> bool:
        """Ranks must know more of a step than their own rows. The header tells them, at no cost."""
        return self.crosses_replicas or self.require_gathered_buffer

    def _crosses(self, group: GroupName) -> bool:
        layout = self.layout
        members = layout.members(group, 0)
        return len({layout.coordinates(rank).attn_dp for rank in members}) > 1

    def _inside_mlp(self, layer: int) -> tuple[Collective, ...]:
        """An all-to-all dispatcher's: rows, their choices, and the results back."""
        scattered = self.settings.moe_a2a_backend != "none" and self.layout.ep_size > 1
        if self.model.sparse[layer] and scattered:
            return (Collective("all_to_all", "moe_ep"),) * 3
        return ()

    def _logits(self) -> tuple[Collective, ...]:
        context = (Collective("all_gather", "attn_cp"),) if self.layout.attn_cp_size > 1 else ()
        if self.head.rows is Rows.FULL:
            return *context, Collective("all_gather", "attn_dp"), Collective("all_to_all", "tp")
        if self.head.group is not None:
            return *context, Collective("all_gather", self.head.group)
        return context


def compile_plan(layout: Layout, settings: PlanSettings, model: ModelLayers) -> Plan:
    """The plan of a model on a layout; a `PlanError` if there is none."""
    _refuse(layout, settings, model)
    shape = _Shape(layout)
    inside = settings.disable_attn_tp_gather and model.gathers_in_attention
    attention = Place(
        shape.rows(Rows.SCATTERED) if inside else Rows.TP_ATTN_FULL, shape.group("attn_tp")
    )
    mlps = tuple(_mlp_place(shape, settings, is_sparse) for is_sparse in model.sparse)
    streams = [_stream(shape, attention, mlp) for mlp in mlps]
    boundaries: list[Boundary] = []
    came, owed, residual = Rows.TP_ATTN_FULL, None, Rows.TP_ATTN_FULL
    for layer, (mlp, stream) in enumerate(zip(mlps, streams, strict=True)):
        first = _into_attention(shape, came, owed, residual, attention.rows, stream)
        residual = first.widen.target
        owed = None if attention.rows is Rows.SCATTERED else attention.group
        second = _into_mlp(shape, attention.rows, owed, residual, mlp.rows, stream)
        boundaries += [first, second]
        residual = second.widen.target
        came, owed = mlp.rows, _owed_by_mlp(shape, settings, mlp, model.sparse[layer])
    last = _into_attention(shape, came, owed, residual, Rows.TP_ATTN_FULL, None)
    spans = layout.attn_dp_size > 1 and not settings.enable_dp_lm_head
    return Plan(
        layout=layout,
        settings=settings,
        model=model,
        attention=attention,
        mlps=mlps,
        head=Place(Rows.FULL, "tp") if spans else Place(Rows.TP_ATTN_FULL, _head_group(shape)),
        boundaries=(*boundaries, last),
    )


def _head_group(shape: "_Shape") -> GroupName | None:
    """Over which ranks the head of one replica is split: they have all its logit rows.

    A replica's parts do, once those are gathered. The group of all its ranks has a name only if
    there is one replica.
    """
    alone = shape.layout.attn_dp_size == 1 and shape.layout.attn_cp_size > 1
    return shape.group("tp" if alone else "attn_tp")


class _Shape(NamedTuple):
    """The layout, as far as it decides which row layouts are the same."""

    layout: Layout

    def rows(self, rows: Rows) -> Rows:
        """One name for layouts that hold the same rows on every rank."""
        if rows is Rows.FULL and self.layout.num_parts == 1:
            return Rows.TP_ATTN_FULL
        if rows is Rows.SCATTERED and self.layout.attn_tp_size == 1:
            return Rows.TP_ATTN_FULL
        return rows

    def group(self, name: GroupName) -> GroupName | None:
        """The group, unless it is one rank."""
        return name if len(self.layout.members(name, 0)) > 1 else None

    def move(self, source: Rows, target: Rows, owed: GroupName | None) -> Move:
        """Take the sum that `owed` owes, if any, and end in `target`."""
        if source is target:
            return Move(source, target, "all_reduce" if owed else None, owed)
        if source is Rows.TP_ATTN_FULL and target is Rows.SCATTERED:
            return Move(source, target, "reduce_scatter" if owed else None, owed)
        if source is Rows.FULL and target is not Rows.FULL and owed == "tp":
            return Move(source, target, "reduce_scatter", "tp")
        if owed is None and target is Rows.FULL:
            return Move(source, target, "all_gather", "tp")
        if owed is None and source is Rows.SCATTERED and target is Rows.TP_ATTN_FULL:
            return Move(source, target, "all_gather", "attn_tp")
        raise PlanError(
            f"rows in layout {source.value} that owe a sum over {owed or 'no group'} cannot be "
            f"brought to {target.value} with one collective"
        )


def _mlp_place(shape: _Shape, settings: PlanSettings, is_sparse: bool) -> Place:
    layout = shape.layout
    if is_sparse:
        if settings.moe_a2a_backend != "none":
            return Place(shape.rows(Rows.SCATTERED), None)
        return Place(shape.rows(Rows.FULL), shape.group("tp"))
    if layout.moe_dense_tp_size in (None, layout.tp_size):
        return Place(shape.rows(Rows.FULL), shape.group("tp"))
    if layout.moe_dense_tp_size == layout.attn_tp_size:
        return Place(Rows.TP_ATTN_FULL, shape.group("attn_tp"))
    return Place(shape.rows(Rows.SCATTERED), None)


def _owed_by_mlp(
    shape: _Shape, settings: PlanSettings, mlp: Place, is_sparse: bool
) -> GroupName | None:
    if is_sparse and settings.moe_a2a_backend != "none":
        return None
    return mlp.group


def _stream(shape: _Shape, attention: Place, mlp: Place) -> Rows:
    """Where the residual stream is while a layer's MLP works."""
    if attention.rows is Rows.SCATTERED:
        return Rows.SCATTERED
    return mlp.rows if mlp.rows is Rows.TP_ATTN_FULL else shape.rows(Rows.SCATTERED)


def _into_attention(
    shape: _Shape,
    came: Rows,
    owed: GroupName | None,
    residual: Rows,
    target: Rows,
    stream: Rows | None,
) -> Boundary:
    """From an MLP, or the embedding, to attention; `stream` is what the layer after it wants.

    Rows that come scattered are added scattered. Where the next MLP wants the stream whole, the
    sum is gathered and normalised after that; else its norm is computed on fewer rows first.
    """
    at = came
    if came is Rows.FULL or Rows.SCATTERED in (target, residual):
        at = shape.rows(Rows.SCATTERED)
    whole = at is Rows.SCATTERED and target is stream is Rows.TP_ATTN_FULL
    norm = target if whole else at
    return Boundary(
        owed=owed,
        residual=residual,
        collect=shape.move(came, at, owed),
        widen=shape.move(at, norm, None),
        spread=shape.move(norm, target, None),
    )


def _into_mlp(
    shape: _Shape,
    came: Rows,
    owed: GroupName | None,
    residual: Rows,
    target: Rows,
    stream: Rows,
) -> Boundary:
    return Boundary(
        owed=owed,
        residual=residual,
        collect=shape.move(came, stream, owed),
        widen=Move(stream, stream),
        spread=shape.move(stream, target, None),
    )


def _stage(layer: int | None, where: str, boundary: Boundary) -> Stage:
    moves = (boundary.collect, boundary.widen, boundary.spread)
    path = [boundary.collect.source]
    path += [move.target for move in moves if move.target is not move.source]
    return Stage(layer, where, tuple(path), boundary.owed, boundary.collectives)


def _refuse(layout: Layout, settings: PlanSettings, model: ModelLayers) -> None:
    reason = next(_reasons(layout, settings, model), None)
    if reason is not None:
        raise PlanError(reason)


def _reasons(layout: Layout, settings: PlanSettings, model: ModelLayers) -> Iterator[str]:
    """Why there is no plan, the first thing to change first."""
    backend, ep = settings.moe_a2a_backend, layout.ep_size
    if settings.enable_dp_lm_head and not layout.enable_dp_attention:
        yield (
            "enable_dp_lm_head splits the head within attention replicas, and there is one "
            "without enable_dp_attention: set that too, or leave it off"
        )
    if settings.disable_attn_tp_gather and not model.gathers_in_attention:
        yield (
            f"disable_attn_tp_gather is for models that gather and scatter rows inside attention, "
            f"and {model.architecture} is none: leave it off"
        )
    if not any(model.sparse):
        if backend != "none":
            yield f"moe_a2a_backend={backend}: {model.architecture} has no experts to send rows to"
        if ep > 1 or layout.moe_dp_size > 1:
            yield (
                f"ep_size={ep}, moe_dp_size={layout.moe_dp_size}: {model.architecture} has no "
                "experts to place; set both to 1"
            )
        return
    if backend == "none" and layout.moe_dp_size > 1:
        yield (
            f"moe_dp_size={layout.moe_dp_size}: replicated experts take rows that are scattered, "
            "so moe_a2a_backend must be torch; or set moe_dp_size to 1"
        )
    if backend != "none" and layout.moe_tp_size > 1:
        yield (
            f"moe_a2a_backend={backend} sends rows to whole experts, and ep_size={ep} x "
            f"moe_dp_size={layout.moe_dp_size} leaves each split over {layout.moe_tp_size} ranks: "
            f"set ep_size to {layout.tp_size // layout.moe_dp_size}"
        )
