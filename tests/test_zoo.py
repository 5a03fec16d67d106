"""The zoo: models that nobody adapted are captured, split over four devices, and trained over two."""

import itertools
import os
import warnings
from contextlib import suppress

import numpy as np
import pytest
import torch
from zoo import ZOO

import shardwright as sw
from shardwright.profiler.recording.equality import relative_difference, tolerance
from shardwright.profiler.recording.inputs import outputs_of
from shardwright.profiler.recording.unitgraph import mean_square_loss
from shardwright.sharder.runtime.placing.sim import SimTensor, Simulated, sim_device

ROWS = 2
PLANNING_S = 0.2
"""Placements have to be right here, not the best: graphs of many orders are searched for as long as one lets them."""
LIBRARIES = {"diffusers", "monai", "transformers", "x_transformers"}


@pytest.fixture(autouse=True)
def one_thread():
    """Small models are quicker on one thread, and the libraries' warnings are theirs."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch.set_num_threads(threads)


def make(entry):
    """The model and its inputs, from a fixed seed."""
    if entry.library.replace("-", "_") in LIBRARIES:
        pytest.importorskip(entry.library.replace("-", "_"))
    torch.manual_seed(0)
    np.random.seed(0)
    return entry.make()


def plain(tensor):
    return tensor.host if isinstance(tensor, SimTensor) else tensor


def names(*, train):
    """Of the models to test. Slow tests are of those that another stands for, and two of three of the libraries' models
    that train, of which the other test has one.
    """
    turns = itertools.cycle([True, False, None])
    for entry in ZOO.values():
        other = entry.trains and entry.library.replace("-", "_") in LIBRARIES and next(turns) != train
        if entry.trains or not train:
            yield pytest.param(entry.name, marks=[pytest.mark.slow] * (entry.slow or other))


@pytest.mark.parametrize("name", names(train=False))
def test_placed_over_four_devices(captured_profile, name):
    """The checked capture gives a plan over four devices that verifies: no device mismatch, equal outputs."""
    model, args, kwargs = make(ZOO[name])
    devices = [f"cuda:{i}" for i in range(4)]
    profile = captured_profile(model, args, kwargs, devices=devices, microbatches=(1,), train=False, refined=True)
    plan = sw.plan(profile, microbatches=1, time_limit_s=PLANNING_S)
    assert sw.verify(model, plan, args, kwargs).ok, str(sw.verify(model, plan, args, kwargs))


@pytest.mark.parametrize("name", names(train=True))
def test_trained_over_two_devices(captured_profile, name):
    """Placed on (cpu, sim:0), loss and gradients are the model's own."""
    model, args, kwargs = make(ZOO[name])
    profile = captured_profile(model, args, kwargs, devices=["cpu:0", "cuda:0"], microbatches=(1,))
    plan = in_two(profile)
    with Simulated():  # both, for attention is computed by one kernel in it
        expected = trained(model, args, kwargs)
        sw.place(model, plan, devices={d: sim_device(0) for d in plan.devices if d == "cuda:0"})
        found = trained(model, args, kwargs)
    assert found.keys() == expected.keys()
    largest = max(float(g.abs().max()) for g in expected.values())
    for key, tensor in expected.items():
        error = relative_difference(tensor, found[key])
        small = float((tensor - found[key]).abs().max()) < 1e-6 * largest
        assert small or error <= 10 * tolerance(tensor.dtype), f"{key} differs by {error:.2g}"


def in_two(profile):
    """A plan of two stages. Alone a micro-batch is trained as fast on one device, where the plan would have it all."""
    units = list(dict.fromkeys(node.unit for node in profile.nodes if node.kind == "unit"))
    first, second = (device.name for device in profile.devices)
    for last in reversed(units[1:]):
        with suppress(sw.ShardwrightError):  # tied to the first
            pins = {units[0]: first, last: second}
            plan = sw.plan(profile, microbatches=1, pins=pins, time_limit_s=PLANNING_S)
            assert set(plan.devices) == {first, second}
            return plan
    raise AssertionError("all units have to share a device")


def trained(model, args, kwargs):
    """The loss and all gradients of one step, from a fixed seed."""
    model.train()
    torch.manual_seed(1)
    np.random.seed(1)
    model.zero_grad()
    loss = mean_square_loss([t for t in outputs_of(model(*args, **kwargs)) if t.requires_grad])
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": plain(loss.detach()), **{name: plain(gradient).clone() for name, gradient in gradients.items()}}
