"""Steps of all kinds, read by a GPU's attention and by plain torch over caches that are alike."""

from collections.abc import Iterator
from typing import NamedTuple

import torch

from kernels.fp8 import E4M3, NO_SCALES, Scales
from workers.attention import PagedAttention
from workers.batch import BatchState, StepRows
from workers.cache import PagedCache, RowShapes
from workers.device_table import DeviceTable
from workers.gpu_attention import GpuAttention
from workers.gpu_latent_attention import GpuLatentAttention
from workers.protocol import Admit, Body, Sampling, pack

NUM_LAYERS, PAGE, NUM_SLOTS, NUM_PAGES, MAX_LEN = 2, 4, 4, 24, 24


def enters(slot: int, length: int) -> Admit:
    """A prompt on pages of its own, in no order."""
    pages = [(slot + 4 * number) % NUM_PAGES for number in (3, 0, 5, 1, 4, 2)]
    return Admit(slot, pack(range(length)), length, 0, pack(pages), Sampling())


BODIES = (
    # Two prompts; a chunk beside two decodes; its rest and a prompt beside them.
    Body(admits=(enters(1, 9), enters(3, 5)), chunk_slots=pack([3, 1]), chunk_lengths=pack([5, 9])),
    Body(admits=(enters(0, 19),), chunk_slots=pack([0]), chunk_lengths=pack([11])),
    Body(admits=(enters(2, 6),), chunk_slots=pack([0, 2]), chunk_lengths=pack([8, 6])),
    # Decodes alone; a prompt alone, shorter than those were many; its decode, not from a graph.
    *(Body(),) * 3,
    Body(
        leaves=pack([0, 1, 2, 3]), admits=(enters(1, 2),), chunk_slots=pack([1]),
        chunk_lengths=pack([2]),
    ),
    Body(),
)  # fmt: skip


class Step(NamedTuple):
    num_rows: int
    num_padded: int
    """Where it is a captured one's: with a row that nobody asks for."""


class TwoCaches:
    """One is `mine`, which a GPU's attention is to be made of; plain torch reads the other."""

    def __init__(self, shapes: RowShapes, device: str, scales: Scales = NO_SCALES) -> None:
        self.device = torch.device(device)
        is_plain = scales == NO_SCALES
        self.mine, self.theirs = (
            PagedCache(
                NUM_LAYERS, shapes, num_pages=NUM_PAGES + 1, page_size=PAGE,
                dtype=torch.float32 if is_plain else E4M3, device=self.device,
                scales=() if is_plain else (scales,) * NUM_LAYERS,
            )
            for _ in range(2)
        )  # fmt: skip
        self.table = DeviceTable(NUM_SLOTS, -(-MAX_LEN // PAGE), NUM_PAGES, self.device)
        self._state = BatchState(
            max_num_seqs=NUM_SLOTS, max_num_batched_tokens=32, max_model_len=MAX_LEN,
            page_size=PAGE, num_pages=NUM_PAGES, vocab_size=100,
        )  # fmt: skip
        self.plain = PagedAttention(self.theirs, self._state, self.device)

    def apply(self, body: Body) -> StepRows:
        """A step's rows, for which plain torch is prepared."""
        rows = self._state.apply(body)
        self.table.update(self._state.table_changes, self._upload)
        positions, places = self._upload(rows.positions_T), self._upload(rows.kv_rows_T)
        self.plain.prepare(rows, positions, places, self._upload)
        return rows

    def steps(self, attention: GpuAttention | GpuLatentAttention) -> Iterator[Step]:
        """Prepares both attentions for each, decodes alone as for a graph but for the last."""
        for number, body in enumerate(BODIES):
            rows = self.apply(body)
            positions, places = self._upload(rows.positions_T), self._upload(rows.kv_rows_T)
            num_padded = rows.num_rows
            if rows.chunks or number == len(BODIES) - 1:
                attention.prepare(rows, positions, places, self._upload)
            else:
                spare = torch.tensor([self.table.spare_slot, 0, NUM_PAGES * PAGE])
                decodes = torch.stack([self._upload(rows.decode_slots_B), positions, places], 1)
                padded = torch.cat([decodes, spare.to(self.device)[None]])
                attention.prepare_decodes(*(each.contiguous() for each in padded.unbind(1)))
                num_padded += 1
            yield Step(rows.num_rows, num_padded)

    def are_alike(self) -> bool:
        """All pages but the spare one hold the same."""
        pairs = zip(self.mine.parts, self.theirs.parts, strict=True)
        pairs = [(mine[:, :-1].float(), theirs[:, :-1].float()) for mine, theirs in pairs]
        return all(torch.allclose(mine, theirs, atol=1e-5) for mine, theirs in pairs)

    def _upload(self, array) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device)
