"""NuSLERP: spherical interpolation of weights or of task vectors, of whole tensors or line by line."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from workers.merging.blocks import weighted_sum
from workers.merging.grams import Origin, gram, line_products, line_sum
from workers.merging.operator import Numbers, Options, Parameter, Whole, operator

SMALLEST_NORM = 1e-7
SMALLEST_SINE = 1e-8


class NuSlerpOptions(Options):
    """Options of `nuslerp`."""

    origin: Origin = Field(
        default="zero",
        description="`zero` interpolates the weights, `base` the task vectors, which the base is added to.",
    )
    angle: Literal["tensor", "row", "column"] = Field(
        default="tensor",
        description=(
            "What has an angle of its own: the whole `tensor`; each `row` (last dimension; mergekit's nuslerp_flatten: "
            "false); or each `column` (first dimension; mergekit's nuslerp_row_wise: true)."
        ),
    )


@operator(
    "nuslerp",
    summary="Moves from one model to the other along arcs between their weights or task vectors, whole or line by line.",
    reference="mergekit's nuslerp; Shoemake, Animating rotation with quaternion curves, SIGGRAPH 1985",
    options=NuSlerpOptions,
    columns="interpolation",
    max_experts=2,
    elementwise=True,
)
def nuslerp(parameter: Parameter, out: Tensor) -> None:
    """Compute sin((1−t)Ω)/sin Ω · a + sin(tΩ)/sin Ω · b, for task vectors a and b plus the base; see `MergeFunction`.

    t is mergekit's w₂ / (w₁ + w₂). Linear where sin Ω is below 1e-8 only, so arcs of nearly equal models are followed
    too. A vector of norm below 1e-7 stands almost at a right angle to every other, as in mergekit. The rows of biases
    and norms are the whole vectors; a number is a vector of one entry.
    """
    (t,) = parameter.coefficients
    origin, angle = parameter.options.origin, parameter.options.angle
    if t in (0.0, 1.0) or out.numel() == 0:
        out.copy_(parameter.models[int(t)])
        return
    if angle == "tensor":
        first, second = _weights(_cosine(torch.from_numpy(gram(parameter, origin))), t).tolist()
        own = 1.0 - first - second if origin == "base" else 0.0
        weighted_sum(out, [parameter.ancestor, *parameter.models], [own, first, second])
        return

    def compute(whole: Whole) -> Numbers:
        return {"cosine": _cosine(line_products(whole[1], angle, whole[0] if origin == "base" else None))}

    found = parameter.facts.of_tensor("line_cosines", compute, settings={"origin": origin, "angle": angle})
    first, second = _weights(found["cosine"], t)
    if origin == "base":
        own = 1.0 - first - second
        line_sum(parameter, out, [parameter.ancestor, *parameter.models], [own, first, second], angle)
    else:
        line_sum(parameter, out, parameter.models, [first, second], angle)


def _cosine(products: Tensor) -> Tensor:
    """Cosines from inner products of shape (2, 2) or (2, 2, lines)."""
    norms = [products[number, number].sqrt().clamp(min=SMALLEST_NORM) for number in (0, 1)]
    return (products[0, 1] / (norms[0] * norms[1])).clamp(-1.0, 1.0)


def _weights(cosine: Tensor, t: float) -> Tensor:
    """The weights of the two models, stacked."""
    straight = 1.0 - cosine.square() <= SMALLEST_SINE**2
    angle = torch.acos(torch.where(straight, 0.0, cosine))
    plain = torch.ones_like(cosine)
    first = torch.where(straight, (1.0 - t) * plain, torch.sin((1.0 - t) * angle) / torch.sin(angle))
    second = torch.where(straight, t * plain, torch.sin(t * angle) / torch.sin(angle))
    return torch.stack([first, second])
