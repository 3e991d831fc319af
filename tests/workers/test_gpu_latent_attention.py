"""A GPU's attention over latents against plain torch, and chosen tokens in bounded memory."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.workers.gpu_steps import MAX_LEN, TwoCaches
from tests.workers.reference import save_tiny
from tests.workers.test_deepseek import FAMILIES, new_runner
from workers import gpu_latent_attention
from workers.batch import IndexRows, StepRows
from workers.cache import PagedCache
from workers.device_table import DeviceTable
from workers.gpu_latent_attention import CHOICE_BYTES, GpuLatentAttention, rows_at_once

NUM_ROWS, NUM_HEADS, WIDTH, NUM_VALUES, KEY_DIM, NUM_CHOSEN = 37, 2, 12, 8, 16, 5
CPU = torch.device("cpu")
pytestmark = pytest.mark.row("S13")
in_the_interpreter = pytest.mark.skipif(
    torch.cuda.is_available(), reason="the interpreter is chosen when Triton is imported"
)


@pytest.mark.parametrize("num_chosen", [None, 3, 6, 100])
def test_chunks_and_decodes_read_what_plain_torch_reads(num_chosen, device):
    """All tokens; those that an indexer chooses; all, because there are no more than it may."""
    torch.manual_seed(0)
    shapes = ((WIDTH,),) if num_chosen is None else ((WIDTH,), (KEY_DIM,))
    caches = TwoCaches(shapes, device)
    attention = GpuLatentAttention(caches.mine, caches.table, MAX_LEN, num_heads=NUM_HEADS)
    for num_rows, num_padded in caches.steps(attention):
        real = slice(0, num_rows)
        for layer in range(2):
            q = torch.randn(num_padded, NUM_HEADS, WIDTH, device=device)
            row = torch.randn(num_padded, WIDTH, device=device)
            index = real_index = None
            if num_chosen is not None:
                parts = (
                    torch.randn(num_padded, 3, KEY_DIM, device=device),
                    torch.rand(num_padded, 3, device=device),
                    torch.randn(num_padded, KEY_DIM, device=device),
                )
                index = IndexRows(*parts, num_chosen)
                real_index = IndexRows(*(part[real] for part in parts), num_chosen)
            options = {"num_values": NUM_VALUES, "scale": 0.3}
            out = attention.attend_latent(layer, q, row, index=index, **options)
            expected = caches.plain.attend_latent(
                layer, q[real], row[real], index=real_index, **options
            )
            torch.testing.assert_close(out[real], expected, rtol=1e-4, atol=1e-5)
    assert caches.are_alike()


@given(st.integers(1, 2**21 - 3 * 4096), st.integers(1, 4096))
def test_rows_at_once_are_aligned_and_fit(longest, num_chosen):
    num_rows = rows_at_once(longest, num_chosen)
    assert num_rows > 0
    assert num_rows % 16 == 0
    assert num_rows * (4 * longest + 12 * num_chosen) <= CHOICE_BYTES


def read_rows(monkeypatch) -> tuple[torch.Tensor, list[tuple[torch.Tensor, ...]]]:
    """37 rows that are not captured, each of a slot of its own; what each launch was given."""
    launches = []
    latent_rows = gpu_latent_attention.latent_rows

    def watched(*tensors, **options):
        launches.append((*tensors, options["chosen_TK"]))
        latent_rows(*tensors, **options)

    monkeypatch.setattr(gpu_latent_attention, "latent_rows", watched)
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
    attention = GpuLatentAttention(cache, table, 32, num_heads=NUM_HEADS)
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


@in_the_interpreter
def test_rows_in_blocks_read_what_they_read_together_and_begin_aligned(monkeypatch):
    """A pointer that is not aligned as the first was has Triton compile a kernel in service."""
    whole, [launch] = read_rows(monkeypatch)
    assert len(launch[-1]) == NUM_ROWS
    monkeypatch.setattr(gpu_latent_attention, "CHOICE_BYTES", 17 * (4 * 21 + 12 * NUM_CHOSEN))
    cut, launches = read_rows(monkeypatch)
    assert [len(launch[-1]) for launch in launches] == [16, 16, 5]
    assert all(tensor.data_ptr() % 16 == 0 for launch in launches for tensor in launch)
    torch.testing.assert_close(cut, whole)


@in_the_interpreter
@pytest.mark.parametrize(("family", "expected"), [("v3", 0), ("v3.2", CHOICE_BYTES)])
def test_room_for_the_choice_is_kept_free_where_there_is_an_indexer(family, expected, tmp_path):
    name, changes = FAMILIES[family]
    save_tiny(tmp_path, name, **changes)
    assert new_runner(tmp_path, use_kernels=True)._steps.unmeasured_bytes == expected
