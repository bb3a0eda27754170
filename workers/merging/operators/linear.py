"""Linear merging, also known as weight averaging or model soup: Σ w_i θ_i / Σ w_i."""

from __future__ import annotations

import math

from pydantic import Field
from torch import Tensor

from optimizer.errors import InfeasibleCandidate
from workers.merging.blocks import weighted_sum
from workers.merging.operator import Options, Parameter, operator

SMALLEST_SUM = 1e-8


class LinearOptions(Options):
    """Options of `linear`."""

    normalise: bool = Field(default=True, description="Divide by the sum of the coefficients.")


@operator(
    "linear",
    summary="Averages the experts' weights with the coefficients as weights.",
    reference="Wortsman et al., Model soups, arXiv 2203.05482",
    options=LinearOptions,
    uses_base=False,
    elementwise=True,
    linear=True,
)
def linear(parameter: Parameter, out: Tensor) -> None:
    """Compute Σ w_i θ_i, divided by Σ w_i with ``normalise``; see `MergeFunction`.

    Raises:
        InfeasibleCandidate: with ``normalise``, the coefficients sum to almost nothing.
    """
    coefficients = parameter.coefficients
    total = math.fsum(coefficients) if parameter.options.normalise else 1.0
    if abs(total) < SMALLEST_SUM:
        raise InfeasibleCandidate(f"the coefficients sum to {total:g}, so the average is not defined")
    weighted_sum(out, parameter.models, [number / total for number in coefficients])
