"""CMA-ES on the unit cube, around the ``cma`` package with a random generator of its own.

Choices that were measured, on sums of quadratics in merge coefficients with interactions between layers, some of the
experts strangers to the tasks (5 to 104 variables, 100 to 4,000 evaluations), as the best loss found over the loss of the
uniform merge:

- sigma0 = 0.1 of the range: 0.81 after 100 evaluations of 40 variables; 1/6 gave 0.87, a third 1.00.
- Start: the warm starts, weighted and recombined as CMA-ES does with parents (0.77), against the uniform merge (0.84) and
  the best warm start (0.79). Experts alone are corners of the box, good merges lie between the good ones, and weights
  that fall to zero at the median leave strangers out.
- Bounds by a transformation that is linear inside and quadratic near the bounds: it equals clipping and adaptive
  penalties on short runs, and does not stall where the optimum is at a bound.
- Diagonal covariance is better by 0.01 to 0.04 below about 50 evaluations a variable. Beyond that, a full one is no worse,
  and better by one to eight orders of magnitude on rotated ill-conditioned quadratics after 200 evaluations a variable.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from optimizer.algorithms.base import Algorithm, AlgorithmContext, Generation, Outcome, Proposal, algorithm
from optimizer.algorithms.scalarise import Scalarisation, Scalariser
from optimizer.space import Genome, SearchSpace, Variable
from optimizer.spec import Strict

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it regrets the absence of matplotlib
    from cma import CMAEvolutionStrategy
    from cma.boundary_handler import BoxConstraintsLinQuadTransformation
    from cma.sigma_adaptation import CMAAdaptSigmaCSA

_FULL_UP_TO = 200
_FULL_EVALUATIONS = 50
_LARGEST_STD = 1 / 3
_DISCRETE_STD = 0.2
_SAME = 1e-6

Vector = NDArray[np.float64]


@algorithm("cma_es")
class CmaEs(Algorithm):
    """CMA-ES with restarts.

    Generational: when all proposals of a generation are out it waits for their outcomes. It learns from the genomes as
    recorded, never from what it remembers having proposed. Outcomes told before the first proposal set the start point;
    later foreign ones are injected into the generation under way when they beat it (Hansen 2011, arXiv:1110.4181). A
    generation without a single finite loss teaches nothing and is drawn again.

    When the strategy meets one of its own stopping criteria (pycma's defaults), it restarts from a random point. It never
    stops by itself: a job ends by its budget.
    """

    summary = "Adapts a normal distribution to the best candidates of each generation; the standard for real vectors."
    reference = "Hansen 2016, The CMA Evolution Strategy: A Tutorial (arXiv:1604.00772)"

    class Options(Strict):
        """Options of `CmaEs`."""

        population: int | None = Field(
            default=None,
            ge=4,
            le=100_000,
            description=(
                "Candidates in a generation; 4 + 3 ln(variables) by default, rounded up to a multiple of the parallel "
                "evaluations."
            ),
        )
        sigma0: float = Field(
            default=0.1, gt=0, le=1, description="First standard deviation, as a fraction of each variable's range."
        )
        restarts: Literal["none", "ipop", "bipop"] = Field(
            default="none",
            description=(
                "What changes when a converged strategy begins again: `none` keeps its population; `ipop` doubles it each "
                "time (Auger and Hansen 2005); `bipop` alternates with small ones (Hansen 2009)."
            ),
        )
        max_restarts: int = Field(
            default=9, ge=0, le=100, description="After so many restarts the population grows no further."
        )
        covariance: Literal["auto", "full", "diagonal"] = Field(
            default="auto",
            description=(
                "`full` learns how variables depend on each other, `diagonal` only their scales; `auto` is full up to "
                f"{_FULL_UP_TO} variables where the budget allows {_FULL_EVALUATIONS} evaluations for each."
            ),
        )
        scalarisation: Scalarisation = Field(
            default="weighted_sum",
            description="How several objectives become one: their weighted sum, or the worst weighted one (Tchebycheff).",
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
        self._random = context.generator()
        self._cube = _Cube(context.space)
        self._scalariser = Scalariser(context.weights, options.scalarisation, options.normalise)
        self._restarts = _Restarts(options.restarts, options.max_restarts, self._default_population(), options.sigma0)
        self._population = self._restarts.population
        self._strategy: Any = None
        self._generation: Generation | None = None
        self._proposed: list[Genome] = []
        self._queue: list[Genome] = []
        self._foreign: list[Outcome] = []
        self._number = -1

    @property
    def batch_size(self) -> int:
        """Candidates in a generation."""
        return self._population

    def ask(self, count: int) -> list[Proposal]:
        """Return the next proposals of the generation; none when all are out and some have no outcome yet."""
        if count <= 0:
            return []
        if self._generation is None:
            self._begin_generation()
        out, self._queue = self._queue[:count], self._queue[count:]
        return [Proposal(genome, self._number) for genome in out]

    def tell(self, outcome: Outcome) -> None:
        """Take in an outcome; the last one of a generation moves the distribution."""
        self._scalariser.observe(outcome)
        if not outcome.own:
            self._foreign.append(outcome)
        elif self._generation is not None and self._generation.add(outcome):
            self._learn(self._generation.outcomes)
            self._generation = None

    def _begin_generation(self) -> None:
        if self._strategy is None:
            self._start(self._first_mean(), self.options.sigma0)
        elif self._strategy.stop():
            self._population, sigma = self._restarts.next(self._random)
            self._start(self._random.random(self.context.space.dim), sigma)
        self._proposed = [self._cube.genome(vector) for vector in self._strategy.ask()]
        self._queue = list(self._proposed)
        self._generation = Generation(len(self._proposed))
        self._number += 1

    def _learn(self, outcomes: Sequence[Outcome]) -> None:
        self._restarts.spent += len(outcomes)
        if not any(outcome.losses is not None and np.isfinite(outcome.losses).all() for outcome in outcomes):
            return
        guests = [outcome for outcome in self._foreign if outcome.feasible]
        self._foreign = []
        scores = self._scalariser.rank([*outcomes, *guests])
        own, foreign = scores[: len(outcomes)], scores[len(outcomes) :]
        vectors = [
            self._vector(outcome.genome, proposed) for outcome, proposed in zip(outcomes, self._proposed, strict=True)
        ]
        if len(guests) and foreign.min() < own.min():
            worst = int(own.argmax())
            vectors[worst] = self._vector(guests[int(foreign.argmin())].genome)
            own[worst] = foreign.min()
        self._strategy.tell(vectors, own.tolist(), check_points=False)
        if self.context.space.dim == 1:
            # pycma keeps its limits by scaling single coordinates, which fails where there is only one.
            std = float(self._strategy.stds[0])
            self._strategy.sigma *= np.clip(std, self._cube.smallest_std[0], _LARGEST_STD) / std

    def _vector(self, genome: Genome, proposed: Genome | None = None) -> Vector:
        """The strategy's coordinates of a genome.

        One that the strategy did not draw could tear the distribution apart: pycma then shortens the step to a plausible
        length. Its own samples may be long; on another kind of CPU they only differ in their last bits.
        """
        vector = self._cube.vector(genome)
        if proposed is not None and np.abs(self._cube.unit(genome) - self._cube.unit(proposed)).max() < _SAME:
            return vector
        return np.asarray(self._strategy.repair_genotype(vector, copy_if_changed=True), dtype=np.float64)

    def _first_mean(self) -> Vector:
        """Return the weighted mean of the better half of the warm starts, or the context's start where none is known."""
        known = [outcome for outcome in self._foreign if outcome.feasible]
        self._foreign = []
        if not known:
            return self._cube.unit(self.context.start)
        order = np.argsort(self._scalariser.rank(known), kind="stable")[: max(1, len(known) // 2)]
        weights = np.log(len(known) / 2 + 0.5) - np.log(np.arange(1, len(order) + 1))
        weights = weights if len(order) > 1 else np.ones(1)
        units = np.array([self._cube.unit(known[i].genome) for i in order])
        return np.asarray(weights @ units / weights.sum(), dtype=np.float64)

    def _start(self, unit: Vector, sigma: float) -> None:
        several = self.context.space.dim > 1
        options: dict[str, Any] = {
            # A generator of its own: pycma's default draws from numpy's global one, and seeds it.
            "seed": np.nan,
            "randn": lambda *shape: self._random.standard_normal(shape),
            # pycma reads options from a file in the working directory otherwise.
            "signals_filename": None,
            "verbose": -10,
            "verb_log": 0,
            "popsize": self._population,
            "CMA_diagonal": self._diagonal(),
            # Two-point adaptation, the default in high dimensions, needs its own unrecorded vectors back.
            "AdaptSigma": CMAAdaptSigmaCSA,
            "CMA_mirrors": 0,
            # A change of coordinates in mid-run would make recorded vectors mean something else.
            "conditioncov_alleviate": None,
            "maxstd": _LARGEST_STD if several else np.inf,
            "minstd": self._cube.smallest_std if several else 0.0,
            "CMA_stds": np.maximum(1.0, self._cube.first_std / sigma),
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # one dimension is poorly tested, it says; our tests run it
            self._strategy = CMAEvolutionStrategy(self._cube.inverse(unit), sigma, options)

    def _diagonal(self) -> bool:
        dim, budget = self.context.space.dim, self.context.budget
        if dim == 1:
            return False  # the same, and pycma's diagonal needs two
        if self.options.covariance != "auto":
            return bool(self.options.covariance == "diagonal")
        return dim > _FULL_UP_TO or (budget is not None and budget < _FULL_EVALUATIONS * dim)

    def _default_population(self) -> int:
        if self.options.population is not None:
            return int(self.options.population)
        size, parallel = 4 + int(3 * np.log(self.context.space.dim)), max(1, self.context.parallel)
        return -(-size // parallel) * parallel


class _Restarts:
    """Population and step size of each restart.

    Attributes:
        population: of the first run.
        spent: evaluations of the run under way.
    """

    def __init__(self, kind: str, limit: int, population: int, sigma0: float) -> None:
        self.population = population
        self.spent = 0
        self._kind = kind if limit else "none"
        self._limit = limit
        self._sigma0 = sigma0
        self._doublings = 0
        self._small = False
        self._spent = {True: 0, False: 0}

    def next(self, random: np.random.Generator) -> tuple[int, float]:
        """Return population and first standard deviation of the next run."""
        self._spent[self._small] += self.spent
        self.spent = 0
        if self._kind == "none":
            return self.population, self._sigma0
        self._small = self._kind == "bipop" and self._doublings > 0 and self._spent[True] < self._spent[False]
        large = self.population * 2**self._doublings
        if self._small:
            ratio = (large / self.population / 2) ** (random.random() ** 2)
            return max(4, int(self.population * ratio)), float(self._sigma0 * 10 ** (-2 * random.random()))
        self._doublings = min(self._doublings + 1, self._limit)
        return self.population * 2**self._doublings, self._sigma0


class _Cube:
    """Maps genomes to the unbounded coordinates of the strategy, by way of the unit cube, and back.

    Integers and choices keep a standard deviation of a fifth of a step, so that they never freeze (as pycma does, whose
    own integer handling draws from numpy's global generator), and begin with half a step.

    Attributes:
        smallest_std: shape (dim,), lower limit of the standard deviations.
        first_std: shape (dim,), least first standard deviation.
    """

    def __init__(self, space: SearchSpace) -> None:
        self._space = space
        self._range = space.high - space.low
        self._transformation = BoxConstraintsLinQuadTransformation([[0.0, 1.0]])
        steps = np.array([_step(variable) for variable in space.variables])
        self.smallest_std = np.minimum(_DISCRETE_STD * steps, _LARGEST_STD / 2)
        self.first_std = np.minimum(steps / 2, _LARGEST_STD)

    def unit(self, genome: Genome) -> Vector:
        """Return the point of the unit cube, moved inside it where a foreign genome lies outside the bounds."""
        return np.clip((genome - self._space.low) / self._range, 0.0, 1.0)

    def inverse(self, unit: Vector) -> Vector:
        return np.array(self._transformation.inverse(unit.copy()), dtype=np.float64)

    def vector(self, genome: Genome) -> Vector:
        return self.inverse(self.unit(genome))

    def genome(self, vector: Vector) -> Genome:
        unit = np.array(self._transformation.transform(vector.copy()), dtype=np.float64)
        return self._space.clip(self._space.low + unit * self._range)


def _step(variable: Variable) -> float:
    """The distance in the unit cube after which a variable reads as another value; 0 for real ones."""
    return 0.0 if variable.kind == "real" else 1.0 / (variable.high - variable.low)
