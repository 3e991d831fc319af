"""How fast a checkpoint is read: ours, safetensors' own way, and the bare reads of its files.

    python -m tests.bench.bench_loading                                  (4 GB in 4 files, here)
    python -m tests.bench.bench_loading --gb 16 --folder /disk --device cuda

A Llama in bfloat16 with random bytes is written to `--folder`, read in every way in turn, each time
into the same tensors, once after its pages are dropped from the page cache (cold) and once more
(warm), and removed. What ours read is compared with what safetensors read, byte by byte. Rank 0 of
4 is the rows and columns that it would hold of everything; its figure is of what it holds.
"""

import argparse
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from parallel.groups import build_groups
from parallel.layout import Layout
from tests.bench.results import record
from workers.models import Model, build_model, read_model_config
from workers.weights import Source, load_weights

LAYER_BYTES = 2 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 12288)


def make_checkpoint(folder: Path, num_gb: float, num_files: int) -> None:
    """Layers of an 8b's shape, as many as fit."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_hidden_layers": max(1, round(num_gb * 1e9 / LAYER_BYTES)),
        "vocab_size": 32000,
        "tie_word_embeddings": True,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
        "model_type": "llama",
    }
    (folder / "config.json").write_text(json.dumps(config))
    sources = sources_of(new_model(folder, torch.device("meta"), Layout()))
    share = len(sources) / num_files
    for number in range(num_files):
        tensors = {
            source.name: random_bytes(source.shape)
            for source in sources[round(number * share) : round((number + 1) * share)]
        }
        name = f"model-{number + 1:05d}-of-{num_files:05d}.safetensors"
        save_file(tensors, folder / name)
        with (folder / name).open("rb") as file:
            os.fsync(file.fileno())  # a page that is yet to be written cannot be dropped


def random_bytes(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randint(-(2**15), 2**15, shape, dtype=torch.int16).view(torch.bfloat16)


def new_model(folder: Path, device: torch.device, layout: Layout) -> Model:
    groups = build_groups(layout, 0, lambda members: None)
    return build_model(read_model_config(folder), groups, device, torch.bfloat16)


def sources_of(model: Model) -> list[Source]:
    return [source for source in model.sources() if isinstance(source, Source)]


def by_safetensors(model: Model, folder: Path) -> None:
    """Whole files, mapped into memory, each tensor then copied to where it belongs."""
    sources = {source.name: source for source in sources_of(model)}
    for file in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            for part in sources[name].parts:
                part.into.copy_(tensor[part.region])


def by_lockstep(model: Model, folder: Path) -> None:
    load_weights(model, folder, lambda stage, done, total: None)


def bare_reads(model: Model, folder: Path) -> None:
    """All bytes of all files into one buffer, one after another."""
    buffer = memoryview(bytearray(16 * 2**20))
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass


def drop_pages(folder: Path) -> None:
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def same(first: Model, second: Model) -> bool:
    return all(
        torch.equal(mine.into.view(torch.int16), theirs.into.view(torch.int16))
        for a, b in zip(sources_of(first), sources_of(second), strict=True)
        for mine, theirs in zip(a.parts, b.parts, strict=True)
    )


def num_bytes(model: Model) -> int:
    return sum(part.into.nbytes for source in sources_of(model) for part in source.parts)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gb", type=float, default=4.0)
    parser.add_argument("--files", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--results", type=Path, help="folder of the CSV, if not the repository's")
    asked = parser.parse_args()
    command = f"python -m tests.bench.bench_loading --gb {asked.gb:g} --files {asked.files}"
    command += "" if asked.device == "cpu" else f" --device {asked.device}"
    device = torch.device(asked.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    where = {} if asked.results is None else {"folder": asked.results}
    folder = Path(tempfile.mkdtemp(prefix="lockstep-loading-", dir=asked.folder))
    try:
        make_checkpoint(folder, asked.gb, asked.files)
        for case, layout in (("whole", Layout()), ("rank 0 of 4", Layout(tp_size=4))):
            figures = measure(folder, device, layout, asked.rounds)
            for way, values in figures.items():
                record("loading", f"{case}, {way}", "GB/s", values, command, name, **where)
    finally:
        shutil.rmtree(folder)


def measure(
    folder: Path, device: torch.device, layout: Layout, rounds: int
) -> dict[str, list[float]]:
    """GB of what the model holds, a second, by way and state of the page cache."""
    ours, theirs = (new_model(folder, device, layout) for _ in range(2))
    ways: list[tuple[str, Model, Callable[[Model, Path], None]]] = [
        ("lockstep", ours, by_lockstep),
        ("safetensors load_file", theirs, by_safetensors),
    ]
    if layout.world_size == 1:
        ways.append(("bare reads", ours, bare_reads))
    for _, model, load in ways:  # the first time, the system has yet to find memory for them
        load(model, folder)
    figures: dict[str, list[float]] = {}
    for _ in range(rounds):
        for way, model, load in ways:
            drop_pages(folder)
            for state in ("cold", "warm"):
                began = time.perf_counter()
                load(model, folder)
                if device.type == "cuda":
                    torch.cuda.synchronize()
                rate = num_bytes(model) / (time.perf_counter() - began) / 1e9
                figures.setdefault(f"{state}: {way}", []).append(rate)
    if not same(ours, theirs):
        raise SystemExit("lockstep and safetensors read different weights")
    return figures


if __name__ == "__main__":
    main()
