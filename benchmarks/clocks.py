"""Which clock tells a step: sums of units, on the GPU's clock and the host's, beside the plain model in a loop.

A profile takes the slower of two sums for a GPU: what its units take there, and what the host takes to enqueue them.
This is to find out how a host is to be timed so that the sum is what a training loop takes. Timed in one process:

- the plain model's steps, enqueued in a loop: by events, and each phase by the host; before the units and after, and
  amid them, three steps after each of their rounds, of which the last is told;
- the same with the queue drained before each phase;
- the units, each called by itself: behind a GPU told to wait, for its clock, and into a drained queue, for the host's;
- the units in a row, as a profile times them for the host's clock.

Beside each is the host's pace, in ms for the same small piece of work. On a CPU there is one clock, and both ways are
the same.

    python benchmarks/clocks.py --models convnext,resnet50,swin    # needs transformers and diffusers: make zoo
    python benchmarks/clocks.py --device cpu:0 --models tiny_gpt2
"""

import argparse
import copy
import gc
import os
import platform
import statistics
import sys
import time
import warnings
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

import torch
from torch import nn

from shardwright.profiler.capture import captures_of
from shardwright.profiler.measure import Pass, prepare
from shardwright.profiler.measuring.optimizers import make_optimizer
from shardwright.profiler.measuring.pace import pace_of
from shardwright.profiler.measuring.stopwatch import CudaStopwatch, HostStopwatch
from shardwright.profiler.measuring.subject import Subject
from shardwright.profiler.measuring.timing import Series
from shardwright.profiler.recording.inputs import outputs_of
from shardwright.profiler.recording.structure import map_tensors
from shardwright.profiler.recording.unitgraph import mean_square_loss

sys.path.append(str(Path(__file__).parent))
MODELS = "convnext,resnet50,swin,bert,t5,NetDict,unet_2d,tiny_gpt2,whisper,llama_bf16,vit,gpt2"
PHASES = ("forward", "backward", "update")


class Loop:
    """Training steps of the plain model on ``device``."""

    def __init__(self, model, args, kwargs, places, device):
        self.model = copy.deepcopy(model).to(device).train()
        self.args, self.kwargs = map_tensors(lambda t: t.to(device), (args, kwargs))
        self.places, self.device = places, device
        self.optimizer = make_optimizer("adam", self.model.parameters())

    def synchronize(self):
        """Wait for the GPU."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def step(self, *, drained):
        """The host's seconds of each phase of a step."""
        kept = {}

        def forward():
            outputs = outputs_of(self.model(*self.args, **self.kwargs))
            kept["loss"] = mean_square_loss([outputs[place] for place in self.places])

        seconds = []
        for phase in (forward, lambda: kept.pop("loss").backward(), self.optimizer.step):
            if drained:
                self.synchronize()
            begin = time.perf_counter()
            phase()
            seconds.append(time.perf_counter() - begin)
        self.optimizer.zero_grad()
        return seconds

    def timed(self, steps):
        """Medians: a step by events (by the host on a CPU), its phases by the host, the same drained; and the pace."""
        for _ in range(3):
            self.step(drained=False)
        pace = pace_of(self.device)
        paces = [pace()]
        self.synchronize()
        marks, phases = [self.mark()], []
        for _ in range(steps):
            phases.append(self.step(drained=False))
            marks.append(self.mark())
        self.synchronize()
        paces.append(pace())
        whole = statistics.median(self.between(a, b) for a, b in pairwise(marks))
        drained = [self.step(drained=True) for _ in range(steps)]
        return whole, medians(phases), medians(drained), statistics.fmean(paces)

    def mark(self):
        """A moment."""
        if self.device.type == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, first, second):
        """Seconds from one moment to another."""
        return second - first if self.device.type == "cpu" else first.elapsed_time(second) / 1e3


def medians(rows):
    """Of each column."""
    return [statistics.median(column) for column in zip(*rows, strict=True)]


def sums(all_series):
    """The medians of each phase, summed up over the units."""
    columns = ("forwards", "backwards", "updates")
    return [sum(statistics.median(getattr(series, column)()) for series in all_series) for column in columns]


def in_ms(seconds):
    """Phases, and all together."""
    return f"{' + '.join(f'{1e3 * s:.2f}' for s in seconds)} = {1e3 * sum(seconds):.2f} ms"


def print_loop(when, timed):
    """What the plain model takes."""
    whole, phases, drained, pace = timed
    print(f"| loop {when} | {1e3 * whole:.2f} ms | {in_ms(phases)} | {1e3 * pace:.2f} |")
    print(f"| loop {when}, drained | | {in_ms(drained)} | {1e3 * pace:.2f} |")


def one(name, make, device, options):
    """Print a model's rows."""
    torch.manual_seed(0)
    model, args, kwargs = make()
    captures, _ = captures_of(model, args, kwargs, [1], devices=1, train=True)
    capture = captures[1]
    before = Loop(model, args, kwargs, capture.output_places, device).timed(options.steps)
    steps = [step for step in capture.steps if step.call is not None]
    subjects = {step.name: Subject(step.call, device, train=True, optimizer="adam", accumulate=False) for step in steps}
    is_gpu = device.type == "cuda"
    stopwatch = CudaStopwatch(device) if is_gpu else HostStopwatch()
    passes = {way: Pass(subjects) for way in ("by themselves", "in a row")}
    passes["by themselves"].in_a_row = False
    series = {way: {key: Series() for key in subjects} for way in passes}
    loop, amid = Loop(model, args, kwargs, capture.output_places, device), []
    for round_ in range(options.rounds + 1):
        for way, own in passes.items():
            own.run(stopwatch, pace=pace_of(device))
            stopwatch.finish()
            own.note(series[way], first=round_ == 0)
        amid.append([loop.step(drained=False) for _ in range(3)][-1])
        loop.synchronize()
    for step in steps:
        if isinstance(step.call.function, nn.Module):
            step.call.function.cpu()
    del loop
    after = Loop(model, args, kwargs, capture.output_places, device).timed(options.steps)
    print(f"\n{name}, {len(steps)} units and pieces of glue\n")
    print("| | GPU's clock, or the step | host: forward, backward, update | pace |\n|---|---|---|---|")
    print_loop("before", before)
    for way, found in series.items():
        own = in_ms(sums(found.values()))
        hosts = [each.host for each in found.values()] if is_gpu else [*found.values()]
        print(f"| units, {way} | {own} | {in_ms(sums(hosts))} | {1e3 * statistics.median(hosts[0].pace_s):.2f} |")
    print(f"| loop amid | | {in_ms(medians(amid[1:]))} | |")
    print_loop("after", after)
    sys.stdout.flush()


def main():
    """Print the rows of each model."""
    import gpu

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--models", default=MODELS, help="of benchmarks/gpu.py")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=12, help="of the plain model, each time")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="after which no further model is begun")
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    warnings.simplefilter("ignore")
    prepare(options.device, 1)
    device = torch.device(options.device if options.device.startswith("cuda") else "cpu")
    known = gpu.makers()
    began = time.monotonic()
    for name in options.models.split(","):
        if time.monotonic() - began > options.seconds:
            break
        one(name, known[name], device, options)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    print(f"\ntorch {torch.__version__}, Python {platform.python_version()}, {gpu.profile_name(device)}")
    print(f"{datetime.now(UTC):%Y-%m-%d}")


if __name__ == "__main__":
    main()
