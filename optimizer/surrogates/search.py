"""What surrogate searches have in common: bookkeeping, and proposals that are pure functions of it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np

from optimizer.algorithms.base import Algorithm, AlgorithmContext, Outcome, Proposal
from optimizer.fitness.racing import Rivals
from optimizer.space import Genome
from optimizer.surrogates.archive import Archive, Flying
from optimizer.surrogates.designs import first_points
from optimizer.surrogates.encoding import Encoding, Units

_RIVALS = 4

INITIAL = "variables + 2 by default, between 4 and 20, and at most a quarter of the budget"


class SurrogateSearch(Algorithm):
    """A search whose next proposal follows from the outcomes told, the genomes in flight, and its own number.

    It never waits. Nothing that is expensive to compute is carried from one proposal to the next: models are fitted when
    a proposal needs one, to what was told until then, and each proposal draws from a generator of its own. So a log is
    replayed without a single fit (`recall`), and the next proposal is the same bit for bit.
    """

    races = True

    def __init__(self, context: AlgorithmContext, options: Any) -> None:
        super().__init__(context, options)
        self.encoding = Encoding(context.space)
        self.archive = Archive(self.encoding, context.objectives, max(context.items, default=0))
        self._key = int(context.generator().integers(2**63))
        self._proposed = 0

    @abstractmethod
    def _propose(self, number: int) -> Proposal:
        """Return the proposal of this number, from 0. Called once for each, in order."""

    def ask(self, count: int) -> list[Proposal]:
        """Return ``count`` proposals, each of which takes those before it into account."""
        return [self._next() for _ in range(max(count, 0))]

    def recall(self, genomes: Sequence[Genome]) -> None:
        """Take in that the next proposals were these, as a log says, without working them out again."""
        for genome in genomes:
            self._take_off(genome, self._recalled(self._proposed))

    def tell(self, outcome: Outcome) -> None:
        """Take in an outcome. Models are fitted when they are needed."""
        number = self.archive.land(outcome)
        self._told(outcome, number, self.archive.add(outcome))

    def rivals(self) -> Rivals | None:
        """The last that joined the front: whoever is dominated by one of them does not, and models do with an estimate."""
        last = self.archive.front[-_RIVALS:].tolist()
        return Rivals(tuple(last), "each", (1.0,) * self.context.objectives) if last else None

    def first_points(self, initial: int | None) -> Units:
        """Return the points to begin with, shape (n, dim), so many as are missing to ``initial`` outcomes; see `INITIAL`."""
        if initial is None:
            budget = self.context.budget
            most = 20 if budget is None else max(2, budget // 4)
            initial = min(max(4, self.context.space.dim + 2), 20, most)
        known = self.archive.observed().full()
        known = known.where(known.measured)
        wanted = max(initial - len(known), min(initial, 2))
        start = self.encoding.units(self.context.start)
        return self.encoding.repair(first_points(self.generator(-1), wanted, start, known.units))

    def generator(self, number: int) -> np.random.Generator:
        """Return the random generator of the proposal of this number; -1 stands for what precedes them all."""
        return np.random.Generator(np.random.PCG64([self._key, number + 1]))

    def _told(self, outcome: Outcome, number: int | None, improved: bool) -> None:
        """Do what else is to be done with an outcome, of the proposal of that number, that may have improved the front."""

    def _recalled(self, number: int) -> int | None:
        """Do what of the proposal of this number later ones depend on; return on how many items it is measured."""
        del number
        return None

    def _next(self) -> Proposal:
        proposal = self._propose(self._proposed)
        self._take_off(proposal.genome, proposal.items)
        return proposal

    def _take_off(self, genome: Genome, items: int | None) -> None:
        self.archive.flying.append(Flying(self._proposed, self.encoding.units(genome), items))
        self._proposed += 1
