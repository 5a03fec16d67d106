"""Offloading: weights that fit nowhere stay on the host, as little of them as can be, and are priced."""

import itertools

import pytest
import torch
from torch import nn

import shardwright as sw
from shardwright.sharder.planning.formulation.blocks import problem_from_graph
from shardwright.sharder.planning.partition import partition
from shardwright.sharder.planning.verdict.offload import Rates, offload, with_offloaded
from shardwright.sharder.runtime.placing.sim import sim_device


def with_rates(profile, *, fetch=None, disk=None, host=0):
    """The profile of devices to which weights come so fast."""
    devices = tuple(device.model_copy(update={"fetch_bytes_per_s": fetch}) for device in profile.devices)
    return profile.model_copy(update={"devices": devices, "disk_bytes_per_s": disk, "host_bytes": host})


def tight(chain_profile, **rates):
    """Eight units of 1,000 bytes on two devices that hold three each."""
    speed = {"cuda:0": 1.0, "cuda:1": 1.0}
    profile = chain_profile(8, train=False, speed=speed, memory_bytes=3_400, param_bytes=1_000, tensor_bytes=8)
    return with_rates(profile, **rates)


def test_as_little_as_possible_is_offloaded(chain_profile):
    """A device holds three units, or two beside any number that come in turn; each call pays for what comes."""
    plan = sw.plan(tight(chain_profile, fetch=1e4, host=10**6), microbatches=1)
    resident = [unit for unit in plan.placement() if unit not in plan.offloaded]
    assert len(plan.offloaded) == 3
    assert len(resident) == 5
    assert set(plan.offloaded.values()) == {"cpu"}
    assert sum(stage.forward_s for stage in plan.stages) == pytest.approx(8 * 1.0 + 3 * 1_000 / 1e4)
    assert all(stage.memory_bytes <= 3_400 for stage in plan.stages)


def test_no_smaller_set_would_fit(chain_profile):
    """Every set of fewer units leaves too much, tried one by one."""
    profile = tight(chain_profile, fetch=1e4, host=10**6)
    problem = problem_from_graph(profile.graph(1), schedule="gpipe")
    rates = Rates((1e4, 1e4), None, 10**6)
    found = offload(problem, rates, time_limit_s=5)
    fewer = itertools.combinations(range(len(problem.blocks)), len(found.tiers) - 1)
    for chosen in fewer:
        changed = with_offloaded(problem, chosen, rates)
        assert changed is None or partition(changed[0], time_limit_s=5) is None


def test_what_the_host_cannot_hold_stays_on_disk(chain_profile):
    """The host's memory is filled first; the disk is read at its own rate."""
    plan = sw.plan(tight(chain_profile, fetch=1e4, disk=1e3, host=2_500), microbatches=1)
    assert sorted(plan.offloaded.values()) == ["cpu", "cpu", "disk"]
    assert sum(stage.forward_s for stage in plan.stages) == pytest.approx(8 + 2 * 0.1 + 1.0)


def test_offloading_is_a_last_resort(chain_profile):
    """Nothing is offloaded where a split fits, in training, when it is not wanted, or when nothing can come."""
    roomy = with_rates(chain_profile(8, train=False), fetch=1e4, host=10**6)
    assert not sw.plan(roomy, microbatches=1).offloaded
    for profile, options in (
        (tight(chain_profile, fetch=1e4, host=10**6), {"offload": False}),
        (tight(chain_profile), {}),
    ):
        with pytest.raises(sw.ShardwrightError, match=r"needs|fits"):
            sw.plan(profile, microbatches=1, **options)


def offloaded_plan(captured_profile, model, x, **rates):
    profile = captured_profile(model, (x,), devices=["cuda:0", "cuda:1"], microbatches=(1,), train=False)
    return sw.plan(with_rates(profile, **rates), microbatches=1, memory={"cuda:0": "700B", "cuda:1": "700B"})


def test_offloaded_weights_are_brought_in_for_their_call(captured_profile):
    """They lie on the CPU between calls, and the placed model computes what the model computes."""
    model, x = nn.Sequential(*[nn.Linear(8, 8) for _ in range(6)]), torch.randn(2, 8)
    expected = model(x).detach()
    plan = offloaded_plan(captured_profile, model, x, fetch=1e9, host=10**6)
    assert sw.verify(model, plan, (x,)).ok
    with pytest.raises(sw.ShardwrightError, match="brought in for each call, which the pipeline cannot do"):
        sw.run(model, plan, (x,))
    sw.place(model, plan, devices={device: sim_device(i) for i, device in enumerate(plan.devices)})
    homes = {unit: str(model.get_submodule(unit).weight.device) for unit in plan.placement()}
    assert {unit for unit, home in homes.items() if home == "cpu"} == set(plan.offloaded)
    with torch.no_grad():
        assert torch.equal(model(x), expected)
    assert {unit: str(model.get_submodule(unit).weight.device) for unit in homes} == homes


def test_weights_on_disk_stay_in_the_checkpoint(captured_profile, tmp_path):
    """A unit left on disk reads the mapped file when it is called; without a checkpoint the remedy is named."""
    save_file = pytest.importorskip("safetensors.torch").save_file
    model, x = nn.Sequential(*[nn.Linear(8, 8) for _ in range(6)]), torch.randn(2, 8)
    expected = model(x).detach()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    plan = offloaded_plan(captured_profile, model, x, fetch=1e9, disk=1e8)
    assert set(plan.offloaded.values()) == {"disk"}
    simulated = {device: sim_device(i) for i, device in enumerate(plan.devices)}
    with sw.empty_weights():
        empty = nn.Sequential(*[nn.Linear(8, 8) for _ in range(6)])
    with pytest.raises(sw.ShardwrightError, match=r"stay on disk: say where they are, place\(model, plan, checkpoint="):
        sw.place(empty, plan, devices=simulated)
    sw.place(empty, plan, devices=simulated, checkpoint=tmp_path)
    with torch.no_grad():
        assert torch.equal(empty(x), expected)
