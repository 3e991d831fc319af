"""Ranks that lie, skip, stall or die: noticed, named, and nobody's answer changes."""

import json
import re

import pytest

from deployments.llm import LLM, SamplingParams
from workers.bundled.questions import answer

QUESTIONS = ["What is 128+305?", "Count from 3 to 30", "Add 77 and 8.", "Count from 50 to 70"]
GREEDY = SamplingParams(max_tokens=200, temperature=0.0)
pytestmark = pytest.mark.timeout(60)


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
    with LLM(tp_size=2, device="cpu", kv_cache_gb=0.1, step_timeout_s=3.0) as llm:
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
        with LLM(tp_size=2, device="cpu", kv_cache_gb=0.1) as llm:
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
