"""Sets within others: every pair that there is, held against all pairs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardwright.sharder.planning.exact.search import OutOfTimeError
from shardwright.sharder.planning.wide import nesting
from shardwright.sharder.planning.wide.nesting import TooManyPairsError, within_each

MANY = 10**9
sets = st.lists(st.tuples(st.integers(0, 2**70 - 1) | st.integers(0, 255), st.integers(0, 3)), max_size=30)


def words_of(masks):
    """Integers as words of 64 bits."""
    return np.array([[mask & 2**64 - 1, mask >> 64] for mask in masks], np.uint64).reshape(len(masks), 2)


def nested(inner, outer, **options):
    """What is within each, from integers with their starts and needs."""
    arrays = []
    for pairs in (inner, outer):
        arrays += [words_of([mask for mask, _ in pairs]), np.array([float(at) for _, at in pairs])]
    return within_each(*arrays, pairs=options.pop("pairs", MANY), **options)


@settings(max_examples=200, derandomize=True, deadline=None)
@given(sets, sets, st.sampled_from([1, 20, 10**6]))
def test_an_inner_set_is_named_just_where_there_is_one(inner, outer, few):
    """However few pairs are looked at without parting the sets."""
    kept, nesting.FEW_PAIRS = nesting.FEW_PAIRS, few
    try:
        found = nested(inner, outer)
    finally:
        nesting.FEW_PAIRS = kept
    for (mask, needed), index in zip(outer, found, strict=True):
        if index >= 0:
            assert not inner[index][0] & ~mask
            assert inner[index][1] >= needed
        else:
            assert not any(not own & ~mask and start >= needed for own, start in inner)


def crowd(count, seed, share):
    """Sets of 60 blocks that have each with that probability."""
    random_ = np.random.default_rng(seed)
    return [(sum(1 << v for v in np.flatnonzero(random_.random(60) < share).tolist()), 0) for _ in range(count)]


def test_few_pairs_of_many_sets_are_looked_at(monkeypatch):
    """Parted by blocks, a small part of all pairs answers for all of them; with too few it says what it knows."""
    monkeypatch.setattr(nesting, "FEW_PAIRS", 100)
    inner, outer = crowd(2_000, 0, 0.2), crowd(2_000, 1, 0.6)
    whole = nested(inner, outer, pairs=len(inner) * len(outer) // 50)
    assert 0 < (whole >= 0).sum() < len(outer)
    with pytest.raises(TooManyPairsError) as error:
        nested(inner, outer, pairs=5_000)
    known = error.value.some >= 0
    assert (whole[known] >= 0).all()
    assert known.sum() < (whole >= 0).sum()


def test_one_pair_is_enough_where_no_more_are_asked_for(monkeypatch):
    """The others are left out, and there is none where all pairs have none."""
    monkeypatch.setattr(nesting, "FEW_PAIRS", 100)
    inner, outer = crowd(50, 0, 0.1), crowd(2_000, 1, 0.9)
    whole, one = nested(inner, outer), nested(inner, outer, one_is_enough=True)
    assert 0 < (one >= 0).sum() < (whole >= 0).sum()
    assert (nested([(1, 0)], [(2, 0), (4, 0)], one_is_enough=True) == -1).all()


def test_the_clock_is_looked_at():
    """Before the first pairs."""
    with pytest.raises(OutOfTimeError):
        nested([(1, 0)], [(1, 0)], out_of_time=lambda: True)
