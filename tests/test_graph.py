"""The cost graph has the attributes that it documents."""

from __future__ import annotations

import pytest

from shardwright.errors import ShardwrightError
from shardwright.profiler.graph import cost_graph


def test_attributes_at_a_number_of_microbatches(make_profile):
    """Graph, node and edge attributes are those of the profile at that number of micro-batches."""
    profile = make_profile({"a": ["x"], "b": ["a", "x"]}, colocate=[("a", "b")])
    graph = cost_graph(profile, 2)
    assert graph.graph == {
        "microbatches": 2,
        "train": True,
        "devices": {d: {"kind": "cpu", "memory_bytes": 10**9} for d in ("cpu:0", "cpu:1")},
        "links": {("cpu:0", "cpu:1"): (1e-6, 1e9), ("cpu:1", "cpu:0"): (1e-6, 1e9)},
        "colocate": (("a", "b"),),
    }
    assert list(graph) == ["x", "a", "b", "outputs"]
    assert graph.nodes["a"] == {
        "kind": "unit",
        "unit": "net.a",
        "forward_s": {"cpu:0": 0.5, "cpu:1": 0.5},
        "backward_s": {"cpu:0": 1.0, "cpu:1": 1.0},
        "update_s": {"cpu:0": 0.0, "cpu:1": 0.0},
        "static_bytes": 2_000,
        "param_bytes": 1_000,
        "saved_bytes": 400,
        "output_bytes": 40,
    }
    assert graph.nodes["x"]["forward_s"] == {}
    assert dict(graph.edges) == {
        ("x", "a"): {"tensors": {"x": (40, 0)}},
        ("x", "b"): {"tensors": {"x": (40, 0)}},
        ("a", "b"): {"tensors": {"a": (40, 40)}},
        ("b", "outputs"): {"tensors": {"b": (40, 40)}},
    }


def test_no_gradient_flows_back_in_inference(make_profile):
    """Without training every edge is one way."""
    graph = make_profile({"a": ["x"], "b": ["a"]}, train=False).graph()
    assert {back for *_, tensors in graph.edges(data="tensors") for _, back in tensors.values()} == {0}


def test_number_that_was_not_profiled(make_profile):
    """Asking for micro-batches that were not profiled says which were, and how to get them."""
    with pytest.raises(
        ShardwrightError, match="no times at 3 micro-batches; it has 1, 2, 4: profile again with --micro"
    ):
        cost_graph(make_profile({"a": ["x"]}), 3)
