"""Decode steps that are captured once and replayed: one CUDA graph for each bucket of rows.

A graph holds the whole step: it reads slots and positions from buffers of its own, runs the model,
takes the likeliest ids, leaves them as the slots' last tokens, moves each row one position on, and
writes ids where the host reads them. While the same slots decode, a step is one launch and nothing
else: no upload, no copy back. When the slots change, their numbers and positions are uploaded.

The driver chooses the bucket, the same for every rank: all replicas have so many rows in it, those
that are idle too, so every collective has the same shape on all ranks. How many of each replica's
rows are tokens lies in a small tensor that graphs read, and that is uploaded when it changes; from
it they work out which rows are routed to experts and counted. Rows that fill a bucket up are the
spare slot's: they write to a page that is nobody's. With context parallelism each part computes
its rows of the bucket, and the replica's ranks bring hidden rows together before the head.

A graph works on slots of the symmetric arena, which stay where they are for good, and on memory of
the graphs alone (`workers.recording`). Logits of all graphs lie in one tensor that has room for the
largest bucket: sampling reads them behind a replay, and before the next. A graph's collectives are
those recorded at capture, which ranks compare before the first step. Steps with prompts have their
own graphs, `workers.prompt_graphs`.

On a CPU nothing is captured and the same rows are run as they are, which is how it is tested.

Shapes: B rows of a bucket, P replicas, V vocabulary, S slots, R turns of the ring.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.decode_rows import Rows, close_rows, open_rows
from parallel.context import part_counts
from parallel.dp_attention import RowCounts, Upload
from parallel.groups import Call, Ledger
from workers.batch import ForwardBatch, StepRows
from workers.context import ContextParts
from workers.device_table import DeviceTable
from workers.gpu_attention import GpuAttention
from workers.gpu_latent_attention import GpuLatentAttention
from workers.models import Model
from workers.recording import Recorder

RING = 4
"""Steps whose ids the host may not have read yet; a worker has two in flight."""


class Replayed(NamedTuple):
    """What a step has queued; the ids and highest logits are the host's once it is done."""

    ids_R: Tensor
    highest_R: Tensor
    logits_RV: Tensor
    """Of the rows that count. The next replay, in whatever bucket, overwrites it."""


class _Graph(NamedTuple):
    graph: torch.cuda.CUDAGraph | None
    rows: Rows
    logits_BV: Tensor
    calls: tuple[Call, ...] = ()
    """The collectives that were captured."""


class DecodeGraphs:
    """The graphs of one rank. The newest step's rows are on the device, if a graph ran it."""

    def __init__(
        self,
        model: Model,
        attention: GpuAttention | GpuLatentAttention,
        table: DeviceTable,
        last_token_S: Tensor,
        ledger: Ledger,
        recorder: Recorder,
        parts: ContextParts,
        upload: Upload,
        *,
        page_size: int,
        buckets: Sequence[int],
        num_replicas: int,
    ) -> None:
        """`buckets` ascend; they are rows of each of `num_replicas`, whose parts are `parts`."""
        self._ledger, self._recorder, self._upload = ledger, recorder, upload
        self._num_parts = parts.num_parts
        self._part_of = {bucket: parts.part_of_bucket(bucket) for bucket in buckets}
        self.buckets = tuple(buckets)
        most_rows = self.buckets[-1]
        self._model, self._attention, self._table = model, attention, table
        self._page_size = page_size
        device = last_token_S.device
        self._slots_B = torch.full((most_rows,), table.spare_slot, device=device)
        self._positions_B = torch.zeros(most_rows, dtype=torch.int64, device=device)
        self._num_replicas = num_replicas
        num_counts = num_replicas * self._num_parts
        self._num_live_P = torch.zeros(num_counts, dtype=torch.int64, device=device)
        self._num_live = (0,) * num_replicas
        """What `_num_live_P` holds, for the parts of each replica together."""
        self._last_token_S = last_token_S
        self._room_BV = model.room_for_logits(most_rows)
        """Every graph's logits, in its first rows."""
        self._turn_1 = torch.zeros(1, dtype=torch.int32, device=device)
        is_gpu = device.type == "cuda"
        self._ring_R2B = torch.zeros(RING, 2, most_rows, dtype=torch.int32, pin_memory=is_gpu)
        self._highest_RB = self._ring_R2B[:, 1].view(torch.float32)
        self._graphs: dict[int, _Graph] = {}
        self._num_turns = 0
        self._slots: NDArray[np.int64] | None = None
        self._bucket = 0

    @property
    def calls(self) -> list[Call]:
        """Of all graphs: ranks must have captured the same."""
        return [call for _, graph in sorted(self._graphs.items()) for call in graph.calls]

    bytes_of_others = 0
    """The graphs of smaller buckets keep nothing beside the largest's: logits have one room."""

    def capture_one(self, bucket: int) -> None:
        rows = self._rows(bucket)
        graph, logits_BV, calls = self._recorder.record(lambda: self._run(rows))
        self._num_turns += 1  # as the device counts it: what is captured has been run once
        self._graphs[bucket] = _Graph(graph, rows, logits_BV, calls)

    def forget_rows(self) -> None:
        """Another kind of step has run: rows on the device are no longer the newest."""
        self._slots = None

    def launch(self, step: StepRows, bucket: int, num_live: tuple[int, ...]) -> Replayed:
        """Queue a step of decodes alone; `num_live` are all replicas' rows, before padding."""
        num_rows = step.num_rows
        if num_live != self._num_live:
            by_part = [part_counts(count, self._num_parts) for count in num_live]
            self._num_live_P.copy_(self._upload(np.array(by_part, np.int64).reshape(-1)))
            self._num_live = num_live
        if step.decode_slots_B is not self._slots or bucket != self._bucket:
            self._upload_rows(step, bucket)
        graph = self._graphs[bucket]
        if graph.graph is None:
            graph = graph._replace(logits_BV=self._run(graph.rows))
        else:
            self._ledger.replay(graph.calls)
            graph.graph.replay()
        self._num_turns += 1
        turn = self._num_turns % RING
        return Replayed(
            self._ring_R2B[turn, 0, :num_rows],
            self._highest_RB[turn, :num_rows],
            graph.logits_BV[:num_rows],
        )

    def _upload_rows(self, step: StepRows, bucket: int) -> None:
        num_rows = step.num_rows
        both = np.zeros((2, bucket), np.int64)
        both[0] = self._table.spare_slot
        both[0, :num_rows], both[1, :num_rows] = step.decode_slots_B, step.positions_T
        slots_B, positions_B = self._upload(both).unbind()
        self._slots_B[:bucket].copy_(slots_B)
        self._positions_B[:bucket].copy_(positions_B)
        self._slots, self._bucket = step.decode_slots_B, bucket

    def _rows(self, bucket: int) -> Rows:
        return Rows(
            self._slots_B[:bucket],
            self._positions_B[:bucket],
            self._last_token_S,
            self._turn_1,
            self._ring_R2B,
            self._table.spare_slot,
        )

    def _run(self, rows: Rows) -> Tensor:
        """The step itself; the logits."""
        ids_B, places_B = open_rows(rows, self._table.table_SN, page_size=self._page_size)
        slots_T, positions_T = rows.slots_B, rows.positions_B
        part = self._part_of[len(slots_T)]
        if part is not None:
            ids_B, slots_T, positions_T = (
                each[part.decodes].contiguous() for each in (ids_B, slots_T, positions_T)
            )
        self._attention.prepare_decodes(slots_T, positions_T, places_B)
        every = (len(rows.slots_B),) * self._num_replicas
        batch = ForwardBatch(
            input_ids_T=ids_B,
            positions_T=positions_T,
            logit_rows_R=slots_T,
            attention=self._attention,
            counts=RowCounts(every, every, every),
            num_live_P=self._num_live_P,
            context=None if part is None else part.gather,
            upload=self._upload,
        )
        hidden_BD = self._model.forward(batch)
        if part is not None:
            hidden_BD = part.take_all(hidden_BD)
        out = self._room_BV[: len(hidden_BD)]
        logits_BV = self._model.logits(hidden_BD, every, out=out)
        close_rows(logits_BV, rows)
        return logits_BV
