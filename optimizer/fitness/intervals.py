"""How far a mean over items can be trusted: bootstrap intervals, and what a search owes to luck with its items."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from optimizer.fitness.aggregate import ItemScores
from optimizer.spec import Direction

DRAWS = 2000
LEVEL = 0.95
_BLOCK = 2**22  # counts drawn at once

Vector = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A value with the interval that it may be expected in.

    Attributes:
        value: the mean over the items.
        low: lower end.
        high: upper end.
        items: number of items; 1 where one number stands for all, of which no error can be told.
    """

    value: float
    low: float
    high: float
    items: int


def bootstrap(scores: ItemScores, seed: Sequence[int], draws: int = DRAWS, level: float = LEVEL) -> Interval:
    """Return the mean over the items with its BCa bootstrap interval.

    Items are drawn with replacement; the ends are percentiles of the drawn means, corrected for bias and for the skew
    that the jackknife finds (Efron 1987, Better Bootstrap Confidence Intervals, JASA 82).

    Args:
        scores: finite, at least one.
        seed: of the draws; the same one gives the same interval.
        draws: number of resamples.
        level: how often the interval should hold the mean over all items that there could be.

    Returns:
        The interval; a single item, or items that are all alike, give one of no width.
    """
    from scipy.stats import norm  # here: commands that only show intervals load no scipy

    values = scores.values.astype(np.float64)
    weights = np.ones_like(values) if scores.weights is None else scores.weights.astype(np.float64)
    mean = scores.mean()
    if np.ptp(values) == 0:
        return Interval(mean, mean, mean, len(values))
    means = np.sort(_drawn(values, weights, np.random.Generator(np.random.PCG64(list(seed))), draws))
    # Half of those that equal the mean count as below it: with few items of 0 or 1 many do.
    below = (np.searchsorted(means, mean, "left") + np.searchsorted(means, mean, "right")) / 2
    bias = float(norm.ppf(np.clip(below / draws, 1 / draws, 1 - 1 / draws)))
    skew = _acceleration(values, weights)
    ends = norm.ppf([(1 - level) / 2, (1 + level) / 2])
    shares = norm.cdf(bias + (bias + ends) / (1 - skew * (bias + ends)))
    low, high = np.quantile(means, shares)
    return Interval(mean, float(low), float(high), len(values))


def _drawn(values: Vector, weights: Vector, random: np.random.Generator, draws: int) -> Vector:
    """The means of so many resamples, shape (draws,)."""
    items = len(values)
    out = []
    for first in range(0, draws, step := max(1, _BLOCK // items)):
        counts = random.multinomial(items, np.full(items, 1 / items), size=min(step, draws - first))
        total = counts @ weights
        # Only items without any weight: such a resample says nothing, and stands for the mean.
        out.append(
            np.where(total > 0, counts @ (weights * values) / np.where(total > 0, total, 1), _mean(values, weights))
        )
    return np.concatenate(out)


def _mean(values: Vector, weights: Vector) -> float:
    return float(np.average(values, weights=weights))


def _acceleration(values: Vector, weights: Vector) -> float:
    """The skew of the mean, from what it would be without each of the items."""
    left = weights.sum() - weights
    if len(values) < 2 or not (left > 0).all():
        return 0.0
    without = ((weights * values).sum() - weights * values) / left
    away = without.mean() - without
    spread = float((away**2).sum())
    return float((away**3).sum() / (6 * spread**1.5)) if spread > 0 else 0.0


def overfitted(search: Interval, test: Interval, direction: Direction) -> bool:
    """Whether a candidate is worse on test items than chance explains.

    The rule: the interval on the test items lies entirely on the worse side of the interval on the search items. Two 95 %
    intervals that do not touch differ beyond chance (at about 0.5 % where they are equally wide). What remains is that the
    search has fitted its items, or that the test items are harder: candidates that no search chose, such as the experts,
    tell the two apart. A single number has no interval, so nothing is beyond chance.
    """
    if min(search.items, test.items) < 2:
        return False
    return test.low > search.high if direction == "minimise" else test.high < search.low
