"""The ingress's side of the live page: views come in from the driver, streams take them.

An ingress asks the driver for views only while somebody looks through it, and keeps the samples of
the last minutes, so that a second page costs the driver nothing. Views reach each stream in order;
a stream that is slow misses some, and loses nothing by it but the steps that they told of.
"""

import asyncio
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from msgspec import Struct

from deployments.messages import EngineState, EngineView, Sample

MAX_SAMPLES = 300


class Look(Struct, frozen=True):
    """What a stream sends: JSON, under these names."""

    model: str
    state: EngineState | None
    """None while the driver is not heard."""
    samples: tuple[Sample, ...]
    """Those the stream has not sent yet."""


class EngineWatch:
    def __init__(self) -> None:
        self.num_streams = 0
        self._samples: deque[Sample] = deque(maxlen=MAX_SAMPLES)
        self._waiting: set[asyncio.Future[EngineState]] = set()

    @property
    def last_sample(self) -> int:
        return self._samples[-1].number if self._samples else -1

    @contextmanager
    def watching(self) -> Iterator[None]:
        self.num_streams += 1
        try:
            yield
        finally:
            self.num_streams -= 1

    def on_view(self, view: EngineView) -> None:
        """Call it in the event loop."""
        last = self.last_sample
        self._samples.extend(one for one in view.samples if one.number > last)
        waiting, self._waiting = self._waiting, set()
        for one in waiting:
            if not one.done():
                one.set_result(view.state)

    def forget(self) -> None:
        """The next view may be another driver's, which counts its samples from 0 again."""
        self._samples.clear()

    def samples_after(self, number: int) -> tuple[Sample, ...]:
        """`number` may be another driver's: then all are new."""
        if number > self.last_sample:
            number = -1
        return tuple(one for one in self._samples if one.number > number)

    async def next(self, timeout_s: float) -> EngineState | None:
        """The next view's state; None if none came in time."""
        arrives = asyncio.get_running_loop().create_future()
        self._waiting.add(arrives)
        try:
            async with asyncio.timeout(timeout_s):
                return await arrives
        except TimeoutError:
            return None
        finally:
            self._waiting.discard(arrives)
