"""Simulated devices: real numbers, and CUDA's refusal to mix."""

import copy

import pytest
import torch
from torch import nn

from shardwright.sharder.runtime.sim import (
    DeviceMismatchError,
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
