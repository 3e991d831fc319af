"""The GPU's steps against the CPU's, against eager runs, and against transformers in float32."""

import pytest
import torch

from parallel.groups import single_rank_groups
from parallel.layout import Layout
from parallel.padding import choose_bucket, choose_prompt_bucket
from tests.headers import header_of
from tests.workers.reference import SEQUENCES, expected_logits, save_tiny
from tests.workers.test_models import GROUPS, INDEX, LATENT
from workers.config import EngineConfig
from workers.protocol import Admit, Body, Header, Mode, Sampling, pack
from workers.runner import ModelRunner

pytestmark = pytest.mark.gpus(1)

MOE = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
FAMILIES = {
    "llama": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "qwen2 window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 4}),
    "qwen3": ("Qwen3", {"head_dim": 16, "num_attention_heads": 6, "num_key_value_heads": 2}),
    "qwen3 moe": ("Qwen3Moe", {**MOE, "norm_topk_prob": True}),
    "deepseek v2": ("DeepseekV2", {**LATENT, "q_lora_rank": None}),
    "deepseek v3": ("DeepseekV3", {**LATENT, **GROUPS}),
    "deepseek v3.2": ("DeepseekV32", {**LATENT, **GROUPS, **INDEX, "index_topk": 6}),
}
PROMPTS = [list(range(3, 20)), [258, 0, 17, 200, 33], [7], list(range(40, 51))]
SLOTS = [2, 0, 5, 4]
GREEDY = [Sampling(temperature=0.0)] * 4


def new_runner(folder, device: str, use_kernels=None, **changes) -> ModelRunner:
    settings = {"page_size": 4, "max_num_seqs": 6, "max_num_batched_tokens": 64}
    runner = ModelRunner(
        EngineConfig(model=str(folder), kv_cache_gb=0.01, **settings | changes),
        Layout(),
        0,
        single_rank_groups(),
        torch.device(device),
        lambda stage, done, total: None,
        use_kernels=use_kernels,
    )
    runner.allocate(min(96, runner.max_pages))
    return runner


def header(num_rows: int, num_logit_rows: int) -> Header:
    return header_of((num_rows,), (num_logit_rows,))


def decoding_of(runner: ModelRunner, num_rows: int) -> Header:
    """As the driver says it: in a bucket, if one holds the rows, and so replayed."""
    bucket = choose_bucket((num_rows,), runner.buckets) if runner.buckets else 0
    return header_of((num_rows,), bucket=bucket, mode=Mode.DECODE)


def streams(runner: ModelRunner, sampling: list[Sampling], num_tokens: int) -> list[list[int]]:
    """All prompts in one step, then decodes, two steps under way at a time."""
    admits = [
        Admit(slot, pack(prompt), len(prompt), 0, pack(range(16 * i, 16 * i + 16)), one)
        for i, (slot, prompt, one) in enumerate(zip(SLOTS, PROMPTS, sampling, strict=True))
    ]
    lengths = [len(prompt) for prompt in PROMPTS]
    body = Body(admits=tuple(admits), chunk_slots=pack(SLOTS), chunk_lengths=pack(lengths))
    under_way = [runner.launch(header(sum(lengths), 4), body, 0)]
    steps = []
    for _ in range(num_tokens):
        under_way.append(runner.launch(decoding_of(runner, 4), Body(), 0))
        steps.append(runner.finish(under_way.pop(0)).ids.tolist())
    ascending = sorted(SLOTS)
    rows = [dict(zip(SLOTS, steps[0], strict=True))]
    rows += [dict(zip(ascending, step, strict=True)) for step in steps[1:]]
    return [[row[slot] for row in rows] for slot in SLOTS]


def mixed_streams(runner: ModelRunner, num_tokens: int) -> tuple[list[list[int]], list[int]]:
    """Prompts one after another, in two chunks each, beside the decodes of those before; then
    decodes alone; two steps under way. (tokens by prompt, the bucket of each step)"""
    sampled: list[list[int]] = []
    buckets, under_way, ids = [], [], []
    decoding: list[int] = []

    def launch(body: Body, num_chunk_rows: int, ends: int | None = None) -> None:
        num_rows = len(decoding) + num_chunk_rows
        sampled.append([*decoding] if ends is None else [*decoding, ends])
        told = decoding_of(runner, num_rows)
        if num_chunk_rows:
            bucket = 0
            if runner.prompt_buckets:
                bucket = choose_prompt_bucket((num_rows,), (1,), runner.prompt_buckets)
            told = header_of((num_rows,), (len(sampled[-1]),), bucket=bucket, mode=Mode.MIXED)
        buckets.append(told.bucket)
        under_way.append(runner.launch(told, body, 0))
        if len(under_way) == 2:
            ids.append(runner.finish(under_way.pop(0)).ids.tolist())

    for i, (slot, prompt) in enumerate(zip(SLOTS, PROMPTS, strict=True)):
        pages = pack(range(16 * i, 16 * i + 16))
        admits = (Admit(slot, pack(prompt), len(prompt), 0, pages, GREEDY[0]),)
        first = len(prompt) // 2
        if first:
            body = Body(admits=admits, chunk_slots=pack([slot]), chunk_lengths=pack([first]))
            launch(body, first)
            admits = ()
        rest = len(prompt) - first
        body = Body(admits=admits, chunk_slots=pack([slot]), chunk_lengths=pack([rest]))
        launch(body, rest, slot)
        decoding = sorted([*decoding, slot])
    for _ in range(num_tokens):
        launch(Body(), 0)
    ids += [runner.finish(pending).ids.tolist() for pending in under_way]
    tokens: dict[int, list[int]] = {slot: [] for slot in SLOTS}
    for slots, step in zip(sampled, ids, strict=True):
        for slot, token in zip(slots, step, strict=True):
            tokens[slot].append(token)
    return list(tokens.values()), buckets


def watch_buckets(runner: ModelRunner) -> list[int]:
    """Fills with the bucket of each step that a graph runs."""
    launch, buckets = runner._steps._graphs.launch, []
    runner._steps._graphs.launch = lambda *step: buckets.append(step[1]) or launch(*step)
    return buckets


MIXED = [
    Sampling(temperature=0.0),
    Sampling(temperature=1.0, seed=5, nonce=7),
    Sampling(temperature=0.8, seed=6, top_k=40, top_p=0.9),
    Sampling(temperature=0.0, repetition_penalty=1.3),
]


@pytest.mark.parametrize("sampling", [GREEDY, MIXED], ids=["greedy", "mixed"])
@pytest.mark.parametrize("case", FAMILIES)
def test_float32_tokens_are_those_of_a_cpu(case, sampling, tmp_path):
    family, changes = FAMILIES[case]
    save_tiny(tmp_path, family, **changes)
    expected = streams(new_runner(tmp_path, "cpu", dtype="float32"), sampling, 40)
    assert streams(new_runner(tmp_path, "cuda", dtype="float32"), sampling, 40) == expected


@pytest.mark.parametrize(
    ("case", "cache"),
    [*((case, "auto") for case in FAMILIES), ("llama", "fp8_e4m3"), ("qwen3", "fp8_e4m3")],
)
def test_a_replay_gives_the_tokens_of_an_eager_run_of_its_rows(case, cache, tmp_path):
    family, changes = FAMILIES[case]
    save_tiny(tmp_path, family, **changes)
    runner = new_runner(tmp_path, "cuda", dtype="bfloat16", kv_cache_dtype=cache)
    buckets = watch_buckets(runner)
    replayed = streams(runner, GREEDY, 40)
    assert buckets == [4] * 40
    runner = new_runner(tmp_path, "cuda", dtype="bfloat16", kv_cache_dtype=cache)
    graphs = runner._steps._graphs
    graphs._graphs = {b: each._replace(graph=None) for b, each in graphs._graphs.items()}
    assert streams(runner, GREEDY, 40) == replayed


WITH_PROMPT_GRAPHS = [case for case in FAMILIES if not case.startswith("deepseek")]


@pytest.mark.parametrize("case", WITH_PROMPT_GRAPHS)
def test_float32_tokens_of_replayed_prompts_are_those_of_a_cpu(case, tmp_path):
    family, changes = FAMILIES[case]
    save_tiny(tmp_path, family, **changes)
    expected, _ = mixed_streams(new_runner(tmp_path, "cpu", dtype="float32"), 20)
    runner = new_runner(tmp_path, "cuda", dtype="float32", prefill_graph_max_tokens=64)
    tokens, buckets = mixed_streams(runner, 20)
    assert (tokens, min(buckets)) == (expected, 4)


@pytest.mark.parametrize(
    ("case", "cache"),
    [*((case, "auto") for case in WITH_PROMPT_GRAPHS), ("llama", "fp8_e4m3")],
)
def test_a_replayed_prompt_gives_the_tokens_of_an_eager_run_of_its_rows(case, cache, tmp_path):
    family, changes = FAMILIES[case]
    save_tiny(tmp_path, family, **changes)
    settings = {"dtype": "bfloat16", "kv_cache_dtype": cache, "prefill_graph_max_tokens": 64}
    runner = new_runner(tmp_path, "cuda", **settings)
    graphs = runner._steps._prompt_graphs._graphs
    assert sorted(graphs) == [16, 32, 64]
    assert all(graph.recording.graph is not None for graph in graphs.values())
    replayed, buckets = mixed_streams(runner, 40)
    assert {16, 4} <= set(buckets)
    assert 0 not in buckets
    runner = new_runner(tmp_path, "cuda", **settings)
    graphs = runner._steps._prompt_graphs._graphs
    for bucket, graph in graphs.items():
        graphs[bucket] = graph._replace(recording=graph.recording._replace(graph=None))
    assert mixed_streams(runner, 40)[0] == replayed


@torch.inference_mode()
def test_graphs_of_all_buckets_take_no_more_memory_than_is_counted(tmp_path):
    """Only the largest is measured. Logits of the others, each for itself, would be 300 MB here."""
    save_tiny(tmp_path, "Llama", vocab_size=300_000)
    runner = new_runner(tmp_path, "cuda", dtype="bfloat16", max_num_seqs=64)
    counted = runner._measure_graphs(runner._new_steps(96))
    steps = runner._new_steps(96)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before, _ = torch.cuda.mem_get_info()
    steps.capture(lambda done, total: None)
    torch.cuda.empty_cache()
    after, _ = torch.cuda.mem_get_info()
    assert before - after <= counted


@pytest.mark.parametrize("case", FAMILIES)
def test_bfloat16_logits_are_as_near_as_those_of_transformers(case, tmp_path):
    family, changes = FAMILIES[case]
    theirs = save_tiny(tmp_path, family, **changes)
    exact = expected_logits(theirs, SEQUENCES)
    rough = torch.cat(
        [
            theirs.to("cuda", torch.bfloat16)(torch.tensor([list(s)], device="cuda")).logits[0]
            for s in SEQUENCES
        ]
    )
    runner = new_runner(tmp_path, "cuda", dtype="bfloat16")
    admits = [
        Admit(i, pack(s), len(s), 0, pack(range(16 * i, 16 * i + 16)), Sampling(temperature=0.0))
        for i, s in enumerate(SEQUENCES)
    ]
    lengths = [len(s) for s in SEQUENCES]
    body = Body(admits=tuple(admits), chunk_slots=pack([0, 1]), chunk_lengths=pack(lengths))
    hidden, forward = [], runner._model.forward
    runner._model.forward = lambda batch: hidden.append(forward(batch)) or hidden[-1]
    runner.finish(runner.launch(header(sum(lengths), 2), body, 0))
    with torch.inference_mode():
        ours = runner._model.logits(hidden[0])
    our_error = (ours.cpu() - exact).abs().mean()
    their_error = (rough.float().cpu() - exact).abs().mean()
    assert our_error <= 1.2 * their_error
