"""Gaussian processes with a Matérn 5/2 kernel, a length scale for each variable, and noise.

Written out instead of taken from scikit-learn, whose fit has no priors, no analytic slopes of the posterior, and takes
several times as long: a search fits one for each objective again and again.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_solve, lapack, solve_triangular
from scipy.optimize import minimize

from optimizer.surrogates.encoding import Features

Vector = NDArray[np.float64]
Matrix = NDArray[np.float64]

_JITTER = 1e-8
_SCALE_SIGMA = np.sqrt(3.0)
_NOISE_MODE, _NOISE_SIGMA = -6.0, 2.0
_NOISE_BOUNDS = (-16.0, 1.0)
_STEPS = 30
_ROOT5 = np.sqrt(5.0)


@dataclass(frozen=True)
class Kernel:
    """Hyper-parameters.

    Attributes:
        scales: shape (variables,), length scales.
        noise: variance of the noise over that of the signal.
        signal: variance of the signal.
    """

    scales: Vector
    noise: float
    signal: float


def squash(losses: Matrix) -> Matrix:
    """Return losses, shape (n, m), on a scale of their better half: 0 at the median, -1 at the best, logarithms above.

    A ruined merge can lose a hundred times what a good one does; left as it is, it would leave the model nothing to
    tell good ones apart with. Monotone, so that fronts stay fronts.
    """
    middle = np.median(losses, axis=0)
    spread = middle - losses.min(axis=0)
    spread = np.where(spread > 0, spread, np.ptp(losses, axis=0))
    scaled = (losses - middle) / np.where(spread > 0, spread, 1.0)
    return np.asarray(np.where(scaled > 0, np.log1p(np.maximum(scaled, 0.0)), scaled), dtype=np.float64)


def fit_kernel(x: Features, y: Vector, owner: NDArray[np.int64]) -> Kernel:
    """Return the kernel of highest posterior probability for standardised values.

    The prior of the length scales grows with the root of the number of variables (Hvarfner, Hellsten and Nardi 2024,
    arXiv:2402.02229), without which high-dimensional models stay at their prior mean. The signal's variance is profiled out.

    Args:
        x: shape (n, features).
        y: shape (n,), mean 0 and variance 1.
        owner: shape (features,), the variable of each feature.
    """
    variables = int(owner.max()) + 1
    mode = np.sqrt(2.0) - _SCALE_SIGMA**2 + 0.5 * np.log(variables)
    begin = np.append(np.full(variables, mode + 1.0), _NOISE_MODE)
    posterior = _Posterior(x, y, owner, mode)
    bounds = [(-4.0, 8.0)] * variables + [_NOISE_BOUNDS]
    found = minimize(posterior, begin, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": _STEPS})
    return posterior.kernel(found.x)


class _Posterior:
    """Minus the log posterior of log scales and log noise, with its gradient."""

    def __init__(self, x: Features, y: Vector, owner: NDArray[np.int64], mode: float) -> None:
        self._x, self._y, self._owner, self._mode = x, y, owner, mode
        self._squares = x * x

    def __call__(self, theta: Vector) -> tuple[float, Vector]:
        n = len(self._y)
        log_scales, noise = theta[:-1], float(np.exp(theta[-1]))
        inverse = np.exp(-log_scales)[self._owner]
        root = _ROOT5 * _distances(self._x * inverse, self._x * inverse)
        decay = np.exp(-root)
        gram = (1 + root + root * root / 3) * decay
        lower = _cholesky(gram + (noise + _JITTER) * np.eye(n))
        alpha = cho_solve((lower, True), self._y, check_finite=False)
        signal = (float(self._y @ alpha) + 1.0) / (n + 1)
        value = 0.5 * (n + 1) * np.log(signal) + np.log(np.diag(lower)).sum()
        # d(value)/d(gram) = (inverse of the gram - alpha alpha' / signal) / 2
        middle = _inverse(lower) - np.outer(alpha, alpha) / signal
        weights = middle * (5.0 / 3.0) * (1 + root) * decay
        # Σ_ij W_ij (x_ik - x_jk)² for each feature k, without the n × n × k array.
        pulled = 2 * (weights.sum(axis=1) @ self._squares - np.einsum("ik,ik->k", self._x, weights @ self._x))
        gradient = np.zeros(len(theta))
        np.add.at(gradient, self._owner, 0.5 * pulled * inverse**2)
        gradient[-1] = 0.5 * noise * np.trace(middle)
        away = (log_scales - self._mode) / _SCALE_SIGMA
        noisy = (theta[-1] - _NOISE_MODE) / _NOISE_SIGMA
        value += 0.5 * float(away @ away) + 0.5 * noisy**2
        gradient += np.append(away / _SCALE_SIGMA, noisy / _NOISE_SIGMA)
        return float(value), gradient

    def kernel(self, theta: Vector) -> Kernel:
        process = GaussianProcess(
            self._x, self._y, self._owner, Kernel(np.exp(theta[:-1]), float(np.exp(theta[-1])), 1.0)
        )
        return Kernel(process.kernel.scales, process.kernel.noise, process.misfit)


class GaussianProcess:
    """The posterior given observations, and proposals in flight that are believed to come out as predicted.

    Believed values leave the mean as it is and take away variance (kriging believer; Ginsbourger, Le Riche and Carraro
    2010).

    Args:
        x: shape (n, features).
        y: shape (n,).
        owner: shape (features,), the variable of each feature.
        kernel: hyper-parameters.
        pending: shape (k, features), what is in flight.
    """

    def __init__(
        self,
        x: Features,
        y: Vector,
        owner: NDArray[np.int64],
        kernel: Kernel,
        pending: Features | None = None,
    ) -> None:
        self.kernel = kernel
        self._inverse = 1.0 / kernel.scales[owner]
        every = x if pending is None or not len(pending) else np.vstack([x, pending])
        self._x = every * self._inverse
        gram = _matern(_distances(self._x, self._x))
        self._lower = _cholesky(gram + (kernel.noise + _JITTER) * np.eye(len(every)))
        n = len(x)
        self._alpha = cho_solve((self._lower[:n, :n], True), y, check_finite=False)
        self._y = y

    @property
    def misfit(self) -> float:
        """The signal's variance that fits best."""
        return (float(self._y @ self._alpha) + 1.0) / (len(self._y) + 1)

    @cached_property
    def _gram_inverse(self) -> Matrix:
        return _inverse(self._lower)

    def predict(self, x: Features) -> tuple[Vector, Vector]:
        """Return mean and standard deviation of the noiseless value, each of shape (m,), at ``x``, shape (m, features)."""
        cross = _matern(_distances(self._x, x * self._inverse))
        mean = cross[: len(self._alpha)].T @ self._alpha
        solved = solve_triangular(self._lower, cross, lower=True, check_finite=False)
        variance = 1.0 - np.einsum("ij,ij->j", solved, solved)
        return mean, np.sqrt(self.kernel.signal * np.maximum(variance, 1e-10))

    def slopes(self, x: Vector) -> tuple[float, float, Vector, Vector]:
        """Return mean and standard deviation at ``x``, shape (features,), and their gradients of the same shape."""
        difference = x * self._inverse - self._x
        root = _ROOT5 * np.sqrt((difference * difference).sum(axis=1))
        decay = np.exp(-root)
        cross = (1 + root + root * root / 3) * decay
        moved = (-5.0 / 3.0 * (1 + root) * decay)[:, None] * difference * self._inverse
        n = len(self._alpha)
        solved = self._gram_inverse @ cross
        variance = max(1.0 - float(cross @ solved), 1e-10)
        std = float(np.sqrt(self.kernel.signal * variance))
        dstd = -self.kernel.signal / std * (solved @ moved)
        return float(cross[:n] @ self._alpha), std, self._alpha @ moved[:n], dstd


def _distances(a: Matrix, b: Matrix) -> Matrix:
    """Euclidean distances, shape (len(a), len(b))."""
    squared = (a * a).sum(axis=1)[:, None] + (b * b).sum(axis=1) - 2 * (a @ b.T)
    return np.asarray(np.sqrt(np.maximum(squared, 0.0)), dtype=np.float64)


def _matern(distance: Matrix) -> Matrix:
    root = _ROOT5 * distance
    return np.asarray((1 + root + root * root / 3) * np.exp(-root), dtype=np.float64)


def _cholesky(gram: Matrix) -> Matrix:
    """The lower factor, with as much on the diagonal as it takes."""
    jitter = 0.0
    for _ in range(6):
        lower, failed = lapack.dpotrf(gram + jitter * np.eye(len(gram)) if jitter else gram, lower=1)
        if not failed:
            return np.asarray(lower, dtype=np.float64)
        jitter = max(10 * jitter, 1e-7)
    raise ValueError("a kernel matrix is not positive definite")  # only with values that are not finite


def _inverse(lower: Matrix) -> Matrix:
    """The inverse of the matrix whose lower factor is given."""
    half, _ = lapack.dpotri(lower, lower=1)
    return np.asarray(np.tril(half) + np.tril(half, -1).T, dtype=np.float64)
