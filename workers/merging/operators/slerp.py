"""Spherical linear interpolation between two models, tensor by tensor."""

from __future__ import annotations

import math

from pydantic import Field
from torch import Tensor

from workers.merging.blocks import dot, weighted_sum
from workers.merging.operator import Options, Parameter, operator

SMALLEST_NORM = 1e-8


class SlerpOptions(Options):
    """Options of `slerp`."""

    lerp_threshold: float = Field(
        default=0.9995, ge=0, le=1, description="Cosine from which on the two tensors are interpolated linearly."
    )


@operator(
    "slerp",
    summary="Moves from one model to the other along the arc between their tensors.",
    reference="Shoemake, Animating rotation with quaternion curves, SIGGRAPH 1985; per tensor as in mergekit",
    options=SlerpOptions,
    columns="interpolation",
    uses_base=False,
    max_experts=2,
)
def slerp(parameter: Parameter, out: Tensor) -> None:
    """Compute sin((1−t)Ω)/sin Ω · a + sin(tΩ)/sin Ω · b, Ω the angle between a and b; see `MergeFunction`.

    Linear where |cos Ω| exceeds the threshold (as mergekit does) or one tensor is all but zero and has no direction
    (where mergekit takes a right angle).
    """
    first, second = parameter.models
    (t,) = parameter.coefficients
    weighted_sum(out, parameter.models, _weights(first, second, t, parameter.options.lerp_threshold))


def _weights(first: Tensor, second: Tensor, t: float, threshold: float) -> tuple[float, float]:
    if t in (0.0, 1.0):  # the end points are exact, whatever the angle
        return 1.0 - t, t
    norms = math.sqrt(dot(first, first)), math.sqrt(dot(second, second))
    if min(norms) <= SMALLEST_NORM:
        return 1.0 - t, t
    cosine = dot(first, second) / (norms[0] * norms[1])
    if abs(cosine) > threshold:
        return 1.0 - t, t
    angle = math.acos(max(-1.0, min(1.0, cosine)))
    return math.sin((1.0 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)
