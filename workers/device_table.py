"""The slots' page lists on a GPU, where kernels look them up.

A `DeviceTable` mirrors `BatchState.page_table_SN` by what changed, so a step that nobody joins and
that grows no page uploads nothing. It has one slot more than there are requests: the spare one,
whose page is nobody's, for the rows that fill a captured step up.

Shapes: S slots, N pages of a slot.
"""

from collections.abc import Sequence

import numpy as np
import torch

from parallel.dp_attention import Upload
from workers.batch import TableChange


class DeviceTable:
    """`spare_slot` has `spare_page` for its only page."""

    def __init__(
        self, num_slots: int, num_pages_a_slot: int, spare_page: int, device: torch.device
    ) -> None:
        shape = (num_slots + 1, num_pages_a_slot)
        self.table_SN = torch.zeros(shape, dtype=torch.int32, device=device)
        self.spare_slot, self.spare_page = num_slots, spare_page
        self.table_SN[num_slots] = spare_page

    def update(self, changes: Sequence[TableChange], upload: Upload) -> None:
        """Write what a step's body changed, all in one go."""
        if not changes:
            return
        width = self.table_SN.shape[1]
        places = [
            np.arange(len(change.pages)) + (change.slot * width + change.first)
            for change in changes
        ]
        pages = np.concatenate([change.pages for change in changes])
        both = np.stack([np.concatenate(places), pages]).astype(np.int64)
        places_N, pages_N = upload(both).unbind()
        self.table_SN.view(-1).index_copy_(0, places_N, pages_N.int())
