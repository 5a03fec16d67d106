"""GraphML of a cost graph: scalar keys, nothing lost, and real captures planned from it as from their profile."""

from __future__ import annotations

import networkx as nx
import pytest
import torch
from torch import nn

import shardwright as sw
from shardwright.errors import ShardwrightError
from shardwright.profiler.formats.from_graph import profile_from_graph
from shardwright.profiler.formats.graphml import flat_graph, graphml, nested_graph
from shardwright.profiler.profile import Tie, Variation


def rich_profile(make_profile):
    """A profile in which every graph attribute says something."""
    profile = make_profile(
        {"w": [], "a": ["x", "w"], "b": ["a"], "c": ["b", "w"]},
        kinds={"w": "parameter"},
        colocate=[("b", "c")],
        microbatches=(4,),
    )
    devices = tuple(
        device.model_copy(update={"fetch_bytes_per_s": 3e9, "engine_s": 5e-4}) for device in profile.devices
    )
    return profile.model_copy(
        update={
            "devices": devices,
            "ties": (Tie(name="w", nodes=("a", "c"), copy_bytes=30, gradient_bytes=10),),
            "obstacles": ('net.py:3: it says "no" <twice> & ends',),
            "variations": (Variation(device="cpu:1", relative=(1.0, 0.9, 1.3)),),
            "host_bytes": 2**34,
            "disk_bytes_per_s": 1.5e9,
        }
    )


def test_keys_are_the_documented_ones(make_profile):
    """Times are by device in their keys, links by their ends, and lists are JSON."""
    flat = rich_profile(make_profile).graph(4, flat=True)
    assert flat.graph == {
        "name": "nets.py:Net",
        "microbatches": 4,
        "train": True,
        "kind:cpu:0": "cpu",
        "memory_bytes:cpu:0": 10**9,
        "fetch_bytes_per_s:cpu:0": 3e9,
        "engine_s:cpu:0": 5e-4,
        "kind:cpu:1": "cpu",
        "memory_bytes:cpu:1": 10**9,
        "fetch_bytes_per_s:cpu:1": 3e9,
        "engine_s:cpu:1": 5e-4,
        "variation:cpu:1": "[1.0, 0.9, 1.3]",
        "latency_s:cpu:0->cpu:1": 1e-6,
        "bandwidth_bytes_per_s:cpu:0->cpu:1": 1e9,
        "latency_s:cpu:1->cpu:0": 1e-6,
        "bandwidth_bytes_per_s:cpu:1->cpu:0": 1e9,
        "colocate": '[["b", "c"]]',
        "ties": '[["w", ["a", "c"], 30, 10]]',
        "obstacles": '["net.py:3: it says \\"no\\" <twice> & ends"]',
        "host_bytes": 2**34,
        "disk_bytes_per_s": 1.5e9,
    }
    assert {k: v for k, v in flat.nodes["a"].items() if ":" in k} == {
        f"{key}:{device}": seconds
        for key, seconds in (("forward_s", 0.25), ("backward_s", 0.5), ("update_s", 0.0))
        for device in ("cpu:0", "cpu:1")
    }
    assert flat.edges["a", "b"] == {"bytes": 20, "gradient_bytes": 20}


def test_several_tensors_on_an_edge_have_keys_of_their_own():
    """A tensor with another name than its producer, or beside another, is named in its keys."""
    graph = nx.DiGraph(devices=["d:0"], train=True, microbatches=1)
    graph.add_node("a", forward_s=1.0, backward_s=1.0)
    graph.add_node("b", forward_s=1.0, backward_s=1.0)
    graph.add_edge("a", "b", tensors={"a:0": (8, 8), "a:1": (4, 0)})
    whole = sw.plan(graph)
    flat = profile_from_graph(graph).graph(1, flat=True)
    assert flat.edges["a", "b"] == {"bytes:a:0": 8, "gradient_bytes:a:0": 8, "bytes:a:1": 4, "gradient_bytes:a:1": 0}
    assert sw.plan(flat) == whole
    graph.edges["a", "b"]["tensors"] = {"hidden": (8, 0)}
    assert profile_from_graph(graph).graph(1, flat=True).edges["a", "b"] == {
        "bytes:hidden": 8,
        "gradient_bytes:hidden": 0,
    }


def test_text_and_back_loses_nothing(make_profile):
    """What networkx reads back, nested again, is the cost graph, in its order."""
    profile = rich_profile(make_profile)
    graph = profile.graph(4)
    back = nested_graph(nx.parse_graphml(graphml(graph)))
    assert sw.plan(back) == sw.plan(graph)
    assert profile_from_graph(back).variations == profile.variations
    assert sw.plan(back, microbatches=4).predicted == sw.plan(profile, microbatches=4).predicted
    for key in ("devices", "links", "name", "microbatches", "train", "host_bytes", "disk_bytes_per_s"):
        for device in graph.graph["devices"].values():  # JSON has lists
            device["variation"] = list(device["variation"])
        found = back.graph[key]
        if key == "devices":
            found = {name: {"variation": []} | device for name, device in found.items()}
        assert found == graph.graph[key]
    assert list(back) == list(graph)


@pytest.mark.parametrize(
    ("attributes", "says"),
    [
        ({"colocate": "a, b"}, "graph attribute colocate is not a JSON list: 'a, b'"),
        ({"ties": '{"a": 1}'}, "graph attribute ties is not a JSON list"),
        ({"latency_s:d:0": 1.0}, "graph attribute latency_s:d:0 names no link; write latency_s:cuda:0->cuda:1"),
        ({"variation:d:0": "fast"}, "graph attribute variation:d:0 is not a JSON list: 'fast'"),
        (
            {"bandwidth_bytes_per_s:d:0->d:9": 1.0},
            "graph attribute links has ('d:0', 'd:9'), not a pair of the devices",
        ),
    ],
)
def test_a_key_that_is_not_as_documented(attributes, says):
    """A key or list that cannot be read is named."""
    graph = nx.DiGraph(devices=["d:0", "d:1"], train=False, **attributes)
    graph.add_node("a", forward_s=1.0)
    with pytest.raises(ShardwrightError) as caught:
        sw.plan(graph)
    assert says in str(caught.value)


def test_a_name_that_xml_cannot_hold(make_profile):
    """A control character in a name would make a file that nothing reads: it is refused."""
    for character in "\x01\x0b\x1c":
        graph = make_profile({f"a{character}": ["x"]}, microbatches=(1,)).graph()
        with pytest.raises(ShardwrightError, match=r"a name has the control character .*, which GraphML cannot hold"):
            graphml(graph)
    odd = make_profile({'ä b\n<&">': ["x"]}, microbatches=(1,)).graph()
    assert list(nx.parse_graphml(graphml(odd))) == ["x", 'ä b\n<&">', "outputs"]


def test_flat_graph_leaves_its_argument(make_profile):
    """Flattening makes a copy."""
    graph = rich_profile(make_profile).graph(4)
    flat_graph(graph)
    assert graph.nodes["a"]["forward_s"] == {"cpu:0": 0.25, "cpu:1": 0.25}


class Tied(nn.Module):
    """Two streams, glue between them, a buffer and a weight that is used twice."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.left = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.0), nn.Linear(8, 8))
        self.right = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("scale", torch.full((8,), 0.5))

    def forward(self, tokens):
        x = self.embedding(tokens)
        one, other = self.left(x), self.right[1](self.right[0](x)) * self.scale
        return self.head(one + other)


@pytest.mark.parametrize("train", [True, False])
def test_a_captured_model_is_planned_alike(captured_profile, tmp_path, train):
    """A profile's graph, its GraphML file read back, and the profile itself give the same split, proof and step."""
    profile = captured_profile(Tied(), (torch.randint(0, 11, (8, 4)),), microbatches=(1, 4), train=train)
    if train:
        assert profile.ties
    path = tmp_path / "tied.graphml"
    nx.write_graphml(profile.graph(4, flat=True), path)
    expected = sw.plan(profile, microbatches=4)
    for graph in (profile.graph(4), nx.read_graphml(path)):
        plan = sw.plan(graph, microbatches=4)
        assert plan.stages == expected.stages
        assert plan.certificate == expected.certificate
        assert plan.candidates[0].step_s == expected.candidates[0].step_s
        assert plan.ties == expected.ties
        assert plan.placement() == expected.placement()
        assert [(n.node, n.kind, n.type, n.site, n.stage) for n in plan.nodes] == [
            (n.node, n.kind, n.type, n.site, n.stage) for n in expected.nodes
        ]


def test_offloaded_weights_are_planned_alike(make_profile):
    """The rates at which weights come from the host and from disk travel with the graph."""
    profile = make_profile(
        {f"u{i}": [f"u{i - 1}" if i else "x"] for i in range(4)},
        speed={"cuda:0": 1.0, "cuda:1": 1.0}, train=False, microbatches=(2,), param_bytes=1_000, memory_bytes=1_500,
    )  # fmt: skip
    devices = tuple(device.model_copy(update={"fetch_bytes_per_s": 1e4}) for device in profile.devices)
    profile = profile.model_copy(update={"devices": devices, "host_bytes": 1_500, "disk_bytes_per_s": 1e3})
    expected = sw.plan(profile)
    assert set(expected.offloaded.values()) == {"cpu", "disk"}
    found = sw.plan(nx.parse_graphml(graphml(profile.graph(2))))
    assert (found.offloaded, found.stages, found.predicted) == (
        expected.offloaded,
        expected.stages,
        expected.predicted,
    )
