"""A rank: joins its groups, loads its share of the model, obeys the driver's steps. No Ray here.

A step is obeyed only if it follows the last one this rank obeyed: next number, hash of the header
before, and the body that the header names. Up to two steps are in flight, so that a GPU has the
next one while the driver reads the last one's tokens. Whatever goes wrong ends the rank: workers
are disposable, and the driver starts the gang again under a new epoch.

    python -m workers.worker < spec.json
"""

import importlib
import os
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
import zmq
from numpy.typing import NDArray

import kernels
from parallel.groups import Groups, Transport
from parallel.layout import Layout
from parallel.padding_cost import PaddingCurves
from workers.architectures import plan_of
from workers.config import EngineConfig
from workers.failpoints import Failpoints, Skipping
from workers.link import DriverLink, Pulse
from workers.protocol import (
    MASK,
    MESSAGE,
    PROTOCOL_VERSION,
    STEP,
    Ack,
    Body,
    Failed,
    Header,
    Hello,
    Mask,
    Progress,
    Ready,
    Serve,
    Start,
    Started,
    Stop,
    TokenLogprobs,
    decode_body,
    decode_header,
    decode_mask,
    decode_to_worker,
    digest,
    pack,
)
from workers.rendezvous import Rendezvous
from workers.spec import WorkerSpec

MAX_IN_FLIGHT = 2
SPIN_S = 20e-6
"""How often a rank with a step on the GPU looks for the next one."""
MAX_REASON = 500
PATHS_EVERY = 100
"""Steps after which a rank says again what its collectives run on."""

ALONE_EXIT_CODE = 70


class Result(Protocol):
    """A finished step, as `ModelRunner.finish` returns it."""

    @property
    def ids(self) -> NDArray[np.int32]: ...
    @property
    def logprobs(self) -> tuple[tuple[int, TokenLogprobs], ...]: ...
    @property
    def prompt_logprobs(self) -> tuple[tuple[int, int, tuple[TokenLogprobs, ...]], ...]: ...
    @property
    def ledger(self) -> bytes: ...
    @property
    def poisoned_rows(self) -> tuple[int, ...]: ...
    @property
    def expert_rows(self) -> tuple[int, ...]: ...


class Runner(Protocol):
    """What computes steps. `Any` is its own record of a step that it has launched."""

    @property
    def max_pages(self) -> int: ...
    @property
    def max_model_len(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def stop_token_ids(self) -> tuple[int, ...]: ...
    @property
    def buckets(self) -> tuple[int, ...]:
        """Rows of the decode graphs that `allocate` captures."""
        ...

    @property
    def prompt_buckets(self) -> tuple[int, ...]:
        """Rows of the graphs of steps with prompts, the same."""
        ...

    @property
    def padding_curves(self) -> PaddingCurves | None:
        """What padding costs, if it was measured."""
        ...

    @property
    def captured(self) -> bytes:
        """Digests of the captured graphs' collectives."""
        ...

    def allocate(self, num_pages: int) -> None: ...

    def launch(self, header: Header, body: Body, replica: int) -> Any:
        """Queue a step; one whose body has `num_masked` > 0 samples only after `mask`."""
        ...

    def mask(self, pending: Any, mask: Mask) -> None: ...

    def is_done(self, pending: Any) -> bool:
        """Whether `finish` would return without waiting."""
        ...

    def finish(self, pending: Any) -> Result: ...


ReportProgress = Callable[[str, int, int], None]
"""(stage, done, total)"""
MakeRunner = Callable[[EngineConfig, Layout, int, Groups, torch.device, ReportProgress], Runner]


class StepRefused(RuntimeError):
    """The driver and this rank no longer agree on what has happened."""


class _Left(Exception):
    """The driver, or `leave`, wants this rank to go."""


class _InFlight(NamedTuple):
    step: int
    header: bytes
    pending: Any
    began: float


Wanted = TypeVar("Wanted", Start, Serve)


class StepChain:
    """Which step comes next. A step that does not fit is refused before it touches anything."""

    def __init__(self, *, epoch: int, rank: int, replica: int) -> None:
        self._epoch, self._rank, self._replica = epoch, rank, replica
        self._previous = b""
        self.step = -1
        """The last step that was accepted."""

    def accept(
        self, header_bytes: bytes, body_bytes: bytes, header_digest: bytes
    ) -> tuple[Header, Body]:
        if digest(header_bytes) != header_digest:
            raise StepRefused(
                f"rank {self._rank} got a header for step {self.step + 1} that is not the one the "
                "driver sent"
            )
        header = decode_header(header_bytes)
        if header.epoch != self._epoch:
            raise StepRefused(
                f"rank {self._rank} of epoch {self._epoch} got a step of epoch {header.epoch}"
            )
        if self._previous and header.step != self.step + 1:
            raise StepRefused(
                f"rank {self._rank} got step {header.step} after step {self.step}: "
                "one was lost, or came twice"
            )
        if header.previous != self._previous:
            raise StepRefused(
                f"rank {self._rank} got step {header.step}, whose header follows another "
                f"header than the one of step {self.step} that this rank has"
            )
        if not self._replica < len(header.bodies):
            raise StepRefused(
                f"step {header.step} has bodies for {len(header.bodies)} replicas, none for "
                f"replica {self._replica} of rank {self._rank}"
            )
        if digest(body_bytes) != header.bodies[self._replica]:
            raise StepRefused(
                f"rank {self._rank} got a body in step {header.step} that is not the one its "
                f"header names for replica {self._replica}"
            )
        body = decode_body(body_bytes)
        self._previous, self.step = header_digest, header.step
        return header, body


class Worker:
    """One rank of one epoch. `run` returns when the driver says `Stop`, or raises."""

    def __init__(
        self,
        spec: WorkerSpec,
        make_runner: MakeRunner,
        *,
        end_process: Callable[[int], None] = os._exit,
    ) -> None:
        self._spec, self._make_runner, self._end_process = spec, make_runner, end_process
        self._layout = spec.config.layout
        place = self._layout.coordinates(spec.rank)
        first = self._layout.replica_ranks(place.domain, place.attn_dp)[0]
        self._is_first_of_replica = spec.rank == first
        self._replica = place.attn_dp
        self._chain = StepChain(epoch=spec.epoch, rank=spec.rank, replica=self._replica)
        self._failpoints = Failpoints(spec.failpoints, epoch=spec.epoch, rank=spec.rank)
        self._groups: Groups | None = None
        self._num_paths = 0
        self._left = threading.Event()
        self._in_flight: deque[_InFlight] = deque()
        self._awaits_mask = False
        """The last step in flight cannot sample yet."""
        self._kept: list[bytes] | None = None
        """The step after one that awaits its mask."""

    def run(self) -> None:
        context = zmq.Context()
        link = DriverLink(context, self._spec)
        pulse = Pulse(
            context,
            self._spec,
            step=self._step,
            alone=self._alone,
            waiting=self._waiting,
        )
        pulse.start()
        try:
            self._serve(link)
        except _Left:
            pass
        except Exception as error:
            link.send(Failed(self._spec.epoch, self._spec.rank, sentence(error)))
            raise
        finally:
            pulse.stop()
            link.close()
            context.term()

    def leave(self) -> None:
        """Makes `run` return soon; for a rank that is a thread. Any thread may call it."""
        self._left.set()

    def _step(self) -> int:
        """For the beats; an epoch that has not begun is at its step 0."""
        return max(0, self._chain.step)

    def _waiting(self) -> tuple[int, str, str]:
        return self._groups.ledger.waiting() if self._groups else (0, "", "")

    def _alone(self) -> None:
        print(
            f"rank {self._spec.rank}: the driver has been silent for too long; leaving",
            file=sys.stderr,
            flush=True,
        )
        self._left.set()
        self._end_process(ALONE_EXIT_CODE)

    def _serve(self, link: DriverLink) -> None:
        refuse_foreign_kernels()
        device = self._take_device()
        rendezvous = Rendezvous(self._spec)
        link.send(self._hello(rendezvous.port))
        start = self._await(link, Start)
        self._failpoints.reach("join")
        groups = rendezvous.join(start, wrap=self._skipping if self._failpoints else None)
        self._groups = groups
        if self._failpoints:
            self._failpoints.attach(groups)
        runner = self._make_runner(
            self._spec.config,
            self._layout,
            self._spec.rank,
            groups,
            device,
            lambda stage, done, total: self._report(link, stage, done, total),
        )
        groups.arena.seal()
        link.send(self._ready(runner))
        runner.allocate(self._await(link, Serve).num_pages)
        link.send(Started(self._spec.epoch, self._spec.rank, runner.captured))
        try:
            while True:
                self._turn(link, runner)
        except _Left:
            rendezvous.close()
            raise

    def _report(self, link: DriverLink, stage: str, done: int, total: int) -> None:
        link.send(Progress(self._spec.epoch, self._spec.rank, stage, done, total))
        self._failpoints.reach(stage)

    def _skipping(self, transport: Transport) -> Transport:
        return Skipping(transport, self._failpoints)

    def _take_device(self) -> torch.device:
        device = torch.device(self._spec.device)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        else:
            cores = len(os.sched_getaffinity(0))
            torch.set_num_threads(max(1, cores // self._spec.ranks_on_node))
        return device

    def _hello(self, store_port: int) -> Hello:
        index = torch.device(self._spec.device).index
        return Hello(
            version=PROTOCOL_VERSION,
            epoch=self._spec.epoch,
            rank=self._spec.rank,
            node_ip=self._spec.node_ip,
            pid=os.getpid(),
            device="cpu" if index is None else gpu_uuids()[index],
            store_port=store_port,
        )

    def _ready(self, runner: Runner) -> Ready:
        return Ready(
            self._spec.epoch,
            self._spec.rank,
            runner.max_pages,
            runner.max_model_len,
            runner.vocab_size,
            tuple(runner.stop_token_ids),
            tuple(runner.buckets),
            runner.padding_curves,
            plan_of(self._spec.config).digest,
            tuple(runner.prompt_buckets),
        )

    def _await(self, link: DriverLink, wanted: type[Wanted]) -> Wanted:
        """The next message, which must be a `wanted` of this epoch."""
        frames = self._receive(link)
        message = self._message(frames)
        if not isinstance(message, wanted):
            raise StepRefused(
                f"rank {self._spec.rank} waited for {wanted.__name__} and got "
                f"{type(message).__name__}"
            )
        return message

    def _receive(self, link: DriverLink) -> list[bytes]:
        while not self._left.is_set():
            frames = link.receive(self._spec.config.beat_ms)
            if frames is not None:
                return frames
        raise _Left

    def _message(self, frames: list[bytes]) -> Start | Serve:
        """What the frames say, if it is no step; `Stop` leaves."""
        if len(frames) != 2 or frames[0] != MESSAGE:
            raise StepRefused(
                f"rank {self._spec.rank} waited for a message and got {len(frames)} frames of "
                f"kind {frames[0][:8]!r}"
            )
        message = decode_to_worker(frames[1])
        if message.epoch != self._spec.epoch:
            raise StepRefused(
                f"rank {self._spec.rank} of epoch {self._spec.epoch} got "
                f"{type(message).__name__} of epoch {message.epoch}"
            )
        if isinstance(message, Stop):
            raise _Left
        return message

    def _turn(self, link: DriverLink, runner: Runner) -> None:
        """Takes the next step or mask if there is one, else ends the oldest step if it is done."""
        if len(self._in_flight) == int(self._awaits_mask):
            self._take(self._next(link) or self._receive(link), runner)
            return
        oldest = self._in_flight[0]
        if len(self._in_flight) == MAX_IN_FLIGHT or runner.is_done(oldest.pending):
            link.send(self._finish(runner))
            return
        frames = self._next(link)
        if frames is not None:
            self._take(frames, runner)
        elif self._left.is_set():
            raise _Left
        else:
            time.sleep(SPIN_S)

    def _next(self, link: DriverLink) -> list[bytes] | None:
        """The step that was kept, if it can go now; else what has come."""
        if self._kept is None or self._awaits_mask:
            return link.receive(0)
        frames, self._kept = self._kept, None
        return frames

    def _take(self, frames: list[bytes], runner: Runner) -> None:
        """A step or a mask. What follows a step that awaits its mask is kept until that comes."""
        if len(frames) == 2 and frames[0] == MASK:
            self._mask(decode_mask(frames[1]), runner)
        elif len(frames) != 4 or frames[0] != STEP:
            message = self._message(frames)
            raise StepRefused(
                f"rank {self._spec.rank} waited for a step and got {type(message).__name__}"
            )
        elif not self._awaits_mask:
            self._launch(frames, runner)
        elif self._kept is None:
            self._kept = frames
        else:
            raise StepRefused(
                f"rank {self._spec.rank} got two steps more while step {self._chain.step} "
                "awaits its mask"
            )

    def _launch(self, frames: list[bytes], runner: Runner) -> None:
        began = time.perf_counter()
        told = self._failpoints.differ(frames[1], self._chain.step + 1)
        header, body = self._chain.accept(told, frames[2], frames[3])
        self._failpoints.enter(header.step)
        if self._failpoints.take("skip_step", header.step):
            return
        pending = runner.launch(header, body, self._replica)
        self._in_flight.append(_InFlight(header.step, frames[3], pending, began))
        self._awaits_mask = body.num_masked > 0

    def _mask(self, mask: Mask, runner: Runner) -> None:
        if not self._awaits_mask or (mask.epoch, mask.step) != (self._spec.epoch, self._chain.step):
            raise StepRefused(
                f"rank {self._spec.rank} is at step {self._chain.step} of epoch "
                f"{self._spec.epoch} and got a mask for step {mask.step} of epoch {mask.epoch}"
            )
        runner.mask(self._in_flight[-1].pending, mask)
        self._awaits_mask = False

    def _finish(self, runner: Runner) -> Ack:
        done = self._in_flight.popleft()
        result = runner.finish(done.pending)
        ids = pack(self._failpoints.corrupt(result.ids, done.step))
        poisoned = self._failpoints.poison(result.poisoned_rows, result.ids, done.step)
        first = self._is_first_of_replica
        return Ack(
            epoch=self._spec.epoch,
            rank=self._spec.rank,
            step=done.step,
            header=done.header,
            ids=digest(ids),
            ledger=result.ledger,
            seconds=time.perf_counter() - done.began,
            tokens=ids if first else b"",
            logprobs=result.logprobs if first else (),
            prompt_logprobs=result.prompt_logprobs if first else (),
            poisoned=poisoned if first else (),
            collectives=self._paths(done.step),
            expert_rows=result.expert_rows,
        )

    def _paths(self, step: int) -> tuple[tuple[str, str, str, str, int], ...]:
        """What collectives have run on so far: now and then, and when something new has come."""
        if self._groups is None:
            return ()
        counts = self._groups.ledger.counts
        if len(counts) == self._num_paths and step % PATHS_EVERY:
            return ()
        self._num_paths = len(counts)
        return tuple((group, op, path, why, n) for (group, op, path, why), n in counts.items())


def refuse_foreign_kernels() -> None:
    """Another distribution also calls its package `kernels`; ours lies beside this one."""
    ours = Path(__file__).resolve().parent.parent / "kernels"
    theirs = Path(str(kernels.__file__)).resolve().parent
    if theirs != ours:
        raise ImportError(
            f"the package `kernels` was found at {theirs}, not at {ours}: put {ours.parent} first "
            "in PYTHONPATH, or uninstall the other package"
        )


def gpu_uuids() -> tuple[str, ...]:
    """UUIDs of the GPUs this process sees, in order."""
    count = torch.cuda.device_count()
    return tuple(str(torch.cuda.get_device_properties(i).uuid) for i in range(count))


def sentence(error: BaseException) -> str:
    """An exception as one line for an operator."""
    text = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {text}"[:MAX_REASON]


def find_runner(name: str) -> MakeRunner:
    """The class behind `module:class`, as the fleet was told by its own process."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def main(spec: WorkerSpec) -> int:
    """Runs one rank as a process of its own; the exit code."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the driver decides, and says Stop
    try:
        Worker(spec, find_runner(spec.runner)).run()
    except Exception:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(WorkerSpec.from_json(sys.stdin.buffer.read())))
