"""Whether a model folder and an engine's settings fit together, before anything is started.

    python -m workers.preflight < config.json        (the JSON of an EngineConfig)

Reads config.json, the tokenizer's presence and the headers of the weights; computes nothing and
needs no GPU. Prints nothing and exits 0 if all is well, else one sentence and 2. `lockstep serve`
runs it while Ray starts, so a mistake costs seconds; the ranks check everything again.
"""

import sys
from pathlib import Path

import msgspec
import torch

from parallel.groups import build_groups
from workers import bundled
from workers.cache_format import stored_dtype
from workers.config import EngineConfig
from workers.models import build_model, read_model_config
from workers.weights import check_weights


def check(config: EngineConfig) -> None:
    """Raise a ValueError with a sentence if the engine could not serve this model."""
    folder = Path(config.model) if config.model else bundled.path()
    model_config = read_model_config(folder)
    groups = build_groups(config.layout, 0, lambda members: None)
    with torch.device("meta"):
        model = build_model(
            model_config, groups, torch.device("meta"), torch.float32, config.plan_settings
        )
    stored_dtype(config.kv_cache_dtype, model.cache_shapes, model.dtype)
    if config.load_format != "dummy":
        check_weights(model, folder)
    longest = model.max_position_embeddings
    if config.max_model_len is not None and config.max_model_len > longest:
        raise ValueError(
            f"max_model_len={config.max_model_len} is more than the {longest} positions of the "
            f"model in {folder}: lower it to {longest}"
        )
    if not (folder / "tokenizer.json").is_file():
        raise ValueError(f"{folder} has no tokenizer.json: save the model's fast tokenizer there")


def main() -> int:
    try:
        check(msgspec.json.decode(sys.stdin.buffer.read(), type=EngineConfig))
    except ValueError as error:
        print(error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
