"""The slots of one replica on one rank, and the rows that a step makes of them.

`BatchState` is the host's side only: plain numpy indexed by slot, no device and no token that was
sampled. It applies a step's `Body` and says which rows the step has; `workers.step` turns those
into a `ForwardBatch`, and a sampled token goes from the sampler to the next step on the device.
So a plan can be applied before the step before it has come back.

Every integer of a body is checked here, before anything reaches the device.

    >>> from workers.protocol import pack
    >>> state = BatchState(max_num_seqs=4, max_num_batched_tokens=64, max_model_len=64,
    ...                    page_size=16, num_pages=9, vocab_size=100)
    >>> admit = Admit(slot=2, tokens=pack([5, 6, 7]), num_prompt=3, num_cached=0,
    ...               pages=pack([8]), sampling=Sampling())
    >>> first = state.apply(Body(admits=(admit,), chunk_slots=pack([2]), chunk_lengths=pack([3])))
    >>> first.positions_T.tolist(), first.kv_rows_T.tolist(), first.logit_rows_R.tolist()
    ([0, 1, 2], [128, 129, 130], [2])
    >>> then = state.apply(Body())
    >>> then.decode_slots_B.tolist(), then.positions_T.tolist()
    ([2], [3])

Shapes: T rows of the step, B of them decodes, R rows that sample, S slots, N pages of a slot.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from parallel.context_gather import ContextGather
from parallel.dp_attention import RowCounts, Upload
from workers.protocol import Admit, Body, Sampling, unpack

Int64s = NDArray[np.int64]


class ProtocolError(ValueError):
    """A step that cannot be obeyed: the driver and this rank do not see the same slots."""


class IndexRows(NamedTuple):
    """What an indexer makes of a step's rows, J heads of E numbers (DeepSeek-V3.2).

    A row scores a token by the sum over heads of weight * relu(q . key), and reads the
    `num_chosen` best of those up to itself.
    """

    q_TJE: Tensor
    weight_TJ: Tensor
    """float32, all scales included."""
    key_UE: Tensor
    """Keys to be kept in the cache: the rows' own, or those of all rows of the replica."""
    num_chosen: int


class HeadAttention(ABC):
    """Attention over a paged cache of keys and values, prepared once a step for its rows."""

    @abstractmethod
    def attend(
        self,
        layer: int,
        q_THD: Tensor,
        k_UGD: Tensor,
        v_UGD: Tensor,
        *,
        scale: float,
        sliding_window: int | None,
    ) -> Tensor:
        """Write keys and values (U, kv heads, head dim) into `layer` of the cache, then let each of
        the T rows attend causally over its own sequence; (T, heads, head dim).

        The keys and values are those of all of the replica's rows. With context parallelism these
        are more than the rows that attend here.
        """


class LatentRowAttention(ABC):
    """The same where all heads share one row of W numbers a token (DeepSeek's latent)."""

    @abstractmethod
    def attend_latent(
        self,
        layer: int,
        q_THW: Tensor,
        row_UW: Tensor,
        *,
        num_values: int,
        scale: float,
        index: IndexRows | None,
    ) -> Tensor:
        """Write the rows into `layer` of the cache, then attend; a row's first `num_values` numbers
        are also the values: (T, heads, num_values). With `index` a row reads only the tokens that
        score highest."""


class ProjectionAttention(HeadAttention):
    """An attention that takes a projection's rows as they come: a GPU does all in one kernel."""

    @abstractmethod
    def attend_projection(
        self,
        layer: int,
        qkv_TND: Tensor,
        norm_ND: Tensor | None,
        rotation_T3C: Tensor,
        *,
        eps: float,
        scale: float,
        sliding_window: int | None,
    ) -> Tensor:
        """Normalise queries and keys if there are weights, rotate them, then attend as above.

        The heads are the queries', then the keys', then the values'. Of a replica in one part.
        """


Attention = HeadAttention | LatentRowAttention
"""Which of the two, the model's cache says."""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class ForwardBatch:
    """Rows of a step that this rank computes, T of them; R of them want logits."""

    input_ids_T: Tensor
    """int64, on the device; past the rows that are tokens, padding."""
    positions_T: Tensor
    """int64, on the device; the row's place in its sequence."""
    logit_rows_R: Tensor
    """int64, on the device; which rows sample a token, in row order."""
    attention: Attention
    counts: RowCounts | None = None
    """Rows of all replicas; None if there is one, in one part, without padding."""
    num_live_P: Tensor | None = None
    """int64, on the device: how many rows of each replica, or of each part of all, are tokens, read
    when kernels run. Set for a step that is captured, where `counts` say only how many rows there
    are."""
    context: ContextGather | None = None
    """How attention gathers the rows of the replica's parts; None if it is one part."""
    upload: Upload = torch.from_numpy
    """Takes what else a step needs to the device; on a GPU it must not wait for the steps before.
    """


class Chunk(NamedTuple):
    """Rows `row` to `row + length` are tokens `start` to `start + length` of a slot."""

    slot: int
    start: int
    length: int
    row: int
    tokens: NDArray[np.int32]
    """All tokens of the slot that the host knows."""

    @property
    def stop(self) -> int:
        return self.start + self.length

    @property
    def span(self) -> tuple[int, int, int, int]:
        """(row, rows, token, slot), as kernels cut it into blocks."""
        return self.row, self.length, self.start, self.slot

    @property
    def is_last(self) -> bool:
        """It reaches the end of what is known, so it samples."""
        return self.stop == len(self.tokens)


class StepRows(NamedTuple):
    """What a step computes. Decodes come first, one row each, then the chunks' rows."""

    decode_slots_B: Int64s
    """Ascending. The same array object for as long as the same slots decode."""
    chunks: tuple[Chunk, ...]
    positions_T: Int64s
    kv_rows_T: Int64s
    """Where a row's keys and values go: page * page_size + offset."""
    logit_rows_R: Int64s
    logit_slots_R: Int64s
    dirty_pages: tuple[int, ...]
    """Pages that change hands in this step and must be zeroed first."""

    @property
    def num_rows(self) -> int:
        return len(self.positions_T)

    @property
    def num_logit_rows(self) -> int:
        return len(self.logit_rows_R)


class TableChange(NamedTuple):
    """Pages `first`, `first + 1`, ... of a slot."""

    slot: int
    first: int
    pages: NDArray[np.int32]


class BatchState:
    """Which slots are taken, what they have computed and where their pages are.

    After a `ProtocolError` the state is half applied: the rank reports it and starts afresh.
    """

    def __init__(
        self,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        page_size: int,
        num_pages: int,
        vocab_size: int,
    ) -> None:
        self.page_size = page_size
        self.page_table_SN = np.zeros((max_num_seqs, -(-max_model_len // page_size)), np.int32)
        """Past a slot's last page its first is repeated, so a padded read meets only its own."""
        self.table_version = 0
        """Grows when `page_table_SN` or the slots that decode change."""
        self.table_changes: list[TableChange] = []
        """What the last body changed in `page_table_SN`."""
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self._max_model_len = max_model_len
        self._num_pages_total = num_pages
        self._vocab_size = vocab_size
        self._shift = page_size.bit_length() - 1
        self._taken_S = np.zeros(max_num_seqs, np.bool_)
        self._num_computed_S = np.zeros(max_num_seqs, np.int64)
        self._num_pages_S = np.zeros(max_num_seqs, np.int64)
        self._limit_S = np.zeros(max_num_seqs, np.int64)
        """First position a slot has no room for: the end of its pages or of the model."""
        self._prompts: dict[int, NDArray[np.int32]] = {}
        """Known tokens of the slots that have not computed all of them."""
        self._decoding_S = np.zeros(max_num_seqs, np.bool_)
        self._decode_slots_B = np.empty(0, np.int64)
        self._decode_rows_B = np.empty(0, np.int64)
        self._dirty: set[int] = set()

    def apply(self, body: Body) -> StepRows:
        """Obey a body: leaves, admits, growth; then the rows, which count as computed from here."""
        self.table_changes = []
        if body.leaves:
            self._leave(_integers("leaves", body.leaves))
        self._refresh_decodes()
        fresh: list[int] = []
        for admit in body.admits:
            fresh += self._admit(admit)
        if body.grow_slots or body.grow_pages:
            fresh += self._grow(body)
        chunks = self._chunks(body) if body.chunk_slots or body.chunk_lengths else ()
        return self._rows(chunks, self._take_dirty(fresh) if self._dirty else ())

    def pages_of(self, slot: int) -> list[int]:
        return self.page_table_SN[slot, : self._num_pages_S[slot]].tolist()

    def mark_dirty(self, slot: int) -> None:
        """`slot` may have written NaN into its pages: whoever gets one next has it zeroed."""
        self._dirty.update(self.pages_of(slot))

    def _leave(self, slots: NDArray[np.int32]) -> None:
        for slot in slots.tolist():
            self._check_taken(slot, "leaves")
            self._taken_S[slot] = self._decoding_S[slot] = False
            self._prompts.pop(slot, None)
        self.table_version += 1

    def _admit(self, admit: Admit) -> list[int]:
        """Fill a slot; the pages it will write to that it does not share."""
        slot, num_cached = admit.slot, admit.num_cached
        tokens = _integers("tokens", admit.tokens)
        pages = _integers("pages", admit.pages)
        self._check_admit(admit, tokens, pages)
        self._taken_S[slot] = True
        self._prompts[slot] = tokens
        self._num_computed_S[slot] = num_cached
        self.page_table_SN[slot] = pages[0]
        self.page_table_SN[slot, : len(pages)] = pages
        self._set_num_pages(slot, len(pages))
        self.table_changes.append(TableChange(slot, 0, pages))
        self.table_version += 1
        return pages[-(-num_cached // self.page_size) :].tolist()

    def _grow(self, body: Body) -> list[int]:
        slots = _integers("grow_slots", body.grow_slots).tolist()
        pages = _integers("grow_pages", body.grow_pages)
        if len(slots) != len(pages):
            raise ProtocolError(f"a step grows {len(slots)} slots by {len(pages)} pages")
        self._check_pages(pages, "a growing slot")
        for number, (slot, page) in enumerate(zip(slots, pages.tolist(), strict=True)):
            self._check_taken(slot, "grows")
            count = int(self._num_pages_S[slot])
            if count == self.page_table_SN.shape[1]:
                raise ProtocolError(
                    f"slot {slot} grows past its page table of {count} pages, which is "
                    f"max_model_len={self._max_model_len}"
                )
            self.page_table_SN[slot, count] = page
            self._set_num_pages(slot, count + 1)
            self.table_changes.append(TableChange(slot, count, pages[number : number + 1]))
        self.table_version += 1
        return pages.tolist()

    def _set_num_pages(self, slot: int, count: int) -> None:
        self._num_pages_S[slot] = count
        self._limit_S[slot] = min(count * self.page_size, self._max_model_len)

    def _chunks(self, body: Body) -> tuple[Chunk, ...]:
        slots = _integers("chunk_slots", body.chunk_slots).tolist()
        lengths = _integers("chunk_lengths", body.chunk_lengths).tolist()
        if len(slots) != len(lengths):
            raise ProtocolError(
                f"a step has {len(slots)} chunk slots, {len(lengths)} chunk lengths"
            )
        if len(set(slots)) != len(slots):
            raise ProtocolError(f"a step has two chunks of one slot: {slots}")
        chunks: list[Chunk] = []
        row = len(self._decode_slots_B)
        for slot, length in zip(slots, lengths, strict=True):
            self._check_taken(slot, "has a chunk")
            tokens = self._prompts.get(slot)
            if tokens is None:
                raise ProtocolError(f"slot {slot} has a chunk, but it decodes: no token is left")
            start = int(self._num_computed_S[slot])
            if not 0 < length <= len(tokens) - start:
                raise ProtocolError(
                    f"slot {slot} has a chunk of {length} tokens with {len(tokens) - start} left"
                )
            if start + length > self._limit_S[slot]:
                raise self._no_room(slot, start + length - 1)
            chunks.append(Chunk(slot, start, length, row, tokens))
            row += length
        return tuple(chunks)

    def _rows(self, chunks: tuple[Chunk, ...], dirty: tuple[int, ...]) -> StepRows:
        slots_B = self._decode_slots_B
        positions_T = self._num_computed_S[slots_B]
        if (positions_T >= self._limit_S[slots_B]).any():
            late = int(np.flatnonzero(positions_T >= self._limit_S[slots_B])[0])
            raise self._no_room(int(slots_B[late]), int(positions_T[late]))
        slots_T = slots_B
        logit_rows_R, logit_slots_R = self._decode_rows_B, slots_B
        self._num_computed_S[slots_B] += 1
        if chunks:
            lengths = [chunk.length for chunk in chunks]
            starts = [np.arange(chunk.start, chunk.stop) for chunk in chunks]
            positions_T = np.concatenate([positions_T, *starts])
            slots_T = np.concatenate(
                [slots_B, np.repeat([chunk.slot for chunk in chunks], lengths)]
            )
            last = [chunk for chunk in chunks if chunk.is_last]
            ends = np.array([chunk.row + chunk.length - 1 for chunk in last], np.int64)
            logit_rows_R = np.concatenate([logit_rows_R, ends])
            logit_slots_R = np.concatenate(
                [slots_B, np.array([chunk.slot for chunk in last], np.int64)]
            )
            self._advance(chunks)
        if len(positions_T) > self._max_num_batched_tokens:
            raise ProtocolError(
                f"a step has {len(positions_T)} rows and max_num_batched_tokens is "
                f"{self._max_num_batched_tokens}"
            )
        pages_T = self.page_table_SN[slots_T, positions_T >> self._shift].astype(np.int64)
        kv_rows_T = (pages_T << self._shift) + (positions_T & (self.page_size - 1))
        return StepRows(slots_B, chunks, positions_T, kv_rows_T, logit_rows_R, logit_slots_R, dirty)

    def _advance(self, chunks: tuple[Chunk, ...]) -> None:
        """A chunk is computed; after its last one a slot decodes from the next step on."""
        for chunk in chunks:
            self._num_computed_S[chunk.slot] = chunk.stop
            if chunk.is_last:
                del self._prompts[chunk.slot]
                self._decoding_S[chunk.slot] = True

    def _refresh_decodes(self) -> None:
        slots = np.flatnonzero(self._decoding_S)
        if not np.array_equal(slots, self._decode_slots_B):
            self._decode_slots_B, self._decode_rows_B = slots, np.arange(len(slots))
            self.table_version += 1

    def _take_dirty(self, fresh: list[int]) -> tuple[int, ...]:
        taken = self._dirty.intersection(fresh)
        self._dirty -= taken
        return tuple(sorted(taken))

    def _check_taken(self, slot: int, does: str) -> None:
        self._check_slot(slot, does)
        if not self._taken_S[slot]:
            raise ProtocolError(f"slot {slot} {does}, but no request was admitted to it")

    def _check_slot(self, slot: int, does: str) -> None:
        if not 0 <= slot < self._max_num_seqs:
            raise ProtocolError(f"slot {slot} {does}, but max_num_seqs is {self._max_num_seqs}")

    def _check_admit(
        self, admit: Admit, tokens: NDArray[np.int32], pages: NDArray[np.int32]
    ) -> None:
        slot, count = admit.slot, len(tokens)
        self._check_slot(slot, "is admitted to")
        if self._taken_S[slot]:
            raise ProtocolError(f"slot {slot} is admitted to, but its request has not left")
        if not 0 < count <= self._max_model_len:
            raise ProtocolError(
                f"slot {slot} enters with {count} tokens; there must be 1 to "
                f"max_model_len={self._max_model_len}"
            )
        if not 0 < admit.num_prompt <= count or admit.num_cached >= count:
            raise ProtocolError(
                f"slot {slot} enters with {count} tokens, of which {admit.num_prompt} are prompt "
                f"and {admit.num_cached} cached; at least one is prompt and one is computed"
            )
        self._check_ids(tokens, f"slot {slot}")
        self._check_sampling(admit.sampling, slot)
        if not 0 < len(pages) <= self.page_table_SN.shape[1]:
            raise ProtocolError(
                f"slot {slot} enters with {len(pages)} pages; its table holds 1 to "
                f"{self.page_table_SN.shape[1]}"
            )
        if admit.num_cached > len(pages) * self.page_size:
            raise ProtocolError(
                f"slot {slot} enters with {admit.num_cached} cached tokens in {len(pages)} pages "
                f"of {self.page_size}"
            )
        self._check_pages(pages, f"slot {slot}")

    def _check_sampling(self, sampling: Sampling, slot: int) -> None:
        named = [token for token, _ in sampling.logit_bias] + list(sampling.stop_token_ids)
        if named and (min(named) < 0 or max(named) >= self._vocab_size):
            raise ProtocolError(
                f"slot {slot} biases or stops at an id outside the vocabulary of {self._vocab_size}"
            )

    def _check_ids(self, ids: NDArray[np.int32], whose: str) -> None:
        if int(ids.min()) < 0 or int(ids.max()) >= self._vocab_size:
            raise ProtocolError(f"{whose} has an id outside the vocabulary of {self._vocab_size}")

    def _check_pages(self, pages: NDArray[np.int32], whose: str) -> None:
        if len(pages) and (int(pages.min()) < 0 or int(pages.max()) >= self._num_pages_total):
            raise ProtocolError(f"{whose} is given a page outside the {self._num_pages_total}")

    def _no_room(self, slot: int, position: int) -> ProtocolError:
        return ProtocolError(
            f"slot {slot} computes position {position}, but its {self._num_pages_S[slot]} pages of "
            f"{self.page_size} and max_model_len={self._max_model_len} end at {self._limit_S[slot]}"
        )


def _integers(name: str, data: bytes) -> NDArray[np.int32]:
    if len(data) % 4:
        raise ProtocolError(f"{name} has {len(data)} bytes, which is no array of int32")
    return unpack(data)
