"""Runners that are parts of one replica: they say what one rank says, and store what it stores."""

import threading
from dataclasses import replace
from random import Random

import numpy as np
import pytest
import torch

from parallel.dp_attention import RowCounts
from parallel.groups import single_rank_groups
from parallel.layout import Layout
from parallel.padding import align_rows
from parallel.thread_world import run_thread_world
from tests.workers import test_dp_runner as replicas
from tests.workers.exact import CONFIGS, build, install, part_of, sequences_of
from tests.workers.random_driver import RandomDriver
from tests.workers.test_runner import ChecksumModel, some_requests
from workers.batch import ForwardBatch, HeadAttention, StepRows
from workers.config import EngineConfig
from workers.context import ContextParts
from workers.layers import fast, linear
from workers.runner import ModelRunner

pytestmark = [pytest.mark.row("S6"), pytest.mark.row("S7")]

CPU = torch.device("cpu")
NUM_PAGES, PAGE, BUDGET, SEQS = 14, 4, 24, 4


class Gathering(HeadAttention):
    """Attention that gathers what it is given to store, as a model's layers do."""

    def __init__(self, batch: ForwardBatch) -> None:
        self._batch = batch

    def attend(self, layer, q_THD, k_TGD, v_TGD, **options):
        context = self._batch.context
        both = context.start(torch.cat([k_TGD, v_TGD], 1)).wait()
        k_UGD, v_UGD = both.split(1, dim=1)
        return self._batch.attention.attend(layer, q_THD, k_UGD, v_UGD, **options)


class ChecksumInParts(ChecksumModel):
    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        if batch.context is None:
            return super().forward(batch)
        num_rows = batch.context.num_here
        own = ForwardBatch(
            input_ids_T=batch.input_ids_T[:num_rows],
            positions_T=batch.positions_T,
            logit_rows_R=batch.logit_rows_R,
            attention=Gathering(batch),
        )
        return super().forward(own)


def new_runner(groups, layout: Layout, rank: int) -> ModelRunner:
    config = EngineConfig(
        tp_size=layout.tp_size, attn_cp_size=layout.attn_cp_size, page_size=PAGE,
        max_num_seqs=SEQS, max_num_batched_tokens=BUDGET,
    )  # fmt: skip
    runner = ModelRunner(
        config, layout, rank, groups, CPU, lambda *_: None,
        make_model=lambda *parts: ChecksumInParts(),
    )  # fmt: skip
    runner.allocate(NUM_PAGES)
    return runner


def streams(layout: Layout, rank: int, groups, seed: int, num_seqs: int, chaos: float):
    """The requests' tokens, and the cache after the last step."""
    runner, requests = new_runner(groups, layout, rank), some_requests(seed)
    driver = RandomDriver(
        requests, Random(seed), max_num_seqs=num_seqs, num_pages=NUM_PAGES, page_size=PAGE,
        budget=BUDGET, chaos=chaos,
    )  # fmt: skip
    for _ in range(2000):
        if driver.is_done:
            return [request.output for request in requests], runner._steps.cache.parts
        planned = driver.plan()
        header = planned.header()
        [padded] = align_rows(header.num_rows, layout.attn_cp_size)
        told = header.__class__(
            1, 0, 3, header.num_rows, header.num_logit_rows, 0, (padded,), 0, (), b""
        )
        driver.feed(planned, runner.finish(runner.launch(told, planned.body, 0)).ids.tolist())
    raise TimeoutError("the requests do not end")


@pytest.mark.parametrize("num_parts", [2, 3, 4])
@pytest.mark.parametrize("seed", range(5))
def test_streams_do_not_depend_on_the_parts(num_parts, seed):
    """Prefix hits, chunks of one token, mixed steps, fewer rows than ranks, preemptions."""
    plain, cache = streams(Layout(), 0, single_rank_groups(), seed, SEQS, 0.5)
    alone, _ = streams(Layout(), 0, single_rank_groups(), seed, 1, 0.0)
    assert plain == alone
    layout = Layout(tp_size=num_parts, attn_cp_size=num_parts)

    def body(rank, groups):
        return streams(layout, rank, groups, seed, SEQS, 0.5)

    for said, kept in run_thread_world(layout, body):
        assert said == plain
        for mine, theirs in zip(kept, cache, strict=True):
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize(
    ("tp", "cp"), [(4, 2), (8, 2), (8, 4)], ids=["1 rank a part", "2 ranks", "4 parts"]
)
def test_replicas_in_parts_say_what_each_says_alone(tp, cp):
    """The bundled model: a long prompt, an idle replica, prompt log-probabilities, decodes."""
    layout = Layout(tp_size=tp, dp_size=2, enable_dp_attention=True, attn_cp_size=cp)
    unit = tp // 2

    def body(rank, groups):
        runner, replica = replicas.runner_of(groups, layout, rank), groups.attn_dp.rank
        results = []
        for told, bodies in replicas.STEPS:
            header = replicas.header(
                told.num_rows, align_rows(told.padded_rows, unit), told.num_logit_rows,
                told.num_prompt_rows,
            )  # fmt: skip
            results.append(runner.finish(runner.launch(header, bodies[replica], replica)))
        return results

    ranks = run_thread_world(layout, body, time_limit_s=120)
    for rank, results in enumerate(ranks):
        replica = layout.coordinates(rank).attn_dp
        first, tokens = ((0, replicas.LONG), (1, replicas.SHORT))[replica]
        replicas.assert_same(results[first : first + 3], replicas.alone(tokens, 3))
        same = [result.ledger for result in ranks[layout.replica_ranks(0, replica)[0]]]
        assert [result.ledger for result in results] == same


def test_what_a_part_uploads_is_contiguous_and_kept_while_the_same_slots_decode():
    """A strided array is copied by the host, row by row, on its way to pinned memory."""
    layout = Layout(tp_size=2, attn_cp_size=2)

    def body(rank, groups):
        uploaded = []

        def upload(array):
            uploaded.append(array)
            return torch.from_numpy(array)

        parts, slots_B = ContextParts(groups.attn_cp, upload), np.arange(5)
        steps = []
        for step in range(2):
            rows = StepRows(
                slots_B, (), np.full(5, step), np.full(5, step), np.arange(5), slots_B, ()
            )
            steps.append(parts.part_of(rows).rows_of(rows))
        return uploaded, steps

    for rank, (uploaded, steps) in enumerate(run_thread_world(layout, body)):
        arrays = [a for rows in steps for a in rows if isinstance(a, np.ndarray)]
        assert all(array.flags["C_CONTIGUOUS"] for array in (*uploaded, *arrays))
        assert steps[0].decode_slots_B.tolist() == list(range(5))[rank::2]
        assert steps[1].decode_slots_B is steps[0].decode_slots_B


class Recorder:
    """A transport that writes down when a gather begins and when it is waited for."""

    def __init__(self, inner, events: list[str]) -> None:
        self._inner, self._events = inner, events

    def __getattr__(self, name: str):
        return getattr(self._inner, name)

    def start_all_gather(self, out, x):
        self._events.append("begin")
        finish = self._inner.start_all_gather(out, x)

        def wait() -> None:
            self._events.append("wait")
            finish()

        return wait


@pytest.mark.parametrize("config", [CONFIGS[0], CONFIGS[2]], ids=["keys and values", "latents"])
def test_queries_are_computed_while_the_rest_comes(config, monkeypatch):
    install(monkeypatch)
    layout = Layout(tp_size=2, attn_cp_size=2)
    counts = RowCounts((5,), (6,), (5,))
    events: dict[int, list[str]] = {0: [], 1: []}
    ranks = threading.local()

    def product(x, weight, bias=None, *, out=None):
        events[ranks.rank].append("product")
        return fast.linear(x, weight, bias, out=out)

    monkeypatch.setattr(linear, "linear", product)

    def body(rank, groups):
        ranks.rank = rank
        recorder = Recorder(groups.attn_cp.transport, events[rank])
        recorded = replace(groups, attn_cp=replace(groups.attn_cp, transport=recorder))
        model = build(config, recorded)
        here = part_of(sequences_of(0, (5,)), counts, recorded)
        model.forward(here.batch)
        return groups.ledger.take()

    with torch.inference_mode():
        run_thread_world(layout, body)
    for seen in events.values():
        spans = [one for one in " ".join(seen).split("begin")[1:] if "wait" in one]
        assert len(spans) == config.num_layers
        assert all("product" in span.partition("wait")[0] for span in spans)
