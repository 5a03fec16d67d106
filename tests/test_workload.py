"""Workloads: a step's operators on fake tensors are those of the real step."""

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn import functional

from shardwright.errors import ShardwrightError
from shardwright.profiler.estimates.workload import HOST_ONLY, Mode, Workloads
from shardwright.profiler.measuring.subject import Subject
from shardwright.profiler.recording.operations import OperationRecorder
from shardwright.profiler.recording.unitgraph import Call, Context


def workload_of(call, mode):
    return Workloads().of(call, mode)


class Block(nn.Module):
    """Norms, a buffer, a plain tensor attribute, dropout, and a frozen layer."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8).requires_grad_(False)
        self.norm, self.drop = nn.BatchNorm1d(8), nn.Dropout(0.1)
        self.scale = torch.full((8,), 2.0)

    def forward(self, x):
        return self.norm(x * self.scale + self.drop(self.down(self.up(x).relu())))


class Counted(nn.Module):
    """Its path follows its input's values."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(x[x[:, 0] > 0])


class Recording:
    """A stopwatch that notes what runs instead of how long."""

    def __init__(self, phases):
        self.phases = phases

    def time(self, function):
        operations = []
        with OperationRecorder(operations.append):
            result = function()
        self.phases.append([o.text for o in operations if (o.bytes or o.flops) and o.name != HOST_ONLY])
        return result, lambda: 0.0

    def finish(self):
        pass


def measured(call, mode):
    """What really happens in the step that the profiler times, second round."""
    phases = []

    optimizer = mode.optimizer or None
    subject = Subject(call, torch.device("cpu"), train=mode.train, optimizer=optimizer, accumulate=mode.accumulate)
    for _ in range(2):
        phases.clear()
        for phase in ("forward", "backward", "update"):
            getattr(subject, phase)(Recording(phases))
    return [*phases, [], []][:3]


def texts(workload):
    return [[o.text for o in phase] for phase in (workload.forward, workload.backward, workload.update)]


@pytest.mark.parametrize("optimizer", ["", "sgd", "momentum", "adam", "adamw"])
@pytest.mark.parametrize("accumulate", [False, True])
def test_a_workload_is_what_the_measured_step_does(optimizer, accumulate):
    """Line for line: forward, backward with or without gradients to add to, and update."""
    call = Call(Block(), (torch.randn(4, 8, requires_grad=True),), {})
    mode = Mode(train=True, optimizer=optimizer, accumulate=accumulate)
    assert texts(workload_of(call, mode)) == measured(call, mode)


def test_inference_has_a_forward_only():
    """As it is measured without training."""
    call = Call(Block(), (torch.randn(4, 8),), {})
    workload = workload_of(call, Mode(train=False))
    assert texts(workload) == measured(call, Mode(train=False))
    assert workload.forward
    assert not workload.backward


def test_glue_and_regions_count_as_they_run():
    """A function is no module, and a region of autocast computes in its dtype."""
    context = Context(grad=True, autocast=torch.bfloat16)
    weight = torch.randn(8, 8, requires_grad=True)
    workload = workload_of(Call(torch.matmul, (torch.randn(4, 8), weight), {}, context), Mode(train=True))
    assert next(o.dtype for o in workload.forward if o.flops) is torch.bfloat16
    assert workload.backward


def test_the_model_is_left_alone():
    """Parameters, gradients, buffers, training flags and inputs stay as they were."""
    block = Block().eval()
    x = torch.randn(4, 8, requires_grad=True)
    before = {name: value.clone() for name, value in block.state_dict().items()}
    workload_of(Call(block, (x,), {}), Mode(train=True, optimizer="adam"))
    assert all(torch.equal(before[name], value) for name, value in block.state_dict().items())
    assert not block.training
    assert x.grad is None
    assert all(p.grad is None for p in block.parameters())
    assert type(block.scale) is torch.Tensor


@pytest.mark.parametrize("without", ["meta", "fake"])
def test_no_values_are_needed(without):
    """A module without values has the workload of one with values."""
    real = workload_of(Call(Block(), (torch.randn(4, 8),), {}), Mode(train=True, optimizer="adam"))
    with torch.device("meta") if without == "meta" else FakeTensorMode():
        call = Call(Block(), (torch.randn(4, 8),), {})
    assert texts(workload_of(call, Mode(train=True, optimizer="adam"))) == texts(real)


def test_a_step_that_follows_values_runs_on_copies(caplog):
    """Where there are values it is run with them; where there are none that is an error in one line."""
    x = torch.tensor([[1.0, 2, 3, 4], [-1, 2, 3, 4], [5, 2, 3, 4]])
    call = Call(Counted(), (x,), {})
    workload = workload_of(call, Mode(train=True, optimizer="sgd"))
    assert next(o.flops for o in workload.forward if o.flops) == 2 * 2 * 4 * 4
    assert not caplog.records
    with torch.device("meta"):
        empty = Call(Counted(), (torch.randn(3, 4),), {})
    with pytest.raises(ShardwrightError, match="depends on values, which are not there: Dynamic") as error:
        workload_of(empty, Mode(train=True))
    assert "\n" not in str(error.value)


def test_gpus_update_all_parameters_at_once():
    """With foreach an update has fewer calls and moves as many bytes."""
    call = Call(nn.Sequential(*[nn.Linear(8, 8) for _ in range(10)]), (torch.randn(4, 8),), {})
    one, all_ = (workload_of(call, Mode(train=True, optimizer="momentum", foreach=f)).update for f in (False, True))
    assert len(all_) < len(one) / 5
    assert sum(o.bytes for o in all_) == sum(o.bytes for o in one)


def test_equal_steps_share_a_workload():
    """Layers of a stack are looked at once, but not another shape, a frozen weight or another backward."""
    workloads = Workloads()
    mode = Mode(train=True, optimizer="adam")

    def of(layer, rows=4):
        return workloads.of(Call(layer, (torch.randn(rows, 8, requires_grad=True),), {}), mode)

    class Halved(torch.autograd.Function):
        @staticmethod
        def forward(_, x):
            return x.clone()

        @staticmethod
        def backward(_, grad):
            return grad / 2

    class Custom(nn.Linear):
        def forward(self, x):
            return Halved.apply(super().forward(x))

    class Plain(nn.Linear):
        def forward(self, x):
            return super().forward(x).clone()

    first = of(Plain(8, 8))
    assert of(Plain(8, 8)) is first
    for other in (of(Plain(8, 8), rows=5), of(Plain(8, 8).requires_grad_(False)), of(Custom(8, 8))):
        assert other is not first
        assert texts(other) != texts(first)


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_dropout_and_attention_are_the_operators_of_the_device(kind):
    """A GPU drops in one operator, and keeps no probabilities of attention; a CPU makes a mask and divides it."""

    class Dropping(nn.Module):
        def forward(self, x):
            return functional.scaled_dot_product_attention(*[functional.dropout(x, 0.5)] * 3, dropout_p=0.5)

    call = Call(Dropping(), (torch.randn(2, 2, 8, 4, requires_grad=True),), {})
    workload = workload_of(call, Mode(train=True, kind=kind))
    names = {operation.name for operation in (*workload.forward, *workload.backward)}
    on_cpu, on_gpu = {"aten.bernoulli_.float", "aten._safe_softmax.default"}, {"aten.native_dropout.default"}
    assert names & (on_cpu | on_gpu) == (on_cpu if kind == "cpu" else on_gpu)
    assert ("aten.native_dropout_backward.default" in names) == (kind == "cuda")


def test_workloads_of_one_step_by_kind_are_kept_apart():
    """A backward is found once for equal forwards, but not for those of another kind of device."""
    workloads = Workloads()
    call = Call(nn.Dropout(0.5), (torch.randn(4, 4, requires_grad=True),), {})
    found = {kind: workloads.of(call, Mode(train=True, kind=kind)).backward for kind in ("cpu", "cuda")}
    assert [o.name for o in found["cpu"]] != [o.name for o in found["cuda"]]
