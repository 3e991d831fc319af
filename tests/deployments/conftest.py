"""A service to ask, shared by the tests of a file."""

import pytest

from tests.deployments.fakes import saying
from tests.deployments.front import running


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
    shared_front.driver.received.clear()
    return shared_front
