"""Costs that a person writes: short forms, planned and reported without a model or torch, and every slip named."""

from __future__ import annotations

import copy
import json
import math
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from torch import nn

import shardwright as sw
from shardwright.errors import ShardwrightError
from shardwright.profiler.formats.costs import Costs, CostsOfDevice, CostsOfLink, CostsOfUnit

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "costs.json"
SHORT: dict[str, Any] = {
    "format": "shardwright.costs",
    "version": 1,
    "devices": {"a": {}, "b": {"memory_bytes": 80e9}},
    "units": [
        {"name": "body", "forward_s": 1e-3, "backward_s": {"a": 2e-3, "b": 3e-3}, "output_bytes": 1e6},
        {"name": "head", "forward_s": {"a": 1e-3, "b": 2e-3}, "backward_s": 2e-3},
    ],
}


def parsed(content: Any) -> Costs:
    return Costs.parse(json.dumps(content), source="costs.json")


def test_short_forms():
    """A number is for all devices, a unit reads the one before it, micro-batches are one a device, transfers free."""
    graph = parsed(SHORT).profile().graph(2)
    assert graph.nodes["body"]["forward_s"] == {"a": 1e-3, "b": 1e-3}
    assert graph.nodes["body"]["backward_s"] == {"a": 2e-3, "b": 3e-3}
    assert list(graph.edges(data="tensors")) == [("body", "head", {"body": (10**6, 10**6)})]
    assert graph.graph["devices"]["b"]["memory_bytes"] == 80 * 10**9
    assert graph.graph["links"] == {("a", "b"): (0.0, math.inf), ("b", "a"): (0.0, math.inf)}
    assert graph.graph["train"]
    plan = sw.plan(parsed(SHORT).profile())
    assert len(plan.stages) == 2
    assert plan.certificate.value_s == pytest.approx(2 * 4e-3)


def test_units_that_read_nothing_stand_side_by_side():
    """An empty list of inputs starts another branch."""
    content = copy.deepcopy(SHORT)
    content["units"].append({"name": "other", "inputs": [], "forward_s": 0, "backward_s": 0})
    content["units"].append({"name": "join", "inputs": ["other", "head"], "forward_s": 0, "backward_s": 0})
    assert set(parsed(content).graph().edges) == {("body", "head"), ("other", "join"), ("head", "join")}


@pytest.mark.parametrize(
    ("links", "forth", "back"),
    [
        ([{"latency_s": 0.5, "bandwidth_bytes_per_s": 8}], (0.5, 8.0), (0.5, 8.0)),
        ([{"between": ["b", "a"], "bandwidth_bytes_per_s": 4}], (0.0, 4.0), (0.0, 4.0)),
        ([{"bandwidth_bytes_per_s": 8}, {"source": "b", "target": "a", "bandwidth_bytes_per_s": 2}], (0, 8), (0, 2)),
    ],
)
def test_links_both_ways_one_way_and_for_all_others(links, forth, back):
    """A link between two is both ways, one with source and target one way, one without ends for what is left."""
    assert parsed(SHORT | {"links": links}).profile().graph(2).graph["links"] == {("a", "b"): forth, ("b", "a"): back}


def unit(at: int, **changes: Any) -> dict[str, Any]:
    content = copy.deepcopy(SHORT)
    content["units"][at] = {k: v for k, v in (content["units"][at] | changes).items() if v is not None}
    return content


def link(*links: dict[str, Any]) -> dict[str, Any]:
    return SHORT | {"links": [{"bandwidth_bytes_per_s": 1e9} | one for one in links]}


# fmt: off
MISTAKES = [
    (unit(1, foward_s=1), "has unit head: foward_s, a field that costs do not have; correct it; docs/costs.md lists"),
    (SHORT | {"device": {}}, "costs.json has device, a field that costs do not have"),
    (link({"bandwith": 3}), "costs.json has links.0.bandwith, a field that costs do not have"),
    (SHORT | {"devices": {"a": {"memory": 3}}}, "costs.json has devices.a.memory, a field that costs do not have"),
    (unit(1, forward_s=None), "costs.json is not right: unit head: forward_s: it is missing; correct it"),
    (unit(1, forward_s="1 ms"), "is not right: unit head: forward_s: Input should be a valid number"),
    (unit(1, forward_s=-1), "is not right: unit head: forward_s: Input should be greater than or equal to 0"),
    (unit(1, backward_s={"a": -1, "b": 1}), "is not right: unit head: backward_s"),
    (unit(1, saved_bytes=0.5), "is not right: unit head: saved_bytes: Input should be a valid integer"),
    (unit(1, name=""), "is not right: units.1.name: String should have at least 1 character"),
    (SHORT | {"units": []}, "is not right: units: it has 0, and needs 1 or more"),
    (SHORT | {"devices": {}}, "is not right: devices: it has 0, and needs 1 or more"),
    (SHORT | {"microbatches": 0}, "is not right: microbatches: Input should be greater than 0"),
    (link({"between": ["a", "b"], "source": "a", "target": "b"}), "is not right: links.0: a link has source and"),
    (link({"source": "a"}), "is not right: links.0: a link has source and target, or between, or neither"),
    (link({"bandwidth_bytes_per_s": 0}), "is not right: links.0.bandwidth_bytes_per_s: Input should be greater than 0"),
    (link({}, {}), "costs.json: two links name no devices; one at most is for all other pairs"),
    (link({"between": ["a", "b"]}, {"source": "b", "target": "a"}), "link b -> a is there twice; keep one of them"),
    (link({"source": "a", "target": "b"}), "costs.json: link b -> a is missing; give every ordered pair"),
    (link({"between": ["a", "c"]}), "costs.json: graph attribute links has ('a', 'c'), not a pair of the devices a, b"),
    (unit(1, name="body"), "costs.json: unit body is there twice; give each unit a name of its own"),
    (unit(0, inputs=["head"]), "costs.json: unit body reads head, which is no unit before it; correct inputs"),
    (unit(1, inputs=["neck"]), "costs.json: unit head reads neck, which is no unit before it"),
    (unit(1, forward_s={"a": 1}), "costs.json: node head: forward_s has no time on b; give one for each device"),
    (unit(1, forward_s={"a": 1, "b": 1, "c": 1}), "costs.json: node head: forward_s names c; the devices are a, b"),
    (unit(1, backward_s=None), "costs.json: node head: backward_s is missing"),
    (SHORT | {"train": False}, "costs.json: node body: backward_s is 0.003, but train is False: leave it out"),
    (unit(1, static_bytes=1, param_bytes=2), "costs.json: node head: param_bytes is 2, more than static_bytes, 1"),
    (SHORT | {"colocate": [["body", "tail"]]}, "costs.json: graph attribute colocate names tail, which is not a node"),
    (SHORT | {"version": 2}, "costs.json has costs version 2; this shardwright reads up to 1: upgrade"),
    (SHORT | {"format": "costs"}, "costs.json is not a costs: its format is 'costs', expected 'shardwright.costs'"),
]
# fmt: on


@pytest.mark.parametrize(("content", "says"), MISTAKES, ids=[says[:60] for _, says in MISTAKES])
def test_a_mistake_is_one_clear_line(content, says):
    """A slip of the pen is named by its unit and field, with what to do."""
    with pytest.raises(ShardwrightError) as caught:
        parsed(content)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_half_a_file_is_to_be_corrected_not_made_again():
    """Costs are written by a person: nothing can make them again."""
    with pytest.raises(
        ShardwrightError, match=r"is not complete JSON \(.*\); correct it; docs/costs.md lists the fields"
    ):
        Costs.parse('{"format": ', source="costs.json")


def test_example_obeys_the_published_schema():
    """examples/costs.json and the short form are accepted by docs/schema; a misspelt field is not."""
    schema = json.loads((ROOT / "docs/schema/costs.schema.json").read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(json.loads(EXAMPLE.read_text(encoding="utf-8")), schema)
    jsonschema.validate(SHORT, schema)
    with pytest.raises(jsonschema.ValidationError, match="foward_s"):
        jsonschema.validate(unit(1, foward_s=1), schema)


def test_saved_costs_are_read_back(tmp_path):
    """Costs survive their file."""
    costs = Costs.load(EXAMPLE)
    costs.save(tmp_path / "again.json")
    assert Costs.load(tmp_path / "again.json") == costs


def test_the_page_shows_what_is_printed(run_cli, tmp_path):
    """docs/costs.md has the example file as it is, and what planning it prints."""
    page = (ROOT / "docs/costs.md").read_text(encoding="utf-8")
    assert EXAMPLE.read_text(encoding="utf-8") in page
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples" / "costs.json").write_text(EXAMPLE.read_text(encoding="utf-8"), encoding="utf-8")
    done = run_cli("shard", "--profile", "examples/costs.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "\n".join(line.rstrip() for line in done.stdout.splitlines()) in page
    assert sw.Plan.load(tmp_path / "costs.plan.json") == sw.plan(Costs.load(EXAMPLE).profile())


def test_the_graph_on_the_page_can_be_planned():
    """The Python on the page runs as it stands, and splits its graph."""
    page = (ROOT / "docs/costs.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict[str, Any] = {}
    exec(program, names)
    assert [stage.units for stage in names["plan"].stages] == [("embed", "body"), ("head",)]


def test_the_page_lists_every_attribute(make_profile):
    """docs/costs.md has each field of the file and each attribute of a profile's graph, nodes and edges."""
    page = (ROOT / "docs/costs.md").read_text(encoding="utf-8")
    graph = make_profile({"a": ["x"]}).graph()
    fields = [name for record in (Costs, CostsOfDevice, CostsOfLink, CostsOfUnit) for name in record.model_fields]
    attributes = [*graph.graph, *graph.graph["devices"]["cpu:0"], *graph.nodes["a"], *graph.edges["x", "a"]]
    columns = list(make_profile({"a": ["x"]}).frame().columns)
    missing = {name for name in [*fields, *attributes, *columns] if f"`{name}`" not in page and f'"{name}"' not in page}
    assert not missing


def test_planning_costs_needs_no_torch(run_cli, tmp_path):
    """From the file to the printed plan nothing imports torch, pandas or networkx."""
    program = (
        "import sys\nfrom shardwright.cli import main\n"
        f"try:\n    main(['shard', '--profile', {str(EXAMPLE)!r}])\n"
        "except SystemExit as error:\n    assert not error.code, error.code\n"
        "slow = {'torch', 'pandas', 'networkx'} & set(sys.modules)\n"
        "assert not slow, slow\n"
    )
    done = run_cli.python("-c", program, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "cuda:0" in done.stdout


def test_a_plan_of_costs_places_nothing():
    """Placing, verifying and running such a plan are refused before anything happens to the model."""
    plan = sw.plan(parsed(SHORT).profile())
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    x = torch.zeros(2, 2)
    says = r"the plan was made from costs \(costs\), not from a model's profile, so it cannot be placed or run: profile"
    for act in (
        lambda: sw.place(model, plan),
        lambda: sw.verify(model, plan, args=(x,)),
        lambda: sw.run(model, plan, args=(x,)),
    ):
        with pytest.raises(ShardwrightError, match=says):
            act()


def test_order_alone_sends_nothing():
    """B and c are free of each other; where c has to come first, so does its device, and no link is paid for it."""
    units = [
        {"name": "a", "forward_s": 1.0, "output_bytes": 1},
        {"name": "c", "forward_s": 3.0, "inputs": ["a"]},
        {"name": "b", "forward_s": 3.0, "inputs": ["a"], "after": ["c"]},
    ]
    content = {
        "format": "shardwright.costs", "version": 1, "train": False, "devices": {"x": {}, "y": {}}, "units": units,
        "links": [{"bandwidth_bytes_per_s": 1e9, "latency_s": 0.25}],
    }  # fmt: skip
    plan = sw.plan(sw.Costs.parse(json.dumps(content), source="here").profile(), microbatches=2)
    assert [stage.units for stage in plan.stages] == [("a", "c"), ("b",)]
    free = json.loads(json.dumps(content).replace('"after": ["c"]', '"after": []'))
    graph = sw.Costs.parse(json.dumps(free), source="here").graph()
    graph.add_edge("c", "b", tensors={})
    assert [stage.units for stage in sw.plan(graph).stages] == [("a", "c"), ("b",)]
    assert plan.certificate.value_s == 2 * (1.0 + 3.0 + 0.25 + 1e-9)
    with pytest.raises(sw.ShardwrightError, match="unit c comes after b, which is no unit before it; correct after"):
        sw.Costs.parse(json.dumps(content).replace('"name": "c",', '"name": "c", "after": ["b"],'), source="here")


def test_how_sure_times_are_makes_a_plan_say_how_it_moves():
    """From a file and from a graph alike; of what nothing is said nothing is drawn."""
    content = json.loads(EXAMPLE.read_text(encoding="utf-8"))
    assert sw.plan(Costs.parse(json.dumps(content), source="here").profile()).sensitivity is None
    for unit in content["units"]:
        unit["median_error"] = 0.1
    costs = Costs.parse(json.dumps(content), source="here")
    plan, of_graph = sw.plan(costs.profile(), replans=3), sw.plan(costs.graph(), replans=3)
    assert plan.sensitivity is not None
    assert plan.sensitivity.replans is not None
    assert of_graph.sensitivity == plan.sensitivity
    graph = costs.graph()
    graph.nodes["decoder"]["median_error"] = "often"
    with pytest.raises(ShardwrightError, match="node decoder: median_error is 'often'; give a part"):
        sw.plan(graph)


def test_a_variation_is_a_row_of_times():
    graph = Costs.load(EXAMPLE).graph()
    graph.graph["devices"]["cuda:0"]["variation"] = 0.1
    with pytest.raises(ShardwrightError, match=r"variation is 0\.1; give times relative to the median"):
        sw.plan(graph)


def at_count(count: int, forward_s: float, **changes: Any) -> dict[str, Any]:
    """Costs of one micro-batch of ``count``, whose two units take ``forward_s`` each, and twice that backward."""
    unit = {
        "forward_s": forward_s,
        "backward_s": 2 * forward_s,
        "saved_bytes": 800 // count,
        "output_bytes": 80 // count,
    }
    units = [{"name": name, **unit, "param_bytes": 100} for name in ("body", "head")]
    return {**SHORT, "microbatches": count, "devices": {"a": {}, "b": {}}, "units": units} | changes


@pytest.mark.parametrize(("times", "best"), [((4.0, 1.0), 8), ((4.0, 3.9), 2)])
def test_costs_of_several_numbers_are_compared(times, best):
    """A step of M micro-batches over two equal stages is (M + 1) of them: 9 x 3 s beat 3 x 12 s, and not 9 x 11.7 s."""
    counts = (2, 8)
    costs = [parsed(at_count(count, forward_s)) for count, forward_s in zip(counts, times, strict=True)]
    plan = sw.plan(costs)
    assert plan.microbatches == best
    each = [sw.plan(one) for one in costs]
    assert plan.predicted.step_s == min(one.predicted.step_s for one in each)
    assert plan.predicted.step_s == pytest.approx((best + 1) * 3 * times[counts.index(best)])
    assert {(c.microbatches, c.step_s) for c in plan.candidates} == {
        (one.microbatches, one.predicted.step_s) for one in each
    }
    assert [stage.memory_bytes for stage in plan.stages] == [s.memory_bytes for s in each[counts.index(best)].stages]
    assert sw.plan(costs, microbatches=2).microbatches == 2


def test_one_device_counts_at_each_number():
    """Where the larger number is much the faster one, one device is priced at that too: 2 x 2 x 3 s, and not 2 x 27."""
    slow = [{"latency_s": 10.0, "bandwidth_bytes_per_s": 1e9}]
    costs = [parsed(at_count(1, 9.0, links=slow)), parsed(at_count(2, 1.0, links=slow))]
    for kept in (costs, costs[1:]):
        plan = sw.plan(kept)
        assert (plan.microbatches, len(plan.stages)) == (2, 1)
        assert plan.predicted.step_s == plan.predicted.baseline_s == pytest.approx(12)


def test_the_command_takes_several_files(run_cli, tmp_path):
    """In any order; the plan is named for the first."""
    for name, count, forward_s in (("some", 8, 1.0), ("few", 2, 4.0)):
        (tmp_path / f"{name}.json").write_text(json.dumps(at_count(count, forward_s)))
    done = run_cli("shard", "--profile", "some.json", "--profile", "few.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert sw.Plan.load(tmp_path / "some.plan.json").microbatches == 8
    (tmp_path / "other.json").write_text(json.dumps(at_count(8, 2.0)))
    done = run_cli("shard", "--profile", "some.json", "--profile", "other.json", cwd=tmp_path)
    assert done.returncode == 2
    assert "two of the costs are of 8 micro-batches; give one of each number" in done.stderr


LINK = {"latency_s": 0.0, "bandwidth_bytes_per_s": 1e9}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"train": False, "units": [{"name": "body", "forward_s": 1.0}, {"name": "head", "forward_s": 1.0}]},
            "train: True at 2 micro-batches and False at 8; only times and bytes of a micro-batch may differ",
        ),
        ({"devices": {"a": {}, "c": {}}}, "devices: a, b at 2 micro-batches and a, c at 8;"),
        (
            {"devices": {"a": {"memory_bytes": 5}, "b": {}}},
            f"device a: memory_bytes: {2**60} at 2 micro-batches and 5 at 8;",
        ),
        ({"links": [LINK]}, "links: none at 2 micro-batches and link a -> b, link b -> a at 8;"),
        ({"units": at_count(8, 1.0)["units"][:1]}, "units: body, head at 2 micro-batches and body at 8;"),
        (
            {"units": [at_count(8, 1.0)["units"][0], {**at_count(8, 1.0)["units"][1], "param_bytes": 7}]},
            "unit head: param_bytes: 100 at 2 micro-batches and 7 at 8;",
        ),
        ({"colocate": [["body", "head"]]}, "colocate: none at 2 micro-batches and ('body', 'head') at 8;"),
    ],
)
def test_costs_that_are_not_of_one_model_are_refused(changes, says):
    """The first thing that differs is named, with both values."""
    with pytest.raises(ShardwrightError, match=f"^{re.escape(says)}"):
        sw.plan([parsed(at_count(2, 1.0)), parsed(at_count(8, 1.0, **changes))])


def test_profiles_are_not_put_together(make_profile):
    """What was measured has all numbers in one profile."""
    profile = make_profile({"a": ["x"], "b": ["a"]})
    with pytest.raises(ShardwrightError, match="was profiled, and several profiles are put together of costs only"):
        sw.plan([profile, parsed(SHORT)])
    with pytest.raises(ShardwrightError, match="no costs to plan"):
        sw.plan([])
