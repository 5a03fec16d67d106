"""What pins and groups cost: against planning without them."""

import io
import math

import pytest
from rich.console import Console

import shardwright as sw
from shardwright.errors import ShardwrightError
from shardwright.reports.plan_report import PlanReport, verdict
from shardwright.sharder.planning.formulation.blocks import problem_from_graph
from shardwright.sharder.planning.partition import partition
from shardwright.sharder.planning.planner import plan
from shardwright.sharder.planning.pricing import price
from shardwright.sharder.planning.verdict.offload import Rates
from shardwright.sharder.planning.verdict.prices import Wishes, load_without, prices_of

NOWHERE = Rates((None, None), None, 0)
"""No weights can come from anywhere."""


def text_of(report):
    """What a wide console would show."""
    stream = io.StringIO()
    Console(file=stream, width=200).print(report)
    return stream.getvalue()


def test_a_pin_costs_what_planning_without_it_gains(chain_profile):
    """Each pin is priced with the others kept."""
    profile = chain_profile(8, speed={"cpu:0": 1.0, "cpu:1": 3.0})
    pins = {"net.u[0-5]": "cpu:0", "net.u7": "cpu:1"}
    result = plan(profile, microbatches=4, pins=pins)
    assert [(price.unit, price.device) for price in result.pins] == [*pins.items()]
    first, second = result.pins
    assert first.without_s == plan(profile, microbatches=4, pins={"net.u7": "cpu:1"}).certificate.value_s
    assert first.without_s < result.certificate.value_s
    assert second.without_s == result.certificate.value_s  # it would be there anyway
    assert first.exact
    assert second.exact


def test_pins_that_leave_no_split_are_named_by_the_verdict(chain_profile):
    """With what there is without them, as planned without them."""
    profile = chain_profile(8, speed={"cpu:0": 1.0, "cpu:1": 2.0})
    pinned, free = plan(profile, pins={"*": "cpu:1"}), plan(profile)
    assert [stage.device for stage in pinned.stages] == ["cpu:1"]
    (lifted,) = [change for change in pinned.changes if change.what == "pins"]
    assert lifted.pays.step_s == pytest.approx(free.predicted.step_s)
    assert lifted.pays.speedup == pytest.approx(free.predicted.speedup)
    text = verdict(pinned).text
    assert "The pins leave no better split; without them one takes" in text
    assert "No split is better" not in text
    assert "What would change that: planning without the pins (" in text_of(PlanReport(pinned))
    assert free.changes is None


def test_pins_to_the_slower_device_are_named_where_no_split_pays(make_profile):
    """One unit cannot be split, and the other device is faster alone: that is what there is without the pin."""
    pinned = plan(make_profile({"a": ["x"]}, speed={"cpu:0": 2.0, "cpu:1": 1.0}), pins={"net.a": "cpu:1"})
    assert next(change for change in pinned.changes if change.what == "pins").pays is None
    assert "The pins leave nothing better; without them cpu:0 alone takes" in verdict(pinned).text
    kept = plan(make_profile({"a": ["x"]}, speed={"cpu:0": 2.0, "cpu:1": 1.0}), pins={"net.a": "cpu:0"})
    assert "No split that obeys the pins is better." in verdict(kept).text


def test_groups_that_leave_no_split_are_named_by_the_verdict(chain_profile):
    """Alone, and with pins where it takes both to be away."""
    profile = chain_profile(8)
    grouped = plan(profile, together=["*"])
    assert "The groups that share a device leave no better split; without them one takes" in verdict(grouped).text
    assert [change.what for change in grouped.changes if change.pays] == ["groups"]
    both = plan(profile, together=["*"], pins={"*": "cpu:1"})
    assert [change.what for change in both.changes if change.pays] == ["pins and groups"]
    assert "The pins and the groups that share a device leave no better split" in verdict(both).text
    assert "pins" not in [change.what for change in plan(chain_profile(1)).changes]


def test_a_pin_of_a_module_is_of_all_units_in_it(chain_profile):
    """A path is that of a unit or of a module; the start of a name is neither."""
    pinned = plan(chain_profile(4), microbatches=4, pins={"net": "cpu:1"})
    assert [(stage.device, len(stage.units)) for stage in pinned.stages] == [("cpu:1", 4)]
    with pytest.raises(ShardwrightError, match=r"no unit matches 'net\.u'"):
        plan(chain_profile(4), microbatches=4, pins={"net.u": "cpu:1"})


def test_glue_of_the_same_name_hides_no_module(make_profile):
    """Both are pinned; and a pattern is of units and of modules at once."""
    wiring = {"a": ["x"], "add.one": ["a"], "add.two": ["add.one"], "net.add": ["add.two"]}
    profile = make_profile(wiring, kinds={"net.add": "glue"})
    assert "net.add" in {node.name for node in profile.nodes if node.kind == "glue"}
    pinned = plan(profile, microbatches=4, pins={"net.a": "cpu:0", "net.add": "cpu:1"})
    assert [stage.units for stage in pinned.stages] == [("net.a",), ("net.add.one", "net.add.two")]
    wide = plan(profile, microbatches=4, pins={"net.a*": "cpu:1"})
    assert [stage.device for stage in wide.stages] == ["cpu:1"]
    mixed = make_profile({"0": ["x"], "1.one": ["0"], "1.two": ["1.one"], "2": ["1.two"]})
    assert [stage.device for stage in plan(mixed, microbatches=4, pins={"net.?": "cpu:1"}).stages] == ["cpu:1"]


def test_a_pin_of_a_unit_is_not_of_those_inside_it(make_profile):
    """A forward may call a layer past the module that it is in."""
    profile = make_profile({"a": ["x"], "a.b": ["a"], "c": ["a.b"]})
    pinned = plan(profile, microbatches=4, pins={"net.a": "cpu:0", "net.a.b": "cpu:1", "net.c": "cpu:1"})
    assert [(stage.device, stage.units) for stage in pinned.stages] == [
        ("cpu:0", ("net.a",)),
        ("cpu:1", ("net.a.b", "net.c")),
    ]


def test_prices_of_pins_are_shown(chain_profile):
    """In percent of the load without the pin."""
    profile = chain_profile(8, speed={"cpu:0": 1.0, "cpu:1": 3.0})
    text = text_of(PlanReport(plan(profile, microbatches=4, pins={"net.u[0-5]": "cpu:0", "net.u7": "cpu:1"})))
    assert "pin net.u[0-5]=cpu:0" in text
    assert "costs 200%: the largest load is" in text
    assert "costs nothing" in text


def test_no_time_for_prices_is_said(chain_profile):
    """Only an uneven cut fits, which takes a search: a pin for which there was none says so."""
    profile = chain_profile(8)
    uneven = {"cpu:0": 6_500, "cpu:1": 15_000}

    def with_pins(pins):
        return problem_from_graph(profile.graph(4), pins=pins, memory=uneven)

    wishes = Wishes({"net.u0": "cpu:0"}, ())
    problem = with_pins(wishes.pins)
    chosen = price(problem, partition(problem), profile)

    def price_in(seconds):
        def best_with(others, _):
            return load_without(chosen, with_pins(others.pins), NOWHERE, seconds)

        (found,), _ = prices_of(wishes, chosen.split.value_s, best_with)
        return found

    assert price_in(math.inf).without_s is not None
    found = price_in(0.0)
    assert found.without_s is None
    assert "in the time allowed" in found.why
    text = text_of(PlanReport(plan(profile, microbatches=4).model_copy(update={"pins": (found,)})))
    assert f"its price was not found: {found.why}" in " ".join(text.split())


ASKED = [{}, {"contiguous": False}, {"objective": "memory"}, {"objective": "memory", "contiguous": False}]


@pytest.mark.parametrize("asked", [*ASKED, {"objective": "latency"}], ids=str)
def test_each_wish_costs_what_planning_without_it_gains(make_profile, asked):
    """Of the objective's own value: pins and groups, each with all others kept."""
    graph = {"a": ["x"], "b": ["a"], "c": ["a"], "d": ["b", "c"], "e": ["d"]}
    heavy = {"b": 5.0, "d": 3.0}
    profile = make_profile(graph, forward_s=heavy, param_bytes=2**10, microbatches=(1, 4))
    wishes = {"pins": {"net.a": "cpu:1", "net.e": "cpu:1"}, "together": [("net.b", "net.d"), "net.[ae]"]}

    def value(found):
        return found.peak.value if found.peak else found.certificate.least_s or found.certificate.value_s

    found = plan(profile, microbatches=4, **asked, **wishes)
    assert [(price.unit, price.device) for price in found.pins] == [*wishes["pins"].items()]
    assert [price.units for price in found.groups] == [("net.b", "net.d"), ("net.[ae]",)]
    others = [{"pins": {"net.e": "cpu:1"}}, {"pins": {"net.a": "cpu:1"}}]
    others += [{"together": wishes["together"][1:]}, {"together": wishes["together"][:1]}]
    for price_, other in zip((*found.pins, *found.groups), others, strict=True):
        without = price_.without_share if "memory" in asked.values() else price_.without_s
        assert without == pytest.approx(value(plan(profile, microbatches=4, **asked, **wishes | other)))
        assert price_.exact
        assert without <= value(found) * (1 + 1e-9)
    text = " ".join(text_of(PlanReport(found)).split())
    assert "together net.b, net.d costs" in text


def test_a_pin_of_a_plan_that_fell_back_to_gpipe_is_priced_under_it():
    """Without the pin 1F1B may have a split of its own, which is another schedule's price."""
    sizes = [(4, 0, 0.8), (1, 4, 0.5), (2, 2, 0.3), (3, 5, 0.3), (2, 2, 0.4), (4, 2, 0.9)]  # MB: static, saved, output
    units = [
        {"name": f"u{i}", "forward_s": 1e-3, "static_bytes": 1e6 * a, "saved_bytes": 1e6 * b, "output_bytes": 1e6 * c}
        for i, (a, b, c) in enumerate(sizes)
    ]
    units[4]["inputs"] = ["u3", "u0"]
    devices = {"cuda:0": {"memory_bytes": 60e6}, "cuda:1": {"memory_bytes": 20e6}}
    units = [unit | {"backward_s": 2e-3} for unit in units]
    links = [{"latency_s": 1e-5, "bandwidth_bytes_per_s": 1e8}]
    costs = sw.Costs.model_validate({"microbatches": 1, "devices": devices, "links": links, "units": units})
    found = plan(costs, objective="memory", pins={"u4": "cuda:1", "u0": "cuda:0"})
    assert found.schedule == "gpipe"
    price_, _ = found.pins
    without = plan(costs, objective="memory", pins={"u0": "cuda:0"}, schedule="gpipe")
    assert price_.without_share == pytest.approx(without.peak.value)
    assert price_.without_share < found.peak.value


def offloading(profile):
    """The profile of devices to which weights come from the host's memory."""
    devices = tuple(device.model_copy(update={"fetch_bytes_per_s": 1e4}) for device in profile.devices)
    return profile.model_copy(update={"devices": devices, "host_bytes": 10**6})


def tight(chain_profile, memory_bytes):
    """Units of 1,000 bytes for inference on two devices of a little memory."""
    speed = {"cuda:0": 1.0, "cuda:1": 1.0}
    return offloading(
        chain_profile(8, train=False, speed=speed, memory_bytes=memory_bytes, param_bytes=1_000, tensor_bytes=8)
    )


def test_a_pin_of_a_plan_with_offloaded_weights_has_a_price(chain_profile):
    """Planned without it, weights are offloaded too, and loads are even: proven, over all choices of weights."""
    profile = tight(chain_profile, 3_400)
    pinned = plan(profile, microbatches=1, pins={"net.u[0-5]": "cuda:0"})
    assert pinned.offloaded
    (found,) = pinned.pins
    free = plan(profile, microbatches=1).certificate
    assert found.without_s == (free.least_s or free.value_s)
    assert found.without_s < pinned.certificate.value_s
    assert found.exact


def test_a_pin_that_is_why_weights_are_offloaded_is_priced_without_it(chain_profile):
    """Each device holds half of the weights: only what a pin crowds onto one has to be brought in."""
    profile = tight(chain_profile, 4_400)
    pinned = plan(profile, microbatches=1, pins={"net.u[0-5]": "cuda:0"})
    alone = plan(profile, microbatches=1)
    assert pinned.offloaded
    assert not alone.offloaded
    assert pinned.pins[0].without_s == alone.certificate.value_s
