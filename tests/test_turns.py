"""Taking turns: everyone meets the same machine, and who is bounded keeps within the time."""

from collections import defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwright.sharder.runtime.run import NOTED_STEPS
from shardwright.sharder.runtime.turns import WARMUP_STEPS, in_turn, spread_over


def told(*names, seconds=1.0):
    """Contenders who write down whose turn it was."""
    order = []
    return order, {name: lambda name=name: order.append(name) or seconds for name in names}


def test_each_begins_a_round_in_its_turn():
    """What the one before leaves in the caches is every other's in turn; the warm-up is not counted."""
    order, contenders = told("a", "b", "c")
    rounds = []
    found = in_turn(contenders, 4, limit_s=0.0, between=lambda number: rounds.append((number, len(order))))
    assert "".join(order) == "abcbcacababcbcacab"
    assert found == {name: [1.0] * 4 for name in "abc"}
    assert rounds == [(number, 3 * (number + 1)) for number in range(WARMUP_STEPS + 4)]


@given(steps=st.integers(1, 30), limit_s=st.floats(0.0, 100.0), each_s=st.floats(0.01, 10.0), rows=st.integers(1, 4))
def test_who_is_bounded_stays_within_the_time(steps, limit_s, each_s, rows):
    """As many turns as fit after the warm-up, one at least and no more than of the others, at the same rounds; all
    steps of a turn count, of which the seconds of one are told."""
    taken = defaultdict(list)

    def step(name, number=[0]):  # noqa: B006  it counts the calls
        taken[name].append(number[0])
        number[0] += 1
        return each_s

    contenders = {name: lambda name=name: step(name) for name in ("plan", "x", "y")}
    found = in_turn(contenders, steps, bounded={"x": rows, "y": rows}, limit_s=limit_s)
    assert len(found["plan"]) == steps
    assert len(found["x"]) == len(found["y"])
    assert 1 <= len(found["x"]) <= steps
    each_s *= rows
    spent_s = 2 * each_s * (WARMUP_STEPS + len(found["x"]))
    assert len(found["x"]) == 1 or spent_s <= limit_s * (1 + 1e-9)
    assert len(found["x"]) == steps or spent_s + 2 * each_s > limit_s * (1 - 1e-9)


@pytest.mark.parametrize(
    ("steps", "rounds"), [(1, [2]), (3, [2, 3, 4]), (11, [2, 4, 6, 8, 10]), (101, [2, 22, 42, 62, 82])]
)
def test_noted_steps_are_spread_over_the_timed_ones(steps, rounds):
    """None after a warm-up step, at most five; what slows the machine down then slows both alike."""
    assert spread_over(steps, NOTED_STEPS) == rounds


@given(steps=st.integers(1, 60), most=st.integers(1, 60))
def test_fewer_rounds_are_spread_evenly(steps, most):
    """No two are further apart than any two others by more than one, the last one's distance to the end included."""
    rounds = spread_over(steps, most)
    assert len(rounds) == min(steps, most)
    apart = [b - a for a, b in zip(rounds, [*rounds[1:], WARMUP_STEPS + steps], strict=True)]
    assert rounds[0] == WARMUP_STEPS
    assert max(apart) - min(apart) <= 1
