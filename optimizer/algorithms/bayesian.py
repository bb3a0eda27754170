"""Bayesian optimisation with Gaussian processes, for one objective and several.

Choices that were measured on the problems described in `cma_es`, as the best loss found over that of the uniform merge:

- The prior of the length scales decides: with its mode at 0.2 of the root of the number of variables, 0.43 after 100
  evaluations of 20 variables (CMA-ES 0.74); with the mode at four times that root the model extrapolates into the corners
  and nothing is found (0.98).
- With that prior a trust region does not pay: after 200 evaluations of 60 variables 0.54 without and 0.55 with it, of 150
  variables 0.60 and 0.68 (CMA-ES 0.87 and 1.00). So it is an option.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from scipy.optimize import minimize

from optimizer.algorithms.base import AlgorithmContext, Outcome, Proposal, algorithm
from optimizer.pareto import crowding_distance, front_mask
from optimizer.spec import Strict
from optimizer.surrogates.acquisition import Scalarised, free_boxes, log_feasibility, log_improvement, tchebycheff
from optimizer.surrogates.archive import Observed
from optimizer.surrogates.encoding import Units
from optimizer.surrogates.models import Kernels, Models, fit_kernels
from optimizer.surrogates.search import INITIAL, SurrogateSearch
from optimizer.surrogates.trust_region import TrustRegion

_HYPERVOLUME_UP_TO = 3
_LARGEST_FRONT = {2: 64, 3: 24}
_REFITS = 1.15
_CENTRES = 4
_CLIMBS = 2
_CLIMB_STEPS = 20
_MARGIN = 0.2
_NUDGE = 1e-4

Vector = NDArray[np.float64]
Matrix = NDArray[np.float64]
Score = Callable[[Matrix, Matrix], Vector]


@algorithm("bayesian")
class Bayesian(SurrogateSearch):
    """One Gaussian process for each objective, and the point of largest expected improvement under them.

    One objective: expected improvement. Two and three: expected hypervolume improvement, exact. More: expected
    improvement of a random Tchebycheff scalarisation. Both times the probability that the constraints hold; failed
    evaluations count as violating. Losses are squashed above their median, so that ruined merges do not swallow the scale.

    It never waits: proposals in flight are taken to come out as predicted. Outcomes on a part of the items are left out.
    """

    summary = "Models each objective by a Gaussian process and evaluates where it expects most; for few evaluations."
    reference = (
        "Jones et al. 1998 (EI); Daulton et al. 2020, arXiv:2006.05078 (EHVI); Eriksson et al. 2019, arXiv:1910.01739"
    )
    multi_objective = True

    class Options(Strict):
        """Options of `Bayesian`."""

        initial: int | None = Field(
            default=None,
            ge=1,
            le=10_000,
            description=f"Outcomes to begin with, warm starts among them, before models are fitted; {INITIAL}.",
        )
        trust_region: bool = Field(
            default=False,
            description="Search only near the best, in a box that grows with success and shrinks without.",
        )
        candidates: int = Field(
            default=400,
            ge=10,
            le=100_000,
            description="Points among which the one to evaluate is looked for, before it is refined.",
        )
        max_observations: int = Field(
            default=1000,
            ge=50,
            le=5000,
            description="Outcomes the models take into account, at most: the latest and the best. Time grows with the cube.",
        )

    def __init__(self, context: AlgorithmContext, options: Any) -> None:
        super().__init__(context, options)
        dim = context.space.dim
        patience = max(4, min(dim, 12), context.parallel)
        self._region = TrustRegion(patience) if options.trust_region else None
        self._design: Units | None = None
        self._kernels: tuple[int, Kernels] | None = None
        self._models: tuple[tuple[int, bytes], Models] | None = None

    def _told(self, outcome: Outcome, number: int | None, improved: bool) -> None:
        del number
        if outcome.own and self._region is not None:
            self._region.add(improved)

    def _recalled(self, number: int) -> int | None:
        if self._design is None:
            self._design = self.first_points(self.options.initial)
        return super()._recalled(number)

    def _propose(self, number: int) -> Proposal:
        if self._design is None:
            self._design = self.first_points(self.options.initial)
        random = self.generator(number)
        observed = self.archive.observed().full()
        if number < len(self._design):
            unit = self._design[number]
        elif not observed.measured.any() or not np.ptp(observed.losses[observed.measured], axis=0).any():
            unit = self.encoding.repair(random.random((1, self.context.space.dim)))[0]
        else:
            unit = self._best(observed, random)
        return Proposal(self.encoding.genome(unit), number // max(1, self.context.parallel))

    # --- models -----------------------------------------------------------------------------------------------------

    def _fitted(self, observed: Observed) -> Kernels:
        """Hyper-parameters are fitted anew when there is a seventh more to fit them to, always from scratch.

        So they depend on what was told only, and not on when somebody asked.
        """
        size = 1
        while int(size * _REFITS) + 1 <= len(observed):
            size = int(size * _REFITS) + 1
        first = int(np.flatnonzero(observed.measured)[0]) + 1
        size = max(size, first)
        if self._kernels is None or self._kernels[0] != size:
            self._kernels = size, fit_kernels(self.encoding, observed.where(np.arange(size)))
        return self._kernels[1]

    def _modelled(self, observed: Observed) -> Models:
        pending = self.archive.pending
        key = len(self.archive), pending.tobytes()
        if self._models is None or self._models[0] != key:
            kernels = self._fitted(observed)
            most = int(self.options.max_observations)
            self._models = key, Models(self.encoding, observed, pending, kernels, most)
        return self._models[1]

    def _score(self, models: Models, random: np.random.Generator) -> Score:
        """Return what is to be maximised, from means and deviations of shape (n, models)."""
        objectives = self.context.objectives
        improvement: Score | None = None
        if len(models.best):
            improvement = _improvement(models.best, random)

        def score(mean: Matrix, std: Matrix) -> Vector:
            total = np.zeros(len(mean))
            if improvement is not None:
                total += improvement(mean[:, :objectives], std[:, :objectives])
            if models.limited:
                total += log_feasibility(mean[:, -1], std[:, -1])
            return total

        return score

    # --- the point to evaluate --------------------------------------------------------------------------------------

    def _best(self, observed: Observed, random: np.random.Generator) -> Units:
        models = self._modelled(observed)
        score = self._score(models, random)
        centres = self._centres(observed)
        low, high = self._box(centres[0])
        candidates = self._candidates(centres, low, high, random)
        values = score(*models.predict(candidates))
        order = np.argsort(-values, kind="stable")
        refined = [self._climb(candidates[i], low, high, models, score) for i in order[:_CLIMBS]]
        best = self.encoding.repair(np.vstack([*refined, candidates[order]]))
        values = np.concatenate([score(*models.predict(best[:_CLIMBS])), values[order]])
        known = {row.tobytes() for row in [*observed.units, *self.archive.pending]}
        for i in np.argsort(-values, kind="stable"):
            if best[i].tobytes() not in known:
                return np.asarray(best[i], dtype=np.float64)
        return np.asarray(self.encoding.repair(random.random((1, self.encoding.dim)))[0], dtype=np.float64)

    def _centres(self, observed: Observed) -> Units:
        """Points to look around, best first: the best, or the most isolated on the front."""
        some = observed.feasible if observed.feasible.any() else observed.measured
        chosen = observed.where(some)
        if chosen.losses.shape[1] == 1:
            order = np.argsort(chosen.losses[:, 0], kind="stable")
        else:
            front = np.flatnonzero(front_mask(chosen.losses))
            order = front[np.argsort(-crowding_distance(chosen.losses[front]), kind="stable")]
            if self._region is not None:
                order = np.roll(order, -(self._proposed % len(order)))
        return np.clip(chosen.units[order[:_CENTRES]], 0.0, 1.0)

    def _box(self, centre: Units) -> tuple[Units, Units]:
        dim = self.encoding.dim
        if self._region is None:
            return np.zeros(dim), np.ones(dim)
        half = np.full(dim, self._region.length / 2)
        if self._kernels is not None:
            scales = np.mean([kernel.scales for kernel in self._kernels[1].losses], axis=0)
            weights = np.clip(scales / np.median(scales), 0.5, 2.0)
            half = half * weights / np.exp(np.mean(np.log(weights)))
        half = np.where(self.encoding.real, half, 1.0)
        return np.maximum(centre - half, 0.0), np.minimum(centre + half, 1.0)

    def _candidates(self, centres: Units, low: Units, high: Units, random: np.random.Generator) -> Units:
        """Points all over the box, and steps of several lengths from the centres along some of the variables."""
        count, dim = int(self.options.candidates), self.encoding.dim
        wide = low + (high - low) * random.random((count // 2, dim))
        near = centres[random.integers(len(centres), size=count - len(wide))]
        if self._region is not None:
            keep = random.random(wide.shape) >= min(1.0, 20 / dim)
            wide = np.where(keep, centres[0], wide)
        steps = 10 ** random.uniform(-2.5, -0.5, (len(near), 1)) * random.standard_normal(near.shape)
        some = random.random(near.shape) < random.uniform(1 / dim, 1, (len(near), 1))
        other = random.random(near.shape)
        moved = np.where(self.encoding.real, near + steps, other)
        if not self.encoding.real.all():
            some &= self.encoding.real | (random.random(near.shape) < 0.3)
        near = np.clip(np.where(some, moved, near), low, high)
        return self.encoding.repair(np.vstack([wide, near]))

    def _climb(self, unit: Units, low: Units, high: Units, models: Models, score: Score) -> Units:
        """Follow the slope in the real variables, the others as they are."""
        real = self.encoding.real
        if not real.any():
            return unit
        places = self.encoding.start[real]
        x = self.encoding.features(unit[None])[0]

        def downhill(values: Vector) -> tuple[float, Vector]:
            x[places] = values
            mean, std, dmean, dstd = models.slopes(x)
            value, by_mean, by_std = _slopes_of(score, mean, std)
            return -value, -(by_mean @ dmean + by_std @ dstd)[places]

        bounds = np.column_stack([low[real], high[real]])
        found = minimize(
            downhill,
            unit[real],
            jac=True,
            method="L-BFGS-B",
            bounds=bounds,
            options={"maxiter": _CLIMB_STEPS, "maxfun": 40},
        )
        out = unit.copy()
        out[real] = found.x
        return out


def _slopes_of(score: Score, mean: Vector, std: Vector) -> tuple[float, Vector, Vector]:
    """Value of the score at one point and its slopes by the means and the deviations, by central differences."""
    models = len(mean)
    steps = _NUDGE * std[:, None] * np.eye(models)
    rows = np.vstack([np.zeros((1, models)), steps, -steps])
    at = np.concatenate([mean + rows, np.repeat(mean[None], 2 * models, axis=0)])
    around = np.concatenate([np.repeat(std[None], len(rows), axis=0), std + rows[1:]])
    values = score(at, around)
    width = 2 * _NUDGE * std
    by_mean = (values[1 : models + 1] - values[models + 1 : 2 * models + 1]) / width
    by_std = (values[2 * models + 1 : 3 * models + 1] - values[3 * models + 1 :]) / width
    return float(values[0]), by_mean, by_std


def _improvement(best: Matrix, random: np.random.Generator) -> Score:
    """Expected improvement over the best, shape (n, objectives)."""
    objectives = best.shape[1]
    front = best[front_mask(best)]
    if objectives > _HYPERVOLUME_UP_TO:
        weights = random.dirichlet(np.ones(objectives))
        ideal, span = front.min(axis=0), np.maximum(np.ptp(front, axis=0), 1e-3)
        weights = weights / span
        return Scalarised(weights, ideal, float(tchebycheff(front - ideal, weights).min()))
    if objectives > 1 and len(front) > _LARGEST_FRONT[objectives]:
        front = front[np.argsort(-crowding_distance(front), kind="stable")[: _LARGEST_FRONT[objectives]]]
    reference = front.max(axis=0) + _MARGIN * np.maximum(np.ptp(front, axis=0), 0.5)
    boxes = free_boxes(front, front.min(axis=0) if objectives == 1 else reference)
    return lambda mean, std: log_improvement(mean, std, boxes)
