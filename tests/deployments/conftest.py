"""A service to ask, shared by the tests of a file."""

import pytest

from deployments.messages import Watch
from tests.deployments.fakes import saying
from tests.deployments.front import running, wait_for


@pytest.fixture(scope="module")
def shared_front():
    with running(saying("Hello, wörld!")) as front:
        yield front


@pytest.fixture
def front(shared_front):
    """The shared one, as it was."""
    shared_front.driver.step_s = 0.001
    shared_front.driver.most_tokens = None
    shared_front.driver.reply = saying("Hello, wörld!")
    shared_front.driver.refusal = None
    # The last test's messages may be under way: they come before what this asks for.
    shared_front.driver.received.clear()
    shared_front.http.head("/api/engine")
    wait_for(lambda: shared_front.driver.of(Watch))
    shared_front.driver.received.clear()
    return shared_front
