"""The predicted peak of a stage, held against the bytes counted in a step of real pipelines."""

from __future__ import annotations

import itertools
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import shardwright as sw
from shardwright.profiler.links import join
from shardwright.profiler.measure import prepare
from shardwright.profiler.profile import Device
from shardwright.profiler.recording.inputs import microbatch
from shardwright.profiler.trace import trace
from shardwright.profiler.workers.pool import Pool
from shardwright.sharder.runtime.pipeline import hold_stages, step_stage, weigh_stage
from shardwright.sharder.runtime.piping.cut import cut
from shardwright.sharder.runtime.session import job_of

LAYERS = 6
LIMIT_S = 60.0


class Chain(nn.Module):
    """Six layers of the given widths; the first one's output may be added to the last one's."""

    def __init__(self, widths, skips=False, checkpoints=False):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(a, b), nn.Tanh()) for a, b in itertools.pairwise(widths))
        self.skips, self.checkpoints = skips, checkpoints

    def forward(self, x):
        first = x = self.layers[0](x)
        for layer in self.layers[1:]:
            x = checkpoint(layer, x, use_reentrant=False) if self.checkpoints else layer(x)
        return x + first if self.skips else x


MODELS = {
    "even": lambda: Chain([48] * 7),
    "wide cut": lambda: Chain([16, 16, 256, 256, 256, 16, 16]),
    "narrow cut": lambda: Chain([64, 256, 16, 256, 16, 256, 64]),
    "relayed": lambda: Chain([48] * 7, skips=True),
    "checkpointed": lambda: Chain([48, 48, 256, 48, 256, 48, 48], checkpoints=True),
    "checkpointed, relayed": lambda: Chain([48] * 7, skips=True, checkpoints=True),
}


@contextmanager
def workers(stages, folder):
    """So many workers in one group, for one pipeline after another."""
    devices = [
        Device(name=f"cpu:{i}", kind="cpu", description="", memory_bytes=10**10, cores=(0,)) for i in range(stages)
    ]
    with Pool(devices) as pool:
        pool.call({d.name: (prepare, (d.name, 1)) for d in devices}, limit_s=LIMIT_S)
        store = str(folder / "store")
        pool.call({d.name: (join, (i, stages, store)) for i, d in enumerate(devices)}, limit_s=LIMIT_S)
        yield pool


def weighed(pool, captured_profile, name, schedule, microbatches, recompute="never"):
    """Predicted and counted peak of each stage, six layers shared out evenly; without a schedule, in inference."""
    train, devices = schedule is not None, list(pool.workers)
    model = MODELS[name]().train(train)
    x = torch.randn(96 * microbatches, model.layers[0][0].in_features)
    counts, parted = (1, microbatches), schedule == "zero-bubble"
    profile = captured_profile(
        model, (x,), devices=devices, microbatches=counts, train=train, counted=True, parted=parted
    )
    pins = {f"layers.{i}.*": devices[i * len(devices) // LAYERS] for i in range(LAYERS)}
    if schedule == "interleaved":
        pins = {}
    plan = sw.plan(profile, microbatches=microbatches, schedule=schedule or "1f1b", pins=pins, recompute=recompute)
    capture = trace(model, *microbatch((x,), {}, microbatches), train=train)
    job = job_of(plan, model, capture.output_places)
    programs = cut(capture, plan)
    pool.call(
        {
            d: (hold_stages, (job, programs[i :: len(devices)], (x,) if i == 0 else ()))
            for i, d in enumerate(plan.devices)
        },
        limit_s=LIMIT_S,
    )
    pool.call(dict.fromkeys(devices, (step_stage, ())), limit_s=LIMIT_S)  # the optimizer's state comes with it
    peaks = pool.call(dict.fromkeys(devices, (weigh_stage, ())), limit_s=LIMIT_S)
    return [(predicted, peaks[device]) for device, predicted in plan.memory().items()]


def check(pool, captured_profile, cases, most=1.03):
    """The prediction of every stage is within 3% of what was counted, or ``most`` times it, and hardly ever below."""
    for case in cases:
        for stage, (predicted, counted) in enumerate(weighed(pool, captured_profile, *case)):
            assert 0.999 <= predicted / counted <= most, (*case, stage, predicted, counted)


def test_two_stages(captured_profile, tmp_path):
    """Under both schedules and in inference, at wide and narrow cuts, with two and three micro-batches."""
    with workers(2, tmp_path) as pool:
        check(
            pool,
            captured_profile,
            [
                ("wide cut", "1f1b", 2),
                ("narrow cut", "1f1b", 3),
                ("relayed", "gpipe", 2),
                ("even", "gpipe", 3),
                ("wide cut", None, 3),
            ],
        )


def test_layers_that_the_model_checkpoints(captured_profile, tmp_path):
    """Each keeps what it is given, and is made again one after the other; in inference nothing changes."""
    cases = [
        ("checkpointed", "1f1b", 3),
        ("checkpointed", "gpipe", 2),
        ("checkpointed, relayed", "1f1b", 2),
        ("checkpointed", None, 2),
    ]
    with workers(2, tmp_path) as pool:
        check(pool, captured_profile, cases)
        check(pool, captured_profile, [("checkpointed", "1f1b", 3, "always")], most=1.05)


def test_stages_computed_anew(captured_profile, tmp_path):
    """What they keep is what they receive and what they have sent, and one micro-batch is made again."""
    cases = [("even", "1f1b", 3, "always"), ("wide cut", "gpipe", 3, "always"), ("relayed", "1f1b", 2, "always")]
    with workers(2, tmp_path) as pool:
        check(pool, captured_profile, cases)


def test_two_stages_on_each_device(captured_profile, tmp_path):
    """Interleaved, the parts of a device's stages add up to what it holds at most, relayed skips among it."""
    with workers(2, tmp_path) as pool:
        check(pool, captured_profile, [("even", "interleaved", 4), ("relayed", "interleaved", 3)])


IN_PARTS = 1.2
"""A part of a backward is taken to need as much for a while as the whole."""


def test_backwards_in_two_parts(captured_profile, tmp_path):
    """Under zero-bubble what waits for its weights is held too, more of it where there are more micro-batches."""
    with workers(2, tmp_path) as pool:
        check(pool, captured_profile, [("narrow cut", "zero-bubble", 2), ("relayed", "zero-bubble", 4)], IN_PARTS)


@pytest.mark.slow
@pytest.mark.parametrize("stages", [2, 3])
def test_every_case_in_two_parts(captured_profile, tmp_path, stages):
    """Four models, from as many micro-batches as stages to six; none is predicted below what it takes."""
    counts = [m for m in (2, 3, 4, 6) if m >= stages]
    with workers(stages, tmp_path) as pool:
        check(pool, captured_profile, [(n, "zero-bubble", m) for n in MODELS for m in counts], IN_PARTS)


@pytest.mark.slow
def test_three_stages(captured_profile, tmp_path):
    """What a stage between the others relays, and what stays of it, is predicted too."""
    with workers(3, tmp_path) as pool:
        check(pool, captured_profile, [("relayed", "1f1b", 5), ("relayed", "gpipe", 3)])


@pytest.mark.slow
@pytest.mark.parametrize("stages", [2, 3])
def test_every_case(captured_profile, tmp_path, stages):
    """Four models, both schedules and inference, two to eight micro-batches."""
    counts = [m for m in (2, 3, 4, 5, 8) if m >= stages]
    with workers(stages, tmp_path) as pool:
        check(pool, captured_profile, [(n, s, m) for n in MODELS for s in ("1f1b", "gpipe", None) for m in counts])


@pytest.mark.slow
def test_every_interleaved_case(captured_profile, tmp_path):
    """Four models, two to eight micro-batches, a round longer than the devices among them."""
    with workers(2, tmp_path) as pool:
        check(pool, captured_profile, [(n, "interleaved", m) for n in MODELS for m in (2, 3, 4, 6, 8)])
