"""`lockstep batch`: answer a file of requests, line by line, and be killed at any time.

    python -m deployments.batch -i in.jsonl -o out.jsonl [--errors errors.jsonl] [engine flags]
    python -m deployments.batch -i in.jsonl -o out.jsonl --url http://127.0.0.1:8000
    ray job submit --working-dir . -- python -m deployments.batch -i in.jsonl -o out.jsonl

Lines are OpenAI's batch JSONL (`deployments.batch_lines`). They are read as they are needed, some
are under way at once, and each result is written when it is there, so the order may differ: join by
`custom_id`. Run the same command again after whatever ended it and it does what is left: nothing
that was written is computed again, and no line is lost or written twice. (An object store gets what
is written every ten seconds: `deployments.batch_objects`.)

Exit codes: 0 every line has its result (an error is one), 1 the engine or the service failed or the
batch was stopped, 2 the command is wrong.
"""

import asyncio
import contextlib
import math
import random
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from deployments.batch_backends import (
    Backend,
    BackendFailed,
    NoAnswer,
    OwnEngine,
    Reply,
    RunningService,
    show,
)
from deployments.batch_files import (
    DiskFull,
    Output,
    count_lines,
    open_input,
    open_output,
    same_file,
)
from deployments.batch_lines import (
    BatchError,
    Done,
    Question,
    Result,
    encode_result,
    key,
    num_tokens,
    read_lines,
    read_question,
    refusal_in_words,
    result,
)
from deployments.config import ServiceConfig
from deployments.fit import check_fit, check_tokenizer

TRY_AGAIN = (429, 502, 503, 504)
"""Not the line's fault: it is asked again until something else is answered."""

MAX_TRIES_500 = 3
LONGEST_PAUSE_S = 30.0
DISK_PAUSE_S = 2.0
REMIND_S = 60.0
SERVICE_CONCURRENCY = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchOptions:
    input: str
    output: str
    errors: str = ""
    """Where lines that failed go; empty puts them into `output` with the others."""
    url: str = ""
    api_key_file: str = ""
    concurrency: int | None = None
    """Lines under way at once."""
    give_up_s: float = 3600.0
    """So long without any answer, and the batch ends; it can be gone on with."""

    def __post_init__(self) -> None:
        if self.concurrency is not None and self.concurrency < 1:
            raise BatchError(f"--concurrency {self.concurrency} must be at least 1")
        files = [self.input, self.output, *([self.errors] if self.errors else [])]
        for place, one in enumerate(files):
            if any(same_file(one, other) for other in files[:place]):
                raise BatchError(f"{one} is named twice: input, output and errors are three files")


def run_batch(options: BatchOptions, settings: dict[str, Any]) -> int:
    """`settings` are the engine's; with a url there is no engine to set."""
    backend = _backend(options, settings)
    concurrency = options.concurrency or _concurrency(options, settings)
    done = Done()
    with contextlib.ExitStack() as stack:
        source = stack.enter_context(open_input(options.input))
        output = open_output(options.output, done)
        stack.callback(_close, output)
        errors = output
        if options.errors:
            errors = open_output(options.errors, done)
            stack.callback(_close, errors)
        is_json = settings.get("log_format") == "json"  # a bar would run into its lines
        total = count_lines(options.input)
        progress = Progress(total=total, num_before=len(done), draws=not is_json)
        todo = questions(source, done)
        batch = Batch(backend, output, errors, progress, concurrency, options.give_up_s)
        try:
            asyncio.run(_until_stopped(batch, todo))
            output.finish()
            errors.finish()
        except BackendFailed as error:
            show(f"{error}; the same command goes on from here")
            return 1
        except Stopped:
            show("stopped; the same command goes on from here")
            return 1
        except OSError as error:
            show(f"the output cannot be written: {error.strerror or error}")
            return 1
        finally:
            progress.close()
    show(progress.summary())
    return 0


def _close(output: Output) -> None:
    try:
        output.close()
    except OSError as error:
        show(f"the last answers could not be written: {error.strerror or error}")


def _backend(options: BatchOptions, settings: dict[str, Any]) -> Backend:
    if not options.url:
        config = ServiceConfig.from_args({"metrics_port": -1} | settings)
        check_fit(config.engine)
        check_tokenizer(config.engine)
        return OwnEngine(config)
    if settings:
        raise BatchError(
            f"--{next(iter(settings)).replace('_', '-')} sets up an engine, and with --url the "
            "running service's is used: leave one out"
        )
    api_key = Path(options.api_key_file).read_text().strip() if options.api_key_file else ""
    connections = options.concurrency or SERVICE_CONCURRENCY
    return RunningService(options.url, api_key=api_key, num_connections=connections)


def _concurrency(options: BatchOptions, settings: dict[str, Any]) -> int:
    """Enough that every slot of every replica is taken and the next request waits."""
    if options.url:
        return SERVICE_CONCURRENCY
    config = ServiceConfig.from_args(settings).engine
    slots = config.max_num_seqs * config.dp_size
    return slots + max(1, slots // 4)


def questions(source: Any, done: Done) -> Iterator[Question | Result]:
    """What is left to do: lines to ask, and errors to write about those that cannot be."""
    seen: set[int] = set()
    for number, data in read_lines(source):
        one = read_question(number, data, seen)
        if isinstance(one, Question):
            if key(one.custom_id) not in done.answered:
                yield one
        elif number not in done.refused:
            yield one


class Stopped(Exception):
    """SIGINT or SIGTERM."""


async def _until_stopped(batch: "Batch", todo: Iterator[Question | Result]) -> None:
    loop = asyncio.get_running_loop()
    stop: asyncio.Future[None] = loop.create_future()

    def on_signal() -> None:
        if not stop.done():
            stop.set_exception(Stopped())

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal)
    work = asyncio.create_task(batch.run(todo))
    try:
        await asyncio.wait({work, stop}, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            work.result()
            stop.cancel()
        else:
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)
            stop.result()
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


class Batch:
    """Keeps `concurrency` lines under way until none is left."""

    def __init__(
        self,
        backend: Backend,
        output: Output,
        errors: Output,
        progress: "Progress",
        concurrency: int,
        give_up_s: float,
    ) -> None:
        self._backend = backend
        self._output, self._errors = output, errors
        self._progress = progress
        self._concurrency = concurrency
        self._give_up_s = give_up_s
        self._last_answer = time.monotonic()

    async def run(self, todo: Iterator[Question | Result]) -> None:
        first = next(todo, None)
        if first is None:
            return  # an engine need not start to find that all is done
        try:
            await self._backend.start()
            self._last_answer = time.monotonic()
            self._progress.begin()
            await self._run(first, todo)
        finally:
            await self._backend.close()

    async def _run(self, first: Question | Result, todo: Iterator[Question | Result]) -> None:
        watch: asyncio.Task[None] = asyncio.create_task(self._backend.watch())
        under_way: set[asyncio.Task[None]] = set()
        one: Question | Result | None = first
        try:
            while one is not None or under_way:
                while one is not None and len(under_way) < self._concurrency:
                    under_way.add(asyncio.create_task(self._do(one)))
                    one = next(todo, None)
                done, _ = await asyncio.wait(
                    {*under_way, watch}, return_when=asyncio.FIRST_COMPLETED
                )
                for task in done:
                    task.result()
                under_way -= done
        finally:
            for task in (*under_way, watch):
                task.cancel()
            await asyncio.gather(*under_way, watch, return_exceptions=True)

    async def _do(self, one: Question | Result) -> None:
        found = await self._answer(one) if isinstance(one, Question) else one
        output = self._output if found.error is None else self._errors
        line = encode_result(found)
        while True:
            try:
                output.append(line)
                break
            except DiskFull as error:
                self._progress.say(f"{error.strerror}: make room, the batch waits")
                await asyncio.sleep(DISK_PAUSE_S)
        self._progress.count(found)

    async def _answer(self, question: Question) -> Result:
        num_tries = 0
        while True:
            num_tries += 1
            try:
                reply = await self._backend.ask(question.url, question.body)
            except NoAnswer as error:
                await self._pause(num_tries, None, f"no answer ({error})")
                continue
            if reply.status in TRY_AGAIN:
                reason = refusal_in_words(reply.status, reply.body)
                await self._pause(num_tries, reply.retry_after_s, reason)
                continue
            self._last_answer = time.monotonic()
            if reply.status < 500 or num_tries >= MAX_TRIES_500:
                return _told(question, reply)

    async def _pause(self, num_tries: int, wanted_s: float | None, reason: str) -> None:
        """Say why and wait as long as asked to, else longer each time; give up in the end."""
        silence = time.monotonic() - self._last_answer
        if silence > self._give_up_s:
            raise BackendFailed(f"nothing was answered for {silence:.0f} s: {reason}")
        kind = reason.partition(" (")[0]  # what follows may differ from answer to answer
        self._progress.remind(kind, f"{reason}; trying for {self._give_up_s - silence:.0f} s more")
        pause = min(2.0 ** min(num_tries, 10) / 4, LONGEST_PAUSE_S)
        pause = min(max(pause, wanted_s or 0.0), LONGEST_PAUSE_S)
        await asyncio.sleep(pause * random.uniform(0.75, 1.25))


def _told(question: Question, reply: Reply) -> Result:
    return result(question, reply.status, reply.request_id, reply.body)


@dataclass(slots=True)
class Progress:
    """The bar, and the sums for the summary."""

    total: int | None
    num_before: int
    draws: bool = True
    num_answered: int = 0
    num_errors: int = 0
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    began: float = field(default_factory=time.monotonic)
    bar: Any = None
    reminded: dict[str, float] = field(default_factory=dict)

    def begin(self) -> None:
        """Throughput counts from here: the engine is up."""
        self.began = time.monotonic()
        is_terminal = sys.stderr.isatty()
        self.bar = tqdm(
            total=self.total,
            initial=self.num_before,
            unit="line",
            disable=not self.draws,
            mininterval=0.2 if is_terminal else 10.0,
            dynamic_ncols=is_terminal,
        )

    def count(self, found: Result) -> None:
        usage = num_tokens(found)
        self.num_answered += found.error is None
        self.num_errors += found.error is not None
        self.num_prompt_tokens += usage.prompt_tokens
        self.num_output_tokens += usage.completion_tokens
        if self.bar is not None:
            rate = self.num_output_tokens / max(1e-9, time.monotonic() - self.began)
            self.bar.set_postfix_str(f"{rate:.0f} tokens/s", refresh=False)
            self.bar.update()

    def say(self, sentence: str) -> None:
        tqdm.write(f"lockstep: {sentence}", file=sys.stderr)

    def remind(self, kind: str, sentence: str) -> None:
        """Says a sentence at once, and another of its kind after a minute at the earliest."""
        now = time.monotonic()
        if now - self.reminded.get(kind, -math.inf) >= REMIND_S:
            self.reminded[kind] = now
            self.say(sentence)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()

    def summary(self) -> str:
        took = time.monotonic() - self.began
        num = self.num_answered + self.num_errors
        before = f", {self.num_before:,} were done before" if self.num_before else ""
        return (
            f"{num:,} lines in {took:.1f} s{before}: {self.num_answered:,} answered, "
            f"{self.num_errors:,} errors; {self.num_prompt_tokens:,} prompt tokens, "
            f"{self.num_output_tokens:,} output tokens "
            f"({self.num_output_tokens / max(took, 1e-9):,.0f}/s)"
        )


if __name__ == "__main__":
    from deployments.cli import main

    sys.exit(main(["batch", *sys.argv[1:]]))
