"""Routing, and the three ways of applying experts, which must agree."""

import pytest
import torch
from torch.nn import functional
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from workers.layers.moe import Experts, Routing, route, route_in_groups

HIDDEN, WIDTH, NUM_EXPERTS = 12, 6, 5


def all_experts() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    gate_up = torch.randn(NUM_EXPERTS, 2 * WIDTH, HIDDEN, generator=generator)
    return gate_up, torch.randn(NUM_EXPERTS, HIDDEN, WIDTH, generator=generator)


def rows_and_routing(num_rows: int, num_chosen: int) -> tuple[torch.Tensor, Routing]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(num_rows, HIDDEN, generator=generator)
    logits = torch.randn(num_rows, NUM_EXPERTS, generator=generator)
    return x, route(logits, num_chosen, normalise=True)


def plain(x: torch.Tensor, routing: Routing, mine: range) -> torch.Tensor:
    """The definition, choice by choice."""
    gate_up, down = all_experts()
    out = torch.zeros_like(x)
    for row, choice in torch.cartesian_prod(*map(torch.arange, routing.expert_TK.shape)).tolist():
        expert = int(routing.expert_TK[row, choice])
        if expert in mine:
            gate, up = functional.linear(x[row], gate_up[expert]).chunk(2)
            out[row] += routing.weight_TK[row, choice] * functional.linear(
                functional.silu(gate) * up, down[expert]
            )
    return out


@pytest.mark.parametrize(
    "mine", [range(5), range(2), range(2, 4), range(4, 5), range(5, 5)], ids=str
)
@pytest.mark.parametrize("num_chosen", [1, 2, 5])
@pytest.mark.parametrize("num_rows", [0, 1, 3, 17])
def test_the_three_ways_agree_with_the_definition(num_rows, num_chosen, mine):
    x, routing = rows_and_routing(num_rows, num_chosen)
    gate_up, down = all_experts()
    padding = 1
    rows = slice(mine.start, mine.stop)
    experts = Experts(
        functional.pad(gate_up[rows], (0, 0, 0, 0, 0, padding)),
        functional.pad(down[rows], (0, 0, 0, 0, 0, padding)),
        mine.start,
        len(mine),
    )
    expected = plain(x, routing, mine)
    for apply in (experts.apply, experts.apply_in_turn, experts.apply_by_expert):
        torch.testing.assert_close(apply(x, routing), expected, atol=1e-5, rtol=1e-5)


def test_routing_is_a_softmax_over_all_experts():
    logits = torch.tensor([[1.0, 3.0, 2.0, 0.0]])
    probs = logits.softmax(-1)[0]
    routing = route(logits, 2, normalise=False)
    assert routing.expert_TK.tolist() == [[1, 2]]
    torch.testing.assert_close(routing.weight_TK[0], probs[[1, 2]])


def test_normalised_weights_sum_to_one():
    routing = route(torch.randn(7, 9), 3, normalise=True)
    torch.testing.assert_close(routing.weight_TK.sum(-1), torch.ones(7))


def test_bfloat16_is_routed_in_float32_and_weighted_in_bfloat16():
    logits = torch.tensor([[8.0, 7.96875, -3.0]], dtype=torch.bfloat16)
    routing = route(logits, 1, normalise=False)
    assert routing.weight_TK.dtype == torch.bfloat16
    assert routing.weight_TK.item() == logits.float().softmax(-1)[0, 0].bfloat16().item()


@pytest.mark.row("S11")
@pytest.mark.parametrize("normalise", [False, True])
def test_a_choice_in_groups_is_deepseek_v3s(normalise):
    """Against transformers' router, whose weight is the identity, so that rows are scores."""
    torch.manual_seed(0)
    num_experts = 16
    config = DeepseekV3Config(
        hidden_size=num_experts, n_routed_experts=num_experts, num_experts_per_tok=4, n_group=4,
        topk_group=2, norm_topk_prob=normalise, routed_scaling_factor=2.5,
    )  # fmt: skip
    theirs = DeepseekV3TopkRouter(config)
    logits, bias = torch.randn(33, num_experts), torch.randn(num_experts)
    with torch.no_grad():
        theirs.weight.copy_(torch.eye(num_experts))
        theirs.e_score_correction_bias.copy_(bias)
        _, weight_TK, expert_TK = theirs(logits)
    ours = route_in_groups(
        logits.sigmoid(), bias, 4, num_groups=4, num_groups_chosen=2, normalise=normalise,
        scale=2.5,
    )  # fmt: skip
    order, other = ours.expert_TK.argsort(1), expert_TK.argsort(1)
    assert torch.equal(ours.expert_TK.gather(1, order), expert_TK.gather(1, other))
    torch.testing.assert_close(ours.weight_TK.gather(1, order), weight_TK.gather(1, other))


@pytest.mark.row("S11")
def test_without_a_bias_a_group_is_as_good_as_its_best_expert():
    scores = torch.tensor([[0.30, 0.01, 0.20, 0.19, 0.02, 0.28]])
    routing = route_in_groups(
        scores, None, 2, num_groups=3, num_groups_chosen=2, normalise=False, scale=16.0
    )
    assert routing.expert_TK.tolist() == [[0, 5]]
    torch.testing.assert_close(routing.weight_TK, torch.tensor([[0.30 * 16, 0.28 * 16]]))
