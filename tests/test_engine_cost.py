"""The engine's own time: what is left of a step when a stage's work and the waits for messages are taken off."""

import itertools
import tempfile
from pathlib import Path

import pytest
import torch.distributed as dist
from torch.distributed.pipelining import schedules

from shardwright.profiler.formats.costs import Costs
from shardwright.profiler.measuring.engine_cost import (
    LEAST_MICROBATCHES,
    STEPS,
    WARMUP,
    Spent,
    engine_s_of,
    engine_steps,
)
from shardwright.sharder.planning.planner import plan
from shardwright.sharder.planning.schedules.foreseen import costs_of, timeline_of

COSTS = Path(__file__).parents[1] / "examples" / "costs.json"


@pytest.fixture
def _group():
    """A process group of this process alone."""
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        yield
        dist.destroy_process_group()


def ticking():
    """A clock that goes on by a second whenever it is read."""
    ticks = itertools.count()
    return lambda: float(next(ticks))


@pytest.mark.usefixtures("_group")
@pytest.mark.parametrize("train", [True, False])
def test_neither_a_stages_work_nor_a_wait_is_the_engines(monkeypatch, train):
    """By a clock that ticks when it is read each of them takes a second, and so does what is between any two."""
    waits = []
    monkeypatch.setattr(schedules, "_wait_batch_p2p", waits.append)
    found = engine_steps(0, 1, train, ticking())
    operations, each = (1 + train) * LEAST_MICROBATCHES, len(waits) // (STEPS + WARMUP)
    assert found == [(operations + each + 1) / operations] * STEPS
    assert schedules._wait_batch_p2p == waits.append


@pytest.mark.usefixtures("_group")
def test_an_error_leaves_the_engine_as_it_was():
    """A clock that fails in the middle does not leave the engine's wait replaced."""
    wait, ticks = schedules._wait_batch_p2p, iter(range(20))
    with pytest.raises(BaseException):  # noqa: B017, PT011  # what the engine makes of it is not ours
        engine_steps(0, 1, True, lambda: float(next(ticks)))
    assert schedules._wait_batch_p2p is wait


def test_slow_steps_of_one_worker_do_not_count_for_more():
    """The median of each worker, then the mean of the workers."""
    assert engine_s_of({"cpu:0": [1.0, 1.0, 90.0], "cpu:1": [3.0, 2.0, 3.0]}) == 2.0


def test_time_is_spent_also_in_a_block_that_fails():
    """What was spent before an error counts."""
    spent = Spent(ticking())
    with pytest.raises(ZeroDivisionError), spent.timed():
        _ = 1 / 0
    assert spent.seconds == 1.0


def test_the_engine_is_in_the_step_and_in_no_load():
    """Devices that say what the engine takes make the same split, a step longer by it at least twice a micro-batch."""
    plain = Costs.load(COSTS).profile()
    devices = tuple(device.model_copy(update={"engine_s": 1e-3}) for device in plain.devices)
    before, after = plan(plain), plan(plain.model_copy(update={"devices": devices}))
    assert [(s.device, s.units, s.load_s) for s in after.stages] == [
        (s.device, s.units, s.load_s) for s in before.stages
    ]
    assert after.predicted.step_s >= before.predicted.step_s + 2e-3 * after.microbatches
    assert after.predicted.baseline_s == before.predicted.baseline_s
    assert after.certificate == before.certificate
    assert {cost.engine_s for cost in costs_of(after)} == {1e-3}
    assert timeline_of(after).step_s == pytest.approx(after.predicted.step_s)
