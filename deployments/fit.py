"""Whether an engine's settings and a model's config.json fit together: known before any start.

What is checked here needs neither torch nor the weights, so that a wrong command is told in its
first second. `workers.preflight` goes on with the weights' names and shapes, and the ranks check
everything again.
"""

from pathlib import Path

from parallel.plan import Plan, compile_plan
from workers import bundled
from workers.architectures import layers_of, read_model_config
from workers.config import EngineConfig
from workers.model_split import check_split


def folder_of(config: EngineConfig) -> Path:
    """The model's folder."""
    return Path(config.model) if config.model else bundled.path()


def check_fit(config: EngineConfig) -> Plan:
    """The collective plan of the configured model; a ValueError says why it cannot be served."""
    folder, layout = folder_of(config), config.layout
    model = read_model_config(folder)
    plan = compile_plan(layout, config.plan_settings, layers_of(model))
    check_split(
        model,
        attn_tp=layout.attn_tp_size,
        dense_tp=layout.dense_tp_size,
        moe_tp=layout.moe_tp_size,
    )
    longest = model.max_position_embeddings
    if config.max_model_len is not None and config.max_model_len > longest:
        raise ValueError(
            f"max_model_len={config.max_model_len} is more than the {longest} positions of the "
            f"model in {folder}: lower it to {longest}"
        )
    return plan


def check_tokenizer(config: EngineConfig) -> None:
    """A ValueError if the model's folder has no tokenizer: texts cannot become token ids."""
    folder = folder_of(config)
    if not (folder / "tokenizer.json").is_file():
        raise ValueError(f"{folder} has no tokenizer.json: save the model's fast tokenizer there")
