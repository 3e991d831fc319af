"""Steps with prompts in buckets, as graphs replay them, on whatever there is: their rows padded and
read from tensors of fixed size, against steps that are launched as they come.

On a CPU the kernels run in Triton's interpreter and nothing is captured; `test_gpu.py` replays.
"""

import json
from random import Random

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.fp8 import NO_SCALES, Scales
from kernels.paged_decode import cut_sequences
from kernels.paged_prefill import cut_chunks
from kernels.rope_rows import rope_rows_reference
from parallel.padding import chunks_in_bucket
from parallel.thread_world import run_thread_world
from tests.headers import header_of
from tests.workers import checksum_runs, test_gpu, tiny_moe
from tests.workers.checksum_runs import CountingModel, checksum_runner, launch, streams
from tests.workers.gpu_steps import BODIES, NUM_PAGES, NUM_SLOTS, PAGE, TwoCaches
from tests.workers.kernel_runner import kernel_runner
from tests.workers.random_driver import RandomDriver, Request
from tests.workers.reference import save_tiny
from tests.workers.test_models import GROUPS, LATENT
from tests.workers.test_runner import (
    ChecksumModel,
    entering,
    header,
    next_token,
    some_requests,
)
from workers.batch import BatchState, Chunk, ProtocolError, StepRows
from workers.config import EngineConfig
from workers.gpu_attention import GpuAttention
from workers.prompt_graphs import Sizes, pack_step
from workers.protocol import Body, Mode, Sampling, pack
from workers.runner import ModelRunner

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is chosen at import"),
    pytest.mark.timeout(300),
    pytest.mark.row("S12"),
    pytest.mark.row("S13"),
]

PROMPT_GRAPHS = {"prefill_graph_max_tokens": 24}
MOE = tiny_moe.SIZES | PROMPT_GRAPHS | {"max_num_seqs": 4}


@pytest.fixture
def nan_where_nobody_wrote():
    """Memory that is asked for and not filled holds NaN, as a GPU's may."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def new_runner(model=None, *, use_kernels=True, **changes) -> ModelRunner:
    return checksum_runner(model, use_kernels=use_kernels, **PROMPT_GRAPHS | changes)


def moe_runner(rank=0, groups=None, *, use_kernels=True, **changes) -> ModelRunner:
    config = EngineConfig(**MOE | changes)
    return kernel_runner(
        config, rank, groups, num_pages=checksum_runs.NUM_PAGES, use_kernels=use_kernels
    )


# What is uploaded


@settings(deadline=None)
@given(bucket=st.integers(1, 700), data=st.data())
def test_a_bucket_has_a_block_for_every_way_to_cut_its_rows_into_chunks(bucket, data):
    left, spans = bucket, []
    for number in range(data.draw(st.integers(0, chunks_in_bucket(bucket)))):
        length = data.draw(st.integers(1, max(1, left)))
        if length > left:
            break
        spans.append((bucket - left, length, 0, number))
        left -= length
    assert len(cut_chunks(spans)) <= Sizes(bucket, bucket, 1).num_blocks


def rows_of(decodes: list[int], lengths: list[int], first_slot: int) -> StepRows:
    """Decodes of slots 0, 1, ... at these positions, then chunks from token 2 on."""
    chunks, row = [], len(decodes)
    for number, length in enumerate(lengths):
        tokens = np.arange(100 * number, 100 * number + length + 3, dtype=np.int32)
        chunks.append(Chunk(first_slot + number, 2, length, row, tokens))
        row += length
    positions = np.array(decodes + [2 + i for n in lengths for i in range(n)], np.int64)
    ends = np.array([*range(len(decodes)), *(c.row + c.length - 1 for c in chunks)], np.int64)
    slots = np.arange(len(decodes))
    return StepRows(slots, tuple(chunks), positions, 7 * positions + 1, ends, ends, ())


@settings(deadline=None)
@given(
    decodes=st.lists(st.integers(0, 90), max_size=6),
    lengths=st.lists(st.integers(1, 140), max_size=4),
    pads=st.integers(0, 20),
)
def test_packed_rows_are_the_steps_and_the_rest_is_nobodys(decodes, lengths, pads):
    rows = rows_of(decodes, lengths, 6)
    num_rows = rows.num_rows
    sizes = Sizes(max(1, num_rows + pads), min(max(1, num_rows + pads), 8), 3)
    packed = pack_step(rows, (5, num_rows, 0), sizes, spare_slot=99, spare_place=4000)
    told = sizes.cut(packed)
    assert all(len(each) and each.ctypes.data % 16 == packed.ctypes.data % 16 for each in told)
    real, decoding = slice(0, num_rows), slice(0, len(decodes))
    tokens = [int(t) for chunk in rows.chunks for t in chunk.tokens[2 : 2 + chunk.length]]
    assert told.ids_T.tolist() == [-1] * len(decodes) + tokens + [0] * (sizes.num_rows - num_rows)
    assert told.positions_T[real].tolist() == rows.positions_T.tolist()
    assert told.places_T[real].tolist() == rows.kv_rows_T.tolist()
    assert set(told.places_T[num_rows:].tolist()) <= {4000}
    assert set(told.positions_T[num_rows:].tolist()) <= {0}
    assert told.slots_T[decoding].tolist() == rows.decode_slots_B.tolist()
    assert set(told.slots_T[len(decodes) :].tolist()) <= {99}
    assert told.decode_positions_D[decoding].tolist() == decodes
    assert set(told.decode_positions_D[len(decodes) :].tolist()) <= {-1}
    assert told.logit_rows_R[: rows.num_logit_rows].tolist() == rows.logit_rows_R.tolist()
    blocks = [block for block in told.blocks_M4.tolist() if block[1]]
    assert blocks == cut_chunks(chunk.span for chunk in rows.chunks).tolist()
    assert told.num_live_P.tolist() == [5, num_rows, 0]


# Attention over what was uploaded


@pytest.mark.parametrize("window", [None, 66])
@pytest.mark.parametrize("num_shares", [1, 3, 40])
def test_rows_at_minus_one_are_cut_into_nothing(num_shares, window):
    """The others are cut as they are without them."""
    real = torch.tensor([200, 3, 63, 64])
    cut = cut_sequences(real, num_shares, sliding_window=window)
    expected = [item for item in cut.items_I3.tolist() if item[2]]
    at = torch.tensor([1, 4, 5, 260])
    positions = torch.full((300,), -1)
    positions[at] = real
    mixed = cut_sequences(positions, num_shares, sliding_window=window)
    items = [item for item in mixed.items_I3.tolist() if item[2]]
    assert items == [[int(at[seq]), part, parts] for seq, part, parts in expected]
    assert mixed.lengths_B[at].tolist() == cut.lengths_B.tolist()
    none = cut_sequences(torch.full((5,), -1), num_shares, sliding_window=window)
    assert none.items_I3[:, 2].tolist() == [0] * (5 + num_shares)


@pytest.mark.parametrize("scales", [NO_SCALES, Scales(0.03, 0.7)], ids=["plain", "e4m3"])
@pytest.mark.parametrize("is_projection", [False, True], ids=["heads", "projection"])
@pytest.mark.usefixtures("nan_where_nobody_wrote")
def test_mixed_rows_read_what_plain_torch_reads(is_projection, scales):
    torch.manual_seed(0)
    num_heads, num_kv_heads, dim, windows, num_padded = 6, 2, 16, (None, 3), 18
    caches = TwoCaches(((num_kv_heads, dim),) * 2, "cpu", scales)
    attention = GpuAttention(caches.mine, caches.table, max_decodes=NUM_SLOTS)
    norm = torch.rand(num_heads + num_kv_heads, dim)
    for body in BODIES[:4]:
        rows = caches.apply(body)
        real = slice(0, rows.num_rows)
        sizes = Sizes(num_padded, NUM_SLOTS, 1)
        spare = {"spare_slot": caches.table.spare_slot, "spare_place": NUM_PAGES * PAGE}
        inputs = sizes.cut(torch.from_numpy(pack_step(rows, [rows.num_rows], sizes, **spare)))
        attention.prepare_mixed(
            inputs.slots_T[:NUM_SLOTS], inputs.decode_positions_D, inputs.places_T,
            inputs.blocks_M4,
        )  # fmt: skip
        for layer, window in enumerate(windows):
            options = {"scale": 0.3, "sliding_window": window}
            qkv = torch.randn(num_padded, num_heads + 2 * num_kv_heads, dim)
            if scales == NO_SCALES:
                qkv[rows.num_rows :] = float("nan")
            turned = qkv
            if is_projection:
                angle = torch.rand(num_padded, dim // 2)
                rotation = torch.stack((angle.cos(), -angle.sin(), angle.sin()), 1)
                out = attention.attend_projection(layer, qkv, norm, rotation, eps=1e-6, **options)
                turned = torch.empty_like(qkv)
                rope_rows_reference(qkv, norm, rotation, turned, num_rotated=len(norm), eps=1e-6)
            q, k, v = turned.split((num_heads, num_kv_heads, num_kv_heads), 1)
            if not is_projection:
                out = attention.attend(layer, q, k, v, **options)
            expected = caches.plain.attend(layer, q[real], k[real], v[real], **options)
            torch.testing.assert_close(out[real], expected, rtol=1e-4, atol=1e-5)
            assert out[real].isfinite().all()
            assert out[rows.num_rows :].isnan().all(), "somebody computes rows that are nobody's"
    assert caches.are_alike()


# Steps of a runner


@pytest.mark.usefixtures("nan_where_nobody_wrote")
def test_greedy_streams_are_those_worked_out_by_hand():
    requests, expected = checksum_runs.greedy_requests(5)
    assert streams(requests, new_runner()) == expected


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.usefixtures("nan_where_nobody_wrote")
def test_sampled_streams_with_shared_pages_equal_those_of_plain_torch(seed):
    """Chunks in any number, prefixes that are shared, preemption: whatever the wire allows."""
    plain = streams(some_requests(seed), new_runner(use_kernels=False))
    assert streams(some_requests(seed), new_runner()) == plain


def test_a_prompt_in_a_bucket_is_launched_while_decodes_are_under_way():
    """The step before is not read yet, and is replayed from another graph."""
    model = CountingModel()
    runner = new_runner(model)
    greedy = Sampling(temperature=0.0)
    prompts = {0: [5, 6, 7], 1: [9, 8, 7, 6, 5]}
    body = entering(0, prompts[0], greedy, [3, 1, 2])
    ids = {0: runner.finish(runner.launch(prompt_header(3, 1), body, 0)).ids.tolist(), 1: []}
    decode = header_of((1,), bucket=1)
    model.num_rows.clear()
    first = runner.launch(decode, Body(), 0)
    body = entering(1, prompts[1], greedy, [7, 6, 5])
    second = runner.launch(prompt_header(6, 2), body, 0)
    ids[0] += runner.finish(first).ids.tolist()
    third = runner.launch(header_of((2,), bucket=2), Body(), 0)
    for pending in (second, third):
        for slot, token in enumerate(runner.finish(pending).ids.tolist()):
            ids[slot].append(token)
    assert model.num_rows == [1, 16, 2]
    for slot, prompt in prompts.items():
        tokens = list(prompt)
        for token in ids[slot]:
            assert token == next_token(tokens)
            tokens.append(token)
    assert [len(each) for each in ids.values()] == [4, 2]


def prompt_header(num_rows: int, num_logit_rows: int, bucket: int = 16):
    return header_of((num_rows,), (num_logit_rows,), bucket=bucket, mode=Mode.MIXED)


def test_pads_write_to_no_page_of_anybody():
    runner = new_runner()
    before = [part.clone() for part in runner._steps.cache.parts]
    body = entering(2, [1, 2, 3], Sampling(temperature=0.0), [5, 6])
    runner.finish(runner.launch(prompt_header(3, 1), body, 0))
    for part, old in zip(runner._steps.cache.parts, before, strict=True):
        changed = (part != old).flatten(2).any(dim=-1)
        assert set(changed.nonzero()[:, 1].tolist()) <= {5, checksum_runs.NUM_PAGES}


def test_a_poisoned_chunk_is_found_and_its_pages_are_zeroed_for_the_next():
    model = ChecksumModel()
    runner = new_runner(model)
    model.poison = 6
    body = entering(0, [5, 6, 7], Sampling(temperature=0.0), [0])
    result = runner.finish(runner.launch(prompt_header(3, 1), body, 0))
    assert result.poisoned_rows == (0,)
    next_body = entering(1, [1, 2], Sampling(temperature=0.0), [0])
    told = prompt_header(2, 1)
    body = msgspec.structs.replace(next_body, leaves=pack([0]))
    result = runner.finish(runner.launch(told, body, 0))
    assert (result.poisoned_rows, result.ids.tolist()) == ((), [next_token([1, 2])])


def test_every_bucket_is_run_at_its_own_size_before_ready():
    model = CountingModel()
    runner = new_runner(model, max_num_batched_tokens=40, prefill_graph_max_tokens=4096)
    assert runner.prompt_buckets == (16, 32, 40)
    every = [*reversed(runner.prompt_buckets), *reversed(runner.buckets)]
    assert model.num_rows[-len(every) :] == every
    graphs = runner._steps._prompt_graphs
    kept = [graphs._graphs[bucket].recording.out.nbytes for bucket in runner.prompt_buckets]
    assert graphs.bytes_of_others == sum(kept[:-1]) > 0
    for bucket in runner.prompt_buckets:
        body = entering(0, [5], Sampling(temperature=0.0), [0])
        model.num_rows.clear()
        runner.finish(runner.launch(prompt_header(1, 1, bucket), body, 0))
        assert model.num_rows == [bucket]
        runner.finish(runner.launch(header(0, 0), Body(leaves=pack([0])), 0))


def test_without_the_option_no_step_with_prompts_is_captured():
    model = CountingModel()
    runner = new_runner(model, prefill_graph_max_tokens=0)
    assert runner.prompt_buckets == ()
    assert model.num_rows[-len(runner.buckets) :] == list(reversed(runner.buckets))
    assert new_runner(use_kernels=False).prompt_buckets == ()
    body = entering(0, [5], Sampling(temperature=0.0), [0])
    with pytest.raises(ProtocolError, match=r"with prompts of 16 rows .* such graphs of \(\)"):
        runner.launch(prompt_header(1, 1), body, 0)


def test_a_bucket_that_cannot_hold_the_step_is_refused():
    def refused(told, body, match):
        runner = new_runner()
        with pytest.raises(ProtocolError, match=match):
            runner.launch(told, body, 0)

    body = entering(0, [5, 6], Sampling(temperature=0.0), [0])
    refused(prompt_header(2, 1, 8), body, r"with prompts of 8 rows .* graphs of \(16, 24\)")
    wrong = msgspec.structs.replace(prompt_header(2, 1), padded_rows=(24,))
    refused(wrong, body, r"16 rows of every replica and pads them to \(24,\)")
    long = entering(0, [5] * 17, Sampling(temperature=0.0), [0, 1, 2, 3, 4])
    told = msgspec.structs.replace(prompt_header(17, 1, 24), bucket=16)
    refused(told, long, "of 17 rows, 1 chunks among them, wants a graph with prompts of 16 rows")


# Real layers: experts, log-probabilities, several ranks


def moe_requests(replica: int) -> list[Request]:
    random = Random(replica)
    kinds = [
        Sampling(temperature=0.0, num_logprobs=3),
        Sampling(temperature=1.0, seed=5, nonce=replica, num_logprobs=2),
        Sampling(temperature=0.0, num_logprobs=0, num_prompt_logprobs=2),
    ]
    lengths = (13, 6, 9) if replica == 0 else (4, 7)
    return [
        Request([random.randrange(64) for _ in range(length)], 2, kind)
        for length, kind in zip(lengths, kinds, strict=False)
    ]


def assert_near(mine, theirs) -> None:
    """Log-probabilities of two runs: of the same tokens, and alike but for rounding."""
    assert len(mine) == len(theirs)
    for one, other in zip(mine, theirs, strict=True):
        assert (one.token, one.top_ids) == (other.token, other.top_ids)
        values = (one.logprob, *one.top_logprobs), (other.logprob, *other.top_logprobs)
        assert values[0] == pytest.approx(values[1], abs=1e-5)


@pytest.mark.row("S11")
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.usefixtures("nan_where_nobody_wrote")
@torch.inference_mode()
def test_experts_and_log_probabilities_are_those_of_steps_that_are_launched(seed):
    """Every step in both ways; pads reach no expert, though their rows are full of NaN."""
    replayed, launched = moe_runner(), moe_runner(use_kernels=False)
    before = replayed._model.expert_loads()[1]
    driver = RandomDriver(moe_requests(0), Random(seed), chaos=0.3, **checksum_runs.DRIVER)
    num_rows = num_told = 0
    while not driver.is_done:
        planned = driver.plan()
        num_rows += len(planned.positions)
        told, pending = launch(replayed, planned)
        assert told.bucket or not planned.positions
        mine = replayed.finish(pending)
        theirs = launched.finish(launched.launch(planned.header(), planned.body, 0))
        assert mine.ids.tolist() == theirs.ids.tolist()
        assert [row for row, _ in mine.logprobs] == [row for row, _ in theirs.logprobs]
        assert_near([each for _, each in mine.logprobs], [each for _, each in theirs.logprobs])
        for one, other in zip(mine.prompt_logprobs, theirs.prompt_logprobs, strict=True):
            assert one[:2] == other[:2]
            assert_near(one[2], other[2])
            num_told += len(one[2])
        assert (mine.poisoned_rows, theirs.poisoned_rows) == ((), ())
        driver.feed(planned, mine.ids.tolist())
    assert num_told >= 8
    assert int((replayed._model.expert_loads()[1] - before).sum()) == 2 * num_rows


LAYOUTS = [
    {"tp_size": 2, "enable_symm_mem": True, "symm_mem_strict": True},
    {"tp_size": 2, "dp_size": 2, "enable_dp_attention": True, "ep_size": 2},
    pytest.param(
        {"tp_size": 4, "dp_size": 2, "enable_dp_attention": True, "moe_a2a_backend": "torch",
         "ep_size": 4, "moe_dense_tp_size": 1},
        marks=pytest.mark.slow,
    ),
]  # fmt: skip


@pytest.mark.row("S10")
@pytest.mark.row("S11")
@pytest.mark.parametrize("layout", LAYOUTS, ids=["tp2", "dp2", "a2a"])
@pytest.mark.usefixtures("one_kernel_at_a_time")
def test_ranks_in_buckets_say_what_each_request_says_alone(layout):
    """Idle replicas run the others' bucket; what ranks recorded at capture is what they call."""
    config = EngineConfig(**MOE | layout)
    num_replicas = config.layout.num_replicas
    expected = [tiny_moe.alone(plain_requests(replica)) for replica in range(num_replicas)]

    @torch.inference_mode()
    def body(rank, groups):
        runner = moe_runner(rank, groups, **layout)
        before = runner._model.expert_loads()[1].clone()
        requests = [plain_requests(replica) for replica in range(num_replicas)]
        of_driver = checksum_runs.DRIVER | {"max_num_seqs": 3}
        steps = tiny_moe.drive(runner, groups, requests, chaos=0.1, **of_driver)
        load = int((runner._model.expert_loads()[1] - before).sum())
        graphs, found = runner._steps._prompt_graphs, []
        for bucket in runner.prompt_buckets:
            groups.ledger.cut()
            graphs.launch(runner._steps._state.apply(Body()), bucket, [0] * num_replicas)
            found.append(groups.ledger.cut() == graphs._graphs[bucket].recording.calls != ())
        outputs = [[request.output for request in mine] for mine in requests]
        return outputs, [step.header for step in steps], load, found, runner.captured

    results = run_thread_world(config.layout, body, time_limit_s=240.0)
    headers = results[0][1]
    for outputs, seen, _, found, captured in results:
        assert outputs == expected
        assert seen == headers
        assert all(found)
        assert captured == results[0][4] != b""
    with_prompts = [told for told in headers if told.mode == Mode.MIXED and told.bucket]
    assert len({told.bucket for told in with_prompts}) >= 2
    assert num_replicas == 1 or any(min(told.num_rows) == 0 for told in with_prompts)
    num_choices = 2 * sum(sum(told.num_rows) for told in headers)
    loads = [load for _, _, load, _, _ in results]
    spread = config.moe_a2a_backend != "none"
    assert (sum(loads) if spread else loads[0]) == num_choices


def plain_requests(replica: int) -> list[Request]:
    """The second replica has one, and is idle in the end."""
    random = Random(replica)
    return [
        Request([random.randrange(64) for _ in range(length)], count)
        for length, count in (((13, 2), (5, 4), (9, 2)) if replica == 0 else ((6, 2),))
    ]


@pytest.mark.slow
def test_what_a_gpus_tests_compare_is_run_in_buckets(tmp_path):
    """Their steps, here in the interpreter: else they would compare eager runs with eager runs."""
    save_tiny(tmp_path, "Llama")
    expected, buckets = test_gpu.mixed_streams(test_gpu.new_runner(tmp_path, "cpu"), 3)
    assert set(buckets) == {0}
    runner = test_gpu.new_runner(tmp_path, "cpu", use_kernels=True, prefill_graph_max_tokens=64)
    tokens, buckets = test_gpu.mixed_streams(runner, 3)
    assert tokens == expected
    assert buckets == [16] * 7 + [4] * 3


def test_the_benchmarks_requests_have_pages_for_all_their_steps():
    from tests.bench.bench_prefill_graphs import Case, Steps

    case = Case(decodes=32, context=40, chunk=9, steps=20)
    steps = Steps(case, 4, 1000)
    state = BatchState(
        max_num_seqs=33, max_num_batched_tokens=80, max_model_len=case.longest, page_size=4,
        num_pages=steps.num_pages, vocab_size=1000,
    )  # fmt: skip
    for body in steps.prompts():
        state.apply(body)
    rows = [state.apply(steps.chunk(number)) for number in range(case.num_steps)]
    assert {each.num_rows for each in rows} == {32 + 9}


@pytest.mark.slow
def test_the_benchmark_runs_each_case_in_both_ways(capsys):
    from tests.bench.bench_prefill_graphs import main

    main(
        ["--model", "", "--device", "cpu", "--decodes", "2", "--context", "8", "--chunks", "5",
         "--steps", "2", "--set", '{"page_size": 4}']
    )  # fmt: skip
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["how"] for line in lines] == ["launched", "replayed", "launched"]
    assert [line["bucket"] for line in lines] == [0, 7, 0]
    assert [line["same"] for line in lines] == [1.0, 1.0, 1.0]


# Where they cannot be captured


def test_a_model_of_latents_has_none_and_says_so(tmp_path, capfd):
    save_tiny(tmp_path, "DeepseekV3", **LATENT, **GROUPS)
    runner = moe_runner(model=str(tmp_path))
    assert runner.prompt_buckets == ()
    assert "no graphs, this model's attention reads latents" in capfd.readouterr().out
