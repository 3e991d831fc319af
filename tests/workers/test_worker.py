"""A rank's own rules: what it refuses, when it leaves, what it says of itself."""

import re
import threading
import time
from types import ModuleType

import msgspec
import pytest
import zmq

from deployments.sockets import IpcFolder
from deployments.worker_link import WorkerLink
from tests.headers import header_of
from tests.workers.fakes import FAKE_RUNNER, FakeRunner, TinyDriver
from workers import worker
from workers.config import EngineConfig, Failpoint
from workers.failpoints import Failpoints
from workers.link import Pulse
from workers.protocol import (
    MASK,
    PROTOCOL_VERSION,
    STEP,
    Ack,
    Beat,
    Body,
    Failed,
    Hello,
    Mask,
    Mode,
    Ready,
    Start,
    decode_header,
    digest,
    encode,
    pack,
    unpack,
)
from workers.spec import WorkerSpec, read_failpoints
from workers.worker import StepChain, StepRefused, Worker, refuse_foreign_kernels, sentence

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
        self.thread.join(60)
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
    header = header_of(
        (1,), epoch=epoch, step=step, mode=Mode.DECODE, bodies=(digest(body),), previous=previous
    )
    told = encode(header)
    return told, body, digest(told)


def test_a_chain_of_steps_is_accepted():
    chain, previous = StepChain(epoch=1, rank=0, replica=0), b""
    for step in range(5):
        header, body, previous = plan(step, previous)
        assert chain.accept(header, body, previous)[0].step == step
    assert chain.step == 4


def test_an_epoch_begins_without_a_past():
    with pytest.raises(StepRefused, match="follows another header"):
        StepChain(epoch=1, rank=0, replica=0).accept(*plan(1, b"p" * 16))


def test_a_header_that_changed_on_its_way_is_refused():
    chain = StepChain(epoch=1, rank=0, replica=0)
    header, body, named = plan(0)
    other = encode(msgspec.structs.replace(decode_header(header), padded_rows=(2,)))
    with pytest.raises(StepRefused, match="rank 0 got a header for step 0 that is not the one"):
        chain.accept(other, body, named)
    with pytest.raises(StepRefused, match="rank 0 got a header for step 0 that is not the one"):
        chain.accept(b"\xc1" + header[1:], body, named)  # nor is it a message any more
    assert chain.accept(header, body, named)[0].step == 0


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
    driver.link.send(0, STEP, *plan(0))
    [(_, failed)] = driver.collect(Failed, 1, fatal=False)
    assert "rank 0 waited for a message and got 4 frames of kind b's'" in failed.reason
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
    driver.link.send(0, STEP, b"\xc1", b"", digest(b"\xc1"))
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
    while driver.collect(Beat, 1)[-1][1].step != 2:  # the test's timeout bounds it
        pass


def test_a_rank_whose_driver_is_silent_is_alone(context):
    folder = IpcFolder()
    spec = WorkerSpec(
        epoch=1, rank=0, config=ALONE, token="ab" * 16, ipc_address=f"ipc://{folder.path}/nobody"
    )
    alone = threading.Event()
    pulse = Pulse(context, spec, step=lambda: 0, alone=alone.set, silence_s=0.2)
    began = time.monotonic()
    pulse.start()
    assert alone.wait(60)
    assert time.monotonic() - began > 0.2
    pulse.stop()
    folder.close()


def test_a_rank_that_hears_echoes_is_not_alone(context, link):
    alone = threading.Event()
    [spec] = link.specs()
    pulse = Pulse(context, spec, step=lambda: 0, alone=alone.set, silence_s=1.0)
    pulse.start()
    TinyDriver(link, ALONE, epoch=1).beats_of(1.5)
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


# Masks


def send_masked(driver):
    """A step of three logit rows whose sampling waits for a mask of one."""
    body = encode(Body(num_masked=1))
    header, _, named = driver.plan(bodies=(digest(body),))
    driver.link.send(0, STEP, header, body, named)
    driver.previous[0] = named
    driver.step[0] += 1


def send_mask(driver, step, row=2, epoch=1):
    driver.link.send(0, MASK, encode(Mask(epoch, step, pack([row]), b"")))


def test_a_step_samples_after_its_mask_and_the_next_one_waits(link, run):
    rank, driver = run(), TinyDriver(link, ALONE, epoch=1)
    driver.handshake()
    driver.run_step()
    send_masked(driver)
    driver.send_step()
    driver.pump(0.2)
    assert not [message for _, message in driver.inbox if isinstance(message, Ack)]
    send_mask(driver, step=1)
    acks = [ack for _, ack in driver.collect(Ack, 2)]
    assert [ack.step for ack in acks] == [1, 2]
    assert [unpack(ack.tokens).tolist()[0] for ack in acks] == [2011, 21]
    send_masked(driver)
    send_mask(driver, step=3, row=1)
    [(_, ack)] = driver.collect(Ack, 1)
    assert unpack(ack.tokens).tolist() == [1031, 1032, 1033]
    driver.stop_all()
    rank.ended()


@pytest.mark.parametrize(
    ("step", "epoch", "awaits"), [(0, 1, False), (5, 1, True), (0, 2, True), (1, 1, True)]
)
def test_a_mask_for_another_step_is_refused(link, run, step, epoch, awaits):
    rank, driver = run(), TinyDriver(link, ALONE, epoch=1)
    driver.handshake()
    if awaits:
        send_masked(driver)
    send_mask(driver, step=step, epoch=epoch)
    [(_, failed)] = driver.collect(Failed, 1, fatal=False)
    assert re.match("StepRefused: rank 0 is at step .* and got a mask for step", failed.reason)
    rank.ended()


def test_a_driver_that_runs_ahead_of_its_masks_is_refused(link, run):
    rank, driver = run(), TinyDriver(link, ALONE, epoch=1)
    driver.handshake()
    send_masked(driver)
    driver.send_step()
    driver.send_step()
    [(_, failed)] = driver.collect(Failed, 1, fatal=False)
    assert "got two steps more while step 0 awaits its mask" in failed.reason
    rank.ended()


def test_a_rank_that_awaits_a_mask_leaves_when_told(link, run):
    rank, driver = run(), TinyDriver(link, ALONE, epoch=1)
    driver.handshake()
    send_masked(driver)
    driver.stop_all()
    rank.ended()
