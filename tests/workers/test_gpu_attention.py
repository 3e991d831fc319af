"""A GPU's attention over keys and values of heads against plain torch, step by step."""

import pytest
import torch

from kernels.fp8 import NO_SCALES, Scales
from kernels.rope_rows import rope_rows_reference
from tests.workers.gpu_steps import NUM_SLOTS, TwoCaches
from workers.gpu_attention import GpuAttention

pytestmark = pytest.mark.row("S13")

NUM_HEADS, NUM_KV_HEADS, DIM, EPS = 6, 2, 16, 1e-6
WINDOWS = (None, 3)
"""By layer: the decodes of a step are cut once for each."""


@pytest.mark.parametrize("scales", [NO_SCALES, Scales(0.03, 0.7)], ids=["plain", "e4m3"])
@pytest.mark.parametrize("is_projection", [False, True], ids=["heads", "projection"])
def test_chunks_and_decodes_read_what_plain_torch_reads(is_projection, scales, device):
    torch.manual_seed(0)
    caches = TwoCaches(((NUM_KV_HEADS, DIM),) * 2, device, scales)
    attention = GpuAttention(caches.mine, caches.table, max_decodes=NUM_SLOTS + 1)
    norm = torch.rand(NUM_HEADS + NUM_KV_HEADS, DIM, device=device)
    for num_rows, num_padded in caches.steps(attention):
        for layer, window in enumerate(WINDOWS):
            options = {"scale": 0.3, "sliding_window": window}
            qkv = torch.randn(num_padded, NUM_HEADS + 2 * NUM_KV_HEADS, DIM, device=device)
            turned = qkv
            if is_projection:
                angle = torch.rand(num_padded, DIM // 2, device=device)
                rotation = torch.stack((angle.cos(), -angle.sin(), angle.sin()), 1)
                out = attention.attend_projection(layer, qkv, norm, rotation, eps=EPS, **options)
                turned = torch.empty_like(qkv)
                rope_rows_reference(qkv, norm, rotation, turned, num_rotated=len(norm), eps=EPS)
            q, k, v = turned.split((NUM_HEADS, NUM_KV_HEADS, NUM_KV_HEADS), 1)
            if not is_projection:
                out = attention.attend(layer, q, k, v, **options)
            real = slice(0, num_rows)
            expected = caches.plain.attend(layer, q[real], k[real], v[real], **options)
            torch.testing.assert_close(out[real], expected, rtol=1e-4, atol=1e-5)
    assert caches.are_alike()
