"""Several stages on each device: the split against brute force, its memory, its step, and the plan that says why."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import re

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shardwright.errors import ShardwrightError
from shardwright.profiler.profile import Tie as ProfileTie
from shardwright.reports.plan_report import verdict
from shardwright.sharder.planning.exact.search import closed_sets
from shardwright.sharder.planning.formulation.device_classes import alike_devices
from shardwright.sharder.planning.formulation.memory import Ledger, Step
from shardwright.sharder.planning.partition import partition
from shardwright.sharder.planning.plan import Plan
from shardwright.sharder.planning.planner import plan
from shardwright.sharder.planning.problem import Block, Crossing, Problem, Tie, bits
from shardwright.sharder.planning.schedules import interleave, interleaved_cuts
from shardwright.sharder.planning.schedules.foreseen import costs_of, timeline_of
from shardwright.sharder.planning.schedules.interleave import device_loads, piece_loads, possible_devices
from shardwright.sharder.planning.schedules.interleaved_memory import device_peaks
from shardwright.sharder.planning.schedules.schedule import operations

WITHIN = 1 + interleave.SLACK
FOUR = dict.fromkeys(("cpu:0", "cpu:1", "cpu:2", "cpu:3"), 1.0)


def problem_of(before, times, devices, *, bytes_=1, rate=4.0, cap=10**6, microbatches=4, saved=0, v=2, **changes):
    """Blocks with ``times[v][d]`` forward seconds; each tensor goes to all that have its maker right before them."""
    count = len(times)
    readers = [sum(1 << w for w in range(count) if before[w] >> v & 1) for v in range(count)]
    return Problem(
        blocks=tuple(
            Block(
                nodes=(f"n{v}",),
                forward_s=tuple(map(float, row)),
                backward_s=tuple(2.0 * s for s in row),
                update_s=(0.0,) * devices,
                static_bytes=1,
                units=(f"u{v}",),
                allowed=(True,) * devices,
            )
            for v, row in enumerate(times)
        ),
        predecessors=tuple(before),
        crossings=tuple(Crossing(f"t{v}", v, mask, bytes_, bytes_) for v, mask in enumerate(readers) if mask),
        devices=tuple(f"cpu:{d}" for d in range(devices)),
        caps=(cap,) * devices,
        links=(((0.0, rate),) * devices,) * devices,
        microbatches=microbatches,
        schedule="interleaved",
        stages_per_device=v,
        ledger=Ledger(tuple(Step(v, saved, saved, 0) for v in range(count))),
        **changes,
    )


def a_chain(times, devices=2, **changes):
    """A chain of blocks that take as long on every device."""
    before = [1 << v - 1 if v else 0 for v in range(len(times))]
    return problem_of(before, [(time,) * devices for time in times], devices, **changes)


@st.composite
def problems(draw, chain=False):
    """Small graphs over mixed devices, transfers that count, caps that may bind, ties and pins."""
    devices = draw(st.integers(2, 3))
    count = draw(st.integers(4, 7 if chain else 6))
    time = st.integers(0, 9)
    if chain:
        before = [1 << v - 1 if v else 0 for v in range(count)]
    else:
        before = [0] + [draw(st.integers(0, (1 << v) - 1)) for v in range(1, count)]
    alike = draw(st.booleans())
    row = time.map(lambda t: (t,) * devices) if alike else st.tuples(*[time] * devices)
    problem = problem_of(
        before,
        [draw(row) for _ in range(count)],
        devices,
        bytes_=draw(st.integers(0, 8)),
        cap=draw(st.sampled_from([10**6, 10**6, 40, 80])),
        microbatches=draw(st.integers(2, 6)),
        saved=draw(st.integers(0, 3)),
        overlap=draw(st.sampled_from([False, False, True])),
    )
    if draw(st.booleans()):
        users = draw(st.sets(st.integers(0, count - 1), min_size=2, max_size=3))
        copy_bytes, gradient_bytes = draw(st.integers(0, 9)), draw(st.sampled_from([0, 9]))
        update_s = tuple(2.0 + d for d in range(devices)) if gradient_bytes else ()
        tie = Tie("p", sum(1 << v for v in users), min(users), copy_bytes, gradient_bytes, update_s)
        problem = dataclasses.replace(problem, ties=(tie,))
    pinned = draw(st.sampled_from([None, None, 0, count - 1]))
    if pinned is not None:
        blocks = list(problem.blocks)
        blocks[pinned] = dataclasses.replace(blocks[pinned], allowed=tuple(d == 0 for d in range(devices)))
        problem = dataclasses.replace(problem, blocks=tuple(blocks))
    return problem


def every_split(problem):
    """All feasible splits with two stages on each of some devices, and their largest loads."""
    lattice = closed_sets(problem.predecessors, 10**6)
    last = (1 << len(problem.blocks)) - 1

    def chains(start, left):
        if left == 0:
            yield ()
            return
        ends = [last] if left == 1 else [e for e in lattice if e & start == start and e not in (start, last)]
        for end in ends:
            for rest in chains(end, left - 1) if end != start else ():
                yield (end & ~start, *rest)

    for count in possible_devices(problem):
        cuts = list(chains(0, 2 * count))
        for order in itertools.permutations(range(len(problem.devices)), count):
            for members in cuts:
                stages = tuple(zip(order * 2, members, strict=True))
                if piece_loads(problem, stages) is not None:
                    yield max(device_loads(problem, stages))


def check_against_brute_force(problem):
    """The value is within the slack of the least largest load, and the bound is that load itself."""
    least = min(every_split(problem), default=math.inf)
    found = partition(problem)
    if found is None:
        assert least == math.inf
        return
    assert found.bound_s == pytest.approx(least)
    assert least * (1 - 1e-9) <= found.value_s <= least * WITHIN * (1 + 1e-9)
    assert found.value_s == max(device_loads(problem, found.stages))
    assert piece_loads(problem, found.stages) is not None
    assert found.exact == (found.value_s <= least * (1 + 1e-9))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(problems(chain=True))
def test_chains_are_split_as_by_brute_force(problem):
    """A chain is cut anywhere, and every cut that could be better is looked at."""
    check_against_brute_force(problem)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(problems())
def test_graphs_are_split_as_by_brute_force(problem):
    """And a graph at all of its closed sets, where these are few."""
    check_against_brute_force(problem)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(problems(), st.data())
def test_what_is_left_out_is_not_forgotten(problem, data):
    """Where too little is kept, not all orders are tried or the time passes, nothing is promised that is not so."""
    least = min(every_split(problem), default=math.inf)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interleave, "MOST_CLOSED", data.draw(st.sampled_from([1, 600, 600, 600])))
        patch.setattr(interleave, "ORDERS", data.draw(st.sampled_from([1, 3, 24])))
        patch.setattr(interleave, "CLIMBED", data.draw(st.sampled_from([0, 1, 8])))
        for width in ("WIDTH", "WIDTH_OF_ALL", "NARROW"):
            patch.setattr(interleaved_cuts, width, data.draw(st.sampled_from([1, 3, 10])))
        left = itertools.count(data.draw(st.sampled_from([-1000, -20, -5, -1, 0])))
        orders = [list(range(len(problem.devices)))]
        try:
            found = interleave.interleaved(problem, alike_devices(problem), orders, lambda: next(left) >= 0)
        except ShardwrightError:  # none was found, which is not to say that there is none
            return
    if found is None:
        assert least == math.inf
        return
    assert found.bound_s <= least * (1 + 1e-9)
    assert found.value_s >= least * (1 - 1e-9)
    assert piece_loads(problem, found.stages) is not None
    assert found.exact <= (found.value_s <= least * (1 + 1e-9))


def test_splits_that_the_time_was_too_short_for_count_as_they_are_estimated(monkeypatch):
    """Nothing is looked at, and what is not has the least largest load at most, as its bound."""
    chain = a_chain([1.0, 2.0, 3.0, 1.0, 2.0, 2.0], 2)
    monkeypatch.setattr(interleave, "CLIMBED", 0)
    best = interleave._Best(chain)
    assert best.cut(interleaved_cuts.Line(chain, range(6)), (0, 1), lambda: True) <= min(every_split(chain))
    assert not best.finals


def test_ends_are_not_moved_to_and_fro():
    """Of loads that are equal but for rounding either may be the less, beside the largest of the time."""
    chain = a_chain([0.0, 2.0, 2e-9, 2.0, 2e-9, 0.0], 2, bytes_=0)
    cuttable = interleaved_cuts.Cuttable(interleaved_cuts.Line(chain, range(6)), (0, 1))
    looks = itertools.count()
    found = list(cuttable.climbed(np.array([[1, 2, 4, 6]]), lambda: next(looks) > 1000))
    assert len(found) == 1
    assert next(looks) < 10


@pytest.mark.filterwarnings("error")
def test_over_a_link_that_is_not_to_be_used_ends_stay_where_they_are():
    """Every split of two devices sends over it, and none has a load to compare with."""
    way, none = (0.0, 4.0), (math.inf, 4.0)
    chain = dataclasses.replace(a_chain([1.0] * 8, 2), links=((way, none), (way, way)))
    cuttable = interleaved_cuts.Cuttable(interleaved_cuts.Line(chain, range(8)), (0, 1))
    assert list(cuttable.climbed(np.array([[2, 4, 6, 8]]), lambda: False)) == [cuttable.stages(np.array([2, 4, 6, 8]))]


def test_transfers_that_are_not_relayed_are_refused():
    """The engine relays, and what is counted here is what it does."""
    chain = dataclasses.replace(a_chain([1.0] * 8, 2), transfers="staged")
    with pytest.raises(ShardwrightError, match="no split for staged transfers"):
        partition(chain)


def test_a_long_chain_is_split_nearly_evenly(monkeypatch):
    """Where not all can be looked at, ends that are moved one at a time bring the rest."""
    times = [1 + (7 * v % 11) / 10 for v in range(300)]
    monkeypatch.setattr(interleaved_cuts, "WIDTH", 200)
    found = partition(a_chain(times, 4, microbatches=8, rate=1e9))
    assert found is not None
    assert not found.exact
    assert found.bound_s <= found.value_s <= 1.015 * found.bound_s


def test_stages_go_around_the_devices():
    """Stage s is on the device of stage s - D, and each device has half of the work."""
    found = partition(a_chain([1.0] * 16, 2, microbatches=8, rate=1e9))
    assert found is not None
    assert [device for device, _ in found.stages] == [found.stages[0][0], found.stages[1][0]] * 2
    assert [sum(members.bit_count() for _, members in found.stages[d::2]) for d in (0, 1)] == [8, 8]
    assert found.exact


def counted(problem, stages, position):
    """The most that a device holds, one operation after the other, and what each of its stages has in flight."""
    devices = len(stages) // 2
    own, closed, terms = [], 0, []
    for _, members in stages:
        walk, end = problem.walk(members), closed | members
        received, sent = problem.received(closed, members), problem.sent(end, members)
        relayed = [c.backward_bytes for c in received if c.readers & ~end and not c.readers & members]
        buffers = sum(c.forward_bytes for c in received) + sum(c.backward_bytes for c in sent)
        static = sum(problem.blocks[v].static_bytes for v in bits(members)) + problem.microbatches * buffers
        gradients = sum(c.backward_bytes for c in received)
        left = gradients + (walk.sent if len(terms) + 1 < len(stages) else 0)
        terms.append((static, walk, left, sum(relayed)))
        closed = end
    own = range(position, len(stages), devices)
    held, done, in_flight, most = dict.fromkeys(own, 0), dict.fromkeys(own, 0), dict.fromkeys(own, 0), 0
    for what in operations("interleaved", position, devices, problem.microbatches, stages_per_device=2):
        now = 0
        for s in own:
            static, walk, left, relayed = terms[s]
            mine = what.stage == s
            now += static + (held[s] - (mine and what.kind == "B")) * walk.kept + done[s] * left
            began = done[s] > 0 or (mine and what.kind == "B")
            now -= 0 if began else walk.gradients
            if mine and what.kind == "F":
                now += walk.forward
            elif mine:
                now += relayed + (walk.backward if done[s] else walk.first - walk.gradients)
        most = max(most, now)
        held[what.stage] += 1 if what.kind == "F" else -1
        done[what.stage] += what.kind == "B"
        in_flight[what.stage] = max(in_flight[what.stage], held[what.stage])
    whole = 0
    for s in own:
        whole |= stages[s][1]
    static = sum(terms[s][0] for s in own)
    copies = sum(tie.copy_bytes for tie in problem.ties if not tie.counted(whole))
    return max(most, static + problem.walk(whole).update) + copies, tuple(in_flight.values())


@settings(max_examples=40, deadline=None)
@given(problems(chain=True))
def test_a_devices_peak_is_that_of_its_operations(problem):
    """The parts add up to the peak, which is what its operations hold one after another."""
    cuts = [0, 1, 2, 3, len(problem.blocks)]
    stages = tuple((s % 2, (1 << b) - (1 << a)) for s, (a, b) in enumerate(itertools.pairwise(cuts)))
    if problem.microbatches % max(1, problem.microbatches // 2):
        return
    for position, peak in enumerate(device_peaks(problem, stages)):
        assert sum(peak.parts) == peak.bytes
        assert (peak.bytes, peak.in_flight) == counted(problem, stages, position)


def test_what_the_stages_of_one_device_share_costs_nothing():
    """A parameter of the first stage and the last but one is on one device; with the next one's it is summed."""
    tie = Tie("p", 0b0101, 0, 100, 8)
    problem = dataclasses.replace(a_chain([1.0] * 4, 2), ties=(tie,))
    stages = tuple((s % 2, 1 << s) for s in range(4))
    apart = dataclasses.replace(problem, ties=(dataclasses.replace(tie, users=0b0011),))
    assert device_loads(problem, stages)[0] < device_loads(apart, stages)[0]
    assert device_peaks(problem, stages)[1].bytes + 100 == device_peaks(apart, stages)[1].bytes


@pytest.mark.parametrize(
    ("devices", "microbatches", "blocks", "expected"),
    [(4, 8, 20, [4, 3, 2]), (4, 7, 20, [4, 2]), (3, 3, 5, [2]), (2, 1, 4, [2]), (4, 8, 3, [])],
)
def test_numbers_of_devices(devices, microbatches, blocks, expected):
    """Rounds have to divide the micro-batches, and each stage needs a unit."""
    found = possible_devices(a_chain([1.0] * blocks, devices, microbatches=microbatches))
    rounds = {k: max(1, microbatches // k) for k in range(2, devices + 1)}
    assert found == [k for k in expected if microbatches % rounds[k] == 0]
    assert set(found) == {k for k, n in rounds.items() if microbatches % n == 0 and 2 * k <= blocks}


def test_the_plan_says_why(chain_profile):
    """Half the bubble of 1F1B for three times the transfers: the record agrees with its own simulation."""
    result = plan(chain_profile(16, speed=FOUR), microbatches=4, schedule="interleaved")
    assert (result.schedule, result.stages_per_device, len(result.stages)) == ("interleaved", 2, 8)
    assert [stage.device for stage in result.stages] == [*result.devices] * 2
    assert len(result.devices) == 4
    timeline = timeline_of(result)
    assert timeline.step_s == pytest.approx(result.predicted.step_s)
    assert max(timeline.busy_s) == pytest.approx(result.certificate.value_s)
    assert timeline.bubble == pytest.approx(result.predicted.bubble)
    other = result.other_schedule
    assert other is not None
    assert (other.schedule, other.stages_per_device, other.devices) == ("1f1b", 1, 4)
    assert result.predicted.bubble < other.bubble
    assert other.own_transfer_s > other.transfer_s
    assert (
        result.predicted.step_s < other.step_s == plan(chain_profile(16, speed=FOUR), microbatches=4).predicted.step_s
    )
    assert [(c.stages_per_device, c.chosen) for c in result.candidates] == [(1, False), (2, True)]
    assert re.search(r"a bubble of \S+% instead of \S+% and transfers of .* instead of", verdict(result).text)
    assert result.certificate.bound_s <= result.certificate.value_s


def test_a_step_of_even_stages_is_that_of_the_paper(chain_profile):
    """Filling and draining take a v-th: (D - 1) / v slots of a device's forward and backward (SC 2021, section 2.2)."""
    profile = chain_profile(16, speed=FOUR, tensor_bytes=0)
    profile = profile.model_copy(
        update={"links": tuple(link.model_copy(update={"latency_s": 0.0}) for link in profile.links)}
    )
    for v in (2, 4):
        result = plan(profile, microbatches=4, schedule="interleaved", stages_per_device=v)
        one = result.certificate.value_s / 4
        assert result.predicted.step_s == pytest.approx((4 + 3 / v) * one)


def test_a_plan_survives_its_file(chain_profile, tmp_path):
    """JSON and back: equal; a file of before there were several stages a device is one stage a device."""
    result = plan(chain_profile(8), microbatches=4, schedule="interleaved")
    result.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == result
    old = json.loads(plan(chain_profile(8), microbatches=4).model_dump_json())
    for name in ("stages_per_device", "other_schedule"):
        del old[name]
    assert Plan.model_validate(old).stages_per_device == 1


@pytest.mark.parametrize(("tensor_bytes", "schedule"), [(80, "interleaved"), (6 * 10**9, "1f1b")])
def test_auto_takes_what_is_faster(chain_profile, tensor_bytes, schedule):
    """Over fast links a smaller bubble wins, over slow ones fewer transfers; the other is named beside it."""
    profile = chain_profile(16, speed=FOUR, tensor_bytes=tensor_bytes, memory_bytes=10**13)
    result = plan(profile, microbatches=4, schedule="auto")
    assert result.schedule == schedule
    assert result.other_schedule is not None
    assert result.other_schedule.schedule != schedule
    assert result.predicted.step_s <= result.other_schedule.step_s
    assert costs_of(result)


def test_auto_is_1f1b_where_nothing_else_is_known(chain_profile):
    """For other objectives and transfers there is one stage a device, and nothing is weighed."""
    result = plan(chain_profile(8), microbatches=4, schedule="auto", transfers="staged")
    assert (result.schedule, result.other_schedule) == ("1f1b", None)


def test_one_device_is_still_chosen_where_no_split_is_faster(chain_profile):
    """When the overhead of micro-batches eats every gain, more stages do not bring it back."""
    result = plan(chain_profile(4, microbatches=(1, 2), overhead_s=9.0), schedule="interleaved")
    assert (result.devices, result.stages_per_device, result.other_schedule) == (("cpu:0",), 1, None)


def test_ties_within_a_device_are_no_copies(chain_profile):
    """A parameter of the first unit and of one in the device's second stage is in no tie of the plan."""
    profile = chain_profile(8, forward_s=1.0)

    def planned(*nodes):
        tie = ProfileTie(name="net.w", nodes=nodes, copy_bytes=3_000, gradient_bytes=0)
        tied = profile.model_copy(update={"ties": (tie,)})
        pins = {f"net.u{i}": f"cpu:{i // 2 % 2}" for i in range(8)}
        return plan(tied, microbatches=4, schedule="interleaved", pins=pins)

    assert planned("u0", "u4").ties == ()
    assert [tie.stages for tie in planned("u0", "u2", "u6").ties] == [(0, 1, 3)]


def test_pins_are_kept_and_priced(chain_profile):
    """A pin holds for whichever of the device's stages has the unit, and its price is looked for."""
    result = plan(chain_profile(8), microbatches=4, schedule="interleaved", pins={"net.u7": "cpu:0"})
    assert result.placement()["net.u7"] == "cpu:0"
    assert result.devices == ("cpu:1", "cpu:0")
    assert result.pins[0].without_s == pytest.approx(result.certificate.value_s)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"stages_per_device": 2}, "1f1b has one stage a device, not 2"),
        ({"schedule": "interleaved", "stages_per_device": 1}, "2 or more on each device, not 1"),
        ({"schedule": "interleaved", "objective": "memory"}, "not for memory, relayed transfers"),
        ({"schedule": "interleaved", "contiguous": False}, "free assignment"),
        ({"schedule": "interleaved", "transfers": "direct"}, "direct transfers"),
        ({"schedule": "interleaved", "stages_per_device": 5}, "need 10 units that can be parted, and there are 8"),
        ({"schedule": "interleaved", "devices": ["cpu:0"]}, "need two devices or more, and there is 1"),
        ({"schedule": "interleaved", "recompute": "always"}, "interleaved stages are not computed anew"),
        ({"schedule": "zb"}, "schedule 'zb' is not known"),
    ],
)
def test_what_cannot_be_is_refused_in_words(chain_profile, asked, words):
    """One line with both numbers, and what to ask for instead."""
    with pytest.raises(ShardwrightError, match=words):
        plan(chain_profile(8), microbatches=4, **asked)


def test_memory_that_is_enough_for_one_stage_a_device(chain_profile):
    """Interleaved, more micro-batches are held at once: said with the way out, where 1F1B fits and this does not."""
    caps = {stage.device: stage.memory_bytes for stage in plan(chain_profile(8), microbatches=4).stages}
    assert plan(chain_profile(8), microbatches=4, memory=caps).devices
    with pytest.raises(ShardwrightError, match=r"2 stages on each device fits the memory, the pins.*--schedule 1f1b"):
        plan(chain_profile(8), microbatches=4, memory=caps, schedule="interleaved")
    assert plan(chain_profile(8), microbatches=4, memory=caps, schedule="auto").schedule == "1f1b"


def test_micro_batches_that_no_round_divides(chain_profile):
    """Seven over three devices: two rounds would not be equal, and with two devices three would not."""
    speed = dict.fromkeys(("cpu:0", "cpu:1", "cpu:2"), 1.0)
    profile = chain_profile(12, speed=speed, microbatches=(1, 7))
    with pytest.raises(ShardwrightError, match="7 micro-batches cannot go around 3 devices in equal rounds"):
        plan(profile, microbatches=7, schedule="interleaved")


@pytest.mark.parametrize("asked", ["interleaved", "auto"])
def test_a_link_that_spoils_what_it_carries_is_not_used(chain_profile, asked):
    """No split goes over it; where that is all, one line says so."""
    profile = chain_profile(8, microbatches=(1, 4))
    links = tuple(
        link.model_copy(update={"probed_bytes": 8, "wrong_bytes": 1}) if link.source == "cpu:0" else link
        for link in profile.links
    )
    profile = profile.model_copy(update={"links": links})
    if asked == "auto":
        assert plan(profile, microbatches=4, schedule=asked).devices == ("cpu:0",)
    else:
        with pytest.raises(ShardwrightError, match="fits the memory, the pins and the links that may be used"):
            plan(profile, microbatches=4, schedule=asked)


def test_a_larger_batch_that_does_not_go_around_is_left_out(chain_profile):
    """Five micro-batches go around three devices in one round, ten in no equal rounds."""
    speed = dict.fromkeys(("cpu:0", "cpu:1", "cpu:2"), 1.0)
    profile = chain_profile(6, speed=speed, microbatches=(1, 5), overhead_s=9.0)
    pins = {f"net.u{i}": f"cpu:{i % 3}" for i in range(6)}
    result = plan(profile, microbatches=5, schedule="interleaved", pins=pins)
    assert result.predicted.speedup < 1.03
    assert all(change.what != "batch" or 2 not in change.tried for change in result.changes)


def test_time_that_is_out_ends_the_search_where_nothing_fits_yet(chain_profile):
    """After the first order of devices: there are six, of devices that differ."""
    speed = {"cpu:0": 1.0, "cpu:1": 1.3, "cpu:2": 1.7}
    profile = chain_profile(12, speed=speed, microbatches=(1, 6), saved_bytes=50_000)
    memory = {device: int(0.99 * size) for device, size in plan(profile, microbatches=6).memory().items()}
    cuts = []
    with pytest.MonkeyPatch.context() as patch:
        original = interleave._Best.cut
        patch.setattr(interleave._Best, "cut", lambda *args: cuts.append(args) or original(*args))
        with contextlib.suppress(ShardwrightError):
            plan(profile, microbatches=6, schedule="interleaved", memory=memory, time_limit_s=0.0)
    assert len(cuts) == 1
