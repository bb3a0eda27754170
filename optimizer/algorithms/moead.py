"""MOEA/D (Zhang and Li 2007), steady state and with constraints, on mixed variables.

Choices that were measured, as hypervolume after 100, 300 and 1,000 evaluations of ZDT1, DTLZ2, merges of 4 and 5 models
for 2 and 3 objectives, and a digit classifier merged by tensor (tests/benchmarks/search/multi_objective.py; means of the
five over medians of three seeds; all with crossover only):

- Weighted sums: 0.537, 0.651, 0.736; Tchebycheff 0.522, 0.628, 0.717 (25 problems). On merges, whose fronts are convex, they
  differ little after 100 evaluations, then weighted sums are ahead (three objectives: 0.561 and 0.635 against 0.538 and
  0.586); on DTLZ2, whose front is not convex, Tchebycheff is (0.753 and 0.814 against 0.729 and 0.782). PBI is behind
  on both.
- A child takes the places where it gains most: 0.432, 0.534, 0.640, against 0.417, 0.505, 0.609 for those nearest in
  direction (weighted sums, seven functions).
- Five replacements: 0.537, 0.651, 0.736; two: 0.519, 0.620, 0.726; no limit (but 15 problems): 0.535, 0.631, 0.736.
- 12, 25 or 50 problems matter less: few are ahead on short budgets.

All these were chosen on the very problems they were measured on; the benchmark has others that nothing was chosen on.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from optimizer.algorithms.base import Algorithm, AlgorithmContext, Outcome, Proposal, algorithm
from optimizer.pareto import front_mask
from optimizer.reference_points import given_points, spread_points
from optimizer.space import Genome
from optimizer.variation import Variation, VariationOptions, first_population

_EVALUATIONS_EACH = 40
_FEWEST_PROBLEMS = 12
_MOST_PROBLEMS = 100
_NEIGHBOURS = 0.2
_FEWEST_NEIGHBOURS = 4
_SMALLEST_WEIGHT = 1e-3
_AUGMENTATION = 0.01

Losses = NDArray[np.float64]


@algorithm("moead")
class Moead(Algorithm):
    """Solves many scalarised problems at once, each with the help of its neighbours.

    Every direction of the weights is a problem of its own that holds the best candidate so far. Steady state: a child is
    bred from the candidates of neighbouring problems, and takes the places of those it is most ahead of, wherever these
    are (as in MOEA/D-GR, Wang et al. 2014). So it matters neither who proposed a candidate nor in which order outcomes
    come, guests are treated like children, and it never waits. A candidate that violates constraints loses against one
    that violates less (Jain and Deb 2014).
    """

    summary = "Splits the front into many scalarised problems that help their neighbours; never waits."
    reference = (
        "Zhang and Li 2007, MOEA/D: A Multiobjective Evolutionary Algorithm Based on Decomposition, IEEE TEVC 11(6)"
    )
    multi_objective = True

    class Options(VariationOptions):
        """Options of `Moead`."""

        population: int | None = Field(
            default=None,
            ge=2,
            le=10_000,
            description=(
                "Most problems, one for each of evenly spread directions; by default so many that the budget gives each "
                f"{_EVALUATIONS_EACH} evaluations, between {_FEWEST_PROBLEMS} and {_MOST_PROBLEMS}."
            ),
        )
        directions: list[list[float]] = Field(
            default_factory=list,
            max_length=10_000,
            description=(
                "The problems' weights of the objectives' losses, in place of evenly spread ones: a row of numbers for "
                "each, of any length."
            ),
            examples=[[[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]]],
        )
        decomposition: Literal["weighted_sum", "tchebycheff", "pbi"] = Field(
            default="weighted_sum",
            description=(
                "What a problem minimises: the `weighted_sum` of the losses, fastest where the front is convex; the "
                "greatest loss divided by its weight (`tchebycheff`), for fronts of any form; or the distance along its "
                "direction and `theta` times that aside of it (`pbi`)."
            ),
        )
        theta: float = Field(default=5.0, gt=0, le=1000, description="Penalty for the distance aside, with `pbi`.")
        neighbour_probability: float = Field(
            default=0.9,
            ge=0,
            le=1,
            description="Share of children whose parents belong to neighbouring problems; the others' come from anywhere.",
        )
        replacements: int = Field(
            default=5, ge=1, le=10_000, description="Problems in which a child may replace the present candidate."
        )
        normalise: bool = Field(
            default=True,
            description="Measure losses in units of the present front's extent, so that scales do not count.",
        )

    def __init__(self, context: AlgorithmContext, options: Any) -> None:
        super().__init__(context, options)
        self._random = context.generator()
        self._variation = Variation(context.space, options, self._random)
        self._decomposition = _Decomposition(self._directions(), options)
        self._size = len(self._decomposition.weights)
        self._near = self._decomposition.neighbourhoods()
        self._holders: list[Outcome] = []  # of each problem, once anything is known
        self._ideal = np.full(context.objectives, np.inf)
        self._told = 0
        self._asked = 0
        self._queue: list[Genome] = []
        self._turns: list[int] = []

    def ask(self, count: int) -> list[Proposal]:
        """Return ``count`` proposals."""
        return [self._propose() for _ in range(count)]

    def tell(self, outcome: Outcome) -> None:
        """Take in an outcome: it takes the places of candidates that are worse for their problems."""
        if outcome.losses is None or not np.isfinite(outcome.losses).all() or (outcome.items and not outcome.own):
            return
        if outcome.feasible:
            self._ideal = np.minimum(self._ideal, outcome.losses)
        self._told += 1
        if not self._holders:
            self._holders = [outcome] * self._size
            return
        limit = self._size if self._told <= self._size else self.options.replacements
        for problem in self._worse(outcome, outcome.losses)[:limit]:
            self._holders[problem] = outcome

    def _worse(self, outcome: Outcome, losses: Losses) -> list[int]:
        """The problems whose candidates are worse than a new one, those that gain most first."""
        held = np.array([holder.losses for holder in self._holders])
        violation = np.array([max(0.0, holder.violation) for holder in self._holders])
        feasible = violation <= 0
        front = held[feasible] if feasible.any() else held
        ideal = np.where(np.isfinite(self._ideal), self._ideal, np.minimum(held.min(axis=0), losses))
        span = np.ones(len(ideal))
        if self.options.normalise:
            extent = front[front_mask(front)].max(axis=0) - ideal
            extent = np.where(extent > 0, extent, losses - ideal)
            span = np.where(extent > 0, extent, 1.0)
        old = self._decomposition.values((held - ideal) / span)
        new = self._decomposition.values(np.broadcast_to((losses - ideal) / span, held.shape))
        mine = max(0.0, outcome.violation)
        better = np.where(violation == mine, new < old, mine < violation)
        return [int(k) for k in np.lexsort((new - old, mine - violation)) if better[k]]

    def _propose(self) -> Proposal:
        generation = self._asked // self._size
        if not self._queue and (not self._holders or (self._asked == 0 and self._told < self._size)):
            self._queue = self._first()
        self._asked += 1
        return Proposal(self._queue.pop(0), generation) if self._queue else self._child(generation)

    def _first(self) -> list[Genome]:
        start, known = self.context.start, [outcome.genome for outcome in _distinct(self._holders)]
        evaluated = self._asked > 0 or any((start == genome).all() for genome in known)
        return first_population(self._size, None if evaluated else start, [start, *known], self._variation)

    def _child(self, generation: int) -> Proposal:
        self._turns = self._turns or [int(k) for k in self._random.permutation(self._size)]
        problem = self._turns.pop()
        local = self._random.random() < self.options.neighbour_probability
        mates = _distinct([self._holders[k] for k in self._near[problem]] if local else self._holders)
        if len(mates) < 3:
            mates = _distinct(self._holders)
        mates = [mates[int(i)] for i in self._random.permutation(len(mates))]
        own = self._holders[problem]
        others = [mate for mate in mates if mate is not own] or mates
        a, b, c = own, others[0], others[-1]
        genome, count = self._variation.child(a.genome, b.genome, c.genome)
        return Proposal(genome, generation, tuple(dict.fromkeys([a.index, b.index, c.index][:count])))

    def _directions(self) -> Losses:
        objectives = self.context.objectives
        if self.options.directions:
            return given_points(self.options.directions, objectives, "algorithm.options.directions")
        budget = self.context.budget
        wanted = _MOST_PROBLEMS if budget is None else budget // _EVALUATIONS_EACH
        size = min(max(wanted, _FEWEST_PROBLEMS), _MOST_PROBLEMS)
        return spread_points(objectives, self.options.population or size)


class _Decomposition:
    """What the problems minimise.

    Attributes:
        weights: shape (problems, objectives), rows adding up to 1.
    """

    def __init__(self, weights: Losses, options: Any) -> None:
        self.weights = weights
        self._options = options
        self._lines = weights / np.linalg.norm(weights, axis=1, keepdims=True)

    def values(self, unit: Losses) -> Losses:
        """Return the value of each row of normalised losses, shape (problems, objectives), for its problem."""
        kind = self._options.decomposition
        if kind == "weighted_sum":
            # The ends weigh the other losses a little, or they would take the worst for them.
            return np.asarray((np.maximum(self.weights, _SMALLEST_WEIGHT) * unit).sum(axis=1), dtype=np.float64)
        if kind == "tchebycheff":
            terms = unit / np.maximum(self.weights, _SMALLEST_WEIGHT)
            return np.asarray(terms.max(axis=1) + _AUGMENTATION * terms.sum(axis=1), dtype=np.float64)
        along = (unit * self._lines).sum(axis=1)
        aside = np.linalg.norm(unit - along[:, None] * self._lines, axis=1)
        return np.asarray(along + self._options.theta * aside, dtype=np.float64)

    def neighbourhoods(self) -> list[list[int]]:
        """Return for each problem those with the nearest weights, itself first: a fifth of all, four at least."""
        count = max(_FEWEST_NEIGHBOURS, round(_NEIGHBOURS * len(self.weights)))
        distances = np.linalg.norm(self.weights[:, None] - self.weights[None], axis=2)
        return [[int(k) for k in np.argsort(row, kind="stable")[:count]] for row in distances]


def _distinct(outcomes: list[Outcome]) -> list[Outcome]:
    return list({outcome.index: outcome for outcome in outcomes}.values())
