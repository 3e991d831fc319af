"""A process that tries grammars out, so that a bad one harms nobody: it may hang, crash or swell.

llguidance bounds its own work, but not all of it, and a schema of a few thousand nested definitions
ends the process it is compiled in. So a grammar that nobody has seen before is compiled here first,
over a vocabulary of bytes, and its first masks are computed; only what comes through in time is
compiled by the driver. Nothing of it comes back but a word: the driver compiles for itself.

Time is the process's own, on a CPU: the kernel ends it when it has had `DEADLINE_S` for a grammar.
So what a grammar is told does not hang on what else the machine has to do.

    checker = Checker()
    checker.check(Grammar("regex", "(a+)+b"))     None: it may be used
    checker.close()
"""

import contextlib
import os
import resource
import select
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from random import Random
from typing import BinaryIO

import msgspec

from deployments.grammar import (
    GrammarFailed,
    GrammarRefused,
    Matcher,
    State,
    Vocabulary,
    compile_grammar,
    ids_of,
)
from deployments.messages import Grammar

DEADLINE_S = 0.5
"""Of CPU time, for compiling a grammar and computing its first masks."""

PATIENCE_S = 10.0
"""By the clock on the wall, for the same: a process that waits for something uses no CPU time."""

START_TIMEOUT_S = 30.0
"""For the process to be there, on a machine with a cold cache; is not part of a deadline."""

MAX_MEMORY_BYTES = 2 * 2**30
STACK_BYTES = 8 * 2**20
"""Of the thread that compiles; the driver's has more, so what comes through here fits there."""

OUT_OF_TIME = signal.SIGPROF
"""Ends the process when it has used its time; sent by the kernel, whatever the process is at."""

NUM_WALKED = 24
"""Tokens said at random: much of a grammar's work is done only when its text gets there."""

START = (
    "import sys; sys.path.insert(0, sys.argv[1]); import deployments.grammar_check as g; g.main()"
)
_LENGTH = struct.Struct("<I")


class Checker:
    """The process and how to talk to it. One thread uses it at a time."""

    def __init__(self, deadline_s: float = DEADLINE_S, patience_s: float = PATIENCE_S) -> None:
        """A grammar has `deadline_s` of the process's CPU time, and `patience_s` in any case."""
        self._deadline_s = deadline_s
        self._patience_s = patience_s
        self._process: subprocess.Popen[bytes] | None = None

    def check(self, grammar: Grammar) -> str | None:
        """None if the grammar may be used, else why not."""
        try:
            process = self._running()
            write_frame(_pipe(process.stdin), msgspec.msgpack.encode(grammar))
            answer = self._answer(process, self._patience_s)
        except OSError:
            self.close()
            return "it could not be compiled"
        if answer is None:
            ended_by = process.poll()
            self.close()
            is_late = ended_by in (None, -OUT_OF_TIME)
            return "it takes too long to compile" if is_late else "it is too complex"
        return answer.decode() or None

    def close(self) -> None:
        """Ends the process, whatever it is doing. Another `check` starts a new one."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):
                _pipe(pipe).close()

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            root = str(Path(__file__).resolve().parent.parent)
            self._process = subprocess.Popen(
                [sys.executable, "-c", START, root, str(self._deadline_s)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                bufsize=0,
                process_group=0,
            )
            if self._answer(self._process, START_TIMEOUT_S) is None:
                raise OSError("the process that checks grammars does not start")
        return self._process

    def _answer(self, process: subprocess.Popen[bytes], timeout_s: float) -> bytes | None:
        """The next frame; None if the process ends or does not answer in time."""
        pipe, deadline = _pipe(process.stdout), time.monotonic() + timeout_s
        data, wanted = b"", _LENGTH.size
        while len(data) < wanted:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([pipe], [], [], left)[0]:
                return None
            piece = os.read(pipe.fileno(), 4096)
            if not piece:
                process.wait()
                return None
            data += piece
            if len(data) >= _LENGTH.size:
                wanted = _LENGTH.size + _LENGTH.unpack(data[: _LENGTH.size])[0]
        return data[_LENGTH.size :]


def _pipe(pipe: object) -> BinaryIO:
    if pipe is None:
        raise OSError("the process has no pipe")
    return pipe  # pyright: ignore[reportReturnType]


def write_frame(pipe: BinaryIO, data: bytes) -> None:
    rest = memoryview(_LENGTH.pack(len(data)) + data)
    while rest:
        rest = rest[os.write(pipe.fileno(), rest) :]


def read_frame(pipe: BinaryIO) -> bytes | None:
    """A frame from a pipe that may block; None at its end."""
    head = pipe.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    return pipe.read(_LENGTH.unpack(head)[0])


def verdict(grammar: Grammar, vocabulary: Vocabulary) -> str:
    """Empty if the grammar can be used, else why not."""
    try:
        _walk(compile_grammar(grammar, vocabulary))
    except (GrammarRefused, GrammarFailed) as error:
        return str(error)
    return ""


def _walk(matcher: Matcher) -> None:
    random = Random(0)
    for _ in range(NUM_WALKED):
        ids = [token for token in ids_of(matcher.allowed((256,))) if token < 256]
        if not ids or matcher.accept(random.choice(ids)) is not State.OPEN:
            return


def _serve(deadline_s: float) -> None:
    vocabulary = Vocabulary.of_bytes()
    write_frame(sys.stdout.buffer, b"ready")
    while (data := read_frame(sys.stdin.buffer)) is not None:
        grammar = msgspec.msgpack.decode(data, type=Grammar)
        signal.setitimer(signal.ITIMER_PROF, deadline_s)
        found = verdict(grammar, vocabulary)
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        write_frame(sys.stdout.buffer, found.encode())


def main() -> None:
    """The process: answers grammars until its input ends."""
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    threading.stack_size(STACK_BYTES)
    signal.signal(OUT_OF_TIME, signal.SIG_DFL)
    thread = threading.Thread(target=_serve, args=(float(sys.argv[2]),))
    thread.start()
    thread.join()
