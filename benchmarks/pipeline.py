"""How well the predictions of pipelines are kept, and what planned splits gain: the zoo profiled, planned and run.

Each model is profiled once for each mode, on two devices; then each schedule and number of micro-batches is planned and
run as ``shard --run`` does: the plan, one device alone and the splits by count and by parameters, their steps timed in
turn. Models are the zoo's, wider and with more samples, so that a step takes long enough to be worth splitting.

    python benchmarks/pipeline.py                               # all: an hour or two (make zoo first)
    python benchmarks/pipeline.py --models bert,resnet --microbatches 4,8
    python benchmarks/pipeline.py --devices cpu,cuda:0 --apart  # over unlike devices, where a plan would take one alone
    python benchmarks/pipeline.py --one-stage                   # what the machinery costs: one stage on one worker

Columns: the step as predicted and measured; how far it is off as predicted, and as predicted for devices as fast as
they were in the run (the machine may have had another speed when it was profiled), and the same of one device alone;
the speedup over one device likewise, and the measured one's share of the schedule's bound, which is S M / (M + S - 1)
for S stages and M micro-batches; the step of each naive split as a multiple of the plan's, where it is another split.
With one stage the speedup is the step of the plain model, in the same worker, over the stage's.
"""

import argparse
import dataclasses
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import cloudpickle
import torch
from torch import nn

import shardwright as sw
from shardwright.profiler.cache import FOLDER_VARIABLE

sys.path.append(str(Path(__file__).parents[1] / "tests"))
MODELS = "bert,gpt2,llama,t5,vit,resnet,hand_resnet,hand_unet,x_decoder"
SAMPLES = {"vit": 512, "resnet": 256, "hand_resnet": 256, "hand_unet": 256}
"""In a batch, so that one device takes a second or two for a step in training; of others MANY."""
MANY, WIDTH, CHANNELS, TOKENS = 128, 256, 4, 48


@dataclasses.dataclass(frozen=True)
class Case:
    """A model to be run in one way."""

    name: str
    train: bool
    schedule: str
    microbatches: int


def made(name: str, samples: int = 0) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    """A model of the zoo, wider, with more samples: so many, or its own number."""
    import zoo

    cloudpickle.register_pickle_by_value(zoo)  # the workers cannot import it
    # Each sample is padded: where a micro-batch has no padding, forwards go another way than with the whole batch.
    zoo.resize(samples or SAMPLES.get(name, MANY), width=WIDTH, channels=CHANNELS, tokens=TOKENS, padded="each")
    torch.manual_seed(0)
    return zoo.ZOO[name].make()


def cases(names: list[str], counts: list[int], modes: list[str]) -> Iterator[list[Case]]:
    """The cases of each model and mode; inference has forwards alone, and so one schedule."""
    for name in names:
        for mode in modes:
            schedules = ["1f1b", "gpipe"] if mode == "train" else ["gpipe"]
            yield [Case(name, mode == "train", schedule, m) for m in counts for schedule in schedules]


class Outcome(NamedTuple):
    """What a run found."""

    case: Case
    run: sw.Run
    stages: int

    @property
    def bound(self) -> float:
        """The largest speedup that the schedule allows."""
        return self.stages * self.case.microbatches / (self.case.microbatches + self.stages - 1)

    @property
    def of_bound(self) -> float:
        """The part of it that was reached."""
        return (self.run.speedup or 0.0) / self.bound


def row(found: Outcome) -> str:
    """A row of the table."""
    case, run = found.case, found.run
    step, alone = run.sharded, "-"
    if run.baseline is not None:
        alone = f"{run.baseline.error_percent or 0.0:+.1f}%, {run.baseline.error_at_pace_percent or 0.0:+.1f}%"
    naive = []
    for name in ("equal count", "by parameters"):
        one = next((one for one in run.naive if one.name == name and one.timed), None)
        naive.append(f"{run.gain_over(one):.3f}" if one else "-")
    return (
        f"| {case.name} | {'training' if case.train else 'inference'} | {case.schedule} | {case.microbatches} "
        f"| {found.stages} | {1e3 * (step.predicted_s or 0):.1f} ms | {1e3 * step.measured_s:.1f} ms "
        f"| {step.error_percent or 0.0:+.1f}%, {step.error_at_pace_percent or 0.0:+.1f}% | {alone} "
        f"| {run.predicted_speedup or 0:.3f}, {run.speedup_at_pace or 0:.3f} | {run.speedup or 0:.3f} "
        f"| {found.of_bound:.3f} | {' | '.join(naive)} |"
    )


def summary(found: list[Outcome]) -> str:
    """Errors, shares of the bound, and gains over naive splits."""
    away = [abs(one.run.sharded.error_percent or 0.0) for one in found]
    lines = [f"{len(found)} runs: step {statistics.median(away):.1f}% off in the median, {max(away):.1f}% at worst"]
    paced = [abs(one.run.sharded.error_at_pace_percent or 0.0) for one in found]
    lines.append(f"at the pace of the run {statistics.median(paced):.1f}%, {max(paced):.1f}% at worst")
    bases = [one.run.baseline for one in found if one.run.baseline is not None]
    if bases:
        for what, off in (
            ("one device alone", [abs(base.error_percent or 0.0) for base in bases]),
            ("at the pace of the run", [abs(base.error_at_pace_percent or 0.0) for base in bases]),
        ):
            lines.append(f"{what} {statistics.median(off):.1f}% off in the median, {max(off):.1f}% at worst")
    ratios = [100 * abs(one.run.predicted_speedup / one.run.speedup - 1) for one in found if one.run.predicted_speedup]
    lines.append(f"speedup {statistics.median(ratios):.1f}% off in the median, {max(ratios):.1f}% at worst")
    pipelines = [one.of_bound for one in found if one.stages > 1]
    if pipelines:
        lines.append(
            f"{len(pipelines)} pipelines: {statistics.median(pipelines):.3f} of the schedule's bound in the median"
        )
    gains = [
        (one.run.gain_over(naive) or 0.0, f"{one.case.name}, {one.case.microbatches} micro-batches, {naive.name}")
        for one in found
        for naive in one.run.naive
        if naive.timed
    ]
    if gains:
        ratios = [ratio for ratio, _ in gains]
        lines.append(
            f"{len(gains)} naive splits: {statistics.median(ratios):.3f} times the plan's step in the median, "
            f"{min(gains)[0]:.3f} at least ({min(gains)[1]})"
        )
    return "\n".join(lines)


def measured(
    case: Case, profile: sw.Profile, model: nn.Module, inputs: tuple[Any, Any], steps: int, *, apart: bool
) -> Outcome:
    """Plan and run a case; if ``apart``, with the first and the last unit pinned to the first and the last device."""
    units = [node.unit for node in profile.nodes if node.kind == "unit"]
    pins = {units[0]: profile.devices[0].name, units[-1]: profile.devices[-1].name} if apart else None
    plan = sw.plan(profile, schedule=case.schedule, microbatches=case.microbatches, pins=pins)
    args, kwargs = inputs
    run = sw.run(model, plan, args, kwargs, steps=steps, naive=len(plan.stages) > 1)
    return Outcome(case, run, len(plan.stages))


def main() -> None:
    """Print a row for each case, and the medians."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", default=MODELS)
    parser.add_argument("--microbatches", default="2,4,8,16")
    parser.add_argument("--modes", default="train,infer")
    parser.add_argument("--devices", default="cpu:0,cpu:1")
    parser.add_argument("--steps", type=int, default=11)
    parser.add_argument("--samples", type=int, default=0, help="in a batch; otherwise each model has its own number")
    parser.add_argument("--apart", action="store_true", help="the first unit on the first device, the last on the last")
    parser.add_argument("--one-stage", action="store_true", help="on the first device alone, whole batches")
    options = parser.parse_args()
    os.environ[FOLDER_VARIABLE] = tempfile.mkdtemp()
    counts = [1] if options.one_stage else [int(count) for count in options.microbatches.split(",")]
    devices = options.devices.split(",")[: 1 if options.one_stage else None]
    print(
        "| model | mode | schedule | micro-batches | stages | step predicted | measured | off, at the pace "
        "| alone off, at the pace | speedup predicted, at the pace | measured | of bound "
        "| equal count | by parameters |\n" + "|---" * 14 + "|"
    )
    found = []
    for group in cases(options.models.split(","), counts, options.modes.split(",")):
        model, *inputs = made(group[0].name, options.samples)
        model.train(group[0].train)
        train = group[0].train
        try:
            profile = sw.profile(model, *inputs, devices=devices, microbatches=sorted({1, *counts}), train=train)
        except sw.ShardwrightError as error:
            print(f"{group[0].name}: {error}", flush=True)
            continue
        for case in group[:1] if options.one_stage else group:
            try:
                found.append(measured(case, profile, model, tuple(inputs), options.steps, apart=options.apart))
                print(row(found[-1]), flush=True)
            except sw.ShardwrightError as error:
                print(f"{case}: {error}", flush=True)
    if found:
        print(summary(found))
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {len(os.sched_getaffinity(0))} cores")
    print(f"{datetime.now(UTC):%Y-%m-%d}")


if __name__ == "__main__":
    main()
