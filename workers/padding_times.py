"""What padding costs on this machine: the exchange of attention replicas' rows, and their MLPs.

Timed once, before the rank is ready, through the functions that a step uses, on its transports and
from its memory. `parallel.padding_cost` says what the driver makes of the curves. What a rank times
is its own; which sizes are timed is agreed, because an exchange is collective.
"""

import math
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from parallel.dp_attention import Activation, RowSplit, gather_all, place_for_gather, sum_to_share
from parallel.groups import Group, Groups
from parallel.padding_cost import PaddingCurves
from parallel.plan import Plan, Rows
from parallel.symmetric import place_in_slot
from workers.config import EngineConfig
from workers.layers.moe import MLP
from workers.models import Model

FEW, MANY = 1, 256
"""Rows of every rank's share that are timed first, the second as far as a step has so many: apart,
so that what a row costs is told from what a call costs."""
SHARES = (FEW, MANY, 32, 2048, 8, 128, 512, 8192, 64, 1024, 4096, 16, 4, 2)
"""In this order, as far as time allows. Between two sizes figures lie on a line: with all powers of
two the choice is within 3 % of the better one where cost has kinks (a matrix product is bound by
its weights, then by its rows), with every eighth 19 % off (`tests/parallel/test_padding_choice`).
"""
LIMIT_S = 0.8
"""A size that would likely end later is left out; the first two never are."""
NUM_TRIES = 5
"""The quickest counts."""
NUM_CALLS = 4
"""In a try on a GPU, whose clock is coarse."""

Call = Callable[[], object]


def exchanges_of(plan: Plan) -> int:
    """In how many layers rows of different attention replicas are brought together, and apart."""
    if plan.layout.attn_dp_size == 1:
        return 0
    return sum(mlp.rows is Rows.FULL for mlp in plan.mlps)


def shares_up_to(most: int) -> tuple[int, ...]:
    """Rows of a rank's share that are timed where a step's largest has `most`, in their order.

    >>> shares_up_to(100)
    (1, 100, 32, 8, 64, 16, 4, 2)
    """
    return tuple(dict.fromkeys(min(share, max(FEW, most)) for share in SHARES))


def time_padding(config: EngineConfig, plan: Plan, model: Model, groups: Groups) -> PaddingCurves:
    """The curves of this rank; every rank of the domain comes here at the same point."""
    num_layers = exchanges_of(plan)
    kinds = _kinds(model.mlps, plan)
    most = config.max_num_batched_tokens // (groups.attn_cp.size * groups.attn_tp.size)
    points: list[tuple[int, float, float, float, float]] = []
    took: list[float] = []
    for share in shares_up_to(most):
        if len(took) > 1 and sum(took) + took[1] * max(1.0, share / MANY) > LIMIT_S:
            continue
        began = time.perf_counter()
        size = _Size(share, model, groups)
        calls = [size.exchange(None), size.exchange(False), size.exchange(True)]
        calls += [size.compute(mlp) for mlp, _ in kinds]
        equal, slots, buffer, *mlps = _quickest(calls, groups.tp, model.device)
        computed = sum(micros * count for micros, (_, count) in zip(mlps, kinds, strict=True))
        exchanged = (equal * num_layers, slots * num_layers, buffer * num_layers)
        points.append((size.num_rows, *exchanged, computed))
        took.append(_summed(time.perf_counter() - began, groups.tp, model.device) / groups.tp.size)
    groups.arena.rows_are_even = True
    groups.ledger.cut()
    return PaddingCurves(*zip(*sorted(points), strict=True))


def _kinds(mlps: Sequence[MLP], plan: Plan) -> list[tuple[MLP, int]]:
    """A dense and a sparse MLP that work on all replicas' rows, and how many are like each."""
    found: list[tuple[MLP, int]] = []
    for kind in (False, True):
        alike = [
            mlp
            for mlp, place, is_sparse in zip(mlps, plan.mlps, plan.model.sparse, strict=True)
            if place.rows is Rows.FULL and is_sparse is kind
        ]
        if alike:
            found.append((alike[0], len(alike)))
    return found


class _Size:
    """A step of so many rows in every rank's share, all of them padding but one."""

    def __init__(self, share: int, model: Model, groups: Groups) -> None:
        self._groups = groups
        self._width, self._like = (
            model.hidden_size,
            torch.empty(0, dtype=model.dtype).to(model.device),
        )
        attn_tp = groups.attn_tp.size
        num_parts = groups.tp.size // attn_tp
        self._even = (share * attn_tp,) * num_parts
        self._uneven = (*self._even[1:], (share - 1) * attn_tp)
        self.num_rows = sum(self._even)
        """Of all replicas, padded to the longest."""

    def exchange(self, in_one_buffer: bool | None) -> Call:
        """Rows of all replicas brought together, and their products apart.

        None is for equal shares; else those of one part are a row shorter.
        """
        tp = self._groups.tp
        split = self._split(self._even if in_one_buffer is None else self._uneven, in_one_buffer)
        self._announce(split)
        share_SD = self._like.new_zeros(split.num_share, self._width)
        place = place_for_gather(share_SD, split, tp, to_all=True)
        share_SD = share_SD if place is None else place.zero_()
        shape = (split.total, self._width)
        product = place_in_slot(tp, shape, self._like, op="reduce_scatter")
        product_ND = self._like.new_zeros(shape) if product is None else product.zero_()

        def call() -> Tensor:
            self._announce(split)
            gather_all(share_SD, split, tp)
            return sum_to_share(product_ND, split, tp)

        return call

    def compute(self, mlp: MLP) -> Call:
        """An MLP on the rows of all replicas."""
        split = self._split(self._even, None)
        x_ND = self._like.new_ones(split.total, self._width)

        def call() -> Activation:
            self._announce(split)
            return mlp.forward(Activation(x_ND, Rows.FULL), split)

        return call

    def _announce(self, split: RowSplit) -> None:
        """What a step tells the arena."""
        self._groups.arena.rows_are_even = split.is_even

    def _split(self, rows: tuple[int, ...], in_one_buffer: bool | None) -> RowSplit:
        groups = self._groups
        return RowSplit(
            rows=rows,
            num_real=(1, *(0,) * (len(rows) - 1)),
            attn_tp=groups.attn_tp.size,
            part=groups.attn_dp.rank * groups.attn_cp.size + groups.attn_cp.rank,
            place=groups.attn_tp.rank,
            in_one_buffer=in_one_buffer,
            upload=lambda array: torch.from_numpy(array).to(self._like.device),
        )


def _quickest(calls: Sequence[Call], tp: Group, device: torch.device) -> list[float]:
    """Microseconds of each, the quickest of some tries in turn, which all ranks begin together."""
    for call in calls:
        call()  # what is set up at the first time is not timed
    best = [math.inf] * len(calls)
    for _ in range(NUM_TRIES):
        for place, call in enumerate(calls):
            _summed(0.0, tp, device)
            best[place] = min(best[place], _micros(call, device))
    return best


def _micros(call: Call, device: torch.device) -> float:
    if device.type != "cuda":
        began = time.perf_counter()
        call()
        return (time.perf_counter() - began) * 1e6
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    start.record()
    for _ in range(NUM_CALLS):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3 / NUM_CALLS


def _summed(value: float, tp: Group, device: torch.device) -> float:
    """Over the ranks, the same on all; nobody goes on before all have come."""
    if tp.transport is None:
        raise TypeError(f"group {tp.name} of ranks {tp.members} has no communicator")
    total = torch.tensor([value], device=device)
    tp.transport.all_reduce(total)
    return total.item()
