"""Matrix products split over ranks: by output columns, or by input rows, which leaves a sum owed.

No layer here communicates. Biases and weights are in the checkpoint's layout, (out, in).
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from parallel.dp_attention import Activation
from parallel.groups import Group
from parallel.plan import Op, Place
from parallel.symmetric import place_in_slot
from workers.layers.build import Build, even_share
from workers.layers.fast import gated_linear, linear
from workers.weights import Part, Source, everything


class Columns(NamedTuple):
    """Output columns of one checkpoint projection, `take` of them on this rank."""

    name: str
    total: int
    take: slice

    @property
    def num_here(self) -> int:
        return self.take.stop - self.take.start


def even_columns(name: str, total: int, group: Group) -> Columns:
    """An equal range on every rank."""
    return Columns(name, total, even_share(total, group, name))


def kv_columns(name: str, num_kv_heads: int, head_dim: int, group: Group) -> Columns:
    """Whole key-value heads: a range of them, or the one that this rank shares with others."""
    if num_kv_heads >= group.size:
        return even_columns(name, num_kv_heads * head_dim, group)
    head = group.rank * num_kv_heads // group.size
    return Columns(name, num_kv_heads * head_dim, slice(head * head_dim, (head + 1) * head_dim))


class ColumnParallelLinear:
    """Several projections of the same rows as one product: q, k and v, or gate and up."""

    def __init__(self, build: Build, num_in: int, pieces: Sequence[Columns], *, bias: bool) -> None:
        num_out = sum(piece.num_here for piece in pieces)
        self._pieces = tuple(pieces)
        self.weight_ND = build.empty(num_out, num_in)
        self.bias_N = build.empty(num_out) if bias else None

    def forward(self, x_TD: Tensor) -> Tensor:
        return linear(x_TD, self.weight_ND, self.bias_N)

    def forward_columns(self, x_TD: Tensor, columns: slice) -> Tensor:
        """Some of the output columns; their weights lie together, so nothing is copied."""
        bias_N = None if self.bias_N is None else self.bias_N[columns]
        return linear(x_TD, self.weight_ND[columns], bias_N)

    def forward_gated(self, x_TD: Tensor) -> Tensor:
        """silu of the first half of the columns, times the second half."""
        return gated_linear(x_TD, self.weight_ND, self.bias_N)

    def sources(self) -> list[Source]:
        sources: list[Source] = []
        first = 0
        num_in = self.weight_ND.shape[1]
        for name, total, take in self._pieces:
            here = slice(first, first + take.stop - take.start)
            part = Part((take, slice(0, num_in)), self.weight_ND[here])
            sources.append(Source(name=f"{name}.weight", shape=(total, num_in), parts=(part,)))
            if self.bias_N is not None:
                part = Part((take,), self.bias_N[here])
                sources.append(
                    Source(name=f"{name}.bias", shape=(total,), parts=(part,), dummy="zeros")
                )
            first = here.stop
        return sources


class RowParallelLinear:
    """A product whose input is split: each rank has an addend of the result.

    Nothing is summed here. What comes out says over which group it is yet to be summed, and the
    boundary behind the layer does that, together with whatever else the plan wants done to the
    rows. The group is the place's, so whether it is one attention replica's or that of all replicas
    is the plan's to say, and no model's to forget. The product is written to that group's symmetric
    memory: within a replica always, over replicas if all have equally many rows.
    """

    def __init__(
        self,
        build: Build,
        name: str,
        num_in: int,
        num_out: int,
        *,
        place: Place,
        bias: bool = False,
    ) -> None:
        self.group = build.group(place.group)
        self.place = place
        self._owed = self.group if self.group.size > 1 else None
        self._op: Op = build.plan.sum_op(place.group)
        self._name = name
        self._take = even_share(num_in, self.group, name)
        self._num_in, self._num_out = num_in, num_out
        self.weight_ND = build.empty(num_out, num_in // self.group.size)
        self.bias_N = build.empty(num_out) if bias else None
        self._added_N = self.bias_N if self.group.rank == 0 else None
        """The bias is one rank's to add, or the sum would have it several times."""

    @property
    def use_dp_attention_reduce(self) -> bool:
        """Whether its sum is taken within one attention replica, whose ranks have equal rows."""
        return self.place.group == "attn_tp"

    def forward(self, x_TD: Tensor) -> Activation:
        place_TN = None
        if self._owed is not None:
            shape = (x_TD.shape[0], self._num_out)
            place_TN = place_in_slot(self._owed, shape, x_TD, op=self._op)
        out_TN = linear(x_TD, self.weight_ND, self._added_N, out=place_TN)
        return Activation(out_TN, self.place.rows, self._owed)

    def sources(self) -> list[Source]:
        num_out = self.weight_ND.shape[0]
        part = Part((slice(0, num_out), self._take), self.weight_ND)
        shape = (num_out, self._num_in)
        sources = [Source(name=f"{self._name}.weight", shape=shape, parts=(part,))]
        if self.bias_N is not None:
            sources.append(everything(self.bias_N, f"{self._name}.bias", "zeros"))
        return sources
