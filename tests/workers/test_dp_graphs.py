"""Captured decodes of several ranks: all run one bucket, idle or not, and say what one rank says.

The kernels run in Triton's interpreter, and what a GPU would replay is run as it is.
"""

from random import Random

import numpy as np
import pytest
import torch

from parallel.padding import buckets_up_to
from parallel.thread_world import run_thread_world
from tests.workers.random_driver import RandomDriver, Request, planned_header
from tests.workers.tiny_moe import (
    A2A,
    DP2,
    DP2_TP2,
    DRIVER,
    SIZES,
    VOCAB,
    alone,
    drive,
    tiny_runner,
)
from workers.architectures import plan_of
from workers.config import EngineConfig
from workers.layers.attention import SelfAttention
from workers.protocol import Body, Mask, Sampling, mask_bytes, pack

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is chosen at import"),
    pytest.mark.timeout(300),
    pytest.mark.row("S10"),
    pytest.mark.row("S12"),
    pytest.mark.usefixtures("one_kernel_at_a_time"),
]


def some_requests(replica: int) -> list[Request]:
    """The second replica has fewer and shorter ones, and is idle in the end."""
    random = Random(replica)
    kinds = [
        Sampling(temperature=0.0),
        Sampling(temperature=1.0, seed=5, nonce=replica, num_logprobs=2),
        Sampling(temperature=0.0, frequency_penalty=1.0),
    ]
    return [
        Request([random.randrange(VOCAB) for _ in range(random.randint(1, 9))], length, kind)
        for length, kind in zip((5, 6, 3) if replica == 0 else (2, 3), kinds, strict=False)
    ]


def run_replicas(settings, *, chaos: float):
    """(outputs by replica, every rank's steps, what experts counted)"""
    config = EngineConfig(**SIZES | settings)
    num_replicas = config.layout.num_replicas

    @torch.inference_mode()
    def body(rank, groups):
        runner = tiny_runner(config, rank, groups)
        before = {n: load.clone() for n, load in runner._model.expert_loads().items()}
        requests = [some_requests(replica) for replica in range(num_replicas)]
        steps = drive(runner, groups, requests, chaos=chaos, **DRIVER)
        after = runner._model.expert_loads()
        loads = {n: int((after[n] - before[n]).sum()) for n in after}
        return [[r.output for r in mine] for mine in requests], steps, loads

    return run_thread_world(config.layout, body, time_limit_s=240.0)


LAYOUTS = [
    pytest.param({"tp_size": 2}, marks=pytest.mark.slow),
    DP2,
    DP2_TP2 | {"ep_size": 2},
    DP2_TP2 | {"ep_size": 2, "attn_cp_size": 2},
    DP2_TP2 | A2A | {"ep_size": 4, "moe_dense_tp_size": 1, "enable_dp_lm_head": True},
    pytest.param(
        {"tp_size": 4, "ep_size": 4, "moe_dense_tp_size": 1, "disable_attn_tp_gather": True} | A2A,
        marks=pytest.mark.slow,
    ),
]


def name_of(settings) -> str:
    short = {"enable_dp_attention": "dpa", "moe_a2a_backend": "a2a", "moe_dense_tp_size": "dense"}
    return "-".join(f"{short.get(name, name)}={value}" for name, value in settings.items())


@pytest.mark.row("S11")
@pytest.mark.parametrize("settings", LAYOUTS, ids=name_of)
def test_replayed_replicas_say_what_each_request_says_alone(settings):
    config = EngineConfig(**SIZES | settings)
    num_replicas = config.layout.num_replicas
    expected = [alone(some_requests(replica)) for replica in range(num_replicas)]
    ranks = run_replicas(settings, chaos=0.1)
    headers = [step.header for step in ranks[0][1]]
    for outputs, steps, _ in ranks:
        assert outputs == expected
        assert [step.header for step in steps] == headers
    buckets = {header.bucket for header in headers}
    assert len(buckets - {0}) >= (1 if 4 in buckets else 2)
    if num_replicas > 1:
        replayed = [header for header in headers if header.bucket]
        assert any(min(header.num_rows) == 0 for header in replayed)
        assert any(0 < min(header.num_rows) < max(header.num_rows) for header in replayed)
    num_tokens = 2 * sum(sum(header.num_rows) for header in headers)
    spread = config.moe_a2a_backend != "none"
    loads = [loads[1] for _, _, loads in ranks]
    assert (sum(loads) if spread else loads[0]) == num_tokens
    assert spread or len(set(loads)) == 1


def test_ranks_replay_the_collectives_that_they_captured():
    """A replay's ledger is the one of capture, and all ranks captured the same."""
    config = EngineConfig(**SIZES | DP2 | {"enable_symm_mem": True, "symm_mem_strict": True})

    @torch.inference_mode()
    def body(rank, groups):
        runner = tiny_runner(config, rank, groups)
        graphs = runner._steps._graphs
        found = []
        for bucket in runner.buckets:
            groups.ledger.cut()
            graphs.launch(runner._steps._state.apply(Body()), bucket, (0, 0))
            found.append(groups.ledger.cut() == graphs._graphs[bucket].calls != ())
        return found, runner.captured

    results = run_thread_world(config.layout, body, time_limit_s=120.0)
    assert all(all(found) for found, _ in results)
    assert len({captured for _, captured in results}) == 1
    assert len(results[0][1]) == 32


@pytest.mark.parametrize(
    ("settings", "head_ranks"),
    [({}, 1), ({"tp_size": 2}, 2), (DP2, 2), (DP2 | {"enable_dp_lm_head": True}, 1)],
)
def test_graphs_of_a_rank_keep_their_logits_in_one_place(settings, head_ranks):
    """Else every row of every bucket would have a vocabulary of its own in the GPU's memory."""
    config = EngineConfig(**SIZES | settings)

    @torch.inference_mode()
    def body(rank, groups):
        graphs = tiny_runner(config, rank, groups)._steps._graphs
        places = {b: graph.logits_BV.data_ptr() for b, graph in graphs._graphs.items()}
        assert list(places) == [3, 2, 1]
        return [b for b, place in places.items() if place != graphs._room_BV.data_ptr()]

    elsewhere = [] if head_ranks == 1 else [1]  # a row that comes from several ranks
    found = run_thread_world(config.layout, body, time_limit_s=120.0)
    assert found == [elsewhere] * config.layout.world_size


def test_a_masked_replica_replays_with_the_others():
    """Its rows wait for a grammar outside the graph; the other replica waits for nobody."""
    config = EngineConfig(**SIZES | DP2)
    barred = np.zeros(mask_bytes(VOCAB) * 8, np.uint8)
    barred[7] = 1
    bits = np.packbits(barred, bitorder="little").tobytes()

    def body(rank, groups):
        runner = tiny_runner(config, rank, groups)
        request = Request([5, 6, 7 + rank], 4)
        driver = RandomDriver([request], Random(0), chaos=0.0, **DRIVER)
        for number in range(3):
            plan = driver.plan()
            header = planned_header([plan, plan], number, runner.buckets)
            masked = rank == 0 and number == 1
            sent = plan.body
            if masked:
                sent = Body(num_masked=1, grow_slots=sent.grow_slots, grow_pages=sent.grow_pages)
            pending = runner.launch(header, sent, rank)
            if masked:
                assert header.bucket == 1
                assert not runner.is_done(pending)
                runner.mask(pending, Mask(1, number, pack([0]), bits))
            driver.feed(plan, runner.finish(pending).ids.tolist())
        return request.output

    masked, free = run_thread_world(config.layout, body, time_limit_s=120.0)
    assert masked[1] == 7
    assert alone([Request([5, 6, 7, masked[0], 7], 1)])[0] == masked[2:3]
    assert alone([Request([5, 6, 8], 3)])[0] == free


@pytest.mark.row("S8")
@pytest.mark.parametrize(("inside", "launched"), [(True, 1), (False, 4)])
def test_a_lone_decode_launches_one_row_if_attention_gathers_inside(inside, launched, monkeypatch):
    settings = A2A | {"tp_size": 4, "ep_size": 4, "moe_dense_tp_size": 1, "max_num_seqs": 1}
    config = EngineConfig(**SIZES | settings | {"disable_attn_tp_gather": inside})
    row_multiple = plan_of(config).row_multiple
    assert buckets_up_to(12, row_multiple) == ((*range(1, 9), 12) if inside else (4, 8, 12))
    expected = launched, alone([Request([5, 6, 7], 2)])[0]
    seen: list[int] = []
    forward = SelfAttention._attend

    def spy(self, x_TD, *others):
        seen.append(x_TD.shape[0])
        return forward(self, x_TD, *others)

    monkeypatch.setattr(SelfAttention, "_attend", spy)

    def body(rank, groups):
        runner = tiny_runner(config, rank, groups)
        request = Request([5, 6, 7], 2)
        one = DRIVER | {"max_num_seqs": 1, "num_pages": 8}
        driver = RandomDriver([request], Random(0), chaos=0.0, **one)
        for number in range(2):
            plan = driver.plan()
            header = planned_header([plan], number, runner.buckets, row_multiple)
            seen.clear()
            driver.feed(plan, runner.finish(runner.launch(header, plan.body, 0)).ids.tolist())
            groups.tp.transport.all_reduce(torch.zeros(1))  # nobody clears what others have seen
        return header.bucket, request.output

    assert run_thread_world(config.layout, body, time_limit_s=120.0) == [expected] * 4
    assert set(seen) == {launched}


def test_a_slot_at_another_offset_on_one_rank_is_told_before_the_first_step():
    """What one rank captured differs; the gang compares it (tests/deployments/test_gang.py)."""
    settings = {"tp_size": 2, "enable_symm_mem": True}
    config = EngineConfig(**SIZES | settings)

    def body(rank, groups):
        if rank == 1:
            groups.arena.place = lambda slot: slot.offset + 512 * (slot.role == "reduced")
        return tiny_runner(config, rank, groups).captured

    captured = run_thread_world(config.layout, body, time_limit_s=120.0)
    assert captured[0] != captured[1]
