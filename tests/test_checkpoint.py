"""Checkpoints in safetensors files: found by name in every layout, and what is none is one clear line."""

import json
import sys

import pytest
import torch
from checkpoints import CPU, message, st, write_shards

from shardwright.errors import ShardwrightError
from shardwright.sharder.runtime.placing.checkpoint import Checkpoint
from shardwright.sharder.runtime.placing.sim import on_host, sim_device

TENSORS = {
    "a.weight": torch.arange(6.0).reshape(2, 3),
    "a.bias": torch.arange(2, dtype=torch.float16),
    "b.steps": torch.tensor(7),
}


# Reading


def folder_with_one_file(folder):
    st.save_file(TENSORS, folder / "model.safetensors")
    write_shards(folder, {"other": torch.zeros(1)}, 1, index=False)
    return folder


LAYOUTS = {
    "model.safetensors before others": folder_with_one_file,
    "index and shards": lambda folder: write_shards(folder, TENSORS),
    "index of another name": lambda folder: (
        (write_shards(folder, TENSORS) / "model.safetensors.index.json")
        .rename(folder / "x.safetensors.index.json")
        .parent
    ),
    "the index itself": lambda folder: write_shards(folder, TENSORS) / "model.safetensors.index.json",
    "files without an index": lambda folder: write_shards(folder, TENSORS, 3, index=False),
    "one file": lambda folder: folder_with_one_file(folder) / "model.safetensors",
    "path as text": lambda folder: str(folder_with_one_file(folder)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_read(tmp_path, layout):
    """Whatever the layout, the names, shapes, element types and numbers are those that were saved."""
    with Checkpoint(LAYOUTS[layout](tmp_path)) as checkpoint:
        assert checkpoint.names == frozenset(TENSORS)
        for name, tensor in TENSORS.items():
            assert checkpoint.shape(name) == tuple(tensor.shape)
            loaded = checkpoint.load(name, "cpu")
            assert loaded.dtype == tensor.dtype
            assert torch.equal(loaded, tensor)
        assert checkpoint.dtype("a.bias") == "F16"


def test_a_loaded_tensor_is_a_copy(tmp_path):
    """It does not change with another load of the same name, with the file, or when the checkpoint is closed."""
    file = LAYOUTS["one file"](tmp_path)
    with Checkpoint(file) as checkpoint:
        one, two = checkpoint.load("a.weight", CPU), checkpoint.load("a.weight", CPU)
        one.zero_()
    file.write_bytes(b"")
    assert torch.equal(two, TENSORS["a.weight"])


def test_load_converts_and_moves(tmp_path):
    """The dtype and the device are those asked for."""
    checkpoint = Checkpoint(LAYOUTS["one file"](tmp_path))
    loaded = checkpoint.load("a.weight", sim_device(1), torch.bfloat16)
    assert (loaded.device, loaded.dtype) == (sim_device(1), torch.bfloat16)
    assert torch.equal(on_host(loaded), TENSORS["a.weight"].bfloat16())


def test_files_open_when_asked_and_close(tmp_path):
    """With an index no file is opened before a tensor is asked for; after close they open again."""
    checkpoint = Checkpoint(write_shards(tmp_path, TENSORS))
    assert not checkpoint._opened
    checkpoint.load("a.weight", CPU)
    assert [file.name for file in checkpoint._opened] == ["model-0.safetensors"]
    checkpoint.close()
    assert not checkpoint._opened
    assert torch.equal(checkpoint.load("a.bias", CPU), TENSORS["a.bias"])


def test_find_takes_the_name_before_its_aliases(tmp_path):
    """A tied tensor is found under whichever of its names is there, its own first."""
    checkpoint = Checkpoint(write_shards(tmp_path, TENSORS))
    assert checkpoint.find("a.bias", ["a.weight"]) == "a.bias"
    assert checkpoint.find("head.weight", ["x", "a.weight"]) == "a.weight"
    assert checkpoint.find("head.weight") is None


def truncated(folder):
    file = LAYOUTS["one file"](folder)
    file.write_bytes(file.read_bytes()[:-3])
    return file


def git_lfs_pointer(folder):
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    return folder


def index_with(text):
    def write(folder):
        (folder / "model.safetensors.index.json").write_text(text)
        return folder

    return write


def absent_shards(folder):
    write_shards(folder, TENSORS, 3)
    for k in (1, 2):
        (folder / f"model-{k}.safetensors").unlink()
    return folder


def pickled(folder):
    (folder / "pytorch_model.bin").write_bytes(b"")
    return folder / "pytorch_model.bin"


def same_name_twice(folder):
    for name in ("x", "y"):
        st.save_file({"w": torch.zeros(1)}, folder / f"{name}.safetensors")
    return folder


def two_indices(folder):
    for name in ("x", "y"):
        (folder / f"{name}.safetensors.index.json").write_text('{"weight_map": {}}')
    return folder


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda folder: folder / "nothing", r"cannot read .*nothing: there is no such file or folder"),
        (lambda folder: folder, r"holds no \*\.safetensors file; save the weights with safetensors\.torch\.save_model"),
        (pickled, r"pytorch_model\.bin is not a safetensors file; save the weights with"),
        (truncated, r"model\.safetensors is damaged or incomplete \(.*not fully covered\); download it again"),
        (git_lfs_pointer, r"model\.safetensors is damaged or incomplete \(.*header.*\); download it again"),
        (index_with("{"), r"index\.json is no index with a weight_map of names to files; download it again"),
        (index_with("[]"), r"is no index with a weight_map"),
        (index_with('{"weight_map": {"a": 1}}'), r"is no index with a weight_map"),
        (index_with('{"metadata": {}}'), r"is no index with a weight_map"),
        (absent_shards, r"index\.json names model-1\.safetensors and 1 more that are not there; download all shards"),
        (same_name_twice, r"^w is in .*x\.safetensors and in y\.safetensors, and no index says which is meant"),
        (two_indices, r"has 2 indices; give one of them, such as .*x\.safetensors\.index\.json"),
    ],
)
def test_what_is_no_checkpoint_is_one_clear_line(tmp_path, make, says):
    """Each fault of a folder or file is named, with the remedy, when the checkpoint is made."""
    with pytest.raises(ShardwrightError, match=says) as caught:
        Checkpoint(make(tmp_path))
    message(caught)


def test_faults_of_one_tensor_are_one_clear_line(tmp_path):
    """A name that is not there, one the index is wrong about, and a device that is not there are told."""
    write_shards(tmp_path, TENSORS)
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["c"] = "model-0.safetensors"
    index.write_text(json.dumps(content))
    checkpoint = Checkpoint(tmp_path)
    with pytest.raises(ShardwrightError, match=r"has no tensor d; it has 4 others"):
        checkpoint.load("d", CPU)
    with pytest.raises(
        ShardwrightError, match=r"cannot read c from .*model-0\.safetensors: .*the checkpoint is damaged"
    ):
        checkpoint.load("c", CPU)
    with pytest.raises(ShardwrightError, match=r"cannot put a\.weight \(24 bytes\) on cuda:77: ") as caught:
        checkpoint.load("a.weight", "cuda:77")
    message(caught)


def test_damaged_shard_is_named_when_it_is_opened(tmp_path):
    """With an index a damaged shard shows when it is opened."""
    write_shards(tmp_path, TENSORS)
    (tmp_path / "model-1.safetensors").write_bytes(b"\xff" * 64)
    checkpoint = Checkpoint(tmp_path)
    checkpoint.load("a.weight", CPU)
    with pytest.raises(ShardwrightError, match=r"model-1\.safetensors is damaged or incomplete"):
        checkpoint.load("a.bias", CPU)


def test_without_safetensors_the_extra_is_named(tmp_path, monkeypatch):
    """Where safetensors is not installed, the error is the command that installs it."""
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ShardwrightError, match=r"pip install 'shardwright\[checkpoint\]'$"):
        Checkpoint(tmp_path)
