"""Chats as token ids: what a row of training data looks like.

A row is one chat in the checkpoint's chat template, filled with turns until the next no longer
fits, so nearly every token is used and the first turn of a row is a chat of one question. Every
byte is its own token. The standard library only: rows are built in many processes.

    >>> ids = prompt_ids(["What is 1+1?"])
    >>> bytes(ids[1:18]), ids[18] == IM_END
    (b'user\\nWhat is 1+1?', True)
"""

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random

from workers.bundled.questions import ADDITION, COUNTING, REVERSING, random_word, training_pairs

ENDOFTEXT, IM_START, IM_END = 256, 257, 258
VOCAB_SIZE = 259

SYSTEM_MESSAGES = (
    "You are a helpful assistant.",
    "You are a careful calculator.",
    "Answer briefly.",
    "Answer with the result only.",
    "You can add, count and reverse words.",
    "You are Lockstep.",
)

_SYSTEM_SHARE = 0.3
_NUM_TRIES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class RowKind:
    """A length of row and what is asked in it."""

    length: int
    """Tokens in a row, one more than the network reads: the last is only a target."""

    shares: Mapping[str, float]
    """Relative weight of each task's questions."""

    max_system_words: int
    """Words, of at most eight letters, in a system message that means nothing."""


SHORT = RowKind(
    length=129, shares={ADDITION: 0.65, COUNTING: 0.1, REVERSING: 0.25}, max_system_words=4
)
LONG = RowKind(
    length=641, shares={ADDITION: 0.35, COUNTING: 0.45, REVERSING: 0.2}, max_system_words=24
)

SINGLE_WEIGHT = 4
"""Weight in the loss of each token of an answer that is one number or one word.

A count is hundreds of tokens, nearly all of them easy, and would drown the four of a sum.
"""


def message_ids(role: str, content: str) -> list[int]:
    return [IM_START, *f"{role}\n{content}".encode(), IM_END, *b"\n"]


def prompt_ids(
    questions: Sequence[str], answers: Sequence[str] = (), system: str | None = None
) -> list[int]:
    """A chat of all `questions`, the earlier ones answered, open for the last one's answer."""
    ids = [] if system is None else message_ids("system", system)
    for question, reply in zip(questions, answers, strict=False):
        ids += message_ids("user", question) + message_ids("assistant", reply)
    return ids + message_ids("user", questions[-1]) + [IM_START, *b"assistant\n"]


def answer_ids(reply: str) -> list[int]:
    return [*reply.encode(), IM_END]


def pack_rows(seed: str, n: int, kind: RowKind) -> tuple[bytes, bytes]:
    """`n` rows: the ids as 16-bit integers, and one byte a token for its weight in the loss."""
    rng = Random(seed)
    all_ids, all_weights = array("H"), bytearray()
    pairs = training_pairs(rng, kind.shares)
    for _ in range(n):
        ids = []
        if rng.random() < _SYSTEM_SHARE:
            ids = message_ids("system", _system(rng, kind.max_system_words))
        weights = [0] * len(ids)
        num_tries = 0
        while num_tries < _NUM_TRIES:
            question, reply = next(pairs)
            prompt, target = prompt_ids([question]), answer_ids(reply)
            if len(ids) + len(prompt) + len(target) + 1 > kind.length:
                num_tries += 1
                continue
            weight = 1 if " " in reply else SINGLE_WEIGHT
            ids += [*prompt, *target, *b"\n"]
            weights += [0] * len(prompt) + [weight] * len(target) + [0]
        num_padding = kind.length - len(ids)
        all_ids.extend(ids + [ENDOFTEXT] * num_padding)
        all_weights += bytes(weights + [0] * num_padding)
    return all_ids.tobytes(), bytes(all_weights)


def _system(rng: Random, max_words: int) -> str:
    """One of ours, or words that mean nothing: the model learns to look past either."""
    if rng.random() < 0.5:
        return rng.choice(SYSTEM_MESSAGES)
    num_words = rng.randint(1, max_words)
    return " ".join(random_word(rng, rng.randint(2, 8)) for _ in range(num_words)).capitalize()
