"""Uniform random search: the baseline every other search must beat."""

from __future__ import annotations

from typing import Any

from optimizer.algorithms.base import Algorithm, AlgorithmContext, Outcome, Proposal, algorithm


@algorithm("random")
class RandomSearch(Algorithm):
    """Independent points, uniform in the box of the bounds. It never waits and learns nothing."""

    summary = "Independent points, uniform within the bounds: the baseline for every other search."
    reference = "Bergstra and Bengio 2012, Random Search for Hyper-Parameter Optimization, JMLR 13"
    multi_objective = True

    def __init__(self, context: AlgorithmContext, options: Any) -> None:
        super().__init__(context, options)
        self._random = context.generator()

    def ask(self, count: int) -> list[Proposal]:
        """Return ``count`` proposals."""
        space = self.context.space
        unit = self._random.random((max(count, 0), space.dim))
        return [Proposal(space.clip(space.low + row * (space.high - space.low))) for row in unit]

    def tell(self, outcome: Outcome) -> None:
        """Take in nothing."""
