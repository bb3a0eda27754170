"""NSGA-II (Deb, Pratap, Agarwal and Meyarivan 2002), with its constraint domination, on mixed variables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from optimizer.algorithms.base import Algorithm, AlgorithmContext, Generation, Outcome, Proposal, algorithm
from optimizer.pareto import crowding_distance, nondominated_ranks
from optimizer.space import Genome, SearchSpace
from optimizer.spec import Strict

_LARGEST_DEFAULT = 100
_SMALLEST_DEFAULT = 12
_GENERATIONS = 60
_JITTER = 0.1

Vector = NDArray[np.float64]


@algorithm("nsga2")
class Nsga2(Algorithm):
    """Evolves a population towards the whole front.

    Generational: when all offspring of a generation are out it waits for their outcomes. Foreign outcomes (warm starts,
    the user's candidates) join the pool from which the next population is selected. Failed candidates never do.
    """

    summary = "Evolves a population towards the whole Pareto front: dominance first, then crowding."
    reference = "Deb et al. 2002, A Fast and Elitist Multiobjective Genetic Algorithm: NSGA-II, IEEE TEVC 6(2)"
    multi_objective = True

    class Options(Strict):
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
        crossover_probability: float = Field(
            default=0.9, ge=0, le=1, description="Share of offspring that mix two parents; the others copy one."
        )
        crossover_eta: float = Field(
            default=5.0,
            gt=0,
            le=1000,
            description="Distribution index of simulated binary crossover: higher stays closer to the parents.",
        )
        mutation_probability: float | None = Field(
            default=None, gt=0, le=1, description="Probability of each variable to mutate; 1 / variables by default."
        )
        mutation_eta: float = Field(
            default=10.0, gt=0, le=1000, description="Distribution index of polynomial mutation: higher changes less."
        )

    def __init__(self, context: AlgorithmContext, options: Any) -> None:
        super().__init__(context, options)
        self._random = context.generator()
        self._variation = _Variation(context.space, options, self._random)
        self._size = self._default_size() if options.population is None else int(options.population)
        self._pool: list[Outcome] = []  # the population, best first, and what was told since
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
            self._queue = self._first() if self._number == 0 or not self._pool else self._offspring()
            self._generation = Generation(len(self._queue))
        out, self._queue = self._queue[:count], self._queue[count:]
        return out

    def tell(self, outcome: Outcome) -> None:
        """Take in an outcome; the last one of a generation lets the next one be bred."""
        if outcome.losses is not None and np.isfinite(outcome.losses).all():
            self._pool.append(outcome)
        if outcome.own and self._generation is not None and self._generation.add(outcome):
            self._generation = None

    def _select(self, pool: Sequence[Outcome]) -> list[Outcome]:
        """Return the best outcomes, at most a population, best first."""
        distinct = {outcome.genome.tobytes(): outcome for outcome in reversed(pool)}
        ordered = sorted(distinct.values(), key=lambda outcome: outcome.index)
        return [ordered[i] for i in _order(ordered)[: self._size]]

    def _first(self) -> list[Proposal]:
        """The start, mixtures of what is known with some jitter, and a Latin hypercube, a half each.

        Far from the experts' hull most merges are useless, so points around it are worth more than an even cover.
        """
        space, known = self.context.space, [outcome.genome for outcome in self._pool]
        start = self.context.start
        evaluated = self._number > 0 or any((start == genome).all() for genome in known)
        genomes = [] if evaluated else [start]
        anchors = np.array([space.clip(genome) for genome in [start, *known]])
        for _ in range((self._size - len(genomes)) // 2):
            mixture = self._random.dirichlet(np.ones(len(anchors))) @ anchors
            jitter = _JITTER * (space.high - space.low) * self._random.standard_normal(space.dim)
            genomes.append(mixture + jitter)
        genomes.extend(self._latin_hypercube(self._size - len(genomes)))
        return [Proposal(self._variation.repair(genome), self._number) for genome in genomes]

    def _latin_hypercube(self, count: int) -> list[Genome]:
        space = self.context.space
        cells = np.array([self._random.permutation(count) for _ in range(space.dim)]).T.reshape(count, space.dim)
        unit = (cells + self._random.random((count, space.dim))) / max(count, 1)
        return list(space.low + unit * (space.high - space.low))

    def _offspring(self) -> list[Proposal]:
        out: list[Proposal] = []
        while len(out) < self._size:
            a, b = self._tournament(), self._tournament()
            for child in self._variation.children(a.genome, b.genome):
                out.append(Proposal(child, self._number, tuple(dict.fromkeys((a.index, b.index)))))
        return out[: self._size]

    def _tournament(self) -> Outcome:
        """The better of two; the pool is ordered by rank and crowding, so its place decides."""
        return self._pool[int(self._random.integers(len(self._pool), size=2).min())]

    def _default_size(self) -> int:
        budget, parallel = self.context.budget, max(1, self.context.parallel)
        wanted = _LARGEST_DEFAULT if budget is None else budget // _GENERATIONS
        size = min(max(wanted, _SMALLEST_DEFAULT), _LARGEST_DEFAULT)
        return -(-size // parallel) * parallel


class _Variation:
    """Simulated binary crossover and polynomial mutation, bounded (Deb and Agrawal 1995; Deb and Goyal 1996).

    Integers and choices are exchanged by crossover. An integer mutates by at least one, a choice to any other.
    """

    def __init__(self, space: SearchSpace, options: Any, random: np.random.Generator) -> None:
        self._space = space
        self._options = options
        self._random = random
        self._integer = np.array([variable.kind == "integer" for variable in space.variables])
        self._choice = np.array([variable.kind == "choice" for variable in space.variables])
        self._discrete = self._integer | self._choice

    def children(self, a: Genome, b: Genome) -> list[Genome]:
        """Return two mutated children; none of them equals a parent."""
        a, b = self.repair(a), self.repair(b)
        crossed = self._cross(a, b) if self._random.random() < self._options.crossover_probability else (a, b)
        out = []
        for child in crossed:
            mutant = self._mutate(child, self._mask())
            if (mutant == a).all() or (mutant == b).all():
                mutant = self._mutate(child, np.arange(len(a)) == self._random.integers(len(a)))
            out.append(mutant)
        return out

    def repair(self, genome: Genome) -> Genome:
        """Return the genome inside the bounds, integers whole and choices in the middle of their cell."""
        out = self._space.clip(genome)
        out[self._integer] = np.round(out[self._integer])
        last = self._space.high[self._choice] - 1
        out[self._choice] = np.minimum(np.floor(out[self._choice]), last) + 0.5
        return out

    def _cross(self, a: Genome, b: Genome) -> tuple[Genome, Genome]:
        chosen = self._random.random(len(a)) < 0.5
        swap = chosen & self._discrete
        u, side = self._random.random(len(a)), self._random.random(len(a)) < 0.5
        first, second = np.minimum(a, b), np.maximum(a, b)
        gap = np.where(second - first > 1e-14, second - first, np.inf)
        low = self._spread(u, 1 + 2 * (first - self._space.low) / gap)
        high = self._spread(u, 1 + 2 * (self._space.high - second) / gap)
        width = np.where(np.isfinite(gap), second - first, 0.0)
        one = (first + second - low * width) / 2
        two = (first + second + high * width) / 2
        x, y = np.where(side, one, two), np.where(side, two, one)
        real = chosen & ~self._discrete & np.isfinite(gap)
        return (
            self.repair(np.where(swap, b, np.where(real, x, a))),
            self.repair(np.where(swap, a, np.where(real, y, b))),
        )

    def _spread(self, u: Vector, beta: Vector) -> Vector:
        """The spread factor for uniform numbers ``u`` where the bound is ``beta`` half-distances away."""
        power = self._options.crossover_eta + 1
        alpha = 2 - beta**-power
        near = u <= 1 / alpha
        inside = np.where(near, u * alpha, 1 / np.where(near, 1.0, 2 - u * alpha))
        return np.asarray(inside ** (1 / power), dtype=np.float64)

    def _mask(self) -> NDArray[np.bool_]:
        dim = self._space.dim
        probability = self._options.mutation_probability or 1 / dim
        return self._random.random(dim) < probability

    def _mutate(self, genome: Genome, mask: NDArray[np.bool_]) -> Genome:
        low, high = self._space.low, self._space.high
        span, power = high - low, self._options.mutation_eta + 1
        u = self._random.random(len(genome))
        down = 1 - (genome - low) / span
        up = 1 - (high - genome) / span
        left = (2 * u + (1 - 2 * u) * down**power) ** (1 / power) - 1
        right = 1 - (2 * (1 - u) + (2 * u - 1) * up**power) ** (1 / power)
        moved = genome + span * np.where(u < 0.5, left, right)
        moved = np.where(self._integer, self._step(genome, moved), moved)
        # Another choice: one to all but one cells further, around the corner.
        turn = 1 + np.floor(self._random.random(len(genome)) * (span - 1))
        moved = np.where(self._choice, (genome + turn) % span, moved)
        return self.repair(np.where(mask, moved, genome))

    def _step(self, genome: Genome, moved: Genome) -> Genome:
        """Integers that would round to where they were go one further, away from a bound they stand at."""
        stuck = np.round(moved) == np.round(genome)
        direction = np.where(moved >= genome, 1.0, -1.0)
        direction = np.where(genome + direction > self._space.high, -1.0, direction)
        direction = np.where(genome + direction < self._space.low, 1.0, direction)
        return np.where(stuck, genome + direction, moved)


def _order(pool: Sequence[Outcome]) -> list[int]:
    """Return the places of the pool, best first: feasible ones by front and crowding, then the others by violation."""
    inside = [i for i, outcome in enumerate(pool) if outcome.feasible]
    outside = [i for i, outcome in enumerate(pool) if not outcome.feasible]
    if inside:
        losses = np.array([pool[i].losses for i in inside])
        ranks, crowding = nondominated_ranks(losses), np.zeros(len(inside))
        for rank in np.unique(ranks):
            members = ranks == rank
            crowding[members] = crowding_distance(losses[members])
        inside = [inside[k] for k in np.lexsort((-crowding, ranks))]
    return inside + sorted(outside, key=lambda i: (pool[i].violation, pool[i].index))
