"""A router's choice: the likeliest experts of each row, and what each counts.

    probs = softmax(logits);   the K highest, highest first, the lowest number first among equals;
    with `normalise` their probabilities are divided by their sum

`route_groups` is DeepSeek's: neighbouring experts form groups, and a row chooses in its best ones.

    score = sigmoid(logits) (V3) or softmax(logits) (V2);   rank = score + bias, or score
    a group is worth its two highest ranks, or its highest without a bias
    the K highest ranks of the best groups;   weight = score * scale, over the sum to normalise

`count_choices` adds up how often each expert was chosen, and takes padding's choices away.

When to use: on a GPU, for up to 1024 experts. One launch, where torch takes five.

Shapes: T rows, E experts, K chosen, G groups.
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
    chosen = tl.minimum(chosen, num_experts - 1)  # whatever NaN has chosen exists
    tl.store(weight_ptr + row * CHOSEN + places, weights, mask=inside)
    tl.store(expert_ptr + row * CHOSEN + places, chosen.to(tl.int64), mask=inside)


@triton.jit
def _groups_kernel(
    logits_ptr,
    bias_ptr,
    weight_ptr,
    expert_ptr,
    num_groups,
    group_size,
    scale,
    CHOSEN: tl.constexpr,
    CHOSEN_PAD: tl.constexpr,
    GROUPS_CHOSEN: tl.constexpr,
    NORMALISE: tl.constexpr,
    BIAS: tl.constexpr,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    groups = tl.arange(0, GROUPS)
    members = tl.arange(0, SIZE)
    experts = groups[:, None] * group_size + members[None, :]
    inside = (groups < num_groups)[:, None] & (members < group_size)[None, :]
    begin(PDL)
    places = row * num_groups * group_size + experts
    logits = tl.load(logits_ptr + places, mask=inside, other=float("-inf")).to(tl.float32)
    if BIAS:
        scores = 1.0 / (1.0 + tl.exp(-logits))
        ranks = scores + tl.load(bias_ptr + experts, mask=inside, other=0.0)
    else:
        powers = tl.exp(logits - tl.max(logits))
        scores = powers / tl.sum(powers)
        ranks = scores
    ranks = tl.where(inside, ranks, float("-inf"))
    if GROUPS_CHOSEN < GROUPS:
        worth, best = tl.max(ranks, axis=1, return_indices=True)
        if BIAS:
            others = tl.where(members[None, :] == best[:, None], float("-inf"), ranks)
            second = tl.max(others, axis=1)
            worth += tl.where(second == float("-inf"), 0.0, second)
        is_open = groups < 0
        for _ in tl.static_range(GROUPS_CHOSEN):
            _, group = tl.max(worth, axis=0, return_indices=True)
            is_open = is_open | (groups == group)
            worth = tl.where(groups == group, float("-inf"), worth)
        ranks = tl.where(is_open[:, None], ranks, float("-inf"))
    left = tl.reshape(ranks, (GROUPS * SIZE,))
    score = tl.reshape(scores, (GROUPS * SIZE,))
    numbers = tl.arange(0, GROUPS * SIZE)
    slots = tl.arange(0, CHOSEN_PAD)
    weights = tl.zeros((CHOSEN_PAD,), tl.float32)
    chosen = tl.zeros((CHOSEN_PAD,), tl.int32)
    for slot in tl.static_range(CHOSEN):
        _, best = tl.max(left, axis=0, return_indices=True)
        value = tl.sum(tl.where(numbers == best, score, 0.0), axis=0)
        weights = tl.where(slots == slot, value, weights)
        chosen = tl.where(slots == slot, best // SIZE * group_size + best % SIZE, chosen)
        left = tl.where(numbers == best, float("-inf"), left)
    if NORMALISE:
        weights = weights / (tl.sum(weights, axis=0) + 1e-20)
    used = slots < CHOSEN
    chosen = tl.minimum(chosen, num_groups * group_size - 1)  # whatever NaN has chosen exists
    tl.store(weight_ptr + row * CHOSEN + slots, weights * scale, mask=used)
    tl.store(expert_ptr + row * CHOSEN + slots, chosen.to(tl.int64), mask=used)


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
        lambda: f"{num_chosen} of {num_experts} experts; there may be up to {MAX_EXPERTS}",
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


def route_groups(
    logits_TE: Tensor,
    bias_E: Tensor | None,
    num_chosen: int,
    *,
    num_groups: int,
    num_groups_chosen: int,
    normalise: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """(float32 weights, experts as int64), (T, K) each, from float32 logits.

    What it must equal, in plain torch, is `workers.layers.moe.route_in_groups`.
    """
    num_rows, num_experts = logits_TE.shape
    refuse_unless(
        logits_TE.is_contiguous() and logits_TE.dtype == torch.float32,
        "logits must be contiguous and float32",
    )
    refuse_unless(
        bias_E is None or (bias_E.shape == (num_experts,) and bias_E.dtype == torch.float32),
        lambda: f"the bias must be {num_experts} float32 numbers",
    )
    refuse_unless(
        0 < num_groups_chosen <= num_groups <= num_experts <= MAX_EXPERTS
        and num_experts % num_groups == 0
        and 0 < num_chosen <= num_experts // num_groups * num_groups_chosen,
        lambda: (
            f"{num_chosen} of {num_experts} experts in {num_groups_chosen} of {num_groups} groups; "
            f"there may be up to {MAX_EXPERTS}"
        ),
    )
    weight_TK = logits_TE.new_empty(num_rows, num_chosen)
    expert_TK = torch.empty(num_rows, num_chosen, dtype=torch.int64, device=logits_TE.device)
    if num_rows == 0:
        return weight_TK, expert_TK
    pdl = has_pdl(logits_TE)
    _groups_kernel[(num_rows,)](
        logits_TE,
        logits_TE if bias_E is None else bias_E,
        weight_TK,
        expert_TK,
        num_groups,
        num_experts // num_groups,
        scale,
        CHOSEN=num_chosen,
        CHOSEN_PAD=triton.next_power_of_2(num_chosen),
        GROUPS_CHOSEN=num_groups_chosen,
        NORMALISE=normalise,
        BIAS=bias_E is not None,
        GROUPS=triton.next_power_of_2(num_groups),
        SIZE=triton.next_power_of_2(num_experts // num_groups),
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
        lambda: f"which of {len(expert_TK)} rows are live must be said of each",
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
