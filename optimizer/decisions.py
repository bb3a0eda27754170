"""Genomes as sequences of decisions, for agents that decide one thing after the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from optimizer.space import Genome, SearchSpace, Variable
from optimizer.spaces.actions import ActionSpace

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]


class Decisions(Protocol):
    """A space as decisions.

    Attributes:
        size: of a state.
        actions: the largest number of actions in any state.
    """

    size: int
    actions: int

    def done(self, taken: Sequence[int]) -> bool:
        """Whether nothing is left to decide."""
        ...

    def state(self, taken: Sequence[int]) -> Array:
        """Return what the agent sees after these decisions, shape (size,)."""
        ...

    def allowed(self, taken: Sequence[int]) -> Mask:
        """Return which actions there are after these decisions, shape (actions,)."""
        ...

    def genome(self, taken: Sequence[int], random: np.random.Generator) -> Genome:
        """Return a genome of these decisions."""
        ...

    def taken(self, genome: Genome) -> list[int]:
        """Return the decisions that a genome stands for."""
        ...


def decisions_of(space: SearchSpace, bins: int) -> Decisions:
    """Return a space as decisions: a walk over layers where it is one, else variable by variable."""
    return LayerDecisions(space) if isinstance(space, ActionSpace) else VariableDecisions(space, bins)


class LayerDecisions:
    """Reinforced Model Merging's walk: the state counts how often each block of each model was taken.

    The state alone does not tell where the walk stands after a layer was skipped, so the present layer stands in it
    besides, which the paper's does not have.
    """

    def __init__(self, space: ActionSpace) -> None:
        self._space = space
        self._blocks = len(space.nodes)
        self.size = space.layers * (self._blocks + 1)
        self.actions = self._blocks + 2

    def done(self, taken: Sequence[int]) -> bool:
        """Whether the last layer is behind, or the sequence at its end."""
        return len(taken) == self._space.dim or self._walk(taken)[1] == self._space.layers

    def state(self, taken: Sequence[int]) -> Array:
        """Return the counts, and where the walk stands."""
        counts, layer = self._walk(taken)
        here = np.zeros(self._space.layers)
        here[min(layer, len(here) - 1)] = 1.0
        return np.concatenate([counts.ravel(), here])

    def allowed(self, taken: Sequence[int]) -> Mask:
        """Forbid going back from the first layer."""
        out = np.ones(self.actions, dtype=bool)
        out[-1] = self._walk(taken)[1] > 0
        return out

    def genome(self, taken: Sequence[int], random: np.random.Generator) -> Genome:
        """Return the genome; nothing is random about it."""
        del random
        return self._space.genome(taken)

    def taken(self, genome: Genome) -> list[int]:
        """Return the actions up to the end of the walk."""
        out: list[int] = []
        for variable, number in zip(self._space.variables, genome.tolist(), strict=True):
            if self.done(out):
                break
            out.append(max(0, min(int(number), len(variable.choices) - 1)))
        return out

    def _walk(self, taken: Sequence[int]) -> tuple[Array, int]:
        counts = np.zeros((self._space.layers, self._blocks))
        layer = 0
        for action in taken:
            if layer == self._space.layers:
                break
            if action < self._blocks:
                counts[layer, action] += 1.0
            layer = max(0, layer - 1) if action > self._space.skip else layer + 1
        return counts, layer


class VariableDecisions:
    """One decision for each variable: a choice, an integer, or a part of a range within which the number is drawn.

    The state holds what was decided, and which variable comes next.
    """

    def __init__(self, space: SearchSpace, bins: int) -> None:
        self._space = space
        self._counts = [_count(variable, bins) for variable in space.variables]
        self.size = 2 * space.dim
        self.actions = max(self._counts)

    def done(self, taken: Sequence[int]) -> bool:
        """Whether every variable has its value."""
        return len(taken) == self._space.dim

    def state(self, taken: Sequence[int]) -> Array:
        """Return the middles of what was decided, from -1 to 1, and a 1 at the next variable."""
        out = np.zeros(self.size)
        count = np.array(self._counts[: len(taken)])
        out[: len(taken)] = (2.0 * np.array(taken) + 1.0) / count - 1.0 if len(taken) else 0.0
        if len(taken) < self._space.dim:
            out[self._space.dim + len(taken)] = 1.0
        return out

    def allowed(self, taken: Sequence[int]) -> Mask:
        """Return which parts the next variable has."""
        return np.arange(self.actions) < self._counts[len(taken)]

    def genome(self, taken: Sequence[int], random: np.random.Generator) -> Genome:
        """Return numbers from within the parts; choices and single integers stand at the middle of theirs."""
        inside = random.uniform(0.01, 0.99, self._space.dim)
        exact = [variable.kind == "choice" for variable in self._space.variables]
        unit = (np.array(taken) + np.where(exact, 0.5, inside)) / np.array(self._counts)
        low, high = _edges(self._space)
        return self._space.clip(low + unit * (high - low))

    def taken(self, genome: Genome) -> list[int]:
        """Return the parts that the numbers lie in."""
        low, high = _edges(self._space)
        unit = (self._space.clip(genome) - low) / (high - low)
        counts = np.array(self._counts)
        return [int(number) for number in np.clip(np.floor(unit * counts), 0, counts - 1)]


def _count(variable: Variable, bins: int) -> int:
    if variable.kind == "choice":
        return len(variable.choices)
    values = round(variable.high - variable.low) + 1
    return min(bins, values) if variable.kind == "integer" else bins


def _edges(space: SearchSpace) -> tuple[Genome, Genome]:
    """Bounds of the parts; integers own half a unit on either side."""
    half = np.array([0.5 if variable.kind == "integer" else 0.0 for variable in space.variables])
    return space.low - half, space.high + half
