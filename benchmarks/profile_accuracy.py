"""How well the sum of the measured units tells the step of the whole model, and what repeated profiles cost.

A CPU worker measures the units, as ``sw.profile`` does, and then steps of the whole model: forward, the profile's loss,
backward and update. The ratio is the profile's sum over the median step. Nothing is taken from the cache.

    python benchmarks/profile_accuracy.py                       # models of the zoo (make zoo)
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
import torch
from torch import nn

import shardwright as sw
from shardwright.profiler.cache import FOLDER_VARIABLE
from shardwright.profiler.devices import find_devices
from shardwright.profiler.inputs import outputs_of
from shardwright.profiler.measure import prepare
from shardwright.profiler.optimizers import make_optimizer
from shardwright.profiler.pool import Pool
from shardwright.profiler.trace import trace
from shardwright.profiler.unitgraph import mean_square_loss

sys.path.append(str(Path(__file__).parents[1] / "tests"))
MODELS = (
    "bert,gpt2,llama,vit,resnet,t5,mixtral,swin,whisper,clip,unet_2d,monai_unet,x_decoder,torch_transformer,hand_resnet,"
    "hand_unet,hand_mixer,gan,soft_experts,tied_autoencoder"
)


def hold(model, args, kwargs, places):
    """Take in a whole model."""
    from shardwright.profiler.worker import resident  # the worker's own

    resident["whole"] = (model.train(), args, kwargs, places, make_optimizer("adam", model.parameters()))


def steps(count):
    """Seconds of so many training steps, after a few to warm up."""
    from shardwright.profiler.worker import resident

    model, args, kwargs, places, optimizer = resident["whole"]
    seconds = []
    for _ in range(count + 3):
        start = time.perf_counter()
        outputs = outputs_of(model(*args, **kwargs))
        mean_square_loss([outputs[place] for place in places]).backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    return seconds[3:]


def compare(name, model, args, kwargs, rounds):
    """Sum of units and median step, both in s, and how many units there were."""
    profile = sw.profile(model, args, kwargs, devices=["cpu:0"], microbatches=[1], refresh=True)
    places = trace(model, args, kwargs).output_places
    with Pool(find_devices(["cpu:0"])) as pool:
        pool.call({"cpu:0": (prepare, ("cpu:0", 1))}, limit_s=120)
        pool.call({"cpu:0": (hold, (model, args, kwargs, places))}, limit_s=120)
        whole = pool.call({"cpu:0": (steps, (rounds,))}, limit_s=600)["cpu:0"]
    units = sum(node.kind == "unit" for node in profile.nodes)
    found, step = profile.step_s("cpu:0"), statistics.median(whole)
    print(f"| {name} | {units} | {1e3 * found:.2f} ms | {1e3 * step:.2f} ms | {found / step:.3f} |", flush=True)
    return found / step


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
        print("| model | units | sum of units | whole step | ratio |\n|---|---|---|---|---|")
        ratios = []
        for name in options.models.split(","):
            if name in zoo.ZOO and zoo.ZOO[name].trains:
                torch.manual_seed(0)
                ratios.append(compare(name, *zoo.ZOO[name].make(), options.rounds))
        away = [abs(ratio - 1) for ratio in ratios]
        print(f"{len(ratios)} models: {statistics.median(away):.1%} off in the median, {max(away):.1%} at worst")
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {datetime.now(UTC):%Y-%m-%d}")


if __name__ == "__main__":
    main()
