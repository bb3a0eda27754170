"""Optimizers of the nevergrad package, those that are deterministic.

Listed are the optimizers that, over 1 to 600 variables, budgets of 1 to 3,000 and 1 to 64 in flight, propose the same
points whatever the state of the global generators, leave these untouched, and go on beyond their budget. NGOpt, Shiwa,
nevergrad's CMA, EDA and the metamodels draw from numpy's global generator in some of these settings; TBPSA breaks down
when told of points it did not ask for; one-shot designs (Hammersley, Latin hypercube) end with their budget; optimizers
around scipy hang the interpreter at exit.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from pydantic import Field

from optimizer.algorithms.base import Algorithm, AlgorithmContext, Outcome, Proposal, algorithm
from optimizer.pending import Pending
from optimizer.space import Genome
from optimizer.spec import Strict

OptimizerName = Literal[
    "AlmostRotationInvariantDE",
    "CauchyOnePlusOne",
    "DE",
    "DiscreteLenglerOnePlusOne",
    "GeneticDE",
    "OnePlusOne",
    "OptimisticNoisyOnePlusOne",
    "PSO",
    "RotatedTwoPointsDE",
    "SQOPSO",
    "TwoPointsDE",
]

_BEYOND = 1e15  # nevergrad clips from 5e20


@algorithm("nevergrad")
class Nevergrad(Algorithm):
    """An optimizer of nevergrad on the unit cube, on the weighted sum of the losses. It never waits.

    Foreign outcomes are told as points it did not ask for, and so is a recorded genome that was none of its proposals.
    Those that violate constraints or failed get losses beyond all real ones; the listed optimizers compare losses and do
    not average them. Foreign outcomes on a part of the items are not comparable and are ignored.
    """

    summary = "An optimizer of the nevergrad package, by name: differential evolution, particle swarms, (1+1)."
    reference = "Bennet et al. 2021, Nevergrad: Black-Box Optimization Platform, SIGEVOlution 14(1)"

    class Options(Strict):
        """Options of `Nevergrad`."""

        optimizer: OptimizerName = Field(
            default="AlmostRotationInvariantDE",
            description="Name of the optimizer in nevergrad's registry; those that are deterministic are listed.",
        )
        sigma0: float = Field(
            default=1 / 6, gt=0, le=1, description="First standard deviation, as a fraction of each variable's range."
        )

    def __init__(self, context: AlgorithmContext, options: Any) -> None:
        super().__init__(context, options)
        self._range = context.space.high - context.space.low
        self._optimizer = self._make()
        self._pending: Pending[Any] = Pending(context.space)

    def ask(self, count: int) -> list[Proposal]:
        """Return ``count`` proposals."""
        return [Proposal(self._next()) for _ in range(count)]

    def tell(self, outcome: Outcome) -> None:
        """Take in the outcome of a proposal or of a foreign candidate."""
        if outcome.items is not None and not outcome.own:
            return
        self._optimizer.tell(self._candidate(outcome), self._loss(outcome))

    def _candidate(self, outcome: Outcome) -> Any:
        asked = self._pending.pop(outcome.genome) if outcome.own else None
        if asked is not None:
            return asked
        return self._optimizer.parametrization.spawn_child(new_value=self._unit(outcome.genome))

    def _next(self) -> Genome:
        candidate = self._optimizer.ask()
        genome = self.context.space.clip(self.context.space.low + candidate.value * self._range)
        self._pending.add(genome, candidate)
        return genome

    def _unit(self, genome: Genome) -> Genome:
        return np.clip((genome - self.context.space.low) / self._range, 0.0, 1.0)

    def _loss(self, outcome: Outcome) -> float:
        if outcome.losses is None or not np.isfinite(outcome.losses).all():
            return 3 * _BEYOND
        if not outcome.feasible:
            return (2 - 1 / (1 + outcome.violation)) * _BEYOND
        return min(float(outcome.losses @ self.context.weights), _BEYOND)

    def _make(self) -> Any:
        import nevergrad  # takes a second: only for jobs that use it

        parameter = nevergrad.p.Array(init=self._unit(self.context.start))
        parameter.set_mutation(sigma=self.options.sigma0)
        # The order matters: whatever needs a random state before this line would seed one from numpy's global generator.
        parameter.random_state = np.random.RandomState(self.context.seed)
        parameter.set_bounds(0.0, 1.0, full_range_sampling=False)
        return nevergrad.optimizers.registry[self.options.optimizer](
            parametrization=parameter, budget=self.context.budget, num_workers=self.context.parallel
        )
