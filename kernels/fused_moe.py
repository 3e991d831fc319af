"""The experts of a sparse layer applied to the rows that chose them; the host never asks who did.

Four launches: list each expert's choices; gate and up products of the lists, with silu; down
products, times the choice's weight; the sum over a row's choices. The products are tiles of rows
of one expert. Which tile is which expert's is worked out by each program from the counts, so the
grid depends on the number of rows only and the step can be captured in a CUDA graph.

    experts [[0, 2], [2, 1]] of two rows, choices numbered 0 to 3:
    lists 0: [0], 1: [3], 2: [1, 2];   tiles of one row, 0 to 3, are of experts 0, 1, 2, 2

When to use: on a GPU, for any number of rows. Choices of experts outside `first` to
`first + num_real` (other ranks', or none) add nothing.

Shapes: T rows, D model width, K choices of a row, N = T * K choices, E experts here, I columns of
an expert.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from kernels.expert_tiles import RULE, Tile, TileTable
from kernels.launch import begin, has_pdl, refuse_unless

LIST_BLOCK = 1024


@triton.jit(do_not_specialize=["num_choices", "first"])
def _list_kernel(
    expert_ptr,
    list_ptr,
    count_ptr,
    first,
    num_choices,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    local = tl.program_id(0)
    begin(PDL)
    target = list_ptr + local.to(tl.int64) * num_choices
    count = 0
    for at in range(0, num_choices, BLOCK):
        choices = at + tl.arange(0, BLOCK)
        experts = tl.load(expert_ptr + choices, mask=choices < num_choices, other=-1)
        mine = (experts == local + first).to(tl.int32)
        places = count + tl.cumsum(mine, axis=0) - 1
        tl.store(target + places, choices, mask=mine == 1)
        count += tl.sum(mine, axis=0)
    tl.store(count_ptr + local, count)


@triton.jit
def _tile_of(count_ptr, tile, num_experts, ROWS: tl.constexpr, EXPERTS: tl.constexpr):
    """(expert, first row in its list, rows of the list) of a tile; expert num_experts for none."""
    experts = tl.arange(0, EXPERTS)
    counts = tl.load(count_ptr + experts, mask=experts < num_experts, other=0)
    tiles = (counts + ROWS - 1) // ROWS
    ends = tl.cumsum(tiles, axis=0)
    expert = tl.sum((ends <= tile).to(tl.int32), axis=0)
    here = experts == expert
    start = tile - tl.sum(tl.where(here, ends - tiles, 0), axis=0)
    return expert, start * ROWS, tl.sum(tl.where(here, counts, 0), axis=0)


@triton.jit(do_not_specialize=["num_choices"])
def _gate_up_kernel(
    x_ptr,
    weight_ptr,
    list_ptr,
    count_ptr,
    out_ptr,
    num_experts,
    num_choices,
    num_chosen,
    width,
    inner,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    INNER: tl.constexpr,
    EXPERTS: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    expert, first, count = _tile_of(count_ptr, tl.program_id(1), num_experts, ROWS, EXPERTS)
    if expert >= num_experts:
        return
    rows = first + tl.arange(0, ROWS)
    in_list = rows < count
    choices = tl.load(
        list_ptr + expert.to(tl.int64) * num_choices + rows, mask=in_list, other=0
    ).to(tl.int64)
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
    in_width = cols < width
    inners = tl.arange(0, INNER)
    x_rows = x_ptr + (choices // num_chosen)[:, None] * inner
    weight = weight_ptr + expert.to(tl.int64) * 2 * width * inner
    gates = weight + cols.to(tl.int64)[None, :] * inner
    ups = gates + width * inner
    gate = tl.zeros((ROWS, COLS), tl.float32)
    up = tl.zeros((ROWS, COLS), tl.float32)
    for at in tl.range(0, inner, INNER, num_stages=STAGES):
        k = at + inners
        in_inner = k < inner
        x = tl.load(x_rows + k[None, :], mask=in_list[:, None] & in_inner[None, :], other=0.0)
        inside = in_inner[:, None] & in_width[None, :]
        gate_weight = tl.load(gates + k[:, None], mask=inside, other=0.0)
        up_weight = tl.load(ups + k[:, None], mask=inside, other=0.0)
        gate = tl.dot(x, gate_weight, gate, input_precision=PRECISION)
        up = tl.dot(x, up_weight, up, input_precision=PRECISION)
    out = gate / (1.0 + tl.exp(-gate)) * up
    inside = in_list[:, None] & in_width[None, :]
    tl.store(out_ptr + choices[:, None] * width + cols[None, :], out, mask=inside)


@triton.jit(do_not_specialize=["num_choices"])
def _down_kernel(
    x_ptr,
    weight_ptr,
    list_ptr,
    count_ptr,
    share_ptr,
    out_ptr,
    num_experts,
    num_choices,
    width,
    inner,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    INNER: tl.constexpr,
    EXPERTS: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    begin(PDL)
    expert, first, count = _tile_of(count_ptr, tl.program_id(1), num_experts, ROWS, EXPERTS)
    if expert >= num_experts:
        return
    rows = first + tl.arange(0, ROWS)
    in_list = rows < count
    choices = tl.load(
        list_ptr + expert.to(tl.int64) * num_choices + rows, mask=in_list, other=0
    ).to(tl.int64)
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
    in_width = cols < width
    inners = tl.arange(0, INNER)
    x_rows = x_ptr + choices[:, None] * inner
    weights = weight_ptr + (expert.to(tl.int64) * width + cols.to(tl.int64))[None, :] * inner
    out = tl.zeros((ROWS, COLS), tl.float32)
    for at in tl.range(0, inner, INNER, num_stages=STAGES):
        k = at + inners
        in_inner = k < inner
        x = tl.load(x_rows + k[None, :], mask=in_list[:, None] & in_inner[None, :], other=0.0)
        weight = tl.load(
            weights + k[:, None], mask=in_inner[:, None] & in_width[None, :], other=0.0
        )
        out = tl.dot(x, weight, out, input_precision=PRECISION)
    share = tl.load(share_ptr + choices, mask=in_list, other=0.0).to(tl.float32)
    inside = in_list[:, None] & in_width[None, :]
    tl.store(out_ptr + choices[:, None] * width + cols[None, :], out * share[:, None], mask=inside)


@triton.jit
def _sum_kernel(
    x_ptr,
    expert_ptr,
    out_ptr,
    first,
    num_experts,
    num_chosen,
    width,
    CHOSEN: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    in_width = cols < width
    places = tl.arange(0, CHOSEN)
    begin(PDL)
    experts = tl.load(expert_ptr + row * num_chosen + places, mask=places < num_chosen, other=-1)
    mine = (experts >= first) & (experts < first + num_experts) & (places < num_chosen)
    x = tl.load(
        x_ptr + (row * num_chosen + places)[:, None] * width + cols[None, :],
        mask=mine[:, None] & in_width[None, :],
        other=0.0,
    )
    tl.store(out_ptr + row * width + cols, tl.sum(x.to(tl.float32), axis=0), mask=in_width)


def fused_moe(
    x_TD: Tensor,
    weight_TK: Tensor,
    expert_TK: Tensor,
    gate_up_END: Tensor,
    down_EDI: Tensor,
    *,
    first: int,
    num_real: int,
    table: TileTable = RULE,
    out: Tensor | None = None,
) -> Tensor:
    """The sum of each row's experts, weighted; (T, D). `gate_up_END` has gates above ups.

    `table` says how the products are cut; see `kernels.expert_tiles`.
    """
    num_rows, hidden = x_TD.shape
    num_chosen, width = expert_TK.shape[1], down_EDI.shape[2]
    refuse_unless(
        gate_up_END.shape[1:] == (2 * width, hidden) and down_EDI.shape[1] == hidden,
        lambda: (
            f"x {tuple(x_TD.shape)}, gate_up {tuple(gate_up_END.shape)} and down "
            f"{tuple(down_EDI.shape)} do not belong together"
        ),
    )
    refuse_unless(
        weight_TK.shape == expert_TK.shape == (num_rows, num_chosen),
        lambda: (
            f"{num_rows} rows come with weights {tuple(weight_TK.shape)} and experts "
            f"{tuple(expert_TK.shape)}"
        ),
    )
    refuse_unless(num_real <= len(gate_up_END), lambda: f"{num_real} experts of {len(gate_up_END)}")
    tensors = (x_TD, weight_TK, expert_TK, gate_up_END, down_EDI)
    refuse_unless(all(each.is_contiguous() for each in tensors), "all tensors must be contiguous")
    out_TD = torch.empty_like(x_TD) if out is None else out
    refuse_unless(
        out_TD.shape == x_TD.shape and out_TD.dtype == x_TD.dtype and out_TD.is_contiguous(),
        lambda: f"out {tuple(out_TD.shape)} must be contiguous and like x {tuple(x_TD.shape)}",
    )
    if num_rows == 0 or num_real == 0:
        return out_TD.zero_()
    num_choices = num_rows * num_chosen
    gate_up, down = table.choose(num_choices, num_real)
    device, pdl = x_TD.device, has_pdl(x_TD)
    list_EN = torch.empty(num_real, num_choices, dtype=torch.int32, device=device)
    count_E = torch.empty(num_real, dtype=torch.int32, device=device)
    gated_NI = x_TD.new_empty(num_choices, width)
    out_ND = x_TD.new_empty(num_choices, hidden)
    precision = "ieee" if x_TD.dtype == torch.float32 else "tf32"
    experts = triton.next_power_of_2(num_real)
    _list_kernel[(num_real,)](
        expert_TK,
        list_EN,
        count_E,
        first,
        num_choices,
        BLOCK=LIST_BLOCK,
        PDL=pdl,
        num_warps=4,
        launch_pdl=pdl,
    )
    _gate_up_kernel[_grid(width, gate_up, num_choices, num_real)](
        x_TD,
        gate_up_END,
        list_EN,
        count_E,
        gated_NI,
        num_real,
        num_choices,
        num_chosen,
        width,
        hidden,
        ROWS=gate_up.rows,
        COLS=gate_up.cols,
        INNER=gate_up.inner,
        EXPERTS=experts,
        STAGES=gate_up.num_stages,
        PRECISION=precision,
        PDL=pdl,
        num_warps=gate_up.num_warps,
        launch_pdl=pdl,
    )
    _down_kernel[_grid(hidden, down, num_choices, num_real)](
        gated_NI,
        down_EDI,
        list_EN,
        count_E,
        weight_TK,
        out_ND,
        num_real,
        num_choices,
        hidden,
        width,
        ROWS=down.rows,
        COLS=down.cols,
        INNER=down.inner,
        EXPERTS=experts,
        STAGES=down.num_stages,
        PRECISION=precision,
        PDL=pdl,
        num_warps=down.num_warps,
        launch_pdl=pdl,
    )
    block = min(1024, triton.next_power_of_2(hidden))
    _sum_kernel[(num_rows, triton.cdiv(hidden, block))](
        out_ND,
        expert_TK,
        out_TD,
        first,
        num_real,
        num_chosen,
        hidden,
        CHOSEN=triton.next_power_of_2(num_chosen),
        BLOCK=block,
        PDL=pdl,
        num_warps=4,
        launch_pdl=pdl,
    )
    return out_TD


def _grid(width: int, tile: Tile, num_choices: int, num_experts: int) -> tuple[int, int]:
    """Programs for the most tiles that so many choices can form."""
    num_tiles = min(num_choices, num_experts + num_choices // tile.rows)
    return triton.cdiv(width, tile.cols), num_tiles


def fused_moe_reference(
    x_TD: Tensor,
    weight_TK: Tensor,
    expert_TK: Tensor,
    gate_up_END: Tensor,
    down_EDI: Tensor,
    *,
    first: int,
    num_real: int,
) -> Tensor:
    """What `fused_moe` must equal: one choice after another."""
    out_TD = torch.zeros_like(x_TD, dtype=torch.float32)
    for row, experts in enumerate(expert_TK.tolist()):
        for place, expert in enumerate(experts):
            local = expert - first
            if 0 <= local < num_real:
                gate, up = functional.linear(x_TD[row].float(), gate_up_END[local].float()).chunk(2)
                y = functional.linear(functional.silu(gate) * up, down_EDI[local].float())
                out_TD[row] += weight_TK[row, place].float() * y
    return out_TD.to(x_TD.dtype)
