"""Quadratic models of losses behind a link, as MAP fits them (Li et al. 2024, arXiv:2406.07529).

A loss is link(½ zᵀAz + bᵀz + e) of the coefficients z: (N + 1)(N + 2) / 2 numbers for N variables. MAP fits them by least
squares to at least as many samples. Here they are ridge regression in its dual form, whose cost depends on the number of
samples only, so that there may be far fewer of them; leaving one out says how strong the ridge must be, and whether
interactions between variables help or a diagonal A predicts better.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

Vector = NDArray[np.float64]
Matrix = NDArray[np.float64]
LinkName = Literal["auto", "sigmoid", "softplus", "identity"]
Interactions = Literal["auto", "full", "diagonal"]

_RIDGES = (1e-5, 1e-3, 1e-2, 1e-1)
_STEPS = 4
_FARTHEST = 12.0
_FLATTEST = 1e-3
_FREE = 100.0
"""How much weaker than the other terms the constant is shrunk."""


@dataclass(frozen=True)
class Link:
    """A monotone function of the quadratic.

    Attributes:
        name: `sigmoid` between the two ends, `softplus` above the lower end, or `identity`.
        low: lower end of the losses.
        scale: width of the range, or the size of a typical loss.
    """

    name: str
    low: float
    scale: float

    def __call__(self, value: Vector) -> Vector:
        """Return losses."""
        shape = {"sigmoid": expit, "softplus": lambda v: np.logaddexp(0.0, v), "identity": lambda v: v}[self.name]
        return np.asarray(self.low + self.scale * shape(value), dtype=np.float64)

    def slope(self, value: Vector) -> Vector:
        """Return the derivative."""
        if self.name == "identity":
            return np.full_like(value, self.scale)
        one = expit(value)
        return np.asarray(self.scale * (one * (1 - one) if self.name == "sigmoid" else one), dtype=np.float64)

    def inverse(self, losses: Vector) -> Vector:
        """Return the values of given losses, which are moved a little inside the range."""
        share = (losses - self.low) / self.scale
        if self.name == "identity":
            return np.asarray(share, dtype=np.float64)
        if self.name == "sigmoid":
            inside = np.clip(share, 1e-3, 1 - 1e-3)
            return np.asarray(np.log(inside / (1 - inside)), dtype=np.float64)
        share = np.maximum(share, 1e-3)
        return np.asarray(share + np.log(-np.expm1(-share)), dtype=np.float64)


def choose_link(losses: Vector, name: LinkName) -> Link:
    """Return the link for losses of the range as seen.

    `auto`: a sigmoid within [-1, 0] (a share that is maximised stands negated), [-100, 0] or [0, 1]; a softplus for other
    losses above 0; the identity for the rest.
    """
    least, most = float(losses.min()), float(losses.max())
    spread = max(most - least, 1e-12)
    for low, width in ((-1.0, 1.0), (0.0, 1.0), (-100.0, 100.0)):
        if name in ("auto", "sigmoid") and low <= least and most <= low + width:
            return Link("sigmoid", low, width)
    if name == "sigmoid":
        return Link("sigmoid", least - 0.1 * spread, 1.2 * spread)
    if name == "identity" or (name == "auto" and least < 0):
        return Link("identity", float(np.median(losses)), spread)
    return Link("softplus", min(0.0, least - 0.1 * spread), max(float(np.median(np.abs(losses))), 1e-12))


class Quadratic:
    """A fitted quadratic.

    Args:
        z: shape (n, features), about between -1 and 1.
        losses: shape (n,).
        link: from the quadratic to the loss.
        weights: shape (n,), how much each observation counts, at most 1.
        interactions: whether A is full or diagonal.

    Attributes:
        r2: share of the losses' variance that is predicted when each observation is left out in turn (with its weight):
            1 is perfect, 0 no better than the mean.
        interactions: whether products of different variables are part of it.
    """

    def __init__(
        self, z: Matrix, losses: Vector, link: Link, weights: Vector, interactions: Interactions = "auto"
    ) -> None:
        self.link = link
        crosses = {"auto": (True, False), "full": (True,), "diagonal": (False,)}[interactions]
        middle = self._working(losses, weights, _gram(z, z, crosses[0]), _RIDGES[2])
        target, precision = middle
        tried = [
            (self._error(_gram(z, z, cross), target, precision, ridge), cross, ridge)
            for cross in crosses
            for ridge in _RIDGES
        ]
        _, self.interactions, ridge = min(tried, key=lambda each: each[0])
        gram = _gram(z, z, self.interactions)
        target, precision = self._working(losses, weights, gram, ridge)
        inverse = np.linalg.inv(gram + np.diag(ridge / precision))
        self._alpha = inverse @ target
        self._inverse, self._z = inverse, z
        self._expand()
        left_out = target - self._alpha / np.diag(inverse)
        self.r2 = _determination(losses, link(np.clip(left_out, -_FARTHEST, _FARTHEST)), weights)
        self._signal = float(target @ self._alpha) / max(len(target), 1)

    def value(self, z: Matrix) -> Vector:
        """Return the quadratic, before the link, shape (m,), at ``z``, shape (m, features)."""
        return np.asarray(
            0.5 * ((z @ self.curvature) * z).sum(axis=1) + z @ self.linear + self.constant, dtype=np.float64
        )

    def predict(self, z: Matrix) -> Vector:
        """Return the losses, shape (m,), at ``z``, shape (m, features)."""
        return self.link(self.value(z))

    def gradient(self, z: Vector) -> tuple[float, Vector]:
        """Return the loss at one point, shape (features,), and its gradient."""
        pulled = self.curvature @ z
        value = np.array([0.5 * float(z @ pulled) + float(z @ self.linear) + self.constant])
        return float(self.link(value)[0]), self.link.slope(value)[0] * (pulled + self.linear)

    def doubt(self, z: Matrix) -> Vector:
        """Return the standard deviation of the predicted losses, shape (m,), at ``z``, by Bayesian ridge regression."""
        cross = _gram(z, self._z, self.interactions)
        own = _diagonal(z, self.interactions)
        variance = np.maximum(own - ((cross @ self._inverse) * cross).sum(axis=1), 0.0)
        slope = np.maximum(self.link.slope(self.value(z)), _FLATTEST * self.link.scale)
        return np.asarray(slope * np.sqrt(max(self._signal, 1e-12) * variance), dtype=np.float64)

    def _working(self, losses: Vector, weights: Vector, gram: Matrix, ridge: float) -> tuple[Vector, Vector]:
        """Gauss-Newton steps on the losses: targets of the quadratic, and how precisely each observation says them."""
        value = self.link.inverse(losses)
        precision = weights
        target = value
        for _ in range(0 if self.link.name == "identity" else _STEPS):
            slope = self.link.slope(value) / self.link.scale
            slope = np.maximum(slope, _FLATTEST)
            typical = slope.max()
            precision = weights * (slope / typical) ** 2
            residual = (losses - self.link(value)) / (self.link.scale * slope)
            target = value + np.clip(residual, -2.0, 2.0)
            alpha = np.linalg.solve(gram + np.diag(ridge / precision), target)
            value = np.clip(gram @ alpha, -_FARTHEST, _FARTHEST)
        return target, precision

    @staticmethod
    def _error(gram: Matrix, target: Vector, precision: Vector, ridge: float) -> float:
        inverse = np.linalg.inv(gram + np.diag(ridge / precision))
        return float(precision @ (inverse @ target / np.diag(inverse)) ** 2)

    def _expand(self) -> None:
        """Read the coefficients off the dual form."""
        z, alpha = self._z, self._alpha
        outer = (z * alpha[:, None]).T @ z
        self.constant = float(_FREE * alpha.sum())
        self.linear = alpha @ z
        # The kernel's ½ z_i² z'_i² is (z_i² / √2)(z'_i² / √2): in ½ zᵀAz the diagonal is Σ alpha z_i'².
        self.curvature = outer if self.interactions else np.diag(np.diag(outer))


def _gram(a: Matrix, b: Matrix, interactions: bool) -> Matrix:
    """Inner products of the features 1, z_i, ½ z_i², and, with interactions, z_i z_j: shape (len(a), len(b))."""
    inner = a @ b.T
    squares = (a * a) @ (b * b).T
    crossed = (inner * inner - squares) / 2 if interactions else 0.0
    return np.asarray(_FREE + inner + squares / 2 + crossed, dtype=np.float64)


def _diagonal(z: Matrix, interactions: bool) -> Vector:
    inner, squares = (z * z).sum(axis=1), (z**4).sum(axis=1)
    crossed = (inner * inner - squares) / 2 if interactions else 0.0
    return np.asarray(_FREE + inner + squares / 2 + crossed, dtype=np.float64)


def _determination(losses: Vector, predicted: Vector, weights: Vector) -> float:
    mean = np.average(losses, weights=weights)
    total = float(weights @ (losses - mean) ** 2)
    return 1.0 - float(weights @ (losses - predicted) ** 2) / total if total > 0 else 1.0
