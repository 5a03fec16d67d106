"""Moves that begin afresh where devices differ: valid splits only, near the optimum, and an end."""

from __future__ import annotations

import dataclasses
from functools import partial

import pytest
from test_shifting import is_split, tangled

from shardwright.sharder.planning.exact.line import split_in_order, split_line
from shardwright.sharder.planning.partition import partition
from shardwright.sharder.planning.split_loads import stage_loads
from shardwright.sharder.planning.wide import afresh, shifting
from shardwright.sharder.planning.wide.afresh import begun_afresh
from shardwright.sharder.planning.wide.lists import Lists
from shardwright.sharder.planning.wide.recut import Neighbours
from shardwright.sharder.planning.wide.shifting import shifted


def mixed(seed, units=12, speeds=(1.0, 2.0, 0.7)):
    """The graph of ``tangled`` on devices of these speeds."""
    problem = tangled(seed, units, len(speeds))
    blocks = (
        dataclasses.replace(
            b,
            forward_s=tuple(t / s for t, s in zip(b.forward_s, speeds, strict=True)),
            backward_s=tuple(t / s for t, s in zip(b.backward_s, speeds, strict=True)),
        )
        for b in problem.blocks
    )
    return dataclasses.replace(problem, blocks=tuple(blocks))


def neighbours(problem):
    """Those that split anew what moves lead to."""
    return Neighbours(Lists(problem), partial(stage_loads, problem), lambda: False)


def improved(problem, ways, best):
    """The best largest load among splits that all are valid, and none better than the best there is."""
    optimum = partition(problem)
    assert optimum.exact
    for stages in ways(lambda: best[-1], optimum.value_s):
        assert is_split(problem, stages)
        value_s = max(stage_loads(problem, stages))
        assert value_s >= optimum.value_s * (1 - 1e-9)
        if value_s < best[-1][1]:
            best.append((stages, value_s))
    return best[-1][1], optimum.value_s


@pytest.mark.parametrize("seed", range(6))
def test_new_starts_find_what_moves_of_blocks_do_not_lead_to(seed, monkeypatch):
    """From the devices in the order that is the best one turned round: a better split than moves alone, and within 5%
    of the search over all closed sets and orders."""
    monkeypatch.setattr(afresh, "PATIENCE", 6)
    monkeypatch.setattr(shifting, "PATIENCE", 6)
    problem = mixed(seed)
    first = split_in_order(problem, range(12), [device for device, _ in reversed(partition(problem).stages)])
    assert first is not None
    start = first.stages, first.value_s
    found_s, optimum_s = improved(
        problem,
        lambda best, bound_s: begun_afresh(
            problem, [[0], [1], [2]], [], best, bound_s, lambda: False, neighbours(problem)
        ),
        [start],
    )
    moved_s, _ = improved(problem, lambda best, bound_s: shifted(problem, best, bound_s, lambda: False), [start])
    assert found_s < moved_s
    assert found_s <= 1.05 * optimum_s


def test_there_are_none_for_devices_alike_other_transfers_or_no_time():
    """Nor where one stage is all there is."""
    problem = mixed(0)
    best = ((0, 0b111111), (1, 0b111111 << 6)), 1e9
    classes = [[0], [1], [2]]
    assert next(begun_afresh(problem, classes, [], lambda: best, 0.0, lambda: False, neighbours(problem)))
    assert not list(begun_afresh(problem, [[0, 1, 2]], [], lambda: best, 0.0, lambda: False, neighbours(problem)))
    assert not list(begun_afresh(problem, classes, [], lambda: best, 0.0, lambda: True, neighbours(problem)))
    assert not list(
        begun_afresh(
            problem, classes, [], lambda: (((0, (1 << 12) - 1),), 1e9), 0.0, lambda: False, neighbours(problem)
        )
    )
    for other in ({"transfers": "staged"}, {"overlap": True}):
        changed = dataclasses.replace(problem, **other)
        assert not list(begun_afresh(changed, classes, [], lambda: best, 0.0, lambda: False, neighbours(changed)))


@pytest.mark.parametrize("seed", range(3))
def test_one_order_of_the_devices_is_cut_no_better_than_all(seed):
    """Each of six orders is at least the best over all of them, and one of them is that."""
    problem, blocks = mixed(seed), range(12)
    whole = split_line(problem, blocks, [[0], [1], [2]], [])
    each = [split_in_order(problem, blocks, order) for order in ([0, 1, 2], [0, 2, 1], [1, 0, 2])]
    each += [split_in_order(problem, blocks, order) for order in ([1, 2, 0], [2, 0, 1], [2, 1, 0])]
    assert whole is not None
    assert min(split.value_s for split in each) == pytest.approx(whole.value_s)
    for split in each:
        assert max(stage_loads(problem, split.stages)) == pytest.approx(split.value_s)
        assert split.bound_s == split.value_s


def test_each_start_is_looked_at_too(monkeypatch):
    """Moves leave out ties and memory: what they make of a start that fits may not."""
    monkeypatch.setattr(afresh, "PATIENCE", 6)
    starts = []

    def noted(of):
        return lambda *args, **more: starts.append(of(*args, **more)) or starts[-1]

    monkeypatch.setattr(afresh, "split_line", noted(split_line))
    monkeypatch.setattr(afresh, "split_in_order", noted(split_in_order))
    problem = mixed(0)
    optimum = partition(problem)
    best = optimum.stages, optimum.value_s
    found = {*begun_afresh(problem, [[0], [1], [2]], [], lambda: best, 0.0, lambda: False, neighbours(problem))}
    assert {split.stages for split in starts if split and len(split.stages) > 1} <= found
