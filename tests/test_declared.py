"""Declared devices: what is here, what stands for measurements, and a whole profile and plan without hardware."""

import pytest
import torch
from torch import nn

import shardwright as sw
from shardwright.profiler.collect import captures_of
from shardwright.profiler.estimates import declared
from shardwright.profiler.estimates.catalogue import catalogue
from shardwright.profiler.estimates.declared import Site, find_site
from shardwright.profiler.estimates.estimate import ASSUMED
from shardwright.profiler.estimates.workload import Mode, Workloads
from shardwright.profiler.profile import Device, Link, Measurement
from shardwright.profiler.recording.shapes import shapes_only

FOUR = """
[[devices]]
names = ["cuda:0", "cuda:1", "cuda:2"]
model = "H100 SXM"

[[devices]]
name = "cuda:3"
model = "L4"
node = "other"

[links]
within = "NVLink 4"
between = "100 Gb Ethernet"
"""


@pytest.fixture
def cluster(tmp_path):
    """Writes a cluster file."""

    def written(text=FOUR):
        path = tmp_path / "cluster.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return written


def net(width=64, layers=4):
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Sequential(nn.Linear(width, width), nn.GELU()) for _ in range(layers)])


@pytest.fixture
def with_gpus(monkeypatch):
    """Pretends that this machine has GPUs of these names."""

    def pretend(*names):
        def find(wanted):
            return tuple(
                Device(name=name, kind="cuda", description=names[int(name[-1])], memory_bytes=10**10) for name in wanted
            )

        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(names))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: names[index])
        monkeypatch.setattr(declared, "find_devices", find)

    return pretend


# What is here


def test_a_gpu_of_the_declared_model_is_here(cluster, with_gpus):
    """It is measured; one of another model, one that does not exist and one of another node are not."""
    with_gpus("NVIDIA H100 80GB HBM3", "NVIDIA H200")
    site = find_site(cluster(), None)
    assert [device.name for device in site.devices] == ["cuda:0", "cuda:1", "cuda:2", "cuda:3"]
    assert [device.name for device in site.found] == ["cuda:0"]
    assert site.found[0].model == "H100 SXM"
    assert site.devices[3].node == "other"


def test_a_device_without_figures_has_to_be_here(cluster):
    """CPU workers are found; what is missing is named with the file and the remedy."""
    (worker,) = find_site(cluster("[[devices]]\nname = 'cpu:0'"), None).found
    assert worker.cores
    with pytest.raises(sw.ShardwrightError, match=r"cluster.toml: there is no cuda:63.* give the devices that are not"):
        find_site(cluster("[[devices]]\nname = 'cuda:63'"), None)


def test_rates_of_its_own_make_another_device(cluster, with_gpus):
    """A device of a model with other rates is not the one that is here, and does not take its times as they are."""
    with_gpus("NVIDIA H100 80GB HBM3", "NVIDIA H100 80GB HBM3")
    halved = (
        '\n[[devices]]\nname = "cuda:1"\nmodel = "H100 SXM"\nmemory_bytes_per_s = 1e12\npeak_flops = { float32 = 1e12 }'
    )
    text = FOUR.replace('names = ["cuda:0", "cuda:1", "cuda:2"]', 'name = "cuda:0"') + halved
    site = find_site(cluster(text), None)
    assert [device.name for device in site.found] == ["cuda:0"]
    captures = captured(net(), torch.randn(8, 64))
    timed = made_up(captures, "cuda:0", 1e-3)
    made = site.declared_times(captures, timed, train=True, optimizer="sgd", tell=quiet)
    assert {estimate.device for estimate in made.estimates} == {"cuda:1", "cuda:3"}


def test_less_memory_can_be_declared(cluster):
    """A device that is here has no more memory than its file says."""
    (worker,) = find_site(cluster("[[devices]]\nname = 'cpu:0'\nmemory = '64MiB'"), None).devices
    assert worker.memory_bytes == 64 * 2**20
    (worker,) = find_site(cluster("[[devices]]\nname = 'cpu:0'"), None).devices
    assert 64 * 2**20 < worker.memory_bytes < 2**60


def test_a_cluster_and_devices_are_not_both_given(cluster):
    """The file says which devices there are."""
    with pytest.raises(sw.ShardwrightError, match="give it without --devices"):
        sw.profile(net(), (torch.randn(8, 64),), cluster=cluster(), devices=["cpu:0"])


def test_measured_links_go_before_declared_ones(cluster):
    """A pair that was timed keeps its figures; the others come from the file."""
    site = find_site(cluster(), None)
    timed = Link(source="cuda:0", target="cuda:1", latency_s=1e-3, bandwidth_bytes_per_s=1e6)
    links = {(link.source, link.target): link for link in site.links([timed])}
    assert links["cuda:0", "cuda:1"] == timed
    assert links["cuda:1", "cuda:0"].origin == "estimated"
    assert len(links) == 12


# What stands for measurements


def captured(model, x):
    captures, _ = captures_of(model, (x,), {}, [1, 2], devices=2, train=True)
    return captures


def made_up(captures, device, forward_s):
    """Measurements of ``device`` as if it had been timed."""
    return [
        Measurement(
            node=step.name,
            device=device,
            microbatches=count,
            repeats=3,
            forward_s=forward_s * (index + 1) / count,
            forward_spread_s=0.0,
            backward_s=2 * forward_s * (index + 1) / count,
            backward_spread_s=0.0,
            update_s=forward_s if step.kind == "unit" else 0.0,
        )
        for count, capture in captures.items()
        for index, step in enumerate(step for step in capture.steps if step.call is not None)
    ]


def quiet(*_):
    """No progress."""


def test_a_device_of_a_measured_model_takes_its_times(cluster, with_gpus):
    """They are scaled by one; another model's are scaled by what the roofline gives for both."""
    with_gpus("NVIDIA H100 80GB HBM3")
    site = find_site(cluster(), None)
    captures = captured(net(), torch.randn(8, 64))
    timed = made_up(captures, "cuda:0", 1e-3)
    made = site.declared_times(captures, timed, train=True, optimizer="adam", tell=quiet)
    own = {(m.node, m.microbatches): m for m in timed}
    rows = {(m.device, m.node, m.microbatches): m for m in made.measurements}
    assert {m.source for m in made.measurements} == {"scaled"}
    assert len(rows) == 3 * len(timed)
    for (device, *key), row in rows.items():
        if device != "cuda:3":
            assert row == own[tuple(key)].model_copy(update={"device": device, "source": "scaled"})
        else:
            assert row.forward_s >= own[tuple(key)].forward_s * 0.999
    assert [(estimate.device, estimate.fitted_to) for estimate in made.estimates] == [("cuda:3", "cuda:0")]


def test_a_bandwidth_bound_step_is_scaled_by_the_bandwidths(cluster, with_gpus):
    """What an H100 takes for large element-wise work, an L4 takes longer by the ratio of their memories' bandwidths."""
    with_gpus("NVIDIA H100 80GB HBM3")
    site = find_site(cluster(), None)
    with torch.device("meta"):
        model = nn.Sequential(nn.Tanh(), nn.Linear(4, 8), nn.Sequential(nn.Tanh(), nn.Softmax(1)), nn.Linear(8, 4))
        x = torch.empty(2**26, 4)
    with shapes_only(model, (x,), {}) as inputs:
        captures, _ = captures_of(model, *inputs, [1], devices=2, depth=1, train=False)
    bandwidth = {name: catalogue().device(name).memory_bytes_per_s for name in ("H100 SXM", "L4")}
    timed = [
        Measurement(
            node=step.name,
            device="cuda:0",
            microbatches=1,
            repeats=3,
            forward_s=sum(o.bytes for o in Workloads().of(step.call, Mode(False)).forward)
            / bandwidth["H100 SXM"]
            / 0.8,
            forward_spread_s=0.0,
            backward_s=0.0,
            backward_spread_s=0.0,
            update_s=0.0,
        )
        for step in captures[1].steps
        if step.kind == "unit"
    ]
    made = site.declared_times(captures, timed, train=False, optimizer="none", tell=quiet)
    slower = {m.node: m.forward_s for m in made.measurements if m.device == "cuda:3"}
    for row in timed:
        assert slower[row.node] == pytest.approx(row.forward_s * bandwidth["H100 SXM"] / bandwidth["L4"], rel=0.02)
    assert made.estimates[0].memory_efficiency == pytest.approx(0.8, rel=0.02)


def test_a_cpu_worker_teaches_the_time_of_an_operator_only(cluster):
    """Its arithmetic and its memory say nothing of a GPU's; those are assumed, and the profile says so."""
    text = FOUR + "\n[[devices]]\nname = 'cpu:0'"
    site = find_site(cluster(text), None)
    captures = captured(net(), torch.randn(8, 64))
    made = site.declared_times(captures, made_up(captures, "cpu:0", 1e-2), train=True, optimizer="sgd", tell=quiet)
    assert {m.source for m in made.measurements} == {"estimated"}
    for estimate in made.estimates:
        assert (estimate.compute_efficiency, estimate.memory_efficiency) == (ASSUMED.compute, ASSUMED.memory)
        assert estimate.fitted_to == "cpu:0"
        assert estimate.operation_s > 0


def test_a_dtype_without_a_rate_is_refused(cluster):
    """File, device and remedy are named."""
    with pytest.raises(sw.ShardwrightError, match=r"cluster.toml: cuda:3: the model computes in float64.*has no rate"):
        sw.profile(net().double(), (torch.randn(8, 64).double(),), cluster=cluster())


# A whole profile


def test_a_profile_and_plan_without_hardware(cluster):
    """Every number says that it is estimated, the plan uses the devices, and the file holds it all."""
    model, x = net(256, 8), torch.randn(64, 256)
    profile = sw.profile(model, (x,), cluster=cluster(), microbatches=[1, 2])
    assert [device.name for device in profile.devices] == ["cuda:0", "cuda:1", "cuda:2", "cuda:3"]
    assert all(device.declared for device in profile.devices)
    assert {m.source for m in profile.measurements} == {link.origin for link in profile.links} == {"estimated"}
    assert {estimate.device for estimate in profile.estimates} == {device.name for device in profile.devices}
    assert {(m.device, m.microbatches) for m in profile.measurements} == {
        (device.name, count) for device in profile.devices for count in (1, 2)
    }
    assert profile.step_s("cuda:3") > profile.step_s("cuda:0")
    assert sw.Profile.parse(profile.model_dump_json(), source="test") == profile
    plan = sw.plan(profile, memory=dict.fromkeys(["cuda:0", "cuda:1", "cuda:2", "cuda:3"], "3MiB"))
    assert len(plan.devices) > 1
    assert plan.declared_devices == ("cuda:0", "cuda:1", "cuda:2", "cuda:3")
    assert sw.verify(model, plan, (x,))
    with pytest.raises(sw.ShardwrightError, match=r"of a cluster file, which are not here: there is no cuda:0.*verify"):
        sw.run(model, plan, (x,))


def test_a_model_without_values_is_profiled(cluster):
    """It has the same profile as one with values, and is left as it was."""
    x = torch.randn(64, 256)
    with sw.empty_weights():
        empty = net(256, 8)
    kept = [*empty.parameters()]
    profile = sw.profile(empty, (x,), cluster=cluster(), microbatches=[1, 4])
    assert all(a is b for a, b in zip(empty.parameters(), kept, strict=True))
    assert all(p.is_meta for p in empty.parameters())
    assert not profile.obstacles
    full = sw.profile(net(256, 8), (x,), cluster=cluster(), microbatches=[1, 4])
    assert profile == full
    plan = sw.plan(profile)
    for use in (sw.verify, sw.run):
        with pytest.raises(sw.ShardwrightError, match="parameters without values, so it cannot be run; build it with"):
            use(empty, plan, (x,))
    assert sw.verify(net(256, 8), plan, (x,))


class Tied(nn.Module):
    """Buffers, a tied weight, and a parameter that glue uses."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(16, 16), nn.Linear(16, 16)
        self.last.weight = self.first.weight
        self.blocks = nn.ModuleList([nn.BatchNorm1d(16), nn.Dropout(0.1), nn.Linear(16, 16)])
        self.scale = nn.Parameter(torch.ones(16))
        self.register_buffer("shift", torch.ones(16))

    def forward(self, x, *, mask):
        x = self.first(x) * self.scale + self.shift
        for block in self.blocks:
            x = block(x) * mask
        return {"out": self.last(x)}


@pytest.mark.parametrize("train", [True, False])
def test_a_model_without_values_keeps_its_ties_and_buffers(cluster, train):
    """Its profile is that of the model with values also where glue, buffers and shared weights are concerned."""
    with sw.empty_weights():
        empty = Tied()
    inputs = {"args": (torch.randn(8, 16),), "kwargs": {"mask": torch.rand(8, 16)}, "microbatches": [1, 2]}
    profile = sw.profile(empty, **inputs, cluster=cluster(), train=train)
    assert len(profile.ties) == 1
    assert profile == sw.profile(Tied(), **inputs, cluster=cluster(), train=train)
    assert empty.shift.tolist() == [1] * 16


@pytest.mark.parametrize("train", [True, False])
def test_a_model_without_values_is_measured_with_values_made_for_it(train):
    """Each unit gets them where it is timed; sizes and steps are those of the model with its own."""
    inputs = {"args": (torch.randn(8, 16),), "kwargs": {"mask": torch.rand(8, 16)}, "microbatches": [1, 2]}
    inputs |= {"devices": ["cpu:0"], "rounds": 1, "train": train}
    with sw.empty_weights():
        empty = Tied()
    found, expected = sw.profile(empty, **inputs), sw.profile(Tied(), **inputs)
    assert (found.nodes, found.tensors, found.ties) == (expected.nodes, expected.tensors, expected.ties)
    assert [(m.node, m.microbatches, m.source) for m in found.measurements] == [
        (m.node, m.microbatches, "measured") for m in expected.measurements
    ]
    assert all(m.forward_s > 0 for m in found.measurements if m.node in ("first", "second"))
    assert all(p.is_meta for p in empty.parameters())


def test_measured_and_estimated_devices_stand_in_one_profile(cluster):
    """A CPU worker is measured beside declared GPUs, each number marked."""
    text = FOUR.split("[[devices]]")[1]
    text = f"[[devices]]{text}\n[[devices]]\nname = 'cpu:0'\n[links]\nwithin = 'PCIe 5'\nbetween = 'PCIe 5'"
    profile = sw.profile(net(), (torch.randn(8, 64),), cluster=cluster(text), microbatches=[1], rounds=1)
    sources = {(m.device, m.source) for m in profile.measurements}
    assert sources == {("cpu:0", "measured"), *((f"cuda:{i}", "estimated") for i in range(3))}
    assert len(profile.links) == 12
    assert not profile.devices[3].declared


def test_a_site_without_a_cluster_has_nothing_to_estimate():
    """Then a profile is what it was."""
    device = Device(name="cpu:0", kind="cpu", description="", memory_bytes=1)
    made = Site((device,)).declared_times({}, [], train=True, optimizer="adam", tell=quiet)
    assert made.measurements == made.estimates == ()


def test_the_command_line_plans_for_a_cluster(cluster, run_cli, tmp_path):
    """`profile --cluster` writes a profile that `shard` plans and `report` shows; `--run` refuses in one line."""
    (tmp_path / "nets.py").write_text(
        "from torch import nn\n"
        "def net(): return nn.Sequential(*[nn.Sequential(nn.Linear(64, 64), nn.GELU()) for _ in range(4)])\n"
    )
    target, files = "nets.py:net", ("--profile", "net.profile.json")
    profiled = run_cli("profile", target, "--input", "8x64", "--cluster", str(cluster()), cwd=tmp_path, in_process=True)
    assert profiled.returncode == 0, profiled.stderr
    assert "all assumed" in profiled.stdout
    options = ("--memory", "cuda:0=60KiB", "--devices", "cuda:0,cuda:1")
    sharded = run_cli("shard", target, *files, *options, cwd=tmp_path, in_process=True)
    assert sharded.returncode == 0, sharded.stderr
    assert "estimates" in sharded.stdout
    refused = run_cli("profile", target, "--input", "8x64", "--cluster", "no.toml", cwd=tmp_path, in_process=True)
    assert refused.returncode == 2
    assert "cannot read no.toml" in refused.stderr
