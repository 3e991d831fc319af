"""Normalisation: by root mean square, alone or after adding to the residual stream; by layer."""

import torch
from torch import Tensor
from torch.nn import functional

from workers.layers.build import Build
from workers.layers.fast import add_rms_norm, rms_norm
from workers.weights import Source, everything


class UnitRms:
    """Scales the last dimension to mean square one.

    NOTE: torch's own rms_norm is fused on GPUs only. In float32 on a CPU a vector norm gives the
    same in half the time: sqrt(mean(x²) + eps) = hypot(|x| / sqrt(D), sqrt(eps)). The two constants
    are tensors because each number handed to an operation costs a conversion.
    """

    def __init__(self, build: Build, size: int, eps: float | None = None) -> None:
        """`eps` is the config's if it is None."""
        self._eps = build.config.rms_norm_eps if eps is None else eps
        self._shape = (size,)
        self._shrink_1 = torch.tensor([size**-0.5], device=build.device)
        self._root_eps_1 = torch.tensor([self._eps**0.5], device=build.device)
        self._is_fused = build.device.type == "cuda" or build.dtype != torch.float32

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        """`weight` is one vector, or one for each of the last two dimensions."""
        if self._is_fused and weight.dim() == 1:
            return functional.rms_norm(x, self._shape, weight, self._eps)
        if self._is_fused:
            return functional.rms_norm(x, self._shape, None, self._eps).mul_(weight)
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return (x / length.mul_(self._shrink_1).hypot_(self._root_eps_1)).mul_(weight)


class RMSNorm:
    def __init__(
        self, build: Build, name: str, size: int | None = None, eps: float | None = None
    ) -> None:
        """Of rows as wide as the model, with the config's eps, unless it is said otherwise."""
        size = build.config.hidden_size if size is None else size
        self._name = name
        self._unit = UnitRms(build, size, eps)
        self.eps = build.config.rms_norm_eps if eps is None else eps
        self.weight_D = build.empty(size)

    def forward(self, x_TD: Tensor, out: Tensor | None = None) -> Tensor:
        """Written to `out` where the caller has a place for it."""
        if x_TD.is_cuda:
            return rms_norm(x_TD, self.weight_D, self.eps, out)
        normal_TD = self._unit.forward(x_TD, self.weight_D)
        return normal_TD if out is None else out.copy_(normal_TD)

    def add(self, x_TD: Tensor, residual_TD: Tensor, out: Tensor | None = None) -> Tensor:
        """Add `x` to the residual stream, in place, and normalise the sum."""
        if x_TD.is_cuda:
            return add_rms_norm(x_TD, residual_TD, self.weight_D, self.eps, out)
        return self.forward(residual_TD.add_(x_TD), out)

    def sources(self) -> list[Source]:
        return [everything(self.weight_D, f"{self._name}.weight", "ones")]


class LayerNorm:
    """With the mean taken off, a weight and a bias."""

    def __init__(self, build: Build, name: str, size: int, eps: float) -> None:
        self._name, self._eps = name, eps
        self.weight_D, self.bias_D = build.empty(size), build.empty(size)

    def forward(self, x_TD: Tensor) -> Tensor:
        shape = self.weight_D.shape
        return functional.layer_norm(x_TD, shape, self.weight_D, self.bias_D, self._eps)

    def sources(self) -> list[Source]:
        return [
            everything(self.weight_D, f"{self._name}.weight", "ones"),
            everything(self.bias_D, f"{self._name}.bias", "zeros"),
        ]
