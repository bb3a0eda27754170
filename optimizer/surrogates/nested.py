"""Many experts by pairs: merge two and two, keep the preferred point of each pair, and merge the merges (nested MAP).

Each pair is a problem of two coefficients, whatever the number of experts, so a level of pairs needs evaluations in
proportion to the experts. A merge of merges that are linear in their members is linear in the experts, with the products of
the coefficients: all of it stays inside a table of coefficients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from optimizer.space import Genome
from optimizer.surrogates.quadratic import Quadratic, choose_link

Vector = NDArray[np.float64]
Matrix = NDArray[np.float64]

_FIRST = ((0.5, 0.5), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0), (0.3, 0.7), (0.7, 0.3))
_GRID = np.stack(np.meshgrid(np.linspace(0, 1.2, 25), np.linspace(0, 1.2, 25), indexing="ij"), axis=-1).reshape(-1, 2)


@dataclass
class Pair:
    """Two merged models and how their merges came out.

    Attributes:
        first, second: shape (dim,), what one of each adds to a genome.
        points: coefficients of the two, and the losses there.
    """

    first: Genome
    second: Genome
    points: list[tuple[Vector, Vector]] = field(default_factory=list)

    def genome(self, origin: Genome, coefficients: Sequence[float] | Vector) -> Genome:
        """Return the genome of a merge of the two."""
        return np.asarray(origin + coefficients[0] * self.first + coefficients[1] * self.second, dtype=np.float64)

    def coefficients(self, origin: Genome, genome: Genome) -> Vector:
        """Return the coefficients that come nearest to a genome."""
        found = np.linalg.lstsq(np.column_stack([self.first, self.second]), genome - origin, rcond=None)[0]
        return np.asarray(found, dtype=np.float64)


class Nested:
    """The tournament of pairs. One that is left over goes on to the next level as it is.

    Args:
        origin: shape (dim,), the genome of no expert at all.
        experts: for each, shape (dim,), what it adds to the origin.
        each: evaluations of a pair.
        weights: shape (objectives,), of the preference.

    Attributes:
        total: proposals in all.
    """

    def __init__(self, origin: Genome, experts: Sequence[Genome], each: int, weights: Vector) -> None:
        self._origin = origin
        self._each = each
        self._weights = weights
        self._left = list(experts)
        self._pairs: list[Pair] = []
        self._began = 0
        self._of: dict[int, Pair] = {}
        self.total = each * (len(experts) - 1)

    def begin(self, number: int) -> tuple[Pair, int]:
        """Return the pair that the proposal of this number is for, and its place among the pair's; in order of numbers."""
        if number - self._began >= self._each * len(self._pairs):
            self._next_level(number)
        step, place = divmod(number - self._began, len(self._pairs))
        self._of[number] = self._pairs[place]
        return self._pairs[place], step

    def point(self, pair: Pair, step: int) -> tuple[Genome, str]:
        """Return the genome of a proposal and its label."""
        known = len(self._pairs)
        if step < len(_FIRST) or len(pair.points) < 3:
            return pair.genome(self._origin, _FIRST[step % len(_FIRST)]), f"pair of {2 * known}"
        z = np.array([each for each, _ in pair.points]) / 0.6 - 1
        losses = np.array([each for _, each in pair.points])
        fits = [Quadratic(z, column, choose_link(column, "auto"), np.ones(len(z))) for column in losses.T]
        predicted = np.column_stack([fit.predict(_GRID / 0.6 - 1) for fit in fits])
        tried = np.abs(_GRID[:, None] - np.array([each for each, _ in pair.points])[None]).max(axis=2).min(axis=1)
        values = np.where(tried > 0.02, self._preference(predicted, losses), np.inf)
        r2 = max(0.0, min(fit.r2 for fit in fits))
        return pair.genome(self._origin, _GRID[int(values.argmin())]), f"pair of {2 * known}, R² {r2:.2f}"

    def tell(self, number: int, genome: Genome, losses: Vector) -> None:
        """Take in the losses of the proposal of this number; what came too late for its pair changes nothing."""
        pair = self._of.pop(number, None)
        if pair is not None:
            pair.points.append((pair.coefficients(self._origin, genome), losses))

    def _next_level(self, number: int) -> None:
        merged = [self._preferred(pair) for pair in self._pairs] + self._left
        self._began = number
        self._pairs = [Pair(merged[k], merged[k + 1]) for k in range(0, len(merged) - 1, 2)]
        self._left = merged[len(merged) // 2 * 2 :]

    def _preferred(self, pair: Pair) -> Genome:
        if not pair.points:
            return np.asarray(0.5 * (pair.first + pair.second), dtype=np.float64)
        losses = np.array([each for _, each in pair.points])
        best = pair.points[int(self._preference(losses, losses).argmin())][0]
        return pair.genome(np.zeros_like(self._origin), best)

    def _preference(self, losses: Matrix, seen: Matrix) -> Vector:
        spread = np.ptp(seen, axis=0)
        scaled = (losses - seen.min(axis=0)) / np.where(spread > 0, spread, 1.0)
        return np.asarray(scaled @ self._weights, dtype=np.float64)
