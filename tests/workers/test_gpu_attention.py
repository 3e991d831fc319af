"""Attention over chosen tokens: rows in blocks, in bounded memory. In Triton's interpreter."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.workers.reference import save_tiny
from tests.workers.test_deepseek import FAMILIES, new_runner
from workers import gpu_attention
from workers.batch import IndexRows, StepRows
from workers.cache import PagedCache
from workers.gpu_attention import CHOICE_BYTES, DeviceTable, GpuAttention, rows_at_once

NUM_ROWS, NUM_HEADS, WIDTH, NUM_VALUES, KEY_DIM, NUM_CHOSEN = 37, 2, 12, 8, 16, 5
CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the interpreter is chosen when Triton is imported"
)


@given(st.integers(1, 2**21 - 3 * 4096), st.integers(1, 4096))
def test_rows_at_once_are_aligned_and_fit(longest, num_chosen):
    num_rows = rows_at_once(longest, num_chosen)
    assert num_rows > 0
    assert num_rows % 16 == 0
    assert num_rows * (4 * longest + 12 * num_chosen) <= CHOICE_BYTES


def read_rows(monkeypatch) -> tuple[torch.Tensor, list[tuple[torch.Tensor, ...]]]:
    """37 rows that are not captured, each of a slot of its own; what each launch was given."""
    launches = []
    latent_rows = gpu_attention.latent_rows

    def watched(*tensors, **options):
        launches.append((*tensors, options["chosen_TK"]))
        latent_rows(*tensors, **options)

    monkeypatch.setattr(gpu_attention, "latent_rows", watched)
    torch.manual_seed(0)
    num_pages = 2 * NUM_ROWS
    cache = PagedCache(
        1, ((WIDTH,), (KEY_DIM,)), num_pages=num_pages + 1, page_size=16, dtype=torch.float32,
        device=CPU,
    )  # fmt: skip
    for part in cache.parts:
        part.normal_()
    table = DeviceTable(NUM_ROWS, 2, num_pages, CPU)
    table.table_SN[:NUM_ROWS] = torch.arange(num_pages, dtype=torch.int32).view(-1, 2)
    attention = GpuAttention(cache, table, 32, num_heads=NUM_HEADS, max_decodes=NUM_ROWS)
    slots = np.arange(NUM_ROWS)
    positions = np.full(NUM_ROWS, 20)
    places = 32 * slots + 20
    rows = StepRows(slots, (), positions, places, slots, slots, ())
    attention.prepare(rows, torch.from_numpy(positions), torch.from_numpy(places), torch.from_numpy)
    index = IndexRows(
        torch.randn(NUM_ROWS, 3, KEY_DIM), torch.rand(NUM_ROWS, 3),
        torch.randn(NUM_ROWS, KEY_DIM), NUM_CHOSEN,
    )  # fmt: skip
    out = attention.attend_latent(
        0, torch.randn(NUM_ROWS, NUM_HEADS, WIDTH), torch.randn(NUM_ROWS, WIDTH),
        num_values=NUM_VALUES, scale=0.3, index=index,
    )  # fmt: skip
    return out, launches


def test_rows_in_blocks_read_what_they_read_together_and_begin_aligned(monkeypatch):
    """A pointer that is not aligned as the first was has Triton compile a kernel in service."""
    whole, [launch] = read_rows(monkeypatch)
    assert len(launch[-1]) == NUM_ROWS
    monkeypatch.setattr(gpu_attention, "CHOICE_BYTES", 17 * (4 * 21 + 12 * NUM_CHOSEN))
    cut, launches = read_rows(monkeypatch)
    assert [len(launch[-1]) for launch in launches] == [16, 16, 5]
    assert all(tensor.data_ptr() % 16 == 0 for launch in launches for tensor in launch)
    torch.testing.assert_close(cut, whole)


@pytest.mark.parametrize(("family", "expected"), [("v3", 0), ("v3.2", CHOICE_BYTES)])
def test_room_for_the_choice_is_kept_free_where_there_is_an_indexer(family, expected, tmp_path):
    name, changes = FAMILIES[family]
    save_tiny(tmp_path, name, **changes)
    assert new_runner(tmp_path, use_kernels=True)._attention.unmeasured_bytes == expected
