"""What `lockstep bench serve` asks: prompts with fixed seeds, and when each is sent. Pure.

Random prompts are token ids (exact lengths, for `/v1/completions`) or words (about one token each
in large vocabularies; the service says how many they were). With `prefix_len` they begin with one
of a few shared prefixes. A JSONL file holds prompts of one's own.

    >>> [ask.prompt for ask in random_asks(PromptShape(input_len=3, as_ids=True), 2, seed=0)]
    [[9794, 817, 2876], [5183, 9468, 6825]]
    >>> arrivals(3, float("inf")).tolist()
    [0.0, 0.0, 0.0]
"""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

LOWEST_ID = 10
"""Ids below are often special ones."""

WORDS = (  # noqa: SIM905 - to be read
    "the of and to in is that it was for on are as with his they at be this from have or by one "
    "had not but what all were when we there can an your which their said if do will each about "
    "how up out them then she many some so these would other into has more her two like him see "
    "time could no make than first been its who now people my made over did down only way find "
    "use may water long little very after words called just where most know"
).split()


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptShape:
    """Lengths in tokens where `as_ids`, else in words."""

    input_len: int = 1024
    """After the shared prefix."""
    output_len: int = 128
    range_ratio: float = 0.0
    """Lengths are drawn from (1 - ratio) to (1 + ratio) times those above."""
    prefix_len: int = 0
    num_prefixes: int = 1
    as_ids: bool = False
    max_token_id: int = 9999

    def __post_init__(self) -> None:
        for name in ("input_len", "output_len", "num_prefixes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.prefix_len < 0:
            raise ValueError(f"prefix_len={self.prefix_len} must be at least 0")
        if not 0.0 <= self.range_ratio < 1.0:
            raise ValueError(f"range_ratio={self.range_ratio} must be at least 0 and below 1")
        if self.max_token_id < 0:
            raise ValueError(f"max_token_id={self.max_token_id} must be at least 0")


@dataclass(frozen=True, slots=True)
class Ask:
    """One request to come. `prompt` is text, token ids, or the messages of a chat."""

    prompt: str | list[int] | list[dict[str, Any]]
    max_tokens: int
    num_input: int | None = None
    """Tokens of the prompt, where that is known before the service says it."""

    @property
    def is_chat(self) -> bool:
        return isinstance(self.prompt, list) and isinstance(self.prompt[0], dict)


def random_asks(shape: PromptShape, num: int, *, seed: int, run: int = 0) -> list[Ask]:
    """The same for the same seed; another number of prompts begins with the same ones.

    Another `run` has the same lengths and other tokens, so that it finds none of an earlier run's
    prompts in a prefix cache.
    """
    prefixes = [
        _tokens(shape, shape.prefix_len, np.random.default_rng([seed, 1, run, number]))
        for number in range(shape.num_prefixes)
    ]
    asks = []
    for number in range(num):
        lengths = np.random.default_rng([seed, 0, number])
        length = _length(shape.input_len, shape.range_ratio, lengths)
        max_tokens = _length(shape.output_len, shape.range_ratio, lengths)
        own = _tokens(shape, length, np.random.default_rng([seed, 2, run, number]))
        ids = prefixes[number % shape.num_prefixes] + own
        if shape.as_ids:
            asks.append(Ask(ids, max_tokens, len(ids)))
        else:
            asks.append(Ask(" ".join(WORDS[each] for each in ids), max_tokens))
    return asks


def _length(middle: int, ratio: float, draw: np.random.Generator) -> int:
    low, high = math.floor(middle * (1 - ratio)), math.ceil(middle * (1 + ratio))
    return int(draw.integers(max(1, low), high, endpoint=True))


def _tokens(shape: PromptShape, length: int, draw: np.random.Generator) -> list[int]:
    """Ids of tokens, or of words."""
    high = shape.max_token_id if shape.as_ids else len(WORDS) - 1
    low = min(LOWEST_ID, high) if shape.as_ids else 0
    return draw.integers(low, high, length, endpoint=True).tolist()


def read_asks(lines: Iterable[str], num: int, output_len: int, *, source: str) -> list[Ask]:
    """The first `num` prompts of a JSONL file, over again from the top if it has fewer.

    A line has `prompt` (text or token ids) or `messages`, and may have `max_tokens`.
    """
    found: list[Ask] = []
    for number, line in enumerate(lines, 1):
        if len(found) == num:
            break
        if line.strip():
            found.append(_read_ask(line, output_len, f"line {number} of {source}"))
    if not found:
        raise ValueError(f"{source} has no prompts: give one JSON object with `prompt` a line")
    return [found[number % len(found)] for number in range(num)]


def _read_ask(line: str, output_len: int, where: str) -> Ask:
    try:
        told = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is no JSON: {error}") from None
    if not isinstance(told, dict):
        raise ValueError(f"{where} is not a JSON object")
    prompt: Any = told.get("prompt")
    if prompt is None:
        prompt = _list_of(dict, told.get("messages"))
    elif not isinstance(prompt, str):
        prompt = _list_of(int, prompt)
    if not prompt:
        raise ValueError(
            f"{where} has no prompt: it needs `prompt` (text or token ids) or `messages` "
            "(a list of objects)"
        )
    max_tokens = told.get("max_tokens", output_len)
    if type(max_tokens) is not int or max_tokens < 1:
        raise ValueError(f"{where} has max_tokens={max_tokens!r}: it must be a number from 1")
    is_ids = isinstance(prompt, list) and type(prompt[0]) is int
    return Ask(prompt, max_tokens, len(prompt) if is_ids else None)


def _list_of(kind: type, value: Any) -> list[Any] | None:
    is_one = isinstance(value, list) and all(type(each) is kind for each in value)
    return value if is_one else None


def arrivals(
    num: int, rate: float, burstiness: float = 1.0, *, seed: int = 0
) -> NDArray[np.float64]:
    """Seconds from the start at which each of `num` requests is sent.

    Gaps are drawn from a gamma distribution of that shape: 1 is a Poisson process, less comes in
    bursts, more is evener. All are scaled so that the last is sent after `num / rate` seconds: a
    run offers the rate it says.
    """
    if not rate > 0 or not burstiness > 0:
        raise ValueError(f"request_rate={rate} and burstiness={burstiness} must be above 0")
    if math.isinf(rate):
        return np.zeros(num)
    gaps = np.random.default_rng([seed, 3]).gamma(burstiness, 1 / (rate * burstiness), num)
    times = np.cumsum(gaps)
    return times * (num / rate / times[-1]) if num and times[-1] > 0 else times
