"""OR-tools' CP-SAT, which comes with an extra: whether it is here, and a run of it that Ctrl-C and the clock end."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any

from shardwright.sharder.planning.clock import Budget, pass_second

if TYPE_CHECKING:
    from ortools.sat.python import cp_model

__all__ = ["EXACT", "EXTRA", "has_ortools", "run_solver"]

EXTRA = "pip install 'shardwright[cp]'"
"""What brings OR-tools."""

LOOK_AGAIN_S = 0.1
"""How long it is waited for the solver before signals are looked at: one that comes just before would not wake it."""
EXACT = 1e-6
"""A bound that is nearer than this share proves the value: CP-SAT counts in whole numbers."""


def has_ortools() -> bool:
    """Whether OR-tools is here."""
    return importlib.util.find_spec("ortools") is not None


def run_solver(
    model: cp_model.CpModel,
    budget: Budget,
    found: Callable[[Callable[[Any], int]], None],
    *,
    linear: bool = False,
) -> tuple[bool, float] | None:
    """Minimise; ``found`` is called with each solution, as a function from variable to value.

    Args:
        model: what is minimised.
        budget: the time.
        found: called in another thread.
        linear: whether the relaxation has every constraint in it, for models whose fractions are few.

    Returns:
        Whether the optimum was proven, and the best bound; None when there is no solution.
    """
    from ortools.sat.python import cp_model

    class Watch(cp_model.CpSolverSolutionCallback):
        def on_solution_callback(self) -> None:
            found(self.value)

    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    solver.parameters.random_seed = 0
    solver.parameters.linearization_level = 2 if linear else 1
    solver.parameters.max_time_in_seconds = budget.left_s
    # Its own handler of Ctrl-C would leave the system's behind, so that the next Ctrl-C kills the process.
    solver.parameters.catch_sigint_signal = False
    with ThreadPoolExecutor(1) as thread:  # signals reach Python code in the main thread only, which so has to be free
        solving = thread.submit(solver.solve, model, Watch())
        while not solving.done():
            try:
                wait([solving], LOOK_AGAIN_S)
                if budget.spent():  # said again each time, for a search that has not begun does not hear it
                    solver.stop_search()
            except KeyboardInterrupt:
                pass_second()
                budget.stop()
    status = solving.result()
    if status == cp_model.INFEASIBLE:
        return None
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE, cp_model.UNKNOWN):
        raise AssertionError(f"CP-SAT says {solver.status_name(status)}: {model.validate()}")
    return status == cp_model.OPTIMAL, solver.best_objective_bound
