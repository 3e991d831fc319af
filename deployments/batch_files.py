"""Where a batch is read from and written to: files that can be gone on with, and object stores.

An `Output` on a disk is append-only: each line is one write, so that a killed run leaves at most
one torn line, which the next run cuts off; the disk is told to keep it at intervals and at the end.
It is locked, so two runs cannot mix. A URL (`s3://...`, through fsspec) can be neither appended to
nor locked; `deployments.batch_objects` writes there.
"""

import errno
import fcntl
import os
import time
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

from deployments.batch_lines import BatchError, Done, read_done
from deployments.batch_objects import ObjectOutput

SYNC_EVERY_S = 1.0


class DiskFull(OSError):
    """Nothing of the line has been written: make room and write it again."""


class Output(Protocol):
    def append(self, line: bytes) -> None: ...

    def finish(self) -> None:
        """Every line of the batch has been appended."""
        ...

    def close(self) -> None: ...


def is_url(path: str) -> bool:
    return "://" in path and not path.startswith("file://")


def _local(path: str) -> Path:
    return Path(path.removeprefix("file://"))


def open_input(path: str) -> BinaryIO:
    try:
        if is_url(path):
            return cast(BinaryIO, _fsspec(path).open(path, "rb").open())
        return _local(path).open("rb")
    except OSError as error:
        raise BatchError(f"{path} cannot be read: {error.strerror or error}") from error


def count_lines(path: str) -> int | None:
    """Lines that are not empty, for the progress bar; None where counting means fetching."""
    if is_url(path):
        return None
    with _local(path).open("rb") as file:
        return sum(1 for line in file if line != b"\n")


def open_output(path: str, done: Done) -> Output:
    """Ready to append to; what it holds already is noted in `done`."""
    if is_url(path):
        return _open_object(path, done)
    return FileOutput(_local(path), done)


def same_file(one: str, other: str) -> bool:
    if is_url(one) or is_url(other):
        return one == other
    return _local(one).resolve() == _local(other).resolve()


class FileOutput:
    def __init__(self, path: Path, done: Done) -> None:
        try:
            self._file = path.open("a+b", buffering=0)
        except OSError as error:
            raise BatchError(f"{path} cannot be written: {error.strerror}") from error
        try:
            self._lock(path)
            self._size = self._recover(path, done)
        except BaseException:
            self._file.close()
            raise
        self._is_regular = path.is_file()
        self._synced = time.monotonic()

    def append(self, line: bytes) -> None:
        """Write one line, all of it or nothing."""
        written = 0
        try:
            while written < len(line):
                written += self._file.write(line[written:])
        except OSError as error:
            self._file.truncate(self._size)
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise DiskFull(error.errno, os.strerror(error.errno)) from error
            raise
        self._size += len(line)
        if time.monotonic() - self._synced > SYNC_EVERY_S:
            self._sync()

    def finish(self) -> None:
        self._sync()

    def close(self) -> None:
        self._sync()
        self._file.close()

    def _sync(self) -> None:
        if self._is_regular:
            os.fsync(self._file.fileno())
        self._synced = time.monotonic()

    def _lock(self, path: Path) -> None:
        try:
            fcntl.flock(self._file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise BatchError(f"another batch is writing to {path}: let it end first") from error

    def _recover(self, path: Path, done: Done) -> int:
        with path.open("rb") as written:
            size, lacks_end = read_done(written, str(path), done)
        self._file.truncate(size)
        if lacks_end:
            size += self._file.write(b"\n")
        return size


def _open_object(url: str, done: Done) -> ObjectOutput:
    fsspec = _fsspec(url)
    try:
        filesystem, path = fsspec.core.url_to_fs(url)
    except (OSError, ImportError, ValueError) as error:
        raise BatchError(f"{url} cannot be written: {error}") from error
    return ObjectOutput(filesystem, path, url, done)


def _fsspec(url: str) -> Any:
    try:
        import fsspec  # only for URLs: local paths need nothing
    except ImportError as error:
        raise BatchError(f"{url} needs fsspec: pip install fsspec, or name a local path") from error
    return fsspec
