"""Open arenas for tests: ranks as threads, with slots for every group."""

from parallel.arena import Need, lay_out
from parallel.groups import Groups
from parallel.layout import GROUP_NAMES, Layout
from parallel.thread_world import run_thread_world

CPU = "cpu"
ROLES = (
    "embedded", "reduced", "gather_in", "scatter_in", "scattered", "local_dp", "global_dp", "cp_in",
    "cp_kv",
)  # fmt: skip
DP_ATTENTION = Layout(tp_size=4, dp_size=2, enable_dp_attention=True)
"""Four ranks: tp 0-3, attn_tp 0 1 and 2 3, attn_dp 0 2 and 1 3."""


def needs(num_bytes=4096):
    return [Need(role, (name,), num_bytes) for role in ROLES for name in GROUP_NAMES]


def open_arena(groups: Groups, layout: Layout, *, is_strict=True, num_bytes=4096, **more) -> None:
    import torch

    plan = lay_out(needs(num_bytes), layout)
    groups.arena.open(plan, groups.by_name(), torch.device(CPU), is_strict=is_strict, **more)


def run_with_arena(layout, body, *, is_strict=True, **more):
    """`run_thread_world` with every rank's arena open and sealed."""

    def opened(rank, groups):
        open_arena(groups, layout, is_strict=is_strict)
        groups.arena.seal()
        return body(rank, groups)

    return run_thread_world(layout, opened, **more)
