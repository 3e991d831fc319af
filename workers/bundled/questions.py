"""What the bundled model is taught: additions, counting and reversed words.

The standard library only, so that a test can ask a served model something and know the answer
without loading anything. It knows nothing of tokens, chats or training.

    >>> answer("What is 128+305?")
    '433'
    >>> answer("Count from 3 to 6")
    '3 4 5 6'
    >>> answer("Spell hello backwards")
    'olleh'
    >>> answer("Who are you?") is None
    True

Every question belongs to a problem: "128+305=" and "What is 128+305?" are the same addition. A
question is held out when its own SHA-256, read as a number, divides by ten, or when that of its
problem's first wording does. `training_pairs` yields none of the first kind and none of the
second; `held_out` yields the second, so a sum it asks was in training under no wording.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from random import Random

Pair = tuple[str, str]
"""A question and its answer."""

ADDITION, COUNTING, REVERSING = TASKS = ("addition", "counting", "reversing")

WORDINGS: Mapping[str, tuple[str, ...]] = {
    ADDITION: (
        "What is {}+{}?",
        "{}+{}=",
        "What is {} + {}?",
        "{} + {} =",
        "Add {} and {}.",
        "Add {} and {}",
    ),
    COUNTING: ("Count from {} to {}", "Count from {} to {}."),
    REVERSING: (
        "Reverse the word {}",
        "Spell {} backwards",
        "Reverse the word {}.",
        "Spell {} backwards.",
    ),
}
"""The first wording of a task is the one that decides whether a problem is held out."""

MAX_NUMBER = 999
MAX_ANSWER_BYTES = 400
"""No range is taught whose count would be longer: 100 numbers of three digits are 399 bytes."""

MIN_WORD, MAX_WORD = 3, 10
"""Letters in a word to reverse, all of them a to z."""

_MAX_COUNTED = 140
_HELD_OUT_SHARE = 10
_NUMBER = "(0|[1-9][0-9]{0,2})"
_WORD = f"([a-z]{{{MIN_WORD},{MAX_WORD}}})"


@dataclass(frozen=True, slots=True)
class Problem:
    """What is asked, apart from how it is worded."""

    task: str
    operands: tuple[str, ...]

    def worded(self, wording: str) -> str:
        return wording.format(*self.operands)

    @property
    def solution(self) -> str:
        if self.task == REVERSING:
            return self.operands[0][::-1]
        first, second = map(int, self.operands)
        if self.task == ADDITION:
            return str(first + second)
        return " ".join(map(str, range(first, second + 1)))

    @property
    def is_held_out(self) -> bool:
        return _is_tenth(self.worded(WORDINGS[self.task][0]))


def answer(question: str) -> str | None:
    """The one right answer, or None for a question the model is not taught."""
    problem = _problem(question)
    return None if problem is None else problem.solution


def is_held_out(question: str) -> bool:
    """Whether training must never show this question, be it one of ours or not."""
    problem = _problem(question)
    return _is_tenth(question) or (problem is not None and problem.is_held_out)


def draw(task: str, rng: Random) -> Pair:
    """One question of `task` in any wording, held out or not."""
    problem = _PROBLEMS[task](rng)
    return problem.worded(rng.choice(WORDINGS[task])), problem.solution


def training_pairs(rng: Random, shares: Mapping[str, float]) -> Iterator[Pair]:
    """Questions without end, none held out; `shares` are the relative weights of the tasks."""
    tasks, weights = list(shares), list(shares.values())
    while True:
        (task,) = rng.choices(tasks, weights)
        problem = _PROBLEMS[task](rng)
        question = problem.worded(rng.choice(WORDINGS[task]))
        if not (problem.is_held_out or _is_tenth(question)):
            yield question, problem.solution


def held_out(task: str, n: int, seed: int) -> list[Pair]:
    """`n` different problems that training never showed, each in a random wording."""
    rng = Random(f"held out {task} {seed}")
    problems: dict[Problem, None] = {}
    while len(problems) < n:
        problem = _PROBLEMS[task](rng)
        if problem.is_held_out:
            problems[problem] = None
    return [(p.worded(rng.choice(WORDINGS[task])), p.solution) for p in problems]


def random_word(rng: Random, num_letters: int) -> str:
    """Half of them sound like words, half are any letters."""
    if rng.random() < 0.5:
        return "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=num_letters))
    kinds = ("bcdfghjklmnprstvwz", "aeiou")
    first = rng.randrange(2)
    return "".join(rng.choice(kinds[(first + i) % 2]) for i in range(num_letters))


def _addition(rng: Random) -> Problem:
    return Problem(ADDITION, (str(_number(rng)), str(_number(rng))))


def _counting(rng: Random) -> Problem:
    while True:
        first = _number(rng)
        last = first + rng.randrange(rng.choice((10, 60, _MAX_COUNTED)))
        if last <= MAX_NUMBER and _num_count_bytes(first, last) <= MAX_ANSWER_BYTES:
            return Problem(COUNTING, (str(first), str(last)))


def _reversing(rng: Random) -> Problem:
    return Problem(REVERSING, (random_word(rng, rng.randint(MIN_WORD, MAX_WORD)),))


_PROBLEMS = {ADDITION: _addition, COUNTING: _counting, REVERSING: _reversing}


def _number(rng: Random) -> int:
    """Two times in three of any size, else of one, two or three digits equally often."""
    if rng.random() < 2 / 3:
        return rng.randint(0, MAX_NUMBER)
    return rng.randint(0, rng.choice((9, 99, MAX_NUMBER)))


def _num_count_bytes(first: int, last: int) -> int:
    digits = sum(max(0, last - max(first, low) + 1) for low in (0, 10, 100))
    return digits + last - first


def _is_tenth(question: str) -> bool:
    return int.from_bytes(sha256(question.encode()).digest(), "big") % _HELD_OUT_SHARE == 0


def _problem(question: str) -> Problem | None:
    for task, wordings in WORDINGS.items():
        operand = _WORD if task == REVERSING else _NUMBER
        for wording in wordings:
            pattern = operand.join(map(re.escape, wording.split("{}")))
            match = re.fullmatch(pattern, question)
            if match is not None:
                problem = Problem(task, match.groups())
                return problem if _is_taught(problem) else None
    return None


def _is_taught(problem: Problem) -> bool:
    if problem.task != COUNTING:
        return True
    first, last = map(int, problem.operands)
    return first <= last and _num_count_bytes(first, last) <= MAX_ANSWER_BYTES
