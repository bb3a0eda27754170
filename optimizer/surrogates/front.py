"""The Pareto front of cheap predictions, by evolution: tournaments, blend crossover, mutation, dominance and crowding."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from optimizer.pareto import crowding_distance, nondominated_ranks
from optimizer.surrogates.encoding import Encoding, Units

Matrix = NDArray[np.float64]
Predict = Callable[[Units], Matrix]

_BLEND = 0.3
_EXCHANGE = 0.5


def predicted_front(
    predict: Predict,
    encoding: Encoding,
    low: Units,
    high: Units,
    first: Units,
    random: np.random.Generator,
    *,
    size: int = 60,
    generations: int = 30,
) -> tuple[Units, Matrix]:
    """Return a population, shape (size, dim), that covers the front of the predictions, with these, best first.

    Args:
        predict: from units, shape (n, dim), to losses, shape (n, objectives).
        low, high: shape (dim,), of the box that is searched.
        first: shape (k, dim), what to begin with; random points of the box fill it up.
    """
    missing = max(0, size - len(first))
    units = np.vstack([first, low + (high - low) * random.random((missing, len(low)))])
    units = encoding.repair(np.clip(units, low, high))
    losses = predict(units)
    for _ in range(generations):
        kept = best_of(losses, size)
        units, losses = units[kept], losses[kept]
        children = encoding.repair(np.clip(_children(units, size, encoding.real, random, high - low), low, high))
        units, losses = np.vstack([units, children]), np.vstack([losses, predict(children)])
    kept = best_of(losses, size)
    return units[kept], losses[kept]


def best_of(losses: Matrix, count: int) -> NDArray[np.int64]:
    """Return the places of the best, by front and by crowding within one, best first."""
    ranks, crowding = nondominated_ranks(losses), np.zeros(len(losses))
    for rank in np.unique(ranks):
        members = ranks == rank
        crowding[members] = crowding_distance(losses[members])
    return np.asarray(np.lexsort((-crowding, ranks))[:count], dtype=np.int64)


def _children(units: Units, count: int, real: NDArray[np.bool_], random: np.random.Generator, width: Units) -> Units:
    """Children of parents from tournaments; the units are ordered from the best on."""
    a, b = (units[random.integers(len(units), size=(2, count)).min(axis=0)] for _ in range(2))
    share = random.uniform(-_BLEND, 1 + _BLEND, (count, 1))
    blended = a + share * (b - a)
    swapped = np.where(random.random(a.shape) < _EXCHANGE, a, b)
    children = np.where(real & (random.random((count, 1)) < 0.5), blended, swapped)
    mutate = random.random(a.shape) < 1 / a.shape[1]
    steps = 10 ** random.uniform(-3, -0.7, (count, 1)) * random.standard_normal(a.shape) * width
    moved = np.where(real, children + steps, random.random(a.shape))
    return np.asarray(np.where(mutate, moved, children), dtype=np.float64)
