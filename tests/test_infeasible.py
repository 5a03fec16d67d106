"""What would fit where nothing does: each change is held against planning with it."""

import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shardwright.errors import ShardwrightError
from shardwright.profiler.graph import cost_graph
from shardwright.sharder.planning.formulation.blocks import problem_from_graph
from shardwright.sharder.planning.formulation.relaxed import (
    checkpointed,
    with_another,
    with_caps_times,
    with_smaller_microbatches,
)
from shardwright.sharder.planning.partition import partition
from shardwright.sharder.planning.planner import plan
from shardwright.sharder.planning.verdict.infeasible import changes_that_fit, why_nothing_fits

LATER = float("inf")


def message_of(profile, **options):
    """Why nothing fits."""
    with pytest.raises(ShardwrightError) as caught:
        plan(profile, **options)
    return str(caught.value)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(units=st.integers(5, 8), mib=st.lists(st.integers(3, 12), min_size=2, max_size=2))
def test_the_memory_that_is_asked_for_is_enough_and_little_less_is_not(chain_profile, units, mib):
    """Planning with the caps of the message works; with all caps 3 MiB lower it does not."""
    profile = chain_profile(units, param_bytes=3 * 2**20)  # 6 MiB a unit with its gradient
    caps = {"cpu:0": f"{max(6, mib[0])}MiB", "cpu:1": f"{max(7, mib[1])}MiB"}  # each unit fits alone
    text = message_of(profile, memory=caps)
    asked = {name: int(size) for name, size in re.findall(r"--memory (cpu:\d)=(\d+)MiB", text)}
    assert plan(profile, memory={name: f"{size}MiB" for name, size in asked.items()}).stages
    message_of(profile, memory={name: f"{size - 3}MiB" for name, size in asked.items()})


def test_devices_more_are_as_few_as_can_be(chain_profile):
    """Eight units of 2 MiB, 5 and 6 MiB of memory: two more devices of the larger kind."""
    profile = chain_profile(8, param_bytes=2**20)
    text = message_of(profile, memory={"cpu:0": "5MiB", "cpu:1": "6MiB"})
    assert "or add 2 devices like cpu:1" in text
    problem = problem_from_graph(cost_graph(profile, 4), memory={"cpu:0": "5MiB", "cpu:1": "6MiB"})
    assert partition(with_another(problem, 1)) is None
    assert partition(with_another(with_another(problem, 1), 1)) is not None


def test_smaller_microbatches_and_checkpoints_are_named_where_activations_are_too_large(chain_profile):
    """What is saved for backward is what does not fit: both ways to save less are found, and said to be estimates."""
    profile = chain_profile(6, saved_bytes=8 * 2**20, tensor_bytes=2**16, microbatches=(2,))
    text = message_of(profile, memory={"cpu:0": "9MiB", "cpu:1": "9MiB"})
    assert "no split fits, not even with stages computed anew: at 2 micro-batches" in text
    assert "profile --microbatches 4, which should fit (estimated)" in text
    assert "compute activations anew in the backward (torch.utils.checkpoint around each unit)" in text
    profile = chain_profile(6, saved_bytes=8 * 2**20, tensor_bytes=2**16, microbatches=(8,))
    assert "--microbatches" not in message_of(profile, memory={"cpu:0": "3MiB", "cpu:1": "3MiB"})  # batch of 8


def test_no_change_is_named_that_does_not_help(chain_profile):
    """Weights are too large: micro-batches and checkpoints change nothing, and are not named."""
    text = message_of(chain_profile(8, param_bytes=2**20), memory={"cpu:0": "5MiB", "cpu:1": "6MiB"})
    assert "micro-batches, which" not in text
    assert "anew in the backward" not in text


def test_pins_that_memory_has_no_room_for_are_told_from_pins_that_no_split_obeys(chain_profile):
    """Neighbours, pinned alike: the message names the set, the device, what lacks, and what is enough."""
    profile, pins = chain_profile(8, param_bytes=2**20), {"net.u[0-5]": "cpu:0"}
    text = message_of(profile, memory={"cpu:0": "9MiB", "cpu:1": "30MiB"}, pins=pins)
    assert "no split fits as pinned: at 4 micro-batches net.u0, net.u1 and 4 more units take 12" in text
    assert "on cpu:0, 4 MiB more than the 9 MiB that it has" in text
    assert "leave the pins out, since a split without them fits" in text
    assert "neighbours" not in text
    (asked,) = map(int, re.findall(r"--memory cpu:0=(\d+)MiB is enough", text))
    assert plan(profile, memory={"cpu:0": f"{asked}MiB", "cpu:1": "30MiB"}, pins=pins).stages
    message_of(profile, memory={"cpu:0": f"{asked - 2}MiB", "cpu:1": "30MiB"}, pins=pins)


def test_where_several_devices_lack_memory_for_the_pins_all_are_raised(chain_profile):
    """One of them that has to be larger is named; more memory for it alone is not said to be enough."""
    profile, pins = chain_profile(8, param_bytes=2**20), {"net.u[0-3]": "cpu:0", "net.u[4-7]": "cpu:1"}
    text = message_of(profile, memory={"cpu:0": "5MiB", "cpu:1": "7MiB"}, pins=pins)
    assert "net.u0, net.u1 and 2 more units take" in text
    assert "is enough" not in text
    asked = dict(re.findall(r"--memory (cpu:\d)=(\d+MiB)", text))
    assert plan(profile, memory=asked, pins=pins).stages


def test_a_copy_of_a_device_is_no_place_for_what_is_pinned_to_it(chain_profile):
    """More devices do not help where the pins hold the whole model in one place, on one device of several or alone."""
    profile, pins = chain_profile(8, param_bytes=2**20), {"net.u0": "cpu:0", "net.u7": "cpu:0"}
    memory = {"cpu:0": "9MiB", "cpu:1": "9MiB"}
    text = message_of(profile, memory=memory, pins=pins)
    assert "net.u0, net.u1 and 6 more units (pinned there: net.u0 and net.u7) take 16" in text
    assert "like cpu" not in text
    assert "add 1 device like cpu:0" in message_of(profile, memory={"cpu:0": "9MiB"}, devices=["cpu:0"])
    text = message_of(profile, memory={"cpu:0": "9MiB"}, devices=["cpu:0"], pins={"*": "cpu:0"})
    assert "like cpu" not in text
    problem = problem_from_graph(cost_graph(profile, 4), memory=memory, pins=pins)
    assert [b.allowed[-1] for b in with_another(problem, 0).blocks] == [not b.pinned for b in problem.blocks]


def test_pins_with_too_few_microbatches_for_so_many_stages_are_obeyed_as_the_planner_does(chain_profile):
    """Under GPipe: what is told of them is what lacks there."""
    profile, pins = chain_profile(4, param_bytes=2**20, microbatches=(1,)), {"net.u0": "cpu:0", "net.u3": "cpu:1"}
    assert len(plan(profile, pins=pins).stages) == 2
    text = message_of(profile, memory={"cpu:0": "3MiB", "cpu:1": "3MiB"}, pins=pins)
    assert "no split obeys the pins" not in text


def test_a_share_of_more_memory_is_in_whole_percents(chain_profile):
    """However much it is."""
    text = message_of(chain_profile(8, param_bytes=2**20), memory={"cpu:0": "3MiB", "cpu:1": "3MiB"})
    assert re.search(r"give each device \d{3}% more memory", text)


def test_what_lacks_of_a_tiny_cap_is_told_in_its_own_unit(chain_profile):
    """And not rounded up to a whole MiB."""
    text = message_of(chain_profile(4, param_bytes=2**12), memory={"cpu:0": "1KiB", "cpu:1": "1KiB"})
    assert "has 1 KiB, " in text
    assert "MiB too little" not in text


def test_units_too_large_for_every_device_are_named_with_a_size_that_would_do(chain_profile):
    """All of a group that has to share a device, what lacks there, and caps with which planning works."""
    profile, caps = chain_profile(4, param_bytes=2**20), {"cpu:0": "3MiB", "cpu:1": "4MiB"}
    text = message_of(profile, memory=caps, together=["net.u[0-2]"])
    assert "net.u0, net.u1 and net.u2, which have to share a device, need at least 6 MiB" in text
    assert "cpu:1, the roomiest device that it may be on, has 4 MiB, 3 MiB too little" in text
    asked = dict(re.findall(r"--memory (cpu:\d)=(\d+MiB)", text))
    assert plan(profile, memory=asked, together=["net.u[0-2]"]).stages


def test_a_pinned_unit_too_large_for_its_device_asks_for_that_device_alone(chain_profile):
    """The others are large enough as they are."""
    profile, pins = chain_profile(4, param_bytes=2**20), {"net.u3": "cpu:0"}
    text = message_of(profile, memory={"cpu:0": "1MiB", "cpu:1": "20MiB"}, pins=pins)
    assert "no split fits as pinned: at 4 micro-batches net.u3 takes 2 MiB on cpu:0, 2 MiB more than" in text
    (asked,) = re.findall(r"--memory cpu:0=(\d+MiB) is enough", text)
    assert plan(profile, memory={"cpu:0": asked, "cpu:1": "20MiB"}, pins=pins).stages


def test_without_time_pins_are_not_blamed(chain_profile):
    """That no split obeys them is said where it is proven."""
    memory, pins = {"cpu:0": "5MiB", "cpu:1": "6MiB"}, {"net.u0": "cpu:0", "net.u4": "cpu:1", "net.u7": "cpu:0"}
    problem = problem_from_graph(cost_graph(chain_profile(8, param_bytes=2**20), 4), memory=memory, pins=pins)
    assert "no split obeys the pins" in why_nothing_fits([problem], LATER, batch=8, train=True)
    assert "pins" not in why_nothing_fits([problem], 0.0, batch=8, train=True)


def test_no_time_no_changes(chain_profile):
    """Without time nothing is tried, and nothing is claimed."""
    problem = problem_from_graph(cost_graph(chain_profile(8, param_bytes=2**20), 4), memory={"cpu:0": 1, "cpu:1": 1})
    assert list(changes_that_fit(problem, 0.0, batch=8, train=True)) == []


@pytest.mark.parametrize("count", [2, 3])
def test_another_device_is_like_its_twin(make_profile, count):
    """A twin of each device: times, cap and links are those of the twin, and a split over both is as good."""
    speed = {f"cpu:{d}": 1.0 + d for d in range(count)}
    problem = problem_from_graph(cost_graph(make_profile({"a": ["x"], "b": ["a"], "c": ["b"]}, speed=speed), 4))
    for device in range(count):
        more = with_another(problem, device)
        assert more.caps[-1] == problem.caps[device]
        assert all(b.forward_s[-1] == b.forward_s[device] for b in more.blocks)
        assert all(b.backward_s[-1] == b.backward_s[device] for b in more.blocks)
        assert len(more.links) == len(more.links[0]) == count + 1
        for other in set(range(count)) - {device}:
            assert more.links[-1][other] == problem.links[device][other]
            assert more.links[other][-1] == problem.links[other][device]


def test_smaller_microbatches_are_the_same_work(chain_profile):
    """Twice as many of half the size: the largest load of a step is the same, and less memory is taken."""
    problem = problem_from_graph(cost_graph(chain_profile(6, saved_bytes=2**20), 4))
    halved = with_smaller_microbatches(problem, 2)
    split = partition(problem)
    assert partition(halved).value_s == pytest.approx(split.value_s, rel=1e-3)  # latencies are paid more often
    members = (1 << len(problem.blocks)) - 1
    assert halved.memory_bytes(0, members, 0, 0) < problem.memory_bytes(0, members, 0, 0)


def test_checkpoints_keep_what_is_read_only(chain_profile):
    """A chain keeps one tensor a unit instead of what its units save, and computes each forward twice."""
    profile = chain_profile(4, saved_bytes=8_000_000, tensor_bytes=80, microbatches=(1,))
    problem = problem_from_graph(cost_graph(profile, 1))
    again = checkpointed(problem)
    every = (1 << len(problem.blocks)) - 1
    assert problem.ledger.walk(every).kept > 4 * 8_000_000 - 1
    assert again.ledger.walk(every).kept <= 4 * 80 + 80
    assert 8_000_000 <= again.ledger.walk(every).backward < 2 * 8_000_000
    assert [b.backward_s[0] for b in again.blocks] == [b.backward_s[0] + b.forward_s[0] for b in problem.blocks]


def test_larger_caps_are_rounded_up(chain_profile):
    """So that a factor of just enough is enough."""
    problem = problem_from_graph(cost_graph(chain_profile(2), 1), memory={"cpu:0": 999, "cpu:1": 1000})
    assert with_caps_times(problem, 1.001).caps == (1000, 1001)
