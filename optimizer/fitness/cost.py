"""What evaluations cost, beside time: the currency that budgets, cost curves and caches are counted in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields


@dataclass(frozen=True)
class Cost:
    """What one evaluation, or several together, took.

    Attributes:
        items: items that were scored; what a cache answered counts nothing.
        tokens: tokens that a model read and wrote for them, padding not counted; 0 where there are none (images).
        requests: calls of services over the network, repeated ones counted.
        money: what those services charged, in the currency of the job's prices.
    """

    items: float = 0.0
    tokens: float = 0.0
    requests: float = 0.0
    money: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(getattr(self, part.name) + getattr(other, part.name) for part in fields(Cost)))

    @classmethod
    def total(cls, costs: Iterable[Cost]) -> Cost:
        """Return the sum."""
        return sum(costs, cls())

    @classmethod
    def of(cls, data: Mapping[str, float] | None) -> Cost:
        """Return the cost that `to_json` wrote; nothing where there is none."""
        return cls(**(data or {}))

    def to_json(self) -> dict[str, float]:
        """Return the parts that are not zero."""
        return {name: value for name, value in asdict(self).items() if value}


FREE = Cost()
"""What costs nothing."""
