"""The vocabulary, split by rows over the attention-TP ranks: ids in, and logits out.

Every rank holds the same number of rows; where the vocabulary does not divide, the last rows are
padding, which no id reaches and whose logits are cut off.
"""

from torch import Tensor
from torch.nn import functional

from parallel.collectives import all_gather_columns, all_reduce
from workers.layers.build import Build, padded_share
from workers.layers.fast import head_linear
from workers.weights import Part, Source


class VocabWeight:
    """This rank's rows of an embedding or head; one object for both where they are tied."""

    def __init__(self, build: Build, name: str) -> None:
        config = build.config
        self.group = build.groups.attn_tp
        self.take, num_rows = padded_share(config.vocab_size, self.group)
        self.weight_VD = build.zeros(num_rows, config.hidden_size)
        self._name = name
        self._shape = (config.vocab_size, config.hidden_size)

    def sources(self) -> list[Source]:
        num_rows = self.take.stop - self.take.start
        part = Part((self.take, slice(0, self._shape[1])), self.weight_VD[:num_rows])
        parts = (part,) if num_rows else ()
        return [Source(name=f"{self._name}.weight", shape=self._shape, parts=parts)]


class VocabParallelEmbedding:
    def __init__(self, vocab: VocabWeight) -> None:
        self._vocab = vocab

    def forward(self, ids_T: Tensor) -> Tensor:
        vocab = self._vocab
        if vocab.group.size == 1:
            return functional.embedding(ids_T, vocab.weight_VD)
        local_T = ids_T - vocab.take.start
        foreign_T = (ids_T < vocab.take.start) | (ids_T >= vocab.take.stop)
        rows_TD = functional.embedding(local_T.masked_fill_(foreign_T, 0), vocab.weight_VD)
        return all_reduce(rows_TD.masked_fill_(foreign_T.unsqueeze(1), 0.0), vocab.group)


class LMHead:
    def __init__(self, vocab: VocabWeight, vocab_size: int) -> None:
        self._vocab = vocab
        self._vocab_size = vocab_size

    def forward(self, hidden_RD: Tensor) -> Tensor:
        """float32 logits (R, vocab_size), the same on all ranks of the group."""
        local_RV = head_linear(hidden_RD, self._vocab.weight_VD)
        logits_RV = all_gather_columns(local_RV, self._vocab.group)
        return logits_RV[:, : self._vocab_size].float()
