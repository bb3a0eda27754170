"""Evo-Merging: CMA-ES decides first how much of each expert to keep, then with which coefficient and sign it enters.

After arXiv 2509.12951 (2025), which merges LoRA adapters behind an endpoint that merges and scores, and its released
code; see `EvoMerging` for what differs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from optimizer.algorithms.base import Algorithm, AlgorithmContext, Generation, Outcome, Proposal, algorithm
from optimizer.algorithms.scalarise import Scalariser
from optimizer.evo_space import Indices, make_evo_space, split
from optimizer.problem import Problem
from optimizer.pycma import BoundedStrategy
from optimizer.space import Genome, JobSpace, SearchSpace, Variable
from optimizer.spec import JobSpec, Strict

_POPULATION = 20
_GENERATIONS = 15
_EVALUATIONS = 400
_SAME = 1e-9


@dataclass(frozen=True)
class _Stage:
    """A stage of the search.

    Attributes:
        moved: indices of the variables it moves.
        penalised: indices of those whose mean magnitude is added to the loss.
        weight: λ, the factor of that.
        evaluations: how many it may spend; None for all.
    """

    moved: Indices
    penalised: Indices
    weight: float
    evaluations: int | None

    def penalty(self, genome: Genome) -> float:
        return self.weight * float(np.abs(genome[self.penalised]).mean()) if self.penalised.size else 0.0


@dataclass(frozen=True)
class _Best:
    outcome: Outcome
    penalty: float


@algorithm("evo_merging")
class EvoMerging(Algorithm):
    """Evo-Merging.

    Stage 1 (sparsity-based denoising) moves the kept shares α ∈ [0, 1]^N from 1, with the coefficients at 1/N, to
    minimise loss + λ₁·mean|α|. Stage 2 (sign-aware scaling) holds α at the best of stage 1 and moves the coefficients
    β ∈ [−1.5, 1.5]^N from 1/N, to minimise loss + λ₂·mean|β|. Each is a CMA-ES with a population of 20 and σ₀ = 0.05. A
    later phase of a job begins both at the best candidate before it. With several objectives the loss is the weighted
    mean of the losses, each divided by its spread among the first outcomes.

    Warm starts and users' candidates compete for the best where they differ from it in what the stage moves only.
    Generational: when all proposals of a generation are out it waits for their outcomes. A generation without a single
    finite loss teaches nothing and is drawn again.

    Beyond the released code: a strategy that meets a stopping criterion of pycma in stage 1 hands over to stage 2, and in
    the last stage begins again at the best point; the code ends there. It learns from the genomes as recorded, so that a
    sample beyond a bound counts as its reflection inside.
    """

    summary = (
        "Two stages: how much of each expert to keep, then coefficients of either sign; made for many LoRA adapters."
    )
    reference = "Evo-Merging, arXiv 2509.12951 (2025)"

    class Options(Strict):
        """Options of Evo-Merging; the defaults are the published values."""

        population: int | None = Field(
            default=None,
            ge=4,
            le=100_000,
            description=(
                f"Candidates in a generation; {_POPULATION} by default, fewer where the budget has no {_GENERATIONS} such "
                "generations, rounded up to a multiple of the parallel evaluations."
            ),
        )
        sigma0: float = Field(
            default=0.05, gt=0, le=1, description="First standard deviation of shares and of coefficients."
        )
        share: float = Field(
            default=1 / 3,
            gt=0,
            lt=1,
            description=f"Share of the evaluations for the first stage ({_EVALUATIONS} without a budget).",
        )
        l1_denoise: float = Field(
            default=0.05, ge=0, le=100, description="λ₁: the first stage adds λ₁ times the mean kept share to the loss."
        )
        l1_scale: float = Field(
            default=0.05,
            ge=0,
            le=100,
            description="λ₂: the second stage adds λ₂ times the mean magnitude of the coefficients to the loss.",
        )
        denoise: bool = Field(default=True, description="Whether to run the first stage; otherwise all is kept.")
        scale: bool = Field(default=True, description="Whether to run the second stage; otherwise β stays 1/N.")
        sign_flip: bool = Field(default=True, description="Whether coefficients may be negative.")
        carry_over: bool = Field(
            default=False,
            description=(
                "As the released code: β stays 1/N unless the second stage's loss with its penalty falls below the first "
                "stage's with its own."
            ),
        )

        @model_validator(mode="after")
        def _some(self) -> EvoMerging.Options:
            if not (self.denoise or self.scale):
                raise ValueError(
                    "`denoise` and `scale` are both off: that is the uniform merge, which is a warm start of every job"
                )
            return self

    def __init__(self, context: AlgorithmContext, options: Any) -> None:
        super().__init__(context, options)
        self._random = context.generator()
        self._scalariser = Scalariser(context.weights / context.weights.sum(), "weighted_sum", context.objectives > 1)
        self._variables = _variables(context.space, options.sign_flip)
        self._low = np.array([variable.low for variable in self._variables])
        self._high = np.array([variable.high for variable in self._variables])
        self._anchor = self._clip(context.start)
        self._population = self._choose_population()
        self._stages = self._plan()
        self._stage = self._stages.pop(0)
        self._spent = 0
        self._best: _Best | None = None
        self._strategy: BoundedStrategy | None = None
        self._generation: Generation | None = None
        self._queue: list[Genome] = []
        self._foreign: list[Outcome] = []
        self._number = -1

    @classmethod
    def make_space(cls, spec: JobSpec, problem: Problem, options: Any) -> JobSpace:
        """Make the space of densities and coefficients; see `make_evo_space`."""
        return make_evo_space(spec, problem, densities=options.denoise)

    @property
    def batch_size(self) -> int:
        """Candidates in a generation."""
        return self._population

    @property
    def best(self) -> Genome:
        """The search's answer so far, shape (dim,): the genome with the least penalised loss; its start before any."""
        return self._anchor.copy() if self._best is None else self._clip(self._best.outcome.genome)

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
        if outcome.items is not None:
            return
        self._scalariser.observe(outcome)
        if not outcome.own:
            self._foreign.append(outcome)
        elif self._generation is not None and self._generation.add(outcome):
            self._learn(self._generation.outcomes)
            self._generation = None

    def _begin_generation(self) -> None:
        stage = self._stage
        if self._strategy is None:
            self._take(self._guests())
        elif self._stages and (self._spent >= (stage.evaluations or 0) or self._strategy.converged):
            self._next_stage()
        if self._strategy is None or self._strategy.converged:
            self._start()
        assert self._strategy is not None  # noqa: S101 - it was just made
        self._queue = [self._placed(part) for part in self._strategy.ask()]
        self._generation = Generation(len(self._queue))
        self._number += 1

    def _next_stage(self) -> None:
        self._anchor = self.best
        self._stage = self._stages.pop(0)
        self._strategy = None
        self._spent = 0
        if self._best is not None and not self.options.carry_over:
            self._best = _Best(self._best.outcome, self._stage.penalty(self._anchor))

    def _start(self) -> None:
        moved = self._stage.moved
        first = self._anchor if self._strategy is None else self.best
        variables = [self._variables[i] for i in moved]
        self._strategy = BoundedStrategy(variables, first[moved], self.options.sigma0, self._population, self._random)

    def _learn(self, outcomes: Sequence[Outcome]) -> None:
        self._spent += len(outcomes)
        guests = self._guests()
        if any(outcome.losses is not None and np.isfinite(outcome.losses).all() for outcome in outcomes):
            everyone = [*outcomes, *guests]
            numbers = self._numbers(everyone)
            genomes = [self._clip(outcome.genome)[self._stage.moved] for outcome in everyone]
            _let_in(genomes, numbers, len(outcomes))
            assert self._strategy is not None  # noqa: S101 - a generation has come from it
            self._strategy.tell(genomes[: len(outcomes)], numbers[: len(outcomes)].tolist())
        self._take([*outcomes, *guests])

    def _numbers(self, outcomes: Sequence[Outcome]) -> NDArray[np.float64]:
        """Penalised losses, shape (outcomes,); those without feasible losses come last."""
        return _penalised(self._scalariser, outcomes, [self._stage.penalty(self._clip(o.genome)) for o in outcomes])

    def _take(self, outcomes: Sequence[Outcome]) -> None:
        """Move the best."""
        known = [_Best(o, self._stage.penalty(self._clip(o.genome))) for o in outcomes if o.feasible]
        known = [*([self._best] if self._best else []), *known]
        if known:
            numbers = _penalised(self._scalariser, [b.outcome for b in known], [b.penalty for b in known])
            self._best = known[int(numbers.argmin())]

    def _guests(self) -> list[Outcome]:
        """Feasible foreign outcomes since the last call that differ from the anchor in what the stage moves only."""
        fixed = np.setdiff1d(np.arange(self.context.space.dim), self._stage.moved)
        found = [
            outcome
            for outcome in self._foreign
            if outcome.feasible and np.abs(outcome.genome[fixed] - self._anchor[fixed]).max(initial=0.0) < _SAME
        ]
        # What does not fit the first stage may fit the second.
        self._foreign = (
            [o for o in self._foreign if o.feasible and all(o is not g for g in found)] if self._stages else []
        )
        return found

    def _placed(self, part: NDArray[np.float64]) -> Genome:
        genome = self._anchor.copy()
        genome[self._stage.moved] = part
        return genome

    def _clip(self, genome: Genome) -> Genome:
        return np.clip(genome, self._low, self._high)

    def _choose_population(self) -> int:
        if self.options.population is not None:
            return int(self.options.population)
        budget, parallel = self.context.budget, max(1, self.context.parallel)
        size = _POPULATION if budget is None else min(_POPULATION, max(4, budget // _GENERATIONS))
        return -(-size // parallel) * parallel

    def _plan(self) -> list[_Stage]:
        options, budget = self.options, self.context.budget
        kept, rest, scales = split(self.context.space)
        first = _EVALUATIONS if budget is None else round(options.share * budget)
        stages = [
            _Stage(kept, kept, options.l1_denoise, first if options.scale else None),
            _Stage(rest, scales, options.l1_scale, None),
        ]
        found = [
            stage
            for stage, wanted in zip(stages, (options.denoise, options.scale), strict=True)
            if wanted and stage.moved.size
        ]
        return found or [stage for stage in stages if stage.moved.size]


def _variables(space: SearchSpace, sign_flip: bool) -> list[Variable]:
    """The space's variables, with coefficients from 0 on where they may not be negative."""
    variables = list(space.variables)
    for i in split(space)[2] if not sign_flip else []:
        if variables[i].kind == "real" and variables[i].low < 0 < variables[i].high:
            variables[i] = Variable(variables[i].name, 0.0, variables[i].high)
    return variables


def _penalised(scalariser: Scalariser, outcomes: Sequence[Outcome], penalties: Sequence[float]) -> NDArray[np.float64]:
    """Losses with their penalties; those that are not feasible stay behind all others, in the scalariser's order."""
    numbers = scalariser.rank(outcomes)
    feasible = np.array([outcome.feasible for outcome in outcomes], dtype=bool)
    numbers[feasible] += np.array(penalties)[feasible]
    numbers[~feasible] += max(penalties)
    return numbers


def _let_in(genomes: list[NDArray[np.float64]], numbers: NDArray[np.float64], own: int) -> None:
    """Put the best guest in the place of the worst of the first ``own`` where it beats them all (arXiv 1110.4181)."""
    if len(genomes) > own and numbers[own:].min() < numbers[:own].min():
        worst, best = int(numbers[:own].argmax()), own + int(numbers[own:].argmin())
        genomes[worst], numbers[worst] = genomes[best], numbers[best]
