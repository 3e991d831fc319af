import pytest
import torch

from kernels.philox import exponential_noise, philox4x32, words_all, words_at

# Random123's published known answers for philox4x32-10: counter, key, words.
KNOWN_ANSWERS = [
    (
        "00000000 00000000 00000000 00000000",
        "00000000 00000000",
        "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
    ),
    (
        "ffffffff ffffffff ffffffff ffffffff",
        "ffffffff ffffffff",
        "408f276d 41c83b0e a20bc7c6 6d5451fd",
    ),
    (
        "243f6a88 85a308d3 13198a2e 03707344",
        "a4093822 299f31d0",
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


def numbers(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def plain_philox(counter: list[int], key: list[int]) -> list[int]:
    c, k = list(counter), list(key)
    for _ in range(10):
        p0, p1 = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        low = 2**32
        c = [p1 // low ^ c[1] ^ k[0], p1 % low, p0 // low ^ c[3] ^ k[1], p0 % low]
        k = [(k[0] + 0x9E3779B9) % low, (k[1] + 0xBB67AE85) % low]
    return c


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_gives_the_published_answers(counter, key, words):
    assert [int(word) for word in philox4x32(numbers(counter), numbers(key))] == numbers(words)
    assert plain_philox(numbers(counter), numbers(key)) == numbers(words)


def test_every_id_draws_its_own_word_of_its_own_counter():
    seed, nonce, position = 2**63 - 5, 2**40 + 3, 77
    words = words_all(torch.tensor([seed]), torch.tensor([nonce]), torch.tensor([position]), 11)
    for token in range(11):
        counter = [token // 4, position, nonce % 2**32, nonce >> 32]
        assert int(words[0, token]) == plain_philox(counter, [seed % 2**32, seed >> 32])[token % 4]


def test_a_row_does_not_depend_on_the_other_rows():
    seeds, nonces = torch.tensor([7, 8, 7, 9]), torch.tensor([1, 1, 2, 5])
    positions = torch.tensor([3, 3, 3, 4])
    together = words_all(seeds, nonces, positions, 101)
    for row in range(4):
        one = slice(row, row + 1)
        alone = words_all(seeds[one], nonces[one], positions[one], 101)
        assert torch.equal(together[one], alone)
    assert len({tuple(row.tolist()) for row in together}) == 4


def test_words_at_some_ids_are_those_of_all_ids():
    seeds = nonces = positions = torch.arange(3)
    ids = torch.tensor([[5, 0, 96], [1, 2, 3], [95, 94, 6]])
    every = words_all(seeds, nonces, positions, 97)
    assert torch.equal(words_at(seeds, nonces, positions, ids), every.gather(1, ids))


def test_noise_is_finite_and_positive_at_the_ends():
    noise = exponential_noise(torch.tensor([0, 1, 2**32 - 129, 2**32 - 1]))
    assert noise.isfinite().all()
    assert (noise > 0).all()


def test_noise_has_the_moments_of_an_exponential():
    noise = exponential_noise(words_all(*(torch.arange(4),) * 3, 50_000))
    assert abs(noise.mean().item() - 1.0) < 0.01
    assert abs(noise.var().item() - 1.0) < 0.03
