"""Messages between stages: they pass while the stage at the other end computes."""

import gc
import os
import time

import pytest
import torch
import torch.distributed as dist
from torch import nn
from training import on_ranks, workers

from shardwright.sharder.runtime.piping.cut import StageProgram, TensorShape
from shardwright.sharder.runtime.piping.engine import make_schedule, make_stage

__all__ = ["workers"]  # a fixture

COUNT, ROWS, WIDTH = 4, 2, 3
LIMIT_S = 20.0


class Held(nn.Module):
    """Doubles what it gets; its first forward, or its first backward, lasts until there is a file, if it is told to."""

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(2.0))
        self.holds, self.until, self.in_time = "", None, None

    def forward(self, x):
        self.hold("forward")
        made = self.factor * x
        if made.requires_grad:
            made.register_hook(lambda _: self.hold("backward"))
        return made

    def hold(self, way):
        if self.holds == way and self.in_time is None:
            end = time.monotonic() + LIMIT_S
            while not self.until.exists() and time.monotonic() < end:
                time.sleep(0.01)
            self.in_time = self.until.exists()


def stepped(kind, holds, until):
    """In a rank: a step; then another, in which one stage computes until the other one's step is over.

    Returns whether that came to pass, and the gradients of both steps.
    """
    rank, train = int(os.environ["RANK"]), holds != "inference"
    dist.init_process_group("gloo")
    shape = TensorShape("x", (ROWS, WIDTH), torch.float32, requires_grad=train)
    module = Held()
    stage = make_stage(StageProgram(rank, (), {}, (shape,), (shape,)), module, 2, torch.device("cpu"))
    loss = (lambda output, _target: output.sum()) if train else None
    schedule = make_schedule([stage], kind, COUNT, loss, [True])
    batch, target = torch.ones(COUNT * ROWS, WIDTH), torch.zeros(COUNT)
    with torch.set_grad_enabled(train):
        for number in range(2):
            last = {"target": target} if train and rank else {}
            if number and holds and rank == (holds == "inference"):
                module.holds, module.until = "forward" if holds == "inference" else holds, until
            schedule.step(*([] if rank else [batch]), **last, return_outputs=False)
            if number and holds and not module.holds:
                until.touch()
    return module.in_time, None if module.factor.grad is None else float(module.factor.grad)


@pytest.mark.parametrize("holds", ["inference", "backward"])
def test_a_step_does_not_wait_for_a_stage_that_computes(workers, tmp_path, holds):
    """What is sent has left before the stage at the other end comes to it, forwards and gradients."""
    found = on_ranks(workers, 2, stepped, "gpipe", holds, tmp_path / "over")
    assert [in_time for in_time, _ in found] == ([None, True] if holds == "inference" else [True, None])


@pytest.mark.parametrize("kind", ["gpipe", "1f1b"])
def test_messages_of_several_steps_are_not_mixed_up(workers, tmp_path, kind):
    """Gradients of two steps are twice those of one, on both stages."""
    gradient = 2 * COUNT * ROWS * WIDTH
    assert [found for _, found in on_ranks(workers, 2, stepped, kind, "", tmp_path)] == [2 * gradient] * 2


def sent_and_let_go(train):
    """In a rank: how many tensors of a size that crosses are alive after steps, with no cycle looked for."""
    dist.init_process_group("gloo")
    shape = TensorShape("x", (ROWS, WIDTH), torch.float32, requires_grad=train)
    rank, module = int(os.environ["RANK"]), Held()
    stage = make_stage(StageProgram(rank, (), {}, (shape,), (shape,)), module, 2, torch.device("cpu"))
    loss = (lambda output, _target: output.sum()) if train else None
    schedule = make_schedule([stage], "gpipe", COUNT, loss, [True])
    found = []
    gc.collect()
    gc.disable()
    try:
        for _ in range(4):
            last = {"target": torch.zeros(COUNT)} if train and rank else {}
            with torch.set_grad_enabled(train):
                schedule.step(*([] if rank else [torch.ones(COUNT * ROWS, WIDTH)]), **last, return_outputs=False)
            found.append(sum(issubclass(type(t), torch.Tensor) and t.shape == (ROWS, WIDTH) for t in gc.get_objects()))
    finally:
        gc.enable()
    return found


@pytest.mark.parametrize("train", [False, True])
def test_what_was_sent_is_let_go(workers, train):
    """Nothing that a step has sent is held in a circle of references: as many tensors are left after each."""
    for found in on_ranks(workers, 2, sent_and_let_go, train):
        assert len(set(found[1:])) == 1, found
