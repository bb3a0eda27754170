"""Task arithmetic: base + Σ λ_i (θ_i − base)."""

from __future__ import annotations

import math

from torch import Tensor

from workers.merging.blocks import weighted_sum
from workers.merging.operator import Parameter, operator


@operator(
    "task_arithmetic",
    summary="Adds the experts' task vectors to the base, each scaled by its coefficient.",
    reference="Ilharco et al., Editing models with task arithmetic, arXiv 2212.04089",
    elementwise=True,
    linear=True,
    modifier=True,
)
def task_arithmetic(parameter: Parameter, out: Tensor) -> None:
    """Compute base + Σ λ_i (θ_i − base), as (1 − Σ λ_i) base + Σ λ_i θ_i; see `MergeFunction`."""
    weights = parameter.coefficients
    own = math.fsum([1.0, *(-number for number in weights)])
    weighted_sum(out, [parameter.ancestor, *parameter.models], [own, *weights])
