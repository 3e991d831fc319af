"""Rotation keeps lengths, depends on distance only, and its scalings touch the right pairs."""

import math

import pytest
import torch

from workers.layers.rotary import RotaryTable, inverse_frequencies
from workers.model_config import RopeConfig

DIM = 16
PLAIN = RopeConfig(theta=10000.0)
LINEAR = RopeConfig(theta=10000.0, kind="linear", factor=4.0)
LLAMA3 = RopeConfig(theta=10000.0, kind="llama3", factor=8.0, original_max_positions=256)
YARN = RopeConfig(theta=10000.0, kind="yarn", factor=4.0, original_max_positions=256)


def table(rope: RopeConfig = PLAIN, dtype: torch.dtype = torch.float32) -> RotaryTable:
    return RotaryTable(rope, DIM, 64, torch.device("cpu"), dtype)


def test_position_zero_is_left_alone():
    x = torch.randn(1, 3, DIM)
    assert torch.equal(table().at(torch.tensor([0])).apply(x), x)


def test_each_pair_turns_by_its_own_angle():
    x = torch.zeros(1, 1, DIM)
    x[0, 0, 2] = 1.0
    out = table().at(torch.tensor([5])).apply(x)[0, 0]
    angle = 5 * 10000.0 ** (-2 * 2 / DIM)
    expected = torch.zeros(DIM)
    expected[2], expected[2 + DIM // 2] = math.cos(angle), math.sin(angle)
    torch.testing.assert_close(out, expected)


def test_products_depend_on_the_distance_only():
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, DIM, generator=generator)
    at = table().at

    def product(i: int, j: int) -> torch.Tensor:
        return (at(torch.tensor([i])).apply(q) * at(torch.tensor([j])).apply(k)).sum()

    torch.testing.assert_close(product(7, 3), product(44, 40))


def test_rows_turn_by_their_own_positions_and_strided_heads_too():
    x = torch.randn(4, 6, DIM)[:, 1:4]
    positions = torch.tensor([3, 0, 63, 3])
    together = table().at(positions).apply(x)
    for row, position in enumerate(positions):
        alone = table().at(position[None]).apply(x[row : row + 1])
        torch.testing.assert_close(together[row : row + 1], alone)


def test_no_rows():
    empty = table().at(torch.zeros(0, dtype=torch.int64)).apply(torch.zeros(0, 3, DIM))
    assert empty.shape == (0, 3, DIM)


def test_linear_slows_every_pair():
    torch.testing.assert_close(
        inverse_frequencies(LINEAR, DIM), inverse_frequencies(PLAIN, DIM) / 4
    )


@pytest.mark.parametrize("rope", [LLAMA3, YARN], ids=["llama3", "yarn"])
def test_fast_pairs_are_kept_and_slow_ones_slowed(rope):
    plain, stretched = inverse_frequencies(PLAIN, DIM), inverse_frequencies(rope, DIM)
    ratio = plain / stretched
    assert ratio[0].item() == pytest.approx(1.0)
    assert ratio[-1].item() == pytest.approx(rope.factor)
    assert (ratio.diff() >= -1e-6).all()


def test_yarns_factor_scales_what_comes_out():
    rope = RopeConfig(
        theta=1e4, kind="yarn", factor=4.0, original_max_positions=16, attention_factor=1.5
    )
    x = torch.randn(1, 2, DIM)
    torch.testing.assert_close(table(rope).at(torch.tensor([0])).apply(x), 1.5 * x)
