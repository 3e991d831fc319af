"""Pieces of regions: every number once, in the order of the file; and what a short file says."""

import math
import os
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from workers import reading
from workers.checkpoint import Entry, read_entries
from workers.errors import BadCheckpoint
from workers.reading import Piece, cut, in_turns, read_pieces

STORED = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}


@st.composite
def regions(draw):
    shape = tuple(draw(st.lists(st.integers(0, 7), max_size=4)))
    region = []
    for size in shape:
        start = draw(st.integers(0, size))
        region.append(slice(start, draw(st.integers(start, size))))
    return shape, tuple(region)


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(reading, "PIECE_BYTES", 40)


@settings(max_examples=200)
@given(
    taken=regions(),
    stored=st.sampled_from(list(STORED)),
    kept=st.sampled_from(list(STORED)),
    limit=st.sampled_from([1, 24, 64, 2**20]),
)
def test_a_region_is_what_safetensors_would_slice(taken, stored, kept, limit, tmp_path_factory):
    shape, region = taken
    whole = torch.randn(shape).to(stored)
    file = tmp_path_factory.mktemp("one") / "model.safetensors"
    save_file({"before": torch.ones(3), "it": whole, "later": torch.ones(2)}, file)
    entry = read_entries(file.parent)["it"]
    into = torch.full_like(whole[region], -7.0, dtype=kept)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "PIECE_BYTES", limit)
        pieces = list(cut("it", entry, region, into))
    assert sum(piece.into.numel() for piece in pieces) == into.numel()
    for piece in pieces:
        inside = piece.start >= entry.start and (
            piece.start + piece.num_bytes <= entry.start + whole.nbytes
        )
        assert inside
        assert max(piece.num_bytes, piece.num_bytes_into) <= limit or piece.shape[0] == 1
    assert list(read_pieces(pieces)) == list(in_turns(pieces))
    assert torch.equal(into, whole[region].to(kept))


def test_rows_are_repeated_where_there_is_room_for_more(tmp_path):
    row = torch.randn(5)
    save_file({"norm": row}, tmp_path / "model.safetensors")
    into = torch.zeros(4, 5)
    entry = read_entries(tmp_path)["norm"]
    list(read_pieces(list(cut("norm", entry, (slice(0, 5),), into[1:3]))))
    assert torch.equal(into[1:3], row.expand(2, 5))
    assert not into[[0, 3]].any()


def piece_at(file: str, start: int) -> Piece:
    shape, columns = (1, 4), slice(0, 4)
    return Piece("t", Path(file), start, torch.float32, shape, columns, torch.empty(shape))


def test_files_are_read_by_turns_each_from_front_to_back(monkeypatch):
    monkeypatch.setattr(reading, "NUM_READERS", 2)
    pieces = [piece_at(*place) for place in (("b", 8), ("a", 16), ("c", 0), ("a", 0), ("a", 32))]
    order = [(str(piece.file), piece.start) for piece in in_turns(pieces)]
    assert order == [("a", 0), ("b", 8), ("a", 16), ("a", 32), ("c", 0)]


def saved(tmp_path: Path, num_rows: int = 100) -> tuple[Path, Entry, torch.Tensor]:
    whole = torch.randn(num_rows, 4)
    file = tmp_path / "model.safetensors"
    save_file({"it": whole}, file)
    return file, read_entries(tmp_path)["it"], whole


@pytest.mark.usefixtures("small_pieces")
def test_reads_that_return_less_than_asked_go_on(tmp_path, monkeypatch):
    _, entry, whole = saved(tmp_path)
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, to, at: preadv(fd, [to[0][:7]], at))
    into = torch.empty_like(whole)
    list(read_pieces(list(cut("it", entry, (slice(0, 100), slice(0, 4)), into))))
    assert torch.equal(into, whole)


@pytest.mark.usefixtures("small_pieces")
def test_a_file_that_is_cut_while_it_is_read_is_named(tmp_path):
    file, entry, whole = saved(tmp_path)
    pieces = list(cut("it", entry, (slice(0, 100), slice(0, 4)), torch.empty_like(whole)))
    os.truncate(file, entry.start + 1000)
    with pytest.raises(BadCheckpoint) as refusal:
        list(read_pieces(pieces))
    assert str(refusal.value) == (
        f"{file} ends at byte {entry.start + 1000}, within it, and was longer when its header was "
        "read: something writes to it; start again when it is whole"
    )


@pytest.mark.usefixtures("small_pieces")
def test_a_disk_that_fails_is_named_with_its_file(tmp_path, monkeypatch):
    file, entry, whole = saved(tmp_path)

    def fail(fd, to, at):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    pieces = list(cut("it", entry, (slice(0, 100), slice(0, 4)), torch.empty_like(whole)))
    with pytest.raises(BadCheckpoint) as refusal:
        list(read_pieces(pieces))
    assert str(refusal.value) == f"{file} cannot be read: [Errno 5] Input/output error"


def test_a_file_that_is_gone_since_its_header_was_read_is_named(tmp_path):
    file, entry, whole = saved(tmp_path)
    pieces = list(cut("it", entry, (slice(0, 100), slice(0, 4)), torch.empty_like(whole)))
    file.unlink()
    with pytest.raises(BadCheckpoint) as refusal:
        list(read_pieces(pieces))
    assert str(refusal.value).startswith(f"{file} cannot be read: [Errno 2] No such file")


@pytest.mark.usefixtures("small_pieces")
def test_several_files_are_read_at_once(tmp_path, monkeypatch):
    """Every reader waits for all others to have begun: one at a time would wait for ever."""
    pieces = []
    for name in ("a", "b", "c", "d"):
        save_file({name: torch.randn(2, 4)}, tmp_path / f"{name}.safetensors")
    for name, entry in read_entries(tmp_path).items():
        pieces += cut(name, entry, (slice(0, 2), slice(0, 4)), torch.empty(2, 4))
    everyone = threading.Barrier(len(pieces))
    preadv, seen = os.preadv, set()

    def together(fd, to, at):
        seen.add(fd)
        everyone.wait(20)
        return preadv(fd, to, at)

    monkeypatch.setattr(os, "preadv", together)
    list(read_pieces(pieces))
    assert len(seen) == 4


def test_inference_tensors_are_filled(tmp_path):
    """The runner builds models in inference mode, which a thread has to enter by itself."""
    _, entry, whole = saved(tmp_path, num_rows=3)
    with torch.inference_mode():
        into = torch.empty_like(whole)
        list(read_pieces(list(cut("it", entry, (slice(0, 3), slice(0, 4)), into))))
        assert into.is_inference()
        assert torch.equal(into, whole)


def test_no_more_threads_have_memory_than_read(tmp_path, monkeypatch):
    """What one thread reads through is as large as its largest piece, not as the tensor."""
    _, entry, whole = saved(tmp_path)
    monkeypatch.setattr(reading, "PIECE_BYTES", 160)
    made = []
    lane = reading._Lane

    def counted(pieces, device):
        made.append(lane(pieces, device))
        return made[-1]

    monkeypatch.setattr(reading, "_Lane", counted)
    pieces = list(cut("it", entry, (slice(0, 100), slice(1, 3)), whole[:, :2].clone()))
    list(read_pieces(pieces))
    assert len(pieces) == math.ceil(100 / 10)
    assert [each._read.nbytes for each in made] == [160] * reading.NUM_READERS


@pytest.mark.gpus(1)
@pytest.mark.parametrize("stored", STORED)
def test_a_gpu_gets_what_a_cpu_gets(stored, tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "PIECE_BYTES", 4096)
    whole = torch.randn(3, 300, 50).to(stored)
    save_file({"it": whole}, tmp_path / "model.safetensors")
    entry = read_entries(tmp_path)["it"]
    regions = [
        (slice(0, 3), slice(0, 300), slice(0, 50)),
        (slice(1, 3), slice(7, 290), slice(5, 9)),
    ]
    for region in regions:
        into = torch.zeros_like(whole[region], dtype=torch.bfloat16, device="cuda")
        list(read_pieces(list(cut("it", entry, region, into))))
        assert torch.equal(into.cpu(), whole[region].bfloat16())
