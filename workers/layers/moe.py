"""A sparse layer: a router chooses a few experts for each row, and their outputs are mixed.

Experts are split over moe_ep by whole experts (padded where they do not divide) and over moe_tp by
intermediate columns. Either every rank routes all rows alike and computes its share, and the sum is
owed over tp; or rows are scattered, and an all-to-all takes each to its experts and back
(`workers.layers.dispatch`). Rows of padding choose no expert.

The ways of computing the experts are one function of their arguments; which is quickest depends on
the device and the number of rows.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from kernels.expert_tiles import RULE, ExpertShape, TileTable, read_table
from parallel.dp_attention import Activation, RowSplit
from parallel.plan import Op, Place
from parallel.symmetric import place_in_slot
from workers.layers.build import Build, even_share, padded_share
from workers.layers.dispatch import AllToAll, Routing
from workers.layers.fast import float32_linear, linear, silu_and_multiply
from workers.model_config import MoeConfig
from workers.weights import OneOf, Part, Source, everything

MAX_WAITING = 64
"""Steps whose choices wait to be counted together."""


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


class MLP(Protocol):
    """The second half of a layer: dense or sparse."""

    def forward(self, x: Activation, split: RowSplit | None) -> Activation: ...
    def sources(self) -> Sequence[Source | OneOf]: ...


class Router(Protocol):
    """Chooses experts for rows, by a product with a vector for each expert."""

    def forward(self, x_TD: Tensor, weight_ED: Tensor) -> Routing: ...
    def sources(self) -> Sequence[Source]: ...


class SoftmaxRouter:
    """The likeliest experts, by a softmax over all of them."""

    def __init__(self, num_chosen: int, *, normalise: bool) -> None:
        self._num_chosen = num_chosen
        self._normalise = normalise

    def forward(self, x_TD: Tensor, weight_ED: Tensor) -> Routing:
        logits_TE = linear(x_TD, weight_ED)
        return route(logits_TE, self._num_chosen, normalise=self._normalise)

    def sources(self) -> Sequence[Source]:
        return ()


class GroupedRouter:
    """DeepSeek's: V2 by a softmax, V3 by a sigmoid and a learned bias; all in float32."""

    def __init__(self, build: Build, moe: MoeConfig, bias_name: str | None) -> None:
        """With the name of a bias it is V3's."""
        self._moe, self._bias_name = moe, bias_name
        self._bias_E = None
        if bias_name is not None:
            self._bias_E = torch.empty(moe.num_experts, device=build.device)

    def forward(self, x_TD: Tensor, weight_ED: Tensor) -> Routing:
        return route_as_deepseek(float32_linear(x_TD, weight_ED), self._bias_E, self._moe)

    def sources(self) -> Sequence[Source]:
        if self._bias_E is None or self._bias_name is None:
            return ()
        return (everything(self._bias_E, self._bias_name, "zeros"),)


def route(logits_TE: Tensor, num_chosen: int, *, normalise: bool) -> Routing:
    """The likeliest experts, by a softmax over all of them in float32."""
    if logits_TE.is_cuda:
        from kernels.route_experts import route_experts  # Triton: only with a GPU

        return Routing(*route_experts(logits_TE, num_chosen, normalise=normalise))
    probs_TE = functional.softmax(logits_TE, dim=-1, dtype=torch.float32)
    weight_TK, expert_TK = probs_TE.topk(num_chosen, dim=-1)
    if normalise:
        weight_TK /= weight_TK.sum(-1, keepdim=True)
    return Routing(weight_TK.to(logits_TE.dtype), expert_TK)


def route_as_deepseek(logits_TE: Tensor, bias_E: Tensor | None, moe: MoeConfig) -> Routing:
    """From float32 logits: V3's choice if there is a bias, else V2's."""
    if logits_TE.is_cuda:
        from kernels.route_experts import route_groups  # Triton: only with a GPU

        made = route_groups(
            logits_TE,
            bias_E,
            moe.num_experts_per_token,
            num_groups=moe.num_groups,
            num_groups_chosen=moe.num_groups_chosen,
            normalise=moe.norm_topk_prob,
            scale=moe.scale,
        )
        return Routing(*made)
    return route_in_groups(
        logits_TE.softmax(-1) if bias_E is None else logits_TE.sigmoid(),
        bias_E,
        moe.num_experts_per_token,
        num_groups=moe.num_groups,
        num_groups_chosen=moe.num_groups_chosen,
        normalise=moe.norm_topk_prob,
        scale=moe.scale,
    )


def route_in_groups(
    score_TE: Tensor,
    bias_E: Tensor | None,
    num_chosen: int,
    *,
    num_groups: int,
    num_groups_chosen: int,
    normalise: bool,
    scale: float,
) -> Routing:
    """DeepSeek's choice: first the best groups of neighbouring experts, then experts within them.

    With a bias (V3) experts are chosen by score plus bias, a group by the sum of its two best, and
    weighted by the score alone; without (V2) a group is as good as its best expert.
    """
    biased_TE = score_TE if bias_E is None else score_TE + bias_E
    if num_groups_chosen < num_groups:
        biased_TE = _in_best_groups(biased_TE, bias_E is not None, num_groups, num_groups_chosen)
    expert_TK = biased_TE.topk(num_chosen, dim=-1).indices
    weight_TK = score_TE.gather(1, expert_TK)
    if normalise:
        weight_TK = weight_TK / (weight_TK.sum(-1, keepdim=True) + 1e-20)
    return Routing(weight_TK * scale, expert_TK)


def _in_best_groups(
    score_TE: Tensor, by_two_best: bool, num_groups: int, num_groups_chosen: int
) -> Tensor:
    """The scores, minus infinity outside the best groups."""
    grouped_TGE = score_TE.unflatten(-1, (num_groups, -1))
    if by_two_best:
        group_TG = grouped_TGE.topk(min(2, grouped_TGE.shape[-1]), dim=-1).values.sum(-1)
    else:
        group_TG = grouped_TGE.amax(-1)
    best_TG = group_TG.topk(num_groups_chosen, dim=-1).indices
    open_TG = torch.zeros_like(group_TG, dtype=torch.bool).scatter_(1, best_TG, True)
    closed_TE = ~open_TG.repeat_interleave(grouped_TGE.shape[-1], 1)
    return score_TE.masked_fill(closed_TE, -torch.inf)


class Experts:
    """This rank's experts, and the ways to apply them to rows.

    Choices of other ranks' experts, or of none, add nothing. On a CPU, sorting pays once experts
    are chosen more than once. On a GPU a kernel of ours takes all choices at once.
    """

    def __init__(
        self,
        gate_up_END: Tensor,
        down_EDI: Tensor,
        first: int,
        num_real: int,
        table: TileTable = RULE,
    ) -> None:
        """`table` is how a GPU cuts the products into tiles."""
        self._table = table
        self.gate_up_END = gate_up_END
        self.down_EDI = down_EDI
        self.first = first
        self.num_real = num_real
        """Experts that are not padding."""
        self._each = tuple(zip(gate_up_END.unbind(), down_EDI.unbind(), strict=True))

    def apply(self, x_TD: Tensor, routing: Routing, out: Tensor | None = None) -> Tensor:
        """Written to `out` where the caller has a place for it."""
        num_choices = routing.expert_TK.numel()
        if x_TD.is_cuda:
            return self.apply_fused(x_TD, routing, out)
        if num_choices <= self.num_real:
            out_TD = self.apply_in_turn(x_TD, routing)
        else:
            out_TD = self.apply_by_expert(x_TD, routing)
        return out_TD if out is None else out.copy_(out_TD)

    def apply_fused(self, x_TD: Tensor, routing: Routing, out: Tensor | None = None) -> Tensor:
        """On a GPU: the host need not know who chose whom."""
        from kernels.fused_moe import fused_moe  # Triton: only with a GPU

        return fused_moe(
            x_TD.contiguous(),
            routing.weight_TK.contiguous(),
            routing.expert_TK.contiguous(),
            self.gate_up_END,
            self.down_EDI,
            first=self.first,
            num_real=self.num_real,
            table=self._table,
            out=out,
        )

    def apply_in_turn(self, x_TD: Tensor, routing: Routing) -> Tensor:
        """One choice after another; nothing is moved."""
        out_TD = torch.zeros_like(x_TD)
        weights_TK = routing.weight_TK.tolist()
        for row, experts in enumerate(routing.expert_TK.tolist()):
            x_1D, out_1D = x_TD[row : row + 1], out_TD[row : row + 1]
            for expert, weight in zip(experts, weights_TK[row], strict=True):
                local = expert - self.first
                if 0 <= local < self.num_real:
                    out_1D.add_(self._one(local, x_1D), alpha=weight)
        return out_TD

    def apply_by_expert(self, x_TD: Tensor, routing: Routing) -> Tensor:
        """Sort the choices by expert; each expert that is hit computes its rows together."""
        num_rows, num_chosen = routing.expert_TK.shape
        expert_N = routing.expert_TK.flatten()
        num_seen = self.first + self.num_real
        counts = expert_N.bincount(minlength=num_seen)[:num_seen].tolist()
        order_N = expert_N.argsort(stable=True)
        start = sum(counts[: self.first])
        mine_N = order_N[start : start + sum(counts[self.first :])]
        x_ND = x_TD.index_select(0, mine_N.div(num_chosen, rounding_mode="floor"))
        blocks = x_ND.split(counts[self.first :])
        ys = [self._one(local, block) for local, block in enumerate(blocks) if len(block)]
        y_ND = x_TD.new_zeros(len(expert_N), x_TD.shape[1])
        if ys:
            y_ND.index_copy_(0, mine_N, torch.cat(ys))
        y_TKD = y_ND.view(num_rows, num_chosen, x_TD.shape[1])
        return torch.bmm(routing.weight_TK.to(y_TKD.dtype).unsqueeze(1), y_TKD).squeeze(1)

    def _one(self, local: int, x_TD: Tensor) -> Tensor:
        gate_up_ND, down_DI = self._each[local]
        return functional.linear(silu_and_multiply(functional.linear(x_TD, gate_up_ND)), down_DI)


def _measured_tiles(build: Build, moe: MoeConfig, width: int) -> TileTable:
    """For a layer whose experts are all here."""
    if build.device.type != "cuda":
        return RULE
    dtype = str(build.dtype).removeprefix("torch.")
    shape = ExpertShape(
        moe.num_experts, moe.num_experts_per_token, build.config.hidden_size, width, dtype
    )
    return read_table(torch.cuda.get_device_name(build.device), shape)


class ExpertLoad:
    """How often each expert was chosen by rows that this rank routed; counted on the device."""

    def __init__(self, num_experts: int, device: torch.device) -> None:
        self._counts_E = torch.zeros(num_experts + 1, dtype=torch.int64, device=device)
        """The last counts choices of none."""
        self._waiting: list[Tensor] = []

    def add(self, expert_TK: Tensor, live_T: Tensor | None = None) -> Tensor:
        """Count the choices of rows that are tokens; padding's become a choice of none."""
        if expert_TK.is_cuda:
            from kernels.route_experts import count_choices  # Triton: only with a GPU

            expert_TK = expert_TK.contiguous()
            count_choices(expert_TK, self._counts_E, live_T)
            return expert_TK
        if live_T is not None:
            expert_TK = expert_TK.masked_fill(~live_T.unsqueeze(1), len(self._counts_E) - 1)
        self._waiting.append(expert_TK)
        if len(self._waiting) == MAX_WAITING:
            self._count_waiting()
        return expert_TK

    def _count_waiting(self) -> None:
        """Many at once: on a CPU every count would cost as much as an expert."""
        if self._waiting:
            chosen_N = torch.cat([each.reshape(-1) for each in self._waiting])
            self._counts_E.index_add_(0, chosen_N, torch.ones_like(chosen_N))
            self._waiting.clear()

    def read(self) -> Tensor:
        self._count_waiting()
        return self._counts_E[:-1].clone()


class SparseMLP:
    def __init__(
        self,
        build: Build,
        moe: MoeConfig,
        names: ExpertNames,
        fused_names: FusedExpertNames,
        *,
        place: Place,
        router: Router,
        shared: MLP | None = None,
    ) -> None:
        """`shared` is an MLP that every row goes through as well, built for the same place."""
        groups, hidden = build.groups, build.config.hidden_size
        self._moe, self._names, self._fused_names = moe, names, fused_names
        self._router, self._shared = router, shared
        self._rows = place.rows
        group = build.group(place.group)
        self._owed = group if group.size > 1 else None
        self._op: Op = build.plan.sum_op(place.group)
        self._columns = even_share(moe.intermediate_size, groups.moe_tp, names.down)
        self._experts, num_slots = padded_share(moe.num_experts, groups.moe_ep)
        width = moe.intermediate_size // groups.moe_tp.size
        self._router_ED = build.empty(moe.num_experts, hidden)
        self._gate_up_END = build.zeros(num_slots, 2 * width, hidden)
        self._down_EDI = build.zeros(num_slots, hidden, width)
        first, num_real = self._experts.start, self._experts.stop - self._experts.start
        table = _measured_tiles(build, moe, width) if num_real == moe.num_experts else RULE
        self.experts = Experts(self._gate_up_END, self._down_EDI, first, num_real, table)
        self.load = ExpertLoad(moe.num_experts, build.device)
        self._all_to_all = None
        if build.plan.settings.moe_a2a_backend != "none":
            self._all_to_all = AllToAll(
                groups.moe_ep, num_experts=moe.num_experts, experts_per_rank=num_slots
            )

    def forward(self, x: Activation, split: RowSplit | None) -> Activation:
        x_TD = x.final(self._rows)
        routing = self._route(x_TD, split)
        if self._all_to_all is None:
            place_TD = None
            if self._shared is None and self._owed is not None:
                place_TD = place_in_slot(self._owed, x_TD.shape, x_TD, op=self._op)
            out_TD = self.experts.apply(x_TD, routing, place_TD)
        else:
            places = x_TD.shape[0] if split is None else split.longest
            out_TD = self._all_to_all.forward(x_TD, routing, places, self.experts.apply)
        if self._shared is not None:
            out_TD = self._shared.forward(x, split).addend(self._rows, self._owed).add_(out_TD)
        return Activation(out_TD, self._rows, self._owed)

    def _route(self, x_TD: Tensor, split: RowSplit | None) -> Routing:
        routing = self._router.forward(x_TD, self._router_ED)
        live_T = None if split is None else split.live(self._rows)
        return Routing(routing.weight_TK, self.load.add(routing.expert_TK, live_T))

    def sources(self) -> list[Source | OneOf]:
        shared = [] if self._shared is None else self._shared.sources()
        experts = OneOf((self._sources_by_expert(), self._fused_sources()))
        return [experts, *self._router.sources(), *shared]

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
