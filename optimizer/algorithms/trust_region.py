"""Quadratic models in a trust region, from as few evaluations as there are directions.

Merges of experts of one base are smooth in their coefficients, and a job has tens to hundreds of evaluations: what
derivative-free optimisation calls expensive and smooth, and solves with local quadratic models. Choices that were measured
on the digits problems of tests/benchmarks/README.md (12, 24 and 48 coefficients), as the loss after 200 evaluations:

- Steps while directions are still being learnt (every other proposal): 0.348 on digits-4, 0.356 with steps only after all
  directions; after 50 evaluations 0.437 and 0.526.
- Points up to five radii away count: 0.336; up to two, where a step that has moved many coefficients leaves most of them
  behind, 0.343.
- Experts probed first, as in CMA-ES (`optimizer.expert_scales`): 0.29 on digits-8, three of whose experts do not belong,
  and 0.52 without.
- Losses far above the best are squashed, not nearer ones: 0.264 on digits-8, 0.287 without; from the median on 0.254,
  but 0.344 for 0.331 on digits-4.
- A ball, not a box: 0.330 and 0.344 on digits-4, 0.29 and 0.33 on digits-8.
- Several objectives, share of the best known hypervolume after 200 evaluations of digits-2, -4 and -8: ten weighted sums
  .92, .73, .92, five .90, .70, .87, the given one alone .78, .61, .81; augmented Tchebycheff functions of a model for each
  objective .92, .72, .93 or .91, .57, .84, as their share in the sum is .3 or .7.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from optimizer.algorithms.base import AlgorithmContext, Outcome, Proposal, algorithm
from optimizer.algorithms.scalarise import ENOUGH, spread_of
from optimizer.expert_scales import SHARE, Probes, expert_columns
from optimizer.reference_points import spread_points
from optimizer.space import Genome
from optimizer.spec import Strict
from optimizer.surrogates.archive import Observed
from optimizer.surrogates.encoding import Units
from optimizer.surrogates.local_model import LocalModel, unknown
from optimizer.surrogates.search import SurrogateSearch

_LARGEST, _SMALLEST = 0.5, 2.0**-8
_GROWTH, _SHRINKAGE = 1.5, 0.7
_REACH = 5.0
_MOST = 400
_KNOWN = 0.1
_APART = 0.05
_HALVINGS = 8
_SQUASHED_ABOVE = 3.0
_SAME = 1e-6
_DISCRETE = (0.1, 0.5)
_FOR_FIRST = 0.3
_LEAST = 0.05
_UNKNOWN_BUDGET = 1000

Vector = NDArray[np.float64]
Matrix = NDArray[np.float64]


@dataclass
class _Aim:
    """One number to minimise, and how far steps towards it go.

    Attributes:
        weights: shape (objectives,): of the losses in the sum.
        radius: of the next step, as a share of the variables' ranges.
    """

    weights: Vector
    radius: float


@dataclass(frozen=True)
class _Place:
    """Where the search stands.

    Attributes:
        centre: shape (dim,), the best so far, in units.
        radius: of the steps from there.
        near: shape (n, dim), what was evaluated or is in flight within reach, in units.
        units, values: of the outcomes there that the model is fitted to, shapes (m, dim) and (m,).
    """

    centre: Units
    radius: float
    near: Units
    units: Units
    values: Vector


@algorithm("trust_region")
class TrustRegionSearch(SurrogateSearch):
    """Fits the flattest quadratic to what lies near the best, and moves to its minimum within a radius.

    Every other proposal is a step along the axis of which the points near the best say least, until they say something of
    all. The radius grows where the model's minimum is better than the best, and shrinks where it is not; when nothing is
    left of it, it begins anew, with all that is known. Where the space has coefficients of several experts, each is first
    moved a little by itself, and those that change the loss more than usual are moved less.

    Integers and choices are changed one at a time; a model holds for the values that the best has. It never waits: what is
    in flight is not proposed again.

    Several objectives are followed as weighted sums in turn, each with its own best and its own radius; all learn from what
    any of them evaluates. The first 30 % of the budget go to the sum with the weights as given.
    """

    summary = (
        "Quadratic models in a trust region: smooth merges in few evaluations, also with experts that do not belong."
    )
    reference = (
        "Powell 2004 (least Frobenius norm); Cartis and Roberts 2021, arXiv:2102.12016 (subspaces); probes: mergeopt"
    )

    multi_objective = True

    class Options(Strict):
        """Options of `TrustRegionSearch`."""

        radius: float = Field(
            default=0.25,
            gt=0,
            le=_LARGEST,
            description="Length of the first steps, as a share of the variables' ranges.",
        )
        probe_experts: bool = Field(
            default=True,
            description=(
                "Move each expert a little first, where that takes at most a third of the budget, and those that change the "
                "loss more than the others less from then on."
            ),
        )
        weightings: int = Field(
            default=10,
            ge=1,
            le=200,
            description=(
                "Weighted sums of several objectives that are followed in turn, evenly spread, at most so many; with 1 only "
                "the sum with the weights as given."
            ),
        )
        normalise: bool = Field(
            default=True,
            description=(
                "Divide each objective by its spread among the first candidates before weighing, so that scales do not "
                "count."
            ),
        )

    def __init__(self, context: AlgorithmContext, options: Any) -> None:
        super().__init__(context, options)
        self._aims = [_Aim(weights, float(options.radius)) for weights in self._weightings()]
        self._scales = np.ones(context.space.dim)
        self._steps: set[int] = set()  # numbers of proposals in flight that are minima of a model
        self._probes: Probes | None = None
        self._first: list[Genome] = []
        self._spread: Vector | None = None  # of the losses, once enough have been seen

    def _told(self, outcome: Outcome, number: int | None, improved: bool) -> None:
        del outcome, improved  # of the front, which may have several objectives
        if number is None or number not in self._steps:
            return
        self._steps.remove(number)
        aim = self._aim(number)
        values = self._values(self.archive.observed(), aim)
        if values[-1] < values[:-1].min(initial=np.inf):
            aim.radius = min(aim.radius * _GROWTH, _LARGEST)
        else:
            aim.radius *= _SHRINKAGE
        if aim.radius < _SMALLEST:
            aim.radius = float(self.options.radius)

    def _recalled(self, number: int) -> int | None:
        self._prepare(number)
        if number >= len(self._first) and (place := self._place(self._aim(number))) is not None:
            self._note(number, self._direction(place, number))
        return super()._recalled(number)

    def _propose(self, number: int) -> Proposal:
        self._prepare(number)
        unit = self._unit(number)
        return Proposal(self.encoding.genome(unit), number // max(1, self.context.parallel))

    # --- the beginning ----------------------------------------------------------------------------------------------

    def _prepare(self, number: int) -> None:
        """Decide on scales and probes before the first proposal, and read these after the last."""
        if self._spread is None:
            self._spread = self._find_spread()
        if number == 0:
            self._probes = self._make_probes()
            if self._probes is not None:
                # Where it begins is known, unless nothing is.
                self._first = self._probes.genomes[1 if len(self._measured()) else 0 :]
        if self._probes is not None and number >= len(self._first):
            self._scales = self._read(self._probes)

    def _weightings(self) -> Matrix:
        """The weights of the sums, shape (n, objectives): first as given, then evenly spread around these."""
        given, most = self.context.weights, int(self.options.weightings)
        if most == 1 or self.context.objectives == 1:
            return given[None]
        points = np.maximum(spread_points(self.context.objectives, most), _LEAST)
        self.context.generator().shuffle(points)
        return np.vstack([given, len(points[0]) * given * points / points.sum(axis=1, keepdims=True)])

    def _aim(self, number: int) -> _Aim:
        """Which sum a proposal is for: the first for some of the budget, then each in turn for two proposals."""
        first = int(_FOR_FIRST * (self.context.budget or _UNKNOWN_BUDGET))
        return self._aims[0 if number < first else (number - first) // 2 % len(self._aims)]

    def _find_spread(self) -> Vector | None:
        """What each loss is divided by; None while too few are known to say."""
        losses = self._measured().losses
        if self.context.objectives == 1 or not self.options.normalise:
            return np.ones(self.context.objectives)
        return spread_of(losses) if len(losses) >= ENOUGH else None

    def _make_probes(self) -> Probes | None:
        columns = expert_columns(self.context.space) if self.options.probe_experts else None
        budget = self.context.budget
        if columns is None or (budget is not None and columns.max() + 2 > SHARE * budget):
            return None
        observed = self._measured()
        start = self.context.start
        if len(observed):
            start = self.encoding.genome(self._best(observed, self._values(observed, self._aims[0])))
        return Probes(self.context.space, columns, start)

    def _read(self, probes: Probes) -> Vector:
        """How far each variable is moved, by the probes that have an outcome; they are read until all have one."""
        observed = self._measured()
        values = self._values(observed, self._aims[0])
        found = [_place_of(self.encoding.units(genome), observed.units) for genome in probes.genomes]
        if found[0] is None:
            return np.ones(self.context.space.dim)
        flying = self.archive.pending
        waiting = [_place_of(self.encoding.units(genome), flying) is not None for genome in probes.genomes]
        if not any(waiting):
            self._probes = None
        told = [
            (genome, values[found[0] if place is None else place])  # in flight: as if it changed nothing
            for genome, place, late in zip(probes.genomes, found, waiting, strict=True)
            if late or place is not None
        ]
        return probes.scales([genome for genome, _ in told], [float(value) for _, value in told])

    # --- the next point ---------------------------------------------------------------------------------------------

    def _unit(self, number: int) -> Units:
        if number < len(self._first):
            return self._whole(self.encoding.units(self._first[number]))
        random = self.generator(number)
        aim = self._aim(number)
        place = self._place(aim)
        if place is None:
            length = 0.0 if number == 0 else aim.radius
            return self._whole(self._around(self.encoding.units(self.context.start), random, length))
        direction = self._direction(place, number)
        self._note(number, direction)
        if direction is None and (other := self._discrete(place.centre, random)) is not None:
            return other
        return self._whole(self._step(place, random) if direction is None else self._along(place, direction))

    def _note(self, number: int, direction: int | None) -> None:
        if direction is None:
            self._steps.add(number)

    def _whole(self, unit: Units) -> Units:
        return np.asarray(self.encoding.repair(unit[None])[0], dtype=np.float64)

    def _measured(self) -> Observed:
        observed = self.archive.observed().full()
        return observed.where(observed.measured)

    def _place(self, aim: _Aim) -> _Place | None:
        observed = self._measured()
        if not len(observed):
            return None
        values = self._values(observed, aim)
        centre = self._best(observed, values)
        everything = np.vstack([self.archive.observed().units, self.archive.pending])
        chosen = self._near(observed.units, centre, aim.radius)[:_MOST]
        near = np.sort(self._near(everything, centre, aim.radius))
        return _Place(centre, aim.radius, everything[near], observed.units[chosen], _squashed(values)[chosen])

    def _values(self, observed: Observed, aim: _Aim) -> Vector:
        return _values(observed, aim.weights if self._spread is None else aim.weights / self._spread)

    def _best(self, observed: Observed, values: Vector) -> Units:
        return self._whole(observed.units[int(np.argmin(values))])

    def _near(self, units: Units, centre: Units, radius: float) -> NDArray[np.int64]:
        """Which points lie within reach and have the centre's integers and choices, the nearest first."""
        distances = np.linalg.norm((units - centre) / self._scales, axis=1)
        found = np.flatnonzero(self._alike(units, centre) & (distances <= _REACH * radius))
        return found[np.argsort(distances[found], kind="stable")]

    def _alike(self, units: Units, centre: Units) -> NDArray[np.bool_]:
        """Which points have the centre's integers and choices."""
        fixed = ~self.encoding.real
        whole = self.encoding.repair(units)[:, fixed]
        return np.asarray((np.abs(whole - centre[fixed]) < _SAME).all(axis=1), dtype=np.bool_)

    def _direction(self, place: _Place, number: int) -> int | None:
        """The axis to learn of, at every other proposal; None where a step is due, or all is known."""
        if number % 2:
            return None
        steps = (place.near - place.centre) / self._scales
        left = unknown(steps[np.linalg.norm(steps, axis=1) > _KNOWN * place.radius], len(place.centre))
        left[~self.encoding.real] = 0.0
        axis = int(np.argmax(left.round(9)))
        return axis if left[axis] > _KNOWN else None

    def _along(self, place: _Place, axis: int) -> Units:
        """A step of the radius along an axis: up, or down where there is no room."""
        centre, out = place.centre, place.centre.copy()
        length = place.radius * self._scales[axis]
        out[axis] = min(centre[axis] + length, 1.0)
        if out[axis] - centre[axis] < length / 2:
            out[axis] = max(centre[axis] - length, 0.0)
        return out

    def _step(self, place: _Place, random: np.random.Generator) -> Units:
        """The model's minimum within the radius; within a smaller one, where that is known or in flight."""
        real = self.encoding.real
        centre, scales = place.centre[real], self._scales[real] * place.radius
        model = LocalModel((place.units[:, real] - centre) / scales, place.values)
        radius = 1.0
        for _ in range(_HALVINGS):
            low, high = np.maximum(-centre / scales, -radius), np.minimum((1 - centre) / scales, radius)
            step = model.minimum(radius, low, high)
            taken = np.linalg.norm((place.near[:, real] - centre) / scales - step, axis=1)
            if taken.min(initial=np.inf) > _APART * radius:
                out = place.centre.copy()
                out[real] = centre + step * scales
                return out
            radius /= 2
        return self._around(place.centre, random, place.radius)

    def _around(self, centre: Units, random: np.random.Generator, length: float) -> Units:
        """A random point so far away; its integers and choices are random with the chance of one change."""
        drawn = random.standard_normal(len(centre))
        out = centre + length * self._scales * drawn / max(float(np.linalg.norm(drawn)), 1e-12)
        other = ~self.encoding.real & (random.random(len(centre)) < (length > 0) / len(centre))
        return np.where(other, random.random(len(centre)), out)

    def _discrete(self, centre: Units, random: np.random.Generator) -> Units | None:
        """The centre with one integer or choice changed, in their share of the steps; None where none is due."""
        places = np.flatnonzero(~self.encoding.real)
        share = np.clip(len(places) / len(centre), *_DISCRETE)
        if not len(places) or (self.encoding.real.any() and random.random() >= share):
            return None
        for _ in range(_HALVINGS):
            out = centre.copy()
            out[random.choice(places)] = random.random()
            out = self._whole(out)
            if not self._alike(np.vstack([self.archive.observed().units, self.archive.pending]), out).any():
                return out
        return out


def _values(observed: Observed, weights: NDArray[np.float64]) -> Vector:
    """One number for each outcome, to minimise: a weighted sum; what violates constraints lies above all that does not.

    Failed outcomes are infinite.
    """
    values = np.where(observed.measured, observed.losses @ weights, np.inf)
    broken = observed.measured & (observed.violation > 0)
    if broken.any():
        fine = values[observed.feasible]
        top, spread = (fine.max(), max(float(np.ptp(fine)), 1e-12)) if len(fine) else (0.0, 1.0)
        values[broken] = top + spread * (1 + observed.violation[broken])
    return np.asarray(values, dtype=np.float64)


def _squashed(values: Vector) -> Vector:
    """Values far above the least one count by their logarithm: a ruined merge says nothing of how good ones differ."""
    spread = max(float(np.median(values) - values.min()), 1e-12)
    top = values.min() + _SQUASHED_ABOVE * spread
    return np.asarray(np.minimum(values, top) + spread * np.log1p(np.maximum(values - top, 0) / spread))


def _place_of(unit: Units, units: Units) -> int | None:
    """Which of the units is this one; None where none is."""
    same = np.flatnonzero(np.abs(units - unit).max(axis=1, initial=0.0) < _SAME)
    return int(same[0]) if len(same) else None
