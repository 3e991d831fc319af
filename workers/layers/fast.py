"""Operations that have a kernel of ours on a GPU; elsewhere they are torch's.

Triton is there only with a GPU build of torch, so its kernels are imported where they are used.
"""

import torch
from torch import Tensor
from torch.nn import functional


def linear(
    x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None, *, out: Tensor | None = None
) -> Tensor:
    """Written to `out` where the caller has a place for it."""
    if x_TK.is_cuda:
        from kernels.skinny_linear import fits, skinny_linear

        if fits(x_TK):
            return skinny_linear(x_TK.contiguous(), weight_NK, bias_N, out=out)
        if bias_N is None and x_TK.dtype != torch.float32:
            return _narrow_or_wide(x_TK, weight_NK, out)
    if out is None:
        return functional.linear(x_TK, weight_NK, bias_N)
    if bias_N is None:
        return torch.mm(x_TK, weight_NK.t(), out=out)
    return torch.addmm(bias_N, x_TK, weight_NK.t(), out=out)


def _narrow_or_wide(x_TK: Tensor, weight_NK: Tensor, out: Tensor | None) -> Tensor:
    from kernels.narrow_linear import choose_tiles, narrow_linear

    (num_rows, num_in), num_out = x_TK.shape, weight_NK.shape[0]
    tiles = choose_tiles(num_rows, num_in, num_out) if num_rows else None
    if tiles is not None:
        return narrow_linear(x_TK.contiguous(), weight_NK, tiles=tiles, out=out)
    if out is None:
        return functional.linear(x_TK, weight_NK)
    return torch.mm(x_TK, weight_NK.t(), out=out)


def gated_linear(x_TK: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """`silu_and_multiply` of the product."""
    if x_TK.is_cuda:
        from kernels.skinny_linear import fits, skinny_linear

        if fits(x_TK):
            return skinny_linear(x_TK.contiguous(), weight_NK, bias_N, gated=True)
    return silu_and_multiply(functional.linear(x_TK, weight_NK, bias_N))


def head_linear(x_RK: Tensor, weight_VK: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Logits: on a GPU not rounded to the weight's type, so that few are equal.

    Written to `out`, which is float32, where the caller has a place for them.
    """
    if x_RK.is_cuda and x_RK.dtype != torch.float32:
        from kernels.skinny_linear import fits, skinny_linear

        if fits(x_RK):
            return skinny_linear(x_RK.contiguous(), weight_VK, out_dtype=torch.float32, out=out)
        if out is None:
            return torch.mm(x_RK, weight_VK.t(), out_dtype=torch.float32)
        return torch.mm(x_RK, weight_VK.t(), out_dtype=torch.float32, out=out)
    if out is None:
        return functional.linear(x_RK, weight_VK)
    if x_RK.dtype != out.dtype:
        return out.copy_(functional.linear(x_RK, weight_VK))
    return torch.mm(x_RK, weight_VK.t(), out=out)


def float32_linear(x_TK: Tensor, weight_NK: Tensor) -> Tensor:
    """The product in float32, whatever the type of the two."""
    if x_TK.is_cuda:
        return head_linear(x_TK, weight_NK)
    return functional.linear(x_TK.float(), weight_NK.float())


def silu_and_multiply(gate_up: Tensor) -> Tensor:
    """silu of the first half of the columns, times the second half."""
    if gate_up.is_cuda:
        from kernels.silu_multiply import silu_multiply

        return silu_multiply(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate).mul_(up)


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
    """On a GPU only: see `workers.layers.norm` for elsewhere."""
    from kernels.rms_norm import rms_norm as launch

    return launch(x_TD, weight_D, eps=eps, out=out)


def add_rms_norm(
    x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float, out: Tensor | None = None
) -> Tensor:
    """On a GPU only."""
    from kernels.rms_norm import add_rms_norm as launch

    return launch(x_TD, residual_TD, weight_D, eps=eps, out=out)


def rope_rows(
    x_TND: Tensor,
    norm_RD: Tensor | None,
    rotation_T3C: Tensor,
    out_TND: Tensor,
    *,
    num_rotated: int,
    eps: float,
) -> None:
    """On a GPU only."""
    from kernels.rope_rows import rope_rows as launch

    launch(x_TND, norm_RD, rotation_T3C, out_TND, num_rotated=num_rotated, eps=eps)


def latent_keys(
    x_TP: Tensor,
    query_norm_Q: Tensor | None,
    latent_norm_R: Tensor,
    rotation_T3C: Tensor,
    *,
    eps: float,
    interleaved: bool,
) -> tuple[Tensor | None, Tensor]:
    """On a GPU only: see `workers.layers.latent_attention` for elsewhere."""
    from kernels.latent_prepare import latent_keys as launch

    return launch(
        x_TP.contiguous(),
        query_norm_Q,
        latent_norm_R,
        rotation_T3C,
        eps=eps,
        interleaved=interleaved,
    )


def turn_queries(x_THX: Tensor, rotation_T3C: Tensor, q_THW: Tensor, *, interleaved: bool) -> None:
    """On a GPU only."""
    from kernels.latent_prepare import turn_queries as launch

    launch(x_THX.contiguous(), rotation_T3C, q_THW, interleaved=interleaved)
