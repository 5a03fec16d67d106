"""CP-SAT as a guest in the process: the time, and the user's Ctrl-C."""

from __future__ import annotations

import random
import signal
import threading

import pytest

from shardwright.sharder.planning.clock import Budget
from shardwright.sharder.planning.solver import run_solver


def test_ctrl_c_stops_cp_sat_and_works_again_after_it():
    """The solution so far is returned; OR-tools' own handler would leave a next Ctrl-C to kill the process."""
    cp_model = pytest.importorskip("ortools.sat.python.cp_model")
    rng, model = random.Random(0), cp_model.CpModel()
    weights = [rng.randrange(2**30, 2**31) for _ in range(60)]
    bins = [[model.new_bool_var("") for _ in range(5)] for _ in weights]  # who proves the best of 5^60 in its time?
    most = model.new_int_var(0, sum(weights), "")
    for row in bins:
        model.add_exactly_one(row)
    for place in range(5):
        model.add(most >= sum(w * row[place] for w, row in zip(weights, bins, strict=True)))
    model.minimize(most)
    found = []

    def interrupted(value):
        found.append(value(most))
        if len(found) == 1:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    budget, before = Budget(200.0), signal.getsignal(signal.SIGINT)
    proven, bound = run_solver(model, budget, interrupted)
    assert budget.stopped
    assert not proven
    assert sum(weights) / 5 <= min(found)
    assert bound <= min(found)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
