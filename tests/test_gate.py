"""The gate: what a stage computes wrongly is told by the first unit, and what fits nowhere is compared unit by unit."""

import itertools
import os
from types import SimpleNamespace

import cloudpickle
import pytest
import torch
from torch import nn
from zoo import ZOO

import shardwright as sw
from shardwright.profiler.profile import Device
from shardwright.profiler.recording.inputs import all_microbatches, outputs_of
from shardwright.profiler.recording.unitgraph import mean_square_loss
from shardwright.profiler.trace import trace
from shardwright.profiler.workers.worker import resident
from shardwright.reports.run_report import equality
from shardwright.sharder.runtime import run as run_module
from shardwright.sharder.runtime import session as session_module
from shardwright.sharder.runtime.check import units_of
from shardwright.sharder.runtime.gates import unitwise
from shardwright.sharder.runtime.gates.gate import DifferenceError, Gate
from shardwright.sharder.runtime.gates.resting import dropout_resting
from shardwright.sharder.runtime.gates.unitwise import UnitByUnit
from shardwright.sharder.runtime.pipeline import Comparison
from shardwright.sharder.runtime.piping.cut import cut, whole_program
from shardwright.sharder.runtime.session import Session, Split


@pytest.mark.parametrize(
    ("devices", "reference", "other"),
    [
        (("cuda:0", "cuda:1"), "cuda:0", False),
        (("cuda:0", "cuda:2"), "cuda:0", True),  # another model of GPU
        (("cuda:0", "cpu:0"), "cuda:0", True),
        (("cuda:0",), None, True),  # held by the host
        (("cpu:0", "cpu:1"), None, False),
        (("cpu:0", "cpu:1"), "cpu:1", False),
    ],
)
def test_kernels_differ_between_models_of_gpus(devices, reference, other):
    """More rounding is allowed where the model was computed by another library's kernels, or for another GPU."""
    models = {"cuda:0": "RTX 4090", "cuda:1": "RTX 4090", "cuda:2": "RTX 3090"}
    kinds = [("cpu", "two cores"), ("cpu", "one core")]
    here = [Device(name=name, kind="cuda", description=model, memory_bytes=1) for name, model in models.items()]
    here += [Device(name=f"cpu:{i}", kind=k, description=d, memory_bytes=1) for i, (k, d) in enumerate(kinds)]
    session = SimpleNamespace(pool=SimpleNamespace(devices=here))
    gate = Gate(session, None, reference, stays=False)
    assert gate._has_other_kernels(SimpleNamespace(plan=SimpleNamespace(devices=devices))) == other


class Stretch(torch.autograd.Function):
    """Its input, with a gradient that is a tenth too long."""

    @staticmethod
    def forward(_ctx, x):
        return x.clone()

    @staticmethod
    def backward(_ctx, gradient):
        return gradient * 1.1


class Layer(nn.Module):
    """A linear layer that computes something else in a process where its fault is planted."""

    def __init__(self, name):
        super().__init__()
        self.name = name
        self.linear = nn.Linear(6, 6)

    def forward(self, x):
        kind = resident.get(f"fault in {self.name}")
        if kind == "input's gradient":
            x = Stretch.apply(x)
        weight = Stretch.apply(self.linear.weight) if kind == "weight's gradient" else self.linear.weight
        y = torch.nn.functional.linear(x, weight, self.linear.bias)
        if kind == "third micro-batch":
            resident["calls"] = resident.get("calls", 0) + 1
            return y * (1.1 if resident["calls"] % 4 == 3 else 1.0)
        return y * 1.1 if kind == "output" else y


class Net(nn.Module):
    """Layers with a skip over all of them and glue between."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Layer(f"layers.{number}") for number in range(6)])

    def forward(self, x):
        skip = x = self.layers[0](x)
        for layer in self.layers[1:]:
            x = torch.tanh(layer(x))
        return x + skip


def plant(what, kind):
    """From now on there is this fault in this worker."""
    if what.startswith("layers"):
        resident[f"fault in {what}"] = kind
        return
    from torch.distributed.pipelining import PipelineStage

    receiving = getattr(PipelineStage, kind)
    setattr(PipelineStage, kind, lambda self, number: tuple(t * 1.1 for t in receiving(self, number)))


@pytest.fixture
def few_cores(monkeypatch):
    """Any number of workers, which share what cores there are."""

    def found(names, beside=()):  # noqa: ARG001
        return tuple(Device(name=n, kind="cpu", description="", memory_bytes=10**10, cores=(core,)) for n in names)

    core = min(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    monkeypatch.setattr(run_module, "find_devices", found)


@pytest.fixture
def planted(monkeypatch, captured_profile):
    """Runs a model over two workers, of which one has a fault."""

    def run(device, what, kind, model=None, devices=("cpu:0", "cpu:1"), train=True, **options):
        torch.manual_seed(0)
        model, x = model or Net(), torch.randn(8, 6)
        profile = captured_profile(model, (x,), devices=devices, microbatches=(1, 4), train=train)
        pins = {"layers.[0-2]": "cpu:0", "layers.[3-5]": "cpu:1"}
        plan = sw.plan(profile, microbatches=4, **{"pins": pins, **options})
        beginning = Session.begin

        def begin(session, devices, store):
            beginning(session, devices, store)
            session.pool.call({device: (plant, (what, kind))}, limit_s=60)

        monkeypatch.setattr(Session, "begin", begin)
        return sw.run(model, plan, (x,), steps=1, naive=False)

    return run


FAULTS = [
    (("cpu:1", "layers.4", "output"), r"layers.4 \(stage 1 on cpu:1\) in the forward: its output for micro-batch 0"),
    (
        ("cpu:1", "layers.4", "third micro-batch"),
        r"layers.4 \(stage 1 on cpu:1\) in the forward: its output for micro-batch 2",
    ),
    (
        ("cpu:1", "layers.4", "input's gradient"),
        r"layers.4 \(stage 1 on cpu:1\) in the backward: the gradient that comes to "
        r"torch.tanh at test_gate.py:\d+:\d+ \(stage 1 on cpu:1\) for micro-batch 0",
    ),
    (
        ("cpu:1", "layers.4", "weight's gradient"),
        r"layers.4 \(stage 1 on cpu:1\) in the backward: the gradient of layers.4.linear.weight",
    ),
    (
        ("cpu:1", "a link", "_retrieve_recv_activations"),
        r"what stage 1 on cpu:1 receives in the forward: the output of layers.0 for micro-batch 0",
    ),
    (
        ("cpu:0", "a link", "_retrieve_recv_grads"),
        r"what stage 0 on cpu:0 receives in the backward: the gradient that comes to "
        r"torch.tanh at test_gate.py:\d+:\d+ \(stage 0 on cpu:0\) for micro-batch 0",
    ),
]


@pytest.mark.parametrize(("fault", "told"), FAULTS, ids=[f"{what}-{kind}" for (_, what, kind), _ in FAULTS])
def test_the_first_unit_that_differs_is_named(planted, fault, told):
    """With its stage, its device and both numbers, and after what the gate found; nothing is timed."""
    numbers = r"differs from the unsharded model's by \d.* of its largest value; {} is allowed for torch.float32"
    gate, unit = numbers.format("1e-05"), numbers.format("(1e-05|0.001)")
    with pytest.raises(sw.ShardwrightError, match=f"{gate}; the first to differ is {told} {unit}; nothing was timed"):
        planted(*fault)


@pytest.mark.parametrize(
    "options", [{"recompute": "always"}, {"schedule": "interleaved", "pins": {"layers.4": "cpu:1"}}]
)
def test_stages_of_every_kind_are_observed(planted, options, monkeypatch):
    """Those that are computed anew in the backward, and several a device; the same is told a segment at a time."""
    monkeypatch.setattr(unitwise, "OBSERVED_BYTES", 1)
    with pytest.raises(sw.ShardwrightError, match=r"first to differ is layers.4 \(stage \d on cpu:1\) in the backward"):
        planted("cpu:1", "layers.4", "input's gradient", **options)


@pytest.mark.usefixtures("few_cores")
def test_the_replica_is_named(planted):
    """By its device and by its own micro-batch, counted over the whole batch; here in inference."""
    told = r"first to differ is layers.5 \(stage 1 on cpu:3\) in the forward: its output for micro-batch 2"
    with pytest.raises(sw.ShardwrightError, match=told):
        planted("cpu:3", "layers.5", "output", devices=[f"cpu:{i}" for i in range(4)], replicas=2, pins={}, train=False)


def test_what_cannot_be_computed_apart_hides_no_difference(planted):
    """A unit that changes its input for others too: the gate's own finding is told, and why there is no more."""
    with pytest.raises(sw.ShardwrightError, match=r"differs .*could not be found: .*relu changes in place .*; nothing"):
        planted("cpu:1", "layers.4", "output", model=Changing())


class Changing(Net):
    """A unit changes its input, which is read again."""

    def __init__(self):
        super().__init__()
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        x = self.layers[0](x) * 1.0
        self.relu(x)
        for layer in self.layers[1:]:
            x = layer(x)
        return x


class Skipping(Net):
    """Units hand on what they are given, which others read too."""

    def __init__(self):
        super().__init__()
        self.shortcuts = nn.ModuleList([nn.Identity() for _ in self.layers])

    def forward(self, x):
        for layer, shortcut in zip(self.layers, self.shortcuts, strict=True):
            x = torch.tanh(layer(x)) + shortcut(x)
        return x


def test_what_is_handed_on_has_the_gradients_of_its_own_readers(planted):
    """An identity's result is the very tensor that it is given, to which those of other readers come too."""
    with pytest.raises(sw.ShardwrightError, match=r"first to differ is layers.3 .*: the gradient of layers.3.linear.w"):
        planted("cpu:1", "layers.3", "weight's gradient", model=Skipping())


class Stirring(nn.Module):
    """Changes the first of what it is given."""

    def forward(self, x, skip):
        return x.relu_() + skip


class Apart(Net):
    """A unit changes one of its inputs, and another of them is read again."""

    def __init__(self):
        super().__init__()
        self.stirring = Stirring()

    def forward(self, x):
        skip = self.layers[0](x)
        x = self.stirring(skip * 2, skip)
        for layer in self.layers[1:]:
            x = layer(x)
        return x + skip


def test_what_is_read_beside_what_changes_is_no_obstacle(planted):
    """Only what a unit does change may have no other reader."""
    with pytest.raises(sw.ShardwrightError, match=r"first to differ is layers.4 \(stage 1 on cpu:1\) in the forward"):
        planted("cpu:1", "layers.4", "output", model=Apart())


class Masking(nn.Module):
    """Leaves out what it draws, whether it trains or not."""

    def forward(self, x):
        return x * (torch.rand_like(x) < 0.5)


def test_a_unit_that_draws_random_numbers_is_named_as_one(captured_profile):
    """Whatever is drawn in the forward is other than in the unsharded model, and the remedy is said."""
    model = nn.Sequential(nn.Linear(6, 6), Masking(), nn.Linear(6, 6), nn.Linear(6, 6))
    plan = sw.plan(captured_profile(model, (torch.randn(8, 6),), microbatches=(1, 4)), microbatches=4)
    told = r"is 1 \(stage 0 on cpu:0\) in the forward, which draws random numbers, .* as an input: its output for micro"
    with pytest.raises(sw.ShardwrightError, match=told):
        sw.run(model, plan, (torch.randn(8, 6),), steps=1, naive=False)


def crowded(captured_profile, model, x):
    """A plan for two devices of which neither has room for all of the model."""
    profile = captured_profile(model, (x,), microbatches=(1, 4), counted=True)
    whole = sw.plan(profile, microbatches=4, pins={"*": "cpu:0"}).stages[0].memory_bytes
    tight = [device.model_copy(update={"memory_bytes": int(0.8 * whole)}) for device in profile.devices]
    return sw.plan(profile.model_copy(update={"devices": tuple(tight)}), microbatches=4)


def test_what_fits_nowhere_is_compared_unit_by_unit(captured_profile, monkeypatch):
    """Neither device nor host has room for the whole model: every output and gradient is compared, and the run says
    how; a wrong gradient is refused as it is beside the whole model."""
    model, x = nn.Sequential(*[nn.Linear(64, 64) for _ in range(6)]), torch.randn(8, 64)
    plan = crowded(captured_profile, model, x)
    assert plan.predicted.baseline_device is None
    monkeypatch.setattr(session_module, "free_host_bytes", lambda: 150_000)
    assert 6 * sum(p.nbytes for p in model.parameters()) > 150_000
    run = sw.run(model, plan, (x,), steps=1, naive=False)
    assert run.equality.how == "unit by unit"
    assert run.equality.tensors == 4 + 12
    assert run.equality.outputs <= 1e-5
    assert run.equality.gradients <= run.equality.tolerance == 1e-3
    assert "compared a unit at a time" in equality(run)[1]
    checking = Session.check

    def check(session, split):
        found = checking(session, split)
        found[1].gradients["4.weight"] *= 1.1
        return found

    monkeypatch.setattr(Session, "check", check)
    told = (
        r"^the gradient of 4.weight differs .*; the first to differ is 4 \(stage 1 on cpu:1\) in the backward: the gr"
    )
    with pytest.raises(sw.ShardwrightError, match=told):
        sw.run(model, plan, (x,), steps=1, naive=False)


class Here:
    """In place of a session: the unsharded model is computed in this process."""

    def __init__(self, model, args, kwargs):
        self.model, self.args, self.kwargs = model, args, kwargs


def in_this_process(function, *args):
    """Call as a worker would, which has tensors and modules of its own."""
    resident["device"] = torch.device("cpu")
    return function(*cloudpickle.loads(cloudpickle.dumps(args)))


class Decoder(nn.Module):
    """Decodes by another module's weight."""

    def forward(self, x, embedding):
        return x @ embedding.weight.T


class Tied(nn.Module):
    """An embedding that is the head too, is read by glue and handed to a unit, a frozen layer, a unit with two outputs,
    a layer that is called twice, one under autocast, batch statistics, and results that are changed in place."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.twice = nn.Linear(8, 8)
        self.recurrent = nn.GRU(8, 8, batch_first=True)
        self.norm = nn.BatchNorm1d(5)
        self.relu = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(0.5)
        self.cast = nn.Linear(8, 8)
        self.decoder = Decoder()
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        x += self.frozen(x)
        y, last = self.recurrent(self.twice(x))
        y = self.drop(self.relu(self.norm(y) * 1.5))
        z = self.twice(y) * 0.5
        z += y
        with torch.no_grad():
            scale = self.twice(x).abs().mean()
        with torch.autocast("cpu", torch.bfloat16):
            z = z + self.cast(y)
        return self.head(z) + self.decoder(z, self.embed) + (y @ self.embed.weight.T).mean() * scale, last.transpose(
            0, 1
        )


def whole(model, args, count):
    """Outputs and gradients by PyTorch itself, dropout at rest."""
    model.zero_grad()
    outputs = []
    with dropout_resting([model]):
        for piece, _ in all_microbatches(args, {}, count):
            made = outputs_of(model(*piece))
            (mean_square_loss(made) / count).backward()
            outputs += [t.detach() for t in made]
    named = model.named_parameters(remove_duplicate=False)
    gradients = {name: p.grad.clone() for name, p in named if p.grad is not None}
    model.zero_grad()
    return Comparison(outputs, gradients)


@pytest.mark.parametrize("name", ["Tied", "NetDict"])
def test_a_unit_at_a_time_is_the_model(captured_profile, containers, name):
    """Outputs and every gradient are PyTorch's own of the whole model; and of each gradient that is another, and of
    each that is missing, the name is told."""
    torch.manual_seed(0)
    if name == "Tied":
        model, args = Tied(), (torch.randint(0, 20, (8, 5)),)
    else:
        model = getattr(containers, name)()
        args = (type(model).sample_inputs()[0][:8, :, :24, :24].contiguous(),)
    plan = sw.plan(captured_profile(model, args, devices=["cpu:0"], microbatches=(1, 4)), microbatches=4)
    capture = trace(model, (args[0][:2],), {}, train=True, units=units_of(plan, model))
    split = Split("plan", plan, cut(capture, plan), capture.output_places, capture)
    expected = whole(model, args, 4)
    assert expected.gradients

    def compared(found):
        units = UnitByUnit(Here(model, args, {}), split, [found], other_kernels=False)
        return units.compared(in_this_process, observing=False)

    found = compared(expected)
    assert max(found.outputs, found.gradients) <= 1e-5
    assert found.tensors == len(expected.outputs) + len(expected.gradients)
    for wrong in itertools.islice(expected.gradients, 3):
        names = dict(model.named_parameters(remove_duplicate=False))
        given = dict(expected.gradients)
        given[wrong] = given[wrong] * 1.1 + 1e-3 * max(t.abs().max() for t in given.values())
        with pytest.raises(DifferenceError, match=rf"the gradient of {wrong} differs"):
            compared(Comparison(expected.outputs, given))
        given = {each: t for each, t in expected.gradients.items() if names[each] is not names[wrong]}
        with pytest.raises(DifferenceError, match="gave no gradient for"):
            compared(Comparison(expected.outputs, given))
    other = [t + (number == 3) for number, t in enumerate(expected.outputs)]
    with pytest.raises(DifferenceError, match="output 3 differs"):
        compared(Comparison(other, expected.gradients))


@pytest.mark.parametrize("name", ["bart", "perceiver", "t5", "swin", "monai_dynunet_deep"])
def test_models_that_nobody_adapted(name):
    """A unit at a time they are PyTorch's own too: encoders that every decoder layer reads, modules handed on."""
    pytest.importorskip(ZOO[name].library.replace("-", "_"))
    torch.manual_seed(0)
    model, args, kwargs = ZOO[name].make()
    capture = trace(model.train(), args, kwargs, train=True)
    assert not capture.obstacles
    with dropout_resting(list(capture.units.values())):
        made = outputs_of(model(*args, **kwargs))
    made = [made[place] for place in capture.output_places]
    mean_square_loss(made).backward()
    named = model.named_parameters(remove_duplicate=False)
    gradients = {each: p.grad.clone() for each, p in named if p.grad is not None}
    plan = SimpleNamespace(train=True, microbatches=1, pipelines=(("cpu:0",),), pipeline_microbatches=1)
    split = SimpleNamespace(capture=capture, plan=plan, programs=[whole_program(capture)])
    found = Comparison([t.detach() for t in made], gradients)
    units = UnitByUnit(Here(model, args, kwargs), split, [found], other_kernels=False)
    assert units.compared(in_this_process, observing=False).tensors == len(made) + len(gradients)
