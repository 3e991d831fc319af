"""What lies where in a folder of safetensors files, by their headers alone.

A file is eight bytes that say how long its header is, the header in JSON, and the tensors' bytes,
one behind another without a gap (https://github.com/huggingface/safetensors, "Format"). The header
is all that is read here, and all of it is checked, so that what reads the tensors can trust it.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import msgspec
import torch

from workers.errors import BadCheckpoint

FLOAT_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
MAX_HEADER_BYTES = 100 * 2**20
NUM_NAMED = 5


class _Described(msgspec.Struct):
    """A tensor in a header: the bytes behind it that are the tensor's, from and to."""

    dtype: str
    shape: tuple[Annotated[int, msgspec.Meta(ge=0)], ...]
    data_offsets: tuple[int, int]


class Entry(NamedTuple):
    """A tensor as a file's header describes it."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    """Where its first byte is in the file."""


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
        try:
            header = _read_header(file)
        except OSError as error:
            raise BadCheckpoint(f"{file} cannot be read: {error}") from error
        for name, entry in header.items():
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
                f"{folder} has {listed(others, 'pickle file')} and only safetensors are read: "
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
        described = json.loads(header)
        described.pop("__metadata__", None)
        tensors = msgspec.convert(described, dict[str, _Described])
    except (ValueError, AttributeError) as error:
        raise BadCheckpoint(
            f"{file} has a damaged header ({type(error).__name__}: {error}): download it again"
        ) from error
    first = 8 + length
    entries = {
        name: Entry(file, tensor.dtype, tensor.shape, first + tensor.data_offsets[0])
        for name, tensor in tensors.items()
    }
    ends = {name: first + tensor.data_offsets[1] for name, tensor in tensors.items()}
    end = max(ends.values(), default=first)
    if end != size:
        raise BadCheckpoint(
            f"{file} has {size} bytes and its header describes {end}: download it again"
        )
    _check_places(file, first, entries, ends)
    return entries


def _check_places(
    file: Path, first: int, entries: Mapping[str, Entry], ends: Mapping[str, int]
) -> None:
    """Every tensor takes the bytes that its shape needs, from `first` on without gap or overlap."""
    for name in sorted(entries, key=lambda name: (entries[name].start, ends[name])):
        _, dtype, shape, start = entries[name]
        num_bytes = max(ends[name] - start, 0)
        if dtype in FLOAT_DTYPES:
            num_bytes = math.prod(shape) * FLOAT_DTYPES[dtype].itemsize
        if start != first or ends[name] != start + num_bytes:
            raise BadCheckpoint(
                f"{file} has a damaged header: {name}, {list(shape)} of {dtype}, cannot be bytes "
                f"{start} to {ends[name]} where the tensor before it ends at {first}: download it "
                "again"
            )
        first = ends[name]


def listed(names: Sequence[str], what: str) -> str:
    """`3 tensors (a, b, c)`, the first few by name."""
    shown = ", ".join(names[:NUM_NAMED])
    more = ", ..." if len(names) > NUM_NAMED else ""
    return f"{len(names)} {what}{'s' if len(names) > 1 else ''} ({shown}{more})"
