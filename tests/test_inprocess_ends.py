"""Pipelining in one process: errors are the caller's, everything ends, and it can be undone."""

import copy
import gc
import os
import pickle
import signal
import threading
import time
import traceback
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from inprocess import BATCH, WIDTH, Chain, Skips, assert_same_step, forward_of, losses, piped
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import shardwright as sw
from shardwright.profiler.recording.placed import placement_hooks
from shardwright.sharder.runtime import place as place_module
from shardwright.sharder.runtime.local.threads import Seat, StageThreads

__all__ = ["piped"]  # fixtures


def stage_threads():
    """The threads of stages that are alive."""
    return {thread for thread in threading.enumerate() if thread.name.startswith("shardwright")}


# What goes wrong


class Failing(nn.Module):
    """Passes its input on, and fails at its third call once it is armed, there or in the backward."""

    def __init__(self, where):
        super().__init__()
        self.where = where
        self.left = None

    def forward(self, x):
        if self.where == "forward":
            self.count()
        elif x.requires_grad:
            x = x * 1
            x.register_hook(self.count)
        return x

    def count(self, _gradient=None):
        if self.left is not None:
            self.left -= 1
            if not self.left:
                raise LookupError("the third")


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("layer", [0, 3, 5])
def test_an_error_in_a_stage_is_the_caller_s(piped, where, layer):
    """Its own type and traceback, where it was, no thread at work, and the next call is as if nothing had been."""
    model = Chain()
    model[layer].append(Failing(where))
    x = torch.randn(BATCH, WIDTH)
    model, placed = piped(model, (x,), stages=3)
    placed(x)
    placed[layer][2].left = 3
    with pytest.raises(LookupError, match="the third") as caught:
        losses(placed(x)).backward()
    number = 2 if where == "forward" else 1  # the backward begins with the last
    stage = next(node.stage for node in forward_of(placed).plan.nodes if node.unit == f"{layer}.2")
    assert caught.value.__notes__ == [f"in stage {stage} of 3 on cpu, micro-batch {number} of 4"]
    functions = [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert functions[0] == "test_an_error_in_a_stage_is_the_caller_s"
    assert functions[-1] == "count"
    placed[layer][2].left = None
    assert_same_step(model, placed, (x,))


@pytest.mark.parametrize("who", ["caller", "stage"])
def test_an_interrupt_ends_the_pass_in_all_threads(who):
    """The caller goes on when every thread is idle, and no micro-batch is begun after that."""
    threads = StageThreads([Seat(f"cpu:{i}", torch.device("cpu")) for i in range(2)])
    begun, released = [], threading.Event()

    def step(stage, number, _received):
        begun.append((stage, number))
        if stage == 1 and not number:
            released.set()
            if who == "stage":
                raise KeyboardInterrupt
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        if number:
            assert released.wait(60)
            time.sleep(1e-3)  # so that the caller comes to its turn; all would take half an hour
        return number

    many = 1_000_000
    with pytest.raises(KeyboardInterrupt):
        threads.run(step, range(many))
    assert len(begun) < 2 * many
    count = len(begun)
    passed = []
    threads.run(lambda stage, number, received: passed.append((stage, number, received)) or number, range(3))
    assert len(begun) == count
    assert [it for it in passed if it[0]] == [(1, number, number) for number in range(3)]
    before = stage_threads()
    threads.end()
    assert len(before - stage_threads()) == 2


def test_a_pass_goes_back_from_the_last_stage():
    """Each stage gets what the one behind it has sent, in the order asked for."""
    threads = StageThreads([Seat(f"cpu:{i}", torch.device("cpu")) for i in range(3)])
    last = []

    def step(stage, number, received):
        if stage == 0:
            last.append((number, received))
        return [*(received or []), stage]

    threads.run(step, reversed(range(4)), backward=True)
    assert last == [(number, [2, 1]) for number in (3, 2, 1, 0)]
    threads.end()


def test_callers_in_several_threads_take_turns(piped):
    """Forwards and backwards of several callers do not block one another."""
    x = torch.randn(BATCH, WIDTH)
    model, placed = piped(Chain(), (x,), stages=3)
    placed(x)

    def step(factor):
        given = (x * factor).requires_grad_()
        losses(placed(given)).backward()
        return given.grad

    with ThreadPoolExecutor(4) as callers:
        found = list(callers.map(step, range(12)))
    for factor, gradient in enumerate(found):
        given = (x * factor).requires_grad_()
        losses(model(given)).backward()
        torch.testing.assert_close(gradient, given.grad)


# Being a model


def test_unplace_removes_everything(piped):
    """Forward, hook and threads are gone; the forward that the instance had of its own is back."""
    x = torch.randn(BATCH, WIDTH)
    model, placed = piped(Chain(), (x,))
    before = stage_threads()
    placed(x)
    assert len(stage_threads() - before) == 2
    sw.unplace(placed)
    assert stage_threads() <= before
    assert "forward" not in vars(placed)
    assert not list(placement_hooks(placed))
    assert torch.equal(placed(x), model(x))


def test_an_own_forward_of_the_instance_is_kept(captured_profile):
    """What another tool has put in its place is called, and there again after unplace."""
    model, x = Chain(), torch.randn(BATCH, WIDTH)
    plan = sw.plan(captured_profile(model, (x,)), microbatches=4)
    plain = model.forward
    model.forward = own = lambda x: plain(x) + 1
    expected = model(x)
    sw.place(model, plan, microbatches=4)
    torch.testing.assert_close(model(x), expected)
    sw.unplace(model)
    assert model.forward is own


@pytest.mark.parametrize("there", ["first", "last"])
def test_inputs_come_and_outputs_go_back(captured_profile, monkeypatch, there):
    """With a stage on a device that mixes with no other: results are on the caller's, with and without a pipeline."""
    monkeypatch.setattr(place_module, "check_threads", lambda *_: None)  # which no simulated device passes
    model, inputs = Skips(), (torch.randn(BATCH, WIDTH), torch.zeros(BATCH, 1, dtype=torch.long))
    plan = sw.plan(captured_profile(model, inputs), microbatches=4)
    devices = {plan.devices[0 if there == "first" else -1]: "sim:0", plan.devices[-1 if there == "first" else 0]: "cpu"}
    with torch.no_grad():
        expected = model(*inputs)
        for _ in range(2):
            sw.place(model, plan, devices=devices, microbatches=4)
            found = model(*inputs)
            assert {t.device.type for t in found.values()} == {"cpu"}
            torch.testing.assert_close(found, expected)
            assert forward_of(model).own.programs
            torch.testing.assert_close(model(*(t[:3] for t in inputs)), {k: t[:3] for k, t in expected.items()})
    sw.unplace(model)
    assert "forward" not in vars(model)
    assert {t.device.type for t in model.parameters()} == {"cpu"}


def test_a_backward_after_unplace_says_so(piped):
    """The threads that would run it are gone."""
    x = torch.randn(BATCH, WIDTH)
    _, placed = piped(Chain(), (x,))
    output = placed(x)
    sw.unplace(placed)
    with pytest.raises(sw.ShardwrightError, match="unplaced after its forward"):
        output.sum().backward()


def test_placing_anew_replaces(captured_profile):
    """With another number of micro-batches, and with none."""
    model, x = Chain(), torch.randn(BATCH, WIDTH)
    plan = sw.plan(captured_profile(model, (x,)), microbatches=4)
    expected = model(x)
    for microbatches in (4, 2, None):
        sw.place(model, plan, microbatches=microbatches)
        torch.testing.assert_close(model(x), expected)
        assert len([h for _, hooks, key in placement_hooks(model) for h in [hooks[key]]]) == (microbatches is not None)
    assert "forward" not in vars(model)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_pipelined_by_themselves(piped, copied):
    """A deep copy and a pickled model have parameters and threads of their own."""
    x = torch.randn(BATCH, WIDTH)
    model, placed = piped(Skips(), (x, torch.zeros(BATCH, 1, dtype=torch.long)))
    placed(x, torch.zeros(BATCH, 1, dtype=torch.long))
    twin = copied(placed)
    assert forward_of(twin).module is twin
    assert_same_step(model, twin, (x, torch.zeros(BATCH, 1, dtype=torch.long)))
    assert all(p.grad is None for p in placed.parameters())
    assert forward_of(twin).threads is not forward_of(placed).threads
    assert list(twin.state_dict()) == list(model.state_dict())


def test_replaced_parameters_are_found(piped):
    """A state dict that takes the parameters' places, in units and between them, is what is computed with."""
    args = torch.randn(BATCH, WIDTH), torch.randint(0, WIDTH, (BATCH, 2))
    model, placed = piped(Skips(), args)
    placed(*args)
    other = Skips().state_dict()
    for one in (model, placed):
        one.load_state_dict({name: t.clone() for name, t in other.items()}, assign=True)
    assert_same_step(model, placed, args)


def test_a_model_that_is_dropped_ends_its_threads(piped):
    """Nothing holds it: no thread, no graph."""
    x = torch.randn(BATCH, WIDTH)
    _, placed = piped(Chain(), (x,))
    losses(placed(x)).backward()
    gone = weakref.ref(placed)
    del placed
    gc.collect()
    assert gone() is None


def test_a_call_leaves_no_ring(piped):
    """What a forward keeps for its backward goes with the output, without waiting for the collector."""
    x = torch.randn(BATCH, WIDTH)
    _, placed = piped(Chain(), (x,))
    kept = []
    placed[0][1].register_forward_hook(lambda _module, _args, output: kept.append(weakref.ref(output)))
    placed(x)
    kept.clear()
    gc.collect()
    gc.disable()
    try:
        output = placed(x)
        assert all(ref() is not None for ref in kept)
        del output
        assert [ref() for ref in kept] == [None] * 4
    finally:
        gc.enable()


def test_under_modes_of_the_caller_the_forward_is_the_model_s(piped):
    """A counter of operations counts what a plain model does."""
    x = torch.randn(BATCH, WIDTH)
    model, placed = piped(Chain(), (x,))
    placed(x)
    counts = []
    for one in (model, placed):
        with FlopCounterMode(display=False) as counter:
            one(x)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_activations_computed_anew(piped):
    """Checkpointing without reentrance, inside of units, works in the threads."""

    class Saving(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=False)

    x = torch.randn(BATCH, WIDTH)
    model, placed = piped(nn.Sequential(*[Saving() for _ in range(4)]), (x,))
    assert_same_step(model, placed, (x,))


# Cores


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="threads are pinned on Linux only")
def test_threads_are_pinned_and_the_caller_is_not():
    """Each stage's thread has its own cores and as many threads within an operator; the caller keeps what it had."""
    cores = sorted(os.sched_getaffinity(0))
    before = torch.get_num_threads(), os.sched_getaffinity(0)
    threads = StageThreads(
        [Seat("cpu:0", torch.device("cpu"), (cores[0],)), Seat("cpu:1", torch.device("cpu"), (cores[-1],))]
    )
    seen = {}

    def step(stage, _number, _received):
        seen[stage] = os.sched_getaffinity(0), torch.get_num_threads()

    threads.run(step, range(1))
    threads.end()
    assert seen == {0: ({cores[0]}, 1), 1: ({cores[-1]}, 1)}
    assert (torch.get_num_threads(), os.sched_getaffinity(0)) == before
    later = []
    thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert later == [before[0]]
