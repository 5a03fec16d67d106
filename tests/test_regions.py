"""Activation checkpointing that a model asks for: kept in every replay, counted, and computed with the same numbers."""

from __future__ import annotations

import threading
from functools import partial

import pytest
import torch
from inprocess import assert_same_step, piped
from recording import ROWS, WIDTH, Layers, batch, faithful, repeatable, rows, step
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.utils import checkpoint as checkpointing
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import shardwright as sw
from shardwright.profiler.capture import captures_of
from shardwright.profiler.estimates.workload import Mode, Workloads
from shardwright.profiler.measuring.gpu_kernels import kernels_as_on
from shardwright.profiler.measuring.signature import step_key
from shardwright.profiler.memory import count_step
from shardwright.profiler.profile import Device
from shardwright.profiler.recording.regions import Region, module_of, regions_told
from shardwright.profiler.recording.unitgraph import Call, Context
from shardwright.profiler.trace import trace

__all__ = ["piped", "repeatable"]  # fixtures

FLOAT_BYTES = 4
BOTH = pytest.mark.parametrize("reentrant", [False, True], ids=["not reentrant", "reentrant"])
ANEW = Context(grad=True, checkpointed=True)


class Block(nn.Module):
    """Two layers with a wide inside; it may checkpoint itself, as those of Transformers do, whose class does it."""

    def __init__(self, width=WIDTH, *, itself=False, reentrant=False, drop=0.0):
        super().__init__()
        self.wide, self.narrow, self.drop = nn.Linear(width, 8 * width), nn.Linear(8 * width, width), drop
        self.itself, self.reentrant = itself, reentrant

    def inside(self, x):
        return self.narrow(F.dropout(torch.tanh(self.wide(x)), self.drop, self.training)) + x

    def forward(self, x):
        if self.itself and self.training:
            return checkpoint(self.inside, x, use_reentrant=self.reentrant)
        return self.inside(x)


class Stack(nn.Module):
    """Blocks in a row, each called in a region of its own."""

    def __init__(self, count=4, *, reentrant=False, checkpoints=True, **options):
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block(reentrant=reentrant, **options) for _ in range(count))
        self.reentrant, self.checkpoints = reentrant, checkpoints

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=self.reentrant) if self.checkpoints else block(x)
        return x


class Half(nn.Module):
    """Two layers, the first or the second of them in a region."""

    def __init__(self, which):
        super().__init__()
        self.layers, self.which = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2)), which

    def forward(self, x):
        for position, layer in enumerate(self.layers):
            part = torch.nn.Sequential(layer, nn.Tanh())
            x = checkpoint(part, x, use_reentrant=False) if position == self.which else part(x)
        return x


class Halves(nn.Sequential):
    def __init__(self):
        super().__init__(Half(0), Half(1))


def blocks(count=4):
    return {f"blocks.{i}" for i in range(count)}


# What is captured


@BOTH
def test_units_in_a_region_are_computed_anew(reentrant):
    """Those that the forward calls in one, and no others; glue in it is computed once."""

    class Model(Layers):
        def part(self, x):
            return torch.relu(self.layers[1](x) * 2)

        def forward(self, x):
            return self.layers[2](checkpoint(self.part, self.layers[0](x), use_reentrant=reentrant))

    capture = faithful(Model(3))
    contexts = {s.name: s.call.context for s in capture.steps if s.call is not None}
    assert contexts["layers.1"] == ANEW
    assert {name for name, context in contexts.items() if context is not None} == {"layers.1"}
    assert [s.name for s in capture.steps if s.checkpointed] == ["layers.1"]


@BOTH
def test_a_step_keeps_what_it_is_given_and_nothing_else(reentrant):
    """Saved are the blocks' inputs, of which the first is nobody else's; without a region, their wide insides too."""
    narrow = ROWS * WIDTH * FLOAT_BYTES
    capture = faithful(Stack(reentrant=reentrant))
    assert [step(capture, f"blocks.{i}").saved_bytes for i in range(4)] == [narrow] * 4
    plain = faithful(Stack(checkpoints=False))
    assert all(step(plain, name).saved_bytes >= 8 * narrow for name in blocks())


@BOTH
def test_a_unit_that_checkpoints_itself_keeps_what_it_hands_to_the_region(reentrant):
    """The region is the unit's own then, and its input is all that is kept."""
    capture = faithful(Stack(itself=True, checkpoints=False, reentrant=reentrant))
    assert all(step(capture, name).call.context is None and step(capture, name).checkpointed for name in blocks())
    assert [step(capture, f"blocks.{i}").saved_bytes for i in range(4)] == [ROWS * WIDTH * FLOAT_BYTES] * 4


def test_a_class_whose_call_begins_the_region_does_so_once():
    """The graph calls the module past it, or the region would hold another one, and compute it anew twice."""

    class Checkpointing(Block):
        calls = 0

        def __call__(self, x):
            return checkpoint(super().__call__, x, use_reentrant=False)

        def forward(self, x):
            type(self).calls += 1
            return super().forward(x)

    model = Stack(1, checkpoints=False)
    model.blocks[0] = Checkpointing()
    capture = faithful(model)
    assert step(capture, "blocks.0").call.context == ANEW
    Checkpointing.calls = 0
    (output,) = capture.module()(rows(0))
    output.sum().backward()
    assert Checkpointing.calls == 2


def test_in_inference_nothing_is_computed_anew():
    """A region without gradients is none."""
    capture = faithful(Stack(), train=False)
    assert not any(s.checkpointed for s in capture.steps)
    assert all(step(capture, name).call.context is None for name in blocks())


def test_without_gradients_a_graph_of_training_computes_once():
    """Its regions follow the caller, as the model's do."""
    module = faithful(Stack()).module()
    with torch.no_grad():
        (output,) = module(rows(0))
    assert not output.requires_grad


def test_segments_of_a_sequence():
    """PyTorch's own checkpoint_sequential, whose last segment is none."""

    class Model(Layers):
        def forward(self, x):
            return checkpoint_sequential(list(self.layers), 2, x, use_reentrant=False)

    capture = faithful(Model(4))
    assert [s.name for s in capture.steps if s.checkpointed] == ["layers.0", "layers.1"]


def test_what_is_measured_is_told_apart():
    """A block with a region, around it or inside, takes another time than one without: no measurement is shared."""
    makes = (Stack(), Stack(checkpoints=False), Stack(itself=True, checkpoints=False))
    steps = [step(trace(model, (rows(0),)), "blocks.1") for model in makes]
    steps += [step(trace(Halves(), (rows(0),)), name) for name in ("0", "1")]
    assert len({step_key(each, train=True, optimizer="adam", accumulate=False) for each in steps}) == 5


# The grain


@pytest.mark.parametrize("itself", [False, True])
def test_a_module_that_is_checkpointed_as_a_whole_stays_whole(itself):
    """Up to half of an even share: opened, its units would each keep what they are given. Without a region it is."""

    def units(devices, **options):
        captures, _ = captures_of(Stack(**options), (rows(0),), {}, [1], devices=devices, train=True)
        return {name for name in captures[1].units if name.startswith("blocks")}

    options = {"itself": itself, "checkpoints": not itself}
    assert units(2, **options) == blocks()
    assert units(2, checkpoints=False) == {f"{name}.{part}" for name in blocks() for part in ("wide", "narrow")}
    assert units(4, **options) == units(2, checkpoints=False)


def test_the_module_of_a_region():
    """Found however its call is written, also where its class wraps the forward."""
    block = Block()
    for function in (block, block.forward, block.__call__):
        assert module_of(function) is block
        assert module_of(partial(partial(function, 1), scale=2)) is block
    assert module_of(partial(Block.forward, block)) is block
    assert module_of(torch.relu) is None
    assert module_of(partial(torch.add, 1)) is None


# What it costs


def test_the_backward_of_an_estimate_has_the_forward_in_it_again():
    """For a region around a unit and for one inside of it, and for neither of an equal unit without."""
    workloads = Workloads()
    plain, around, inside = (
        workloads.of(Call(block, (rows(0),), {}, context), Mode(train=True))
        for block, context in ((Block(), None), (Block(), ANEW), (Block(itself=True), None))
    )
    assert [o.name for o in around.forward] == [o.name for o in plain.forward] == [o.name for o in inside.forward]

    def products(workload):
        return sum("mm" in operation.name for operation in workload.backward)

    first, second = (workloads.of(Call(Half(which), (rows(0),), {}), Mode(train=True)) for which in (0, 1))
    assert [o.text for o in first.backward] != [o.text for o in second.backward]
    # What the narrow layer gives is not needed for the backward, and PyTorch stops before it is made again.
    assert products(around) == products(inside) == products(plain) + 1


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.project = nn.Linear(16, 48)

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in self.project(x).chunk(3, -1))
        return F.scaled_dot_product_attention(q, k, v, None, 0.1 if self.training else 0.0).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("around", [True, False], ids=["around", "inside"])
def test_kernels_are_those_of_gpus_when_computed_anew(around):
    """Attention with dropout, counted as for GPUs, goes the same way in the backward as in the forward."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(Attention() if around else Inside() for _ in range(2))

        def forward(self, x):
            for layer in self.layers:
                x = checkpoint(layer, x, use_reentrant=False) if around else layer(x)
            return x

    class Inside(Attention):
        def forward(self, x):
            return checkpoint(super().forward, x, use_reentrant=False)

    gpus = [Device(name="cuda:0", kind="cuda", description="", memory_bytes=1)]
    with kernels_as_on(gpus):
        options = {"devices": 2, "train": True, "strict": True, "units": ["layers.*"]}
        captures, _ = captures_of(Model(), (torch.randn(4, 8, 16),), {}, [1, 2], **options)
        counted = count_step(step(captures[1], "layers.0").call, train=True)
    assert counted.saved_bytes < 4 * 8 * 16 * FLOAT_BYTES  # random numbers' state at most


# Where it runs


@BOTH
@pytest.mark.parametrize("options", [{}, {"itself": True, "checkpoints": False}], ids=["around", "inside"])
def test_a_pipeline_in_this_process_is_the_model(piped, reentrant, options):
    """Outputs and gradients, over two threads."""
    x = torch.randn(12, WIDTH, requires_grad=True)
    model, placed = piped(Stack(reentrant=reentrant, **options), (x,))
    assert_same_step(model, placed, (x,))


class Dropping(nn.Module):
    """Multiplies by one number and drops: the gradient of it is the sum of what comes out, over it."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        return F.dropout(x * self.scale, 0.5)


@pytest.mark.parametrize("recompute", ["never", "always"])
@pytest.mark.parametrize("inside", [False, True], ids=["around", "inside"])
def test_units_that_drop_do_so_alike_in_the_backward_of_a_pipeline(captured_profile, inside, recompute):
    """The threads draw from one generator; what one draws again in its backward is what it drew, whoever drew since."""

    class Unit(Dropping):
        def forward(self, x):
            return checkpoint(super().forward, x, use_reentrant=False) if inside else super().forward(x)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.units = nn.ModuleList(Unit() for _ in range(6))

        def forward(self, x):
            for unit in self.units:
                x = unit(x) if inside else checkpoint(unit, x, use_reentrant=False)
            return x

    x = torch.ones(12, 2000)
    profile = captured_profile(Model(), (x,), microbatches=(1, 4))
    plan = sw.plan(profile, microbatches=4, recompute=recompute)
    assert len(plan.stages) == 2
    placed = sw.place(Model(), plan, microbatches=4)
    for _ in range(5):
        placed.zero_grad()
        total = placed(x).sum()
        total.backward()
        for unit in placed.units:
            torch.testing.assert_close(unit.scale.grad, total.detach() / unit.scale.detach())


def test_the_report_says_so(captured_profile, run_cli, tmp_path):
    """How many steps are computed anew, among what a pipeline has to know."""

    def report(**options):
        path = tmp_path / "net.profile.json"
        captured_profile(Stack(**options), (rows(0),)).save(path)
        return " ".join(run_cli("report", str(path), in_process=True).stdout.split())

    assert "checkpointed 4 steps, computed anew in the backward" in report()
    assert "checkpointed" not in report(checkpoints=False)


# What cannot be computed anew, and what trains nothing


class OverwritesItsInput(Layers):
    """A ReLU that writes into what the layer before it has made, both in one region."""

    def __init__(self):
        super().__init__(2)
        self.relu = nn.ReLU(inplace=True)

    def part(self, x):
        return self.layers[1](self.relu(x * 2))

    def forward(self, x):
        return checkpoint(self.part, self.layers[0](x), use_reentrant=False)


class OverwrittenLater(Layers):
    """Glue that writes into what a unit of the region was given."""

    def part(self, x):
        y = x * 1
        h = self.layers[1](y + 0) + self.layers[2](y)
        return h + y.mul_(2)

    def forward(self, x):
        return checkpoint(self.part, self.layers[0](x), use_reentrant=False)


def test_steps_whose_arguments_are_overwritten_are_not_computed_anew():
    """The region could begin again with what it was given, but a unit of it cannot; the others are."""
    capture = faithful(OverwritesItsInput())
    assert [s.name for s in capture.steps if s.checkpointed] == ["layers.1"]
    capture = trace(OverwrittenLater(3), (rows(0),))
    assert [s.name for s in capture.steps if s.checkpointed] == ["layers.1"]
    profile = sw.profile(OverwritesItsInput(), (rows(0),), devices=["cpu:0"], microbatches=[1], budget_s=0.1)
    assert not profile.obstacles


def test_a_pipeline_in_this_process_computes_them_as_they_are(piped):
    """Where the model is captured again, too."""
    x = torch.randn(12, WIDTH)
    model, placed = piped(nn.Sequential(OverwritesItsInput(), OverwritesItsInput()), (x,))
    assert_same_step(model, placed, (x,))


@pytest.mark.parametrize("inside", [False, True], ids=["around", "inside"])
def test_a_reentrant_region_that_is_given_no_gradients_trains_nothing(piped, inside):
    """As PyTorch has it: its parameters get none in a replay and a pipeline either."""

    class First(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            return checkpoint(self.linear, x, use_reentrant=True) if inside else self.linear(x)

    class Model(Layers):
        def __init__(self):
            super().__init__(3)
            self.layers[0] = First()

        def forward(self, x):
            y = self.layers[0](x) if inside else checkpoint(self.layers[0], x, use_reentrant=True)
            return self.layers[2](self.layers[1](y))

    x = torch.randn(12, WIDTH)
    model, placed = piped(Model(), (x,))
    for one in (model, placed):
        one(x).sum().backward()
        assert [p.grad is None for p in one.parameters()] == [True, True, False, False, False, False]


# What tells of them


def test_the_generator_is_pytorch_s_again():
    """After all blocks, also of one that failed; other threads are not told."""
    original = checkpointing._checkpoint_without_reentrant_generator
    told = []

    def dissolving(_function, _handed):
        told.append(threading.get_ident())
        return Region(dissolves=True)

    def elsewhere():
        x = rows(0).requires_grad_()
        checkpoint(torch.tanh, x, use_reentrant=False).sum().backward()

    def inside():
        first, second = (regions_told(dissolving) for _ in range(2))
        with first:
            checkpoint(torch.tanh, rows(0), use_reentrant=False)
            thread = threading.Thread(target=elsewhere)
            thread.start()
            thread.join()
            with second:
                checkpoint(torch.tanh, rows(0), use_reentrant=False)
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        inside()
    assert told == [threading.get_ident()] * 2
    assert checkpointing._checkpoint_without_reentrant_generator is original


def test_an_error_inside_of_a_region_is_the_forward_s():
    """It is told as any other, and leaves no region open."""

    class Model(Layers):
        def part(self, x):
            return self.layers[1](x[:, :2])

        def forward(self, x):
            return checkpoint(self.part, self.layers[0](x), use_reentrant=False)

    with pytest.raises(sw.ShardwrightError, match=r"failed in unit layers\.1 .* cannot be multiplied"):
        trace(Model(), *batch(0))
