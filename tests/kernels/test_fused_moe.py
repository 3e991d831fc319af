import pytest
import torch

from kernels import fused_moe as module
from kernels.expert_tiles import (
    RULE,
    ExpertShape,
    Tile,
    Tiles,
    TileTable,
    read_table,
    tiles_by_rule,
    write_table,
)
from kernels.fused_moe import fused_moe, fused_moe_reference
from kernels.route_experts import (
    count_choices,
    route_experts,
    route_experts_reference,
    route_groups,
)
from tests.bench import tune_experts
from workers.layers.moe import route_in_groups

pytestmark = pytest.mark.row("S13")

# NOTE: the interpreter multiplies the bits of bfloat16 as if they were integers.
DTYPES = [torch.float32, torch.bfloat16 if torch.cuda.is_available() else torch.float16]


SMALL = TileTable({1: Tiles(Tile(16, 16, 16, 4, 2), Tile(32, 16, 16, 4, 2))})


def numbers(*shape: int, seed: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device, dtype)


def layer(num_experts: int, hidden: int, width: int, dtype: torch.dtype, device: str):
    options = {"dtype": dtype, "device": device}
    gate_up = numbers(num_experts, 2 * width, hidden, seed=1, **options) / hidden**0.5
    down = numbers(num_experts, hidden, width, seed=2, **options) / width**0.5
    return gate_up, down


def assert_near(actual: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = 1e-5 if actual.dtype == torch.float32 else 2e-2
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize(
    ("num_rows", "num_experts", "num_chosen"), [(1, 1, 1), (3, 6, 2), (5, 40, 7)]
)
def test_the_choice_equals_the_reference(
    num_rows, num_experts, num_chosen, normalise, dtype, device
):
    logits = numbers(num_rows, num_experts, seed=0, dtype=dtype, device=device).round(decimals=1)
    weights, experts = route_experts(logits, num_chosen, normalise=normalise)
    expected = route_experts_reference(logits, num_chosen, normalise=normalise)
    assert experts.tolist() == expected[1].tolist()
    assert_near(weights, expected[0])


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter's
def test_a_poisoned_row_chooses_experts_that_exist(device):
    """Others would be counted past the end of the counts."""
    logits = torch.full((3, 6), float("nan"), device=device)
    logits[1, 2] = 1.0
    _, experts = route_experts(logits, 2, normalise=True)
    assert 0 <= experts.min() <= experts.max() < 6


def test_choices_are_counted(device):
    counts = torch.tensor([5, 0, 0, 1], device=device)
    count_choices(torch.tensor([[0, 2], [2, 3]], device=device), counts)
    assert counts.tolist() == [6, 0, 2, 2]
    experts = torch.tensor([[0, 2], [2, 1], [1, 1]], device=device)
    counts.zero_()
    count_choices(experts, counts, torch.tensor([True, False, True], device=device))
    assert experts.tolist() == [[0, 2], [3, 3], [1, 1]]
    assert counts.tolist() == [1, 2, 1, 2]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("table", [RULE, SMALL], ids=["rule", "small"])
@pytest.mark.parametrize(("first", "num_real"), [(0, 6), (2, 3), (0, 0)])
@pytest.mark.parametrize("num_rows", [1, 21])
def test_experts_equal_the_reference(num_rows, first, num_real, table, dtype, device):
    gate_up, down = layer(6, 40, 24, dtype, device)
    x = numbers(num_rows, 40, seed=0, dtype=dtype, device=device)
    logits = numbers(num_rows, 7, seed=3, dtype=dtype, device=device)
    weights, experts = route_experts(logits, 2, normalise=True)  # expert 6 is nobody's
    places = {"first": first, "num_real": num_real}
    out = fused_moe(x, weights, experts, gate_up, down, **places, table=table)
    assert_near(out, fused_moe_reference(x, weights, experts, gate_up, down, **places))


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize(
    ("num_experts", "num_groups", "num_open", "num_chosen"),
    [(1, 1, 1, 1), (6, 1, 1, 3), (12, 3, 2, 5), (64, 8, 4, 8), (5, 5, 3, 3)],
)
def test_a_choice_in_groups_equals_the_reference(
    num_experts, num_groups, num_open, num_chosen, normalise, has_bias, device
):
    kind = {"dtype": torch.float32, "device": device}
    logits = numbers(9, num_experts, seed=4, **kind)
    bias = numbers(num_experts, seed=5, **kind) if has_bias else None
    groups = {"num_groups": num_groups, "num_groups_chosen": num_open}
    options = {**groups, "normalise": normalise, "scale": 2.5}
    weights, experts = route_groups(logits, bias, num_chosen, **options)
    scores = logits.sigmoid() if has_bias else logits.softmax(-1)
    expected = route_in_groups(scores, bias, num_chosen, **options)
    assert experts.tolist() == expected.expert_TK.tolist()
    assert_near(weights, expected.weight_TK)


def test_a_choice_of_more_than_the_open_groups_have_is_refused(device):
    with pytest.raises(ValueError, match="5 of 8 experts in 1 of 2 groups"):
        route_groups(
            torch.zeros(1, 8, device=device), None, 5, num_groups=2, num_groups_chosen=1,
            normalise=False, scale=1.0,
        )  # fmt: skip


def test_one_expert_may_have_all_rows(device):
    gate_up, down = layer(4, 32, 16, torch.float32, device)
    x = numbers(37, 32, seed=0, dtype=torch.float32, device=device)
    experts = torch.full((37, 1), 2, device=device)
    weights = torch.ones(37, 1, device=device)
    out = fused_moe(x, weights, experts, gate_up, down, first=0, num_real=4)
    expected = fused_moe_reference(x, weights, experts, gate_up, down, first=0, num_real=4)
    assert_near(out, expected)


def test_tiles_grow_with_the_rows_of_an_expert():
    rows = [tiles_by_rule(8 * num_rows, 128).down.rows for num_rows in (1, 32, 512, 8192)]
    assert rows == sorted(rows)


SHAPE = ExpertShape(6, 2, 40, 24, "float32")


def tiles_of(number: int) -> Tiles:
    return Tiles(Tile(16, 16, 16, 4, number), Tile(16, 32, 16, 4, number))


class Launches:
    """In place of a kernel: what it is launched with."""

    def __init__(self, kernel):
        self._kernel, self.args = kernel, []

    def __getitem__(self, grid):
        def launch(*args, **named):
            self.args.append(named)
            return self._kernel[grid](*args, **named)

        return launch


def test_a_bucket_runs_the_tiles_that_were_measured_at_its_own_size(tmp_path, monkeypatch, device):
    file = tmp_path / "tiles.json"
    measured = {2 * rows: (tiles_of(stages), 1.0, 2.0) for rows, stages in ((1, 2), (4, 3), (8, 4))}
    write_table("a GPU", SHAPE._replace(hidden=41), {2: (tiles_of(9), 1.0, 2.0)}, {}, file)
    write_table("a GPU", SHAPE, {2: (tiles_of(9), 1.0, 2.0)}, {}, file)
    write_table("a GPU", SHAPE, measured, {"command": "tune"}, file)
    table = read_table("a GPU", SHAPE, file)
    assert read_table("another", SHAPE, file) == read_table("a GPU", SHAPE, tmp_path / "no") == RULE
    kernels = {
        name: Launches(getattr(module, name)) for name in ("_gate_up_kernel", "_down_kernel")
    }
    for name, launches in kernels.items():
        monkeypatch.setattr(module, name, launches)
    gate_up, down = layer(6, 40, 24, torch.float32, device)
    for num_rows in (1, 3, 4, 8, 9):
        x = numbers(num_rows, 40, seed=0, dtype=torch.float32, device=device)
        weights, experts = route_experts(x[:, :6].contiguous(), 2, normalise=True)
        fused_moe(x, weights, experts, gate_up, down, first=0, num_real=6, table=table)
    for launches, cols in zip(kernels.values(), (16, 32), strict=True):
        assert [args["STAGES"] for args in launches.args] == [2, 3, 3, 4, 4]
        assert {args["COLS"] for args in launches.args} == {cols}


def test_tiles_that_were_measured_for_few_rows_say_nothing_of_many():
    few, many = tiles_of(2), tiles_of(3)
    early, late = TileTable({8: few, 512: few}), TileTable({8: few, 65536: many})
    for num_choices in (4096, 65536):
        assert early.choose(num_choices, 128) == tiles_by_rule(num_choices, 128)
    assert early.choose(600, 128) == few
    assert late.choose(131072, 128) == many
    for num_choices in (576, 5120):  # between two sizes, and cut unlike the larger
        assert late.choose(num_choices, 128) == tiles_by_rule(num_choices, 128)
    assert late.choose(60000, 128) == many


def test_a_tuner_takes_what_is_quickest_and_right_and_keeps_the_rule_for_less(tmp_path):
    rule = tiles_by_rule(8, 6)
    times = {
        Tile(16, 16, 64, 4, 3): 70.0,
        Tile(16, 32, 64, 4, 3): 50.0,
        Tile(16, 64, 64, 4, 3): 10.0,
    }

    def measure(tiles):
        if tiles.down.cols == 64:
            return float("inf")  # a wrong result
        return times.get(tiles.gate_up, 100.0) + times.get(tiles.down, 100.0)

    best = Tiles(Tile(16, 64, 64, 4, 3), Tile(16, 32, 64, 4, 3))
    assert tune_experts.tune(measure, rule, times) == (best, 60.0, 200.0)
    near = lambda tiles: 100.0 if tiles == rule else 99.0  # noqa: E731
    assert tune_experts.tune(near, rule, times) == (rule, 100.0, 100.0)
    firsts = iter([110.0])
    slow_at_first = lambda tiles: next(firsts, 100.0)  # noqa: E731
    tiles = [rule.gate_up, rule.down, *times]
    assert tune_experts.tune(slow_at_first, rule, tiles) == (rule, 100.0, 100.0)


def test_a_layer_is_tuned_where_it_runs(tmp_path, device, monkeypatch):
    if device != "cpu":
        pytest.skip("the candidates are many to compile")
    monkeypatch.setattr(
        tune_experts, "candidates", lambda choices, experts: [Tile(16, 32, 32, 4, 2)]
    )
    file = tmp_path / "tiles.json"
    tune_experts.run(SHAPE, (1, 2), torch.device(device), file, 60.0)
    assert sorted(read_table("cpu", SHAPE, file).measured) == [2, 4]
    tune_experts.run(SHAPE, (4,), torch.device(device), file, -1.0)  # no time: nothing is changed
    assert sorted(read_table("cpu", SHAPE, file).measured) == [2, 4]


def test_shapes_that_do_not_fit_are_refused(device):
    gate_up, down = layer(2, 8, 4, torch.float32, device)
    x = torch.zeros(3, 8, device=device)
    experts = torch.zeros(2, 1, dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match="3 rows come with"):
        fused_moe(x, torch.ones(2, 1, device=device), experts, gate_up, down, first=0, num_real=2)
