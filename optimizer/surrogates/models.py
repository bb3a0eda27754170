"""Gaussian processes of all losses of a search, and of whether constraints hold."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from optimizer.surrogates.archive import Observed
from optimizer.surrogates.encoding import Encoding, Features, Units
from optimizer.surrogates.gaussian_process import GaussianProcess, Kernel, fit_kernel, squash

Vector = NDArray[np.float64]
Matrix = NDArray[np.float64]

FITTED = 200
"""Observations that hyper-parameters are fitted to, at most."""


@dataclass(frozen=True)
class Kernels:
    """Hyper-parameters of all models.

    Attributes:
        losses: one for each objective.
        limits: of the model of violations; None where nothing was violated.
    """

    losses: tuple[Kernel, ...]
    limits: Kernel | None


def fit_kernels(encoding: Encoding, observed: Observed) -> Kernels:
    """Fit the hyper-parameters to some outcomes, at most `FITTED` of them: the latest and the best."""
    measured = observed.where(observed.measured)
    chosen = measured.where(latest_and_best(measured, FITTED))
    x, values = encoding.features(chosen.units), standardised(chosen.losses)
    losses = tuple(fit_kernel(x, column, encoding.owner) for column in values.T)
    limits = None
    signs = limit_values(observed)
    if np.ptp(signs) > 0:
        some = latest(len(observed), FITTED)
        x, y = encoding.features(observed.units[some]), signs[some]
        limits = fit_kernel(x, (y - y.mean()) / max(float(y.std()), 1e-9), encoding.owner)
    return Kernels(losses, limits)


class Models:
    """The posteriors, given outcomes and what is in flight. All losses are squashed and standardised.

    Args:
        observed: outcomes, of which at least one has losses.
        pending: shape (k, dim), units of what is in flight.
        most: observations to take into account, at most: the latest and the best.

    Attributes:
        best: shape (n, objectives), the posterior means at the feasible observations and at what is in flight.
        limited: whether the last model predicts violations; it is below 0 where the constraints hold.
    """

    def __init__(self, encoding: Encoding, observed: Observed, pending: Units, kernels: Kernels, most: int) -> None:
        self._encoding = encoding
        measured = observed.where(observed.measured)
        measured = measured.where(latest_and_best(measured, most))
        flying = encoding.features(pending)
        x, values = encoding.features(measured.units), standardised(measured.losses)
        self._processes = [
            GaussianProcess(x, column, encoding.owner, kernel, flying)
            for column, kernel in zip(values.T, kernels.losses, strict=True)
        ]
        known = np.vstack([x[measured.feasible], flying])
        self.best = np.column_stack([process.predict(known)[0] for process in self._processes])
        self.limited = kernels.limits is not None
        if kernels.limits is not None:
            some = latest(len(observed), most)
            y = limit_values(observed)[some]
            spread = max(float(y.std()), 1e-9)
            limits = GaussianProcess(
                encoding.features(observed.units[some]), (y - y.mean()) / spread, encoding.owner, kernels.limits, flying
            )
            self._processes.append(limits)
            self._zero = y.mean() / spread

    def predict(self, units: Units) -> tuple[Matrix, Matrix]:
        """Return means and standard deviations, each of shape (n, models), at units of shape (n, dim)."""
        x = self._encoding.features(units)
        found = [process.predict(x) for process in self._processes]
        mean = np.column_stack([mean for mean, _ in found])
        if self.limited:
            mean[:, -1] += self._zero
        return mean, np.column_stack([std for _, std in found])

    def slopes(self, x: Features) -> tuple[Vector, Vector, Matrix, Matrix]:
        """Return means and deviations, shape (models,), and their gradients, (models, features), at one point."""
        found = [process.slopes(x) for process in self._processes]
        mean, std = np.array([each[0] for each in found]), np.array([each[1] for each in found])
        if self.limited:
            mean[-1] += self._zero
        return mean, std, np.array([each[2] for each in found]), np.array([each[3] for each in found])


def standardised(losses: Matrix) -> Matrix:
    """Return losses, shape (n, m), squashed, with mean 0 and variance 1."""
    values = squash(losses)
    spread = values.std(axis=0)
    return np.asarray((values - values.mean(axis=0)) / np.where(spread > 1e-12, spread, 1.0), dtype=np.float64)


def limit_values(observed: Observed) -> Vector:
    """Return what the model of violations is fitted to, shape (n,): -1 where they hold, above 0 where they do not.

    Failures count as gross violations. Only the sum of violations is known, and no slack, hence no true zero.
    """
    typical = observed.violation[np.isfinite(observed.violation) & (observed.violation > 0)]
    middle = float(np.median(typical)) if len(typical) else 1.0
    amount = np.where(np.isfinite(observed.violation), observed.violation, np.inf)
    share = 1 - 1 / (1 + amount / middle)
    values = np.where(observed.violation > 0, 0.5 + share, -1.0)
    return np.asarray(np.where(observed.measured, values, 1.5), dtype=np.float64)


def latest(count: int, most: int) -> NDArray[np.int64]:
    """Return the places of the latest outcomes, in order."""
    return np.arange(max(0, count - most), count)


def latest_and_best(observed: Observed, most: int) -> NDArray[np.int64]:
    """Return the places of at most so many outcomes, in order: the best half in any objective, and the latest."""
    count = len(observed)
    if count <= most:
        return np.arange(count)
    ranks = np.argsort(np.argsort(observed.losses, axis=0, kind="stable"), axis=0).min(axis=1)
    ranks = ranks + count * ~observed.feasible
    chosen = np.zeros(count, dtype=bool)
    chosen[np.argsort(ranks, kind="stable")[: most // 2]] = True
    rest = np.flatnonzero(~chosen)
    chosen[rest[len(rest) - (most - int(chosen.sum())) :]] = True
    return np.flatnonzero(chosen)
