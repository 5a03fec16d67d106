"""From a cost graph to blocks: groups, hulls, pins, sizes, and what is refused."""

from __future__ import annotations

import dataclasses
import itertools
import random

import networkx as nx
import pytest

from shardwright.errors import ShardwrightError
from shardwright.profiler.profile import Tie
from shardwright.sharder.planning.formulation.blocks import parse_bytes, problem_from_graph
from shardwright.sharder.planning.formulation.memory import Gradient, Step, Storage
from shardwright.sharder.planning.problem import Tie as BlockTie
from shardwright.sharder.planning.problem import in_flight


def nodes_of(problem):
    return [block.nodes for block in problem.blocks]


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("10GiB", 10 * 2**30),
        ("500 MB", 500 * 10**6),
        ("1.5g", 3 * 2**29),
        ("2000000", 2_000_000),
        ("8 kib", 8192),
        (123, 123),
        ("9007199254740993", 9007199254740993),
    ],
)
def test_sizes_in_words(text, size):
    """Decimal and binary units, either case, with or without a space, and plain bytes, exactly."""
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "ten", "10 parsecs", "-1GiB", "0", 0, -5, "nan", "inf", "1e400", "1..5G"])
def test_sizes_that_are_none(text):
    """Anything else is refused with an example."""
    with pytest.raises(ShardwrightError, match="is not a size in bytes; write for example 10GiB"):
        parse_bytes(text)


def test_in_flight_by_schedule():
    """1F1B holds a micro-batch for each stage from here on; GPipe holds all of them."""
    assert [in_flight("1f1b", 8, after) for after in range(4)] == [1, 2, 3, 4]
    assert in_flight("1f1b", 2, 3) == 2
    assert in_flight("gpipe", 8, 0) == 8


def test_chain_becomes_blocks(chain_profile):
    """Each unit is a block; inputs come first, outputs last, and the numbers are those of the graph."""
    problem = problem_from_graph(chain_profile(2, speed={"cpu:0": 1.0, "cpu:1": 2.0}).graph(2))
    assert nodes_of(problem) == [("x",), ("u0",), ("u1",), ("outputs",)]
    assert problem.predecessors == (0b0, 0b1, 0b11, 0b111)
    unit = problem.blocks[1]
    assert (unit.forward_s, unit.backward_s, unit.units) == ((0.5, 0.25), (1.0, 0.5), ("net.u0",))
    assert unit.static_bytes == 2_000
    # The forward leaves 400 saved and the output, the backward makes the gradient of what it reads, u0 that of nothing.
    assert problem.ledger.steps[1:3] == (
        Step(1, 400, 440, 0, gradient=1_000),
        Step(2, 400, 440, 40, gradient=1_000),
    )
    assert problem.ledger.storages == (Storage(40, 1, (2,)), Storage(40, 2, (3,), returned=True))
    assert problem.ledger.gradients == (Gradient(40, (2,), 1, 40), Gradient(40, (3,), 2, 40))
    assert problem.work_s(1, 0) == 2 * 1.5
    assert [(c.name, c.producer, c.readers, c.forward_bytes, c.backward_bytes) for c in problem.crossings] == [
        ("x", 0, 0b10, 40, 0),
        ("u0", 1, 0b100, 40, 40),
        ("u1", 2, 0b1000, 40, 40),
    ]


def test_tensor_with_several_readers_crosses_once(make_profile):
    """A skip is one tensor at each cut between its producer and its last reader."""
    problem = problem_from_graph(make_profile({"a": ["x"], "b": ["a"], "c": ["b", "a"]}).graph(1))
    (skip,) = [c for c in problem.crossings if c.name == "a"]
    assert skip.readers == 0b1100
    assert [skip in problem.crossing(closed) for closed in (0b1, 0b11, 0b111, 0b1111)] == [False, True, True, False]


def test_inputs_come_first_and_outputs_last(make_profile):
    """All inputs are one block before every other, the outputs one behind every other, also with dead ends."""
    profile = make_profile({"y": [], "a": ["x"], "b": ["y"], "dead": ["a"], "c": ["a", "b"]}, kinds={"y": "input"})
    problem = problem_from_graph(profile.graph(1))
    assert problem.blocks[0].nodes == ("x", "y")
    assert problem.blocks[-1].nodes == ("outputs",)
    everything = (1 << len(problem.blocks)) - 1
    assert all(before & 1 for before in problem.predecessors[1:])
    assert problem.predecessors[-1] == everything >> 1


def test_group_takes_what_lies_between(chain_profile):
    """Tied units take along every node on a path between them, and nothing else."""
    problem = problem_from_graph(chain_profile(6, colocate=[("u1", "u3")]).graph(1))
    assert nodes_of(problem) == [("x",), ("u0",), ("u1", "u2", "u3"), ("u4",), ("u5",), ("outputs",)]
    assert problem.blocks[2].static_bytes == 3 * 2_000


def test_crossed_groups_do_not_deadlock(make_profile):
    """Two groups of which each must come before the other become one block."""
    edges = {"a": ["x"], "b": ["x"], "c": ["a"], "d": ["b"], "e": ["c", "d"]}
    problem = problem_from_graph(make_profile(edges, colocate=[("a", "d"), ("b", "c")]).graph(1))
    assert nodes_of(problem) == [("x",), ("a", "b", "c", "d"), ("e",), ("outputs",)]


def test_shared_parameter_keeps_its_readers_together(make_profile):
    """A parameter read by glue, or by several nodes, is where all of its readers are."""
    edges = {"w": [], "a": ["x"], "g": ["a", "w"], "b": ["g"], "h": ["b", "w"], "c": ["h"]}
    profile = make_profile(edges, kinds={"w": "parameter", "g": "glue", "h": "glue"})
    problem = problem_from_graph(profile.graph(1))
    assert nodes_of(problem) == [("x",), ("a",), ("w", "g", "b", "h"), ("c",), ("outputs",)]


def tied(profile, *nodes, name="w", copy_bytes=30, gradient_bytes=10):
    tie = Tie(name=name, nodes=nodes, copy_bytes=copy_bytes, gradient_bytes=gradient_bytes)
    return profile.model_copy(update={"ties": (*profile.ties, tie)})


def of_type(profile, **types):
    """The same profile, with the types of some nodes set and 7 static bytes in each of them."""
    changes = {name: {"type": type_, "buffer_bytes": 7} for name, type_ in types.items()}
    return profile.model_copy(
        update={"nodes": tuple(n.model_copy(update=changes.get(n.name, {})) for n in profile.nodes)}
    )


def test_tie_of_units_leaves_them_apart(chain_profile):
    """Units that share a parameter stay blocks of their own; the tie has their mask, and the first that counts it."""
    problem = problem_from_graph(tied(chain_profile(4), "u0", "u3").graph(1))
    assert nodes_of(problem) == [("x",), ("u0",), ("u1",), ("u2",), ("u3",), ("outputs",)]
    assert problem.ties == (BlockTie("w", 0b010010, 1, 30, 10),)
    assert problem.predecessors == problem_from_graph(chain_profile(4).graph(1)).predecessors


def test_tie_within_one_block_is_none(chain_profile):
    """Users that must share a stage anyway need no second copy."""
    problem = problem_from_graph(tied(chain_profile(4, colocate=[("u1", "u2")]), "u1", "u2").graph(1))
    assert problem.ties == ()


def test_tied_parameter_stays_with_its_first_reader(make_profile):
    """Glue that reads a tied parameter has a copy in its own stage: no order and no tensor comes from the parameter."""
    edges = {"w": [], "a": ["x"], "g": ["a", "w"], "b": ["g"], "h": ["b", "w"], "c": ["h"]}
    profile = make_profile(edges, kinds={"w": "parameter", "g": "glue", "h": "glue"})
    problem = problem_from_graph(tied(profile, "g", "h").graph(1))
    assert nodes_of(problem) == [("x",), ("a",), ("w", "g"), ("b",), ("h",), ("c",), ("outputs",)]
    assert problem.ties == (BlockTie("w", 0b010100, 2, 30, 10),)
    assert "w" not in {crossing.name for crossing in problem.crossings}


def test_embedding_and_glue_share_a_parameter(make_profile):
    """A unit that holds the parameter counts it; the node that the head's glue reads is with the glue."""
    edges = {"embed": ["x"], "body": ["embed"], "w": [], "head": ["body", "w"]}
    profile = make_profile(edges, kinds={"w": "parameter", "head": "glue"})
    problem = problem_from_graph(tied(profile, "embed", "head").graph(1))
    assert nodes_of(problem) == [("x",), ("embed",), ("body",), ("w", "head"), ("outputs",)]
    assert problem.ties == (BlockTie("w", 0b01010, 1, 30, 10),)


def test_parameter_with_a_reader_outside_its_tie_joins_them(make_profile):
    """Copies are kept alike for the users of the tie only: another reader keeps the old rule."""
    edges = {"w": [], "g": ["x", "w"], "b": ["g"], "h": ["b", "w"], "c": ["h"]}
    profile = make_profile(edges, kinds={"w": "parameter", "g": "glue", "h": "glue"})
    for other in (tied(profile, "g", "c"), tied(profile, "g", "h", name="v")):
        assert nodes_of(problem_from_graph(other.graph(1)))[1] == ("w", "g", "b", "h")


@pytest.mark.parametrize("type_", ["buffer", "constant"])
def test_buffers_and_constants_are_copied_to_their_readers(make_profile, type_):
    """Such a node stays with its first reader; the others have a copy of its bytes, and nothing to sum."""
    edges = {"k": [], "a": ["x", "k"], "b": ["a"], "c": ["b", "k"]}
    problem = problem_from_graph(of_type(make_profile(edges, kinds={"k": "parameter"}), k=type_).graph(1))
    assert nodes_of(problem) == [("x",), ("k", "a"), ("b",), ("c",), ("outputs",)]
    assert problem.ties == (BlockTie("k", 0b01010, 1, 7, 0),)
    alone = dataclasses.replace(problem, ties=())
    copies = [problem.memory_bytes(v - 1, 2 * v - 1, 0, 1) - alone.memory_bytes(v - 1, 2 * v - 1, 0, 1) for v in (4, 8)]
    assert copies == [0, 7]
    assert [problem.ties_s(0b01000, device) for device in range(2)] == [0.0, 0.0]


def test_copied_tensor_orders_nothing(make_profile):
    """Two streams that read one constant may be split in either order."""
    edges = {"k": [], "a": ["x", "k"], "b": ["x", "k"]}
    problem = problem_from_graph(of_type(make_profile(edges, kinds={"k": "parameter"}), k="constant").graph(1))
    assert problem.blocks[2].nodes == ("b",)
    assert problem.predecessors[2] == 0b1


def test_buffer_that_is_changed_stays_in_one_place(make_profile):
    """A buffer that an in-place change keeps with its readers has no copies."""
    edges = {"k": [], "a": ["x", "k"], "b": ["a"], "c": ["b", "k"]}
    profile = make_profile(edges, kinds={"k": "parameter"}, colocate=[("k", "a", "c")])
    problem = problem_from_graph(of_type(profile, k="buffer").graph(1))
    assert nodes_of(problem) == [("x",), ("k", "a", "b", "c"), ("outputs",)]
    assert problem.ties == ()


def test_sum_of_a_tie_takes_the_slowest_link(chain_profile):
    """Twice the latency and the gradient's bytes, over the slowest link of the device among those that are used."""
    graph = tied(chain_profile(2, speed={"a": 1.0, "b": 1.0, "c": 1.0}), "u0", "u1", gradient_bytes=40).graph(1)
    graph.graph["links"] |= {("a", "b"): (1.0, 40.0), ("c", "a"): (5.0, 10.0)}
    problem = problem_from_graph(graph)
    assert [problem.ties_s(0b0010, device) for device in (0, 2)] == [2 * (5 + 4), 2 * (5 + 4)]
    assert problem.ties_s(0b0010, 1) == 2 * (1 + 1)
    assert problem_from_graph(graph, devices=["a", "b"]).ties_s(0b0010, 0) == 2 * (1 + 1)
    assert problem.ties_s(0b1111, 0) == problem.ties_s(0b1000, 0) == 0.0
    assert problem.alone(0).ties == ()


def test_blocks_of_random_graphs_are_convex_and_in_order(make_profile):
    """Whatever the groups, blocks partition the nodes, follow the data, and no path leaves one and comes back."""
    random_ = random.Random(3)
    for _ in range(60):
        count = random_.randint(2, 10)
        names = [f"u{i}" for i in range(count)]
        edges = {
            name: sorted({random_.choice(["x", *names[:i]]) for _ in range(random_.randint(1, 3))})
            for i, name in enumerate(names)
        }
        groups = [random_.sample(names, 2) for _ in range(random_.randint(0, 3))]
        graph = make_profile(edges, colocate=groups, microbatches=(1,)).graph(1)
        problem = problem_from_graph(graph)
        block_of = {node: i for i, block in enumerate(problem.blocks) for node in block.nodes}
        assert sorted(block_of) == sorted(graph)
        assert all(block_of[a] <= block_of[b] for a, b in graph.edges)
        assert all(
            problem.predecessors[block_of[b]] >> block_of[a] & 1 for a, b in graph.edges if block_of[a] != block_of[b]
        )
        assert all(before < 1 << v for v, before in enumerate(problem.predecessors))
        assert all(len({block_of[name] for name in group}) == 1 for group in groups)
        for (a, i), (b, j) in itertools.product(block_of.items(), repeat=2):
            if i == j and nx.has_path(graph, a, b):
                between = nx.descendants(graph, a) & nx.ancestors(graph, b)
                assert {block_of[node] for node in between} <= {i}


def test_pins_by_name_and_pattern(chain_profile):
    """A pin names a unit by its path or by a pattern, and leaves its block one device."""
    graph = chain_profile(3).graph(1)
    problem = problem_from_graph(graph, pins={"net.u0": "cpu:1", "*.u[12]": "cpu:0"})
    assert [block.allowed for block in problem.blocks[1:4]] == [(False, True), (True, False), (True, False)]
    assert problem.blocks[0].allowed == (True, True)


@pytest.mark.parametrize(
    ("pins", "says"),
    [
        ({"net.u9": "cpu:0"}, "pin net.u9=cpu:0: no unit matches 'net.u9'"),
        ({"net.u0": "cuda:7"}, "pin net.u0=cuda:7: unknown device cuda:7; the profile has cpu:0, cpu:1"),
        (
            {"net.u1": "cpu:0", "net.u2": "cpu:1"},
            "pins put net.u1 on cpu:0 and net.u2 on cpu:1, but the two must share",
        ),
        ({"net.u0": "cpu:0", "*u0": "cpu:1"}, "pins put net.u0 on both cpu:0 and cpu:1; keep one"),
    ],
)
def test_pins_that_cannot_be(chain_profile, pins, says):
    """A pin to nothing, or two against each other, is refused by name."""
    graph = chain_profile(4, colocate=[("u1", "u2")]).graph(1)
    with pytest.raises(ShardwrightError) as caught:
        problem_from_graph(graph, pins=pins)
    assert says in str(caught.value)


def test_devices_and_memory_are_chosen(chain_profile):
    """A subset of the devices, in the order asked for, with caps in bytes or in words."""
    graph = chain_profile(2, speed={"a": 1.0, "b": 2.0, "c": 4.0}).graph(1)
    problem = problem_from_graph(graph, devices=["c", "a"], memory={"a": "2KiB", "b": 5})
    assert problem.devices == ("c", "a")
    assert problem.caps == (10**9, 2048)
    assert problem.blocks[1].forward_s == (0.25, 1.0)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"devices": ["cpu:7"]}, "unknown device cpu:7; the profile has cpu:0, cpu:1"),
        ({"memory": {"gpu": 1}}, "unknown device gpu"),
        ({"devices": []}, "at least one; got none"),
        ({"devices": ["cpu:0", "cpu:0"]}, "named once each"),
        ({"memory": {"cpu:0": "much"}}, "'much' is not a size in bytes"),
    ],
)
def test_devices_that_cannot_be(chain_profile, options, says):
    """Devices are known, named once, and have a size."""
    with pytest.raises(ShardwrightError) as caught:
        problem_from_graph(chain_profile(2).graph(1), **options)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda g: g.graph["links"].pop(("cpu:1", "cpu:0")), "no link from cpu:1 to cpu:0"),
        (lambda g: g.add_edge("u1", "u0", tensors={}), "the cost graph has a cycle"),
        (lambda g: g.nodes["u0"]["forward_s"].pop("cpu:1"), "no time of u0 on cpu:1"),
        (lambda g: g.graph.update(colocate=[("u0", "u9")]), "colocate names u9, which is not in the cost graph"),
        (lambda g: g.graph.update(ties=[("w", ("u0", "u9"), 1, 1)]), "ties names u9, which is not in the cost graph"),
        (lambda g: g.remove_nodes_from(["u0", "u1"]), "the cost graph has no unit"),
    ],
)
def test_graphs_that_cannot_be(chain_profile, change, says):
    """A graph with a part missing is refused by what is missing: never is an unmeasured unit free."""
    graph = chain_profile(2).graph(1)
    change(graph)
    with pytest.raises(ShardwrightError) as caught:
        problem_from_graph(graph)
    assert says in str(caught.value)


def test_transfers_go_both_ways_of_the_link(chain_profile):
    """Activations take the link forward, gradients the link back, and each tensor pays the latency."""
    graph = chain_profile(2).graph(1)
    graph.graph["links"] = {("cpu:0", "cpu:1"): (1.0, 40.0), ("cpu:1", "cpu:0"): (5.0, 10.0)}
    problem = problem_from_graph(graph)
    assert problem.transfer_s(problem.crossing(0b1), 0, 1) == (1.0 + 80 / 40, 0.0)
    assert problem.transfer_s(problem.crossing(0b11), 0, 1) == (1.0 + 80 / 40, 5.0 + 80 / 10)


def test_memory_is_weights_and_what_is_in_flight(chain_profile):
    """A stage holds weights, the engine's buffers, and for each micro-batch in flight what is saved and sent."""
    problem = problem_from_graph(chain_profile(4).graph(4))
    weights, saved, tensor = 2_000, 200, 20
    # Blocks: input, u0 to u3, outputs. The buffers: 4 tensors that come, 4 gradients that come back.
    buffers = 4 * (tensor + tensor)
    walked = 2 * saved + tensor + tensor  # the gradient of u2 is made by u3, or u2 is held while u3 runs
    assert problem.memory_bytes(0b000111, 0b011111, 0, 1) == (
        2 * weights + buffers + 2 * tensor + (2 * saved + tensor) + walked
    )


def test_one_device_alone(chain_profile):
    """The same work on the second device by itself, free of pins."""
    graph = chain_profile(2, speed={"cpu:0": 1.0, "cpu:1": 2.0}).graph(1)
    alone = problem_from_graph(graph, pins={"net.u0": "cpu:0"}, memory={"cpu:1": 77}).alone(1)
    assert (alone.devices, alone.caps, alone.most_stages) == (("cpu:1",), (77,), 1)
    assert alone.blocks[1].forward_s == (0.5,)
    assert alone.blocks[1].allowed == (True,)
