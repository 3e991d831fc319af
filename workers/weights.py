"""From a folder of safetensors files into a model's tensors.

A model describes its weights as data: for each tensor of the checkpoint its name, its full shape,
and which region of it goes where on this rank (`Source`). All headers are read and compared with
that description first (`checkpoint.py`), so a wrong checkpoint is refused before any weight is;
then only this rank's regions are read, several files at once (`reading.py`). Nothing is unpickled
and no code in the folder is run.

`dummy_weights` fills the same description with random numbers instead: the full tensor is drawn,
by its name, and cut, so every layout holds the same model.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from workers.checkpoint import FLOAT_DTYPES, Entry, listed, read_entries
from workers.errors import BadCheckpoint
from workers.reading import cut, read_pieces

Progress = Callable[[str, int, int], None]
"""Called with a stage's name, how much of it is done, and out of how much."""

IGNORED = re.compile(r".*\.rotary_emb\.inv_freq")
"""Tensors that old checkpoints hold and nobody needs: they are computed from config.json."""


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
    pieces = [
        piece
        for source in sources
        for part in source.parts
        for piece in cut(source.name, entries[source.name], part.region, part.into)
    ]
    unread = Counter(piece.name for piece in pieces)
    done = len(sources) - len(unread)
    progress("weights", done, len(sources))
    for piece in read_pieces(pieces):
        unread[piece.name] -= 1
        if unread[piece.name] == 0:
            done += 1
            if done * 100 // len(sources) != (done - 1) * 100 // len(sources):
                progress("weights", done, len(sources))


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
            f"{folder} lacks {listed(missing, 'tensor')} that {model.architecture} needs: "
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
            f"{folder} has {listed(sorted(unexpected), 'tensor')} that {model.architecture} does "
            "not know: check that config.json belongs to this checkpoint"
        )


def _check_contents(sources: Sequence[Source], entries: Mapping[str, Entry]) -> None:
    for source in sources:
        entry = entries[source.name]
        if entry.shape != source.shape and (source.shape, entry.shape) != ((), (1,)):
            raise BadCheckpoint(
                f"{entry.file}: {source.name} should be {list(source.shape)} by config.json and "
                f"is {list(entry.shape)}"
            )
        if entry.dtype not in FLOAT_DTYPES:
            raise BadCheckpoint(
                f"{entry.file}: {source.name} is stored as {entry.dtype} and there is "
                f"{', '.join(FLOAT_DTYPES)}: quantized checkpoints are not offered"
            )
