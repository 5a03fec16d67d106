"""Chrome traces of runs and plans, parsed again: valid events, a process a timeline, a thread a stage, no overlaps."""

import json
from itertools import groupby, pairwise
from pathlib import Path

import pytest

import shardwright as sw
from shardwright.sharder.planning.schedules.foreseen import timeline_of
from shardwright.sharder.runtime.record import Account, Accounts, Equality, Run, Slot, StageAccounts, Timed


def slot(stage, what, microbatch, start_s, end_s):
    return Slot(stage=stage, what=what, microbatch=microbatch, start_s=start_s, end_s=end_s)


MEASURED = (
    slot(0, "forward", 0, 0.0, 0.1 + 0.2),
    slot(0, "send activations", 0, 0.1 + 0.2, 0.4),
    slot(0, "wait", 0, 0.4, 0.7),
    slot(0, "receive gradients", 0, 0.7, 0.8),
    slot(1, "receive activations", 0, 0.3, 0.4),
    slot(1, "loss", None, 0.4, 0.41),
    slot(1, "backward", 0, 0.41, 0.7),
)
PREDICTED = (slot(0, "forward", 0, 0.0, 0.25), slot(1, "update", None, 0.5, 0.6), slot(1, "tie", None, 0.6, 0.7))


@pytest.fixture
def run():
    """Of two stages."""
    nothing = Account(forward_s=0, backward_s=0, update_s=0, transfer_s=0, bubble_s=0, other_s=0)
    return Run(
        model="net.py:Net",
        batch=4,
        train=True,
        devices=("cpu:0", "cpu:1"),
        schedule="1f1b",
        microbatches=1,
        steps=1,
        equality=Equality(outputs=0, gradients=0, tolerance=0, tensors=1),
        sharded=Timed(predicted_s=0.7, measured_s=0.8, spread_s=0.0),
        baseline_device=None,
        baseline=None,
        accounts=Accounts(
            noted_s=(0.8,),
            measured_s=0.8,
            predicted_s=0.7,
            stages=tuple(StageAccounts(device=d, predicted=nothing, measured=nothing) for d in ("cpu:0", "cpu:1")),
            off=(),
            predicted=PREDICTED,
            measured=MEASURED,
        ),
    )


def test_a_trace_is_what_the_format_asks_for(run, tmp_path):
    """Saved, loaded again and written from the file: complete events in microseconds, with named tracks."""
    run.save(tmp_path / "run.json")
    sw.Run.load(tmp_path / "run.json").save_trace(tmp_path / "run.trace.json")
    trace = json.loads((tmp_path / "run.trace.json").read_text(encoding="utf-8"))
    assert trace["displayTimeUnit"] in ("ms", "ns")
    complete = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    metadata = [event for event in trace["traceEvents"] if event["ph"] == "M"]
    assert len(complete) + len(metadata) == len(trace["traceEvents"])
    for event in trace["traceEvents"]:
        assert isinstance(event["name"], str)
        assert isinstance(event["pid"], int)
        assert isinstance(event["tid"], int)
    assert {(e["pid"], e["args"]["name"].partition(":")[0]) for e in metadata if e["name"] == "process_name"} == {
        (1, "measured"),
        (2, "predicted"),
    }
    threads = {(e["pid"], e["tid"]): e["args"]["name"] for e in metadata if e["name"] == "thread_name"}
    assert set(threads.values()) == {"stage 0: cpu:0", "stage 1: cpu:1"}
    assert {(e["pid"], e["tid"]) for e in complete} <= set(threads)
    assert len(threads) == 4
    assert [(e["name"], e["ts"], e["dur"]) for e in complete if e["pid"] == 1] == [
        ("F0", 0.0, 300000.0),
        ("send F0", 300000.0, 100000.0),
        ("wait", 400000.0, 300000.0),
        ("recv B0", 700000.0, 100000.0),
        ("recv F0", 300000.0, 100000.0),
        ("loss", 400000.0, 10000.0),
        ("B0", 410000.0, 290000.0),
    ]
    assert [e["name"] for e in complete if e["pid"] == 2] == ["F0", "update", "tie"]


def test_no_event_of_a_track_overlaps_another(run):
    """Complete events of a track that overlap must nest, and these stand side by side."""
    from shardwright.sharder.runtime.chrome import trace_of

    events = [event for event in trace_of(run, run.accounts)["traceEvents"] if event["ph"] == "X"]
    track = lambda event: (event["pid"], event["tid"])  # noqa: E731
    for _, own in groupby(sorted(events, key=lambda e: (track(e), e["ts"])), key=track):
        for before, after in pairwise(own):
            assert round(1e3 * (before["ts"] + before["dur"])) <= round(1e3 * after["ts"])


def test_a_run_without_accounts_says_how_to_get_them(run, tmp_path):
    """A file of before they were kept loads, and has no timeline to show."""
    content = json.loads(run.model_dump_json())
    del content["accounts"]
    old = sw.Run.parse(json.dumps(content), source="run.json")
    assert old.accounts is None
    assert old.disturbance_percent is None
    with pytest.raises(sw.ShardwrightError, match=r"kept no timeline: run the plan again, with `shard --run --trace"):
        old.save_trace(tmp_path / "run.trace.json")


COSTS = Path(__file__).parents[1] / "examples" / "costs.json"


def saved(plan, folder):
    """The events of a plan's trace."""
    plan.save_trace(folder / "plan.trace.json")
    return json.loads((folder / "plan.trace.json").read_text(encoding="utf-8"))["traceEvents"]


@pytest.mark.parametrize(
    "asked", [{}, {"schedule": "gpipe"}, {"schedule": "interleaved", "devices": ["cuda:0", "cuda:1"]}]
)
def test_a_plan_s_trace_is_the_step_that_it_foresees(asked, tmp_path):
    """Each operation when the simulator has it, and of each device's memory the peak that the plan states."""
    plan = sw.plan(sw.Costs.load(COSTS), **asked)
    events = saved(plan, tmp_path)
    computes = [e for e in events if e["ph"] == "X" and e["cat"] in ("forward", "backward")]
    found = sorted((e["tid"] - 1, e["args"]["stage"], e["cat"], e["args"]["microbatch"], e["ts"]) for e in computes)
    kinds = {"F": "forward", "B": "backward"}
    assert found == sorted(
        (slot.device, slot.operation.stage, kinds[slot.operation.kind], slot.operation.microbatch,
         pytest.approx(1e6 * slot.start_s, abs=1e-2))
        for slot in timeline_of(plan).slots
    )  # fmt: skip
    held = {}
    for event in events:
        if event["ph"] == "C":
            held.setdefault(event["name"], []).append(event["args"]["bytes"])
    assert {name: max(sizes) for name, sizes in held.items()} == {
        f"memory of {device}": size for device, size in plan.memory().items()
    }


def test_a_latency_plan_s_trace_is_one_input_s_way(tmp_path):
    """Each part when and where the plan has it."""
    plan = sw.plan(sw.Costs.load(COSTS), objective="latency")
    events = [event for event in saved(plan, tmp_path) if event["ph"] == "X"]
    found = [(plan.devices[e["tid"] - 1], e["cat"], round(e["ts"]), round(e["dur"])) for e in events]
    stated = [(t.device, t.phase, round(1e6 * t.start_s), round(1e6 * (t.end_s - t.start_s))) for t in plan.timeline]
    assert sorted(found) == sorted(stated)


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ({"contiguous": False}, "a free assignment has no pipeline.*--objective latency"),
        ({"devices": ["cuda:0"]}, "cuda:0 alone.*--pin"),
    ],
)
def test_a_plan_without_a_timeline_says_so(asked, why, tmp_path):
    """And writes nothing."""
    plan = sw.plan(sw.Costs.load(COSTS), **asked)
    with pytest.raises(sw.ShardwrightError, match=why):
        plan.save_trace(tmp_path / "plan.trace.json")
    assert not [*tmp_path.iterdir()]
