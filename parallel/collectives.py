"""The collectives the model needs: one function a kind, each taking the group it runs over.

No function reads a global: a call site shows who is talking to whom. A group of one returns its
input untouched, so single-GPU code is the same code. Every call is recorded in the group's
ledger before it is made, so a rank that skips one is found by its digest.
"""

import torch
from torch import Tensor

from parallel.groups import Group, Transport


def _transport(group: Group) -> Transport:
    if group.transport is None:
        raise RuntimeError(
            f"group {group.name} of ranks {group.members} has no communicator on this rank"
        )
    return group.transport


def all_reduce(x: Tensor, group: Group) -> Tensor:
    """Sum `x` over `group`, in place, and return it."""
    if group.size == 1:
        return x
    group.ledger.record("all_reduce", group.name, x.shape)
    _transport(group).all_reduce(x)
    return x


def all_gather_rows(x_TD: Tensor, group: Group) -> Tensor:
    """Stack every rank's rows (T, ...) in group order: (W * T, ...). All ranks hold equal T."""
    if group.size == 1:
        return x_TD
    group.ledger.record("all_gather", group.name, x_TD.shape)
    out = x_TD.new_empty(group.size * x_TD.shape[0], *x_TD.shape[1:])
    _transport(group).all_gather(out, x_TD.contiguous())
    return out


def all_gather_columns(x_TD: Tensor, group: Group) -> Tensor:
    """Join every rank's columns (T, D) in group order: (T, W * D)."""
    if group.size == 1:
        return x_TD
    num_rows, num_cols = x_TD.shape
    stacked = all_gather_rows(x_TD, group).view(group.size, num_rows, num_cols)
    return stacked.transpose(0, 1).reshape(num_rows, group.size * num_cols)


def reduce_scatter_rows(x_TD: Tensor, group: Group) -> Tensor:
    """Sum over `group` and keep this rank's block of rows: (W * T, ...) becomes (T, ...)."""
    if group.size == 1:
        return x_TD
    if x_TD.shape[0] % group.size:
        raise ValueError(
            f"{x_TD.shape[0]} rows do not divide over the {group.size} ranks of {group.name}; "
            "pad them first"
        )
    group.ledger.record("reduce_scatter", group.name, x_TD.shape)
    out = torch.empty_like(x_TD[: x_TD.shape[0] // group.size])
    _transport(group).reduce_scatter(out, x_TD.contiguous())
    return out
