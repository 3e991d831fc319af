"""Steps with prompts that are captured once and replayed: one CUDA graph for each bucket of rows.

Launched kernel by kernel a step costs the host as much for 40 rows as for 4000, and for few rows
that is several times what the GPU needs. So where a step's rows, decodes and chunks of prompts
together, fit into a bucket, the model's forward pass is one launch. What comes after it (rows that
sample, the head, sampling, log-probabilities) is launched as for any other step, on the hidden rows
that the graph leaves: graphs of one kind know nothing of sampling, and need not.

Everything that a forward pass reads of a step lies in one tensor a bucket, written by one upload:

    2 decodes and a chunk of 3 from token 4 on, in a bucket of 8 with room for 4 decodes

    ids                 -1  -1   7   5   9 |  0   0   0      -1: the slot's last token
    slots                0   2   s   s   s |  s   s   s      s: the spare slot
    positions           31   8   4   5   6 |  0   0   0
    decode positions    31   8  -1  -1                       -1: reads nothing
    places in the cache  .   .   .   .   . |  p   p   p      p: on the page that is nobody's
    blocks of chunks    (2, 3, 4, slot), (0, 0, 0, 0), ...   of no rows: a program that ends at once
    rows that sample     0   1   4   0   0    0   0   0
    live                 5                                   each replica's rows that are tokens

Attention runs for all: first each row that may be a decode, which those at -1 are not, then every
block. Nobody attends for rows of padding: what they hold may be NaN and stays in those rows, and on
the page that is nobody's. Which rows are routed to experts and counted is worked out from `live`,
as for decodes, and so it is with attention replicas: all are padded to the bucket, idle ones too.

The driver chooses the bucket, by what all replicas have; see `workers.graphs`, whose graphs replay
decodes alone, sampling included. On a CPU the same rows are run as they are.

Shapes: T rows of a bucket, D of them may be decodes, M blocks of chunks, R rows that sample,
P replicas, S slots.
"""

from collections.abc import Sequence
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.paged_prefill import BLOCK_ROWS, cut_chunks
from parallel.dp_attention import RowCounts, Upload
from parallel.groups import Call, Groups
from parallel.padding import chunks_in_bucket
from workers.batch import ForwardBatch, StepRows
from workers.device_table import DeviceTable
from workers.gpu_attention import GpuAttention
from workers.models import Model
from workers.recording import Recorder, Recording

ALIGNED = 16
"""Numbers of int64 from such a multiple on are aligned as a tensor's first are."""

Numbers = TypeVar("Numbers", NDArray[np.int64], Tensor)


class Sizes(NamedTuple):
    """Of a bucket: all that is fixed when it is captured."""

    num_rows: int
    num_decodes: int
    """Rows that may be decodes: the first ones."""
    num_replicas: int

    @property
    def num_blocks(self) -> int:
        """As many as all its chunks can have: of each, one block may not be full."""
        return self.num_rows // BLOCK_ROWS + chunks_in_bucket(self.num_rows)

    @property
    def total(self) -> int:
        """Numbers that are uploaded."""
        return sum(map(_aligned, self._lengths))

    @property
    def _lengths(self) -> tuple[int, ...]:
        """Of the fields of `Inputs`, in order."""
        num_rows = self.num_rows
        return (
            *(num_rows, num_rows, num_rows, self.num_decodes, num_rows, num_rows),
            *(4 * self.num_blocks, self.num_replicas),
        )

    def cut(self, packed_N: Numbers) -> "Inputs[Numbers]":
        """`total` numbers as views of them, one a field."""
        views: list[Numbers] = []
        first = 0
        for length in self._lengths:
            views.append(packed_N[first : first + length])
            first += _aligned(length)
        ids, slots, positions, decode_positions, places, logit_rows, blocks, live = views
        blocks_M4 = blocks.reshape(-1, 4)
        return Inputs(ids, slots, positions, decode_positions, places, logit_rows, blocks_M4, live)


class Inputs(NamedTuple, Generic[Numbers]):
    """What a graph reads of a step, all int64: see the top of the file."""

    ids_T: Numbers
    slots_T: Numbers
    positions_T: Numbers
    decode_positions_D: Numbers
    places_T: Numbers
    logit_rows_R: Numbers
    """As many as there are rows; those past the step's are 0."""
    blocks_M4: Numbers
    num_live_P: Numbers


def _aligned(length: int) -> int:
    return -(-length // ALIGNED) * ALIGNED


def pack_step(
    rows: StepRows, num_live: Sequence[int], sizes: Sizes, *, spare_slot: int, spare_place: int
) -> NDArray[np.int64]:
    """What `Sizes.cut` makes `Inputs` of. `num_live` are all replicas' rows, before padding."""
    packed_N = np.zeros(sizes.total, np.int64)
    inputs = sizes.cut(packed_N)
    num_rows, num_decodes = rows.num_rows, len(rows.decode_slots_B)
    inputs.ids_T[:num_decodes] = -1
    for chunk in rows.chunks:
        at = slice(chunk.row, chunk.row + chunk.length)
        inputs.ids_T[at] = chunk.tokens[chunk.start : chunk.stop]
    inputs.slots_T[:] = spare_slot
    inputs.slots_T[:num_decodes] = rows.decode_slots_B
    inputs.positions_T[:num_rows] = rows.positions_T
    inputs.decode_positions_D[:num_decodes] = rows.positions_T[:num_decodes]
    inputs.decode_positions_D[num_decodes:] = -1
    inputs.places_T[:num_rows] = rows.kv_rows_T
    inputs.places_T[num_rows:] = spare_place
    inputs.logit_rows_R[: rows.num_logit_rows] = rows.logit_rows_R
    if rows.chunks:
        blocks_M4 = cut_chunks(chunk.span for chunk in rows.chunks)
        inputs.blocks_M4[: len(blocks_M4)] = blocks_M4
    inputs.num_live_P[:] = num_live
    return packed_N


class Forwarded(NamedTuple):
    """A forward pass that is queued."""

    hidden_TD: Tensor
    """Of the rows that are tokens. The next graph that runs overwrites it."""
    logit_rows_R: Tensor


class _Graph(NamedTuple):
    recording: Recording
    sizes: Sizes
    packed_N: Tensor
    inputs: Inputs[Tensor]


class PromptGraphs:
    """The graphs of one rank."""

    def __init__(
        self,
        model: Model,
        attention: GpuAttention,
        table: DeviceTable,
        last_token_S: Tensor,
        groups: Groups,
        recorder: Recorder,
        upload: Upload,
        *,
        page_size: int,
        buckets: Sequence[int],
        num_replicas: int,
    ) -> None:
        """`buckets` ascend; they are rows of each of `num_replicas`, none of which is in parts."""
        self.buckets = tuple(buckets)
        self._model, self._attention, self._table = model, attention, table
        self._last_token_S = last_token_S
        self._ledger, self._arena = groups.ledger, groups.arena
        self._recorder, self._upload = recorder, upload
        self._spare_place = table.spare_page * page_size
        self._num_replicas = num_replicas
        self._graphs: dict[int, _Graph] = {}

    @property
    def calls(self) -> list[Call]:
        """Of all graphs: ranks must have captured the same."""
        graphs = (graph for _, graph in sorted(self._graphs.items()))
        return [call for graph in graphs for call in graph.recording.calls]

    @property
    def bytes_of_others(self) -> int:
        """What graphs of smaller buckets will keep for good beside the largest's: hidden rows."""
        out_TD = self._graphs[self.buckets[-1]].recording.out
        return out_TD.nbytes // len(out_TD) * sum(self.buckets[:-1])

    def capture_one(self, bucket: int) -> None:
        sizes = Sizes(bucket, min(bucket, self._table.spare_slot), self._num_replicas)
        nothing = pack_step(
            _NO_ROWS, [0] * self._num_replicas, sizes,
            spare_slot=self._table.spare_slot, spare_place=self._spare_place,
        )  # fmt: skip
        packed_N = self._upload(nothing).clone()
        inputs = sizes.cut(packed_N)
        recording = self._recorder.record(lambda: self._run(inputs))
        self._graphs[bucket] = _Graph(recording, sizes, packed_N, inputs)

    def launch(self, rows: StepRows, bucket: int, num_live: Sequence[int]) -> Forwarded:
        """Queue a step's forward pass; `num_live` are all replicas' rows, before padding."""
        recording, sizes, packed_N, inputs = self._graphs[bucket]
        packed = pack_step(
            rows, num_live, sizes,
            spare_slot=self._table.spare_slot, spare_place=self._spare_place,
        )  # fmt: skip
        packed_N.copy_(self._upload(packed))
        if recording.graph is None:
            hidden_TD = self._run(inputs)
        else:
            hidden_TD = recording.out
            self._ledger.replay(recording.calls)
            recording.graph.replay()
            self._arena.rows_are_even = True  # as the forward pass would say, for the head
        return Forwarded(hidden_TD[: rows.num_rows], inputs.logit_rows_R[: rows.num_logit_rows])

    def _run(self, inputs: Inputs[Tensor]) -> Tensor:
        """The forward pass itself; hidden rows."""
        last_T = self._last_token_S.index_select(0, inputs.slots_T)
        ids_T = torch.where(inputs.ids_T < 0, last_T, inputs.ids_T)
        num_decodes = len(inputs.decode_positions_D)
        self._attention.prepare_mixed(
            inputs.slots_T[:num_decodes],
            inputs.decode_positions_D,
            inputs.places_T,
            inputs.blocks_M4,
        )
        every = (len(ids_T),) * self._num_replicas
        return self._model.forward(
            ForwardBatch(
                input_ids_T=ids_T,
                positions_T=inputs.positions_T,
                logit_rows_R=inputs.logit_rows_R,
                attention=self._attention,
                counts=RowCounts(every, every, ()),
                num_live_P=inputs.num_live_P,
                upload=self._upload,
            )
        )


_NOTHING = np.empty(0, np.int64)
_NO_ROWS = StepRows(_NOTHING, (), _NOTHING, _NOTHING, _NOTHING, _NOTHING, ())
