"""Other packages' searches, run on the same box and the same evaluations as their users run them.

- ``pycma``: `cma.CMAEvolutionStrategy` from the uniform merge with σ0 = 1/6, as mergekit-evolve does; no restarts.
- ``ngopt``: nevergrad's default NGOpt from the uniform merge.
- ``pymoo``: pymoo's NSGA-II with its default population of 100; ``pymoo-20`` with one of 20, fairer to small budgets.

They get no warm starts: neither the base nor the experts alone count among their evaluations.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from optimizer.space import Genome
from tests.benchmarks.search.bench import Bench, Run, finish

Vector = NDArray[np.float64]
Objective = Callable[[Genome], Vector]


class Spent(Exception):
    """The budget is spent."""


class Counted:
    """The objectives as a function of the genome that records what it returns and raises `Spent` after the budget."""

    def __init__(self, bench: Bench, budget: int) -> None:
        self.run = Run(variables=bench.space.dim)
        self.genomes: list[Genome] = []
        self.seconds = 0.0  # spent in here, less than the evaluations' own where they were known
        self._bench = bench
        self._budget = budget

    def __call__(self, genome: Genome) -> Vector:
        """Return the losses, shape (objectives,); infinite ones for a failed candidate."""
        if len(self.genomes) == self._budget:
            raise Spent
        began = time.perf_counter()
        inside = self._bench.space.clip(np.asarray(genome, dtype=np.float64))
        losses, seconds = self._bench.losses(self._bench.space.recipe(inside))
        self.genomes.append(inside)
        self.run.losses.append(None if losses is None else losses.tolist())
        self.run.evaluating += seconds
        self.seconds += time.perf_counter() - began
        return np.full(len(self._bench.weights), np.inf) if losses is None else losses


def run_peer(name: str, bench: Bench, seed: int, budget: int) -> Run:
    """Run a peer on a problem."""
    counted = Counted(bench, budget)
    began = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they warn of one another's deprecations
        try:
            PEERS[name](counted, bench, seed, budget)
        except Spent:
            pass
        else:
            counted.run.stopped = "it converged" if len(counted.genomes) < budget else None
    counted.run.proposing = time.perf_counter() - began - counted.seconds
    finish(counted.run, bench.weights)
    if counted.run.best is not None:
        counted.run.test = bench.test_losses(bench.space.recipe(counted.genomes[counted.run.best]))
    return counted.run


def _pycma(counted: Counted, bench: Bench, seed: int, budget: int) -> None:
    import cma

    space = bench.space
    options = {"bounds": [space.low.tolist(), space.high.tolist()], "seed": seed + 1, "verbose": -9}
    strategy = cma.CMAEvolutionStrategy(space.uniform(), 1 / 6, {**options, "maxfevals": budget})
    while not strategy.stop():
        genomes = strategy.ask()
        strategy.tell(genomes, [float(counted(genome) @ bench.weights) for genome in genomes])


def _ngopt(counted: Counted, bench: Bench, seed: int, budget: int) -> None:
    import nevergrad as ng

    space = bench.space
    np.random.seed(seed)  # NGOpt draws from the global generator too
    box = ng.p.Array(init=space.uniform(), lower=space.low, upper=space.high)
    box.random_state.seed(seed)
    ng.optimizers.NGOpt(parametrization=box, budget=budget).minimize(
        lambda genome: float(counted(genome) @ bench.weights)
    )


def _pymoo(population: int) -> Callable[[Counted, Bench, int, int], None]:
    def run(counted: Counted, bench: Bench, seed: int, budget: int) -> None:
        elementwise: Any = import_module("pymoo.core.problem").ElementwiseProblem
        nsga2: Any = import_module("pymoo.algorithms.moo.nsga2").NSGA2
        minimize: Any = import_module("pymoo.optimize").minimize

        class Merging(elementwise):  # type: ignore[misc]
            def _evaluate(self, x: Genome, out: dict[str, Any], *args: Any, **kwargs: Any) -> None:
                out["F"] = counted(x)

        space = bench.space
        merging = Merging(n_var=space.dim, n_obj=len(bench.weights), xl=space.low, xu=space.high)
        minimize(merging, nsga2(pop_size=population), ("n_eval", budget), seed=seed + 1)

    return run


PEERS: dict[str, Callable[[Counted, Bench, int, int], None]] = {
    "pycma": _pycma,
    "ngopt": _ngopt,
    "pymoo": _pymoo(100),
    "pymoo-20": _pymoo(20),
}
