"""From a folder of safetensors files into a model's tensors, one file at a time.

A model describes its weights as data: for each tensor of the checkpoint its name, its full shape,
and which region of it goes where on this rank (`Source`). All headers are read and compared with
that description first, so a wrong checkpoint is refused before any weight is; then each file is
opened once and only this rank's regions are read. Nothing is unpickled and no code in the folder
is run.

`dummy_weights` fills the same description with random numbers instead: the full tensor is drawn,
by its name, and cut, so every layout holds the same model.
"""

import hashlib
import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from workers.errors import BadCheckpoint

Progress = Callable[[str, int, int], None]
"""Called with a stage's name, how much of it is done, and out of how much."""

IGNORED = re.compile(r".*\.rotary_emb\.inv_freq")
"""Tensors that old checkpoints hold and nobody needs: they are computed from config.json."""

FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")
MAX_HEADER_BYTES = 100 * 2**20
NUM_NAMED = 5


class Part(NamedTuple):
    """`into` becomes `region` of the checkpoint's tensor, repeated where it has more rows."""

    region: tuple[slice, ...]
    into: Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Source:
    """One tensor of the checkpoint, and what this rank takes of it: maybe nothing."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    dummy: Literal["normal", "zeros", "ones"] = "normal"
    """What load_format=dummy fills it with."""


@dataclass(frozen=True, slots=True, eq=False)
class OneOf:
    """The same weights under different names; the checkpoint's first match is read."""

    formats: tuple[tuple[Source, ...], ...]

    def choose(self, names: Collection[str]) -> tuple[Source, ...]:
        """The format most of whose tensors exist; the first if none does."""
        return max(self.formats, key=lambda sources: sum(s.name in names for s in sources))


class Weighted(Protocol):
    """What has weights to fill."""

    @property
    def architecture(self) -> str: ...
    @property
    def initializer_range(self) -> float: ...
    @property
    def unused_weights(self) -> tuple[str, ...]:
        """Beginnings of names that a checkpoint may hold though the model does not need them."""
        ...

    def sources(self) -> list[Source | OneOf]: ...


class Entry(NamedTuple):
    """A tensor as a file's header describes it."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


def everything(into: Tensor, name: str, dummy: Literal["normal", "zeros", "ones"]) -> Source:
    """A tensor that every rank holds whole."""
    shape = tuple(into.shape)
    part = Part(tuple(slice(0, size) for size in shape), into)
    return Source(name=name, shape=shape, parts=(part,), dummy=dummy)


def check_weights(model: Weighted, folder: Path) -> tuple[list[Source], dict[str, Entry]]:
    """What of the folder `model` reads; `BadCheckpoint` if its headers do not fit the model."""
    entries = read_entries(folder)
    sources = _choose(model.sources(), entries)
    _check_names(model, sources, entries, folder)
    _check_contents(sources, entries)
    return sources, entries


def load_weights(model: Weighted, folder: Path, progress: Progress) -> None:
    """Fill `model` from the folder's safetensors files, or raise `BadCheckpoint`."""
    sources, entries = check_weights(model, folder)
    by_file: dict[Path, list[Source]] = {}
    for source in sources:
        by_file.setdefault(entries[source.name].file, []).append(source)
    loaded: set[str] = set()
    progress("weights", 0, len(sources))
    for file in sorted(by_file):
        _load_file(file, by_file[file], loaded, len(sources), progress)
    absent = [source.name for source in sources if source.name not in loaded]
    if absent:
        raise BadCheckpoint(f"{folder}: {_listed(absent, 'tensor')} were described but not read")


def dummy_weights(model: Weighted, seed: int) -> None:
    """Random weights that depend on `seed` and the checkpoint's names only, not on the layout."""
    for source in _choose(model.sources(), ()):
        if not source.parts:
            continue
        like = source.parts[0].into
        full = torch.empty(source.shape, dtype=like.dtype, device=like.device)
        if source.dummy == "normal":
            key = hashlib.blake2b(f"{seed} {source.name}".encode(), digest_size=7).digest()
            generator = torch.Generator(like.device).manual_seed(int.from_bytes(key, "little"))
            full.normal_(0.0, model.initializer_range, generator=generator)
        else:
            full.fill_(1.0 if source.dummy == "ones" else 0.0)
        for part in source.parts:
            part.into.copy_(full[part.region])


def read_entries(folder: Path) -> dict[str, Entry]:
    """Every tensor of the checkpoint and the file that holds it, from the files' headers."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        placed = _read_index(index)
        files = sorted({folder / file for file in placed.values()})
    else:
        placed = None
        files = _lone_files(folder)
    entries: dict[str, Entry] = {}
    for file in files:
        if not file.exists():
            raise BadCheckpoint(
                f"{file} is missing though {index.name} names it: download the checkpoint again"
            )
        for name, entry in _read_header(file).items():
            if placed is not None and placed.get(name, file.name) != file.name:
                continue
            if name in entries:
                raise BadCheckpoint(
                    f"{folder}: tensor {name} is in both {entries[name].file.name} and {file.name}"
                    ": keep the files of one checkpoint only"
                )
            entries[name] = entry
    return entries


def _read_index(index: Path) -> dict[str, str]:
    """Which file holds which tensor."""
    try:
        placed = json.loads(index.read_bytes())["weight_map"]
        files = set(placed.values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadCheckpoint(
            f"{index} is no index of safetensors files ({type(error).__name__}: {error}): "
            "download it again"
        ) from error
    for file in files:
        if not isinstance(file, str) or Path(file).name != file:
            raise BadCheckpoint(f"{index} names {file!r}, which is not a file beside it")
    return placed


def _lone_files(folder: Path) -> list[Path]:
    """The weight files of a folder without an index."""
    single = folder / "model.safetensors"
    files = [single] if single.exists() else sorted(folder.glob("*.safetensors"))
    if not files:
        others = sorted(path.name for path in folder.glob("*.bin"))
        if others:
            raise BadCheckpoint(
                f"{folder} has {_listed(others, 'pickle file')} and only safetensors are read: "
                "convert the checkpoint, for example with transformers' save_pretrained"
            )
        raise BadCheckpoint(
            f"{folder} has no *.safetensors file: download the weights, or set load_format=dummy "
            "for random ones"
        )
    _check_numbering(files)
    return files


def _check_numbering(files: Sequence[Path]) -> None:
    """Files called `x-00001-of-00003.safetensors` must be three."""
    numbered = [re.fullmatch(r".*-(\d+)-of-(\d+)\.safetensors", file.name) for file in files]
    for file, match in zip(files, numbered, strict=True):
        if match is not None and int(match[2]) != len(files):
            raise BadCheckpoint(
                f"{file} is one of {int(match[2])} files by its name and {file.parent} has "
                f"{len(files)}: download the others"
            )


def _read_header(file: Path) -> dict[str, Entry]:
    """The tensors of a safetensors file; refuses one that is not whole."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(64)
        if start.startswith(b"version https://git-lfs"):
            raise BadCheckpoint(
                f"{file} is a git-lfs pointer of {size} bytes, not the weights: run `git lfs pull` "
                "in the folder"
            )
        length = int.from_bytes(start[:8], "little")
        if len(start) < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise BadCheckpoint(
                f"{file} has {size} bytes, which is too few for its own header: it is truncated "
                "or no safetensors file; download it again"
            )
        stream.seek(8)
        header = stream.read(length)
    try:
        described: dict[str, Any] = json.loads(header)
        described.pop("__metadata__", None)
        end = 8 + length + max((d["data_offsets"][1] for d in described.values()), default=0)
        entries = {
            name: Entry(file, d["dtype"], tuple(d["shape"])) for name, d in described.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise BadCheckpoint(
            f"{file} has a damaged header ({type(error).__name__}: {error}): download it again"
        ) from error
    if end != size:
        raise BadCheckpoint(
            f"{file} has {size} bytes and its header describes {end}: download it again"
        )
    return entries


def _choose(sources: Iterable[Source | OneOf], names: Collection[str]) -> list[Source]:
    chosen: list[Source] = []
    for source in sources:
        chosen.extend(source.choose(names) if isinstance(source, OneOf) else (source,))
    return chosen


def _check_names(
    model: Weighted, sources: Sequence[Source], entries: Mapping[str, Entry], folder: Path
) -> None:
    missing = [source.name for source in sources if source.name not in entries]
    if missing:
        raise BadCheckpoint(
            f"{folder} lacks {_listed(missing, 'tensor')} that {model.architecture} needs: "
            "download the checkpoint again, or check that config.json belongs to it"
        )
    expected = {source.name for source in sources}
    unexpected = [
        name
        for name in entries
        if name not in expected
        and not name.startswith(model.unused_weights)
        and IGNORED.fullmatch(name) is None
    ]
    if unexpected:
        raise BadCheckpoint(
            f"{folder} has {_listed(sorted(unexpected), 'tensor')} that {model.architecture} does "
            "not know: check that config.json belongs to this checkpoint"
        )


def _check_contents(sources: Sequence[Source], entries: Mapping[str, Entry]) -> None:
    for source in sources:
        entry = entries[source.name]
        if entry.shape != source.shape:
            raise BadCheckpoint(
                f"{entry.file}: {source.name} should be {list(source.shape)} by config.json and "
                f"is {list(entry.shape)}"
            )
        if entry.dtype not in FLOAT_DTYPES:
            raise BadCheckpoint(
                f"{entry.file}: {source.name} is stored as {entry.dtype} and there is "
                f"{', '.join(FLOAT_DTYPES)}: quantized checkpoints are not offered"
            )


def _load_file(
    file: Path, sources: Sequence[Source], loaded: set[str], total: int, progress: Progress
) -> None:
    try:
        with safe_open(file, framework="pt") as shard:
            for source in sources:
                if source.parts:
                    tensor = shard.get_slice(source.name)
                    for part in source.parts:
                        part.into.copy_(tensor[part.region])
                loaded.add(source.name)
                if len(loaded) * 100 // total != (len(loaded) - 1) * 100 // total:
                    progress("weights", len(loaded), total)
    except SafetensorError as error:
        raise BadCheckpoint(f"{file} cannot be read: {error}; download it again") from error


def _listed(names: Sequence[str], what: str) -> str:
    """`3 tensors (a, b, c)`, the first few by name."""
    shown = ", ".join(names[:NUM_NAMED])
    more = ", ..." if len(names) > NUM_NAMED else ""
    return f"{len(names)} {what}{'s' if len(names) > 1 else ''} ({shown}{more})"
