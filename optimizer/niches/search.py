"""What searches with archives have in common: they breed from what they were told so far, and never wait."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from optimizer.algorithms.base import Algorithm, AlgorithmContext, Outcome, Proposal
from optimizer.niches.breeding import Breeding, make_breeding, same


class NicheSearch(Algorithm):
    """A steady-state search that begins with the models themselves, or with its start in a box."""

    def __init__(self, context: AlgorithmContext, options: Any) -> None:
        super().__init__(context, options)
        self._random = context.generator()
        self._breeding = self._make_breeding()
        self._first = self._breeding.begin()
        self._proposed = 0

    def ask(self, count: int) -> list[Proposal]:
        """Return ``count`` children; it never waits."""
        return [self._propose() for _ in range(max(0, count))]

    def tell(self, outcome: Outcome) -> None:
        """Let a candidate compete, if it is feasible and was measured on all items."""
        self._first = [genome for genome in self._first if not same(genome, outcome.genome)]
        if outcome.feasible and outcome.items is None:
            self._compete(outcome)

    def _make_breeding(self) -> Breeding:
        return make_breeding(self.context, self.options, self._random)

    @abstractmethod
    def _propose(self) -> Proposal:
        """Return the next child."""

    @abstractmethod
    def _compete(self, outcome: Outcome) -> None:
        """Let a feasible candidate compete for a place."""
