"""The symmetric memory of an engine's ranks: what the configured model needs, opened at start.

The sizes come from the configuration and the model's own, never from a step, so all ranks find the
same slots. Nothing here is called without `enable_symm_mem`.
"""

import torch

from parallel.arena import (
    ArenaPlan,
    ModelSizes,
    context_needs,
    lay_out,
    logit_needs,
    model_needs,
)
from parallel.groups import Groups
from parallel.layout import GROUP_NAMES, GroupName
from parallel.padding import align_rows
from parallel.plan import Plan, Rows
from parallel.symmetric import nccl_version
from workers.config import EngineConfig
from workers.model_config import ModelConfig

FIRST_NCCL = (2, 27)
"""The first NCCL with symmetric kernels."""

LEAST_LOGIT_ROWS = 256
"""A prompt's log-probabilities are worked out for so many rows at once."""


def arena_plan(
    config: EngineConfig, model: ModelConfig, plan: Plan, dtype: torch.dtype
) -> ArenaPlan:
    """Slots for every collective of the plan; refused if they need more than they may take."""
    [num_decodes] = align_rows([config.max_num_seqs], plan.row_multiple)
    num_logit_rows = max(num_decodes, LEAST_LOGIT_ROWS)
    num_rows = config.max_num_batched_tokens
    made = slots_of(model, plan, dtype, num_rows=num_rows, num_logit_rows=num_logit_rows)
    made.check_cap(config.symm_mem_prealloc_gb)
    return made


def slots_of(
    model: ModelConfig, plan: Plan, dtype: torch.dtype, *, num_rows: int, num_logit_rows: int
) -> ArenaPlan:
    sizes = ModelSizes(
        model.hidden_size,
        model.vocab_size,
        dtype.itemsize,
        num_rows,
        num_logit_rows,
        context_bytes=cached_width(model, plan.layout.attn_tp_size) * dtype.itemsize,
    )
    stages = [stage for stage in plan.stages() if stage.where != "logits"]
    collectives = dict.fromkeys(one for stage in stages for one in stage.collectives)
    pairs: list[tuple[str, GroupName]] = [(one.op, one.group) for one in collectives]
    uneven = plan.attention.rows is Rows.SCATTERED  # then no rows are padded to divide
    needs = model_needs(plan.layout, sizes, pairs, has_uneven_shares=uneven)
    needs += context_needs(plan.layout, sizes)
    spans, group = plan.head.rows is Rows.FULL, plan.head.group or "attn_tp"
    needs += logit_needs(plan.layout, sizes, spans_replicas=spans, group=group)
    return lay_out(needs, plan.layout)


def cached_width(model: ModelConfig, attn_tp: int) -> int:
    """Numbers that a row leaves in the cache of one layer on one rank."""
    latent = model.latent
    if latent is not None:
        index = 0 if latent.index is None else latent.index.head_dim
        return latent.rank + model.head_dim + index
    return 2 * max(model.num_kv_heads // attn_tp, 1) * model.head_dim


def open_arena(
    config: EngineConfig,
    model: ModelConfig,
    plan: Plan,
    groups: Groups,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Allocate and register; all ranks of the domain come here at the same point of their start."""
    if device.type == "cuda" and nccl_version() < FIRST_NCCL:
        raise ValueError(
            f"enable_symm_mem needs NCCL {'.'.join(map(str, FIRST_NCCL))} or later and this torch "
            f"has {'.'.join(map(str, nccl_version()))}: leave it off, or install a newer torch"
        )
    groups.arena.open(
        arena_plan(config, model, plan, dtype),
        groups.by_name(),
        device,
        is_strict=config.symm_mem_strict,
        time_limit_s=config.start_timeout_s / 4,
    )


def open_sums_of(
    config: EngineConfig,
    model: ModelConfig,
    plan: Plan,
    groups: Groups,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Measure how each group that sums rows does it quickest; nothing to do on a CPU.

    Every rank of the domain comes here at the same point of its start.
    """
    if device.type != "cuda" or config.all_reduce == "nccl":
        return
    from parallel.peer_memory import open_sums

    names = {one.group for one in plan.collectives if one.op == "all_reduce"}
    by_name = groups.by_name()
    chosen = [by_name[name] for name in GROUP_NAMES if name in names and by_name[name].size > 1]
    open_sums(chosen, device, model.hidden_size, dtype, lambda line: print(line, flush=True))
