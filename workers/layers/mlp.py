"""The gated MLP of a dense layer, split by intermediate columns."""

from parallel.dp_attention import Activation, RowSplit
from parallel.plan import Place
from workers.layers.build import Build
from workers.layers.linear import ColumnParallelLinear, RowParallelLinear, even_columns
from workers.weights import Source


class GatedMLP:
    """On whole rows in the layout of `place`, its columns split over the place's group."""

    def __init__(
        self,
        build: Build,
        prefix: str,
        *,
        place: Place,
        width: int | None = None,
        bias: bool = False,
    ) -> None:
        """`width` is the number of intermediate columns; None takes the config's."""
        hidden, group = build.config.hidden_size, build.group(place.group)
        width = width or build.config.intermediate_size
        pieces = (
            even_columns(f"{prefix}.gate_proj", width, group),
            even_columns(f"{prefix}.up_proj", width, group),
        )
        self._rows = place.rows
        self._gate_up = ColumnParallelLinear(build, hidden, pieces, bias=bias)
        self._down = RowParallelLinear(
            build, f"{prefix}.down_proj", width, hidden, place=place, bias=bias
        )

    def forward(self, x: Activation, split: RowSplit | None) -> Activation:
        x_TD = x.final(self._rows)
        return self._down.forward(self._gate_up.forward_gated(x_TD))

    def sources(self) -> list[Source]:
        return [*self._gate_up.sources(), *self._down.sources()]
