"""A layer that works on all rows of a replica, wherever the plan has put them: attention."""

from collections.abc import Callable

from torch import Tensor

from parallel.dp_attention import Activation, RowSplit, gather_replica, sum_to_shares
from parallel.groups import Group
from parallel.plan import Place, Rows
from workers.layers.build import Build
from workers.layers.linear import RowParallelLinear


def on_whole_rows(
    work: Callable[[Tensor], Activation],
    x: Activation,
    rows: Rows,
    split: RowSplit | None,
    attn_tp: Group,
) -> Activation:
    """What `work` gives of whole rows, in layout `rows`.

    Scattered rows are gathered before it and their sum is scattered behind it: then nobody outside
    has to pad a replica's rows to a multiple of its ranks, and products see the true number.
    """
    x_TD = x.final(rows)
    if rows is not Rows.SCATTERED or split is None:
        return work(x_TD)
    out = work(gather_replica(x_TD, split, attn_tp))
    out_TD = out.addend(Rows.TP_ATTN_FULL, attn_tp)
    return Activation(sum_to_shares(out_TD, split, attn_tp), rows)


def on_real_rows(
    read: Callable[[Tensor], Tensor], x_TN: Tensor, width: int, *, num_here: int, num_read: int
) -> Tensor:
    """What the first `num_here` rows read of their sequences (T, width); zeros for padding.

    Padding has no place in any sequence, so attention never sees it. With `num_read`, the rows of
    all parts of the replica, it is called where only others have some.
    """
    num_rows = x_TN.shape[0]
    if num_here == num_rows > 0:
        return read(x_TN)
    out_TN = x_TN.new_zeros(num_rows, width)
    if num_read:
        out_TN[:num_here] = read(x_TN[:num_here])
    return out_TN


def attention_output(build: Build, prefix: str, width: int, *, bias: bool) -> RowParallelLinear:
    """The product behind attention, of all heads' `width` numbers; on a replica's whole rows."""
    place = Place(Rows.TP_ATTN_FULL, build.plan.attention.group)
    name = f"{prefix}.o_proj"
    return RowParallelLinear(build, name, width, build.config.hidden_size, place=place, bias=bias)
