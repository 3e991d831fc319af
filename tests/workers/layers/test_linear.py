"""Split products equal whole ones, and a row-parallel layer must say over whom it sums."""

import pytest
import torch
from torch.nn import functional

from parallel.collectives import all_reduce
from parallel.dp_attention import UnreducedError
from parallel.groups import single_rank_groups
from parallel.layout import Layout
from parallel.plan import Place, Rows
from parallel.thread_world import run_thread_world
from tests.workers.layers.tiny import build_on, fill
from workers.errors import BadSplit
from workers.layers.build import padded_share
from workers.layers.linear import (
    ColumnParallelLinear,
    RowParallelLinear,
    even_columns,
    kv_columns,
)

TP4 = Layout(tp_size=4)


@pytest.mark.row("S3")
def test_a_row_parallel_layer_without_a_place_cannot_be_built():
    build = build_on(single_rank_groups())
    with pytest.raises(TypeError, match="place"):
        RowParallelLinear(build, "x", 8, 8)  # pyright: ignore[reportCallIssue]


@pytest.mark.row("S2")
def test_the_place_says_whether_one_replica_sums():
    layout = Layout(tp_size=4, dp_size=2, enable_dp_attention=True)
    places = (Place(Rows.TP_ATTN_FULL, "attn_tp"), Place(Rows.FULL, "tp"))

    def sizes(rank, groups):
        layers = [RowParallelLinear(build_on(groups), "x", 8, 8, place=each) for each in places]
        return [(layer.group.name, layer.use_dp_attention_reduce) for layer in layers]

    assert run_thread_world(layout, sizes) == [[("attn_tp", True), ("tp", False)]] * 4


@pytest.mark.row("S14")
def test_an_addend_is_not_taken_for_the_sum():
    def body(rank, groups):
        layer = RowParallelLinear(build_on(groups), "x", 8, 8, place=Place(Rows.FULL, "tp"))
        out = layer.forward(torch.zeros(1, 8 // groups.tp.size))
        with pytest.raises(UnreducedError, match="FULL, owed over tp and FULL, summed, are needed"):
            out.final(Rows.FULL)
        with pytest.raises(UnreducedError, match="built for another group than the plan's"):
            out.addend(Rows.FULL, groups.attn_tp)
        return out.addend(Rows.FULL, groups.tp) is out.tensor

    layout = Layout(tp_size=4, dp_size=2, enable_dp_attention=True)
    assert run_thread_world(layout, body) == [True] * 4


@pytest.mark.parametrize("num_rows", [0, 1, 5])
@pytest.mark.parametrize("bias", [False, True])
def test_column_then_row_equals_the_whole_product(bias, num_rows):
    generator = torch.Generator().manual_seed(0)
    full = {
        "a.weight": torch.randn(12, 6, generator=generator),
        "a.bias": torch.randn(12, generator=generator),
        "b.weight": torch.randn(5, 12, generator=generator),
        "b.bias": torch.randn(5, generator=generator),
    }
    x = torch.randn(num_rows, 6, generator=generator)
    hidden = functional.linear(x, full["a.weight"], full["a.bias"] if bias else None)
    expected = functional.linear(hidden, full["b.weight"], full["b.bias"] if bias else None)

    def body(rank, groups):
        build = build_on(groups)
        column = ColumnParallelLinear(build, 6, [even_columns("a", 12, groups.tp)], bias=bias)
        row = RowParallelLinear(build, "b", 12, 5, place=Place(Rows.FULL, "tp"), bias=bias)
        fill([*column.sources(), *row.sources()], full)
        return all_reduce(row.forward(column.forward(x)).addend(Rows.FULL, groups.tp), groups.tp)

    for out in run_thread_world(TP4, body):
        torch.testing.assert_close(out, expected)


@pytest.mark.parametrize(
    ("num_kv_heads", "heads_by_rank"),
    [(8, ["01", "23", "45", "67"]), (4, list("0123")), (2, list("0011")), (1, list("0000"))],
)
def test_key_value_heads_are_split_or_shared(num_kv_heads, heads_by_rank):
    def heads(rank, groups):
        take = kv_columns("k", num_kv_heads, 16, groups.tp).take
        assert take.start % 16 == take.stop % 16 == 0
        return "".join(str(head) for head in range(take.start // 16, take.stop // 16))

    assert run_thread_world(TP4, heads) == heads_by_rank


def test_columns_that_do_not_divide_are_refused():
    with pytest.raises(BadSplit, match="gate: 10 does not divide over the 4 ranks of tp"):
        run_thread_world(TP4, lambda rank, groups: even_columns("gate", 10, groups.tp))


@pytest.mark.parametrize("total", [1, 3, 4, 5, 259])
def test_padded_shares_cover_everything_once(total):
    shares = run_thread_world(TP4, lambda rank, groups: padded_share(total, groups.tp))
    covered = [i for share, _ in shares for i in range(share.start, share.stop)]
    assert covered == list(range(total))
    assert {length for _, length in shares} == {-(-total // 4)}
