"""Names in a checkpoint and in the model, and what is refused before anything is replaced."""

import copy
import warnings

import pytest
import torch
from checkpoints import CPU, Net, message, on_cpu, same, saved, write_shards
from torch import nn

from shardwright.errors import ShardwrightError
from shardwright.sharder.runtime.placing.checkpoint import Checkpoint
from shardwright.sharder.runtime.placing.sim import sim_device
from shardwright.sharder.runtime.placing.weights import empty_weights, fill


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
