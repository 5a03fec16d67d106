"""What the tests of checkpoints share: tensors in files, models, and how they are held against each other."""

import json

import pytest
import torch
from torch import nn

from shardwright.sharder.runtime.placing.checkpoint import Checkpoint
from shardwright.sharder.runtime.placing.sim import on_host

st = pytest.importorskip("safetensors.torch")

CPU = torch.device("cpu")


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
