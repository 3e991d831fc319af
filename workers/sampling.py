"""From logits to tokens: what each request asked for, applied to its row.

`Sampler` keeps, by slot, every request's parameters (on the host) and what sampling needs to
remember on the device: its last token and, for those with penalties, how often each id came out.
`sample` never waits for the device and never looks at a sampled token on the host.

The order is: log-probabilities of the raw logits; logit bias and ids barred until `min_tokens`;
penalties; what a grammar allows; temperature; min_p, top_k, top_p; the draw. Which ids survive is
decided by the value of the last one that does, so ids with equal logits stay or go together, in
whatever order a sort leaves them. The draw is a race of exponentials keyed by (seed, nonce,
position): see `kernels.philox`. The lowest id wins a tie.

Shapes: R rows, V vocabulary, S slots, N rows of a kind, K candidates of a row.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from workers.batch import StepRows
from workers.drawing import NEVER, Truncation, draw, lowest_kept
from workers.protocol import Admit, Mask, Sampling, TokenLogprobs, mask_bytes, unpack

COLDEST = 1e-5
"""A temperature below is greedy: logits divided by it would leave float32."""

DRAW, TRUNCATE, BIAS, BAR, PENALISE, LOGPROBS = (1 << bit for bit in range(6))
"""What a slot needs beyond the likeliest id."""


class PendingLogprobs(NamedTuple):
    """Log-probabilities of N rows, still on the device."""

    rows: list[int]
    """Index of each among the step's logit rows, or among a chunk's."""
    num_top: list[int]
    ids_N: Tensor
    logprobs_N: Tensor
    ranks_N: Tensor
    top_ids_NK: Tensor
    top_logprobs_NK: Tensor

    def moved(self, move: Callable[[Tensor], Tensor]) -> "PendingLogprobs":
        """With every tensor passed through `move`, which takes it to the host."""
        return PendingLogprobs(self.rows, self.num_top, *(move(tensor) for tensor in self[2:]))

    def read(self) -> list[tuple[int, TokenLogprobs]]:
        """(index of the row, its log-probabilities); the tensors are on the host and complete."""
        columns = [tensor.tolist() for tensor in self[2:]]
        return [
            (row, TokenLogprobs(token, logprob, rank, tuple(ids[:num]), tuple(values[:num])))
            for row, num, token, logprob, rank, ids, values in zip(
                self.rows, self.num_top, *columns, strict=True
            )
        ]


class Allowed(NamedTuple):
    """The ids that a grammar leaves to some rows."""

    rows_N: Tensor
    barred_NV: Tensor
    """True where the id must not be sampled."""

    @classmethod
    def unpacked(cls, mask: Mask, vocab_size: int, device: torch.device) -> "Allowed":
        rows = unpack(mask.rows).astype(np.int64)
        bits = np.frombuffer(mask.bits, np.uint8).reshape(len(rows), mask_bytes(vocab_size))
        bits_NB = torch.from_numpy(bits.copy()).to(device)
        places = torch.arange(8, dtype=torch.uint8, device=device)
        barred_NV = (bits_NB[:, :, None] >> places & 1).flatten(1)[:, :vocab_size] == 0
        return cls(torch.from_numpy(rows).to(device), barred_NV)


class Sampled(NamedTuple):
    ids_R: Tensor
    highest_R: Tensor
    """The row's highest logit: not finite if the row is poisoned."""
    logprobs: PendingLogprobs | None


class _Draws(NamedTuple):
    """Parameters of the rows that draw, on the device."""

    rows_N: Tensor | None
    """None if all rows of the step draw."""
    rows: NDArray[np.int64]
    temperature_N1: Tensor
    seed_N: Tensor
    nonce_N: Tensor
    truncation: Truncation | None


class _Penalties(NamedTuple):
    rows_N: Tensor
    slots_N: Tensor
    presence_N1: Tensor
    frequency_N1: Tensor
    repetition_N1: Tensor


class _Extras(NamedTuple):
    """What the rows of a step need beyond the likeliest id; None where no row does."""

    draws: _Draws | None
    bias: tuple[Tensor, Tensor, Tensor] | None
    """(row, id, value)."""
    penalties: _Penalties | None
    logprobs: tuple[list[int], list[int], Tensor] | None
    """(rows, how many of the likeliest, the rows on the device)."""


class Sampler:
    """The requests' parameters by slot, and their state on the device."""

    def __init__(self, *, max_num_seqs: int, vocab_size: int, device: torch.device) -> None:
        self.last_token_S = torch.zeros(max_num_seqs + 1, dtype=torch.int64, device=device)
        """The next decode's input of each slot; the last slot is for rows that nobody wants."""
        self._device = device
        self._vocab_size = vocab_size
        self._sampling = [Sampling()] * max_num_seqs
        self._needs_S = np.zeros(max_num_seqs, np.uint8)
        self._num_prompt_S = np.zeros(max_num_seqs, np.int64)
        self._counts_SV: Tensor | None = None
        self._in_prompt_SV: Tensor | None = None
        self._num_admits = 0
        self._slots_R = np.empty(0, np.int64)
        self._extras: tuple[int, _Extras] | None = None

    @staticmethod
    def penalty_bytes(max_num_seqs: int, vocab_size: int) -> int:
        """Memory of the counts that the first request with a penalty allocates."""
        return max_num_seqs * vocab_size * (torch.int32.itemsize + torch.bool.itemsize)

    def admit(self, admit: Admit) -> None:
        """Take a slot's parameters; what it has said already counts as output."""
        slot, sampling = admit.slot, admit.sampling
        self._sampling[slot] = sampling
        self._needs_S[slot] = needs_of(sampling)
        self._num_prompt_S[slot] = admit.num_prompt
        self._num_admits += 1
        if self._needs_S[slot] & PENALISE:
            tokens = torch.from_numpy(unpack(admit.tokens).astype(np.int64)).to(self._device)
            self._count(slot, tokens[: admit.num_prompt], tokens[admit.num_prompt :])

    def prompt_logprobs_of(self, slot: int) -> tuple[int, int]:
        """(how many of the likeliest or -1 for none, tokens of the prompt)."""
        return self._sampling[slot].num_prompt_logprobs, int(self._num_prompt_S[slot])

    def needs_more(self, slots_R: NDArray[np.int64]) -> bool:
        """Whether some of these slots need more than their likeliest id."""
        return bool(self._needs_S[slots_R].any())

    def sample(self, logits_RV: Tensor, rows: StepRows, allowed: Allowed | None = None) -> Sampled:
        """One id for each logit row, in float32 logits that it leaves as they are."""
        slots_R = rows.logit_slots_R
        highest_R, ids_R = likeliest(logits_RV)
        logprobs = None
        if allowed is not None or self.needs_more(slots_R):
            positions_R = rows.positions_T[rows.logit_rows_R] + 1
            ids_R, logprobs = self._sample_with_extras(
                logits_RV, ids_R, slots_R, positions_R, allowed
            )
        slots = torch.from_numpy(slots_R)
        if self._device.type == "cuda":
            slots = slots.pin_memory().to(self._device, non_blocking=True)
        self.last_token_S.index_copy_(0, slots, ids_R)
        return Sampled(ids_R, highest_R, logprobs)

    def _sample_with_extras(
        self,
        logits_RV: Tensor,
        ids_R: Tensor,
        slots_R: NDArray[np.int64],
        positions_R: NDArray[np.int64],
        allowed: Allowed | None,
    ) -> tuple[Tensor, PendingLogprobs | None]:
        extras = self._extras_of(slots_R)
        edited_RV = self._edit(logits_RV, extras, slots_R, positions_R, allowed)
        if edited_RV is not logits_RV:
            ids_R = likeliest(edited_RV)[1]
        if extras.draws is not None:
            ids_R = _draw_rows(edited_RV, ids_R, extras.draws, positions_R)
        if extras.penalties is not None and self._counts_SV is not None:
            said = (extras.penalties.slots_N, ids_R[extras.penalties.rows_N])
            one = self._counts_SV.new_ones(())
            self._counts_SV.index_put_(said, one, accumulate=True)
        logprobs = None
        if extras.logprobs is not None:
            rows, num_top, rows_N = extras.logprobs
            logprobs = token_logprobs(logits_RV[rows_N], ids_R[rows_N], rows, num_top)
        return ids_R, logprobs

    def _edit(
        self,
        logits_RV: Tensor,
        extras: _Extras,
        slots_R: NDArray[np.int64],
        positions_R: NDArray[np.int64],
        allowed: Allowed | None,
    ) -> Tensor:
        """Bias, barred ids, penalties and grammars, on a copy if there are any."""
        barred = self._barred(slots_R, positions_R)
        if extras.bias is None and barred is None and extras.penalties is None and allowed is None:
            return logits_RV
        edited_RV = logits_RV.clone()
        if extras.bias is not None:
            row, token, value = extras.bias
            edited_RV.index_put_((row, token), value, accumulate=True)
        if barred is not None:
            edited_RV.index_put_(barred, edited_RV.new_tensor(NEVER))
        if extras.penalties is not None:
            self._penalise(edited_RV, extras.penalties)
        if allowed is not None:
            raw_NV = logits_RV[allowed.rows_N].masked_fill_(allowed.barred_NV, NEVER)
            kept_NV = edited_RV[allowed.rows_N].masked_fill_(allowed.barred_NV, NEVER)
            # What a grammar has left may be barred by `min_tokens`: the grammar counts.
            is_left_N1 = kept_NV.amax(dim=-1, keepdim=True) > NEVER
            edited_RV[allowed.rows_N] = torch.where(is_left_N1, kept_NV, raw_NV)
        return edited_RV

    def _barred(
        self, slots_R: NDArray[np.int64], positions_R: NDArray[np.int64]
    ) -> tuple[Tensor, Tensor] | None:
        """(row, id) of the stop ids of requests that have not said `min_tokens` yet."""
        pairs: list[tuple[int, int]] = []
        for row in np.flatnonzero(self._needs_S[slots_R] & BAR).tolist():
            slot = int(slots_R[row])
            sampling = self._sampling[slot]
            if positions_R[row] - self._num_prompt_S[slot] < sampling.min_tokens:
                pairs += [(row, token) for token in sampling.stop_token_ids]
            else:
                self._needs_S[slot] &= 0xFF ^ BAR
        if not pairs:
            return None
        rows, ids = torch.tensor(pairs, dtype=torch.int64, device=self._device).unbind(1)
        return rows, ids

    def _penalise(self, logits_RV: Tensor, penalties: _Penalties) -> None:
        """Presence and frequency look at what came out, repetition at the prompt too."""
        if self._counts_SV is None or self._in_prompt_SV is None:
            return
        counts_NV = self._counts_SV[penalties.slots_N]
        out_NV = counts_NV > 0
        seen_NV = out_NV | self._in_prompt_SV[penalties.slots_N]
        x_NV = logits_RV[penalties.rows_N]
        factor_N1 = penalties.repetition_N1
        repeated_NV = torch.where(x_NV > 0, x_NV / factor_N1, x_NV * factor_N1)
        x_NV = torch.where(seen_NV, repeated_NV, x_NV)
        x_NV -= penalties.frequency_N1 * counts_NV
        x_NV -= penalties.presence_N1 * out_NV
        logits_RV[penalties.rows_N] = x_NV

    def _count(self, slot: int, prompt: Tensor, output: Tensor) -> None:
        if self._counts_SV is None or self._in_prompt_SV is None:
            shape = (len(self._sampling), self._vocab_size)
            self._counts_SV = torch.zeros(shape, dtype=torch.int32, device=self._device)
            self._in_prompt_SV = torch.zeros(shape, dtype=torch.bool, device=self._device)
        counts_V, in_prompt_V = self._counts_SV[slot].zero_(), self._in_prompt_SV[slot].zero_()
        counts_V.index_add_(0, output, torch.ones_like(output, dtype=torch.int32))
        in_prompt_V.index_fill_(0, prompt, True)

    def _extras_of(self, slots_R: NDArray[np.int64]) -> _Extras:
        """Made anew only when the step's rows or their requests have changed."""
        same = slots_R is self._slots_R or np.array_equal(slots_R, self._slots_R)
        if self._extras is None or self._extras[0] != self._num_admits or not same:
            self._slots_R = slots_R
            self._extras = (self._num_admits, self._make_extras(slots_R))
        return self._extras[1]

    def _make_extras(self, slots_R: NDArray[np.int64]) -> _Extras:
        needs_R = self._needs_S[slots_R]
        sampling = [self._sampling[slot] for slot in slots_R.tolist()]

        def rows_that(need: int) -> list[int]:
            return np.flatnonzero(needs_R & need).tolist()

        drawing, penalised = rows_that(DRAW), rows_that(PENALISE)
        biased, wordy = rows_that(BIAS), rows_that(LOGPROBS)
        return _Extras(
            self._make_draws(drawing, sampling) if drawing else None,
            self._make_bias(biased, sampling) if biased else None,
            self._make_penalties(penalised, sampling, slots_R) if penalised else None,
            (wordy, [sampling[row].num_logprobs for row in wordy], self._integers(wordy))
            if wordy
            else None,
        )

    def _make_draws(self, rows: list[int], sampling: list[Sampling]) -> _Draws:
        chosen = [sampling[row] for row in rows]
        truncation = None
        if any(needs_of(one) & TRUNCATE for one in chosen):
            truncation = Truncation(
                self._integers([min(one.top_k, self._vocab_size) for one in chosen]),
                self._floats([one.top_p for one in chosen]),
                self._floats([one.min_p for one in chosen]),
            )
        return _Draws(
            None if len(rows) == len(sampling) else self._integers(rows),
            np.array(rows),
            self._floats([one.temperature for one in chosen])[:, None],
            self._integers([one.seed for one in chosen]),
            self._integers([one.nonce for one in chosen]),
            truncation,
        )

    def _make_bias(
        self, rows: list[int], sampling: list[Sampling]
    ) -> tuple[Tensor, Tensor, Tensor]:
        triples = [(row, token, bias) for row in rows for token, bias in sampling[row].logit_bias]
        row, token, bias = zip(*triples, strict=True)
        return self._integers(row), self._integers(token), self._floats(bias)

    def _make_penalties(
        self, rows: list[int], sampling: list[Sampling], slots_R: NDArray[np.int64]
    ) -> _Penalties:
        chosen = [sampling[row] for row in rows]
        return _Penalties(
            self._integers(rows),
            self._integers(slots_R[rows].tolist()),
            self._floats([one.presence_penalty for one in chosen])[:, None],
            self._floats([one.frequency_penalty for one in chosen])[:, None],
            self._floats([one.repetition_penalty for one in chosen])[:, None],
        )

    def _integers(self, values: list[int] | tuple[int, ...]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)

    def _floats(self, values: list[float] | tuple[float, ...]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=self._device)


def likeliest(logits_RV: Tensor) -> tuple[Tensor, Tensor]:
    """(highest logit, its id) of each row; not finite if the row is poisoned."""
    if logits_RV.is_cuda:
        from kernels import decode_rows  # Triton: only with a GPU

        return decode_rows.likeliest(logits_RV)
    highest_R, ids_R = logits_RV.max(dim=-1)
    return highest_R, ids_R


def needs_of(sampling: Sampling) -> int:
    """The kinds of work a request needs beyond the likeliest id.

    >>> needs_of(Sampling(temperature=0.0))
    0
    """
    needs = 0
    if sampling.temperature >= COLDEST:
        needs |= DRAW
        if sampling.top_k or sampling.top_p < 1.0 or sampling.min_p > 0.0:
            needs |= TRUNCATE
    if sampling.logit_bias:
        needs |= BIAS
    if sampling.min_tokens and sampling.stop_token_ids:
        needs |= BAR
    penalties = (sampling.presence_penalty, sampling.frequency_penalty)
    if any(penalties) or sampling.repetition_penalty != 1.0:
        needs |= PENALISE
    if sampling.num_logprobs >= 0:
        needs |= LOGPROBS
    return needs


def token_logprobs(
    logits_NV: Tensor, ids_N: Tensor, rows: list[int], num_top: list[int]
) -> PendingLogprobs:
    """Log-probabilities of `ids_N` and of each row's `num_top` likeliest, from raw logits."""
    logprobs_NV = logits_NV.log_softmax(dim=-1)
    chosen_N1 = logprobs_NV.gather(-1, ids_N[:, None])
    ranks_N = (logprobs_NV > chosen_N1).sum(dim=-1) + 1
    top = logprobs_NV.topk(min(max(num_top), logits_NV.shape[-1]), dim=-1)
    return PendingLogprobs(
        rows, num_top, ids_N, chosen_N1.squeeze(-1), ranks_N, top.indices, top.values
    )


def _draw_rows(
    logits_RV: Tensor, ids_R: Tensor, draws: _Draws, positions_R: NDArray[np.int64]
) -> Tensor:
    """`ids_R` with the drawn rows' ids in place of the likeliest."""
    positions_N = torch.from_numpy(positions_R[draws.rows]).to(ids_R.device, non_blocking=True)
    scaled_NV = logits_RV if draws.rows_N is None else logits_RV[draws.rows_N]
    if scaled_NV.is_cuda:
        drawn_N = _draw_on_gpu(scaled_NV, draws, positions_N)
        return drawn_N if draws.rows_N is None else ids_R.index_copy(0, draws.rows_N, drawn_N)
    scaled_NV = scaled_NV / draws.temperature_N1
    lowest_N1 = None if draws.truncation is None else lowest_kept(scaled_NV, draws.truncation)
    drawn_N = draw(scaled_NV, lowest_N1, draws.seed_N, draws.nonce_N, positions_N)
    if draws.rows_N is None:
        return drawn_N
    return ids_R.index_copy(0, draws.rows_N, drawn_N)


def _draw_on_gpu(logits_NV: Tensor, draws: _Draws, position_N: Tensor) -> Tensor:
    from kernels import draw as race  # Triton: only with a GPU
    from kernels import truncate

    temperature_N, lowest_N = draws.temperature_N1.flatten(), None
    if draws.truncation is not None:
        lowest_N = truncate.lowest_kept(logits_NV, temperature_N, *draws.truncation)
    return race.draw(logits_NV, temperature_N, lowest_N, draws.seed_N, draws.nonce_N, position_N)
