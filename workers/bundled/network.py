"""Qwen3-MoE in plain torch, as small as it can be and still be trained.

Names and shapes of the parameters are those of the Hugging Face checkpoint, so a state dict is a
checkpoint. There is no key-value cache, no parallelism and no attention mask but the causal one:
rows are padded on the right. It is what the served model is compared with, not what serves it.

Shapes: B rows, T tokens, D hidden size, H heads, K key-value heads, E experts, I their
intermediate size, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkConfig:
    """Field names are those of a Qwen3-MoE config.json; the defaults are the bundled model."""

    vocab_size: int = 259
    """256 bytes and three special tokens; deliberately not a multiple of 2."""

    hidden_size: int = 128
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 32
    intermediate_size: int = 384
    """Of the dense layers."""

    moe_intermediate_size: int = 128
    num_experts: int = 8
    num_experts_per_tok: int = 2
    mlp_only_layers: tuple[int, ...] = (0,)
    """Layers that are dense."""

    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        normal = functional.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps)
        return normal.to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        width = config.num_attention_heads * config.head_dim
        kv_width = config.num_key_value_heads * config.head_dim
        self.head_dim = config.head_dim
        self.num_groups = config.num_attention_heads // config.num_key_value_heads
        self.q_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(self, x_BTD: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        by_head = (*x_BTD.shape[:2], -1, self.head_dim)
        q_BTHd = rotate(self.q_norm(self.q_proj(x_BTD).view(by_head)), rope)
        k_BTKd = rotate(self.k_norm(self.k_proj(x_BTD).view(by_head)), rope)
        v_BTKd = self.v_proj(x_BTD).view(by_head)
        out_BHTd = functional.scaled_dot_product_attention(
            q_BTHd.transpose(1, 2),
            k_BTKd.repeat_interleave(self.num_groups, dim=2).transpose(1, 2),
            v_BTKd.repeat_interleave(self.num_groups, dim=2).transpose(1, 2),
            is_causal=True,
        )
        return self.o_proj(out_BHTd.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """A dense MLP, and also one expert."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class SparseMLP(nn.Module):
    """Experts, of which each token uses the best few.

    All experts are computed for all tokens, as three products of E * I columns, and weighted by
    zero where they were not chosen: at this size that is quicker than moving tokens about.
    """

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.num_chosen = config.num_experts_per_tok
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = nn.ModuleList(
            MLP(config.hidden_size, config.moe_intermediate_size) for _ in range(config.num_experts)
        )

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """The mixture, and how uneven the routing was: 1 when every expert gets an equal share."""
        probs_BTE = self.gate(x_BTD).float().softmax(-1)
        best, chosen = probs_BTE.topk(self.num_chosen, dim=-1)
        scores_BTE = torch.zeros_like(probs_BTE)
        scores_BTE = scores_BTE.scatter(-1, chosen, best / best.sum(-1, keepdim=True))

        experts = cast(Sequence[MLP], self.experts)
        gate_proj = torch.cat([expert.gate_proj.weight for expert in experts])
        up_proj = torch.cat([expert.up_proj.weight for expert in experts])
        down_proj = torch.cat([expert.down_proj.weight for expert in experts], dim=1)
        hidden = functional.silu(functional.linear(x_BTD, gate_proj)) * functional.linear(
            x_BTD, up_proj
        )
        hidden_BTEI = hidden.unflatten(-1, (len(self.experts), -1))
        weighted = hidden_BTEI * scores_BTE.to(hidden.dtype).unsqueeze(-1)
        out_BTD = functional.linear(weighted.flatten(-2), down_proj)

        used_E = (scores_BTE > 0).float().mean((0, 1)) / self.num_chosen
        return out_BTD, len(self.experts) * (used_E * probs_BTE.mean((0, 1))).sum()


class Layer(nn.Module):
    def __init__(self, config: NetworkConfig, index: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp: MLP | SparseMLP
        if index in config.mlp_only_layers:
            self.mlp = MLP(config.hidden_size, config.intermediate_size)
        else:
            self.mlp = SparseMLP(config)

    def forward(self, x_BTD: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor | None]:
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), rope)
        normal_BTD = self.post_attention_layernorm(x_BTD)
        if isinstance(self.mlp, SparseMLP):
            out_BTD, imbalance = self.mlp(normal_BTD)
            return x_BTD + out_BTD, imbalance
        return x_BTD + self.mlp(normal_BTD), None


class Decoder(nn.Module):
    """Everything but the head, which is the embedding again."""

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Network(nn.Module):
    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)

    def forward(self, ids_BT: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the next token (B, T, V), and the layers' mean routing imbalance."""
        x_BTD = self.model.embed_tokens(ids_BT)
        rope = rope_table(ids_BT.shape[1], self.config, x_BTD)
        imbalances = []
        for layer in self.model.layers:
            x_BTD, imbalance = layer(x_BTD, rope)
            if imbalance is not None:
                imbalances.append(imbalance)
        logits_BTV = functional.linear(self.model.norm(x_BTD), self.model.embed_tokens.weight)
        return logits_BTV, torch.stack(imbalances).mean()

    def initialise(self, generator: torch.Generator) -> None:
        """Draw all weights, on the CPU; projections into the residual stream start smaller."""
        num_additions = 2 * self.config.num_hidden_layers
        for name, weight in self.named_parameters():
            if weight.dim() == 1:
                continue
            std = 0.05 if "embed" in name else 0.7 * weight.shape[1] ** -0.5
            if "o_proj" in name or "down_proj" in name:
                std *= num_additions**-0.5
            weight.data.normal_(0.0, std, generator=generator)


def rope_table(num_tokens: int, config: NetworkConfig, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of positions 0 to T-1, each (T, 1, head_dim)."""
    exponents = torch.arange(0, config.head_dim, 2, device=like.device) / config.head_dim
    positions = torch.arange(num_tokens, device=like.device, dtype=torch.float32)
    angles = torch.outer(positions, config.rope_theta**-exponents).repeat(1, 2)[:, None]
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def rotate(x_BTHd: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = rope
    first, second = x_BTHd.chunk(2, dim=-1)
    return (x_BTHd * cos + torch.cat((-second, first), dim=-1) * sin).to(x_BTHd.dtype)


def padded(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Token ids (B, T), T that of the longest row, padded on the right with zeros."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=device)


@torch.inference_mode()
def generate(
    network: Network, prompts: Sequence[Sequence[int]], *, eos_token_id: int, max_tokens: int
) -> list[list[int]]:
    """Greedy continuations without their end token, every step computed from the beginning."""
    rows = [list(prompt) for prompt in prompts]
    unfinished = set(range(len(rows)))
    device = network.model.embed_tokens.weight.device
    for _ in range(max_tokens):
        indices = sorted(unfinished)
        if not indices:
            break
        logits_BTV, _ = network(padded([rows[i] for i in indices], device))
        for i, logits_TV in zip(indices, logits_BTV, strict=True):
            token = int(logits_TV[len(rows[i]) - 1].argmax())
            if token == eos_token_id:
                unfinished.remove(i)
            else:
                rows[i].append(token)
    return [row[len(prompt) :] for row, prompt in zip(rows, prompts, strict=True)]
