"""A process that has imported everything a rank needs and forks ranks on demand. No device here.

Importing torch takes seconds; a fork takes milliseconds, so a gang that died is back at once. A
fork is safe only from a process with one thread that has not touched CUDA: both are checked, and
both are why this is a process of its own. It talks to `deployments.forks` over one socket, a
datagram a message:

    fleet to zygote     a `WorkerSpec` in JSON, and a descriptor for the rank's stdout and stderr
    zygote to fleet     `{"pid": 7}` with a pidfd of the rank; later `{"pid": 7, "ended": "..."}`

When the fleet's end of the socket closes, for whatever reason, all ranks are killed.
"""

import ctypes
import gc
import importlib
import os
import random
import select
import signal
import socket
import sys
import threading
import traceback

import msgspec
import torch

from workers import worker
from workers.spec import WorkerSpec, ZygoteMessage

PR_SET_PDEATHSIG = 1
MAX_SPEC_BYTES = 128 * 1024


class Zygote:
    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._children: dict[int, int] = {}
        """pid of each rank, by its pidfd."""
        self._poller = select.poll()
        self._poller.register(control, select.POLLIN)

    def run(self) -> WorkerSpec | None:
        """Serves until the fleet is gone: None. In a forked rank it returns what the rank is."""
        while True:
            for fd, _ in self._poller.poll():
                if fd in self._children:
                    self._bury(fd)
                    continue
                data, fds, _, _ = socket.recv_fds(self._control, MAX_SPEC_BYTES, 1)
                if not data:
                    self._kill_all()
                    return None
                if self._fork(fds[0]):
                    return WorkerSpec.from_json(data)

    def _fork(self, output: int) -> bool:
        """Whether this is the child."""
        parent = os.getpid()
        pid = os.fork()
        if pid:
            pidfd = os.pidfd_open(pid)
            os.close(output)
            self._children[pidfd] = pid
            self._poller.register(pidfd, select.POLLIN)
            socket.send_fds(self._control, [msgspec.json.encode(ZygoteMessage(pid))], [pidfd])
            return False
        die_with_parent(parent)
        os.setpgid(0, 0)
        for pidfd in self._children:
            os.close(pidfd)
        self._control.close()
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.close(output)
        random.seed()
        return True

    def _bury(self, pidfd: int) -> None:
        self._poller.unregister(pidfd)
        pid = self._children.pop(pidfd)
        _, status = os.waitpid(pid, 0)
        os.close(pidfd)
        self._control.send(msgspec.json.encode(ZygoteMessage(pid, how_it_ended(status))))

    def _kill_all(self) -> None:
        for pidfd, pid in self._children.items():
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            os.waitpid(pid, 0)


def how_it_ended(status: int) -> str:
    """A wait status in words.

    >>> how_it_ended(9), how_it_ended(256)
    ('signal SIGKILL', 'exit code 1')
    """
    code = os.waitstatus_to_exitcode(status)
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def die_with_parent(parent: int) -> None:
    """SIGKILL for this process when its parent thread ends, even by SIGKILL."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def refuse_unsafe_fork() -> None:
    if threading.active_count() > 1:
        names = ", ".join(thread.name for thread in threading.enumerate())
        raise RuntimeError(f"importing a runner must start no threads: {names}")
    if torch.cuda.is_initialized():
        raise RuntimeError("importing a runner must not initialise CUDA: no rank could fork")


def main(control_fd: int, preload: str) -> None:
    """`preload` is the module to import besides the worker: the runner's."""
    importlib.import_module(preload)
    refuse_unsafe_fork()
    gc.collect()
    gc.freeze()  # else the first collection in a rank copies every page
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the socket's end says when to go
    spec = Zygote(socket.socket(fileno=control_fd)).run()
    if spec is None:
        return
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    code = 1
    try:
        code = worker.main(spec)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # the zygote's own exit handlers are not the rank's
