"""How near roofline estimates come: calibrated on some models on one core, the times of other models' units.

Both are CPU time of one thread, so that other work on the machine does not count. A zoo model is tiny, and shows what
operators cost beside their work; the container networks and the larger transformer and ResNet show the work.

    python benchmarks/roofline.py --rounds 7    # needs transformers: make zoo
"""

import argparse
import os
import platform
import statistics
import sys
import time
import warnings
from datetime import UTC, datetime
from pathlib import Path

import torch

from shardwright.profiler.collect import captures_of
from shardwright.profiler.devices import find_devices
from shardwright.profiler.estimates.estimate import NOMINAL, demand_of, fit, roofline_s
from shardwright.profiler.estimates.workload import Mode, Workloads
from shardwright.profiler.measuring.stopwatch import HostStopwatch
from shardwright.profiler.measuring.subject import Subject
from shardwright.profiler.target import load_target

ROOT = Path(__file__).parents[1]
CALIBRATION = "NetList,transformer,gpt2,resnet"
ESTIMATED = "Net,NetDict,resnet18,llama,bert,vit,monai_unet,unet_2d"
PHASES = ("forward", "backward")


def main() -> None:
    """Print the fit, and a row a model."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--calibration", default=CALIBRATION)
    parser.add_argument("--models", default=ESTIMATED)
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["HF_HUB_OFFLINE"] = "1"
    warnings.simplefilter("ignore")
    makers = _makers()
    known = [row for name in options.calibration.split(",") for row in _rows(makers[name], options.rounds)]
    learned = fit([demand for _, demand, _ in known], [seconds for _, _, seconds in known], NOMINAL)
    efficiency = learned.efficiency
    print(
        f"calibrated on {options.calibration}: {efficiency.compute * NOMINAL.peak_flops['float32'] / 1e9:.1f} GFLOP/s, "
        f"{efficiency.memory * NOMINAL.memory_bytes_per_s / 1e9:.1f} GB/s, {efficiency.operation_s * 1e6:.1f} us an "
        f"operator; median error there {100 * learned.median_error:.0f}%"
    )
    print("| model | units | estimated/measured, median | worst | of the sum |\n|---|---|---|---|---|")
    all_ratios: list[float] = []
    for name in options.models.split(","):
        rows = _rows(makers[name], options.rounds)
        pairs = [(roofline_s(demand, NOMINAL, efficiency), seconds) for _, demand, seconds in rows]
        ratios = [
            estimated / measured
            for (kind, _, _), (estimated, measured) in zip(rows, pairs, strict=True)
            if kind == "unit"
        ]
        all_ratios += ratios
        total = sum(estimated for estimated, _ in pairs) / sum(measured for _, measured in pairs)
        print(
            f"| {name} | {len(ratios) // 2} | {statistics.median(ratios):.2f} | {_worst(ratios):.2f} | {total:.2f} |",
            flush=True,
        )
    print(f"all: median {statistics.median(all_ratios):.2f}, worst {_worst(all_ratios):.2f} of {len(all_ratios)} times")
    off = [max(ratio, 1 / ratio) for ratio in all_ratios]
    print(
        f"half of them within a factor of {statistics.median(off):.2f}, "
        f"nine of ten within {sorted(off)[int(0.9 * len(off))]:.2f}"
    )
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {find_devices(['cpu:0'])[0].description}")
    print(f"{datetime.now(UTC):%Y-%m-%d}")


def _worst(ratios):
    """The ratio that is furthest from 1."""
    return max(ratios, key=lambda ratio: max(ratio, 1 / ratio))


def _rows(make, rounds):
    """Kind, demand and seconds of the forward and the backward of every step."""
    torch.manual_seed(0)
    model, args, kwargs = make()
    captures, _ = captures_of(model, args, kwargs, [1], devices=2, train=True)
    stopwatch = HostStopwatch(time.thread_time)
    workloads = Workloads()
    rows = []
    for step in captures[1].steps:
        if step.call is None:
            continue
        workload = workloads.of(step.call, Mode(train=True))
        subject = Subject(step.call, torch.device("cpu"), train=True, optimizer=None, accumulate=False)
        times = [{phase: _seconds(getattr(subject, phase)(stopwatch)) for phase in PHASES} for _ in range(rounds + 1)]
        for phase in PHASES:
            demand = demand_of(getattr(workload, phase))
            seconds = statistics.median(run[phase] for run in times[1:])
            if len(demand.flops) and seconds > 0:
                rows.append((step.kind, demand, seconds))
    return rows


def _seconds(reading):
    return reading() if reading is not None else 0.0


def _makers():
    """Model makers by name: the zoo's, the container networks', and two of usual size."""
    sys.path.append(str(ROOT / "tests"))
    import zoo

    def container(name):
        model, (args, kwargs) = load_target(f"{ROOT / 'examples' / 'containers.py'}:{name}")
        return model, args, kwargs

    makers = {name: entry.make for name, entry in zoo.ZOO.items()}
    makers |= {name: lambda name=name: container(name) for name in ("Net", "NetList", "NetDict")}
    return makers | {"transformer": _transformer, "resnet18": _resnet18}


def _transformer():
    layer = torch.nn.TransformerEncoderLayer(256, 8, 1024, batch_first=True, dropout=0.0)
    return torch.nn.TransformerEncoder(layer, 4, enable_nested_tensor=False), (torch.randn(8, 64, 256),), {}


def _resnet18():
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(num_labels=10, depths=[2, 2, 2, 2], layer_type="basic", hidden_sizes=[64, 128, 256, 512])
    return ResNetForImageClassification(config), (torch.randn(4, 3, 96, 96),), {}


if __name__ == "__main__":
    main()
