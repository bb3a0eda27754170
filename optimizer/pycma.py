"""pycma's strategies, isolated from everything outside: with a random generator of their own, no files, no output."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from optimizer.box_transformation import BoxTransformation
from optimizer.space import Genome, Variable

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it regrets the absence of matplotlib
    from cma import CMAEvolutionStrategy
    from cma.sigma_adaptation import CMAAdaptSigmaCSA

Vector = NDArray[np.float64]

LARGEST_STD = 1 / 3
"""Largest standard deviation, as a fraction of a variable's range."""

_FULL_UP_TO = 200
_SAME = 1e-6


def make_strategy(
    mean: Vector,
    sigma: float,
    population: int,
    random: np.random.Generator,
    *,
    diagonal: bool,
    stds: Vector,
    largest: Vector | float,
    smallest: Vector | float = 0.0,
) -> Any:
    """Return a strategy of pycma that depends on nothing but its arguments, and learns from vectors as recorded.

    Args:
        mean: shape (dim,), where it begins, in its own coordinates.
        sigma: first step size.
        population: samples in a generation.
        random: where its random numbers come from.
        diagonal: whether the covariance stays diagonal.
        stds: shape (dim,), first standard deviations.
        largest, smallest: limits of the standard deviations. Of a single variable, the caller keeps them (`limit_alone`):
            pycma does so by scaling single coordinates, which fails where there is only one.
    """
    several = len(mean) > 1
    options: dict[str, Any] = {
        # pycma's default draws from numpy's global generator, and seeds it.
        "seed": np.nan,
        "randn": lambda *shape: random.standard_normal(shape),
        # It reads options from a file in the working directory otherwise.
        "signals_filename": None,
        "verbose": -10,
        "verb_log": 0,
        "popsize": population,
        "CMA_diagonal": diagonal and several,  # the same for one, and pycma's diagonal needs two
        # Two-point adaptation, the default in high dimensions, needs its own unrecorded vectors back.
        "AdaptSigma": CMAAdaptSigmaCSA,
        "CMA_mirrors": 0,
        # A change of coordinates in mid-run would make recorded vectors mean something else.
        "conditioncov_alleviate": None,
        "maxstd": largest if several else np.inf,
        "minstd": smallest if several else 0.0,
        "CMA_stds": stds / sigma,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one dimension is poorly tested, it says; our tests run it
        return CMAEvolutionStrategy(mean, sigma, options)


def limit_alone(strategy: Any, largest: float, smallest: float = 0.0) -> None:
    """Keep the limits of the standard deviation of a strategy with a single variable; see `make_strategy`."""
    std = float(strategy.stds[0])
    strategy.sigma *= np.clip(std, smallest, largest) / std


class BoundedStrategy:
    """CMA-ES with bounds as pycma keeps them: a transformation that is linear inside and quadratic near the bounds.

    It learns from vectors as they were recorded.

    Args:
        variables: bounds and kinds; integers and choices begin with a standard deviation of half a step at least.
        mean: shape (variables,), inside the bounds.
        sigma: first standard deviation of real variables, in their own units.
        population: candidates in a generation.
        random: the generator; shared with whoever else draws from it.
    """

    def __init__(
        self,
        variables: Sequence[Variable],
        mean: Genome,
        sigma: float,
        population: int,
        random: np.random.Generator,
    ) -> None:
        self._low = np.array([variable.low for variable in variables])
        self._high = np.array([variable.high for variable in variables])
        self._bounds = BoxTransformation(self._low, self._high)
        self._proposed: list[Vector] = []
        real = np.array([variable.kind == "real" for variable in variables])
        self._largest = LARGEST_STD * (self._high - self._low)
        self._strategy = make_strategy(
            self._bounds.inner(mean),
            sigma,
            population,
            random,
            diagonal=len(variables) > _FULL_UP_TO,
            stds=np.minimum(np.where(real, sigma, np.maximum(sigma, 0.5)), self._largest),
            largest=self._largest,
        )

    @property
    def converged(self) -> bool:
        """Whether one of pycma's own stopping criteria is met."""
        return bool(self._strategy.stop())

    def ask(self) -> list[Vector]:
        """Return a generation: vectors inside the bounds."""
        self._proposed = [self._bounds.outer(vector) for vector in self._strategy.ask()]
        return list(self._proposed)

    def tell(self, vectors: Sequence[Vector], losses: Sequence[float]) -> None:
        """Learn from the generation that was asked for last: as many vectors, in any order, and finite losses."""
        self._strategy.tell([self._known(vector) for vector in vectors], list(losses), check_points=False)
        if len(self._low) == 1:
            limit_alone(self._strategy, float(self._largest[0]))

    def _known(self, vector: Vector) -> Vector:
        """The strategy's coordinates; a vector that it did not draw is moved to a plausible distance first."""
        inner = self._bounds.inner(vector)
        if any(np.abs(vector - proposed).max() < _SAME for proposed in self._proposed):
            return inner
        return np.asarray(self._strategy.repair_genotype(inner, copy_if_changed=True), dtype=np.float64)
