"""Which proposal an outcome belongs to, where an algorithm must know more about it than its genome."""

from __future__ import annotations

from typing import Generic, TypeVar

import numpy as np

from optimizer.space import Genome, SearchSpace

T = TypeVar("T")

_SAME = 1e-6


class Pending(Generic[T]):
    """Proposals that are out, each with what the algorithm remembers about it.

    Outcomes come in any order and say only what was evaluated, so proposals are found again by genome, up to the last
    bits in which machines differ. Equal genomes are found in the order of their proposal.
    """

    def __init__(self, space: SearchSpace) -> None:
        self._range = space.high - space.low
        self._out: list[tuple[Genome, T]] = []

    def __len__(self) -> int:
        return len(self._out)

    def add(self, genome: Genome, memory: T) -> None:
        """Remember a proposal."""
        self._out.append((genome, memory))

    def pop(self, genome: Genome) -> T | None:
        """Return what is remembered of the proposal with this genome, once.

        None where another genome was evaluated than any that is out; then the nearest proposal is forgotten, for which
        that one must have stood.
        """
        if not self._out:
            return None
        genomes = np.array([proposed for proposed, _ in self._out])
        distances = (np.abs(genomes - genome) / self._range).max(axis=1)
        nearest = int(np.argmin(distances))
        # Distances that differ in the last bits only are equal: the oldest counts.
        if distances[nearest] < _SAME:
            nearest = int(np.argmax(distances < _SAME))
        memory = self._out.pop(nearest)[1]
        return memory if distances[nearest] < _SAME else None
