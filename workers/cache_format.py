"""What the cache keeps its numbers in: the model's own type, or e4m3 times a scale of each layer.

kv_cache_dtype=auto        keys and values, or a latent, as they are computed
kv_cache_dtype=fp8_e4m3    keys and values in eight bits (`kernels.fp8`), by the checkpoint's
                           k_scale and v_scale, or as they are where it has none
"""

from typing import Literal, NamedTuple

import torch

from kernels.fp8 import E4M3, Scales
from workers.cache import RowShapes, is_latent
from workers.models import Model

FP8_CAPABILITY = (8, 9)
"""Of the first GPUs that convert e4m3."""

KVCacheDtype = Literal["auto", "fp8_e4m3"]


class CacheFormat(NamedTuple):
    """What a `PagedCache` is made of."""

    dtype: torch.dtype
    scales: tuple[Scales, ...] = ()
    """By layer, of a cache of e4m3; of any other none."""

    @property
    def lacks_scales(self) -> bool:
        """It is e4m3 and nothing is known of how large keys and values are."""
        return set(self.scales) == {Scales(1.0, 1.0)}


def stored_dtype(asked: KVCacheDtype, shapes: RowShapes, dtype: torch.dtype) -> torch.dtype:
    """For a token's parts of these shapes in a model that computes in `dtype`."""
    if asked == "auto":
        return dtype
    if is_latent(shapes):
        raise ValueError(
            "kv_cache_dtype=fp8_e4m3 is offered for keys and values of heads, and this model "
            "caches a latent: take kv_cache_dtype=auto"
        )
    return E4M3


def format_of(asked: KVCacheDtype, model: Model, device: torch.device) -> CacheFormat:
    """For a model that has its weights; `ValueError` if it, or the GPU, cannot be served so."""
    dtype = stored_dtype(asked, model.cache_shapes, model.dtype)
    if dtype != E4M3:
        return CacheFormat(dtype)
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < FP8_CAPABILITY:
        raise ValueError(
            "kv_cache_dtype=fp8_e4m3 needs a GPU of compute capability 8.9 or later, and this is "
            f"{torch.cuda.get_device_name(device)}: take kv_cache_dtype=auto"
        )
    scales = model.kv_scales()
    for layer, (key, value) in enumerate(scales):
        if not all(scale is not None and 0.0 < scale < float("inf") for scale in (key, value)):
            raise ValueError(
                f"layer {layer} of the checkpoint has k_scale {key} and v_scale {value}, which "
                "must be above 0: take kv_cache_dtype=auto"
            )
    return CacheFormat(dtype, scales)
