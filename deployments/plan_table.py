"""`lockstep plan`: the collectives of a model under given settings, as a table; starts nothing.

    lockstep plan --model DIR --tp-size 8 --dp-size 2 --enable-dp-attention
    lockstep plan --preset 30b-a3b --tp-size 8 ...

reads config.json alone; a preset is one that we bring. What cannot be is refused with the sentence
that the engine would give.
"""

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from deployments.config import ServiceConfig
from deployments.fit import check_fit
from deployments.presets import write_preset
from parallel.layout import Layout
from parallel.plan import Collective, Plan, Stage
from workers.config import EngineConfig

COLUMNS = ("layers", "where", "rows", "owed over", "collectives (ranks of each group)")


class _Line(NamedTuple):
    """A stage, for all the neighbouring layers that have it alike."""

    layers: range | None
    stage: Stage


def print_plan(args: Mapping[str, Any]) -> int:
    """Prints the table; a ValueError says why there is none."""
    settings = dict(args)
    preset = settings.pop("preset", "")
    if preset and settings.get("model"):
        raise ValueError(f"--preset {preset} stands for a model: leave out --model")
    with tempfile.TemporaryDirectory() as folder:
        if preset:
            settings["model"] = str(write_preset(preset, Path(folder)))
        print("\n".join(plan_text(ServiceConfig.from_args(settings).engine)))
    return 0


def plan_text(config: EngineConfig) -> list[str]:
    """The lines of the table."""
    plan = check_fit(config)
    layout = plan.layout
    cells = [COLUMNS, *(_cells(line, layout) for line in _lines(plan))]
    widths = [max(len(row[i]) for row in cells) for i in range(len(COLUMNS))]
    table = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    ]
    rule = "  ".join("-" * width for width in widths)
    return [_title(plan), "", table[0], rule, *table[1:], "", *_consequences(plan)]


def _title(plan: Plan) -> str:
    layout = plan.layout
    sparse = sum(plan.model.sparse)
    layers = f"{len(plan.mlps) - sparse} dense and {sparse} sparse layers"
    ranks = f"{layout.tp_size} ranks"
    if layout.num_domains > 1:
        ranks = f"each of {layout.num_domains} separate replicas of {ranks}"
    context = f" x {layout.attn_cp_size}" if layout.attn_cp_size > 1 else ""
    attention = f"attention {layout.attn_dp_size}{context} x {layout.attn_tp_size}"
    experts = f"experts {layout.moe_dp_size} x {layout.ep_size} x {layout.moe_tp_size}"
    parts = [attention, experts] if sparse else [attention]
    return f"{plan.model.architecture}, {layers}, on {ranks}: {', '.join(parts)}"


def _lines(plan: Plan) -> Iterator[_Line]:
    """Layers that are alike are one block of lines."""
    stages = list(plan.stages())
    by_layer: dict[int, list[Stage]] = {}
    for stage in stages:
        if stage.layer is not None:
            by_layer.setdefault(stage.layer, []).append(stage)
    yield from (_Line(None, stage) for stage in stages[:1])
    first = 0
    while first < len(by_layer):
        alike = first
        while alike + 1 < len(by_layer) and _same(by_layer[first], by_layer[alike + 1]):
            alike += 1
        yield from (_Line(range(first, alike + 1), stage) for stage in by_layer[first])
        first = alike + 1
    yield from (
        _Line(None, stage) for stage in stages if stage.layer is None and stage is not stages[0]
    )


def _same(one: list[Stage], other: list[Stage]) -> bool:
    return [stage._replace(layer=None) for stage in one] == [
        stage._replace(layer=None) for stage in other
    ]


def _cells(line: _Line, layout: Layout) -> tuple[str, ...]:
    layers, stage = line
    numbers = ""
    if layers is not None:
        numbers = str(layers[0]) if len(layers) == 1 else f"{layers[0]}-{layers[-1]}"
    rows = " > ".join(each.value for each in stage.path)
    collectives = ", ".join(_collective(one, layout) for one in stage.collectives)
    return numbers, stage.where, rows, stage.owed or "", collectives or "-"


def _collective(one: Collective, layout: Layout) -> str:
    members = layout.members(one.group, 0)
    across = ", across NVLink domains" if layout.spans_nodes(members) else ""
    return f"{one.op} {one.group} ({len(members)}{across})"


def _consequences(plan: Plan) -> Iterator[str]:
    """What the driver and the arena make of it."""
    multiple, num_parts = plan.row_multiple, plan.layout.attn_cp_size
    if multiple == 1:
        yield "rows       of a replica are never rounded up"
    else:
        what = "its parts" if multiple == num_parts else "its ranks"
        yield f"rows       of a replica are padded to a multiple of {multiple}, {what}"
    if num_parts > 1:
        yield f"context    prompts are cut zigzag over {num_parts} parts, decodes are dealt out;"
        yield "           what rows leave in the cache is gathered while queries are computed"
    if plan.crosses_replicas:
        yield "padding    MAX_LEN or SUM_LEN, in the step's header: no collective agrees on it"
    if plan.collectives:
        yield "symmetric  both sides of every collective but all_to_all, on its own group"
    yield f"require_mlp_tp_gather   {_yes(plan.require_mlp_tp_gather)}"
    yield f"require_attn_tp_gather  {_yes(plan.require_attn_tp_gather)}"
    yield f"require_gathered_buffer {_yes(plan.require_gathered_buffer)}"
    yield f"require_mlp_sync        {_yes(plan.require_mlp_sync)}"


def _yes(value: bool) -> str:
    return "yes" if value else "no"
