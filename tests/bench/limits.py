"""An end to a benchmark that does not end."""

import contextlib
import faulthandler
import signal
from collections.abc import Iterator


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """An error in the main thread after `seconds`; the end of the process if that does not help."""

    def over(*_: object) -> None:
        raise TimeoutError(f"not done after {seconds:g} s")

    faulthandler.dump_traceback_later(seconds + 25, exit=True)
    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        faulthandler.cancel_dump_traceback_later()
