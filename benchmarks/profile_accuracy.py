"""How well the sum of the measured units tells the step of the whole model, and what repeated profiles cost.

A CPU worker measures the units as it does for ``sw.profile``, equal ones once, and in turn with them steps of the whole
model: forward, the profile's loss, backward and update. The ratio is that of the sum to the step within each round, its
median over the rounds: the machine's speed changes from second to second.

    python benchmarks/profile_accuracy.py                       # models of the zoo (make zoo)
    python benchmarks/profile_accuracy.py --samples 16 --width 256 --channels 4     # larger ones
    python benchmarks/profile_accuracy.py --cpu-time            # of the thread: on a machine that is busy otherwise
    python benchmarks/profile_accuracy.py --again               # a second profile, and 80 layers against 2
"""

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import cloudpickle
import numpy as np
import torch
from torch import nn

import shardwright as sw
from shardwright.profiler.cache import FOLDER_VARIABLE
from shardwright.profiler.capture import captures_of
from shardwright.profiler.devices import find_devices
from shardwright.profiler.measure import prepare
from shardwright.profiler.measuring.held import How, borrowing, hold, passes_held
from shardwright.profiler.measuring.optimizers import make_optimizer
from shardwright.profiler.measuring.selection import Item, chosen, known_by
from shardwright.profiler.measuring.stopwatch import HostStopwatch
from shardwright.profiler.measuring.timed import timed_steps
from shardwright.profiler.measuring.timing import Series
from shardwright.profiler.recording.inputs import outputs_of
from shardwright.profiler.recording.unitgraph import mean_square_loss
from shardwright.profiler.workers.pool import Pool

sys.path.append(str(Path(__file__).parents[1] / "tests"))
MODELS = (
    "bert,gpt2,llama,vit,resnet,t5,mixtral,swin,whisper,clip,unet_2d,monai_unet,x_decoder,torch_transformer,hand_resnet,"
    "hand_unet,hand_mixer,gan,soft_experts,tied_autoencoder,albert,looped_block"
)


def hold_whole(model, args, kwargs, places):
    """Take in a whole model."""
    from shardwright.profiler.workers.worker import resident  # the worker's own

    resident["whole"] = (model.train(), args, kwargs, places, make_optimizer("adam", model.parameters()))


def step(stopwatch):
    """One training step of the whole model: seconds of forward, backward, update, and of all."""
    from shardwright.profiler.workers.worker import resident

    model, args, kwargs, places, optimizer = resident["whole"]

    def forward():
        outputs = outputs_of(model(*args, **kwargs))
        return mean_square_loss([outputs[place] for place in places])

    def whole():
        loss, forward_s = stopwatch.time(forward)
        _, backward_s = stopwatch.time(loss.backward)
        _, update_s = stopwatch.time(optimizer.step)
        return [reading() for reading in (forward_s, backward_s, update_s)]

    parts, whole_s = stopwatch.time(whole)
    optimizer.zero_grad()
    return [*parts, whole_s()]


def fail(item, error):
    """What does not fit ends the benchmark."""
    raise MemoryError(f"{item}: {error}")


def alternate(rounds, cpu_time):
    """Seconds of the phases of each held step, by key, and of the whole, in each round; one before to warm up."""
    from shardwright.profiler.workers.worker import resident

    stopwatch = HostStopwatch(time.thread_time if cpu_time else time.perf_counter)
    (steps,) = passes_held(fail)
    series = {item: Series() for item in steps.named.values()}
    whole = []
    for count in range(rounds + 1):
        # The first of two brings the caches to where a step before would have left them.
        steps.run(stopwatch)
        steps.run(stopwatch)
        steps.note(series, first=count == 0)
        step(stopwatch)
        whole.append(step(stopwatch))
    times = {resident["held"][item].key: (s.forward_s, s.backwards(), s.updates()) for item, s in series.items()}
    return times, whole[1:]


def new_parts(called):
    """By step, the part of its parameters, by their bytes, that no step before has: they are updated once."""
    seen, parts = set(), {}
    for one in called:
        function = one.call.function
        trained = [p for p in function.parameters() if p.requires_grad] if isinstance(function, nn.Module) else []
        new = [p for p in trained if id(p) not in seen]
        seen.update(map(id, trained))
        parts[one.name] = sum(p.nbytes for p in new) / sum(p.nbytes for p in trained) if trained else 1.0
    return parts


def compare(name, model, args, kwargs, rounds, cpu_time):
    """Sum of units and median step, both in s, and how many units there were."""
    captures, _ = captures_of(model, args, kwargs, [1], devices=2, train=True)
    called = timed_steps(captures[1], train=True, accumulate=False)
    items = {Item(1, one.name): one for one in called}
    known, loans = known_by(items, train=True, optimizer="adam")
    keys = {item.step: key for item, key in known.items()}
    how = How(train=True, optimizer="adam")
    measured = chosen(items, known, loans, train=True)
    with Pool(find_devices(["cpu:0"])) as pool:
        pool.call({"cpu:0": (prepare, ("cpu:0", 1))}, limit_s=120)
        for number, item in enumerate(measured):
            loan = loans.get(item.step)
            calls = {1: items[item].call if loan is None else borrowing(items[item].call)}
            arguments = item.step, calls, {item: known[item]}, how, loan, number == 0
            pool.call({"cpu:0": (hold, arguments)}, limit_s=120)
        pool.call({"cpu:0": (hold_whole, (model, args, kwargs, captures[1].output_places))}, limit_s=120)
        times, whole = pool.call({"cpu:0": (alternate, (rounds, cpu_time))}, limit_s=600)["cpu:0"]
    new = new_parts(called)
    parts = [np.sum([times[keys[one.name]][phase] for one in called], axis=0) for phase in range(2)]
    parts.append(np.sum([new[one.name] * np.array(times[keys[one.name]][2]) for one in called], axis=0))
    found, true = np.array([*parts, sum(parts)]), np.array(whole).T
    units = sum(one.kind == "unit" for one in called)
    pairs = zip(1e3 * np.median(found, axis=1), 1e3 * np.median(true, axis=1), strict=True)
    cells = " | ".join(f"{ours:.2f} of {theirs:.2f} ms" for ours, theirs in pairs)
    ratio = float(np.median(found[-1] / true[-1]))
    print(f"| {name} | {units} | {cells} | {ratio:.3f} |", flush=True)
    return ratio


class Decoder(nn.Module):
    """Layers of one width."""

    def __init__(self, layers, width=256):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 4 * width, batch_first=True, dropout=0.0) for _ in range(layers)
        )

    def forward(self, x):
        """One layer after another."""
        for layer in self.layers:
            x = layer(x)
        return x


def again():
    """Seconds of a first and a second profile, and of 80 layers after 2, each with a cache of its own."""

    def seconds(layers):
        model, x = Decoder(layers), torch.randn(8, 64, 256)
        start = time.perf_counter()
        sw.profile(model, (x,), devices=["cpu:0"], units=["layers.*"])
        return time.perf_counter() - start

    for layers in (2, 80):
        os.environ[FOLDER_VARIABLE] = tempfile.mkdtemp()
        first, second = seconds(layers), seconds(layers)
        print(f"{layers} layers: first profile {first:.1f} s, second {second:.1f} s ({second / first:.1%})", flush=True)


def main():
    """Print one row a model, and the median and the worst ratio."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--models", default=MODELS)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--samples", type=int, help="in a batch; by default two or so")
    parser.add_argument("--width", type=int, help="of hidden states, where a model has none of its own; by default 32")
    parser.add_argument("--channels", type=int, help="how many times those of convolutions")
    parser.add_argument("--again", action="store_true")
    options = parser.parse_args()
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    os.environ[FOLDER_VARIABLE] = tempfile.mkdtemp()
    torch.set_num_threads(1)
    if options.again:
        again()
    else:
        import zoo

        cloudpickle.register_pickle_by_value(zoo)  # the worker cannot import it
        zoo.resize(options.samples, width=options.width, channels=options.channels)
        print(
            "| model | units | forward | backward | update | sum of units | whole step | ratio |\n" + "|---" * 8 + "|"
        )
        ratios = []
        for name in options.models.split(","):
            if name in zoo.ZOO and zoo.ZOO[name].trains:
                torch.manual_seed(0)
                ratios.append(compare(name, *zoo.ZOO[name].make(), options.rounds, options.cpu_time))
        away = [abs(ratio - 1) for ratio in ratios]
        print(f"{len(ratios)} models: {statistics.median(away):.1%} off in the median, {max(away):.1%} at worst")
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {datetime.now(UTC):%Y-%m-%d}")


if __name__ == "__main__":
    main()
