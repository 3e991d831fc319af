"""A sparse layer: a router chooses a few experts for each row, and their outputs are mixed.

Experts are split over moe_ep by whole experts (padded where they do not divide) and over moe_tp by
intermediate columns. Every rank of tp routes all rows alike, computes its share, and one
all-reduce over tp at the end sums them.

The three ways of computing the experts are one function of their arguments; which is quickest
depends on the number of rows and on whether the host may look at the choice.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from parallel.collectives import all_reduce
from workers.errors import BadSplit
from workers.layers.build import Build, even_share, padded_share
from workers.layers.mlp import silu_and_multiply
from workers.models.config import MoeConfig
from workers.weights import OneOf, Part, Source, everything

MAX_GATHERED = 64
"""Choices up to which a GPU copies the experts' weights instead of asking who was chosen."""


class ExpertNames(NamedTuple):
    """How a checkpoint calls a sparse layer's tensors; `{expert}` stands for the number."""

    router: str
    gate: str
    up: str
    down: str


class FusedExpertNames(NamedTuple):
    """The same with all experts of a layer in one tensor, gate above up."""

    router: str
    gate_up: str
    down: str


class Routing(NamedTuple):
    """For every row its K experts and what each counts."""

    weight_TK: Tensor
    expert_TK: Tensor


def route(logits_TE: Tensor, num_chosen: int, *, normalise: bool) -> Routing:
    """The likeliest experts, by a softmax over all of them in float32."""
    probs_TE = F.softmax(logits_TE, dim=-1, dtype=torch.float32)
    weight_TK, expert_TK = probs_TE.topk(num_chosen, dim=-1)
    if normalise:
        weight_TK /= weight_TK.sum(-1, keepdim=True)
    return Routing(weight_TK.to(logits_TE.dtype), expert_TK)


class Experts:
    """This rank's experts, and the three ways to apply them to rows.

    Choices of other ranks' experts add nothing.
    """

    def __init__(self, gate_up_END: Tensor, down_EDI: Tensor, first: int, num_real: int) -> None:
        self.gate_up_END = gate_up_END
        self.down_EDI = down_EDI
        self.first = first
        self.num_real = num_real
        """Experts that are not padding."""
        self._each = tuple(zip(gate_up_END.unbind(), down_EDI.unbind(), strict=True))

    def apply(self, x_TD: Tensor, routing: Routing) -> Tensor:
        if x_TD.is_cuda and routing.expert_TK.numel() <= MAX_GATHERED:
            return self.apply_gathered(x_TD, routing)
        if x_TD.shape[0] == 1:
            return self.apply_to_one_row(x_TD, routing)
        return self.apply_by_expert(x_TD, routing)

    def apply_to_one_row(self, x_1D: Tensor, routing: Routing) -> Tensor:
        """The chosen experts in turn; nothing is moved."""
        out_1D = torch.zeros_like(x_1D)
        chosen, weights = routing.expert_TK[0].tolist(), routing.weight_TK[0].tolist()
        for expert, weight in zip(chosen, weights, strict=True):
            local = expert - self.first
            if 0 <= local < self.num_real:
                out_1D.add_(self._one(local, x_1D), alpha=weight)
        return out_1D

    def apply_by_expert(self, x_TD: Tensor, routing: Routing) -> Tensor:
        """Sort the choices by expert; each expert that is hit computes its rows together."""
        num_chosen = routing.expert_TK.shape[1]
        expert_N = routing.expert_TK.flatten()
        order_N = expert_N.argsort(stable=True)
        row_N = order_N.div(num_chosen, rounding_mode="floor")
        ends = expert_N.bincount(minlength=self.first + self.num_real).cumsum(0).tolist()
        x_ND = x_TD.index_select(0, row_N)
        weight_N1 = routing.weight_TK.flatten().index_select(0, order_N).unsqueeze(1)
        out_TD = torch.zeros_like(x_TD)
        start = ends[self.first - 1] if self.first else 0
        for local in range(self.num_real):
            end = ends[self.first + local]
            if end > start:
                y_nD = self._one(local, x_ND[start:end]).mul_(weight_N1[start:end])
                out_TD.index_add_(0, row_N[start:end], y_nD)
            start = end
        return out_TD

    def apply_gathered(self, x_TD: Tensor, routing: Routing) -> Tensor:
        """Copy the chosen experts' weights, one set a choice: the host need not know which."""
        if self.num_real == 0:
            return torch.zeros_like(x_TD)
        num_rows, num_chosen = routing.expert_TK.shape
        local_TK = routing.expert_TK - self.first
        mine_TK = (local_TK >= 0) & (local_TK < self.num_real)
        local_N = local_TK.clamp(0, self.num_real - 1).flatten()
        x_ND1 = x_TD.repeat_interleave(num_chosen, 0).unsqueeze(2)
        gate_up_N2I = torch.bmm(self.gate_up_END[local_N], x_ND1).squeeze(2)
        y_ND1 = torch.bmm(self.down_EDI[local_N], silu_and_multiply(gate_up_N2I).unsqueeze(2))
        weight_TK1 = (routing.weight_TK * mine_TK).unsqueeze(2)
        return (y_ND1.view(num_rows, num_chosen, -1) * weight_TK1).sum(1)

    def _one(self, local: int, x_TD: Tensor) -> Tensor:
        gate_up_ND, down_DI = self._each[local]
        return F.linear(silu_and_multiply(F.linear(x_TD, gate_up_ND)), down_DI)


class SparseMLP:
    def __init__(
        self,
        build: Build,
        moe: MoeConfig,
        names: ExpertNames,
        fused_names: FusedExpertNames,
        *,
        norm_topk_prob: bool,
    ) -> None:
        groups, hidden = build.groups, build.config.hidden_size
        if groups.moe_dp.size > 1:
            raise BadSplit(
                f"moe_dp_size={groups.moe_dp.size}: replicated experts need their rows split "
                "first, which is not offered; set moe_dp_size to 1"
            )
        self._moe, self._names, self._fused_names = moe, names, fused_names
        self._norm_topk_prob = norm_topk_prob
        self._group = groups.tp
        self._columns = even_share(moe.intermediate_size, groups.moe_tp, names.down)
        self._experts, num_slots = padded_share(moe.num_experts, groups.moe_ep)
        width = moe.intermediate_size // groups.moe_tp.size
        self._router_ED = build.empty(moe.num_experts, hidden)
        self._gate_up_END = build.zeros(num_slots, 2 * width, hidden)
        self._down_EDI = build.zeros(num_slots, hidden, width)
        first, num_real = self._experts.start, self._experts.stop - self._experts.start
        self.experts = Experts(self._gate_up_END, self._down_EDI, first, num_real)

    def forward(self, x_TD: Tensor) -> Tensor:
        logits_TE = F.linear(x_TD, self._router_ED)
        chosen = self._moe.num_experts_per_token
        routing = route(logits_TE, chosen, normalise=self._norm_topk_prob)
        return all_reduce(self.experts.apply(x_TD, routing), self._group)

    def sources(self) -> list[Source | OneOf]:
        return [OneOf((self._sources_by_expert(), self._fused_sources()))]

    def _sources_by_expert(self) -> tuple[Source, ...]:
        names, hidden = self._names, self._router_ED.shape[1]
        width, every = self._moe.intermediate_size, slice(0, hidden)
        split = self._gate_up_END.shape[1] // 2
        sources = [everything(self._router_ED, names.router, "normal")]
        for expert in range(self._moe.num_experts):
            gate, up, down = (), (), ()
            if self._experts.start <= expert < self._experts.stop:
                gate_up_ND = self._gate_up_END[expert - self._experts.start]
                gate = (Part((self._columns, every), gate_up_ND[:split]),)
                up = (Part((self._columns, every), gate_up_ND[split:]),)
                down_DI = self._down_EDI[expert - self._experts.start]
                down = (Part((every, self._columns), down_DI),)
            for name, shape, parts in (
                (names.gate, (width, hidden), gate),
                (names.up, (width, hidden), up),
                (names.down, (hidden, width), down),
            ):
                sources.append(Source(name=name.format(expert=expert), shape=shape, parts=parts))
        return tuple(sources)

    def _fused_sources(self) -> tuple[Source, ...]:
        names, hidden = self._fused_names, self._router_ED.shape[1]
        count, width, every = self._moe.num_experts, self._moe.intermediate_size, slice(0, hidden)
        num_real = self._experts.stop - self._experts.start
        split = self._gate_up_END.shape[1] // 2
        gate_up_END, down_EDI = self._gate_up_END[:num_real], self._down_EDI[:num_real]
        below = slice(width + self._columns.start, width + self._columns.stop)
        gate = Part((self._experts, self._columns, every), gate_up_END[:, :split])
        up = Part((self._experts, below, every), gate_up_END[:, split:])
        down = Part((self._experts, every, self._columns), down_EDI)
        shape = (count, 2 * width, hidden)
        return (
            everything(self._router_ED, names.router, "normal"),
            Source(name=names.gate_up, shape=shape, parts=(gate, up) if num_real else ()),
            Source(
                name=names.down, shape=(count, hidden, width), parts=(down,) if num_real else ()
            ),
        )
