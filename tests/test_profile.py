"""The profile as a record, a file, a table."""

from __future__ import annotations

import copy
import json

import jsonschema
import pytest
from pydantic import ValidationError

from shardwright.errors import ShardwrightError
from shardwright.profiler.profile import Profile, TensorSpec


def test_round_trip(chain_profile, tmp_path):
    """A profile read back equals the one that was saved, also after its times were looked up."""
    profile = chain_profile(3)
    assert profile.measurement("u0", "cpu:0", 2) is not None
    profile.save(tmp_path / "p.json")
    assert Profile.load(tmp_path / "p.json") == profile


def test_file_obeys_the_published_schema(chain_profile):
    """The JSON schema is itself valid, accepts a profile's JSON, and refuses one without its nodes."""
    schema = Profile.model_json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    content = json.loads(chain_profile(2).model_dump_json())
    jsonschema.validate(content, schema)
    del content["nodes"]
    with pytest.raises(jsonschema.ValidationError, match="nodes"):
        jsonschema.validate(content, schema)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: c["tensors"].pop(0), "tensor 'x' is used but not listed"),
        (lambda c: c["devices"].pop(), "device 'cpu:1' is used but not listed"),
        (lambda c: c["nodes"].pop(1), "node 'u0' is used but not listed"),
        (lambda c: c.update(colocate=[["u0", "u9"]]), "node 'u9' is used but not listed"),
        (lambda c: c.update(microbatches=[]), "microbatches: it has 0, and needs 1 or more"),
        (lambda c: c["measurements"][0].update(forward_s=-1), "measurements.0.forward_s: Input should be greater"),
        (lambda c: c.pop("links"), "links: it is missing"),
    ],
)
def test_damaged_profile_is_one_clear_line(chain_profile, tmp_path, change, says):
    """A file edited into nonsense is refused in one line that names the first fault."""
    content = chain_profile(2).model_dump(mode="json")
    change(content)
    path = tmp_path / "p.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ShardwrightError, match="damaged profile") as caught:
        Profile.load(path)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_truncated_and_newer_profiles_are_refused(chain_profile, tmp_path):
    """Half a file and a file of a later release are each refused with what to do."""
    path = tmp_path / "p.json"
    text = chain_profile(2).model_dump_json()
    path.write_text(text[: len(text) // 2])
    with pytest.raises(ShardwrightError, match=r"p\.json is not complete JSON .*; make the profile again"):
        Profile.load(path)
    path.write_text(text.replace('"version":1', '"version":2'))
    with pytest.raises(ShardwrightError, match="has profile version 2; this shardwright reads up to 1: upgrade"):
        Profile.load(path)


def test_profile_is_frozen(chain_profile):
    """A profile cannot be changed, and a copy of it is equal."""
    profile = chain_profile(1)
    with pytest.raises(ValidationError, match="frozen"):
        profile.batch = 9
    assert copy.deepcopy(profile) == profile


def test_step_is_the_sum_over_the_nodes(chain_profile):
    """One device's step is each micro-batch's forward and backward over all nodes, and it is asked for by name."""
    profile = chain_profile(4, speed={"cpu:0": 1.0, "cpu:1": 2.0}, overhead_s=0.25)
    assert profile.step_s("cpu:0") == 4 * (3 + 0.25)
    assert profile.step_s("cpu:1", 4) == pytest.approx(4 * (1.5 + 4 * 0.25))
    with pytest.raises(ShardwrightError, match="no times for cpu:7 at 1 micro-batches; it has devices cpu:0, cpu:1"):
        profile.step_s("cpu:7")


def test_frame_has_a_row_for_each_measurement(chain_profile):
    """The table has times, spreads and bytes of every node on every device at every micro-batch."""
    frame = chain_profile(3).frame()
    assert len(frame) == 3 * 2 * 3
    assert list(frame.columns) == [
        "node",
        "device",
        "microbatches",
        "repeats",
        "forward_s",
        "forward_spread_s",
        "backward_s",
        "backward_spread_s",
        "backward_input_s",
        "backward_weight_s",
        "recompute_s",
        "update_s",
        "first_call_s",
        "median_error",
        "outliers",
        "peak_bytes",
        "source",
        "host_bound",
        "kind",
        "type",
        "param_bytes",
        "buffer_bytes",
        "grad_bytes",
        "optimizer_bytes",
        "output_bytes",
        "saved_bytes",
    ]
    row = frame[(frame.node == "u1") & (frame.device == "cpu:1") & (frame.microbatches == 4)].iloc[0]
    assert (row.forward_s, row.backward_s, row.saved_bytes, row.kind) == (0.25, 0.5, 200, "unit")


def test_tensor_spec_reads_as_a_person_writes_it():
    """A shape is shown as dtype and extents; a tensor without extents is a scalar."""
    assert str(TensorSpec(name="x", dtype="float32", shape=(8, 3, 4))) == "float32 8x3x4"
    assert str(TensorSpec(name="x", dtype="int64", shape=())) == "int64 scalar"
