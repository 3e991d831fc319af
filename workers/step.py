"""The steps of one rank: a header and a body go in, tokens come out.

`launch` queues everything a step needs and returns; `finish` waits for the tokens. On a CPU the
work is done when `launch` returns. Between the two lies the overlap: step n+1 may be launched
before step n is finished, because what n+1 needs of n never leaves the device.

A step obeys the body (`batch.py`), is compared with its header (`step_checks.py`), and goes one of
three ways: decodes that have a bucket are replayed (`graphs.py`), the forward pass of few rows with
prompts among them may be (`prompt_graphs.py`), anything else is launched here, kernel by kernel.
Each way it is sampled (`sampling.py`), and its results are on their way.

Shapes: T rows of the step, R rows that sample, D model width, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from parallel.dp_attention import RowCounts
from parallel.groups import Groups, Ledger, digest_of
from parallel.padding import align_rows
from workers.attention import PagedAttention
from workers.batch import BatchState, ForwardBatch, ProtocolError, StepRows
from workers.cache import PagedCache
from workers.cache_format import CacheFormat
from workers.config import EngineConfig
from workers.context import ContextParts, StepPart
from workers.expert_load import ExpertTally
from workers.models import Model
from workers.prompt_logprobs import PendingPrompt, PromptLogprobs, prompt_logprobs
from workers.protocol import Admit, Body, Header, Mask, Mode, Padding, TokenLogprobs
from workers.sampling import Allowed, PendingLogprobs, Sampler
from workers.step_checks import check_bucket, check_header, check_mask, check_prompt_bucket
from workers.transfers import Transfers

if TYPE_CHECKING:
    from workers.graphs import DecodeGraphs
    from workers.prompt_graphs import Forwarded, PromptGraphs

IN_ONE_BUFFER = {Padding.SUM_SLOTS: False, Padding.SUM_BUFFER: True}
"""Where a header says how uneven rows are exchanged."""


class StepResult(NamedTuple):
    """A step that is done."""

    ids: NDArray[np.int32]
    """Sampled tokens in row order."""
    logprobs: tuple[tuple[int, TokenLogprobs], ...]
    """(index of the logit row, its log-probabilities) for those that asked."""
    prompt_logprobs: tuple[PromptLogprobs, ...]
    """(slot, position of the first, log-probabilities of the prompt tokens this step read)."""
    ledger: bytes
    """Digest of the collectives that this rank took part in."""
    poisoned_rows: tuple[int, ...]
    """Logit rows whose logits have no finite highest; their ids mean nothing."""
    expert_rows: tuple[int, ...] = ()
    """Now and then: see `workers.expert_load`."""


def _nothing() -> Tensor:
    return torch.empty(0)


@dataclass(slots=True, eq=False)
class PendingStep:
    """A step whose work is queued: its results, on their way to the host."""

    rows: StepRows
    ledger: bytes
    num_masked: int = 0
    ids_R: Tensor = field(default_factory=_nothing)
    highest_R: Tensor = field(default_factory=_nothing)
    """Each logit row's highest logit."""
    row_sums_T: Tensor | None = None
    """Sums of all hidden rows, where some belong to chunks: not finite if a row is poisoned."""
    logprobs: PendingLogprobs | None = None
    prompt_logprobs: Sequence[PendingPrompt] = ()
    done: torch.cuda.Event | None = None
    """None on a CPU, where it is done already."""
    logits_RV: Tensor | None = None
    """Set while sampling waits for the mask of `num_masked` rows."""


class StepRunner:
    """A model with a cache, slots and a sampler, that takes steps."""

    def __init__(
        self,
        model: Model,
        config: EngineConfig,
        groups: Groups,
        transfers: Transfers,
        expert_tally: ExpertTally,
        cache_format: CacheFormat,
        *,
        num_replicas: int,
        row_multiple: int,
        max_model_len: int,
        num_pages: int,
        buckets: tuple[int, ...],
        prompt_buckets: tuple[int, ...],
        use_kernels: bool,
    ) -> None:
        """The pages are those that requests may have; both `buckets` are captured by `capture`."""
        self._model, self._config = model, config
        self._transfers, self._expert_tally = transfers, expert_tally
        self._num_replicas, self._row_multiple = num_replicas, row_multiple
        self._max_model_len = max_model_len
        self._num_pages = num_pages
        self._buckets, self._prompt_buckets = buckets, prompt_buckets
        self._use_kernels = use_kernels
        self._groups = groups
        self._ledger: Ledger = groups.ledger
        self._parts = ContextParts(groups.attn_cp, transfers.upload)
        self._graphs: DecodeGraphs | None = None
        self._prompt_graphs: PromptGraphs | None = None
        self.cache = PagedCache(
            model.num_layers,
            model.cache_shapes,
            num_pages=num_pages + int(use_kernels),  # and the spare slot's
            page_size=config.page_size,
            dtype=cache_format.dtype,
            device=transfers.device,
            scales=cache_format.scales,
        )
        self.forget()

    def launch(self, header: Header, body: Body, replica: int) -> PendingStep:
        """Queue a step. A body that this rank cannot obey is a `ProtocolError`."""
        with torch.inference_mode():
            rows = self._state.apply(body)
            check_header(header, rows, replica)
            if header.bucket and header.mode in (Mode.EXTEND, Mode.MIXED):
                check_prompt_bucket(header, rows, self._prompt_buckets)
            elif header.bucket:
                check_bucket(header, rows, self._buckets)
                return self._replay(rows, header, body)
            counts = RowCounts(
                header.num_rows,
                header.padded_rows,
                header.num_logit_rows,
                header.num_prompt_rows,
                IN_ONE_BUFFER.get(header.padding),
            )
            return self._launch(rows, body.admits, counts, replica, body.num_masked, header.bucket)

    def mask(self, pending: PendingStep, mask: Mask) -> None:
        """Sample the rows of a step whose body announced this mask."""
        vocab_size = self._model.vocab_size
        check_mask(
            mask,
            is_awaited=pending.logits_RV is not None,
            num_masked=pending.num_masked,
            num_logit_rows=pending.rows.num_logit_rows,
            vocab_size=vocab_size,
        )
        logits_RV, pending.logits_RV = pending.logits_RV, None
        if logits_RV is not None:
            with torch.inference_mode():
                allowed = Allowed.unpacked(mask, vocab_size, self._transfers.device)
                self._sample(pending, logits_RV, allowed)

    def is_done(self, pending: PendingStep) -> bool:
        """Whether `finish` would return without waiting."""
        if pending.logits_RV is not None:
            return False
        return pending.done is None or pending.done.query()

    def finish(self, pending: PendingStep) -> StepResult:
        """Wait for a step's tokens."""
        with torch.inference_mode():
            return self._finish(pending)

    def run(self, body: Body) -> StepResult:
        """A step that no driver asked for: all ranks run it, on equal rows."""
        with torch.inference_mode():
            rows, num = self._state.apply(body), self._num_replicas
            [padded] = align_rows([rows.num_rows], self._row_multiple)
            counts = RowCounts(
                (rows.num_rows,) * num, (padded,) * num, (rows.num_logit_rows,) * num
            )
            pending = self._launch(rows, body.admits, counts, 0)
        return self._finish(pending)

    def _launch(
        self,
        rows: StepRows,
        admits: tuple[Admit, ...],
        counts: RowCounts,
        replica: int,
        num_masked: int = 0,
        bucket: int = 0,
    ) -> PendingStep:
        """An idle replica takes part with padding alone, or with no rows, if another has some.

        With a bucket the forward pass is a replay.
        """
        self._prepare_pages(rows)
        if self._graphs is not None:
            self._graphs.forget_rows()
        for admit in admits:
            self._sampler.admit(admit)
        if not any(counts.padded):
            return PendingStep(rows, self._ledger.take())
        part = self._parts.part_of(rows)
        if bucket:
            hidden_TD, logit_rows_R = self._forward_by_graph(rows, counts, bucket)
        else:
            batch = self._batch(rows, counts, replica, part)
            hidden_TD, logit_rows_R = self._model.forward(batch), batch.logit_rows_R
        prompts = prompt_logprobs(
            self._model,
            self._sampler,
            rows.chunks,
            hidden_TD,
            counts.num_prompt_rows,
            part,
            self._transfers,
        )
        logits_RV = None
        if any(counts.num_logit_rows):
            hidden_RD = self._logit_rows(hidden_TD, rows, logit_rows_R, part)
            logits_RV = self._model.logits(hidden_RD, counts.num_logit_rows)
            if rows.num_logit_rows == 0:  # an idle replica lends its part of the head
                logits_RV = None
        row_sums_T = self._row_sums(hidden_TD, part) if rows.chunks else None
        pending = PendingStep(
            rows,
            self._ledger.take(),
            num_masked,
            row_sums_T=None if row_sums_T is None else self._transfers.fetch(row_sums_T),
            prompt_logprobs=prompts,
        )
        if logits_RV is None:
            pending.done = self._transfers.mark()
        elif num_masked:
            pending.logits_RV = logits_RV
        else:
            self._sample(pending, logits_RV, None)
        return pending

    def _forward_by_graph(self, rows: StepRows, counts: RowCounts, bucket: int) -> "Forwarded":
        if self._prompt_graphs is None:
            raise ProtocolError("no graph of steps with prompts is captured")
        return self._prompt_graphs.launch(rows, bucket, counts.num_real)

    def _replay(self, rows: StepRows, header: Header, body: Body) -> PendingStep:
        """A step of decodes alone, by a captured graph; an idle replica replays it on padding."""
        graphs = self._graphs
        if graphs is None:
            raise ProtocolError("no graph is captured")
        self._prepare_pages(rows)
        for admit in body.admits:
            self._sampler.admit(admit)
        replayed = graphs.launch(rows, header.bucket, header.num_rows)
        ids_R, highest_R, logits_RV = replayed
        pending = PendingStep(
            rows, self._ledger.take(), body.num_masked, ids_R=ids_R, highest_R=highest_R
        )
        if body.num_masked:
            pending.logits_RV = logits_RV
        elif self._sampler.needs_more(rows.logit_slots_R):
            self._sample(pending, logits_RV, None)
        else:
            pending.done = self._transfers.mark()
        return pending

    def _batch(
        self, rows: StepRows, counts: RowCounts, replica: int, part: StepPart | None
    ) -> ForwardBatch:
        """The step's rows on the device; decodes read the token that sampling left there."""
        padded, upload = counts.padded[replica], self._transfers.upload
        if part is not None:
            rows, padded = part.rows_of(rows), padded // self._parts.num_parts
        positions_T = upload(rows.positions_T)
        input_ids_T = self._sampler.last_token_S.index_select(0, upload(rows.decode_slots_B))
        if rows.chunks:
            parts = [chunk.tokens[chunk.start : chunk.stop] for chunk in rows.chunks]
            tokens = upload(np.concatenate(parts).astype(np.int64))
            input_ids_T = torch.cat([input_ids_T, tokens])
        num_pads = padded - rows.num_rows
        if num_pads:
            input_ids_T = torch.cat([input_ids_T, input_ids_T.new_zeros(num_pads)])
        if len(rows.kv_rows_T):
            self._attention.prepare(rows, positions_T, upload(rows.kv_rows_T), upload)
        return ForwardBatch(
            input_ids_T=input_ids_T,
            positions_T=positions_T,
            logit_rows_R=upload(rows.logit_rows_R),
            attention=self._attention,
            counts=counts,
            context=None if part is None else part.gather,
            upload=upload,
        )

    def _prepare_pages(self, rows: StepRows) -> None:
        if rows.dirty_pages:
            self.cache.clear(rows.dirty_pages)
        if self._table is not None:
            self._table.update(self._state.table_changes, self._transfers.upload)

    def _logit_rows(
        self, hidden_TD: Tensor, rows: StepRows, logit_rows_R: Tensor, part: StepPart | None
    ) -> Tensor:
        """Hidden rows (R, D) that sample, all of the replica's."""
        if rows.num_logit_rows == 0:
            return hidden_TD[:0]
        if part is not None:
            return part.take(hidden_TD, rows.logit_rows_R)
        if rows.chunks:
            return hidden_TD.index_select(0, logit_rows_R)
        return hidden_TD[: rows.num_logit_rows]

    def _row_sums(self, hidden_TD: Tensor, part: StepPart | None) -> Tensor:
        """A number for each of the replica's rows that is finite only if all of the row are."""
        sums_T = hidden_TD.sum(dim=-1, dtype=torch.float32)
        return sums_T if part is None else part.take_all(sums_T.unsqueeze(1)).squeeze(1)

    def _sample(self, pending: PendingStep, logits_RV: Tensor, allowed: Allowed | None) -> None:
        """Queue the step's sampling, and its results' way to the host."""
        ids_R, highest_R, logprobs = self._sampler.sample(logits_RV, pending.rows, allowed)
        fetch = self._transfers.fetch
        pending.ids_R, pending.highest_R = fetch(ids_R), fetch(highest_R)
        pending.logprobs = None if logprobs is None else logprobs.moved(fetch)
        pending.done = self._transfers.mark()

    def _finish(self, pending: PendingStep) -> StepResult:
        if pending.done is not None:
            pending.done.synchronize()
        rows = pending.rows
        finite_R = np.isfinite(pending.highest_R.numpy())
        poisoned = () if finite_R.all() else tuple(np.flatnonzero(~finite_R).tolist())
        for row in poisoned:
            self._state.mark_dirty(int(rows.logit_slots_R[row]))
        if pending.row_sums_T is not None:
            self._mark_dirty_chunks(rows, pending.row_sums_T.numpy())
        return StepResult(
            pending.ids_R.numpy().astype(np.int32),
            () if pending.logprobs is None else tuple(pending.logprobs.read()),
            tuple(prompt.read() for prompt in pending.prompt_logprobs),
            pending.ledger,
            poisoned,
            self._expert_tally.step_done(),
        )

    def _mark_dirty_chunks(self, rows: StepRows, row_sums_T: NDArray[np.float32]) -> None:
        if np.isfinite(row_sums_T).all():
            return
        for chunk in rows.chunks:
            if not np.isfinite(row_sums_T[chunk.row : chunk.row + chunk.length]).all():
                self._state.mark_dirty(chunk.slot)

    def forget(self) -> None:
        """State of no requests at all, over the same cache."""
        config, device = self._config, self._transfers.device
        self._state = BatchState(
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_model_len=self._max_model_len,
            page_size=config.page_size,
            num_pages=self._num_pages,
            vocab_size=self._model.vocab_size,
        )
        self._sampler = Sampler(
            max_num_seqs=config.max_num_seqs, vocab_size=self._model.vocab_size, device=device
        )
        self._table = None
        if not self._use_kernels:
            self._attention = PagedAttention(self.cache, self._state, device)
            return
        from workers.device_table import DeviceTable  # Triton: only with a GPU
        from workers.gpu_attention import GpuAttention
        from workers.gpu_latent_attention import GpuLatentAttention

        num_slots, num_columns = self._state.page_table_SN.shape
        self._table = DeviceTable(num_slots, num_columns, self._num_pages, device)
        if self.cache.is_latent:
            self._attention = GpuLatentAttention(
                self.cache, self._table, self._max_model_len, num_heads=self._model.num_heads
            )
        else:
            max_decodes = max(num_slots, *self._buckets)
            self._attention = GpuAttention(self.cache, self._table, max_decodes=max_decodes)

    @property
    def unmeasured_bytes(self) -> int:
        """What the largest step may take beyond what a step of short sequences shows."""
        if isinstance(self._attention, PagedAttention):
            return 0
        return self._attention.unmeasured_bytes

    def capture(self, report: Callable[[int, int], None]) -> bytes:
        """Capture a graph for every bucket; digests of their collectives.

        The largest of a kind is first: the others fit into its memory.
        """
        with torch.inference_mode():
            self._prompt_graphs, self._graphs = kinds = self._new_graphs()
            todo = [(kind, bucket) for kind in kinds if kind for bucket in reversed(kind.buckets)]
            for done, (kind, bucket) in enumerate(todo):
                report(done, len(todo))
                kind.capture_one(bucket)
            report(len(todo), len(todo))
            return digest_of([call for kind in kinds if kind for call in kind.calls])

    def capture_largest(self) -> "list[PromptGraphs | DecodeGraphs]":
        """Only the largest of each kind, and not for use: to see how much memory they take."""
        with torch.inference_mode():
            kinds = [kind for kind in self._new_graphs() if kind]
            for kind in kinds:
                kind.capture_one(kind.buckets[-1])
        return kinds

    def _new_graphs(self) -> "tuple[PromptGraphs | None, DecodeGraphs]":
        """Nothing is captured yet."""
        from workers.graphs import DecodeGraphs
        from workers.recording import Recorder

        if isinstance(self._attention, PagedAttention) or self._table is None:
            raise ValueError("torch's attention cannot be captured")
        recorder = Recorder(self._transfers.device, self._ledger)
        decodes = DecodeGraphs(
            self._model,
            self._attention,
            self._table,
            self._sampler.last_token_S,
            self._ledger,
            recorder,
            self._parts,
            self._transfers.upload,
            page_size=self._config.page_size,
            buckets=self._buckets,
            num_replicas=self._num_replicas,
        )
        if not self._prompt_buckets:
            return None, decodes
        from workers.gpu_attention import GpuAttention
        from workers.prompt_graphs import PromptGraphs

        if not isinstance(self._attention, GpuAttention) or self._parts.num_parts > 1:
            raise ValueError("steps with prompts cannot be captured of latents, or in parts")
        prompts = PromptGraphs(
            self._model,
            self._attention,
            self._table,
            self._sampler.last_token_S,
            self._groups,
            recorder,
            self._transfers.upload,
            page_size=self._config.page_size,
            buckets=self._prompt_buckets,
            num_replicas=self._num_replicas,
        )
        return prompts, decodes
