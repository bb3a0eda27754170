"""Searches with surrogates on merge-like losses, and the time they think: `python -m tests.benchmarks.search.surrogates`.

The problems are those that CMA-ES was set up on: sums of quadratics in merge coefficients with interactions between layers
behind a logarithm, one of three experts a stranger to the tasks; 5, 20 and 60 variables. Figures are the best loss over that
of the uniform merge after 30, 100 and 200 evaluations, warm starts among them. Time is that of one proposal where as many
outcomes are known, in seconds of the processor, and of bringing a search back from its log: by asking again, and by
`SurrogateSearch.recall`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from optimizer.algorithms import ALGORITHMS, Algorithm, AlgorithmContext, Outcome
from optimizer.space import SearchSpace, Variable
from optimizer.surrogates.search import SurrogateSearch
from tests.benchmarks.search.common import main

Array = NDArray[np.float64]
Losses = Callable[[Array], Array]

EVALUATIONS = (30, 100, 200)
SURROGATES = ("bayesian", "forest", "map", "trust_region")
PEERS = ("cma_es", "random")
EXPERTS = 5
TASKS = 3


def make_problem(dim: int, seed: int) -> tuple[SearchSpace, Losses, list[Array]]:
    """Return the space, the mean loss over three tasks, and the warm starts."""
    random = np.random.default_rng(seed)
    groups, strangers = dim // EXPERTS, 1
    tasks = []
    for _ in range(TASKS):
        best = random.normal(0.4, 0.2, (groups, EXPERTS))
        best[:, EXPERTS - strangers :] = random.normal(0, 0.05, (groups, strangers))
        mixing = random.normal(size=(dim, dim)) / np.sqrt(dim)
        tasks.append((best.ravel(), np.diag(np.exp(random.normal(0, 0.7, dim))) + 0.5 * mixing @ mixing.T))

    def losses(genome: Array) -> Array:
        distances = [float((genome - best) @ matrix @ (genome - best)) for best, matrix in tasks]
        return np.array([np.mean([-np.log(0.9 * np.exp(-2 * each / dim) + 0.02) for each in distances])])

    space = SearchSpace(tuple(Variable(f"c{number}", -0.5, 1.5) for number in range(dim)))
    alone = [np.tile(row, groups) for row in np.eye(EXPERTS)]
    return space, losses, [np.zeros(dim), *alone, np.full(dim, 1 / EXPERTS)]


def run(quick: bool) -> dict[str, Any]:
    """Measure; see the module."""
    dims, seeds, most = ((5, 20), 2, 60) if quick else ((5, 20, 60), 5, max(EVALUATIONS))
    marks = sorted({min(mark, most) for mark in EVALUATIONS})
    quality = []
    for dim in dims:
        for name in (*SURROGATES, *PEERS):
            curves = [_curve(name, dim, seed, most) for seed in range(seeds)]
            medians = [statistics.median(curve[mark - 1] for curve in curves) for mark in marks]
            quality.append({"variables": dim, "algorithm": name, "median": medians})
    known = (50,) if quick else (100, 500, 1000)
    return {
        "evaluations": marks,
        "seeds": seeds,
        "quality": quality,
        "times": [_time(name, dim, count) for name in SURROGATES for dim in (5, dims[-1]) for count in known],
        "replay": [_replay(name, count) for name in SURROGATES for count in ((40,) if quick else (200, 1000))],
    }


def make(name: str, space: SearchSpace, start: Array, seed: int, budget: int) -> Algorithm:
    """Make an algorithm with its default options."""
    cls = ALGORITHMS[name]
    return cls(AlgorithmContext(space, np.ones(1), seed, start, 1, budget), cls.Options())


def _curve(name: str, dim: int, seed: int, budget: int) -> list[float]:
    """Best loss so far over that of the uniform merge, by evaluations."""
    space, losses, known = make_problem(dim, seed)
    algorithm = make(name, space, known[-1], seed, budget)
    values: list[float] = []
    for point in known:
        values.append(float(losses(point)[0]))
        algorithm.tell(Outcome(len(values) - 1, point, losses(point), own=False))
    uniform = values[-1]
    while len(values) < budget:
        for proposal in algorithm.ask(min(algorithm.batch_size, budget - len(values))):
            values.append(float(losses(proposal.genome)[0]))
            algorithm.tell(Outcome(len(values) - 1, proposal.genome, losses(proposal.genome)))
    return [float(best) / uniform for best in np.minimum.accumulate(values)]


def _time(name: str, dim: int, count: int) -> dict[str, Any]:
    """Time of the proposals that follow ``count`` foreign outcomes, after those that fill the first design."""
    space, losses, known = make_problem(dim, 0)
    random = np.random.default_rng(0)
    algorithm = make(name, space, known[-1], 0, 10 * count)
    for index in range(count):
        point = space.clip(known[-1] + 0.15 * random.standard_normal(dim))
        algorithm.tell(Outcome(index, point, losses(point), own=False))
    seconds = []
    for index in range(count, count + 24):
        began = time.process_time()
        proposal = algorithm.ask(1)[0]
        seconds.append(time.process_time() - began)
        algorithm.tell(Outcome(index, proposal.genome, losses(proposal.genome)))
    later = seconds[2:]
    return {
        "algorithm": name,
        "variables": dim,
        "outcomes": count,
        "mean_ms": 1000 * statistics.mean(later),
        "longest_ms": 1000 * max(later),
    }


def _replay(name: str, count: int) -> dict[str, Any]:
    """Time to bring back a search of 20 variables."""
    space, losses, known = make_problem(20, 0)
    random = np.random.default_rng(0)
    points = [space.clip(known[-1] + 0.15 * random.standard_normal(20)) for _ in range(count)]
    told = [losses(point) for point in points]
    seconds = {}
    for way in ("ask", "recall"):
        algorithm = make(name, space, known[-1], 0, count + 10)
        assert isinstance(algorithm, SurrogateSearch)
        began = time.process_time()
        for index, (point, value) in enumerate(zip(points, told, strict=True)):
            if way == "ask":
                algorithm.ask(1)
            else:
                algorithm.recall([point])
            algorithm.tell(Outcome(index, point, value))
        algorithm.ask(1)
        seconds[way] = time.process_time() - began
    return {"algorithm": name, "evaluations": count, "ask_s": seconds["ask"], "recall_s": seconds["recall"]}


def plot(data: dict[str, Any], figure: Any) -> None:
    """Draw the best loss by evaluations, a panel for each number of variables."""
    dims = sorted({row["variables"] for row in data["quality"]})
    axes = np.atleast_1d(figure.subplots(1, len(dims), sharey=True))
    for axis, dim in zip(axes, dims, strict=True):
        for row in data["quality"]:
            if row["variables"] == dim:
                axis.plot(data["evaluations"], row["median"], marker="o", label=row["algorithm"])
        axis.set(title=f"{dim} variables", xlabel="evaluations")
    axes[0].set_ylabel("best loss / that of the uniform merge")
    axes[-1].legend()


if __name__ == "__main__":
    main("surrogates", run, plot)
