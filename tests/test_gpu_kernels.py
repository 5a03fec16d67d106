"""What attention and dropout keep where GPUs are to run them: no probabilities, and a byte for each element."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

import shardwright as sw
from shardwright.profiler.capture import captures_of
from shardwright.profiler.devices import find_devices
from shardwright.profiler.measuring.gpu_kernels import kernels_as_on, without_dropout
from shardwright.profiler.measuring.signature import step_key
from shardwright.profiler.profile import Device

GPUS = [Device(name=f"cuda:{i}", kind="cuda", description="", memory_bytes=1) for i in range(2)]
CLUSTER = """
[[devices]]
names = ["cuda:0", "cuda:1"]
model = "H100 SXM"
[links]
within = "NVLink 4"
"""


class Attention(nn.Module):
    """Attention by the function, as transformers calls it."""

    def __init__(self, dropout):
        super().__init__()
        self.project, self.dropout = nn.Linear(16, 48), dropout

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in self.project(x).chunk(3, -1))
        return F.scaled_dot_product_attention(q, k, v, None, self.dropout if self.training else 0.0)


def layer(dropout):
    made = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True)
    made.self_attn.dropout = dropout
    return nn.Sequential(made, nn.Linear(16, 16))


@pytest.fixture
def kept(tmp_path):
    """What all steps keep for the backward, counted for declared GPUs."""
    path = tmp_path / "cluster.toml"
    path.write_text(CLUSTER)

    def of(model):
        torch.manual_seed(0)
        profile = sw.profile(model, (torch.randn(2, 32, 16),), cluster=path, microbatches=[1])
        return {node.name: node.saved_bytes[1] for node in profile.nodes if node.saved_bytes}

    return of


@pytest.mark.parametrize(
    "make", [lambda p: nn.Sequential(Attention(p), nn.Flatten()), layer], ids=["function", "layer"]
)
def test_gpus_keep_no_probabilities(kept, make):
    """With dropout attention keeps what it keeps without."""
    assert kept(make(0.1)) == kept(make(0.0))


def test_a_cpu_keeps_them():
    """There the counts are those of what it runs, and the values those that it gives."""
    q = torch.randn(1, 2, 32, 8, requires_grad=True)

    def saved(devices):
        sizes = []
        with kernels_as_on(devices), torch.autograd.graph.saved_tensors_hooks(sizes.append, lambda t: t):
            F.scaled_dot_product_attention(q, q, q, dropout_p=0.5)
            F.scaled_dot_product_attention(q, q, q, None, 0.5)
        return sum(t.numel() for t in sizes)

    assert saved(GPUS) < saved(find_devices(["cpu:0"])) == saved([*GPUS, *find_devices(["cpu:0"])])


class ByModule(Attention):
    """Its share is a module's."""

    def __init__(self, dropout):
        super().__init__(0.0)
        self.attn_drop = nn.Dropout(dropout)

    def forward(self, x):
        self.dropout = self.attn_drop.p
        return super().forward(x)


@pytest.mark.parametrize("make", [Attention, ByModule])
def test_shares_that_are_dropped_tell_units_apart(make):
    """Two layers that the capture sees alike are not timed as one."""
    keys = set()
    for dropout in (0.0, 0.1):
        model = nn.Sequential(make(dropout), nn.Flatten())
        with kernels_as_on(GPUS):
            captures, _ = captures_of(model, (torch.randn(2, 32, 16),), {}, [1], devices=2, units=["0"], train=True)
        step = next(step for step in captures[1].steps if step.unit == "0")
        keys.add(step_key(step, train=True, optimizer="adam", accumulate=False))
    assert len(keys) == 2


def test_dropout_is_taken_out_of_every_form_of_the_call():
    """By position or by name; other functions keep their arguments."""
    q = torch.randn(1, 1, 4, 2)
    attend = F.scaled_dot_product_attention
    assert without_dropout(attend, (q, q, q, None, 0.5, True), {})[0][4:] == (0.0, True)
    assert without_dropout(attend, (q, q, q), {"dropout_p": 0.5})[1] == {"dropout_p": 0.0}
    assert without_dropout(F.dropout, (q, 0.5), {}) == ((q, 0.5), {})


CALLS = {
    "module": nn.Dropout(0.25),
    "function": lambda x: F.dropout(x, 0.25),
    "by name": lambda x: F.dropout(input=x, p=0.25, training=True),
    "operator": lambda x: torch.dropout(x, 0.25, train=True),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_dropout_keeps_a_byte_for_each_element(call):
    """What stays is scaled up, as without; the gradient is that of the elements that stayed."""
    x = torch.rand(64, 33, requires_grad=True)
    kept = []
    with kernels_as_on(GPUS), torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        found = call(x + 1.0)
    assert sum(t.nbytes for t in kept) == x.numel()
    stays = found != 0
    assert 0.6 < stays.float().mean() < 0.9
    torch.testing.assert_close(found, torch.where(stays, (x + 1.0) / 0.75, 0.0))
    found.sum().backward()
    torch.testing.assert_close(x.grad, stays / 0.75)


@pytest.mark.parametrize("call", [lambda x: F.dropout(x, 0.5, False), lambda x: F.dropout(x, 0.0), nn.Dropout(1.0)])
def test_dropout_that_drops_nothing_or_all_is_as_it_was(call):
    """Not in training, none, and all."""
    x = torch.rand(8)
    with kernels_as_on(GPUS):
        found = call(x)
    assert torch.equal(found, call(x))


def test_dropout_in_place_stays_in_place():
    """The tensor itself is changed."""
    x = torch.ones(100)
    with kernels_as_on(GPUS):
        assert F.dropout(x, 0.5, inplace=True) is x
    assert set(x.tolist()) == {0.0, 2.0}


class Grouped(nn.Module):
    """Attention whose keys and values have fewer heads than its queries, as Llama's."""

    def __init__(self, dtype, key_heads):
        super().__init__()
        self.project, self.key_heads = nn.Linear(16, 16 + 2 * 4 * key_heads, dtype=dtype), key_heads

    def forward(self, x):
        q, k, v = self.project(x.to(self.project.weight.dtype)).split([16, 4 * self.key_heads, 4 * self.key_heads], -1)
        q, k, v = (t.unflatten(-1, (-1, 4)).transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


@pytest.mark.parametrize(
    ("dtype", "key_heads", "step_by_step"),
    [
        *((torch.float32, 2, True), (torch.float32, 4, False), (torch.bfloat16, 2, False)),
        *((torch.float64, 2, True), (torch.float64, 4, True)),
    ],
    ids=["single precision", "equal heads", "half precision", "double precision", "equal heads, double precision"],
)
def test_attention_without_a_kernel_keeps_its_probabilities(kept, dtype, key_heads, step_by_step):
    """Unequal heads in single precision, and any in double: 2 samples, 4 heads, 32 x 32; else nothing is quadratic."""
    probabilities = 2 * 4 * 32 * 32 * dtype.itemsize
    found = kept(nn.Sequential(Grouped(dtype, key_heads), nn.Flatten()))
    assert (sum(found.values()) >= probabilities) == step_by_step


def test_on_a_cpu_unequal_heads_are_as_they_are():
    """Nothing changes unless all devices are GPUs; and the result is the same where it does."""
    torch.manual_seed(0)
    model, x = Grouped(torch.float32, 2), torch.randn(2, 32, 16)
    expected = model(x)
    with kernels_as_on(GPUS):
        assert torch.allclose(model(x), expected, atol=1e-6)
