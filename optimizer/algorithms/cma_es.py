"""CMA-ES on the unit cube, around the ``cma`` package with a random generator of its own.

Choices that were measured, on sums of quadratics in merge coefficients with interactions between layers, some of the
experts strangers to the tasks (5 to 104 variables, 100 to 4,000 evaluations), as the best loss found over the loss of the
uniform merge:

- sigma0 = 0.1 of the range: 0.81 after 100 evaluations of 40 variables; 1/6 gave 0.87, a third 1.00. It must shrink where
  there are many variables, as a step's length grows with the root of their number: in 300, 1,000 and 3,000 variables the
  best of seven values were 0.07, 0.05 and 0.03 for short budgets, and 0.1 found nothing at all in 3,000 (1.00 after 1,000
  evaluations, against 0.77).
- Start: the warm starts, weighted and recombined as CMA-ES does with parents (0.77), against the uniform merge (0.84) and
  the best warm start (0.79). Experts alone are corners of the box, good merges lie between the good ones, and weights
  that fall to zero at the median leave strangers out.
- Bounds by a transformation that is linear inside and quadratic near the bounds: it equals clipping and adaptive
  penalties on short runs, and does not stall where the optimum is at a bound.
- Diagonal covariance is better by 0.01 to 0.04 below about 50 evaluations a variable. Beyond that, a full one is no worse,
  and better by one to eight orders of magnitude on rotated ill-conditioned quadratics after 200 evaluations a variable.
  In thousands of variables VD-CMA gains little on such budgets (1,000 variables, 4,000 evaluations, sigma0 = 0.1: 0.59
  against 0.65); the smaller sigma0 gains more (diagonal: 0.18, as much as VkD-CMA with its two-point step sizes).
- Choices by a categorical distribution, against one coordinate cut into cells: excess over the optimum after 300 and 1,000
  evaluations of 20 reals and 10 choices among 4: 0.042 and 0.0004, against 0.146 and 0.067; a learning rate of 0.5 was
  the best of 0.1, 0.2, 0.3 and 0.5 on six such problems.
- Experts probed one by one (`expert_scales`): on eight digits experts, three of which do not belong, the loss after 200
  evaluations is 0.34, without it 0.62, that of the best expert, and on four that all belong 0.38 with and without. With
  sigma0 = 0.07, 0.10 and 0.14 the eight reach 0.364, 0.340 and 0.345, the four 0.390, 0.378 and 0.370. Steps that
  correlate the layers of an expert (0.3, 0.5, 0.8; full covariance) are worse on both: 0.36, 0.38 and 0.44, 0.40 and 0.41.
- `warm_start` from 200 evaluations of another search, then 100 more: on a rotated ellipsoid the mean and the spread of
  the best gave 1.3 and 2.9 (after NSGA-II and CMA-ES), the mean alone 10.8 and 6.8; on Rosenbrock's function 11 and 10
  against 17 and 18; on merges within 2 % of each other but once (0.574 against 0.547); after random search no difference,
  as sigma0 caps the spread. The covariance of Nomura et al. 2021 (arXiv:2012.06932) as published, sigma0 added to the
  spread of the best, was worse than the mean alone after random search (0.63 against 0.56 on merges, 119 against 16).
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from optimizer.algorithms.base import Algorithm, AlgorithmContext, Outcome, Proposal, algorithm
from optimizer.algorithms.scalarise import Scalarisation, Scalariser
from optimizer.expert_scales import SHARE, Probes, expert_columns
from optimizer.fitness.racing import Rivals
from optimizer.mixed_normal import MixedNormal, choice_shares
from optimizer.pending import Pending
from optimizer.space import Genome
from optimizer.spec import Strict

_FULL_UP_TO = 200
_FULL_EVALUATIONS = 50
_SIGMA0 = 0.1
_SIGMA0_PROBED = 0.14
_SIGMA0_UP_TO = 150
_BEST_SHARE = 0.1
_FEWEST_BEST = 5
_SMALLEST_SPREAD = 0.1
_SHRINKAGE = 0.8

Vector = NDArray[np.float64]
_Told = tuple[Outcome, bool]  # and whether the distribution drew it


@algorithm("cma_es")
class CmaEs(Algorithm):
    """CMA-ES with restarts, on mixed variables.

    Generational: when all proposals of a generation are out it waits for their outcomes, or for as many as `close_after`
    says; latecomers join the next generation. It learns from the genomes as recorded, never from what it remembers having
    proposed. Outcomes told before the first proposal set the start (`warm_start`); later foreign ones are injected into
    the generation under way when they beat it (Hansen 2011, arXiv:1110.4181). A generation without a single finite loss
    teaches nothing and is drawn again. Foreign outcomes on a part of the items are not comparable and are ignored.

    Integers keep a margin (Hamano et al. 2022, arXiv:2205.13482), choices have a categorical distribution of their own
    (after Hamano et al. 2024, arXiv:2405.09962).

    When the strategy meets one of its own stopping criteria (pycma's defaults), it restarts from a random point. It never
    stops by itself: a job ends by its budget.
    """

    summary = "Adapts a normal distribution to the best candidates of each generation; the standard for real vectors."
    reference = "Hansen 2016, The CMA Evolution Strategy: A Tutorial (arXiv:1604.00772)"
    races = True

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
        sigma0: float | None = Field(
            default=None,
            gt=0,
            le=1,
            description=(
                f"First standard deviation, as a fraction of each variable's range; {_SIGMA0} by default, "
                f"{_SIGMA0_PROBED} where experts are probed, and with more than {_SIGMA0_UP_TO} variables less: "
                f"× √({_SIGMA0_UP_TO} / variables)."
            ),
        )
        close_after: float = Field(
            default=1.0,
            ge=0.5,
            le=1,
            description=(
                "Share of a generation's outcomes that suffices to go on, so that no worker waits for the slowest; the "
                "late ones join the next generation. For asynchronous jobs, 0.75 is usual."
            ),
        )
        warm_start: Literal["mean", "distribution", "none"] = Field(
            default="distribution",
            description=(
                "What is learned from candidates that others evaluated before: the `mean` of the better ones; or the "
                f"`distribution`: where there are {int(_FEWEST_BEST / _BEST_SHARE)} or more, also the spread of their best "
                "tenth; `none` begins at the uniform merge."
            ),
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
        probe_experts: bool = Field(
            default=True,
            description=(
                "In a space of merge coefficients, begin with a small step of each expert in all layers at once: those that "
                "change the loss most then move least, so that a checkpoint that does not belong cannot spoil every "
                "candidate. One evaluation for each expert and one more, where that is at most a third of the budget."
            ),
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
        self._columns = self._columns_to_probe()
        self._scalariser = Scalariser(context.weights, options.scalarisation, options.normalise)
        self._restarts = _Restarts(options.restarts, options.max_restarts, self._default_population(), self._sigma0())
        self._population = self._restarts.population
        self._distribution: MixedNormal | None = None
        self._pending: Pending[int] = Pending(context.space)
        self._queue: list[Genome] = []
        self._own: list[_Told] = []
        self._late: list[_Told] = []
        self._foreign: list[Outcome] = []
        self._bar: int | None = None
        self._number = -1
        self._first_number = 0  # of the run under way
        self._probes: Probes | None = None
        self._scales = np.ones(context.space.dim)

    @property
    def batch_size(self) -> int:
        """Candidates in a generation."""
        return self._population if self._probes is None else max(self._population, len(self._probes.genomes))

    def ask(self, count: int) -> list[Proposal]:
        """Return the next proposals of the generation; none when all are out and too few have an outcome."""
        if count <= 0:
            return []
        if not self._queue and (self._number < 0 or len(self._own) >= self._enough()):
            self._begin_generation()
        out, self._queue = self._queue[:count], self._queue[count:]
        for genome in out:
            self._pending.add(genome, self._number)
        return [Proposal(genome, self._number) for genome in out]

    def tell(self, outcome: Outcome) -> None:
        """Take in an outcome; the next generation is drawn from what all of them show."""
        if outcome.items is not None and not outcome.own:
            return
        self._scalariser.observe(outcome)
        if not outcome.own:
            self._foreign.append(outcome)
            return
        number = self._pending.pop(outcome.genome)
        if number is None or number == self._number:
            self._own.append((outcome, number is not None))
        elif number >= self._first_number:
            self._late.append((outcome, False))

    def rivals(self) -> Rivals | None:
        """The last of those that the distribution learnt most from: whoever loses to it, would hardly be among them."""
        weights = self._scalariser.linear
        if self._bar is None or weights is None:
            return None
        return Rivals((self._bar,), "sum", tuple(weights.tolist()))

    def _enough(self) -> int:
        if self._probes is not None:
            return len(self._probes.genomes)
        return max(int(np.ceil(self.options.close_after * self._population)), self._population // 2 + 1)

    def _begin_generation(self) -> None:
        self._queue = self._next_generation()
        self._own = []
        self._number += 1

    def _next_generation(self) -> list[Genome]:
        if self._distribution is None:
            if self._number < 0:
                self._probes = self._make_probes()
                if self._probes is not None:
                    return list(self._probes.genomes)
            self._read_probes()
            self._distribution = self._first_distribution()
        else:
            self._learn(self._distribution)
            if self._distribution.converged:
                self._distribution = self._restart()
        return self._distribution.sample()

    def _columns_to_probe(self) -> NDArray[np.int64] | None:
        """Whose coefficients the variables are; None where experts are not probed."""
        columns = expert_columns(self.context.space) if self.options.probe_experts else None
        budget = self.context.budget
        if columns is None or (budget is not None and columns.max() + 2 > SHARE * budget):
            return None
        return columns

    def _make_probes(self) -> Probes | None:
        """What to try first: where it would begin, and a step of each expert from there. None where they are left out."""
        if self._columns is None:
            return None
        known = self._known()
        best, weights = _better(known) if len(known) else (self.context.start[None], np.ones(1))
        return Probes(self.context.space, self._columns, weights @ best)

    def _read_probes(self) -> None:
        """Learn the experts' scales; the probes then count among what is known."""
        if self._probes is None:
            return
        outcomes = [outcome for outcome, _ in self._own]
        feasible = [outcome for outcome in outcomes if outcome.feasible]
        losses = self._scalariser.rank(feasible).tolist() if feasible else []
        self._scales = self._probes.scales([outcome.genome for outcome in feasible], losses)
        self._foreign += outcomes
        self._probes = None

    def _learn(self, distribution: MixedNormal) -> None:
        self._restarts.spent += len(self._own)
        if not any(_finite(outcome) for outcome, _ in self._own):
            return
        told = self._with_guests()
        scores = self._scalariser.rank([outcome for outcome, _ in told])
        self._bar = self._last_of_the_better(told, scores)
        distribution.learn([outcome.genome for outcome, _ in told], [own for _, own in told], scores)
        self._late, self._foreign = [], []

    def _last_of_the_better(self, told: list[_Told], scores: Vector) -> int | None:
        """The worst among the better half of a generation that was measured on all items, by its index."""
        order = [told[i][0] for i in np.argsort(scores, kind="stable")[: max(1, len(told) // 2)]]
        whole = [outcome.index for outcome in order if outcome.feasible and outcome.items is None]
        return whole[-1] if whole else self._bar

    def _with_guests(self) -> list[_Told]:
        """The generation, filled up with latecomers, the best first; a guest that beats it takes the place of its worst."""
        told = [*self._own, *self._sorted([late for late in self._late if late[0].feasible])][: self._population]
        guests = self._sorted([(outcome, False) for outcome in self._foreign if outcome.feasible])[:1]
        if guests:
            order = np.argsort(self._scalariser.rank([outcome for outcome, _ in [*told, *guests]]), kind="stable")
            if order[0] == len(told):
                told = [*(told[i] for i in sorted(order[1:-1])), *guests]
        return told

    def _sorted(self, told: list[_Told]) -> list[_Told]:
        order = np.argsort(self._scalariser.rank([outcome for outcome, _ in told]), kind="stable")
        return [told[i] for i in order]

    def _restart(self) -> MixedNormal:
        self._population, sigma = self._restarts.next(self._random)
        self._first_number, self._late = self._number + 1, []
        self._bar = None
        space = self.context.space
        point = space.low + self._random.random(space.dim) * (space.high - space.low)
        return self._make(point, self._scaled(sigma), sigma=sigma)

    def _known(self) -> Vector:
        """What is known and may be begun from: genomes, the best first, shape (n, dim)."""
        known = [outcome for outcome in self._foreign if outcome.feasible]
        known = [outcome for outcome in known if outcome.own or self.options.warm_start != "none"]
        if not known:
            return np.empty((0, self.context.space.dim))
        order = np.argsort(self._scalariser.rank(known), kind="stable")
        return np.array([self.context.space.clip(known[i].genome) for i in order])

    def _first_distribution(self) -> MixedNormal:
        """Begin at the context's start, or where what is known is best."""
        genomes = self._known()
        self._foreign = []
        if not len(genomes):
            return self._make(self.context.start, self._covariance(genomes))
        best, weights = _better(genomes)
        return self._make(weights @ best, self._covariance(genomes), best, weights)

    def _covariance(self, known: Vector) -> Vector | None:
        """The first covariance in the unit cube, shape (dim, dim); None for a sphere.

        Where enough is known its mean standard deviation is that of the best of it, between a tenth of sigma0 and sigma0;
        its shape is shrunk towards that of the experts' scales.
        """
        best = known[: int(_BEST_SHARE * len(known))]
        if self.options.warm_start != "distribution" or len(best) < _FEWEST_BEST:
            return self._scaled(self._sigma0())
        units = best / (self.context.space.high - self.context.space.low)
        covariance = np.atleast_2d(np.cov(units, rowvar=False, bias=True))
        variance = float(np.trace(covariance)) / len(covariance)
        shape = covariance / variance if variance > 0 else np.eye(len(covariance))
        std = np.clip(np.sqrt(variance), _SMALLEST_SPREAD * self._sigma0(), self._sigma0())
        return np.asarray(std**2 * ((1 - _SHRINKAGE) * shape + _SHRINKAGE * np.diag(self._scales**2)), dtype=np.float64)

    def _scaled(self, sigma: float) -> Vector | None:
        """A covariance with the experts' scales; None where these are all the same."""
        return None if (self._scales == 1).all() else np.diag((sigma * self._scales) ** 2)

    def _make(
        self,
        mean: Genome,
        covariance: Vector | None = None,
        examples: Vector | None = None,
        weights: Vector | None = None,
        sigma: float | None = None,
    ) -> MixedNormal:
        space = self.context.space
        return MixedNormal(
            space,
            self._random,
            self._population,
            diagonal=self._diagonal(),
            mean=mean,
            std=sigma or self._sigma0(),
            covariance=covariance,
            shares=() if examples is None or weights is None else choice_shares(space, examples, weights),
        )

    def _sigma0(self) -> float:
        if self.options.sigma0 is not None:
            return float(self.options.sigma0)
        usual = _SIGMA0 if self._columns is None else _SIGMA0_PROBED
        return usual * min(1.0, float(np.sqrt(_SIGMA0_UP_TO / self.context.space.dim)))

    def _diagonal(self) -> bool:
        dim, budget = self.context.space.dim, self.context.budget
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


def _better(genomes: Vector) -> tuple[Vector, Vector]:
    """The better half of genomes that are ordered, and the weights that CMA-ES gives to parents, which sum to 1."""
    best = genomes[: max(1, len(genomes) // 2)]
    weights = np.log(len(genomes) / 2 + 0.5) - np.log(np.arange(1, len(best) + 1))
    weights = weights if len(best) > 1 else np.ones(1)
    return best, weights / weights.sum()


def _finite(outcome: Outcome) -> bool:
    return outcome.losses is not None and bool(np.isfinite(outcome.losses).all())
