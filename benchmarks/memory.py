"""How well memory is predicted: the peak that the plan states for one device, and the peak counted in a real step.

The models are those of tests/zoo whose libraries are installed. The step is the unplaced model's own: forward, loss,
backward of each micro-batch, then the optimizer, with gradients present from a step before. What is live before the
step (weights, gradients, optimizer state, inputs) is counted by storage, the rest by a MemoryCounter.

    python benchmarks/memory.py --batch 8 --microbatches 1,4
"""

import argparse
import copy
import platform
import statistics
import sys
import warnings
from datetime import UTC, datetime
from pathlib import Path

import cloudpickle
import torch

import shardwright as sw
from shardwright.profiler.measuring.optimizers import make_optimizer
from shardwright.profiler.memory import MemoryCounter, total_bytes
from shardwright.profiler.recording.inputs import all_microbatches, outputs_of
from shardwright.profiler.recording.structure import tensors_in
from shardwright.profiler.recording.unitgraph import mean_square_loss
from shardwright.profiler.trace import trace

WITHIN_PERCENT = 3.0


def load_zoo(batch):
    """The registry in tests/zoo, with batches of so many samples."""
    sys.path.append(str(Path(__file__).parents[1] / "tests"))
    import zoo

    zoo.resize(batch)
    cloudpickle.register_pickle_by_value(zoo)  # the worker cannot import it
    return zoo.ZOO


def counted_peak(model, args, kwargs, microbatches, optimizer):
    """Bytes live at most in a training step, and those that were live before it."""
    places = trace(model, args, kwargs).output_places  # those that the profile's loss is taken over, caches left out
    model.train()
    updating = make_optimizer(optimizer, model.parameters())

    def step():
        for piece_args, piece_kwargs in all_microbatches(args, kwargs, microbatches):
            outputs = outputs_of(model(*piece_args, **piece_kwargs))
            (mean_square_loss([outputs[place] for place in places]) / microbatches).backward()
            del outputs
        updating.step()

    step()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    states = [tensor for _, tensor in tensors_in(list(updating.state.values()))]
    inputs = [tensor for _, tensor in tensors_in((args, kwargs))]
    before = total_bytes([*model.parameters(), *model.buffers(), *gradients, *states, *inputs])
    counter = MemoryCounter()
    with counter:
        step()
    return before + counter.peak_bytes, before


def predicted_peak(model, args, kwargs, microbatches, optimizer):
    """By number of micro-batches: the peak that the plan states for one device that has the whole model."""
    profile = sw.profile(
        model, args, kwargs, devices=["cpu:0"], microbatches=microbatches, optimizer=optimizer, rounds=1
    )
    plans = {count: sw.plan(profile, microbatches=count) for count in microbatches}
    return {count: plan.stages[0].memory_bytes for count, plan in plans.items()}


def main() -> None:
    """Print one row a model and number of micro-batches, and how many are within the aim."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", default="", help="names in tests/zoo; all that can be trained by default")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--microbatches", default="1,4")
    parser.add_argument("--optimizer", default="adam")
    options = parser.parse_args()
    counts = [int(count) for count in options.microbatches.split(",")]
    zoo = load_zoo(options.batch)
    warnings.simplefilter("ignore")
    errors = []
    print("| model | micro-batches | before the step | counted peak | predicted peak | off by |")
    print("|---|---|---|---|---|---|")
    for name in options.models.split(",") if options.models else [n for n, entry in zoo.items() if entry.trains]:
        torch.manual_seed(0)
        try:
            model, args, kwargs = zoo[name].make()
        except ImportError:
            continue
        predicted = {}
        for tried in (counts, [1]):  # not every batch can be divided
            try:
                predicted = predicted or predicted_peak(copy.deepcopy(model), args, kwargs, tried, options.optimizer)
            except sw.ShardwrightError as error:
                print(f"| {name} | {tried} | | | | refused: {str(error)[:150]} |", flush=True)
        for count in predicted:
            found, before = counted_peak(copy.deepcopy(model), args, kwargs, count, options.optimizer)
            percent = 100 * (predicted[count] / found - 1)
            errors.append((name, percent))
            print(f"| {name} | {count} | {before:,} | {found:,} | {predicted[count]:,} | {percent:+.2f}% |", flush=True)
    if not errors:
        sys.exit("none of these models could be compared: install their libraries with `make zoo`")
    within = {name for name, _ in errors} - {name for name, percent in errors if abs(percent) > WITHIN_PERCENT}
    print(
        f"\n{len(within)} of {len({name for name, _ in errors})} models within {WITHIN_PERCENT:g}% at every number of "
        f"micro-batches; median error {statistics.median(abs(percent) for _, percent in errors):.2f}%"
    )
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {datetime.now(UTC):%Y-%m-%d}")


if __name__ == "__main__":
    main()
