"""A driver that does all the wire allows, at random, and knows by itself what rows to expect.

It admits with and without shared pages, cuts prompts into chunks, grows page lists, preempts and
admits again, and ends requests. One request at a time with `max_num_seqs=1` and `chaos=0` is the
plain run that any other must equal.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from typing import NamedTuple

from parallel.padding import align_rows, choose_bucket, choose_prompt_bucket
from tests.headers import header_of
from workers.protocol import Admit, Body, Header, Mode, Sampling, pack

GREEDY = Sampling(temperature=0.0)


@dataclass(eq=False)
class Request:
    prompt: list[int]
    max_tokens: int
    sampling: Sampling = GREEDY
    tokens: list[int] = field(default_factory=list)
    slot: int = -1
    num_computed: int = 0
    pages: list[int] = field(default_factory=list)
    decodes: bool = False

    def __post_init__(self) -> None:
        self.tokens = list(self.prompt)

    @property
    def output(self) -> list[int]:
        return self.tokens[len(self.prompt) :]

    @property
    def is_done(self) -> bool:
        return len(self.output) >= self.max_tokens


class Planned(NamedTuple):
    body: Body
    positions: list[int]
    kv_rows: list[int]
    logit_rows: list[int]
    sampling: list[Request]
    """The request of each logit row."""

    def header(self, step: int = 0, buckets: Sequence[int] = ()) -> Header:
        """As a driver of one replica would say it, with these graphs."""
        return planned_header([self], step, buckets)


def planned_header(
    plans: Sequence[Planned],
    step: int = 0,
    buckets: Sequence[int] = (),
    row_multiple: int = 1,
    prompt_buckets: Sequence[int] = (),
) -> Header:
    """Of all replicas' plans: padded to a bucket if there is one, else no more than needed.

    `buckets` are those of decodes alone, `prompt_buckets` those of other steps.
    """
    num_rows = tuple(len(plan.positions) for plan in plans)
    has_prompts = any(plan.body.chunk_slots for plan in plans)
    if has_prompts:
        num_chunks = [len(plan.body.chunk_slots) // 4 for plan in plans]
        bucket = choose_prompt_bucket(num_rows, num_chunks, prompt_buckets)
    else:
        bucket = choose_bucket(num_rows, buckets)
    padded = (bucket,) * len(plans) if bucket else align_rows(num_rows, row_multiple)
    num_logit_rows = tuple(len(plan.logit_rows) for plan in plans)
    mode = Mode.MIXED if has_prompts else Mode.DECODE
    return header_of(
        num_rows, num_logit_rows, padded_rows=padded, bucket=bucket, step=step, mode=mode
    )


class RandomDriver:
    def __init__(
        self,
        requests: list[Request],
        random: Random,
        *,
        max_num_seqs: int,
        num_pages: int,
        page_size: int,
        budget: int,
        chaos: float,
    ) -> None:
        self.waiting = list(requests)
        self.running: dict[int, Request] = {}
        self._random, self._chaos = random, chaos
        self._free_slots = list(range(max_num_seqs))
        self._users = dict.fromkeys(range(num_pages), 0)
        self._shared: dict[tuple[int, ...], int] = {}
        self._page_size, self._budget = page_size, budget
        self._is_stuck = False

    @property
    def is_done(self) -> bool:
        return not self.waiting and not self.running

    def plan(self) -> Planned:
        leaves = [
            slot
            for slot, request in sorted(self.running.items())
            if request.is_done or self._random.random() < self._chaos / 4
        ]
        grows: list[tuple[int, int]] = []
        for slot, request in sorted(self.running.items()):
            if slot not in leaves and request.decodes and not self._make_room(request, 1, grows):
                leaves.append(slot)
        if self._is_stuck and self.running and not leaves:
            leaves.append(max(self.running))
        for slot in leaves:
            self._leave(slot)
        decodes = [request for _, request in sorted(self.running.items()) if request.decodes]
        room = self._budget - len(decodes)
        going = [request for request in self.running.values() if not request.decodes]
        admits = self._admit(room)
        self._random.shuffle(going)
        chunks: list[tuple[Request, int]] = []
        for request in [*going, *admits]:
            length = min(len(request.tokens) - request.num_computed, room)
            if length and self._random.random() < self._chaos:
                length = self._random.randint(0, length)
            if length and self._make_room(request, length, grows):
                chunks.append((request, length))
                room -= length
        admitted = [self._message(request) for request in admits]
        entering = {request.slot for request in admits}
        grows = [(slot, page) for slot, page in grows if slot not in entering]
        body = Body(
            leaves=pack(leaves),
            admits=tuple(admitted),
            grow_slots=pack([slot for slot, _ in grows]),
            grow_pages=pack([page for _, page in grows]),
            chunk_slots=pack([request.slot for request, _ in chunks]),
            chunk_lengths=pack([length for _, length in chunks]),
        )
        return self._expect(body, decodes, chunks)

    def feed(self, planned: Planned, ids: list[int]) -> None:
        for request, token in zip(planned.sampling, ids, strict=True):
            request.tokens.append(token)

    def _expect(
        self, body: Body, decodes: list[Request], chunks: list[tuple[Request, int]]
    ) -> Planned:
        planned = Planned(body, [], [], [], [])
        for request, length in [*((one, 1) for one in decodes), *chunks]:
            for position in range(request.num_computed, request.num_computed + length):
                page = request.pages[position // self._page_size]
                planned.positions.append(position)
                planned.kv_rows.append(page * self._page_size + position % self._page_size)
            request.num_computed += length
            if request.num_computed == len(request.tokens):
                request.decodes = True
                planned.logit_rows.append(len(planned.positions) - 1)
                planned.sampling.append(request)
            for count in range(1, request.num_computed // self._page_size + 1):
                prefix = tuple(request.tokens[: count * self._page_size])
                self._shared.setdefault(prefix, request.pages[count - 1])
        self._is_stuck = not planned.positions
        return planned

    def _admit(self, room: int) -> list[Request]:
        admits: list[Request] = []
        while self.waiting and self._free_slots and room > 0:
            request = self.waiting[0]
            request.pages, request.num_computed = self._hits(request), 0
            request.num_computed = len(request.pages) * self._page_size
            for page in request.pages:
                self._users[page] += 1
            if not self._make_room(request, 1, []):
                self._release(request)
                break
            self.waiting.pop(0)
            index = self._random.randrange(len(self._free_slots))
            request.slot = self._free_slots.pop(index)
            self.running[request.slot] = request
            admits.append(request)
            room -= 1
        return admits

    def _hits(self, request: Request) -> list[int]:
        pages: list[int] = []
        while (len(pages) + 1) * self._page_size < len(request.tokens):
            page = self._shared.get(tuple(request.tokens[: (len(pages) + 1) * self._page_size]))
            if page is None:
                break
            pages.append(page)
        return pages

    def _message(self, request: Request) -> Admit:
        return Admit(
            request.slot,
            pack(request.tokens),
            len(request.prompt),
            request.num_computed,
            pack(request.pages),
            request.sampling,
        )

    def _make_room(self, request: Request, length: int, grows: list[tuple[int, int]]) -> bool:
        need = -(-(request.num_computed + length) // self._page_size) - len(request.pages)
        free = [page for page, users in self._users.items() if users == 0]
        if need > len(free):
            return False
        self._random.shuffle(free)
        for page in free[: max(need, 0)]:
            self._users[page] = 1
            self._shared = {key: value for key, value in self._shared.items() if value != page}
            request.pages.append(page)
            grows.append((request.slot, page))
        return True

    def _leave(self, slot: int) -> None:
        request = self.running.pop(slot)
        self._release(request)
        self._free_slots.append(slot)
        if not request.is_done:
            self.waiting.insert(0, request)

    def _release(self, request: Request) -> None:
        for page in request.pages:
            self._users[page] -= 1
        request.pages, request.num_computed, request.decodes = [], 0, False
