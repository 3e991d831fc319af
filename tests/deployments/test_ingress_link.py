"""The driver's side of the wire to its ingresses, over a real socket."""

import tempfile
from pathlib import Path

import msgspec
import pytest
import zmq

from deployments.ingress_link import IngressLink
from deployments.messages import (
    Cancel,
    Forgotten,
    IngressBeat,
    Refused,
    Submit,
    decode_to_ingress,
)
from deployments.sockets import bind_router
from workers.protocol import Sampling, encode, pack

SUBMIT = Submit(
    epoch=1,
    request=7,
    tokens=pack([1, 2]),
    num_prompt=2,
    max_tokens=3,
    stop_token_ids=(),
    sampling=Sampling(),
)


class Line:
    """A link, and an ingress's socket to it."""

    def __init__(self, context, folder):
        self.bound = bind_router(context, ipc_path=Path(folder, "driver"), max_queued=100)
        self.link = IngressLink(self.bound.socket)
        self._socket = context.socket(zmq.DEALER)
        self._socket.linger = 0
        self._socket.identity = b"ingress-1"
        self._socket.connect(self.bound.ipc_address)

    def say(self, *messages):
        """What the link makes of them."""
        found = []
        for message in messages:
            self._socket.send(message if isinstance(message, bytes) else encode(message))
            assert self.bound.socket.poll(10_000), "it did not arrive"
            found += [message for _, message in self.link.receive(now=0.0)]
        return found

    def told(self):
        return decode_to_ingress(self._socket.recv()) if self._socket.poll(10_000) else None


@pytest.fixture
def line():
    with tempfile.TemporaryDirectory(prefix="ls-") as folder, zmq.Context() as context:
        line = Line(context, folder)
        yield line
        line.bound.close()
        context.destroy(linger=0)


def test_a_line_that_opens_is_heard(line):
    assert line.say(IngressBeat(opens=True), SUBMIT) == [IngressBeat(opens=True), SUBMIT]


@pytest.mark.parametrize("message", [SUBMIT, Cancel(7), IngressBeat()])
def test_a_line_that_was_given_up_is_told_so_and_what_it_says_does_not_count(line, message):
    line.say(IngressBeat(opens=True))
    [gone] = line.link.silent(now=3.0, limit_s=2.0, awake_since=0.0)
    assert gone.identity == b"ingress-1"
    assert line.say(message) == []
    assert line.told() == Forgotten()
    assert line.link.ingresses == {}


def test_nobody_is_silent_who_could_not_be_heard(line):
    line.say(IngressBeat(opens=True))
    assert line.link.silent(now=3.0, limit_s=2.0, awake_since=2.5) == []
    assert line.link.silent(now=1.5, limit_s=2.0, awake_since=0.0) == []


def test_a_request_that_cannot_be_read_is_refused_by_its_number_and_said(line, caplog):
    fields = msgspec.msgpack.decode(encode(SUBMIT))
    too_hot = [*fields[:7], [1000.0, *fields[7][1:]], *fields[8:]]
    line.say(IngressBeat(opens=True))
    assert line.say(msgspec.msgpack.encode(too_hot)) == []
    told = line.told()
    assert isinstance(told, Refused)
    assert (told.request, told.status) == (7, 500)
    assert "Expected `float` <= 100.0" in told.message
    assert line.link.num_undecodable == 1
    assert "request 7 was refused" in caplog.text
    assert line.say(SUBMIT) == [SUBMIT]


@pytest.mark.parametrize(
    "data",
    [b"", b"\xff", msgspec.msgpack.encode(["submit", 1]), msgspec.msgpack.encode({"request": 7})],
)
def test_what_names_no_request_is_counted_and_said(line, caplog, data):
    line.say(IngressBeat(opens=True))
    assert line.say(data) == []
    assert line.link.num_undecodable == 1
    assert "it was ignored" in caplog.text
    assert line.say(SUBMIT) == [SUBMIT]
