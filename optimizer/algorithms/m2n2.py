"""M2N2, competition and attraction for model fusion (Abrantes et al. 2025), and the genetic algorithm it came from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from optimizer.algorithms.base import AlgorithmContext, Outcome, Proposal, algorithm
from optimizer.errors import InvalidInput
from optimizer.geometry import Cuts
from optimizer.niches.breeding import BreedingOptions, breeding_space, gram_cuts, same
from optimizer.niches.scores import Capacity, ItemScores, draw, item_gains
from optimizer.niches.search import NicheSearch
from optimizer.problem import Problem
from optimizer.space import Genome, JobSpace
from optimizer.spec import JobSpec
from optimizer.tables import Table, TableSpace

_SCALING = 0.3


@dataclass(frozen=True)
class _Member:
    index: int
    genome: Genome


@algorithm("m2n2")
class M2n2(NicheSearch):
    """Keeps an archive in which candidates share what each item has to give, so that specialists for few items survive.

    Steady state: each proposal is a child of two members of the archive as it was told so far, however many are in
    flight. The first parent is drawn by fitness, f_i = Σ_j c_j S_ij / z_j^α with z_j = Σ_i S_ij; the second by
    attraction, g(A, B) = Σ_j c_j max(S_Bj − S_Aj, 0) / z_j^α: it does well where the first does not. An evaluated child
    joins; of more than ``archive`` members the one of least fitness leaves. Infeasible candidates, and such as were
    measured on part of the items, never join. The genetic algorithm that the paper compares with is ``alpha`` = 0 without
    ``attraction``, with ``duplicates``.

    Scores, capacities and several objectives: see `ItemScores`. Where no candidate does better than the first parent on
    any item the second is drawn by fitness among the others. With fewer than two members the models themselves and
    children of them are proposed, in a box its start and random points.
    """

    summary = (
        "Evolves an archive of niches: candidates share each item's reward, and mate where they complement another."
    )
    reference = "Abrantes, Lange and Tang 2025, Competition and Attraction Improve Model Fusion, arXiv 2508.16204"
    needs_items = True

    class Options(BreedingOptions):
        """Options of `M2n2`."""

        archive: int = Field(default=20, ge=2, le=10_000, description="Members of the archive.")
        alpha: float = Field(
            default=1.0,
            ge=0,
            le=4,
            description="Strength of the competition for items: 1 divides an item's reward, 0 gives it to everybody.",
        )
        capacity: Capacity = Field(
            default="auto",
            description=(
                "Reward of an item: 1 (`one`), the archive's highest score (`max`), or the former for scores of 0 and 1 and "
                "the latter for others."
            ),
        )
        attraction: bool = Field(
            default=True, description="Whether the second parent is one that does well where the first does not."
        )
        duplicates: bool = Field(
            default=False,
            description=(
                "Whether a member may enter the archive again and, without attraction, mate with itself, as in "
                "the released code. Without competition copies of a good candidate may then fill the archive early."
            ),
        )
        scaling: float = Field(
            default=_SCALING,
            ge=0,
            le=2,
            description=(
                "How far a child lies from the base, in tables over one: its task vector is multiplied by a factor whose "
                "logarithm has this standard deviation. With 0 coefficients sum to about 1 for ever, as published."
            ),
        )
        crossover: bool = Field(default=True, description="Whether children have two parents; else they only mutate.")

    @classmethod
    def make_space(cls, spec: JobSpec, problem: Problem, options: Any) -> JobSpace:
        """See `Algorithm.make_space`: tables, or the job's own space."""
        if not options.crossover and (options.representation == "table" or options.mutation == 0):
            raise InvalidInput(
                "without crossover and mutation children are their parents",
                field="algorithm.options.crossover",
                remedy="leave `crossover` on, or set `representation` to `coefficients`, where children mutate",
            )
        return breeding_space(spec, problem, options)

    @classmethod
    def cuts(cls, options: Any) -> Cuts | None:
        """See `Algorithm.cuts`."""
        return gram_cuts(options)

    def __init__(self, context: AlgorithmContext, options: Any) -> None:
        super().__init__(context, options)
        self._members: list[_Member] = []
        self._sizes: tuple[int, ...] = ()
        self._gains: NDArray[np.float64] = np.empty((0, 0))
        self._scores: ItemScores | None = None
        self._fitness: NDArray[np.float64] = np.empty(0)

    def _compete(self, outcome: Outcome) -> None:
        gains = item_gains(outcome)
        sizes = tuple(len(part) for part in gains)
        distinct = not self.options.duplicates
        if distinct and any(same(member.genome, outcome.genome) for member in self._members):
            return
        if self._members and sizes != self._sizes:
            return
        before = self._gains, self._scores, self._fitness
        self._sizes = sizes
        self._members.append(_Member(outcome.index, outcome.genome))
        self._gains = np.vstack([self._gains.reshape(-1, sum(sizes)), np.concatenate(gains)])
        self._score()
        if len(self._members) > self.options.archive:
            worst = int(np.argmin(self._fitness))
            del self._members[worst]
            if worst == self.options.archive:  # the newcomer: all is as it was
                self._gains, self._scores, self._fitness = before
                return
            self._gains = np.delete(self._gains, worst, axis=0)
            self._score()

    def _score(self) -> None:
        self._scores = ItemScores(
            self._gains,
            self._sizes,
            self.context.weights,
            alpha=float(self.options.alpha),
            capacity=self.options.capacity,
        )
        self._fitness = self._scores.fitness()

    def _propose(self) -> Proposal:
        generation = self._proposed // int(self.options.archive)
        self._proposed += 1
        if len(self._members) < 2:
            genome = self._first.pop(0) if self._first else self._breeding.fresh()
            return Proposal(genome, generation)
        first = draw(self._random, self._fitness)
        a = self._members[first]
        if not self.options.crossover:
            return Proposal(self._breeding.mutate(a.genome), generation, (a.index,))
        b = self._members[self._second(first)]
        child = self._breeding.mutate(self._scaled(self._breeding.cross(a.genome, b.genome)))
        return Proposal(child, generation, tuple(dict.fromkeys((a.index, b.index))))

    def _scaled(self, genome: Genome) -> Genome:
        """A child nearer to the base or further away: its sum of coefficients stays, the base makes up for the experts'."""
        space = self.context.space
        if not (self.options.scaling and isinstance(space, TableSpace) and space.problem.operator.uses_base):
            return genome
        factor = float(np.exp(self._random.normal(scale=self.options.scaling)))
        table = space.table(genome)
        coefficients = table.coefficients * factor
        coefficients[:, space.models.index("base")] += 1 - factor
        return space.clip(Table(table.breaks, coefficients).encode())

    def _second(self, first: int) -> int:
        """The other parent; without attraction both are drawn by fitness, with replacement if copies are welcome."""
        if not self.options.attraction and self.options.duplicates:
            return draw(self._random, self._fitness)
        others = np.arange(len(self._members)) != first
        chances = np.zeros(len(others))
        if self.options.attraction and self._scores is not None:
            chances = self._scores.attraction(first)
        if not chances.sum() > 0:
            chances = self._fitness * others
        return draw(self._random, chances if chances.sum() > 0 else others.astype(np.float64))
