"""What a pin costs: against planning without it."""

import io

from rich.console import Console

from shardwright.reports.plan_report import PlanReport
from shardwright.sharder.planning.planner import plan


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


def test_prices_of_pins_are_shown(chain_profile):
    """In percent of the load without the pin."""
    profile = chain_profile(8, speed={"cpu:0": 1.0, "cpu:1": 3.0})
    text = text_of(PlanReport(plan(profile, microbatches=4, pins={"net.u[0-5]": "cpu:0", "net.u7": "cpu:1"})))
    assert "pin net.u[0-5]=cpu:0" in text
    assert "costs 200%: the largest load is" in text
    assert "costs nothing" in text


def test_no_time_for_prices_is_said(chain_profile):
    """A pin whose price was not found has none."""
    result = plan(chain_profile(8), microbatches=4, pins={"net.u0": "cpu:0"})
    unpriced = result.pins[0].model_copy(update={"without_s": None, "exact": False})
    text = text_of(PlanReport(result.model_copy(update={"pins": (unpriced,)})))
    assert "its price was not found in the time" in text
