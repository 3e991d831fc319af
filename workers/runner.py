"""One rank's engine room: a step's header and body go in, its tokens come out.

`launch` queues everything a step needs and returns; `finish` waits for the tokens. On a CPU the
work is done when `launch` returns. Between the two lies the overlap: step n+1 may be launched
before step n is finished, because what n+1 needs of n never leaves the device.

Nothing here talks to the driver (that is `workers.worker`) or knows an architecture.

Shapes: T rows of the step, R rows that sample, D model width.
"""

import gc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from parallel.dp_attention import RowCounts
from parallel.groups import Groups, Ledger
from parallel.layout import Layout
from parallel.padding import align_rows, buckets_up_to
from workers import bundled
from workers.architectures import plan_of
from workers.attention import PagedAttention
from workers.batch import BatchState, Chunk, ForwardBatch, ProtocolError, StepRows
from workers.cache import PagedCache, bytes_per_page, pages_that_fit
from workers.config import EngineConfig
from workers.context import ContextParts, StepPart
from workers.expert_load import ExpertTally
from workers.models import Model, build_model, read_model_config
from workers.protocol import (
    Admit,
    Body,
    Header,
    Mask,
    Sampling,
    TokenLogprobs,
    mask_bytes,
    pack,
    unpack,
)
from workers.sampling import Allowed, PendingLogprobs, Sampler, token_logprobs
from workers.symmetric import open_arena, open_sums_of
from workers.weights import dummy_weights, load_weights

if TYPE_CHECKING:
    from workers.graphs import DecodeGraphs

GIB = 2**30
CPU_CACHE_GB = 1.0
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
GRAPH_BYTES = 8 * 2**20
"""What each graph takes for its nodes."""
WARM_UP_LENGTHS = (
    *(3, 20, 40, 60, 80, 100, 130, 160, 200, 250, 300, 350, 400, 450, 500, 600, 700, 800, 900),
    *(1000, 1200, 1400, 1700, 2000, 2500, 3000, 3500, 4000, 5000, 6000, 7000, 8000),
)
"""Prompts that a GPU reads before it is ready. Kernels are compiled for few and for many rows, and
cuBLAS loads another kernel for nearly each of these: while one is loaded the GPU stands still."""
LOGIT_BLOCK_ROWS = 256
"""Rows of a prompt whose logits are held at once, when their log-probabilities are wanted."""

ReportProgress = Callable[[str, int, int], None]
"""(stage, done, total)"""
PromptLogprobs = tuple[int, int, tuple[TokenLogprobs, ...]]


MakeModel = Callable[[EngineConfig, Layout, int, Groups, torch.device, ReportProgress], Model]


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


class _WantedPrompt(NamedTuple):
    """The first `length` rows of a chunk are to tell their next tokens' log-probabilities."""

    chunk: Chunk
    num_top: int
    length: int


class _PendingPrompt(NamedTuple):
    slot: int
    first: int
    blocks: list[PendingLogprobs]


@dataclass(slots=True, eq=False)
class PendingStep:
    """A step whose work is queued: its results, on their way to the host."""

    rows: StepRows
    ledger: bytes
    ids_R: Tensor
    highest_R: Tensor
    """Each logit row's highest logit."""
    row_sums_T: Tensor | None
    """Sums of all hidden rows, where some belong to chunks: not finite if a row is poisoned."""
    logprobs: PendingLogprobs | None
    prompt_logprobs: list[_PendingPrompt]
    done: torch.cuda.Event | None
    """None on a CPU, where it is done already."""
    num_masked: int = 0
    logits_RV: Tensor | None = None
    """Set while sampling waits for the mask of `num_masked` rows."""


def load_model(
    config: EngineConfig,
    layout: Layout,
    rank: int,
    groups: Groups,
    device: torch.device,
    progress: ReportProgress,
) -> Model:
    """This rank's part of the configured model, with its weights."""
    folder = Path(config.model) if config.model else bundled.path()
    model_config = read_model_config(folder)
    name = config.dtype
    if name == "auto":
        name = "float32" if device.type == "cpu" else model_config.dtype
    if config.enable_symm_mem:
        open_arena(config, model_config, plan_of(config), groups, device, DTYPES[name])
    open_sums_of(config, model_config, plan_of(config), groups, device, DTYPES[name])
    model = build_model(model_config, groups, device, DTYPES[name], config.plan_settings)
    if config.load_format == "dummy":
        dummy_weights(model, config.seed)
    else:
        load_weights(model, folder, progress)
    return model


class ModelRunner:
    """The model, its cache and its sampler on one rank."""

    def __init__(
        self,
        config: EngineConfig,
        layout: Layout,
        rank: int,
        groups: Groups,
        device: torch.device,
        progress: ReportProgress,
        make_model: MakeModel = load_model,
        use_kernels: bool | None = None,
    ) -> None:
        """`use_kernels` is for tests: Triton's interpreter can run on a CPU what a GPU runs."""
        self._config = config
        self._device = device
        self._use_kernels = device.type == "cuda" if use_kernels is None else use_kernels
        self._report = progress
        self._memory: dict[str, int] = {}
        self._graphs: DecodeGraphs | None = None
        self._ledger: Ledger = groups.ledger
        self._parts = ContextParts(groups.attn_cp, self._upload)
        self._num_replicas = layout.num_replicas
        self._row_multiple = plan_of(config).row_multiple
        self.buckets = (
            buckets_up_to(config.max_num_seqs, self._row_multiple) if self._use_kernels else ()
        )
        """Rows of a replica for which a decode is captured."""
        self.captured = b""
        """Digests of the graphs' collectives; empty where nothing is captured."""
        with torch.inference_mode():
            self._model = make_model(config, layout, rank, groups, device, progress)
        self._expert_tally = ExpertTally(self._model, config, groups, self._fetch)
        self.vocab_size = self._model.vocab_size
        self.stop_token_ids = self._model.stop_token_ids
        self.max_model_len = _limit_of(config, self._model)
        progress("measure", 0, 1)
        self.max_pages = self._count_pages()
        self._fit_max_model_len()
        progress("measure", 1, 1)

    def allocate(self, num_pages: int) -> None:
        """Make the cache and run a request through it, so that the first step finds all warm."""
        if not 0 < num_pages <= self.max_pages:
            raise ValueError(f"num_pages={num_pages} must be from 1 to max_pages={self.max_pages}")
        self._build(num_pages)
        admit = _dummy_admit(0, 1, self._config.page_size)
        self._finish(
            self._run(Body(admits=(admit,), chunk_slots=pack([0]), chunk_lengths=pack([1])))
        )
        if self.max_model_len > 1 and self._config.page_size > 1:
            self._finish(self._run(Body()))
        self._cache.clear([0])
        self._renew(num_pages)
        for length in WARM_UP_LENGTHS if self._device.type == "cuda" else ():
            self._read_one_prompt(length, num_pages)
        if self.buckets:
            with torch.inference_mode():
                self._graphs = self._new_graphs()
                self._graphs.capture(lambda done, total: self._report("graphs", done, total))
            self.captured = self._graphs.captured
        if self._device.type == "cuda":
            from kernels.launch import tell_of_compilations

            print(self._memory_table(num_pages), flush=True)
            tell_of_compilations(_complain_of_compilation)

    def _read_one_prompt(self, length: int, num_pages: int) -> None:
        room = num_pages * self._config.page_size
        if length <= min(self._config.max_num_batched_tokens, self.max_model_len, room):
            admit = _dummy_admit(0, length, self._config.page_size)
            body = Body(admits=(admit,), chunk_slots=pack([0]), chunk_lengths=pack([length]))
            self._finish(self._run(body))
            self._renew(num_pages)

    def launch(self, header: Header, body: Body, replica: int) -> PendingStep:
        """Queue a step. A body that this rank cannot obey is a `ProtocolError`."""
        with torch.inference_mode():
            rows = self._state.apply(body)
            _check_header(header, rows, replica)
            if header.bucket:
                _check_bucket(header, rows, self.buckets)
                return self._replay(rows, header, body)
            counts = RowCounts(
                header.num_rows,
                header.padded_rows,
                header.num_logit_rows,
                header.num_prompt_rows,
            )
            return self._launch(rows, body.admits, counts, replica, body.num_masked)

    def mask(self, pending: PendingStep, mask: Mask) -> None:
        """Sample the rows of a step whose body announced this mask."""
        _check_mask(pending, mask, self.vocab_size)
        logits_RV, pending.logits_RV = pending.logits_RV, None
        if logits_RV is not None:
            with torch.inference_mode():
                allowed = Allowed.unpacked(mask, self.vocab_size, self._device)
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

    def _run(self, body: Body) -> PendingStep:
        """A step that no driver asked for: all ranks run it, on equal rows."""
        with torch.inference_mode():
            rows, num = self._state.apply(body), self._num_replicas
            [padded] = align_rows([rows.num_rows], self._row_multiple)
            counts = RowCounts(
                (rows.num_rows,) * num, (padded,) * num, (rows.num_logit_rows,) * num
            )
            return self._launch(rows, body.admits, counts, 0)

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
            rows, self._ledger.take(), ids_R, highest_R, None, None, [], None, body.num_masked
        )
        if body.num_masked:
            pending.logits_RV = logits_RV
        elif self._sampler.needs_more(rows.logit_slots_R):
            self._sample(pending, logits_RV, None)
        else:
            pending.done = self._mark()
        return pending

    def _prepare_pages(self, rows: StepRows) -> None:
        if rows.dirty_pages:
            self._cache.clear(rows.dirty_pages)
        if isinstance(self._attention, PagedAttention):
            return
        self._table.update(self._state.table_changes, self._upload)

    def _launch(
        self,
        rows: StepRows,
        admits: tuple[Admit, ...],
        counts: RowCounts,
        replica: int,
        num_masked: int = 0,
    ) -> PendingStep:
        """An idle replica takes part with padding alone, or with no rows, if another has some."""
        self._prepare_pages(rows)
        if self._graphs is not None:
            self._graphs.forget_rows()
        for admit in admits:
            self._sampler.admit(admit)
        if not any(counts.padded):
            nothing = torch.empty(0)
            return PendingStep(
                rows, self._ledger.take(), nothing, nothing, None, None, [], done=None
            )
        part = self._parts.part_of(rows)
        batch = self._batch(rows, counts, replica, part)
        hidden_TD = self._model.forward(batch)
        prompts = self._prompt_logprobs(rows.chunks, hidden_TD, counts.num_prompt_rows, part)
        logits_RV = None
        if any(counts.num_logit_rows):
            hidden_RD = self._logit_rows(hidden_TD, rows, batch, part)
            logits_RV = self._model.logits(hidden_RD, counts.num_logit_rows)
            if rows.num_logit_rows == 0:  # an idle replica lends its part of the head
                logits_RV = None
        row_sums_T = self._row_sums(hidden_TD, part) if rows.chunks else None
        pending = PendingStep(
            rows,
            self._ledger.take(),
            torch.empty(0),
            torch.empty(0),
            None if row_sums_T is None else self._fetch(row_sums_T),
            None,
            prompts,
            None,
            num_masked,
        )
        if logits_RV is None:
            pending.done = self._mark()
        elif num_masked:
            pending.logits_RV = logits_RV
        else:
            self._sample(pending, logits_RV, None)
        return pending

    def _sample(self, pending: PendingStep, logits_RV: Tensor, allowed: Allowed | None) -> None:
        """Queue the step's sampling, and its results' way to the host."""
        ids_R, highest_R, logprobs = self._sampler.sample(logits_RV, pending.rows, allowed)
        pending.ids_R, pending.highest_R = self._fetch(ids_R), self._fetch(highest_R)
        pending.logprobs = None if logprobs is None else logprobs.moved(self._fetch)
        pending.done = self._mark()

    def _logit_rows(
        self, hidden_TD: Tensor, rows: StepRows, batch: ForwardBatch, part: StepPart | None
    ) -> Tensor:
        """Hidden rows (R, D) that sample, all of the replica's."""
        if rows.num_logit_rows == 0:
            return hidden_TD[:0]
        if part is not None:
            return part.take(hidden_TD, rows.logit_rows_R)
        if rows.chunks:
            return hidden_TD.index_select(0, batch.logit_rows_R)
        return hidden_TD[: rows.num_logit_rows]

    def _row_sums(self, hidden_TD: Tensor, part: StepPart | None) -> Tensor:
        """A number for each of the replica's rows that is finite only if all of the row are."""
        sums_T = hidden_TD.sum(dim=-1, dtype=torch.float32)
        return sums_T if part is None else part.take_all(sums_T.unsqueeze(1)).squeeze(1)

    def _batch(
        self, rows: StepRows, counts: RowCounts, replica: int, part: StepPart | None
    ) -> ForwardBatch:
        """The step's rows on the device; decodes read the token that sampling left there."""
        padded = counts.padded[replica]
        if part is not None:
            rows, padded = part.rows_of(rows), padded // self._parts.num_parts
        positions_T = self._upload(rows.positions_T)
        input_ids_T = self._sampler.last_token_S.index_select(0, self._upload(rows.decode_slots_B))
        if rows.chunks:
            parts = [chunk.tokens[chunk.start : chunk.stop] for chunk in rows.chunks]
            tokens = self._upload(np.concatenate(parts).astype(np.int64))
            input_ids_T = torch.cat([input_ids_T, tokens])
        num_pads = padded - rows.num_rows
        if num_pads:
            input_ids_T = torch.cat([input_ids_T, input_ids_T.new_zeros(num_pads)])
        if len(rows.kv_rows_T):
            self._attention.prepare(rows, positions_T, self._upload(rows.kv_rows_T), self._upload)
        return ForwardBatch(
            input_ids_T=input_ids_T,
            positions_T=positions_T,
            logit_rows_R=self._upload(rows.logit_rows_R),
            attention=self._attention,
            counts=counts,
            context=None if part is None else part.gather,
            upload=self._upload,
        )

    def _prompt_logprobs(
        self,
        chunks: tuple[Chunk, ...],
        hidden_TD: Tensor,
        num_by_replica: tuple[int, ...],
        part: StepPart | None,
    ) -> list[_PendingPrompt]:
        """Log-probabilities of the prompts' tokens, some rows' logits at a time.

        A head that spans replicas is needed by all of them as often as by the one with most rows,
        so the header says how many each has.
        """
        wanted = [each for chunk in chunks if (each := self._wanted_of(chunk)) is not None]
        pending = [_PendingPrompt(chunk.slot, chunk.start + 1, []) for chunk, _, _ in wanted]
        blocks = _blocks([length for _, _, length in wanted])
        num_blocks = max(len(blocks), -(-max(num_by_replica, default=0) // LOGIT_BLOCK_ROWS))
        for number in range(num_blocks):
            pieces = blocks[number] if number < len(blocks) else []
            spans = [(wanted[i].chunk.row + first, count) for i, first, count in pieces]
            hidden_ND = self._rows_in(spans, hidden_TD, part)
            done = number * LOGIT_BLOCK_ROWS
            counts = tuple(min(max(n - done, 0), LOGIT_BLOCK_ROWS) for n in num_by_replica)
            logits = self._model.logits(hidden_ND, counts or None)
            at = 0
            for index, first, count in pieces:
                chunk, num_top, _ = wanted[index]
                tokens = chunk.tokens[chunk.start + first + 1 :][:count]
                block = token_logprobs(
                    logits[at : at + count],
                    self._upload(tokens.astype(np.int64)),
                    list(range(count)),
                    [num_top] * count,
                )
                pending[index].blocks.append(block.moved(self._fetch))
                at += count
        return pending

    def _rows_in(
        self, spans: list[tuple[int, int]], hidden_TD: Tensor, part: StepPart | None
    ) -> Tensor:
        """Hidden rows of the replica, from all (first row, count) one after another."""
        if part is None or not spans:
            rows = [hidden_TD[first : first + count] for first, count in spans]
            return torch.cat([hidden_TD[:0], *rows])
        return part.take(hidden_TD, np.concatenate([np.arange(f, f + n) for f, n in spans]))

    def _wanted_of(self, chunk: Chunk) -> _WantedPrompt | None:
        """Row p tells the prompt's token p + 1, so the first token has none."""
        num_top, num_prompt = self._sampler.prompt_logprobs_of(chunk.slot)
        length = min(chunk.stop, num_prompt - 1) - chunk.start
        return _WantedPrompt(chunk, num_top, length) if num_top >= 0 and length > 0 else None

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
            tuple(_read_prompt(prompt) for prompt in pending.prompt_logprobs),
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

    def _upload(self, array: NDArray[np.generic]) -> Tensor:
        tensor = torch.from_numpy(array)
        if self._device.type == "cpu":
            return tensor
        return tensor.pin_memory().to(self._device, non_blocking=True)

    def _fetch(self, tensor: Tensor) -> Tensor:
        """The tensor on the host: complete once the step's event is."""
        if tensor.device.type == "cpu":
            return tensor
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return host.copy_(tensor, non_blocking=True)

    def _mark(self) -> torch.cuda.Event | None:
        if self._device.type == "cpu":
            return None
        event = torch.cuda.Event()
        event.record()
        return event

    def _build(self, num_pages: int) -> None:
        spare = int(self._use_kernels)
        self._cache = PagedCache(
            self._model.num_layers,
            self._model.cache_shapes,
            num_pages=num_pages + spare,
            page_size=self._config.page_size,
            dtype=self._model.dtype,
            device=self._device,
        )
        self._graphs = None
        self._renew(num_pages)

    def _renew(self, num_pages: int) -> None:
        """State of no requests at all."""
        self._state, self._sampler = self._new_state(num_pages), self._new_sampler()
        if not self._use_kernels:
            self._attention = PagedAttention(self._cache, self._state, self._device)
            return
        from workers.device_table import DeviceTable  # Triton: only with a GPU
        from workers.gpu_attention import GpuAttention
        from workers.gpu_latent_attention import GpuLatentAttention

        num_slots, num_columns = self._state.page_table_SN.shape
        self._table = DeviceTable(num_slots, num_columns, num_pages, self._device)
        if self._cache.is_latent:
            self._attention = GpuLatentAttention(
                self._cache, self._table, self.max_model_len, num_heads=self._model.num_heads
            )
        else:
            max_decodes = max(num_slots, *self.buckets)
            self._attention = GpuAttention(self._cache, self._table, max_decodes=max_decodes)

    def _new_graphs(self) -> "DecodeGraphs":
        from workers.graphs import DecodeGraphs

        if isinstance(self._attention, PagedAttention):
            raise ValueError("torch's attention cannot be captured")
        return DecodeGraphs(
            self._model,
            self._attention,
            self._table,
            self._sampler.last_token_S,
            self._ledger,
            self._parts,
            self._upload,
            page_size=self._config.page_size,
            buckets=self.buckets,
            num_replicas=self._num_replicas,
        )

    def _new_state(self, num_pages: int) -> BatchState:
        return BatchState(
            max_num_seqs=self._config.max_num_seqs,
            max_num_batched_tokens=self._config.max_num_batched_tokens,
            max_model_len=self.max_model_len,
            page_size=self._config.page_size,
            num_pages=num_pages,
            vocab_size=self.vocab_size,
        )

    def _new_sampler(self) -> Sampler:
        return Sampler(
            max_num_seqs=self._config.max_num_seqs,
            vocab_size=self.vocab_size,
            device=self._device,
        )

    def _page_bytes(self) -> int:
        return bytes_per_page(
            self._model.num_layers,
            self._model.cache_shapes,
            page_size=self._config.page_size,
            dtype=self._model.dtype,
        )

    def _count_pages(self) -> int:
        """Pages there is memory for, as far as requests could ever fill them."""
        cache_gb = self._config.kv_cache_gb
        if cache_gb is None and self._device.type == "cpu":
            cache_gb = CPU_CACHE_GB
        num_bytes = self._measure_free_bytes() if cache_gb is None else int(cache_gb * GIB)
        most = self._config.max_num_seqs * self._num_pages_for(self.max_model_len)
        return pages_that_fit(num_bytes, self._page_bytes(), most=most)

    def _fit_max_model_len(self) -> None:
        """A limit that was asked for must fit into the cache; the model's own is lowered."""
        room = self.max_pages * self._config.page_size
        if self.max_model_len <= room:
            return
        if self._config.max_model_len is not None or room < 2:
            raise ValueError(
                f"max_model_len={self.max_model_len} needs "
                f"{self._num_pages_for(self.max_model_len)} pages of {self._page_bytes()} bytes "
                f"and the cache holds {self.max_pages}: raise kv_cache_gb or lower max_model_len"
            )
        self.max_model_len = room

    def _num_pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._config.page_size)

    def _measure_free_bytes(self) -> int:
        """What the largest step leaves of this rank's share of the GPU."""
        num_seqs = self._config.max_num_seqs
        length = min(self._config.max_num_batched_tokens // num_seqs, self.max_model_len)
        self._build(self._num_pages_for(length))
        admits = [_dummy_admit(slot, length, self._config.page_size) for slot in range(num_seqs)]
        body = Body(
            admits=tuple(admits),
            chunk_slots=pack(range(num_seqs)),
            chunk_lengths=pack([length] * num_seqs),
        )
        torch.cuda.reset_peak_memory_stats(self._device)
        self._finish(self._run(body))
        peak = torch.cuda.max_memory_allocated(self._device) - self._cache.num_bytes
        graph_bytes = self._measure_graphs()
        unmeasured = 0
        if not isinstance(self._attention, PagedAttention):
            unmeasured = self._attention.unmeasured_bytes
        del self._cache, self._state, self._sampler, self._attention, self._table
        gc.collect()
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(self._device)
        others = total - free - torch.cuda.memory_reserved(self._device)
        counts = Sampler.penalty_bytes(num_seqs, self.vocab_size)
        self._memory = {
            "other": others,
            "weights": torch.cuda.memory_allocated(self._device),
            "largest step": peak - torch.cuda.memory_allocated(self._device) + unmeasured,
            "graphs": graph_bytes,
            "penalty counts": counts,
        }
        usable = int(total * self._config.gpu_memory_utilization)
        return usable - sum(self._memory.values()) - self._page_bytes()

    def _measure_graphs(self) -> int:
        """What graphs take: the largest is measured, the others live in its memory."""
        if not self.buckets:
            return 0
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        before, _ = torch.cuda.mem_get_info(self._device)
        with torch.inference_mode():
            graphs = self._new_graphs()
            graphs.capture_one(graphs.buckets[-1])
        after, _ = torch.cuda.mem_get_info(self._device)
        return max(0, before - after) + GRAPH_BYTES * len(graphs.buckets)

    def _memory_table(self, num_pages: int) -> str:
        """Where this rank's memory goes, in GiB: measured, except for the cache."""
        rows = {**self._memory, "cache": num_pages * self._page_bytes()}
        free, total = torch.cuda.mem_get_info(self._device)
        rows |= {"free": free, "total": total}
        lines = [f"{name:16s}{size / GIB:9.2f} GiB" for name, size in rows.items()]
        num_tokens = num_pages * self._config.page_size
        return "\n".join([f"memory, {num_pages} pages for {num_tokens} tokens:", *lines])


def _complain_of_compilation(kernel: str, seconds: float) -> None:
    print(
        f"the kernel {kernel} was compiled after ready and a step waited {seconds:.2f} s for it; "
        "please report it with the model and the settings",
        flush=True,
    )


def _limit_of(config: EngineConfig, model: Model) -> int:
    """The longest sequence that is asked for, which the model must be able to read."""
    if config.max_model_len is None:
        return model.max_position_embeddings
    if config.max_model_len > model.max_position_embeddings:
        raise ValueError(
            f"max_model_len={config.max_model_len} is more than the "
            f"{model.max_position_embeddings} positions of this model: lower it"
        )
    return config.max_model_len


def _check_header(header: Header, rows: StepRows, replica: int) -> None:
    if not replica < len(header.num_rows) == len(header.num_logit_rows):
        raise ProtocolError(
            f"step {header.step} counts {len(header.num_rows)} replicas' rows and "
            f"{len(header.num_logit_rows)} replicas' logit rows, and this is replica {replica}"
        )
    if len(header.padded_rows) != len(header.num_rows) or any(
        padded < real for padded, real in zip(header.padded_rows, header.num_rows, strict=False)
    ):
        raise ProtocolError(
            f"step {header.step} pads {header.num_rows} rows to {header.padded_rows}, which is less"
        )
    counted = (rows.num_rows, rows.num_logit_rows)
    told = (header.num_rows[replica], header.num_logit_rows[replica])
    if counted != told:
        raise ProtocolError(
            f"step {header.step} should have {told[0]} rows and {told[1]} logit rows in replica "
            f"{replica}, and this rank counts {counted[0]} and {counted[1]}"
        )


def _check_bucket(header: Header, rows: StepRows, buckets: tuple[int, ...]) -> None:
    if header.bucket not in buckets or rows.chunks or rows.num_rows > header.bucket:
        raise ProtocolError(
            f"step {header.step} of {rows.num_rows} rows, {len(rows.chunks)} chunks among them, "
            f"wants a graph of {header.bucket} rows; there are graphs of {buckets}"
        )
    if set(header.padded_rows) != {header.bucket}:
        raise ProtocolError(
            f"step {header.step} wants a graph of {header.bucket} rows of every replica and pads "
            f"them to {header.padded_rows}"
        )


def _check_mask(pending: PendingStep, mask: Mask, vocab_size: int) -> None:
    rows, num_logit_rows = unpack(mask.rows), pending.rows.num_logit_rows
    num_bytes = len(rows) * mask_bytes(vocab_size)
    if pending.logits_RV is None or len(rows) != pending.num_masked:
        raise ProtocolError(
            f"step {mask.step} waits for the mask of {pending.num_masked} rows and got {len(rows)}"
        )
    if len(mask.bits) != num_bytes or not ((rows >= 0) & (rows < num_logit_rows)).all():
        raise ProtocolError(
            f"the mask of step {mask.step} has {len(mask.bits)} bytes for {len(rows)} of "
            f"{num_logit_rows} logit rows, and this rank counts {num_bytes}"
        )


def _blocks(lengths: list[int]) -> list[list[tuple[int, int, int]]]:
    """Parts of these lengths, one after another, cut into blocks of `LOGIT_BLOCK_ROWS`.

    A block lists (part, first row in the part, rows).
    """
    blocks: list[list[tuple[int, int, int]]] = []
    room = 0
    for index, length in enumerate(lengths):
        first = 0
        while first < length:
            if room == 0:
                blocks.append([])
                room = LOGIT_BLOCK_ROWS
            count = min(room, length - first)
            blocks[-1].append((index, first, count))
            first, room = first + count, room - count
    return blocks


def _dummy_admit(slot: int, length: int, page_size: int) -> Admit:
    """A request to warm up with: it goes through all of sampling, on the first pages."""
    return Admit(
        slot,
        pack([0] * length),
        length,
        0,
        pack(range(-(-length // page_size))),
        Sampling(top_p=0.9, num_logprobs=0),
    )


def _read_prompt(prompt: _PendingPrompt) -> PromptLogprobs:
    values = tuple(value for block in prompt.blocks for _, value in block.read())
    return prompt.slot, prompt.first, values
