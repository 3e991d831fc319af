"""Two runners, each a replica: what one computes is what it would alone, whoever runs beside it."""

import pytest
import torch

from parallel.groups import single_rank_groups
from parallel.layout import Layout
from parallel.thread_world import run_thread_world
from tests.headers import header_of
from workers.batch import ProtocolError
from workers.config import EngineConfig
from workers.protocol import Admit, Body, Header, Padding, Sampling, pack
from workers.runner import ModelRunner

pytestmark = pytest.mark.row("S10")

CPU = torch.device("cpu")
SIZES = {
    "page_size": 16, "max_num_seqs": 2, "max_num_batched_tokens": 400, "max_model_len": 400,
    "kv_cache_gb": 0.02, "device": "cpu",
}  # fmt: skip
LONG = [5 + i * 7 % 200 for i in range(300)]
SHORT = [9, 4, 77]
WANTED = Sampling(temperature=0.0, num_prompt_logprobs=2)


def entering(tokens: list[int], sampling: Sampling = WANTED) -> Body:
    pages = pack(range(-(-len(tokens) // 16) + 1))
    admit = Admit(0, pack(tokens), len(tokens), 0, pages, sampling)
    return Body(admits=(admit,), chunk_slots=pack([0]), chunk_lengths=pack([len(tokens)]))


def header(num_rows, padded, num_logit_rows, num_prompt_rows=(), padding=Padding.SUM_LEN) -> Header:
    return header_of(
        num_rows, num_logit_rows, padded_rows=padded, padding=padding,
        num_prompt_rows=num_prompt_rows,
    )  # fmt: skip


def runner_of(groups, layout, rank=0) -> ModelRunner:
    config = EngineConfig(
        tp_size=layout.tp_size, dp_size=layout.dp_size,
        enable_dp_attention=layout.enable_dp_attention, attn_cp_size=layout.attn_cp_size, **SIZES,
    )  # fmt: skip
    runner = ModelRunner(config, layout, rank, groups, CPU, lambda stage, done, total: None)
    runner.allocate(min(40, runner.max_pages))
    return runner


STEPS = [
    (header((300, 0), (300, 0), (1, 0), (299, 0)), (entering(LONG), Body())),
    (header((1, 3), (3, 3), (1, 1), (0, 2)), (Body(), entering(SHORT))),
    (header((1, 1), (1, 1), (1, 1)), (Body(), Body())),
    (header((0, 1), (1, 1), (0, 1)), (Body(leaves=pack([0])), Body())),
]
"""A long prompt beside nobody, a short one beside a decode, two decodes, and one left alone."""
UNEVEN = ((300, 0), (1, 3), (1, 1), (0, 1))
"""The same steps as SUM_LEN has them."""


def steps_in(padding: int):
    """The steps with rows exchanged in this way, wherever they are uneven."""
    for (told, bodies), rows in zip(STEPS, UNEVEN, strict=True):
        prompt_rows = told.num_prompt_rows
        yield header(told.num_rows, rows, told.num_logit_rows, prompt_rows, padding), bodies


def alone(tokens: list[int], num_steps: int):
    """The same request on a rank of its own."""
    runner = runner_of(single_rank_groups(), Layout())
    results = []
    for number in range(num_steps):
        body = entering(tokens) if number == 0 else Body()
        num_rows = len(tokens) if number == 0 else 1
        told = header((num_rows,), (num_rows,), (1,))
        results.append(runner.finish(runner.launch(told, body, 0)))
    return results


def assert_same(ours, theirs) -> None:
    """Results of the same request, slot 0's, over as many steps."""
    for mine, one in zip(ours, theirs, strict=True):
        assert mine.ids.tolist() == one.ids.tolist()
        assert len(mine.prompt_logprobs) == len(one.prompt_logprobs)
        for (slot, at, values), (_, where, others) in zip(
            mine.prompt_logprobs, one.prompt_logprobs, strict=True
        ):
            assert (slot, at, len(values)) == (0, where, len(others))
            for value, other in zip(values, others, strict=True):
                assert value.token == other.token
                assert value.logprob == pytest.approx(other.logprob, abs=1e-4)


def test_each_replica_says_what_it_says_alone():
    layout = Layout(tp_size=2, dp_size=2, enable_dp_attention=True)

    def body(rank, groups):
        runner = runner_of(groups, layout, rank)
        return [runner.finish(runner.launch(told, b[rank], rank)) for told, b in STEPS]

    both = run_thread_world(layout, body)
    for replica, (first, tokens, count) in enumerate(((0, LONG, 3), (1, SHORT, 3))):
        assert_same(both[replica][first : first + count], alone(tokens, count))
    assert len(both[0][0].prompt_logprobs[0][2]) == 299
    assert len(both[1][0].ids) == len(both[0][3].ids) == 0


@pytest.mark.parametrize("padding", [Padding.SUM_SLOTS, Padding.SUM_BUFFER])
def test_uneven_rows_say_the_same_exchanged_in_either_way(padding):
    layout = Layout(tp_size=2, dp_size=2, enable_dp_attention=True)

    def body(rank, groups):
        runner, ops = runner_of(groups, layout, rank), set()
        record = groups.ledger.record

        def noted(call):
            if call.shape[-1] == runner._model.hidden_size:
                ops.add(call.op)
            record(call)

        groups.ledger.record = noted
        steps = list(steps_in(padding))
        results = [runner.finish(runner.launch(told, b[rank], rank)) for told, b in steps]
        return results, ops

    both = run_thread_world(layout, body)
    for replica, (first, tokens, count) in enumerate(((0, LONG, 3), (1, SHORT, 3))):
        results, ops = both[replica]
        assert_same(results[first : first + count], alone(tokens, count))
        assert ("all_reduce" in ops) == (padding == Padding.SUM_BUFFER)


def test_which_rows_are_tokens_is_uploaded_as_the_runner_does_it():
    """It waits for nothing; a plain copy would wait on a GPU for the steps that are under way."""
    layout = Layout(tp_size=2, dp_size=2, enable_dp_attention=True)

    def body(rank, groups):
        runner, uploaded = runner_of(groups, layout, rank), []
        upload = runner._transfers.upload
        runner._transfers.upload = lambda array: uploaded.append(array) or upload(array)
        for told, bodies in STEPS[:2]:
            runner.finish(runner.launch(told, bodies[rank], rank))
        return [array.tolist() for array in uploaded if array.dtype == bool]

    for uploaded in run_thread_world(layout, body):
        assert [True, False, False, True, True, True] in uploaded


def test_fewer_rows_than_there_are_is_refused():
    runner = runner_of(single_rank_groups(), Layout())
    with pytest.raises(ProtocolError, match="pads"):
        runner.launch(header((3,), (2,), (1,)), entering(SHORT), 0)
