"""Updates of parameters that several nodes use: once on each device, whoever uses them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwright.profiler.profile import Tie
from shardwright.profiler.shared_updates import Shared, once_each
from shardwright.sharder.planning.formulation.blocks import problem_from_graph
from shardwright.sharder.planning.planner import plan
from shardwright.sharder.planning.problem import bits


def test_a_module_that_is_called_twice_is_updated_once():
    """Its second call owns nothing, and is no user of what it shares with others."""
    times = {"block": {"cpu": 4.0}, "block#2": {"cpu": 8.0}, "head": {"cpu": 1.0}}
    units = {"block": "block", "block#2": "block", "head": "head"}
    own = {"block": {"cpu": 4.0}, "block#2": {"cpu": 0.0}, "head": {"cpu": 1.0}}
    assert once_each(times, {"block": 80, "head": 5}, [], units) == (own, [])
    tied = [Shared(["block", "block#2", "head"], 20), Shared(["block", "block#2"], 60)]
    updates = once_each(times, {"block": 80, "head": 5}, tied, units)
    assert updates.own == own | {"head": {"cpu": pytest.approx(0.2)}}
    assert updates.copies == [{"cpu": pytest.approx(0.8)}, {"cpu": 3.0}]


def test_a_part_of_a_later_user_is_its_own():
    """By the bytes of its gradients."""
    updates = once_each(
        {"embed": {"cpu": 3.0}, "head": {"cpu": 8.0}}, {"embed": 30, "head": 10}, [Shared(["embed", "head"], 30)], {}
    )
    assert updates.own == {"embed": {"cpu": 3.0}, "head": {"cpu": 2.0}}
    assert updates.copies == [{"cpu": 6.0}]


def test_glue_that_uses_a_parameter_of_a_unit_has_a_copy_to_update():
    """On another device; its share of the unit's update, which stays the unit's."""
    updates = once_each({"embed": {"a": 4.0, "b": 8.0}, "glue": {}}, {"embed": 40}, [Shared(["embed", "glue"], 10)], {})
    assert updates.own == {"embed": {"a": 4.0, "b": 8.0}, "glue": {}}
    assert updates.copies == [{"a": 1.0, "b": 2.0}]


def test_an_update_is_where_the_bytes_are_counted():
    """With the first user, though glue was not timed with it; the units after it update a copy where they are apart."""
    times = {"glue": {}, "a": {"cpu": 1.0}, "b": {"cpu": 4.0}}
    updates = once_each(times, {"a": 0, "b": 5}, [Shared(["glue", "a", "b"], 5)], {})
    assert updates.own == {"glue": {"cpu": 1.0}, "a": {"cpu": 0.0}, "b": {"cpu": 2.0}}
    assert updates.copies == [{"cpu": 2.0}]


def test_what_is_not_trained_is_not_updated():
    """Nor what was not timed."""
    times = {"a": {"cpu": 1.0}, "b": {"cpu": 2.0}}
    assert once_each(times, {"a": 5, "b": 5}, [Shared(["a", "b"], 0)], {}) == (times, [{}])
    assert once_each({}, {}, [Shared(["a", "b"], 3)], {}) == ({}, [{}])


def test_calls_of_a_module_in_any_order_are_updated_once():
    """By the one that has its bytes, or else by the first."""
    times, units = {"u#2": {"cpu": 5.0}, "u": {"cpu": 5.0}}, {"u": "u", "u#2": "u"}
    assert once_each(times, {"u": 3, "u#2": 0}, [], units).own == {"u#2": {"cpu": 0.0}, "u": {"cpu": 5.0}}
    assert once_each(times, {}, [], units).own == {"u#2": {"cpu": 5.0}, "u": {"cpu": 0.0}}


SIZES = st.integers(1, 9)


@given(st.lists(SIZES, min_size=1, max_size=4), st.lists(st.tuples(SIZES, st.sets(st.integers(0, 3))), max_size=4))
def test_all_on_one_device_take_what_all_parameters_take(own, shared):
    """Where an update takes a second a byte: those that are shared once, and on two devices once on each."""
    nodes = [f"n{number}" for number in range(len(own))]
    ties = [Shared(users, size) for size, on in shared if len(users := [n for n in nodes if int(n[1]) in on]) > 1]
    held = {
        node: size + sum(t.gradient_bytes for t in ties if node in t.users)
        for node, size in zip(nodes, own, strict=True)
    }
    counted = {
        node: size + sum(t.gradient_bytes for t in ties if node == t.users[0])
        for node, size in zip(nodes, own, strict=True)
    }
    updates = once_each({node: {"d": float(size)} for node, size in held.items()}, counted, ties, {})
    assert sum(seconds["d"] for seconds in updates.own.values()) == pytest.approx(sum(counted.values()))
    assert [copy["d"] for copy in updates.copies] == pytest.approx([t.gradient_bytes for t in ties])


def tied(profile, *users):
    """The same profile, with units that share their 6 bytes of gradients, counted at the first."""
    nodes = (
        n.model_copy(update={"grad_bytes": 6 if n.name == users[0] else 0}) if n.name in users else n
        for n in profile.nodes
    )
    tie = Tie(name="w", nodes=users, copy_bytes=18, gradient_bytes=6)
    return profile.model_copy(update={"nodes": tuple(nodes), "ties": (tie,)})


def timed(profile, update_s):
    """The same profile with these seconds of each unit's update on all devices."""
    rows = (m.model_copy(update={"update_s": update_s.get(m.node, 0.0)}) for m in profile.measurements)
    return profile.model_copy(update={"measurements": tuple(rows)})


def test_tied_units_are_updated_once_on_each_device(chain_profile):
    """In the planner's problem, in the plan of one device and of two, and in the profile's own sum."""
    update_s = {f"u{number}": 5.0 for number in range(4)}
    profile = timed(tied(chain_profile(4), "u0", "u1", "u2", "u3"), update_s)
    before = timed(profile, {}).step_s("cpu:0", 2)
    assert profile.step_s("cpu:0", 2) == before + 5.0
    ties = tuple(tie.model_copy(update={"nodes": tie.nodes[::-1]}) for tie in profile.ties)
    assert profile.model_copy(update={"ties": ties}).step_s("cpu:0", 2) == before + 5.0
    problem = problem_from_graph(profile.graph(2))
    assert [block.update_s for block in problem.blocks] == [(0.0, 0.0), (5.0, 5.0), *[(0.0, 0.0)] * 4]
    assert problem.ties[0].update_s == (5.0, 5.0)
    units = [v for v, block in enumerate(problem.blocks) if block.units]
    whole = sum(1 << v for v in bits(sum(1 << v for v in units)))
    assert problem.copies_s(whole, 0) == problem.copies_s(1 << units[0], 0) == problem.copies_s(1, 0) == 0.0
    assert problem.copies_s(1 << units[1] | 1 << units[2], 1) == 5.0
    alone = plan(profile, microbatches=2, devices=["cpu:0"])
    assert [stage.update_s for stage in alone.stages] == [5.0]
    assert alone.predicted.step_s == pytest.approx(profile.step_s("cpu:0", 2))
    pins = {"net.u0": "cpu:0", "net.u3": "cpu:1"}
    apart = plan(profile, microbatches=2, pins=pins)
    assert [stage.update_s for stage in apart.stages] == [5.0, 5.0]
    free = plan(profile, microbatches=2, pins=pins, contiguous=False)
    assert [stage.update_s for stage in free.stages] == [5.0, 5.0]


def test_a_looped_block_is_updated_once(chain_profile):
    """Its calls share a device; in the planner's problem and in the profile's own sum."""
    profile = timed(chain_profile(4), {f"u{number}": 5.0 for number in range(4)})
    before = timed(profile, {}).step_s("cpu:0", 2)
    assert profile.step_s("cpu:0", 2) == before + 20.0
    calls = {"u1": {"unit": "net.u1", "grad_bytes": 9}, "u2": {"unit": "net.u1", "grad_bytes": 0}}
    nodes = tuple(n.model_copy(update=calls.get(n.name, {})) for n in profile.nodes)
    profile = profile.model_copy(update={"nodes": nodes, "colocate": (("u1", "u2"),)})
    assert profile.step_s("cpu:0", 2) == before + 15.0
    problem = problem_from_graph(profile.graph(2))
    assert [block.update_s[0] for block in problem.blocks] == [0.0, 5.0, 5.0, 5.0, 0.0]


def test_a_parameter_that_no_unit_holds_is_updated_where_its_copies_are(make_profile):
    """It is timed with its own node, which is where its first reader is."""
    edges = {"w": [], "a": ["x"], "g": ["a", "w"], "b": ["g"], "h": ["b", "w"], "c": ["h"]}
    profile = make_profile(edges, kinds={"w": "parameter", "g": "glue", "h": "glue"})
    rows = [m for m in profile.measurements if m.node == "a"]
    rows = tuple(m.model_copy(update={"node": "w", "forward_s": 0.0, "backward_s": 0.0, "update_s": 3.0}) for m in rows)
    tie = Tie(name="w", nodes=("g", "h"), copy_bytes=12, gradient_bytes=4)
    profile = profile.model_copy(update={"measurements": profile.measurements + rows, "ties": (tie,)})
    problem = problem_from_graph(profile.graph(1))
    (tie,) = problem.ties
    assert set(tie.update_s) == {3.0}
    work_s = sum(problem.work_s(v, 0) for v in range(len(problem.blocks)))
    assert profile.step_s("cpu:0", 1) == pytest.approx(work_s)
    assert [block.nodes for block in problem.blocks if any(block.update_s)] == [("w", "g")]
