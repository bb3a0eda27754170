"""The distribution that CMA-ES adapts, over mixed variables: pycma's normal one, and a categorical one for choices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from optimizer.box_transformation import BoxTransformation
from optimizer.pycma import LARGEST_STD, limit_alone, make_strategy
from optimizer.space import Genome, SearchSpace, Variable

_ESCAPE = 0.73
_LEARNING = 0.5

Vector = NDArray[np.float64]


class MixedNormal:
    """A normal distribution in the unit cube of the reals and integers, by pycma, and one of categories for each choice.

    Args:
        space: the variables.
        random: the generator all samples come from.
        population: samples in a generation.
        diagonal: whether the covariance stays diagonal.
        mean: genome to begin at; its choices do not count.
        std: first standard deviation, as a fraction of each range.
        covariance: shape (dim, dim), the first covariance in the unit cube (rows and columns of choices do not count), in
            place of ``std``.
        shares: for each choice its first probabilities.
    """

    def __init__(
        self,
        space: SearchSpace,
        random: np.random.Generator,
        population: int,
        *,
        diagonal: bool,
        mean: Genome,
        std: float,
        covariance: Vector | None = None,
        shares: Sequence[Vector] = (),
    ) -> None:
        chosen = np.array([variable.kind == "choice" for variable in space.variables])
        self._space = space
        self._random = random
        self._population = population
        self._numeric = np.flatnonzero(~chosen)
        self._strategy: Any = None
        if len(self._numeric):
            self._cube = _Cube([space.variables[i] for i in self._numeric], population)
            numbers = self._cube.unit(mean[self._numeric])
            first = None if covariance is None else covariance[np.ix_(self._numeric, self._numeric)]
            self._start(numbers, std, first, diagonal or len(self._numeric) == 1)
        self._choices = _Choices(np.flatnonzero(chosen), [v for v in space.variables if v.kind == "choice"], shares)

    @property
    def converged(self) -> bool:
        """Whether one of pycma's own stopping criteria is met."""
        return self._strategy is not None and bool(self._strategy.stop())

    def sample(self) -> list[Genome]:
        """Return a generation of genomes."""
        genomes = np.zeros((self._population, self._space.dim))
        if self._strategy is not None:
            self._cube.keep_margin(self._strategy)
            units = [self._cube.outer(vector) for vector in self._strategy.ask(self._population)]
            low, high = self._space.low[self._numeric], self._space.high[self._numeric]
            genomes[:, self._numeric] = low + np.array(units) * (high - low)
        self._choices.fill(genomes, self._random)
        return [self._space.clip(genome) for genome in genomes]

    def learn(self, genomes: Sequence[Genome], sampled: Sequence[bool], scores: Vector) -> None:
        """Move towards the genomes with the lowest scores.

        Args:
            genomes: as recorded: at least more than half a population.
            sampled: which of them this distribution drew. Others could tear it apart: pycma shortens their step to a
                plausible length.
            scores: finite, to be minimised.
        """
        if self._strategy is not None:
            vectors = [self._vector(genome[self._numeric], own) for genome, own in zip(genomes, sampled, strict=True)]
            self._strategy.tell(vectors, scores.tolist(), check_points=False)
            if len(self._numeric) == 1:
                limit_alone(self._strategy, LARGEST_STD, float(self._cube.smallest_std[0]))
        best = np.argsort(scores, kind="stable")[: self._population // 2]
        self._choices.learn(np.array(genomes)[best])

    def _vector(self, numbers: Vector, sampled: bool) -> Vector:
        vector = self._cube.inner(self._cube.unit(numbers))
        if sampled:
            return vector
        return np.asarray(self._strategy.repair_genotype(vector, copy_if_changed=True), dtype=np.float64)

    def _start(self, unit: Vector, std: float, covariance: Vector | None, diagonal: bool) -> None:
        stds = np.full(len(unit), std) if covariance is None else np.sqrt(np.diag(covariance))
        self._strategy = make_strategy(
            self._cube.inner(unit),
            std if covariance is None else float(np.exp(np.log(stds).mean())),
            self._population,
            self._random,
            diagonal=diagonal,
            stds=np.clip(stds, self._cube.first_std, LARGEST_STD),
            largest=LARGEST_STD,
            smallest=self._cube.smallest_std,
        )
        if covariance is not None and not diagonal:
            correlation = covariance / np.outer(stds, stds)
            own = np.sqrt(np.diag(self._strategy.sm.C))
            self._strategy.sm.C = correlation * np.outer(own, own)
            self._strategy.sm.update_now(-1)


class _Cube:
    """Maps reals and integers to the unbounded coordinates of the strategy, by way of the unit cube, and back.

    Attributes:
        smallest_std: shape (dim,), lower limit of the standard deviations: an integer in the middle of its cell leaves it
            with the margin's probability, 1 / (variables × population) (Hamano et al. 2022, arXiv:2205.13482).
        first_std: shape (dim,), least first standard deviation: half a step of an integer.
    """

    def __init__(self, variables: Sequence[Variable], population: int) -> None:
        self._low = np.array([variable.low for variable in variables])
        self._range = np.array([variable.high for variable in variables]) - self._low
        self._transformation = BoxTransformation(np.zeros(len(variables)), np.ones(len(variables)))
        self._step = np.array([0.0 if v.kind == "real" else 1.0 / (v.high - v.low) for v in variables])
        self._margin = -float(ndtri(min(0.25, 1 / (len(variables) * population)) / 2))
        self.smallest_std = np.minimum(self._step / 2 / self._margin, LARGEST_STD / 2)
        self.first_std = np.minimum(self._step / 2, LARGEST_STD)

    def unit(self, numbers: Vector) -> Vector:
        """Return the point of the unit cube, moved inside it where a foreign genome lies outside the bounds."""
        return np.asarray(np.clip((numbers - self._low) / self._range, 0.0, 1.0), dtype=np.float64)

    def inner(self, unit: Vector) -> Vector:
        """Return the strategy's coordinates of a point of the unit cube."""
        return self._transformation.inner(unit)

    def outer(self, vector: Vector) -> Vector:
        """Return the point of the unit cube for the strategy's coordinates."""
        return self._transformation.outer(vector)

    def keep_margin(self, strategy: Any) -> None:
        """Move the mean so far to the nearest other value of an integer that the margin's probability is kept.

        Between two values `smallest_std` does it, but the outermost cells reach beyond the bounds' middle of the cell.
        """
        discrete = self._step > 0
        if not discrete.any():
            return
        unit = self.outer(strategy.mean)
        reach = self._margin * strategy.stds
        low, high = self._step / 2 - reach, 1 - self._step / 2 + reach
        moved = np.where(discrete, np.clip(unit, np.minimum(low, 0.5), np.maximum(high, 0.5)), unit)
        if (moved != unit).any():
            strategy.mean = np.where(moved != unit, self.inner(moved), strategy.mean)


class _Choices:
    """A categorical distribution for each choice, moved towards the shares among the best (as in CatCMA).

    Hamano et al. 2024, arXiv:2405.09962. No probability falls below a margin, so that no value is lost for good.
    """

    def __init__(self, places: NDArray[np.int64], variables: Sequence[Variable], shares: Sequence[Vector]) -> None:
        self._places = places
        counts = [len(variable.choices) for variable in variables]
        self._shares = [
            np.array(shares[k]) if len(shares) else np.full(count, 1 / count) for k, count in enumerate(counts)
        ]
        self._least = [(1 - _ESCAPE ** (1 / len(counts))) / max(count - 1, 1) for count in counts]

    def fill(self, genomes: NDArray[np.float64], random: np.random.Generator) -> None:
        """Draw the choices of genomes, shape (population, dim), in place: the middle of each one's cell."""
        for place, shares in zip(self._places, self._shares, strict=True):
            drawn = np.searchsorted(np.cumsum(shares)[:-1], random.random(len(genomes)), side="right")
            genomes[:, place] = drawn + 0.5

    def learn(self, best: NDArray[np.float64]) -> None:
        """Move towards the shares among ``best``, shape (selected, dim), best first."""
        if not len(self._places):
            return
        weights = np.log(len(best) + 0.5) - np.log(np.arange(1, len(best) + 1))
        for k, place in enumerate(self._places):
            seen = _shares(best[:, place], weights, len(self._shares[k]))
            shares = np.maximum((1 - _LEARNING) * self._shares[k] + _LEARNING * seen, self._least[k])
            self._shares[k] = shares / shares.sum()


def choice_shares(space: SearchSpace, genomes: Vector, weights: Vector) -> list[Vector]:
    """Return first probabilities for each choice of a space: half even, half the weighted shares among genomes.

    Args:
        genomes: shape (n, dim), n ≥ 1.
        weights: shape (n,), not negative.
    """
    out = []
    for place, variable in enumerate(space.variables):
        if variable.kind == "choice":
            count = len(variable.choices)
            out.append((1 / count + _shares(genomes[:, place], weights, count)) / 2)
    return out


def _shares(numbers: Vector, weights: Vector, count: int) -> Vector:
    values = np.clip(numbers.astype(np.int64), 0, count - 1)
    return np.asarray(np.bincount(values, weights / weights.sum(), minlength=count), dtype=np.float64)
