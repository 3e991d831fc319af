"""Regions of safetensors files into tensors, as fast as the disk gives them.

Each region is cut into pieces of some rows. A few threads read them, each in one system call of
megabytes, in the order in which they lie in their file and from several files at once: a disk or a
file server is at its best with several long reads under way, and the interpreter is not held
meanwhile. What needs neither another dtype nor some of the columns only is read where it belongs;
the rest goes through a buffer. For a GPU the piece is put together in pinned memory and sent from
there while the other threads read.

Host memory: for each of `NUM_READERS` threads a piece as it lies in the file and, for a GPU, one
as it is sent, which is pinned: twice 64 MiB for all threads, if no row is longer than a piece.
"""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import zip_longest
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

import torch
from torch import Tensor

from workers.checkpoint import FLOAT_DTYPES, Entry
from workers.errors import BadCheckpoint

NUM_READERS = 8
PIECE_BYTES = 8 * 2**20


class Piece(NamedTuple):
    """Rows of a tensor, which lie together in its file, and where some of their columns go."""

    name: str
    file: Path
    start: int
    """Where its first byte is in the file."""
    dtype: torch.dtype
    """As it is stored."""
    shape: tuple[int, int]
    """Rows and columns, as they are stored."""
    columns: slice
    """Those that are taken. Whole rows are read: a column is in nearly every block of a disk."""
    into: Tensor
    """(rows, columns taken), or more dimensions before these, over which the piece is repeated."""

    @property
    def num_bytes(self) -> int:
        """What is read."""
        return self.shape[0] * self.shape[1] * self.dtype.itemsize

    @property
    def num_bytes_into(self) -> int:
        """What is written, once."""
        return self.shape[0] * (self.columns.stop - self.columns.start) * self.into.itemsize


def cut(name: str, entry: Entry, region: tuple[slice, ...], into: Tensor) -> Iterator[Piece]:
    """The pieces of `region`, at most `PIECE_BYTES` each both here and there.

    `into` has the region's dimensions last. A tensor of more than two dimensions is cut at each
    index of the first ones; a vector counts as one column, and so does a scalar.
    """
    dtype, shape = FLOAT_DTYPES[entry.dtype], entry.shape
    if len(shape) > 2:
        stride = dtype.itemsize
        for size in shape[1:]:
            stride *= size
        for place, index in enumerate(range(region[0].start, region[0].stop)):
            inner = Entry(entry.file, entry.dtype, shape[1:], entry.start + index * stride)
            yield from cut(name, inner, region[1:], into.select(-len(shape), place))
        return
    shape += (1,) * (2 - len(shape))
    while len(region) < 2:
        region, into = (*region, slice(0, 1)), into.unsqueeze(-1)
    rows, columns = region
    if columns.stop == columns.start:
        return
    row_bytes = shape[1] * max(dtype.itemsize, into.itemsize)
    step = max(1, PIECE_BYTES // row_bytes)
    for first in range(rows.start, rows.stop, step):
        num_rows = min(step, rows.stop - first)
        yield Piece(
            name=name,
            file=entry.file,
            start=entry.start + first * shape[1] * dtype.itemsize,
            dtype=dtype,
            shape=(num_rows, shape[1]),
            columns=columns,
            into=into.narrow(-2, first - rows.start, num_rows),
        )


def in_turns(pieces: Sequence[Piece]) -> Iterator[Piece]:
    """In the order in which they are read: each file from front to back, several by turns."""
    by_file: dict[Path, list[Piece]] = {}
    for piece in sorted(pieces, key=lambda piece: (piece.file, piece.start)):
        by_file.setdefault(piece.file, []).append(piece)
    files = list(by_file.values())
    for first in range(0, len(files), NUM_READERS):
        for turn in zip_longest(*files[first : first + NUM_READERS]):
            yield from (piece for piece in turn if piece is not None)


def read_pieces(pieces: Sequence[Piece]) -> Iterator[Piece]:
    """Fill every piece's `into`, all of them on one device; yields each piece when it is there.

    Raises `BadCheckpoint`, naming the file, where one cannot be read or has become shorter.
    """
    if not pieces:
        return
    device = pieces[0].into.device
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()  # what zeroes a tensor comes before it
    num_lanes = min(NUM_READERS, len(pieces))
    lanes: SimpleQueue[_Lane] = SimpleQueue()
    for _ in range(num_lanes):
        lanes.put(_Lane(pieces, device))

    def fill(piece: Piece) -> Piece:
        lane = lanes.get()
        try:
            lane.fill(piece, descriptors[piece.file])
        except OSError as error:
            raise BadCheckpoint(f"{piece.file} cannot be read: {error}") from error
        finally:
            lanes.put(lane)
        return piece

    with ExitStack() as stack:
        descriptors: dict[Path, int] = {}
        for file in {piece.file for piece in pieces}:
            try:
                descriptors[file] = stack.enter_context(file.open("rb", buffering=0)).fileno()
            except OSError as error:
                raise BadCheckpoint(f"{file} cannot be read: {error}") from error
        pool = stack.enter_context(ThreadPoolExecutor(num_lanes, "weights"))
        yield from pool.map(fill, in_turns(pieces))


class _Lane:
    """What one thread reads through."""

    def __init__(self, pieces: Sequence[Piece], device: torch.device) -> None:
        self._read = torch.empty(max(piece.num_bytes for piece in pieces), dtype=torch.uint8)
        self._stream = None
        if device.type == "cuda":
            num_bytes = max(piece.num_bytes_into for piece in pieces)
            self._sent = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
            self._stream = torch.cuda.Stream(device)

    @torch.inference_mode()  # of this thread; the model's tensors are made in it
    def fill(self, piece: Piece, descriptor: int) -> None:
        if self._stream is None:
            self._read_into(piece.into, piece, descriptor)
            return
        sent = self._sent[: piece.num_bytes_into].view(piece.into.dtype)
        sent = sent.view(piece.shape[0], -1)
        self._read_into(sent, piece, descriptor)
        with torch.cuda.stream(self._stream):
            piece.into.copy_(sent, non_blocking=True)
        self._stream.synchronize()

    def _read_into(self, target: Tensor, piece: Piece, descriptor: int) -> None:
        if target.dtype == piece.dtype and target.shape == piece.shape and target.is_contiguous():
            _read_bytes(target.view(-1).view(torch.uint8), piece, descriptor)
            return
        stored = self._read[: piece.num_bytes]
        _read_bytes(stored, piece, descriptor)
        target.copy_(stored.view(piece.dtype).view(piece.shape)[:, piece.columns])


def _read_bytes(into: Tensor, piece: Piece, descriptor: int) -> None:
    left, place = into.numpy().data, piece.start
    while left:
        num_read = os.preadv(descriptor, [left], place)
        if num_read == 0:
            raise BadCheckpoint(
                f"{piece.file} ends at byte {place}, within {piece.name}, and was longer when its "
                "header was read: something writes to it; start again when it is whole"
            )
        left, place = left[num_read:], place + num_read
