"""Memory counted on fake tensors: wherever it is told, it is what real tensors take; else they are counted."""

import copy
import random
from contextlib import suppress
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint
from zoo import ZOO

from shardwright.profiler import records
from shardwright.profiler.capture import captures_of
from shardwright.profiler.follower import BackwardFollower, ForwardFollower, OtherOperationError
from shardwright.profiler.gpu_kernels import kernels_as_on
from shardwright.profiler.memory import count_step
from shardwright.profiler.operations import OperationRecorder
from shardwright.profiler.profile import Device
from shardwright.profiler.shape_count import count_shapes, is_worth_it
from shardwright.profiler.trace import trace

GPU = Device(name="cuda:0", kind="cuda", description="", memory_bytes=1)
IMAGE, TOKENS, ROWS = (2, 4, 9, 9), (2, 6, 16), (5, 16)


class Function(nn.Module):
    """A unit that calls a function, with parameters of its own."""

    def __init__(self, function, *shapes):
        super().__init__()
        self.function = function
        self.weights = nn.ParameterList(torch.randn(shape) / 4 for shape in shapes)

    def forward(self, x):
        return self.function(x, *self.weights)


def attention(x, _=None, *, causal=False, dropout=0.0):
    q = x.unflatten(-1, (2, -1)).transpose(1, 2)
    return F.scaled_dot_product_attention(q, q, q, None, dropout, causal).transpose(1, 2).flatten(2)


def expert(x, gate, weight):
    """The best half of the rows, weighed and put back."""
    found = (x @ gate).topk(2, dim=0)
    rows = x.gather(0, found.indices.expand(-1, x.shape[1])) @ weight
    return x.index_add(0, found.indices[:, 0], rows * found.values.sigmoid())


class Square(torch.autograd.Function):
    """With a backward of its own."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return 2 * gradient * x


def again(x, weight):
    """Computed a second time in the backward."""
    return checkpoint(lambda y: (y @ weight).tanh().exp(), x, use_reentrant=False)


UNITS = {
    "linear": (nn.Linear(16, 8), ROWS),
    "convolution": (nn.Conv2d(4, 6, 3, stride=2, padding=1), IMAGE),
    "grouped, dilated": (nn.Conv2d(4, 8, 3, groups=2, dilation=2, bias=False), IMAGE),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, stride=2), IMAGE),
    "volumes": (nn.Sequential(nn.Conv3d(4, 6, 3), nn.InstanceNorm3d(6, affine=True)), (1, 4, 5, 5, 5)),
    "sequence": (nn.Sequential(nn.Conv1d(6, 6, 3), nn.MaxPool1d(2)), TOKENS),
    "batch norm": (nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.MaxPool2d(3)), IMAGE),
    "batch norm without statistics": (nn.BatchNorm2d(4, track_running_stats=False), IMAGE),
    "group norm": (nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU(), nn.AdaptiveAvgPool2d(2)), IMAGE),
    "pools": (nn.Sequential(nn.AvgPool2d(2), nn.AdaptiveMaxPool2d(2), nn.Flatten()), IMAGE),
    "resized": (nn.Upsample(scale_factor=2, mode="bilinear"), IMAGE),
    "shuffled": (nn.Sequential(nn.PixelShuffle(2), nn.ReflectionPad2d(1), nn.LocalResponseNorm(1)), IMAGE),
    "layer norm": (nn.Sequential(nn.LayerNorm(16), nn.GELU(), nn.RMSNorm(16)), TOKENS),
    "dropouts": (nn.Sequential(nn.Dropout(0.3), nn.AlphaDropout(0.2), nn.Softmax(-1)), TOKENS),
    "encoder": (nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), TOKENS),
    "encoder without dropout": (nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, norm_first=True), TOKENS),
    "causal": (Function(partial(attention, causal=True), (1,)), TOKENS),
    "dropped": (Function(partial(attention, dropout=0.1), (1,)), TOKENS),
    "bilinear": (Function(lambda x, w: F.bilinear(x, x, w), (3, 16, 16)), ROWS),
    "einsum": (Function(lambda x, w: torch.einsum("bsd,de->bse", x, w).logsumexp(1), (16, 4)), TOKENS),
    "experts": (Function(expert, (16, 1), (16, 16)), ROWS),
    "scan": (Function(lambda x, w: (x * w).cumsum(1).cummax(1).values, (16,)), TOKENS),
    "sorted": (Function(lambda x, w: (x * w).sort(-1).values.prod(-1), (16,)), ROWS),
    "spectrum": (Function(lambda x, w: torch.fft.rfft(x * w).abs(), (16,)), TOKENS),
    "norm": (Function(lambda x, w: F.normalize(x @ w).var(0), (16, 4)), ROWS),
    "made inside": (Function(lambda x, w: x * w + torch.arange(16.0).cos() + torch.tensor([0.5]), (16,)), ROWS),
    "loss": (Function(lambda x, w: F.cross_entropy(x * w, (x > 0).long().argmax(1)).exp(), (16,)), ROWS),
    "weight norm": (nn.utils.parametrizations.weight_norm(nn.Linear(16, 4)), ROWS),
    "own backward": (Function(lambda x, w: Square.apply(x @ w), (16, 4)), ROWS),
    "checkpoint": (Function(again, (16, 4)), ROWS),
}


def step_of(module, x, *, train=True):
    """The captured call of ``module``, and what it needs to be found as it was."""
    model = nn.Sequential(module)
    graph = trace(model, (x,), train=train, units={"0": module})
    module.train(train)
    return next(step for step in graph.steps if step.kind == "unit")


def both(step, **options):
    """What is told of a step without its values, and what it takes with them."""
    return count_shapes(step, **options), count_step(step.call, **options)


NOT_ALWAYS = {"batch norm", "batch norm without statistics"}
"""The fake kernel makes a gradient of the input also where none is wanted."""


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("name", UNITS)
def test_without_values_it_is_what_real_tensors_take(name, first):
    """Each unit is told without its values, in training, to the byte; also if its input wants no gradient."""
    module, shape = UNITS[name]
    step = step_of(module, torch.randn(shape, requires_grad=not first))
    told, real = both(step, train=True, called_again=first)
    assert told == real or (told is None and first and name in NOT_ALWAYS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    "name", ["linear", "convolution", "batch norm", "group norm", "layer norm", "encoder", "dropped"]
)
def test_of_any_precision(name, dtype):
    """So it is with numbers of other sizes, as far as it is told."""
    module, shape = UNITS[name]
    told, real = both(step_of(copy.deepcopy(module).to(dtype), torch.randn(shape, dtype=dtype)), train=True)
    assert told in (None, real)


BY_ONE_KERNEL = {"encoder", "encoder without dropout"}
"""In inference."""


@pytest.mark.parametrize("name", UNITS)
def test_in_inference(name):
    """Nothing is saved then, and what is there at once is told too."""
    module, shape = UNITS[name]
    step = step_of(module, torch.randn(shape), train=False)
    told, real = both(step, train=False)
    assert told in (None, real)
    assert told is not None or not step.operations or name in BY_ONE_KERNEL


@pytest.mark.parametrize("name", ["encoder", "dropouts", "dropped"])
def test_with_the_kernels_of_gpus(name):
    """What GPUs keep of dropout and attention is told alike."""
    module, shape = UNITS[name]
    x = torch.randn(shape, requires_grad=True)
    with kernels_as_on([GPU]):
        told, real = both(step_of(module, x), train=True)
    assert told == real
    assert told != count_step(step_of(module, x).call, train=True)


def test_inputs_that_are_no_dense_tensors():
    """An expanded mask and a part of a tensor are copied before they are given, then as always."""

    class Masked(nn.Module):
        def forward(self, x):
            return F.scaled_dot_product_attention(x[0], x[1], x[1], x[2])

    def given(width):
        mask = torch.randn(2, 1, 1, 6).expand(2, 2, 6, 6)
        return torch.randn(2, 2, 6, 2 * width)[..., :width], torch.randn(2, 6, 2, width).transpose(1, 2), mask

    told, real = both(step_of(Masked(), given(8)), train=True)
    assert told == real


class Counted(nn.Module):
    """Its path follows its input's values."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(16, 4)

    def forward(self, x):
        return self.layer(x[x[:, 0] > 0])


class Drawn(Counted):
    """Whether it drops its layer is drawn by Python."""

    def forward(self, x):
        return self.layer(x) if random.random() < 1.0 else x


class DrawnByNumPy(Counted):
    """The same by NumPy."""

    def forward(self, x):
        return self.layer(x * float(np.random.rand()))


class Forgiving(Counted):
    """Goes on if its values cannot be had."""

    def forward(self, x):
        try:
            return self.layer(x) * float(x.sum())
        except Exception:
            return self.layer(x).exp().exp()


class Hidden(Counted):
    """Reads a table that it does not hold."""

    TABLE = torch.randn(16)

    def forward(self, x):
        return self.layer(x * self.TABLE)


class Sparse(nn.Module):
    """Its gradients are rows of a table."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(9, 4, sparse=True)

    def forward(self, x):
        return self.table((x > 0).sum(1).clamp(max=8))


def watched(module):
    module.register_forward_hook(lambda *_: None)
    return module


def hooked(module):
    module.weight.register_hook(lambda gradient: gradient * 2)
    return module


@pytest.mark.parametrize(
    "module",
    [
        *(Counted(), Drawn(), DrawnByNumPy(), Forgiving(), Hidden(), Sparse()),
        *(watched(nn.Linear(16, 4)), hooked(nn.Linear(16, 4)), nn.LSTM(16, 4)),
        *(torch.jit.script(nn.Linear(16, 4)), nn.Sequential(nn.LSTM(16, 8), nn.Identity())),
    ],
    ids=lambda module: type(module).__name__,
)
def test_what_needs_values_is_not_told(module):
    """Values, chance, hooks, tensors from elsewhere, and kernels that keep other things: nothing is told, or drawn."""
    step = step_of(module, torch.randn(5, 16))
    before = random.getstate(), str(np.random.get_state())
    assert count_shapes(step, train=True) is None
    assert (random.getstate(), str(np.random.get_state())) == before


def test_the_model_is_left_alone():
    """Statistics, gradients, attributes and random numbers stay as they are, and no fake tensor stays behind."""

    class Noting(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.drop, self.seen = nn.BatchNorm1d(16), nn.Dropout(0.5), []

        def forward(self, x):
            self.last = self.drop(self.norm(x))
            self.seen.append(self.last)
            return self.last

    module = Noting()
    step = step_of(module, torch.randn(5, 16, requires_grad=True))
    before, state = copy.deepcopy(module.state_dict()), torch.get_rng_state()
    assert count_shapes(step, train=True) is not None
    assert all(torch.equal(before[key], value) for key, value in module.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert not hasattr(module, "last")
    assert module.seen == []
    assert all(p.grad is None for p in module.parameters())


def test_a_unit_that_knows_the_model_does_not_copy_it():
    """Modules around are shared with the copy that has no values."""

    class Knowing(nn.Linear):
        def __deepcopy__(self, memo):
            raise AssertionError("copied")

    class Known(nn.Linear):
        pass

    module = Known(16, 16)
    module.__dict__["model"] = [Knowing(2, 2)]
    step = step_of(module, torch.randn(5, 16))
    assert count_shapes(step, train=True) is None
    assert count_shapes(step, train=True, around=module.model) == count_step(step.call, train=True)


layers = st.sampled_from(
    [
        lambda: nn.Conv2d(4, 4, 3, padding=1),
        lambda: nn.Conv2d(4, 4, 1, bias=False),
        lambda: nn.BatchNorm2d(4),
        lambda: nn.GroupNorm(2, 4),
        nn.ReLU,
        nn.GELU,
        nn.Sigmoid,
        lambda: nn.MaxPool2d(2, 1),
        lambda: nn.AvgPool2d(2, 1),
        lambda: nn.Dropout(0.5),
        lambda: nn.ZeroPad2d(1),
        lambda: Function(lambda x, w: torch.cat([x[:, :2] * w, x[:, 2:]], 1), (1,)),
        lambda: Function(lambda x, w: x.transpose(2, 3) + w, (1,)),
        lambda: Function(lambda x, w: x.to(torch.float64).mul(w).float(), (1,)),
    ]
)


@settings(max_examples=15, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(layers, min_size=1, max_size=6), st.booleans(), st.booleans())
def test_random_stacks(makers, last, frozen):
    """Whatever is stacked, with memory laid out either way and with or without what is trained, is told to the byte."""
    module = nn.Sequential(*(make() for make in makers)).requires_grad_(not frozen)
    x = torch.randn(2, 4, 8, 8)
    model = nn.Sequential(nn.Conv2d(4, 4, 1), module)
    graph = trace(model, (x.to(memory_format=torch.channels_last) if last else x,), units=dict(model.named_children()))
    step = next(step for step in graph.steps if step.name == "1")
    told, real = both(step, train=True)
    assert told == real


def operations_of(function):
    found = []
    with OperationRecorder(found.append):
        function()
    return found


def follow(function, expected):
    """Run ``function``, which may catch what the follower raises."""
    x, follower = torch.ones(3), ForwardFollower(expected)
    with follower:
        function(x)
    follower.end()


def caught(x):
    with suppress(OtherOperationError):
        (x * 2.0).sin()
    x.exp()


@pytest.mark.parametrize(
    "other", [lambda x: x.exp(), lambda x: (x * 2.0).exp(), lambda x: (x * 2.0).exp().exp().exp(), caught]
)
def test_other_operators_are_not_followed(other):
    """Neither one too few, nor another, nor one too many; also where the model goes on after the error."""
    expected = operations_of(lambda: (torch.ones(3) * 2.0).exp().exp())[1:]
    with pytest.raises(OtherOperationError):
        follow(other, expected)
    follow(lambda x: (x.view(3, 1).view(3) * 2.0).exp().exp(), expected)


def test_larger_storages_are_not_followed():
    """The same operator, whose result takes more than it did."""
    x = torch.ones(2, 3)
    (operation,) = operations_of(lambda: F.mse_loss(x, x))
    assert operation.result_bytes == F.mse_loss(x, x).untyped_storage().nbytes()
    with ForwardFollower([operation]) as same:
        F.mse_loss(x, x)
    same.end()
    with pytest.raises(OtherOperationError), ForwardFollower([operation._replace(result_bytes=10**6)]):
        F.mse_loss(x, x)


def test_a_backward_gives_what_it_is_asked_for():
    """Several results need a mask that asks for each, or a forward that had them."""
    x = torch.ones(2, 3, requires_grad=True)
    given = torch.native_layer_norm(x, (3,), None, None, 1e-5)[0]
    with (follower := BackwardFollower()):
        given.sum().backward()
        x.detach().sigmoid()
    follower.end()
    with pytest.raises(OtherOperationError), BackwardFollower():
        x.detach().sort()
    with BackwardFollower(operations_of(lambda: x.detach().sort())):
        x.detach().sort()


def test_small_steps_are_computed():
    """A fake operator costs more than a small real one."""
    small, large = torch.ones(100), torch.ones(10_000_000)
    assert not is_worth_it(operations_of(lambda: small + 1))
    assert is_worth_it(operations_of(lambda: large + 1))
    assert not is_worth_it([])


QUICK = ("mlp", "hand_resnet", "torch_encoder", "soft_experts")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else [pytest.mark.slow]) for n in ZOO])
def test_the_zoo_is_counted_alike(name, monkeypatch):
    """Every step of a model takes what it takes with all its values."""
    if ZOO[name].library != "torch":
        pytest.importorskip(ZOO[name].library.replace("-", "_"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    torch.manual_seed(0)
    model, args, kwargs = ZOO[name].make()
    train = ZOO[name].trains
    captures, _ = captures_of(model, args, kwargs, [1], devices=2, train=train)
    monkeypatch.setattr(records, "is_worth_it", lambda _: False)
    expected = records.count_steps(captures[1], train=train)
    monkeypatch.setattr(records, "is_worth_it", lambda _: True)
    assert records.count_steps(captures[1], train=train) == expected
