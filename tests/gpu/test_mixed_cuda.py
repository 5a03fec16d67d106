"""Pipelines over a CPU worker and a GPU, and over two stages of one GPU, on PyTorch's engine.

`pytest -m gpu` on a machine that has one.
"""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import shardwright as sw
from shardwright.sharder.runtime import session as session_module

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]

SCRIPT = """
import sys
import torch
from torch import nn
from torch.nn import functional as F
import shardwright as sw

torch.backends.cuda.matmul.allow_tf32 = False


class Positions(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 32)
        self.layers = nn.ModuleList([nn.Linear(32, 32) for _ in range(4)])
        self.head = nn.Linear(32, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        x = skip = self.embed(tokens) + torch.arange(7, device=tokens.device)[:, None] / 7
        for layer in self.layers:
            x = torch.relu(layer(x))
        return self.head(x + skip)


def loss_of(output, target):
    return F.cross_entropy(output.flatten(0, 1), target.flatten())


def batch(seed):
    made = torch.Generator().manual_seed(seed)
    return torch.randint(0, 50, (16, 7), generator=made), torch.randint(0, 50, (16, 7), generator=made)


def trained(model, step, parameters):
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    losses = []
    for seed in range(5):
        optimizer.zero_grad()
        losses.append(step(*batch(seed)))
        optimizer.step()
    return losses


def plain(model, tokens, target):
    loss = loss_of(model(tokens), target)
    loss.backward()
    return float(loss.detach())


if "--without-nccl" in sys.argv:
    torch.distributed.is_nccl_available = lambda: False
torch.manual_seed(0)
model = Positions()
plan = sw.Plan.load(sys.argv[1])
pipe = sw.pipeline(model, plan, (batch(0)[0],), loss=loss_of)
losses = trained(pipe, lambda x, y: float(pipe.step(x, target=y)), pipe.parameters())
norm = float(pipe.clip_grad_norm_(1e9))
evaluated = pipe(batch(9)[0]).detach().cpu()
state = pipe.state_dict(full=True)
pipe.close()
torch.manual_seed(0)
whole = Positions()
expected = trained(whole, lambda x, y: plain(whole, x, y), whole.parameters())
assert max(abs(a - b) for a, b in zip(losses, expected)) < 1e-4, (losses, expected)
other = whole(batch(9)[0]).detach()
assert torch.allclose(evaluated, other, atol=2e-3), (evaluated - other).abs().max()
own = float(torch.nn.utils.get_total_norm([p.grad for p in whole.parameters()]))
assert abs(norm - own) < 1e-3 * own, (norm, own)
if state:
    for name, tensor in whole.state_dict().items():
        assert torch.allclose(state[name].cpu(), tensor, atol=1e-3), name
print("equal on", pipe.device)
"""


def two_stages(profile, microbatches, first, last, **options):
    """A plan whose first layers are on ``first``."""
    names = [node.unit for node in profile.nodes if node.kind == "unit"]
    half = len(names) // 2
    pins = dict.fromkeys(names[:half], first) | dict.fromkeys(names[half:], last)
    plan = sw.plan(profile, microbatches=microbatches, pins=pins, **options)
    assert plan.devices == (first, last)
    return plan


@pytest.mark.parametrize(("first", "last"), [("cpu:0", "cuda:0"), ("cuda:0", "cpu:0")])
@pytest.mark.parametrize(
    "options", [{}, {"schedule": "gpipe"}, {"schedule": "zero-bubble"}, {"recompute": "always"}], ids=str
)
def test_a_run_is_the_model(captured_profile, first, last, options):
    """The gate compares outputs and gradients; steps are timed, noted and weighed on both."""
    model = nn.Sequential(*[nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.1), nn.GELU()) for _ in range(6)])
    x = torch.randn(64, 64)
    parted = options.get("schedule") == "zero-bubble"
    profile = captured_profile(model, (x,), devices=["cpu:0", "cuda:0"], microbatches=(1, 4), parted=parted)
    run = sw.run(model, two_stages(profile, 4, first, last, **options), (x,), steps=3)
    assert run.devices == (first, last)
    assert run.equality.gradients < 1e-4
    assert run.accounts is not None
    for stage in run.accounts.stages:
        assert min(stage.measured.forward_s, stage.measured.backward_s, stage.measured.update_s) > 0
    assert all(weighed.measured_bytes > 0 for weighed in run.memory)


class OtherOnGPU(nn.Module):
    """A layer that a GPU computes otherwise."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 64)

    def forward(self, x):
        return self.linear(x) * (1.1 if x.is_cuda else 1.0)


@pytest.mark.parametrize("free", [10**12, 10**6], ids=["on the host", "unit by unit"])
def test_the_host_compares_and_names_the_first_unit(captured_profile, monkeypatch, free):
    """Whole, or a unit at a time where it has no room: alike within what other kernels explain, and a unit that the GPU
    computes otherwise is named."""
    monkeypatch.setattr(session_module, "free_host_bytes", lambda: free)
    monkeypatch.setattr(session_module.Session, "room", lambda _: dict.fromkeys(("cpu:0", "cuda:0"), 10))
    x = torch.randn(64, 64)
    for other in (False, True):
        model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(12)])
        if other:
            model[9] = OtherOnGPU()
        profile = captured_profile(model, (x,), devices=["cpu:0", "cuda:0"], microbatches=(1, 4))
        plan = two_stages(profile, 4, "cpu:0", "cuda:0")
        if other:
            told = r"first to differ is 9 \(stage 1 on cuda:0\) in the forward: its output for micro-batch 0 differs"
            with pytest.raises(sw.ShardwrightError, match=told):
                sw.run(model, plan, (x,), steps=1, naive=False)
        else:
            run = sw.run(model, plan, (x,), steps=1, naive=False)
            assert run.equality.how == ("on the host" if free > 10**6 else "unit by unit")


def test_a_measured_profile_is_run():
    """From the profile, whose links are messages of both processes, to the run, with nothing made up."""
    model, x = nn.Sequential(*[nn.Linear(256, 256) for _ in range(6)]), torch.randn(64, 256)
    profile = sw.profile(model, (x,), devices=["cpu:0", "cuda:0"], microbatches=[1, 4], rounds=2)
    run = sw.run(model, two_stages(profile, 4, "cpu:0", "cuda:0"), (x,), steps=5)
    assert run.sharded.predicted_s
    assert run.sharded.measured_s > 0


NODES = {"cuda:0": "a", "cuda:1": "b"}
"""Two that have a GPU each: started on one machine, both find its only one."""


@pytest.mark.parametrize(
    ("first", "last", "hosts"),
    [("cpu:0", "cuda:0", {}), ("cuda:0", "cpu:0", {}), ("cuda:0", "cuda:1", NODES)],
    ids=["cpu first", "cuda first", "two stages on one card"],
)
def test_a_script_trains_over_both(tmp_path, captured_profile, first, last, hosts):
    """Under torchrun: losses, clipping, evaluation and the gathered state are those of the plain model.

    NCCL takes no two stages on one GPU; without it they exchange through the host.
    """
    names = {}
    (tmp_path / "train.py").write_text(SCRIPT)
    exec(SCRIPT.partition("if ")[0], names)
    profile = captured_profile(
        names["Positions"](), (names["batch"](0)[0],), devices=[first, last], microbatches=(1, 4)
    )
    plan = two_stages(profile, 4, first, last).model_copy(update={"hosts": hosts})
    plan.save(tmp_path / "plan.json")
    root = str(Path(sw.__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    launched = [
        subprocess.Popen(
            [
                sys.executable,
                "-m",
                "torch.distributed.run",
                *way,
                "train.py",
                "plan.json",
                *["--without-nccl"][: len(hosts)],
            ],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for way in ways_to_launch(len(set(hosts.values())))
    ]
    done = [each.communicate(timeout=150) for each in launched]
    assert [each.returncode for each in launched] == [0] * len(launched), "\n".join(error[-3000:] for _, error in done)
    said = "".join(output for output, _ in done)
    assert said.count("equal on cuda:0") == 1 + bool(hosts)
    assert said.count("equal on cpu") == 1 - bool(hosts)


def ways_to_launch(nodes):
    """What tells torchrun of each node; of none, all is on this machine."""
    if not nodes:
        return [["--standalone", "--nproc-per-node", "2"]]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = ["--nnodes", str(nodes), "--nproc-per-node", "1", "--master-addr", "127.0.0.1", "--master-port", port]
    return [[*common, "--node-rank", str(number)] for number in range(nodes)]
