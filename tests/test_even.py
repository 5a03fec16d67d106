"""Even splits: shares in proportion to speed, the best of them, and no more looked at than time allows."""

import dataclasses
import itertools
import math

from hypothesis import given
from hypothesis import strategies as st

from shardwright.sharder.planning.exact.even import EvenSplit, best_even_split, even_splits
from shardwright.sharder.planning.partition import partition
from shardwright.sharder.planning.problem import Block, Crossing, Problem
from shardwright.sharder.planning.wide import incumbent


def two_chains(times, devices, *, bandwidth=1.0):
    """Blocks of which each reads the one before the last: two chains, side by side, on devices that are alike."""
    return Problem(
        blocks=tuple(
            Block(
                nodes=(f"n{v}",),
                forward_s=(time,) * devices,
                backward_s=(0.0,) * devices,
                update_s=(0.0,) * devices,
                static_bytes=1,
                units=(f"n{v}",),
                allowed=(True,) * devices,
            )
            for v, time in enumerate(times)
        ),
        predecessors=tuple(1 << v - 2 if v > 1 else 0 for v in range(len(times))),
        crossings=tuple(Crossing(f"t{v}", v, 4 << v, 1, 1) for v in range(len(times) - 2)),
        devices=tuple(f"d{d}" for d in range(devices)),
        caps=(10**9,) * devices,
        links=(((0.0, bandwidth),) * devices,) * devices,
        microbatches=devices,
    )


def test_shares_follow_the_speed():
    """A device of twice the speed has twice the blocks; a stage for each number of devices, in the order given."""
    problem = two_chains([1.0] * 6, 2)
    fast = [dataclasses.replace(b, forward_s=(1.0, 0.5)) for b in problem.blocks]
    found = even_splits(dataclasses.replace(problem, blocks=tuple(fast)), [[0, 1], [1, 0]])
    assert [split.stages for split in found] == [
        ((0, 0b111111),),
        ((0, 0b11), (1, 0b111100)),
        ((1, 0b111111),),
        ((1, 0b1111), (0, 0b110000)),
    ]
    assert [split.compute_s for split in found] == [2 * seconds for seconds in (6.0, 2.0, 3.0, 2.0)]


@given(st.lists(st.tuples(st.integers(0, 4), st.none() | st.integers(0, 4)), max_size=8), st.integers(0, 9))
def test_the_best_is_the_first_of_the_best_of_all(splits, below):
    """As if each was looked at in turn and taken where it is better than those before."""
    loads = {
        ((number, 1),): None if more is None else [compute + more] for number, (compute, more) in enumerate(splits)
    }
    offered = [EvenSplit(compute, stages) for stages, (compute, _) in zip(loads, splits, strict=True)]
    expected, value = None, below
    for stages, of_stages in loads.items():
        if of_stages and of_stages[0] < value:
            expected, value = (stages, of_stages[0]), of_stages[0]
    assert best_even_split(offered, loads.__getitem__, below, lambda _: False) == expected


def looked_at(problem, monkeypatch, time_limit_s):
    """How many splits ``partition`` looks at where each takes a second, all else next to nothing; and its answer."""
    now, asked = itertools.count(), itertools.count()
    seen = []

    def slow(problem, stages):
        seen.append(next(now))
        return loads_of(problem, stages)

    loads_of = incumbent.stage_loads
    with monkeypatch.context() as patch:
        patch.setattr(incumbent, "stage_loads", slow)
        found = partition(problem, limit=0, time_limit_s=time_limit_s, clock=lambda: len(seen) + next(asked) / 50)
    return len(seen), found


def test_looking_at_even_splits_ends_with_the_time(monkeypatch):
    """Transfers so slow that compute says nothing of the loads: of 16 splits those are looked at that time allows."""
    problem = two_chains([1.0] * 40, 16, bandwidth=1e-3)
    for limit_s in (0.0, 4.0, 8.0):
        count, found = looked_at(problem, monkeypatch, limit_s)
        assert count <= max(1, limit_s)
        assert found is not None
        assert math.isfinite(found.value_s)
        assert found.bound_s <= found.value_s
    assert looked_at(problem, monkeypatch, 100.0)[0] >= 16


def test_splits_that_their_compute_rules_out_are_not_looked_at(monkeypatch):
    """With transfers that take nothing the split over most devices is best, and no other of the 16 is looked at."""
    problem = two_chains([1.0] * 32, 16, bandwidth=math.inf)
    count, found = looked_at(problem, monkeypatch, 1000.0)
    assert found is not None
    assert (count, found.value_s, found.exact) == (1, 16 * 2.0, True)
