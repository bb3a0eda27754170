"""How much an evaluation is expected to improve: expected improvement and expected hypervolume improvement, as logarithms.

Both are one formula. Hypervolume improvement is the volume of what the new point dominates and the front does not, so its
expectation for independent normal losses is the integral of the probability to dominate z over all z that the front leaves
free; cut into boxes it is a sum of products of G(u) - G(l), G(z) being the expected improvement below z. With one loss
there is one box, from minus infinity to the best so far. Logarithms keep their slope where the expectation itself would
be zero in floating point (Ament et al. 2023, arXiv:2310.20708).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import erfcx, log_ndtr, logsumexp, ndtr, ndtri

Vector = NDArray[np.float64]
Matrix = NDArray[np.float64]

_LOG_ROOT_2PI = 0.5 * np.log(2 * np.pi)
_LOWEST = -1e8
_FAR = -1e6
_DRAWS = 64
_DOUBTFUL = 10.0


@dataclass(frozen=True)
class Boxes:
    """What a front leaves free, in disjoint boxes.

    Attributes:
        low: shape (boxes, m), -inf where a box has no lower end.
        high: shape (boxes, m).
    """

    low: Matrix
    high: Matrix


def free_boxes(front: Matrix, reference: Vector) -> Boxes:
    """Cut what lies below the reference, shape (m,), and is not dominated by the front, shape (n, m), into boxes.

    Their number grows with n to the power of m - 1.
    """
    front = np.minimum(front, reference)
    if len(reference) == 1:
        best = front[:, 0].min() if len(front) else reference[0]
        return Boxes(np.array([[-np.inf]]), np.array([[best]]))
    ordered = front[np.argsort(front[:, -1], kind="stable")]
    edges = np.concatenate([[-np.inf], ordered[:, -1], reference[-1:]])
    lows, highs = [], []
    for count in range(len(ordered) + 1):
        if edges[count + 1] > edges[count]:
            inner = free_boxes(ordered[:count, :-1], reference[:-1])
            rows = len(inner.low)
            lows.append(np.column_stack([inner.low, np.full(rows, edges[count])]))
            highs.append(np.column_stack([inner.high, np.full(rows, edges[count + 1])]))
    return Boxes(np.vstack(lows), np.vstack(highs))


def log_improvement(mean: Matrix, std: Matrix, boxes: Boxes) -> Vector:
    """Return the logarithm of the expected (hypervolume) improvement, shape (n,).

    Args:
        mean, std: shape (n, m), of independent normal losses; ``std`` is positive.
        boxes: what the front leaves free; with one loss, everything below the best.
    """
    total = np.zeros((len(mean), len(boxes.low)))
    for k in range(mean.shape[1]):
        high, at_high = np.unique(boxes.high[:, k], return_inverse=True)
        below = _log_below(mean[:, k], std[:, k], high)[:, at_high]
        bounded = np.isfinite(boxes.low[:, k])
        if bounded.any():
            low, at_low = np.unique(boxes.low[bounded, k], return_inverse=True)
            cut = _log_below(mean[:, k], std[:, k], low)[:, at_low]
            ratio = np.minimum(cut - below[:, bounded], -1e-15)
            below[:, bounded] += np.log(-np.expm1(ratio))
        total += below
    return np.asarray(np.maximum(logsumexp(total, axis=1), _LOWEST), dtype=np.float64)


def log_feasibility(mean: Vector, std: Vector) -> Vector:
    """Return the logarithm of the probability that a normal value is not above 0, shape (n,), and less below a quarter.

    Near the end improvements that hold the constraints are tiny, and large ones that almost surely violate them would win.
    """
    probability = log_ndtr(-mean / std)
    return np.asarray(probability + _DOUBTFUL * np.minimum(probability - np.log(0.25), 0.0), dtype=np.float64)


class Scalarised:
    """Expected improvement of a random augmented Tchebycheff scalarisation, for many objectives (ParEGO).

    With g(z) = max_k w_k z_k + 0.05 Σ w_k z_k for z over the ideal point, integrated over 64 quasi-random draws.

    Args:
        weights: shape (m,), of this proposal.
        ideal: shape (m,).
        best: the lowest value of g so far.
    """

    def __init__(self, weights: Vector, ideal: Vector, best: float) -> None:
        self._weights, self._ideal, self._best = weights, ideal, best
        self._normal = _normals(_DRAWS, len(weights))

    def __call__(self, mean: Matrix, std: Matrix) -> Vector:
        """Return the logarithm of the expected improvement, shape (n,), for means and deviations of shape (n, m)."""
        draws = mean[:, None, :] + std[:, None, :] * self._normal - self._ideal
        gain = self._best - tchebycheff(draws, self._weights)
        # A soft positive part, so that there is a slope where no draw improves.
        width = 0.05 * std.mean(axis=1)[:, None]
        scaled = gain / width
        soft = np.where(scaled > 30, gain, width * np.logaddexp(0.0, np.minimum(scaled, 30.0)))
        return np.asarray(np.log(np.maximum(soft.mean(axis=1), 1e-300)), dtype=np.float64)


def tchebycheff(losses: NDArray[np.float64], weights: Vector) -> NDArray[np.float64]:
    """Return the augmented Tchebycheff value over the last axis (Knowles 2006)."""
    terms = losses * weights
    return np.asarray(terms.max(axis=-1) + 0.05 * terms.sum(axis=-1), dtype=np.float64)


def _log_below(mean: Vector, std: Vector, levels: Vector) -> Matrix:
    """log E[max(level - Y, 0)] of normal Y, shape (n, levels)."""
    return np.log(std)[:, None] + _log_h((levels - mean[:, None]) / std[:, None])


def _log_h(z: Matrix) -> Matrix:
    """log(φ(z) + z Φ(z)), accurate for all z (Ament et al. 2023)."""
    near = z > -1
    out = np.empty_like(z)
    t = z[near]
    out[near] = np.log(np.exp(-0.5 * t * t - _LOG_ROOT_2PI) + t * ndtr(t))
    t = np.maximum(z[~near], _FAR)
    # 1 + z Φ(z) / φ(z), which cancels to z**-2 far out
    rest = 1 + np.sqrt(np.pi / 2) * erfcx(-t / np.sqrt(2)) * t
    rest = np.where(t < -1e3, t**-2.0, rest)
    out[~near] = -0.5 * t * t - _LOG_ROOT_2PI + np.log(rest)
    return out


def _normals(count: int, dim: int) -> Matrix:
    """Quasi-random standard normal draws, shape (count, dim): an additive recurrence (Roberts' R sequence)."""
    root = 2.0
    for _ in range(60):
        root = (1 + root) ** (1 / (dim + 1))
    steps = root ** -np.arange(1, dim + 1)
    return np.asarray(ndtri((0.5 + np.arange(1, count + 1)[:, None] * steps) % 1.0), dtype=np.float64)
