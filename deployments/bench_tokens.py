"""Whether what `lockstep bench offline` timed is what the model says: answers are read as prompts.

A timed answer, after its own prompt, is given to the engine as one prompt whose log-probabilities
are asked for. That is a pass without decode graphs, cache reads or draws (no graphs at all but of
steps that `prefill_graph_max_tokens` replays): every place has the tokens before it as they were
answered (teacher forcing), and says which token it finds likeliest. Each answered token must be
that one, unless the two lie closer than twice the noise.

The noise is measured: the same requests run once more, not timed, and tell the log-probabilities
that decoding gave the two likeliest tokens of each place; the same tokens of the same places, read
as prompts, must have the same but for rounding. The largest difference is the noise. Two tokens may
change places where they lie closer than twice that, because each of them may be off by it. Since
something broken would widen its own limit, differences have limits of their own: `MEAN_APART` and
`LARGEST_APART`.
"""

import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from deployments.bench_cases import Timed, sample
from deployments.llm import LLM, Answer, SamplingParams
from workers.protocol import TokenLogprobs

MEAN_APART, LARGEST_APART = 0.1, 0.5
"""Of log-probabilities, decoded and read. With random weights bfloat16 gives means of 0.006 where
rows are 1024 wide and 0.05 where they are 4096 wide and layers 36; transformers' own, against
float32, are 0.009 after 28 layers of 1024, 0.020 and 0.024 after 4 and 9 of 4096. Others saw 0.32
between two engines at worst (vLLM, pull request 18352)."""
NUM_TOLD = 2
"""Likeliest tokens told of each place: those that may change places."""


class Reading(NamedTuple):
    """What a case's sampled answers are, read as prompts."""

    case: str
    gaps: list[float]
    """How much likelier than the answered token the pass found its own: 0 if they are the same."""
    apart: list[float]
    """Differences between log-probabilities, decoded and read, of the same tokens."""


def greedy(length: int, logprobs: int | None = None) -> SamplingParams:
    return SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=length, logprobs=logprobs)


def read_again(llm: LLM, timed: Timed[Answer]) -> Reading:
    """Run a case's requests once more, and read its answers, and theirs, as prompts."""
    picked = sample(len(timed.answers))
    params = [
        greedy(len(answer.ids), NUM_TOLD if number in picked else None)
        for number, answer in enumerate(timed.answers)
    ]
    repeats = llm.generate(timed.prompts, params, detokenize=False)
    read = _as_prompts(llm, [timed.answers[number] for number in picked])
    others = [number for number in picked if repeats[number].ids != timed.answers[number].ids]
    read_repeats = dict(zip(picked, read, strict=True))
    read_repeats |= zip(others, _as_prompts(llm, [repeats[n] for n in others]), strict=True)
    apart = [
        difference
        for number, places in read_repeats.items()
        for decoded, place in zip(repeats[number].logprobs, places, strict=False)
        for difference in differences(decoded, place)
    ]
    gaps = [place.top_logprobs[0] - place.logprob for places in read for place in places]
    return Reading(timed.case, gaps, apart)


def _as_prompts(llm: LLM, answers: Sequence[Answer]) -> list[list[TokenLogprobs]]:
    """Of each answer's tokens, in order; a last one that fills the model's length has none."""
    params = SamplingParams(
        temperature=0.0, ignore_eos=True, max_tokens=1, prompt_logprobs=NUM_TOLD
    )
    prompts = [(answer.prompt_ids + answer.ids)[: llm.max_model_len - 1] for answer in answers]
    read = llm.generate(prompts, params, detokenize=False) if prompts else []
    return [
        [one.prompt_logprobs[place] for place in range(len(answer.prompt_ids), len(prompt))]
        for answer, prompt, one in zip(answers, prompts, read, strict=True)
    ]


def differences(decoded: TokenLogprobs, read: TokenLogprobs) -> list[float]:
    """Of every token that both sides tell."""
    theirs = _told(read)
    return [
        abs(logprob - theirs[token]) for token, logprob in _told(decoded).items() if token in theirs
    ]


def _told(values: TokenLogprobs) -> dict[int, float]:
    tops = dict(zip(values.top_ids, values.top_logprobs, strict=True))
    return tops | {values.token: values.logprob}


def verdicts(readings: Sequence[Reading]) -> list[dict[str, Any]]:
    """One line a case. The noise is that of all cases: model, machine and kernels are the same.

    >>> good, bad = verdicts([Reading("a", [0.0, 0.01], [0.004, 0.006]), Reading("b", [2.0], [])])
    >>> good["value"], good["ties"], good["noise"], bad["value"], bad["wrong"]
    (True, 1, 0.006, False, 1)
    """
    every = [difference for reading in readings for difference in reading.apart]
    noise = max(every, default=0.0)
    return [_verdict(reading, noise) for reading in readings]


def _verdict(reading: Reading, noise: float) -> dict[str, Any]:
    others = [gap for gap in reading.gaps if gap > 0.0]
    wrong = sum(gap > 2 * noise for gap in others)
    largest = max(reading.apart, default=0.0)
    mean = statistics.fmean(reading.apart) if reading.apart else 0.0
    is_ok = bool(reading.gaps) and not wrong and mean <= MEAN_APART and largest <= LARGEST_APART
    return {
        "case": "tokens_ok",
        "of": reading.case,
        "value": is_ok,
        "tokens": len(reading.gaps),
        "ties": len(others) - wrong,
        "wrong": wrong,
        "largest_gap": _rounded(max(reading.gaps, default=0.0)),
        "logprob_apart": {"largest": _rounded(largest), "mean": _rounded(mean)},
        "noise": _rounded(noise),
    }


def _rounded(value: float) -> float:
    """Three digits that count, however small."""
    return float(f"{value:.3g}")
