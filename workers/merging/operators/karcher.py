"""Karcher mean: the point of a sphere with the least sum of squared distances to the experts."""

from __future__ import annotations

import math

import numpy as np
from pydantic import Field
from torch import Tensor

from optimizer.errors import InfeasibleCandidate
from workers.merging.blocks import weighted_sum
from workers.merging.grams import Matrix, gram
from workers.merging.operator import Options, Parameter, operator

SMALLEST_SUM = 1e-8


class KarcherOptions(Options):
    """Options of `karcher`."""

    max_iter: int = Field(default=10, ge=0, le=1000, description="Largest number of steps.")
    tol: float = Field(
        default=1e-5,
        gt=0,
        le=0.1,
        description="Length of a step at which the search ends, and of a vector without direction.",
    )


@operator(
    "karcher",
    summary="Averages the experts along the sphere that their directions lie on.",
    reference="Karcher, Riemannian center of mass and mollifier smoothing, 1977; as in mergekit",
    options=KarcherOptions,
    uses_base=False,
    elementwise=True,
)
def karcher(parameter: Parameter, out: Tensor) -> None:
    """Compute the weighted Karcher mean of the directions, times the weighted mean of the norms; see `MergeFunction`.

    mergekit's method weighs all models alike; its inner function takes weights as this does. Every iterate is a linear
    combination of the experts, so the search runs on their inner products alone, which are facts: a candidate costs one
    weighted sum.

    Raises:
        InfeasibleCandidate: the coefficients sum to almost nothing.
    """
    total = math.fsum(parameter.coefficients)
    if abs(total) < SMALLEST_SUM:
        raise InfeasibleCandidate(f"the coefficients sum to {total:g}, so the average is not defined")
    used = [number for number, weight in enumerate(parameter.coefficients) if weight != 0.0]
    weights = np.array([parameter.coefficients[number] for number in used]) / total
    if len(used) == 1:
        factors = np.ones(1)
    else:
        factors = _factors(gram(parameter, "zero")[np.ix_(used, used)], weights, parameter.options)
    weighted_sum(out, [parameter.models[number] for number in used], factors.tolist())


def _factors(products: Matrix, weights: Matrix, options: KarcherOptions) -> Matrix:
    """What each expert is multiplied by."""
    norms = np.sqrt(np.diag(products))
    valid = np.flatnonzero(norms > options.tol)
    factors = np.zeros(len(weights))
    if not len(valid):
        return factors
    share = float(weights[valid].sum())
    if abs(share) < SMALLEST_SUM:
        raise InfeasibleCandidate("the coefficients of the experts that are not zero sum to almost nothing")
    cosines = products[np.ix_(valid, valid)] / np.outer(norms[valid], norms[valid])
    mean = _mean(cosines, weights[valid] / share, options)
    factors[valid] = mean / norms[valid] * float(weights @ norms)
    return factors


def _mean(cosines: Matrix, weights: Matrix, options: KarcherOptions) -> Matrix:
    """The mean of unit vectors, by its coordinates in them."""
    length = _length(weights, cosines)
    mean = np.eye(len(weights))[0] if length < options.tol else weights / length
    for _ in range(options.max_iter):
        towards = np.clip(cosines @ mean, -1.0, 1.0)
        angles = np.arccos(towards)
        near = angles < options.tol
        steps = np.where(near, 0.0, weights * angles / np.where(near, 1.0, np.sin(angles)))
        tangent = steps - float(steps @ towards) * mean
        step = _length(tangent, cosines)
        if step < options.tol:
            break
        mean = math.cos(step) * mean + math.sin(step) / step * tangent
        length = _length(mean, cosines)
        mean = mean / length if length > options.tol else mean
    return mean


def _length(coordinates: Matrix, cosines: Matrix) -> float:
    return math.sqrt(max(0.0, float(coordinates @ cosines @ coordinates)))
