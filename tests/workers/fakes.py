"""A runner without a model and a driver without requests: enough to run ranks in tests."""

import time
from typing import NamedTuple

import msgspec
import numpy as np
import torch
import zmq

from deployments.worker_link import WorkerLink
from parallel.collectives import all_reduce
from tests.headers import header_of
from workers.protocol import (
    MESSAGE,
    STEP,
    Ack,
    Beat,
    Body,
    Failed,
    Hello,
    Mode,
    Ready,
    Serve,
    Start,
    Started,
    Stop,
    digest,
    encode,
    pack,
    unpack,
)

FAKE_RUNNER = "tests.workers.fakes:FakeRunner"
NUM_ROWS = 3


class FakeResult(NamedTuple):
    ids: np.ndarray
    ledger: bytes
    logprobs: tuple = ()
    prompt_logprobs: tuple = ()
    poisoned_rows: tuple = ()
    expert_rows: tuple = ()


class FakeRunner:
    """Samples `step * 10 + row + (what the all-reduce gave)`; really does the all-reduce."""

    max_pages, max_model_len, vocab_size, stop_token_ids = 100, 64, 1000, (2,)
    buckets, prompt_buckets, captured, padding_curves = (), (), b"", None

    def __init__(self, config, layout, rank, groups, device, progress):
        self._groups, self._device = groups, device
        progress("fake weights", 1, 1)

    def allocate(self, num_pages):
        self.num_pages = num_pages

    def launch(self, header, body, replica):
        ones_R = torch.ones(header.num_logit_rows[replica], device=self._device)
        all_reduce(ones_R, self._groups.tp)
        rows_R = np.arange(len(ones_R), dtype=np.int32)
        return rows_R + ones_R.cpu().numpy().astype(np.int32) + 10 * header.step

    def mask(self, pending, mask):
        pending += 1000 * unpack(mask.rows)[0]

    def is_done(self, pending):
        return True

    def finish(self, pending):
        return FakeResult(pending, self._groups.ledger.take())


def expected_ids(step, tp_size):
    return [10 * step + row + tp_size for row in range(NUM_ROWS)]


class TinyDriver:
    """Handshakes with all ranks of an epoch, then sends them steps and collects their acks."""

    def __init__(self, link: WorkerLink, config, *, epoch: int) -> None:
        self.link, self.epoch, self.layout = link, epoch, config.layout
        self.ranks = range(self.layout.world_size)
        self.inbox: list = []
        self.previous = [b""] * self.layout.num_domains
        self.step = [0] * self.layout.num_domains

    def pump(self, timeout_s=0.05):
        if self.link.socket.poll(int(timeout_s * 1000), zmq.POLLIN):
            self.inbox.extend(self.link.receive())

    def collect(self, kind, count, timeout_s=30.0, fatal=True):
        """Waits for `count` messages of a kind; a `Failed` raises."""
        deadline, found = time.monotonic() + timeout_s, []
        while len(found) < count:
            for rank, message in self.inbox:
                if fatal and isinstance(message, Failed):
                    raise RuntimeError(message.reason)
                if isinstance(message, kind):
                    found.append((rank, message))
            self.inbox = []
            if len(found) < count:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{len(found)} of {count} {kind.__name__}")
                self.pump()
        return found

    def send(self, rank, message):
        self.link.send(rank, MESSAGE, encode(message))

    def hellos(self):
        return dict(self.collect(Hello, len(self.ranks)))

    def handshake(self):
        hellos = self.hellos()
        for rank in self.ranks:
            first = self.layout.domain_ranks(self.layout.coordinates(rank).domain)[0]
            self.send(rank, Start(self.epoch, hellos[first].node_ip, hellos[first].store_port))
        ready = dict(self.collect(Ready, len(self.ranks)))
        for rank in self.ranks:
            self.send(rank, Serve(self.epoch, min(each.max_pages for each in ready.values())))
        self.collect(Started, len(self.ranks))
        return hellos

    def plan(self, domain=0, **changed):
        body = encode(Body())
        header = header_of(
            (NUM_ROWS,),
            epoch=self.epoch,
            step=self.step[domain],
            mode=Mode.DECODE,
            bodies=(digest(body),),
            previous=self.previous[domain],
        )
        told = encode(msgspec.structs.replace(header, **changed))
        return told, body, digest(told)

    def send_step(self, domain=0):
        header, *others = self.plan(domain)
        for rank in self.layout.domain_ranks(domain):
            self.link.send(rank, STEP, header, *others)
        self.previous[domain] = digest(header)
        self.step[domain] += 1
        return digest(header)

    def run_step(self, domain=0):
        """One step of one domain, checked: its ranks' acks agree."""
        step, header = self.step[domain], self.send_step(domain)
        ranks = self.layout.domain_ranks(domain)
        acks = dict(self.collect(Ack, len(ranks)))
        wanted = pack(expected_ids(step, self.layout.tp_size))
        assert sorted(acks) == list(ranks)
        for rank, ack in acks.items():
            assert (ack.step, ack.header, ack.ids) == (step, header, digest(wanted))
            assert ack.tokens == (wanted if rank == ranks[0] else b"")
        assert len({ack.ledger for ack in acks.values()}) == 1
        return unpack(acks[ranks[0]].tokens).tolist()

    def stop_all(self):
        for rank in self.ranks:
            self.send(rank, Stop(self.epoch))

    def beats_of(self, seconds):
        """How many beats of each rank come in so long."""
        deadline, counts = time.monotonic() + seconds, dict.fromkeys(self.ranks, 0)
        while time.monotonic() < deadline:
            self.pump()
            for rank, message in self.inbox:
                counts[rank] += isinstance(message, Beat)
            self.inbox = []
        return counts
