"""What the tests of the recorder share: models to wire, and what it means that a capture is faithful."""

import inspect
from pathlib import Path

import pytest
import torch
from torch import nn

from shardwright.profiler.recording.inputs import outputs_of
from shardwright.profiler.trace import checked_trace

WIDTH, ROWS = 6, 4


@pytest.fixture(autouse=True)
def repeatable():
    """Weights are the same in every run, and small models are quicker on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
    torch.set_num_threads(threads)


class Layers(nn.Module):
    """Linear layers, which every test wires in its own way."""

    def __init__(self, count=2):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(count))


def rows(seed):
    """A batch."""
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(seed))


def batch(seed):
    return (rows(seed),), {}


def with_mask(mask):
    """A batch and the same mask with it, whatever the seed."""
    return lambda seed: ((rows(seed), mask.clone()), {})


def marked(model):
    """Where the line is that ends in an arrow, as ``file:line:``."""
    lines, first = inspect.getsourcelines(type(model))
    (offset,) = [index for index, line in enumerate(lines) if line.rstrip().endswith("# <--")]
    return f"{Path(inspect.getsourcefile(type(model))).name}:{first + offset}:"


def results(run, model, *, train, places=None):
    """What ``run`` returns and the gradients that its floating outputs give the model, from a fixed seed."""
    torch.manual_seed(5)
    model.zero_grad()
    with torch.set_grad_enabled(train):
        outputs = outputs_of(run())
        outputs = outputs if places is None else [outputs[place] for place in places]
    trained = [t for t in outputs if t.requires_grad]
    if trained:
        torch.stack([t.float().square().sum() for t in trained]).sum().backward()
    gradients = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    return [t.detach() for t in outputs], gradients


def assert_replays(capture, model, args, kwargs, *, train=True):
    """On these inputs, the graph gives the model's own outputs, bit for bit, and its gradients."""
    inputs = [t.clone() for t in outputs_of((args, kwargs))]
    expected = results(lambda: model(*args, **kwargs), model, train=train, places=capture.output_places)
    found = results(lambda: capture.module()(*inputs), model, train=train)
    assert len(found[0]) == len(expected[0])
    for one, other in zip(found[0], expected[0], strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    for name, gradient in expected[1].items():
        other = found[1][name]
        assert (gradient is None) == (other is None), name
        assert gradient is None or torch.allclose(gradient, other, rtol=1e-5, atol=1e-6), name


def faithful(model, make=batch, *, train=True, **options):
    """The capture of a model that a graph can hold: without obstacles, and right on inputs that it never saw."""
    capture = checked_trace(model, *make(0), train=train, **options)
    assert capture.obstacles == []
    model.train(train)
    assert_replays(capture, model, *make(1), train=train)
    return capture


def obstacles(model, make=batch, *, train=True):
    """The obstacles of a model that a graph cannot hold."""
    found = checked_trace(model, *make(0), train=train).obstacles
    assert found
    return found


def step(capture, name):
    (found,) = [step for step in capture.steps if step.name == name]
    return found


class Takes(nn.Linear):
    """A unit that takes whatever ``look`` knows how to look into."""

    look = staticmethod(lambda value: value)

    def forward(self, value):
        return super().forward(self.look(value))
