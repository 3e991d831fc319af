"""The GPU's path, kernels and padded decodes, on whatever there is: a GPU, or the interpreter."""

import msgspec
import pytest
import torch

from tests.headers import header_of
from tests.workers import test_gpu
from tests.workers.checksum_runs import (
    NUM_PAGES,
    CountingModel,
    checksum_runner,
    greedy_requests,
    streams,
)
from tests.workers.test_runner import ChecksumModel, entering, header, next_token, some_requests
from workers.batch import ProtocolError
from workers.protocol import Body, Header, Mode, Sampling, pack

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the interpreter is chosen when Triton is imported"
)


def test_greedy_streams_are_those_worked_out_by_hand():
    requests, expected = greedy_requests(9)
    assert streams(requests, checksum_runner()) == expected


@pytest.mark.parametrize("seed", range(3))
def test_sampled_streams_equal_those_without_kernels(seed):
    plain = streams(some_requests(seed), checksum_runner(use_kernels=False))
    assert streams(some_requests(seed), checksum_runner()) == plain


def decoding(num_rows: int, bucket: int) -> Header:
    return header_of((num_rows,), bucket=bucket, mode=Mode.DECODE)


def test_steps_overlap_and_keep_their_own_tokens():
    """Steps n and n+1 are both under way before step n is read."""
    runner = checksum_runner()
    prompt = [5, 6, 7]
    first = runner.launch(
        header(3, 1), entering(2, prompt, Sampling(temperature=0.0), [3, 1, 2]), 0
    )
    ids = [runner.finish(first).ids.tolist()]
    older = runner.launch(decoding(1, 1), Body(), 0)
    for _ in range(6):
        newer = runner.launch(decoding(1, 1), Body(), 0)
        ids.append(runner.finish(older).ids.tolist())
        older = newer
    tokens = list(prompt)
    for (token,) in ids:
        assert token == next_token(tokens)
        tokens.append(token)


def test_decodes_fill_up_to_a_bucket_and_pads_touch_nobody():
    model = CountingModel()
    runner = checksum_runner(model)
    greedy = Sampling(temperature=0.0)
    for number, slot in enumerate((0, 1, 3)):
        body = entering(slot, [slot + 1, 9], greedy, [2 * number, 2 * number + 1])
        runner.finish(runner.launch(header(2 + number, 1 + number), body, 0))
    before = [part.clone() for part in runner._steps.cache.parts]
    model.num_rows.clear()
    result = runner.finish(runner.launch(decoding(3, 4), Body(), 0))
    assert model.num_rows == [4]
    assert len(result.ids) == 3
    for part, old in zip(runner._steps.cache.parts, before, strict=True):
        changed = (part != old).flatten(2).any(dim=-1)
        assert set(changed.nonzero()[:, 1].tolist()) == {1, 2, 4, NUM_PAGES}


@pytest.mark.row("S13")
def test_every_bucket_is_run_at_its_own_size_before_ready_and_no_other_size_is_replayed():
    """Kernels are compiled, chosen by size and captured at exactly the rows that steps launch."""
    model = CountingModel()
    runner = checksum_runner(model, max_num_seqs=20)
    assert runner.buckets == (1, 2, 3, 4, 5, 6, 7, 8, 16, 20)
    assert model.num_rows[-len(runner.buckets) :] == list(reversed(runner.buckets))
    body = entering(0, [5], Sampling(temperature=0.0), [0, 1, 2])
    runner.finish(runner.launch(header(1, 1), body, 0))
    for bucket in runner.buckets:
        model.num_rows.clear()
        runner.finish(runner.launch(decoding(1, bucket), Body(), 0))
        assert model.num_rows == [bucket]


def test_what_a_gpus_tests_compare_is_run_by_graphs(tmp_path):
    """Their steps, here in the interpreter: else they would compare eager runs with eager runs."""
    test_gpu.save_tiny(tmp_path, "Llama")
    runner = test_gpu.new_runner(tmp_path, "cpu", use_kernels=True)
    buckets = test_gpu.watch_buckets(runner)
    tokens = test_gpu.streams(runner, test_gpu.GREEDY, 3)
    assert buckets == [4] * 3
    assert tokens == test_gpu.streams(test_gpu.new_runner(tmp_path, "cpu"), test_gpu.GREEDY, 3)


def test_a_bucket_that_does_not_exist_is_refused():
    runner = checksum_runner()
    runner.launch(header(1, 1), entering(0, [1], Sampling(temperature=0.0), [0]), 0)
    with pytest.raises(ProtocolError, match=r"wants a graph of 5 rows; there are graphs of \(1, 2"):
        runner.launch(decoding(1, 5), Body(), 0)
    runner = checksum_runner()
    runner.launch(header(1, 1), entering(0, [1], Sampling(temperature=0.0), [0]), 0)
    wrong = msgspec.structs.replace(decoding(1, 1), bucket=2)
    with pytest.raises(ProtocolError, match=r"of every replica and pads them to \(1,\)"):
        runner.launch(wrong, Body(), 0)


def test_a_poisoned_decode_is_found():
    model = ChecksumModel()
    runner = checksum_runner(model)
    prompt = [5, 6, 7]
    model.poison = next_token(prompt)
    body = entering(0, prompt, Sampling(temperature=0.0), [0, 1])
    runner.finish(runner.launch(header(3, 1), body, 0))
    result = runner.finish(runner.launch(decoding(1, 1), Body(), 0))
    assert result.poisoned_rows == (0,)
    leave = Body(leaves=pack([0]))
    runner.finish(runner.launch(header(0, 0), leave, 0))
