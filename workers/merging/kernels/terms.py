"""What of a task vector is kept, as plain numbers that every kernel understands."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Vote = Literal["sum", "count"]
"""How the sign of an entry is elected."""

Combine = Literal["sum", "mean", "max"]
"""What becomes of the entries that have the elected sign: their sum, that divided by their weights, or the largest."""


@dataclass(frozen=True)
class Limits:
    """Keeps the entries whose magnitude lies between two limits, both included."""

    low: float = 0.0
    high: float = math.inf


@dataclass(frozen=True)
class Chance:
    """Keeps every entry with the same probability.

    Attributes:
        seed: 64 bits; an entry's lot depends on them and on its number in the parameter, on nothing else.
        keep: the probability, 0 to 1; resolved to 2⁻³².
    """

    seed: int
    keep: float

    @property
    def top(self) -> int:
        """The largest of the 2³² lots with which an entry is kept."""
        return max(round(self.keep * 2.0**32) - 1, 0)

    @property
    def probability(self) -> float:
        """The probability as it is resolved."""
        return (self.top + 1) / 2.0**32


@dataclass(frozen=True)
class RankedChance:
    """Keeps every entry with the probability lowest + step · rank, resolved to 2⁻²⁴.

    Attributes:
        seed: see `Chance`.
        lowest, step: rounded to float32; probabilities outside 0 … 1 are as good as 0 or 1.
        ranks: of the stretch's entries; uint16 seen as int16, flat.
        inverse: divide the kept entries by their probability.
    """

    seed: int
    lowest: float
    step: float
    ranks: Tensor
    inverse: bool = False


@dataclass(frozen=True)
class Term:
    """One model of a sum.

    Attributes:
        tensor: the model's, of the base's shape.
        weight: its coefficient; in a mean, what counts for an entry.
        select: what is kept of its task vector.
        factor: what the kept entries are multiplied by.
    """

    tensor: Tensor
    weight: float
    select: Limits | Chance | RankedChance
    factor: float = 1.0
