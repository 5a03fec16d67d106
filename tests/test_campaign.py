"""The campaign: equal work once, known work never, and a profile that was broken off goes on."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import shardwright as sw
from shardwright.profiler import campaign
from shardwright.profiler.cache import Cache
from shardwright.profiler.campaign import Workers, investigate
from shardwright.profiler.capture import captures_of
from shardwright.profiler.devices import find_devices
from shardwright.profiler.measure import Goal
from shardwright.profiler.measuring import held, selection
from shardwright.profiler.measuring.signature import board_key, device_key, step_key
from shardwright.profiler.profile import Device
from shardwright.profiler.trace import trace

ROOT = Path(__file__).parents[1]
WIDTH = 8


class Block(nn.Module):
    """A layer that knows its own number, as decoders' layers do."""

    def __init__(self, index, width=WIDTH):
        super().__init__()
        self.index = index
        self.linear, self.norm = nn.Linear(width, width), nn.LayerNorm(width)

    def forward(self, x):
        return x + self.norm(self.linear(x)).relu()


class Stack(nn.Module):
    """Equal layers."""

    def __init__(self, layers=6):
        super().__init__()
        self.layers = nn.ModuleList(Block(index) for index in range(layers))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def key_of(model, *args, name="layers.1", train=True, optimizer="adam", accumulate=False):
    (step,) = [step for step in trace(model, args, train=train).steps if step.name == name]
    return step_key(step, train=train, optimizer=optimizer, accumulate=accumulate)


def examined(monkeypatch, cache, model, *args, counts=(1, 2), devices=("cpu:0",), train=True):
    """What a campaign finds, and the steps that it sent to workers, with the number of micro-batches."""
    sent = []
    hold = campaign.hold

    def noted(name, calls, *rest):
        sent.extend((count, name) for count in calls)
        return hold(name, calls, *rest)

    class Here:
        """Workers in this process, one after another."""

        def __init__(self, found):
            for device in found:
                campaign.prepare(device.name, 1)

        def call(self, calls, *, on_progress=None, **_):
            answers = {}
            for device, (function, arguments) in calls.items():
                with monkeypatch.context() as patch:
                    patch.setattr(held, "report", lambda message, d=device: on_progress(d, message))
                    answers[device] = function(*arguments)
            return answers

    found = find_devices(list(devices))
    captures, _ = captures_of(model, args, {}, counts, devices=2, units=["layers.*"], train=train)
    workers = Workers(found, lambda *_: None)
    workers._pool = Here(found)
    with monkeypatch.context() as patch:
        patch.setattr(held, "_keep_busy", lambda *_: None)
        patch.setattr(campaign, "hold", noted)
        findings = investigate(
            workers,
            found,
            captures,
            dict.fromkeys(captures, ()),
            train=train,
            optimizer="adam",
            goal=Goal(repeats=1),
            cache=cache,
            tell=lambda *_: None,
        )
    return findings, sent


def test_equal_layers_share_one_measurement(monkeypatch, tmp_path):
    """Six layers cost what four cost, the first having no gradient to hand back; each has its times in the profile."""
    monkeypatch.setattr(selection, "MOST_ALIKE_BYTES", 0)
    findings, sent = examined(monkeypatch, Cache(tmp_path), Stack(), torch.randn(4, WIDTH))
    names = [name for count, name in sent if count == 1 and name.startswith("layers")]
    assert names == [f"layers.{index}" for index in range(1 + selection.MOST_ALIKE)]
    rows = [findings.timings["cpu:0", 1, f"layers.{index}"] for index in range(1, 6)]
    assert rows == [rows[0]] * 5


def test_small_equal_steps_are_all_measured(monkeypatch, tmp_path):
    """They are mostly their code, which is cold only in the first of them, and they take no time."""
    _, sent = examined(monkeypatch, Cache(tmp_path), Stack(), torch.randn(4, WIDTH), counts=(1,))
    assert [name for _, name in sent if name.startswith("layers")] == [f"layers.{index}" for index in range(6)]


def test_what_is_known_is_not_measured(monkeypatch, tmp_path):
    """A second profile sends nothing, one of another depth neither, one of another width does."""
    x = torch.randn(4, WIDTH)
    first, sent = examined(monkeypatch, Cache(tmp_path), Stack(), x)
    again, none = examined(monkeypatch, Cache(tmp_path), Stack(), x)
    assert sent
    assert none == []
    assert again == first
    _, deeper = examined(monkeypatch, Cache(tmp_path), Stack(9), x)
    assert deeper == []
    _, larger = examined(monkeypatch, Cache(tmp_path), Stack(), torch.randn(8, WIDTH))
    assert larger
    _, anew = examined(monkeypatch, Cache(tmp_path, refresh=True), Stack(), x)
    assert anew == sent


@pytest.mark.parametrize(
    "other",
    [
        {"args": (torch.randn(6, WIDTH),)},
        {"args": (torch.randn(WIDTH, 4).T,)},
        {"args": (torch.randn(4, WIDTH, dtype=torch.float64),), "model": Stack().double()},
        {"train": False},
        {"optimizer": "sgd"},
        {"optimizer": None},
        {"accumulate": True},
        {"model": nn.ModuleDict()},
    ],
    ids=["shape", "strides", "dtype", "train", "optimizer", "no update", "accumulate", "frozen"],
)
def test_what_time_depends_on_is_in_the_signature(other):
    """Another shape, layout, dtype, mode, update or set of trained parameters is another measurement."""
    options = {"args": (torch.randn(4, WIDTH),), "model": Stack()} | other
    if isinstance(options["model"], nn.ModuleDict):
        options["model"] = Stack()
        options["model"].layers[1].linear.weight.requires_grad_(False)
    args, model = options.pop("args"), options.pop("model")
    assert key_of(model, *args, **options) != key_of(Stack(), torch.randn(4, WIDTH))


def test_what_time_does_not_depend_on_is_not():
    """Weights, floating values, and a layer's own number."""
    x = torch.randn(4, WIDTH)
    assert key_of(Stack(), x) == key_of(Stack(), torch.randn(4, WIDTH), name="layers.4")


def test_the_range_of_indices_is_in_the_signature():
    """A lookup in a few rows finds them in the cache, one over the whole table does not."""
    model = nn.Sequential(nn.Embedding(1000, 4), nn.ReLU())
    few, many = torch.zeros(2, 8, dtype=torch.long), torch.arange(0, 992, 62).view(2, 8)
    assert key_of(model, few, name="0") != key_of(model, many, name="0")
    assert key_of(model, few, name="0") == key_of(model, few.clone(), name="0")


def test_a_worker_is_its_cores_and_a_gpu_its_model():
    """CPU workers on other cores, or beside others, are measured anew; one GPU serves its twins."""
    made = Device(name="cpu:0", kind="cpu", description="a core", memory_bytes=1, cores=(0,))
    there = made.model_copy(update={"name": "cpu:1", "cores": (1,)})
    assert len({device_key(made, 0), device_key(made, 1), device_key(there, 1)}) == 3
    gpus = [Device(name=f"cuda:{i}", kind="cuda", description="NVIDIA H100", memory_bytes=1) for i in range(2)]
    assert device_key(gpus[0], 0) == device_key(gpus[1], 0)


def test_links_are_those_of_the_boards_and_of_how_nccl_was_told_to_go(monkeypatch):
    """Two boards of one model have times in common, not links, and those change when peer access is turned off."""
    boards = {"cuda:0": "one", "cuda:1": "two"}
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda d: SimpleNamespace(uuid=boards[str(d)]))
    monkeypatch.delenv("NCCL_P2P_DISABLE", raising=False)
    gpus = [Device(name=name, kind="cuda", description="NVIDIA H100", memory_bytes=1) for name in boards]
    with_peers = [board_key(gpu, 2) for gpu in gpus]
    monkeypatch.setenv("NCCL_P2P_DISABLE", "1")
    assert len({*with_peers, *(board_key(gpu, 2) for gpu in gpus)}) == 4


def test_a_twin_takes_the_times_as_scaled(monkeypatch, tmp_path):
    """Of two devices of one model the first is measured, and the other's times say that they are not its own."""
    (found,) = find_devices(["cpu:0"])
    twin = found.model_copy(update={"name": "cpu:1"})  # the same cores: one model
    monkeypatch.setattr(sys.modules[__name__], "find_devices", lambda _: (found, twin))
    findings, sent = examined(monkeypatch, Cache(tmp_path), Stack(), torch.randn(4, WIDTH), counts=(1,))
    assert len(sent) == len(set(sent))
    one, other = (findings.timings[name, 1, "layers.1"] for name in ("cpu:0", "cpu:1"))
    assert (one.source, other.source) == ("measured", "scaled")
    assert other.forward_s == one.forward_s


def test_what_does_not_fit_is_a_result(monkeypatch, tmp_path):
    """The unit is tried again alone, then told with the reason; all others are measured."""

    class Greedy(nn.Linear):
        def forward(self, x):
            if self.training and os.environ.get("SHARDWRIGHT_TEST_MEMORY") == "none":
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
            return super().forward(x)

    model = nn.Module()
    model.layers = nn.Sequential(nn.Linear(WIDTH, WIDTH), Greedy(WIDTH, WIDTH))
    model.forward = model.layers.forward
    captured = campaign.hold

    def measuring(*args):
        os.environ["SHARDWRIGHT_TEST_MEMORY"] = "none"
        return captured(*args)

    monkeypatch.setattr(campaign, "hold", measuring)
    monkeypatch.setenv("SHARDWRIGHT_TEST_MEMORY", "enough")
    findings, sent = examined(monkeypatch, Cache(tmp_path), model, torch.randn(4, WIDTH), counts=(1,))
    (misfit,) = findings.misfits
    assert (misfit.node, misfit.device, misfit.microbatches) == ("layers.1", "cpu:0", 1)
    assert "20.00 GiB" in misfit.reason
    assert [name for _, name in sent].count("layers.1") == 2
    assert ("cpu:0", 1, "layers.0") in findings.timings


def test_groups_fit_the_device(monkeypatch, tmp_path):
    """What does not fit together is measured one group after another, with the same steps in the end."""
    x = torch.randn(4, WIDTH)
    model = nn.Module()
    model.layers = nn.Sequential(*[nn.Linear(WIDTH, WIDTH, bias=bias) for bias in (True, False)], nn.LayerNorm(WIDTH))
    model.forward = model.layers.forward
    groups = []
    grouped = campaign._groups

    def small(jobs, _limit):
        groups.extend(grouped(jobs, max(job.nbytes for job in jobs)))
        return groups[:]

    monkeypatch.setattr(campaign, "_groups", small)
    findings, _ = examined(monkeypatch, Cache(tmp_path), model, x, counts=(1,))
    assert len(groups) > 1
    assert {step for _, _, step in findings.timings} >= {"layers.0", "layers.1", "layers.2"}


PROFILE = """
import sys, torch, shardwright as sw
from torch import nn
torch.manual_seed(0)
sizes = [16, 24, 32, 40, 48, 56, 64, 72]
model = nn.Sequential(*[nn.Linear(a, b) for a, b in zip(sizes, sizes[1:])])
made = sw.profile(model, (torch.randn(8, 16),), devices=["cpu:0"], microbatches=[2], rounds=20, precision=0.0)
made.save(sys.argv[1])
"""


def content(path):
    """A profile without its times."""
    made = sw.Profile.load(path)
    return (
        made.structure,
        made.nodes,
        made.tensors,
        [(m.node, m.device, m.microbatches) for m in made.measurements],
        [device.name for device in made.devices],
        made.misfits,
    )


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_profile_killed_at_any_moment_goes_on(tmp_path):
    """Killed at ten random moments, the next one is complete, and but for the times equal to an undisturbed one."""
    environment = os.environ | {"SHARDWRIGHT_CACHE": str(tmp_path / "undisturbed"), "PYTHONPATH": str(ROOT.parent)}
    start = time.monotonic()
    subprocess.run([sys.executable, "-c", PROFILE, str(tmp_path / "whole.json")], check=True, env=environment)
    whole_s = time.monotonic() - start
    generator = random.Random(0)
    for number in range(10):
        environment["SHARDWRIGHT_CACHE"] = str(tmp_path / f"cache{number}")
        out = tmp_path / f"{number}.json"
        killed = subprocess.Popen([sys.executable, "-c", PROFILE, str(out)], env=environment, start_new_session=True)
        time.sleep(generator.uniform(0.3, 1.0) * whole_s)
        os.killpg(killed.pid, signal.SIGKILL)
        killed.wait()
        subprocess.run([sys.executable, "-c", PROFILE, str(out)], check=True, env=environment)
        assert content(out) == content(tmp_path / "whole.json")
