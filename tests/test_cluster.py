"""Declared clusters: what the catalogue holds, what a file may say, and what is wrong with one."""

from pathlib import Path

import pytest

from shardwright.errors import ShardwrightError
from shardwright.profiler.estimates.catalogue import catalogue, model_of
from shardwright.profiler.estimates.cluster import load_cluster

TWO_NODES = """
[[devices]]
names = ["cuda:0", "cuda:1"]
model = "h100-sxm"
node = "a"

[[devices]]
name = "cuda:2"
model = "RTX 4090"
node = "b"
memory = "20GiB"
peak_flops = { float16 = 150e12 }

[links]
within = "NVLink 4"
between = "100 Gb Ethernet"

[[links.pairs]]
devices = ["cuda:1", "cuda:2"]
latency_s = 5e-6
bandwidth_bytes_per_s = 1e9
"""
OWN = """
[[devices]]
name = "cuda:0"
memory = 1_000_000
memory_bytes_per_s = 1e12
peak_flops = { float32 = 1e13 }
"""


@pytest.fixture
def load(tmp_path):
    def written(text):
        path = tmp_path / "cluster.toml"
        path.write_text(text, encoding="utf-8")
        return load_cluster(path)

    return written


# The catalogue


def test_the_catalogue_has_the_common_devices_and_links():
    """Each card and link that is sold to many is there, with a source."""
    models = {
        device.model.split()[-1] if "RTX" in device.model else device.model.split()[0]: device
        for device in catalogue().devices
    }
    assert {"3090", "4090", "5090", "A100", "H100", "H200", "L4", "MI300X"} <= set(models)
    kinds = " ".join(link.kind for link in catalogue().links)
    assert all(name in kinds for name in ("NVLink", "PCIe 4", "PCIe 5", "100 Gb Ethernet", "400 Gb Ethernet"))
    assert all(name in kinds for name in ("100 Gb InfiniBand", "400 Gb InfiniBand"))
    assert all(len(entry.source) > 10 for entry in (*catalogue().devices, *catalogue().links))


@pytest.mark.parametrize("device", catalogue().devices, ids=lambda device: device.model)
def test_narrow_numbers_are_never_slower(device):
    """Dense rates: float16 is as fast as bfloat16, float8 twice as fast, and no rate is that of sparse matrices."""
    rates = device.peak_flops
    assert rates["float16"] == rates["bfloat16"] >= 1.99 * rates["tf32"] >= 1.99 * 0.99 * rates["float32"]
    assert rates.get("float8", 2 * rates["float16"]) == pytest.approx(2 * rates["float16"], rel=0.01)
    assert 10 < rates["float16"] / device.memory_bytes_per_s < 500
    assert catalogue().link(device.host_link)


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("NVIDIA GeForce RTX 3090", "RTX 3090"),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
        ("NVIDIA A100 80GB PCIe", "A100 80GB PCIe"),
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40S", None),
        ("AMD Instinct MI300X", "MI300X"),
        ("AMD EPYC 7B13, 1 core", None),
    ],
)
def test_a_card_is_known_by_its_drivers_name(name, model):
    """A card that is here is matched with the catalogue, and its faster or slower namesake is not."""
    found = model_of(name)
    assert (found and found.model) == model


# What a file says


def test_a_cluster_is_completed_from_the_catalogue(load):
    """Models give figures, own figures go before them, and links follow from the nodes."""
    cluster = load(TWO_NODES)
    first, second, third = cluster.devices
    assert [device.name for device in cluster.devices] == ["cuda:0", "cuda:1", "cuda:2"]
    assert first.model == second.model == "H100 SXM"
    assert [device.node for device in cluster.devices] == ["a", "a", "b"]
    assert all(device.declared for device in cluster.devices)
    assert 0.9 * 80 * 2**30 < first.memory_bytes < 80 * 2**30
    assert third.memory_bytes == 20 * 2**30
    assert third.fetch_bytes_per_s == catalogue().link("PCIe 4").bandwidth_bytes_per_s
    assert cluster.rates["cuda:2"].peak_flops["float16"] == 150e12
    assert cluster.rates["cuda:2"].peak_flops["float32"] == catalogue().device("RTX 4090").peak_flops["float32"]
    links = {(link.source, link.target): (link.latency_s, link.bandwidth_bytes_per_s) for link in cluster.links}
    assert len(links) == 6
    assert links["cuda:0", "cuda:1"] == links["cuda:1", "cuda:0"] == (11.8e-6, 450e9)
    assert links["cuda:0", "cuda:2"] == (18e-6, 12.5e9)
    assert links["cuda:1", "cuda:2"] == links["cuda:2", "cuda:1"] == (5e-6, 1e9)
    assert {link.origin for link in cluster.links} == {"estimated"}


def test_a_device_without_figures_is_to_be_measured(load):
    """It is found on this machine; such devices need no link between them."""
    cluster = load('[[devices]]\nnames = ["cpu:0", "cpu:1"]')
    assert cluster.here == ("cpu:0", "cpu:1")
    assert not cluster.links
    assert not cluster.rates


def test_a_device_may_have_figures_of_its_own(load):
    """No model is needed where memory and rates are given, also for a CPU."""
    cluster = load(OWN)
    assert cluster.devices[0].memory_bytes == 1_000_000
    assert cluster.here == ()
    assert load(OWN.replace("cuda", "cpu")).devices[0].kind == "cpu"


def test_a_device_may_say_its_way_to_the_host(load):
    """Declared with a latency and a bandwidth for staged transfers, or as a part of the host's memory."""
    way = "host_latency_s = 2e-6\nhost_bandwidth_bytes_per_s = 24e9\n"
    device = load(OWN.replace("memory_bytes_per_s", way + "memory_bytes_per_s", 1)).devices[0]
    assert (device.host_latency_s, device.host_bandwidth_bytes_per_s, device.in_host_memory) == (2e-6, 24e9, False)
    inside = load(OWN.replace("memory_bytes_per_s", "in_host_memory = true\nmemory_bytes_per_s", 1)).devices[0]
    assert inside.in_host_memory


def test_the_example_is_a_cluster():
    """The file in examples/ is read, with all three ways to give a device and a link."""
    cluster = load_cluster(Path(__file__).parents[1] / "examples" / "cluster.toml")
    assert len(cluster.devices) == 7
    links = {(link.source, link.target): link for link in cluster.links}
    assert links["cuda:6", "cuda:5"].latency_s == 20e-6
    assert links["cuda:6", "cuda:5"].bandwidth_bytes_per_s == catalogue().link("PCIe 4").bandwidth_bytes_per_s
    assert links["cuda:0", "cuda:6"].bandwidth_bytes_per_s == 50e9


# What is wrong with one


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("[[devices]]", "[[devices", "is not TOML"),
        ('name = "cuda:2"', 'name = "gpu2"', "'gpu2' is not a device: write cuda:0"),
        ('name = "cuda:2"', 'name = "cuda:1"', "cuda:1 is named twice"),
        ('name = "cuda:2"', "", 'write either name = "cuda:0" or names'),
        ('"RTX 4090"', '"RTX 4080"', "cuda:2 has model 'RTX 4080', which the catalogue does not have; it has RTX 3090"),
        ("20GiB", "20 parsecs", "memory of cuda:2: '20 parsecs' is not a size"),
        ("float16 = 150e12", "float15 = 150e12", "devices.1.peak_flops.float15"),
        ("150e12", "-1.0", "devices.1.peak_flops.float16: Input should be greater than 0"),
        ("150e12", "inf", "devices.1.peak_flops.float16: Input should be a finite number"),
        ("memory =", "memroy =", "devices.1.memroy: there is no such key; the keys there are name, names, model, node"),
        ("between", "betwixt", "links.betwixt: there is no such key; the keys there are within, between, pairs"),
        (
            'between = "100 Gb Ethernet"',
            "",
            "no link between cuda:0 and cuda:2 .nodes 'a' and 'b'.; write under .links.",
        ),
        ("NVLink 4", "NVLink 9", "links.within: the catalogue has no link 'NVLink 9'; use one of 'NVLink 3 bridge'"),
        ('["cuda:1", "cuda:2"]', '["cuda:1", "cuda:7"]', "links.pairs has cuda:1 and cuda:7; name two devices"),
        ('["cuda:1", "cuda:2"]', '["cuda:1", "cuda:1"]', "links.pairs has cuda:1 and cuda:1; name two devices"),
        ("latency_s = 5e-6", "", "links.pairs.0: give a kind, or latency_s and bandwidth_bytes_per_s"),
    ],
)
def test_a_wrong_file_is_refused(load, before, after, message):
    """The file, the key and the remedy are named in one line."""
    assert before in TWO_NODES
    with pytest.raises(ShardwrightError, match=message) as error:
        load(TWO_NODES.replace(before, after, 1))
    assert "cluster.toml" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("memory = 1_000_000", 'cuda:0 has no memory; write for example memory = "24GiB"'),
        ("memory_bytes_per_s = 1e12", "cuda:0 has no memory_bytes_per_s"),
        ("peak_flops = { float32 = 1e13 }", "cuda:0 has no peak_flops; give its rates by dtype"),
    ],
)
def test_figures_of_its_own_are_complete(load, line, message):
    """A device that no model describes has memory, its bandwidth, and rates."""
    with pytest.raises(ShardwrightError, match=message):
        load(OWN.replace(line, ""))


def test_a_missing_or_empty_file_is_refused(load, tmp_path):
    """One line each, without a traceback."""
    with pytest.raises(ShardwrightError, match=r"cannot read .*nowhere.toml: No such file"):
        load_cluster(tmp_path / "nowhere.toml")
    with pytest.raises(ShardwrightError, match="devices: it is missing"):
        load("")
    with pytest.raises(ShardwrightError, match="devices: it has 0, and needs 1 or more"):
        load("devices = []")
