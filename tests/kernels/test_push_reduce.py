"""The kernel that sums over GPUs, in one process: ranks take turns, and each is run until all came.

A rank that is run before its peers finds their rows missing and gives up after `num_polls` looks;
run again, with its count set back, it sends the same and finds theirs.
"""

import pytest
import torch

from kernels.push_reduce import (
    Inbox,
    fits,
    inbox_words,
    push_reduce,
    push_reduce_reference,
    push_reduce_rms_norm,
)
from kernels.rms_norm import add_rms_norm_reference

pytestmark = pytest.mark.row("S2")

MAX_ROWS, MAX_COLS = 5, 24


def inboxes(world: int, device: str) -> list[Inbox]:
    count = inbox_words(world, MAX_ROWS, MAX_COLS)
    words = [torch.zeros(count, dtype=torch.int64, device=device) for _ in range(world)]
    peers = torch.tensor([each.data_ptr() for each in words], device=device)
    return [
        Inbox(
            words[rank], peers, torch.zeros(MAX_ROWS, dtype=torch.int32, device=device),
            MAX_COLS, rank,
        )
        for rank in range(world)
    ]  # fmt: skip


def rows(world: int, num_rows: int, num_cols: int, seed: int, device: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(world, num_rows, num_cols, generator=generator).to(torch.bfloat16)
    return x.to(device)


def run_all(boxes, launch):
    """Every rank once, to send; then again, to receive."""
    for box in boxes[:-1]:
        before = box.calls_T.clone()
        launch(box)
        box.calls_T.copy_(before)
    return [launch(box).clone() for box in boxes[::-1]][::-1]


@pytest.mark.parametrize("world", [2, 3])
def test_every_rank_gets_the_same_sum_call_after_call(world, device):
    boxes = inboxes(world, device)
    for call, (num_rows, num_cols) in enumerate([(1, 24), (3, 24), (5, 10), (2, 24), (2, 24)]):
        x = rows(world, num_rows, num_cols, call, device)
        outs = run_all(boxes, lambda box, x=x: push_reduce(x[box.rank].clone(), box, num_polls=0))
        assert all(torch.equal(out, outs[0]) for out in outs)
        expected = push_reduce_reference(x)
        # Triton's interpreter cuts float32 off to bfloat16 instead of rounding.
        torch.testing.assert_close(outs[0], expected, atol=1e-2, rtol=2**-7)
    assert boxes[0].calls_T.tolist() == [5, 4, 2, 1, 1]


def test_the_sum_is_added_and_normalised(device):
    boxes = inboxes(2, device)
    x, residual = rows(2, 3, 24, 1, device), rows(1, 3, 24, 2, device)[0]
    weight = rows(1, 1, 24, 3, device)[0, 0]
    left = {}

    def launch(box):
        left[box.rank] = residual.clone()
        return push_reduce_rms_norm(x[box.rank], left[box.rank], weight, box, eps=1e-5, num_polls=0)

    outs = run_all(boxes, launch)
    stream = residual.clone()
    expected = add_rms_norm_reference(push_reduce_reference(x), stream, weight, eps=1e-5)
    for out, rank in zip(outs, (0, 1), strict=True):
        torch.testing.assert_close(left[rank], stream, atol=2e-2, rtol=2**-6)
        torch.testing.assert_close(out, expected, atol=4e-2, rtol=2**-5)


def test_a_peer_that_does_not_come_leaves_nan_and_an_old_row_is_not_taken_for_a_new(device):
    boxes = inboxes(2, device)
    x = rows(2, 2, 24, 0, device)
    for _ in range(3):
        run_all(boxes, lambda box: push_reduce(x[box.rank].clone(), box, num_polls=0))
    late = push_reduce(x[0].clone(), boxes[0], num_polls=2)
    assert late.isnan().all()


def test_what_does_not_fit_is_refused(device):
    box = inboxes(2, device)[0]
    good = rows(1, 2, 24, 0, device)[0]
    assert fits(good, box)
    for bad in (good.float(), good.t(), rows(1, 6, 24, 0, device)[0], rows(1, 2, 26, 0, device)[0]):
        assert not fits(bad, box)
        with pytest.raises(ValueError, match="must be contiguous bfloat16 with at most 5 rows"):
            push_reduce(bad, box)
