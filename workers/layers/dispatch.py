"""How rows reach the ranks that hold their experts, and how the results come back.

Without an all-to-all back end there is nothing here to do: the plan has gathered all rows, every
rank applies its experts to all of them, and the sum behind the layer brings the results home.

`AllToAll` takes scattered rows instead: a rank sends each of its rows once to every rank that holds
one of its experts. Every pair of ranks exchanges the same number of places, as many as any rank has
rows, so no row is ever dropped, nobody has to say first how many come, and the exchange can be
captured in a graph. Places that nobody fills hold a choice of no expert.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from parallel.collectives import all_to_all_rows
from parallel.groups import Group


class Routing(NamedTuple):
    """For every row its K experts and what each counts."""

    weight_TK: Tensor
    expert_TK: Tensor
    """An id past the last expert chooses none."""


class ApplyExperts(Protocol):
    def __call__(self, x_TD: Tensor, routing: Routing) -> Tensor:
        """What this rank's experts give the rows, zero for rows that chose none of them."""
        ...


class AllToAll:
    def __init__(self, group: Group, *, num_experts: int, experts_per_rank: int) -> None:
        self._group = group
        self._num_experts = num_experts
        self._experts_per_rank = experts_per_rank

    def forward(
        self, x_TD: Tensor, routing: Routing, num_places: int, apply: ApplyExperts
    ) -> Tensor:
        """Rows of this rank through all their experts; no rank has more than `num_places` rows."""
        if self._group.size == 1:
            return apply(x_TD, routing)
        if num_places == 0:
            return x_TD  # nobody has rows
        place_TW = self._places(routing, num_places)
        row_N = self._rows(place_TW, num_places)
        sent_ND = _with_last(x_TD, 0.0).index_select(0, row_N)
        arrived_ND = all_to_all_rows(sent_ND, self._group)
        arrived = self._send_choices(routing, row_N)
        answer_ND = all_to_all_rows(apply(arrived_ND, arrived), self._group)
        back_TWD = _with_last(answer_ND, 0.0)[place_TW]
        return back_TWD.sum(1)

    def _places(self, routing: Routing, num_places: int) -> Tensor:
        """For each row its place at each rank; past all places where it does not go there."""
        ranks_W = torch.arange(self._group.size, device=routing.expert_TK.device)
        chosen_TK = routing.expert_TK < self._num_experts
        peer_TK = (routing.expert_TK // self._experts_per_rank).masked_fill(~chosen_TK, -1)
        goes_TW = (peer_TK.unsqueeze(2) == ranks_W).any(1)
        place_TW = ranks_W * num_places + goes_TW.cumsum(0) - 1
        return place_TW.masked_fill(~goes_TW, self._group.size * num_places)

    def _rows(self, place_TW: Tensor, num_places: int) -> Tensor:
        """For each place the row that fills it; past the last row where none does."""
        num_rows = place_TW.shape[0]
        row_N = place_TW.new_full((self._group.size * num_places + 1,), num_rows)
        row_T1 = torch.arange(num_rows, device=place_TW.device).unsqueeze(1)
        row_N[place_TW] = row_T1.expand_as(place_TW)
        row_N[-1:].fill_(num_rows)  # an assigned number would be copied from the host
        return row_N[:-1]

    def _send_choices(self, routing: Routing, row_N: Tensor) -> Routing:
        """Weights and ids travel as one float32 tensor, which holds both exactly."""
        num_chosen = routing.weight_TK.shape[1]
        weight_NK = _with_last(routing.weight_TK.float(), 0.0)
        expert_NK = _with_last(routing.expert_TK.float(), float(self._num_experts))
        sent = torch.cat([weight_NK, expert_NK], 1).index_select(0, row_N)
        arrived = all_to_all_rows(sent, self._group)
        weight_NK, expert_NK = arrived.split(num_chosen, dim=1)
        return Routing(weight_NK.to(routing.weight_TK.dtype), expert_NK.long())


def _with_last(x_TD: Tensor, value: float) -> Tensor:
    """With one more row, all `value`."""
    return torch.cat([x_TD, x_TD.new_full((1, *x_TD.shape[1:]), value)])
