"""What asking costs, counted as it happens, and stopped before a budget is exceeded."""

from __future__ import annotations

import threading
from dataclasses import replace

from optimizer.errors import JobPaused
from optimizer.fitness.cost import Cost

_BUDGETS = ("requests", "tokens", "money")


class Meter:
    """Counts costs over all threads that ask, and what is under way: no budget is exceeded by asking at the same time.

    Where an estimate was too low, as of the tokens of an answer, a budget may be exceeded by what was under way.

    Args:
        allowance: most that may be spent; parts that are infinite are not bounded.
    """

    def __init__(self, allowance: Cost | None = None) -> None:
        self._lock = threading.Lock()
        self._spent = Cost()
        self._reserved = Cost()
        self._allowance = allowance

    @property
    def spent(self) -> Cost:
        """What was spent and not yet taken."""
        return self._spent

    def allow(self, allowance: Cost | None) -> None:
        """Bound what may be spent, beside what was spent and not yet taken; None for no bound."""
        with self._lock:
            self._allowance = allowance

    def take(self) -> Cost:
        """Return what was spent since this was last called, and lower the allowance by it."""
        with self._lock:
            spent, self._spent = self._spent, Cost()
            if self._allowance is not None:
                left = {name: getattr(self._allowance, name) - getattr(spent, name) for name in _BUDGETS}
                self._allowance = Cost(**left)
            return spent

    def reserve(self, estimate: Cost) -> None:
        """Reserve what a request will probably cost.

        Raises:
            JobPaused: it would exceed the allowance.
        """
        with self._lock:
            wanted = self._spent + self._reserved + estimate
            for name in _BUDGETS if self._allowance is not None else ():
                if getattr(wanted, name) > getattr(self._allowance, name) * (1 + 1e-9):
                    raise JobPaused(
                        f"the budget of {name} is spent",
                        field=f"budget.{name}",
                        remedy="clone the job with a larger one: what was paid for is kept and costs nothing again",
                    )
            self._reserved += estimate

    def settle(self, estimate: Cost, taken: Cost) -> None:
        """Replace what was reserved by what it came to."""
        with self._lock:
            left = {name: getattr(self._reserved, name) - getattr(estimate, name) for name in _BUDGETS}
            self._reserved = replace(self._reserved, **left)
            self._spent += taken
