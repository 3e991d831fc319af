"""The engine without Ray: the same answers whatever the layout, the pressure and the order."""

import pytest

from deployments.engine import EngineFailed
from deployments.llm import LLM, SamplingParams
from tests.e2e.conftest import await_so
from workers.bundled.questions import answer

QUESTIONS = [
    "What is 128+305?",
    "Count from 3 to 40",
    "Add 77 and 8.",
    "Reverse the word hello",
    "Count from 50 to 90",
    "What is 999+999?",
]
GREEDY = SamplingParams(max_tokens=200, temperature=0.0)
SAMPLED = SamplingParams(max_tokens=40, temperature=1.0, seed=11, ignore_eos=True)


def serve(**settings):
    return LLM(**({"device": "cpu", "kv_cache_gb": 0.1} | settings))


@pytest.fixture(scope="module")
def sampled():
    """What one rank without overlap, sharing or company samples."""
    with serve(overlap=False, enable_prefix_caching=False, max_num_seqs=1) as llm:
        return [one.ids for one in llm.chat(QUESTIONS, SAMPLED)]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"in_process": True},
        {"overlap": False, "page_size": 4},
        {"tp_size": 4},  # two key-value heads: each on two ranks
        {"tp_size": 2, "dp_size": 2, "max_num_seqs": 4},
        {"max_num_batched_tokens": 16, "max_num_seqs": 16},  # prompts in pieces
    ],
    ids=str,
)
def test_answers_do_not_depend_on_the_layout(settings, sampled):
    with serve(**settings) as llm:
        answers = [one.text for one in llm.chat(QUESTIONS, GREEDY)]
        ids = [one.ids for one in llm.chat(QUESTIONS, SAMPLED)]
    assert answers == [answer(question) for question in QUESTIONS]
    assert ids == sampled


def test_answers_survive_preemption():
    with serve(max_model_len=256, kv_cache_gb=0.0005, page_size=4) as llm:
        answers = [one.text for one in llm.chat(QUESTIONS, GREEDY)]
        assert llm.engine.num_preemptions > 0
        # The acks of the last plans come by themselves.
        await_so(lambda: llm.engine.num_free_pages == llm.engine.num_pages)
    assert answers == [answer(question) for question in QUESTIONS]


def test_an_equal_beginning_is_not_computed_twice():
    with serve() as llm:
        first, second = (llm.chat(["Count from 3 to 40"], GREEDY)[0] for _ in range(2))
    assert (first.num_cached, first.text) == (0, second.text)
    assert second.num_cached == len(second.prompt_ids) // 16 * 16


def test_stop_strings_end_an_answer_across_tokens():
    params = SamplingParams(max_tokens=200, temperature=0.0, stop=("12 13",))
    with serve() as llm:
        one = llm.chat(["Count from 3 to 40"], params)[0]
    assert (one.text, one.finish_reason) == ("3 4 5 6 7 8 9 10 11 ", "stop")


def test_the_chosen_token_is_the_likeliest_when_greedy():
    params = SamplingParams(max_tokens=8, temperature=0.0, logprobs=3)
    with serve() as llm:
        one = llm.chat(["What is 128+305?"], params)[0]
    assert [values.token for values in one.logprobs] == one.ids
    for values in one.logprobs:
        assert values.rank == 1
        assert values.top_ids[0] == values.token
        assert list(values.top_logprobs) == sorted(values.top_logprobs, reverse=True)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"model": "/does/not/exist"}, "config.json does not exist"),
        ({"tp_size": 3}, "4 attention heads do not divide over 3 ranks"),
        ({"max_model_len": 4096, "kv_cache_gb": 0.001}, "max_model_len"),
    ],
)
def test_an_engine_that_cannot_start_says_why(settings, sentence):
    with pytest.raises((EngineFailed, ValueError), match=sentence):
        serve(**settings).close()


def test_a_prompt_that_does_not_fit_is_refused_and_the_engine_goes_on():
    with serve(max_model_len=128) as llm:
        with pytest.raises(ValueError, match="128"):
            llm.generate([[5] * 128], GREEDY)
        assert llm.chat(["What is 128+305?"], GREEDY)[0].text == "433"
