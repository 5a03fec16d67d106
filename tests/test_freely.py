"""Plans that are no chain of stages, and the objectives latency and memory: records, files, reports, refusals."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch
from reported import text_of

import shardwright as sw
from shardwright.reports.plan_report import PlanReport, verdict
from shardwright.sharder.planning.free import assign, fastest, free_record
from shardwright.sharder.planning.plan import WORTHWHILE, Plan
from shardwright.sharder.planning.planner import plan
from shardwright.sharder.runtime.placing.sim import sim_device

BRANCHES = {"stem": ["x"], "left": ["stem"], "right": ["stem"], "join": ["left", "right"]}


@pytest.fixture
def branches(make_profile):
    """A stem, two branches and a join of one second each, and twice that back; transfers take no time to speak of."""
    return make_profile(BRANCHES, microbatches=(1, 4))


ASKED = [
    {"contiguous": False},
    {"contiguous": False, "transfers": "staged", "overlap": True},
    {"objective": "latency"},
    {"objective": "memory"},
    {"objective": "memory", "contiguous": False},
]


@pytest.mark.parametrize("asked", ASKED, ids=str)
def test_a_plan_agrees_with_itself_and_comes_back_from_its_file(branches, asked, tmp_path):
    """Loads and peaks are those of the certificate, caps hold, every node is on its stage's device."""
    result = plan(branches, **asked)
    assert result.objective == asked.get("objective", "throughput")
    assert result.contiguous == (asked == {"objective": "memory"})
    assert {node.node for node in result.nodes} == {node.name for node in branches.nodes}
    assert all(result.stages[node.stage].device == node.device for node in result.nodes)
    assert sorted(u for stage in result.stages for u in stage.units) == sorted(result.placement())
    assert all(stage.memory_bytes <= stage.memory_cap_bytes for stage in result.stages)
    if result.objective == "latency":
        assert max(stage.finish_s for stage in result.stages) == result.certificate.value_s
    else:
        assert max(stage.load_s for stage in result.stages) == pytest.approx(result.certificate.value_s)
    shares = [stage.memory_bytes / stage.memory_cap_bytes for stage in result.stages]
    assert (result.peak is not None) == (result.objective == "memory")
    assert result.peak is None or result.peak.value == max(shares)
    assert result.certificate.bound_s <= result.certificate.value_s
    result.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == result
    assert "Placement" in text_of(PlanReport(result), 100)


def test_latency_runs_the_branches_side_by_side(branches):
    """Three seconds forward and six back, and not four and eight."""
    result = plan(branches, objective="latency")
    assert len(result.devices) == 2
    assert result.certificate.exact
    assert result.certificate.value_s == pytest.approx(9, rel=0.01)
    assert result.predicted.baseline_s == pytest.approx(12, rel=0.01)
    assert "branches side by side" in verdict(result).text
    left, right = (next(r for r in result.timeline if r.units == (u,)) for u in ("net.left", "net.right"))
    assert left.start_s < right.end_s
    assert right.start_s < left.end_s
    assert left.device != right.device


def test_free_is_no_worse_than_stages(chain_profile):
    """4, 3, 3, 2, 2, 4: 9 and 9 in place of 10 and 8."""
    times = dict(zip([f"u{i}" for i in range(6)], [4.0, 3.0, 3.0, 2.0, 2.0, 4.0], strict=True))
    profile = chain_profile(6, forward_s=times, train=False, microbatches=(1, 2))
    stages, free = (plan(profile, microbatches=2, contiguous=c, transfers="direct") for c in (True, False))
    assert stages.certificate.value_s == pytest.approx(10, rel=0.01)
    assert free.certificate.value_s == pytest.approx(9, rel=0.01)


def test_pins_and_together_hold(branches):
    """However the units might be better placed."""
    result = plan(branches, contiguous=False, pins={"net.left": "cpu:1"}, together=[["net.left", "net.right"]])
    assert {result.placement()[unit] for unit in ("net.left", "net.right")} == {"cpu:1"}


def test_the_least_share_is_no_larger_than_that_of_the_fastest(chain_profile):
    """And the report says so first, with the largest batch."""
    profile = chain_profile(8, forward_s={f"u{i}": 1.0 + (i == 0) * 6 for i in range(8)}, param_bytes=2**20)
    fast, least = plan(profile), plan(profile, objective="memory")
    free = plan(profile, objective="memory", contiguous=False)
    assert least.peak.value <= max(stage.memory_bytes / stage.memory_cap_bytes for stage in fast.stages)
    assert least.peak.exact
    assert free.peak.exact
    text = text_of(PlanReport(least), 100)
    assert text.index("peak share") < text.index("largest load", text.index("Certificate"))
    assert "largest batch" in text


@pytest.mark.parametrize("asked", [{"contiguous": False}, {"objective": "latency"}], ids=str)
def test_pins_and_groups_that_leave_no_other_assignment_are_named(branches, asked):
    """With what there is without them."""
    free = plan(branches, **asked)
    for told, what in (({"pins": {"*": "cpu:1"}}, "pins"), ({"together": ["*"]}, "groups")):
        kept = plan(branches, **asked, **told)
        (change,) = kept.changes
        assert (change.what, change.pays.step_s) == (what, pytest.approx(free.predicted.step_s))
        assert "without them one takes" in verdict(kept).text
    assert free.changes is None


FREE = [{"contiguous": False}, {"contiguous": False, "objective": "memory"}, {"objective": "latency"}]


def refused(profile, **options):
    """Why nothing fits."""
    with pytest.raises(sw.ShardwrightError) as caught:
        plan(profile, **options)
    return str(caught.value)


@pytest.mark.parametrize("asked", FREE, ids=str)
def test_the_memory_that_is_asked_for_is_enough_and_little_less_is_not(chain_profile, asked):
    """For an assignment with as many micro-batches at once as are said; whole percents."""
    profile = chain_profile(8, param_bytes=2**20, saved_bytes=2**20, tensor_bytes=2**10)
    text = refused(profile, memory={"cpu:0": "5MiB", "cpu:1": "5MiB"}, **asked)
    latency = asked.get("objective") == "latency"
    assert f"with {'1 micro-batch' if latency else '2 micro-batches'} held at once: the model takes" in text
    assert re.search(r"give each device \d+% more memory", text)
    caps = {name: int(size) for name, size in re.findall(r"--memory (cpu:\d)=(\d+)MiB", text)}
    assert plan(profile, memory={name: f"{size}MiB" for name, size in caps.items()}, **asked).stages
    assert "no free assignment" in refused(profile, memory={n: f"{size - 2}MiB" for n, size in caps.items()}, **asked)


def test_devices_more_for_latency_are_as_few_as_can_be(chain_profile):
    """Sixteen MiB of weights on devices of five."""
    text = refused(chain_profile(8, param_bytes=2**20), memory={"cpu:0": "5MiB", "cpu:1": "5MiB"}, objective="latency")
    assert "or add 2 devices like cpu:0" in text


def test_pinned_units_that_their_device_does_not_hold_are_named(chain_profile):
    """All of them, with what lacks there and the memory that is enough for it."""
    profile, pins = chain_profile(8, param_bytes=2**20), {"net.u[0-2]": "cpu:0"}
    options = {"contiguous": False, "pins": pins, "microbatches": 4}
    text = refused(profile, memory={"cpu:0": "4MiB", "cpu:1": "20MiB"}, **options)
    assert "net.u0, net.u1 and net.u2, as pinned, take 6" in text
    assert "MiB more than the 4 MiB that it has" in text
    assert "leave the pins out, since an assignment without them fits" in text
    assert "like cpu" not in text
    (asked,) = re.findall(r"--memory cpu:0=(\d+MiB) is enough", text)
    assert plan(profile, memory={"cpu:0": asked, "cpu:1": "20MiB"}, **options).stages


def test_a_device_without_a_cap_is_said_to_have_none(chain_profile):
    """In the report, and where nothing fits; nor is more memory asked for it."""
    profile = chain_profile(8, param_bytes=2**20, memory_bytes=2**60)
    text = text_of(PlanReport(plan(profile, objective="memory")), 100)
    assert "MiB, no cap" in text
    assert "TiB" not in text
    text = refused(profile, memory={"cpu:0": "1MiB"}, contiguous=False, pins={"net.u0": "cpu:0"})
    assert "--memory cpu:1" not in text


@pytest.mark.parametrize("asked", ASKED, ids=str)
def test_what_fits_nowhere_is_refused_with_both_numbers(chain_profile, asked):
    """By the name of a unit that is too large."""
    profile = chain_profile(2, param_bytes=2**30)
    with pytest.raises(sw.ShardwrightError, match=r"net\.u0 needs at least 2 GiB.*51[23] MiB"):
        plan(profile, memory={"cpu:0": "1GiB", "cpu:1": "1.5GiB"}, microbatches=4, **asked)


def test_without_ortools_a_gap_is_honest_and_names_the_extra(chain_profile, monkeypatch):
    """Where the time is up before branch and bound has seen everything."""
    for module in (assign, fastest, free_record):
        monkeypatch.setattr(module, "has_ortools", lambda: False)
    times = {f"u{i}": 1.0 + 0.1 * (7 * i % 11) for i in range(24)}
    profile = chain_profile(24, forward_s=times, microbatches=(1, 4))
    for asked in ({"contiguous": False}, {"objective": "latency"}):
        result = plan(profile, time_limit_s=0.3, microbatches=4, **asked)
        assert result.certificate.bound_s <= result.certificate.value_s
        assert result.certificate.exact or "pip install 'shardwright[cp]'" in result.advice
        assert result.advice in text_of(PlanReport(result), 100).replace("\n", " ") or len(result.advice) > 60


@pytest.mark.parametrize("name", ["NetList", "NetDict"])
def test_a_free_plan_places_and_verifies(containers, captured_profile, name):
    """Units alternate between simulated devices, by pins that no chain of stages could obey."""
    model = getattr(containers, name)()
    x = type(model).sample_inputs()[0][:2, :, :16, :16]
    profile = captured_profile(model, (x,))
    units = [node.unit for node in profile.nodes if node.kind == "unit"]
    pins = {unit: f"cpu:{i % 2}" for i, unit in enumerate(units)}
    for asked in ({"contiguous": False}, {"objective": "latency"}):
        free = sw.plan(profile, pins=pins, microbatches=2, **asked)
        assert free.placement() == pins
        check = sw.verify(model, free, (x,))
        assert check, str(check)
        assert check.transfers > 0
    placed = sw.place(copy.deepcopy(model), free, devices={d: sim_device(i) for i, d in enumerate(free.devices)})
    assert {p.device.index for p in placed.parameters()} == {0, 1}


def test_run_refuses_what_is_no_chain_of_stages(captured_profile):
    """In one line that says what does take it."""
    model, x = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(3))), torch.ones(4, 4)
    free = sw.plan(captured_profile(model, (x,)), pins={"0": "cpu:0", "1": "cpu:1", "2": "cpu:0"}, contiguous=False)
    with pytest.raises(sw.ShardwrightError, match=r"no chain of stages.*place\(model, plan\)"):
        sw.run(model, free, (x,))


def test_a_verdict_claims_no_more_than_the_certificate(branches):
    """That nothing is better is said where it is proven."""
    result = plan(branches, contiguous=False)
    alone = result.model_copy(update={"stages": result.stages[:1]})
    for exact, said in ((True, "No other assignment is better."), (False, "No better assignment was found.")):
        certificate = result.certificate.model_copy(update={"exact": exact})
        assert verdict(alone.model_copy(update={"certificate": certificate})).text.endswith(said)


@pytest.mark.parametrize("objective", ["latency", "throughput"])
def test_pins_have_a_price(objective):
    """What the value would be without each: that of a plan with the other alone."""
    costs = sw.Costs.load(Path(__file__).parents[1] / "examples" / "costs.json")
    pins = {"text.*": "cuda:2", "decoder": "cuda:0"}
    found = sw.plan(costs, objective=objective, contiguous=False, pins=pins)
    assert [(pin.unit, pin.device, pin.exact) for pin in found.pins] == [(*pin, True) for pin in pins.items()]
    for pin in found.pins:
        others = {unit: device for unit, device in pins.items() if unit != pin.unit}
        other = sw.plan(costs, objective=objective, contiguous=False, pins=others)
        assert pin.without_s == other.certificate.value_s <= found.certificate.value_s


@pytest.mark.parametrize("objective", ["latency", "throughput"])
def test_what_one_would_do_else_is_priced_as_the_plan_is(objective):
    """A plan pinned to the naive split has its value, or under latency an order that is no worse."""
    costs = sw.Costs.load(Path(__file__).parents[1] / "examples" / "costs.json")
    found = sw.plan(costs, objective=objective, contiguous=False)
    assert [one.name for one in found.alternatives] == ["equal count", "by parameters", "data parallel"]
    units = list(found.placement())
    for other in found.alternatives[:2]:
        assert other.speedup == pytest.approx(found.predicted.baseline_s / other.step_s)
        assert found.certificate.value_s <= other.step_s
    equal = found.alternatives[0]
    pins = {unit: f"cuda:{number * equal.devices // len(units)}" for number, unit in enumerate(units)}
    pinned = sw.plan(costs, objective=objective, contiguous=False, pins=pins).certificate.value_s
    assert pinned <= equal.step_s * (1 + 1e-9)
    assert objective == "latency" or pinned == pytest.approx(equal.step_s)


def test_data_parallel_under_latency_shares_one_input_out(make_profile):
    """Each device has the whole model, and a part of the input as it was profiled; without that it says so."""
    chain = {"a": ["x"], "b": ["a"]}
    found = plan(make_profile(chain, microbatches=(1, 2)), objective="latency")
    parallel = found.alternatives[-1]
    whole, half = (
        sum(
            n.forward_s + n.backward_s
            for n in make_profile(chain, microbatches=(1, 2)).measurements
            if n.microbatches == count and n.device == "cpu:0"
        )
        for count in (1, 2)
    )
    assert (parallel.name, parallel.devices) == ("data parallel", 2)
    assert half <= parallel.step_s < whole * 1.5
    lone = plan(make_profile(chain, microbatches=(1, 3)), objective="latency").alternatives[-1]
    assert (lone.step_s, lone.why) == (None, "no profile of 1/2 of an input: 2 micro-batches")


@pytest.mark.parametrize("objective", ["latency", "throughput"])
def test_links_with_which_an_assignment_is_worth_it_are_found(make_profile, objective):
    """Over slow ones one device is best; the factor named is the first of those tried with which it is not."""
    profile = make_profile(BRANCHES, forward_s=1.0, tensor_bytes=6 * 10**9, memory_bytes=10**12)

    def faster(factor):
        links = (one.model_copy(update={"latency_s": one.latency_s / factor}) for one in profile.links)
        links = (one.model_copy(update={"bandwidth_bytes_per_s": one.bandwidth_bytes_per_s * factor}) for one in links)
        return profile.model_copy(update={"links": tuple(links)})

    found = plan(profile, objective=objective, contiguous=False)
    assert len(found.stages) == 1
    (change,) = found.changes
    assert change.what == "links"
    for factor in change.tried:
        there = plan(faster(factor), objective=objective, contiguous=False).predicted
        assert (there.speedup >= WORTHWHILE) == (factor == change.pays.factor)
    assert change.pays.step_s == pytest.approx(there.step_s)
    assert "What would change that: links" in " ".join(text_of(PlanReport(found), 200).split())


@pytest.mark.parametrize("asked", [*ASKED, {}], ids=str)
def test_units_that_take_no_time_and_no_room_are_planned_and_told(asked):
    """Nothing is divided by what they take, and nothing is a gain."""
    costs = sw.Costs.model_validate(
        {
            "microbatches": 2,
            "devices": {f"cuda:{d}": {"memory_bytes": 1e9} for d in range(2)},
            "links": [{"latency_s": 0, "bandwidth_bytes_per_s": 1e9}],
            "units": [{"name": f"u{i}", "forward_s": 0, "backward_s": 0} for i in range(4)],
        }
    )
    found = sw.plan(costs, pins={"u0": "cuda:1"}, together=[["u1", "u2"]], **asked)
    assert "Placement" in text_of(PlanReport(found), 60)
