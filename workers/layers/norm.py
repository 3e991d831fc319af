"""Root-mean-square normalisation, alone or after adding to the residual stream."""

import torch
import torch.nn.functional as F
from torch import Tensor

from workers.layers.build import Build
from workers.weights import Source, everything


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Normalise the last dimension to mean square one, then scale by `weight`.

    NOTE: F.rms_norm is fused on GPUs only. In float32 on a CPU the same is had from a vector norm
    in half the time: sqrt(mean(x²) + eps) = hypot(|x| / sqrt(D), sqrt(eps)).
    """
    size = x.shape[-1]
    if x.is_cuda or x.dtype != torch.float32:
        return F.rms_norm(x, (size,), weight, eps)
    root = torch.linalg.vector_norm(x, dim=-1, keepdim=True).mul_(size**-0.5)
    out = x / root.hypot_(root.new_full((1,), eps**0.5))
    return out if weight is None else out.mul_(weight)


class RMSNorm:
    def __init__(self, build: Build, name: str) -> None:
        self._name = name
        self.weight_D = build.empty(build.config.hidden_size)
        self.eps = build.config.rms_norm_eps

    def forward(self, x_TD: Tensor) -> Tensor:
        return rms_norm(x_TD, self.weight_D, self.eps)

    def add(self, x_TD: Tensor, residual_TD: Tensor) -> Tensor:
        """Add `x` to the residual stream, in place, and normalise the sum."""
        return rms_norm(residual_TD.add_(x_TD), self.weight_D, self.eps)

    def sources(self) -> list[Source]:
        return [everything(self.weight_D, f"{self._name}.weight", "ones")]
