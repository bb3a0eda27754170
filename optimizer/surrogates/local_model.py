"""A quadratic model of a loss around a point, from few evaluations that need not lie well."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

Vector = NDArray[np.float64]
Matrix = NDArray[np.float64]

_LINEAR = 1e3
_RIDGE = 1e-6
_PENALTIES = (0.0, *np.geomspace(1e-3, 1e3, 13))
_SLACK = 1.05
_ITERATIONS = 60
_UNCERTAIN = 0.01


class LocalModel:
    """The flattest quadratic through some points: that whose Hessian has the least Frobenius norm.

    Powell's model (2004, Least Frobenius norm updating, Math. Program. 100) interpolates with the kernel ½(s·s')² and a free
    linear part. Points that do not span the space leave the linear part open: it has a kernel of its own here, with so
    much more weight that a slope explains what it can before any curvature does.

    Args:
        steps: shape (n, dim): the points, from the centre, in units of the radius.
        values: shape (n,).
    """

    def __init__(self, steps: Matrix, values: Vector) -> None:
        count = len(steps)
        products = steps @ steps.T
        kernel = 0.5 * products**2 + _LINEAR * products + _RIDGE * count * np.eye(count)
        ones = np.ones((count, 1))
        system = np.block([[kernel, ones], [ones.T, np.zeros((1, 1))]])
        scale = max(float(np.ptp(values)), 1e-12)
        wanted = np.append((values - values.min()) / scale, 0.0)
        self._steps = steps
        self._weights = np.linalg.solve(system, wanted)[:-1]

    def __call__(self, step: Vector) -> tuple[float, Vector]:
        """Return value and slope at a step, up to a positive factor and a constant."""
        products = self._steps @ step
        value = self._weights @ (0.5 * products**2 + _LINEAR * products)
        return float(value), self._steps.T @ (self._weights * (products + _LINEAR))

    def minimum(self, radius: float, low: Vector, high: Vector) -> Vector:
        """Return the step of least value that is no longer than ``radius`` (by 5 % at most) and inside the bounds."""
        step = np.zeros(len(low))
        for penalty in _PENALTIES:
            step = self._penalised(penalty, low, high)
            if np.linalg.norm(step) <= _SLACK * radius:
                return step
        return step * radius / float(np.linalg.norm(step))

    def _penalised(self, penalty: float, low: Vector, high: Vector) -> Vector:
        def downhill(step: Vector) -> tuple[float, Vector]:
            value, slope = self(step)
            return value + 0.5 * penalty * float(step @ step), slope + penalty * step

        found = minimize(
            downhill,
            np.zeros(len(low)),
            jac=True,
            method="L-BFGS-B",
            bounds=np.column_stack([low, high]),
            options={"maxiter": _ITERATIONS},
        )
        return np.asarray(found.x, dtype=np.float64)


def unknown(steps: Matrix, dim: int) -> Vector:
    """Return how little some steps, shape (n, dim), say of the slope along each axis, shape (dim,): 1 nothing, 0 all.

    It is the variance of the slope given the steps' differences, where it was 1 before; how long they are is no matter.
    """
    lengths = np.linalg.norm(steps, axis=1)
    directions = steps[lengths > 0] / lengths[lengths > 0, None]
    precision = directions.T @ directions / _UNCERTAIN + np.eye(dim)
    return np.array(np.diag(np.linalg.inv(precision)))
