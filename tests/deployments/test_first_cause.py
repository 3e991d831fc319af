"""What a lost epoch is said to have been lost by, whatever was noticed first."""

import itertools
import time

import pytest
import zmq

from deployments.first_cause import first_cause, judge
from deployments.fleet import describe
from deployments.gang import Cause, GangFailed, complaint
from deployments.sockets import IpcFolder
from deployments.worker_link import LinkFull, WorkerLink
from workers.config import EngineConfig
from workers.link import DriverLink
from workers.protocol import MESSAGE, Failed, Started

KILLED = describe(1, 12, "127.0.0.1", "signal SIGKILL")
ENDED = describe(0, 11, "127.0.0.1", "exit code 1")
CRASHED = describe(0, 11, "127.0.0.1", "signal SIGABRT")
COMPLAINT = complaint(0, "ValueError: no")
CUT = GangFailed("rank 0 is not connected", 0, cause=Cause.LINK)


def died(death):
    return GangFailed(death.sentence, death.rank, cause=Cause.DIED)


def said(noticed, words=None, deaths=()):
    cause = judge(noticed, words or {}, deaths)
    return str(cause), cause.rank, cause.cause


@pytest.mark.parametrize(
    ("noticed", "words", "deaths", "expected"),
    [
        (COMPLAINT, {}, [KILLED], died(KILLED)),
        (COMPLAINT, {}, [ENDED, KILLED], died(KILLED)),
        (COMPLAINT, {}, [ENDED], COMPLAINT),
        (COMPLAINT, {}, [CRASHED], COMPLAINT),
        (COMPLAINT, {1: "RuntimeError: peer"}, [], COMPLAINT),
        (died(ENDED), {0: "ValueError: no"}, [], COMPLAINT),
        (died(ENDED), {1: "RuntimeError: peer"}, [], died(ENDED)),
        (died(ENDED), {0: "ValueError: no"}, [KILLED], died(KILLED)),
        (died(ENDED), {}, [], died(ENDED)),
        (died(KILLED), {0: "ValueError: no"}, [CRASHED], died(KILLED)),
        (CUT, {0: "ValueError: no"}, [], COMPLAINT),
        (CUT, {0: "ValueError: no"}, [ENDED], COMPLAINT),
        (CUT, {}, [ENDED], died(ENDED)),
        (CUT, {}, [CRASHED], died(CRASHED)),
        (CUT, {1: "RuntimeError: peer"}, [], CUT),
        (CUT, {}, [], CUT),
    ],
)  # fmt: skip
def test_the_rules(noticed, words, deaths, expected):
    assert said(noticed, words, deaths) == (str(expected), expected.rank, expected.cause)


def test_what_a_rank_said_of_itself_is_told_whichever_sign_came_first():
    signs = {"words": COMPLAINT, "end": died(ENDED), "socket": CUT}
    for first, *rest in itertools.permutations(signs):
        words = {0: "ValueError: no"} if "words" in rest else {}
        deaths = [ENDED] if "end" in rest else []
        assert said(signs[first], words, deaths) == said(COMPLAINT)


# With a real link


def nobody():
    return []


@pytest.fixture
def context():
    context = zmq.Context()
    yield context
    context.destroy(linger=0)


@pytest.fixture
def link(context):
    folder = IpcFolder()
    link = WorkerLink(context, epoch=2, config=EngineConfig(tp_size=2), ipc_folder=folder.path)
    yield link
    link.close()
    folder.close()


def connected(context, link, rank):
    there = DriverLink(context, link.specs()[rank])
    there.send(Started(2, rank))
    assert link.socket.poll(60_000)
    assert link.receive() == [(rank, Started(2, rank))]
    return there


def keep_sending(link, rank):
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        link.send(rank, MESSAGE, b"step")
        time.sleep(0.01)  # its queue holds 1000


def test_a_rank_that_failed_and_left_is_quoted(context, link):
    rank = connected(context, link, 0)
    rank.send(Failed(2, 0, "ValueError: no"))
    rank.close()
    with pytest.raises(LinkFull, match="not connected") as caught:
        keep_sending(link, 0)
    noticed = GangFailed(str(caught.value), 0, cause=Cause.LINK)
    cause = first_cause(noticed, deaths=lambda: [ENDED], link=link, other_nodes={}, beat_ms=100)
    assert str(cause) == "rank 0 failed: ValueError: no"
    assert cause.cause is Cause.FAILED


def test_a_killing_is_told_without_a_wait(link):
    def never_asked():
        raise AssertionError

    noticed = died(KILLED)
    told = first_cause(noticed, deaths=never_asked, link=link, other_nodes={}, beat_ms=100)
    assert told is noticed


def test_a_node_that_says_nothing_more_is_lost(context, link):
    rank = connected(context, link, 1)
    rank.send(Started(2, 1))
    assert link.socket.poll(60_000)
    asked = {"deaths": nobody, "link": link, "beat_ms": 20}
    cause = first_cause(COMPLAINT, other_nodes={"10.0.0.2": [1]}, **asked)
    assert cause is COMPLAINT  # it has been heard since
    cause = first_cause(COMPLAINT, other_nodes={"10.0.0.2": [1]}, **asked)
    assert cause.cause is Cause.SILENT
    assert cause.rank == 1
    assert str(cause).startswith("node 10.0.0.2 is lost: its ranks [1] have said nothing for 0.1 s")
    rank.close()
