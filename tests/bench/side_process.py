"""A benchmark as a process of its own: its lines as they come, and an end to it in any case."""

import contextlib
import os
import queue
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

GRACE_S = 8.0
"""From asking a process to end to ending it."""


def run_lines(
    command: Sequence[str],
    on_line: Callable[[str], None],
    *,
    limit_s: float,
    environment: Mapping[str, str],
    grace_s: float = GRACE_S,
) -> str:
    """Run a command and hand on each line it prints; why it did not end well, or nothing.

    It has a process group of its own, and nothing of that group is left when this returns, however
    it does.
    """
    with tempfile.TemporaryFile("w+", errors="replace") as errors:
        try:
            process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=errors, text=True, errors="replace",
                env=dict(environment), start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            return f"could not be started: {error}"
        with _ended(process, grace_s):
            deadline = time.monotonic() + limit_s
            lines = _lines_of(process)
            while True:
                try:
                    line = lines.get(timeout=max(0.0, deadline - time.monotonic()))
                except queue.Empty:
                    return f"was not done after {limit_s:.0f} s"
                if line is None:
                    break
                on_line(line.rstrip("\n"))
            try:
                code = process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                return f"closed its output and was not done after {limit_s:.0f} s"
        if code == 0:
            return ""
        errors.seek(0)
        last = " | ".join(line.strip() for line in errors.read().splitlines()[-4:])
        return f"ended with {code}: {last[-600:]}"


def _lines_of(process: subprocess.Popen[str]) -> "queue.Queue[str | None]":
    """Its lines, read by a thread, because a pipe has no deadline; None at the end.

    The thread closes the pipe: somebody who left the group may hold its other end for long.
    """
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        if process.stdout is not None:
            with process.stdout as out:
                for line in out:
                    lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    return lines


@contextlib.contextmanager
def _ended(process: subprocess.Popen[str], grace_s: float) -> Iterator[None]:
    """Afterwards the whole group is gone."""
    try:
        yield
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            if not _signal(process.pid, number):
                break
            end = time.monotonic() + grace_s
            while time.monotonic() < end and _signal(process.pid, 0):
                process.poll()  # a zombie still counts as one of its group
                time.sleep(0.05)


def _signal(group: int, number: int) -> bool:
    """Whether there was anybody to tell."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    return True
