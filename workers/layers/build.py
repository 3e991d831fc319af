"""What every layer is built with. Nothing of a step is here."""

from dataclasses import dataclass

import torch
from torch import Tensor

from parallel.groups import Group, Groups
from parallel.layout import GroupName
from parallel.plan import Plan
from workers.errors import BadSplit
from workers.model_config import ModelConfig


@dataclass(frozen=True, slots=True, eq=False)
class Build:
    """One rank's model in the making."""

    config: ModelConfig
    groups: Groups
    device: torch.device
    dtype: torch.dtype
    plan: Plan
    """Where every layer works, and what moves rows between them."""

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, device=self.device, dtype=self.dtype)

    def zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, device=self.device, dtype=self.dtype)

    def group(self, name: GroupName | None) -> Group:
        """The group of a place in the plan; for None this rank alone."""
        if name is not None:
            return getattr(self.groups, name)
        tp = self.groups.tp
        return Group("tp", (tp.members[tp.rank],), 0, None, tp.ledger)


def even_share(total: int, group: Group, what: str) -> slice:
    """The range of `total` that falls to this rank of `group`."""
    if total % group.size:
        raise BadSplit(
            f"{what}: {total} does not divide over the {group.size} ranks of {group.name}"
        )
    count = total // group.size
    return slice(group.rank * count, (group.rank + 1) * count)


def padded_share(total: int, group: Group) -> tuple[slice, int]:
    """This rank's range of `total` and the length that all ranks' ranges are padded to."""
    length = -(-total // group.size)
    first = min(group.rank * length, total)
    return slice(first, min(first + length, total)), length
