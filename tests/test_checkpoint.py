"""Weights from safetensors files: found by name, read once each, checked before anything is replaced."""

import copy
import json
import sys
import threading
import warnings
from collections import Counter

import pytest
import torch
from torch import nn

from shardwright.errors import ShardwrightError
from shardwright.sharder.runtime.checkpoint import Checkpoint
from shardwright.sharder.runtime.sim import on_host, sim_device
from shardwright.sharder.runtime.weights import empty_weights, fill

st = pytest.importorskip("safetensors.torch")

CPU = torch.device("cpu")
TENSORS = {
    "a.weight": torch.arange(6.0).reshape(2, 3),
    "a.bias": torch.arange(2, dtype=torch.float16),
    "b.steps": torch.tensor(7),
}


def on_cpu(_name):
    return CPU


def write_shards(folder, tensors, count=2, *, index=True):
    """Save tensors dealt over ``count`` shards, with an index if asked."""
    names = list(tensors)
    file_of = {name: f"model-{i % count}.safetensors" for i, name in enumerate(names)}
    for file in set(file_of.values()):
        st.save_file({n: tensors[n].contiguous().clone() for n in names if file_of[n] == file}, folder / file)
    if index:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": file_of}))
    return folder


def saved(model, path):
    """The model's tensors in one file; of tied ones only the first name is kept, as everywhere."""
    st.save_model(model, str(path))
    return Checkpoint(path)


def same(model, other):
    """Both have the same names and numbers."""
    one, two = model.state_dict(), other.state_dict()
    return list(one) == list(two) and all(torch.equal(on_host(one[n]), on_host(two[n])) for n in one)


def message(caught):
    text = str(caught.value)
    assert "\n" not in text
    return text


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


# Building


class Net(nn.Module):
    """Tied weights, a frozen parameter, persistent and other buffers."""

    def __init__(self, width=4):
        super().__init__()
        self.embed = nn.Embedding(5, width)
        self.body = nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width), nn.Linear(width, width, bias=False))
        self.head = nn.Linear(width, 5, bias=False)
        self.head.weight = self.embed.weight
        self.body[2].weight.requires_grad_(False)
        self.register_buffer("scale", torch.full((width,), 0.5), persistent=False)

    def forward(self, x):
        return self.head(self.body(self.embed(x)) * self.scale)


class Marked(nn.Parameter):
    """A parameter with a class and an attribute of its own."""


def test_parameters_are_empty_and_buffers_real():
    """Shapes, dtypes, requires_grad and ties are the model's own; nothing but the parameters lacks values."""
    model = Net()
    with empty_weights():
        empty = Net()
    assert all(p.is_meta for p in empty.parameters())
    assert not any(b.is_meta for b in empty.buffers())
    assert torch.equal(empty.scale, model.scale)
    assert empty.head.weight is empty.embed.weight
    for (name, p), (other, q) in zip(model.named_parameters(), empty.named_parameters(), strict=True):
        assert (name, p.shape, p.dtype, p.requires_grad) == (other, q.shape, q.dtype, q.requires_grad)


def test_class_attributes_and_a_shared_parameter_are_kept():
    """A parameter made once and given to two modules stays one object, of its class and with its attributes."""
    with empty_weights():
        weight = Marked(torch.ones(2, dtype=torch.int8), requires_grad=False)
        weight.tag = "mine"
        one, two = nn.Module(), nn.Module()
        one.weight = two.weight = weight
        one.register_parameter("none", None)
    assert one.weight is two.weight
    assert one.weight.is_meta
    assert (type(one.weight), one.weight.tag, one.weight.dtype) == (Marked, "mine", torch.int8)
    assert not one.weight.requires_grad
    assert one.none is None


def test_blocks_nest_and_end_after_an_error():
    """Inside an inner block's end the outer still holds; after an error modules are real again."""

    @empty_weights()
    def build():
        with empty_weights():
            assert nn.Linear(2, 2).weight.is_meta
        assert nn.Linear(2, 2).weight.is_meta
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        build()
    assert not nn.Linear(2, 2).weight.is_meta


def test_other_threads_build_real_modules():
    """The block is its thread's own."""
    made = []
    with empty_weights():
        thread = threading.Thread(target=lambda: made.append(nn.Linear(2, 2)))
        thread.start()
        thread.join()
    assert not made[0].weight.is_meta


# Filling

MODULES = {
    "tied": Net,
    "lstm": lambda: nn.LSTM(4, 5, num_layers=2),
    "attention": lambda: nn.MultiheadAttention(4, 2),
    "transformer": lambda: nn.TransformerEncoderLayer(4, 2, dim_feedforward=8),
    "parametrized": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)),
    "list": lambda: nn.ParameterList([torch.rand(2), torch.rand(3)]),
    "dict": lambda: nn.ParameterDict({"a": torch.rand(1)}),
    "one module at two paths": lambda: nn.Sequential(*[nn.Linear(3, 3)] * 2),
}


@pytest.mark.parametrize("empty", [True, False], ids=["empty", "real"])
@pytest.mark.parametrize("name", MODULES)
def test_round_trip(tmp_path, name, empty):
    """A model saved and filled again has the numbers it was saved with."""
    torch.manual_seed(0)
    model = MODULES[name]()
    with empty_weights() if empty else warnings.catch_warnings():
        other = MODULES[name]()
    assert not same(model, other) if not empty else True
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fill(other, saved(model, tmp_path / "m.safetensors"), on_cpu)
    assert same(model, other)
    assert [p.requires_grad for p in other.parameters()] == [p.requires_grad for p in model.parameters()]


def test_a_filled_model_computes_and_learns(tmp_path):
    """Outputs and gradients of the filled model are those of the saved one, also of a recurrent one."""
    for make, x in ((Net, torch.tensor([0, 3, 4])), (MODULES["lstm"], torch.rand(3, 2, 4))):
        model = make()
        with empty_weights():
            filled = make()
        fill(filled, saved(model, tmp_path / "m.safetensors"), on_cpu)
        out, expected = filled(x), model(x)
        out, expected = (out[0], expected[0]) if isinstance(out, tuple) else (out, expected)
        assert torch.equal(out, expected)
        out.square().sum().backward()
        expected.square().sum().backward()
        for p, q in zip(filled.parameters(), model.parameters(), strict=True):
            assert p.grad is q.grad is None or torch.equal(p.grad, q.grad)


def test_tied_parameters_stay_one(tmp_path):
    """One new object at each of its names, from whichever name the checkpoint has; the other name is no surprise."""
    model = Net()
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name != "embed.weight"}
    with empty_weights():
        filled = Net()
    fill(filled, Checkpoint(write_shards(tmp_path, tensors)), on_cpu)
    assert filled.head.weight is filled.embed.weight
    assert same(model, filled)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fill(filled, Checkpoint(write_shards(tmp_path, model.state_dict())), on_cpu)


def test_each_tensor_is_read_once_and_put_before_the_next(tmp_path, monkeypatch):
    """At no time is more than one tensor outside the model, and no shard stays open."""
    torch.manual_seed(0)
    model = Net()
    with empty_weights():
        filled = Net()
    reads, waiting = Counter(), []
    load = Checkpoint.load

    def counted(self, name, device, dtype=None):
        reads[name] += 1
        waiting.append(sum(p.is_meta for p in filled.parameters()))
        return load(self, name, device, dtype)

    monkeypatch.setattr(Checkpoint, "load", counted)
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name != "head.weight"}
    checkpoint = Checkpoint(write_shards(tmp_path, tensors, 3))
    fill(filled, checkpoint, on_cpu)
    assert set(reads) == set(tensors)
    assert set(reads.values()) == {1}
    steps = [a - b for a, b in zip(waiting, [*waiting[1:], 0], strict=True)]
    assert waiting[0] == 6
    assert set(steps) == {0, 1}  # 0: a buffer, which was real
    assert not checkpoint._opened


def test_each_tensor_lands_on_its_device(tmp_path):
    """Devices go by name, a tied tensor's by its first; non-persistent buffers move along with their values."""
    model = Net()
    asked = []

    def device_of(name):
        asked.append(name)
        return sim_device(1) if name.startswith("body") or name == "scale" else CPU

    with empty_weights():
        filled = Net()
    fill(filled, saved(model, tmp_path / "m.safetensors"), device_of)
    assert same(model, filled)
    assert filled.scale.device == sim_device(1)
    assert torch.equal(on_host(filled.scale), model.scale)
    for name, tensor in filled.state_dict().items():
        assert tensor.device == (sim_device(1) if name.startswith("body") else CPU)
    assert isinstance(filled.body[0].weight, nn.Parameter)
    assert "head.weight" not in asked
    assert len(asked) == len(set(asked))


def test_the_models_dtype_wins(tmp_path):
    """Values are converted to what the model's tensors are."""
    model = Net()
    with empty_weights():
        filled = Net().to(torch.bfloat16)
    fill(filled, saved(model, tmp_path / "m.safetensors"), on_cpu)
    assert same(filled, copy.deepcopy(model).to(torch.bfloat16))
    assert filled.body[1].num_batches_tracked.dtype == torch.int64


def test_a_real_parameter_stays_the_same_object(tmp_path):
    """An optimizer that was made before goes on with the filled weights; gradients of the old ones are gone."""
    model, filled = Net(), Net()
    before = dict(filled.named_parameters())
    optimizer = torch.optim.SGD([p for p in filled.parameters() if p.requires_grad], lr=0.1)
    filled(torch.tensor([1, 2])).sum().backward()
    fill(filled, saved(model, tmp_path / "m.safetensors"), on_cpu)
    assert all(before[name] is p for name, p in filled.named_parameters())
    assert all(p.grad is None for p in filled.parameters())
    filled(torch.tensor([1, 2])).sum().backward()
    optimizer.step()
    assert not same(model, filled)


def test_class_and_attributes_of_a_parameter_are_kept(tmp_path):
    """A filled parameter is of the class that it was, with its attributes."""
    with empty_weights():
        model = nn.Module()
        model.weight = Marked(torch.zeros(2, 3), requires_grad=False)
        model.weight.tag = "mine"
    st.save_file({"weight": torch.ones(2, 3)}, tmp_path / "m.safetensors")
    fill(model, Checkpoint(tmp_path), on_cpu)
    assert type(model.weight) is Marked
    assert model.weight.tag == "mine"
    assert not model.weight.requires_grad
    assert torch.equal(model.weight.detach(), torch.ones(2, 3))


@pytest.mark.parametrize(
    ("in_model", "in_file", "how"), [("", "base.model.", "added"), ("base.", "", "left out")], ids=["added", "left out"]
)
def test_one_prefix_for_all_that_is_missing(tmp_path, in_model, in_file, how):
    """A prefix more or less is bridged if it finds every missing name, and a warning says so."""
    net = Net()
    model = nn.ModuleDict({"base": net}) if in_model else net
    tensors = {in_file + name: tensor for name, tensor in net.state_dict().items() if name != "head.weight"}
    other = copy.deepcopy(model)
    for p in other.parameters():
        p.data.zero_()
    with pytest.warns(UserWarning, match=f"with the prefix '{in_model or in_file}' {how}$") as caught:
        fill(other, Checkpoint(write_shards(tmp_path, tensors)), on_cpu)
    assert len(caught) == 1
    assert same(model, other)


def test_the_name_itself_goes_before_a_prefix(tmp_path):
    """What is there as it is called is taken; only the missing names get the prefix, and no tensor is used twice."""
    with empty_weights():
        model = nn.ModuleDict({"model": nn.ModuleDict({"a": nn.Linear(2, 2)}), "head": nn.Linear(2, 2)})
    tensors = {name.removeprefix("model."): torch.rand(p.shape) for name, p in model.named_parameters()}
    with pytest.warns(UserWarning, match="with the prefix 'model.' left out"):
        fill(model, Checkpoint(write_shards(tmp_path, tensors)), on_cpu)
    assert torch.equal(model["head"].weight, tensors["head.weight"])
    assert torch.equal(model["model"]["a"].weight, tensors["a.weight"])
    with empty_weights():
        model = nn.ModuleDict({"model": nn.ModuleDict({"head": nn.Linear(2, 2)}), "head": nn.Linear(2, 2)})
    with pytest.raises(ShardwrightError, match=r"lacks model\.head\.weight and 1 more"):
        fill(model, Checkpoint(tmp_path), on_cpu)


def test_what_the_model_does_not_use_is_a_warning(tmp_path):
    """Tensors too many are told by one line and tolerated."""
    tensors = nn.Linear(2, 2).state_dict() | {"z": torch.zeros(1), "y": torch.zeros(1)}
    with pytest.warns(UserWarning, match=r"has y and 1 more that the model has no use for") as caught:
        fill(nn.Linear(2, 2), Checkpoint(write_shards(tmp_path, tensors)), on_cpu)
    assert len(caught) == 1
    assert caught[0].filename == __file__


def without(name):
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name}


def changed(name, value):
    return lambda tensors: tensors | {name: value}


def under_two_prefixes(tensors):
    return {f"{prefix}.{name}": tensor for prefix in "ab" for name, tensor in tensors.items()}


def lazily():
    return nn.ModuleDict({"net": Net(), "lazy": nn.LazyLinear(3)})


def on_meta():
    with torch.device("meta"):
        return Net()


def no_device(_name):
    return torch.device("cuda:77")


REFUSED = {
    "lacks a parameter": (Net, without("body.0.bias"), on_cpu, r"lacks body\.0\.bias \(the model has 9\), also under"),
    "lacks a real persistent buffer": (Net, without("body.1.running_var"), on_cpu, r"lacks body\.1\.running_var \("),
    "lacks all": (Net, lambda _: {"x": torch.zeros(1)}, on_cpu, r"lacks embed\.weight and 8 more \(the model has 9\)"),
    "lacks one under the best prefix": (
        Net,
        lambda tensors: {f"p.{name}": tensor for name, tensor in without("body.0.bias")(tensors).items()},
        on_cpu,
        r"lacks body\.0\.bias \(",
    ),
    "two prefixes": (Net, under_two_prefixes, on_cpu, r"^embed\.weight could be a\.embed\.weight or b\.embed"),
    "shape": (
        Net,
        changed("body.0.weight", torch.zeros(4, 5)),
        on_cpu,
        r"body\.0\.weight has shape \(4, 4\) in the model and \(4, 5\) in .+",
    ),
    "integers": (
        Net,
        changed("body.0.weight", torch.zeros(4, 4, dtype=torch.int8)),
        on_cpu,
        r"body\.0\.weight is float32 in the model and I8 in .*: the checkpoint is quantised, or of another model",
    ),
    "buffer on meta": (
        on_meta,
        lambda tensors: tensors,
        on_cpu,
        r"^scale is on meta, not persistent.*: build the model under sw\.empty_weights\(\), which leaves buffers real$",
    ),
    "lazy": (
        lazily,
        lambda tensors: (
            {f"net.{name}": tensor for name, tensor in tensors.items()}
            | {f"lazy.{name}": tensor for name, tensor in nn.Linear(2, 3).state_dict().items()}
        ),
        on_cpu,
        r"lazy\.weight has no shape yet: call the model once",
    ),
    "device": (Net, lambda tensors: tensors, no_device, r"cannot use cuda:77: "),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refused_checkpoint_leaves_the_model_as_it_was(tmp_path, monkeypatch, case):
    """Every mistake is one line that names the tensor, and no tensor was read or replaced."""
    make, change, device_of, says = REFUSED[case]
    checkpoint = Checkpoint(write_shards(tmp_path, change(without("head.weight")(Net().state_dict()))))
    model = make()
    before = [(id(t), t.device, t._version) for t in [*model.parameters(), *model.buffers()]]
    monkeypatch.setattr(Checkpoint, "load", lambda *_: pytest.fail("read before all was checked"))
    with pytest.raises(ShardwrightError, match=says) as caught:
        fill(model, checkpoint, device_of)
    message(caught)
    assert [(id(t), t.device, t._version) for t in [*model.parameters(), *model.buffers()]] == before


def test_a_damaged_shard_leaves_the_model_as_it_was(tmp_path):
    """All shards' headers are read before the first tensor is replaced."""
    write_shards(tmp_path, without("head.weight")(Net().state_dict()), 3)
    (tmp_path / "model-2.safetensors").write_bytes(b"")
    with empty_weights():
        model = Net()
    with pytest.raises(ShardwrightError, match=r"model-2\.safetensors is damaged"):
        fill(model, Checkpoint(tmp_path), on_cpu)
    assert all(p.is_meta for p in model.parameters())


def test_a_buffer_on_meta_that_the_checkpoint_has_is_filled(tmp_path):
    """A model wholly on meta is filled if it has no buffer that no checkpoint holds."""
    model = nn.BatchNorm1d(3)
    checkpoint = saved(model, tmp_path / "m.safetensors")
    with torch.device("meta"):
        filled = nn.BatchNorm1d(3)
    fill(filled, checkpoint, on_cpu)
    assert same(model, filled)


def test_filling_inside_the_block_is_refused(tmp_path):
    """Inside empty_weights() the values would be dropped again."""
    checkpoint = saved(nn.Linear(2, 2), tmp_path / "m.safetensors")
    with empty_weights(), pytest.raises(ShardwrightError, match=r"after the `with empty_weights\(\)` block"):
        fill(nn.Linear(2, 2), checkpoint, on_cpu)


# Hugging Face's models


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def llama(request, tmp_path_factory):
    """A tiny Llama, and the folder with its shards."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=48,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=request.param,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    folder = tmp_path_factory.mktemp("llama")
    model.save_pretrained(folder, max_shard_size="5KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    return model, folder


def test_llama_from_its_shards_onto_three_devices(llama):
    """A Llama built empty and filled shard by shard, each layer on its device, has the saved numbers, ties included."""
    model, folder = llama
    with empty_weights():
        filled = type(model)(model.config)
    assert all(p.is_meta for p in filled.parameters())

    def device_of(name):
        return sim_device(int(name.split(".")[2])) if ".layers." in name else CPU

    with Checkpoint(folder) as checkpoint, warnings.catch_warnings():
        warnings.simplefilter("error")
        fill(filled, checkpoint, device_of)
    assert same(model, filled)
    assert (filled.lm_head.weight is filled.model.embed_tokens.weight) == model.config.tie_word_embeddings
    assert {p.device.index for p in filled.model.layers.parameters()} == {0, 1, 2}


def test_filled_llama_computes_what_the_saved_one_does(llama):
    """The rotary buffers, which no checkpoint holds, are real: the outputs are equal to the last bit."""
    model, folder = llama
    with empty_weights():
        filled = type(model)(model.config).eval()
    fill(filled, Checkpoint(folder), on_cpu)
    x = torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        assert torch.equal(filled(x).logits, model(x).logits)


def test_base_model_and_model_with_head_share_checkpoints(llama, tmp_path):
    """The base model is filled from the whole checkpoint; the whole from the base's if the head is tied."""
    model, folder = llama
    with empty_weights():
        base, whole = type(model.model)(model.config), type(model)(model.config)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fill(base, Checkpoint(folder), on_cpu)
    assert same(base, model.model)
    assert str(caught[0].message).endswith("with the prefix 'model.' added")
    unused = [str(warning.message).partition(" has ")[2] for warning in caught[1:]]
    assert unused == ([] if model.config.tie_word_embeddings else ["lm_head.weight that the model has no use for"])
    model.model.save_pretrained(tmp_path)
    if model.config.tie_word_embeddings:
        with pytest.warns(UserWarning, match=r"with the prefix 'model\.' left out"):
            fill(whole, Checkpoint(tmp_path), on_cpu)
        assert same(whole, model)
    else:
        with pytest.raises(ShardwrightError, match=r"lacks lm_head\.weight \("):
            fill(whole, Checkpoint(tmp_path), on_cpu)
