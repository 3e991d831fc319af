"""The quick norm equals the plain one."""

import pytest
import torch
from torch.nn import functional

from parallel.groups import single_rank_groups
from tests.workers.layers.tiny import build_on
from workers.layers.norm import RMSNorm, UnitRms


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(0, 32), (1, 32), (3, 5, 8), (2, 4097)], ids=str)
def test_equals_torchs(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).to(dtype)
    weight = torch.randn(shape[-1], generator=generator).to(dtype)
    expected = functional.rms_norm(x, (shape[-1],), weight, 1e-6)
    unit = UnitRms(build_on(single_rank_groups(), dtype), shape[-1])
    torch.testing.assert_close(unit.forward(x, weight), expected)


@pytest.mark.parametrize("scale", [0.0, 1e-6, 1e15])
def test_tiny_and_huge_rows_stay_finite(scale):
    x = torch.full((1, 32), scale)
    unit = UnitRms(build_on(single_rank_groups()), 32)
    expected = x.double() * (x.double().square().mean() + 1e-6).rsqrt()
    torch.testing.assert_close(unit.forward(x, torch.ones(32)), expected.float())


def test_one_weight_for_each_head():
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    weight = torch.arange(24.0).view(3, 8)
    unit = UnitRms(build_on(single_rank_groups()), 8)
    torch.testing.assert_close(
        unit.forward(x, weight), functional.rms_norm(x, (8,), None, 1e-6) * weight
    )


def test_add_leaves_the_sum_in_the_residual():
    norm = RMSNorm(build_on(single_rank_groups()), "norm")
    norm.weight_D.fill_(1.0)
    x, residual = torch.ones(2, 32), torch.full((2, 32), 3.0)
    out = norm.add(x, residual)
    assert torch.equal(residual, torch.full((2, 32), 4.0))
    assert torch.equal(x, torch.ones(2, 32))
    torch.testing.assert_close(out, torch.ones(2, 32))
