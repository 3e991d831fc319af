"""A rank killed or stopped in any phase of its life: named, replaced, and nothing of it is left.

The first epoch is lost in a step, so that the second one's start is a recovery; the fault meets it
there. The third serves. In between the engine is not ready, not for a moment.
"""

import contextlib
import json
import os
import re
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import ray
from ray.util import placement_group_table

from deployments import gang
from deployments.config import ServiceConfig
from deployments.engine import Engine, EngineFailed
from deployments.llm import LLM, SamplingParams
from deployments.ray_fleet import RayFleet
from tests.e2e.conftest import LIMIT_S
from tests.e2e.machine import slowdown
from tests.workers.kernel_runner import KERNEL_RUNNER
from tests.workers.tiny_moe import SIZES
from workers.bundled.questions import answer

pytestmark = pytest.mark.row("S5")

QUESTIONS = ["What is 128+305?", "Add 77 and 8."]
GREEDY = SamplingParams(max_tokens=60, temperature=0.0)
SETTINGS = {"device": "cpu", "kv_cache_gb": 0.05, "tp_size": 2, "enable_symm_mem": True}
TINY = SIZES | {"max_num_seqs": 2, "runner": KERNEL_RUNNER}
"""Random weights, in Triton's interpreter; buckets of one and two rows."""
PROMPTS = [[5, 6, 7], [8, 9]]
LISTENING = "0A"
"""In /proc/net/tcp."""


class Seen(NamedTuple):
    """What the engine's thread told its ingresses, turn by turn, and of whom it heard."""

    ready: set[tuple[int, bool]]
    """(epoch, whether it was ready)"""
    pids: dict[int, set[int]]
    """Of every epoch's ranks."""
    ports: dict[int, set[int]]
    """Where its stores listened."""
    lost: dict[int, tuple[float, str]]
    """When each epoch was found to be over, and why."""
    begun: dict[int, float]


@contextlib.contextmanager
def watched(monkeypatch, **settings) -> Iterator[tuple[LLM, Seen]]:
    """An engine, what it is seen to do, and afterwards nothing of it in this machine."""
    before, shared = descendants(os.getpid()), set(os.listdir("/dev/shm"))
    seen = Seen(set(), {}, {}, {}, {})
    with LLM(**SETTINGS | settings) as llm:
        engine, folder = llm.engine, llm.engine._folder.path
        tell, lose, launch = engine._tell_all, engine._lose_epoch, engine._launch

        def note_told():
            health = engine.health()
            seen.ready.add((health.epoch, health.ready))
            for hello in engine.ranks():
                seen.pids.setdefault(health.epoch, set()).add(hello.pid)
                seen.ports.setdefault(health.epoch, set()).add(hello.store_port)
            tell()

        def note_lost(failure, now):
            epoch = engine.health().epoch
            lose(failure, now)
            seen.lost[epoch] = (time.monotonic(), engine.counters.last_failure)

        def note_begun(now):
            launch(now)
            seen.begun[engine.health().epoch] = time.monotonic()

        monkeypatch.setattr(engine, "_tell_all", note_told)
        monkeypatch.setattr(engine, "_lose_epoch", note_lost)
        monkeypatch.setattr(engine, "_launch", note_begun)
        yield llm, seen
        ours = descendants(os.getpid()) - before
        old = set().union(*(ports for epoch, ports in seen.ports.items() if epoch in seen.lost))
        serving = {hello.pid for hello in engine.ranks()}  # whose own ports are new, and may be old
        assert not listened_to(ours - serving) & (old - {0})
        gone = set().union(*(pids for epoch, pids in seen.pids.items() if epoch in seen.lost))
        assert gone
        assert not {pid for pid in gone if is_alive(pid)}
    assert descendants(os.getpid()) <= before
    every = set().union(*seen.pids.values())
    assert not {pid for pid in every | ours if is_alive(pid)}
    new = set(os.listdir("/dev/shm")) - shared
    assert not [name for name in new for pid in every if re.search(rf"(?<!\d){pid}(?!\d)", name)]
    assert not folder.exists()


def descendants(pid: int) -> set[int]:
    found = set()
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in map(int, task.read_text().split()):
                found |= {child} | (descendants(child) if is_alive(child) else set())
    return found


def is_alive(pid: int) -> bool:
    """Not gone, and not dead with nobody to bury it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def listened_to(pids: set[int]) -> set[int]:
    """Ports on which any of these processes listens."""
    sockets = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            for fd in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    sockets.add(os.readlink(fd))
    ports = set()
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        _, local, _, state, *_, inode = line.split()[:10]
        if state == LISTENING and f"socket:[{inode}]" in sockets:
            ports.add(int(local.rpartition(":")[2], 16))
    return ports


SENTENCES = {
    "kill": r"rank 1 \(pid \d+ on 127\.0\.0\.1\) died: signal SIGKILL",
    "stop": r"ranks \[1\] have not been heard for",
}
slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("action", "stage"),
    [
        pytest.param("kill", "join", marks=slow),
        ("kill", "register"),
        pytest.param("kill", "weights", marks=slow),
        pytest.param("kill", "measure", marks=slow),
        pytest.param("stop", "join", marks=slow),
        pytest.param("stop", "register", marks=slow),
        ("stop", "weights"),
        pytest.param("stop", "measure", marks=slow),
    ],
)
def test_a_rank_lost_while_it_starts_is_named_and_the_next_start_serves(monkeypatch, action, stage):
    plant(monkeypatch, action, stage)
    with watched(monkeypatch, **patience(action)) as (llm, seen):
        said = [one.text for one in llm.chat(QUESTIONS, GREEDY)]
        counters = llm.engine.counters
    assert said == [answer(question) for question in QUESTIONS]
    assert counters.num_recoveries == 1
    check_second_start(seen, action)


@pytest.mark.row("S12")
@pytest.mark.parametrize("action", ["kill", pytest.param("stop", marks=slow)])
def test_a_rank_lost_while_it_captures_is_named_and_the_next_start_serves(monkeypatch, action):
    greedy = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True)
    with LLM(**SIZES) as alone:
        expected = [one.ids for one in alone.generate(PROMPTS, greedy, detokenize=False)]
    plant(monkeypatch, action, "graphs")
    with watched(monkeypatch, **TINY, **patience(action)) as (llm, seen):
        said = [one.ids for one in llm.generate(PROMPTS, greedy, detokenize=False)]
    assert said == expected
    check_second_start(seen, action)


@pytest.mark.row("S12")
def test_memory_that_is_registered_while_graphs_are_captured_is_refused(monkeypatch):
    fault = {"action": "late_registration", "rank": 1, "stage": "graphs"}
    monkeypatch.setenv("LOCKSTEP_FAILPOINTS", json.dumps([fault]))
    before = descendants(os.getpid())
    with pytest.raises(EngineFailed, match=r"rank 1 failed: SymmetryError: .* to be registered"):
        LLM(**SETTINGS | TINY).close()
    assert descendants(os.getpid()) <= before


def plant(monkeypatch, action: str, stage: str) -> None:
    if action == "stop":
        monkeypatch.setattr(gang, "LOADING_PATIENCE", 3)  # 6 s of silence; 30 s otherwise
    faults = [
        {"action": "kill", "rank": 0, "step": 3},
        {"action": action, "rank": 1, "stage": stage, "epoch": 2},
    ]
    monkeypatch.setenv("LOCKSTEP_FAILPOINTS", json.dumps(faults))


def patience(action: str) -> dict[str, int]:
    """A rank that a busy machine does not let run for two seconds is not the one to be lost."""
    return {} if action == "stop" else {"beat_ms": 1000}


def check_second_start(seen: Seen, action: str) -> None:
    assert set(seen.lost) == {1, 2}
    assert re.match(SENTENCES[action], seen.lost[2][1]), seen.lost
    assert {(2, False), (3, True)} <= seen.ready
    assert (2, True) not in seen.ready
    # What is promised, and as much again for a start.
    promised = 0.0 if action == "kill" else 8 * 0.25 * 3
    assert seen.lost[2][0] - seen.begun[2] < 2 * (promised + 10.0) * slowdown()


@pytest.mark.parametrize(
    ("action", "step"),
    [("kill", 1), pytest.param("stop", 1, marks=slow), pytest.param("kill", 9, marks=slow),
     pytest.param("stop", 9, marks=slow)],
)  # fmt: skip
def test_a_rank_lost_between_chunks_of_a_prompt_or_in_a_decode_leaves_nothing(
    monkeypatch, action, step
):
    """A step has room for four tokens, so the first nine read prompts."""
    fault = {"action": action, "rank": 1, "step": step}
    monkeypatch.setenv("LOCKSTEP_FAILPOINTS", json.dumps([fault]))
    settings = {"max_num_seqs": 2, "max_num_batched_tokens": 4} | patience(action)
    with watched(monkeypatch, **settings) as (llm, seen):
        said = [one.text for one in llm.chat(QUESTIONS, GREEDY)]
    assert said == [answer(question) for question in QUESTIONS]
    assert set(seen.lost) == {1}
    assert re.match(SENTENCES[action], seen.lost[1][1]), seen.lost
    assert {(1, True), (1, False), (2, False), (2, True)} >= seen.ready
    assert {(1, False), (2, False), (2, True)} <= seen.ready


@pytest.fixture
def ray_alone() -> Iterator[None]:
    with tempfile.TemporaryDirectory(prefix="lsray", dir="/tmp", ignore_cleanup_errors=True) as at:
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            _temp_dir=at,
            object_store_memory=80 * 2**20,
            log_to_driver=False,
        )
        yield
        ray.shutdown()


@pytest.mark.slow
@pytest.mark.row("C4")
@pytest.mark.parametrize("action", ["kill", "stop"])
@pytest.mark.parametrize("stage", ["register", "weights"])
def test_under_ray_the_next_start_serves_and_no_placement_group_is_left(
    monkeypatch, ray_alone, action, stage
):
    plant(monkeypatch, action, stage)
    config = ServiceConfig.from_args(SETTINGS).engine
    engine = Engine(config, RayFleet(cluster_wait_s=60), listen_tcp=True)
    pids, ready = set(), set()

    def look() -> bool:
        health = engine.health()
        ready.add((health.epoch, health.ready))
        pids.update(hello.pid for hello in engine.ranks())
        return health.ready and health.epoch > 1

    engine.start()
    try:
        engine.wait_ready()
        look()
        os.kill(engine.ranks()[0].pid, signal.SIGKILL)
        deadline = time.monotonic() + LIMIT_S
        while not look():
            assert time.monotonic() < deadline, engine.health()
            time.sleep(0.02)
        assert re.match(
            SENTENCES[action].replace(r"127\.0\.0\.1", ".*"), engine.counters.last_failure
        )
        assert engine.health().epoch == 3
        assert (2, True) not in ready
        assert engine.counters.num_recoveries == 1
    finally:
        engine.stop()
    assert all(table["state"] == "REMOVED" for table in placement_group_table().values())
    assert len(pids) >= 4
    assert not {pid for pid in pids if is_alive(pid)}
