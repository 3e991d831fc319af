from random import Random

import numpy as np
import pytest
import torch

from kernels.philox import exponential_noise, words_all
from workers.batch import StepRows
from workers.drawing import Truncation, draw, lowest_kept
from workers.protocol import Admit, Mask, Sampling, mask_bytes, pack
from workers.sampling import Allowed, Sampled, Sampler

CPU = torch.device("cpu")
GREEDY = Sampling(temperature=0.0)


def new_sampler(*requests: Sampling, vocab_size: int = 8, tokens=(1, 2), num_prompt=2) -> Sampler:
    sampler = Sampler(max_num_seqs=max(len(requests), 1), vocab_size=vocab_size, device=CPU)
    for slot, sampling in enumerate(requests):
        sampler.admit(Admit(slot, pack(tokens), num_prompt, 0, b"", sampling))
    return sampler


def sample(sampler: Sampler, logits, slots: list[int], positions: list[int]) -> Sampled:
    """One decode of each of `slots`; `positions` are those of the tokens that are sampled."""
    rows = StepRows(
        np.array(slots),
        (),
        np.array(positions) - 1,
        np.zeros(len(slots), np.int64),
        np.arange(len(slots)),
        np.array(slots),
        (),
    )
    return sampler.sample(torch.as_tensor(logits, dtype=torch.float32), rows)


def only(sampling: Sampling, logits: list[float], position: int = 2, **how) -> int:
    sampler = new_sampler(sampling, vocab_size=len(logits), **how)
    return int(sample(sampler, [logits], [0], [position]).ids_R[0])


def test_greedy_takes_the_lowest_of_equal_ids():
    assert only(GREEDY, [0.0, 3.0, 3.0, 1.0]) == 1
    assert only(Sampling(temperature=1e-7), [0.0, 3.0, 3.0, 1.0]) == 1


def test_the_last_token_of_each_slot_stays_on_the_device():
    sampler = new_sampler(GREEDY, GREEDY, GREEDY)
    sample(sampler, torch.eye(8)[[5, 6]], [2, 0], [2, 2])
    assert sampler.last_token_S.tolist() == [6, 0, 5, 0]


def test_bias_is_added():
    assert only(Sampling(temperature=0.0, logit_bias=((3, 2.0),)), [0.0, 1.0, 0.0, 0.0]) == 3
    assert only(Sampling(temperature=0.0, logit_bias=((1, -2.0),)), [0.0, 1.0, 0.5, 0.0]) == 2


def test_stop_ids_are_barred_until_enough_tokens_are_out():
    sampler = new_sampler(Sampling(temperature=0.0, min_tokens=2, stop_token_ids=(7, 6)), GREEDY)
    logits = torch.arange(8.0).expand(2, 8)
    picks = [sample(sampler, logits, [0, 1], [at, at]).ids_R.tolist() for at in (2, 3, 4, 5)]
    assert picks == [[5, 7], [5, 7], [7, 7], [7, 7]]


def test_presence_and_frequency_count_what_came_out_and_not_the_prompt():
    presence = Sampling(temperature=0.0, presence_penalty=1.5)
    assert only(presence, [0.0, 2.0, 1.0], tokens=(1, 1), num_prompt=2) == 1
    assert only(presence, [0.0, 2.0, 1.0], tokens=(1, 1), num_prompt=1) == 2
    frequency = Sampling(temperature=0.0, frequency_penalty=0.6)
    assert only(frequency, [0.0, 2.0, 1.0], tokens=(0, 1), num_prompt=1) == 1
    assert only(frequency, [0.0, 2.0, 1.0], tokens=(0, 1, 1), num_prompt=1) == 2


def test_repetition_counts_the_prompt_and_shrinks_either_sign():
    repetition = Sampling(temperature=0.0, repetition_penalty=2.0)
    assert only(repetition, [0.0, 3.0, 2.0], tokens=(1,), num_prompt=1) == 2
    assert only(repetition, [-1.0, -1.5, -9.0], tokens=(0,), num_prompt=1) == 1


def test_counts_follow_the_sampled_tokens_and_start_afresh_with_a_request():
    frequency = Sampling(temperature=0.0, frequency_penalty=1.0)
    sampler = new_sampler(GREEDY, frequency)
    logits = torch.tensor([[0.0, 2.0, 0.5, 0, 0, 0, 0, 0]]).expand(2, 8)
    outs = [sample(sampler, logits, [0, 1], [at, at]).ids_R.tolist() for at in range(2, 6)]
    assert outs == [[1, 1], [1, 1], [1, 2], [1, 0]]
    sampler.admit(Admit(1, pack([3]), 1, 0, b"", frequency))
    assert sample(sampler, logits, [0, 1], [1, 1]).ids_R.tolist() == [1, 1]


def test_rows_of_all_kinds_do_not_disturb_each_other():
    kinds = [
        GREEDY,
        Sampling(seed=1, nonce=5),
        Sampling(seed=1, nonce=6, top_k=3),
        Sampling(seed=2, top_p=0.8, temperature=0.7),
        Sampling(seed=2, min_p=0.1, frequency_penalty=0.5),
        Sampling(temperature=0.0, repetition_penalty=1.3, num_logprobs=2),
        Sampling(seed=9, logit_bias=((3, 4.0),), min_tokens=3, stop_token_ids=(0, 1)),
    ]
    vocab_size = 1001  # no multiple of 4 or 16
    logits = torch.randn(7, vocab_size, generator=torch.Generator().manual_seed(0)) * 3
    alone, random = [], Random(3)
    for kind, row in zip(kinds, logits, strict=True):
        sampler = new_sampler(kind, vocab_size=vocab_size)
        alone.append(int(sample(sampler, row[None], [0], [2]).ids_R))
    for _ in range(5):
        order = random.sample(range(7), random.randint(1, 7))
        sampler = new_sampler(*kinds, vocab_size=vocab_size)
        together = sample(sampler, logits[order], order, [2] * len(order)).ids_R.tolist()
        assert together == [alone[slot] for slot in order]


def test_a_draw_depends_on_seed_nonce_and_position_only():
    logits = torch.zeros(1, 500)

    def drawn(seed: int, nonce: int, position: int) -> int:
        return only(Sampling(seed=seed, nonce=nonce), logits[0].tolist(), position)

    assert drawn(1, 2, 3) == drawn(1, 2, 3)
    assert len({drawn(1, 2, 3), drawn(2, 2, 3), drawn(1, 3, 3), drawn(1, 2, 4)}) == 4
    assert drawn(1, 2, 3) != drawn(1 + 2**40, 2, 3)


def test_draws_follow_the_distribution():
    count, logits = 20_000, torch.tensor([2.0, 1.0, 0.0, -1.0, -3.0])
    ones = torch.ones(count, dtype=torch.int64)
    ids = draw(logits.expand(count, 5), None, ones * 7, torch.arange(count), ones)
    shares = torch.bincount(ids, minlength=5) / count
    torch.testing.assert_close(shares, logits.softmax(0), atol=0.015, rtol=0)


@pytest.mark.parametrize("spread", [1.0, 30.0], ids=["all ids can win", "few ids can win"])
def test_ids_that_cannot_win_are_skipped_without_changing_the_draw(spread):
    logits = torch.randn(50, 1003, generator=torch.Generator().manual_seed(1)) * spread
    seed, nonce, position = torch.arange(50), torch.arange(50) * 3, torch.arange(50) + 9
    noise = exponential_noise(words_all(seed, nonce, position, 1003))
    plain = (logits - noise.log()).argmax(-1)
    assert torch.equal(draw(logits, None, seed, nonce, position), plain)


def kept_plainly(logits: list[float], top_k: int, top_p: float, min_p: float) -> set[int]:
    """min_p, then top_k, then top_p, one id at a time."""
    weights = np.exp(np.array(logits, np.float64) - max(logits))
    order = [i for i in np.argsort(-weights, kind="stable").tolist() if weights[i] >= min_p]
    if top_k:
        order = order[:top_k]
    total, running, kept = sum(weights[i] for i in order), 0.0, set()
    for i in order:
        if top_p < 1.0 and running >= top_p * total:
            break
        kept.add(i)
        running += weights[i]
    return kept


@pytest.mark.parametrize("vocab_size", [5, 900])
@pytest.mark.parametrize("spread", [0.1, 3.0])
def test_truncation_keeps_what_a_plain_loop_keeps(vocab_size, spread):
    random = Random(vocab_size)
    logits = torch.randn(40, vocab_size, generator=torch.Generator().manual_seed(2)) * spread
    top_k = [random.choice([0, 1, 3, 300, 2000]) for _ in range(40)]
    top_p = [random.choice([1.0, 0.05, 0.5, 0.95]) for _ in range(40)]
    min_p = [random.choice([0.0, 0.01, 0.7]) for _ in range(40)]
    limits = Truncation(torch.tensor(top_k), torch.tensor(top_p), torch.tensor(min_p))
    lowest = lowest_kept(logits, limits)
    for row in range(40):
        kept = set(torch.nonzero(logits[row] >= lowest[row]).flatten().tolist())
        assert kept == kept_plainly(logits[row].tolist(), top_k[row], top_p[row], min_p[row])
        one = Truncation(*(limit[row : row + 1] for limit in limits))
        assert torch.equal(lowest_kept(logits[row : row + 1], one), lowest[row : row + 1])


def test_a_top_k_beyond_the_vocabulary_keeps_all():
    huge = Sampling(temperature=1.0, seed=3, top_k=2**63 - 1)
    logits = [0.1 * token for token in range(20)]
    assert only(huge, logits) == only(Sampling(temperature=1.0, seed=3), logits)


def test_equal_ids_stay_together():
    limits = Truncation(torch.tensor([2]), torch.tensor([1.0]), torch.tensor([0.0]))
    lowest = lowest_kept(torch.tensor([[1.0, 5.0, 1.0, 1.0, 0.0]]), limits)
    assert lowest.item() == 1.0


def test_logprobs_are_of_the_raw_logits():
    logits = torch.tensor([[0.5, 2.0, -1.0, 1.0, 0.0, 0.1, 0.2, 0.3]])
    sampling = Sampling(
        temperature=0.0, num_logprobs=2, presence_penalty=2.0, logit_bias=((2, 50.0),)
    )
    sampled = sample(new_sampler(GREEDY, sampling), logits.expand(2, 8), [0, 1], [2, 2])
    assert sampled.logprobs is not None
    ((row, value),) = sampled.logprobs.read()
    expected = logits[0].log_softmax(0)
    assert (row, value.token, value.rank, value.top_ids) == (1, 2, 8, (1, 3))
    assert value.logprob == pytest.approx(expected[2].item())
    assert value.top_logprobs == pytest.approx((expected[1].item(), expected[3].item()))


def test_zero_logprobs_are_the_tokens_own():
    sampled = sample(
        new_sampler(Sampling(temperature=0.0, num_logprobs=0)), torch.eye(8)[:1], [0], [2]
    )
    assert sampled.logprobs is not None
    ((_, value),) = sampled.logprobs.read()
    assert (value.token, value.rank, value.top_ids, value.top_logprobs) == (0, 1, (), ())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")], ids=str)
def test_a_poisoned_row_disturbs_nobody(bad):
    kinds = [
        Sampling(seed=4, top_p=0.9),
        Sampling(seed=4, top_k=2, num_logprobs=1, frequency_penalty=1.0),
        GREEDY,
    ]
    logits = torch.randn(3, 600, generator=torch.Generator().manual_seed(5))
    healthy = sample(new_sampler(*kinds, vocab_size=600), logits, [0, 1, 2], [2] * 3)
    for sick in range(3):
        poisoned = logits.clone()
        poisoned[sick] = bad
        sampled = sample(new_sampler(*kinds, vocab_size=600), poisoned, [0, 1, 2], [2] * 3)
        assert sampled.highest_R.isfinite().tolist() == [row != sick for row in range(3)]
        assert 0 <= int(sampled.ids_R[sick]) < 600
        others = [row for row in range(3) if row != sick]
        assert sampled.ids_R[others].tolist() == healthy.ids_R[others].tolist()


# Grammars


def masked(logits, allowed: list[int], sampling: Sampling, position: int = 2) -> int:
    """What one row samples of the ids that a grammar leaves it."""
    vocab = len(logits)
    bits = np.zeros(mask_bytes(vocab) * 8, np.uint8)
    bits[allowed] = 1
    mask = Mask(1, 0, pack([0]), np.packbits(bits, bitorder="little").tobytes())
    sampler = Sampler(max_num_seqs=1, vocab_size=vocab, device=CPU)
    sampler.admit(Admit(0, pack([1]), 1, 0, b"", sampling))
    rows = StepRows(
        np.array([0]), (), np.array([position - 1]), np.zeros(1, np.int64), np.arange(1),
        np.array([0]), (),
    )  # fmt: skip
    logits_RV = torch.tensor([logits])
    kept = logits_RV.clone()
    ids = sampler.sample(logits_RV, rows, Allowed.unpacked(mask, vocab, CPU)).ids_R
    assert torch.equal(logits_RV, kept)
    return int(ids[0])


LOGITS = [5.0, 4.0, 3.0, 2.0, 1.0, 0.0]


def test_the_likeliest_of_the_allowed_is_taken():
    assert masked(LOGITS, [3, 5], Sampling(temperature=0.0)) == 3


def test_a_bias_does_not_bring_back_what_is_not_allowed():
    sampling = Sampling(temperature=0.0, logit_bias=((0, 100.0), (5, 100.0)))
    assert masked(LOGITS, [3, 5], sampling) == 5


def test_draws_are_cut_among_the_allowed():
    drawn = {
        masked(LOGITS, [3, 4, 5], Sampling(temperature=50.0, top_k=2, seed=seed))
        for seed in range(30)
    }
    assert drawn == {3, 4}


def test_what_min_tokens_bars_is_lifted_where_nothing_else_is_allowed():
    sampling = Sampling(temperature=0.0, min_tokens=4, stop_token_ids=(3,))
    assert masked(LOGITS, [3, 5], sampling) == 5
    assert masked(LOGITS, [3], sampling) == 3
