"""Costs from anywhere: a graph by hand, GraphML and costs.json plan as a profile with the same numbers does."""

from __future__ import annotations

import json
import math
from typing import Any

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import shardwright as sw
from shardwright.errors import ShardwrightError
from shardwright.profiler.formats import from_graph
from shardwright.profiler.formats.costs import Costs
from shardwright.profiler.formats.from_graph import costs_from_graph, profile_from_graph
from shardwright.profiler.formats.given_devices import AMPLE_BYTES
from shardwright.profiler.formats.graphml import graphml
from shardwright.profiler.profile import Device, Link, Measurement, Node, Profile, Tensor


def five_lines(**attributes: Any) -> nx.DiGraph[str]:
    """A graph as a person writes it."""
    graph: nx.DiGraph[str] = nx.DiGraph(devices=["cuda:0", "cuda:1"], microbatches=8, **attributes)
    graph.add_node("embed", forward_s=2e-3, backward_s=4e-3)
    graph.add_node("body", forward_s=3e-3, backward_s=5e-3)
    graph.add_node("head", forward_s=5e-3, backward_s=9e-3)
    graph.add_edges_from([("embed", "body"), ("body", "head")], bytes=4e6)
    return graph


def changed(**attributes: Any) -> nx.DiGraph[str]:
    """The same with other graph attributes; None leaves one out."""
    graph = five_lines()
    graph.graph = {k: v for k, v in (graph.graph | attributes).items() if v is not None}
    return graph


def node(name: str, **attributes: Any) -> nx.DiGraph[str]:
    graph = five_lines()
    graph.add_node(name, **attributes)
    return graph


def edge(source: str, target: str, **attributes: Any) -> nx.DiGraph[str]:
    graph = five_lines()
    graph.remove_edges_from([(source, target)] if graph.has_edge(source, target) else [])
    graph.add_edge(source, target, **attributes)
    return graph


def test_five_lines_are_planned():
    """Times alone make a plan: here the first two units against the last, without cost for transfers."""
    plan = sw.plan(five_lines())
    assert [stage.units for stage in plan.stages] == [("embed", "body"), ("head",)]
    assert [stage.load_s for stage in plan.stages] == pytest.approx([8 * 14e-3, 8 * 14e-3])
    assert plan.certificate.exact
    assert plan.predicted.step_s == pytest.approx(9 * 14e-3)
    assert plan.predicted.baseline_s == pytest.approx(8 * 28e-3)
    assert (plan.model, plan.of_model, plan.train) == ("costs", False, True)


def test_what_is_not_said_has_a_documented_default():
    """Devices come from the times, micro-batches are one for each, memory is ample, an output is what edges carry."""
    graph: nx.DiGraph[Any] = nx.DiGraph()
    graph.add_node(0, forward_s={"tpu:0": 1.0, "cuda:1": 2.0, "cpu:3": 4}, backward_s=2, param_bytes=7)
    graph.add_node(1, forward_s=np.float32(1), backward_s=0)
    graph.add_edge(0, 1, bytes=np.int64(30))
    profile = profile_from_graph(graph)
    kinds = [("tpu:0", "other"), ("cuda:1", "cuda"), ("cpu:3", "cpu")]
    assert [(d.name, d.kind) for d in profile.devices] == kinds
    assert {d.memory_bytes for d in profile.devices} == {AMPLE_BYTES}
    assert profile.microbatches == (3,)
    first, second = profile.nodes
    assert (first.name, first.unit, first.type, first.static_bytes, first.param_bytes) == ("0", "0", "Unit", 7, 7)
    assert (first.output_bytes, second.output_bytes) == ({3: 30}, {3: 0})
    assert (second.name, second.inputs) == ("1", ("0",))
    assert profile.tensors == (Tensor(name="0", producer="0", requires_grad=True, bytes={3: 30}),)
    assert [m.backward_s for m in profile.measurements if m.node == "0"] == [2.0] * 3
    assert set(profile.graph(3).graph["links"].values()) == {(0.0, math.inf)}
    assert list(graph.nodes[0]) == ["forward_s", "backward_s", "param_bytes"], "the caller's graph is as it was"


def test_bytes_and_outputs_stand_for_each_other():
    """An edge without bytes carries its producer's output; static bytes without parameters are all the rest."""
    graph = five_lines()
    graph.nodes["embed"].update(output_bytes=70, static_bytes=100)
    graph.remove_edge("embed", "body")
    graph.add_edge("embed", "body")
    profile = profile_from_graph(graph)
    assert profile.tensors[0].bytes == {8: 70}
    assert (profile.nodes[0].param_bytes, profile.nodes[0].static_bytes) == (0, 100)


def test_no_gradient_flows_back_to_inputs_and_parameters():
    """By default only units and glue get a gradient of what they made."""
    graph = nx.DiGraph(devices=["a"])
    kinds = ["input", "parameter", "unit", "glue"]
    for kind in kinds:
        graph.add_node(kind, kind=kind, **({"forward_s": 1.0, "backward_s": 1.0} if kind in ("unit", "glue") else {}))
        graph.add_edge(kind, "outputs", bytes=4)
    graph.nodes["outputs"]["kind"] = "output"
    tensors = profile_from_graph(graph).graph().edges(data="tensors")
    assert {source: tensors_[source] for source, _, tensors_ in tensors} == {
        "input": (4, 0),
        "parameter": (4, 0),
        "unit": (4, 4),
        "glue": (4, 4),
    }


@pytest.mark.parametrize("type_", [None, "parameter", "buffer", "constant"])
@pytest.mark.parametrize("copied", [None, True, False])
def test_what_is_copied_stays_so(type_, copied):
    """A buffer or constant is copied unless it is said not to be, whatever the type is called."""
    graph = five_lines()
    given_ = {key: value for key, value in (("type", type_), ("copied", copied)) if value is not None}
    graph.add_node("p", kind="parameter", **given_)
    graph.add_edge("p", "head")
    expected = type_ in ("buffer", "constant") if copied is None else copied
    assert profile_from_graph(graph).graph(8).nodes["p"]["copied"] == expected


def test_nodes_are_taken_in_the_order_of_the_forward():
    """Edges may be added before their nodes, and in any order."""
    graph = nx.DiGraph([("b", "c"), ("a", "b")], devices=["x", "y"], train=False)
    nx.set_node_attributes(graph, 1.0, "forward_s")
    assert [n.name for n in profile_from_graph(graph).nodes] == ["a", "b", "c"]


def test_one_link_for_all_pairs():
    """A latency and a bandwidth hold for every pair, and slow transfers keep the model on one device."""
    links = profile_from_graph(changed(links=(1e-3, 1e6))).links
    assert {(li.source, li.target) for li in links} == {("cuda:0", "cuda:1"), ("cuda:1", "cuda:0")}
    assert {(li.latency_s, li.bandwidth_bytes_per_s) for li in links} == {(1e-3, 1e6)}
    assert len(sw.plan(changed(links=(1e-3, 1e6))).stages) == 1


def test_labels_and_colours_stay():
    """Attributes for a drawing are nobody's mistake."""
    graph = five_lines(Creator="yEd")
    graph.nodes["body"].update(label="the body", x=3.0)
    graph.edges["body", "head"]["colour"] = "red"
    assert sw.plan(graph) == sw.plan(five_lines())


# fmt: off
MISTAKES = [
    (node("head", forward_s=-1), "node head: forward_s on cuda:0 is -1; give a finite number of seconds, 0 or more"),
    (node("head", forward_s="3 ms"), "node head: forward_s on cuda:0 is '3 ms'; give a finite number of seconds"),
    (node("head", forward_s=math.nan), "node head: forward_s on cuda:0 is nan"),
    (node("head", forward_s={"cuda:0": 1.0}), "node head: forward_s has no time on cuda:1; give one for each device"),
    (node("head", forward_s={"cuda:2": 1.0}), "node head: forward_s names cuda:2; the devices are cuda:0, cuda:1"),
    (node("tail", backward_s=1.0), "node tail: forward_s is missing; give seconds, by device or one number for all"),
    (node("tail", forward_s=1.0), "node tail: backward_s is missing; give seconds, by device or one number for all, or "
                                  "make train False"),
    (node("tail", kind="glue", update_s=1.0), "node tail: forward_s is missing, and other times are there"),
    (node("head", kind="layer"), "node head: kind is 'layer'; the kinds are input, parameter, unit, glue, output"),
    (node("head", foward_s=1.0), "node head has foward_s, which costs do not have; did you mean forward_s?"),
    (node("head", wait_s=1.0), "node head has wait_s, which costs do not have; there are kind, type, unit, site"),
    (node("head", saved_bytes=1.5), "node head: saved_bytes is 1.5; give a whole number, 0 or more"),
    (node("head", static_bytes="2GB"), "node head: static_bytes is '2GB'; give a whole number"),
    (
        node("head", param_bytes=2, static_bytes=3, grad_bytes=2),
        "node head: grad_bytes is 2, and static_bytes leaves 1 beside param_bytes; correct one of them",
    ),
    (node("head", static_bytes=1, param_bytes=2), "node head: param_bytes is 2, more than static_bytes, 1, which has"),
    (edge("embed", "body", bytes=-4), "edge embed -> body: bytes of embed is -4; give a whole number, 0 or more"),
    (edge("embed", "head", bytes=5), "edge embed -> head: tensor embed has 5 bytes and a gradient here and 4000000 "
                                     "bytes and a gradient on another edge; give a tensor one size, or name two"),
    (edge("embed", "body", bytes=4, gradient_bytes=3), "gradient_bytes of embed is 3; give 0 or 4, the tensor's own"),
    (edge("embed", "body", byte=4), "edge embed -> body has byte, which costs do not have; did you mean bytes?"),
    (edge("embed", "body", tensors={"a": 3}), "edge embed -> body: tensors is {'a': 3}; give {name: (bytes, bytes of"),
    (edge("embed", "body", tensors=[3]), "edge embed -> body: tensors is [3]; give"),
    (edge("embed", "body", tensors={"a": (3, 3)}, bytes=4), "tensors and bytes are both given; give one of them"),
    (edge("embed", "body", tensors={"body": (3, 3)}), "body -> head: tensor body is also made by embed; rename one"),
    (edge("head", "embed"), "the graph has a cycle, embed -> body -> head -> embed; a forward has none"),
    (changed(train=False), "node embed: backward_s is 0.004, but train is False: leave it out"),
    (changed(train="no"), "graph attribute train is 'no'; give True or False"),
    (changed(microbatches=0), "graph attribute microbatches is 0"),
    (changed(microbatches="8"), "graph attribute microbatches is '8'; give a whole number"),
    (changed(micro_batches=8), "the graph has micro_batches, which costs do not have; did you mean microbatches?"),
    (changed(devices=None), "no device is named; give the graph attribute devices"),
    (changed(devices="cuda:0"), "graph attribute devices is 'cuda:0'; give their names"),
    (changed(devices={"a": 80e9}), "device a has 80000000000.0; give a dict, such as {'memory_bytes': 80e9}"),
    (changed(devices={"a": {"memory": 80e9}}), "device a has memory, which costs do not have; there are kind, memory"),
    (changed(devices={"a": {"memory_bytes": 0}}), "device a: memory_bytes is 0; give what a plan may use there"),
    (changed(devices={"a": {"kind": "gpu"}}), "device a: kind is 'gpu'; the kinds are cpu, cuda, other"),
    (changed(links={("cuda:0", "cuda:1"): (0, 1e9)}), "link cuda:1 -> cuda:0 is missing; give every ordered pair"),
    (changed(links={("cuda:0", "b"): (0, 1e9)}), "graph attribute links has ('cuda:0', 'b'), not a pair of the"),
    (changed(links=(0.0, 0.0)), "link cuda:0 -> cuda:1: bandwidth is 0.0; give a finite number above 0"),
    (changed(links=5), "link cuda:0 -> cuda:1 is 5; give (latency in s, bandwidth in bytes/s)"),
    (changed(colocate=[["embed", "tail"]]), "graph attribute colocate names tail, which is not a node of the graph"),
    (changed(colocate=["embed"]), "graph attribute colocate is ['embed']; give groups of node names"),
    (changed(ties=[("w", ["embed", "tail"], 1, 1)]), "graph attribute ties names tail, which is not a node"),
    (changed(ties=[("w", ["embed"], 1, 1)]), "graph attribute ties has ('w', ['embed'], 1, 1); give (parameter, two"),
    (changed(ties=[("w", ["embed", "head"], 1, -1)]), "graph attribute ties: bytes of w is -1"),
    (changed(obstacles="a loop"), "graph attribute obstacles is not a JSON list: 'a loop'"),
    (changed(obstacles=7), "graph attribute obstacles is 7; give a sequence of texts"),
    (nx.Graph([("a", "b")]), "costs are a Profile or a networkx.DiGraph, not a Graph; make it a DiGraph"),
    (nx.MultiDiGraph([("a", "b")]), "not a MultiDiGraph"),
    ({"a": 1}, "not a dict"),
    (nx.DiGraph([(1, "1")], devices=["a"]), "two nodes of the graph have the same name as text"),
    (nx.DiGraph(devices=["a"]), "the cost graph has no unit to place"),
]
# fmt: on


@pytest.mark.parametrize(("graph", "says"), MISTAKES, ids=[says[:40] for _, says in MISTAKES])
def test_a_mistake_is_one_clear_line(graph, says):
    """What is wrong is named with its node, edge or graph attribute, its value, and what to give instead."""
    with pytest.raises(ShardwrightError) as caught:
        sw.plan(graph)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_another_number_of_microbatches_is_refused():
    """The costs are of one number of micro-batches, and say so."""
    with pytest.raises(
        ShardwrightError, match="costs of costs are of 8 micro-batches, not of 4: give the costs of one"
    ):
        sw.plan(five_lines(), microbatches=4)


SECONDS = st.integers(0, 20).map(lambda n: n / 16)
BYTES = st.integers(0, 1_000)


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    """Costs as costs.json has them, everything written out."""
    names = [f"u{i}" for i in range(draw(st.integers(1, 6)))]
    devices = [f"cuda:{i}" for i in range(draw(st.integers(1, 3)))]
    train = draw(st.booleans())

    def times() -> dict[str, float]:
        return {device: draw(SECONDS) for device in devices}

    units = []
    for at, name in enumerate(names):
        param_bytes, more = draw(BYTES), draw(BYTES)
        unit = {
            "name": name,
            "inputs": draw(st.lists(st.sampled_from(names[:at]), unique=True, max_size=3)) if at else [],
            "forward_s": times(),
            "param_bytes": param_bytes,
            "static_bytes": param_bytes + more,
            "saved_bytes": draw(BYTES) if train else 0,
            "output_bytes": draw(BYTES),
        }
        if train and draw(st.booleans()):
            unit["grad_bytes"] = draw(st.integers(0, more))
        units.append(unit | ({"backward_s": times(), "update_s": times()} if train else {}))
    pairs = [(a, b) for a in devices for b in devices if a != b]
    return {
        "format": "shardwright.costs",
        "version": 1,
        "train": train,
        "microbatches": draw(st.integers(1, 4)),
        "devices": {device: {"memory_bytes": draw(st.integers(2_000, 20_000))} for device in devices},
        "links": [
            {
                "source": a,
                "target": b,
                "latency_s": draw(SECONDS) / 16,
                "bandwidth_bytes_per_s": draw(st.integers(1, 9)),
            }
            for a, b in pairs
        ],
        "units": units,
        "colocate": [draw(st.lists(st.sampled_from(names), min_size=1, max_size=2, unique=True))],
    }


def gradients(unit: dict[str, Any]) -> int:
    """The gradients among a unit's bytes where nothing else is said."""
    given: int = unit.get("grad_bytes", min(unit["param_bytes"], unit["static_bytes"] - unit["param_bytes"]))
    return given


def as_profile(case: dict[str, Any]) -> Profile:
    """The records of ``case``, written without the reader that is tested."""
    m, train = case["microbatches"], case["train"]
    read = {source for unit in case["units"] for source in unit["inputs"]}
    return Profile(
        model="costs",
        structure="0123",
        inputs=(),
        batch=m,
        train=train,
        optimizer="none",
        torch_version="",
        microbatches=(m,),
        devices=tuple(
            Device(name=name, kind="cuda", description="", **facts) for name, facts in case["devices"].items()
        ),
        links=tuple(Link(**link) for link in case["links"]),
        nodes=tuple(
            Node(
                name=unit["name"],
                kind="unit",
                type="Unit",
                unit=unit["name"],
                inputs=tuple(unit["inputs"]),
                param_bytes=unit["param_bytes"],
                grad_bytes=gradients(unit) if train else 0,
                buffer_bytes=unit["static_bytes"] - unit["param_bytes"] - (gradients(unit) if train else 0),
                output_bytes={m: unit["output_bytes"]},
                saved_bytes={m: unit["saved_bytes"]},
            )
            for unit in case["units"]
        ),
        tensors=tuple(
            Tensor(name=unit["name"], producer=unit["name"], requires_grad=train, bytes={m: unit["output_bytes"]})
            for unit in case["units"]
            if unit["name"] in read
        ),
        colocate=tuple(map(tuple, case["colocate"])),
        measurements=tuple(
            Measurement(
                node=unit["name"],
                device=device,
                microbatches=m,
                repeats=1,
                forward_s=unit["forward_s"][device],
                forward_spread_s=0.0,
                backward_s=unit["backward_s"][device] if train else 0.0,
                backward_spread_s=0.0,
                update_s=unit["update_s"][device] if train else 0.0,
            )
            for unit in case["units"]
            for device in case["devices"]
        ),
    )


def by_hand(case: dict[str, Any]) -> nx.DiGraph[str]:
    """``case`` as a graph that a person builds."""
    graph: nx.DiGraph[str] = nx.DiGraph(
        train=case["train"],
        microbatches=case["microbatches"],
        devices=case["devices"],
        links={(li["source"], li["target"]): (li["latency_s"], li["bandwidth_bytes_per_s"]) for li in case["links"]},
        colocate=case["colocate"],
    )
    for unit in case["units"]:
        graph.add_node(unit["name"], **{key: value for key, value in unit.items() if key not in ("name", "inputs")})
        graph.add_edges_from((source, unit["name"]) for source in unit["inputs"])
    return graph


def outcome(costs: Profile | nx.DiGraph[Any]) -> Any:
    """The plan, apart from what only a model has and the order in which inputs are listed; or why there is none."""
    try:
        plan = sw.plan(costs)
    except ShardwrightError as error:
        return str(error)
    nodes = tuple(node.model_copy(update={"inputs": tuple(sorted(node.inputs))}) for node in plan.nodes)
    same = {"structure": "", "nodes": nodes, "inputs": (), "batch": 1, "optimizer": "", "guards": ()}
    return plan.model_copy(update=same)


@settings(max_examples=25, deadline=None)
@given(cases())
def test_every_form_of_the_same_costs_has_the_same_plan(case):
    """A profile, a graph by hand, GraphML of both, and costs.json: one plan, or one reason why there is none."""
    profile = as_profile(case)
    expected = outcome(profile)
    costs = Costs.parse(json.dumps(case), source="costs.json")
    graph = profile.graph(case["microbatches"])
    assert outcome(by_hand(case)) == expected
    assert outcome(costs.profile()) == expected
    assert outcome(graph) == expected
    assert outcome(nx.parse_graphml(graphml(graph))) == expected
    assert outcome(nx.parse_graphml(graphml(costs.profile().graph(case["microbatches"])))) == expected


@settings(max_examples=25, deadline=None)
@given(cases())
def test_reading_a_graph_again_changes_nothing(case):
    """The profile of a profile's graph has that graph, to the last attribute and in the same order."""
    graph = as_profile(case).graph(case["microbatches"])
    again = profile_from_graph(graph).graph(case["microbatches"])
    profile, direct = costs_from_graph(graph)
    assert profile == profile_from_graph(graph).model_copy(update={"measurements": ()})
    for same in (again, direct.networkx()):
        assert same.graph == graph.graph
        assert list(same.nodes(data=True)) == list(graph.nodes(data=True))
        assert list(same.edges(data=True)) == list(graph.edges(data=True))


def test_no_record_is_made_of_each_time_for_planning(monkeypatch):
    """Units times devices are many, and records take longer to make than the plan."""
    expected = sw.plan(five_lines())
    monkeypatch.setattr(from_graph, "Measurement", None)
    assert sw.plan(five_lines()) == expected


def test_the_parts_of_a_backward_come_in_pairs():
    """By device or as one number, through GraphML too; one part without the other is refused."""
    graph = five_lines()
    graph.add_node("head", backward_input_s=3e-3, backward_weight_s={"cuda:0": 6e-3, "cuda:1": 7e-3}, deferred_bytes=8)
    profile = profile_from_graph(graph)
    found = profile.measurement("head", "cuda:1", 8)
    assert found is not None
    assert (found.backward_input_s, found.backward_weight_s) == (3e-3, 7e-3)
    again = profile_from_graph(nx.parse_graphml(graphml(profile.graph(8))))
    assert again.measurements == profile.measurements
    assert [node.deferred_bytes.get(8, 0) for node in again.nodes] == [0, 0, 8]
    del graph.nodes["head"]["backward_input_s"]
    with pytest.raises(ShardwrightError, match="head: backward_weight_s is there and backward_input_s is not"):
        profile_from_graph(graph)
