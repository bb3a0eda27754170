"""Multi-SLERP: barycentric interpolation of any number of models on a sphere."""

from __future__ import annotations

import math

import numpy as np
from pydantic import Field
from torch import Tensor

from optimizer.errors import InfeasibleCandidate
from workers.merging.blocks import weighted_sum
from workers.merging.grams import Matrix, Origin, gram
from workers.merging.kernels import merge_sparse
from workers.merging.kernels.terms import Limits, Term
from workers.merging.operator import Options, Parameter, operator

SMALLEST_SUM = 1e-8


class MultiSlerpOptions(Options):
    """Options of `multislerp`."""

    origin: Origin = Field(
        default="zero",
        description="`zero` interpolates the weights, `base` the task vectors, which the base is added to.",
    )
    normalise: bool = Field(default=True, description="Divide the coefficients by their sum.")
    eps: float = Field(
        default=1e-8, gt=0, le=1e-2, description="Added to norms; a mean direction shorter than this does not count."
    )


@operator(
    "multislerp",
    summary="Averages the directions of the experts on a sphere, and their norms.",
    reference="Goddard, Multi-SLERP, goddard.blog/posts/multislerp-wow-what-a-cool-idea; as in mergekit",
    options=MultiSlerpOptions,
    elementwise=True,
)
def multislerp(parameter: Parameter, out: Tensor) -> None:
    """Compute Σ w_i |v_i| · m / |m| with m = Σ w_i v_i / |v_i|, v_i a tensor or its task vector; see `MergeFunction`.

    The method's step in the tangent space at m / |m| is Σ w_i (u_i − ⟨u_i, m/|m|⟩ m/|m|) = m − m, always zero, so what
    remains is this mean; mergekit adds ``eps`` to the step's length, hence the factor cos(eps). All norms and products
    are facts of the models: a candidate costs one weighted sum. Without any coefficient the result is the base.

    Raises:
        InfeasibleCandidate: with ``normalise`` the coefficients sum to almost nothing, or the directions cancel out (two
            that do are interpolated linearly, as in mergekit).
    """
    options: MultiSlerpOptions = parameter.options
    used = [number for number, weight in enumerate(parameter.coefficients) if weight != 0.0]
    if not used:
        out.copy_(parameter.ancestor)
        return
    weights = np.array([parameter.coefficients[number] for number in used])
    if options.normalise:
        total = math.fsum(weights)
        if abs(total) < SMALLEST_SUM:
            raise InfeasibleCandidate(f"the coefficients sum to {total:g}, so the average is not defined")
        weights = weights / total
    if len(parameter.models) == 1 or (len(used) == 1 and options.normalise):
        factors = np.ones(1)
    else:
        factors = _factors(gram(parameter, options.origin)[np.ix_(used, used)], weights, options.eps)
    chosen = [parameter.models[number] for number in used]
    if options.origin == "zero" or factors.tolist() == [1.0]:
        weighted_sum(out, chosen, factors.tolist())
    else:
        # Short task vectors have large factors, so differences are taken before anything is multiplied.
        terms = [Term(model, 1.0, Limits(), factor) for model, factor in zip(chosen, factors.tolist(), strict=True)]
        merge_sparse(out, parameter.ancestor, terms)


def _factors(products: Matrix, weights: Matrix, eps: float) -> Matrix:
    """What each vector is multiplied by."""
    norms = np.sqrt(np.diag(products))
    mean = weights / (norms + eps)
    length = math.sqrt(max(0.0, float(mean @ products @ mean)))
    if length < eps:
        if len(weights) == 2 or not norms.any():
            return weights
        raise InfeasibleCandidate("the experts' directions cancel each other out, so they have no mean on the sphere")
    out: Matrix = mean / length * (math.cos(eps) * float(weights @ norms))
    return out
