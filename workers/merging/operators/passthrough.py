"""Passthrough: one model as it is, or scaled; what stacks of layers are made from."""

from __future__ import annotations

from torch import Tensor

from workers.merging.blocks import weighted_sum
from workers.merging.operator import Parameter, operator


@operator(
    "passthrough",
    summary="Takes one model's weights as they are, times the scale.",
    reference="mergekit's passthrough (frankenmerging)",
    columns="scale",
    high=2.0,
    uses_base=False,
    max_experts=1,
    elementwise=True,
    linear=True,
)
def passthrough(parameter: Parameter, out: Tensor) -> None:
    """Compute scale · θ; bit for bit the model's with scale 1; see `MergeFunction`."""
    weighted_sum(out, parameter.models, parameter.coefficients)
