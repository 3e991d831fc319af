"""How evenly rows are spread over the ranks that hold experts, told now and then at no cost.

Layers count on the device how often each expert is chosen (`workers.layers.moe.ExpertLoad`). Here
the counts are added up over layers and over the experts of each moe_ep rank, and set out for the
host; what is told is what has arrived there by the next time, so no step waits for it.

Without an all-to-all all ranks of a domain route all rows alike, and one of them tells; with one,
each routes its own, and all tell.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from parallel.groups import Groups
from workers.config import EngineConfig
from workers.models import Model

TOLD_EVERY = 50
"""Steps from one look at the counts to the next."""


class ExpertTally:
    def __init__(
        self, model: Model, config: EngineConfig, groups: Groups, fetch: Callable[[Tensor], Tensor]
    ) -> None:
        """`fetch` brings a tensor to the host, complete once a later step is done."""
        self._model, self._fetch = model, fetch
        self._num_ranks = groups.moe_ep.size
        self._tells = config.moe_a2a_backend != "none" or groups.tp.rank == 0
        self._num_steps = 0
        self._begun: tuple[int, ...] | None = None
        """What warming up had counted."""
        self._arriving: Tensor | None = None

    def step_done(self) -> tuple[int, ...]:
        """Rows for the experts of each moe_ep rank since the start; () at most steps."""
        self._num_steps += 1
        if not self._tells or self._num_steps % TOLD_EVERY:
            return ()
        arrived, self._arriving = self._arriving, self._count()
        if arrived is None:
            return ()
        rows = tuple(arrived.tolist())
        if self._begun is None:
            self._begun = rows
        return tuple(now - then for now, then in zip(rows, self._begun, strict=True))

    def _count(self) -> Tensor | None:
        loads = list(self._model.expert_loads().values())
        if not loads:
            return None
        total_E = torch.stack(loads).sum(0)
        width = -(-len(total_E) // self._num_ranks)
        padded = total_E.new_zeros(self._num_ranks * width)
        padded[: len(total_E)] = total_E
        return self._fetch(padded.view(self._num_ranks, width).sum(1))
