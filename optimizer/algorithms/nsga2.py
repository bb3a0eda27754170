"""NSGA-II (Deb, Pratap, Agarwal and Meyarivan 2002), with its constraint domination, on mixed variables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from optimizer.algorithms.base import Algorithm, AlgorithmContext, Generation, Outcome, Proposal, algorithm
from optimizer.fitness.racing import Rivals
from optimizer.pareto import crowding_distance, nondominated_ranks
from optimizer.variation import Variation, VariationOptions, first_population

_LARGEST_DEFAULT = 100
_SMALLEST_DEFAULT = 12
_GENERATIONS = 60
_RIVALS = 4


@algorithm("nsga2")
class Nsga2(Algorithm):
    """Evolves a population towards the whole front.

    Generational: when all offspring of a generation are out it waits for their outcomes. Foreign outcomes (warm starts,
    the user's candidates) join the pool from which the next population is selected. Failed candidates never do.
    """

    summary = "Evolves a population towards the whole Pareto front: dominance first, then crowding."
    reference = "Deb et al. 2002, A Fast and Elitist Multiobjective Genetic Algorithm: NSGA-II, IEEE TEVC 6(2)"
    multi_objective = True
    races = True

    class Options(VariationOptions):
        """Options of `Nsga2`."""

        population: int | None = Field(
            default=None,
            ge=4,
            le=10_000,
            description=(
                f"Candidates in a generation; by default so many that the budget makes {_GENERATIONS} generations, between "
                f"{_SMALLEST_DEFAULT} and {_LARGEST_DEFAULT}, rounded up to a multiple of the parallel evaluations."
            ),
        )

    def __init__(self, context: AlgorithmContext, options: Any) -> None:
        super().__init__(context, options)
        self._random = context.generator()
        self._variation = Variation(context.space, options, self._random)
        self._size = self._default_size() if options.population is None else int(options.population)
        self._pool: list[Outcome] = []  # the population, best first, and what was told since
        self._parents: tuple[Outcome, ...] = ()
        self._queue: list[Proposal] = []
        self._generation: Generation | None = None
        self._number = -1

    @property
    def batch_size(self) -> int:
        """Candidates in a generation."""
        return self._size

    def ask(self, count: int) -> list[Proposal]:
        """Return the next proposals of the generation; none when all are out and some have no outcome yet."""
        if count <= 0:
            return []
        if self._generation is None:
            self._number += 1
            self._pool = self._select(self._pool)
            self._parents = tuple(self._pool)
            self._queue = self._offspring() if self._seasoned() else self._first()
            self._generation = Generation(len(self._queue))
        out, self._queue = self._queue[:count], self._queue[count:]
        return out

    def tell(self, outcome: Outcome) -> None:
        """Take in an outcome; the last one of a generation lets the next one be bred."""
        if outcome.items is not None and not outcome.own:
            return  # measured on some items only: not to be compared with the others
        if outcome.losses is not None and np.isfinite(outcome.losses).all():
            self._pool.append(outcome)
        if outcome.own and self._generation is not None and self._generation.add(outcome):
            self._generation = None

    def rivals(self) -> Rivals | None:
        """The last of the population: whoever is dominated by one of them has no place among its better."""
        whole = [outcome for outcome in self._parents if outcome.feasible and outcome.items is None]
        last = whole[-_RIVALS:]
        if len(self._parents) < self._size or not last:
            return None
        return Rivals(tuple(outcome.index for outcome in last), "each", (1.0,) * self.context.objectives)

    def _select(self, pool: Sequence[Outcome]) -> list[Outcome]:
        """Return the best outcomes, at most a population, best first."""
        distinct = {outcome.genome.tobytes(): outcome for outcome in reversed(pool)}
        ordered = sorted(distinct.values(), key=lambda outcome: outcome.index)
        return [ordered[i] for i in self._ordered(ordered)[: self._size]]

    def _ordered(self, pool: Sequence[Outcome]) -> list[int]:
        """The places of the pool, best first; those beyond the size of a population may be missing."""
        inside = [i for i, outcome in enumerate(pool) if outcome.feasible]
        outside = [i for i, outcome in enumerate(pool) if not outcome.feasible]
        if inside:
            inside = [inside[k] for k in self._ranked(np.array([pool[i].losses for i in inside]))]
        return inside + sorted(outside, key=lambda i: (pool[i].violation, pool[i].index))

    def _ranked(self, losses: NDArray[np.float64]) -> Sequence[int]:
        """The rows of feasible losses, best first: by front, then by crowding."""
        ranks, crowding = nondominated_ranks(losses), np.zeros(len(losses))
        for rank in np.unique(ranks):
            members = ranks == rank
            crowding[members] = crowding_distance(losses[members])
        return [int(i) for i in np.lexsort((-crowding, ranks))]

    def _seasoned(self) -> bool:
        """Whether there is something to breed from: a generation of its own, or as much from an earlier search."""
        return bool(self._pool) and (self._number > 0 or len(self._pool) >= self._size)

    def _first(self) -> list[Proposal]:
        start, known = self.context.start, [outcome.genome for outcome in self._pool]
        evaluated = self._number > 0 or any((start == genome).all() for genome in known)
        genomes = first_population(self._size, None if evaluated else start, [start, *known], self._variation)
        return [Proposal(genome, self._number) for genome in genomes]

    def _offspring(self) -> list[Proposal]:
        out: list[Proposal] = []
        while len(out) < self._size:
            a, b, c = (self._tournament() for _ in range(3))
            child, count = self._variation.child(a.genome, b.genome, c.genome)
            out.append(Proposal(child, self._number, tuple(dict.fromkeys([a.index, b.index, c.index][:count]))))
        return out

    def _tournament(self) -> Outcome:
        """The better of two; the pool is ordered by rank and crowding, so its place decides."""
        return self._pool[int(self._random.integers(len(self._pool), size=2).min())]

    def _default_size(self) -> int:
        budget, parallel = self.context.budget, max(1, self.context.parallel)
        wanted = _LARGEST_DEFAULT if budget is None else budget // _GENERATIONS
        size = min(max(wanted, _SMALLEST_DEFAULT), _LARGEST_DEFAULT)
        return -(-size // parallel) * parallel
