"""Planted faults, so that tests can show what a fault does. Without failpoints none of this runs.

A fault fires at the first step, from its own on, at which it can: `corrupt_ids` and `poison` wait
for a step that samples, `skip_collective` for one that communicates, `foreign_slot` (another
group's) and `shifted_slot` (at another offset than on other ranks) for one that takes a slot.

A fault with a stage fires on the way to readiness instead, when that stage is reached: a rank can
be lost while it joins its groups, registers memory, loads weights or captures graphs.

`other_plan` pads the replicas' rows to one more than the driver said. The header's digest tells,
before any collective has another size than on other ranks.

`skip_collective` leaves out what goes through a transport. A sum that GPUs make over their peers'
memory does not: who plants it sets `all_reduce="nccl"`.
"""

import os
import signal
import time
from collections.abc import Callable, Iterable

import numpy as np
import torch
import torch.distributed as dist
from msgspec import structs
from numpy.typing import NDArray
from torch import Tensor

from parallel.arena import ALIGNMENT, Block, Slot
from parallel.groups import Groups, Transport
from workers.config import Failpoint
from workers.protocol import decode_header, encode

SLOW_S = 3.0


class PlantedFault(RuntimeError):
    """The failpoint `raise`."""


class Failpoints:
    """The faults of one rank in one epoch, each to happen once."""

    def __init__(self, failpoints: Iterable[Failpoint], *, epoch: int, rank: int) -> None:
        self._left = [each for each in failpoints if each.epoch == epoch and each.rank == rank]
        self._step = -1
        self._groups: Groups | None = None

    def __bool__(self) -> bool:
        return bool(self._left)

    def take(self, action: str, step: int, stage: str = "") -> bool:
        """Whether `action` is due; it is not due again."""
        for each in self._left:
            if each.action == action and each.stage == stage and step >= each.step:
                self._left.remove(each)
                return True
        return False

    def enter(self, step: int) -> None:
        """What happens to a process on its way into a step."""
        self._step = step
        self._happen(step, "", f"the failpoint of step {step} was reached")

    def reach(self, stage: str) -> None:
        """What happens to a process at a stage of its start."""
        self._happen(0, stage, f"the failpoint of stage {stage} was reached")

    def _happen(self, step: int, stage: str, sentence: str) -> None:
        if self.take("kill", step, stage):
            os.kill(os.getpid(), signal.SIGKILL)
        if self.take("stop", step, stage):
            os.kill(os.getpid(), signal.SIGSTOP)
        if self.take("slow", step, stage):
            time.sleep(SLOW_S)
        transport = self._groups.tp.transport if self._groups else None
        if self._groups and transport and self.take("late_registration", step, stage):
            self._groups.arena.register(transport)
        if self.take("raise", step, stage):
            raise PlantedFault(sentence)

    def differ(self, header: bytes, step: int) -> bytes:
        """The header of `step`, or another one if that is due."""
        if not self.take("other_plan", step):
            return header
        told = decode_header(header)
        return encode(structs.replace(told, padded_rows=tuple(n + 1 for n in told.padded_rows)))

    def attach(self, groups: Groups) -> None:
        """Let this rank's memory and ledger go wrong when that is due."""
        self._groups = groups
        groups.arena.place = self._place

    def skips_a_collective(self) -> bool:
        """Then it is as if the rank had not called it, and its ledger does not know of it."""
        if self._groups is None or not self.take("skip_collective", self._step):
            return False
        self._groups.ledger.forget_last()
        return True

    def _place(self, slot: Slot) -> int:
        """Where a slot begins, or another one."""
        if self._groups and self.take("foreign_slot", self._step):
            foreign = [each for each in self._groups.arena.plan.slots if each.groups != slot.groups]
            return max(foreign, key=lambda each: each.num_bytes).offset
        if self.take("shifted_slot", self._step):
            return slot.offset + ALIGNMENT
        return slot.offset

    def corrupt(self, ids: NDArray[np.int32], step: int) -> NDArray[np.int32]:
        """The ids of `step`, the first one flipped if that is due."""
        if not len(ids) or not self.take("corrupt_ids", step):
            return ids
        wrong = ids.copy()
        wrong[0] ^= 1
        return wrong

    def poison(self, rows: tuple[int, ...], ids: NDArray[np.int32], step: int) -> tuple[int, ...]:
        """The poisoned rows of `step`, with its first logit row among them if that is due."""
        if not len(ids) or not self.take("poison", step):
            return rows
        return tuple(sorted({0, *rows}))


class Skipping:
    """A transport that can leave out its next collective."""

    def __init__(self, inner: Transport, failpoints: Failpoints) -> None:
        self._inner, self._failpoints = inner, failpoints

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        """So that this rank sets up at start what its peers, who are not wrapped, set up."""
        return self._inner.process_group

    def all_reduce(self, x: Tensor) -> None:
        if not self._failpoints.skips_a_collective():
            self._inner.all_reduce(x)

    def all_gather(self, out: Tensor, x: Tensor) -> None:
        if not self._failpoints.skips_a_collective():
            self._inner.all_gather(out, x)

    def start_all_gather(self, out: Tensor, x: Tensor) -> Callable[[], None]:
        if self._failpoints.skips_a_collective():
            return lambda: None
        return self._inner.start_all_gather(out, x)

    def reduce_scatter(self, out: Tensor, x: Tensor) -> None:
        if not self._failpoints.skips_a_collective():
            self._inner.reduce_scatter(out, x)

    def all_to_all(self, out: Tensor, x: Tensor) -> None:
        if not self._failpoints.skips_a_collective():
            self._inner.all_to_all(out, x)

    def allocate(self, num_bytes: int, device: torch.device) -> Block:
        return self._inner.allocate(num_bytes, device)

    def warm(self, device: torch.device) -> None:
        self._inner.warm(device)

    def register(self, block: Block) -> None:
        self._failpoints.reach("register")
        self._inner.register(block)
