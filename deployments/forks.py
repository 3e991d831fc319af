"""The driver's end of the zygote: fork ranks, hear of their ends, read what they print. No Ray.

`workers.zygote` is the other end and describes the messages. Ranks on this machine are started
this way because an import of torch takes seconds and a fork does not.
"""

import os
import select
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from pathlib import Path
from typing import NamedTuple

import msgspec

from workers.config import rank_environment
from workers.spec import ZygoteMessage

START = """
import os, sys
os.putenv("OPENBLAS_NUM_THREADS", "1")  # a process that forks has one thread
sys.path.insert(0, sys.argv[1])
from workers.zygote import main
main(int(sys.argv[2]), sys.argv[3])
"""
MAX_MESSAGE_BYTES = 64 * 1024
TAIL_LINES = 3
MAX_TAIL = 600
KILL_TIMEOUT_S = 10.0
DRAIN_S = 0.05
"""How long the last output of a dead process may take to be read."""


class ForkFailed(Exception):
    """The zygote did not start, or is gone; the message has its last output."""


class Fork(NamedTuple):
    pid: int
    pidfd: int
    name: str


class ForkServer:
    """One zygote and the ranks it has forked."""

    def __init__(self, preload: str) -> None:
        self._output = Output()
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        writer = self._output.open("zygote")
        root = str(Path(__file__).resolve().parent.parent)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-c", START, root, str(theirs.fileno()), preload],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=writer,
                stderr=writer,
                process_group=0,
                env=rank_environment(),
            )
        finally:
            theirs.close()
            os.close(writer)
        self._forks: dict[int, Fork] = {}
        self._ends: dict[int, str] = {}
        self._is_gone = False

    @property
    def is_gone(self) -> bool:
        """The zygote itself has ended, and all ranks with it."""
        return self._is_gone

    def fileno(self) -> int:
        """Readable when a rank has ended."""
        return self._control.fileno()

    def fork(self, spec: bytes, name: str, timeout_s: float) -> Fork:
        """A new rank; `name` is put before what it prints."""
        writer = self._output.open(name)
        try:
            socket.send_fds(self._control, [spec], [writer])
        except OSError as error:
            raise ForkFailed(self._last_words()) from error
        finally:
            os.close(writer)
        deadline = time.monotonic() + timeout_s
        while True:
            if not readable(self._control.fileno(), deadline - time.monotonic()):
                raise ForkFailed(f"no process for {name} after {timeout_s:g} s")
            begun = self._read(name)
            if begun is not None:
                return begun
            if self._is_gone:
                raise ForkFailed(self._last_words())

    def take_ends(self) -> dict[int, str]:
        """How ranks have ended since last time, by pid. Does not wait."""
        while not self._is_gone and readable(self._control.fileno(), 0):
            self._read("")
        ends, self._ends = self._ends, {}
        return {pid: self._with_tail(pid, how) for pid, how in ends.items()}

    def kill(self) -> None:
        """SIGKILL for all ranks; returns when they are gone."""
        waiting = set(self._forks)
        for fork in self._forks.values():
            try:
                signal.pidfd_send_signal(fork.pidfd, signal.SIGKILL)
            except ProcessLookupError:
                waiting.discard(fork.pid)  # ended and buried before
        deadline = time.monotonic() + KILL_TIMEOUT_S
        while not self._is_gone and waiting - self._ends.keys():
            if not readable(self._control.fileno(), deadline - time.monotonic()):
                break
            self._read("")
        for fork in self._forks.values():
            os.close(fork.pidfd)
            self._output.forget(fork.name)
        self._forks.clear()
        self._ends.clear()

    def close(self) -> None:
        """Ends the zygote too."""
        self.kill()
        self._control.close()
        try:
            self._process.wait(KILL_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._output.close()

    def _read(self, name: str) -> Fork | None:
        """Reads one message: the fork that it announces, or an end that it tells of."""
        try:
            data, fds, _, _ = socket.recv_fds(self._control, MAX_MESSAGE_BYTES, 1)
        except ConnectionResetError:
            data, fds = b"", []
        if not data:
            self._is_gone = True
            for pid in self._forks.keys() - self._ends.keys():
                self._ends[pid] = "the process that forks ranks is gone"
            return None
        message = msgspec.json.decode(data, type=ZygoteMessage)
        if not fds:
            self._ends[message.pid] = message.ended
            return None
        fork = self._forks[message.pid] = Fork(message.pid, fds[0], name)
        return fork

    def _with_tail(self, pid: int, how: str) -> str:
        fork = self._forks.get(pid)
        tail = self._output.tail(fork.name) if fork else ""
        return f"{how}; its last output: {tail}" if tail else how

    def _last_words(self) -> str:
        tail = self._output.tail("zygote") or "it printed nothing"
        return f"the process that forks ranks is gone: {tail}"


def readable(fd: int, timeout_s: float) -> bool:
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    return bool(poller.poll(max(0, round(timeout_s * 1000))))


class Output:
    """Prints what processes print, each line with its process's name, and keeps the last lines."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._wake_read, self._wake_write = os.pipe()
        self._selector.register(self._wake_read, selectors.EVENT_READ, None)
        self._lock = threading.Lock()
        self._streams: dict[str, Stream] = {}
        self._thread = threading.Thread(target=self._run, name="rank-output", daemon=True)
        self._thread.start()

    def open(self, name: str) -> int:
        """A descriptor for a process to print to; the caller closes its copy."""
        reader, writer = os.pipe()
        stream = Stream(name, reader)
        with self._lock:
            self._streams[name] = stream
            self._selector.register(reader, selectors.EVENT_READ, stream)
        os.write(self._wake_write, b"r")
        return writer

    def tail(self, name: str) -> str:
        """The last lines of a process that has ended, as one."""
        with self._lock:
            stream = self._streams.get(name)
        if stream is None:
            return ""
        stream.at_end.wait(DRAIN_S)
        return " | ".join(stream.lines)[-MAX_TAIL:]

    def forget(self, name: str) -> None:
        with self._lock:
            self._streams.pop(name, None)

    def close(self) -> None:
        os.write(self._wake_write, b"q")
        self._thread.join()
        os.close(self._wake_write)
        os.close(self._wake_read)

    def _run(self) -> None:
        while True:
            for key, _ in self._selector.select():
                stream = key.data
                if stream is None:
                    if b"q" in os.read(self._wake_read, 4096):
                        self._close_all()
                        return
                elif not stream.read():
                    with self._lock:
                        self._selector.unregister(stream.fd)
                    os.close(stream.fd)
                    stream.at_end.set()

    def _close_all(self) -> None:
        for key in list(self._selector.get_map().values()):
            if key.data is not None:
                os.close(key.data.fd)
        self._selector.close()


class Stream:
    """What one process prints."""

    def __init__(self, name: str, fd: int) -> None:
        self.name, self.fd = name, fd
        self.lines: deque[str] = deque(maxlen=TAIL_LINES)
        self.at_end = threading.Event()
        self._rest = b""

    def read(self) -> bool:
        """Takes what there is; False at the end."""
        data = os.read(self.fd, 65536)
        *lines, self._rest = (self._rest + data).split(b"\n")
        if not data and self._rest:
            lines, self._rest = [self._rest], b""
        for line in lines:
            text = line.decode(errors="replace").rstrip()
            if text:
                self.lines.append(text.strip())
            print(f"[{self.name}] {text}", file=sys.stderr, flush=True)
        return bool(data)
