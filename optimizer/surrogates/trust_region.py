"""A box around the best that grows with success and shrinks without (TuRBO; Eriksson et al. 2019, arXiv:1910.01739)."""

from __future__ import annotations

_FIRST, _LARGEST, _SMALLEST = 0.2, 1.6, 2.0**-7
_SUCCESSES = 3


class TrustRegion:
    """Its length follows from which outcomes improved the front.

    Args:
        patience: outcomes in a row without improvement after which it halves.

    Attributes:
        length: side of the box in units, before it is scaled by the length scales.
    """

    def __init__(self, patience: int) -> None:
        self.length = _FIRST
        self._patience = patience
        self._successes = 0
        self._failures = 0

    def add(self, improved: bool) -> None:
        """Take in whether an own outcome improved the front. A box that has shrunk to nothing begins anew."""
        self._successes = self._successes + 1 if improved else 0
        self._failures = 0 if improved else self._failures + 1
        if self._successes == _SUCCESSES:
            self.length, self._successes = min(2 * self.length, _LARGEST), 0
        elif self._failures == self._patience:
            self.length, self._failures = self.length / 2, 0
            if self.length < _SMALLEST:
                self.length = _FIRST
