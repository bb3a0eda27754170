"""MO-CMA-ES (Igel, Hansen and Roth 2007; Voß, Hansen and Igel 2010), steady state, in the unit cube.

Choices that were measured, as in `moead`, by mean hypervolume after 100, 300 and 1,000 evaluations:

- 8 individuals: 0.494, 0.600, 0.699; 12: 0.450, 0.580, 0.684 (diagonal, first step 0.1).
- With 12 and full covariances: survival alone as success 0.464, 0.578, 0.672; survival where the parent is not as good
  0.460, 0.586, 0.681. Diagonal covariances, survival alone: 0.461, 0.579, 0.686 (12 to 30 variables).
- First step, with 12: 0.2 of the range is too long (0.462, 0.531, 0.636 against 0.464, 0.578, 0.672 for 0.1); 0.05 is slower
  at first (0.426, 0.570, 0.692 against 0.450, 0.580, 0.684), but ahead on merges later (0.571 against 0.540 for three
  objectives). The default lies between the two.
- Reflection at the bounds finds no optimum that lies at them (ZDT1: 0.53 against 0.73); clipping does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from optimizer.algorithms.base import Algorithm, AlgorithmContext, Outcome, Proposal, algorithm
from optimizer.pareto import hypervolume_contributions, nondominated_ranks
from optimizer.pending import Pending
from optimizer.space import Genome
from optimizer.spec import Strict
from optimizer.variation import Variation, VariationOptions, first_population

_GENERATIONS = 120
_SMALLEST = 8
_LARGEST = 50
_FULL_UP_TO = 100
_FULL_EVALUATIONS = 50
_TARGET = 1 / 5.5
_SUCCESS_RATE = _TARGET / (2 + _TARGET)
_STALLED = 0.44
_STD_LIMITS = (1e-10, 1 / 3)
_DISCRETE_STD = 0.2
_REACH = 2.0

Vector = NDArray[np.float64]


@algorithm("mo_cma_es")
class MoCmaEs(Algorithm):
    """A population of elitist (1+1) evolution strategies, each with its own step size and covariance.

    Steady state: a parent from the first front has a child, and the individual that adds the least hypervolume to the last
    front leaves. It never waits. Foreign outcomes join with the first step size. Integers and choices are searched as
    numbers, whose standard deviation stays above a fifth of a step.
    """

    summary = "Many elitist evolution strategies with step sizes and covariances of their own, kept by hypervolume."
    reference = (
        "Igel, Hansen and Roth 2007, Covariance Matrix Adaptation for Multi-objective Optimization, Evol. Comp. 15(1)"
    )
    multi_objective = True

    class Options(Strict):
        """Options of `MoCmaEs`."""

        population: int | None = Field(
            default=None,
            ge=1,
            le=1000,
            description=(
                f"Individuals; by default a {_GENERATIONS}th of the budget, between {_SMALLEST} and {_LARGEST}, and at "
                "least twice the objectives."
            ),
        )
        sigma0: float = Field(
            default=0.07, gt=0, le=1, description="First standard deviation, as a fraction of each variable's range."
        )
        covariance: Literal["auto", "full", "diagonal"] = Field(
            default="auto",
            description=(
                "`full` learns how variables depend on each other, `diagonal` only their scales; `auto` is full up to "
                f"{_FULL_UP_TO} variables where the budget allows {_FULL_EVALUATIONS} evaluations for each."
            ),
        )

    def __init__(self, context: AlgorithmContext, options: Any) -> None:
        super().__init__(context, options)
        self._random = context.generator()
        self._variation = Variation(context.space, VariationOptions(), self._random)
        self._size = options.population or self._default_size()
        self._adaptation = _Adaptation(context.space.dim, diagonal=self._diagonal())
        self._population: list[_Individual] = []
        self._pending: Pending[_Birth | None] = Pending(context.space)
        self._queue: list[Genome] = []
        self._asked = 0
        self._range = context.space.high - context.space.low
        steps = [0.0 if v.kind == "real" else 1 / (v.high - v.low) for v in context.space.variables]
        self._smallest_std = np.minimum(_DISCRETE_STD * np.array(steps), _STD_LIMITS[1])

    def ask(self, count: int) -> list[Proposal]:
        """Return ``count`` proposals."""
        return [self._propose() for _ in range(count)]

    def tell(self, outcome: Outcome) -> None:
        """Take in an outcome: the child joins, the population shrinks again, parent and child learn from it."""
        if outcome.items is not None and not outcome.own:
            return
        birth = self._pending.pop(outcome.genome) if outcome.own else None
        if outcome.losses is None or not np.isfinite(outcome.losses).all():
            if birth is not None:
                self._adaptation.step_size(birth.parent, success=False)
            return
        unit = np.clip((outcome.genome - self.context.space.low) / self._range, 0.0, 1.0)
        if birth is None:
            self._population.append(self._adaptation.founder(outcome, unit, self.options.sigma0))
            self._trim()
        else:
            self._add_child(outcome, unit, birth)

    def _add_child(self, outcome: Outcome, unit: Vector, birth: _Birth) -> None:
        parent = birth.parent
        child = parent.copy(outcome, unit)
        self._population.append(child)
        self._trim()
        success = any(one is child for one in self._population) and not _as_good(parent.outcome, outcome)
        self._adaptation.step_size(parent, success=success)
        self._adaptation.step_size(child, success=success)
        if success:
            self._adaptation.covariance(child, (unit - birth.origin) / birth.sigma)

    def _propose(self) -> Proposal:
        generation = self._asked // self._size
        if not self._queue and (not self._population or (self._asked == 0 and len(self._population) < self._size)):
            self._queue = self._first()
        self._asked += 1
        if self._queue:
            genome = self._queue.pop(0)
            self._pending.add(genome, None)
            return Proposal(genome, generation)
        front = [one for one, rank in zip(self._population, self._ranks(), strict=True) if rank == 0]
        parent = front[int(self._random.integers(len(front)))]
        unit = np.clip(parent.unit + self._step(parent), 0.0, 1.0)
        genome = self.context.space.clip(self.context.space.low + unit * self._range)
        self._pending.add(genome, _Birth(parent, parent.unit, parent.sigma))
        return Proposal(genome, generation, (parent.outcome.index,))

    def _step(self, parent: _Individual) -> Vector:
        step, stds = parent.sigma * parent.draw(self._random), parent.sigma * parent.stds
        return np.asarray(step * np.maximum(1.0, self._smallest_std / stds), dtype=np.float64)

    def _first(self) -> list[Genome]:
        start, known = self.context.start, [one.outcome.genome for one in self._population]
        evaluated = self._asked > 0 or any((start == genome).all() for genome in known)
        return first_population(self._size, None if evaluated else start, [start, *known], self._variation)

    def _ranks(self) -> NDArray[np.int64]:
        """Fronts of the feasible individuals, then the others by violation, shape (individuals,)."""
        losses = np.array([one.outcome.losses for one in self._population])
        violation = np.array([max(0.0, one.outcome.violation) for one in self._population])
        feasible = violation <= 0
        ranks = np.zeros(len(losses), dtype=np.int64)
        ranks[feasible] = nondominated_ranks(losses[feasible])
        behind = 1 + ranks[feasible].max(initial=-1)
        ranks[~feasible] = behind + np.unique(violation[~feasible], return_inverse=True)[1]
        return ranks

    def _trim(self) -> None:
        while len(self._population) > self._size:
            ranks = self._ranks()
            last = np.flatnonzero(ranks == ranks.max())
            losses = np.array([self._population[i].outcome.losses for i in last])
            self._population.pop(int(last[self._least(losses)]))

    def _least(self, losses: Vector) -> int:
        """The row that adds the least hypervolume; the ends of the front add the most, as the reference lies far out."""
        span = np.ptp(losses, axis=0)
        unit = (losses - losses.min(axis=0)) / np.where(span > 0, span, 1.0)
        shares = hypervolume_contributions(unit, np.full(unit.shape[1], _REACH), self._random)
        return len(shares) - 1 - int(np.argmin(shares[::-1]))  # of equals the youngest

    def _diagonal(self) -> bool:
        dim, budget = self.context.space.dim, self.context.budget
        if self.options.covariance != "auto":
            return bool(self.options.covariance == "diagonal")
        return dim > _FULL_UP_TO or (budget is not None and budget < _FULL_EVALUATIONS * dim)

    def _default_size(self) -> int:
        budget = self.context.budget
        wanted = _LARGEST if budget is None else budget // _GENERATIONS
        return max(min(max(wanted, _SMALLEST), _LARGEST), 2 * self.context.objectives)


@dataclass
class _Individual:
    """One evolution strategy.

    Attributes:
        unit: where it is, in the unit cube.
        sigma: its step size.
        covariance: shape (dim,) if diagonal, else (dim, dim).
        path: evolution path, shape (dim,).
        success: smoothed share of its children that were better.
        factor: Cholesky factor of a full covariance, once it was needed.
    """

    outcome: Outcome
    unit: Vector
    sigma: float
    covariance: Vector
    path: Vector
    success: float = _TARGET
    factor: Vector | None = None

    @property
    def stds(self) -> Vector:
        """Standard deviations for a step size of 1, shape (dim,)."""
        return np.sqrt(self.covariance if self.covariance.ndim == 1 else np.diag(self.covariance))

    def draw(self, random: np.random.Generator) -> Vector:
        """Return a step for a step size of 1."""
        normal = random.standard_normal(len(self.unit))
        if self.covariance.ndim == 1:
            return np.asarray(self.stds * normal, dtype=np.float64)
        if self.factor is None:
            self.factor = np.asarray(np.linalg.cholesky(self.covariance), dtype=np.float64)
        return np.asarray(np.dot(self.factor, normal), dtype=np.float64)

    def copy(self, outcome: Outcome, unit: Vector) -> _Individual:
        """Return a child that has not learned anything yet."""
        return _Individual(outcome, unit, self.sigma, self.covariance, self.path, self.success, self.factor)


@dataclass(frozen=True)
class _Birth:
    """Where a child was drawn from: its parent, and where and how far-reaching that was."""

    parent: _Individual
    origin: Vector
    sigma: float


class _Adaptation:
    """How individuals learn, with the constants of Igel, Hansen and Roth 2007 for one child at a time.

    A diagonal covariance learns (dim + 2) / 3 times as fast (Ros and Hansen 2008).
    """

    def __init__(self, dim: int, *, diagonal: bool) -> None:
        self._diagonal = diagonal
        self._damping = 1 + dim / 2
        self._path_rate = 2 / (dim + 2)
        self._rate = min(1.0, 2 / (dim**2 + 6) * ((dim + 2) / 3 if diagonal else 1.0))

    def founder(self, outcome: Outcome, unit: Vector, sigma: float) -> _Individual:
        """Return an individual without ancestors."""
        dim = len(unit)
        return _Individual(outcome, unit, sigma, np.ones(dim) if self._diagonal else np.eye(dim), np.zeros(dim))

    def step_size(self, one: _Individual, *, success: bool) -> None:
        """Lengthen the step where more children than the target are better than their parents, else shorten it."""
        one.success = (1 - _SUCCESS_RATE) * one.success + _SUCCESS_RATE * success
        sigma = one.sigma * float(np.exp((one.success - _TARGET) / (self._damping * (1 - _TARGET))))
        one.sigma = min(max(sigma, _STD_LIMITS[0]), _STD_LIMITS[1])

    def covariance(self, one: _Individual, step: Vector) -> None:
        """Learn from a step that was better; where these are frequent the path stalls, as the step is too short."""
        path, missing = (1 - self._path_rate) * one.path, self._path_rate * (2 - self._path_rate)
        if one.success < _STALLED:
            path, missing = path + np.sqrt(missing) * step, 0.0
        square = path**2 if self._diagonal else np.outer(path, path)
        one.path = path
        one.covariance = (1 - self._rate) * one.covariance + self._rate * (square + missing * one.covariance)
        one.factor = None


def _as_good(parent: Outcome, child: Outcome) -> bool:
    """Whether the parent is nowhere worse."""
    if max(0.0, parent.violation) != max(0.0, child.violation):
        return parent.violation < child.violation
    if parent.losses is None or child.losses is None:
        return child.losses is None
    return bool((parent.losses <= child.losses).all())
