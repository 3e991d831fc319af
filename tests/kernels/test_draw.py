import pytest
import torch

from kernels.draw import draw, draw_reference
from kernels.truncate import kept_reference, lowest_kept

pytestmark = pytest.mark.row("S13")


def logits_of(num_rows: int, vocab_size: int, device: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(num_rows)
    return torch.randn(num_rows, vocab_size, generator=generator).mul_(2.0).to(device)


def whole(values: list[int], device: str) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64, device=device)


@pytest.mark.parametrize("vocab_size", [1, 97, 5003])
@pytest.mark.parametrize("limited", [False, True])
def test_draws_equal_the_reference(vocab_size, limited, device):
    logits = logits_of(5, vocab_size, device)
    keys = (
        whole([0, 1, 2**40 + 5, 2**63 - 1, 7], device),
        whole([9, 2**33, 0, 2**62, 7], device),
        whole([0, 1, 77, 40000, 3], device),
    )
    temperature = torch.tensor([1.0, 0.3, 2.0, 50.0, 1.0], device=device)
    lowest = torch.full((5,), 0.5, device=device) if limited else None
    if limited and vocab_size == 1:
        logits.fill_(60.0)
    drawn = draw(logits, temperature, lowest, *keys)
    assert drawn.tolist() == draw_reference(logits, temperature, lowest, *keys).tolist()


def test_a_request_draws_the_same_in_any_row_of_any_batch(device):
    logits = logits_of(64, 500, device)
    logits[63] = logits[0]
    seeds, nonces, positions = (whole(list(range(64)), device) for _ in range(3))
    seeds[63], nonces[63], positions[63] = seeds[0], nonces[0], positions[0]
    ones = torch.ones(64, device=device)
    large = draw(logits, ones, None, seeds, nonces, positions)
    alone = draw(logits[:1], ones[:1], None, seeds[:1], nonces[:1], positions[:1])
    assert large[0] == large[63] == alone[0]


@pytest.mark.gpus(1)
def test_draws_follow_the_probabilities(device):
    logits = torch.tensor([[0.0, 1.0, 2.0, -50.0]], device=device).repeat(4000, 1)
    ones, zeros = torch.ones(4000, device=device), torch.zeros(4000, dtype=torch.int64)
    zeros = zeros.to(device)
    drawn = draw(logits, ones, None, zeros + 3, zeros, torch.arange(4000, device=device))
    shares = drawn.bincount(minlength=4).cpu() / 4000
    assert (shares - logits[0].cpu().softmax(0)).abs().max() < 0.03


LIMITS = [
    (0, 1.0, 0.0),
    (1, 1.0, 0.0),
    (7, 1.0, 0.0),
    (0, 0.9, 0.0),
    (0, 0.1, 0.0),
    (0, 1.0, 0.05),
    (20, 0.7, 0.0),
    (20, 0.7, 0.02),
    (300, 0.999, 0.001),
]


@pytest.mark.parametrize("vocab_size", [300, pytest.param(20001, marks=pytest.mark.gpus(1))])
@pytest.mark.parametrize("is_tied", [False, True])
def test_the_kept_ids_equal_the_reference(vocab_size, is_tied, device):
    logits = logits_of(len(LIMITS), vocab_size, device)
    if is_tied:
        logits = logits.mul_(2.0).round_()
    temperature = torch.full((len(LIMITS),), 0.7, device=device)
    k, p, min_p = zip(*LIMITS, strict=True)
    lowest = lowest_kept(
        logits,
        temperature,
        whole(list(k), device),
        torch.tensor(p, device=device),
        torch.tensor(min_p, device=device),
    )
    for row, limits in enumerate(LIMITS):
        kept = (logits[row] / temperature[row] >= lowest[row]).nonzero().flatten().tolist()
        assert kept == kept_reference(logits[row].cpu(), temperature[row].item(), *limits)


def test_rows_that_are_not_float32_are_refused(device):
    ones = torch.ones(1, device=device)
    key = whole([1], device)
    with pytest.raises(ValueError, match="float32"):
        draw(torch.zeros(1, 4, device=device).half(), ones, None, key, key, key)
