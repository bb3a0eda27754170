"""Hypervolume after few evaluations: every multi-objective algorithm here beside pymoo's, on test functions and merges.

`python -m tests.benchmarks.search.multi_objective`; without pymoo (an extra) only our own run. Problems:

- ZDT1, ZDT2 and ZDT3 (Zitzler, Deb and Thiele 2000) in 20 variables, DTLZ2 (Deb et al. 2002) with 3 objectives in 12.
- merge-2 to merge-4: an objective for each of 2 to 4 experts, two strangers to them beside. The loss of objective k is a
  quadratic in the coefficients (experts × 6 layers) with its minimum near expert k alone and interactions between layers
  and experts; the experts, the base and the uniform merge are known before, as in every job.
- digits: three experts of a 64-32-10 network on scikit-learn's handwritten digits, a coefficient for each of its four
  tensors and each expert; the losses are the cross-entropies on the three groups of digits.

The reference point is what the starts of a job reach: the worst loss of each objective over the known candidates (for the
test functions fixed, where random points lie). Volumes are shares of the box between it and a point that no candidate
beats, over all candidates evaluated, as a job's front is.

pymoo's algorithms run as they come (100 individuals, or the nearest number of reference points, random at first); with 20,
which suits so few evaluations better; and with 20 of which the known candidates are the first ("20 known"). Only this last
one starts from what ours start from, so on merges it is the comparison of the algorithms; the others show what starts and
populations do. Our defaults were chosen on these very problems, with seeds 0 to 2 (`HELD_OUT` has others: merges drawn anew
and ZDT6 and DTLZ7, with seeds that nothing was chosen on), pymoo's were not.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from optimizer.algorithms import ALGORITHMS, AlgorithmContext
from optimizer.pareto import hypervolume
from optimizer.space import Genome, SearchSpace
from tests.benchmarks.search.common import main
from tests.optimizer.algorithms.driving import Case, clean, drive, outcomes_of, reals

Losses = NDArray[np.float64]

BUDGETS = (100, 300, 1000)
SEEDS = range(5)
HELD_OUT = range(10, 15)
PARALLEL = 4
OURS = ("random", "nsga2", "nsga3", "moead", "mo_cma_es")
THEIRS = ("NSGA2", "NSGA3", "MOEAD")
THEIR_STARTS = ("100", "20", "20 known")
PEER = importlib.util.find_spec("pymoo") is not None
NO_PEER = "pymoo is not installed, so nothing is compared with it: pip install pymoo==0.6.2"


@dataclass(frozen=True)
class Problem:
    """Losses on a box.

    Attributes:
        losses: from a genome to shape (objectives,).
        start: where searches begin.
        known: candidates evaluated before the search, as a job's warm starts are.
        ideal, reference: corners of the box in which volume is measured, shape (objectives,).
    """

    name: str
    space: SearchSpace
    losses: Callable[[Genome], Losses]
    start: Genome
    known: tuple[Genome, ...]
    ideal: Losses
    reference: Losses

    def volume(self, losses: Losses) -> float:
        """Return the share of the box that ``losses``, shape (n, objectives), dominate."""
        return hypervolume(losses, self.reference) / float(np.prod(self.reference - self.ideal))


def problems(quick: bool) -> list[Problem]:
    """Return the problems that defaults were chosen on; two of them for a quick run."""
    if quick:
        return [_function("zdt1", 10), _merge(2)]
    functions = [_function(name, 20) for name in ("zdt1", "zdt2", "zdt3")]
    return [*functions, _function("dtlz2", 12), _merge(2), _merge(3), _merge(4), _digits()]


def held_out() -> list[Problem]:
    """Return problems that nothing was chosen on."""
    return [_function("zdt6", 10), _function("dtlz7", 10), *(_merge(tasks, draw=100) for tasks in (2, 3, 4))]


# --- test functions -----------------------------------------------------------------------------------------------------


def _function(name: str, dim: int) -> Problem:
    losses, ideal, reference = {
        "zdt1": (_zdt1, [0.0, 0.0], [1.1, 4.0]),
        "zdt2": (_zdt2, [0.0, 0.0], [1.1, 4.0]),
        "zdt3": (_zdt3, [0.0, -0.78], [1.1, 4.0]),
        "zdt6": (_zdt6, [0.28, 0.0], [1.1, 9.0]),
        "dtlz7": (_dtlz7, [0.0, 0.0, 2.6], [1.0, 1.0, 25.0]),
        "dtlz2": (_dtlz2, [0.0, 0.0, 0.0], [1.5, 1.5, 1.5]),
    }[name]
    space = reals(dim, 0.0, 1.0)
    start = np.full(dim, 0.5)
    return Problem(name, space, losses, start, (), np.array(ideal), np.array(reference))


def _zdt1(genome: Genome) -> Losses:
    g = 1 + 9 * genome[1:].mean()
    return np.array([genome[0], g * (1 - np.sqrt(genome[0] / g))])


def _zdt2(genome: Genome) -> Losses:
    g = 1 + 9 * genome[1:].mean()
    return np.array([genome[0], g * (1 - (genome[0] / g) ** 2)])


def _zdt3(genome: Genome) -> Losses:
    g = 1 + 9 * genome[1:].mean()
    ratio = genome[0] / g
    return np.array([genome[0], g * (1 - np.sqrt(ratio) - ratio * np.sin(10 * np.pi * genome[0]))])


def _dtlz2(genome: Genome) -> Losses:
    radius = 1 + np.square(genome[2:] - 0.5).sum()
    a, b = genome[:2] * np.pi / 2
    return float(radius) * np.array([np.cos(a) * np.cos(b), np.cos(a) * np.sin(b), np.sin(a)])


def _zdt6(genome: Genome) -> Losses:
    first = 1 - np.exp(-4 * genome[0]) * np.sin(6 * np.pi * genome[0]) ** 6
    g = 1 + 9 * genome[1:].mean() ** 0.25
    return np.array([first, g * (1 - (first / g) ** 2)])


def _dtlz7(genome: Genome) -> Losses:
    g, two = 1 + 9 * genome[2:].mean(), genome[:2]
    return np.array([*two, (1 + g) * (3 - (two / (1 + g) * (1 + np.sin(3 * np.pi * two))).sum())])


# --- merges -------------------------------------------------------------------------------------------------------------

_LAYERS = 6
_STRANGERS = 2
_MIXED = 0.5


def _merge(tasks: int, draw: int = 0) -> Problem:
    experts = tasks + _STRANGERS
    dim = experts * _LAYERS
    random = np.random.default_rng(tasks + draw)
    optima, shapes = [], []
    for task in range(tasks):
        optimum = np.zeros((_LAYERS, experts))
        optimum[:, task] = 1.0
        optima.append((optimum + 0.15 * random.standard_normal(optimum.shape)).ravel())
        scales = 10 ** random.uniform(-1, 0.5, dim)
        mixing = random.standard_normal((dim, dim)) / np.sqrt(dim)
        shapes.append(np.diag(scales) + _MIXED * mixing @ mixing.T)

    def losses(genome: Genome) -> Losses:
        steps = [genome - optimum for optimum in optima]
        return np.array([0.1 + step @ shape @ step / dim for step, shape in zip(steps, shapes, strict=True)])

    alone = [np.tile(row, _LAYERS) for row in np.eye(experts)]
    return _of_merges(f"merge-{tasks}", dim, losses, alone, np.full(tasks, 0.1))


def _of_merges(name: str, dim: int, losses: Callable[[Genome], Losses], alone: list[Genome], ideal: Losses) -> Problem:
    """A problem whose known candidates are the experts ``alone``, the base and the uniform merge."""
    uniform = np.full(dim, 1 / len(alone))
    known = (*alone, np.zeros(dim), uniform)
    reference = np.max([losses(genome) for genome in known], axis=0)
    return Problem(name, reals(dim, -0.25, 1.25), losses, uniform, known, ideal, reference)


_GROUPS = ((0, 1, 2, 3), (4, 5, 6), (7, 8, 9))
_HIDDEN = 32
_TRAIN = 1200


def _digits() -> Problem:
    images, labels = _scans()
    random = np.random.default_rng(0)
    base = [
        random.standard_normal((64, _HIDDEN)) / 8,
        np.zeros(_HIDDEN),
        random.standard_normal((_HIDDEN, 10)) / 6,
        np.zeros(10),
    ]
    first, rest = (images[:400], labels[:400]), (images[:_TRAIN], labels[:_TRAIN])
    base = _train(base, *first, steps=150)
    search = images[_TRAIN:], labels[_TRAIN:]
    vectors = []
    for group in _GROUPS:
        mine = np.isin(rest[1], group) | (random.random(_TRAIN) < 0.2)
        expert = _train(base, rest[0][mine], rest[1][mine], steps=100)
        vectors.append([tensor - start for tensor, start in zip(expert, base, strict=True)])

    def losses(genome: Genome) -> Losses:
        table = genome.reshape(4, len(_GROUPS))
        merged = [
            start + sum(c * vector[k] for c, vector in zip(table[k], vectors, strict=True))
            for k, start in enumerate(base)
        ]
        each = _cross_entropy(merged, *search)
        return np.array([each[np.isin(search[1], group)].mean() for group in _GROUPS])

    alone = [np.tile(row, 4) for row in np.eye(len(_GROUPS))]
    return _of_merges("digits", 4 * len(_GROUPS), losses, alone, np.zeros(len(_GROUPS)))


@cache
def _scans() -> tuple[Losses, NDArray[np.int64]]:
    from sklearn.datasets import load_digits

    found = load_digits()
    order = np.random.default_rng(0).permutation(len(found.target))
    return found.data[order] / 16, found.target[order]


def _forward(tensors: list[Losses], images: Losses) -> tuple[Losses, Losses]:
    hidden = np.maximum(images @ tensors[0] + tensors[1], 0.0)
    logits = hidden @ tensors[2] + tensors[3]
    logits = logits - logits.max(axis=1, keepdims=True)
    return hidden, logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def _cross_entropy(tensors: list[Losses], images: Losses, labels: NDArray[np.int64]) -> Losses:
    return np.asarray(-_forward(tensors, images)[1][np.arange(len(labels)), labels])


def _train(
    tensors: list[Losses], images: Losses, labels: NDArray[np.int64], steps: int, rate: float = 0.01
) -> list[Losses]:
    """Full-batch Adam on the cross-entropy."""
    tensors = [tensor.copy() for tensor in tensors]
    first, second = [np.zeros_like(t) for t in tensors], [np.zeros_like(t) for t in tensors]
    for step in range(1, steps + 1):
        hidden, log_probabilities = _forward(tensors, images)
        error = (np.exp(log_probabilities) - np.eye(10)[labels]) / len(labels)
        back = (error @ tensors[2].T) * (hidden > 0)
        gradients = [images.T @ back, back.sum(axis=0), hidden.T @ error, error.sum(axis=0)]
        for k, gradient in enumerate(gradients):
            first[k] = 0.9 * first[k] + 0.1 * gradient
            second[k] = 0.999 * second[k] + 0.001 * gradient**2
            scale = rate * np.sqrt(1 - 0.999**step) / (1 - 0.9**step)
            tensors[k] -= scale * first[k] / (np.sqrt(second[k]) + 1e-8)
    return tensors


# --- runs ---------------------------------------------------------------------------------------------------------------


def run_ours(case: Case, problem: Problem, budget: int, seed: int) -> float:
    """Return the volume after ``budget`` evaluations, those of known candidates counted."""
    own = budget - len(problem.known)
    weights = np.ones(len(problem.ideal))
    context = AlgorithmContext(problem.space, weights, seed, problem.start, PARALLEL, own)
    log = drive(case.make(context), clean(problem.losses), own, foreign=problem.known)
    return problem.volume(np.array([outcome.losses for outcome in outcomes_of(log)]))


def run_theirs(name: str, population: int, problem: Problem, budget: int, seed: int, *, known: bool) -> float:
    """Return the volume of an algorithm of pymoo after ``budget`` evaluations; ``known`` candidates are its first."""
    from pymoo.core.problem import Problem as PymooProblem
    from pymoo.optimize import minimize

    seen: list[Losses] = []

    class Theirs(PymooProblem):  # type: ignore[misc]
        def _evaluate(self, x: Losses, out: dict[str, Any], *args: object, **kwargs: object) -> None:
            rows = [problem.losses(row) for row in np.atleast_2d(x)]
            seen.extend(rows)
            out["F"] = np.array(rows)

    low, high = problem.space.low, problem.space.high
    theirs = Theirs(n_var=len(low), n_obj=len(problem.ideal), xl=low, xu=high)
    algorithm = _theirs(name, population, len(problem.ideal))
    if known:
        points = low + np.random.default_rng(seed).random((algorithm.pop_size, len(low))) * (high - low)
        first = problem.known[: len(points)]
        points[: len(first)] = np.reshape(first, (-1, len(low)))
        algorithm.initialization.sampling = points
    minimize(theirs, algorithm, ("n_eval", budget), seed=seed, verbose=False)
    return problem.volume(np.array(seen[:budget]))


def _theirs(name: str, population: int, objectives: int) -> Any:
    from pymoo.algorithms.moo.moead import MOEAD
    from pymoo.algorithms.moo.nsga2 import NSGA2
    from pymoo.algorithms.moo.nsga3 import NSGA3

    from optimizer.reference_points import spread_points

    if name == "NSGA2":
        return NSGA2(pop_size=population)
    points = spread_points(objectives, population)
    return NSGA3(points) if name == "NSGA3" else MOEAD(points, n_neighbors=min(20, len(points)))


def run(quick: bool) -> dict[str, Any]:
    """Run every algorithm on every problem with every budget and seed; return the volumes."""
    budgets, seeds = ((60,), range(2)) if quick else (BUDGETS, SEEDS)
    names = [*OURS, *(f"pymoo {name} {starts}" for name in THEIRS for starts in THEIR_STARTS if PEER)]
    found = _volumes(problems(quick), names, budgets, seeds)
    return {
        "budgets": list(budgets),
        "seeds": list(seeds),
        "parallel": PARALLEL,
        "options": {name: ALGORITHMS[name].Options().model_dump() for name in OURS},
        "peer": f"pymoo {importlib.metadata.version('pymoo')}" if PEER else NO_PEER,
        "volumes": found,
        "medians": _medians(found),
        "held out": {} if quick else _held_out(names),
    }


def _held_out(names: list[str]) -> dict[str, Any]:
    """Volumes and their medians on problems and seeds that nothing was chosen on."""
    found = _volumes(held_out(), names, BUDGETS, HELD_OUT)
    return {"seeds": list(HELD_OUT), "volumes": found, "medians": _medians(found)}


def _volumes(
    measured: list[Problem], names: list[str], budgets: Sequence[int], seeds: Sequence[int]
) -> dict[str, dict[str, dict[str, list[float]]]]:
    """By problem, algorithm and budget, the volumes of all seeds."""
    return {
        problem.name: {
            name: {
                str(budget): [round(_volume(name, problem, budget, seed), 5) for seed in seeds] for budget in budgets
            }
            for name in names
        }
        for problem in measured
    }


def _volume(name: str, problem: Problem, budget: int, seed: int) -> float:
    if not name.startswith("pymoo"):
        return run_ours(Case(name), problem, budget, seed)
    _, algorithm, population, *known = name.split()
    return run_theirs(algorithm, int(population), problem, budget, seed, known=bool(known))


def _medians(found: dict[str, dict[str, dict[str, list[float]]]]) -> dict[str, dict[str, float]]:
    """By algorithm and budget, the mean over the problems of the medians over the seeds."""
    by_problem = list(found.values())
    return {
        name: {
            budget: round(float(np.mean([np.median(rows[name][budget]) for rows in by_problem])), 4)
            for budget in by_problem[0][name]
        }
        for name in by_problem[0]
    }


def plot(measured: dict[str, Any], figure: Any) -> None:
    """Draw the median volume against the budget, problem by problem."""
    rows = measured["volumes"]
    columns = min(4, len(rows))
    axes = figure.subplots(-(-len(rows) // columns), columns, squeeze=False, sharex=True)
    for axis, (problem, by_name) in zip(axes.flat, rows.items(), strict=False):
        for name, by_budget in by_name.items():
            medians = [float(np.median(volumes)) for volumes in by_budget.values()]
            style = ":" if name.startswith("pymoo") else "-"
            axis.plot([int(budget) for budget in by_budget], medians, style, marker=".", label=name)
        axis.set_title(problem)
        axis.set_xscale("log")
    figure.supxlabel("evaluations")
    figure.supylabel("hypervolume, share of the box")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize="x-small")


if __name__ == "__main__":
    main("multi_objective", run, plot)
