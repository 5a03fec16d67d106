"""Every fault in every worker at every phase of a run: that worker is named, soon, and nothing is left behind."""

import os
import resource
import signal
import tempfile
import time
from functools import partial

import pytest
import torch
from torch import nn

import shardwright as sw
from shardwright.profiler.workers import pool
from shardwright.sharder.runtime import run as run_module
from shardwright.sharder.runtime import session

BOTH = ("prepare", "join", "hold_stages", "check_stage", "step_stage", "weigh_stage", "note_stage")
"""What each worker is told in a run, by the name of the function; and what the worker of the whole model is told."""
WHOLE = ("hold_whole", "check_whole", "step_whole")
FAULTS = {
    "kill": "was killed by SIGKILL",
    "exit": "ended with exit code 3",
    "raise": "failed: ValueError: out of luck",
    "memory": "failed: RuntimeError: .*allocate",
    "freeze": "is frozen",
    "hang": "did not answer within",
}
"""Kind -> what is said of it."""
CASES = [(kind, victim, phase) for kind in FAULTS for victim in ("cpu:0", "cpu:1") for phase in BOTH]
CASES += [(kind, "cpu:0", phase) for kind in FAULTS for phase in WHOLE]


def fault(kind, note):
    """Go wrong, and note when: a worker that is still starting comes to it late."""
    with open(note, "w") as file:
        file.write(str(time.monotonic()))
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "exit":
        os._exit(3)
    if kind == "raise":
        raise ValueError("out of luck")
    if kind == "memory":
        with open("/proc/self/statm") as file:
            held = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + (1 << 26),) * 2)
        torch.ones(1 << 30)
    if kind == "freeze":
        os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(3600)


@pytest.fixture
def planned(captured_profile):
    """A chain over two workers, its plan and its batch."""
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.randn(4, 4)
    return model, sw.plan(captured_profile(model, (x,)), microbatches=2), x


def check(planned, monkeypatch, folder, kind, victim, phase):
    """Run the plan, with a fault in what ``victim`` is told at ``phase``."""
    model, plan, x = planned
    assert plan.predicted.baseline_device == "cpu:0"
    monkeypatch.setattr(run_module, "STEP_LIMIT_S", 4.0)
    monkeypatch.setattr(session, "START_LIMIT_S", 8.0)  # less than importing torch may take, which is progress
    monkeypatch.setattr(pool, "SILENCE_S", 4.0)
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    pids, struck = [], []
    original, calling = pool.Worker.__init__, pool.Pool.call

    def noted(self, device):
        original(self, device)
        pids.append(self.process.pid)

    def call(self, calls, **options):
        function = calls.get(victim, (None,))[0]
        function = function.func if isinstance(function, partial) else function
        if getattr(function, "__name__", "") == phase:
            calls = {**calls, victim: (fault, (kind, str(folder / "struck")))}
            struck.append(phase)
        return calling(self, calls, **options)

    monkeypatch.setattr(pool.Worker, "__init__", noted)
    monkeypatch.setattr(pool.Pool, "call", call)
    with pytest.raises(sw.ShardwrightError, match=FAULTS[kind]) as caught:
        sw.run(model, plan, (x,), steps=2)
    said = str(caught.value)
    # One that hangs and one that waits for it look the same: both are named.
    assert said.startswith(f"worker {victim} ") or (kind == "hang" and f"nor did {victim}" in said)
    assert len(struck) == 1
    assert time.monotonic() - float((folder / "struck").read_text()) < 30
    assert "\n" not in said
    assert len(pids) == 2
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert [path.name for path in folder.iterdir()] == ["struck"]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "victim", "phase"), CASES, ids=["-".join(case) for case in CASES])
def test_a_fault_ends_the_run(planned, monkeypatch, tmp_path, kind, victim, phase):
    """A hundred times in a row."""
    check(planned, monkeypatch, tmp_path, kind, victim, phase)


def test_memory_that_runs_out_in_a_step(planned, monkeypatch, tmp_path):
    """Of that fault; the others of a step are tried with test_run."""
    check(planned, monkeypatch, tmp_path, "memory", "cpu:1", "step_stage")
