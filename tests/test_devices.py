"""Devices: names, cores and the mistakes in naming them."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwright.errors import ShardwrightError
from shardwright.profiler import devices as devices_module
from shardwright.profiler.devices import find_devices, parse_devices, share_cores


@pytest.fixture(autouse=True)
def six_cores_no_gpu(monkeypatch):
    monkeypatch.setattr(devices_module, "available_cores", lambda: [0, 1, 2, 5, 6, 7])
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_two_cpu_workers_without_a_gpu():
    """Where there is no GPU the default is two CPU workers that share the cores out evenly."""
    found = find_devices()
    assert [(d.name, d.cores) for d in found] == [("cpu:0", (0, 1, 2)), ("cpu:1", (5, 6, 7))]
    assert all("3 cores" in d.description for d in found)


def test_memory_is_shared_out():
    """The workers' memory together is less than the host's."""
    one, many = find_devices(["cpu:0"]), find_devices([f"cpu:{i}" for i in range(3)])
    assert sum(d.memory_bytes for d in many) <= one[0].memory_bytes


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["gpu:0"], "'gpu:0' is not a device: write cuda:0,cuda:1 or cpu:0"),
        (["cpu"], "'cpu' is not a device"),
        (["cpu:0", "cpu:0"], "cpu:0 is named twice"),
        (["cuda:0"], "there is no cuda:0: this machine has 0 CUDA devices"),
        ([f"cpu:{i}" for i in range(7)], "7 CPU workers need a core each; this process may use 6"),
    ],
)
def test_a_wrong_device_is_one_clear_line(names, message):
    """Each mistake names the device and the remedy."""
    with pytest.raises(ShardwrightError, match=message):
        find_devices(names)


def test_hidden_gpus_are_told(monkeypatch):
    """A launcher may show each process a GPU of its own, which all call cuda:0."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    with pytest.raises(ShardwrightError, match=r"this process sees 0 CUDA devices \(CUDA_VISIBLE_DEVICES=3\)"):
        find_devices(["cuda:1"])


def test_kinds():
    """A name's kind is what stands before the colon."""
    assert parse_devices(["cpu:0", "cuda:3"]) == ["cpu", "cuda"]


def test_the_budget_of_a_gpu_leaves_room_for_context_and_rounding(monkeypatch):
    """Of what is free, a plan may use what another process's context and the allocator's rounding leave."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda index: f"GPU {index}")
    for free, budget in ((10 * 2**30 + 512 * 2**20, int(0.97 * 10 * 2**30)), (2**20, 1)):
        monkeypatch.setattr("torch.cuda.mem_get_info", lambda _index, free=free: (free, 80 * 2**30))
        assert [d.memory_bytes for d in find_devices(["cuda:0"])] == [budget]


@given(count=st.integers(1, 9), gpus=st.integers(0, 3), cores=st.sets(st.integers(0, 63), min_size=1, max_size=16))
def test_cores_are_shared_equally(count, gpus, cores):
    """Each worker has as many; none is in two shares where there are enough; a core is left to each GPU then."""
    workers = [f"cpu:{i}" for i in range(count)]
    shares = share_cores([f"cuda:{i}" for i in range(gpus)] + workers, sorted(cores))
    left = min(gpus, max(0, len(cores) - count))
    assert [*shares] == workers
    assert {len(share) for share in shares.values()} == {max(1, (len(cores) - left) // count)}
    assert set().union(*shares.values()) <= {*sorted(cores)[left:]}
    if len(cores) >= count:
        assert all(not {*a} & {*b} for a, b in pairwise(shares.values()))


def test_a_run_shares_the_cores_as_its_profile_did(monkeypatch):
    """Two of four workers have the cores that they had beside the others, and beside a GPU."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda index: f"GPU {index}")
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda _index: (10 * 2**30, 80 * 2**30))
    every = ["cpu:0", "cuda:0", "cpu:1", "cpu:2"]
    all_ = {device.name: device for device in find_devices(every)}
    assert [all_[name].cores for name in every] == [(1,), (), (2,), (5,)]
    assert find_devices(["cpu:2", "cpu:0"], beside=every) == (all_["cpu:2"], all_["cpu:0"])
    with pytest.raises(ShardwrightError, match="7 CPU workers need a core each; this process may use 6"):
        find_devices(["cpu:0"], beside=[f"cpu:{i}" for i in range(7)])
