"""Random-forest surrogates with Hyperband fidelities: SMAC's way, for mixed spaces and for measures made of many items."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from optimizer.algorithms.base import AlgorithmContext, Outcome, Proposal, algorithm
from optimizer.pareto import nondominated_ranks
from optimizer.spec import Strict
from optimizer.surrogates.acquisition import Boxes, log_improvement, tchebycheff
from optimizer.surrogates.archive import Observed
from optimizer.surrogates.designs import mixtures
from optimizer.surrogates.encoding import Features, Units
from optimizer.surrogates.forest import Forest
from optimizer.surrogates.gaussian_process import squash
from optimizer.surrogates.hyperband import Hyperband, rungs
from optimizer.surrogates.search import INITIAL, SurrogateSearch

_INCUMBENTS = 10
_ROUNDS = 3
_NEIGHBOURS = 20
_WORSE = 0.5

Vector = NDArray[np.float64]
Matrix = NDArray[np.float64]


@algorithm("forest")
class ForestSearch(SurrogateSearch):
    """A random forest predicts the loss; the point of largest expected improvement, or now and then a random one, is next.

    Several objectives: a random augmented Tchebycheff scalarisation for each proposal (ParEGO). Failed evaluations count
    as a little worse than the worst, violating ones by how much they violate.

    Where the objectives have enough items, candidates are measured on a part of them first, and the best one in eta go on
    to eta times as many (`Hyperband`); the number of items is a feature of the forest, which predicts for all of them.
    It never waits.
    """

    summary = (
        "Random-forest surrogate, trying most candidates on few items first: for mixed choices and costly measures."
    )
    reference = (
        "Lindauer et al. 2022, SMAC3, JMLR 23; as in MedSAMix (arXiv:2508.11032) and GPTailor (arXiv:2506.20480)"
    )
    multi_objective = True

    class Options(Strict):
        """Options of `ForestSearch`."""

        items_min: int = Field(
            default=100,
            ge=1,
            description="Fewest items that candidates are measured on; with fewer than eta times as many, always all.",
        )
        eta: int = Field(
            default=3, ge=2, le=10, description="One in so many candidates is measured on so many times as many items."
        )
        hyperband: bool = Field(
            default=True,
            description="Begin with different numbers of items in turn; otherwise always with the fewest (halving).",
        )
        initial: int | None = Field(
            default=None,
            ge=1,
            le=10_000,
            description=f"Outcomes to begin with, warm starts among them, before the forest is grown; {INITIAL}.",
        )
        trees: int = Field(default=20, ge=2, le=1000, description="Trees of the forest.")
        random_share: float = Field(
            default=0.05,
            ge=0,
            le=1,
            description="Share of candidates that are drawn at random, whatever the forest says.",
        )
        candidates: int = Field(
            default=1000, ge=10, le=100_000, description="Random points among which the search for the next one begins."
        )

    def __init__(self, context: AlgorithmContext, options: Any) -> None:
        super().__init__(context, options)
        self._sizes = rungs(max(context.items, default=1), options.items_min, options.eta)
        brackets = len(self._sizes) if options.hyperband else 1
        self._halving = Hyperband(self._sizes, options.eta, brackets) if len(self._sizes) > 1 else None
        self._results: dict[int, tuple[Units, Vector]] = {}
        self._design: Units | None = None
        self._fresh = 0

    def _told(self, outcome: Outcome, number: int | None, improved: bool) -> None:
        del improved
        if number is None or self._halving is None:
            return
        if outcome.losses is not None and outcome.feasible:
            self._results[number] = self.encoding.units(outcome.genome), outcome.losses
        self._halving.finish(number)

    def _recalled(self, number: int) -> int | None:
        return self._begin(number)[1]

    def _begin(self, number: int) -> tuple[int | None, int | None]:
        """Decide what the proposal of this number is: the number of the one it promotes, and on how many items."""
        if self._design is None:
            self._design = self.first_points(self.options.initial)
        promoted, items = None, None
        if self._halving is not None:
            promoted, bracket, rung = self._halving.next(self._rank)
            self._halving.begin(number, bracket, rung, promoted)
            items = self._sizes[rung] if rung + 1 < len(self._sizes) else None
        self._fresh += promoted is None
        return promoted, items

    def _rank(self, numbers: Sequence[int]) -> list[int]:
        """By dominance, then by the weighted sum of what lies above the best, in units of the spread."""
        places = [place for place, number in enumerate(numbers) if number in self._results]
        if not places:
            return []
        losses = np.array([self._results[numbers[place]][1] for place in places])
        spread = np.ptp(losses, axis=0)
        total = (losses - losses.min(axis=0)) / np.where(spread > 0, spread, 1.0) @ self.context.weights
        return [places[i] for i in np.lexsort((total, nondominated_ranks(losses)))]

    def _propose(self, number: int) -> Proposal:
        promoted, items = self._begin(number)
        if promoted is not None:
            unit = self._results[promoted][0]
            return Proposal(self.encoding.genome(np.clip(unit, 0, 1)), self._generation(number), items=items)
        unit = self._new(self.generator(number))
        return Proposal(self.encoding.genome(unit), self._generation(number), items=items)

    def _generation(self, number: int) -> int:
        return number // max(1, self.context.parallel)

    def _new(self, random: np.random.Generator) -> Units:
        """A point that was not proposed before."""
        assert self._design is not None  # noqa: S101  made when the proposal began
        if self._fresh <= len(self._design):
            return np.asarray(self._design[self._fresh - 1], dtype=np.float64)
        observed = self.archive.observed()
        anywhere = self.encoding.repair(random.random((1, self.encoding.dim)))[0]
        measured = observed.losses[observed.measured]
        if random.random() < self.options.random_share or not len(measured) or not np.ptp(measured, axis=0).any():
            return np.asarray(anywhere, dtype=np.float64)
        known = {row.tobytes() for row in [*observed.units, *self.archive.pending]}
        for unit in self._search(observed, random):
            if unit.tobytes() not in known:
                return np.asarray(unit, dtype=np.float64)
        return np.asarray(anywhere, dtype=np.float64)

    # --- forest -----------------------------------------------------------------------------------------------------

    def _costs(self, observed: Observed, random: np.random.Generator) -> Vector:
        """What the forest is fitted to, shape (n,): squashed, 0 at the median of what was measured."""
        measured = observed.measured
        losses = squash(observed.losses[measured])
        values = losses[:, 0]
        if losses.shape[1] > 1:
            spread = np.ptp(losses, axis=0)
            weights = random.dirichlet(np.ones(losses.shape[1])) / np.where(spread > 0, spread, 1.0)
            values = tchebycheff(losses - losses.min(axis=0), weights)
        worst, span = values.max(), max(float(np.ptp(values)), 1e-9)
        out = np.full(len(observed), worst + _WORSE * span)
        violation = observed.violation[measured]
        out[measured] = np.where(violation > 0, worst + _WORSE * span * (1 - 1 / (1 + violation)), values)
        return out

    def _input(self, units: Units, share: Vector | float) -> Features:
        """Features, and the share of the items."""
        x = self.encoding.features(units)
        return x if self._halving is None else np.column_stack([x, np.broadcast_to(share, len(x))])

    def _search(self, observed: Observed, random: np.random.Generator) -> Units:
        """Return points, shape (n, dim), by falling expected improvement: random ones, and neighbours of the best."""
        costs = self._costs(observed, random)
        pending = self.archive.pending
        # Proposals in flight stand with the median cost, lest all look in the same place.
        x = self._input(np.vstack([observed.units, pending]), np.append(observed.share, np.ones(len(pending))))
        y = np.append(costs, np.full(len(pending), np.median(costs)))
        forest = Forest(x, y, random, trees=self.options.trees)
        full = observed.feasible & (observed.share >= 1)
        some = full if full.any() else observed.measured
        best = float(costs[some].min())
        if not full.any():
            best = float(forest.predict(self._input(observed.units[some], 1.0))[0].min())
        boxes = Boxes(np.array([[-np.inf]]), np.array([[best]]))

        def improvement(units: Units) -> Vector:
            mean, std = forest.predict(self._input(units, 1.0))
            return log_improvement(mean[:, None], std[:, None], boxes)

        order = np.argsort(costs, kind="stable")[:_INCUMBENTS]
        count = int(self.options.candidates) // 2
        wide = random.random((count, self.encoding.dim))
        units = self.encoding.repair(np.vstack([wide, mixtures(random, count, observed.units[order])]))
        values = improvement(units)
        centres = np.vstack(
            [self.encoding.repair(observed.units[order]), units[np.argsort(-values, kind="stable")[:5]]]
        )
        for _ in range(_ROUNDS):
            near = self.encoding.repair(self._neighbours(centres, random))
            units, values = np.vstack([units, near]), np.append(values, improvement(near))
            centres = units[np.argsort(-values, kind="stable")[:_INCUMBENTS]]
        return np.asarray(units[np.argsort(-values, kind="stable")], dtype=np.float64)

    def _neighbours(self, centres: Units, random: np.random.Generator) -> Units:
        """Points that differ from a centre in one variable or a few."""
        near = np.repeat(centres, _NEIGHBOURS, axis=0)
        dim = near.shape[1]
        some = random.random(near.shape) < np.where(random.random((len(near), 1)) < 0.5, 1 / dim, 3 / dim)
        some[np.arange(len(near)), random.integers(dim, size=len(near))] = True
        moved = np.where(
            self.encoding.real,
            near + 10 ** random.uniform(-2, -0.5, (len(near), 1)) * random.standard_normal(near.shape),
            random.random(near.shape),
        )
        return np.where(some, moved, near)
