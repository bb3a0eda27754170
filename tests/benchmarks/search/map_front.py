"""MAP's front against a dense grid of merges of 2 and 3 real experts: `python -m tests.benchmarks.search.map_front`.

The experts are small networks fine-tuned on groups of the digits from a common base, merged by one coefficient each; an
objective is the cross-entropy on a group's search items. Shown is the share of the grid's hypervolume that a search reaches
for each number of evaluations, warm starts (base, experts, uniform) among them, beside Bayesian optimisation, NSGA-II and
random search. The reference point is twice the base's loss in each objective: merges that ruin a task do not count.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits

from optimizer.algorithms import ALGORITHMS, AlgorithmContext, Outcome
from optimizer.pareto import front_mask, hypervolume
from optimizer.space import SearchSpace, Variable
from optimizer.surrogates.quadratic import Quadratic, choose_link
from tests.benchmarks.search.common import main

Array = NDArray[np.float64]

BUDGETS = (6, 10, 20, 30, 50, 100)
ALGORITHM_NAMES = ("map", "bayesian", "nsga2", "random")
GROUPS = {2: ((0, 1, 2, 3, 4), (5, 6, 7, 8, 9)), 3: ((0, 1, 2, 3), (4, 5, 6), (7, 8, 9))}
LOW, HIGH = -0.5, 1.5
HIDDEN = 48


@dataclass(frozen=True)
class Merges:
    """Merges of experts by one coefficient each.

    Attributes:
        base: shape (parameters,).
        vectors: shape (experts, parameters), the task vectors.
        items: for each group its inputs, shape (items, 64), and labels.
    """

    base: Array
    vectors: Array
    items: list[tuple[Array, NDArray[np.int64]]]

    @property
    def space(self) -> SearchSpace:
        """A coefficient for each expert."""
        return SearchSpace(tuple(Variable(f"expert {k}", LOW, HIGH) for k in range(len(self.vectors))))

    def losses(self, coefficients: Array) -> Array:
        """Return the cross-entropy on each group, shape (groups,)."""
        weights = self.base + coefficients @ self.vectors
        return np.array([_entropy(_logits(weights, x), y) for x, y in self.items])


def make_merges(experts: int, seed: int = 0) -> Merges:
    """Train base and experts; takes a few seconds."""
    random = np.random.default_rng(seed)
    x, y = load_digits(return_X_y=True)
    x = x / 16.0
    order = random.permutation(len(x))
    train, search = order[: len(x) // 2], order[len(x) // 2 :]
    parameters = 64 * HIDDEN + HIDDEN + HIDDEN * 10 + 10
    begin = random.normal(0, 0.1, parameters)
    base = _train(begin, x[train[:200]], y[train[:200]], 60, 3e-3)
    vectors, items = [], []
    for group in GROUPS[experts]:
        chosen = train[np.isin(y[train], group)]
        vectors.append(_train(base, x[chosen], y[chosen], 30, 1e-3) - base)
        held = search[np.isin(y[search], group)]
        items.append((x[held], y[held]))
    return Merges(base, np.array(vectors), items)


def run(quick: bool) -> dict[str, Any]:
    """Measure; see the module."""
    budgets = BUDGETS[:4] if quick else BUDGETS
    out: dict[str, Any] = {"budgets": list(budgets), "algorithms": list(ALGORITHM_NAMES), "problems": []}
    for experts in (2, 3):
        merges = make_merges(experts)
        side = {True: {2: 21, 3: 11}, False: {2: 101, 3: 31}}[quick][experts]
        out["problems"].append(_measure(merges, side, 2 if quick else 10, budgets))
    return out


def _measure(merges: Merges, side: int, seeds: int, budgets: Sequence[int]) -> dict[str, Any]:
    began = time.perf_counter()
    axis = np.linspace(LOW, HIGH, side)
    grid = np.array([merges.losses(np.array(point)) for point in product(axis, repeat=len(merges.vectors))])
    each = (time.perf_counter() - began) / len(grid)
    front = grid[front_mask(grid)]
    reference = 2 * merges.losses(np.zeros(len(merges.vectors)))
    whole = hypervolume(front, reference)
    reached: dict[str, dict[str, list[float]]] = {}
    asked: dict[str, float] = {}
    for name in ALGORITHM_NAMES:
        shares, seconds = [], 0.0
        for seed in range(seeds):
            losses, spent = search(merges, name, seed, max(budgets))
            seconds += spent
            shares.append([hypervolume(losses[:n], reference) / whole for n in budgets])
        reached[name] = {
            "median": [statistics.median(column) for column in zip(*shares, strict=True)],
            "worst": [min(column) for column in zip(*shares, strict=True)],
        }
        asked[name] = 1000 * seconds / (seeds * max(budgets))
    return {
        "experts": len(merges.vectors),
        "grid": len(grid),
        "grid_front": len(front),
        "ms_per_evaluation": 1000 * each,
        "seeds": seeds,
        "reached": reached,
        "ms_per_proposal": asked,
        "r2": _fits(merges),
    }


def warm_starts(experts: int) -> list[Array]:
    """Base, experts, uniform merge."""
    return [np.zeros(experts), *np.eye(experts), np.full(experts, 1 / experts)]


def search(merges: Merges, name: str, seed: int, budget: int) -> tuple[Array, float]:
    """Run an algorithm; return all losses, shape (budget, groups), and the seconds it took to propose."""
    space, known = merges.space, warm_starts(len(merges.vectors))
    context = AlgorithmContext(space, np.ones(len(merges.items)), seed, known[-1], 1, budget)
    cls = ALGORITHMS[name]
    algorithm = cls(context, cls.Options())
    losses: list[Array] = []
    for point in known:
        losses.append(merges.losses(point))
        algorithm.tell(Outcome(len(losses) - 1, point, losses[-1], own=False))
    seconds = 0.0
    while len(losses) < budget:
        began = time.perf_counter()
        proposals = algorithm.ask(min(algorithm.batch_size, budget - len(losses)))
        seconds += time.perf_counter() - began
        for proposal in proposals:
            losses.append(merges.losses(proposal.genome))
            algorithm.tell(Outcome(len(losses) - 1, proposal.genome, losses[-1]))
    return np.array(losses), seconds


def _fits(merges: Merges) -> list[dict[str, float]]:
    """How well the quadratics predict merges they were not fitted to, by the number of samples in [0, 1]."""
    random = np.random.default_rng(1)
    experts = len(merges.vectors)
    unseen = random.random((300, experts))
    truth = np.array([merges.losses(point) for point in unseen])
    rows = []
    for count in BUDGETS:
        points = random.random((count, experts))
        losses = np.array([merges.losses(point) for point in points])
        fits = [Quadratic(2 * points - 1, y, choose_link(y, "auto"), np.ones(count)) for y in losses.T]
        predicted = np.column_stack([fit.predict(2 * unseen - 1) for fit in fits])
        error = ((predicted - truth) ** 2).mean(axis=0) / truth.var(axis=0)
        rows.append({"samples": count, "r2": float(1 - error.max()), "left_out_r2": min(fit.r2 for fit in fits)})
    return rows


# --- the networks ---------------------------------------------------------------------------------------------------


def _parts(weights: Array) -> tuple[Array, Array, Array, Array]:
    a, b, c = 64 * HIDDEN, 64 * HIDDEN + HIDDEN, 64 * HIDDEN + HIDDEN + HIDDEN * 10
    return weights[:a].reshape(64, HIDDEN), weights[a:b], weights[b:c].reshape(HIDDEN, 10), weights[c:]


def _logits(weights: Array, x: Array) -> Array:
    first, bias, second, last = _parts(weights)
    return np.asarray(np.maximum(x @ first + bias, 0.0) @ second + last, dtype=np.float64)


def _entropy(logits: Array, y: NDArray[np.int64]) -> float:
    shifted = logits - logits.max(axis=1, keepdims=True)
    return float((np.log(np.exp(shifted).sum(axis=1)) - shifted[np.arange(len(y)), y]).mean())


def _train(weights: Array, x: Array, y: NDArray[np.int64], steps: int, lr: float) -> Array:
    """Full-batch Adam."""
    weights = weights.copy()
    mean, square = np.zeros_like(weights), np.zeros_like(weights)
    for step in range(1, steps + 1):
        gradient = _gradient(weights, x, y)
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.999 * square + 0.001 * gradient**2
        weights -= lr * (mean / (1 - 0.9**step)) / (np.sqrt(square / (1 - 0.999**step)) + 1e-8)
    return weights


def _gradient(weights: Array, x: Array, y: NDArray[np.int64]) -> Array:
    first, bias, second, last = _parts(weights)
    hidden = np.maximum(x @ first + bias, 0.0)
    logits = hidden @ second + last
    share = np.exp(logits - logits.max(axis=1, keepdims=True))
    share /= share.sum(axis=1, keepdims=True)
    share[np.arange(len(y)), y] -= 1
    share /= len(y)
    back = (share @ second.T) * (hidden > 0)
    return np.concatenate([(x.T @ back).ravel(), back.sum(axis=0), (hidden.T @ share).ravel(), share.sum(axis=0)])


def plot(data: dict[str, Any], figure: Any) -> None:
    """Draw the share of the grid's hypervolume by evaluations."""
    axes: Sequence[Any] = figure.subplots(1, len(data["problems"]), sharey=True)
    for axis, problem in zip(axes, data["problems"], strict=True):
        for name in data["algorithms"]:
            axis.plot(data["budgets"], problem["reached"][name]["median"], marker="o", label=name)
        axis.set(title=f"{problem['experts']} experts", xlabel="evaluations", xscale="log")
        axis.axhline(1.0, color="grey", linewidth=0.5)
    axes[0].set_ylabel("hypervolume / the grid's")
    axes[0].legend()


if __name__ == "__main__":
    main("map_front", run, plot)
