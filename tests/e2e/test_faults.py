"""Ranks that lie, skip, stall or die: noticed, named, and nobody's answer changes."""

import asyncio
import json
import re
import time

import pytest

from deployments.driver_client import DriverClient
from deployments.generations import GenerateSpec
from deployments.llm import LLM, SamplingParams
from workers.bundled.questions import answer
from workers.protocol import Sampling, pack

QUESTIONS = ["What is 128+305?", "Count from 3 to 30", "Add 77 and 8.", "Count from 50 to 70"]
PATIENT = {"beat_ms": 1000}
"""A rank that a busy machine does not let run for two seconds is not what these tests are about."""
GREEDY = SamplingParams(max_tokens=200, temperature=0.0)


@pytest.mark.parametrize(
    ("action", "rank", "sentence"),
    [
        # Of two that differ the later is named; which of them is wrong nobody can tell.
        ("corrupt_ids", 1, r"ranks \[1\] sampled other tokens than ranks \[0\] in step"),
        ("corrupt_ids", 0, r"ranks \[1\] sampled other tokens than ranks \[0\] in step"),
        # It is found behind, or finds out itself when the next step comes.
        (
            "skip_step",
            1,
            r"ranks \[1\] have not|rank 1 (failed: ProtocolError|\(pid \d+ on .* died)",
        ),
        (
            "skip_step",
            0,
            r"ranks \[0\] have not|rank 0 (failed: ProtocolError|\(pid \d+ on .* died)",
        ),
        ("raise", 1, "rank 1 failed: PlantedFault: the failpoint of step"),
        ("kill", 1, r"rank 1 \(pid \d+ on 127.0.0.1\) died: signal SIGKILL"),
        ("stop", 0, r"ranks \[0\] have not been heard for 2.0 s"),
    ],
)
def test_a_faulty_rank_is_named_and_every_answer_is_right(
    monkeypatch, caplog, action, rank, sentence
):
    fault = {"action": action, "rank": rank, "step": 6}
    monkeypatch.setenv("LOCKSTEP_FAILPOINTS", json.dumps([fault]))
    settings = {} if action == "stop" else PATIENT
    with LLM(tp_size=2, device="cpu", kv_cache_gb=0.1, step_timeout_s=6.0, **settings) as llm:
        answers = [one.text for one in llm.chat(QUESTIONS, GREEDY)]
        counters = llm.engine.counters
    assert answers == [answer(question) for question in QUESTIONS]
    assert counters.num_recoveries == 1
    assert re.match(sentence, counters.last_failure)
    (line,) = [one for one in caplog.records if " is over: " in one.getMessage()]
    assert (line.epoch, line.rank) == (1, rank if action != "corrupt_ids" else 1)
    # The overlap has another step under way; one that disagrees is over already.
    assert line.step in range(5, 9)


def test_sampled_answers_survive_too(monkeypatch):
    params = SamplingParams(max_tokens=120, temperature=1.0, seed=7, ignore_eos=True)

    def sample():
        with LLM(tp_size=2, device="cpu", kv_cache_gb=0.1, **PATIENT) as llm:
            answers = [one.ids for one in llm.chat(QUESTIONS, params)]
            return answers, llm.engine.counters.num_recoveries

    undisturbed, none = sample()
    fault = {"action": "kill", "rank": 0, "step": 30}
    monkeypatch.setenv("LOCKSTEP_FAILPOINTS", json.dumps([fault]))
    disturbed, once = sample()
    assert (none, once) == (0, 1)
    assert disturbed == undisturbed


def test_an_engine_that_fails_again_and_again_gives_up(monkeypatch):
    faults = [{"action": "kill", "rank": 0, "step": 3, "epoch": epoch} for epoch in range(1, 9)]
    monkeypatch.setenv("LOCKSTEP_FAILPOINTS", json.dumps(faults))
    with (
        LLM(device="cpu", kv_cache_gb=0.1) as llm,
        pytest.raises(RuntimeError, match="6 epochs were lost within 600 s"),
    ):
        llm.chat(QUESTIONS, GREEDY)


HELD_UP_S = 2.0
"""Twenty beats of the tests below, after eight of which the engine gives up who is silent."""
ENDLESS = SamplingParams(max_tokens=2500, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def short_beats():
    """An engine and the ids it says to [65]."""
    with LLM(in_process=True, device="cpu", kv_cache_gb=0.1, beat_ms=100) as llm:
        yield llm, llm.generate([[65]], ENDLESS)[0].ids


def test_an_ingress_that_was_held_up_and_given_up_loses_no_token(short_beats):
    llm, expected = short_beats

    async def locate():
        return llm.engine.info()

    async def ask():
        client = DriverClient(locate, name="test", node_id="local")
        await client.start()
        while not client.ready:
            await asyncio.sleep(0.01)
        spec = GenerateSpec(
            prompt=pack([65]),
            max_tokens=ENDLESS.max_tokens,
            stop_token_ids=(),
            sampling=Sampling(temperature=0.0),
        )
        try:
            events = []
            async with client.generate([spec]) as generations:
                async for found in generations:
                    if not events:
                        time.sleep(HELD_UP_S)
                    events += found
            return events, client.counts.resumed
        finally:
            await client.close()

    events, num_resumed = asyncio.run(ask())
    assert num_resumed == 1, "it was not given up"
    assert [event.index for event in events] == list(range(ENDLESS.max_tokens))
    assert [event.token for event in events] == expected


def test_a_caller_of_the_library_that_was_held_up_loses_no_token(short_beats, monkeypatch):
    llm, expected = short_beats
    on_tokens, num_lines, held = llm._on_tokens, [], []

    def slowly(message, readers):
        if not held:
            held.append(time.sleep(HELD_UP_S))
        return on_tokens(message, readers)

    open_line = llm._open_line
    monkeypatch.setattr(llm, "_on_tokens", slowly)
    monkeypatch.setattr(llm, "_open_line", lambda: num_lines.append(1) or open_line())
    assert llm.generate([[65]], ENDLESS)[0].ids == expected
    assert len(num_lines) == 2, "it was not given up"
