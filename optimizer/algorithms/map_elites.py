"""MAP-Elites (Mouret and Clune 2015) with the crossover of M2N2, as the latter's baseline."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from optimizer.algorithms.base import AlgorithmContext, Outcome, Proposal, algorithm
from optimizer.geometry import Cuts
from optimizer.niches.breeding import BreedingOptions, breeding_space, gram_cuts
from optimizer.niches.grid import Elite, Grid
from optimizer.niches.scores import draw, item_gains
from optimizer.niches.search import NicheSearch
from optimizer.problem import Problem
from optimizer.space import JobSpace
from optimizer.spec import JobSpec


@algorithm("map_elites")
class MapElites(NicheSearch):
    """Keeps the best candidate for each combination of descriptors: objectives' values, or accuracies on groups of items.

    Quality is the weighted sum of the objectives' values. Steady state: both parents are drawn among the elites in
    proportion to quality (measured from the worst elite's where that is negative), the second among the others; children
    are bred as in `m2n2`. Infeasible candidates, and such as were measured on part of the items, join no cell.
    """

    summary = "Keeps the best candidate of every kind: a grid over objectives or groups of items, and mates across it."
    reference = "Mouret and Clune 2015, Illuminating search spaces by mapping elites, arXiv 1504.04909"
    multi_objective = True
    needs_items = True

    class Options(BreedingOptions):
        """Options of `MapElites`."""

        bins: int = Field(default=10, ge=1, le=1000, description="Cells along each descriptor.")
        descriptors: Literal["auto", "objectives", "items"] = Field(
            default="auto",
            description=(
                "What the grid is over: the `objectives`' values, or the mean scores of groups of `items`; by default the "
                "former where there are several objectives."
            ),
        )
        groups: int = Field(
            default=2, ge=1, le=8, description="Groups of items, which take turns: item j is in group j mod `groups`."
        )
        item_groups: list[int] | None = Field(
            default=None,
            min_length=1,
            max_length=100_000,
            description="The group of each item, numbered from 0, all objectives' items side by side; in place of turns.",
        )

    @classmethod
    def make_space(cls, spec: JobSpec, problem: Problem, options: Any) -> JobSpace:
        """See `Algorithm.make_space`: tables, or the job's own space."""
        return breeding_space(spec, problem, options)

    @classmethod
    def cuts(cls, options: Any) -> Cuts | None:
        """See `Algorithm.cuts`."""
        return gram_cuts(options)

    def __init__(self, context: AlgorithmContext, options: Any) -> None:
        super().__init__(context, options)
        self._by_objective = options.descriptors == "objectives" or (
            options.descriptors == "auto" and context.objectives > 1
        )
        self._grid: Grid | None = None
        self._dimensions = 0

    def _compete(self, outcome: Outcome) -> None:
        """Put a feasible candidate in its cell if it is the best there."""
        if outcome.losses is None:
            return
        descriptors = self._descriptors(outcome)
        if self._grid is None:
            self._grid = Grid(int(self.options.bins), len(descriptors))
            self._dimensions = len(descriptors)
        if len(descriptors) == self._dimensions:
            quality = -float(outcome.losses @ self.context.weights)
            self._grid.add(Elite(outcome.index, outcome.genome, quality, descriptors))

    def _descriptors(self, outcome: Outcome) -> NDArray[np.float64]:
        if self._by_objective and outcome.losses is not None:
            return -outcome.losses
        gains = np.concatenate(item_gains(outcome))
        given = self.options.item_groups
        if given is not None and len(given) == len(gains):
            groups = np.array(given)
        else:
            groups = np.arange(len(gains)) % int(self.options.groups)
        return np.array([gains[groups == group].mean() for group in np.unique(groups)])

    def _propose(self) -> Proposal:
        generation = self._proposed // int(self.options.bins)
        self._proposed += 1
        elites = list(self._grid or ())
        if len(elites) < 2:
            return self._alone(elites, generation)
        qualities = np.array([elite.quality for elite in elites])
        qualities -= min(0.0, qualities.min())
        first = draw(self._random, qualities)
        others = np.delete(np.arange(len(elites)), first)
        a, b = elites[first], elites[others[draw(self._random, qualities[others])]]
        child = self._breeding.mutate(self._breeding.cross(a.genome, b.genome))
        return Proposal(child, generation, (a.index, b.index))

    def _alone(self, elites: list[Elite], generation: int) -> Proposal:
        """What is proposed without a pair: the beginning, then by turns random ones and mates of these with the elite."""
        if self._first:
            return Proposal(self._first.pop(0), generation)
        fresh = self._breeding.fresh()
        if not elites or self._proposed % 2:
            return Proposal(fresh, generation)
        child = self._breeding.mutate(self._breeding.cross(elites[0].genome, fresh))
        return Proposal(child, generation, (elites[0].index,))
