"""Orders of operations: drawn ones, the laws that all keep, and PyTorch's own tables."""

from unittest.mock import MagicMock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.pipelining import schedules as torch_schedules

from shardwright.errors import ShardwrightError
from shardwright.sharder.planning.problem import in_flight
from shardwright.sharder.planning.schedules import schedule as module
from shardwright.sharder.planning.schedules.schedule import Operation, operations, order

SCHEDULES = ["gpipe", "1f1b", "interleaved", "zero-bubble"]


def takes(schedule, devices, microbatches, stages_per_device):
    """Whether the schedule is defined for these numbers."""
    if schedule in ("gpipe", "1f1b"):
        return stages_per_device == 1
    return microbatches % max(1, microbatches // devices) == 0


SHAPES = [
    (schedule, devices, microbatches, stages_per_device)
    for schedule in SCHEDULES
    for devices in (1, 2, 3, 4)
    for microbatches in (1, 2, 3, 4, 6, 8, 10)
    for stages_per_device in (1, 2, 3)
    if takes(schedule, devices, microbatches, stages_per_device)
]


def text(todo):
    """The operations of one stage a device."""
    return " ".join(f"{op.kind}{op.microbatch}" for op in todo)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "zero-bubble"])
def test_the_orders_that_the_module_draws(schedule):
    """The table at the head of the module is what comes out."""
    drawn = next(line for line in module.__doc__.splitlines() if line.strip().startswith(f"{schedule}  "))
    assert text(operations(schedule, 2, 3, 4)) in drawn


def test_1f1b_begins_with_a_forward_for_every_device_behind():
    """The first of three devices runs two forwards, then one forward and one backward."""
    assert text(operations("1f1b", 0, 3, 4)) == "F0 F1 F2 B0 F3 B1 B2 B3"


def test_interleaved_goes_around_in_rounds():
    """Two devices of two stages: two micro-batches climb both stages of a device, backwards descend."""
    todo = operations("interleaved", 1, 2, 4, stages_per_device=2)
    assert " ".join(f"{kind}{stage}.{microbatch}" for kind, stage, microbatch in todo) == (
        "F1.0 F1.1 F3.0 B3.0 F3.1 B3.1 F1.2 B1.0 F1.3 B1.1 F3.2 B3.2 F3.3 B3.3 B1.2 B1.3"
    )


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_inference_has_forwards_only(schedule):
    """Without training each micro-batch passes once, in order."""
    assert operations(schedule, 1, 2, 3, train=False) == [Operation("F", 1, m) for m in range(3)]


@pytest.mark.parametrize(("schedule", "devices", "microbatches", "stages_per_device"), SHAPES)
def test_every_operation_comes_once_and_in_order(schedule, devices, microbatches, stages_per_device):
    """Each stage does F, B and W of each micro-batch in this order, micro-batches in theirs, and nothing else."""
    for device in range(devices):
        todo = operations(schedule, device, devices, microbatches, stages_per_device=stages_per_device)
        kinds = "FBW" if schedule == "zero-bubble" else "FB"
        assert len(todo) == len(kinds) * microbatches * stages_per_device
        for stage in range(device, devices * stages_per_device, devices):
            for kind in kinds:
                assert [op.microbatch for op in todo if op[:2] == (kind, stage)] == list(range(microbatches))
            for m in range(microbatches):
                places = [todo.index((kind, stage, m)) for kind in kinds]
                assert places == sorted(places)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@pytest.mark.parametrize("devices", [1, 2, 3, 5])
@pytest.mark.parametrize("microbatches", [1, 2, 4, 7])
def test_in_flight_is_what_the_operations_hold(schedule, devices, microbatches):
    """The micro-batches that memory is counted for are the most forwards that ever wait for their backward."""
    for device in range(devices):
        held = most = 0
        for op in operations(schedule, device, devices, microbatches):
            held += 1 if op.kind == "F" else -1
            most = max(most, held)
        assert most == in_flight(schedule, microbatches, devices - 1 - device)


def test_sources_are_neighbours_results():
    """A forward needs the stage before, a backward the stage behind, W and the ends of the pipeline nothing."""
    whole = order("zero-bubble", 2, 4, stages_per_device=2)
    each = whole.kinds.shape[1]
    for device in range(2):
        for position, source in enumerate(whole.sources[device]):
            kind, stage, microbatch = whole.operation(device, position)
            before = {"F": stage - 1, "B": stage + 1, "W": -1}[kind]
            if 0 <= before < 4:
                assert whole.operation(*divmod(int(source), each)) == (kind, before, microbatch)
            else:
                assert source == -1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("1f1b", 2, 0), "there are 2 devices, 0 micro-batches and 1 stages a device"),
        (("interleaved", 4, 11), "4 devices cannot take 11 micro-batches in 2 equal rounds; 8 or 12 would do"),
    ],
)
def test_impossible_numbers_are_refused(arguments, message):
    """The message has the numbers, and what would do."""
    with pytest.raises(ShardwrightError, match=message):
        order(*arguments)
    with pytest.raises(ShardwrightError, match="1f1b has one stage a device, not 2: ask for interleaved"):
        order("1f1b", 2, 4, stages_per_device=2)


def mock_stage(index, devices, stages):
    """What a schedule of PyTorch asks of a stage, without a process group."""
    group = {"group_size": devices, "group_rank": index % devices, "stage_index": index, "num_stages": stages}
    return MagicMock(**group, is_first=index == 0, is_last=index == stages - 1, submod=torch.nn.Identity())


def runs(engine_class, device, devices, microbatches):
    """The calls of an engine of one stage a device. (The table of 1F1B's own is wrong on the last stage in 2.13.)"""
    called = []
    stage = mock_stage(device, devices, devices)
    stage.forward_one_chunk.side_effect = lambda m, *_, **__: called.append(Operation("F", device, m))
    stage.backward_one_chunk.side_effect = lambda m, **_: called.append(Operation("B", device, m))
    for transfer in ("get_fwd_recv_ops", "get_fwd_send_ops", "get_bwd_recv_ops", "get_bwd_send_ops"):
        getattr(stage, transfer).return_value = []
    engine = engine_class(stage, microbatches)
    engine._initialize_stage = lambda *_: None
    engine._step_microbatches()
    return called


def table(engine_class, device, devices, microbatches, stages_per_device):
    """The table that an engine of several stages a device works through, without waiting and communication."""
    stages = devices * stages_per_device
    mine = [mock_stage(stage, devices, stages) for stage in range(0, stages, devices)]
    kinds = {"F": "F", "B": "B", "I": "B", "W": "W"}
    return [
        Operation(kinds[action.computation_type.value], action.stage_index, action.microbatch_index)
        for action in engine_class(mine, microbatches).pipeline_order[device]
        if action is not None and action.computation_type.value in kinds
    ]


@pytest.mark.parametrize(("schedule", "devices", "microbatches", "stages_per_device"), SHAPES)
def test_orders_are_those_of_pytorchs_engine(schedule, devices, microbatches, stages_per_device):
    """A simulated schedule is the one that would run."""
    for device in range(devices):
        ours = operations(schedule, device, devices, microbatches, stages_per_device=stages_per_device)
        if schedule in ("gpipe", "1f1b"):
            engine = {"gpipe": torch_schedules.ScheduleGPipe, "1f1b": torch_schedules.Schedule1F1B}[schedule]
            if schedule == "1f1b" and microbatches < devices:
                continue  # PyTorch refuses
            assert ours == runs(engine, device, devices, microbatches)
        else:
            engine = {
                "interleaved": torch_schedules.ScheduleInterleaved1F1B,
                "zero-bubble": torch_schedules.ScheduleInterleavedZeroBubble,
            }[schedule]
            assert ours == table(engine, device, devices, microbatches, stages_per_device)


@given(st.integers(1, 6), st.integers(1, 12), st.integers(1, 3))
def test_interleaved_with_one_stage_a_device_is_1f1b_with_more_warmup(devices, microbatches, stages_per_device):
    """The last device of any interleaved schedule alternates from its last round of stages on, as 1F1B does at once."""
    if not takes("interleaved", devices, microbatches, stages_per_device):
        return
    last = operations("interleaved", devices - 1, devices, microbatches, stages_per_device=stages_per_device)
    per_round = microbatches // max(1, microbatches // devices)
    warmup = (stages_per_device - 1) * per_round
    middle = [op.kind for op in last[warmup : len(last) - warmup]]
    assert middle == ["F", "B"] * (len(middle) // 2)
