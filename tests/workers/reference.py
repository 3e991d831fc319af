"""What the models are compared with: dense attention, and tiny checkpoints of transformers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn import functional

from parallel.dp_attention import RowCounts
from parallel.groups import Groups, single_rank_groups
from workers.batch import ForwardBatch, HeadAttention, IndexRows, LatentRowAttention
from workers.models import Model, build_model, read_model_config
from workers.weights import load_weights

SIZES: dict[str, Any] = {
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}

torch.set_num_threads(1)  # tiny models are slower on two, and the machine is shared

CPU = torch.device("cpu")


class DenseAttention(HeadAttention, LatentRowAttention):
    """Causal attention over whole sequences that lie one after another; keeps no cache."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self._lengths = list(lengths)

    def attend(
        self,
        layer: int,
        q_THD: Tensor,
        k_TGD: Tensor,
        v_TGD: Tensor,
        *,
        scale: float,
        sliding_window: int | None,
    ) -> Tensor:
        outs = []
        for q, k, v in zip(*(x.split(self._lengths) for x in (q_THD, k_TGD, v_TGD)), strict=True):
            length = q.shape[0]
            distance = torch.arange(length)[:, None] - torch.arange(length)
            seen = (distance >= 0) & (distance < (sliding_window or length))
            out = functional.scaled_dot_product_attention(
                q.transpose(0, 1)[None],
                k.transpose(0, 1)[None],
                v.transpose(0, 1)[None],
                attn_mask=seen,
                scale=scale,
                enable_gqa=True,
            )
            outs.append(out[0].transpose(0, 1))
        return torch.cat(outs)

    def attend_latent(
        self,
        layer: int,
        q_THW: Tensor,
        row_UW: Tensor,
        *,
        num_values: int,
        scale: float,
        index: IndexRows | None,
    ) -> Tensor:
        outs, first = [], 0
        for length in self._lengths:
            here, first = slice(first, first + length), first + length
            q, row = q_THW[here], row_UW[here]
            hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
            if index is not None:
                score = torch.einsum("tje,se->tjs", index.q_TJE[here], index.key_UE[here]).relu()
                score = torch.einsum("tj,tjs->ts", index.weight_TJ[here], score)
                rank = score.masked_fill(hidden, -torch.inf).argsort(1, descending=True).argsort(1)
                hidden = hidden | (rank >= index.num_chosen)
            score = torch.einsum("thw,sw->ths", q, row) * scale
            weight = score.masked_fill(hidden[:, None], -torch.inf).softmax(-1)
            outs.append(torch.einsum("ths,sr->thr", weight, row[:, :num_values]))
        return torch.cat(outs)


def batch_of(sequences: Sequence[Sequence[int]], num_replicas: int = 1) -> ForwardBatch:
    """Whole prompts, all of whose rows want logits; every replica has the same."""
    lengths = [len(sequence) for sequence in sequences]
    ids = torch.tensor([token for sequence in sequences for token in sequence], dtype=torch.int64)
    return ForwardBatch(
        input_ids_T=ids,
        positions_T=torch.cat([torch.arange(length) for length in lengths]),
        logit_rows_R=torch.arange(len(ids)),
        attention=DenseAttention(lengths),
        counts=RowCounts(*((sum(lengths),) * num_replicas,) * 3),
    )


def save_tiny(folder: Path, family: str, **changes: Any) -> transformers.PreTrainedModel:
    """A random model of `family` ("Llama", "Qwen3Moe"), saved in several files."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES | changes)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        biases = [each for each in model.named_buffers() if each[0].endswith("correction_bias")]
        for name, weight in [*model.named_parameters(), *biases]:
            if weight.dim() == 1:  # norms start at one and biases at zero, which hides mistakes
                weight.add_(torch.randn_like(weight) * (0.2 if "norm" in name else 0.5))
    model.save_pretrained(folder, max_shard_size="40KB")
    return model


def no_progress(stage: str, done: int, total: int) -> None:
    pass


def load(folder: Path, groups: Groups | None = None) -> Model:
    """Our float32 model of a folder, loaded."""
    config = read_model_config(folder)
    model = build_model(config, groups or single_rank_groups(), CPU, torch.float32)
    load_weights(model, folder, no_progress)
    return model


def logits_of(model: Model, sequences: Sequence[Sequence[int]], num_replicas: int = 1) -> Tensor:
    batch = batch_of(sequences, num_replicas)
    with torch.inference_mode():
        return model.logits(model.forward(batch), (len(batch.input_ids_T),) * num_replicas)


def expected_logits(
    model: transformers.PreTrainedModel, sequences: Sequence[Sequence[int]]
) -> Tensor:
    with torch.inference_mode():
        return torch.cat([model(torch.tensor([list(s)])).logits[0] for s in sequences])


SEQUENCES = (tuple(range(3, 27)), (258, 0, 17, 200, 33))
"""Two prompts of unequal length, with the vocabulary's first and last ids."""
