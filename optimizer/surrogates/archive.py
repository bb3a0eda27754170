"""What a surrogate search was told, as arrays, and what it knows of its proposals in flight."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from optimizer.algorithms.base import Outcome
from optimizer.pareto import update_front
from optimizer.surrogates.encoding import Encoding, Units

Vector = NDArray[np.float64]
Mask = NDArray[np.bool_]

_SOME = 0.5
"""The share of the items that a part counts for where nobody says how many there are."""


@dataclass(frozen=True)
class Flying:
    """A proposal that has no outcome yet.

    Attributes:
        number: of the proposal, from 0.
        unit: shape (dim,).
        items: on how many items it is measured; None for all.
    """

    number: int
    unit: Units
    items: int | None = None


@dataclass(frozen=True)
class Observed:
    """Outcomes as arrays, in the order in which they were told.

    Attributes:
        units: shape (n, dim).
        losses: shape (n, objectives); NaN where the evaluation failed or gave no finite numbers.
        violation: shape (n,).
        share: shape (n,), the share of the items it was measured on; 1 for all, and where a lost race tells the rest.
        indices: shape (n,), the candidates' numbers in the job.
    """

    units: Units
    losses: NDArray[np.float64]
    violation: Vector
    share: Vector
    indices: NDArray[np.int64]

    @property
    def measured(self) -> Mask:
        """Which have losses, shape (n,)."""
        return np.asarray(np.isfinite(self.losses).all(axis=1), dtype=np.bool_)

    @property
    def feasible(self) -> Mask:
        """Which have losses and violate nothing, shape (n,)."""
        return np.asarray(self.measured & (self.violation <= 0), dtype=np.bool_)

    def full(self) -> Observed:
        """Return those that were measured on all items or lost a race, and the failed ones."""
        return self.where((self.share >= 1) | ~self.measured)

    def where(self, mask: NDArray[np.bool_] | NDArray[np.int64]) -> Observed:
        """Return the chosen ones."""
        return Observed(self.units[mask], self.losses[mask], self.violation[mask], self.share[mask], self.indices[mask])

    def __len__(self) -> int:
        return len(self.units)


class Archive:
    """Outcomes and proposals in flight.

    Args:
        encoding: of the space.
        objectives: number of losses.
        items: number of items of a full evaluation; 0 where unknown.

    Attributes:
        flying: the proposals that have no outcome yet, in the order of proposing.
        front: indices of the candidates on the front of those that were measured on all items, in the order of joining.
    """

    def __init__(self, encoding: Encoding, objectives: int, items: int = 0) -> None:
        self.flying: list[Flying] = []
        self.front: NDArray[np.int64] = np.empty(0, np.int64)
        self._encoding = encoding
        self._items = items
        self._units: list[Units] = []
        self._losses: list[Vector] = []
        self._rest: list[tuple[float, float, int]] = []
        self._front = np.empty((0, objectives))
        self._arrays: Observed | None = None
        self._objectives = objectives

    def __len__(self) -> int:
        return len(self._units)

    def add(self, outcome: Outcome) -> bool:
        """Take in an outcome; return whether it improved the front of the full evaluations."""
        unit = self._encoding.units(outcome.genome)
        usable = outcome.losses is not None and bool(np.isfinite(outcome.losses).all())
        losses = outcome.losses if outcome.losses is not None and usable else np.full(self._objectives, np.nan)
        share = 1.0
        if outcome.items is not None and not outcome.lost:
            share = min(1.0, outcome.items / self._items) if self._items else _SOME
        self._units.append(unit)
        self._losses.append(losses)
        self._rest.append((max(0.0, float(np.nan_to_num(outcome.violation, nan=np.inf))), share, outcome.index))
        self._arrays = None
        return outcome.feasible and outcome.items is None and self._improves(losses, outcome.index)

    @property
    def pending(self) -> Units:
        """Units of the proposals that have no outcome yet, shape (k, dim)."""
        return np.array([each.unit for each in self.flying]).reshape(-1, self._encoding.dim)

    def land(self, outcome: Outcome) -> int | None:
        """Take the proposal of an own outcome off the list, and return its number; None where there is none.

        It is the nearest one, of those measured on as many items: the recorded genome may differ from what was proposed.
        """
        if not outcome.own or not self.flying:
            return None
        distance = np.abs(self.pending - self._encoding.units(outcome.genome)).max(axis=1)
        items = None if outcome.lost else outcome.items
        others = np.array([each.items != items for each in self.flying])
        return self.flying.pop(int(np.lexsort((distance, others))[0])).number

    def observed(self) -> Observed:
        """Return all outcomes told so far."""
        if self._arrays is None:
            count, dim = len(self._units), self._encoding.dim
            rest = np.array(self._rest).reshape(count, 3)
            self._arrays = Observed(
                np.array(self._units).reshape(count, dim),
                np.array(self._losses).reshape(count, self._objectives),
                rest[:, 0],
                rest[:, 1],
                rest[:, 2].astype(np.int64),
            )
        return self._arrays

    def _improves(self, losses: Vector, index: int) -> bool:
        joins, pushed_out = update_front(self._front, losses)
        if not joins or (self._front == losses).all(axis=1).any():
            return False
        self._front = np.vstack([self._front[~pushed_out], losses])
        self.front = np.append(self.front[~pushed_out], index)
        return True
