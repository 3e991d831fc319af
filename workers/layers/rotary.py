"""Rotary position embedding: each pair of a head's coordinates turns with the row's position.

The table is computed once and indexed once a step; all layers share what comes out.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from workers.model_config import RopeConfig


class Rotation(NamedTuple):
    """A step's rotation, with the head dimension as two halves of C = head_dim / 2."""

    rows_T3C: Tensor
    """Cosines, minus sines and sines; what follows are views of it."""

    cos_T11C: Tensor
    sin_T12C: Tensor
    """Minus the sine for the first half, the sine for the second."""

    def apply(self, x_THD: Tensor) -> Tensor:
        """Rotate all heads of every row."""
        num_rows, num_heads, dim = x_THD.shape
        x_TH2C = x_THD.view(num_rows, num_heads, 2, dim // 2)
        out_TH2C = x_TH2C * self.cos_T11C
        return out_TH2C.addcmul_(x_TH2C.flip(2), self.sin_T12C).flatten(-2)


class RotaryTable:
    """Cosines and sines of all positions."""

    def __init__(
        self,
        rope: RopeConfig,
        head_dim: int,
        max_positions: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        frequency_C = inverse_frequencies(rope, head_dim)
        position_P = torch.arange(max_positions, dtype=torch.float32)
        angle_PC = torch.outer(position_P.to(device), frequency_C.to(device))
        cos_PC = angle_PC.cos() * rope.attention_factor
        sin_PC = angle_PC.sin() * rope.attention_factor
        self._table_P3C = torch.stack((cos_PC, -sin_PC, sin_PC), dim=1).to(dtype)

    def at(self, positions_T: Tensor) -> Rotation:
        rows_T13C = self._table_P3C[positions_T].unsqueeze(1)
        return Rotation(rows_T13C[:, 0], rows_T13C[:, :, :1], rows_T13C[:, :, 1:])


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """Radians that each of the head_dim / 2 pairs turns from one position to the next."""
    exponent_C = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    frequency_C = rope.theta**-exponent_C
    if rope.kind == "linear":
        return frequency_C / rope.factor
    if rope.kind == "llama3":
        return _stretch_llama3(frequency_C, rope)
    if rope.kind == "yarn":
        return _stretch_yarn(frequency_C, rope, head_dim)
    return frequency_C


def _stretch_llama3(frequency_C: Tensor, rope: RopeConfig) -> Tensor:
    """Slow pairs turn `factor` times slower, fast ones as before, those between in between."""
    turns_C = frequency_C * rope.original_max_positions / (2 * math.pi)
    width = rope.high_freq_factor - rope.low_freq_factor
    keep_C = ((turns_C - rope.low_freq_factor) / width).clamp(0.0, 1.0)
    return frequency_C * (keep_C + (1.0 - keep_C) / rope.factor)


def _stretch_yarn(frequency_C: Tensor, rope: RopeConfig, head_dim: int) -> Tensor:
    """Like llama3's, with a ramp that is linear in the pair's index instead of its frequency."""

    def pair_turning(turns: float) -> float:
        """The index, as a real number, of the pair that turns so often over the old context."""
        ratio = rope.original_max_positions / (turns * 2 * math.pi)
        return head_dim * math.log(ratio) / (2 * math.log(rope.theta))

    low, high = pair_turning(rope.beta_fast), pair_turning(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low if high != low else 0.001
    index_C = torch.arange(len(frequency_C), dtype=torch.float32)
    slow_C = ((index_C - low) / width).clamp(0.0, 1.0)
    return frequency_C * (1.0 - slow_C) + frequency_C / rope.factor * slow_C
