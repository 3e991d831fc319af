"""Memory and collectives that go wrong on one rank: no token of that step gets out, and the rank is
named within two seconds. Real ranks, over gloo."""

import json
import re
import time

import pytest

from deployments.llm import LLM, SamplingParams
from tests.e2e.machine import slowdown
from workers.bundled.questions import answer

QUESTIONS = ["What is 128+305?", "Count from 3 to 13", "Add 77 and 8."]
GREEDY = SamplingParams(max_tokens=200, temperature=0.0)
RIGHT = [answer(question) for question in QUESTIONS]
# NOTE: sums that GPUs make over their peers' memory use neither a slot nor a transport.
SETTINGS = {
    "device": "cpu", "kv_cache_gb": 0.1, "beat_ms": 200, "enable_symm_mem": True,
    "all_reduce": "nccl",
}  # fmt: skip
SPLIT = {"tp_size": 4, "dp_size": 2, "enable_dp_attention": True}
pytestmark = [pytest.mark.row("S5"), pytest.mark.row("S12")]


def ask_with_fault(monkeypatch, fault, **settings):
    """The answers, the failure that was named, and how long after the fault's step it was."""
    monkeypatch.setenv("LOCKSTEP_FAILPOINTS", json.dumps([fault]))
    with LLM(**SETTINGS, **settings) as llm:
        lose, pump = llm.engine._lose_epoch, type(llm.engine._gang).pump
        moments = {}

        def note_loss(failure, now):
            moments.setdefault("lost", time.monotonic())
            lose(failure, now)

        def note_step(gang, now):
            pump(gang, now)
            if gang.num_steps > fault["step"]:
                moments.setdefault("sent", time.monotonic())

        monkeypatch.setattr(llm.engine, "_lose_epoch", note_loss)
        monkeypatch.setattr(type(llm.engine._gang), "pump", note_step)
        answers = [one.text for one in llm.chat(QUESTIONS, GREEDY)]
        counters = llm.engine.counters
        assert counters.num_recoveries == 1
        return answers, counters.last_failure, moments["lost"] - moments["sent"]


@pytest.mark.parametrize(
    ("action", "rank", "settings", "sentence"),
    [
        (
            "foreign_slot", 1, SPLIT | {"symm_mem_strict": True},
            r"rank 1 failed: SymmetryError: \w+ over attn_tp \(0, 1\): its send tensor .* is in "
            r"slot [\w.]+, which is declared for tp",
        ),
        pytest.param(
            "foreign_slot", 2, SPLIT, r"ranks \[(2|3)\] took part in other collectives than",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "shifted_slot", 1, {"tp_size": 2, "symm_mem_strict": True},
            r"rank 1 failed: SymmetryError: all_reduce over attn_tp \(0, 1\): its send tensor .* "
            r"begins 512 bytes inside slot embedded.attn_tp: elsewhere than on other ranks",
            marks=pytest.mark.slow,
        ),
        ("shifted_slot", 1, {"tp_size": 2}, r"ranks \[1\] took part in other collectives than"),
        (
            "late_registration", 0, {"tp_size": 2},
            "rank 0 failed: SymmetryError: symmetric memory was to be registered after the rank "
            "was ready",
        ),
        (
            "other_plan", 2, SPLIT,
            r"rank 2 failed: StepRefused: rank 2 got a header for step \d+ that is not the one the "
            r"driver sent",
        ),
        (
            "skip_collective", 1, {"tp_size": 2, "overlap": False},
            r"ranks \[1\] left out a collective",
        ),
        pytest.param(
            "skip_collective", 3, SPLIT | {"overlap": False},
            r"ranks \[3\] left out a collective",
            marks=pytest.mark.slow,
        ),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else "",
)  # fmt: skip
def test_the_step_is_stopped_and_the_rank_named(monkeypatch, action, rank, settings, sentence):
    fault = {"action": action, "rank": rank, "step": 6}
    answers, failure, seconds = ask_with_fault(monkeypatch, fault, **settings)
    assert answers == RIGHT
    assert re.match(sentence, failure), failure
    assert seconds < 2.0 * slowdown(), failure


@pytest.mark.row("S1", "S2")
@pytest.mark.parametrize("settings", [{"tp_size": 2}, SPLIT], ids=["tp", "dp attention"])
def test_strict_ranks_answer_without_a_fallback(settings):
    with LLM(**SETTINGS, **settings, symm_mem_strict=True) as llm:
        assert [one.text for one in llm.chat(QUESTIONS, GREEDY)] == RIGHT
        assert llm.engine.counters.num_recoveries == 0
        counts = llm.engine.counters.collectives
    paths = {(group, op, path) for group, op, path, _ in counts}
    assert ("attn_tp", "all_reduce", "symmetric") in paths
    assert not [labels for labels in counts if labels[2] == "fallback"]


@pytest.mark.slow
def test_more_than_the_cap_is_refused_at_start_with_both_numbers():
    with pytest.raises(RuntimeError, match=r"collectives need 0\.0\d GiB .*_prealloc_gb=0\.0001"):
        LLM(**SETTINGS, tp_size=2, symm_mem_prealloc_gb=0.0001)
