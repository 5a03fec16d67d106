"""What hooks cost: a forward of 100 small layers on two devices, placed by hand, by shardwright and by Accelerate.

    python benchmarks/placement.py
    python benchmarks/placement.py --devices cuda:0,cuda:1 cuda:0,cpu

Layers 0 to 49 are on the first device, the others on the second; inputs and outputs are on the first. The chain is an
nn.Sequential; the residual network computes ``x = x + layer(x)``: at the cut the sum has an operand on each device.
Placed are copies of one network, which have to give equal outputs:

- plain: on the first device, whole;
- by hand: such containers with ``.to()`` at the beginning, the cut and the end; again: how much of a ratio is chance;
- shardwright: ``place`` of a plan with the same cut;
- Accelerate: the hooks of ``dispatch_model`` with the same map, attached by the function that it calls for that, since
  itself it would run on the GPU what the map has on the CPU. They do not align sums: where those fail, so it says.

In each round all make two forwards, in an order drawn anew; the second is timed, with warm caches. Where its tensors
and modules happen to lie makes a copy faster or slower than its like by some percent, as does which was made first; so
all are copied anew several times, in another order each time. Ratios and differences are taken within rounds; their
medians are printed, the ratio to the hand-written one with its quartiles.
Beside inference is a forward for training (gradients on, no backward), all in one thread. What the devices show:

- two real devices: what a user gets;
- ``sim:0,sim:1``: the same path without a GPU, crossings and the alignment of sums included. An operation takes some
  ten times as long as on the CPU: the microseconds added count, a ratio flatters. Copies and sums are slowed down too;
- ``cpu,cpu``: the hooks alone, beside operations as fast as they get. ``place`` would add none here: it places on two
  simulated devices, then tensors and hooks are brought to the CPU, so that every ``.to()`` finds nothing to do, in the
  hand-written forward and in Accelerate's hooks too. Sums are looked at, and never need aligning.
"""

import argparse
import copy
import gc
import platform
import random
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime

import torch
from accelerate.hooks import attach_align_device_hook_on_blocks
from torch import Tensor, nn

import shardwright as sw
from shardwright.profiler.recording.placed import placement_hooks
from shardwright.sharder.runtime.placing.hooks import MoveInputs, UnitForward
from shardwright.sharder.runtime.placing.relocate import relocate
from shardwright.sharder.runtime.placing.sim import on_host, parameters_may_move, sim_device
from shardwright.sharder.runtime.placing.whole import WholeForward

LAYERS, CUT, WIDTH, BATCH = 100, 50, 32, 8
BY_HAND = "by hand"
CPU = torch.device("cpu")
Homes = tuple[torch.device, torch.device]


class Residual(nn.Module):
    """Sums between the units."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        """Add what each layer makes of the sum before it."""
        for layer in self.layers:
            x = x + layer(x)
        return x


class ByHand(nn.Module):
    """As a careful user writes it: a container for each device, with x where its layers are."""

    def __init__(self, layers: list[nn.Module], homes: Homes) -> None:
        super().__init__()
        self.homes = homes
        with parameters_may_move():
            self.first = self.of(layers[:CUT]).to(homes[0])
            self.second = self.of(layers[CUT:]).to(homes[1])

    def of(self, layers: list[nn.Module]) -> nn.Module:
        """The layers in a container of the kind that the model has them in."""
        return nn.ModuleList(layers)


class ChainByHand(ByHand):
    """The chain, an nn.Sequential a device, as in PyTorch's own tutorial of model parallelism."""

    def of(self, layers: list[nn.Module]) -> nn.Module:
        """The layers as one chain."""
        return nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Run the layers."""
        caller = x.device
        x = self.first(x.to(self.homes[0]))
        x = self.second(x.to(self.homes[1]))
        return x.to(caller)


class ResidualByHand(ByHand):
    """The residual network."""

    def forward(self, x: Tensor) -> Tensor:
        """Run the layers and sums."""
        caller = x.device
        x = x.to(self.homes[0])
        for layer in self.first:
            x = x + layer(x)
        x = x.to(self.homes[1])
        for layer in self.second:
            x = x + layer(x)
        return x.to(caller)


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    """The units, by path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear)}


def placed_by_us(model: nn.Module, plan: sw.Plan, homes: Homes) -> nn.Module:
    """Place the model; on the CPU alone, with the hooks of a placement on two devices."""
    if homes != (CPU, CPU):
        return sw.place(model, plan, devices=dict(zip(plan.devices, homes, strict=True)))
    sw.place(model, plan, devices={name: sim_device(index) for index, name in enumerate(plan.devices)})
    relocate(model, {id(parameter): CPU for parameter in model.parameters()})
    for _, hooks, key in placement_hooks(model):
        if isinstance(hooks[key], (UnitForward, MoveInputs)):
            hooks[key].device = CPU
        elif isinstance(hooks[key], WholeForward):
            hooks[key].layout.move_to(dict.fromkeys(hooks[key].layout.homes, CPU))
    return model


def placed_by_accelerate(model: nn.Module, homes: Homes) -> nn.Module:
    """Attach Accelerate's hooks as ``dispatch_model`` does."""
    where = {path: homes[index >= CUT] for index, path in enumerate(layers_of(model))}
    with parameters_may_move():
        attach_align_device_hook_on_blocks(model, {"": homes[0], **where}, offload=dict.fromkeys(where, False))
    return model


def contenders(model: nn.Module, plan: sw.Plan, homes: Homes) -> dict[str, nn.Module]:
    """Copies of the model, each placed in another way; made in an order drawn anew, which counts for their speed."""

    def plain() -> nn.Module:
        with parameters_may_move():
            return copy.deepcopy(model).to(homes[0])

    def by_hand() -> nn.Module:
        layers = [*layers_of(copy.deepcopy(model)).values()]
        return (ResidualByHand if isinstance(model, Residual) else ChainByHand)(layers, homes)

    ways: dict[str, Callable[[], nn.Module]] = {
        "plain": plain,
        BY_HAND: by_hand,
        "by hand, again": by_hand,
        "shardwright": lambda: placed_by_us(copy.deepcopy(model), plan, homes),
        "Accelerate": lambda: placed_by_accelerate(copy.deepcopy(model), homes),
    }
    made = {name: ways[name]() for name in random.sample([*ways], len(ways))}
    return {name: made[name] for name in ways}


def run(model: nn.Module, x: Tensor) -> float:
    """Seconds of a forward, from and to idle devices."""
    begin = time.perf_counter()
    model(x)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def measure(models: dict[str, nn.Module], x: Tensor, seconds: float, times: dict[str, list[float]]) -> None:
    """Add the times of rounds, so many seconds long, to those of each contender."""
    for name in models:
        times.setdefault(name, [])
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for name in random.sample([*models], len(models)):
            run(models[name], x)  # brings it into the caches
            times[name].append(run(models[name], x))


def cells_of(times: dict[str, list[float]]) -> dict[str, str]:
    """Cells of the table by contender: time, ratios to hand-written and plain, and what is added to hand-written."""
    cells = {}
    for name, own in times.items():
        to_hand = [mine / hand for mine, hand in zip(own, times[BY_HAND], strict=True)]
        to_plain = [mine / plain for mine, plain in zip(own, times["plain"], strict=True)]
        added = [mine - hand for mine, hand in zip(own, times[BY_HAND], strict=True)]
        low, middle, high = statistics.quantiles(to_hand, n=4)
        cells[name] = (
            f"{statistics.median(own) * 1e6:.0f} µs | {middle:.3f} ({low:.3f} to {high:.3f}) "
            f"| {statistics.median(to_plain):.3f} | {statistics.median(added) * 1e6:+.1f} µs"
        )
    return cells


def main() -> None:
    """Print a row for each way to place each network on each pair of devices."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--devices", nargs="+", default=["sim:0,sim:1", "cpu,cpu"], help="pairs of devices")
    parser.add_argument("--seconds", type=float, default=10.0, help="for each network, pair and column")
    parser.add_argument("--copies", type=int, default=5, help="how often all are copied anew")
    options = parser.parse_args()
    torch.set_num_threads(1)
    sim_device(0)  # before the first tensors, as sim.py asks
    gc.disable()
    columns = "forward | to hand-written | to plain | added to hand-written |"
    print(f"| devices | network | placed | {columns} training {columns}")
    print("|---" * 11 + "|")
    for network, model in (
        ("chain", nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)])),
        ("residual", Residual([nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)])),
    ):
        x = torch.randn(BATCH, WIDTH)
        profile = sw.profile(model, (x,), devices=["cpu:0", "cpu:1"], microbatches=[1], rounds=1)
        pins = {path: f"cpu:{int(index >= CUT)}" for index, path in enumerate(layers_of(model))}
        plan = sw.plan(profile, microbatches=1, pins=pins)
        for pair in options.devices:
            homes = tuple(torch.device(name) for name in pair.split(","))
            given, expected = x.to(homes[0]), model(x).detach()
            inference: dict[str, list[float]] = {}
            training: dict[str, list[float]] = {}
            for _ in range(options.copies):
                models = contenders(model, plan, homes)
                for name in [*models]:
                    try:
                        off = (on_host(models[name](given)).cpu() - expected).abs().max() / expected.abs().max()
                        assert off < 1e-4, f"{name} gives other outputs"
                    except RuntimeError as error:
                        print(f"{pair}, {network}, {name} fails: {str(error).partition(',')[0]}")
                        del models[name]
                with torch.no_grad():
                    measure(models, given, options.seconds / options.copies, inference)
                measure(models, given, options.seconds / options.copies, training)
            cells = cells_of(inference), cells_of(training)
            for name in inference:
                print(f"| {pair} | {network} | {name} | {cells[0][name]} | {cells[1][name]} |", flush=True)
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {profile.devices[0].description}{gpu}")
    print(f"{datetime.now(UTC):%Y-%m-%d}")


if __name__ == "__main__":
    main()
