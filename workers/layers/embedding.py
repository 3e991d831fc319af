"""The vocabulary, split by rows: ids in over the attention-TP ranks, logits out over those or all.

Every rank holds the same number of rows; where the vocabulary does not divide, the last rows are
padding, which no id reaches and whose logits are cut off. With DP attention the head is split over
all ranks unless `enable_dp_lm_head`: each replica's rows go to all, and every rank's columns of
them come back.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from parallel.collectives import all_gather_columns, all_reduce
from parallel.dp_attention import answer_logit_rows, gather_logit_rows
from parallel.groups import Group
from parallel.plan import PlanError, Rows
from parallel.symmetric import moved_to_slot, place_in_slot
from workers.layers.build import Build, padded_share
from workers.layers.fast import head_linear
from workers.weights import Part, Source


class VocabWeight:
    """This rank's rows of an embedding or head; one object for both where they are the same."""

    def __init__(self, build: Build, name: str, group: Group) -> None:
        config = build.config
        self.group = group
        self.take, num_rows = padded_share(config.vocab_size, group)
        self.weight_VD = build.zeros(num_rows, config.hidden_size)
        self.name = name
        self.shape = (config.vocab_size, config.hidden_size)

    def parts(self) -> tuple[Part, ...]:
        num_rows = self.take.stop - self.take.start
        part = Part((self.take, slice(0, self.shape[1])), self.weight_VD[:num_rows])
        return (part,) if num_rows else ()


def vocab_sources(weights: Sequence[VocabWeight]) -> list[Source]:
    """A tied vocabulary that is split in two ways is one tensor of the checkpoint."""
    names = dict.fromkeys((weight.name, weight.shape) for weight in weights)
    return [
        Source(
            name=f"{name}.weight",
            shape=shape,
            parts=tuple(part for each in weights if each.name == name for part in each.parts()),
        )
        for name, shape in names
    ]


class VocabParallelEmbedding:
    def __init__(self, vocab: VocabWeight) -> None:
        self._vocab = vocab

    def forward(self, ids_T: Tensor) -> Tensor:
        vocab = self._vocab
        if vocab.group.size == 1:
            return functional.embedding(ids_T, vocab.weight_VD)
        local_T = ids_T - vocab.take.start
        foreign_T = (ids_T < vocab.take.start) | (ids_T >= vocab.take.stop)
        local_T.masked_fill_(foreign_T, 0)
        shape = (local_T.shape[0], vocab.weight_VD.shape[1])
        place_TD = place_in_slot(
            vocab.group, shape, vocab.weight_VD, role="embedded", op="all_reduce"
        )
        if place_TD is None:
            rows_TD = functional.embedding(local_T, vocab.weight_VD)
        else:
            rows_TD = torch.index_select(vocab.weight_VD, 0, local_T, out=place_TD)
        return all_reduce(rows_TD.masked_fill_(foreign_T.unsqueeze(1), 0.0), vocab.group)


class LMHead:
    def __init__(self, build: Build, vocab: VocabWeight) -> None:
        self._vocab = vocab
        self._vocab_size = build.config.vocab_size
        self._spans_replicas = build.plan.head.rows is Rows.FULL
        self._replicas = build.groups.attn_dp

    def room_for(self, num_rows: int) -> Tensor:
        """Where `forward` may write so many rows, or its first rows fewer: float32, not filled."""
        weight_VD = self._vocab.weight_VD
        shape = (num_rows, self._vocab.group.size * weight_VD.shape[0])
        return weight_VD.new_empty(shape, dtype=torch.float32)

    def forward(
        self,
        hidden_RD: Tensor,
        num_logit_rows: tuple[int, ...] | None = None,
        *,
        out: Tensor | None = None,
    ) -> Tensor:
        """float32 logits (R, vocab_size), the same on all ranks of a replica.

        `num_logit_rows` says how many rows each replica brings, which a head over all replicas
        must know; then all ranks come here in the same step, those without rows too. `out` is as
        many rows of `room_for`: what is returned lies there, or, a single row that comes from
        several ranks, where it arrived.
        """
        if not self._spans_replicas:
            group = self._vocab.group
            whole = out if group.size == 1 else None
            local_RV = head_linear(hidden_RD, self._vocab.weight_VD, out=whole)
            local_RV = moved_to_slot(local_RV, group, role="logits", op="all_gather")
            logits_RV = all_gather_columns(local_RV, group, out=out, role="all_logits")
            return logits_RV[:, : self._vocab_size].float()
        if num_logit_rows is None:
            raise PlanError(
                "the head spans replicas, and a step does not say how many rows each has"
            )
        rows_PMD = gather_logit_rows(hidden_RD, num_logit_rows, self._replicas)
        local_NV = head_linear(rows_PMD.flatten(0, 1), self._vocab.weight_VD)
        local_PMV = local_NV.view(*rows_PMD.shape[:2], -1)
        logits_RV = answer_logit_rows(local_PMV, hidden_RD.shape[0], self._vocab.group, out=out)
        return logits_RV[:, : self._vocab_size].float()
