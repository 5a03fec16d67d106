"""Simulated devices: real numbers, and CUDA's refusal to mix."""

import copy

import pytest
import torch
from torch import nn

from shardwright.sharder.runtime.placing.sim import (
    DeviceMismatchError,
    Simulated,
    crossings_watched,
    on_host,
    parameters_may_move,
    sim_device,
)


def network():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten(), nn.Dropout(0.0), nn.Linear(144, 5)
    )


def moved(module, device):
    with parameters_may_move():
        return copy.deepcopy(module).to(device)


def test_numbers_are_the_cpus():
    """A network on a simulated device computes what it computes on the CPU."""
    model, x = network(), torch.randn(2, 3, 8, 8)
    found = moved(model, sim_device(0))(x.to("sim:0"))
    assert found.device == sim_device(0)
    assert torch.equal(on_host(found), model(x))


def test_training_works_on_the_first_device():
    """Gradients, and Adam's steps from them, equal the CPU's."""
    torch.manual_seed(0)  # Adam turns the rounding of a gradient that should be zero into whole steps
    model, x = network(), torch.randn(2, 3, 8, 8)
    there = moved(model, sim_device(0))
    for network_, inputs in ((model, x), (there, x.to("sim:0"))):
        optimizer = torch.optim.Adam(network_.parameters())
        for _ in range(3):
            optimizer.zero_grad()
            network_(inputs).square().mean().backward()
            optimizer.step()
    for one, other in zip(model.parameters(), there.parameters(), strict=True):
        assert torch.allclose(one, on_host(other), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "operation",
    [
        lambda a, b: a + b,
        lambda a, b: torch.cat([a, b]),
        lambda a, b: a @ b.T,
        lambda a, b: a.add_(b),
        lambda a, b: torch.where(a > 0, a, b),
        nn.functional.linear,
    ],
)
@pytest.mark.parametrize(("one", "other"), [("sim:0", "sim:1"), ("cpu", "sim:0"), ("sim:1", "cpu")])
def test_devices_do_not_mix(operation, one, other):
    """An operation on two devices fails with CUDA's words and names both."""
    a, b = torch.ones(2, 2).to(one), torch.ones(2, 2).to(other)
    with pytest.raises(DeviceMismatchError, match="Expected all tensors to be on the same device") as caught:
        operation(a, b)
    assert set(caught.value.devices) == {one, other}


def test_cpu_scalars_go_with_any_device():
    """As on CUDA, a CPU tensor without dimensions may meet a device's."""
    assert on_host(torch.ones(2).to("sim:1") * torch.tensor(3.0)).tolist() == [3.0, 3.0]


def test_factories_views_and_writes():
    """Factories make tensors there; views share memory; writes are seen through both."""
    base = torch.zeros(2, 3, device=sim_device(1))
    view = base.view(6)
    view[4] = 7.0
    base.mul_(2)
    assert base.device == view.device == sim_device(1)
    assert on_host(view).tolist() == [0, 0, 0, 0, 14, 0]
    assert view[4].item() == 14.0


def test_crossings_are_watched():
    """Copies between simulated devices are seen; copies from and to the CPU are not."""
    seen = []
    with crossings_watched(lambda tensor: seen.append(tuple(tensor.shape))):
        x = torch.ones(2, 3).to("sim:0")
        x.to("sim:1").to("cpu")
        x.to("sim:0")
    assert seen == [(2, 3)]


@pytest.mark.parametrize(
    "function",
    [
        lambda z: z * z.conj(),
        lambda z: z.conj() * 1,
        lambda z: z.conj().imag * 1,
        lambda z: torch.view_as_real(z * 2 - z.conj()),
        lambda z: z.mH @ z,
    ],
)
def test_conjugates_are_the_cpus(function):
    """What PyTorch conjugates or negates only when it is read is conjugated and negated there too."""
    z = torch.fft.fft(torch.randn(3, 4))
    assert torch.allclose(on_host(function(z.to(sim_device(0)))), function(z))


@pytest.mark.parametrize("make", [torch.tensor, torch.as_tensor, torch.asarray])
def test_tensors_are_made_of_numbers_on_a_device(make):
    """Tensors without dimensions in a list are numbers, as on CUDA."""
    numbers = torch.tensor([2, 5]).to(sim_device(0))
    with Simulated():
        made = make([numbers.max(), numbers.min() + 1, 7], device=sim_device(1))
    assert made.device == sim_device(1)
    assert on_host(made).tolist() == [5, 3, 7]


def test_sizes_of_packed_sequences_stay_on_the_cpu():
    """A recurrent layer takes them so, and the padded result is the CPU's."""
    layer, x, lengths = nn.GRU(3, 4), torch.randn(5, 2, 3), torch.tensor([5, 3])
    there = moved(layer, sim_device(0))

    def run(layer, x):
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths)
        assert packed.batch_sizes.device.type == "cpu"
        return nn.utils.rnn.pad_packed_sequence(layer(packed)[0])

    found, expected = run(there, x.to(sim_device(0))), run(layer, x)
    assert torch.allclose(on_host(found[0]), expected[0], atol=1e-6)
    assert torch.equal(on_host(found[1]), expected[1])


def test_lists_may_lie_on_several_devices():
    """Functions of lists need one device at each position only."""

    def lists():
        return [[torch.full((2,), float(k)).to(sim_device(k)) for k in range(2)] for _ in range(2)]

    one, other = lists()
    assert [t.device for t in torch._foreach_mul(one, other)] == [sim_device(0), sim_device(1)]
    torch._foreach_add_(one, other)
    assert [on_host(t).tolist() for t in one] == [[0.0, 0.0], [2.0, 2.0]]
    with pytest.raises(DeviceMismatchError):
        torch._foreach_add_(one, other[::-1])


def test_attention_rounds_alike_on_every_device():
    """Attention on a simulated device has the very numbers of the CPU's, and the CPU's own kernel is given back."""
    flash = torch.backends.cuda.flash_sdp_enabled()
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 4, 64, 32).unbind()
    with Simulated():
        found = nn.functional.scaled_dot_product_attention(*(t.to("sim:1") for t in (query, key, value)))
        expected = nn.functional.scaled_dot_product_attention(query, key, value)
    assert torch.equal(on_host(found), expected)
    assert torch.backends.cuda.flash_sdp_enabled() == flash
