"""Log-probabilities of prompts' tokens, from the hidden rows of a step that reads them.

Row p tells the prompt's token p + 1. Only some rows' logits are held at once, however long the
prompts are.

Shapes: T rows of the step, N rows of a block, D model width.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from workers.batch import Chunk
from workers.context import StepPart
from workers.models import Model
from workers.protocol import TokenLogprobs
from workers.sampling import PendingLogprobs, Sampler, token_logprobs
from workers.transfers import Transfers

LOGIT_BLOCK_ROWS = 256
"""Rows whose logits are held at once."""

PromptLogprobs = tuple[int, int, tuple[TokenLogprobs, ...]]
"""(slot, position of the first, log-probabilities of the tokens that one step read)."""


class PendingPrompt(NamedTuple):
    """On its way to the host."""

    slot: int
    first: int
    blocks: list[PendingLogprobs]

    def read(self) -> PromptLogprobs:
        """Once the step is done."""
        values = tuple(value for block in self.blocks for _, value in block.read())
        return self.slot, self.first, values


class _Wanted(NamedTuple):
    """The first `length` rows of a chunk are to tell their next tokens' log-probabilities."""

    chunk: Chunk
    num_top: int
    length: int


def prompt_logprobs(
    model: Model,
    sampler: Sampler,
    chunks: tuple[Chunk, ...],
    hidden_TD: Tensor,
    num_by_replica: tuple[int, ...],
    part: StepPart | None,
    transfers: Transfers,
) -> list[PendingPrompt]:
    """Queue what the chunks' requests want of them.

    A head that spans replicas is needed by all of them as often as by the one with most rows, so
    the header says how many each has.
    """
    wanted = [each for chunk in chunks if (each := _wanted_of(chunk, sampler)) is not None]
    pending = [PendingPrompt(chunk.slot, chunk.start + 1, []) for chunk, _, _ in wanted]
    blocks = _blocks([length for _, _, length in wanted])
    num_blocks = max(len(blocks), -(-max(num_by_replica, default=0) // LOGIT_BLOCK_ROWS))
    for number in range(num_blocks):
        pieces = blocks[number] if number < len(blocks) else []
        spans = [(wanted[i].chunk.row + first, count) for i, first, count in pieces]
        hidden_ND = _rows_in(spans, hidden_TD, part)
        done = number * LOGIT_BLOCK_ROWS
        counts = tuple(min(max(n - done, 0), LOGIT_BLOCK_ROWS) for n in num_by_replica)
        logits = model.logits(hidden_ND, counts or None)
        at = 0
        for index, first, count in pieces:
            chunk, num_top, _ = wanted[index]
            tokens = chunk.tokens[chunk.start + first + 1 :][:count]
            block = token_logprobs(
                logits[at : at + count],
                transfers.upload(tokens.astype(np.int64)),
                list(range(count)),
                [num_top] * count,
            )
            pending[index].blocks.append(block.moved(transfers.fetch))
            at += count
    return pending


def _wanted_of(chunk: Chunk, sampler: Sampler) -> _Wanted | None:
    """Row p tells the prompt's token p + 1, so the first token has none."""
    num_top, num_prompt = sampler.prompt_logprobs_of(chunk.slot)
    length = min(chunk.stop, num_prompt - 1) - chunk.start
    return _Wanted(chunk, num_top, length) if num_top >= 0 and length > 0 else None


def _rows_in(spans: list[tuple[int, int]], hidden_TD: Tensor, part: StepPart | None) -> Tensor:
    """Hidden rows of the replica, from all (first row, count) one after another."""
    if part is None or not spans:
        rows = [hidden_TD[first : first + count] for first, count in spans]
        return torch.cat([hidden_TD[:0], *rows])
    return part.take(hidden_TD, np.concatenate([np.arange(f, f + n) for f, n in spans]))


def _blocks(lengths: list[int]) -> list[list[tuple[int, int, int]]]:
    """Parts of these lengths, one after another, cut into blocks of `LOGIT_BLOCK_ROWS`.

    A block lists (part, first row in the part, rows).

    >>> _blocks([300, 10])
    [[(0, 0, 256)], [(0, 256, 44), (1, 0, 10)]]
    """
    blocks: list[list[tuple[int, int, int]]] = []
    room = 0
    for index, length in enumerate(lengths):
        first = 0
        while first < length:
            if room == 0:
                blocks.append([])
                room = LOGIT_BLOCK_ROWS
            count = min(room, length - first)
            blocks[-1].append((index, first, count))
            first, room = first + count, room - count
    return blocks
