from random import Random

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.groups import single_rank_groups
from parallel.layout import Layout
from tests.headers import header_of
from tests.workers.random_driver import Planned, RandomDriver, Request
from workers.batch import ForwardBatch, ProtocolError
from workers.config import EngineConfig
from workers.protocol import (
    Admit,
    Body,
    Header,
    Mask,
    Sampling,
    TokenLogprobs,
    mask_bytes,
    pack,
)
from workers.runner import ModelRunner
from workers.step import StepResult

CPU = torch.device("cpu")
VOCAB = 97
WINDOW = 5
HEAD_DIM = 4


def marks(layer: int, token: int, position: int) -> list[int]:
    """What a token leaves in the cache: small whole numbers that tell tokens and places apart."""
    return [
        (token * 31 + position * 17 + layer * 7 + d * (token + 3)) % 61 for d in range(HEAD_DIM)
    ]


class ChecksumModel:
    """Its next token is a checksum of all tokens it can read back from the cache.

    With queries of zero attention is the mean of the values, so times the number of tokens it is
    their sum. The second layer sees a window only.
    """

    num_layers, num_heads, cache_shapes = 2, 1, ((1, HEAD_DIM), (1, HEAD_DIM))
    vocab_size, max_position_embeddings = VOCAB, 64
    stop_token_ids = (0,)
    dtype = torch.float32

    def __init__(self) -> None:
        self.poison = -1
        """A token id whose rows come out as NaN."""

    def expert_loads(self) -> dict[int, torch.Tensor]:
        return {}

    def forward(self, batch: ForwardBatch) -> torch.Tensor:
        ids, positions = batch.input_ids_T.tolist(), batch.positions_T.tolist()
        hidden_TD = torch.zeros(len(ids), 2 * HEAD_DIM)
        for layer, window in enumerate((None, WINDOW)):
            pairs = zip(ids, positions, strict=True)
            values = torch.tensor([marks(layer, *p) for p in pairs]).float().view(-1, 1, HEAD_DIM)
            values[batch.input_ids_T == self.poison] = float("nan")
            q_THD = torch.zeros(len(ids), 2, HEAD_DIM)
            out = batch.attention.attend(
                layer, q_THD, values, values, scale=1.0, sliding_window=window
            )
            counts_T1 = (batch.positions_T + 1).clamp(max=window or VOCAB)[:, None]
            mine = slice(layer * HEAD_DIM, (layer + 1) * HEAD_DIM)
            hidden_TD[:, mine] = (out[:, 1] * counts_T1).round()
        return hidden_TD

    def logits(self, hidden_RD: torch.Tensor, num_logit_rows=None, *, out=None) -> torch.Tensor:
        primes = torch.tensor([3, 5, 7, 11, 13, 17, 19, 23])
        next_R1 = (hidden_RD * primes).sum(-1, keepdim=True) % VOCAB
        logits_RV = -((torch.arange(VOCAB) - next_R1).abs() * 0.5)
        return logits_RV if out is None else out.copy_(logits_RV)

    def room_for_logits(self, num_rows: int) -> torch.Tensor:
        return torch.empty(num_rows, VOCAB)


def next_token(tokens: list[int]) -> int:
    """What the checksum model says after `tokens`, worked out by hand."""
    sums = [
        sum(marks(layer, tokens[at], at)[d] for at in range(first, len(tokens)))
        for layer, first in ((0, 0), (1, max(0, len(tokens) - WINDOW)))
        for d in range(HEAD_DIM)
    ]
    return sum(s * p for s, p in zip(sums, (3, 5, 7, 11, 13, 17, 19, 23), strict=True)) % VOCAB


def new_runner(num_pages: int = 64, **changes) -> ModelRunner:
    settings = {"page_size": 4, "max_num_seqs": 4, "max_num_batched_tokens": 24} | changes
    runner = ModelRunner(
        EngineConfig(**settings),
        Layout(),
        0,
        single_rank_groups(),
        CPU,
        lambda stage, done, total: None,
        make_model=lambda *parts: ChecksumModel(),
    )
    runner.allocate(min(num_pages, runner.max_pages))
    return runner


def step(runner: ModelRunner, planned: Planned) -> StepResult:
    return runner.finish(runner.launch(planned.header(), planned.body, 0))


def header(num_rows: int, num_logit_rows: int) -> Header:
    return header_of((num_rows,), (num_logit_rows,))


def run_body(runner: ModelRunner, body: Body, num_rows: int, num_logit_rows: int) -> StepResult:
    return runner.finish(runner.launch(header(num_rows, num_logit_rows), body, 0))


def entering(slot: int, tokens: list[int], sampling: Sampling, pages: list[int]) -> Body:
    admit = Admit(slot, pack(tokens), len(tokens), 0, pack(pages), sampling)
    return Body(admits=(admit,), chunk_slots=pack([slot]), chunk_lengths=pack([len(tokens)]))


def streams(requests: list[Request], seed: int, *, num_seqs: int, chaos: float) -> list[list[int]]:
    runner = new_runner()
    runner.allocate(num_pages=14)
    driver = RandomDriver(
        requests, Random(seed), max_num_seqs=num_seqs, num_pages=14, page_size=4, budget=24,
        chaos=chaos,
    )  # fmt: skip
    for _ in range(2000):
        if driver.is_done:
            return [request.output for request in requests]
        planned = driver.plan()
        driver.feed(planned, step(runner, planned).ids.tolist())
    raise TimeoutError("the requests do not end")


def some_requests(seed: int) -> list[Request]:
    """Some begin alike, so that they share pages; some draw and some are penalised."""
    random = Random(seed)
    start = [random.randrange(VOCAB) for _ in range(12)]
    kinds = [
        Sampling(temperature=0.0),
        Sampling(temperature=2.0, seed=7, nonce=random.randrange(99)),
        Sampling(temperature=3.0, seed=8, top_k=20, top_p=0.9, frequency_penalty=1.0),
        Sampling(temperature=0.0, repetition_penalty=1.5, min_tokens=3, stop_token_ids=(5, 6)),
    ]
    requests = []
    for _ in range(7):
        own = [random.randrange(VOCAB) for _ in range(random.randint(1, 6))]
        prompt = start[: random.choice([0, 4, 8, 12])] + own
        requests.append(Request(prompt, random.randint(1, 12), random.choice(kinds)))
    return requests


@settings(max_examples=40)
@given(seed=st.integers(0, 2**32))
def test_streams_do_not_depend_on_paging_chunks_sharing_or_preemption(seed):
    plain = streams(some_requests(seed), seed, num_seqs=1, chaos=0.0)
    assert streams(some_requests(seed), seed, num_seqs=4, chaos=0.5) == plain


def test_greedy_streams_are_those_worked_out_by_hand():
    random = Random(1)
    requests = [Request([random.randrange(VOCAB) for _ in range(n)], 15) for n in (1, 7, 9, 16)]
    expected = []
    for request in requests:
        tokens = list(request.prompt)
        while len(tokens) < len(request.prompt) + request.max_tokens:
            tokens.append(next_token(tokens))
        expected.append(tokens[len(request.prompt) :])
    assert streams(requests, 1, num_seqs=4, chaos=0.3) == expected


def test_an_idle_body_samples_nothing():
    result = run_body(new_runner(), Body(), 0, 0)
    assert (result.ids.tolist(), result.logprobs, result.poisoned_rows) == ([], (), ())
    assert result.ids.dtype.name == "int32"
    assert len(result.ledger) == 32


def test_a_header_that_counts_other_rows_is_refused():
    body = entering(0, [1, 2, 3], Sampling(), [0])
    with pytest.raises(
        ProtocolError, match="should have 4 rows and 1 logit rows in replica 0, and"
    ):
        new_runner().launch(header(4, 1), body, 0)
    with pytest.raises(ProtocolError, match="this rank counts 3 and 1"):
        new_runner().launch(header(3, 0), body, 0)
    with pytest.raises(ProtocolError, match=r"counts 1 replicas' rows .* and this is replica 1"):
        new_runner().launch(header(3, 1), body, 1)


def test_a_step_may_be_launched_before_the_one_before_is_finished():
    runner = new_runner()
    first = runner.launch(header(3, 1), entering(0, [1, 2, 3], Sampling(temperature=0.0), [0]), 0)
    second = runner.launch(header(1, 1), Body(), 0)
    assert runner.is_done(first)
    tokens = [1, 2, 3]
    for pending in (first, second):
        assert runner.finish(pending).ids.tolist() == [next_token(tokens)]
        tokens.append(next_token(tokens))


@pytest.mark.parametrize("lengths", [[11], [4, 1, 6], [1] * 11], ids=str)
def test_prompt_logprobs_come_with_their_chunks(lengths):
    random = Random(2)
    prompt = [random.randrange(VOCAB) for _ in range(11)]
    sampling = Sampling(temperature=0.0, num_prompt_logprobs=2)
    runner = new_runner()
    admit = Admit(2, pack(prompt), len(prompt), 0, pack([4, 2, 9]), sampling)
    got: dict[int, TokenLogprobs] = {}
    for index, length in enumerate(lengths):
        body = Body(
            admits=(admit,) if index == 0 else (),
            chunk_slots=pack([2]),
            chunk_lengths=pack([length]),
        )
        for slot, first, values in run_body(
            runner, body, length, int(index == len(lengths) - 1)
        ).prompt_logprobs:
            assert slot == 2
            got |= {first + offset: value for offset, value in enumerate(values)}
    assert sorted(got) == list(range(1, 11))
    for position, value in got.items():
        likeliest = next_token(prompt[:position])
        distance = (torch.arange(VOCAB) - likeliest).abs() * -0.5
        expected = distance.log_softmax(0)
        assert value.token == prompt[position]
        assert value.logprob == pytest.approx(expected[prompt[position]].item(), abs=1e-5)
        assert value.rank == int((expected > expected[prompt[position]]).sum()) + 1
        assert value.top_ids[0] == likeliest
        assert len(value.top_logprobs) == 2
    assert run_body(runner, Body(), 1, 1).prompt_logprobs == ()


def test_a_prompts_generated_part_has_no_prompt_logprobs():
    sampling = Sampling(temperature=0.0, num_prompt_logprobs=0)
    admit = Admit(0, pack([1, 2, 3, 4, 5]), 3, 0, pack([0, 1]), sampling)
    body = Body(admits=(admit,), chunk_slots=pack([0]), chunk_lengths=pack([5]))
    ((slot, first, values),) = run_body(new_runner(), body, 5, 1).prompt_logprobs
    assert (slot, first, [value.token for value in values]) == (0, 1, [2, 3])


def test_a_poisoned_request_is_named_and_its_pages_are_safe_for_the_next():
    runner = new_runner()
    greedy = Sampling(temperature=0.0)
    runner._model.poison = 13
    run_body(runner, entering(0, [1, 2, 3], greedy, [0, 2]), 3, 1)
    both = run_body(runner, entering(1, [5, 6, 7, 13], greedy, [1, 3]), 5, 2)
    assert both.poisoned_rows == (1,)
    assert both.ids[0] == next_token([1, 2, 3, next_token([1, 2, 3])])
    assert run_body(runner, Body(), 2, 2).poisoned_rows == (1,)

    runner._model.poison = -1
    heir = entering(2, [7, 8], greedy, [1])
    first = run_body(runner, msgspec.structs.replace(heir, leaves=pack([1])), 3, 2)
    second = run_body(runner, Body(), 2, 2)
    assert (first.poisoned_rows, second.poisoned_rows) == ((), ())
    assert first.ids[1] == next_token([7, 8])
    assert second.ids[1] == next_token([7, 8, next_token([7, 8])])


def test_the_cache_is_no_larger_than_requests_can_fill():
    assert new_runner().max_pages == 4 * 64 // 4
    assert new_runner(max_model_len=10).max_pages == 4 * 3


def test_the_models_own_limit_gives_way_to_a_small_cache():
    page = 2 * 2 * 4 * HEAD_DIM * 4
    runner = new_runner(kv_cache_gb=3 * page / 2**30)
    assert (runner.max_pages, runner.max_model_len) == (3, 12)


def test_a_limit_that_was_asked_for_must_fit():
    page = 2 * 2 * 4 * HEAD_DIM * 4
    with pytest.raises(ValueError, match="max_model_len=50 needs 13 pages of 256 bytes and the"):
        new_runner(kv_cache_gb=3 * page / 2**30, max_model_len=50)
    with pytest.raises(ValueError, match="max_model_len=65 is more than the 64 positions"):
        new_runner(max_model_len=65)


def test_more_pages_than_there_is_memory_for_are_refused():
    runner = new_runner()
    with pytest.raises(ValueError, match=r"num_pages=999 must be from 1 to max_pages=64"):
        runner.allocate(999)


def test_the_bundled_model_says_what_it_needs_and_runs():
    config = EngineConfig(max_num_seqs=2, max_num_batched_tokens=16, max_model_len=32)
    runner = ModelRunner(
        config, Layout(), 0, single_rank_groups(), CPU, lambda stage, done, total: None
    )
    runner.allocate(4)
    greedy = Sampling(temperature=0.0)
    whole = run_body(runner, entering(0, [5, 6, 7, 8], greedy, [2]), 4, 1).ids.tolist()
    admit = Admit(1, pack([5, 6, 7, 8]), 4, 0, pack([1]), greedy)
    run_body(
        runner,
        Body(leaves=pack([0]), admits=(admit,), chunk_slots=pack([1]), chunk_lengths=pack([3])),
        3,
        0,
    )
    pieces = run_body(runner, Body(chunk_slots=pack([1]), chunk_lengths=pack([1])), 1, 1)
    assert pieces.ids.tolist() == whole


# Masks


def only_ids(ids: list[list[int]]) -> bytes:
    bits = np.zeros((len(ids), mask_bytes(VOCAB) * 8), np.uint8)
    for row, allowed in enumerate(ids):
        bits[row, allowed] = 1
    return np.packbits(bits, axis=1, bitorder="little").tobytes()


def two_entering(sampling: Sampling) -> Body:
    admits = tuple(Admit(slot, pack([5, 6]), 2, 0, pack([slot]), sampling) for slot in (0, 1))
    return Body(admits=admits, chunk_slots=pack([0, 1]), chunk_lengths=pack([2, 2]), num_masked=1)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_masked_row_samples_what_is_allowed_and_the_others_as_ever(temperature):
    sampling = Sampling(temperature=temperature, seed=1)
    plain = run_body(
        new_runner(), msgspec.structs.replace(two_entering(sampling), num_masked=0), 4, 2
    )
    runner = new_runner()
    pending = runner.launch(header(4, 2), two_entering(sampling), 0)
    assert not runner.is_done(pending)
    runner.mask(pending, Mask(1, 0, pack([1]), only_ids([[40]])))
    assert runner.is_done(pending)
    assert runner.finish(pending).ids.tolist() == [plain.ids[0], 40]
    again = runner.launch(header(2, 2), Body(num_masked=1), 0)
    runner.mask(again, Mask(1, 1, pack([0]), only_ids([[7, 8]])))
    assert runner.finish(again).ids[0] in (7, 8)


@pytest.mark.parametrize(
    ("rows", "bits"),
    [([], b""), ([0, 1], only_ids([[1], [1]])), ([2], only_ids([[1]])), ([0], b"12")],
)
def test_a_mask_that_does_not_fit_its_step_is_refused(rows, bits):
    runner = new_runner()
    pending = runner.launch(header(4, 2), two_entering(Sampling()), 0)
    with pytest.raises(ProtocolError, match="mask"):
        runner.mask(pending, Mask(1, 0, pack(rows), bits))
