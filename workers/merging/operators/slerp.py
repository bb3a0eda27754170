"""Spherical linear interpolation between two models, tensor by tensor or with one angle for the whole model."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field
from torch import Tensor

from workers.merging.blocks import weighted_sum
from workers.merging.grams import Matrix, gram, model_gram
from workers.merging.operator import Options, Parameter, operator

SMALLEST_NORM = 1e-8


class SlerpOptions(Options):
    """Options of `slerp`."""

    lerp_threshold: float = Field(
        default=0.9995, ge=0, le=1, description="Cosine from which on the two models are interpolated linearly."
    )
    scope: Literal["tensor", "model"] = Field(
        default="tensor",
        description="`tensor` takes the angle between the two tensors, `model` the one between all weights together.",
    )
    no_direction: Literal["linear", "right_angle"] = Field(
        default="linear",
        description=(
            "What is done where one of the two is all but zero (norm below 1e-8): interpolate linearly, or as if they "
            "stood at a right angle, as mergekit does."
        ),
    )


@operator(
    "slerp",
    summary="Moves from one model to the other along the arc between their tensors.",
    reference="Shoemake, Animating rotation with quaternion curves, SIGGRAPH 1985; per tensor as in mergekit",
    options=SlerpOptions,
    columns="interpolation",
    uses_base=False,
    max_experts=2,
    elementwise=True,
)
def slerp(parameter: Parameter, out: Tensor) -> None:
    """Compute sin((1−t)Ω)/sin Ω · a + sin(tΩ)/sin Ω · b, Ω the angle between a and b; see `MergeFunction`.

    Linear where |cos Ω| exceeds the threshold, as mergekit does. The angle is a fact of the two models, so a candidate
    costs one weighted sum; with ``scope="model"`` the two are flat vectors of all shared parameters, as in M2N2
    (arXiv 2508.16204), where different ranges have different t.
    """
    (t,) = parameter.coefficients
    weights = (1.0 - t, t)
    if t not in (0.0, 1.0):  # the end points are exact, whatever the angle
        products = (gram if parameter.options.scope == "tensor" else model_gram)(parameter, "zero")
        weights = _weights(products, t, parameter.options)
    weighted_sum(out, parameter.models, weights)


def _weights(products: Matrix, t: float, options: SlerpOptions) -> tuple[float, float]:
    norms = [math.sqrt(products[number, number]) for number in (0, 1)]
    if min(norms) <= SMALLEST_NORM:
        if options.no_direction == "linear":
            return 1.0 - t, t
        norms = [norm if norm > SMALLEST_NORM else 1.0 for norm in norms]
    cosine = float(products[0, 1]) / (norms[0] * norms[1])
    if abs(cosine) > options.lerp_threshold:
        return 1.0 - t, t
    angle = math.acos(max(-1.0, min(1.0, cosine)))
    return math.sin((1.0 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)
