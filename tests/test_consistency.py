"""Plans that were changed by hand: what does not hold together is refused in one line, with both sides."""

import json

import pytest

from shardwright.errors import ShardwrightError
from shardwright.sharder.planning.plan import Plan
from shardwright.sharder.planning.planner import plan

FOUR = {f"cpu:{i}": 1.0 for i in range(4)}


@pytest.fixture
def contents(chain_profile):
    """By name, plans as they are on disk."""
    profile = chain_profile(8, speed=FOUR, param_bytes=10**6)
    two = chain_profile(8, speed={"cpu:0": 1.0, "cpu:1": 1.0})
    made = {
        "replicas": plan(profile, microbatches=4, replicas=2),
        "interleaved": plan(two, microbatches=4, schedule="interleaved", stages_per_device=2),
        "chain": plan(profile, microbatches=4),
    }
    return {name: json.loads(one.model_dump_json()) for name, one in made.items()}


def replica_devices(stage, devices):
    return lambda it: it["stages"][stage].update(replica_devices=devices)


EDITS = {
    "a replica too many": (
        "replicas",
        lambda it: it.update(replicas=4),
        "stage 0 has 1 replica_devices.*replicas 4.* 3",
    ),
    "a device too few": ("replicas", replica_devices(1, []), "stage 1 has 0 replica_devices.*replicas 2 needs 1"),
    "a device too many": ("chain", replica_devices(0, ["cpu:7"]), "stage 0 has 1 replica_devices.*replicas 1 needs 0"),
    "an odd number": ("replicas", lambda it: it.update(microbatches=3), "3 microbatches cannot .* among 2 replicas"),
    "in two replicas": ("replicas", replica_devices(0, ["cpu:1"]), "cpu:1 is in replica 0 and in replica 1"),
    "twice in one": ("replicas", replica_devices(0, ["cpu:3"]), "cpu:3 has 2 stages, and a device has 1"),
    "twice in a chain": (
        "chain",
        lambda it: it["stages"][1].update(device=it["stages"][0]["device"]),
        "cpu:0 has 2 stages, and a device has 1",
    ),
    "one stage less": ("interleaved", lambda it: it["stages"].pop(), "3 stages are not 2 on each device"),
    "not in turn": (
        "interleaved",
        lambda it: it["stages"][2].update(device="cpu:1"),
        "stage 2 is on cpu:1, and with 2 devices it is on that of stage 0, cpu:0",
    ),
    "numbered anew": ("chain", lambda it: it["stages"][1].update(index=3), r"stages have the indices \[0, 3, "),
    "no stages": ("chain", lambda it: it.update(stages=[]), r"stages have the indices \[\]"),
    "moved alone": (
        "chain",
        lambda it: it["nodes"][-1].update(device="cpu:0"),
        "node outputs is on cpu:0, and its stage 3 on cpu:3",
    ),
    "a stage moved alone": ("chain", lambda it: it["stages"][0].update(device="cuda:9"), "its stage 0 on cuda:9"),
    "a node less": ("chain", lambda it: it["nodes"].pop(1), "node u1 reads of u0, which is not among its nodes"),
    "a last node less": (
        "chain",
        lambda it: it.update(nodes=it["nodes"][:-2]),
        "stage 3 has unit net.u7, which is",
    ),
    "an unknown stage": ("chain", lambda it: it["nodes"][-1].update(stage=9), "is in stage 9, and the last stage is 3"),
}


@pytest.mark.parametrize("edit", EDITS)
def test_a_file_that_contradicts_itself_is_refused(contents, tmp_path, edit):
    """By name of the file, in one line that says both numbers and a remedy."""
    name, change, says = EDITS[edit]
    path = tmp_path / "net.plan.json"
    path.write_text(json.dumps(contents[name]))
    Plan.load(path)
    change(contents[name])
    path.write_text(json.dumps(contents[name]))
    with pytest.raises(ShardwrightError, match=says) as caught:
        Plan.load(path)
    line = str(caught.value)
    assert line.startswith(f"{path} contradicts itself: ")
    assert line.endswith(", or make the plan again")
    assert "\n" not in line


def test_a_damaged_field_is_named_as_ever(contents, tmp_path):
    """By its path."""
    contents["chain"]["stages"][0]["forward_s"] = "soon"
    (tmp_path / "a.json").write_text(json.dumps(contents["chain"]))
    with pytest.raises(ShardwrightError, match=r"a.json is a damaged plan: stages.0.forward_s"):
        Plan.load(tmp_path / "a.json")
