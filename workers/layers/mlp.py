"""The gated MLP of a dense layer, split by intermediate columns."""

from torch import Tensor

from parallel.groups import Group
from workers.layers.build import Build
from workers.layers.fast import gated_linear
from workers.layers.linear import ColumnParallelLinear, RowParallelLinear, even_columns
from workers.weights import Source


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
        gate_up = self._gate_up
        return self._down.forward(gated_linear(x_TD, gate_up.weight_ND, gate_up.bias_N))

    def sources(self) -> list[Source]:
        return [*self._gate_up.sources(), *self._down.sources()]
