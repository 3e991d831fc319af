"""Who runs in the next step of one replica: decisions over requests, slots and pages.

`Scheduler` is a deterministic state machine: `add`, `cancel`, `plan_step`, `apply` in, plans and
accepted tokens out. It waits for nothing, logs nothing and knows no clock, no socket, no torch.

- Decodes go first, one token each; what is left of the token budget reads prompts in chunks, those
  already begun before new ones, in order of arrival (continuous batching, chunked prefill).
- Plans run ahead of results: step n+1 may be planned while n computes. What is known ahead
  (max_tokens) is never overrun; what is learnt late (a stop token) costs one token, dropped here.
- When pages run out the latest arrival is preempted: it leaves at once, its pages return when its
  last step is acked, and it is computed again later, with everything it had said so far. Pages for
  the decodes of this step and of the next are made sure of beforehand, because a preempted
  request's pages come back one step late.
- A slot or page is used again only in a plan made after the last step naming it was acked.
- A request with a grammar is planned like any other. Its matcher reads each accepted token, ends
  the request where nothing may follow, and goes with it through preemptions.
"""

import heapq
from bisect import insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from deployments.grammar import State
from deployments.pages import PagePool, page_name
from deployments.requests import GRAMMAR_ERROR, NUMERICAL_ERROR, Finish, Request
from workers.protocol import Admit, Body, pack


class RequestTooLarge(ValueError):
    """A request that would not fit if it were alone."""


def _by_slot(request: Request) -> int:
    return request.slot


def _by_arrival(request: Request) -> int:
    return request.arrival


@dataclass(slots=True)
class Chunk:
    """`num_tokens` tokens of a request's known tokens, from `start`, computed in one step."""

    request: Request
    slot: int
    start: int
    num_tokens: int
    samples: bool
    """The chunk reaches the end of the known tokens, so it samples one."""


@dataclass(slots=True)
class Plan:
    """One replica's part in one step, and what the scheduler must remember until its results."""

    step: int
    body: Body
    decodes: list[Request]
    chunks: list[Chunk]
    preempted: list[Request] = field(default_factory=list)
    masked_rows: list[int] = field(default_factory=list)
    """Logit rows of requests with a grammar."""

    @property
    def num_rows(self) -> int:
        return len(self.decodes) + sum(chunk.num_tokens for chunk in self.chunks)

    @property
    def num_prompt_rows(self) -> int:
        """Rows whose next prompt token's log-probability is wanted."""
        return sum(
            max(0, min(chunk.start + chunk.num_tokens, chunk.request.num_prompt - 1) - chunk.start)
            for chunk in self.chunks
            if chunk.request.sampling.num_prompt_logprobs >= 0
        )

    @property
    def sampled(self) -> list[Request]:
        """Whose token each logit row is, in row order."""
        return self.decodes + [chunk.request for chunk in self.chunks if chunk.samples]


Accepted = tuple[Request, int, int]
"""(request, index among its output tokens, token)."""


class Scheduler:
    """The requests of one replica."""

    def __init__(
        self,
        *,
        num_pages: int,
        page_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        enable_prefix_caching: bool = True,
    ) -> None:
        self.pool = PagePool(num_pages, page_size)
        self.max_num_batched_tokens = max_num_batched_tokens
        self.enable_prefix_caching = enable_prefix_caching
        self.waiting: list[Request] = []
        self.prefilling: list[Request] = []
        self.decoding: list[Request] = []
        self.retiring: list[Request] = []
        """Out of all plans to come; their slots and pages return when their last step is acked."""
        self.failed: list[Request] = []
        """Ended by `fail`; whoever tells their owners takes them out."""
        self._has_grammars = False
        self._free_slots = list(range(max_num_seqs))
        self._leaves: list[int] = []
        self._plans: dict[int, Plan] = {}
        self._last_applied = -1
        self.num_preemptions = 0

    # What comes in

    def check_fits(self, num_prompt: int, max_tokens: int) -> None:
        """Refuse what could not run even alone, naming both numbers."""
        needed = self.pool.pages_for(num_prompt + max_tokens)
        if needed > self.pool.num_pages:
            most = self.pool.num_pages * self.pool.page_size
            raise RequestTooLarge(
                f"{num_prompt} prompt tokens and {max_tokens} output tokens need {needed} pages "
                f"of cache and there are {self.pool.num_pages}: ask for at most {most} in all"
            )

    def add(self, request: Request) -> None:
        self.check_fits(request.num_prompt, request.max_tokens)
        self._has_grammars |= request.matcher is not None
        insort(self.waiting, request, key=_by_arrival)

    def cancel(self, request: Request, finish: Finish = Finish.CANCELLED) -> None:
        """No plan made after this names the request."""
        if request.finish is not None:
            return
        self._finish(request, finish)
        self._release(self._last_applied)  # no step may come whose results would do it

    def fail(self, request: Request, failure: str) -> None:
        """End a request for a fault of ours; what it computed is not for others to find."""
        self.pool.forget(request.pages)
        request.failure = failure
        if request.finish is None:
            self._finish(request, Finish.ERROR)
            self.failed.append(request)

    @property
    def num_running(self) -> int:
        return len(self.prefilling) + len(self.decoding)

    @property
    def has_work(self) -> bool:
        """Whether a step planned now would have rows."""
        return bool(self.decoding or self.prefilling) or self.num_beginnable > 0

    @property
    def num_beginnable(self) -> int:
        """Waiting requests, if there is room for the first of them now."""
        waiting = self.waiting
        if not waiting or not self._can_admit(waiting[0], self._find(waiting[0])):
            return 0
        return len(waiting)

    @property
    def remaining_tokens(self) -> int:
        """Tokens that all its requests may still compute: what routing balances."""
        waiting = sum(len(r.tokens) + r.max_tokens - r.num_output for r in self.waiting)
        running = sum(
            max(0, len(r.tokens) - r.num_planned) + r.num_left
            for r in (*self.prefilling, *self.decoding)
        )
        return waiting + running

    def num_cached_tokens(self, names: Sequence[bytes]) -> int:
        """Tokens of a prompt with these page names that this replica has cached."""
        return len(self.pool.find(names)) * self.pool.page_size

    # A step

    def plan_step(
        self, step: int, *, admits_prompts: bool = True, reads_prompts: bool = True
    ) -> Plan:
        """The next step's plan; call only after the results of all but one earlier plan.

        Without `admits_prompts` who waits goes on waiting, and prompts already begun go on; without
        `reads_prompts` neither do.
        """
        preempted = self._make_room()
        grow_slots: list[int] = []
        grow_pages: list[int] = []
        decodes = self.decoding
        capacity = self.pool.page_size
        ended: list[Request] = []
        for request in decodes:
            if request.num_planned == len(request.pages) * capacity:
                page = self.pool.allocate(1)[0]
                request.pages.append(page)
                grow_slots.append(request.slot)
                grow_pages.append(page)
            request.num_planned += 1
            request.num_inflight += 1
            request.num_left -= 1
            request.last_step = step
            if request.num_left == 0:
                ended.append(request)
        decodes = decodes.copy()

        leaves, self._leaves = self._leaves, []
        room = self.max_num_batched_tokens - len(decodes) if reads_prompts else 0
        chunks: list[Chunk] = []
        for request in self.prefilling:
            if room == 0:
                break
            chunks.append(self._chunk(request, room, step))
            room -= chunks[-1].num_tokens
        admits: list[Admit] = []
        while admits_prompts and room > 0 and self.waiting:
            found = self._find(self.waiting[0])
            if not self._can_admit(self.waiting[0], found):
                break
            request = self.waiting.pop(0)
            admits.append(self._admit(request, found))
            chunks.append(self._chunk(request, room, step))
            room -= chunks[-1].num_tokens

        for request in ended:
            self._leave(request)
        for chunk in chunks:
            if chunk.samples:
                self.prefilling.remove(chunk.request)
                insort(self.decoding, chunk.request, key=_by_slot)
                if chunk.request.num_left == 0:
                    self._leave(chunk.request)
        masked_rows = _masked_rows(decodes, chunks) if self._has_grammars else []
        body = Body(
            leaves=pack(leaves),
            admits=tuple(admits),
            grow_slots=pack(grow_slots),
            grow_pages=pack(grow_pages),
            chunk_slots=pack([chunk.slot for chunk in chunks]),
            chunk_lengths=pack([chunk.num_tokens for chunk in chunks]),
            num_masked=len(masked_rows),
        )
        plan = Plan(step, body, decodes, chunks, preempted, masked_rows)
        self._plans[step] = plan
        return plan

    def apply(
        self, step: int, tokens: Sequence[int], poisoned: Sequence[int] = ()
    ) -> list[Accepted | None]:
        """The results of `step`, which all ranks have acked: one entry a logit row.

        None where the row's request has ended since, or its row is among the `poisoned`, or its
        grammar fails: its token is dropped.
        """
        plan = self._plans.pop(step)
        if poisoned:
            sampled = plan.sampled
            for row in poisoned:
                self.fail(sampled[row], NUMERICAL_ERROR)
        self._last_applied = step
        for chunk in plan.chunks:
            chunk.request.num_computed += chunk.num_tokens
            self._publish(chunk.request, chunk.start)
        page_mask = self.pool.page_size - 1
        accepted: list[Accepted | None] = []
        for request, token in zip(plan.sampled, tokens, strict=True):
            request.num_inflight -= 1
            if request.finish is not None:
                accepted.append(None)
                continue
            is_complete = False
            if request.matcher is not None:
                state = request.matcher.accept(token)
                if state is State.BROKEN:
                    self.fail(request, GRAMMAR_ERROR)
                    accepted.append(None)
                    continue
                is_complete = state is State.COMPLETE
            index = len(request.tokens) - request.num_prompt
            request.tokens.append(token)
            accepted.append((request, index, token))
            if is_complete or (
                token in request.stop_token_ids and index + 1 >= request.sampling.min_tokens
            ):
                self._finish(request, Finish.STOP)
            elif index + 1 == request.max_tokens:
                self._finish(request, Finish.LENGTH)
        for request in plan.decodes:
            request.num_computed += 1
            if not request.num_computed & page_mask:
                self._publish(request, request.num_computed - 1)
        if self.retiring:
            self._release(step)
        return accepted

    def unfinished(self) -> list[Request]:
        """Every request that has not ended, in order of arrival."""
        alive = [*self.waiting, *self.prefilling, *self.decoding]
        alive += [r for r in self.retiring if r not in self.waiting]
        return sorted((r for r in alive if r.finish is None), key=_by_arrival)

    # Pages and slots

    def _find(self, request: Request) -> list[int]:
        """Cached pages that a waiting request can start from; at most all but its last token."""
        if not self.enable_prefix_caching or request.sampling.num_prompt_logprobs >= 0:
            return []
        most = (len(request.tokens) - 1) // self.pool.page_size
        self._name_pages(request, most)
        return self.pool.find(request.names[:most])

    def _name_pages(self, request: Request, num_pages: int) -> None:
        size = self.pool.page_size
        while len(request.names) < num_pages:
            start = len(request.names) * size
            parent = request.names[-1] if request.names else b""
            tokens = request.tokens[start : start + size]
            request.names.append(page_name(parent, tokens, request.salt))

    def _can_admit(self, request: Request, found: list[int]) -> bool:
        if not self._free_slots or request.pages or request.num_inflight:
            return False
        fresh = self.pool.pages_for(len(request.tokens) + 1) - len(found)
        left = self.pool.num_free - self.pool.num_free_among(found) - fresh
        return left >= self.num_running

    def _admit(self, request: Request, found: list[int]) -> Admit:
        self.pool.hold(found)
        fresh = self.pool.pages_for(len(request.tokens) + 1) - len(found)
        request.pages = found + self.pool.allocate(fresh)
        request.slot = heapq.heappop(self._free_slots)
        request.num_planned = request.num_computed = len(found) * self.pool.page_size
        request.num_left = request.max_tokens - request.num_output
        if request.num_cached < 0:
            request.num_cached = min(request.num_planned, request.num_prompt)
        self.prefilling.append(request)
        return Admit(
            slot=request.slot,
            tokens=pack(request.tokens),
            num_prompt=request.num_prompt,
            num_cached=request.num_planned,
            pages=pack(request.pages),
            sampling=request.sampling,
        )

    def _chunk(self, request: Request, room: int, step: int) -> Chunk:
        start = request.num_planned
        num_tokens = min(len(request.tokens) - start, room)
        request.num_planned += num_tokens
        request.last_step = step
        samples = request.num_planned == len(request.tokens)
        if samples:
            request.num_inflight += 1
            request.num_left -= 1
        return Chunk(request, request.slot, start, num_tokens, samples)

    def _make_room(self) -> list[Request]:
        """Preempt, latest arrival first, until the decodes of this and the next step have pages."""
        pool = self.pool
        preempted: list[Request] = []
        if pool.num_free >= 2 * len(self.decoding):
            return preempted
        while True:
            spare = [len(r.pages) * pool.page_size - r.num_planned for r in self.decoding]
            now = sum(room == 0 for room in spare)
            soon = now + sum(room == 1 for room in spare)
            coming = sum(pool.refs(page) == 1 for r in self.retiring for page in r.pages)
            if now <= pool.num_free and soon <= pool.num_free + coming:
                return preempted
            running = self.decoding + self.prefilling
            victim = max(running, key=_by_arrival)
            if now > pool.num_free:
                # NOTE: a victim's pages are not back before the next plan, so what helps this
                # one is that fewer need a page now.
                needy = [r for r, room in zip(self.decoding, spare, strict=True) if room == 0]
                victim = max(needy, key=_by_arrival)
            self._preempt(victim)
            preempted.append(victim)

    def _preempt(self, request: Request) -> None:
        self._leave(request)
        self._release(self._last_applied)  # at once, if none of its steps is under way
        request.num_preemptions += 1
        self.num_preemptions += 1
        insort(self.waiting, request, key=_by_arrival)

    def _leave(self, request: Request) -> None:
        """Out of all further plans; the slot is told to the workers with the next one."""
        (self.prefilling if request in self.prefilling else self.decoding).remove(request)
        self._leaves.append(request.slot)
        self.retiring.append(request)

    def _finish(self, request: Request, finish: Finish) -> None:
        request.finish = finish
        if request in self.waiting:  # preempted, and this was its last result
            self.waiting.remove(request)
        elif request.is_running and request not in self.retiring:
            self._leave(request)

    def _release(self, step: int) -> None:
        still: list[Request] = []
        for request in self.retiring:
            if request.last_step > step:
                still.append(request)
                continue
            self.pool.release(request.pages)
            heapq.heappush(self._free_slots, request.slot)
            request.pages = []
            request.slot = -1
            request.num_planned = request.num_computed = 0
        self.retiring = still

    def _publish(self, request: Request, start: int) -> None:
        """Name the pages that became full from token `start` on: other requests may find them."""
        if not self.enable_prefix_caching or request.failure:
            return
        size = self.pool.page_size
        num_full = min(request.num_computed, len(request.tokens)) // size
        self._name_pages(request, num_full)
        for index in range(start // size, num_full):
            self.pool.publish(request.pages[index], request.names[index])


def _masked_rows(decodes: Sequence[Request], chunks: Sequence[Chunk]) -> list[int]:
    """The logit rows of requests with a grammar."""
    sampled = [*decodes, *(chunk.request for chunk in chunks if chunk.samples)]
    return [row for row, request in enumerate(sampled) if request.matcher is not None]


def route(
    schedulers: Sequence[Scheduler], num_tokens: int, names: Callable[[], Sequence[bytes]]
) -> int:
    """The replica for a new request: least predicted work, a cached prefix counted as work saved.

    Ties go to the lowest index. `names` is asked only if there is a choice.
    """
    if len(schedulers) == 1:
        return 0
    page_names = names()

    def work(index: int) -> int:
        scheduler = schedulers[index]
        return scheduler.remaining_tokens + num_tokens - scheduler.num_cached_tokens(page_names)

    return min(range(len(schedulers)), key=work)
