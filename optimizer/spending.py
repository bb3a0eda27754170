"""A job's budgets in requests, tokens and money: who may spend how much of what is left."""

from __future__ import annotations

import math

from optimizer.fitness.cost import FREE, Cost
from optimizer.spec import Budget

PARTS = ("requests", "tokens", "money")


class Spending:
    """Divides what is left of budgets among the evaluations under way, so that all together never exceed it.

    An evaluation gets its share of what is left. Where a share is less than an evaluation is thought to cost, it gets
    all that is left and goes alone.

    Args:
        budget: the job's.
        spent: what the job cost so far.
        estimate: most that an evaluation is thought to cost.
    """

    def __init__(self, budget: Budget, spent: Cost = FREE, estimate: Cost = FREE) -> None:
        bounds = {part: getattr(budget, part) for part in PARTS}
        self._bounds: dict[str, float] = {part: bound for part, bound in bounds.items() if bound is not None}
        self._spent = spent
        self._estimate = estimate
        self._given: dict[int, dict[str, float]] = {}

    @property
    def exhausted(self) -> str | None:
        """Which budget is spent, in words; None while all have something left."""
        for part, bound in self._bounds.items():
            if getattr(self._spent, part) >= bound * (1 - 1e-9):
                return f"the budget of {bound:g} {part if part != 'money' else 'in money'} is spent"
        return None

    def may_start(self, most: int) -> bool:
        """Return whether another evaluation may start where ``most`` may be under way at once."""
        return not self._given or self._enough(most)

    def start(self, index: int, most: int) -> Cost | None:
        """Return what the evaluation of a candidate may spend; None where nothing bounds it."""
        if not self._bounds:
            return None
        self._given[index] = self._share(most) if self._enough(most) else self._left()
        return Cost(**(dict.fromkeys(PARTS, math.inf) | self._given[index]))

    def end(self, index: int, cost: Cost) -> None:
        """Note that an evaluation is over, and what it cost."""
        self._given.pop(index, None)
        self._spent += cost

    def _left(self) -> dict[str, float]:
        given = self._given.values()
        return {
            part: max(0.0, bound - getattr(self._spent, part) - sum(one[part] for one in given))
            for part, bound in self._bounds.items()
        }

    def _enough(self, most: int) -> bool:
        """Whether a share of what is left is enough for an evaluation, so that others may go beside it."""
        return all(share > 0 and share >= getattr(self._estimate, part) for part, share in self._share(most).items())

    def _share(self, most: int) -> dict[str, float]:
        free = max(1, most - len(self._given))
        return {part: left / free for part, left in self._left().items()}
