"""The simulated step against a plain event-driven one, closed forms, drawn timelines and the laws of a schedule."""

import dataclasses
import itertools
import statistics
import time

import event_driven
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardwright.errors import ShardwrightError
from shardwright.sharder.planning.schedules import simulate as module
from shardwright.sharder.planning.schedules.simulate import StageCost, expected_step_s, simulate
from shardwright.sharder.planning.schedules.timeline import Transfer

SHAPES = list(itertools.product([1, 2, 3, 5], [1, 2, 4, 7]))
SECONDS = st.floats(0, 10, allow_subnormal=False) | st.sampled_from([0.0, 0.5, 1.0, 3.0])
OWN = st.none() | SECONDS
COSTS = st.builds(StageCost, *[SECONDS] * 8, receive_forward_s=OWN, send_backward_s=OWN, engine_s=SECONDS)


@st.composite
def pipelines(draw, transfers=("serial", "overlapped")):
    """Costs, micro-batches and the keywords of a random step."""
    schedule = draw(st.sampled_from(["gpipe", "1f1b", "interleaved", "zero-bubble"]))
    devices = draw(st.integers(1, 5))
    each = draw(st.integers(1, 3)) if schedule in ("interleaved", "zero-bubble") else 1
    microbatches = draw(
        st.integers(1, 9).filter(
            lambda m: schedule in ("gpipe", "1f1b") or m % max(1, m // devices) == 0  # what they are defined for
        )
    )
    costs = draw(st.lists(COSTS, min_size=devices * each, max_size=devices * each))
    keywords = {"schedule": schedule, "stages_per_device": each, "train": draw(st.booleans())}
    keywords["staged"] = draw(st.booleans())
    return costs, microbatches, {**keywords, "transfers": draw(st.sampled_from(transfers))}


def drawn(timeline):
    """The timeline as text, a column for each second."""
    rows = [[".."] * int(timeline.step_s) for _ in timeline.busy_s]
    for slot in timeline.slots:
        rows[slot.device][int(slot.start_s)] = f"{slot.operation.kind}{slot.operation.microbatch}"
    return [" ".join(row).rstrip(" .") for row in rows]


def test_1f1b_on_three_stages():
    """1F1B as its paper draws it."""
    assert drawn(simulate([StageCost(1.0, 1.0)] * 3, 4)) == [
        "F0 F1 F2 .. .. B0 F3 B1 .. B2 .. B3",
        ".. F0 F1 .. B0 F2 B1 F3 B2 .. B3",
        ".. .. F0 B0 F1 B1 F2 B2 F3 B3",
    ]


def test_gpipe_on_two_stages():
    """GPipe runs all forwards before the first backward."""
    timeline = simulate([StageCost(1.0, 1.0)] * 2, 3, schedule="gpipe")
    assert drawn(timeline) == ["F0 F1 F2 .. .. B0 B1 B2", ".. F0 F1 F2 B0 B1 B2"]


def test_zero_bubble_on_three_stages():
    """ZB-H1: the gradients of weights fill what 1F1B waits for."""
    costs = [StageCost(1.0, backward_input_s=1.0, backward_weight_s=1.0)] * 3
    assert drawn(simulate(costs, 4, schedule="zero-bubble")) == [
        "F0 F1 F2 .. .. B0 W0 F3 B1 W1 B2 W2 B3 W3",
        ".. F0 F1 .. B0 F2 B1 W0 F3 B2 W1 B3 W2 W3",
        ".. .. F0 B0 F1 B1 F2 B2 W0 F3 B3 W1 W2 W3",
    ]


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@pytest.mark.parametrize(("stages", "microbatches"), SHAPES)
def test_equal_stages_without_transfers(schedule, stages, microbatches):
    """A step takes (M + S - 1)(f + b), and (S - 1) / (M + S - 1) of it is bubble."""
    timeline = simulate([StageCost(2.0, 3.0)] * stages, microbatches, schedule=schedule)
    assert timeline.step_s == (microbatches + stages - 1) * 5.0
    assert timeline.bubble == pytest.approx((stages - 1) / (microbatches + stages - 1))


@pytest.mark.parametrize(("devices", "rounds", "each"), [*itertools.product([1, 2, 4], [1, 2, 5], [1, 2, 3])])
def test_interleaving_divides_the_bubble(devices, rounds, each):
    """With v stages a device a step takes (M + (D - 1) / v)(f + b) of the device's whole model part (SC 2021, 2.2)."""
    costs = [StageCost(2.0, 3.0)] * (devices * each)
    timeline = simulate(costs, rounds * devices, schedule="interleaved", stages_per_device=each)
    assert timeline.step_s == (rounds * devices + (devices - 1) / each) * each * 5.0


@pytest.mark.parametrize(("devices", "rounds"), [*itertools.product([1, 2, 4, 7], [2, 3, 5])])
def test_zero_bubble_leaves_a_third_of_the_bubble(devices, rounds):
    """With f = b = w, the bubble of ZB-H1 is (D - 1)(f + b - w), where that of 1F1B is (D - 1)(f + b + w)."""
    costs = [StageCost(1.0, 2.0, backward_input_s=1.0, backward_weight_s=1.0)] * devices
    microbatches = rounds * devices
    timeline = simulate(costs, microbatches, schedule="zero-bubble")
    assert timeline.step_s == 3 * microbatches + (devices - 1)
    assert simulate(costs, microbatches).step_s == 3 * microbatches + 3 * (devices - 1)


@pytest.mark.parametrize(("stages", "microbatches"), SHAPES)
def test_inference_has_forwards_only(stages, microbatches):
    """Without training a step takes (M + S - 1) f, whatever the backward would cost."""
    timeline = simulate([StageCost(2.0, 3.0)] * stages, microbatches, schedule="gpipe", train=False)
    assert timeline.step_s == (microbatches + stages - 1) * 2.0
    assert {slot.operation.kind for slot in timeline.slots} == {"F"}


def test_transfers_keep_both_ends_busy():
    """One micro-batch passes forward, link, forward, backward, link, backward one after the other."""
    timeline = simulate([StageCost(1.0, 2.0, send_forward_s=0.5, receive_backward_s=0.25), StageCost(3.0, 4.0)], 1)
    assert timeline.step_s == 1 + 0.5 + 3 + 4 + 0.25 + 2
    assert timeline.busy_s == (3.75, 7.75)
    assert timeline.transfers == (
        Transfer(("F", 0, 0), sender=0, receiver=1, start_s=1.0, end_s=1.5, received_s=1.5),
        Transfer(("B", 1, 0), sender=1, receiver=0, start_s=8.5, end_s=8.75, received_s=8.75),
    )


def test_busy_receiver_takes_the_transfer_afterwards():
    """A tensor that arrives while its receiver computes costs the receiver its time once it is free."""
    timeline = simulate([StageCost(1.0, send_forward_s=1.0), StageCost(5.0)], 2, schedule="gpipe", train=False)
    # F0 is there at 2; F1 arrives at 4, is received from 7 to 8 and computed until 13.
    assert [(slot.start_s, slot.end_s) for slot in timeline.slots if slot.device == 1] == [(2, 7), (8, 13)]
    assert [(t.start_s, t.end_s, t.received_s) for t in timeline.transfers] == [(1, 2, 2), (3, 4, 8)]


def test_overlapped_transfers_keep_nobody_busy_but_their_link():
    """Messages on one link follow each other while both ends compute."""
    costs = [StageCost(1.0, send_forward_s=3.0), StageCost(1.0)]
    timeline = simulate(costs, 3, schedule="gpipe", train=False, transfers="overlapped")
    assert [(slot.start_s, slot.end_s) for slot in timeline.slots if slot.device == 0] == [(0, 1), (1, 2), (2, 3)]
    assert [(t.start_s, t.end_s, t.received_s) for t in timeline.transfers] == [(1, 4, 4), (4, 7, 7), (7, 10, 10)]
    assert timeline.step_s == 11
    assert timeline.busy_s == (3, 3)


def test_two_devices_of_two_stages_share_a_link_each_way():
    """Between two devices activations that go on and gradients that go back can be on the same directed link."""
    costs = [StageCost(1.0, 1.0, send_forward_s=1.0, receive_backward_s=1.0)] * 4
    timeline = simulate(costs, 4, schedule="interleaved", stages_per_device=2, transfers="overlapped")
    for sender in (0, 1):
        sent = [t for t in timeline.transfers if t.sender == sender]
        assert {t.operation.kind for t in sent} == {"F", "B"}
        assert all(a.end_s <= b.start_s for a, b in itertools.pairwise(sent))


def test_staged_transfers_take_one_end_after_the_other():
    """What is sent waits in the host's memory: it is there after both ends' parts, each of which keeps its own busy."""
    costs = [StageCost(1.0, send_forward_s=2.0), StageCost(1.0, receive_forward_s=3.0)]
    timeline = simulate(costs, 2, schedule="gpipe", train=False, staged=True)
    assert [(slot.start_s, slot.end_s) for slot in timeline.slots if slot.device == 0] == [(0, 1), (3, 4)]
    assert [(slot.start_s, slot.end_s) for slot in timeline.slots if slot.device == 1] == [(6, 7), (10, 11)]
    assert timeline.busy_s == (2 * (1 + 2), 2 * (3 + 1))


@given(pipelines(transfers=("overlapped",)))
@settings(deadline=None)
def test_overlapped_a_device_sends_and_receives_one_thing_at_a_time(pipeline):
    """No step is shorter than what a device computes, all that it sends, or all that it receives."""
    costs, microbatches, keywords = pipeline
    timeline = simulate(costs, microbatches, **keywords)
    devices = len(timeline.busy_s)
    sent, received = [0.0] * devices, [0.0] * devices
    for slot in timeline.slots:
        sent[slot.device] += event_driven.out_s(costs, slot.operation, devices)
        received[slot.device] += event_driven.into_s(costs, slot.operation, devices)
    assert timeline.step_s >= max(*timeline.busy_s, *sent, *received) - 1e-9


def test_stages_on_the_same_device_exchange_nothing():
    """One device of two stages has no link to wait for."""
    costs = [StageCost(1.0, 1.0, send_forward_s=9.0, receive_backward_s=9.0)] * 2
    assert simulate(costs, 2, schedule="interleaved", stages_per_device=2).step_s == 8


def test_update_comes_once_at_the_end_of_each_stage():
    """The step ends with the last update; an update hidden behind another stage's work costs nothing."""
    costs = [StageCost(1.0, 1.0, update_s=2.0), StageCost(1.0, 1.0, update_s=3.0)]
    plain = simulate([StageCost(1.0, 1.0)] * 2, 4)
    timeline = simulate(costs, 4)
    assert timeline.step_s == plain.step_s + 2.0
    assert timeline.busy_s == (10.0, 11.0)


@given(pipelines())
@settings(deadline=None, max_examples=200)
def test_equal_to_an_event_driven_simulation(pipeline):
    """All devices at once give the slots, the step and the busy times of one event after the other."""
    costs, microbatches, keywords = pipeline
    timeline = simulate(costs, microbatches, **keywords)
    played = event_driven.play(costs, microbatches, **keywords)
    assert set(timeline.slots) == set(played.slots)
    assert timeline.step_s == pytest.approx(played.step_s)
    assert timeline.busy_s == pytest.approx(played.busy_s)


@given(pipelines())
@settings(deadline=None)
def test_no_step_is_shorter_than_its_largest_load_or_its_longest_path(pipeline):
    """Each device has its load to do, and one micro-batch has to pass through all stages and back."""
    costs, microbatches, keywords = pipeline
    timeline = simulate(costs, microbatches, **keywords)
    split = keywords["schedule"] == "zero-bubble"
    there = sum(cost.forward_s for cost in costs)
    back = sum((cost.backward_input_s if split else cost.backward_s) for cost in costs) if keywords["train"] else 0.0
    if len(timeline.busy_s) > 1:
        there += sum(cost.send_forward_s for cost in costs[:-1])
        back += sum(cost.receive_backward_s for cost in costs[:-1]) if keywords["train"] else 0.0
    assert timeline.step_s >= max(*timeline.busy_s, there + back) - 1e-9
    assert 0 <= timeline.bubble + 1e-9 <= 1 + 1e-9


@given(pipelines(transfers=("serial",)))
@settings(deadline=None)
def test_no_device_does_two_things_at_once(pipeline):
    """Slots and serial transfers of a device follow each other, whether it sends or receives."""
    costs, microbatches, keywords = pipeline
    timeline = simulate(costs, microbatches, **keywords)
    devices = len(timeline.busy_s)
    for device in range(devices):
        taken = [(slot.start_s, slot.end_s) for slot in timeline.slots if slot.device == device]
        for transfer in timeline.transfers:
            if transfer.sender == device:
                sent_s = event_driven.out_s(costs, transfer.operation, devices)
                taken.append((transfer.start_s, transfer.start_s + sent_s))
            if transfer.receiver == device:
                reader = event_driven.target(transfer.operation, len(costs))
                received_s = event_driven.into_s(costs, reader, devices)
                taken.append((transfer.received_s - received_s, transfer.received_s))
        taken = sorted((start_s, end_s) for start_s, end_s in taken if end_s > start_s + 1e-9)
        assert all(a[1] <= b[0] + 1e-9 for a, b in itertools.pairwise(taken))


@given(pipelines(), st.data())
@settings(deadline=None)
def test_nothing_gets_faster_by_a_dearer_part(pipeline, data):
    """The order of operations is fixed, so no step shortens when one cost grows."""
    costs, microbatches, keywords = pipeline
    stage = data.draw(st.integers(0, len(costs) - 1))
    name = data.draw(st.sampled_from([name for name, s in dataclasses.asdict(costs[stage]).items() if s is not None]))
    dearer = list(costs)
    dearer[stage] = dataclasses.replace(costs[stage], **{name: getattr(costs[stage], name) + data.draw(SECONDS)})
    assert simulate(dearer, microbatches, **keywords).step_s >= simulate(costs, microbatches, **keywords).step_s - 1e-9


@given(pipelines())
@settings(deadline=None)
def test_overlapped_transfers_never_take_longer(pipeline):
    """What crosses while its ends compute delays nothing that would not have been delayed by it anyway."""
    costs, microbatches, keywords = pipeline
    overlapped = simulate(costs, microbatches, **{**keywords, "transfers": "overlapped"})
    assert overlapped.step_s <= simulate(costs, microbatches, **{**keywords, "transfers": "serial"}).step_s + 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved", "zero-bubble"])
def test_a_thousand_stages_and_four_thousand_micro_batches(schedule):
    """A step of 8 to 12 million operations takes less than 10 s of a core."""
    costs = [StageCost(1.0, 2.0, 0.0, 0.1, 0.1, 0.0, 1.0, 1.0)] * 1000
    began = time.process_time()
    simulate(costs, 4096, schedule=schedule)
    assert time.process_time() - began < 10


def test_zero_bubble_guesses_no_split():
    """A backward that nobody split is refused by its stage."""
    costs = [StageCost(1.0, 2.0, backward_input_s=1.0, backward_weight_s=1.0), StageCost(1.0, 2.0)]
    with pytest.raises(ShardwrightError, match="stage 1 needs backward_input_s and backward_weight_s"):
        simulate(costs, 2, schedule="zero-bubble")
    assert simulate(costs, 2, schedule="zero-bubble", train=False).step_s == 3.0


def test_stages_have_to_be_equally_many_on_each_device():
    """Five stages are not two a device."""
    with pytest.raises(ShardwrightError, match="5 stages cannot be 2 on each device"):
        simulate([StageCost(1.0)] * 5, 4, schedule="interleaved", stages_per_device=2)


def test_steady_devices_step_as_simulated():
    """Without variation the expected step is the simulated one, and has no spread."""
    costs = [StageCost(1.0, 2.0), StageCost(1.0, 2.0)]
    assert expected_step_s(costs, [(), (1.0, 1.0)], 4) == (simulate(costs, 4).step_s, 0.0)


def test_a_pipeline_waits_for_the_device_that_is_slow_at_the_moment():
    """When each device is at times faster and slower, the median step is longer than that of the median times."""
    costs = [StageCost(1.0, 2.0), StageCost(1.0, 2.0)]
    varied, spread = expected_step_s(costs, [(0.8, 1.0, 1.2)] * 2, 8)
    assert varied > simulate(costs, 8).step_s
    assert spread > 0
    assert expected_step_s(costs, [(0.8, 1.0, 1.2)] * 2, 8) == (varied, spread)


@given(
    st.lists(st.tuples(st.floats(0.1, 3), st.floats(0.1, 3), st.floats(0, 2), st.floats(0, 1)), min_size=1, max_size=3),
    st.lists(st.lists(st.floats(0.3, 3), max_size=6), min_size=3, max_size=3),
    st.integers(1, 5),
    st.sampled_from(["gpipe", "1f1b"]),
)
def test_no_median_step_is_shorter_than_a_load(works, times, count, schedule):
    """However the speeds vary, a step takes at least what its longest device does at its median speed."""
    costs = [StageCost(*work) for work in works]
    relative = [[t / statistics.median(seen) for t in seen] for seen in times[: len(costs)]]
    count = max(count, len(costs))  # 1F1B needs a micro-batch for each stage
    load_s = max(count * (forward_s + backward_s) + update_s for forward_s, backward_s, update_s, _ in works)
    assert expected_step_s(costs, relative, count, schedule=schedule)[0] >= load_s * (1 - 1e-9)


def test_each_device_has_its_variation():
    """As many variations as stages, where a device has two, are a mistake."""
    with pytest.raises(ShardwrightError, match="there are 1 devices, and variations of 2"):
        expected_step_s([StageCost(1.0)] * 2, [(1.0,)] * 2, 1, schedule="interleaved", stages_per_device=2)


def test_draws_in_several_goes_are_the_same_draws(monkeypatch):
    """When not all draws fit into memory at once, some follow the others."""
    costs, variations = [StageCost(1.0, 2.0, 0.5), StageCost(1.5, 2.0)], [(0.8, 1.0, 1.2)] * 2
    at_once = expected_step_s(costs, variations, 4)
    monkeypatch.setattr(module, "AT_ONCE", 50)
    assert expected_step_s(costs, variations, 4) == at_once


def test_one_stage_varies_around_its_median():
    """A device alone waits for nobody: its expected step is its median step."""
    assert expected_step_s([StageCost(1.0, 2.0)], [(0.5, 1.0, 1.0, 1.0, 1.5)], 2)[0] == pytest.approx(6.0)


def test_a_devices_stages_are_slow_together():
    """A draw is of a device: with two stages on it, both take as long."""
    costs = [StageCost(1.0, 2.0)] * 2
    step_s, _ = expected_step_s(costs, [(2.0, 2.0, 4.0)], 1, schedule="interleaved", stages_per_device=2)
    assert step_s in (12.0, 24.0)
