"""Kernels that take one row at a time: norms, gates, rotation, argmax, products of few rows."""

import pytest
import torch

from kernels.decode_rows import Rows, close_rows, likeliest, likeliest_reference, open_rows
from kernels.latent_prepare import latent_keys, turn_queries, turned_reference
from kernels.narrow_linear import Tiles, narrow_linear, narrow_linear_reference
from kernels.rms_norm import add_rms_norm, add_rms_norm_reference, rms_norm, rms_norm_reference
from kernels.rope_rows import rope_rows, rope_rows_reference
from kernels.rope_store import rope_store, rope_store_reference
from kernels.silu_multiply import silu_multiply, silu_multiply_reference
from kernels.skinny_linear import skinny_linear, skinny_linear_reference

DTYPES = [torch.float32, torch.bfloat16]


def numbers(*shape: int, dtype: torch.dtype, device: str, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device, dtype)


def assert_near(actual: torch.Tensor, expected: torch.Tensor) -> None:
    # Triton's interpreter truncates to bfloat16 where a GPU rounds.
    tolerance = 2e-2 if actual.dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_rows", "num_cols"), [(1, 16), (3, 33), (5, 1024), (2, 3000)])
def test_norms_equal_their_references(num_rows, num_cols, dtype, device):
    x = numbers(num_rows, num_cols, dtype=dtype, device=device)
    residual = numbers(num_rows, num_cols, dtype=dtype, device=device, seed=1)
    weight = numbers(num_cols, dtype=dtype, device=device, seed=2)
    assert_near(rms_norm(x, weight, eps=1e-6), rms_norm_reference(x, weight, eps=1e-6))
    mine, theirs = residual.clone(), residual.clone()
    out = add_rms_norm(x, mine, weight, eps=1e-6)
    assert_near(out, add_rms_norm_reference(x, theirs, weight, eps=1e-6))
    assert_near(mine, theirs)
    place = torch.empty_like(out)
    assert add_rms_norm(x, residual.clone(), weight, eps=1e-6, out=place) is place
    assert torch.equal(place, out)


def test_a_norm_refuses_what_does_not_fit(device):
    x = torch.zeros(2, 4, device=device)
    with pytest.raises(ValueError, match="must be"):
        rms_norm(x, torch.ones(5, device=device), eps=1e-6)
    with pytest.raises(ValueError, match="contiguous"):
        rms_norm(torch.zeros(4, 2, device=device).T, torch.ones(4, device=device), eps=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_rows", "width"), [(1, 1), (3, 24), (2, 1500)])
def test_the_gate_equals_its_reference(num_rows, width, dtype, device):
    gate_up = numbers(num_rows, 2 * width, dtype=dtype, device=device)
    assert_near(silu_multiply(gate_up), silu_multiply_reference(gate_up))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_norm", [True, False])
@pytest.mark.parametrize(
    ("num_rows", "num_heads", "num_kv_heads", "dim"), [(1, 1, 1, 2), (3, 4, 2, 16), (2, 20, 10, 12)]
)
def test_rope_and_store_equal_their_reference(
    num_rows, num_heads, num_kv_heads, dim, with_norm, dtype, device
):
    options = {"dtype": dtype, "device": device}
    qkv = numbers(num_rows, num_heads + 2 * num_kv_heads, dim, **options)
    norm = numbers(num_heads + num_kv_heads, dim, seed=1, **options) if with_norm else None
    angle = torch.rand(num_rows, dim // 2)
    rotation = torch.stack((angle.cos(), -angle.sin(), angle.sin()), 1).to(device, dtype)
    places = torch.tensor([7, 0, 3], device=device)[:num_rows]
    mine = torch.zeros(2, 9, num_kv_heads, dim, **options)
    theirs = torch.zeros_like(mine)
    q = rope_store(qkv, norm, rotation, places, mine[0], mine[1], eps=1e-6)
    expected = rope_store_reference(qkv, norm, rotation, places, theirs[0], theirs[1], eps=1e-6)
    assert_near(q, expected)
    assert_near(mine, theirs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_norm", [True, False])
@pytest.mark.parametrize(
    ("num_rows", "num_heads", "num_rotated", "dim"),
    [(1, 1, 1, 2), (3, 4, 2, 16), (2, 20, 10, 12), (2, 9, 9, 6), (0, 2, 1, 4)],
)
def test_heads_are_rotated_or_copied_as_in_the_reference(
    num_rows, num_heads, num_rotated, dim, with_norm, dtype, device
):
    options = {"dtype": dtype, "device": device}
    x = numbers(num_rows, num_heads, dim, **options)
    norm = numbers(num_rotated, dim, seed=1, **options) if with_norm else None
    angle = torch.rand(num_rows, dim // 2)
    rotation = torch.stack((angle.cos(), -angle.sin(), angle.sin()), 1).to(device, dtype)
    mine, theirs = torch.zeros_like(x), torch.zeros_like(x)
    options = {"num_rotated": num_rotated, "eps": 1e-6}
    rope_rows(x, norm, rotation, mine, **options)
    rope_rows_reference(x, norm, rotation, theirs, **options)
    assert_near(mine, theirs)
    assert torch.equal(mine[:, num_rotated:], x[:, num_rotated:])


def test_more_heads_than_there_are_cannot_be_rotated(device):
    x = torch.zeros(1, 2, 4, device=device)
    rotation = torch.zeros(1, 3, 2, device=device)
    with pytest.raises(ValueError, match="3 heads of"):
        rope_rows(x, None, rotation, torch.zeros_like(x), num_rotated=3, eps=0.0)


def test_the_rotation_of_the_docstring(device):
    qkv = torch.tensor([1.0, 2.0, 0.0, 0.0, 0.0, 0.0], device=device).view(1, 3, 2)
    rotation = torch.tensor([0.6, -0.8, 0.8], device=device).view(1, 3, 1)
    cache = torch.zeros(2, 1, 1, 2, device=device)
    places = torch.zeros(1, dtype=torch.int64, device=device)
    q = rope_store(qkv, None, rotation, places, cache[0], cache[1], eps=0.0)
    torch.testing.assert_close(q.flatten().tolist(), [-1.0, 2.0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("vocab_size", [1, 97, 4096, 9001])
def test_the_likeliest_id_is_the_lowest_of_the_highest(vocab_size, device):
    logits = numbers(4, vocab_size, dtype=torch.float32, device=device).round()
    logits[1] = 2.0
    logits[2, vocab_size // 2] = float("nan")
    logits[3] = float("-inf")
    value, token = likeliest(logits)
    expected_value, expected_token = likeliest_reference(logits)
    assert value.tolist() == expected_value.tolist()
    assert token.tolist() == expected_token.tolist()
    assert token[1] == 0
    assert not value[2].isfinite()
    assert not value[3].isfinite()


def test_rows_are_opened_and_closed(device):
    spare = 3
    rows = Rows(
        slots_B=torch.tensor([2, 0, spare], device=device),
        positions_B=torch.tensor([9, 3, 0], device=device),
        last_token_S=torch.tensor([10, 11, 12, 13], device=device),
        turn_1=torch.tensor([4], dtype=torch.int32, device=device),
        ring_R2B=torch.zeros(3, 2, 8, dtype=torch.int32, device=device),
        spare_slot=spare,
    )
    table = torch.tensor([[5, 6, 7], [0, 0, 0], [8, 1, 4], [9, 9, 9]], dtype=torch.int32)
    ids, places = open_rows(rows, table.to(device), page_size=4)
    assert ids.tolist() == [12, 10, 13]
    assert places.tolist() == [4 * 4 + 1, 5 * 4 + 3, 9 * 4]
    assert rows.turn_1.item() == 5
    logits = torch.zeros(3, 20, device=device)
    logits[0, 17], logits[1, 4], logits[2, 6] = 1.5, 2.5, 3.5
    close_rows(logits, rows)
    assert rows.positions_B.tolist() == [10, 4, 0]
    assert rows.last_token_S.tolist() == [4, 11, 17, 6]
    assert rows.ring_R2B[5 % 3, 0, :3].tolist() == [17, 4, 6]
    assert rows.ring_R2B[5 % 3, 1, :3].view(torch.float32).tolist() == [1.5, 2.5, 3.5]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("num_rows", "num_in", "num_out"), [(1, 16, 6), (2, 33, 10), (1, 3000, 4)])
def test_a_skinny_product_equals_its_reference(num_rows, num_in, num_out, gated, dtype, device):
    x = numbers(num_rows, num_in, dtype=dtype, device=device)
    weight = numbers(num_out, num_in, dtype=dtype, device=device, seed=1) / num_in**0.5
    bias = numbers(num_out, dtype=dtype, device=device, seed=2)
    out = skinny_linear(x, weight, bias, gated=gated)
    assert_near(out, skinny_linear_reference(x, weight, bias, gated=gated))
    out = skinny_linear(x, weight, gated=gated, tile=64)
    assert_near(out, skinny_linear_reference(x, weight, gated=gated))


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize(("num_rows", "num_in", "num_out"), [(3, 40, 20), (17, 200, 70)])
def test_a_narrow_product_equals_its_reference(num_rows, num_in, num_out, splits, device):
    x = numbers(num_rows, num_in, dtype=torch.float32, device=device)
    weight = numbers(num_out, num_in, dtype=torch.float32, device=device, seed=1) / num_in**0.5
    tiles = Tiles(64, 32, splits, 2, 4)
    out = narrow_linear(x, weight, tiles=tiles)
    assert_near(out, narrow_linear_reference(x, weight))
    place = torch.empty_like(out)
    assert narrow_linear(x, weight, tiles=tiles, out=place) is place
    assert torch.equal(place, out)


def rotation_of(num_rows: int, half: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    angle = numbers(num_rows, half, dtype=torch.float32, device=device, seed=9)
    return torch.stack((angle.cos(), -angle.sin(), angle.sin()), 1).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("num_query", "rank", "half"), [(0, 16, 1), (24, 20, 5), (100, 64, 32)])
def test_latents_and_keys_equal_their_reference(num_query, rank, half, interleaved, dtype, device):
    kind = {"dtype": dtype, "device": device}
    x = numbers(3, num_query + rank + 2 * half, **kind)
    query_norm = numbers(num_query, **kind, seed=1) if num_query else None
    latent_norm = numbers(rank, **kind, seed=2)
    rotation = rotation_of(3, half, dtype, device)
    query, row = latent_keys(
        x, query_norm, latent_norm, rotation, eps=1e-6, interleaved=interleaved
    )
    parts = x.split((num_query, rank, 2 * half), 1)
    if query_norm is None:
        assert query is None
    else:
        assert_near(query, rms_norm_reference(parts[0], query_norm, eps=1e-6))
    assert_near(row[:, :rank], rms_norm_reference(parts[1], latent_norm, eps=1e-6))
    turned = turned_reference(parts[2].unsqueeze(1), rotation, interleaved=interleaved)
    assert_near(row[:, rank:], turned.squeeze(1))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("num_heads", "half"), [(1, 1), (5, 3), (33, 32)])
def test_queries_are_turned_and_the_rest_is_left_alone(num_heads, half, interleaved, device):
    kind = {"dtype": torch.float32, "device": device}
    x, q = (
        numbers(2, num_heads, 7 + 2 * half, **kind),
        torch.ones(2, num_heads, 9 + 2 * half, **kind),
    )
    rotation = rotation_of(2, half, torch.float32, device)
    turn_queries(x, rotation, q, interleaved=interleaved)
    assert (q[..., :9] == 1).all()
    assert_near(q[..., 9:], turned_reference(x[..., 7:], rotation, interleaved=interleaved))


def test_latents_of_another_width_are_refused(device):
    rotation = rotation_of(1, 2, torch.float32, device)
    with pytest.raises(ValueError, match="rows of 11 are not 0 for queries, 8 and 4 rotated"):
        latent_keys(
            torch.zeros(1, 11, device=device), None, torch.ones(8, device=device), rotation,
            eps=1e-6, interleaved=True,
        )  # fmt: skip
