"""A router's choice: the likeliest experts of each row, and what each counts.

    probs = softmax(logits);   the K highest, highest first, the lowest number first among equals;
    with `normalise` their probabilities are divided by their sum

`count_choices` adds up how often each expert was chosen, and takes padding's choices away.

When to use: on a GPU, for up to 1024 experts. One launch, where torch takes five.

Shapes: T rows, E experts, K chosen.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import begin, has_pdl, refuse_unless

MAX_EXPERTS = 1024


@triton.jit
def _route_kernel(
    logits_ptr,
    weight_ptr,
    expert_ptr,
    num_experts,
    CHOSEN: tl.constexpr,
    CHOSEN_PAD: tl.constexpr,
    NORMALISE: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    experts = tl.arange(0, BLOCK)
    places = tl.arange(0, CHOSEN_PAD)
    inside = experts < num_experts
    begin(PDL)
    logits = tl.load(logits_ptr + row * num_experts + experts, mask=inside, other=float("-inf"))
    logits = logits.to(tl.float32)
    powers = tl.exp(logits - tl.max(logits, axis=0))
    left = tl.where(inside, powers / tl.sum(powers, axis=0), -1.0)
    weights = tl.zeros((CHOSEN_PAD,), tl.float32)
    chosen = tl.zeros((CHOSEN_PAD,), tl.int32)
    for place in tl.static_range(CHOSEN):
        value, best = tl.max(left, axis=0, return_indices=True)
        weights = tl.where(places == place, value, weights)
        chosen = tl.where(places == place, best, chosen)
        left = tl.where(experts == best, -1.0, left)
    if NORMALISE:
        weights = weights / tl.sum(weights, axis=0)
    inside = places < CHOSEN
    tl.store(weight_ptr + row * CHOSEN + places, weights, mask=inside)
    tl.store(expert_ptr + row * CHOSEN + places, chosen.to(tl.int64), mask=inside)


@triton.jit(do_not_specialize=["num_choices"])
def _count_kernel(
    expert_ptr,
    count_ptr,
    live_ptr,
    num_choices,
    none,
    CHOSEN: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    choices = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = choices < num_choices
    begin(PDL)
    experts = tl.load(expert_ptr + choices, mask=inside, other=0)
    if MASKED:
        live = tl.load(live_ptr + choices // CHOSEN, mask=inside, other=0)
        experts = tl.where(live != 0, experts, none)
        tl.store(expert_ptr + choices, experts, mask=inside)
    one = tl.full((BLOCK,), 1, tl.int64)
    tl.atomic_add(count_ptr + experts, one, mask=inside, sem="relaxed")


def route_experts(logits_TE: Tensor, num_chosen: int, *, normalise: bool) -> tuple[Tensor, Tensor]:
    """(weights in the logits' type, experts as int64), (T, K) each."""
    num_rows, num_experts = logits_TE.shape
    refuse_unless(logits_TE.is_contiguous(), "logits must be contiguous")
    refuse_unless(
        0 < num_chosen <= num_experts <= MAX_EXPERTS,
        f"{num_chosen} of {num_experts} experts; there may be up to {MAX_EXPERTS}",
    )
    weight_TK = logits_TE.new_empty(num_rows, num_chosen)
    expert_TK = torch.empty(num_rows, num_chosen, dtype=torch.int64, device=logits_TE.device)
    if num_rows == 0:
        return weight_TK, expert_TK
    pdl = has_pdl(logits_TE)
    _route_kernel[(num_rows,)](
        logits_TE,
        weight_TK,
        expert_TK,
        num_experts,
        CHOSEN=num_chosen,
        CHOSEN_PAD=triton.next_power_of_2(num_chosen),
        NORMALISE=normalise,
        BLOCK=triton.next_power_of_2(num_experts),
        PDL=pdl,
        num_warps=1,
        launch_pdl=pdl,
    )
    return weight_TK, expert_TK


def count_choices(expert_TK: Tensor, counts_E: Tensor, live_T: Tensor | None = None) -> None:
    """Add to int64 `counts_E` how often each expert is in `expert_TK`; its last place counts none.

    Rows that are not `live` (bool) choose none from here on: `expert_TK` is changed in place.
    """
    refuse_unless(
        expert_TK.is_contiguous() and counts_E.dtype == torch.int64,
        "choices must be contiguous and counts int64",
    )
    refuse_unless(
        live_T is None or (live_T.is_contiguous() and live_T.shape == expert_TK.shape[:1]),
        f"which of {len(expert_TK)} rows are live must be said of each",
    )
    num_choices = expert_TK.numel()
    if num_choices == 0:
        return
    pdl = has_pdl(expert_TK)
    _count_kernel[(triton.cdiv(num_choices, 256),)](
        expert_TK,
        counts_E,
        counts_E if live_T is None else live_T.view(torch.uint8),
        num_choices,
        len(counts_E) - 1,
        CHOSEN=expert_TK.shape[1],
        MASKED=live_T is not None,
        BLOCK=256,
        PDL=pdl,
        num_warps=4,
        launch_pdl=pdl,
    )


def route_experts_reference(
    logits_TE: Tensor, num_chosen: int, *, normalise: bool
) -> tuple[Tensor, Tensor]:
    """What `route_experts` must equal, in plain torch."""
    probs_TE = logits_TE.softmax(dim=-1, dtype=torch.float32)
    order_TE = probs_TE.sort(dim=-1, descending=True, stable=True)
    weight_TK, expert_TK = order_TE.values[:, :num_chosen], order_TE.indices[:, :num_chosen]
    if normalise:
        weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True)
    return weight_TK.to(logits_TE.dtype), expert_TK
