"""A batch's output in an object store, which cannot be appended to: parts, and one object at last.

    s3://bucket/out.jsonl.part-000001    what was answered in the first ten seconds
    s3://bucket/out.jsonl.part-000002    and in the next
    s3://bucket/out.jsonl                all of it, when the batch is done; then the parts go

Each part is put whole, so a killed batch finds all that it put and computes only the answers of
its last seconds again. Whatever step of the end is interrupted, the next run does it over: parts
are removed last, and a line that is in the object already is not written to it twice. An object
store has no locks: two runs that write to one URL at once would answer lines twice.
"""

import contextlib
import threading
from collections.abc import Iterator
from hashlib import blake2b
from typing import Any

from deployments.batch_lines import BatchError, Done, read_done

PART_S = 10.0
"""Between parts; what a killed batch computes again at most."""

PART_BYTES = 16 * 2**20
"""A part that is so long goes at once."""

MAX_HELD_BYTES = 64 * 2**20
"""So much waits while the store takes nothing; more makes the batch wait too."""

PART = ".part-"
WHOLE = ".whole"


class ObjectOutput:
    """An `Output` at an fsspec URL. `append` only notes the line; a thread puts the parts."""

    def __init__(self, filesystem: Any, path: str, url: str, done: Done) -> None:
        """Notes in `done` what is there; a `BatchError` if that is something else."""
        self._filesystem, self._path, self._url = filesystem, path, url
        self._held: list[bytes] = []
        self._num_held_bytes = 0
        self._error: OSError | None = None
        self._is_closed = False
        self._has_changed = threading.Condition()
        try:
            self._num_parts = self._recover(done)
        except (OSError, ImportError) as error:
            raise BatchError(f"{url} cannot be read or written: {error}") from error
        self._thread = threading.Thread(target=self._put_parts, name="batch-parts", daemon=True)
        self._thread.start()

    def append(self, line: bytes) -> None:
        with self._has_changed:
            while self._num_held_bytes > MAX_HELD_BYTES and self._error is None:
                self._has_changed.wait()
            if self._error is not None:
                raise self._error
            self._held.append(line)
            self._num_held_bytes += len(line)
            if self._num_held_bytes >= PART_BYTES:
                self._has_changed.notify_all()

    def finish(self) -> None:
        """All lines are there: make the parts one object. An `OSError` says why it cannot be."""
        self._stop()
        try:
            self._join()
        except OSError:
            raise
        except Exception as wrong:  # each store has errors of its own
            raise OSError(f"{self._url}: {wrong}") from wrong

    def _join(self) -> None:
        if not self._parts():
            if not self._filesystem.exists(self._path):
                self._put(self._path, b"")
            return
        whole, kept = self._path + WHOLE, set[bytes]()
        with self._filesystem.open(whole, "wb") as target:
            for name in self._written():
                for line in self._lines(name):
                    mark = blake2b(line, digest_size=8).digest()
                    if mark not in kept:
                        kept.add(mark)
                        target.write(line)
        self._filesystem.mv(whole, self._path)
        self._filesystem.rm(self._parts())

    def close(self) -> None:
        """Leave what was answered in parts, for the next run to go on with."""
        self._stop()

    def _recover(self, done: Done) -> int:
        """Note what is written; the number of the last part."""
        for name in self._written():
            with self._filesystem.open(name, "rb") as file:
                read_done(file, f"{self._url} ({name})", done)
        numbers = [int(name.rpartition(PART)[2]) for name in self._parts()]
        return max(numbers, default=0)

    def _lines(self, name: str) -> Iterator[bytes]:
        """The whole lines of an object: not every store puts one whole or not at all."""
        with self._filesystem.open(name, "rb") as file:
            size, _ = read_done(file, name, Done())
        with self._filesystem.open(name, "rb") as file:
            while size > 0:
                line = file.readline()
                size -= len(line)
                yield line if line.endswith(b"\n") else line + b"\n"

    def _written(self) -> list[str]:
        first = [self._path] if self._filesystem.exists(self._path) else []
        return [*first, *self._parts()]

    def _parts(self) -> list[str]:
        self._filesystem.invalidate_cache()
        folder = self._path.rpartition("/")[0]
        with contextlib.suppress(FileNotFoundError):
            names = self._filesystem.ls(folder, detail=False)
            ours = [str(name) for name in names if _is_part(str(name), self._path)]
            return sorted(ours)
        return []

    def _put(self, name: str, data: bytes) -> None:
        self._filesystem.pipe_file(name, data)

    def _put_parts(self) -> None:
        while True:
            with self._has_changed:
                self._has_changed.wait_for(
                    lambda: self._is_closed or self._num_held_bytes >= PART_BYTES, PART_S
                )
                lines, self._held = self._held, []
                is_closed = self._is_closed
            if lines:
                self._put_part(lines)
            if is_closed or self._error is not None:
                return

    def _put_part(self, lines: list[bytes]) -> None:
        data = b"".join(lines)
        error = None
        try:
            self._put(f"{self._path}{PART}{self._num_parts + 1:06d}", data)
        except Exception as wrong:  # each store has errors of its own
            error = OSError(f"{self._url}: {wrong}")
        with self._has_changed:
            self._num_parts += 1
            self._num_held_bytes -= len(data)
            self._error = error
            self._has_changed.notify_all()

    def _stop(self) -> None:
        """Put what is held; raises if that, or a part before it, could not be put."""
        with self._has_changed:
            self._is_closed = True
            self._has_changed.notify_all()
        self._thread.join()
        if self._error is not None:
            raise self._error


def _is_part(name: str, path: str) -> bool:
    """A store may name its objects with or without a leading slash."""
    ours, _, number = name.rpartition(PART)
    return ours.strip("/") == path.strip("/") and number.isdecimal()
