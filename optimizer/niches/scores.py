"""From outcomes to scores item by item, and the competition for items: fitness and attraction of M2N2."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from optimizer.algorithms.base import Outcome

Matrix = NDArray[np.float64]
Vector = NDArray[np.float64]
Capacity = Literal["auto", "one", "max"]


def item_gains(outcome: Outcome) -> list[Vector]:
    """Return a feasible outcome's scores item by item, more is better; its losses, negated, where there are none."""
    if outcome.gains:
        return [np.asarray(part, dtype=np.float64) for part in outcome.gains]
    return [np.array([-loss]) for loss in outcome.losses] if outcome.losses is not None else []


class ItemScores:
    """The scores of some candidates side by side, as what M2N2 lets them compete for.

    Gains that are all 0 or 1 stay as they are. Others are brought to scores from 0 up, whatever their unit: where an
    objective has negative ones (losses, log-likelihoods), each item's lowest gain among the candidates becomes 0, and then
    all are divided by the objective's mean, over items, of the highest score. An order by the scores of an item is that
    by its gains.

    Args:
        gains: shape (candidates, items): those of all objectives side by side.
        sizes: number of items of each objective.
        weights: of the objectives.
        alpha: strength of the competition; 0 for none.
        capacity: what an item has to give: 1, the highest score (`max`), or 1 for an objective of zeros and ones only and
            the highest score for others (`auto`). Each objective's items have ``weight / items`` times that.

    Attributes:
        scores: shape (candidates, items).
        prices: shape (items,): c_j / z_j^α with z_j = Σ_i S_ij, what a score of 1 earns.
    """

    def __init__(
        self, gains: Matrix, sizes: Sequence[int], weights: Vector, *, alpha: float, capacity: Capacity
    ) -> None:
        parts, capacities, end = [], [], 0
        for size, weight in zip(sizes, weights, strict=True):
            part = gains[:, end : end + size]
            end += size
            binary = bool(((part == 0) | (part == 1)).all())
            part = part if binary else _from_zero(part)
            highest = capacity == "max" or (capacity == "auto" and not binary)
            parts.append(part)
            capacities.append((part.max(axis=0) if highest else np.ones(size)) * (weight / size))
        self.scores: Matrix = parts[0] if len(parts) == 1 else np.hstack(parts)
        capacities_of = np.concatenate(capacities)
        if alpha == 0:
            self.prices: Vector = capacities_of
            return
        total = self.scores.sum(axis=0)
        total[total == 0] = 1.0
        self.prices = capacities_of / (total if alpha == 1 else total**alpha)

    def fitness(self) -> Vector:
        """Return f_i = Σ_j c_j S_ij / z_j^α, shape (candidates,)."""
        return np.asarray(self.scores @ self.prices)

    def attraction(self, number: int) -> Vector:
        """Return g(A, B) = Σ_j c_j max(S_Bj − S_Aj, 0) / z_j^α of A = ``number`` and each B, shape (candidates,)."""
        return np.asarray(np.maximum(self.scores - self.scores[number], 0.0) @ self.prices)


def _from_zero(part: Matrix) -> Matrix:
    if part.min() < 0:
        part = part - part.min(axis=0)
    scale = part.max(axis=0).mean()
    return part / scale if scale > 0 else part


def draw(random: np.random.Generator, weights: Vector) -> int:
    """Draw a place with probabilities in proportion to ``weights``, which are not negative; evenly if all are 0."""
    sums = np.cumsum(weights)
    point = random.random()
    if not (sums[-1] > 0 and np.isfinite(sums[-1])):
        return int(point * len(weights))
    return min(int(np.searchsorted(sums, point * sums[-1], side="right")), int(np.flatnonzero(weights)[-1]))
