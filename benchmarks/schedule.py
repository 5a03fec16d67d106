"""How fast a step is simulated: each schedule at 1,000 stages and 4,096 micro-batches, and against a plain simulator.

The plain one is tests/event_driven.py, which does one operation after another; at the smaller size both are run, and
have to agree. Times are of one core.

    python benchmarks/schedule.py --stages 1000 --microbatches 4096
"""

import argparse
import math
import platform
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

from shardwright.sharder.planning.schedules.simulate import StageCost, simulate

SCHEDULES = (("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("zero-bubble", 1))
"""With stages a device."""


def main() -> None:
    """Print a row a schedule."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--stages", type=int, default=1000)
    parser.add_argument("--microbatches", type=int, default=4096)
    parser.add_argument("--plain", default="100x400", help="stages and micro-batches of the comparison with tests/")
    options = parser.parse_args()
    print(f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, {platform.machine()}, Python {platform.python_version()}")
    small = tuple(map(int, options.plain.split("x")))
    print(f"| schedule | transfers | million operations | seconds | bubble | plain/ours at {options.plain} |")
    print("|---|---|---|---|---|---|")
    for schedule, each in SCHEDULES:
        for transfers in ("serial", "overlapped"):
            keywords = {"schedule": schedule, "stages_per_device": each, "transfers": transfers}
            timeline, seconds = timed(simulate, costs(options.stages), options.microbatches, keywords)
            print(
                f"| {schedule} | {transfers} | {timeline.start_s.size / 1e6:.1f} | {seconds:.1f} | "
                f"{100 * timeline.bubble:.1f}% | {against_plain(*small, keywords):.0f} |",
                flush=True,
            )


def costs(stages):
    """Uneven stages, with transfers."""
    return [
        StageCost(
            forward_s=1.0 + 0.3 * math.sin(stage),
            backward_s=2.0 + 0.5 * math.cos(stage),
            send_forward_s=0.1,
            receive_backward_s=0.1,
            backward_input_s=1.0 + 0.3 * math.cos(stage),
            backward_weight_s=1.0 + 0.2 * math.cos(stage),
        )
        for stage in range(stages)
    ]


def timed(simulator, stages, microbatches, keywords):
    """The result, and the seconds of the processor that it took."""
    began = time.process_time()
    result = simulator(stages, microbatches, **keywords)
    return result, time.process_time() - began


def against_plain(stages, microbatches, keywords):
    """How many times longer the plain simulator takes."""
    sys.path.append(str(Path(__file__).parents[1] / "tests"))
    from event_driven import play

    plain, plain_s = timed(play, costs(stages), microbatches, keywords)
    ours, ours_s = timed(simulate, costs(stages), microbatches, keywords)
    assert math.isclose(plain.step_s, ours.step_s)
    return plain_s / ours_s


if __name__ == "__main__":
    main()
