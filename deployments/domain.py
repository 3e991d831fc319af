"""A lockstep domain: the ranks that share collectives, and the steps they take together.

`Domain` turns its replicas' plans into one header and one body a replica, keeps the few steps that
are under way, and releases a step's tokens only when every rank has acknowledged it and all say
the same: the same header obeyed, the same collectives taken part in, the same tokens sampled
within a replica. A disagreement is a `Desync` that names the rank.

Pure: no clock, no socket. The engine sends what `next_step` returns and feeds acks to `on_ack`.
"""

from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from deployments.alignment import Prompts, align
from deployments.scheduler import Accepted, Plan, Scheduler
from parallel.layout import Layout
from parallel.padding import (
    PaddingMode,
    align_rows,
    choose_bucket,
    choose_prompt_bucket,
    pad_rows,
)
from parallel.padding_cost import PaddingCosts, pad_by_cost
from workers.protocol import (
    LEDGER_HALF,
    Ack,
    Header,
    Mode,
    Padding,
    digest,
    encode,
    unpack,
)

PADDING: dict[PaddingMode, int] = {
    "max_len": Padding.MAX_LEN,
    "sum_len": Padding.SUM_LEN,
    "sum_slots": Padding.SUM_SLOTS,
    "sum_buffer": Padding.SUM_BUFFER,
}


class Desync(Exception):
    """A rank did not do what the others did; nothing of its step has been released."""

    def __init__(self, rank: int, sentence: str) -> None:
        super().__init__(sentence)
        self.rank = rank


@dataclass(slots=True)
class Step:
    """A step under way: what was sent and who has acknowledged it."""

    number: int
    header: bytes
    bodies: list[bytes]
    plans: list[Plan]
    header_digest: bytes
    told: Header
    """What `header` says."""
    sent_at: float = 0.0
    mask_is_due: bool = False
    """Some of its rows wait for a mask that nobody has been asked for."""
    acks: dict[int, Ack] = field(default_factory=dict)


@dataclass(slots=True)
class StepDone:
    """A step all ranks agree on."""

    number: int
    plans: list[Plan]
    accepted: list[list[Accepted | None]]
    """For each replica, one entry a logit row."""
    acks: dict[int, Ack]
    domain: int
    header: Header
    num_bytes: int
    """Of its header and bodies."""
    sent_at: float


class Domain:
    def __init__(
        self,
        layout: Layout,
        index: int,
        schedulers: Sequence[Scheduler],
        *,
        epoch: int,
        depth: int,
        row_multiple: int = 1,
        shares_rows: bool = False,
        buckets: Sequence[int] = (),
        prompt_buckets: Sequence[int] = (),
        padding: PaddingMode | None = None,
        costs: PaddingCosts | None = None,
        most_held: int = 0,
        prompt_interval: int = 0,
    ) -> None:
        """`depth` steps may be under way at once: 2 overlaps planning with computing.

        `row_multiple` and `shares_rows` are the collective plan's: what a replica's rows are padded
        to a multiple of, and whether rows of different replicas meet. `buckets` are the rows of the
        decode graphs that all ranks have captured, `prompt_buckets` those of steps with prompts.
        Other steps are padded as `padding` says, else by `costs`, else by the rule. Prompts are
        held for at most `most_held` steps, to begin with those of other replicas
        (`deployments.alignment`). A step full of prompts is followed by `prompt_interval` steps of
        decodes alone, if there are any.
        """
        self.index = index
        self.ranks = layout.domain_ranks(index)
        self.replica_ranks = [layout.replica_ranks(index, r) for r in range(layout.num_replicas)]
        self.schedulers = list(schedulers)
        self.epoch = epoch
        self.depth = depth
        self.num_steps = 0
        self._row_multiple = row_multiple
        self._shares_rows = shares_rows
        self._buckets, self._prompt_buckets = tuple(buckets), tuple(prompt_buckets)
        self._padding: PaddingMode | None = padding
        self._costs = costs
        self._most_held, self._prompt_interval = most_held, prompt_interval
        self._num_owed = 0
        """Steps of decodes alone until prompts are read again."""
        self._prompts = Prompts.GO
        self.num_held = 0
        """Steps in a row, up to now, that held prompts."""
        self._previous = b""
        self.under_way: deque[Step] = deque()

    @property
    def can_step(self) -> bool:
        return len(self.under_way) < self.depth and any(s.has_work for s in self.schedulers)

    def next_step(self) -> Step:
        """Plan a step on every replica, idle ones included, so that all ranks enter it."""
        number = self.num_steps
        reads = self._prompts_are_read()
        begins = reads and self._prompts_begin()
        plans = [
            scheduler.plan_step(number, admits_prompts=begins, reads_prompts=reads)
            for scheduler in self.schedulers
        ]
        self._num_owed = max(self._num_owed - 1, self._owed_after(plans))
        bodies = [encode(plan.body) for plan in plans]
        num_rows = tuple(plan.num_rows for plan in plans)
        mode = _mode(plans)
        bucket, padding, padded_rows = self._pad(plans, num_rows, mode)
        told = Header(
            epoch=self.epoch,
            step=number,
            mode=mode,
            num_rows=num_rows,
            num_logit_rows=tuple(len(plan.sampled) for plan in plans),
            padding=padding,
            padded_rows=padded_rows,
            bucket=bucket,
            bodies=tuple(digest(body) for body in bodies),
            previous=self._previous,
            num_prompt_rows=self._num_prompt_rows(plans),
        )
        header = encode(told)
        self._previous = digest(header)
        self.num_steps += 1
        step = Step(number, header, bodies, plans, self._previous, told)
        step.mask_is_due = any(plan.masked_rows for plan in plans)
        self.under_way.append(step)
        return step

    def _prompts_are_read(self) -> bool:
        """Not while decodes are owed steps of their own, which they are only if there are any."""
        return self._num_owed <= 0 or not any(s.decoding for s in self.schedulers)

    def _owed_after(self, plans: Sequence[Plan]) -> int:
        """Steps of decodes alone, in proportion to the prompts that held them up.

        The source is SGLang's --prefill-decode-interval (pull request 35017), which owes as many
        to a prompt of one token as to a step full of prompts.
        """
        shares = [
            (_num_chunk_rows(plan), scheduler.max_num_batched_tokens - len(plan.decodes))
            for plan, scheduler in zip(plans, self.schedulers, strict=True)
        ]
        return max(self._prompt_interval * rows // room if rows else 0 for rows, room in shares)

    def _prompts_begin(self) -> bool:
        if self._most_held == 0:
            return True
        self._prompts = align(
            self._prompts,
            [scheduler.num_beginnable for scheduler in self.schedulers],
            [len(scheduler.waiting) for scheduler in self.schedulers],
            [len(scheduler.decoding) for scheduler in self.schedulers],
            num_reading=sum(len(scheduler.prefilling) for scheduler in self.schedulers),
            num_held=self.num_held,
            most=self._most_held,
        )
        self.num_held = self.num_held + 1 if self._prompts is Prompts.HELD else 0
        return self._prompts is not Prompts.HELD

    def _pad(
        self, plans: Sequence[Plan], num_rows: tuple[int, ...], mode: int
    ) -> tuple[int, int, tuple[int, ...]]:
        """(bucket, padding, how many rows each replica computes): MLP sync, at no collective.

        The bucket comes first: if all replicas decode or are idle, every rank replays its graph,
        and so does it if some have prompts and all that they have fits into a graph for such.
        """
        has_prompts = mode in (Mode.EXTEND, Mode.MIXED)
        if has_prompts:
            num_chunks = [len(plan.chunks) for plan in plans]
            bucket = choose_prompt_bucket(num_rows, num_chunks, self._prompt_buckets)
        else:
            bucket = choose_bucket(num_rows, self._buckets)
        if bucket:
            padding = Padding.MAX_LEN if self._shares_rows else Padding.NONE
            return bucket, padding, (bucket,) * len(num_rows)
        if not self._shares_rows:
            return 0, Padding.NONE, align_rows(num_rows, self._row_multiple)
        if self._costs is not None and self._padding is None:
            padded = pad_by_cost(num_rows, self._costs, row_multiple=self._row_multiple)
        else:
            padded = pad_rows(
                num_rows,
                has_prompts=has_prompts,
                row_multiple=self._row_multiple,
                mode=self._padding,
            )
        return 0, PADDING[padded.mode], padded.rows

    def _num_prompt_rows(self, plans: Sequence[Plan]) -> tuple[int, ...]:
        """For a head that spans replicas, which all ranks must come to equally often."""
        if not self._shares_rows:
            return ()
        counts = tuple(plan.num_prompt_rows if plan.chunks else 0 for plan in plans)
        return counts if any(counts) else ()

    def on_ack(self, ack: Ack) -> list[StepDone]:
        """The steps that this ack completes, in order."""
        step = next((step for step in self.under_way if step.number == ack.step), None)
        if step is None or ack.rank in step.acks:
            expected = self.under_way[0].number if self.under_way else self.num_steps
            raise Desync(
                ack.rank, f"rank {ack.rank} acknowledged step {ack.step} instead of {expected}"
            )
        if ack.header != step.header_digest:
            raise Desync(
                ack.rank, f"rank {ack.rank} obeyed another plan of step {ack.step} than was sent"
            )
        step.acks[ack.rank] = ack
        done: list[StepDone] = []
        while self.under_way and len(self.under_way[0].acks) == len(self.ranks):
            done.append(self._agree(self.under_way.popleft()))
        return done

    def take_mask_due(self) -> Step | None:
        """The step whose masks can be computed now: all tokens before its own are known."""
        if not self.under_way or not self.under_way[0].mask_is_due:
            return None
        self.under_way[0].mask_is_due = False
        return self.under_way[0]

    def late_ranks(self) -> list[int]:
        """Ranks that have not acknowledged the oldest step under way."""
        if not self.under_way:
            return []
        return [rank for rank in self.ranks if rank not in self.under_way[0].acks]

    def _agree(self, step: Step) -> StepDone:
        _same(step, list(self.ranks), _shared_ledger, "took part in other collectives")
        for ranks in self.replica_ranks:
            _same(step, list(ranks), _own_ledger, "took part in other collectives")
            _same(step, list(ranks), _ids, "sampled other tokens")
        accepted: list[list[Accepted | None]] = []
        for scheduler, plan, ranks in zip(
            self.schedulers, step.plans, self.replica_ranks, strict=True
        ):
            tokens = unpack(step.acks[ranks[0]].tokens).tolist()
            if len(tokens) != len(plan.sampled):
                raise Desync(
                    ranks[0],
                    f"rank {ranks[0]} sampled {len(tokens)} tokens in step {step.number} and its "
                    f"plan has {len(plan.sampled)}",
                )
            poisoned = step.acks[ranks[0]].poisoned
            if any(row >= len(tokens) for row in poisoned):
                raise Desync(ranks[0], f"rank {ranks[0]} reports rows that it does not have")
            accepted.append(scheduler.apply(step.number, tokens, poisoned))
        num_bytes = len(step.header) + sum(map(len, step.bodies))
        return StepDone(
            number=step.number,
            plans=step.plans,
            accepted=accepted,
            acks=step.acks,
            domain=self.index,
            header=step.told,
            num_bytes=num_bytes,
            sent_at=step.sent_at,
        )


def _num_chunk_rows(plan: Plan) -> int:
    return sum(chunk.num_tokens for chunk in plan.chunks)


def _mode(plans: Sequence[Plan]) -> int:
    decodes = any(plan.decodes for plan in plans)
    chunks = any(plan.chunks for plan in plans)
    if decodes and chunks:
        return Mode.MIXED
    return Mode.DECODE if decodes else Mode.EXTEND if chunks else Mode.IDLE


def _shared_ledger(ack: Ack) -> bytes:
    """Of the collectives that reach over attention replicas: all ranks make the same."""
    return ack.ledger[:LEDGER_HALF]


def _own_ledger(ack: Ack) -> bytes:
    """Of those inside one replica, whose shapes are its own."""
    return ack.ledger[LEDGER_HALF:]


def _ids(ack: Ack) -> bytes:
    return ack.ids


def odd_ones(values: Mapping[int, bytes]) -> tuple[list[int], list[int]]:
    """Ranks that say something else than most, and those; of two, the later one is odd."""
    common = Counter(values.values()).most_common(1)[0][0]
    odd = [rank for rank, value in values.items() if value != common]
    return odd, [rank for rank in values if rank not in odd]


def _same(step: Step, ranks: list[int], what: Callable[[Ack], bytes], sentence: str) -> None:
    """All `ranks` must report the same; the odd one out is named, or the later one of two."""
    odd, others = odd_ones({rank: what(step.acks[rank]) for rank in ranks})
    if not odd:
        return
    raise Desync(
        odd[0],
        f"ranks {odd} {sentence} than ranks {others} in step {step.number}: "
        "the step is stopped and none of its tokens released",
    )
