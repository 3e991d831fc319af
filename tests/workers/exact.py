"""A model in whole numbers: the real layers, with every smooth function replaced by a stepped one.

Sums of whole numbers under 2**24 are exact in float32 in any order, so a split model must give the
very numbers of a whole one. The stepped functions are not linear: a norm, a gate or a router that
sees a part of a sum, or another row, gives something else.
"""

import hashlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from parallel.context import cut_rows
from parallel.dp_attention import RowCounts
from parallel.groups import Groups, single_rank_groups
from parallel.plan import PlanSettings
from tests.workers.layers.tiny import CONFIG
from workers.batch import Attention, ForwardBatch, HeadAttention, LatentRowAttention
from workers.context import StepPart
from workers.layers import fast, moe, norm, rotary
from workers.layers.dispatch import Routing
from workers.model_config import IndexConfig, LatentConfig, ModelConfig, MoeConfig
from workers.models import Model, build_model
from workers.weights import OneOf

CPU = torch.device("cpu")
LIMIT = 2**24
PLAIN = PlanSettings()


def sparse_config(dense_layers: Sequence[int], num_layers: int) -> ModelConfig:
    """Sizes that 8 ranks divide, but for the experts and the vocabulary, which are padded."""
    return replace(
        CONFIG,
        architecture="Qwen3MoeForCausalLM",
        vocab_size=37,
        hidden_size=16,
        intermediate_size=16,
        num_layers=num_layers,
        num_heads=8,
        num_kv_heads=4,
        head_dim=2,
        tie_word_embeddings=True,
        moe=MoeConfig(
            num_experts=6,
            num_experts_per_token=2,
            intermediate_size=8,
            norm_topk_prob=True,
            sparse_step=1,
            dense_layers=frozenset(dense_layers),
        ),
    )


def deepseek_config(dense_layers: Sequence[int], num_layers: int) -> ModelConfig:
    """Attention over a latent with an indexer, experts in groups, and some for all rows."""
    sparse = sparse_config(dense_layers, num_layers)
    assert sparse.moe is not None
    moe = replace(sparse.moe, num_experts=8, num_groups=4, num_groups_chosen=2, shared_size=16)
    return replace(
        sparse,
        architecture="DeepseekV32ForCausalLM",
        num_kv_heads=1,
        latent=LatentConfig(
            query_rank=6,
            rank=5,
            plain_dim=3,
            value_dim=2,
            is_interleaved=True,
            scale=1.0,
            index=IndexConfig(query_rank=6, num_heads=4, head_dim=4, num_chosen=3),
        ),
        moe=moe,
    )


CONFIGS = (sparse_config((0, 3), 4), sparse_config((1, 2), 4), deepseek_config((0, 3), 4))
"""Dense, sparse, sparse, dense; and the other way round: every pair of neighbours is there. Then
the first of these in DeepSeek's form."""


def stepped_norm(self: object, x: Tensor, weight: Tensor) -> Tensor:
    return (torch.remainder(x, 7.0) - 3.0) * weight


def stepped_layer_norm(self: norm.LayerNorm, x: Tensor) -> Tensor:
    return stepped_norm(self, x, self.weight_D) + self.bias_D


def stepped_gate(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.remainder(gate.relu() - up, 5.0) - 2.0


def stepped_route(logits_TE: Tensor, num_chosen: int, *, normalise: bool) -> Routing:
    """The highest scores; the lower id wins a tie. The best counts most."""
    apart_TE = logits_TE * 16 - torch.arange(logits_TE.shape[1])
    expert_TK = apart_TE.topk(num_chosen, dim=-1).indices
    weight_K = torch.arange(num_chosen, 0, -1, dtype=logits_TE.dtype)
    return Routing(weight_K.expand(expert_TK.shape), expert_TK)


def stepped_route_as_deepseek(logits_TE: Tensor, bias_E: Tensor | None, moe: MoeConfig) -> Routing:
    """The same within the groups that have the highest scores."""
    biased_TE = logits_TE if bias_E is None else logits_TE + bias_E
    apart_TE = biased_TE * 16 - torch.arange(logits_TE.shape[1])
    group_TG = apart_TE.unflatten(1, (moe.num_groups, -1)).amax(-1)
    best_TG = group_TG.topk(moe.num_groups_chosen, dim=1).indices
    open_TG = torch.zeros_like(group_TG, dtype=torch.bool).scatter_(1, best_TG, True)
    open_TE = open_TG.repeat_interleave(moe.num_experts // moe.num_groups, 1)
    apart_TE = apart_TE.masked_fill(~open_TE, -torch.inf)
    expert_TK = apart_TE.topk(moe.num_experts_per_token, dim=-1).indices
    weight_K = torch.arange(moe.num_experts_per_token, 0, -1, dtype=logits_TE.dtype)
    return Routing(weight_K.expand(expert_TK.shape), expert_TK)


class SteppedRotation:
    """Scales a row by what its position leaves over."""

    def __init__(self, positions_T: Tensor) -> None:
        self._factor_T11 = (1 + positions_T % 3).float()[:, None, None]

    def apply(self, x_THD: Tensor) -> Tensor:
        return x_THD * self._factor_T11


class LinearAttention(HeadAttention, LatentRowAttention):
    """Sums what came before, weighted by whole numbers; sequences lie one after another."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self._lengths = list(lengths)

    def attend(self, layer, q_THD, k_TGD, v_TGD, *, scale, sliding_window):
        repeat = q_THD.shape[1] // k_TGD.shape[1]
        k_THD, v_THD = k_TGD.repeat_interleave(repeat, 1), v_TGD.repeat_interleave(repeat, 1)
        outs = []
        parts = zip(*(x.split(self._lengths) for x in (q_THD, k_THD, v_THD)), strict=True)
        for q, k, v in parts:
            score_HTS = torch.remainder(torch.einsum("thd,shd->hts", q, k), 3.0).tril()
            outs.append(torch.remainder(torch.einsum("hts,shd->thd", score_HTS, v), 11.0) - 5.0)
        return torch.cat(outs)

    def attend_latent(self, layer, q_THW, row_TW, *, num_values, scale, index):
        """The indexer's scores are a factor: the rest of their division by three."""
        outs = []
        rows = (q_THW, row_TW, index.q_TJE, index.weight_TJ, index.key_UE)
        parts = zip(*(x.split(self._lengths) for x in rows), strict=True)
        for q, row, index_q, weight, key in parts:
            product_TJS = torch.einsum("tje,se->tjs", index_q, key).relu()
            factor_TS = torch.remainder(torch.einsum("tj,tjs->ts", weight * 4, product_TJS), 3.0)
            score_HTS = torch.remainder(torch.einsum("thw,sw->hts", q, row), 3.0).tril()
            out = torch.einsum("hts,ts,sr->thr", score_HTS, factor_TS, row[:, :num_values])
            outs.append(torch.remainder(out, 11.0) - 5.0)
        return torch.cat(outs)


class OnRows(HeadAttention, LatentRowAttention):
    """An attention over whole sequences, where some of the rows ask and all have keys."""

    def __init__(self, whole: Attention, rows: Tensor) -> None:
        self._whole, self._rows = whole, rows

    def attend(self, layer, q_THD, k_UGD, v_UGD, **options):
        q_UHD = self._spread(q_THD, len(k_UGD))
        return self._whole.attend(layer, q_UHD, k_UGD, v_UGD, **options)[self._rows]

    def attend_latent(self, layer, q_THW, row_UW, *, index, **options):
        num_rows = len(row_UW)
        q_UHW = self._spread(q_THW, num_rows)
        if index is not None:
            index = index._replace(
                q_TJE=self._spread(index.q_TJE, num_rows),
                weight_TJ=self._spread(index.weight_TJ, num_rows),
            )
        return self._whole.attend_latent(layer, q_UHW, row_UW, index=index, **options)[self._rows]

    def _spread(self, q_T: Tensor, num_rows: int) -> Tensor:
        spread = q_T.new_full((num_rows, *q_T.shape[1:]), torch.nan)
        spread[self._rows] = q_T
        return spread


def install(patch) -> None:
    """Replace the smooth functions for as long as `patch` (pytest's) lasts."""
    patch.setattr(norm.UnitRms, "forward", stepped_norm)
    patch.setattr(norm.LayerNorm, "forward", stepped_layer_norm)
    patch.setattr(fast, "silu_and_multiply", stepped_gate)
    patch.setattr(moe, "silu_and_multiply", stepped_gate)
    patch.setattr(moe, "route", stepped_route)
    patch.setattr(moe, "route_as_deepseek", stepped_route_as_deepseek)
    patch.setattr(rotary.RotaryTable, "at", lambda self, positions_T: SteppedRotation(positions_T))


@cache
def whole_tensor(name: str, shape: tuple[int, ...], is_norm: bool) -> Tensor:
    seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=7).digest(), "little")
    generator = torch.Generator().manual_seed(seed)
    low, high = (1, 3) if is_norm else (-1, 2)
    return torch.randint(low, high, shape, generator=generator).float()


def build(
    config: ModelConfig, groups: Groups | None = None, settings: PlanSettings = PLAIN
) -> Model:
    """The model with its weights of -1, 0 and 1, the same in every layout."""
    model = build_model(config, groups or single_rank_groups(), CPU, torch.float32, settings)
    for each in model.sources():
        for source in each.formats[0] if isinstance(each, OneOf) else (each,):
            full = whole_tensor(source.name, source.shape, source.dummy == "ones")
            for part in source.parts:
                part.into.copy_(full[part.region])
    return model


def sequences_of(seed: int, lengths: Sequence[int]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 37, (length,), generator=generator).tolist() for length in lengths]


def batch_of(
    sequences: Sequence[Sequence[int]], counts: RowCounts | None, num_rows: int, pad_id: int = 0
) -> ForwardBatch:
    """Whole prompts, padded to `num_rows` rows."""
    ids = [token for sequence in sequences for token in sequence]
    positions = [place for sequence in sequences for place in range(len(sequence))]
    pads = [pad_id] * (num_rows - len(ids))
    return ForwardBatch(
        input_ids_T=torch.tensor(ids + pads, dtype=torch.int64),
        positions_T=torch.tensor(positions, dtype=torch.int64),
        logit_rows_R=torch.arange(len(ids)),
        attention=LinearAttention([len(sequence) for sequence in sequences]),
        counts=counts,
    )


class Part(NamedTuple):
    """A step's rows of one replica that one of its context-parallel ranks computes."""

    batch: ForwardBatch
    part: StepPart | None

    def all_rows(self, hidden_TD: Tensor, num_real: int) -> Tensor:
        """Hidden rows of the whole replica."""
        if self.part is None or num_real == 0:
            return hidden_TD[:num_real]
        return self.part.take_all(hidden_TD)


def part_of(
    sequences: Sequence[Sequence[int]],
    counts: RowCounts,
    groups: Groups,
    pad_id: int = 0,
    attention: Callable[[list[int]], Attention] = LinearAttention,
) -> Part:
    """What the runner makes of whole prompts: this rank's rows of them. Sequences of one token
    count as decodes, which come first."""
    num_parts, padded = groups.attn_cp.size, counts.padded[groups.attn_dp.rank]
    if num_parts == 1:
        alone = batch_of(sequences, counts, padded, pad_id)
        return Part(replace(alone, attention=attention([len(each) for each in sequences])), None)
    lengths = [len(sequence) for sequence in sequences]
    num_decodes = len(list(itertools.takewhile(lambda length: length == 1, lengths)))
    cut = cut_rows(num_decodes, lengths[num_decodes:], num_parts)
    part = StepPart(groups.attn_cp, cut, torch.from_numpy)
    here = torch.from_numpy(cut.rows_of(groups.attn_cp.rank))
    whole = batch_of(sequences, counts, sum(lengths))
    pads = torch.full((padded // num_parts - len(here),), pad_id)
    batch = replace(
        whole,
        input_ids_T=torch.cat([whole.input_ids_T[here], pads]),
        positions_T=whole.positions_T[here],
        attention=OnRows(attention(lengths), here),
        context=part.gather,
    )
    return Part(batch, part)


def whole_logits(config: ModelConfig, sequences: Sequence[Sequence[int]]) -> Tensor:
    """What one rank says of all rows."""
    with torch.inference_mode():
        model = build(config)
        num_rows = sum(map(len, sequences))
        logits = model.logits(model.forward(batch_of(sequences, None, num_rows)))
    if logits.abs().max() >= LIMIT or not torch.equal(logits, logits.round()):
        raise ValueError("these are no exact whole numbers")
    return logits
