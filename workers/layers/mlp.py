"""The gated MLP of a dense layer, split by intermediate columns."""

from torch import Tensor
from torch.nn import functional

from parallel.groups import Group
from workers.layers.build import Build
from workers.layers.linear import ColumnParallelLinear, RowParallelLinear, even_columns
from workers.weights import Source


def silu_and_multiply(gate_up: Tensor) -> Tensor:
    """silu of the first half of the columns, times the second half."""
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate).mul_(up)


class GatedMLP:
    def __init__(self, build: Build, prefix: str, *, group: Group, bias: bool = False) -> None:
        config = build.config
        width = config.intermediate_size
        pieces = (
            even_columns(f"{prefix}.gate_proj", width, group),
            even_columns(f"{prefix}.up_proj", width, group),
        )
        self._gate_up = ColumnParallelLinear(build, config.hidden_size, pieces, bias=bias)
        self._down = RowParallelLinear(
            build,
            f"{prefix}.down_proj",
            width,
            config.hidden_size,
            group=group,
            use_dp_attention_reduce=False,
            bias=bias,
        )

    def forward(self, x_TD: Tensor) -> Tensor:
        return self._down.forward(silu_and_multiply(self._gate_up.forward(x_TD)))

    def sources(self) -> list[Source]:
        return [*self._gate_up.sources(), *self._down.sources()]
