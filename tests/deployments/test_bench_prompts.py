import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deployments.bench_prompts import Ask, PromptShape, arrivals, random_asks, read_asks

SHAPES = st.builds(
    PromptShape,
    input_len=st.integers(1, 40),
    output_len=st.integers(1, 40),
    range_ratio=st.floats(0.0, 0.99),
    prefix_len=st.integers(0, 20),
    num_prefixes=st.integers(1, 4),
    as_ids=st.just(True),
    max_token_id=st.integers(0, 5000),
)


@settings(max_examples=60)
@given(SHAPES, st.integers(1, 12), st.integers(0, 5))
def test_prompts_are_as_long_as_asked_and_begin_with_a_shared_prefix(shape, num, seed):
    asks = random_asks(shape, num, seed=seed)
    assert len(asks) == num
    for number, ask in enumerate(asks):
        own = len(ask.prompt) - shape.prefix_len
        assert ask.num_input == len(ask.prompt)
        assert abs(own - shape.input_len) <= shape.input_len * shape.range_ratio + 1
        assert abs(ask.max_tokens - shape.output_len) <= shape.output_len * shape.range_ratio + 1
        assert own >= 1
        assert ask.max_tokens >= 1
        assert all(0 <= token <= shape.max_token_id for token in ask.prompt)
        twin = asks[number % shape.num_prefixes]
        assert ask.prompt[: shape.prefix_len] == twin.prompt[: shape.prefix_len]


@settings(max_examples=30)
@given(SHAPES, st.integers(1, 10), st.integers(0, 5))
def test_a_seed_fixes_the_prompts_and_more_prompts_begin_with_the_same(shape, num, seed):
    assert random_asks(shape, num, seed=seed) == random_asks(shape, num + 3, seed=seed)[:num]


def test_another_seed_gives_other_prompts_and_prompts_differ():
    shape = PromptShape(input_len=20, as_ids=True)
    asks = random_asks(shape, 50, seed=0)
    assert len({tuple(ask.prompt) for ask in asks}) == 50
    assert asks != random_asks(shape, 50, seed=1)


@settings(max_examples=30)
@given(SHAPES, st.integers(1, 10))
def test_another_run_has_the_same_lengths(shape, num):
    one, other = (random_asks(shape, num, seed=0, run=run) for run in (0, 1))
    assert [len(ask.prompt) for ask in one] == [len(ask.prompt) for ask in other]
    assert [ask.max_tokens for ask in one] == [ask.max_tokens for ask in other]


def test_another_run_shares_no_beginning():
    shape = PromptShape(input_len=20, prefix_len=10, num_prefixes=3, as_ids=True)
    one, other = (random_asks(shape, 30, seed=0, run=run) for run in (0, 1))
    assert not {tuple(ask.prompt[:3]) for ask in one} & {tuple(ask.prompt[:3]) for ask in other}


def test_words_are_text_of_that_many_words():
    [ask] = random_asks(PromptShape(input_len=7, prefix_len=3), 1, seed=0)
    assert len(ask.prompt.split()) == 10
    assert ask.num_input is None


@pytest.mark.parametrize(
    ("shape", "sentence"),
    [
        ({"input_len": 0}, "input_len=0 must be at least 1"),
        ({"range_ratio": 1.0}, "range_ratio=1.0 must be at least 0 and below 1"),
        ({"prefix_len": -1}, "prefix_len=-1"),
    ],
)
def test_a_shape_that_cannot_be_is_refused(shape, sentence):
    with pytest.raises(ValueError, match=sentence):
        PromptShape(**shape)


RATES = st.floats(0.1, 1000.0)


@settings(max_examples=100)
@given(st.integers(1, 300), RATES, st.floats(0.1, 10.0), st.integers(0, 3))
def test_requests_come_in_order_and_the_last_at_the_rate_asked(num, rate, burstiness, seed):
    times = arrivals(num, rate, burstiness, seed=seed)
    assert len(times) == num
    assert (np.diff(times) >= 0).all()
    assert times[0] >= 0
    assert times[-1] == pytest.approx(num / rate)
    assert (times == arrivals(num, rate, burstiness, seed=seed)).all()


def test_burstiness_is_how_uneven_the_gaps_are():
    def unevenness(burstiness):
        gaps = np.diff(arrivals(20_000, 10.0, burstiness))
        return np.std(gaps) / np.mean(gaps)

    assert unevenness(1.0) == pytest.approx(1.0, abs=0.05)  # Poisson
    assert unevenness(0.25) == pytest.approx(2.0, abs=0.15)
    assert unevenness(4.0) == pytest.approx(0.5, abs=0.05)


def test_a_rate_of_nothing_is_refused():
    with pytest.raises(ValueError, match="must be above 0"):
        arrivals(3, 0.0)


def test_a_file_is_read_and_begun_again_when_it_is_short():
    chat = [{"role": "user", "content": "hi"}]
    lines = [
        json.dumps({"prompt": "one", "max_tokens": 5}),
        "",
        json.dumps({"prompt": [4, 5, 6]}),
        json.dumps({"messages": chat}),
    ]
    asks = read_asks(lines, 4, 9, source="f")
    assert asks == [Ask("one", 5), Ask([4, 5, 6], 9, 3), Ask(chat, 9), Ask("one", 5)]
    assert [ask.is_chat for ask in asks] == [False, False, True, False]
    assert read_asks(lines, 1, 9, source="f") == asks[:1]


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("{", "line 1 of f is no JSON"),
        ("[1]", "line 1 of f is not a JSON object"),
        ("{}", "line 1 of f has no prompt"),
        ('{"prompt": ""}', "line 1 of f has no prompt"),
        ('{"prompt": [1, "a"]}', "line 1 of f has no prompt"),
        ('{"messages": "hi"}', "line 1 of f has no prompt"),
        ('{"prompt": "a", "max_tokens": 0}', "line 1 of f has max_tokens=0"),
        ("  ", "f has no prompts"),
    ],
)
def test_a_line_that_is_no_prompt_is_named(line, sentence):
    with pytest.raises(ValueError, match=sentence):
        read_asks([line], 1, 9, source="f")
