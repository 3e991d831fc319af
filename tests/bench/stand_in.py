"""Models for benchmarks: a preset's folder has its shape, and made-up words for random ids."""

import itertools
import json
import string
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from deployments.presets import PRESETS


def model_settings(name: str, folder: Path) -> dict[str, Any]:
    """Settings for a preset, whose files go to `folder`, a model's folder, or the bundled model."""
    if name in PRESETS:
        write_preset(name, folder)
        return {"model": str(folder), "load_format": "dummy"}
    return {"model": name} if name else {}


def write_preset(name: str, folder: Path) -> None:
    """config.json and tokenizer.json; no weights, so it is for `load_format=dummy`."""
    config = PRESETS[name]
    (folder / "config.json").write_text(json.dumps(config))
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = map("".join, itertools.product(string.ascii_lowercase, repeat=4))
    spelt = itertools.islice(itertools.chain(letters, words), config["vocab_size"])
    vocabulary = {word: number for number, word in enumerate(spelt)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
