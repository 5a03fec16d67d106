"""What the shortest step is worth beside the least largest load, over devices of unlike speed.

    python benchmarks/steps.py                          # chains, a minute
    python benchmarks/steps.py --units 96 --reach 8     # graphs with branches

A row is of random graphs in training, whose steps are simulated. Printed is the step of the split with the least
largest load over that of the split that the plan takes, in the median and at most; the same of the naive splits; how
many of the plan's are proven to be the shortest, and how far they are above the bound that is proven for all splits,
in the median; and what the search and the bound take, of a processor.
"""

import argparse
import dataclasses
import platform
import random
import statistics
import time
from datetime import UTC, datetime

from planner import chain, problem_of, tangled

from shardwright.sharder.planning.exact.even import NAIVE, naive_split
from shardwright.sharder.planning.exact.search import Stages
from shardwright.sharder.planning.partition import partition
from shardwright.sharder.planning.problem import Problem
from shardwright.sharder.planning.schedules.simulate import simulate
from shardwright.sharder.planning.schedules.stage_costs import rules_of, stage_costs
from shardwright.sharder.planning.schedules.step_bound import step_bound_s
from shardwright.sharder.planning.schedules.step_search import shortest_step

SPEEDS = (1.0, 1.0), (1.0, 1.5), (1.0, 3.0), (1.0, 1.0, 1.0), (1.0, 2.0, 3.0), (1.0, 1.0, 3.0, 3.0), (1.0,) * 8


def step_s(problem: Problem, stages: Stages) -> float:
    """The simulated step, in seconds."""
    return simulate(stage_costs(problem, stages), problem.microbatches, **rules_of(problem, train=True)).step_s


def main() -> None:
    """Print a row for each set of devices and number of micro-batches."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--graphs", type=int, default=20, help="of each row")
    parser.add_argument("--units", type=int, default=24)
    parser.add_argument("--reach", type=int, default=0, help="each unit reads one or two of so many before it")
    parser.add_argument("--time-limit", type=float, default=2.0, help="seconds for the least largest load")
    parser.add_argument("--microbatches", default="2,4,8,16")
    options = parser.parse_args()
    print(
        "| speeds | micro-batches | least largest load | equal count | by parameters | proven | above the bound "
        "| search, bound |"
    )
    print("|---" * 8 + "|")
    for speeds in SPEEDS:
        for count in map(int, options.microbatches.split(",")):
            ratios: dict[str, list[float]] = {"least largest load": [], **{name: [] for name in NAIVE}}
            searches_s, bounds_s, above, proven = [], [], [], 0
            for seed in range(options.graphs):
                reach = options.reach
                graph = tangled(options.units, reach, random.Random(seed)) if reach else chain(options.units)
                problem = dataclasses.replace(problem_of(graph, speeds, seed), microbatches=count)
                least = partition(problem, time_limit_s=options.time_limit)
                assert least is not None
                start = time.process_time()
                found = shortest_step(problem, least.stages, train=True)
                searches_s.append(time.process_time() - start)
                proven += found.proven
                start = time.process_time()
                bound_s = step_bound_s(problem) or 0.0
                bounds_s.append(time.process_time() - start)
                shortest_s = step_s(problem, found.stages)
                above.append(shortest_s / bound_s if bound_s else float("nan"))
                ratios["least largest load"].append(step_s(problem, least.stages) / shortest_s)
                for name, weight in NAIVE.items():
                    ratios[name].append(step_s(problem, naive_split(problem, weight)) / shortest_s)
            cells = [f"{statistics.median(each):.3f}, {max(each):.3f}" for each in ratios.values()]
            print(
                f"| {', '.join(f'{speed:g}' for speed in speeds)} | {count} | {' | '.join(cells)} "
                f"| {proven} of {options.graphs} | {statistics.median(above):.3f} "
                f"| {1e3 * statistics.median(searches_s):.0f} ms, {1e3 * statistics.median(bounds_s):.0f} ms |",
                flush=True,
            )
    print(f"Python {platform.python_version()}, {datetime.now(UTC):%Y-%m-%d}")


if __name__ == "__main__":
    main()
