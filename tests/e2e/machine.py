"""How much this machine holds programs up, so that limits in seconds are of the product alone."""

import time

SPIN_S = 0.1
"""Of this process's own computing time: some of the scheduler's turns."""


def slowdown() -> float:
    """How many times longer computing takes now than it would on an idle machine; at least 1."""
    began, spent = time.monotonic(), time.thread_time()
    while time.thread_time() - spent < SPIN_S:
        pass
    return max(1.0, (time.monotonic() - began) / SPIN_S)
