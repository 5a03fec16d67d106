"""The memory over a step that a plan foresees: its most is the peak that the plan states, under every schedule."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shardwright.errors import ShardwrightError
from shardwright.profiler.profile import Tie
from shardwright.sharder.planning.plan import Plan
from shardwright.sharder.planning.planner import plan
from shardwright.sharder.planning.schedules.foreseen import memory_of, timeline_of

UNITS = 6


def states_its_peaks(made):
    """Each device's curve has the most that the plan states, in the drawn parts of the step, too."""
    timeline = timeline_of(made)
    curves = memory_of(made, timeline)
    assert curves is not None
    stated = made.memory()
    for device, curve in zip(made.pipelines[0], curves, strict=True):
        assert curve.bytes.max() == stated[device]
        assert curve.times_s.tolist() == sorted(curve.times_s)
        if timeline.step_s:
            assert max(curve.most_bytes(40, timeline.step_s)) == stated[device]
    return curves


@st.composite
def weighed(draw, make, train):
    """A chain, or a graph with branches, of units of unlike sizes, with what their operations and the optimizer take
    for a while."""
    wiring = {"u0": ["x"]}
    for i in range(1, UNITS):
        back = draw(st.integers(1, 2))
        wiring[f"u{i}"] = sorted({f"u{i - 1}", f"u{max(0, i - back)}"})
    devices = draw(st.integers(2, 4))
    counts = (1, 2, 3, 4, 6)
    profile = make(
        wiring,
        speed={f"cpu:{d}": 1.0 for d in range(devices)},
        microbatches=counts,
        train=train,
        forward_s={f"u{i}": float(draw(st.integers(1, 5))) for i in range(UNITS)},
    )
    size = st.integers(0, 5_000)
    nodes = []
    for node in profile.nodes:
        if node.kind != "unit":
            nodes.append(node)
            continue
        each = lambda: dict.fromkeys(counts, draw(size))  # noqa: E731
        sizes = {"saved_bytes": each(), "backward_peak_bytes": each(), "deferred_bytes": each()} if train else {}
        update = {"update_peak_bytes": {"cpu": draw(size)}, "update_left_bytes": 0} if train else {}
        nodes.append(
            node.model_copy(
                update={"output_bytes": each(), "forward_peak_bytes": each(), "param_bytes": draw(size)}
                | sizes
                | update
            )
        )
    tensors = [
        t.model_copy(update={"bytes": dict.fromkeys(counts, draw(size))}) if t.name != "x" else t
        for t in profile.tensors
    ]
    measurements = [
        m.model_copy(update={"backward_input_s": m.backward_s / 2, "backward_weight_s": m.backward_s / 2})
        for m in profile.measurements
    ]
    return profile.model_copy(
        update={"nodes": tuple(nodes), "tensors": tuple(tensors), "measurements": tuple(measurements)}
    )


CASES = {
    "1f1b": ({}, True),
    "gpipe": ({"schedule": "gpipe"}, True),
    "interleaved": ({"schedule": "interleaved"}, True),
    "zero-bubble": ({"schedule": "zero-bubble"}, True),
    "inference": ({}, False),
    "inference, interleaved": ({"schedule": "interleaved"}, False),
    "recompute": ({"recompute": "always"}, True),
    "recompute, gpipe": ({"recompute": "always", "schedule": "gpipe"}, True),
    "replicas": ({"replicas": 2}, True),
    "staged": ({"transfers": "staged"}, True),
    "overlap": ({"overlap": True}, True),
    "memory": ({"objective": "memory"}, True),
    "tied": ({}, True),
    "tied, interleaved": ({"schedule": "interleaved"}, True),
}


@pytest.mark.parametrize("case", CASES)
@settings(max_examples=25, suppress_health_check=list(HealthCheck), deadline=None)
@given(data=st.data())
def test_the_most_is_what_the_plan_states(case, make_profile, data):
    """Of plans as the planner makes them, with units pinned apart so that there is a pipeline; saved and loaded."""
    options, train = CASES[case]
    profile = data.draw(weighed(make_profile, train))
    pins = {"net.u0": "cpu:0", f"net.u{UNITS - 1}": "cpu:1"}
    if "replicas" in options or options.get("schedule") == "interleaved" or options.get("objective") == "memory":
        pins = {}
    if case.startswith("tied"):
        tie = Tie(name="w", nodes=("u0", f"u{UNITS - 1}"), copy_bytes=700, gradient_bytes=300)
        profile = profile.model_copy(update={"ties": (tie,)})
    try:
        made = plan(profile, microbatches=data.draw(st.sampled_from([2, 3, 4, 6])), pins=pins, **options)
    except ShardwrightError:
        return
    states_its_peaks(Plan.parse(made.model_dump_json(), source="plan.json"))
