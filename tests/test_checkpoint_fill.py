"""Weights from safetensors files: read once each, each on its device, of models built without."""

import copy
import threading
import warnings
from collections import Counter

import pytest
import torch
from checkpoints import CPU, Net, on_cpu, same, saved, st, write_shards
from torch import nn

from shardwright.sharder.runtime.placing.checkpoint import Checkpoint
from shardwright.sharder.runtime.placing.sim import on_host, sim_device
from shardwright.sharder.runtime.placing.weights import empty_weights, fill


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
