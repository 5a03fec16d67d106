"""The cost graph has the attributes that it documents."""

from __future__ import annotations

import json

import pytest

from shardwright.errors import ShardwrightError
from shardwright.profiler.graph import cost_graph
from shardwright.profiler.profile import Profile, Tie


def test_attributes_at_a_number_of_microbatches(make_profile):
    """Graph, node and edge attributes are those of the profile at that number of micro-batches."""
    profile = make_profile({"a": ["x"], "b": ["a", "x"]}, colocate=[("a", "b")])
    graph = cost_graph(profile, 2)
    assert graph.graph == {
        "name": "nets.py:Net",
        "microbatches": 2,
        "train": True,
        "devices": {
            d: {"kind": "cpu", "memory_bytes": 10**9, "fetch_bytes_per_s": None, "variation": ()}
            for d in ("cpu:0", "cpu:1")
        },
        "links": {("cpu:0", "cpu:1"): (1e-6, 1e9), ("cpu:1", "cpu:0"): (1e-6, 1e9)},
        "colocate": (("a", "b"),),
        "ties": (),
        "obstacles": (),
        "host_bytes": 0,
        "disk_bytes_per_s": None,
        "tensors": {
            name: {"maker": name, "storage": "", "held_bytes": 40, "saver": "", "gradient_bytes": gradient}
            for name, gradient in {"x": 0, "a": 40, "b": 40}.items()
        },
        "waiting": (),
    }
    assert list(graph) == ["x", "a", "b", "outputs"]
    assert graph.nodes["a"] == {
        "kind": "unit",
        "type": "Linear",
        "unit": "net.a",
        "site": "",
        "unfit": (),
        "copied": False,
        "forward_s": {"cpu:0": 0.5, "cpu:1": 0.5},
        "backward_s": {"cpu:0": 1.0, "cpu:1": 1.0},
        "backward_input_s": {},
        "backward_weight_s": {},
        "update_s": {"cpu:0": 0.0, "cpu:1": 0.0},
        "recompute_s": {},
        "static_bytes": 2_000,
        "param_bytes": 1_000,
        "grad_bytes": 1_000,
        "saved_bytes": 400,
        "output_bytes": 40,
        "forward_peak_bytes": 0,
        "backward_peak_bytes": 0,
        "input_gradient_bytes": None,
        "deferred_bytes": None,
        "update_peak_bytes": {},
        "update_left_bytes": 0,
    }
    assert graph.nodes["x"]["forward_s"] == {}
    assert dict(graph.edges) == {
        ("x", "a"): {"tensors": {"x": (40, 0)}},
        ("x", "b"): {"tensors": {"x": (40, 0)}},
        ("a", "b"): {"tensors": {"a": (40, 40)}},
        ("b", "outputs"): {"tensors": {"b": (40, 40)}},
    }


def test_ties_and_copied_tensors(make_profile):
    """Ties are listed with their bytes; buffers and constants are copied to who reads them, parameters are not."""
    profile = make_profile(
        {"w": [], "b": [], "c": [], "a": ["x", "w", "b", "c"]}, kinds=dict.fromkeys("wbc", "parameter")
    )
    types = {"b": "buffer", "c": "constant"}
    nodes = tuple(node.model_copy(update={"type": types.get(node.name, node.type)}) for node in profile.nodes)
    tie = Tie(name="w", nodes=("a", "outputs"), copy_bytes=30, gradient_bytes=10)
    graph = cost_graph(profile.model_copy(update={"nodes": nodes, "ties": (tie,)}), 1)
    assert graph.graph["ties"] == (("w", ("a", "outputs"), 30, 10),)
    assert [name for name, copied in graph.nodes(data="copied") if copied] == ["b", "c"]


@pytest.mark.parametrize(
    ("nodes", "says"),
    [(["a", "u9"], "node 'u9' is used but not listed"), (["a"], "ties.0.nodes: it has 1, and needs 2 or more")],
)
def test_tie_without_its_users(make_profile, nodes, says):
    """A tie names two nodes of the profile at least."""
    content = make_profile({"a": ["x"]}).model_dump(mode="json")
    content["ties"] = [{"name": "w", "nodes": nodes, "copy_bytes": 4, "gradient_bytes": 4}]
    with pytest.raises(ShardwrightError, match=says):
        Profile.parse(json.dumps(content), source="p.json")


def test_no_gradient_flows_back_in_inference(make_profile):
    """Without training every edge is one way."""
    graph = make_profile({"a": ["x"], "b": ["a"]}, train=False).graph()
    assert {back for *_, tensors in graph.edges(data="tensors") for _, back in tensors.values()} == {0}


def test_number_that_was_not_profiled(make_profile):
    """Asking for micro-batches that were not profiled says which were, and how to get them, if the batch allows it."""
    with pytest.raises(
        ShardwrightError, match="no times at 8 micro-batches; it has 1, 2, 4: profile again with --micro"
    ):
        cost_graph(make_profile({"a": ["x"]}), 8)
    with pytest.raises(ShardwrightError, match="take one of these, as a batch of 8 does not divide into 3 equal parts"):
        cost_graph(make_profile({"a": ["x"]}), 3)
