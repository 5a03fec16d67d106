"""Units that share a device because somebody says so."""

from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardwright.errors import ShardwrightError
from shardwright.profiler.formats.costs import Costs
from shardwright.profiler.formats.graphml import flat_graph
from shardwright.profiler.graph import cost_graph
from shardwright.sharder.planning.formulation.blocks import problem_from_graph
from shardwright.sharder.planning.planner import plan
from shardwright.sharder.planning.schedules.simulate import StageCost, simulate


@pytest.mark.parametrize(
    ("together", "expected"),
    [
        (["net.u[01]"], [("u0", "u1"), ("u2",), ("u3",)]),
        ("net.u[01]", [("u0", "u1"), ("u2",), ("u3",)]),
        ([["net.u0", "net.u2"]], [("u0", "u1", "u2"), ("u3",)]),
        (["net.u[01]", "net.u[12]"], [("u0", "u1", "u2"), ("u3",)]),
        (["net.u3"], [("u0",), ("u1",), ("u2",), ("u3",)]),
        (["net"], [("u0", "u1", "u2", "u3")]),  # a module has the units that are in it
    ],
)
def test_groups_become_blocks(chain_profile, together, expected):
    """The units of a group are one block with all that lies between them; groups with a common unit are one."""
    problem = problem_from_graph(chain_profile(4).graph(1), together=together)
    assert [block.nodes for block in problem.blocks[1:-1]] == expected


def test_freely_a_group_takes_nothing_along(chain_profile):
    """Where there is no chain of stages, what lies between the units of a group may be elsewhere, by a pin or not."""
    profile = chain_profile(3, forward_s={"u0": 1.0, "u1": 2.0, "u2": 1.0}, train=False, microbatches=(4,))
    group = [["net.u0", "net.u2"]]
    for pins in ({}, {"net.u0": "cpu:0", "net.u1": "cpu:1"}):
        freely = plan(profile, contiguous=False, together=group, pins=pins)
        found = freely.placement()
        assert found["net.u0"] == found["net.u2"] != found["net.u1"]
        assert freely.certificate.value_s == pytest.approx(2.0, rel=0.01)
    assert len(plan(profile, together=group).devices) == 1
    assert len(plan(profile, objective="latency", together=group).devices) == 1  # which runs a block without a pause


@given(st.data())
@settings(max_examples=30, deadline=None, derandomize=True)
def test_free_assignments_keep_to_groups_and_to_nothing_else(data):
    """Brute force over all assignments in which each group is on one device; no transfers, ample memory."""
    times = data.draw(st.lists(st.integers(1, 9), min_size=3, max_size=6))
    names = [f"u{i}" for i in range(len(times))]
    groups = data.draw(st.lists(st.lists(st.sampled_from(names), min_size=2, max_size=3, unique=True), max_size=2))
    costs = Costs.model_validate(
        {
            "train": False,
            "microbatches": 2,
            "devices": {"a": {}, "b": {}, "c": {}},
            "units": [{"name": name, "forward_s": time} for name, time in zip(names, times, strict=True)],
            "colocate": groups,
        }
    )
    least = min(
        max(2 * sum(time for time, on in zip(times, of, strict=True) if on == device) for device in of)
        for of in itertools.product("abc", repeat=len(times))
        if all(len({of[names.index(name)] for name in group}) == 1 for group in groups)
    )
    found = plan(costs, contiguous=False)
    assert found.certificate.exact
    assert found.certificate.value_s == pytest.approx(least)
    assert all(len({found.placement()[name] for name in group}) == 1 for group in groups)


def test_no_plan_cuts_a_group(chain_profile):
    """Three of four units that must share a device leave one for the other."""
    result = plan(chain_profile(4), microbatches=4, together=["net.u[0-2]"])
    assert [len(stage.units) for stage in result.stages] == [3, 1]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"together": ["net.u0", "net.x*"]}, "together net.x*: no unit matches 'net.x*'; `profile` lists the units"),
        (
            {"together": [["net.u0", "net.u2"]], "pins": {"net.u0": "cpu:0", "net.u2": "cpu:1"}},
            "together net.u0,net.u2 has net.u0, which is pinned to cpu:0, and net.u2, which is pinned to cpu:1",
        ),
        (
            {"together": [["net.u0", "net.u2"]], "pins": {"net.u0": "cpu:0", "net.u1": "cpu:1"}},
            "pins put net.u0 on cpu:0 and net.u1 on cpu:1, but the two must share a device, as what lies between units",
        ),
    ],
)
def test_groups_that_cannot_be(chain_profile, options, says):
    """A pattern that matches nothing, and pins against a group, are refused by name."""
    with pytest.raises(ShardwrightError) as caught:
        problem_from_graph(chain_profile(4).graph(1), **options)
    assert says in str(caught.value)


def given_costs(**devices):
    units = [
        {"name": f"u{i}", "forward_s": 1.0, "backward_s": 1.0, "output_bytes": 8, "inputs": inputs}
        for i, inputs in enumerate(([], ["u0"], ["u0", "u1"]))
    ]
    content = {
        "format": "shardwright.costs",
        "version": 1,
        "microbatches": 4,
        "devices": {"cpu:0": {}, "cpu:1": {}, "cpu:2": {}} | devices,
        "links": [{"bandwidth_bytes_per_s": 16.0}, {"between": ["cpu:0", "cpu:1"], "bandwidth_bytes_per_s": 8.0}],
        "units": units,
    }
    return Costs.parse(json.dumps(content), source="costs.json").profile()


def test_ways_to_the_host_are_given_or_those_of_the_slowest_link():
    """A device says its way, or that it is in the host's memory, or else its slowest link counts; GraphML keeps it."""
    own = {
        "cpu:1": {"host_latency_s": 0.5, "host_bandwidth_bytes_per_s": 4.0},
        "cpu:2": {"in_host_memory": True},
    }
    profile = given_costs(**own)
    problem = problem_from_graph(cost_graph(profile, 4), transfers="staged")
    assert problem.ways == (((0.0, 8.0),) * 2, ((0.5, 4.0),) * 2, ((0.0, float("inf")),) * 2)
    assert problem_from_graph(cost_graph(given_costs(), 4)).ways[2] == ((0.0, 16.0),) * 2
    result = plan(profile, transfers="staged")
    assert result == plan(flat_graph(cost_graph(profile, 4)), transfers="staged")


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("transfers", ["relayed", "staged", "direct"])
def test_the_record_says_what_was_taken(transfers, overlap):
    """Transfers, loads and step of a plan are those of its own stages."""
    result = plan(given_costs(), transfers=transfers, overlap=overlap)
    assert (result.transfers, result.overlap) == (transfers, overlap)
    fields = [name for name in StageCost.__dataclass_fields__ if name in type(result.stages[0]).model_fields]
    costs = [StageCost(**{name: getattr(stage, name) for name in fields}) for stage in result.stages]
    rules = {"transfers": "overlapped" if overlap else "serial", "staged": transfers == "staged"}
    timeline = simulate(costs, result.microbatches, schedule=result.schedule, **rules)
    assert timeline.step_s == pytest.approx(result.predicted.step_s)
    if not overlap:
        assert timeline.busy_s == pytest.approx([stage.load_s for stage in result.stages])
    assert max(stage.load_s for stage in result.stages) == result.certificate.value_s
    assert result.predicted.step_s >= result.certificate.value_s * (1 - 1e-9)


def test_unknown_transfers_are_refused():
    """With what there is."""
    with pytest.raises(ShardwrightError, match="transfers 'teleport' is not known; the planner has: relayed, staged"):
        plan(given_costs(), transfers="teleport")
