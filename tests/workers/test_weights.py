"""Loading: this rank's regions only, file by file; and the sentence for every bad checkpoint."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from parallel.groups import single_rank_groups
from parallel.layout import Layout
from parallel.thread_world import run_thread_world
from tests.workers.reference import CPU, load, no_progress, save_tiny
from workers.checkpoint import read_entries
from workers.errors import BadCheckpoint
from workers.models import Model, build_model, read_model_config
from workers.weights import OneOf, Source, dummy_weights, load_weights

INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path) -> Path:
    """A Llama in several files with an index."""
    save_tiny(tmp_path, "Llama", num_hidden_layers=1)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    return tmp_path


def file_of(folder: Path, tensor: str) -> Path:
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][tensor]


def rewrite(folder: Path, tensor: str, replacement: dict[str, torch.Tensor]) -> Path:
    """Take `tensor` out of its file, and put others in."""
    file = file_of(folder, tensor)
    tensors = load_file(file)
    del tensors[tensor]
    save_file(tensors | replacement, file)
    index = json.loads((folder / INDEX).read_text())
    del index["weight_map"][tensor]
    index["weight_map"].update(dict.fromkeys(replacement, file.name))
    (folder / INDEX).write_text(json.dumps(index))
    return file


def join(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors, their files removed."""
    tensors: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
        file.unlink()
    (folder / INDEX).unlink()
    return tensors


def plain_sources(model: Model) -> list[Source]:
    return [source for source in model.sources() if isinstance(source, Source)]


def refusal_of(folder: Path) -> str:
    with pytest.raises(BadCheckpoint) as refusal:
        load(folder)
    return str(refusal.value)


def test_files_without_an_index_are_all_read(folder):
    (folder / INDEX).unlink()
    load(folder)


def test_one_file_is_read(folder):
    save_file(join(folder), folder / "model.safetensors")
    load(folder)


def test_progress_goes_from_nothing_to_everything(folder):
    calls = []
    model = build_model(read_model_config(folder), single_rank_groups(), CPU, torch.float32)
    load_weights(model, folder, lambda *call: calls.append(call))
    assert calls[0] == ("weights", 0, 12)
    assert calls[-1] == ("weights", 12, 12)
    assert [done for _, done, _ in calls] == list(range(13))


def test_weights_come_in_the_dtype_of_the_model(folder):
    config = read_model_config(folder)
    exact = build_model(config, single_rank_groups(), CPU, torch.float32)
    rounded = build_model(config, single_rank_groups(), CPU, torch.bfloat16)
    for model in (exact, rounded):
        load_weights(model, folder, no_progress)
    for ours, theirs in zip(plain_sources(rounded), plain_sources(exact), strict=True):
        for part, reference in zip(ours.parts, theirs.parts, strict=True):
            assert part.into.dtype == torch.bfloat16
            assert torch.equal(part.into, reference.into.bfloat16())


EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


@pytest.mark.parametrize(
    ("family", "changes", "layout"),
    [
        ("Qwen2", {}, Layout(tp_size=4)),
        ("Qwen3Moe", EXPERTS, Layout(tp_size=4)),
        ("Qwen3Moe", EXPERTS, Layout(tp_size=4, ep_size=4)),
    ],
)
def test_ranks_together_hold_every_number_of_the_checkpoint(family, changes, layout, tmp_path):
    save_tiny(tmp_path, family, **changes)

    def held(rank, groups):
        model = build_model(read_model_config(tmp_path), groups, CPU, torch.float32)
        plain = [s.formats[0] if isinstance(s, OneOf) else (s,) for s in model.sources()]
        return [source for sources in plain for source in sources]

    by_rank = run_thread_world(layout, held)
    entries = read_entries(tmp_path)
    for same in zip(*by_rank, strict=True):
        covered = torch.zeros(entries[same[0].name].shape, dtype=torch.bool)
        for source in same:
            for part in source.parts:
                covered[part.region] = True
        assert covered.all(), same[0].name


def test_a_known_useless_tensor_is_ignored(folder):
    file = file_of(folder, "model.norm.weight")
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    save_file(load_file(file) | {name: torch.ones(4)}, file)
    load(folder)


def test_a_head_beside_tied_embeddings_is_ignored(tmp_path):
    save_tiny(tmp_path, "Llama", tie_word_embeddings=True)
    save_file({"lm_head.weight": torch.ones(259, 32)}, tmp_path / "head.safetensors")
    index = json.loads((tmp_path / INDEX).read_text())
    index["weight_map"]["lm_head.weight"] = "head.safetensors"
    (tmp_path / INDEX).write_text(json.dumps(index))
    load(tmp_path)


def test_a_missing_tensor_is_named(folder):
    rewrite(folder, "model.norm.weight", {})
    assert refusal_of(folder) == (
        f"{folder} lacks 1 tensor (model.norm.weight) that LlamaForCausalLM needs: download the "
        "checkpoint again, or check that config.json belongs to it"
    )


def test_of_many_missing_tensors_five_are_named(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    prefix = "model.layers.1"
    assert refusal_of(folder) == (
        f"{folder} lacks 9 tensors ({prefix}.input_layernorm.weight, "
        f"{prefix}.self_attn.q_proj.weight, {prefix}.self_attn.k_proj.weight, "
        f"{prefix}.self_attn.v_proj.weight, {prefix}.self_attn.o_proj.weight, ...) that "
        "LlamaForCausalLM needs: download the checkpoint again, or check that config.json belongs "
        "to it"
    )


def test_missing_experts_are_named_as_the_checkpoint_would(tmp_path):
    save_tiny(tmp_path, "Mixtral", num_local_experts=2, num_hidden_layers=1)
    rewrite(tmp_path, "model.layers.0.block_sparse_moe.experts.1.w3.weight", {})
    assert "lacks 1 tensor (model.layers.0.block_sparse_moe.experts.1.w3.weight)" in refusal_of(
        tmp_path
    )


def test_an_unexpected_tensor_is_named(folder):
    file = file_of(folder, "model.norm.weight")
    name = "model.layers.0.self_attn.q_proj.bias"
    save_file(load_file(file) | {name: torch.ones(32)}, file)
    assert refusal_of(folder) == (
        f"{folder} has 1 tensor ({name}) that LlamaForCausalLM does not know: check that "
        "config.json belongs to this checkpoint"
    )


def test_a_wrong_shape_is_told_with_both(folder):
    file = rewrite(folder, "model.norm.weight", {"model.norm.weight": torch.ones(31)})
    assert refusal_of(folder) == (
        f"{file}: model.norm.weight should be [32] by config.json and is [31]"
    )


def test_integers_are_refused(folder):
    name = "model.norm.weight"
    file = rewrite(folder, name, {name: torch.ones(32, dtype=torch.int8)})
    assert refusal_of(folder) == (
        f"{file}: {name} is stored as I8 and there is F64, F32, F16, BF16: quantized checkpoints "
        "are not offered"
    )


def test_a_file_that_cannot_be_read_is_refused(folder):
    file = file_of(folder, "model.norm.weight")
    file.unlink()
    file.mkdir()  # root may read every file
    assert refusal_of(folder) == f"{file} cannot be read: [Errno 21] Is a directory: '{file}'"


def test_a_truncated_file_is_refused(folder):
    file = file_of(folder, "model.norm.weight")
    content = file.read_bytes()
    file.write_bytes(content[:-10])
    size = len(content)
    assert refusal_of(folder) == (
        f"{file} has {size - 10} bytes and its header describes {size}: download it again"
    )


@pytest.mark.parametrize("num_bytes", [0, 5, 100])
def test_a_file_cut_in_its_header_is_refused(num_bytes, folder):
    file = file_of(folder, "model.norm.weight")
    file.write_bytes(file.read_bytes()[:num_bytes])
    assert refusal_of(folder) == (
        f"{file} has {num_bytes} bytes, which is too few for its own header: it is truncated or no "
        "safetensors file; download it again"
    )


def test_a_damaged_header_is_refused(folder):
    file = file_of(folder, "model.norm.weight")
    content = bytearray(file.read_bytes())
    content[8:10] = b"[["
    file.write_bytes(content)
    said = refusal_of(folder)
    assert said.startswith(f"{file} has a damaged header (JSONDecodeError: ")
    assert said.endswith("): download it again")


def test_a_file_that_the_index_names_must_exist(folder):
    file = file_of(folder, "model.norm.weight")
    file.unlink()
    assert refusal_of(folder) == (
        f"{file} is missing though {INDEX} names it: download the checkpoint again"
    )


def test_numbered_files_must_all_be_there(folder):
    (folder / INDEX).unlink()
    first, second, *others = sorted(folder.glob("*.safetensors"))
    first.unlink()
    total = len(others) + 2
    assert refusal_of(folder) == (
        f"{second} is one of {total} files by its name and {folder} has {total - 1}: download the "
        "others"
    )


def test_the_same_tensor_in_two_files_is_refused(folder):
    tensors = join(folder)
    save_file(tensors, folder / "a.safetensors")
    save_file({"model.norm.weight": tensors["model.norm.weight"]}, folder / "b.safetensors")
    assert refusal_of(folder) == (
        f"{folder}: tensor model.norm.weight is in both a.safetensors and b.safetensors: keep the "
        "files of one checkpoint only"
    )


def test_pickles_are_refused(folder):
    join(folder)
    for number in (1, 2):
        (folder / f"pytorch_model-0000{number}-of-00002.bin").write_bytes(b"")
    assert refusal_of(folder) == (
        f"{folder} has 2 pickle files (pytorch_model-00001-of-00002.bin, "
        "pytorch_model-00002-of-00002.bin) and only safetensors are read: convert the checkpoint, "
        "for example with transformers' save_pretrained"
    )


def test_a_folder_without_weights_is_refused(folder):
    join(folder)
    assert refusal_of(folder) == (
        f"{folder} has no *.safetensors file: download the weights, or set load_format=dummy for "
        "random ones"
    )


def test_git_lfs_pointers_are_recognised(folder):
    file = file_of(folder, "model.norm.weight")
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 123\n"
    file.write_text(pointer)
    assert refusal_of(folder) == (
        f"{file} is a git-lfs pointer of {len(pointer)} bytes, not the weights: run `git lfs pull` "
        "in the folder"
    )


@pytest.mark.parametrize("name", ["../elsewhere.safetensors", "/etc/passwd", 3])
def test_an_index_that_points_outside_the_folder_is_refused(name, folder):
    (folder / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    assert refusal_of(folder) == (f"{folder / INDEX} names {name!r}, which is not a file beside it")


def test_a_damaged_index_is_refused(folder):
    (folder / INDEX).write_text('{"weights": {}}')
    assert refusal_of(folder) == (
        f"{folder / INDEX} is no index of safetensors files (KeyError: 'weight_map'): download it "
        "again"
    )


def test_dummy_weights_follow_their_seed_and_scale(folder):
    def filled(seed: int) -> dict[str, torch.Tensor]:
        model = build_model(read_model_config(folder), single_rank_groups(), CPU, torch.float32)
        dummy_weights(model, seed)
        return {source.name: source.parts[0].into for source in plain_sources(model)}

    first, again, other = filled(1), filled(1), filled(2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])
    assert not torch.equal(first["lm_head.weight"], first["model.embed_tokens.weight"])
    assert first["lm_head.weight"].std().item() == pytest.approx(0.2, rel=0.05)
    assert torch.equal(first["model.norm.weight"], torch.ones(32))


def header_of(file: Path) -> tuple[dict, bytes]:
    content = file.read_bytes()
    first = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:first]), content[first:]


def write(file: Path, header: dict, payload: bytes) -> None:
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + payload)


@pytest.mark.parametrize(
    "lie",
    [
        {"shape": [16]},
        {"data_offsets": [4, 128]},
        {"data_offsets": [0, 124]},
        {"data_offsets": [-4, 124]},
        {"shape": [2**40, 2**40]},
    ],
)
def test_a_header_that_lies_about_places_is_refused(lie, folder):
    """The tensor has 128 bytes and is the first of its file."""
    file = file_of(folder, "model.norm.weight")
    tensors = load_file(file)
    save_file({"model.norm.weight": tensors.pop("model.norm.weight")}, folder / "first.tmp")
    _, payload = header_of(folder / "first.tmp")
    save_file(tensors, folder / "rest.tmp")
    rest, more = header_of(folder / "rest.tmp")
    for tensor in rest.values():
        if "data_offsets" in tensor:
            tensor["data_offsets"] = [place + 128 for place in tensor["data_offsets"]]
    honest = {"dtype": "F32", "shape": [32], "data_offsets": [0, 128]}
    write(file, rest | {"model.norm.weight": honest}, payload + more)
    load(folder)
    write(file, rest | {"model.norm.weight": honest | lie}, payload + more)
    assert refusal_of(folder).startswith(f"{file} has a damaged header: model.")


@pytest.mark.parametrize("lie", [{"shape": [-32]}, {"shape": [1.5]}, {"data_offsets": ["0", 128]}])
def test_a_header_of_other_types_is_refused(lie, folder):
    file = file_of(folder, "model.norm.weight")
    header, payload = header_of(file)
    header["model.norm.weight"] |= lie
    write(file, header, payload)
    assert refusal_of(folder).startswith(f"{file} has a damaged header (ValidationError: ")
