"""A split vocabulary looks up and scores like a whole one, also where it does not divide."""

import pytest
import torch
from torch.nn import functional

from parallel.layout import Layout
from parallel.thread_world import run_thread_world
from tests.workers.layers.tiny import build_on, fill
from workers.layers.embedding import LMHead, VocabParallelEmbedding, VocabWeight, vocab_sources


@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("vocab_size", [5, 256, 259])
def test_equals_the_whole_vocabulary(vocab_size, tp_size):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(vocab_size, 32, generator=generator)
    ids = torch.tensor([0, vocab_size - 1, vocab_size // 2, 1])
    kept = ids.clone()

    def body(rank, groups):
        build = build_on(groups, vocab_size=vocab_size)
        vocab = VocabWeight(build, "embed", groups.attn_tp)
        fill(vocab_sources([vocab]), {"embed.weight": weight})
        rows = VocabParallelEmbedding(vocab).forward(ids)
        return rows, LMHead(build, vocab).forward(rows)

    for rows, logits in run_thread_world(Layout(tp_size=tp_size), body):
        assert torch.equal(rows, weight[ids])
        assert logits.shape == (4, vocab_size)
        torch.testing.assert_close(logits, functional.linear(weight[ids], weight))
    assert torch.equal(ids, kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("num_rows", [1, 3])
def test_logits_are_written_where_the_caller_has_room(num_rows, tp_size, dtype):
    """The vocabulary does not divide; one row of several ranks lies where it arrived."""
    weight = torch.randn(259, 32, generator=torch.Generator().manual_seed(0)).to(dtype)

    def body(rank, groups):
        build = build_on(groups, dtype)
        vocab = VocabWeight(build, "embed", groups.attn_tp)
        fill(vocab_sources([vocab]), {"embed.weight": weight})
        head = LMHead(build, vocab)
        room = head.room_for(5).fill_(torch.nan)
        rows = weight[:num_rows]
        logits = head.forward(rows, out=room[:num_rows])
        assert torch.equal(logits, head.forward(rows))
        assert logits.dtype == torch.float32
        assert room[num_rows:].isnan().all()
        assert (logits.data_ptr() == room.data_ptr()) == (num_rows > 1 or tp_size == 1)

    run_thread_world(Layout(tp_size=tp_size), body)


def test_logits_are_float32_whatever_the_model():
    def body(rank, groups):
        build = build_on(groups, torch.bfloat16)
        vocab = VocabWeight(build, "embed", groups.attn_tp)
        return LMHead(build, vocab).forward(torch.zeros(2, 32, dtype=torch.bfloat16)).dtype

    assert run_thread_world(Layout(tp_size=2), body) == [torch.float32] * 2
