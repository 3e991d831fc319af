"""The driver's ROUTER: who is heard, what is dropped, what never blocks."""

import stat
import time

import msgspec
import pytest
import zmq

from deployments.sockets import CurveKeys, Gate, IpcFolder, bind_router
from deployments.worker_link import LinkFull, WorkerLink
from workers.config import EngineConfig
from workers.link import DriverLink, connect
from workers.protocol import ECHO, MAX_MESSAGE_BYTES, MESSAGE, Ack, Beat, Started, encode
from workers.spec import BEATS, STEPS

SMALL = EngineConfig(tp_size=2)


@pytest.fixture
def context():
    context = zmq.Context()
    yield context
    context.destroy(linger=0)


@pytest.fixture
def folder():
    folder = IpcFolder()
    yield folder.path
    folder.close()
    assert not folder.path.exists()


@pytest.fixture
def link(context, folder):
    link = WorkerLink(context, epoch=2, config=SMALL, ipc_folder=folder)
    yield link
    link.close()


def messages(link, count=1, timeout_s=60.0):
    """At least `count` messages, or what there is at the end of the time."""
    received, deadline = [], time.monotonic() + timeout_s
    while len(received) < count and time.monotonic() < deadline:
        if link.socket.poll(50):
            received += link.receive()
    return received


def test_a_rank_is_heard_and_answered(context, link):
    rank = DriverLink(context, link.specs()[1])
    rank.send(Started(2, 1))
    assert messages(link) == [(1, Started(2, 1))]
    link.send(1, MESSAGE, b"hello")
    assert rank.receive(60_000) == [MESSAGE, b"hello"]
    rank.close()


def test_a_beat_is_echoed(context, link):
    beats = connect(context, link.specs()[0], BEATS)
    beats.send(encode(Beat(2, 0, 7)))
    assert messages(link) == [(0, Beat(2, 0, 7))]
    assert beats.poll(60_000)
    assert beats.recv_multipart() == [ECHO]
    beats.close()


@pytest.mark.parametrize(
    "frames",
    [
        [b"not msgpack"],
        [b""],
        [b"\x93\xa7started\xff\xff"],
        [encode(Started(1, 0))],
        [encode(Started(2, 1))],
        [encode(Beat(2, 0, 0))],
        [encode(Started(2, 0)), b"more"],
    ],
    ids=["garbage", "empty", "cut", "old epoch", "another's rank", "a beat", "two frames"],
)
def test_what_is_not_a_ranks_own_message_is_dropped_and_counted(context, link, frames):
    rank = connect(context, link.specs()[0], STEPS)
    rank.send_multipart(frames)
    rank.send(encode(Started(2, 0)))
    assert messages(link) == [(0, Started(2, 0))]
    assert link.num_dropped == 1
    rank.close()


def test_an_old_epochs_rank_is_not_heard(context, folder, link):
    old = WorkerLink(context, epoch=1, config=SMALL, ipc_folder=folder)
    stale = msgspec.structs.replace(old.specs()[0], ipc_address=link.ipc_address)
    rank = connect(context, stale, STEPS)
    rank.send(encode(Started(2, 0)))
    while link.num_dropped == 0:  # the test's timeout bounds it
        assert messages(link, timeout_s=0.05) == []
    assert link.num_dropped == 1
    rank.close()
    old.close()


def test_sending_to_a_rank_that_is_not_there_names_it(link):
    with pytest.raises(LinkFull, match=r"^rank 1 is not connected$") as caught:
        link.send(1, b"x")
    assert caught.value.rank == 1


def test_a_rank_that_does_not_read_is_named_and_never_waited_for(context, link):
    rank = DriverLink(context, link.specs()[0])
    rank.send(Started(2, 0))
    messages(link)
    began = time.monotonic()

    def flood():
        for _ in range(100_000):
            link.send(0, MESSAGE, bytes(2000))

    with pytest.raises(LinkFull, match=r"^rank 0 has 1000 messages unread$"):
        flood()
    assert time.monotonic() - began < 30
    rank.close()


def test_an_oversize_frame_does_not_end_the_link(context, link):
    good, bad = (connect(context, spec, STEPS) for spec in link.specs())
    bad.send(bytes(MAX_MESSAGE_BYTES + 1))
    good.send(encode(Started(2, 0)))
    assert messages(link) == [(0, Started(2, 0))]
    received = []
    while not received:  # what is sent before it has connected again is lost
        bad.send(encode(Started(2, 1)))
        received = messages(link, timeout_s=0.2)
    assert set(received) == {(1, Started(2, 1))}
    good.close()
    bad.close()


def test_the_folder_and_the_socket_are_this_users_only(folder, link):
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert link.ipc_address.startswith(f"ipc://{folder}/")
    assert link.tcp_address == ""
    link.close()
    assert list(folder.iterdir()) == []


def test_a_path_too_long_for_a_socket_is_refused(context, tmp_path):
    with pytest.raises(ValueError, match="longer than the 100 bytes a Unix socket allows"):
        bind_router(context, ipc_path=tmp_path / ("x" * 100), max_queued=1)


@pytest.fixture
def gate(context):
    gate = Gate(context)
    yield gate
    gate.close()


def remote(spec, **changes):
    return msgspec.structs.replace(spec, with_driver=False, **changes)


def test_another_nodes_rank_comes_over_curve(context, folder, gate):
    link = WorkerLink(context, epoch=1, config=SMALL, ipc_folder=folder, gate=gate)
    far = DriverLink(context, remote(link.specs()[1]))
    near = DriverLink(context, link.specs()[0])
    far.send(Started(1, 1))
    near.send(Started(1, 0))
    assert dict(messages(link, count=2)) == {1: Started(1, 1), 0: Started(1, 0)}
    link.send(1, MESSAGE, b"far")
    assert far.receive(60_000) == [MESSAGE, b"far"]
    far.close()
    near.close()
    link.close()


def test_a_stranger_on_tcp_is_not_heard(context, folder, gate):
    link = WorkerLink(context, epoch=1, config=SMALL, ipc_folder=folder, gate=gate)
    other = CurveKeys.fresh()
    spec = link.specs()[0]
    unlisted = remote(
        spec, client_public_key=other.client_public, client_secret_key=other.client_secret
    )
    stranger = connect(context, unlisted, STEPS)
    plain = context.socket(zmq.DEALER)
    plain.setsockopt(zmq.IDENTITY, spec.identity(STEPS))
    plain.setsockopt(zmq.LINGER, 0)
    plain.connect(link.tcp_address)
    for socket in (stranger, plain):
        socket.send(encode(Started(1, 0)))
    assert messages(link, timeout_s=0.5) == []
    listed = connect(context, remote(spec), STEPS)
    listed.send(encode(Started(1, 0)))
    assert messages(link) == [(0, Started(1, 0))]
    for socket in (stranger, plain, listed):
        socket.close()
    link.close()


def test_keys_of_an_ended_epoch_open_nothing(context, folder, gate):
    first = WorkerLink(context, epoch=1, config=SMALL, ipc_folder=folder, gate=gate)
    keys = first.specs()[0]
    first.close()
    second = WorkerLink(context, epoch=2, config=SMALL, ipc_folder=folder, gate=gate)
    spec = remote(
        second.specs()[0],
        client_public_key=keys.client_public_key,
        client_secret_key=keys.client_secret_key,
    )
    late = connect(context, spec, STEPS)
    late.send(encode(Started(2, 0)))
    assert messages(second, timeout_s=0.5) == []
    late.close()
    second.close()


def test_acks_survive_the_wire(context, link):
    ack = Ack(2, 0, 5, b"h" * 16, b"i" * 16, b"l" * 16, 0.25, b"\1\0\0\0", (), ())
    rank = DriverLink(context, link.specs()[0])
    rank.send(ack)
    assert messages(link) == [(0, ack)]
    rank.close()
