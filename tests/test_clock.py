"""Ctrl-C while a plan is looked for: the best so far, and what was there before stays."""

from __future__ import annotations

import itertools
import random
import signal
import threading

import networkx as nx
import pytest

import shardwright as sw
from shardwright.sharder.planning import clock
from shardwright.sharder.planning.wide import incumbent


def wide_graph():
    """Too many closed sets to be gone through, and no split that is proven in a moment."""
    draw = random.Random(0)
    graph = nx.DiGraph(devices=["a", "b", "c"], microbatches=8)
    sizes = [draw.randint(1, 9) * 10**9 for _ in range(60)]
    for v in range(60):
        graph.add_node(f"u{v}", forward_s=draw.uniform(0.5, 2.0), backward_s=draw.uniform(1.0, 3.0))
        for u in draw.sample(range(v), min(v, 2)):
            graph.add_edge(f"u{u}", f"u{v}", bytes=sizes[u])
    graph.graph["links"] = dict.fromkeys(itertools.permutations("abc", 2), (0.001, 1000000000.0))
    return graph


@pytest.fixture
def interrupted(monkeypatch):
    """Ctrl-C as often as is asked for, when moves begin for the first time."""
    times = [1]
    moves = incumbent.shifted

    def after_ctrl_c(*args, **kwargs):
        for _ in range(times[0]):
            signal.raise_signal(signal.SIGINT)
        times[0] = 0
        return moves(*args, **kwargs)

    monkeypatch.setattr(incumbent, "shifted", after_ctrl_c)
    return times


@pytest.mark.usefixtures("interrupted")
def test_ctrl_c_gives_the_best_plan_so_far_with_its_gap():
    """Of a search that had ten days."""
    found = sw.plan(wide_graph(), time_limit_s=1e6)
    assert found.stages
    assert found.certificate.value_s >= found.certificate.bound_s > 0
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert sw.plan(wide_graph(), time_limit_s=0.5).stages  # the next plan has its time again


@pytest.mark.usefixtures("interrupted")
def test_ctrl_c_ends_what_would_never_end():
    """However long the user allows, since there is Ctrl-C."""
    assert sw.plan(wide_graph(), time_limit_s=float("inf")).stages


def test_the_clock_never_goes_back():
    """A deadline that another thread set meanwhile is none of a later age."""
    before_s = clock.clock_s()
    with clock.ended_by_interrupt():
        signal.raise_signal(signal.SIGINT)
        meanwhile_s = clock.clock_s()
    assert before_s + clock.MOST_S < meanwhile_s <= clock.clock_s() < meanwhile_s + 60


def test_the_second_ctrl_c_ends_it_without_a_plan(interrupted):
    """Who presses it twice does not want to wait for reports either."""
    interrupted[0] = 2
    with pytest.raises(KeyboardInterrupt):
        sw.plan(wide_graph(), time_limit_s=1e6)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.usefixtures("interrupted")
def test_a_program_with_a_handler_of_its_own_keeps_it():
    """It is called, and the search goes on until its time is up."""
    called = []
    before = signal.signal(signal.SIGINT, lambda *_: called.append(1))
    try:
        assert sw.plan(wide_graph(), time_limit_s=0.5).stages
    finally:
        signal.signal(signal.SIGINT, before)
    assert called


def test_threads_plan_without_touching_signals():
    """Python allows handlers in the main thread only."""
    found = []
    thread = threading.Thread(target=lambda: found.append(sw.plan(wide_graph(), time_limit_s=0.2)))
    thread.start()
    thread.join()
    assert found[0].stages
