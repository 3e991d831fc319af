"""Captured decodes of several ranks: all run one bucket, idle or not, and say what one rank says.

The kernels run in Triton's interpreter, and what a GPU would replay is run as it is.
"""

import json
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import NamedTuple

import numpy as np
import pytest
import torch

from parallel.groups import single_rank_groups
from parallel.padding import buckets_up_to
from parallel.thread_world import run_thread_world
from tests.workers.random_driver import RandomDriver, Request, planned_header
from workers.architectures import plan_of
from workers.config import EngineConfig
from workers.layers.attention import SelfAttention
from workers.protocol import Body, Header, Mask, Sampling, mask_bytes, pack
from workers.runner import ModelRunner
from workers.step import StepResult

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is chosen at import"),
    pytest.mark.timeout(300),
    pytest.mark.row("S10"),
    pytest.mark.row("S12"),
]

CPU = torch.device("cpu")
VOCAB = 64
MODEL = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "vocab_size": VOCAB,
    "hidden_size": 32, "num_hidden_layers": 2, "mlp_only_layers": [0], "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 32, "moe_intermediate_size": 16,
    "num_experts": 8, "num_experts_per_tok": 2, "decoder_sparse_step": 1, "norm_topk_prob": True,
    "rope_theta": 10000.0, "rms_norm_eps": 1e-6, "attention_bias": False, "hidden_act": "silu",
    "bos_token_id": 0, "eos_token_id": 1, "initializer_range": 0.3, "torch_dtype": "float32",
    "max_position_embeddings": 64, "tie_word_embeddings": True, "use_sliding_window": False,
}  # fmt: skip
FOLDER = tempfile.TemporaryDirectory()
Path(FOLDER.name, "config.json").write_text(json.dumps(MODEL))
SIZES = {
    "model": FOLDER.name, "load_format": "dummy", "page_size": 4, "max_num_seqs": 3,
    "max_num_batched_tokens": 24, "max_model_len": 32, "kv_cache_gb": 0.05, "device": "cpu",
}  # fmt: skip
NUM_PAGES = 24
DRIVER = {"max_num_seqs": 3, "num_pages": NUM_PAGES, "page_size": 4, "budget": 24}
DP2 = {"tp_size": 2, "dp_size": 2, "enable_dp_attention": True}
DP2_TP2 = {"tp_size": 4, "dp_size": 2, "enable_dp_attention": True}
A2A = {"moe_a2a_backend": "torch"}


@pytest.fixture(autouse=True)
def one_kernel_at_a_time(monkeypatch):
    """Triton's interpreter keeps what it runs in globals; ranks are threads here."""
    from triton.runtime.interpreter import GridExecutor

    launch, lock = GridExecutor.__call__, threading.RLock()

    def launch_alone(self, *args, **kwargs):
        with lock:
            return launch(self, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", launch_alone)


def new_runner(config: EngineConfig, rank=0, groups=None, *, use_kernels=True) -> ModelRunner:
    runner = ModelRunner(
        config, config.layout, rank, groups or single_rank_groups(), CPU,
        lambda stage, done, total: None, use_kernels=use_kernels,
    )  # fmt: skip
    runner.allocate(min(NUM_PAGES, runner.max_pages))
    return runner


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


class Step(NamedTuple):
    header: Header
    result: StepResult


def alone(requests: Sequence[Request]) -> list[list[int]]:
    """One rank, no kernels, no buckets, one request after another."""
    runner = new_runner(EngineConfig(**SIZES), use_kernels=False)
    driver = RandomDriver(list(requests), Random(0), chaos=0.0, **DRIVER | {"max_num_seqs": 1})
    while not driver.is_done:
        planned = driver.plan()
        result = runner.finish(runner.launch(planned.header(), planned.body, 0))
        driver.feed(planned, result.ids.tolist())
    return [request.output for request in requests]


def run_replicas(settings, *, chaos: float):
    """(outputs by replica, every rank's steps, what experts counted): each rank drives all replicas
    by itself, from the same seed, so all see the same headers."""
    config = EngineConfig(**SIZES | settings)
    num_replicas = config.layout.num_replicas

    @torch.inference_mode()
    def body(rank, groups):
        runner = new_runner(config, rank, groups)
        before = {n: load.clone() for n, load in runner._model.expert_loads().items()}
        requests = [some_requests(replica) for replica in range(num_replicas)]
        drivers = [
            RandomDriver(list(mine), Random(7 + replica), chaos=chaos, **DRIVER)
            for replica, mine in enumerate(requests)
        ]
        replica, steps = groups.attn_dp.rank, []
        for number in range(400):
            if all(driver.is_done for driver in drivers):
                break
            plans = [driver.plan() for driver in drivers]
            header = planned_header(plans, number, runner.buckets, runner._row_multiple)
            mine = plans[replica]
            result = runner.finish(runner.launch(header, mine.body, replica))
            told = tell(groups, header, replica, result.ids)
            for driver, plan, ids in zip(drivers, plans, told, strict=True):
                driver.feed(plan, ids)
            steps.append(Step(header, result))
        after = runner._model.expert_loads()
        loads = {n: int((after[n] - before[n]).sum()) for n in after}
        return [[r.output for r in mine] for mine in requests], steps, loads

    return run_thread_world(config.layout, body, time_limit_s=240.0)


def tell(groups, header: Header, replica: int, ids: np.ndarray) -> list[list[int]]:
    """What every replica sampled, as the driver's acks would say it."""
    if groups.attn_dp.size == 1:
        return [ids.tolist()]
    most = max(header.num_logit_rows)
    mine = torch.zeros(most, dtype=torch.int64)
    mine[: len(ids)] = torch.from_numpy(ids.astype(np.int64))
    out = torch.zeros(groups.attn_dp.size * most, dtype=torch.int64)
    if most:
        groups.attn_dp.transport.all_gather(out, mine)
    counts = header.num_logit_rows
    return [out[r * most :][: counts[r]].tolist() for r in range(groups.attn_dp.size)]


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
        runner = new_runner(config, rank, groups)
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
        graphs = new_runner(config, rank, groups)._steps._graphs
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
        runner = new_runner(config, rank, groups)
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
        runner = new_runner(config, rank, groups)
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
        return new_runner(config, rank, groups).captured

    captured = run_thread_world(config.layout, body, time_limit_s=120.0)
    assert captured[0] != captured[1]
