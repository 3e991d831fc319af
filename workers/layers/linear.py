"""Matrix products split over ranks: by output columns, without communication, or by input rows,
with a sum at the end. Biases and weights are in the checkpoint's layout, (out, in).
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from parallel.collectives import all_reduce
from parallel.groups import Group
from workers.layers.build import Build, even_share
from workers.layers.fast import linear
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
    """A product whose input is split; the ranks' results are summed.

    `use_dp_attention_reduce` has no default: whoever writes a layer must say whether its rows are
    one attention replica's (True: the sum is over `attn_tp`) or those of all of `group`. With the
    wrong one, data-parallel attention would sum different requests' rows.
    """

    def __init__(
        self,
        build: Build,
        name: str,
        num_in: int,
        num_out: int,
        *,
        group: Group,
        use_dp_attention_reduce: bool,
        bias: bool = False,
    ) -> None:
        self.group = build.groups.attn_tp if use_dp_attention_reduce else group
        self._name = name
        self._take = even_share(num_in, self.group, name)
        self._num_in = num_in
        self.weight_ND = build.empty(num_out, num_in // self.group.size)
        self.bias_N = build.empty(num_out) if bias else None

    def forward(self, x_TD: Tensor) -> Tensor:
        if self.group.size == 1:
            return linear(x_TD, self.weight_ND, self.bias_N)
        out_TN = all_reduce(linear(x_TD, self.weight_ND), self.group)
        return out_TN if self.bias_N is None else out_TN.add_(self.bias_N)

    def sources(self) -> list[Source]:
        num_out = self.weight_ND.shape[0]
        part = Part((slice(0, num_out), self._take), self.weight_ND)
        shape = (num_out, self._num_in)
        sources = [Source(name=f"{self._name}.weight", shape=shape, parts=(part,))]
        if self.bias_N is not None:
            sources.append(everything(self.bias_N, f"{self._name}.bias", "zeros"))
        return sources
