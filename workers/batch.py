"""One step's rows of one rank, as the model sees them.

`ForwardBatch` is what a model's forward is given besides its weights. Decodes come first, one row
each, then the rows of prompt chunks; that order is the protocol's.
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


class Attention(Protocol):
    """Attention over the paged cache, prepared once a step for this step's rows."""

    def attend(
        self,
        layer: int,
        q_THD: Tensor,
        k_TGD: Tensor,
        v_TGD: Tensor,
        *,
        scale: float,
        sliding_window: int | None,
    ) -> Tensor:
        """Write the rows' keys and values (T, kv heads, head dim) into `layer` of the cache, then
        attend causally over each row's own sequence; (T, heads, head dim)."""
        ...


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class ForwardBatch:
    """Rows of a step, T of them; R of them want logits."""

    input_ids_T: Tensor
    """int64, on the device."""
    positions_T: Tensor
    """int64, on the device; the row's place in its sequence."""
    logit_rows_R: Tensor
    """int64, on the device; which rows sample a token, in row order."""
    attention: Attention
