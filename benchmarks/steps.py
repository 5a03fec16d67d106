"""What the shortest step is worth beside the least largest load: splits of chains over devices of unlike speed.

    python benchmarks/steps.py            # a minute

A row is of random chains in training, with few micro-batches, whose steps are simulated. Printed is the step of the
split with the least largest load over that of the split that the plan takes, in the median and at most, and how many
of the latter are proven to be the shortest; the same of the naive splits; and what the search takes, of a processor.
"""

import argparse
import dataclasses
import platform
import statistics
import time
from datetime import UTC, datetime

from planner import chain, problem_of

from shardwright.sharder.planning.even import NAIVE, naive_split
from shardwright.sharder.planning.partition import partition
from shardwright.sharder.planning.problem import Problem
from shardwright.sharder.planning.search import Stages
from shardwright.sharder.planning.simulate import simulate
from shardwright.sharder.planning.stage_costs import rules_of, stage_costs
from shardwright.sharder.planning.step_search import shortest_step

SPEEDS = (1.0, 1.0), (1.0, 1.5), (1.0, 3.0), (1.0, 1.0, 1.0), (1.0, 2.0, 3.0), (1.0, 1.0, 3.0, 3.0), (1.0,) * 8


def step_s(problem: Problem, stages: Stages) -> float:
    """The simulated step, in seconds."""
    return simulate(stage_costs(problem, stages), problem.microbatches, **rules_of(problem, train=True)).step_s


def main() -> None:
    """Print a row for each set of devices and number of micro-batches."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--chains", type=int, default=20, help="of each row")
    parser.add_argument("--units", type=int, default=24)
    parser.add_argument("--microbatches", default="2,4,8,16")
    options = parser.parse_args()
    print("| speeds | micro-batches | least largest load | equal count | by parameters | proven | search |")
    print("|---" * 7 + "|")
    for speeds in SPEEDS:
        for count in map(int, options.microbatches.split(",")):
            ratios: dict[str, list[float]] = {"least largest load": [], **{name: [] for name in NAIVE}}
            seconds, proven = [], 0
            for seed in range(options.chains):
                drawn = problem_of(chain(options.units), speeds, seed)
                problem = dataclasses.replace(drawn, microbatches=count)
                least = partition(problem)
                assert least is not None
                start = time.process_time()
                found = shortest_step(problem, least.stages, train=True)
                seconds.append(time.process_time() - start)
                proven += found.proven
                shortest_s = step_s(problem, found.stages)
                ratios["least largest load"].append(step_s(problem, least.stages) / shortest_s)
                for name, weight in NAIVE.items():
                    ratios[name].append(step_s(problem, naive_split(problem, weight)) / shortest_s)
            cells = [f"{statistics.median(each):.3f}, {max(each):.3f}" for each in ratios.values()]
            print(
                f"| {', '.join(f'{speed:g}' for speed in speeds)} | {count} | {' | '.join(cells)} "
                f"| {proven} of {options.chains} | {1e3 * statistics.median(seconds):.0f} ms |",
                flush=True,
            )
    print(f"Python {platform.python_version()}, {datetime.now(UTC):%Y-%m-%d}")


if __name__ == "__main__":
    main()
