"""How well predictions are kept: profile, plan and run the container networks, several times over.

Predicted and measured are a profile and a run of the same session; speedups are ratios of steps timed in turn.

    python benchmarks/prediction.py --times 5
"""

import argparse
import platform
import statistics
from datetime import UTC, datetime
from pathlib import Path

import torch

import shardwright as sw
from shardwright.profiler.target import load_target

EXAMPLES = Path(__file__).parents[1] / "examples" / "containers.py"


def main() -> None:
    """Print one row a run, and the medians."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--times", type=int, default=3, help="how often each network is profiled and run")
    parser.add_argument("--devices", default="cpu:0,cpu:1")
    parser.add_argument("--networks", default="Net,NetList,NetDict")
    options = parser.parse_args()
    rows = []
    print("| network | micro-batches | step predicted | step measured | speedup predicted | speedup measured |")
    print("|---|---|---|---|---|---|")
    for _ in range(options.times):
        for name in options.networks.split(","):
            model, (args, kwargs) = load_target(f"{EXAMPLES}:{name}")
            profile = sw.profile(model, args, kwargs, devices=options.devices.split(","))
            plan = sw.plan(profile)
            run = sw.run(model, plan, args, kwargs)
            rows.append((name, plan.microbatches, run))
            print(
                f"| {name} | {plan.microbatches} | {run.sharded.predicted_s * 1e3:.0f} ms "
                f"| {run.sharded.measured_s * 1e3:.0f} ms ({run.sharded.error_percent:+.1f}%) "
                f"| {run.predicted_speedup:.2f}x | {run.speedup:.2f}x "
                f"({100 * (run.predicted_speedup / run.speedup - 1):+.1f}%) |",
                flush=True,
            )
    for name in options.networks.split(","):
        runs = [run for network, _, run in rows if network == name]
        step = statistics.median(abs(run.sharded.error_percent) for run in runs)
        ratio = statistics.median(100 * abs(run.predicted_speedup / run.speedup - 1) for run in runs)
        speedup = statistics.median(run.speedup for run in runs)
        print(f"{name}: median speedup {speedup:.2f}x; median error: step {step:.1f}%, speedup {ratio:.1f}%")
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {profile.devices[0].description}")
    print(f"{datetime.now(UTC):%Y-%m-%d}")


if __name__ == "__main__":
    main()
