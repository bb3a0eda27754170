"""NSGA-III (Deb and Jain 2014; with constraints Jain and Deb 2014), on mixed variables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from optimizer.algorithms.base import AlgorithmContext, Outcome, algorithm
from optimizer.algorithms.nsga2 import Nsga2
from optimizer.pareto import nondominated_ranks
from optimizer.reference_points import given_points, spread_points

_CORNER = 1e-6

Losses = NDArray[np.float64]


@algorithm("nsga3")
class Nsga3(Nsga2):
    """Evolves a population along reference points: dominance first, then an even spread over the reference lines.

    Losses are normalised by the best values seen and the plane through the extreme points, so scales do not count. Where
    NSGA-II breaks ties by crowding, which says little from three objectives on, the last front is thinned out such that
    every reference line keeps its nearest candidates. Generations, guests and failures are as in `Nsga2`.
    """

    summary = "Evolves a population evenly along reference lines: dominance first; for three objectives and more."
    reference = "Deb and Jain 2014, An Evolutionary Many-Objective Optimization Algorithm, Part I, IEEE TEVC 18(4)"
    multi_objective = True

    class Options(Nsga2.Options):
        """Options of `Nsga3`."""

        reference_points: list[list[float]] = Field(
            default_factory=list,
            max_length=10_000,
            description=(
                "Directions in the objectives' losses that the front is wanted along, a row of numbers for each, of any "
                "length; by default evenly spread ones, at most as many as the population."
            ),
            examples=[[[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]]],
        )

    def __init__(self, context: AlgorithmContext, options: Any) -> None:
        super().__init__(context, options)
        self._ideal = np.full(context.objectives, np.inf)
        self._extremes = np.empty((0, context.objectives))
        if options.reference_points:
            self._lines = given_points(
                options.reference_points, context.objectives, "algorithm.options.reference_points"
            )
        else:
            self._lines = spread_points(context.objectives, self._size)

    def tell(self, outcome: Outcome) -> None:
        """Take in an outcome; the last one of a generation lets the next one be bred."""
        super().tell(outcome)
        if outcome.feasible and outcome.losses is not None and (outcome.own or outcome.items is None):
            self._ideal = np.minimum(self._ideal, outcome.losses)

    def _ranked(self, losses: Losses) -> Sequence[int]:
        """The places of the best rows, at most a population: whole fronts, then what fills empty niches."""
        ranks = nondominated_ranks(losses)
        order = np.argsort(ranks, kind="stable")
        last = ranks[order[min(self._size, len(order)) - 1]]
        chosen = [int(i) for i in order if ranks[i] < last]
        front = np.flatnonzero(ranks == last)
        unit = self._normalised(losses, ranks == 0)
        niche, distance = self._associate(unit)
        counts = np.bincount(niche[chosen], minlength=len(self._lines))
        left = sorted((int(i) for i in front), key=lambda i: float(distance[i]))
        while left and len(chosen) < self._size:
            pick = self._next(left, niche, counts)
            left.remove(pick)
            counts[niche[pick]] += 1
            chosen.append(pick)
        return chosen

    def _next(self, left: list[int], niche: NDArray[np.int64], counts: NDArray[np.int64]) -> int:
        """One of those ``left`` (nearest first) from a niche with the fewest: the nearest if that is empty, else any."""
        fewest = min(counts[niche[i]] for i in left)
        niches = sorted({int(niche[i]) for i in left if counts[niche[i]] == fewest})
        wanted = niches[int(self._random.integers(len(niches)))]
        members = [i for i in left if niche[i] == wanted]
        return members[0] if fewest == 0 else members[int(self._random.integers(len(members)))]

    def _normalised(self, losses: Losses, first: NDArray[np.bool_]) -> Losses:
        """Losses from the ideal point (0) to the intercepts of the plane through the extreme points (1)."""
        candidates = np.vstack([self._extremes, losses[first]])
        shifted = candidates - self._ideal
        weights = np.where(np.eye(len(self._ideal), dtype=bool), 1.0, 1 / _CORNER)
        reach = (shifted[None] * weights[:, None]).max(axis=2)
        self._extremes = candidates[reach.argmin(axis=1)]
        nadir = losses[first].max(axis=0) - self._ideal
        span = _intercepts(self._extremes - self._ideal, nadir)
        return np.asarray((losses - self._ideal) / span, dtype=np.float64)

    def _associate(self, unit: Losses) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """The nearest reference line of each row, and its distance."""
        lines = self._lines / np.linalg.norm(self._lines, axis=1, keepdims=True)
        along = unit @ lines.T
        squared = np.maximum(np.square(unit).sum(axis=1)[:, None] - np.square(along), 0.0)
        niche = squared.argmin(axis=1)
        return niche, np.sqrt(squared[np.arange(len(unit)), niche])


def _intercepts(extremes: Losses, nadir: Losses) -> Losses:
    """Where the plane through the extreme points meets the axes; the nadir of the first front where it does not."""
    with np.errstate(divide="ignore", invalid="ignore"):
        try:
            intercepts = 1 / np.linalg.solve(extremes, np.ones(len(extremes)))
        except np.linalg.LinAlgError:
            intercepts = nadir
    usable = np.isfinite(intercepts).all() and (intercepts > _CORNER * nadir).all() and (intercepts > 0).all()
    span = intercepts if usable else nadir
    return np.where(span > 0, span, 1.0)
