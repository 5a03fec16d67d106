"""Training by a plan in the processes of a script: the unsharded model's losses, whichever way it is divided."""

import contextlib
import functools
import io
import itertools
import os
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.nn import functional as F  # noqa: N812

import shardwright as sw
from shardwright.profiler.pool import Pool
from shardwright.profiler.profile import Device
from shardwright.profiler.target import load_target
from shardwright.sharder.runtime.newfiles import NewFiles

ROOT = Path(__file__).parents[1]
STEPS = 4


@pytest.fixture(scope="module")
def workers():
    """Four processes that stand for those of torchrun."""
    core = (min(os.sched_getaffinity(0)),) if hasattr(os, "sched_getaffinity") else ()
    devices = [Device(name=f"cpu:{i}", kind="cpu", description="", memory_bytes=10**9, cores=core) for i in range(4)]
    with Pool(devices) as pool:
        yield pool


def on_ranks(pool, count, function, *args):
    """What ``function(*args)`` returns on each of ``count`` ranks, as torchrun would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    calls = {f"cpu:{rank}": (as_rank, (rank, count, port, function, args)) for rank in range(count)}
    return list(pool.call(calls, limit_s=60).values())


def as_rank(rank, count, port, function, args):
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    try:
        return function(*args)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        if cores is not None:
            os.sched_setaffinity(0, cores)


class Chain(nn.Module):
    """Layers in a row."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(*[nn.Linear(6, 6) for _ in range(6)])

    def forward(self, x):
        return self.layers(x)

    @staticmethod
    def batch(seed, size=8):
        made = torch.Generator().manual_seed(seed)
        return (torch.randn(size, 6, generator=made),), {}, torch.randn(size, 6, generator=made)

    loss = staticmethod(F.mse_loss)


class Branches(nn.Module):
    """Skips, an integer keyword, a parameter and a buffer outside units, a frozen unit, a dictionary of results."""

    def __init__(self):
        super().__init__()
        self.left = nn.ModuleList([nn.Linear(6, 6) for _ in range(3)])
        self.right = nn.ModuleList([nn.Linear(6, 6) for _ in range(3)])
        self.right[0].requires_grad_(False)
        self.gain = nn.Parameter(torch.rand(6))
        self.register_buffer("shift", torch.rand(6))
        self.heads = nn.ModuleDict({"rows": nn.Linear(12, 4), "sum": nn.Linear(6, 1)})

    def forward(self, x, *, index, scale=1.0):
        left, right = x, x
        for a, b in zip(self.left, self.right, strict=True):
            left, right = a(left).relu() + right, b(right).tanh()
        rows = self.heads["rows"](torch.cat([left, right * self.gain + self.shift], dim=1))
        return {"rows": torch.gather(rows, 1, index), "sum": self.heads["sum"](left) * scale}

    @staticmethod
    def batch(seed, size=8):
        made = torch.Generator().manual_seed(seed)
        index = torch.randint(0, 4, (size, 2), generator=made)
        return (torch.randn(size, 6, generator=made),), {"index": index}, torch.randn(size, 2, generator=made)

    @staticmethod
    def loss(output, target):
        return F.mse_loss(output["rows"], target) + output["sum"].square().mean()


class Language(nn.Module):
    """A tied embedding and head, dropout at rest in evaluation only."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.layers = nn.ModuleList([nn.Linear(6, 6) for _ in range(4)])
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight
        self.unused = nn.Linear(2, 2)

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = x + layer(x).tanh()
        return self.head(x)

    @staticmethod
    def batch(seed, size=8):
        made = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, 11, (size, 5), generator=made)
        return (ids[:, :-1].contiguous(),), {}, ids[:, 1:].contiguous()

    @staticmethod
    def loss(output, target):
        return F.cross_entropy(output.flatten(0, 1), target.flatten())


def made(kind):
    torch.manual_seed(0)
    return kind()


def planned(captured_profile, kind, stages, microbatches=4, pieces=1, replicas=1, **options):
    """A plan of ``kind`` over exactly ``stages`` devices, with ``pieces`` stages on each; or so many ``replicas``."""
    args, kwargs, _ = kind.batch(0)
    devices = [f"cpu:{i}" for i in range(stages * replicas)]
    parted = options.get("schedule") == "zero-bubble"
    profile = captured_profile(
        made(kind), args, kwargs, devices=devices, microbatches=(1, microbatches), optimizer="adamw", parted=parted
    )
    if pieces > 1:
        options |= {"schedule": "interleaved", "stages_per_device": pieces}
    plan = sw.plan(profile, microbatches=microbatches, replicas=replicas, **options)
    assert (plan.replicas, plan.depth, len(plan.stages)) == (replicas, stages, pieces * stages)
    return plan


def made_pipe(kind, plan, **options):
    args, kwargs, _ = kind.batch(0)
    return sw.pipeline(made(kind), plan, args, kwargs, **{"loss": kind.loss, "timeout_s": 20.0} | options)


def adamw(module):
    return torch.optim.AdamW(module.parameters(), lr=0.01, weight_decay=0.1)


def plain_step(model, optimizer, seeds, clip=None):
    """A step of the unsharded model on one or several batches: the last loss, and the gradients' norm."""
    optimizer.zero_grad()
    for seed in seeds:
        args, kwargs, target = type(model).batch(seed)
        loss = type(model).loss(model(*args, **kwargs), target)
        loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip) if clip else torch.zeros(())
    optimizer.step()
    return float(loss.detach()), float(norm)


def piped_step(kind, pipe, optimizer, seeds, clip=None):
    """The same of a pipeline."""
    optimizer.zero_grad()
    for seed in seeds:
        args, kwargs, target = kind.batch(seed)
        loss = pipe.step(*args, target=target, **kwargs)
    norm = pipe.clip_grad_norm_(clip) if clip else torch.zeros(())
    optimizer.step()
    return float(loss), float(norm)


def unsharded(kind, steps, **options):
    """Losses and norms of the unsharded model, and the model."""
    model = made(kind)
    optimizer = adamw(model)
    return [plain_step(model, optimizer, seeds, **options) for seeds in steps], model


def trained(kind, plan, steps, options):
    """In a rank: losses and norms, the whole state on rank 0, what the stage holds, and what is left of the model."""
    model = made(kind)
    args, kwargs, _ = kind.batch(0)
    pipe = sw.pipeline(model, plan, args, kwargs, loss=kind.loss, timeout_s=20.0)
    optimizer = adamw(pipe)
    curve = [piped_step(kind, pipe, optimizer, seeds, **options) for seeds in steps]
    values = {name for name, p in model.named_parameters(remove_duplicate=False) if not p.is_meta}
    own = {name for name, _ in pipe.named_parameters()}
    return curve, pipe.state_dict(full=True), set(pipe.state_dict()), own, values


def close(found, expected):
    return all(a == pytest.approx(b, rel=1e-5, abs=1e-6) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("kind", "stages", "options"),
    [
        (Chain, 3, {}),
        (Branches, 2, {}),
        (Language, 3, {}),
        (Branches, 3, {}),
        (Language, 3, {"recompute": "always"}),
        (Chain, 3, {"pieces": 2}),
        (Branches, 2, {"pieces": 2}),
        (Language, 2, {"pieces": 3}),
        (Chain, 1, {"replicas": 2}),
        (Branches, 2, {"replicas": 2}),
        (Language, 2, {"replicas": 2}),
        (Chain, 2, {"replicas": 2, "pieces": 2}),
        (Language, 2, {"replicas": 2, "recompute": "always"}),
        (Chain, 3, {"schedule": "zero-bubble"}),
        (Branches, 2, {"schedule": "zero-bubble"}),
        (Branches, 3, {"schedule": "zero-bubble"}),
        (Language, 3, {"schedule": "zero-bubble"}),
    ],
)
def test_a_pipeline_trains_as_the_model_does(workers, captured_profile, kind, stages, options):
    """Losses of four AdamW steps on every rank, and all weights after them, are the unsharded model's."""
    steps = [[seed] for seed in range(STEPS)]
    expected, model = unsharded(kind, steps)
    plan = planned(captured_profile, kind, stages, **options)
    results = on_ranks(workers, len(plan.devices), trained, kind, plan, steps, {})
    for curve, *_ in results:
        assert close(curve, expected)
    whole = results[0][1]
    assert list(whole) == list(model.state_dict())
    for key, value in model.state_dict().items():
        assert torch.allclose(whole[key], value, rtol=1e-4, atol=1e-5), key
    assert all(not result[1] for result in results[1:])
    held = [result[2] for result in results]
    assert set.union(*held) == set(model.state_dict())
    for _, _, state, own, values in results:
        assert own <= state
        assert values <= state  # of the other stages nothing is kept


def interfaces(kind, plan, given):
    """In a rank: ``GLOO_SOCKET_IFNAME`` where the engine's groups are made, after it, and after a refusal."""
    name, seen, made_by_us = "GLOO_SOCKET_IFNAME", [], dist.new_group
    os.environ.pop(name, None)
    os.environ |= {name: given} if given else {}
    dist.new_group = lambda *args, **options: (seen.append(os.environ.get(name)), made_by_us(*args, **options))[1]
    try:
        made_pipe(kind, plan).close()
    finally:
        dist.new_group = made_by_us
    after = os.environ.get(name)
    with pytest.raises(sw.ShardwrightError):
        made_pipe(Chain, plan)
    return {*seen}, after, os.environ.get(name)


@pytest.mark.parametrize("given", ["lo", None])
def test_the_interface_is_the_script_s_again(workers, captured_profile, given):
    """All groups, those of tied weights too, are made over the chosen one; then the variable is as it was."""
    if sys.platform != "linux":
        pytest.skip("other systems call loopback otherwise")
    plan = planned(captured_profile, Language, 2)
    assert on_ranks(workers, 2, interfaces, Language, plan, given) == [({"lo"}, given, given)] * 2


def hosted(function, *args):
    """In a rank whose stages exchange through the host's memory, as those of a plan over kinds of devices do."""
    from shardwright.sharder.runtime import ranks

    before, ranks.is_hosted = ranks.is_hosted, lambda _: True
    try:
        return function(*args)
    finally:
        ranks.is_hosted = before


@pytest.mark.parametrize(
    ("kind", "options"), [(Branches, {}), (Language, {"recompute": "always"}), (Chain, {"replicas": 2, "pieces": 2})]
)
def test_stages_of_several_kinds_of_devices_train_alike(workers, captured_profile, kind, options):
    """What the plain model learns, ties and what is computed anew included."""
    steps = [[0, 1], [2]]
    expected, model = unsharded(kind, steps, clip=0.5)
    plan = planned(captured_profile, kind, 2, **options)
    results = on_ranks(workers, len(plan.devices), hosted, trained, kind, plan, steps, {"clip": 0.5})
    assert all(close(curve, expected) for curve, *_ in results)
    for key, value in model.state_dict().items():
        assert torch.allclose(results[0][1][key], value, rtol=1e-4, atol=1e-5), key


def autocast_on_one(kind, plan):
    """The error of a rank of which only the second computes in bfloat16."""
    with torch.autocast("cpu", torch.bfloat16, enabled=os.environ["RANK"] == "1"):
        try:
            made_pipe(kind, plan)
        except sw.ShardwrightError as error:
            return str(error)


def test_kinds_of_devices_under_unequal_autocast_are_refused(workers, captured_profile):
    """A region of one kind would leave the other's stages in another precision than their neighbours send."""
    plan = planned(captured_profile, Chain, 2)
    errors = on_ranks(workers, 2, hosted, autocast_on_one, Chain, plan)
    assert errors == [errors[0]] * 2
    assert errors[0].startswith("rank 1 has an autocast dtype other than rank 0's; enter torch.autocast for each kind")


@pytest.mark.parametrize("options", [{}, {"pieces": 2}, {"replicas": 2}])
def test_gradients_accumulate_and_are_clipped(workers, captured_profile, options):
    """Two batches a step, a norm over all stages with tied weights once: as the unsharded model's."""
    steps = [[0, 1], [2, 3], [4, 5]]
    expected, _ = unsharded(Language, steps, clip=0.5)
    plan = planned(captured_profile, Language, 2, **options)
    for curve, *_ in on_ranks(workers, len(plan.devices), trained, Language, plan, steps, {"clip": 0.5}):
        assert close(curve, expected)
    assert min(norm for _, norm in expected) > 0.5


def sizes(kind, plan, batches):
    """In a rank: losses of batches of other sizes in training and evaluation, results, and what of one is refused."""
    pipe = made_pipe(kind, plan)
    optimizer, found = adamw(pipe), []
    for seed, size in batches:
        args, kwargs, target = kind.batch(seed, size)
        evaluated = float(pipe.evaluate(*args, target=target, **kwargs))
        optimizer.zero_grad()
        loss = float(pipe.step(*args, target=target, **kwargs))
        optimizer.step()
        found.append((evaluated, loss, pipe(*args, **kwargs)))
    return found


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (Branches, {}),
        (Language, {}),
        (Branches, {"pieces": 2}),
        (Branches, {"replicas": 2}),
        (Branches, {"schedule": "zero-bubble"}),
    ],
)
def test_batches_of_any_size(workers, captured_profile, kind, options):
    """A last partial batch, one that only divides by itself, and a larger one: losses and results are the model's."""
    batches = [(0, 8), (1, 6), (2, 7), (3, 16), (4, 3), (5, 8), (6, 10)]
    batches = [(seed, size) for seed, size in batches if size % options.get("replicas", 1) == 0]
    model = made(kind)
    optimizer, expected = adamw(model), []
    for seed, size in batches:
        args, kwargs, target = kind.batch(seed, size)
        optimizer.zero_grad()
        loss = kind.loss(model(*args, **kwargs), target)
        loss.backward()
        optimizer.step()
        loss = float(loss.detach())
        expected.append((loss, model(*args, **kwargs)))
    plan = planned(captured_profile, kind, 2, **options)
    for found in on_ranks(workers, len(plan.devices), sizes, kind, plan, batches):
        for (evaluated, loss, output), (expected_loss, expected_output) in zip(found, expected, strict=True):
            assert evaluated == pytest.approx(expected_loss, rel=1e-5)
            assert loss == pytest.approx(expected_loss, rel=1e-5)
            torch.testing.assert_close(output, expected_output, rtol=1e-4, atol=1e-5)


def saved(kind, plan, folder, seeds):
    """In a rank: losses of some steps, and a checkpoint."""
    pipe = made_pipe(kind, plan)
    optimizer = adamw(pipe)
    curve = [piped_step(kind, pipe, optimizer, [seed]) for seed in seeds]
    pipe.save(folder, optimizer)
    return curve


def resumed(kind, plan, folder, seeds):
    """In a rank: losses of steps from a checkpoint on; the learning rate is the checkpoint's."""
    pipe = made_pipe(kind, plan)
    optimizer = torch.optim.AdamW(pipe.parameters(), lr=0.5)
    pipe.load(folder, optimizer)
    return [piped_step(kind, pipe, optimizer, [seed]) for seed in seeds]


@pytest.mark.parametrize(
    ("before", "after"),
    [((1, 1), (3, 1)), ((3, 1), (2, 2)), ((2, 2), (1, 1)), ((2, 1, 2), (3, 1)), ((3, 1), (2, 1, 2))],
)
def test_a_checkpoint_goes_on_with_another_number_of_stages(workers, captured_profile, tmp_path, before, after):
    """Weights, AdamW's moments and its settings: the curve is the one without a break, tied weights included.

    Stages on a device come after their devices, and the replicas after these.
    """
    expected, _ = unsharded(Language, [[seed] for seed in range(6)])
    plans = {n: planned(captured_profile, Language, n[0], 4, *n[1:]) for n in (before, after)}
    counts = [len(plan.devices) for plan in plans.values()]
    first = on_ranks(workers, counts[0], saved, Language, plans[before], tmp_path, range(3))
    second = on_ranks(workers, counts[1], resumed, Language, plans[after], tmp_path, range(3, 6))
    assert close(first[0] + second[-1], expected)


class Told(nn.Linear):
    """A layer that saves a word beside its tensors."""

    word = "as made"

    def get_extra_state(self):
        return self.word

    def set_extra_state(self, state):
        self.word = state


class Telling(Language):
    """A language model with such a layer."""

    def __init__(self):
        super().__init__()
        self.layers[0] = Told(6, 6)


def state_handed_out(kind, plan):
    """In a rank: load the whole state from rank 0, where all weights are one; whether the stage has that then."""
    pipe = made_pipe(kind, plan)
    whole = {
        key: torch.ones_like(value) if isinstance(value, torch.Tensor) else "handed out"
        for key, value in made(kind).state_dict().items()
    }
    pipe.load_state_dict(whole if (pipe.replica, pipe.stage) == (0, 0) else {}, full=True)
    return all(
        bool((value == 1).all()) if isinstance(value, torch.Tensor) else value == "handed out"
        for value in pipe.state_dict().values()
    )


@pytest.mark.parametrize("replicas", [1, 2])
def test_rank_0_hands_out_a_state(workers, captured_profile, replicas):
    """The counterpart of gathering: only rank 0 need have read the file."""
    plan = planned(captured_profile, Telling, 2, replicas=replicas)
    assert all(on_ranks(workers, 2 * replicas, state_handed_out, Telling, plan))


@pytest.fixture
def alone(monkeypatch):
    """An ordinary process, without what torchrun sets; pipelines are left at the end."""
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_one_stage_needs_no_launcher(captured_profile):
    """In a plain process a plan for one device trains as the model does, and leaves no process group behind."""
    expected, _ = unsharded(Chain, [[0], [1]])
    pipe = made_pipe(Chain, planned(captured_profile, Chain, 1))
    optimizer = adamw(pipe)
    assert close([piped_step(Chain, pipe, optimizer, [seed]) for seed in range(2)], expected)
    pipe.close()
    assert not dist.is_initialized()


def saved_once(kind, plan, folder):
    """In a rank: one step, and a checkpoint."""
    pipe = made_pipe(kind, plan)
    optimizer = adamw(pipe)
    piped_step(kind, pipe, optimizer, [0])
    pipe.save(folder, optimizer)


def resumed_without_us(kind, folder):
    """In one process: the whole model goes on from a pipeline's checkpoint by what PyTorch has; one more step."""
    model = made(kind)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    state = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer, options=options)}
    dcp.load(state, checkpoint_id=folder)
    model.load_state_dict(state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"], options=options)
    return plain_step(model, optimizer, [1])


def test_the_whole_model_resumes_by_pytorch_alone(workers, captured_profile, tmp_path):
    """The checkpoint's layout is that of torch.distributed.checkpoint, for the model and its optimizer."""
    on_ranks(workers, 2, saved_once, Chain, planned(captured_profile, Chain, 2), tmp_path)
    expected, _ = unsharded(Chain, [[0], [1]])
    assert close(on_ranks(workers, 1, resumed_without_us, Chain, tmp_path), expected[1:])


@pytest.mark.usefixtures("alone")
def test_a_plain_process_is_told_how_to_start(captured_profile):
    """More stages than processes: the line to start the script with, before anything is captured."""
    with pytest.raises(sw.ShardwrightError, match=r"2 stages, and this is one process: .*torchrun --nproc-per-node 2"):
        made_pipe(Chain, planned(captured_profile, Chain, 2))


def told(function, *args):
    """In a rank: the error of ``function``, or what it returns."""
    try:
        return function(*args)
    except sw.ShardwrightError as error:
        return str(error)


def refused_once_made(kind, plan, options, size):
    """In a rank: make a pipeline and take a step with a batch that may be another one on every rank."""
    pipe = made_pipe(kind, plan, **options)
    args, kwargs, target = kind.batch(int(os.environ["RANK"]) if size == "apart" else 0)
    return float(pipe.step(*args, target=target, **kwargs))


def test_the_number_of_processes_is_that_of_the_stages(workers, captured_profile):
    """One process too many, or one too few: both numbers, on every rank."""
    plan = planned(captured_profile, Chain, 2)
    for line in on_ranks(workers, 3, told, made_pipe, Chain, plan):
        assert line.startswith("the plan has 2 stages (cpu:0, cpu:1), and there are 3 processes")
        assert "torchrun --nproc-per-node 2" in line


def test_ranks_with_other_batches_are_told(workers, captured_profile):
    """A sampler that is seeded apart would train on inputs of one batch and targets of another."""
    plan = planned(captured_profile, Chain, 2)
    for line in on_ranks(workers, 2, told, refused_once_made, Chain, plan, {}, "apart"):
        assert line.startswith("rank 1 has a batch other than rank 0's; give every rank the same inputs and target")


def raising(_output, _target):
    raise ValueError("no luck with this loss")


def failing_and_going_on(kind, plan, options):
    """In a rank: the errors of a step and of the next."""
    pipe = made_pipe(kind, plan, **options)
    args, kwargs, target = kind.batch(0)
    step = functools.partial(pipe.step, *args, target=target, **kwargs)
    return told(step), told(step)


def refused_each_in_its_way(kind, plan):
    """In a rank: a batch of another type on the first, of another shape on the second; then one that is right."""
    pipe = made_pipe(kind, plan)
    (x,), _, target = kind.batch(0)
    line = told(lambda: pipe.step(x.double() if pipe.stage == 0 else x[:, :3], target=target))
    return line, float(pipe.step(x, target=target))


def test_one_fault_has_one_text(workers, captured_profile):
    """Whichever rank is the first to say it; where no message was sent the pipeline goes on."""
    ((loss, _),), _ = unsharded(Chain, [[0]])
    found = on_ranks(workers, 2, refused_each_in_its_way, Chain, planned(captured_profile, Chain, 2))
    assert len({line for line, _ in found}) == 1
    assert "the pipeline was made for inputs [0] float32 8x6" in found[0][0]
    assert [value for _, value in found] == pytest.approx([loss] * 2, rel=1e-5)


def test_a_loss_that_raises_ends_all_ranks(workers, captured_profile):
    """All ranks name the stage that failed and why; none waits for longer than the limit."""
    plan = planned(captured_profile, Chain, 3)
    lines = on_ranks(workers, 3, failing_and_going_on, Chain, plan, {"loss": raising, "timeout_s": 4.0})
    failed = "stage 2 on cpu:2 failed: ValueError: no luck with this loss"
    assert [first for first, _ in lines] == [failed] * 3
    # Messages of that step are still under way; the next one must not take them for its own.
    (second,) = {second for _, second in lines}
    assert second.startswith("the pipeline broke off in an earlier call, of which messages are left")
    assert f"({failed}); start the processes again, from the last checkpoint" in second


def test_of_several_stages_all_are_named(workers, captured_profile):
    """What fails on a device is said of its stages, since the engine does not tell which of them it was at."""
    plan = planned(captured_profile, Chain, 2, pieces=2)
    lines = on_ranks(workers, 2, told, refused_once_made, Chain, plan, {"loss": raising, "timeout_s": 4.0}, "same")
    assert lines == [f"stages 1 and 3 on {plan.devices[1]} failed: ValueError: no luck with this loss"] * 2


def test_a_plain_process_is_told_the_number_of_devices(captured_profile):
    """Four stages on two devices are two processes, two replicas of two stages four."""
    with pytest.raises(sw.ShardwrightError, match=r"4 stages on 2 devices, and this is one process: .*per-node 2 "):
        made_pipe(Chain, planned(captured_profile, Chain, 2, pieces=2))
    with pytest.raises(sw.ShardwrightError, match=r"2 replicas of 2 stages on 4 devices, .*per-node 4 SCRIPT$"):
        made_pipe(Chain, planned(captured_profile, Chain, 2, replicas=2))


def raising_in_one_replica(output, target):
    if os.environ["RANK"] == "3":
        raise ValueError("no luck with this part")
    return F.mse_loss(output, target)


def test_a_failure_in_one_replica_ends_all(workers, captured_profile):
    """The other replica, which waits to sum its gradients, names the stage that failed and its replica."""
    plan = planned(captured_profile, Chain, 2, replicas=2)
    options = {"loss": raising_in_one_replica, "timeout_s": 3.0}
    lines = on_ranks(workers, 4, told, refused_once_made, Chain, plan, options, "same")
    assert lines == ["stage 1 of replica 1 on cpu:3 failed: ValueError: no luck with this part"] * 4


def seeded_apart(kind, plan):
    """In a rank: the weights that it starts with, where every rank's model was made with numbers of its own."""
    torch.manual_seed(int(os.environ["RANK"]))
    args, kwargs, _ = kind.batch(0)
    pipe = sw.pipeline(kind(), plan, args, kwargs, loss=kind.loss, timeout_s=20.0)
    return {name: value.clone() for name, value in pipe.state_dict().items()}


class Kinds(Chain):
    """What gloo knows no dtype of, what does not lie in its memory as it is read, and what is empty."""

    def __init__(self):
        super().__init__()
        self.turned = nn.Parameter(torch.rand(6, 6).t())
        self.register_buffer("short", torch.randint(9, (6,), dtype=torch.int16))
        self.register_buffer("turns", torch.view_as_complex(torch.rand(6, 2)))
        self.register_buffer("mask", torch.rand(6) > 0.5)
        self.register_buffer("repeated", torch.rand(6, 1, 1).expand(6, 6, 500))
        self.register_buffer("none", torch.rand(0, 3))

    def forward(self, x):
        x = (x @ self.turned + self.short + self.turns.real) * self.mask + self.repeated[:, 0, 0]
        return self.layers(x) + self.none.sum()


@pytest.mark.parametrize(("kind", "stages"), [(Branches, 2), (Kinds, 1)])
def test_replicas_start_alike(workers, captured_profile, kind, stages):
    """Whatever the ranks' models were made with, weights and buffers are the first replica's."""
    plan = planned(captured_profile, kind, stages, replicas=2)
    found = on_ranks(workers, 2 * stages, seeded_apart, kind, plan)
    for own, other in zip(found[:stages], found[stages:], strict=True):
        assert own.keys() == other.keys()
        assert all(torch.equal(own[name], other[name]) for name in own)


class Graph(Chain):
    """A sparse matrix, which the first and the last stage multiply by."""

    layout = torch.sparse_coo

    def __init__(self):
        super().__init__()
        self.register_buffer("edges", torch.diag(torch.rand(6) + 0.5).to_sparse(layout=self.layout))

    def forward(self, x):
        return (self.edges @ self.layers((self.edges @ x.t()).t()).t()).t()


class Rows(Graph):
    """The same in compressed rows."""

    layout = torch.sparse_csr


def sparse_states(kind, plan):
    """In a rank whose model was made with numbers of its own: its matrix, the loss, and the matrix twice as large."""
    torch.manual_seed(int(os.environ["RANK"]))
    (x,), _, target = kind.batch(0)
    pipe = sw.pipeline(kind(), plan, (x,), loss=kind.loss, timeout_s=20.0)
    own, loss = pipe.state_dict()["edges"].to_dense(), float(pipe.step(x, target=target))
    whole = pipe.state_dict(full=True)
    pipe.load_state_dict({key: value * 2 for key, value in whole.items()}, full=True)
    return own, loss, pipe.state_dict()["edges"].to_dense()


@pytest.mark.parametrize("kind", [Graph, Rows])
@pytest.mark.parametrize(("stages", "replicas"), [(2, 1), (1, 2)])
@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_sparse_buffers_are_the_first_ones(workers, captured_profile, kind, stages, replicas):
    """In all stages and replicas that have one, from the beginning and where a state is handed out."""
    plan = planned(captured_profile, kind, stages, replicas=replicas)
    (first, loss, twice), (other, same, again) = on_ranks(workers, 2, sparse_states, kind, plan)
    torch.manual_seed(0)
    assert torch.equal(first, kind().edges.to_dense())
    assert torch.equal(first, other)
    assert loss == same
    assert torch.equal(twice, 2 * first)
    assert torch.equal(again, 2 * first)


class Way(nn.Module):
    """Of three layers the one that the samples' sign says; the third is never taken."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.never = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        return self.up(x) if bool(x.sum() > 0) else self.down(x)


class Routed(Chain):
    """A layer whose parameters the first half of a batch reaches otherwise than the second."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(Way(), nn.Linear(6, 6), nn.Linear(6, 6).requires_grad_(False))

    @staticmethod
    def batch(seed, size=8):
        (x,), _, target = Chain.batch(seed, size)
        return (x.abs() * torch.ones(size, 1).index_fill_(0, torch.arange(size // 2, size), -1.0),), {}, target


class Repeated(Chain):
    """Beside its result, whole numbers and a part of the input that repeat their memory."""

    def forward(self, x):
        return {"found": self.layers(x), "places": torch.arange(6).expand(3, 6), "wide": x[:, :1].expand(-1, 6)}


def result(kind, plan):
    """In a rank: the model's result for a batch."""
    return made_pipe(kind, plan)(*kind.batch(1)[0])


@pytest.mark.parametrize(("stages", "replicas"), [(2, 1), (1, 2)])
def test_results_may_repeat_their_memory(workers, captured_profile, stages, replicas):
    """Every rank has their values."""
    expected = made(Repeated)(*Repeated.batch(1)[0])
    plan = planned(captured_profile, Repeated, stages, replicas=replicas)
    for found in on_ranks(workers, 2, result, Repeated, plan):
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value)


def gradients_of(kind, plan):
    """In a rank: the gradients of two batches, of which the second trains what was frozen."""
    pipe = made_pipe(kind, plan)
    for seed in range(2):
        (x,), _, target = kind.batch(seed)
        pipe.step(x, target=target)
        for parameter in pipe.parameters():
            parameter.requires_grad_()
    return {name: None if p.grad is None else p.grad.clone() for name, p in pipe.named_parameters()}


def test_what_the_samples_of_some_replicas_reach_is_summed(workers, captured_profile):
    """One replica's samples reach other parameters than the other's, and what no sample reaches has no gradient."""
    model = made(Routed)
    for seed in range(2):
        (x,), _, target = Routed.batch(seed)
        for part, wanted in zip(x.split(2), target.split(2), strict=True):
            (Routed.loss(model(part), wanted) / 4).backward()
        model.requires_grad_()
    for found in on_ranks(workers, 2, gradients_of, Routed, planned(captured_profile, Routed, 1, replicas=2)):
        for name, parameter in model.named_parameters():
            assert (found[name] is None) == (parameter.grad is None) == ("never" in name), name
            if parameter.grad is not None:
                torch.testing.assert_close(found[name], parameter.grad)


class Sparse(Language):
    """Gradients of the rows that were read alone."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6, sparse=True)


def test_sparse_gradients_are_refused(workers, captured_profile):
    """By name, on all ranks; one pipeline of the same model takes them."""
    plan = planned(captured_profile, Sparse, 1, replicas=2)
    for first, second in on_ranks(workers, 2, failing_and_going_on, Sparse, plan, {}):
        assert first.startswith("embed.weight has a sparse gradient, and replicas sum dense ones: make its module with")
        assert second.startswith("the pipeline broke off in an earlier call")  # other stages wait for their sums


class Noisy(Chain):
    """Dropout in the first layers alone."""

    def __init__(self):
        super().__init__()
        noisy = [nn.Linear(6, 6), nn.Dropout(0.5), nn.Linear(6, 6), nn.Dropout(0.5)]
        self.layers = nn.Sequential(*noisy, *[nn.Linear(6, 6) for _ in range(4)])


def noise(plan, seed):
    """In a rank: what dropout left in two steps, and a number that the script draws after them."""
    torch.manual_seed(seed)
    pipe, seen = made_pipe(Noisy, plan), []
    torch.manual_seed(seed)
    for module in pipe.module.modules():
        if isinstance(module, nn.Dropout):
            module.register_forward_hook(lambda _module, _args, output: seen.append(output != 0))
    (x,), _, target = Noisy.batch(0)
    for _ in range(2):
        pipe.step(x, target=target)
    return torch.stack(seen) if seen else None, float(torch.rand(()))


def test_ranks_draw_numbers_of_their_own(workers, captured_profile):
    """Replicas that are seeded alike drop other entries, again the same ones; and the script's numbers go on alike."""
    plan = planned(captured_profile, Noisy, 2, replicas=2)
    first, again = (on_ranks(workers, 4, noise, plan, 0) for _ in range(2))
    torch.manual_seed(0)
    assert [number for _, number in first] == [float(torch.rand(()))] * 4
    masks = [mask for mask, _ in first if mask is not None]
    assert len(masks) in (2, 4)
    pairs = itertools.combinations([step for mask in masks for step in mask.chunk(2)], 2)
    assert not any(a.shape == b.shape and torch.equal(a, b) for a, b in pairs)
    for (mask, _), (other, _) in zip(first, again, strict=True):
        assert (mask is None and other is None) or torch.equal(mask, other)


def in_a_group_of_the_scripts(kind, plan):
    """In a rank: the script has a process group of its own, and keeps it."""
    dist.init_process_group("gloo")
    pipe = made_pipe(kind, plan)
    args, kwargs, target = kind.batch(0)
    loss = float(pipe.step(*args, target=target, **kwargs))
    pipe.close()
    total = torch.ones(1)
    dist.all_reduce(total)
    return loss, float(total)


def test_the_scripts_own_process_group_is_used(workers, captured_profile):
    """What the script has initialised serves, and outlives the pipeline."""
    ((loss, _),), _ = unsharded(Chain, [[0]])
    for found, total in on_ranks(workers, 2, in_a_group_of_the_scripts, Chain, planned(captured_profile, Chain, 2)):
        assert (found, total) == (pytest.approx(loss, rel=1e-5), 2.0)


class Normed(Chain):
    """Batch statistics."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 6), nn.Linear(6, 6))


@pytest.mark.usefixtures("alone")
def test_batch_statistics_are_those_of_micro_batches(captured_profile):
    """A warning names the layer and both sizes; the running statistics are as of four batches of two."""
    plan = planned(captured_profile, Normed, 1)
    with pytest.warns(UserWarning, match=r"layers\.1 normalises over a micro-batch of 2 samples .* the batch of 8"):
        pipe = made_pipe(Normed, plan)
    (x,), _, target = Normed.batch(0)
    pipe.step(x, target=target)
    model = made(Normed)
    for piece in x.split(2):
        model(piece)
    for key, value in pipe.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[key])


def normed_in_replicas(plan):
    """In a rank: what was warned of, and the whole state after a step."""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        pipe = made_pipe(Normed, plan)
    (x,), _, target = Normed.batch(0)
    pipe.step(x, target=target)
    return [str(each.message) for each in warned], pipe.state_dict(full=True)


def test_batch_statistics_are_each_replicas_own(workers, captured_profile):
    """A warning says so, and those that are gathered are of the first replica's two batches of two."""
    (told_, state), _ = on_ranks(workers, 2, normed_in_replicas, planned(captured_profile, Normed, 1, replicas=2))
    assert any("running statistics for each replica, of which the first's are saved" in line for line in told_)
    model = made(Normed)
    (x,), _, _ = Normed.batch(0)
    for piece in x[:4].split(2):
        model(piece)
    for key, value in model.named_buffers():
        torch.testing.assert_close(state[key], value)


def normed_and_evaluated(plan):
    """In a rank: the result for a batch after some steps, and the whole state."""
    pipe = made_pipe(Normed, plan)
    for seed in range(3):
        (x,), _, target = Normed.batch(seed)
        pipe.step(x, target=target)
    return pipe(*Normed.batch(9)[0]), pipe.state_dict(full=True)


def test_one_model_is_evaluated(workers, captured_profile):
    """All replicas evaluate with the first's statistics: the result is that of the model that is saved."""
    plan = planned(captured_profile, Normed, 1, replicas=2)
    (found, state), (other, _) = on_ranks(workers, 2, normed_and_evaluated, plan)
    model = made(Normed)
    model.load_state_dict(state)
    expected = model.eval()(*Normed.batch(9)[0])
    torch.testing.assert_close(found, expected)
    assert torch.equal(found, other)


@pytest.mark.usefixtures("alone")
def test_a_loss_may_be_a_sum(captured_profile):
    """With reduction="sum" the micro-batches' losses and gradients are added up."""
    pipe = made_pipe(Chain, planned(captured_profile, Chain, 1), loss=summed, reduction="sum")
    (x,), _, target = Chain.batch(0)
    model = made(Chain)
    expected = summed(model(x), target)
    expected.backward()
    assert float(pipe.step(x, target=target)) == pytest.approx(float(expected.detach()), rel=1e-5)
    gradients = {name: p.grad for name, p in pipe.named_parameters()}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad)


def summed(output, target):
    return F.mse_loss(output, target, reduction="sum")


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("recompute", ["never", "always"])
def test_batch_statistics_are_updated_once_a_step(captured_profile, recompute):
    """Also where the forward comes again in the backward, in steps and not in evaluation."""
    with pytest.warns(UserWarning, match="normalises over a micro-batch"):
        pipe = made_pipe(Normed, planned(captured_profile, Normed, 1, recompute=recompute))
    (x,), _, target = Normed.batch(0)
    pipe.step(x, target=target)
    pipe.evaluate(x, target=target)
    assert pipe.state_dict()["layers.1.num_batches_tracked"] == 4


class Dropped(Chain):
    """Dropout inside units and between them."""

    def forward(self, x):
        return F.dropout(self.layers(x), 0.5, self.training)


@pytest.mark.usefixtures("alone")
def test_results_are_those_of_evaluation(captured_profile):
    """Dropout in the forward itself works in steps and rests in results, whatever the mode; no gradient is kept."""
    pipe = made_pipe(Dropped, planned(captured_profile, Dropped, 1))
    (x,), _, target = Dropped.batch(0)
    model = made(Dropped).eval()
    torch.testing.assert_close(pipe(x), model(x))
    assert not pipe(x).requires_grad
    assert float(pipe.evaluate(x, target=target)) == pytest.approx(
        float(F.mse_loss(model(x), target).detach()), rel=1e-5
    )
    assert len({float(pipe.step(x, target=target)) for _ in range(3)}) == 3
    assert pipe.module.training


@pytest.mark.usefixtures("alone")
def test_autocast_is_part_of_the_pipeline(captured_profile):
    """Made in a region it computes as the model does there, loss included; outside of it a step is refused."""
    plan = planned(captured_profile, Chain, 1)
    (x,), _, target = Chain.batch(0)
    seen = []

    def loss(output, target):
        seen.append((output.dtype, torch.is_autocast_enabled("cpu")))
        return F.mse_loss(output.float(), target)

    with torch.autocast("cpu", torch.bfloat16):
        expected = F.mse_loss(made(Chain)(x).float(), target)
        pipe = made_pipe(Chain, plan, loss=loss)
        found = pipe.step(x, target=target)
    assert float(found) == pytest.approx(float(expected.detach()), rel=1e-3)
    assert set(seen) == {(torch.bfloat16, True)}
    with pytest.raises(sw.ShardwrightError, match=r"autocast is none here and was torch\.bfloat16 where"):
        pipe.step(x, target=target)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda pipe, x: pipe.step(x.double(), target=x),
            r"made for inputs \[0\] float32 8x6, .*these are .*float64 8x6",
        ),
        (lambda pipe, x: pipe.step(x[:, :3], target=x), "these are .*float32 8x3: call it as its sample"),
        (lambda pipe, x: pipe.step(input=x, target=x), r"these are \['input'\] float32 8x6"),
        (lambda pipe, x: pipe.step(x[:0], target=x), "these inputs hold no samples"),
        (lambda pipe, _: pipe.load("nowhere"), "no checkpoint in nowhere"),
        (lambda pipe, _: pipe.load_state_dict({}), r"the state has no layers.0.weight"),
        (lambda pipe, x: pipe.load_state_dict(pipe.state_dict() | {"more": x}), "has more, which the model has not"),
        (
            lambda pipe, x: pipe.load_state_dict(pipe.state_dict() | {"layers.0.bias": x}),
            r"layers.0.bias has shape \(8, 6",
        ),
        (lambda pipe, _: pipe.optimizer_state_dict(adamw(nn.Linear(2, 2))), "make it over pipe.parameters"),
        (lambda pipe, _: pipe.load_optimizer_state_dict(adamw(pipe), {}), "has nothing for layers.0.weight"),
    ],
)
@pytest.mark.usefixtures("alone")
def test_what_does_not_fit_is_refused(captured_profile, call, message):
    """One line says what was given and what belongs there."""
    pipe = made_pipe(Chain, planned(captured_profile, Chain, 1))
    with pytest.raises(sw.ShardwrightError, match=message) as caught:
        call(pipe, Chain.batch(0)[0][0])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda output, _: output, r"the loss function returned a tensor of shape \(2, 6\)"),
        (lambda *_: 1.0, "the loss function returned float"),
        (None, "there is no loss to train with"),
    ],
)
@pytest.mark.usefixtures("alone")
def test_a_loss_is_one_number(captured_profile, loss, message):
    """What else a loss function returns is refused."""
    pipe = made_pipe(Chain, planned(captured_profile, Chain, 1), loss=loss)
    (x,), _, target = Chain.batch(0)
    with pytest.raises(sw.ShardwrightError, match=message):
        pipe.step(x, target=target)


LM = ROOT / "examples" / "train_lm.py"


def read_lines(text):
    """Step -> loss of what the example prints."""
    lines = [line.split() for line in text.splitlines() if line.startswith("step ")]
    return {int(step): float(loss) for _, step, _, loss in lines}


def example(**sizes):
    """The example's module, with other sizes."""
    model, _ = load_target(f"{LM}:CharacterModel")
    module = sys.modules[type(model).__module__]
    for name, size in ({"LAYERS": 6, "LENGTH": 64} | sizes).items():
        setattr(module, name, size)
    return module


SMALL = {"LAYERS": 3, "LENGTH": 16}


def example_trained(plan, steps, resume, save):
    """In a rank: what the example prints."""
    module = example(**SMALL)
    torch.manual_seed(0)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        if plan is None:
            module.train_whole(steps)
        else:
            module.train(plan, steps, resume, save)
    return printed.getvalue()


def test_the_example_goes_on_with_more_stages(workers, captured_profile, tmp_path):
    """A language model on real text: two stages, then three, have the unsharded model's curve, and it learns."""
    model = example(**SMALL).CharacterModel()
    args, plans = model.sample_inputs(), {}
    for count in (2, 3):
        devices = [f"cpu:{i}" for i in range(count)]
        profile = captured_profile(model, args, devices=devices, microbatches=(1, 4), optimizer="adamw")
        plans[count] = sw.plan(profile, microbatches=4)
        assert len(plans[count].stages) == count
    first = on_ranks(workers, 2, example_trained, plans[2], 3, None, tmp_path)
    second = on_ranks(workers, 3, example_trained, plans[3], 3, tmp_path, None)
    expected = read_lines(on_ranks(workers, 1, example_trained, None, 6, None, None)[0])
    assert expected[5] < expected[0] - 0.5
    assert read_lines(first[0]) | read_lines(second[0]) == pytest.approx(expected, rel=1e-5)


def launched(folder, *arguments):
    """What a script started by torchrun prints and says, with its exit code."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=200, check=False
    )


@pytest.mark.slow
def test_a_script_under_torchrun(captured_profile, tmp_path):
    """The example as its users start it; and when the loss of one rank raises, both ranks end and say why."""
    model = example().CharacterModel()
    plan = sw.plan(
        captured_profile(model, model.sample_inputs(), microbatches=(1, 4), optimizer="adamw"), microbatches=4
    )
    plan.save(tmp_path / "lm.plan.json")
    result = launched(tmp_path, LM, "--plan", "lm.plan.json", "--steps", "3")
    assert result.returncode == 0, result.stderr
    assert len(read_lines(result.stdout)) == 3
    (tmp_path / "raising.py").write_text(
        f"import sys; sys.path.insert(0, {str(LM.parent)!r})\n"
        "import train_lm\n"
        "def loss(logits, target): raise ValueError('no luck')\n"
        "train_lm.loss_of = loss\n"
        "train_lm.main()\n"
    )
    result = launched(tmp_path, "raising.py", "--plan", "lm.plan.json", "--steps", "3")
    assert result.returncode != 0
    assert "[rank1]: shardwright.errors.ShardwrightError: stage 1 on cpu:1 failed: ValueError: no luck" in result.stderr


KEPT = []
"""In a rank: pipelines that live on; one that is let go of has left, which the others would be told."""


def left_alone(kind, plan):
    """In a rank: the second process takes no step, and is still there."""
    pipe = made_pipe(kind, plan, timeout_s=3.0)
    KEPT.append(pipe)
    args, kwargs, target = kind.batch(0)
    return told(lambda: pipe.step(*args, target=target, **kwargs)) if pipe.stage == 0 else ""


def test_a_stage_does_not_wait_for_ever(workers, captured_profile):
    """A rank that takes no part is noticed within the limit."""
    lines = on_ranks(workers, 2, left_alone, Chain, planned(captured_profile, Chain, 2))
    assert lines[0].startswith("stage 0 on cpu:0 lost another stage, which has ended or did not answer within 3 s")


def made_apart(kind, other, plan):
    """In a rank: the second makes a pipeline of another model."""
    return made_pipe(other if os.environ["RANK"] == "1" else kind, plan).stage


class Unlucky(Chain):
    """Fails in the second rank alone, where it is captured."""

    def forward(self, x):
        if os.environ.get("RANK") == "1":
            raise ValueError("no luck with this capture")
        return super().forward(x)


class Longer(Chain):
    """One more layer than was planned."""

    def __init__(self):
        super().__init__()
        self.layers.append(nn.Linear(6, 6))


def test_a_rank_that_fails_while_they_meet_is_noticed_at_once(workers, captured_profile):
    """Before the others have captured anything, and while they capture; the limit is ten minutes."""
    lines = on_ranks(workers, 2, told, made_apart, Chain, Longer, planned(captured_profile, Chain, 2))
    assert lines[0].startswith("rank 1 (stage 1 on cpu:1) is not ready: the plan is for another Chain")
    assert lines[0] == lines[1]
    lines = on_ranks(workers, 2, told, made_apart, Unlucky, Unlucky, planned(captured_profile, Unlucky, 2))
    assert all("no luck with this capture" in line for line in lines)


def left_after_a_failure(kind, plan):
    """In a rank: a step that all refuse, then one for which the second process does not come."""
    pipe = made_pipe(kind, plan, timeout_s=3.0)
    args, kwargs, target = kind.batch(0)
    first = told(lambda: pipe.step(args[0][..., :-1], target=target, **kwargs))
    return first, told(lambda: pipe.step(*args, target=target, **kwargs)) if pipe.stage == 0 else ""


def test_an_error_is_not_explained_by_an_earlier_one(workers, captured_profile):
    """A script that caught the first goes on."""
    (first, second), _ = on_ranks(workers, 2, left_after_a_failure, Chain, planned(captured_profile, Chain, 2))
    assert first != second
    assert second.startswith("stage 0 on cpu:0 lost another stage")


@pytest.mark.usefixtures("alone")
def test_a_checkpoint_that_fails_leaves_the_one_before(captured_profile, tmp_path, monkeypatch):
    """Whether it fails in the data or in what says where they are; and one that succeeds leaves no other's files."""
    pipe = made_pipe(Chain, planned(captured_profile, Chain, 1))
    (tmp_path / "notes.txt").write_text("mine")
    pipe.save(tmp_path)
    saved = {name: value.clone() for name, value in pipe.state_dict().items()}
    files = {path.name for path in tmp_path.iterdir()}
    with torch.no_grad():
        for parameter in pipe.parameters():
            parameter.add_(1.0)

    def fail(*_args, **_kwargs):
        raise OSError(28, "no space left")

    write = NewFiles.write_data

    def write_and_fail(*args):
        write(*args).wait()
        fail()

    for where, what, does in ((NewFiles, "write_data", write_and_fail), (filesystem.pickle, "dump", fail)):
        with monkeypatch.context() as patch:
            patch.setattr(where, what, does)
            with pytest.raises(
                sw.ShardwrightError, match=r"cannot write the checkpoint into .*: rank 0: OSError: .*no space left"
            ):
                pipe.save(tmp_path)
        other = made_pipe(Chain, planned(captured_profile, Chain, 1))
        other.load(tmp_path)
        assert all(torch.equal(other.state_dict()[name], value) for name, value in saved.items())
    pipe.save(tmp_path)
    left = {path.name for path in tmp_path.iterdir()}
    assert left & files == {"notes.txt", ".metadata"}
    assert len(left) == len(files)
    pipe.load(tmp_path)
    assert not torch.equal(pipe.state_dict()[name := next(iter(saved))], saved[name])


class Masked(Chain):
    """Looks whether its mask has holes, as the libraries do."""

    def forward(self, x, mask):
        for layer in self.layers:
            x = layer(x) if mask.all() else layer(x) * mask[:, None]
        return x

    @staticmethod
    def batch(seed, size=8):
        (x,), _, target = Chain.batch(seed, size)
        return (x, torch.tensor([seed != 1] * size)), {}, target


def guarded(kind, plan):
    """In a rank: a step with a mask like the sample's, and one with holes."""
    pipe = made_pipe(kind, plan, timeout_s=4.0)
    (x, mask), _, target = kind.batch(0)
    return told(lambda: float(pipe.step(x, mask, target=target))), told(lambda: pipe.step(x, ~mask, target=target))


def test_inputs_of_another_path_are_refused_on_all_ranks(workers, captured_profile):
    """A guard in the second stage stops both with the file and line of the forward."""
    for loss, line in on_ranks(workers, 2, guarded, Masked, planned(captured_profile, Masked, 2)):
        assert isinstance(loss, float)
        assert "__bool__ gives False for these inputs and gave True for the sample inputs" in line
