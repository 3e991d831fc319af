"""Grammars for the engine's loop, which never waits: compiling and masks, in threads of their own.

`open` gives a request its matcher at once if its grammar is known, and otherwise later; `ask` has
the masks of a step computed. What is ready comes out of `results`, and `wake` is readable then.
The loop alone advances matchers; a thread reads one only between `ask` and its result, when the
loop has no token for it. llguidance releases the interpreter while it works.

Known grammars are kept, those used last, up to `MAX_CACHED_CHARS` of their text: what a compiled
one takes is not known, but `deployments.grammar.LIMITS` bounds it.
"""

import logging
import os
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

from deployments.grammar import (
    GrammarFailed,
    GrammarRefused,
    Matcher,
    Vocabulary,
    compile_grammar,
    everything,
)
from deployments.grammar_check import Checker
from deployments.messages import Grammar

log = logging.getLogger("lockstep.grammars")

NUM_COMPILERS = 2
MAX_MASK_THREADS = 4
ROWS_A_TASK = 8
"""So many masks are a thread's turn: a mask takes 5 to 100 us, and a turn costs 30."""

MAX_MASK_S = 0.25
"""A mask that took longer (of the thread's own time) ends its request: the next would too."""

MAX_CACHED_CHARS = 4 * 2**20
MAX_CACHED = 256
MAX_OPENING = 1000
"""Grammars that may wait to be compiled."""

STACK_BYTES = 64 * 2**20
"""Eight times what the checking process has, so that what came through there fits."""


@dataclass(frozen=True, slots=True)
class Opened:
    """An `open` has been decided. The ticket is the caller's."""

    ticket: Any
    matcher: Matcher | None
    """At the beginning of the grammar, the caller's own; None if it is refused."""
    reason: str = ""


@dataclass(slots=True, eq=False)
class Masks:
    """The masks of one replica's rows in one step; `None` where a row is unlimited."""

    ticket: Any
    vocab_size: int
    matchers: Sequence[tuple[Matcher, frozenset[int]] | None]
    """Of each row, with the end-of-sequence ids that must not come yet."""
    bits: list[bytes] = field(default_factory=list)
    failed: list[int] = field(default_factory=list)
    """Places in `matchers` whose matcher has failed; their bits allow everything."""
    num_left: int = 0


class Grammars:
    """Compiled grammars by their text, and the threads that work on them."""

    def __init__(self, load_vocabulary: Callable[[], Vocabulary]) -> None:
        """`load_vocabulary` is called once, in a thread, when the first grammar comes."""
        self._load_vocabulary = load_vocabulary
        self._vocabulary: Vocabulary | None = None
        self._loading = threading.Lock()
        self._counting = threading.Lock()
        self._known: OrderedDict[tuple[str, str], Matcher] = OrderedDict()
        self._num_chars = 0
        self._opening: dict[tuple[str, str], list[Any]] = {}
        self._compiled: deque[tuple[tuple[str, str], Matcher | str]] = deque()
        self._masks: deque[Masks] = deque()
        self._compilers = _Threads("lockstep-compile", NUM_COMPILERS)
        self._maskers = _Threads("lockstep-mask", min(MAX_MASK_THREADS, os.cpu_count() or 1))
        self._checkers: SimpleQueue[Checker] = SimpleQueue()
        for _ in range(NUM_COMPILERS):
            self._checkers.put(Checker())
        self.wake = os.eventfd(0, os.EFD_NONBLOCK)
        """For the loop's poller."""

    def open(self, ticket: Any, grammar: Grammar) -> Opened | None:
        """The grammar's matcher if it is known; None: `results` will name the ticket."""
        key = (grammar.kind, grammar.text)
        known = self._known.get(key)
        if known is not None:
            self._known.move_to_end(key)
            return Opened(ticket, known.copy())
        if key in self._opening:
            self._opening[key].append(ticket)
        elif len(self._opening) >= MAX_OPENING:
            return Opened(ticket, None, "too many grammars are waiting to be compiled")
        else:
            self._opening[key] = [ticket]
            self._compilers.put(lambda: self._compile(key, grammar))
        return None

    def ask(self, masks: Masks) -> None:
        """Have `masks.bits` filled in."""
        masks.bits = [b""] * len(masks.matchers)
        starts = range(0, len(masks.matchers), ROWS_A_TASK)
        masks.num_left = len(starts)
        for start in starts:
            self._maskers.put(lambda start=start: self._fill(masks, start))

    def results(self) -> tuple[list[Opened], list[Masks]]:
        """What is ready since last asked."""
        try:
            os.eventfd_read(self.wake)
        except BlockingIOError:
            return [], []
        opened: list[Opened] = []
        while self._compiled:
            opened += self._on_compiled(*self._compiled.popleft())
        masks: list[Masks] = []
        while self._masks:
            masks.append(self._masks.popleft())
        return opened, masks

    def forget_tickets(self) -> None:
        """Nobody waits any more for what is being compiled; it is kept when it is ready."""
        for tickets in self._opening.values():
            tickets.clear()

    def close(self) -> None:
        """Ends the processes; threads end with what they are doing."""
        self._compilers.close()
        self._maskers.close()
        for _ in range(NUM_COMPILERS):
            self._checkers.get().close()
        os.close(self.wake)

    def _on_compiled(self, key: tuple[str, str], found: Matcher | str) -> list[Opened]:
        tickets = self._opening.pop(key, [])
        if isinstance(found, str):
            return [Opened(ticket, None, found) for ticket in tickets]
        self._known[key] = found
        self._num_chars += len(key[1])
        while len(self._known) > MAX_CACHED or self._num_chars > MAX_CACHED_CHARS:
            (_, text), _ = self._known.popitem(last=False)
            self._num_chars -= len(text)
        return [Opened(ticket, found.copy()) for ticket in tickets]

    # In the threads

    def _compile(self, key: tuple[str, str], grammar: Grammar) -> None:
        found: Matcher | str
        checker = self._checkers.get()
        try:
            refused = checker.check(grammar)
            found = refused if refused is not None else self._compiled_here(grammar)
        except GrammarRefused as error:
            found = str(error)
        except Exception:
            log.exception("a grammar was not compiled")
            found = "it could not be compiled"
        self._checkers.put(checker)
        self._compiled.append((key, found))
        os.eventfd_write(self.wake, 1)

    def _compiled_here(self, grammar: Grammar) -> Matcher:
        with self._loading:
            if self._vocabulary is None:
                self._vocabulary = self._load_vocabulary()
        return compile_grammar(grammar, self._vocabulary)

    def _fill(self, masks: Masks, start: int) -> None:
        unlimited = everything(masks.vocab_size)
        for place in range(start, min(start + ROWS_A_TASK, len(masks.matchers))):
            pair = masks.matchers[place]
            bits = None if pair is None else _allowed(*pair)
            masks.bits[place] = unlimited if bits is None else bits
            if pair is not None and bits is None:
                masks.failed.append(place)
        with self._counting:
            masks.num_left -= 1
            is_last = masks.num_left == 0
        if is_last:
            self._masks.append(masks)
            os.eventfd_write(self.wake, 1)


def _allowed(matcher: Matcher, barred: frozenset[int]) -> bytes | None:
    """A row's mask; None if there is none to be had, now or ever."""
    began = time.thread_time()
    try:
        bits = matcher.allowed(barred)
    except GrammarFailed as error:
        log.warning("a grammar failed: %s", error)
        return None
    except Exception:
        log.exception("a grammar failed")
        return None
    if time.thread_time() - began > MAX_MASK_S:
        log.warning("a grammar failed: a mask took %.2f s", time.thread_time() - began)
        return None
    return bits


class _Threads:
    """A few threads with large stacks that do what they are given, from the first `put` on."""

    def __init__(self, name: str, num_threads: int) -> None:
        self._name, self._num_threads = name, num_threads
        self._tasks: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []

    def put(self, task: Callable[[], None]) -> None:
        if not self._threads:
            self._start()
        self._tasks.put(task)

    def close(self) -> None:
        """Returns when all have ended."""
        for _ in self._threads:
            self._tasks.put(None)
        for thread in self._threads:
            thread.join()

    def _start(self) -> None:
        before = threading.stack_size(STACK_BYTES)
        try:
            for number in range(self._num_threads):
                name = f"{self._name}-{number}"
                self._threads.append(threading.Thread(target=self._run, name=name, daemon=True))
                self._threads[-1].start()
        finally:
            threading.stack_size(before)

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None:
            task()
