"""A layer that works on all rows of a replica, wherever the plan has put them."""

from collections.abc import Callable

from torch import Tensor

from parallel.dp_attention import Activation, RowSplit, gather_replica, sum_to_shares
from parallel.groups import Group
from parallel.plan import Rows


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
