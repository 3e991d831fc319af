"""A rank's own rules: what it refuses, when it leaves, what it says of itself."""

import threading
import time
from types import ModuleType

import pytest
import zmq

from deployments.sockets import IpcFolder
from deployments.worker_link import WorkerLink
from tests.workers.fakes import FAKE_RUNNER, FakeRunner, TinyDriver
from workers import worker
from workers.config import EngineConfig, Failpoint
from workers.failpoints import Failpoints
from workers.link import Pulse
from workers.protocol import (
    PROTOCOL_VERSION,
    Beat,
    Body,
    Failed,
    Header,
    Hello,
    Ready,
    Start,
    digest,
    encode,
)
from workers.spec import WorkerSpec, read_failpoints
from workers.worker import StepChain, StepRefused, Worker, refuse_foreign_kernels, sentence

pytestmark = pytest.mark.timeout(20)
ALONE = EngineConfig(device="cpu", beat_ms=20)


@pytest.fixture
def context():
    context = zmq.Context()
    yield context
    context.destroy(linger=0)


@pytest.fixture
def link(context):
    folder = IpcFolder()
    link = WorkerLink(context, epoch=1, config=ALONE, ipc_folder=folder.path)
    yield link
    link.close()
    folder.close()


class Running:
    """A rank in a thread, and what its `run` raised."""

    def __init__(self, rank: Worker) -> None:
        self.rank, self.raised = rank, None
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self):
        try:
            self.rank.run()
        except Exception as error:
            self.raised = error

    def ended(self):
        self.thread.join(5)
        assert not self.thread.is_alive()
        return self.raised


@pytest.fixture
def run(link):
    started = []

    def start(make_runner=FakeRunner, failpoints=()):
        [spec] = link.specs(failpoints=failpoints, runner=FAKE_RUNNER)
        started.append(Running(Worker(spec, make_runner, end_process=lambda code: None)))
        return started[-1]

    yield start
    for each in started:
        each.rank.leave()
        each.ended()


def plan(step, previous=b"", epoch=1):
    body = encode(Body())
    header = Header(epoch, step, 1, (1,), (1,), 0, (1,), 0, (digest(body),), previous)
    return encode(header), body


def test_a_chain_of_steps_is_accepted():
    chain, previous = StepChain(epoch=1, rank=0, replica=0), b""
    for step in range(5):
        header, body = plan(step, previous)
        assert chain.accept(header, body)[0].step == step
        previous = digest(header)
    assert chain.step == 4


def test_an_epoch_begins_without_a_past():
    with pytest.raises(StepRefused, match="follows another header"):
        StepChain(epoch=1, rank=0, replica=0).accept(*plan(1, b"p" * 16))


def test_a_refused_step_changes_nothing():
    chain = StepChain(epoch=1, rank=0, replica=0)
    first = plan(0)
    chain.accept(*first)
    with pytest.raises(StepRefused):
        chain.accept(*plan(1, digest(b"other")))
    assert chain.accept(*plan(1, digest(first[0])))[0].step == 1


def test_stop_ends_a_rank_in_good_order(link, run):
    rank, driver = run(), TinyDriver(link, ALONE, epoch=1)
    driver.handshake()
    driver.run_step()
    driver.stop_all()
    assert rank.ended() is None


def test_leave_ends_a_rank_wherever_it_waits(run):
    rank = run()
    rank.rank.leave()
    assert rank.ended() is None


def test_a_model_that_cannot_be_loaded_is_a_sentence_for_the_driver(link, run):
    def broken(*args):
        raise ValueError("config.json names\n   no architecture")

    rank, driver = run(broken), TinyDriver(link, ALONE, epoch=1)
    driver.hellos()
    driver.send(0, Start(1, "", 0))
    [(_, failed)] = driver.collect(Failed, 1, fatal=False)
    assert failed.reason == "ValueError: config.json names no architecture"
    assert isinstance(rank.ended(), ValueError)


def test_a_message_out_of_turn_is_refused(link, run):
    rank, driver = run(), TinyDriver(link, ALONE, epoch=1)
    driver.hellos()
    driver.link.send(0, b"s", *plan(0))
    [(_, failed)] = driver.collect(Failed, 1, fatal=False)
    assert "rank 0 waited for a message and got 3 frames of kind b's'" in failed.reason
    assert isinstance(rank.ended(), StepRefused)


def test_a_start_of_another_epoch_is_refused(link, run):
    run()
    driver = TinyDriver(link, ALONE, epoch=1)
    driver.hellos()
    driver.send(0, Start(2, "", 0))
    [(_, failed)] = driver.collect(Failed, 1, fatal=False)
    assert "rank 0 of epoch 1 got Start of epoch 2" in failed.reason


def test_garbage_is_a_failure_and_not_a_crash(link, run):
    rank, driver = run(), TinyDriver(link, ALONE, epoch=1)
    driver.handshake()
    driver.link.send(0, b"s", b"\xc1", b"")
    [(_, failed)] = driver.collect(Failed, 1, fatal=False)
    assert failed.reason.startswith("DecodeError: ")
    rank.ended()


def test_what_a_rank_says_of_itself(link, run):
    run()
    driver = TinyDriver(link, ALONE, epoch=1)
    [(_, hello)] = driver.collect(Hello, 1)
    said = (hello.version, hello.rank, hello.device, hello.store_port)
    assert said == (PROTOCOL_VERSION, 0, "cpu", 0)
    driver.send(0, Start(1, "", 0))
    [(_, ready)] = driver.collect(Ready, 1)
    assert (ready.max_pages, ready.vocab_size, ready.stop_token_ids) == (100, 1000, (2,))


def test_beats_carry_the_step(link, run):
    run()
    driver = TinyDriver(link, ALONE, epoch=1)
    driver.handshake()
    driver.collect(Beat, 2)
    assert link.num_dropped == 0
    for _ in range(3):
        driver.run_step()
    driver.inbox = []
    deadline = time.monotonic() + 3
    while driver.inbox[-1:] == [] and time.monotonic() < deadline:
        driver.pump()
    assert driver.inbox[-1][1].step == 2


def test_a_rank_whose_driver_is_silent_is_alone(context):
    folder = IpcFolder()
    spec = WorkerSpec(
        epoch=1, rank=0, config=ALONE, token="ab" * 16, ipc_address=f"ipc://{folder.path}/nobody"
    )
    alone = threading.Event()
    pulse = Pulse(context, spec, step=lambda: 0, alone=alone.set, silence_s=0.2)
    began = time.monotonic()
    pulse.start()
    assert alone.wait(5)
    assert time.monotonic() - began > 0.2
    pulse.stop()
    folder.close()


def test_a_rank_that_hears_echoes_is_not_alone(context, link):
    alone = threading.Event()
    [spec] = link.specs()
    pulse = Pulse(context, spec, step=lambda: 0, alone=alone.set, silence_s=0.2)
    pulse.start()
    TinyDriver(link, ALONE, epoch=1).beats_of(0.6)
    assert not alone.is_set()
    pulse.stop()


def test_another_package_called_kernels_is_refused(monkeypatch):
    theirs = ModuleType("kernels")
    theirs.__file__ = "/site-packages/kernels/__init__.py"
    monkeypatch.setattr(worker, "kernels", theirs)
    with pytest.raises(ImportError, match="was found at /site-packages/kernels, not at "):
        refuse_foreign_kernels()


def test_a_sentence_has_one_line_and_an_end():
    assert sentence(RuntimeError("a\n  b")) == "RuntimeError: a b"
    assert sentence(KeyError()) == "KeyError: no message"
    assert len(sentence(RuntimeError("x" * 10_000))) == 500


def test_failpoints_are_for_one_rank_and_epoch_and_fire_once():
    planted = read_failpoints('[{"action": "slow", "rank": 1, "step": 4, "epoch": 2}]')
    assert planted == (Failpoint("slow", 1, 4, 2),)
    assert not Failpoints(planted, epoch=1, rank=1)
    assert not Failpoints(planted, epoch=2, rank=0)
    failpoints = Failpoints(planted, epoch=2, rank=1)
    assert not failpoints.take("slow", 3)
    assert failpoints.take("slow", 5)
    assert not failpoints.take("slow", 5)
    assert read_failpoints("") == ()
